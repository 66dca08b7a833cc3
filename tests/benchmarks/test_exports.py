"""benchmarks/exports.py and benchmarks/llama_cpp.py: they notice a reader that differs.

Also what they reject.
"""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from benchmarks import exports, llama_cpp
from model import generate
from tests.builders import random_model, tiny_config


class Reader:
    """Reads a model right, or from one token on wrong."""

    def __init__(self, model, wrong_from: int | None = None, error: float = 0.0):
        self.model, self.wrong_from, self.error = model, wrong_from, error

    def logits(self, ids: list[int]) -> np.ndarray:
        with torch.inference_mode():
            return self.model(torch.tensor([ids])).logits[0].numpy() + self.error

    def greedy(self, prompt: str, count: int) -> list[int]:
        ids = [
            int(i)
            for i in generate(self.model, torch.tensor([[len(prompt)]]), count, temperature=0)
        ]
        return (
            ids
            if self.wrong_from is None
            else ids[: self.wrong_from] + [-1] * (count - self.wrong_from)
        )


def test_a_reader_who_reads_otherwise_is_seen():
    model = random_model(tiny_config()).eval()
    stories, expected = (
        [[1, 2, 3], [4] * 9],
        {prompt: Reader(model).greedy(prompt, 12) for prompt in ("a", "bcd")},
    )
    right = exports.compare(Reader(model), model, stories, expected, 12)
    assert (
        right["largest_logit_difference"] == 0
        and right["tokens"] == 12
        and right["same_greedy_tokens"] == {"a": 12, "bcd": 12}
        and right["all_greedy_tokens_same"]
    )
    wrong = exports.compare(Reader(model, 5, 0.25), model, stories, expected, 12)
    assert (
        wrong["largest_logit_difference"] == pytest.approx(0.25, rel=1e-3)
        and wrong["same_greedy_tokens"] == {"a": 5, "bcd": 5}
        and not wrong["all_greedy_tokens_same"]
    )


@pytest.mark.nightly
@pytest.mark.slow
def test_a_script_that_fails_ends_it():
    """Its last words are kept; a figure of half an export would be none."""
    with pytest.raises(RuntimeError, match="no such file"):
        exports.run("-m", "scripts.export_hf", "--ckpt", "nowhere.pt", "--out", "nothing")


def test_sizes_are_of_weights(tmp_path):
    (tmp_path / "hf").mkdir()
    for name, size in (
        ("hf/model.safetensors", 10),
        ("hf/tokenizer.json", 5),
        ("m.onnx", 3),
        ("m.onnx.data", 20),
        ("m.tokenizer.json", 7),
    ):
        (tmp_path / name).write_bytes(bytes(size))
    assert exports.size_of(tmp_path / "hf") == 10 and exports.size_of(tmp_path / "m.onnx") == 23


@pytest.mark.parametrize("module", [exports, llama_cpp])
def test_a_checkpoint_has_a_model_of_its_own(module):
    with pytest.raises(ValueError, match="leave the model's flags out"):
        module.main(["--name", "x", "--ckpt", "a.pt", "--d_model", "64"])


@pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is not None, reason="llama-cpp-python is installed"
)
def test_llama_cpp_has_to_be_there():
    with pytest.raises(ValueError, match="pip install llama-cpp-python"):
        llama_cpp.main(["--name", "x"])
