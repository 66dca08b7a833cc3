"""What needs llama-cpp-python: the export's own check in llama.cpp, and the benchmark of speeds.

Skipped where it is not installed: `make test-llamacpp` compiles it. What our files compute in
llama.cpp is in test_llamacpp.py, which needs no compiler.
"""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import common
from benchmarks import llama_cpp as benchmark
from config_model import TrainConfig
from runtime.checkpoint.write import save_checkpoint
from runtime.data.tokenizers import load_tokenizer
from runtime.interop.gguf import QUANTIZE
from scripts.export_gguf import main
from tests.builders import random_model, tiny_config
from tests.nightly import nightly_but

llama_cpp = pytest.importorskip(
    "llama_cpp", reason="llama-cpp-python is not installed (make test-llamacpp)"
)
pytestmark = pytest.mark.llamacpp


@pytest.mark.parametrize("quantize", nightly_but(QUANTIZE, 3))
def test_the_script_runs_its_file_in_llama_cpp(tmp_path, capsys, quantize):
    """(Not in the smallest shapes.)

    With fewer than 64 rows or columns llama.cpp's own products with q8_0 give NaN on CPUs with AMX.
    """
    shapes = dict(vocabulary_size=260, context_length=96, d_model=64, num_heads=8, d_ff=64)
    model = random_model(tiny_config(**shapes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                # (at 1.0 rounding grows from block to block).
                parameter.mul_(0.6)
    ckpt = save_checkpoint(
        tmp_path,
        1,
        model,
        None,
        train_config=TrainConfig(),
        tokenizer_state=load_tokenizer("byte").to_state(),
    )
    path = tmp_path / "model.gguf"
    assert main(["--ckpt", str(ckpt), "--out", str(path), "--quantize", quantize]) == 0
    out = capsys.readouterr().out
    assert "check: llama.cpp: the same 778 token ids" in out and "check: llama.cpp: l" in out


def test_the_benchmark_of_speeds(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(common, "REPO", tmp_path)
    # Samples are shorter than the clock's ticks.
    monkeypatch.setattr(
        benchmark,
        "alternate_undisturbed",
        lambda functions, repeats: common.alternate_undisturbed(functions, repeats, 99.0),
    )
    flags = {
        "name": "tiny",
        "context": 8,
        "prefill": 12,
        "new_tokens": 6,
        "repeats": 2,
        "min_sample_seconds": 1e-6,
        "num_threads": 1,
        "batch_sizes": (1, 3),
        "d_model": 64,
        "transformer_blocks": 2,
        "num_heads": 8,
        "num_kv_heads": 2,
        "d_ff": 64,
        "num_experts": 4,
        "vocabulary_size": 288,
        "context_length": 32,
        "expert_activation": "swiglu",
        "rms_norm_eps": 1e-6,
    }
    off = ("expert_bias", "out_proj_bias", "head_bias", "use_attention_bias")
    assert (
        benchmark.main(
            [
                part
                for name, value in flags.items()
                for part in (f"--{name}", *map(str, value if isinstance(value, tuple) else [value]))
            ]
            + [f"--no-{name}" for name in off]
        )
        == 0
    )
    stored = json.loads((tmp_path / "llama_cpp_tiny.json").read_text())
    three = stored["batched"]["3"]
    for found in (stored["decode"], stored["prefill"], three["sides"]):
        speeds = {name: side["tokens_per_sec"]["median"] for name, side in found.items()}
        pairs = benchmark.PAIRS.values()
        assert speeds.keys() == {name for pair in pairs for name in pair}
        assert min(speeds.values()) > 0
        for ours, theirs in pairs:
            ratio = speeds[ours] / speeds[theirs]
            assert found[ours]["ratio_to_llama_cpp"] == pytest.approx(ratio)
    sides = stored["sides"]
    assert sides["llama_f32"]["same_tokens"] == "6 of 6"
    assert three["agreement"]["same_tokens"] == "18 of 18"
    sizes = [sides[f"llama_{kind}"]["file_bytes"] for kind in ("f32", "q8_0", "q4_0")]
    assert sizes[0] > 2 * sizes[1] and sizes[1] > 1.2 * sizes[2]
    with pytest.raises(ValueError, match="do not fit the context_length 2048"):
        benchmark.main(
            [
                "--name",
                "tiny",
                "--context",
                "2040",
                "--no-use_attention_bias",
                "--vocabulary_size",
                "300",
                "--d_model",
                "64",
                "--transformer_blocks",
                "1",
                "--d_ff",
                "64",
                "--expert_activation",
                "swiglu",
                *(f"--no-{name}" for name in off),
            ]
        )
