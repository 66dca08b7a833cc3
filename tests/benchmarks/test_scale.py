"""The table of docs/distributed.md is what the closed forms say today."""

from __future__ import annotations

from benchmarks.scale import MODELS, WAYS, best, table
from tests.conftest import REPO


def test_the_page_has_the_table_that_the_command_prints():
    page = (REPO / "docs" / "distributed.md").read_text(encoding="utf-8")
    assert "\n".join(table()) in page


def test_what_does_not_fit_has_no_figure():
    """117 B parameters take 1.3 TiB with their moments, and eight cards have 576 GiB."""
    model = MODELS["gpt-oss-120b"]
    assert [best(model, 8, *way) for way in WAYS.values()] == [None] * len(WAYS)
    found = best(MODELS["gpt-oss-20b"], 64, "full", 1)
    assert found is not None and found.recomputed
