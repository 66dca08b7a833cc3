"""benchmarks/score and decode_builds: both sides are the same model, and take turns."""

from __future__ import annotations

import json

import pytest

from benchmarks import common, decode_builds, score
from tests.conftest import REPO
from tests.shared_checks import needs_code


@needs_code
def test_all_sides_score_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    ckpt = str(REPO / "public" / "stories.pt")
    flags = ["--ckpt", ckpt, "--documents", "5", "--repeats", "1", "--name", "tiny"]
    assert score.main(flags) == 0
    result = json.loads((tmp_path / "score_tiny.json").read_text())
    nats = result["nats_a_token"]
    assert set(nats) == {"c_kernel", "one_at_a_time", "batched"}
    # Means of about a thousand numbers, in float32 and other orders.
    assert max(nats.values()) - min(nats.values()) < 1e-5
    assert result["same_bits"] == {"documents": 5, "same": 5}
    assert result["documents"] == 5 and result["tokens"] > 500
    assert "5 of 5 documents" in capsys.readouterr().out


def test_a_commit_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--base nonsense: git has no runtime/inference"):
        decode_builds.build_of("nonsense", tmp_path)
