"""The benchmarks that need a large machine, run at a tiny size: they measure what they say and store where it came from."""
import json

import pytest

from benchmarks import common, end_to_end
from tests.test_train import MODEL, data  # noqa: F401  (a fixture)


def test_end_to_end_figures(data, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(common, "REPO", tmp_path)
    monkeypatch.setenv("GPTOSS_DATA", str(data))
    flags = [*MODEL, "--name", "tiny", "--max_steps", "12", "--warmup_steps", "2", "--batch_size", "2", "--grad_accum", "2", "--lr", "1e-2", "--min_lr", "1e-3",
             "--val_steps", "2", "--device", "cpu", "--context_length", "32", "--prompt_tokens", "8", "--new_tokens", "16", "--repeats", "2"]
    assert end_to_end.main(flags) == 0
    results = json.loads((tmp_path / "end_to_end_tiny.json").read_text())
    assert {"command", "commit", "hardware", "versions"} <= results["environment"].keys()
    training = results["training"]
    assert len(training["losses"]) == 12 and training["validation_loss"]["after"] < training["validation_loss"]["before"]
    assert training["tokens_per_sec"]["median"] > 0 and training["mfu"] is None and training["peak_memory_bytes"] > 0
    assert results["decoding"]["decode_tokens_per_sec"]["median"] > 0 and results["model"]["context_length"] == 32
    with pytest.raises(ValueError, match="more than the 5 steps"):
        end_to_end.main([*flags, "--max_steps", "5"])
    with pytest.raises(ValueError, match="exceed the context of 32"):
        end_to_end.main([*flags, "--new_tokens", "64"])
