"""The commands for a quarter of an hour on a GPU: seconds, sizes, predictions, what survives what.

And all of it at a tiny size.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

import train
from benchmarks import (
    attention,
    common,
    gpu,
    gpu_plan,
    gpu_resume,
    gpu_tests,
    latency,
    loss,
    measures,
    probe,
    steps,
)
from benchmarks import train as bench
from benchmarks.gpu_plan import CARDS, GIB, Stage
from config_model import TrainConfig
from runtime.base import cli
from runtime.inference import decoder as inference
from runtime.training import setup
from tests import children
from tests.builders_inference import (
    COMPILED_CASES,
    COMPILED_SPAN,
    CONTEXT,
    assert_same_texts,
    decoder_on,
)
from tests.builders_runs import Run
from tests.conftest import REPO
from tests.nightly import nightly_but
from tests.ranks import run_on

CARD_MEMORY = {"H100": 79 * GIB, "H200": 139 * GIB}
TINY = [
    "--d_model",
    "16",
    "--transformer_blocks",
    "1",
    "--num_heads",
    "2",
    "--num_kv_heads",
    "1",
    "--d_ff",
    "16",
    "--num_experts",
    "4",
    "--context_length",
    "16",
    "--vocabulary_size",
    "61",
    "--dtype",
    "float32",
    "--device",
    "cpu",
]


@pytest.fixture
def results(tmp_path, monkeypatch):
    """No file of the repository is written."""
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "KEPT", tmp_path / "kept")
    monkeypatch.delenv("GPTOSS_DATA", raising=False)
    return tmp_path


def stored(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())


# ----------------------------------------------------------------------------------------- the plan
@pytest.mark.parametrize("card", CARDS)
def test_the_stages_of_a_command_fit_its_seconds(card):
    """560 seconds were shared by nine stages as they came: later ones would have had none."""
    plans = {
        "first": gpu_plan.first("x", CARD_MEMORY[card], False),
        "second": gpu_plan.second("x", False, "x.json", "work"),
        "third": gpu_plan.third("x", False),
    }
    assert gpu_plan.TOTAL_SECONDS == {"first": 585, "second": 120, "third": 120}
    for which, stages in plans.items():
        seconds = [stage.seconds for stage in stages.values()]
        assert sum(seconds) + gpu_plan.OWN_SECONDS[which] <= gpu_plan.TOTAL_SECONDS[which]
        assert min(seconds) > gpu.GRACE_SECONDS + gpu.LEAST_SECONDS
    assert list(plans["first"]) == [
        "probe",
        "tests",
        "no_table",
        "modern",
        "default",
        "latency",
        "loss",
        "hugging_face",
    ]
    assert list(plans["second"]) == ["failed_tests", "resume", "compiled_tests"]
    assert list(plans["third"]) == ["triton_tests", "triton_attention", "triton_default"]


def test_a_stage_has_its_own_seconds_and_those_that_others_left():
    stages = {name: Stage(seconds, []) for name, seconds in (("a", 10), ("b", 20), ("c", 30))}
    assert gpu.time_for(stages, "a", 60) == 10
    assert gpu.time_for(stages, "b", 58) == 28
    assert gpu.time_for(stages, "c", 4) == 4


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("stage", gpu_plan.SIZES)
def test_sizes_fit_the_memory(stage, card):
    """The command asked an H100 for 91 GiB, and an H200 for 160.

    The peak is the estimate's (tests hold it to a count over fake tensors), and what was counted
    where it was.
    """
    config, changes = gpu_plan.models()[stage]
    sizes = gpu_plan.sizes_for(stage, CARD_MEMORY[card])

    def peak(size):
        return gpu_plan.peak_bytes(
            config, TrainConfig(batch_size=size[0], grad_accum=size[1], **changes)
        )

    for size in sizes:
        assert peak(size) < 0.95 * CARD_MEMORY[card]
        _, _, counted = gpu_plan.TRAINED.get((stage, "{}x{}".format(*size)), (0, 0, 0))
        assert counted * GIB + gpu_plan.CONTEXT_BYTES < 0.95 * CARD_MEMORY[card]
    faster = gpu_plan.SIZES[stage][: gpu_plan.SIZES[stage].index(sizes[0])]
    assert all(peak(size) >= 0.95 * CARD_MEMORY[card] for size in faster)
    sequences = {batch_size * grad_accum for batch_size, grad_accum in gpu_plan.SIZES[stage]}
    assert len(sequences) == 1, "all sizes of a stage are the same step"
    # What is chosen first has a prediction.
    assert (stage, "{}x{}".format(*sizes[0])) in gpu_plan.TRAINED
    # On cards of any other size, too.
    for memory in range(40 * GIB, 80 * GIB, 4 * GIB):
        chosen = gpu_plan.sizes_for(stage, memory)
        assert all(peak(size) < 0.95 * memory for size in chosen) or (
            chosen == [gpu_plan.SIZES[stage][-1]]
        )
    # And where nothing fits, the smallest is tried.
    assert gpu_plan.sizes_for(stage, GIB) == [gpu_plan.SIZES[stage][-1]]


def test_hugging_faces_side_fits():
    """Ours keeps weights, gradients and moments in float32, theirs in bfloat16.

    Ours is the larger one.
    """
    config, _ = gpu_plan.models()["modern"]
    assert (
        gpu_plan.peak_bytes(config, TrainConfig(batch_size=8, grad_accum=1))
        < 0.95 * CARD_MEMORY["H100"]
    )


@pytest.mark.parametrize("card", CARDS)
def test_every_program_understands_its_flags(card, results, monkeypatch):
    """At full size, up to where the work would begin.

    The models are those that the sizes were computed for.
    """
    seen = {}
    monkeypatch.setattr(probe, "measure", lambda out, args, device, dtype: seen.update(probe=args))
    monkeypatch.setattr(latency, "measure", lambda out, setting, args: seen.update(latency=setting))
    monkeypatch.setattr(
        loss,
        "measure",
        lambda args, flags, variants, *rest: (
            seen.update(loss=list(variants)) or {"variants": {}, "failed": {}}
        ),
    )
    monkeypatch.setattr(
        bench,
        "compare",
        lambda setting, names, *rest: (
            seen.update({names[0]: setting}) or {"variants": {"it": {}}, "failed": {}}
        ),
    )
    monkeypatch.setattr(bench, "print_table", lambda results: None)
    monkeypatch.setattr(pytest, "main", lambda flags, plugins: seen.update(tests=flags) or 0)
    monkeypatch.setattr(
        gpu_resume,
        "cut_and_resume",
        lambda work, half, flags: seen.update(resume=flags) or (work, work),
    )
    monkeypatch.setattr(gpu_resume, "different_tensors", lambda *folders: ([], 1))
    monkeypatch.setattr(
        attention,
        "measure_case",
        lambda args, case, names, *rest: seen.update(attention=(args, case, names)) or {},
    )
    monkeypatch.setattr(attention, "print_case", lambda case, results: None)
    monkeypatch.setattr(
        bench,
        "random_tokens",
        lambda model_config, config: bench.RandomTokens(model_config.vocabulary_size, 9, 0),
    )
    plan = gpu_plan.first("x", CARD_MEMORY[card], False)
    for stage in gpu_plan.SIZES:
        (command,) = plan.pop(stage).commands
        args = steps.make_parser().parse_args(command[3:])
        config, changes = gpu_plan.models()[stage]
        sizes = steps.parse_sizes(args.sizes)
        assert sizes == gpu_plan.sizes_for(stage, CARD_MEMORY[card])
        for size in sizes:
            setting = steps.make_setting(args, *size)
            assert (
                setting.model_config == config
                and setting.config.compile
                and setting.dtype == torch.bfloat16
            )
            assert (setting.config.batch_size, setting.config.grad_accum) == size
            assert setting.config.optimizer == changes.get("optimizer", "adamw")
    (results / "x.json").write_text('{"stages": {}}')
    third = gpu_plan.third("x", False)
    (command,) = third.pop("triton_default").commands
    args = steps.make_parser().parse_args(command[3:])
    setting = steps.make_setting(args, *steps.parse_sizes(args.sizes)[0])
    assert (setting.config.batch_size, setting.config.grad_accum) == (16, 1)
    assert setting.model_config == gpu_plan.models()["default"][0]
    for stage in (
        *plan.values(),
        *third.values(),
        *gpu_plan.second("x", False, str(results / "x.json"), str(results / "work")).values(),
    ):
        for command in stage.commands:
            assert command[:2] == [sys.executable, "-m"]
            assert importlib.import_module(command[2]).main(command[3:]) == 0, command
    assert seen["probe"].product == 8192 and seen["probe"].rows == 65_536
    assert (
        seen["latency"].config == gpu_plan.models()["no_table"][0]
        and seen["latency"].dtype == torch.bfloat16
    )
    assert seen["loss"] == [f"ours_{rows}_compiled" for rows in (2048, 4096, 8192)]
    assert (
        seen["ours"].model_config == gpu_plan.models()["modern"][0]
        and seen["ours"].config.batch_size == 8
    )
    parser = cli.parser("")
    cli.add_config_flags(parser, gpu_plan.ModelConfig, TrainConfig)
    assert (
        cli.settings_from(
            parser.parse_args(seen["resume"]), gpu_plan.ModelConfig, TrainConfig
        ).preset
        == "modern-8gb"
    )
    assert seen["tests"][1] == gpu_plan.COMPILED_TESTS
    args, case, names = seen["attention"]
    assert (case, names) == ("table", ["sdpa_efficient", "triton"]) and args.batch_size == 16


def test_all_gpu_tests_are_asked_for():
    """Selected by the files that hold them.

    The rest of tests/ needs libraries that a rented machine may not have.
    """
    marked = [
        path.relative_to(REPO).as_posix()
        for path in (REPO / "tests").rglob("test_*.py")
        if re.search(
            r"^(@pytest\.mark\.gpu|pytestmark = \[?\s*pytest\.mark\.gpu)",
            path.read_text(),
            re.MULTILINE,
        )
    ]
    assert sorted(gpu_plan.TEST_FILES) == sorted(marked)


@pytest.mark.nightly
@pytest.mark.slow
def test_gpu_tests_compile_few_models():
    """They compiled some 70 whole models, several minutes.

    Now at most 4, of which none is in the first command.
    """
    done = children.run(
        ["-m", "pytest", "--collect-only", "-q", "-m", "gpu", "tests/test_gpu.py"],
        env=os.environ | {"PYTEST_ADDOPTS": "-o addopts="},
    )
    assert done.returncode == 0, done.stderr
    collected = re.findall(r"^tests/test_gpu\.py::(\w+)", done.stdout, re.MULTILINE)
    assert len(collected) > 50
    spans, span = 1, COMPILED_SPAN
    while span < CONTEXT:
        spans, span = spans + 1, 2 * span
    compiled = collected.count(gpu_plan.COMPILED_TESTS.partition("::")[2])
    assert compiled and compiled * spans <= 4
    # The only place that asks a decoder for the compiler.
    assert (REPO / "tests/test_gpu.py").read_text().count("compile=True") == 1


@pytest.mark.slow
@pytest.mark.parametrize("case", COMPILED_CASES)
def test_the_compiled_tests_read_both_spans(case, monkeypatch):
    """Run here in place of a GPU, without the compiler.

    What is asked for and compared is the same, and no step reads more of the cache than the spans
    that were counted.
    """
    spans, decode_step = set(), inference.decode_step

    def noted(model, cache, ids_B, positions_B, span):
        spans.add(span)
        return decode_step(model, cache, ids_B, positions_B, span)

    monkeypatch.setattr(inference, "decode_step", noted)
    changes, packed = COMPILED_CASES[case]
    model, decoder = decoder_on(torch.device("cpu"), changes, packed, compile=True, native=False)
    assert_same_texts(model, decoder, slide=True)
    assert min(spans) <= COMPILED_SPAN < max(spans) <= CONTEXT


# -------------------------------------------------------------------------------------- predictions
def test_what_is_predicted_is_what_was_worked_out():
    """Shares of the peak follow from the speeds.

    Rates give the milliseconds that whole models were summed up from.
    """
    values = {
        (p.stage, p.measure, p.size): [round(p.of(CARDS[card]), 2) for card in ("H100", "H200")]
        for p in gpu_plan.PREDICTIONS
    }
    assert len(values) == len(gpu_plan.PREDICTIONS), "one figure for each"
    shares = {key: [round(x) for x in value] for key, value in values.items() if key[1] == "MFU"}
    assert shares["no_table", "MFU", "16x1"] == [29, 33] and shares["modern", "MFU", "16x4"] == [
        26,
        30,
    ]
    assert shares["default", "MFU", "4x4"][0] == 10 and shares["default", "MFU", "16x1"][1] == 14
    # 12 blocks: 29 ms (no table) and 16 (modern) of cuDNN's attention, 251 with the table.
    assert 12 * values["probe", "attention 32 cudnn grouped", ""][0] == pytest.approx(29, rel=0.02)
    assert 12 * values["probe", "attention 64 cudnn grouped", ""][0] == pytest.approx(16, rel=0.05)
    assert 12 * values["probe", "attention 32 table", ""][1] == pytest.approx(251, rel=0.02)
    # Passes of the loss: 26 ms of 2,048 rows on an H100, 16 of 8,192, next to 65 of products.
    assert values["loss", "ours_2048_compiled time", ""][0] == pytest.approx(65 + 26, abs=1)
    assert values["loss", "ours_8192_compiled time", ""][0] == pytest.approx(65 + 16, abs=1)
    assert all(p.how for p in gpu_plan.PREDICTIONS)
    # 12 blocks of 11 causal products, 9.1 TFLOP.
    assert 12 * values["triton_attention", "table triton time", ""][0] == pytest.approx(
        9.1e15 / 150e12, rel=0.02
    )


def test_a_card_is_known_by_its_name():
    names = {
        "NVIDIA H100 80GB HBM3": "H100",
        "NVIDIA H200": "H200",
        "NVIDIA H200 NVL": "H200",
        "cpu (2 threads)": None,
        "NVIDIA GH100X": None,
        "": None,
    }
    assert {name: gpu_plan.card_of(name) for name in names} == names


def test_a_prediction_stands_next_to_its_result(capsys):
    """With a mark where they are more than 1.4 times apart, either way.

    Without one for another card, another size, or no result.
    """

    def figure(value):
        return {"value": value, "unit": "tokens/s"}

    def stages(size, **figures):
        return {
            "no_table": {
                "exit_code": 0,
                "seconds": 9.0,
                "limit_s": 85.0,
                "results": {"steps": {"size": size, "measures": figures}},
            }
        }

    H100 = "NVIDIA H100 80GB HBM3"
    for value, off in (
        (132e3, False),
        (1.39 * 132e3, False),
        (1.41 * 132e3, True),
        (132e3 / 1.39, False),
        (132e3 / 1.41, True),
    ):
        (row,) = gpu.table(stages("16x1", speed=figure(value)), H100)
        assert (
            row["predicted"] == 132e3
            and row["ratio"] == pytest.approx(value / 132e3)
            and row["off"] is off
            and row["how"]
        )
        gpu.print_table(stages("16x1", speed=figure(value)), [row])
        assert ("<-- more than 1.4 x off" in capsys.readouterr().out) is off
    for device, size, measure in (
        ("cpu (2 threads)", "16x1", "speed"),
        (H100, "8x2", "speed"),
        (H100, "16x1", "build"),
    ):
        (row,) = gpu.table(stages(size, **{measure: figure(1.0)}), device)
        assert row == {"stage": "no_table", "measure": measure, "value": 1.0, "unit": "tokens/s"}
    (row,) = gpu.table(stages("16x1", speed={"why": "out of memory"}), H100)
    assert row == {"stage": "no_table", "measure": "speed", "why": "out of memory"}
    gpu.print_table(stages("16x1"), [row])
    assert "none: out of memory" in capsys.readouterr().out


# ------------------------------------------------------------------------------- what survives what
WRITE = """
import json, os, pathlib
result = {"measures": {"x": {"value": %d, "unit": "s"}}}
pathlib.Path(os.environ["GPTOSS_RESULTS"], "it.json").write_text(json.dumps(result))
"""
# Itself, a child, and a child of a child in a session of its own; then it hangs.
PARENT = """
import os, subprocess, sys, time
inner = '''
import subprocess, sys, time
sleep = [sys.executable, "-c", "import time; time.sleep(300)"]
print("alone", subprocess.Popen(sleep, start_new_session=True).pid, flush=True)
time.sleep(300)
'''
print("leader", os.getpid(), flush=True)
print("child", subprocess.Popen([sys.executable, "-c", inner]).pid, flush=True)
def hang_here():
    time.sleep(HANG)
hang_here()
"""
HANGS, LEAVES = PARENT.replace("HANG", "300"), PARENT.replace("HANG", "3")


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def is_alive(pid: int) -> bool:
    """A process that runs; one that is dead and that nobody has asked about yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, seconds: float = 60.0) -> bool:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.05)
    return bool(condition())


def started_in(log: Path) -> dict[str, int]:
    """Process ids by kind."""
    return {
        kind: int(pid)
        for kind, pid in re.findall(r"^(leader|child|alone) (\d+)$", log.read_text(), re.MULTILINE)
    }


def all_end(pids: dict[str, int]) -> bool:
    return wait_until(lambda: not any(map(is_alive, pids.values())))


@pytest.fixture
def plan(results, monkeypatch):
    """Stages of the test's own in place of the first command's."""

    def use(**stages: Stage):
        monkeypatch.setattr(gpu_plan, "first", lambda name, memory, tiny: stages)
        return results / "out"

    return use


def test_a_stage_that_fails_costs_the_others_nothing(plan, capsys):
    out = plan(
        one=Stage(60, [python(WRITE % 1)]),
        bad=Stage(60, [python("print('because'); raise SystemExit(7)"), python(WRITE % 2)]),
        last=Stage(60, [python(WRITE % 3)]),
    )
    assert gpu.main(["--name", "box", "--out", str(out)]) == 1
    told, log = stored(out, "box"), (out / "box.log").read_text()
    assert [stage["exit_code"] for stage in told["stages"].values()] == [0, 7, 0]
    assert told["stages"]["bad"]["tail"][-1] == "because" and "because" in log
    # The second command of a stage runs also where its first fails.
    assert [row["value"] for row in told["table"]] == [1, 2, 3]
    assert {path.name for path in out.iterdir()} == {"box.json", "box.log"}
    assert "exit code 7" in capsys.readouterr().out
    assert stored(gpu.KEPT, "box") == told
    # Nothing is left over from a run before, and single stages can be asked for.
    assert gpu.main(["--name", "box", "--out", str(out), "--stages", "one"]) == 0
    assert (
        list(stored(out, "box")["stages"]) == ["one"]
        and "because" not in (out / "box.log").read_text()
    )


@pytest.mark.nightly
def test_a_stage_that_hangs_is_killed_with_all_its_children(plan):
    """Its place in the program is in the log; the next stage has its own seconds."""
    out = plan(hangs=Stage(12, [python(WRITE % 1 + HANGS)]), last=Stage(30, [python(WRITE % 2)]))
    started = time.monotonic()
    assert gpu.main(["--name", "box", "--out", str(out)]) == 1
    assert time.monotonic() - started < 12 + 30
    told, log = stored(out, "box"), (out / "box.log").read_text()
    assert (
        told["stages"]["hangs"]["exit_code"] == gpu.TIMED_OUT
        and told["stages"]["last"]["exit_code"] == 0
    )
    assert [row["value"] for row in told["table"]] == [1, 2]
    assert "in hang_here" in log
    pids = started_in(out / "box.log")
    assert len(pids) == 3 and all_end(pids)


@pytest.mark.nightly
def test_a_child_that_outlives_its_stage_is_killed(plan):
    out = plan(leaves=Stage(60, [python(LEAVES)]))
    assert gpu.main(["--name", "box", "--out", str(out)]) == 0
    pids = started_in(out / "box.log")
    assert len(pids) == 3 and all_end(pids)


@pytest.mark.slow
@pytest.mark.parametrize("how", nightly_but([signal.SIGKILL, signal.SIGTERM], 1))
def test_the_command_may_be_killed_at_any_time(results, how):
    """What ended is stored by then, what the stage in between has measured too.

    And its program does not hold the GPU after it.
    """
    code = f"""
from pathlib import Path
from benchmarks import gpu, gpu_plan
from benchmarks.gpu_plan import Stage
from tests.benchmarks.test_gpu import HANGS, WRITE, python
gpu.KEPT = Path({str(results)!r}) / "kept"
programs = dict(one=WRITE % 1, two=WRITE % 2 + HANGS, three=WRITE % 3)
stages = {{name: Stage(60, [python(program)]) for name, program in programs.items()}}
gpu_plan.first = lambda name, memory, tiny: stages
gpu.main(["--name", "box", "--out", {str(results)!r}])
"""
    process = children.start(["-c", code])
    path, log = results / "box.json", results / "box.log"
    assert wait_until(
        lambda: (
            path.is_file()
            and len(json.loads(path.read_text())["table"]) == 2
            and len(started_in(log)) == 3
        )
    )
    pids = started_in(log)
    try:
        process.send_signal(how)
        printed = process.communicate(timeout=60)[0]
        told = json.loads(path.read_text())
        assert told["stages"]["one"]["exit_code"] == 0 and [
            row["value"] for row in told["table"]
        ] == [1, 2]
        assert "exit_code" not in told["stages"]["two"] and "three" not in told["stages"]
        if how == signal.SIGTERM:
            assert process.returncode == 128 + how and "running" in printed and all_end(pids)
        else:
            # The system does it: children of the stage's program are not reached.
            assert all_end({"leader": pids["leader"]})
    finally:
        for pid in filter(is_alive, pids.values()):
            os.kill(pid, signal.SIGKILL)


def test_where_no_time_is_left_a_stage_says_so(plan, monkeypatch):
    out = plan(one=Stage(1, [python(WRITE % 1)]), two=Stage(60, [python(WRITE % 2)]))
    assert gpu.main(["--name", "box", "--out", str(out)]) == 1
    assert (
        stored(out, "box")["stages"]["one"] == {"why": "no time was left"}
        and stored(out, "box")["stages"]["two"]["exit_code"] == 0
    )


def test_stages_have_their_environment(plan, monkeypatch):
    """What is set outside wins; a relative folder of shards stays the same folder."""
    monkeypatch.setenv("TORCHINDUCTOR_FX_GRAPH_CACHE", "0")
    names = [
        "PYTORCH_ALLOC_CONF",
        "TORCHINDUCTOR_FX_GRAPH_CACHE",
        "PYTHONUNBUFFERED",
        "PYTHONFAULTHANDLER",
    ]
    out = plan(
        one=Stage(30, [python(f"import os; print(*(os.environ[name] for name in {names}))")])
    )
    assert gpu.main(["--name", "box", "--out", str(out)]) == 0
    assert "\nexpandable_segments:True 0 1 1\n" in (out / "box.log").read_text()


def test_sizes_follow_the_memory_that_the_probe_found(results, monkeypatch):
    memories = []

    def first(name, memory, tiny):
        memories.append(memory)
        report = json.dumps({"memory_bytes": 139 * GIB, "device": "NVIDIA H200", "measures": {}})
        write = f"""
import os, pathlib
pathlib.Path(os.environ["GPTOSS_RESULTS"], "probe.json").write_text({report!r})
"""
        return {"probe": Stage(30, [python(write)]), "next": Stage(30, [python("pass")])}

    monkeypatch.setattr(gpu_plan, "first", first)
    assert gpu.main(["--name", "box", "--out", str(results / "out")]) == 0
    assert memories[0] == gpu.SMALLEST_MEMORY and memories[-1] == 139 * GIB
    assert stored(results / "out", "box")["machine"]["device"] == "NVIDIA H200"


def test_the_command_itself_needs_no_torch():
    """It would hold half a GiB of the GPU, while its stages measure what is free.

    It would also cost seconds that they could have.
    """
    code = "import sys, benchmarks.gpu; print({'torch', 'pytest'} & set(sys.modules))"
    done = subprocess.run(python(code), cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_bad_requests_are_told(results, data, monkeypatch):
    for flags, message in (
        (["--name", "x", "--stages", "nothing"], "no such stage: nothing; there are probe, tests"),
        (["--name", "a/b"], "name must be letters"),
        (["--name", "x", "--second", "--stages", "probe"], "there are failed_tests, resume"),
        (["--name", "x", "--third", "--stages", "probe"], "there are triton_tests, triton_att"),
    ):
        with pytest.raises(ValueError, match=message):
            gpu.main([*flags, "--out", str(results / "out")])
    monkeypatch.setenv("GPTOSS_DATA", str(results))
    with pytest.raises(ValueError, match="has no prepared text"):
        gpu.main(["--name", "x", "--out", str(results / "out")])
    monkeypatch.setenv("GPTOSS_DATA", str(data))
    with pytest.raises(
        ValueError, match="has 257 ids, and sizes and predictions are for 200,019: prepare the text"
    ):
        gpu.main(["--name", "x", "--out", str(results / "out")])
    assert not (results / "out").exists()


# ----------------------------------------------------------------------------------------- programs
def test_measures_are_stored_as_they_come(results, capsys):
    """A figure that is not finite, or that could not be made, is a reason; the others stay."""
    out = measures.Measures("m", device="x")
    assert out.attempt("good", "s", lambda: 2) and not out.failed
    assert (
        stored(results, "m")["measures"] == {"good": {"value": 2.0, "unit": "s"}}
        and stored(results, "m")["device"] == "x"
    )
    assert not out.attempt("bad", "s", lambda: 1 / 0)
    out.add("none", float("nan"), "s")
    assert stored(results, "m")["measures"] == {
        "good": {"value": 2.0, "unit": "s"},
        "bad": {"why": "ZeroDivisionError: division by zero"},
        "none": {"why": "the value is nan"},
    }
    assert out.failed and "good: 2 s" in capsys.readouterr().out


def test_figures_of_other_benchmarks_are_found():
    trained = {
        "variants": {
            "ours": {"tokens_per_sec": {"median": 5.0}, "mfu": 0.25, "peak_above_states_bytes": 3e9}
        },
        "failed": {"hf": "OutOfMemoryError: x"},
    }
    assert measures.measures_of(trained) == {
        "ours speed": {"value": 5.0, "unit": "tokens/s"},
        "ours MFU": {"value": 25.0, "unit": "%"},
        "ours memory": {"value": 3.0, "unit": "GB"},
        "hf": {"why": "OutOfMemoryError: x"},
    }
    lost = {
        "variants": {
            "ours_16": {"seconds": {"median": 0.5}, "peak_above_inputs_and_gradients_bytes": None}
        },
        "failed": {},
    }
    assert measures.measures_of(lost) == {"ours_16 time": {"value": 500.0, "unit": "ms"}}


def test_results_go_where_the_environment_says(tmp_path):
    """A stage's JSON files are its own: two of them may have the same name."""
    code = "from benchmarks.common import save_results; save_results('x', {'a': 1})"
    done = subprocess.run(
        python(code),
        cwd=REPO,
        env=os.environ | {"GPTOSS_RESULTS": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert stored(tmp_path, "x")["a"] == 1 and str(tmp_path / "x.json") in done.stdout


@pytest.mark.parametrize("text", ["", "4", "0x1", "4x", "4x4,", "4x4;8x2", "4x-1"])
def test_sizes_are_read_or_refused(text):
    assert steps.parse_sizes("16x4,8x8") == [(16, 4), (8, 8)]
    with pytest.raises(ValueError, match="sizes must be like 16x4,8x8"):
        steps.parse_sizes(text)


def test_steps_are_measured_and_nothing_is_saved(results, monkeypatch):
    """train.py writes 24 GB at the end of a run of the modern model.

    There is neither room nor time for them.
    """

    def refuse(*given, **more):
        raise AssertionError("a checkpoint")

    monkeypatch.setattr(train, "save_checkpoint", refuse)
    monkeypatch.setattr(train, "Reporter", refuse)
    assert (
        steps.main(
            [
                "--name",
                "x",
                "--sizes",
                "2x2",
                "--min_sample_seconds",
                "1e-6",
                "--samples",
                "2",
                *TINY,
            ]
        )
        == 0
    )
    told = stored(results, "steps_x")
    assert (
        told["size"] == "2x2"
        and told["data"] == "random ids"
        and told["steps"] == 4
        and len(told["speeds"]) == 2
    )
    found = {name: row["value"] for name, row in told["measures"].items()}
    # Nothing was compiled, and a CPU has no known peak.
    assert "first compile" not in found and "MFU" not in found
    assert found["speed"] > 0 and found["memory"] > 0 and abs(found["first loss"] - 4.11) < 0.3
    parts = sum(value for name, value in found.items() if name.endswith(", profiled"))
    assert 0 < parts <= 1.001 * found["profiled wall"]
    kernels = told["kernels"]
    assert 10 < len(kernels) <= steps.MOST_KERNELS and any(
        row["part"] == "products" for row in kernels
    )
    assert [row["ms"] for row in kernels] == sorted((row["ms"] for row in kernels), reverse=True)
    assert {path.name for path in results.iterdir()} == {"steps_x.json"}


def steps_on(ranks, folder: Path, flags: list[str]) -> dict | str:
    """Return what one of several ranks measures, or its error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "RESULTS", folder)
        patch.setattr(common, "REPO", folder)
        try:
            assert steps.run(steps.make_parser().parse_args(flags), ranks) == 0
        except ValueError as error:
            return str(error)
        return stored(folder, "steps_x")


@pytest.mark.nightly
def test_steps_of_one_rank_that_shards(results):
    """What FSDP costs where nothing is split; the losses are those of one process."""
    flags = ["--name", "x", "--sizes", "2x1", "--min_sample_seconds", "1e-6", *TINY]
    assert steps.main([*flags, "--samples", "1"]) == 0
    plain = stored(results, "steps_x")
    (sharded,) = run_on(1, steps_on, results, [*flags, "--samples", "1"])
    assert (plain["sharded"], sharded["sharded"]) == (False, True)
    first = [found["measures"]["first loss"]["value"] for found in (plain, sharded)]
    assert first[0] == first[1]
    assert all("--nproc_per_node 1" in line for line in run_on(2, steps_on, results, flags))


def test_the_first_size_that_fits_is_measured(results, monkeypatch):
    """Out of memory costs the seconds that it took, not the stage."""
    measure, tried = steps.measure, []

    def too_large(out, setting, args):
        tried.append(setting.config.batch_size)
        out.add("build", 1.0, "s")
        if setting.config.batch_size > 2:
            try:
                raise torch.OutOfMemoryError("CUDA out of memory")
            except torch.OutOfMemoryError as error:
                raise ValueError("out of memory on x") from error
        return measure(out, setting, args)

    monkeypatch.setattr(steps, "measure", too_large)
    flags = [
        "--name",
        "x",
        "--min_sample_seconds",
        "1e-6",
        "--samples",
        "1",
        "--profile_steps",
        "0",
        *TINY,
        "--sizes",
    ]
    assert steps.main([*flags, "8x1,4x2,2x4,1x8"]) == 0
    assert (
        tried == [8, 4, 2]
        and stored(results, "steps_x")["size"] == "2x4"
        and stored(results, "steps_x")["out_of_memory"] == ["8x1", "4x2"]
    )
    with pytest.raises(
        ValueError, match="out of memory at all of --sizes 8x1,4x2: give smaller ones"
    ):
        steps.main([*flags, "8x1,4x2"])
    monkeypatch.setattr(steps, "measure", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        steps.main([*flags, "8x1,4x2"])


def test_a_profiler_that_fails_leaves_the_speeds(results, monkeypatch):
    monkeypatch.setattr(steps, "time_by_kernel", lambda *given: (1.0, {}))
    assert (
        steps.main(
            [
                "--name",
                "x",
                "--sizes",
                "2x1",
                "--min_sample_seconds",
                "1e-6",
                "--samples",
                "1",
                *TINY,
            ]
        )
        == 1
    )
    told = stored(results, "steps_x")["measures"]
    assert (
        told["profiled wall"] == {"why": "ValueError: the profiler saw no kernel"}
        and told["speed"]["value"] > 0
    )


def test_seconds_to_compile_are_what_the_first_micro_batch_took_longer(results, monkeypatch):
    """train.dry_run says how long the last one took."""
    setting = steps.make_setting(
        steps.make_parser().parse_args(["--name", "x", "--sizes", "2x1", *TINY]), 2, 1
    )

    def dry_run(*given):
        time.sleep(0.3)
        return 0.05

    monkeypatch.setattr(setup, "dry_run", dry_run)
    _, seconds = steps.build(setting)
    assert seconds["compile"] >= 0.2 and seconds["build"] >= 0 and setup.dry_run is dry_run


def test_kernels_belong_to_parts():
    """Names as PyTorch's profiler gives them on a Hopper GPU."""
    names = {
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3f_64x64": "attention",
        "fmha_cutlassB_bf16_aligned_64x64_k32_sm80(PyTorchMemEffAttention::Kernel)": "attention",
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128>>": "attention",
        "void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<"
        "cutlass::gemm::GroupProblemShape<int>>>": "grouped products",
        "nvjet_tst_256x128_64x4_1x2_h_bz_coopA_NNT": "products",
        "sm80_xmma_gemm_f32f32_f32f32_f32_tn_n_tilesize32x32x8": "products",
        "void gemv2T_kernel_val<int, int, __nv_bfloat16>": "products",
        "triton_tem_fused_mm_3": "products",
        "triton_red_fused__to_copy_add_mul_scaled_dot_product_cudnn_attention_mm_4": "fused",
        "Memcpy HtoD (Pinned -> Device)": "copies",
        "void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor<float>>": "optimizer",
        "void at::native::elementwise_kernel<128, 4, at::native::gelu>": "other",
    }
    assert {name: steps.part_of(name) for name in names} == names


def test_seconds_of_a_gpus_kernels_are_summed_by_name():
    """Not of the operations on the host that launch them, nor of marks."""

    def event(name, kind, micros, mark=False):
        return SimpleNamespace(
            name=name,
            device_type=kind,
            is_user_annotation=mark,
            self_cpu_time_total=1000 * micros,
            time_range=SimpleNamespace(elapsed_us=lambda: micros),
        )

    events = [
        event("a", DeviceType.CUDA, 1),
        event("b", DeviceType.CUDA, 5),
        event("a", DeviceType.CUDA, 2),
        event("aten::mm", DeviceType.CPU, 99),
        event("Optimizer.step", DeviceType.CUDA, 50, mark=True),
    ]
    assert steps.sum_by_name(events, on_gpu=True) == {"b": (5e-6, 1), "a": (pytest.approx(3e-6), 2)}
    assert steps.sum_by_name(events[3:4], on_gpu=False) == {"aten::mm": (pytest.approx(0.099), 1)}


def test_prompts_have_lengths_that_nothing_has_met():
    for context, prompts in ((256, 5), (64, 5), (1024, 7)):
        lengths = latency.prompt_lengths(SimpleNamespace(context=context, prompts=prompts))
        assert (
            len(set(lengths)) == 3 * prompts
            and context not in lengths
            and min(lengths) > context / 2
        )


def test_one_text_is_decoded_and_first_tokens_are_timed(results, monkeypatch):
    allowed = []
    forward = latency.LLM.forward

    def noted(self, *given, **more):
        is_ours = self.layers[0].attention.device_attention is not None
        allowed.append("ours" if is_ours else torch.backends.cuda.cudnn_sdp_enabled())
        return forward(self, *given, **more)

    def attention(q_BHTD, k_BGSD, v_BGSD, mask, is_causal, dropout):
        return torch.nn.functional.scaled_dot_product_attention(
            q_BHTD, k_BGSD, v_BGSD, mask, dropout, is_causal, enable_gqa=True
        )

    make_model = latency.decode.make_model

    def as_on_a_gpu(*given):
        """With attention as choose_kernels sets it there, which takes no notice of the switch."""
        model = make_model(*given)
        for block in model.layers:
            block.attention.device_attention = attention
        return model

    monkeypatch.setattr(latency.decode, "make_model", as_on_a_gpu)

    monkeypatch.setattr(latency.LLM, "forward", noted)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    flags = [
        *TINY,
        "--no-use_attention_bias",
        "--context",
        "6",
        "--new_tokens",
        "4",
        "--prompts",
        "2",
    ]
    assert latency.main(["--name", "x", *flags]) == 0
    told = stored(results, "latency_x")
    found = {name: row["value"] for name, row in told["measures"].items()}
    assert found["graph tokens"] == found["compiled same tokens"] == 4
    assert (
        found["graph token"] == pytest.approx(1000 / found["graph speed"])
        and found["graph bandwidth"] > 0
    )
    ways = [
        f"{way} {times}" for way in ("decoder", "cudnn", "no cudnn") for times in ("new", "again")
    ]
    assert list(told["first_token_ms"]) == ways and all(
        len(ms) == 2 for ms in told["first_token_ms"].values()
    )
    assert all(found[f"first token {way}"] > 0 for way in ways)
    # Those of the two plain ways are PyTorch's choice: ours takes no cuDNN here, so that both ways
    # were the same.
    assert [way for way in allowed if way != "ours"] == [True] * 4 + [False] * 4
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


def test_what_the_compiler_breaks_leaves_the_rest(results, monkeypatch):
    Ours = latency.decode.Ours
    monkeypatch.setattr(
        latency.decode, "Ours", lambda model, **options: 1 / 0 if options else Ours(model)
    )
    assert (
        latency.main(
            ["--name", "x", *TINY, "--context", "6", "--new_tokens", "4", "--prompts", "1"]
        )
        == 1
    )
    told = stored(results, "latency_x")["measures"]
    assert (
        "ZeroDivisionError" in told["compiled same tokens"]["why"]
        and told["graph token"]["value"] > 0
    )


def test_the_probe_runs_on_a_cpu(results):
    """All figures, of what this machine has no kernel for the library's reason."""
    assert probe.main(["--name", "x", "--device", "cpu", *gpu_plan.TINY_PROBE]) == 0
    told = stored(results, "probe_x")
    names = {
        "product",
        "copy",
        *(f"grouped {which}" for which in ("forward", "dgrad", "wgrad")),
        "attention 32 table",
        *(
            f"attention {D} {kernel} {heads}"
            for D in (32, 64)
            for kernel in probe.BACKENDS
            for heads in ("grouped", "repeated")
        ),
    }
    assert (
        set(told["measures"]) == names
        and told["memory_bytes"] > 0
        and set(told["chosen_kernel"]) == {"32", "64"}
    )
    assert all(
        row["value"] > 0
        for name, row in told["measures"].items()
        if "cudnn" not in name and "efficient" not in name
    )
    assert "not supported here" in told["measures"]["attention 32 cudnn grouped"]["why"]
    # Each of them is looked for among the predictions by this name.
    assert {p.measure for p in gpu_plan.PREDICTIONS if p.stage == "probe"} <= names
    with pytest.raises(ValueError, match="rows must be above 0, not 0"):
        probe.main(["--name", "x", "--rows", "0"])


def test_the_grouped_products_are_the_models_own():
    """Forward and both gradients of w x for rows of each expert, as autograd makes them."""
    args = SimpleNamespace(rows=40, experts=3, d_in=8, d_out=16)
    products = probe.grouped_products(args, torch.device("cpu"), torch.float32)
    x_RI, dy_RO, w_EOI, ends_E = (
        next(
            cell.cell_contents
            for product in products.values()
            for name, cell in zip(product.__code__.co_freevars, product.__closure__, strict=True)
            if name == wanted
        )
        for wanted in ("x_RI", "dy_RO", "w_EOI", "ends_E")
    )
    begins = [0, *ends_E.tolist()]
    for e in range(3):
        rows = slice(begins[e], begins[e + 1])
        torch.testing.assert_close(products["forward"]()[rows], x_RI[rows] @ w_EOI[e].T)
        torch.testing.assert_close(products["dgrad"]()[rows], dy_RO[rows] @ w_EOI[e])
        torch.testing.assert_close(products["wgrad"]()[e], dy_RO[rows].T @ x_RI[rows])
    assert begins[-1] == 40


def test_predictions_name_what_is_measured():
    """A prediction for a measure that no program has would never be seen."""
    training = {
        "speed",
        "MFU",
        "memory",
        "first loss",
        *(f"{part}, profiled" for part in steps.KERNELS),
    }
    of_latency = {
        f"{side} {what}" for side in ("graph", "compiled") for what in ("speed", "token")
    } | {"first token cudnn new"}
    of_loss = {
        f"ours_{rows}_compiled {what}" for rows in (2048, 4096, 8192) for what in ("time", "memory")
    }
    for p in gpu_plan.PREDICTIONS:
        known = (
            training
            if p.stage in gpu_plan.SIZES
            else {"latency": of_latency, "loss": of_loss}.get(p.stage)
        )
        assert known is None or p.measure in known, p


# ---------------------------------------------------------------------------------- the GPU's tests
TESTS = """
import pytest, time
@pytest.fixture
def broken():
    raise KeyError("in the fixture")
def test_good(): pass
def test_bad(): assert 1 == 2, "one is not two"
def test_skipped(): pytest.skip("not here")
def test_error(broken): pass
"""


@pytest.mark.slow
def test_failed_tests_and_their_reasons_are_stored(results):
    """As each ends; and the second command takes those again that failed in the first."""
    folder = results / "suite"
    folder.mkdir()
    (folder / "test_it.py").write_text(TESTS)
    command = ["-m", "benchmarks.gpu_tests", "--name"]
    env = os.environ | {"GPTOSS_RESULTS": str(results)}
    where = ["-p", "no:cacheprovider", "--rootdir", str(folder), str(folder / "test_it.py")]
    done = children.run([*command, "x", "--", *where], env=env)
    told = stored(results, "tests_x")
    assert done.returncode == 1
    assert {name: row["value"] for name, row in told["measures"].items()} == {
        "passed": 1,
        "failed": 2,
        "skipped": 1,
    }
    reasons = {test.rpartition("::")[2]: why for test, why in told["failed"].items()}
    assert (
        set(reasons) == {"test_bad", "test_error"}
        and "one is not two" in reasons["test_bad"]
        and "in the fixture" in reasons["test_error"]
    )
    assert len(told["slowest_seconds"]) == 4


def test_only_what_failed_is_taken_again(results, monkeypatch):
    given = []
    monkeypatch.setattr(pytest, "main", lambda flags, plugins: given.append(flags) or 0)
    test = "tests/test_gpu.py::test_it_trains[flags0]"
    record = {
        "stages": {
            "probe": {"results": {"probe": {"failed": {"x": "y"}}}},
            "tests": {
                "results": {
                    "tests_x": {
                        "failed": {test: "why", "tests/gone.py::test_it": "why"},
                        "slowest_seconds": {},
                    }
                }
            },
            "modern": {"why": "no time was left"},
        }
    }
    (results / "x.json").write_text(json.dumps(record))
    assert (
        gpu_tests.main(
            ["--name", "y", "--failed_in", str(results / "x.json"), "--", "--maxfail", "4"]
        )
        == 0
    )
    assert given == [["-vv", "--maxfail", "4", test]]
    record["stages"]["tests"]["results"]["tests_x"]["failed"] = {}
    (results / "x.json").write_text(json.dumps(record))
    assert (
        gpu_tests.main(["--name", "y", "--failed_in", str(results / "x.json")]) == 0
        and len(given) == 1
    )
    with pytest.raises(
        ValueError,
        match=r"none.json is no result of benchmarks.gpu \(FileNotFoundError\): run its first",
    ):
        gpu_tests.main(["--name", "y", "--failed_in", str(results / "none.json")])


@pytest.mark.nightly
@pytest.mark.slow
def test_a_difference_between_two_runs_is_seen(tmp_path, data, results, monkeypatch):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert Run(data, tmp_path / name)("--max_steps", "4", "--seed", seed) == 0
    a, b, c = (tmp_path / name / "ckpt" for name in "abc")
    assert gpu_resume.different_tensors(a, b)[0] == []
    different, count = gpu_resume.different_tensors(a, c)
    assert len(different) > 5 and count > len(different)
    monkeypatch.setattr(gpu_resume, "cut_and_resume", lambda *given: (a, c))
    assert gpu_resume.main(["--name", "x", "--work", str(tmp_path / "work")]) == 1
    assert (
        stored(results, "resume_x")["measures"]["tensors that differ"]["value"] == len(different)
        and not (tmp_path / "work").exists()
    )
    assert Run(data, tmp_path / "d")("--max_steps", "5") == 0
    with pytest.raises(ValueError, match="ends at step 4 and"):
        gpu_resume.different_tensors(a, tmp_path / "d" / "ckpt")


# ---------------------------------------------------------------------------------- all of it, tiny
NO_DATASETS = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("datasets", "gguf", "llama_cpp"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Refuse())
"""


def test_the_tiny_plan_has_time_on_a_busy_machine(tmp_path):
    """Kernels that an interpreter runs met their 28 seconds, and the whole plan failed."""

    def seconds(tiny: bool) -> list[int]:
        args = SimpleNamespace(name="x", tiny=tiny, stages=["triton_tests", "triton_default"])
        stages = gpu.stages_of(args, "third", 1e10, tmp_path, tmp_path)
        return [stage.seconds for stage in stages.values()]

    assert seconds(True) == [10 * s for s in seconds(False)] == [280, 570]


@pytest.mark.nightly
@pytest.mark.slow
def test_all_commands_run_at_a_tiny_size(results, data):
    """Every program, with real shards.

    Without the library datasets, the tests' fixtures and a network.
    """
    (results / "sitecustomize.py").write_text(NO_DATASETS)
    out = results / "out"
    env = os.environ | {
        "PYTHONPATH": str(results),
        "GPTOSS_DATA": str(data),
        "GPTOSS_SHARED": str(results / "none"),
        "OMP_NUM_THREADS": "1",
    }
    told = {}
    for which in ("", "_second", "_third"):
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "benchmarks.gpu",
                "--name",
                "tiny",
                "--out",
                str(out),
                "--tiny",
                *([which.replace("_", "--")] if which else []),
            ],
            cwd=REPO,
            env=env,
            capture_output=True,
            text=True,
        )
        stem = f"tiny{which}"
        assert done.returncode == 0, (
            done.stdout + done.stderr + (out / f"{stem}.log").read_text()[-5000:]
        )
        told |= stored(out, stem)["stages"]
        assert "predicted" in done.stdout and "x off" not in done.stdout
    assert {path.name for path in out.iterdir()} == {
        f"tiny{which}.{kind}" for which in ("", "_second", "_third") for kind in ("log", "json")
    }
    assert list(told) == [
        *gpu_plan.first("x", GIB, True),
        *gpu_plan.second("x", True, "", ""),
        *gpu_plan.third("x", True),
    ]
    figures = {
        stage: {
            name: figure
            for results in record["results"].values()
            for name, figure in measures.measures_of(results).items()
        }
        for stage, record in told.items()
    }
    for stage in gpu_plan.SIZES:
        assert {"speed", "memory", "first loss", "loss", "profiled wall"} <= figures[stage].keys()
        assert next(iter(told[stage]["results"].values()))["data"] == "windows of shards"
    assert figures["no_table"]["first compile"]["value"] > 0
    assert {
        "graph token",
        "compiled token",
        "first token cudnn new",
        "first token no cudnn new",
    } <= figures["latency"].keys()
    assert {"ours_16 time", "ours_32 time", "ours_64 time"} <= figures[
        "loss"
    ].keys() and "ours speed" in figures["hugging_face"]
    assert (
        figures["resume"]["tensors that differ"]["value"] == 0
        and figures["tests"]["passed"]["value"] > 0
    )
    assert figures["triton_attention"]["table sdpa_expanded time"]["value"] > 0
    assert "Triton needs a CUDA GPU" in figures["triton_attention"]["table triton time"]["why"]
    # The setting reaches the stage that it is for, and no other.
    assert figures["triton_default"]["speed"]["value"] > 0
    assert told["triton_default"]["environment"] == {"GPTOSS_BIAS_KERNEL": "triton"}
    assert (out / "tiny_third.log").read_text().count(
        "note     plain operations compute attent"
    ) == 1
    assert not any((REPO / "benchmarks" / "results").glob("*tiny*"))


def test_steps_takes_every_preset_and_no_mask_that_is_asked_for(monkeypatch):
    """nano brings a document mask: its user was told to leave out a flag that was not given."""
    monkeypatch.setattr(bench, "random_tokens", lambda model_config, config: None)
    for name in ("nano", "plain-nano", "gptoss"):
        args = steps.make_parser().parse_args(["--name", "x", "--preset", name, "--sizes", "2x1"])
        assert not steps.make_setting(args, 2, 1).config.document_mask
    flags = ["--name", "x", "--preset", "nano", "--sizes", "2x1", "--document_mask"]
    with pytest.raises(ValueError, match="none of --resume.*--document_mask"):
        steps.make_setting(steps.make_parser().parse_args(flags), 2, 1)
