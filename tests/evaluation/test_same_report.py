"""scripts/evaluate: one report, byte for byte, whatever is scored together."""

from __future__ import annotations

import pytest
import torch

from runtime.evaluation.writing import as_json
from runtime.inference import scorer as scorer_module
from tests.builders_evaluation import byte_model, checkpoint, report_of, texts, write_texts


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.nightly
def test_the_report_is_the_same_bytes_whatever_the_batches(tmp_path, monkeypatch):
    """Buffers, slots, rows of a pass, shared beginnings, threads, and the order of the lines."""
    files = write_texts(tmp_path / "valid.jsonl", texts(40))
    ckpt = checkpoint(tmp_path / "model", byte_model(1, context_length=24))
    report = report_of(ckpt, files, experts=True)
    assert report["checkpoint"]["computed_by"]["is_exact"]
    wanted = as_json(report)
    shuffled = texts(40)[::-1]
    for changes, threads, some in (
        (dict(BUFFER_TOKENS=64), 1, None),
        (dict(SLOTS=3, PASS_ROWS=7), 1, None),
        (dict(LEAST_SHARED=10**9), 1, None),
        ({}, 2, None),
        (dict(BUFFER_TOKENS=200, SLOTS=5), 2, shuffled),
    ):
        with monkeypatch.context() as patch:
            for name, value in changes.items():
                patch.setattr(scorer_module, name, value)
            if some is not None:
                write_texts(tmp_path / "valid.jsonl", some)
            again = as_json(report_of(ckpt, files, experts=True, num_threads=threads))
        assert again == wanted, changes
