"""benchmarks/serving.py and soak.py: real servers and clients at tiny size, and their figures."""

from __future__ import annotations

import json

import pytest

from benchmarks import common, engine, serving, soak, tables
from benchmarks.serving_clients import Answered
from runtime.inference import decoder
from tests.builders_server_process import HAS_PROC

TINY = ["--d_model", "32", "--transformer_blocks", "2", "--num_heads", "4", "--num_kv_heads", "2"]
TINY += ["--num_experts", "4", "--d_ff", "32", "--vocabulary_size", "300"]
TINY += ["--context_length", "64"]


@pytest.fixture
def bench(tmp_path):
    flags = ["--name", "tiny", "--clients", "1", "2", "--new_tokens", "8", "--prompt_tokens", "4"]
    flags += ["--requests", "2", "--repeats", "1", "--idle_seconds", "0.1"]
    return serving.bench_of(serving.make_parser().parse_args([*flags, *TINY]), tmp_path)


@pytest.mark.nightly
def test_all_sides_answer(bench):
    """The server, generation without it and predict.py: each gives the tokens it is asked for."""
    found = serving.scaling(bench, "none")
    sides = {"1 clients", "2 clients", "generate 1", "generate 2", "predict", "2 streams"}
    assert set(found["tokens_per_sec"]) == sides
    assert all(one["min"] > 0 for one in found["tokens_per_sec"].values())
    assert set(found["ratios"]) == {
        "2 clients over 1",
        "1 clients over generate",
        "2 clients over generate",
        "1 clients over predict",
    }


def test_passes_are_counted_to_the_first_token_and_between_tokens(bench):
    found = serving.passes(bench, rounds=2)
    assert found["to_first_token"]["min"] >= 1 and found["between_tokens_p99"] >= 1
    assert found["between_tokens_max"] <= serving.TARGETS["p99 of passes between tokens"]


def test_ratios_are_of_rounds():
    """A slow spell of the machine halves both sides of its round: no ratio of medians is right."""
    speeds = {"1 clients": [10, 5, 12], "8 clients": [15, 7.5, 15], "generate 1": [20, 10, 24]}
    speeds |= {"generate 8": [20, 10, 20], "predict": [40, 20, 24]}
    found = {
        name: {"of_each_round": values, "rounds": [0, 1, 2]} for name, values in speeds.items()
    }
    assert serving.ratios(found, [1, 8]) == {
        "8 clients over 1": 1.5,
        "1 clients over generate": 0.5,
        "8 clients over generate": 0.75,
        "1 clients over predict": 0.25,
    }


def test_a_sample_that_was_measured_again_is_paired_with_its_own_round():
    """The ratios paired the n-th values of both sides, whatever rounds they were measured in.

    Here "a" is 2 times as fast as "b" in each round, and its round 0 was measured again in round 3.
    """
    found = {
        "a": {"of_each_round": [20, 40, 80], "rounds": [1, 2, 3]},
        "b": {"of_each_round": [5, 10, 20], "rounds": [0, 1, 2]},
    }
    assert serving.ratio(found, "a", "b") == 2
    # Of sides that share no round, the medians.
    found["a"]["rounds"] = [3, 4, 5]
    assert serving.ratio(found, "a", "b") == 4


def test_speeds_say_in_which_round_each_value_was_measured(bench, monkeypatch):
    """The first round of "a" is spoilt, and it is measured again when the others are done."""
    foreign = iter([1.0, 0.0, 0.0, 0.0, 0.0])
    monkeypatch.setattr(common, "foreign_cores", lambda before, after: next(foreign))
    bench.args.repeats = 2
    found = bench.speeds({"a": lambda: 2.0, "b": lambda: 1.0})
    assert found["a"]["rounds"] == [1, 2] and found["a"]["discarded"] == 1
    assert found["b"]["rounds"] == [0, 1]
    assert serving.ratio(found, "a", "b") == 2


def test_gaps_are_between_events():
    assert Answered(200, 3, 1.0, {}, [0.5, 0.75, 0.8125]).gaps_s == [0.25, 0.0625]


def test_sizes_that_do_not_fit_are_refused(tmp_path):
    flags = ["--name", "x", "--new_tokens", "64", "--prompt_tokens", "8", *TINY]
    with pytest.raises(ValueError, match="do not fit the context_length 64"):
        serving.bench_of(serving.make_parser().parse_args(flags), tmp_path)


def test_growth_is_from_the_second_tenth_to_the_last():
    """The first tenth fills caches: it counts for nothing."""
    memory = [(float(i), 100 if i < 10 else 200 + (i >= 90) * 7) for i in range(100)]
    assert soak.growth(memory) == 7
    assert soak.growth([(0.0, 5), (1.0, 6)]) == 0


@pytest.mark.nightly
@pytest.mark.skipif(not HAS_PROC, reason="memory is read from Linux's /proc")
def test_a_short_soak_compares_answers(monkeypatch):
    monkeypatch.setattr(soak, "SAMPLE_SECONDS", 0.2)
    from runtime.inference.predictor import READY

    found = soak.soak(READY, 2.0, 2)
    assert found["num_wrong"] == 0 and found["same_as_alone"] > 0 and found["memory_mib"]


@pytest.mark.parametrize("kernel", [True, False])
def test_the_engine_without_http_is_measured_by_both_readers(tmp_path, monkeypatch, capsys, kernel):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    if not kernel:
        monkeypatch.setattr(decoder, "native_model", lambda model: (None, "a test's reason"))
    flags = ["--name", "x", "--device", "cpu", "--clients", "1", "3", "--prompt_tokens", "5"]
    assert engine.main([*flags, "--new_tokens", "6", "--repeats", "1", *TINY]) == 0
    assert ("the C kernel reads" if kernel else "PyTorch reads") in capsys.readouterr().out
    cells = json.loads((tmp_path / "engine_x.json").read_text())["cells"]
    assert [cell["requests"] for cell in cells] == [1, 3]
    assert all(cell["ratio"] > 0 and cell["first_ms"] > 0 for cell in cells)


def test_the_guide_names_the_targets_that_were_missed():
    """A figure below its target stood in a table without a word."""
    ratios = {"8 clients over 1": 2.0, "32 clients over 1": 1.7, "1 clients over generate": 0.9}
    ratios |= {"8 clients over generate": 0.8951, "1 clients over predict": 0.5}
    side = {"scaling": {"ratios": ratios, "idle": {"cpu_seconds": 0.0}}, "llama.cpp": {"ratio": 1}}
    good = {"8 clients over 1": 1.3, "8 clients over generate": 1.0}
    other = {"scaling": {"ratios": good, "idle": {"cpu_seconds": 0.5}}, "llama.cpp": {"ratio": 0.5}}
    passes = {"to_first_token": {"median": 4}, "between_tokens_p99": 3}
    result = {"targets": serving.TARGETS, "none": side, "int8": other, "passes": passes}
    assert tables._missed_targets(result) == [
        "float32, 8 clients over generate: 0.895 (0.9)",
        "float32, 1 client over predict: 0.500 (0.9)",
        "8 bits, 8 clients over llama.cpp: 0.500 (1)",
        "8 bits, idle CPU seconds: 0.5 (0)",
        "passes to the first token of a short prompt: 4 (3)",
    ]
    # As stored, they stand in the guide.
    for line in tables._missed_targets(tables.stored(tables.SERVING)):
        assert line in (common.REPO / "docs/serving.md").read_text()
