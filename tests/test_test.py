"""test.py, the size report: its numbers against the module's own, and where they come from."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import test as script
from config_model import (
    PRESETS,
    ModelConfig,
    TrainConfig,
    active_parameters,
    flops_per_token,
    total_parameters,
)
from model import LLM
from model_parts import KVCache
from runtime.base.device import peak_memory_bytes
from runtime.base.text import human_bytes, human_count
from runtime.checkpoint.read import read_config
from runtime.checkpoint.write import save_checkpoint
from runtime.training.memory import training_memory_bytes
from runtime.training.placement import Placement
from runtime.training.traffic import step_collectives
from tests.builders import NEEDS, as_flags, other_value, tiny_config


@pytest.fixture
def report(capsys):
    """Runs test.py's main; gives its lines by their first words (two blanks or more end them)."""

    def run(*argv) -> dict[str, list[str]]:
        assert script.main(list(map(str, argv))) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if line]
        return {
            line.split("  ")[0]: [word.strip() for word in line.split("  ")[1:] if word.strip()]
            for line in lines
        }

    return run


def check(lines: dict, config: ModelConfig, batch_size: int, **train) -> None:
    """Every figure of a report, from the config."""
    with torch.device("meta"):
        model = LLM(config)
    total = sum(p.numel() for p in model.parameters())
    parts = [
        int(values[0].replace(",", ""))
        for name, values in list(lines.items())[1 : list(lines).index("total")]
    ]
    assert sum(parts) == total == int(lines["total"][0].replace(",", ""))
    assert lines["active per token"][0] == f"{active_parameters(config):,}"
    forward = flops_per_token(config)
    assert (
        f"FLOPs per token at {config.context_length} tokens: {human_count(forward)} forward, "
        f"{human_count(3 * forward)} training" in lines
    )
    assert lines["weights"] == [human_bytes(4 * total), human_bytes(2 * total)]
    for where, on_gpu in (("GPU", True), ("CPU", False)):
        needed = [
            human_bytes(
                sum(
                    training_memory_bytes(
                        config, TrainConfig(batch_size=batch_size, **train), b, on_gpu
                    ).values()
                )
            )
            for b in (4, 2)
        ]
        assert lines[f"training, {where}, {batch_size} x {config.context_length}"] == needed
    # What a cache really holds.
    for column, dtype in enumerate((torch.float32, torch.bfloat16)):
        one, full = (
            KVCache(config, 1, tokens, dtype, "meta").num_bytes()
            for tokens in (1, config.context_length)
        )
        assert lines["KV cache per token"][column] == human_bytes(one)
        assert lines["KV cache, full context"][column] == human_bytes(full)


def test_the_default_is_the_published_model_and_its_table_is_named(report):
    """M2: 44 % of the published 3.66 B parameters are the learned attention bias.

    The original implementation never says so.
    """
    lines = report()
    assert lines["total"] == ["3,664,132,435"]
    assert "2.05 B + 1.61 B learned attention bias; see --preset gptoss-modern" in lines
    assert lines["attention bias table"] == ["1,610,612,736", "44.0%"]
    # 2 x 12 blocks x 8 heads x 32 features x 4 bytes.
    assert lines["KV cache per token"] == [
        "24.0 KiB",
        "12.0 KiB",
    ]
    check(lines, ModelConfig(), TrainConfig().batch_size)
    assert report("--preset", "gptoss") == lines


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset(report, name):
    config, train = ModelConfig(**PRESETS[name].model), TrainConfig(**PRESETS[name].train)
    lines = report("--preset", name)
    counted = ("optimizer", "grad_accum", "document_mask")
    check(lines, config, train.batch_size, **{name: getattr(train, name) for name in counted})
    assert any("learned attention bias" in line for line in lines) == config.use_attention_bias


@pytest.mark.parametrize(
    "changes",
    [
        dict(sliding_window=8),
        dict(sliding_window=8, window_pattern="alternating", transformer_blocks=3),
        dict(sliding_window=1000),
        dict(use_attention_bias=True, tie_embeddings=True),
        dict(num_experts=1, top_k=1),
    ],
)
def test_windows_and_options_count_as_the_cache_and_the_module_do(report, changes):
    config = tiny_config(**changes)
    given = {
        f.name: getattr(config, f.name)
        for f in dataclasses.fields(config)
        if getattr(config, f.name) != f.default
    }
    check(report(*as_flags(given), "--batch_size", 3), config, 3)
    check(
        report(
            *as_flags(given), "--batch_size", 3, "--optimizer", "muon", "--activation_checkpointing"
        ),
        config,
        3,
        optimizer="muon",
        activation_checkpointing=True,
    )


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(ModelConfig)])
def test_every_model_flag_reaches_the_report(monkeypatch, name):
    seen = []
    monkeypatch.setattr(
        script, "report", lambda config, train: seen.append((config, train.batch_size)) or []
    )
    value = other_value(ModelConfig, name)
    assert script.main(as_flags(NEEDS.get(name, {}) | {name: value, "batch_size": 7})) == 0
    assert getattr(seen[0][0], name) == value and seen[0][1] == 7


def test_a_toml_file_of_a_run_is_read(report, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        "[model]\nd_model = 64\nnum_heads = 4\nnum_kv_heads = 2\nuse_attention_bias = false\n"
        "[train]\nbatch_size = 5\nlr = 0.1\n"
    )
    config = ModelConfig(d_model=64, num_heads=4, num_kv_heads=2, use_attention_bias=False)
    check(report("--config", path), config, 5)
    check(report("--config", path, "--batch_size", 6), config, 6)


# -------------------------------------------------------------------------------------- checkpoints
@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(
        tmp_path_factory.mktemp("ckpt"),
        3,
        LLM(tiny_config(sliding_window=8)),
        None,
        train_config=TrainConfig(),
        tokenizer_state=None,
    )


def test_a_checkpoint_of_ours_says_what_it_is(report, checkpoint):
    check(report("--ckpt", checkpoint), tiny_config(sliding_window=8), 2)
    check(report("--ckpt", checkpoint, "--batch_size", 9), tiny_config(sliding_window=8), 9)


@pytest.mark.parametrize("name", ["bias_gqa", "nobias_qkvbias"])
def test_a_checkpoint_of_the_reference_says_what_it_is(report, shared_dir, name):
    path = shared_dir / "upstream" / f"{name}.pt"
    lines = report("--ckpt", path)
    check(lines, read_config(path), 2)
    model = torch.load(path, weights_only=True)["model"]
    assert int(lines["total"][0].replace(",", "")) == sum(
        t.numel() for name, t in model.items() if not name.endswith("_cached")
    )


@pytest.mark.parametrize(
    "argv", [["--preset", "nano"], ["--d_model", "64"], ["--no-use_rope"], ["--config", "run.toml"]]
)
def test_a_checkpoint_with_other_settings_is_refused(checkpoint, tmp_path, monkeypatch, argv):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text("[model]\nd_model = 64\n")
    with pytest.raises(
        ValueError, match="--ckpt says what the model is: leave out --preset and the model's flags"
    ):
        script.main(["--ckpt", str(checkpoint), *argv])


def test_files_that_are_no_checkpoint_are_one_line(tmp_path):
    (tmp_path / "x.pt").write_bytes(b"no checkpoint")
    for path, message in (
        (tmp_path, "is a directory"),
        (tmp_path / "y.pt", "no such file"),
        (tmp_path / "x.pt", "not a checkpoint"),
    ):
        with pytest.raises(ValueError, match=message):
            script.main(["--ckpt", str(path)])


def test_an_empty_name_is_not_ignored():
    """`--ckpt "$LATEST"` with the variable unset silently reported on the 3.66 B default."""
    with pytest.raises(ValueError, match="not a checkpoint file"):
        script.main(["--ckpt", ""])


def test_models_that_cannot_be_are_one_line():
    for argv, message in (
        (["--num_heads", "7"], "d_model 1024 is not divisible by num_heads 7"),
        (["--top_k", "99"], "top_k 99 must not exceed"),
        (["--batch_size", "0"], "batch_size must be"),
    ):
        with pytest.raises(ValueError, match=message):
            script.main(argv)


# ------------------------------------------------------------------------------------ what it costs
def test_no_parameter_is_ever_made(report):
    """The report on 3.66 B parameters, and on 100 times as many, is made on the meta device.

    No real tensor is larger than a page.
    """
    real = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            real.extend(
                t.nbytes
                for t in (out if isinstance(out, (tuple, list)) else [out])
                if isinstance(t, torch.Tensor) and not t.is_meta
            )
            return out

    before = peak_memory_bytes(torch.device("cpu"))
    with Watch():
        report()
        lines = report(
            "--transformer_blocks",
            64,
            "--num_experts",
            128,
            "--d_model",
            8192,
            "--d_ff",
            8192,
            "--num_heads",
            64,
            "--no-use_attention_bias",
        )
    assert (
        int(lines["total"][0].replace(",", ""))
        == total_parameters(
            ModelConfig(
                transformer_blocks=64,
                num_experts=128,
                d_model=8192,
                d_ff=8192,
                num_heads=64,
                use_attention_bias=False,
            )
        )
        > 1e12
    )
    assert max(real, default=0) <= 4096
    assert before is None or peak_memory_bytes(torch.device("cpu")) - before < 100 << 20


# --------------------------------------------------------------------------------------- many ranks
def test_a_run_on_many_ranks_is_priced(report):
    """The memory of a rank, what it sends over each link, and a bound that says it is an estimate.

    The sums of the two tables are those of the closed forms.
    """
    argv = ("--preset", "gpt-oss-20b", "--context_length", 4096, "--world", 64)
    lines = report(*argv, "--expert_parallel", 8, "--activation_checkpointing")
    config = dataclasses.replace(ModelConfig(**PRESETS["gpt-oss-20b"].model), context_length=4096)
    train = TrainConfig(
        batch_size=1, grad_accum=64, expert_parallel=8, activation_checkpointing=True
    )
    placement = Placement(64, 8, config.num_experts, 8, in_half=True)
    parts = training_memory_bytes(config, train, 2, on_gpu=True, placement=placement)
    assert lines["memory of a rank"] == ["1 x 4096"]
    assert lines["gathered"] == [human_bytes(parts["gathered"])]
    sent = [c.sent_bytes for c in step_collectives(config, train, placement, 2)]
    in_all = [human_bytes(sum(link)) for link in zip(*sent, strict=True)]
    assert lines["in all"] == in_all
    assert lines["rows of tokens"][1] == "0 B"
    told = "\n".join(lines)
    assert "64 ranks, 8 a node; weights sharded over 64, experts shared by 8" in told
    assert "train.py needs --grad_accum 64 instead of 1" in lines["batch"][0]
    assert "not measured: computed for an H100 SXM" in told
    assert "bound by weights and gradients over the network" in told


def test_ranks_take_the_micro_batches_that_train_py_gives_them(report):
    """16 x 4 sequences are 8 x 8 on 8 ranks, as train.py cuts them."""
    lines = report("--preset", "gptoss-modern", "--world", 8)
    assert lines["batch"][0].startswith("8 x 8 sequences a step instead of 16 x 4")
    assert lines["memory of a rank"] == ["8 x 2048"]


def test_more_tokens_hide_the_weights(report):
    """Twice the micro-batch is twice the compute and the same bytes, so that links bind no more."""
    few, many = (
        "\n".join(report("--preset", "gptoss-modern", "--world", 8, "--batch_size", size))
        for size in (1, 32)
    )
    assert "bound by weights and gradients over NVLink" in few
    assert "bound by compute" in many


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--expert_parallel", "2"], "--expert_parallel is for runs on several ranks"),
        (["--shard", "none"], "--shard is for runs on several ranks"),
        (["--nproc_per_node", "4"], "--nproc_per_node has no effect without --world"),
        (["--world", "0"], "--world and --nproc_per_node count ranks"),
        (["--world", "8", "--nproc_per_node", "0"], "--world and --nproc_per_node count ranks"),
        (["--world", "12"], "12 ranks do not fill nodes of 8"),
        (["--world", "8", "--shard", "node"], "--shard node is for several nodes"),
        (["--world", "8", "--expert_parallel", "3"], "take 1 or 2 or 4 or 8"),
    ],
)
def test_ranks_that_cannot_be_are_one_line(argv, message):
    with pytest.raises(ValueError, match=message):
        script.main(argv)
