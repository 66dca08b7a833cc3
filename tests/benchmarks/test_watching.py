"""benchmarks/watching.py: what it asks, in which order it trains, and what it makes of seconds."""

from __future__ import annotations

import pytest

from benchmarks import watching
from runtime.serving.watch import Watch, answer, parsed_have
from tests.builders_watch import write_long_run


@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_each_pair_has_both_sides_and_neither_is_always_first(rounds):
    order = watching.turns(rounds)
    pairs = [order[i : i + 2] for i in range(0, len(order), 2)]
    assert len(pairs) == rounds and all(sorted(pair) == ["with", "without"] for pair in pairs)
    firsts = [pair[0] for pair in pairs]
    assert all(one != other for one, other in zip(firsts, firsts[1:], strict=False))


def test_the_cost_is_of_pairs():
    """A slow spell of the machine meets both of a pair: the medians of the sides say nothing."""
    found = watching.costs({"without": [1.0, 4.0, 2.0], "with": [1.01, 4.2, 2.0]})
    assert found["cost_percent"]["of_each_pair"] == pytest.approx([1, 5, 0])
    assert found["cost_percent"]["median"] == pytest.approx(1)
    assert found["without"] == {"median": 2.0, "min": 1.0, "max": 4.0}


def test_a_step_is_the_median_of_those_after_the_first_quarter():
    ends = [0.0, 9.0, 18.0, 19.0, 20.0, 21.0, 71.0, 72.0, 73.0]
    records = [{"kind": "train", "seconds": end} for end in ends]
    records.insert(3, {"kind": "val", "seconds": 1000.0})
    assert watching.step_seconds(records) == 1.0
    slow_start = [{"kind": "train", "seconds": end} for end in (0, 50, 100, 102, 104, 106, 108)]
    # Six steps: the first one is left out.
    assert watching.step_seconds(slow_start) == 2


def test_it_asks_as_a_page_that_has_the_answer(tmp_path):
    """Else the server would send all runs each time, and the cost would be another one."""
    write_long_run(tmp_path / "a", 5, 2, 2)
    write_long_run(tmp_path / "b", 7, 2, 2, seed=1)
    watch = Watch([tmp_path])
    asked = watching.question(answer(watch, {}, None))
    session, _, have = asked.removeprefix("?session=").partition("&have=")
    again = answer(watch, parsed_have(have), None)
    assert session == watch.session and [run["step"] for run in again["runs"]] == [5, 7]
    assert not any("tables" in run for run in again["runs"])


def test_pages_are_opened_and_compared(tmp_path):
    for i in range(2):
        write_long_run(tmp_path / "runs" / f"run{i}", 5, 2, 2, seed=i)
    found = watching.opening(tmp_path / "runs", 1)
    assert found["page_bytes"] > 10_000
    assert found["one_run_s"]["min"] > 0 and found["all_runs_s"]["min"] > 0
    page = tmp_path / "page.html"
    assert watching.comparing(tmp_path / "runs", page, 1)["min"] > 0 and page.exists()
