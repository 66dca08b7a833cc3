"""README.md, docs/ and CONTRIBUTING.md are checked: tables, figures, commands, flags, paths."""

import importlib
import re
import runpy
import shlex

import pytest

import test as size_report
from benchmarks import tables
from config_model import ModelConfig, PredictConfig, TrainConfig
from prepare_data import parse_options
from runtime.base import cli
from runtime.checkpoint.write import save_checkpoint
from runtime.data.tokenizers import load_tokenizer
from tests.builders import random_model, tiny_config
from tests.conftest import REPO
from tests.mutants import MUTANTS, names

README = (REPO / "README.md").read_text(encoding="utf-8")
PAGES = {
    path: path.read_text(encoding="utf-8") for path in [*tables.pages(), REPO / "CONTRIBUTING.md"]
}
ABLATIONS, CHANGELOG = REPO / "benchmarks" / "ABLATIONS.md", REPO / "CHANGELOG.md"
TEXT = "\n".join(PAGES.values())
MAKEFILE = (REPO / "Makefile").read_text(encoding="utf-8")
COMMANDS = sorted(
    {
        *re.findall(r"^python .*$", TEXT, re.MULTILINE),
        *re.findall(r"`(python [^`\n]+)`", TEXT),
    }
)
# All commands that print their flags.
SCRIPTS = ["prepare_data", "train", "predict", "test"] + [
    f"scripts.{path.stem}" for path in (REPO / "scripts").glob("[a-z]*.py")
]
# A generated table has the words of its code, a block of code has none of ours.
NOT_PROSE = r"```.*?```|<!-- ([\w. ]+)\b[^>]*-->.*?<!-- /\1 -->|^\|.*?$|^>.*?$"
# What house style writes otherwise.
HOUSE_WORDS = (
    r"\b(the reference|anew|goes on|go on|beside|behind|besides|refused|look-up|gates"
    r"|position table|selection bias|native)\b"
)


def between(name: str) -> str:
    """Return what stands between a table's marks; each is in one place."""
    (found,) = re.findall(rf"<!-- {name}(?::.*?)? -->\n(.*?)<!-- /{name} -->", TEXT, re.DOTALL)
    return found.strip()


def test_the_preset_table_is_computed():
    """Paste the output of `python test.py --presets` if this fails."""
    assert between("presets") == "\n".join(size_report.preset_table())


@pytest.mark.parametrize("name", tables.TABLES)
def test_each_table_is_what_the_stored_results_say(name):
    """Run `python -m benchmarks.tables` if this fails."""
    assert between(name) == tables.TABLES[name]()


def test_every_table_has_one_place(tmp_path):
    """A marker that no page has, or two, stops the writing before any page is changed."""
    one, two = tmp_path / "one.md", tmp_path / "two.md"
    one.write_text("<!-- a -->\nold\n<!-- /a -->\n")
    two.write_text("<!-- b -->\nold\n<!-- /b -->\n")
    tables.write_tables({"a": "new a", "b": "new b"}, [one, two])
    assert one.read_text() == "<!-- a -->\nnew a\n<!-- /a -->\n"
    assert two.read_text() == "<!-- b -->\nnew b\n<!-- /b -->\n"
    with pytest.raises(ValueError, match="<!-- c --> .* no document"):
        tables.write_tables({"a": "newer", "c": "x"}, [one, two])
    two.write_text(one.read_text())
    with pytest.raises(ValueError, match=r"<!-- a --> .* one\.md, two\.md"):
        tables.write_tables({"a": "newer"}, [one, two])
    assert "new a" in one.read_text()


def test_the_mutants_it_counts_are_those_there_are():
    """The README said 203 of 203 when there were 217: the stored run was of an older list."""
    result = tables.stored("mutants")
    tried = [(one["id"], one["what"]) for one in result["mutants"] if one["caught"]]
    stale = (
        "run `python -m tests.mutants`, then `python -m benchmarks.tables`: "
        "benchmarks/results/mutants.json or docs/reliability.md is of another list of mutants"
    )
    assert result["made"] == result["caught"] == len(MUTANTS), stale
    assert tried == [(name, one.what) for name, one in zip(names(), MUTANTS, strict=True)], stale
    counts = re.findall(r"Mutants: (\d+) of (\d+) caught", TEXT)
    assert counts == [(str(len(MUTANTS)), str(len(MUTANTS)))], stale


def test_figures_in_sentences_are_the_stored_ones():
    shares = {"ours": [], "plain": [], "hf_compiled": []}
    for name in tables.DECODING:
        decode, prefill = tables._decoding(tables.stored(name))
        one = {
            side: round(100 * v["share_of_bandwidth"])
            for side, v in decode[1].items()
            if "share_of_bandwidth" in v
        }
        shares["ours"].append(one["ours"])
        shares["hf_compiled"].append(one["hf_compiled"])
        torch_sides = ("ours_torch", "plain", "hf_eager", "hf_grouped", "hf_batched")
        shares["plain"] += [one[side] for side in torch_sides if side in one]
    low, high = ({k: f(v) for k, v in shares.items()} for f in (min, max))
    performance = PAGES[REPO / "docs" / "performance.md"]
    for text in (README, performance):
        assert f"{low['ours']} to {high['ours']} %" in text
    assert f"{low['plain']} to {high['plain']} % of its speed" in performance
    assert f"compiled ones {low['hf_compiled']} to {high['hf_compiled']} %" in performance
    steps = [tables.stored(name)["variants"] for name in ("train_cpu_4x512", "train_cpu_1x2048")]
    gains = [round(100 * v["ours_compiled"]["ratio_to"]["hf_grouped"] - 100) for v in steps]
    assert f"`--compile` is {min(gains)} to {max(gains)} % faster" in performance
    large = tables.stored("train_cpu_200k")["variants"]
    memory = [large[side]["peak_above_states_bytes"] for side in ("loop", "ours")]
    assert f"{memory[0] / memory[1]:.0f} times the memory" in performance


def test_every_picture_and_file_it_names_is_there():
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), (page.name, target)
    architecture = PAGES[REPO / "docs" / "architecture.md"]
    files = re.findall(r"^(\w+\.py|\w+/) ", architecture, re.MULTILINE)
    assert len(files) == 11
    for name in files:
        assert (REPO / name).exists(), name
    for name in re.findall(r"`(\w+\*?\w*\.json)`", TEXT):
        is_stored = any((REPO / "benchmarks" / "results").glob(name))
        assert is_stored or name in ("metrics.json", "tokenizer_config.json"), name


def paths_not_there(text: str) -> list[str]:
    """Return the paths of this repository that a text names, and that do not exist."""
    tops = "benchmarks|docs|public|runtime|scripts|tests"
    paths = re.findall(rf"`((?:{tops})/[\w./*-]*)`", text)
    targets = re.findall(r"(?:^|`)make ([a-z][\w-]*)", text, re.MULTILINE)
    return sorted({path for path in paths if not any(REPO.glob(path.rstrip("/")))}) + [
        f"make {target}" for target in targets if f"\n{target}:" not in MAKEFILE
    ]


@pytest.mark.parametrize("page", tables.pages(), ids=lambda page: page.name)
def test_every_path_it_names_is_there(page):
    assert paths_not_there(PAGES[page]) == []


def test_every_path_of_contributing_is_there():
    assert paths_not_there(PAGES[REPO / "CONTRIBUTING.md"]) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_it_shows_is_understood(command, tmp_path, monkeypatch, capsys):
    """Flags and values are parsed by the script's own parser (nothing is run).

    The text files that it names are made.
    """
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command, comments=True)
    for name in words:
        if name.endswith("/") or re.search(r"\.(?:jsonl|csv|txt)(?:\.gz)?$", name):
            # A folder has a file; a pattern matches one.
            path = tmp_path / (f"{name}a.txt" if name.endswith("/") else name.replace("*", "a"))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    if words[1:3] == ["-m", "pytest"] or words[1:3] == ["-m", "venv"]:
        return
    script, flags = (words[2], words[3:]) if words[1] == "-m" else (words[1], words[2:])
    path = REPO / (script.replace(".", "/") + ".py" if words[1] == "-m" else script)
    assert path.exists()
    if script == "prepare_data.py":
        parse_options(flags)
    elif script == "train.py":
        parser = cli.parser("")
        cli.add_config_flags(parser, ModelConfig, TrainConfig)
        flags = [flag for flag in flags if flag != "--help"]
        settings = cli.settings_from(parser.parse_args(flags), ModelConfig, TrainConfig)
        settings.build(ModelConfig)
        settings.build(TrainConfig)
    elif script == "predict.py":
        parser = cli.parser("")
        parser.add_argument("--prompt")
        cli.add_fields(parser, PredictConfig)
        given = vars(
            parser.parse_args(re.findall(r"(?:\"[^\"]*\"|\S)+", re.sub(r"\s+#.*", "", command))[2:])
        )
        PredictConfig(**{k: v for k, v in given.items() if k != "prompt"})
    elif script.startswith("scripts."):
        with pytest.raises(SystemExit):
            importlib.import_module(script).main(["--help"])
        known = capsys.readouterr().out
        assert all(re.search(rf"{flag}\b", known) for flag in flags if flag.startswith("--"))
    elif script.startswith(("benchmarks.", "tests.")):
        source = path.read_text(encoding="utf-8")
        assert all(f'"{flag}"' in source for flag in flags if flag.startswith("--"))


def test_every_flag_it_names_is_one(capsys):
    # benchmarks.gpu's, and that of the field which CONTRIBUTING.md's example adds.
    # And one of pip, and one of the mutants' runner.
    known = {"--name", "--out", "--tiny", "--second", "--shared_d_ff", "--extra-index-url"}
    known |= {"--left", "--third"}
    for script in SCRIPTS:
        with pytest.raises(SystemExit):
            importlib.import_module(script).main(["--help"])
        known |= set(re.findall(r"--[a-z][\w-]*", capsys.readouterr().out))
    torchrun = importlib.import_module("torch.distributed.run").get_args_parser()
    known |= set(torchrun._option_string_actions)
    # tests/benchmarks/test_recipes.py has the flags of `hf`. Slurm reads the lines with SBATCH.
    ours = re.sub(r"^(hf|lm_eval|#SBATCH) .*$", "", TEXT, flags=re.MULTILINE)
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", ours))
    assert len(named) > 40 and named - known == set()


def test_the_defaults_it_lists_are_the_defaults():
    rows = re.findall(r"\| ([a-z_]+(?:, [a-z_]+)*) \| ([\d.,e -]+?)(?= \||  ?\(| experts)", TEXT)
    assert len(rows) > 8
    for name, value in rows:
        values = [v.strip() for v in re.split(r", (?!\d{3}\b)", value)]
        for field, text in zip(name.split(", "), values, strict=True):
            owner = ModelConfig if hasattr(ModelConfig, field) else TrainConfig
            assert float(getattr(owner, field)) == float(text.replace(",", "")), field


def test_its_python_runs(tmp_path, monkeypatch, capsys):
    """The program under "Use it from Python" loads a checkpoint and continues a text."""
    (program,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    model = random_model(tiny_config(vocabulary_size=260, context_length=128))
    saved = dict(tokenizer_state=load_tokenizer("byte").to_state())
    path = save_checkpoint(
        tmp_path / "checkpoints", 1, model, None, train_config=TrainConfig(), **saved
    )
    path.rename(path.with_name("best.pt"))
    (tmp_path / "program.py").write_text(program, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path("program.py")
    assert names["logits"].shape == (1, 1 + len("Once upon a time"), 260)
    assert 1 <= len(names["drawn"]) <= 50
    ids = [int(token) for token in names["drawn"]]
    assert capsys.readouterr().out == load_tokenizer("byte").decode(ids) + "\n"


def test_lines_it_quotes_are_those_of_the_programs():
    generation = PAGES[REPO / "docs" / "generation.md"]
    (session,) = re.findall(r"```\n(> .*?)```", generation, re.DOTALL)
    source = "".join(
        path.read_text(encoding="utf-8")
        for path in [*REPO.glob("*.py"), *(REPO / "runtime").rglob("*.py")]
    )
    for line in ("taken back; there is no text now", "tokens/s, first after "):
        assert line in session and line in source


def prose(text: str) -> str:
    """Return a page without code, tables, quotations and headings."""
    return re.sub(NOT_PROSE, "\n\n", text, flags=re.DOTALL | re.MULTILINE)


def sentences(text: str) -> list[str]:
    """Return the sentences of a page, and the points of its lists."""
    text = re.sub(r"^#.*$", "", prose(text), flags=re.MULTILINE)
    parts = re.split(r"(?<=[.:?!])\s+|\n\n|\n(?=- )", text)
    return [part for part in parts if len(part.split()) > 2]


@pytest.mark.parametrize(
    "term",
    [
        "REPL",
        "greedy",
        "perplexity",
        "prefix caching",
        "speculative",
        "KV cache",
        "vocabulary",
        "rolls back",
        "host sync",
        "ring buffer",
        "routing weight",
        "expert bias",
        "learned attention bias",
        "prompt-lookup decoding",
        "C kernel",
    ],
)
def test_the_words_of_the_field_are_found(term):
    assert term in TEXT


def test_the_readme_is_a_front_page():
    lines = README.splitlines()
    assert len(lines) <= 200 and len(README.split()) <= 2000
    assert any(line.startswith("![") for line in lines[:6])


@pytest.mark.parametrize("page", [*PAGES, ABLATIONS, CHANGELOG], ids=lambda page: page.name)
def test_it_is_plain_english(page):
    """Short sentences, and no house word. Read the page aloud if this fails."""
    text = page.read_text(encoding="utf-8")
    lengths = [len(sentence.split()) for sentence in sentences(text)]
    assert sum(lengths) / len(lengths) <= 18 and max(lengths) <= 35
    assert re.findall(HOUSE_WORDS, re.sub(r"`[^`]*`", "", prose(text))) == []
    assert prose(text).count(";") < 8
