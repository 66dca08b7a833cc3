"""The benchmarks at a tiny size: both sides are the same model, and they measure what they say.

They also store their provenance.
"""

import dataclasses
import importlib.util
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks import baselines, common, end_to_end, experts, loss
from benchmarks import train as bench
from config_model import ModelConfig, TrainConfig, flops_per_token
from runtime.base import cli
from runtime.kernels.linear_cross_entropy import softmax_gradient_
from tests.builders import random_model, tiny_config
from tests.builders_runs import MODEL
from tests.numeric import assert_close, before_ties, gradients_bound, is_close, logits_bound

TINY = [
    *MODEL,
    "--name",
    "tiny",
    "--num_kv_heads",
    "2",
    "--no-expert_bias",
    "--no-out_proj_bias",
    "--no-head_bias",
    "--no-use_attention_bias",
    "--batch_size",
    "2",
    "--grad_accum",
    "2",
    "--device",
    "cpu",
    "--repeats",
    "1",
    "--min_sample_seconds",
    "1e-6",
    "--allocator",
    "default",
]
DEFAULT_LIKE = dict(
    expert_activation="gelu",
    expert_bias=True,
    out_proj_bias=True,
    head_bias=True,
    qkv_bias=True,
    use_attention_bias=True,
    qk_norm=False,
    z_loss_coef=0.01,
)
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)


@pytest.fixture
def results_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(common, "REPO", tmp_path)
    return tmp_path


def setting(*flags) -> bench.Setting:
    parser = cli.parser("")
    parser.add_argument("--allocator", default="default")
    cli.add_config_flags(parser, ModelConfig, TrainConfig)
    return bench.make_setting(parser.parse_args(["--device", "cpu", *map(str, flags)]))


def sizes(config: ModelConfig) -> list[str]:
    """Flags of a config."""
    flags = []
    for name, value in dataclasses.asdict(config).items():
        flags += (
            [f"--{'' if value else 'no-'}{name}"]
            if isinstance(value, bool)
            else [f"--{name}", str(value)]
        )
    return flags


# ---------------------------------------------------------------------------------------- baselines
def losses_and_gradients(config, baseline):
    """Both sides after a backward pass over the same tokens."""
    model = random_model(config, 1)
    baseline.load_from(model)
    ids = torch.randint(config.vocabulary_size, (3, 20), generator=torch.Generator().manual_seed(1))
    assert before_ties(model, ids[:, :-1]).all(), (
        "another seed: a router may choose either of two experts"
    )
    out = model(ids[:, :-1], ids[:, 1:])
    ours = out.cross_entropy_sum / out.num_targets
    (ours + out.aux_loss + out.z_loss).backward()
    theirs, auxiliary = baseline(ids[:, :-1], ids[:, 1:])
    (theirs + auxiliary).backward()
    return (
        model,
        ours.detach(),
        (out.aux_loss + out.z_loss).detach(),
        theirs.detach(),
        auxiliary.detach(),
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        DEFAULT_LIKE,
        dict(tie_embeddings=True, sliding_window=5, window_pattern="alternating", use_rope=False),
    ],
)
def test_loop_is_our_model(changes):
    config = tiny_config(**changes)
    loop = baselines.LoopMoE(config)
    model, ours, our_auxiliary, theirs, auxiliary = losses_and_gradients(config, loop)
    bound = logits_bound(config, 19)
    assert_close(theirs, ours, bound)
    assert_close(auxiliary, our_auxiliary, bound)
    parameters, seen = dict(model.named_parameters()), 0
    for own, name, index in loop.counterparts():
        expected = parameters[name].grad[index]
        gradient = torch.zeros_like(expected) if own.grad is None else own.grad
        assert_close(gradient, expected, gradients_bound(config, 19, rows=3), name)
        seen += own.numel()
    assert (
        seen
        == sum(p.numel() for p in parameters.values())
        == sum(p.numel() for p in loop.parameters())
    )


@needs_transformers
@pytest.mark.parametrize(
    "experts, changes",
    [
        ("eager", dict(qk_norm=False)),
        ("grouped_mm", dict(qk_norm=False, tie_embeddings=True)),
        ("grouped_mm", {}),
    ],
)
def test_hugging_face_is_our_model(experts, changes):
    # With one block their load-balance loss, too, is ours.
    config = tiny_config(transformer_blocks=1, **changes)
    hf = baselines.build_hf(config, experts)
    model, ours, our_auxiliary, theirs, auxiliary = losses_and_gradients(config, hf)
    bound = logits_bound(config, 19)
    assert_close(theirs, ours, bound)
    assert_close(auxiliary, our_auxiliary, bound)
    block, layer = model.layers[0], hf.model.model.layers[0]
    for own, expected in (
        (layer.mlp.experts.gate_up_proj, block.moe.experts.w_in),
        (layer.self_attn.k_proj.weight, block.attention.W_k.weight),
        (layer.mlp.gate.weight, block.moe.router.weight),
        (hf.model.model.embed_tokens.weight, model.embed.weight),
    ):
        assert_close(own.grad, expected.grad, gradients_bound(config, 19, rows=3))
    assert type(hf.model).__name__ == (
        "Qwen3MoeForCausalLM" if config.qk_norm else "MixtralForCausalLM"
    )
    assert hf.model.config._experts_implementation == experts
    assert sum(p.numel() for p in hf.parameters()) == sum(p.numel() for p in model.parameters())


def test_baselines_refuse_what_they_cannot_be(monkeypatch):
    with pytest.raises(
        ValueError,
        match=(
            r"loop baseline cannot have capacity_factor 1.5: leave it out, or set "
            r"capacity_factor 0.0"
        ),
    ):
        baselines.LoopMoE(tiny_config(capacity_factor=1.5))
    with pytest.raises(ValueError, match="cannot have expert_activation gelu, expert_bias True"):
        baselines.build_hf(tiny_config(expert_activation="gelu", expert_bias=True))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install transformers"):
        baselines.build_hf(tiny_config())


def test_dense_has_the_active_flops():
    config = tiny_config()
    dense = baselines.dense_config(config)
    routers = 2 * config.transformer_blocks * config.d_model
    assert (
        flops_per_token(dense) - routers == flops_per_token(config) - routers * config.num_experts
    )


# ------------------------------------------------------------------------------------ the load gate
def test_disturbed_samples_are_measured_again(monkeypatch):
    clock, foreign = [0.0, 0.0, 0.0], iter([0.0, 0.5, 0.1, 0.0, 0.0])

    def cpu_clock():
        return tuple(clock)

    def function(value):
        # A second, all of it this process's work on one core.
        clock[0] += 1.0
        clock[2] += 1.0
        # What others did in that second.
        clock[1] += 1.0 + next(foreign)
        return value

    monkeypatch.setattr(common, "cpu_clock", cpu_clock)
    values = {"a": iter([1, 3, 5]), "b": iter([2, 4, 6])}
    samples = common.alternate_undisturbed(
        {name: lambda name=name: function(next(values[name])) for name in values}, repeats=2
    )
    assert samples["a"].values == [1, 3] and samples["a"].discarded == 0
    assert samples["a"].rounds == [0, 1] and samples["b"].rounds == [1, 2]
    assert (
        samples["b"].values == [4, 6] and samples["b"].discarded == 1 and not samples["b"].disturbed
    )


def test_least_disturbed_samples_are_taken_where_none_is_clean(monkeypatch):
    loads = [0.9, 0.5, 0.3, 0.7, 0.4, 0.8, 0.6, 0.95]
    clock, left = [0.0, 0.0, 0.0], iter(loads)

    def function():
        load = next(left)
        clock[0] += 1.0
        clock[1] += load
        return load

    monkeypatch.setattr(common, "cpu_clock", lambda: tuple(clock))
    sample = common.alternate_undisturbed({"a": function}, repeats=2)["a"]
    assert sample.values == [0.3, 0.4] and sample.discarded == 8 and sample.disturbed
    assert sample.rounds == [2, 4]


def test_cpu_clock(tmp_path, monkeypatch):
    """Idle time and disk waits do not count as work; guests' time is already part of user time."""
    (tmp_path / "stat").write_text(
        "cpu  100 20 3000 70000 8000 400 50 6 90 9\ncpu0 1 2 3 4 5 6 7 8 9 10\n"
    )
    monkeypatch.setattr(common.os, "sysconf", lambda name: {"SC_CLK_TCK": 100}[name])
    monkeypatch.setattr(common.os, "times", lambda: (1.0, 2.0, 4.0, 8.0, 1000.0))
    assert common.cpu_clock(str(tmp_path / "stat"))[1:] == (35.76, 15.0)
    assert common.cpu_clock(str(tmp_path / "none"))[1:] == (0.0, 0.0)


# ----------------------------------------------------------------------------------- training steps
@pytest.mark.slow
def test_train_benchmark(data, results_folder, monkeypatch):
    compiled = []
    # What it does is tested elsewhere.
    monkeypatch.setattr(
        torch, "compile", lambda function, **kwargs: compiled.append(function) or function
    )
    monkeypatch.setattr(bench, "GEMM_SIZE", 64)
    monkeypatch.setenv("GPTOSS_DATA", str(data))
    hf = ["hf_eager", "hf_grouped"] if importlib.util.find_spec("transformers") else []
    names = ["ours", "ours_compiled", "loop", *hf, "dense", "dense_compiled"]
    assert bench.main([*TINY, "--variants", ",".join(names), "--no-memory"]) == 0
    results = json.loads((results_folder / "train_tiny.json").read_text())
    assert {"command", "commit", "hardware", "versions"} <= results["environment"].keys()
    assert list(results["variants"]) == names and results["failed"] == results["left_out"] == {}
    # ours_compiled and dense_compiled.
    assert compiled.count(softmax_gradient_) == 2
    assert (
        results["order"] == "in turns"
        and "(byte)" in results["tokens"]
        and results["tokens_per_step"] == 2 * 2 * 16
    )
    median = {name: v["tokens_per_sec"]["median"] for name, v in results["variants"].items()}
    first = results["variants"]["ours"]["first_loss"]
    config = ModelConfig(**results["model"])
    for name, v in results["variants"].items():
        assert v["samples"] == 1 and v["ratio_to"] == {
            other: median[name] / median[other] for other in ("loop", *hf[1:])
        }
        flops = flops_per_token(baselines.dense_config(config) if "dense" in name else config)
        assert v["mfu"] == pytest.approx(
            3 * flops * median[name] / results["peak_flops"]["per_second"]
        )
        assert "dense" in name or is_close(v["first_loss"], first, logits_bound(config, 16))
        assert v["state_bytes"] >= 16 * results["parameters"] or "dense" in name
    for name in ("ours", "ours_compiled"):
        shares = results["time_by_part"][name]["shares"]
        assert (
            sum(shares.values()) == pytest.approx(1)
            and set(shares) == set(bench.PARTS)
            and all(share >= 0 for share in shares.values())
        )
        assert all(
            shares[part] > 0
            for part in ("attention", "router", "experts", "loss", "optimizer", "waiting")
        )


def test_what_the_model_cannot_be_is_left_out(results_folder, monkeypatch, capsys):
    monkeypatch.delenv("GPTOSS_DATA", raising=False)
    monkeypatch.setattr(bench, "GEMM_SIZE", 64)
    monkeypatch.setattr(bench, "DEFAULT_VARIANTS", ("loop", "hf_grouped"))
    assert (
        bench.main(
            [*TINY, "--expert_bias", "--vocabulary_size", "300", "--one_at_a_time", "--no-memory"]
        )
        == 0
    )
    results = json.loads((results_folder / "train_tiny.json").read_text())
    assert (
        list(results["variants"]) == ["loop"]
        and "expert_bias True" in results["left_out"]["hf_grouped"]
        and results["tokens"] == "random ids"
    )
    assert results["order"] == "one after another" and "no hf_grouped: " in capsys.readouterr().out


def test_what_fails_costs_the_others_nothing(results_folder, monkeypatch, capsys):
    monkeypatch.delenv("GPTOSS_DATA", raising=False)
    monkeypatch.setattr(bench, "GEMM_SIZE", 64)
    monkeypatch.setattr(bench, "run_worker", lambda module, flags: {"peak_above_states_bytes": 7})
    monkeypatch.setattr(bench.LoopMoE, "forward", lambda self, ids, targets: 1 / 0)
    flags = [*TINY, "--vocabulary_size", "300", "--one_at_a_time", "--no-parts"]
    assert bench.main([*flags, "--variants", "loop,ours"]) == 1
    results = json.loads((results_folder / "train_tiny.json").read_text())
    assert (
        list(results["variants"]) == ["ours"]
        and results["variants"]["ours"]["peak_above_states_bytes"] == 7
    )
    assert (
        results["failed"] == {"loop": "ZeroDivisionError: division by zero"}
        and "no loop: ZeroDivisionError" in capsys.readouterr().out
    )
    with pytest.raises(ValueError, match="nothing could be measured"):
        bench.main([*flags, "--variants", "loop"])


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--compile"], "compiled or not is chosen by --variants"),
        (["--optimizer", "muon"], "optimizer 'adamw' on all sides, not 'muon'"),
        (["--dtype", "float16"], "no loss scaling"),
        (["--variants", "ours,nonsense"], "unknown variant 'nonsense'"),
        (["--variants", "ours,hf_grouped", "--expert_bias"], "cannot have expert_bias True"),
        (["--repeats", "0"], "repeats must be at least 1"),
        (["--variants", "hf_grouped_bf16", "--dtype", "float32"], "needs --dtype bfloat16"),
    ],
)
def test_train_benchmark_refuses(flags, message, monkeypatch):
    monkeypatch.delenv("GPTOSS_DATA", raising=False)
    if "hf_grouped_bf16" in flags and importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    with pytest.raises(ValueError, match=message):
        bench.main([*TINY, "--vocabulary_size", "300", *flags])


def test_another_model_is_noticed(monkeypatch):
    monkeypatch.delenv("GPTOSS_DATA", raising=False)
    s = setting(*sizes(tiny_config()), "--batch_size", "1", "--grad_accum", "1")
    ours, loop = bench.build("ours", s), bench.build("loop", s)
    with torch.no_grad():
        loop.model.head.weight.mul_(2.0)
    with pytest.raises(ValueError, match="do not train the same model"):
        bench.check_same_model({"ours": ours.run(1), "loop": loop.run(1)}, s)


def test_both_sides_take_the_same_steps(monkeypatch):
    """Both sides share tokens, gradients, clipping and AdamW.

    After a few steps the weights are equal.
    """
    monkeypatch.delenv("GPTOSS_DATA", raising=False)
    s = setting(
        *sizes(tiny_config()),
        "--batch_size",
        "2",
        "--grad_accum",
        "2",
        "--lr",
        "1e-2",
        "--grad_clip",
        "0.1",
    )
    ours, loop = bench.build("ours", s), bench.build("loop", s)
    start = ours.model.embed.weight.detach().clone()
    losses = [(ours.run(steps), loop.run(steps)) for steps in (1, 3)]
    for mine, theirs in losses:
        assert mine == pytest.approx(theirs, rel=1e-4)
    moved = (ours.model.embed.weight - start).norm()
    assert (
        moved > 0.1
        and (ours.model.embed.weight - loop.model.embedding.weight).norm() < 0.02 * moved
    )


def test_baseline_out_of_memory_gets_smaller_micro_batches(monkeypatch):
    monkeypatch.delenv("GPTOSS_DATA", raising=False)
    s = setting(*sizes(tiny_config()), "--batch_size", "4", "--grad_accum", "1")
    whole, runner = bench.build("loop", s), bench.build("loop", s)
    forward = runner.model.forward

    for most in (2, 1):

        def small_forward(ids, targets, most=most):
            if len(ids) > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return forward(ids, targets)

        runner.model.forward = small_forward
        assert runner.run(2) == pytest.approx(whole.run(2), rel=1e-4)
        assert (
            runner.facts
            == {
                "micro_batch_sequences": most,
                "micro_batch_why": f"out of memory with {2 * most} of 4",
            }
            and whole.facts == {}
        )

    def no_forward(ids, targets):
        raise torch.OutOfMemoryError("CUDA out of memory")

    runner.model.forward = no_forward
    with pytest.raises(torch.OutOfMemoryError):
        runner.run(1)


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_all_logits_is_seen():
    """Measure each in its own process, as the benchmark does.

    In this process, memory that malloc kept from other tests came and went.
    """
    rows, V = 512, 48_000
    peaks = {}
    for name in ("ours", "loop"):
        flags = [
            *TINY,
            "--vocabulary_size",
            str(V),
            "--context_length",
            str(rows // 2),
            "--grad_accum",
            "1",
            "--variants",
            name,
            "--worker",
            "memory",
            "--dtype",
            "float32",
        ]
        peaks[name] = common.run_worker("benchmarks.train", flags, GPTOSS_DATA=None)[
            "peak_above_states_bytes"
        ]
    logits = rows * V * 4
    # Logits and their gradient, at least.
    assert peaks["loop"] > 2 * logits
    # Half of the rows at a time, in one buffer.
    assert peaks["ours"] < 0.75 * logits


def test_worker_measures_speed(tmp_path, monkeypatch):
    monkeypatch.delenv("GPTOSS_DATA", raising=False)
    out = tmp_path / "out.json"
    assert (
        bench.main(
            [
                *TINY,
                "--vocabulary_size",
                "300",
                "--variants",
                "ours",
                "--worker",
                "speed",
                "--worker_out",
                str(out),
            ]
        )
        == 0
    )
    result = json.loads(out.read_text())
    assert result["tokens_per_sec"] > 0 and result["threads"] == torch.get_num_threads()


def test_allocator_row_alternates_processes(monkeypatch):
    calls, speeds = [], iter([100, 150, 80, 160, 120, 170])

    def worker(module, flags, **environment):
        calls.append(
            (
                flags[flags.index("--allocator") + 1],
                flags[-2:] == ["--num_threads", "0"],
                environment["GOMP_SPINCOUNT"],
            )
        )
        return {"tokens_per_sec": next(speeds), "threads": 2}

    monkeypatch.setattr(bench, "run_worker", worker)
    row = bench.allocator_row(["--name", "x"], repeats=3)
    assert calls == [("default", True, "300000"), ("tuned", False, "1000")] * 3
    assert row["ratio"] == 160 / 100 and row["default"]["tokens_per_sec"] == {
        "median": 100,
        "min": 80,
        "max": 120,
    }


def test_run_worker_gives_what_the_process_wrote(tmp_path, monkeypatch):
    (tmp_path / "small_worker.py").write_text(
        "import json, os, sys\n"
        "if '--fail' in sys.argv: sys.exit('torch.SomeError: no such luck' + chr(10) + 'Set "
        "VERBOSE for more')\n"
        "json.dump([sys.argv[1], os.environ.get('LEFT'), os.environ.get('TAKEN')], "
        "open(sys.argv[-1], 'w'))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("TAKEN", "1")
    assert common.run_worker("small_worker", ["--flag"], LEFT="2", TAKEN=None) == [
        "--flag",
        "2",
        None,
    ]
    # Not the hint below it.
    with pytest.raises(
        ValueError, match="small_worker --fail failed: torch.SomeError: no such luck"
    ):
        common.run_worker("small_worker", ["--fail"])


# ------------------------------------------------------------------------------------- time by part
def event(
    name, start, end, children=(), number=-1, kernels=(), device=DeviceType.CPU, annotation=False
):
    """What the profiler gives, as far as it is read."""
    times = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
    e = SimpleNamespace(
        name=name,
        time_range=times,
        cpu_children=list(children),
        cpu_parent=None,
        sequence_nr=number,
        device_type=device,
        kernels=[SimpleNamespace(name=n, duration=d) for n, d in kernels],
        is_user_annotation=annotation,
    )
    for child in children:
        child.cpu_parent = e
    return e


def flat(e) -> list:
    return [e, *(x for child in e.cpu_children for x in flat(child))]


def test_parts_on_a_cpu():
    """A backward operation belongs to the part whose forward operation had its number last.

    Gaps and ranges count as waiting.
    """
    steps = event(
        "bench:steps",
        0,
        100,
        [
            event(
                "part:attention",
                0,
                12,
                [
                    event("aten::linear", 1, 11, [event("aten::mm", 2, 10, number=7)], number=7),
                    event("aten::zeros", 11, 12, number=8),
                ],
            ),
            event(
                "part:router",
                20,
                40,
                [
                    event("aten::softmax", 20, 24, number=8),
                    event("part:experts", 25, 40, [event("aten::bmm", 25, 40, number=9)]),
                ],
            ),
            event(
                "autograd::engine::evaluate_function: BmmBackward0",
                40,
                60,
                [event("BmmBackward0", 41, 59, number=9)],
                number=9,
            ),
            event("autograd::engine::evaluate_function: SoftmaxBackward0", 60, 64, number=8),
            event("autograd::engine::evaluate_function: MmBackward0", 64, 80, number=7),
            event("Optimizer.step#AdamW.step", 80, 90, [event("aten::_fused_adamw_", 81, 90)]),
        ],
    )
    wall, seconds = bench.seconds_of_parts(flat(steps), on_gpu=False)
    expected = dict(
        attention=10 + 1 + 16,
        router=4 + 4,
        experts=15 + 20,
        loss=0,
        optimizer=10,
        data=0,
        other=0,
        waiting=1 + 1 + 18,
    )
    assert (
        wall == pytest.approx(100e-6)
        and {part: round(1e6 * value) for part, value in seconds.items()} == expected
    )


def test_parts_on_a_gpu():
    """Kernels count for the part that launched them, also from the backward pass's thread.

    The rest of the time is waiting.
    """
    forward = event(
        "part:attention",
        0,
        10,
        [event("aten::mm", 1, 3, number=5, kernels=[("gemm", 20)])],
        kernels=[("part:attention", 20)],
    )
    steps = event(
        "bench:steps", 0, 100, [forward, event("aten::add", 10, 12, number=6, kernels=[("add", 5)])]
    )
    backward = event(
        "autograd::engine::evaluate_function: MmBackward0",
        30,
        40,
        [event("aten::mm", 31, 33, kernels=[("gemm", 30)])],
        number=5,
    )
    on_device = [
        event(name, start, end, device=DeviceType.CUDA, annotation=annotation)
        for name, start, end, annotation in (
            ("gemm", 5, 25, False),
            ("add", 25, 30, False),
            ("gemm", 40, 70, False),
            ("copy", 60, 75, False),
            ("part:attention", 0, 95, True),
        )
    ]
    wall, seconds = bench.seconds_of_parts(flat(steps) + flat(backward) + on_device, on_gpu=True)
    assert seconds["attention"] == pytest.approx(50e-6) and seconds["waiting"] == pytest.approx(
        100e-6 - 60e-6
    )
    assert seconds["other"] == pytest.approx(10e-6) and sum(seconds.values()) == pytest.approx(wall)


# ----------------------------------------------------------------------------------------- the loss
LOSS = [
    "--name",
    "tiny",
    "--vocabulary_size",
    "301",
    "--d_model",
    "16",
    "--rows",
    "40",
    "--chunk_rows",
    "8,64",
    "--repeats",
    "2",
    "--device",
    "cpu",
    "--allocator",
    "default",
]


def test_loss_benchmark(results_folder, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: function)
    assert loss.main([*LOSS, "--head_bias", "--compiled", "--no-memory"]) == 0
    results = json.loads((results_folder / "loss_tiny.json").read_text())
    expected = {"ours_8", "ours_64", "full", "ours_8_compiled", "ours_64_compiled", "full_compiled"}
    assert results["variants"].keys() == expected | (
        {"torch_auto", "torch_8", "torch_64"} if loss.HAS_TORCH_FUNCTION else set()
    )
    for row in results["variants"].values():
        assert (
            row["flops_per_sec"] == pytest.approx(6 * 40 * 301 * 16 / row["seconds"]["median"])
            and row["peak_above_inputs_and_gradients_bytes"] is None
        )
        assert row["speed_against_full"] == pytest.approx(
            results["variants"]["full"]["seconds"]["median"] / row["seconds"]["median"]
        )
    assert "versions" in results["environment"]
    assert loss.vocabulary_of("ours_8_aligned", SimpleNamespace(vocabulary_size=301)) == 320
    with pytest.raises(ValueError, match="chunk_rows must be whole numbers"):
        loss.main([*LOSS, "--chunk_rows", "8,x"])
    with pytest.raises(ValueError, match="unknown variant 'ours_9'"):
        loss.main([*LOSS, "--variants", "ours_9"])


def test_loss_benchmark_notices_a_wrong_gradient(monkeypatch):
    monkeypatch.setattr(loss, "linear_cross_entropy", lambda h, *rest: loss_of_twice(h, *rest))

    def loss_of_twice(h, weight, bias, targets, chunk_rows, softmax_gradient):
        return torch.nn.functional.cross_entropy(2 * h @ weight.T, targets, reduction="sum")

    with pytest.raises(ValueError, match="full has another gradient than ours_8"):
        loss.main([*LOSS, "--variants", "ours_8,full", "--no-memory"])


def test_loss_benchmark_notices_a_wrong_gradient_of_the_head(monkeypatch):
    """Only the hidden states' gradient was compared."""
    monkeypatch.setattr(
        loss,
        "linear_cross_entropy",
        lambda h, weight, bias, targets, *rest: torch.nn.functional.cross_entropy(
            h @ (2 * weight - weight.detach()).T, targets, reduction="sum"
        ),
    )
    with pytest.raises(ValueError, match="full has another gradient than ours_8"):
        loss.main([*LOSS, "--variants", "ours_8,full", "--no-memory"])


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loss_memory_of_all_logits_is_seen():
    peaks = {}
    for name in ("ours_64", "full"):
        peaks[name] = common.run_worker(
            "benchmarks.loss",
            [
                *LOSS,
                "--vocabulary_size",
                "24000",
                "--rows",
                "512",
                "--variants",
                name,
                "--worker",
                "--dtype",
                "float32",
            ],
        )
    assert peaks["full"] > 2 * 512 * 24_000 * 4 and peaks["ours_64"] < 0.3 * 512 * 24_000 * 4


# -------------------------------------------------------------------------------------- the experts
def test_experts_benchmark(results_folder):
    flags = [
        "--name",
        "tiny",
        "--d_model",
        "16",
        "--d_ff",
        "24",
        "--num_heads",
        "2",
        "--num_kv_heads",
        "1",
        "--num_experts",
        "3",
        "--rows",
        "40",
        "--repeats",
        "2",
        "--device",
        "cpu",
        "--dtype",
        "float32",
    ]
    assert experts.main([*flags, "--expert_activation", "swiglu", "--no-expert_bias"]) == 0
    results = json.loads((results_folder / "experts_tiny.json").read_text())
    assert (
        results["variants"].keys() == experts.VARIANTS.keys()
        and results["variants"]["one_by_one"]["ratio"]["median"] == 1
    )
    for row in results["variants"].values():
        assert row["flops_per_second"] == pytest.approx(
            3 * 2 * 40 * 3 * 16 * 24 / row["seconds"]["median"]
        )
    assert "commit" in results["environment"]
    with pytest.raises(ValueError, match="rows must be at least 1"):
        experts.main([*flags, "--rows", "0"])


def test_experts_benchmark_notices_another_result():
    same, other = [torch.ones(2), torch.ones(3)], [torch.ones(2), torch.tensor([1.0, 1.0, 1.1])]
    experts.check_equal({"a": same, "b": [t.clone() for t in same]}, 1e-4)
    with pytest.raises(ValueError, match="b computes something else than a"):
        experts.check_equal({"a": same, "b": other}, 1e-4)


# ------------------------------------------------------------------------------- the whole programs
def test_a_compiled_model_is_decoded_plain(data, results_folder, monkeypatch):
    """Its blocks compile a graph per length, and the ninth raises.

    On a GPU the figures of the whole run were lost.
    """
    monkeypatch.setenv("GPTOSS_DATA", str(data))
    original = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda self, **kwargs: original(self, **kwargs | {"backend": "eager"}),
    )
    compile_ = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda function, **kwargs: compile_(function, **kwargs | {"backend": "eager"}),
    )
    flags = [
        *MODEL,
        "--name",
        "tiny",
        "--compile",
        "--max_steps",
        "6",
        "--warmup_steps",
        "2",
        "--batch_size",
        "2",
        "--grad_accum",
        "1",
        "--val_steps",
        "1",
        "--device",
        "cpu",
        "--context_length",
        "32",
        "--prompt_tokens",
        "4",
        "--new_tokens",
        "16",
        "--repeats",
        "1",
        "--document_mask",
    ]
    masked = []
    loss_of = end_to_end.train.packed_documents_loss
    monkeypatch.setattr(
        end_to_end.train,
        "packed_documents_loss",
        lambda *a, **k: masked.append(1) or loss_of(*a, **k),
    )
    assert end_to_end.main(flags) == 0
    # --document_mask reaches the dry run, the steps and the validations; only the first did.
    assert len(masked) == 2 + 6 + 2


def test_end_to_end_figures(data, results_folder, monkeypatch):
    monkeypatch.setenv("GPTOSS_DATA", str(data))
    flags = [
        *MODEL,
        "--name",
        "tiny",
        "--max_steps",
        "12",
        "--warmup_steps",
        "2",
        "--batch_size",
        "2",
        "--grad_accum",
        "2",
        "--lr",
        "1e-2",
        "--min_lr",
        "1e-3",
        "--val_steps",
        "2",
        "--device",
        "cpu",
        "--context_length",
        "32",
        "--prompt_tokens",
        "8",
        "--new_tokens",
        "16",
        "--repeats",
        "2",
    ]
    assert end_to_end.main(flags) == 0
    results = json.loads((results_folder / "end_to_end_tiny.json").read_text())
    assert {"command", "commit", "hardware", "versions"} <= results["environment"].keys()
    training = results["training"]
    assert (
        len(training["losses"]) == 12
        and training["validation_loss"]["after"] < training["validation_loss"]["before"]
    )
    assert (
        training["tokens_per_sec"]["median"] > 0
        and training["mfu"] is None
        and training["peak_memory_bytes"] > 0
    )
    assert (
        results["decoding"]["decode_tokens_per_sec"]["median"] > 0
        and results["model"]["context_length"] == 32
    )
    with pytest.raises(ValueError, match="takes neither --profile nor"):
        end_to_end.main([*flags, "--profile"])
    with pytest.raises(ValueError, match="more than the 5 steps"):
        end_to_end.main([*flags, "--max_steps", "5"])
    with pytest.raises(ValueError, match="exceed the context of 32"):
        end_to_end.main([*flags, "--new_tokens", "64"])
