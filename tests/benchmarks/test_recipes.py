"""docs/recipes.md: its figures are those of the commands it shows, and its claims were tried."""

import re
import shlex

import pytest
from huggingface_hub.cli.hf import app

import test as size_report
from benchmarks import gpu_plan, recipes, tables
from benchmarks.recipes import RECIPES, configs, cost
from config_model import ModelConfig, TrainConfig
from runtime.base import cli
from runtime.base.text import human_bytes, human_count
from runtime.data.sources import own_validation
from runtime.training.plan import make_plan
from runtime.training.task import Task
from tests.conftest import REPO

PAGE = (REPO / "docs" / "recipes.md").read_text(encoding="utf-8")
GIB = 2**30
each_recipe = pytest.mark.parametrize("name", RECIPES)


@each_recipe
def test_it_fits_the_machine_it_is_for(name):
    # A card holds back up to 3 % of its memory, and PyTorch's context takes half a GiB.
    recipe = RECIPES[name]
    room = 0.97 * recipe.memory_gib * GIB - 0.6 * GIB
    assert cost(recipe).memory_bytes < room


@each_recipe
def test_the_text_suffices(name):
    """Only the laptop reads its text more than once, as the README's run does."""
    c = cost(RECIPES[name])
    assert c.trained_tokens <= (2.5 if name == "laptop" else 1) * c.train_tokens
    assert c.val_tokens * 99 >= c.train_tokens * 0.5 or c.val_tokens > 5e6


@each_recipe
def test_memory_and_parameters_are_those_of_the_size_report(name):
    """Two ways to one figure: the recipe's, and what test.py prints for its model."""
    recipe = RECIPES[name]
    _, model, train = configs(recipe)
    report = size_report.report(model, train)
    (row,) = [
        line
        for line in report
        if line.startswith("training, GPU" if recipe.cards else "training, CPU")
    ]
    float32, bfloat16 = re.findall(r"[\d.]+ [KMGT]iB", row)
    c = cost(recipe)
    assert human_bytes(c.memory_bytes) == (bfloat16 if recipe.cards else float32)
    assert human_count(c.parameters) == human_count(size_report.known.counts(model).total)


def test_presets_cost_what_their_table_says():
    """The 80 GB recipe is a preset as it is, so its row is in README.md as well."""
    (row,) = [line for line in size_report.preset_table() if "`gptoss-modern`" in line]
    assert human_bytes(cost(RECIPES["80 GB"]).memory_bytes) in row


def test_a_recipe_with_other_flags_has_other_figures():
    """Each figure follows from the commands, not from a table of its own."""
    recipe = RECIPES["8 GB"]
    before = cost(recipe)

    def changed(**flags) -> recipes.Cost:
        return cost(recipes.dataclasses.replace(recipe, **flags))

    half = changed(train=f"{recipe.train} --max_steps 10000")
    assert half.trained_tokens * 2 == before.trained_tokens and half.flops * 2 == before.flops
    # 200 validations, of 50 micro-batches with 8 sequences of 512 tokens.
    assert before.validated_tokens == 200 * 50 * 8 * 512
    never = changed(train=f"{recipe.train} --val_interval 20001")
    share = never.flops / before.flops
    assert share == pytest.approx(1 / (1 + before.validated_tokens / (3 * before.trained_tokens)))
    wide = changed(prepare=recipe.prepare.replace("bpe:32768", "o200k_base"))
    assert wide.shard_bytes == 2 * before.shard_bytes
    assert wide.parameters - before.parameters == (200_019 - 32_768) * 512
    assert human_bytes(wide.memory_bytes) in "\n".join(size_report.preset_table())
    one = changed(train=f"{recipe.train} --keep_last 1")
    assert one.checkpoints_bytes * 5 == before.checkpoints_bytes * 3
    narrow = changed(export=f"{recipe.export} --dtype bfloat16")
    assert narrow.export_bytes * 2 == before.export_bytes


@each_recipe
def test_train_py_plans_it(name, tmp_path, monkeypatch):
    """Everything that train.py checks before it reads text passes, with the data's vocabulary."""
    monkeypatch.chdir(tmp_path)
    _, model, train = configs(RECIPES[name])
    parser = cli.parser("")
    cli.add_config_flags(parser, ModelConfig, TrainConfig)
    flags = [*shlex.split(RECIPES[name].train), "--device", "cpu", "--dtype", "float32"]
    settings = cli.settings_from(parser.parse_args(flags), ModelConfig, TrainConfig)
    size = model.vocabulary_size
    task = Task()
    task.vocabulary_size = size
    plan = make_plan(settings, lambda config, source: task)
    assert plan.model_config == model and plan.config.max_steps == train.max_steps


@each_recipe
def test_its_lines_are_a_chain(name):
    """Each command reads what the one before it wrote: data/, checkpoints/best.pt."""
    options, _, train = configs(RECIPES[name])
    assert (options.out_dir, train.data_dir, train.ckpt_dir) == ("data", "data", "checkpoints")
    prepare, training, predict, export = RECIPES[name].commands
    assert "--ckpt checkpoints/best.pt " in predict and "--ckpt checkpoints/best.pt " in export
    assert f"<!-- recipe {name} -->\n```\n{prepare}\n{training}\n{predict}\n{export}\n```" in PAGE


def test_the_range_of_utilisation_holds_what_is_predicted():
    low, high = (100 * share for share in recipes.UTILISATION)
    predicted = [
        prediction.of(card)
        for prediction in gpu_plan.training_predictions()
        if prediction.measure == "MFU"
        for card in gpu_plan.CARDS.values()
    ]
    assert len(predicted) >= 6 and low <= min(predicted) and max(predicted) <= high
    assert f"{low:.0f} to {high:.0f} %" in PAGE


def test_a_time_is_flops_over_a_share_of_the_peak():
    (row,) = [line for line in recipes.times_table().splitlines() if "RTX 4090" in line]
    seconds = cost(RECIPES["24 GB"]).flops / (165e12 * 0.4)
    assert f"| {recipes.human_seconds(seconds)} |" in row and 3 < seconds / 3600 < 4


def test_known_losses_are_in_the_page_they_are_from():
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    training = (REPO / "docs" / "training.md").read_text(encoding="utf-8")
    loss = RECIPES["laptop"].known.split()[0]
    assert re.fullmatch(r"\d\.\d{3}", loss) and f"{loss} after 2,500" in readme
    assert "`nano` preset" in readme and "2,500 steps of 4,096 tokens" in readme
    assert re.findall(r"\d\.\d+", RECIPES["published"].known) == ["2.01", "2.2493"]
    assert "2.2493" in training and "about 2.01" in training
    # A run of another recipe would be a result to store, and to show.
    others = {r.known for name, r in RECIPES.items() if name not in ("laptop", "published")}
    assert others == {"no such run exists"}


def test_the_published_run_is_that_of_training_md():
    """The recipe adds --keep_last to docs/training.md's line, and nothing else."""
    line = RECIPES["published"].commands[1].replace(" --keep_last 1", "")
    assert line in (REPO / "docs" / "training.md").read_text(encoding="utf-8").splitlines()


def test_a_dataset_with_a_script_ends_with_the_line_it_quotes(tmp_path, monkeypatch):
    """`datasets` has run no loading scripts since version 4; RedPajama on the Hub has one."""
    (quoted,) = re.findall(r"^error: (dataset togethercomputer/.*)$", PAGE, re.MULTILINE)
    name = "togethercomputer/RedPajama-Data-1T"
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir(parents=True)
    (tmp_path / name / "RedPajama-Data-1T.py").write_text("raise SystemExit('it was run')\n")
    with pytest.raises(ValueError) as error:
        own_validation(name, None, "train")
    assert str(error.value) == quoted


def hub_arguments(line: str) -> dict:
    """Return what huggingface_hub's own parser makes of an `hf` command; nothing is sent."""
    command, context, words = app, None, shlex.split(line)[1:]
    while hasattr(command, "resolve_command"):
        context = command.make_context(None, list(words), parent=context)
        _, command, words = command.resolve_command(context, list(words))
    return command.make_context(None, words, parent=context).params


HUB_LINES = re.findall(r"^hf .*$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("line", HUB_LINES)
def test_hub_commands_are_those_of_the_installed_library(line):
    """Version 1 of huggingface_hub dropped `huggingface-cli`, and `login` became `auth login`."""
    given = [value for value in hub_arguments(line).values() if value]
    assert set(shlex.split(line)[2:3]) - {"login"} <= {str(value) for value in given}


def test_a_wrong_hub_command_would_be_noticed():
    assert len(HUB_LINES) == 4
    for line in ("hf login", "hf upload NAME/my-model my-model . --secret"):
        with pytest.raises(Exception, match="No such"):
            hub_arguments(line)


def test_recipes_are_in_the_tables_that_one_command_writes():
    assert recipes.TABLES.items() <= tables.TABLES.items()
    assert len(recipes.TABLES) == len(RECIPES) + 4
