"""runtime/evaluation/requirements: what a report must hold, and whether it does."""

from __future__ import annotations

import pytest

from runtime.evaluation.report import figure, section
from runtime.evaluation.requirements import Requirement, addresses, read_requirement, verdicts

PARTS = {"bits_per_byte", "against", "tasks"}
REPORT = {
    "bits_per_byte": {"value": 0.8, "low": 0.7, "high": 0.9, "documents": 5},
    "against": {"difference": -0.1, "low": -0.2, "high": None, "documents": 5},
    "tasks": {"files": section("tasks", {"pairs_sum": figure(0.75, 4, 0.3, 0.95)})},
}


@pytest.mark.parametrize(
    "text, is_met",
    [
        ("bits_per_byte<=0.8", True),
        ("bits_per_byte<0.8", False),
        (" bits_per_byte >= 8e-1 ", True),
        ("bits_per_byte>0.8", False),
        ("bits_per_byte.high<=0.85", False),
        ("against<0", True),
        ("tasks.files.pairs_sum>=0.7", True),
        ("tasks.files.pairs_sum.low>0.5", False),
        ("tasks.files.pairs_sum.n>=4", True),
    ],
)
def test_a_requirement_is_compared_with_the_figure_at_its_address(text, is_met):
    lines, all_met = verdicts([read_requirement(text, PARTS)], REPORT)
    assert all_met is is_met
    assert ("NOT MET" in lines[0]) is not is_met


def test_one_that_is_not_met_is_enough():
    both = [read_requirement(text, PARTS) for text in ("bits_per_byte>1", "bits_per_byte<1")]
    lines, all_met = verdicts(both, REPORT)
    assert len(lines) == 2 and not all_met


@pytest.mark.parametrize(
    "text",
    ["", "bits_per_byte", "bits_per_byte=0.8", "bits_per_byte<=", "bits_per_byte<=nan", "<=1"]
    + ["bits_per_byte<=inf", "bits_per_byte<=0,8", "loss<=1", "bits per byte<=1"],
)
def test_what_is_no_requirement_is_refused_before_the_work_starts(text):
    with pytest.raises(ValueError, match="--require"):
        read_requirement(text, PARTS)


def test_a_figure_that_the_report_lacks_names_the_closest():
    with pytest.raises(ValueError, match="did you mean tasks.files.pairs_sum"):
        verdicts([Requirement("tasks.files.pair_sum", "<", 1.0)], REPORT)


def test_a_figure_that_is_not_defined_is_not_met_in_silence():
    with pytest.raises(ValueError, match="not defined"):
        verdicts([Requirement("against.high", "<", 1.0)], REPORT)


def test_every_figure_has_one_address():
    found = [address for address, _ in addresses(REPORT)]
    assert "tasks.files.pairs_sum" in found and "bits_per_byte.documents" in found
    assert len(found) == len(set(found))
