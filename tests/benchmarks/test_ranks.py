"""benchmarks/ranks.py and ranks_curve.py: all sides take the same steps."""

from __future__ import annotations

import json

import pytest

from benchmarks import common, ranks, ranks_curve
from tests.builders import TINY

TWO_SIDES = ["one process", "FSDP"]
SHARED_SIDES = ["one process", "nothing shared", "FSDP"]


def test_sides_take_the_same_steps(monkeypatch):
    """`measured` raises if the sides' first losses differ."""
    monkeypatch.setattr(ranks, "FOREIGN_CORES", float("inf"))
    found = ranks.measured(SHARED_SIDES, 64, rounds=1, steps=2, model=TINY)
    result = ranks.figures(found)
    for name, one in result.items():
        assert len(found[name].seconds) == 2 and not one["disturbed"]
        shared = {"gather weights", "sum gradients", "agree"} if name == "FSDP" else set()
        assert set(one["parts"]) == {"compute", "optimizer"} | shared
    assert result["FSDP"]["ratio_to"].keys() == {"one process", "nothing shared"}
    table = ranks.table(64, result)
    assert table.count("\n") == 1 + len(SHARED_SIDES) and "sum gradients" in table


def test_a_side_that_takes_other_steps_is_noticed(monkeypatch):
    monkeypatch.setattr(ranks, "FOREIGN_CORES", float("inf"))
    monkeypatch.setattr(ranks, "loss_of", lambda side, turns: turns[0].loss + len(turns))
    with pytest.raises(ValueError, match="FSDP has another first loss than one process"):
        ranks.measured(TWO_SIDES, 64, rounds=1, steps=1, model=TINY)


def test_foreign_work_is_what_no_process_of_ours_did():
    def one(own: float) -> ranks.Turn:
        return ranks.Turn([1.0], {}, 0.0, ((10.0, 50.0, 1.0), (12.0, 54.0, 1.0 + own)))

    # In two seconds the machine worked four, of which these two processes did three.
    assert ranks.foreign_in([one(1.5), one(1.5)]) == pytest.approx(0.5)


@pytest.mark.parametrize("flags", [["--tokens", "100"], ["--rounds", "0"]])
def test_flags_that_cannot_be_measured_are_refused(flags):
    with pytest.raises(ValueError, match=flags[0]):
        ranks.main(flags)


# ------------------------------------------------------------------------------------- the curve
CURVES = {
    "one process": {"train": [[1, 4.0], [2, 2.0]], "val": [[2, 2.0]]},
    "four ranks": {"train": [[1, 4.0], [2, 2.002]], "val": [[2, 1.999]]},
    "one process, 1 thread": {"train": [[1, 4.0], [2, 2.0]], "val": [[2, 2.0]]},
}


def test_the_curves_are_compared_step_by_step():
    figures = ranks_curve.summary(CURVES)
    assert set(figures.pop("one process, 1 thread").values()) == {0.0}
    (figures,) = figures.values()
    assert figures["largest difference of a training loss"] == pytest.approx(1e-3)
    assert figures["difference of the last validation loss"] == pytest.approx(5e-4)
    shorter = CURVES["four ranks"] | {"train": [[1, 4.0]]}
    with pytest.raises(ValueError, match="other steps"):
        ranks_curve.differences(CURVES | {"four ranks": shorter}, "four ranks")


def test_the_picture_is_drawn_from_what_is_stored(tmp_path, monkeypatch):
    monkeypatch.setattr(ranks_curve, "RESULTS", tmp_path)
    monkeypatch.setattr(ranks_curve, "PICTURE", tmp_path / "curve.png")
    with pytest.raises(ValueError, match="leave --picture out"):
        ranks_curve.main(["--picture"])
    (tmp_path / "ranks_curve.json").write_text(json.dumps({"curves": CURVES}))
    assert ranks_curve.main(["--picture"]) == 0
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="--steps"):
        ranks_curve.main(["--steps", "10"])


def test_a_run_without_text_says_where_it_looks(tmp_path, monkeypatch):
    monkeypatch.setattr(ranks_curve, "SHARED", tmp_path)
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    with pytest.raises(ValueError, match="GPTOSS_SHARED"):
        ranks_curve.main([])
