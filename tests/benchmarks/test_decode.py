"""The benchmark of generation at a tiny size: what it counts, compares, rejects and stores."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import os
import sys

import pytest
import torch

from benchmarks import common, decode, tables
from benchmarks.common import Samples
from config_model import active_parameters, parameter_counts
from model import generate
from runtime.checkpoint.read import load_model
from runtime.data.loader import validation_batches
from runtime.data.shards import open_data
from runtime.inference.decoder import NOT_ASKED_FOR, Decoder
from runtime.inference.quantize import quantize_
from tests.builders import random_model, tiny_config
from tests.builders_runs import Run
from tests.numeric import assert_close, logits_bound, packed_bound, size_of

HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None
needs_transformers = pytest.mark.skipif(
    not HAS_TRANSFORMERS, reason="transformers is not installed"
)
MODEL = [
    "--d_model",
    "32",
    "--transformer_blocks",
    "2",
    "--num_heads",
    "4",
    "--num_kv_heads",
    "2",
    "--d_ff",
    "24",
    "--num_experts",
    "4",
    "--context_length",
    "48",
    "--expert_activation",
    "swiglu",
    "--no-expert_bias",
    "--no-out_proj_bias",
    "--no-head_bias",
    "--no-use_attention_bias",
    "--rms_norm_eps",
    "1e-6",
]
TINY = [
    *MODEL,
    "--name",
    "tiny",
    "--vocabulary_size",
    "61",
    "--device",
    "cpu",
    "--batch_sizes",
    "1",
    "3",
    "--contexts",
    "8",
    "0",
    "--prefill",
    "5",
    "48",
    "--new_tokens",
    "6",
    "--repeats",
    "2",
    "--min_sample_seconds",
    "1e-6",
    "--num_threads",
    "1",
]


@pytest.fixture
def results_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(common, "REPO", tmp_path)
    monkeypatch.setattr(decode, "BANDWIDTH_BYTES", {"cpu": 1 << 16})
    # Samples here are shorter than the clock's ticks.
    monkeypatch.setattr(
        decode,
        "alternate_undisturbed",
        lambda functions, repeats: common.alternate_undisturbed(functions, repeats, 99.0),
    )
    return tmp_path


def setting(*flags) -> decode.Setting:
    return decode.make_setting(decode.make_parser().parse_args([*TINY, *map(str, flags)]))


# --------------------------------------------------------------------------------------- arithmetic
@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(tie_embeddings=True),
        dict(
            expert_bias=True,
            out_proj_bias=True,
            head_bias=True,
            qkv_bias=True,
            use_attention_bias=True,
            top_k=3,
        ),
        dict(expert_activation="gelu", top_k=1, num_experts=7),
    ],
)
def test_a_token_reads_its_active_weights(changes):
    """Count all parameters except other experts' and the learned attention bias.

    The embedding counts as one row, or also as a whole where it is the head.
    """
    config = tiny_config(**changes)
    embedding = parameter_counts(config)["embedding"]
    expected = (
        active_parameters(config) + config.d_model - (0 if config.tie_embeddings else embedding)
    )
    model = random_model(config)
    assert decode.weight_bytes_per_token(model) == 4 * expected
    assert decode.weight_bytes_per_token(model.to(torch.bfloat16)) == 2 * expected


@pytest.mark.parametrize("tied", [False, True])
def test_a_token_reads_packed_weights(tied):
    c = tiny_config(tie_embeddings=tied)
    model = quantize_(random_model(c))
    q, kv, C, F = c.num_heads * 8, c.num_kv_heads * 8, c.d_model, c.d_ff
    matrices = [(q, C), (kv, C), (kv, C), (C, q), *c.top_k * [(2 * F, C), (C, F)]]
    # Router, norms, those of q and k.
    per_block = sum(rows * cols + 4 * rows for rows, cols in matrices) + 4 * (
        c.num_experts * C + 2 * C + 2 * 8
    )
    # Head, last norm, a row of the embedding.
    assert (
        decode.weight_bytes_per_token(model)
        == 2 * per_block + c.vocabulary_size * (C + 4) + 4 * C + 4 * C
    )


def test_a_token_reads_its_context():
    config = tiny_config(transformer_blocks=3)
    assert decode.context_bytes_per_token(config, 100, 2) == 3 * 100 * 2 * 2 * 8 * 2
    windowed = tiny_config(
        transformer_blocks=3,
        sliding_window=10,
        window_pattern="alternating",
        use_attention_bias=True,
    )
    assert decode.context_bytes_per_token(windowed, 20, 4) == (10 + 20 + 10) * (2 * 2 * 8 + 4) * 4


def test_ratios_are_to_the_best_of_hugging_face():
    sides = {
        "ours": {"tokens_per_sec": {"median": 60.0}},
        "hf_eager": {"tokens_per_sec": {"median": 10.0}},
        "hf_grouped": {"tokens_per_sec": {"median": 20.0}},
        "hf_compiled": {"failed": "no"},
    }
    decode.add_ratios(sides)
    assert [side.get("ratio_to_hf") for side in sides.values()] == [3.0, 0.5, 1.0, None]
    alone = {"ours": {"tokens_per_sec": {"median": 60.0}}}
    decode.add_ratios(alone)
    assert "ratio_to_hf" not in alone["ours"]


def test_speed_of_samples():
    stored = decode.speed(12, Samples([2.0, 3.0, 4.0], discarded=1))
    assert stored == {
        "tokens_per_sec": {"median": 4.0, "min": 3.0, "max": 6.0},
        "samples": 3,
        "discarded_samples": 1,
        "disturbed": False,
    }


def test_a_run_is_timed_from_its_first_token(monkeypatch):
    clock = iter([5.0, 6.0, 8.0])
    monkeypatch.setattr(decode.time, "perf_counter", lambda: next(clock))
    run = decode.timed([[1, 2], [3, 4], [5, 6]], 1.0)
    assert run == decode.Run([[1, 3, 5], [2, 4, 6]], 4.0, 3.0)


def test_bandwidth_counts_both_directions_of_a_copy(monkeypatch):
    monkeypatch.setattr(decode, "BANDWIDTH_BYTES", {"cpu": 1 << 10})
    monkeypatch.setattr(
        decode,
        "repeated",
        lambda function, min_seconds, device: (
            lambda: 2.0 if function.__name__ == "<lambda>" else 3.0
        ),
    )
    timers = decode.bandwidth_timers(torch.device("cpu"), 1.0)
    assert timers["copy"]() == 2.0 / 2048 and timers["read"]() == 3.0 / 1024


# ---------------------------------------------------------------------------------- the same tokens
def test_the_same_tokens():
    assert decode.first_differences([[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 0, 6]]) == [None, 1]
    model = random_model(tiny_config())
    prompts = torch.randint(61, (2, 7), generator=torch.Generator().manual_seed(3))
    reference = torch.stack(list(generate(model, prompts, 5, temperature=0)), dim=1).tolist()
    assert decode.compare_tokens(model, prompts, reference, reference) == {
        "same_tokens": "10 of 10"
    }
    other = copy.deepcopy(reference)
    logits = model(torch.tensor([prompts[1].tolist() + reference[1][:3]])).logits[0, -1]
    other[1][3] = int(logits.topk(2).indices[1])
    found = decode.compare_tokens(model, prompts, reference, other)
    # What follows a difference continues another text.
    assert found["same_tokens"] == "8 of 10"
    # A gap is as exact as the logits are.
    bound, size = (
        logits_bound(model.config, 12),
        size_of(logits),
    )
    best, second = logits.topk(2).values
    assert_close(found["first_difference_gap"], best - second, bound, size=size)
    # A token that no rounding puts first is told from one that ties with the second.
    other[1][3] = int(logits.argmin())
    for sides in ((reference, other), (other, reference)):
        found = decode.compare_tokens(model, prompts, *sides)
        assert_close(found["first_difference_gap"], logits.max() - logits.min(), bound, size=size)


class Wrong(decode.Plain):
    """Draws its last token at random."""

    def run(self, prompts_BT, new_tokens, fresh=True):
        run = super().run(prompts_BT, new_tokens)
        for row in run.ids:
            row[-1] = (row[-1] + 1) % 61
        return run


def test_a_side_with_other_tokens_fails_alone(results_folder, monkeypatch, capsys):
    monkeypatch.setattr(decode, "Plain", Wrong)
    assert (
        decode.main(
            [
                *TINY,
                "--variants",
                "ours",
                "plain",
                "ours_torch",
                "--batch_sizes",
                "3",
                "--contexts",
                "8",
                "--prefill",
            ]
        )
        == 1
    )
    (cell,) = json.loads((results_folder / "decode_tiny.json").read_text())["decode"]
    assert (
        cell["sides"]["plain"]["failed"].startswith(
            "draws another token than ours where the logits are"
        )
        and "tokens_per_sec" not in cell["sides"]["plain"]
    )
    assert (
        cell["sides"]["plain"]["same_tokens"] == "15 of 18"
        and cell["sides"]["ours_torch"]["same_tokens"] == "18 of 18"
    )
    assert "no plain at 3 x 8: draws another token" in capsys.readouterr().out


def test_what_fails_costs_the_others_nothing(results_folder, monkeypatch, capsys):
    monkeypatch.setattr(decode, "make_hf", lambda setting, model: 1 / 0)
    monkeypatch.setattr(decode.Plain, "run", lambda self, prompts_BT, new_tokens, fresh=True: [][0])
    assert (
        decode.main(
            [
                *TINY,
                "--variants",
                "ours",
                "plain",
                "hf_eager",
                "--batch_sizes",
                "1",
                "--contexts",
                "8",
                "--prefill",
                "5",
            ]
        )
        == 1
    )
    results = json.loads((results_folder / "decode_tiny.json").read_text())
    assert results["sides"]["hf_eager"]["failed"] == "ZeroDivisionError: division by zero"
    for cell in results["decode"] + results["prefill"]:
        assert (
            cell["sides"]["plain"] == {"failed": "IndexError: list index out of range"}
            and cell["sides"]["ours"]["tokens_per_sec"]["median"] > 0
        )
        assert "hf_eager" not in cell["sides"]
    assert "no hf_eager: ZeroDivisionError" in capsys.readouterr().out


def test_what_hugging_face_cannot_be_is_told(results_folder):
    """Asked for by name it has failed; of the default sides it is left out."""
    flags = [*TINY, "--expert_bias", "--batch_sizes", "1", "--contexts", "8", "--prefill"]
    assert decode.main([*flags, "--variants", "ours", "hf_grouped"]) == 1
    results = json.loads((results_folder / "decode_tiny.json").read_text())
    assert (
        "cannot have expert_bias True" in results["sides"]["hf_grouped"]["failed"]
        or not HAS_TRANSFORMERS
    )
    s = setting("--expert_bias")
    assert s.names == ["ours", "ours_int8", "ours_int4", "ours_torch", "plain"] and set(
        s.left_out
    ) == {
        "hf_eager",
        "hf_grouped",
        "hf_batched",
        "hf_compiled",
    }


# ----------------------------------------------------------------------------------------- rejected
@pytest.mark.parametrize(
    "flags, message",
    [
        (["--contexts", "43"], "contexts 43 and new_tokens 6 do not fit the context_length 48"),
        (["--contexts", "-1"], "contexts -1"),
        (["--new_tokens", "48", "--contexts", "0"], "contexts 0 and new_tokens 48 do not fit"),
        (["--new_tokens", "1"], "new_tokens must be at least 2, not 1"),
        (["--prefill", "49"], "prefill 49 must be from 1 to context_length 48"),
        (["--prefill", "0"], "prefill 0 must be"),
        (["--repeats", "0"], "repeats must be at least 1"),
        (["--batch_sizes", "0"], "batch_sizes must be at least 1, not 0"),
        (["--hf_batches", "2"], "hf_batches 2 is not among batch_sizes: 1, 3"),
        (["--variants", "ours", "nonsense"], "unknown variant 'nonsense'"),
        (["--variants", "ours_compiled"], "ours_compiled is for cuda, and this runs on cpu"),
        (["--variants"], "nothing to measure"),
        (["--val_windows", "0"], "val_windows must be at least 1"),
        (["--min_sample_seconds", "0"], "min_sample_seconds and weight_scale"),
        (["--data_dir", "nowhere"], "nowhere has no prepared text"),
        (["--launch", "nowhere.pt"], "predict.py --ckpt ... failed: error: "),
    ],
)
def test_impossible_settings_are_refused(flags, message, results_folder):
    with pytest.raises(ValueError, match=message) as error:
        decode.main([*TINY, *flags])
    assert "\n" not in str(error.value) and not list(results_folder.glob("*.json"))


def test_settings(data):
    s = setting("--contexts", "0", "8", "--hf_batches", "3")
    assert (
        s.contexts == [42, 8]
        and s.hf_batches == [3]
        and s.dtype == torch.float32
        and s.prompts_BT.shape == (3, 48)
    )
    assert (
        torch.equal(s.prompts_BT, setting("--contexts", "0", "8").prompts_BT)
        and s.tokens == "random ids"
    )
    assert setting().hf_batches == [1] and setting("--hf_batches").hf_batches == []
    with pytest.raises(ValueError, match="smaller than the data's"):
        setting("--data_dir", data)
    s = setting("--data_dir", data, "--vocabulary_size", 300)
    assert (
        s.prompts_BT.flatten().tolist() == open_data(data)[1].read(0, 3 * 48).tolist()
        and s.config.vocabulary_size == 300
        and "(byte)" in s.tokens
    )
    with pytest.raises(ValueError, match="10000 prompts of 48 need 480,000"):
        setting("--data_dir", data, "--vocabulary_size", 300, "--batch_sizes", 10_000)
    parser = decode.make_parser()
    flags = [f for f in TINY if f not in ("--vocabulary_size", "61")]
    assert (
        decode.make_setting(
            parser.parse_args([*flags, "--data_dir", str(data)])
        ).config.vocabulary_size
        == open_data(data)[1].vocabulary_size
    )


# ---------------------------------------------------------------------------------- the whole of it
@pytest.mark.slow
@needs_transformers
def test_the_benchmark_of_generation(results_folder, capsys):
    """Every cell has every side, and the sides draw the same tokens.

    Each ratio is what its name says.
    """
    names = ["ours", "ours_int8", "ours_int4", "plain", "hf_eager"]
    assert decode.main([*TINY, "--variants", *names, "--hf_batches", "1", "3"]) == 0
    results = json.loads((results_folder / "decode_tiny.json").read_text())
    assert (
        {"command", "commit", "hardware", "versions"} <= results["environment"].keys()
        and list(results["sides"]) == names
        and results["left_out"] == {}
    )
    assert [(cell["batch_size"], cell["context"]) for cell in results["decode"]] == [
        (1, 8),
        (1, 42),
        (3, 8),
        (3, 42),
    ]
    assert (
        [cell["tokens"] for cell in results["prefill"]] == [5, 48]
        and results["model"]["context_length"] == 48
        and results["threads"] == 1
    )
    for cell in results["decode"]:
        B = cell["batch_size"]
        assert (
            list(cell["sides"]) == names
            and cell["reference"] == "ours"
            and 1 <= cell["distinct_tokens"] <= 6 * B
        )
        for name, side in cell["sides"].items():
            assert side.get("same_tokens", "") == (
                "" if name in decode.PACKED else f"{6 * B} of {6 * B}"
            ), name
            assert (
                side["samples"] == 2
                and side["tokens_per_sec"]["min"]
                <= side["tokens_per_sec"]["median"]
                <= side["tokens_per_sec"]["max"]
            )
            assert (
                side["ratio_to_hf"]
                == side["tokens_per_sec"]["median"]
                / cell["sides"]["hf_eager"]["tokens_per_sec"]["median"]
            )
            if B == 1:
                assert side["achieved_gb_s"] == pytest.approx(
                    side["bytes_per_token"] * side["tokens_per_sec"]["median"] / 1e9
                )
                assert side["share_of_bandwidth"] == pytest.approx(
                    side["achieved_gb_s"] / max(cell["copy_gb_s"], cell["read_gb_s"])
                )
            else:
                assert (
                    not {"bytes_per_token", "achieved_gb_s", "share_of_bandwidth"} & side.keys()
                    and "copy_gb_s" not in cell
                )
    short, long, *_ = results["decode"]
    for name in names:
        # Blocks, keys and values, heads, features.
        assert (
            long["sides"][name]["bytes_per_token"] - short["sides"][name]["bytes_per_token"]
            == (42 - 8) * 2 * 2 * 2 * 8 * 4
        )
        assert (
            short["sides"]["ours_int8"]["bytes_per_token"] < short["sides"][name]["bytes_per_token"]
            or name in decode.PACKED
        )
    for cell in results["prefill"]:
        assert list(cell["sides"]) == names and all(
            side["tokens_per_sec"]["median"] > 0 and side["ratio_to_hf"] > 0
            for side in cell["sides"].values()
        )
    printed = capsys.readouterr().out
    assert (
        "x Hugging Face's best, decoding 1 x 8: ours " in printed
        and "of the memory's speed, 1 x 42: ours " in printed
    )


@needs_transformers
def test_each_side_runs_what_its_name_says(monkeypatch):
    s = setting("--variants", "ours", "ours_torch", "hf_grouped", "hf_batched", "hf_compiled")
    model = decode.make_model(s, 3.0)
    sides, failed = decode.build_sides(s, model)
    assert (
        failed == {}
        and sides["ours"].model is model
        and sides["ours_torch"].facts == {"native": False, "why_not_native": NOT_ASKED_FOR}
    )
    assert (
        sides["ours"].facts["native"] == (sides["ours"].decoder.native is not None)
        and not sides["hf_grouped"].hf.config.output_router_logits
    )
    modes, ids = [], {}
    hf = sides["hf_grouped"].hf
    forward = hf.forward
    monkeypatch.setattr(
        hf,
        "forward",
        lambda *a, **k: (
            modes.append((hf.config._experts_implementation, type(k["past_key_values"]).__name__))
            or forward(*a, **k)
        ),
    )
    compiled = []
    monkeypatch.setattr(
        torch, "compile", lambda function, **kwargs: compiled.append(kwargs["mode"]) or function
    )
    for name, side in sides.items():
        side.make_room(1, 12)
        ids[name] = side.run(s.prompts_BT[:1, :8], 4).ids
    assert all(drawn == ids["ours"] and len(drawn[0]) == 4 for drawn in ids.values())
    assert (
        modes
        == [("grouped_mm", "DynamicCache")] * 5
        + [("batched_mm", "DynamicCache")] * 3
        + [("grouped_mm", "StaticCache")]
        + [("batched_mm", "StaticCache")] * 3
    )
    assert compiled == ["default"]


def test_random_weights_are_scaled_but_for_norms():
    s = setting()
    torch.manual_seed(decode.SEED)
    plain, scaled = decode.make_model(s, 1.0), decode.make_model(s, 3.0)
    assert (
        torch.equal(scaled.embed.weight, 3 * plain.embed.weight)
        and torch.equal(scaled.norm.weight, torch.ones(32))
        and not scaled.training
    )


# -------------------------------------------------------------------------------- with a checkpoint
@pytest.mark.slow
def test_perplexity_of_packed_weights(data, tmp_path, results_folder):
    run = Run(data, tmp_path / "run")
    assert run("--max_steps", "6") == 0
    ckpt = str(run.ckpt_dir / "latest.pt")
    assert (
        decode.main([*TINY, "--variants", "--perplexity", ckpt, str(data), "--val_windows", "5"])
        == 0
    )
    results = json.loads((results_folder / "decode_tiny.json").read_text())
    p = results["perplexity"]
    assert "decode" not in results and p["windows"] == 5 and p["tokens"] == 5 * 16
    for what in ("float32", "int8", "int4"):
        model, _ = load_model(ckpt)
        model = model if what == "float32" else quantize_(model, what)
        with torch.no_grad():
            outs = [model(x, y) for x, y in validation_batches(open_data(data)[1], 16, 1, 5)]
        expected = sum(out.cross_entropy_sum for out in outs) / sum(out.num_targets for out in outs)
        bound = logits_bound(model.config, 16) + packed_bound(model)
        if what == "int4" and Decoder(model).native is not None:
            # As it is decoded: with inputs of 8 bits.
            assert abs(p["cross_entropy"][what] - expected) > 1e-5 * expected
            bound = 1e-2
        assert_close(p["cross_entropy"][what], expected, bound)
        assert p["perplexity"][what] == pytest.approx(math.exp(p["cross_entropy"][what]))
    for kind, name in (("int8", "ratio"), ("int4", "ratio_int4")):
        assert p[name] == pytest.approx(p["perplexity"][kind] / p["perplexity"]["float32"])
        assert p[name] != 1


def test_another_text_is_refused(data, monkeypatch):
    model = random_model(tiny_config())
    for state, message in (
        (
            {"fingerprint": "other", "name": "bpe:61"},
            "trained with tokenizer bpe:61, and .* was made with byte",
        ),
        (None, "ids and the model in .* 61"),
    ):
        monkeypatch.setattr(
            decode,
            "load_model",
            lambda ckpt, device, state=state: (model, type("", (), {"tokenizer_state": state})),
        )
        with pytest.raises(ValueError, match=message):
            decode.measure_perplexity("x.pt", str(data), torch.device("cpu"), 2)


def test_launch_is_beside_the_import_of_torch(results_folder, monkeypatch):
    calls, seconds = [], iter([9.0, 9.0, 3.0, 1.0, 5.0, 1.5])
    monkeypatch.setattr(
        decode, "launch_seconds", lambda command: calls.append(command) or next(seconds)
    )
    assert decode.main([*TINY, "--variants", "--launch", "some.pt"]) == 0
    predict = [
        sys.executable,
        "predict.py",
        "--ckpt",
        os.path.abspath("some.pt"),
        "--prompt",
        "x",
        "--max_new_tokens",
        "1",
        "--quiet",
    ]
    # The first two fill the page cache.
    assert calls == [predict, [sys.executable, "-c", "import torch"]] * 3
    launch = json.loads((results_folder / "decode_tiny.json").read_text())["launch"]
    assert (
        launch["predict_s"] == {"median": 4.0, "min": 3.0, "max": 5.0}
        and launch["import_torch_s"]["median"] == 1.25
        and launch["difference_s"] == 2.75
    )


def test_a_launched_process_has_pytorchs_own_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("GOMP_SPINCOUNT", "1")
    assert (
        decode.launch_seconds(
            [
                sys.executable,
                "-c",
                "import os; exit('OMP_NUM_THREADS' in os.environ or 'GOMP_SPINCOUNT' in "
                "os.environ)",
            ]
        )
        > 0
    )
    with pytest.raises(ValueError, match="-c .* failed: no luck"):
        decode.launch_seconds(
            [sys.executable, "-c", "import sys; sys.exit('Traceback:\\nno luck')"]
        )


# ----------------------------------------------------------------------------- the table, the stage
def test_the_table_of_generation(monkeypatch):
    def side(speed, ratio=None, **more):
        return (
            {"tokens_per_sec": {"median": speed}, "disturbed": False}
            | ({} if ratio is None else {"ratio_to_hf": ratio})
            | more
        )

    def result(scale):
        return {
            "environment": {
                "hardware": {"gpus": [], "cpu": "Some CPU"},
                "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
            },
            "device": "cpu (2 threads)",
            "sides": {"ours": {}, "hf_eager": {}, "hf_compiled": {"failed": "x"}},
            "decode": [
                {
                    "batch_size": 1,
                    "context": 1024,
                    "sides": {"ours": side(1.0, 1.0, share_of_bandwidth=0.1)},
                },
                {
                    "batch_size": 1,
                    "context": 128,
                    "sides": {
                        "ours": side(1500.0 * scale, 6.125, share_of_bandwidth=0.857),
                        "hf_eager": side(240.0 * scale, 1.0, share_of_bandwidth=0.14),
                    },
                },
                {"batch_size": 8, "context": 128, "sides": {"ours": side(4000.0 * scale)}},
                {"batch_size": 32, "context": 128, "sides": {"ours": {"failed": "out of memory"}}},
            ],
            "prefill": [
                {
                    "tokens": 64,
                    "sides": {
                        "ours": side(6400.0, 2.5),
                        "hf_eager": side(2560.0, 1.0, disturbed=True),
                    },
                },
                {"tokens": 1024, "sides": {"ours": side(9000.0)}},
            ],
        }

    stored = {"decode_cpu_56m": result(1.0), "decode_cpu_330m": result(0.25)}
    monkeypatch.setattr(tables, "stored", stored.__getitem__)
    header, line, *rows = tables.decoding_table().splitlines()
    assert header.count("|") == line.count("|") == rows[0].count("|") == 8
    assert rows[:4] == [
        "| 55 M, vocabulary 8,192 | gptoss (C kernel) | 1,500 | 6.12 | 86 % | 4,000 |  |",
        "|  | Hugging Face, eager experts | 240 | 1.00 | 14 % |  |  |",
        "| 328 M, vocabulary 50,304 | gptoss (C kernel) | 375 | 6.12 | 86 % | 1,000 |  |",
        "|  | Hugging Face, eager experts | 60 | 1.00 | 14 % |  |  |",
    ]
    caption = rows[5]
    assert rows[4] == "" and len(rows) == 6
    assert "Some CPU, cpu (2 threads), torch 2.13.0, transformers 5.23.0." in caption
    assert "`decode_cpu_56m.json`, `decode_cpu_330m.json`" in caption
    header, line, *rows = tables.prompts_table().splitlines()
    assert "prompt of 1,024" in header
    assert header.count("|") == line.count("|") == rows[0].count("|") == 6
    eager = "|  | Hugging Face, eager experts (machine was busy) | 2,560 (1.00 x) |  |  |"
    assert rows[:4] == [
        "| 55 M, vocabulary 8,192 | gptoss (C kernel) | 6,400 (2.50 x) |  | 9,000 |",
        eager,
        "| 328 M, vocabulary 50,304 | gptoss (C kernel) | 6,400 (2.50 x) |  | 9,000 |",
        eager,
    ]
    assert rows[4:] == [
        "",
        caption.replace(caption.partition(" Some")[0], "Prompt tokens/s, float32."),
    ]
    assert tables.DECODERS.keys() == decode.VARIANTS.keys()
