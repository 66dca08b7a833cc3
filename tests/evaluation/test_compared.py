"""Two checkpoints on the same questions: paired differences of accuracies."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from runtime.evaluation.choices import Result
from runtime.evaluation.compared import as_differences, compared_section, paired_difference
from runtime.evaluation.writing import as_lines, as_markdown
from tests.builders_evaluation import byte_model, checkpoint, report_of, texts, write_texts


def result(numbers: list[int] | None = None, **columns: list[float]) -> Result:
    """Return a result of columns of credits. numbers: of their questions, None = all."""
    credits = {name: np.array(own, dtype=float) for name, own in columns.items()}
    asked = {name: np.array(numbers or range(len(own))) for name, own in credits.items()}
    return Result("pairs", "plain", credits, {}, numbers=asked)


def test_only_questions_that_both_were_asked_are_compared():
    """A short context leaves out others, and as many: row by row, they were no pairs.

    Of questions 1 to 10 both are right on the odd ones.
    """
    odd = [float(number % 2) for number in range(12)]
    mine = result([*range(11)], sum=odd[:11], pmi=odd[:11])
    other = result([*range(1, 12)], sum=odd[1:])
    section = compared_section([mine], [other], "tasks")
    (one,) = section["figures"].values()
    assert one["value"] == 0.0 and one["n"] == 10 and one["high"] == -one["low"]
    # No question on which they differ: z^2 / (n + z^2). Differences would make it wider.
    assert one["high"] == pytest.approx(1.96**2 / (10 + 1.96**2), abs=1e-4)
    assert section["rows"]["rows"][0][3:5] == [0.5, 0.5]
    apart = compared_section([result([1, 2], sum=[1, 1])], [result([3], sum=[1])], "tasks")
    assert apart["figures"] == {}


def test_a_difference_is_of_the_same_questions_and_far_surer_than_each_accuracy():
    """Both are right on half of 400 questions, the first on 4 more.

    Alone, each share is sure to about 0.05. The difference is 4 of 400, give or take 2 * 2.
    """
    half = [1.0, 0.0] * 200
    more = [1.0] * 8 + half[8:]
    section = compared_section([result(sum=more)], [result(sum=half)], "tasks")
    one = section["figures"]["pairs_sum"]
    assert one["value"] == pytest.approx(0.01) and one["n"] == 400
    assert 0 < one["low"] < 0.006 and 0.014 < one["high"] < 0.026
    (row,) = section["rows"]["rows"]
    assert row[:5] == ["pairs", "sum", 400, pytest.approx(0.51), 0.5]


def test_columns_do_not_depend_on_each_other_and_swapping_changes_the_sign():
    mine, other = [1.0, 0.0, 1.0, 0.5] * 5, [0.0, 0.0, 1.0, 1.0] * 5
    section = compared_section([result(sum=mine, pmi=mine)], [result(sum=other, pmi=other)], "t")
    assert section["figures"]["pairs_sum"] == section["figures"]["pairs_pmi"]
    back = compared_section([result(sum=other)], [result(sum=mine)], "t")["figures"]["pairs_sum"]
    one = section["figures"]["pairs_sum"]
    assert [back[key] for key in ("value", "low", "high")] == [
        -one["value"],
        -one["high"],
        -one["low"],
    ]


def standard_deviations(first: int, second: int, n: int, end: float) -> float:
    """Return how far a sample is from the difference `end`, at the likeliest shares that have it.

    They are found on a grid: of questions that only one model has right, and those of both.
    """
    second_P = np.linspace(max(0.0, -end), (1 - end) / 2, 400_001)[1:-1]
    first_P = second_P + end
    log_likelihood_P = first * np.log(first_P) + second * np.log(second_P)
    log_likelihood_P += (n - first - second) * np.log(1 - first_P - second_P)
    best = log_likelihood_P.argmax()
    variance = n * (first_P[best] + second_P[best] - end**2)
    return (first - second - n * end) / variance**0.5


@pytest.mark.parametrize("first, second, n", [(0, 0, 30), (0, 1, 44), (9, 4, 50), (4, 0, 400)])
def test_the_ends_are_where_a_score_test_begins_to_refuse(first, second, n):
    mine, other = np.zeros(n), np.zeros(n)
    mine[:first] = other[first : first + second] = 1.0
    one = paired_difference(mine, other)
    # The grid's step is at most 2e-6, and a likelihood is flat at its top.
    assert standard_deviations(first, second, n, one.low) == pytest.approx(1.96, abs=2e-3)
    assert standard_deviations(first, second, n, one.high) == pytest.approx(-1.96, abs=2e-3)


def test_models_that_rarely_differ_are_not_taken_for_equal():
    """30 questions, and the first is right on 2 % more. It was said in 41 % of samples.

    Where a sample has no question on which they differ, no resample has one: from 0 to 0.
    """
    generator, hits = np.random.default_rng(0), 0
    for _ in range(300):
        drawn_Q = generator.random(30)
        one = paired_difference((drawn_Q < 0.52).astype(float), (drawn_Q < 0.5).astype(float))
        hits += one.low <= 0.02 <= one.high
    assert hits >= 0.93 * 300


def test_parts_of_answers_count_as_parts():
    """Half of a tie on 8 questions is a difference of 4, and no less sure than 4 whole ones."""
    halves = paired_difference(np.array([0.5] * 8 + [0.0] * 12), np.zeros(20))
    whole = paired_difference(np.array([1.0] * 4 + [0.0] * 16), np.zeros(20))
    assert halves == whole and halves.value == 0.2


def test_other_weights_that_answer_alike_are_not_the_same_model(tmp_path, asked):
    files, tasks, ckpt, _ = asked
    model = byte_model(1)
    with torch.no_grad():
        model.out_head.weight.mul_(1 + 2**-7)
    other = checkpoint(tmp_path / "scaled", model)
    one = report_of(ckpt, files, against=other, tasks=(tasks,))
    found = one["against"]["tasks"]["files"]["two_sum"]
    assert found["difference"] == 0.0 and found["low"] < 0 < found["high"]
    (note,) = one["compared_tasks"]["files"]["notes"]
    assert "Tango" in note


def test_few_questions_have_a_difference_and_no_interval():
    section = compared_section([result(sum=[1, 1])], [result(sum=[0, 1])], "t")
    assert as_differences(section) == {
        "pairs_sum": {"difference": 0.5, "low": None, "high": None, "questions": 2}
    }


@pytest.fixture
def asked(tmp_path):
    """Return files and tasks, and two checkpoints."""
    rows = [
        {"query": t[:9], "choices": ["a b", "c"], "gold": i % 2} for i, t in enumerate(texts(20))
    ]
    tasks = tmp_path / "two.jsonl"
    tasks.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    ckpts = [checkpoint(tmp_path / str(seed), byte_model(seed)) for seed in (1, 2)]
    return write_texts(tmp_path / "valid.jsonl", texts(40)), str(tasks), *ckpts


def test_against_itself_tasks_differ_by_exactly_nothing(asked):
    files, tasks, ckpt, _ = asked
    report = report_of(ckpt, files, against=ckpt, tasks=(tasks,))
    found = report["against"]["tasks"]["files"]
    assert set(found) == {f"two_{name}" for name in ("sum", "per_byte", "per_token", "pmi")}
    for one in found.values():
        assert [one[key] for key in ("difference", "low", "high")] == [0.0, 0.0, 0.0]
    # A text that begins with blanks gives a question without a context, and so without PMI.
    assert found["two_sum"]["questions"] == 20 > found["two_pmi"]["questions"] > 10


def test_the_difference_is_that_of_the_accuracies_of_two_reports(asked):
    files, tasks, ckpt, other = asked
    report = report_of(ckpt, files, against=other, tasks=(tasks,))
    mine, theirs = (report_of(path, files, tasks=(tasks,)) for path in (ckpt, other))
    accuracies = [r["tasks"]["files"]["figures"]["two_sum"]["value"] for r in (mine, theirs)]
    found = report["against"]["tasks"]["files"]["two_sum"]["difference"]
    assert found == pytest.approx(accuracies[0] - accuracies[1], abs=1e-12)
    assert "compared_tasks.files.two_sum" in "\n".join(as_lines(report))
    assert "tasks: difference" in as_markdown(report)


def test_two_checkpoints_are_compared_on_tasks_without_a_text(tmp_path, monkeypatch, asked):
    monkeypatch.chdir(tmp_path)
    _, tasks, ckpt, other = asked
    report = report_of(ckpt, "", against=other, tasks=(tasks,))
    assert report["data"] is None and set(report["against"]) == {"tasks"}
    assert "comparison" not in report
    with pytest.raises(ValueError, match="no number 'against.difference'"):
        report_of(ckpt, "", against=other, tasks=(tasks,), require=("against.difference<0",))


def test_models_of_different_contexts_are_compared_on_what_both_can_read(tmp_path):
    some = [f"Tom ran. Lily ran. Tom saw {'a big dog ' * (i % 4)}{i}. Lily sat." for i in range(30)]
    files = write_texts(tmp_path / "valid.jsonl", some)
    long, short = (
        checkpoint(tmp_path / str(size), byte_model(3, context_length=size)) for size in (128, 32)
    )
    report = report_of(long, files, against=short, own_tasks=True)
    n = report["tasks"]["own"]["figures"]["order_sum"]["n"]
    assert 0 < report["against"]["tasks"]["own"]["order_sum"]["questions"] < n


def test_an_answer_that_one_of_two_cannot_hold_is_left_out_and_counted(tmp_path, asked):
    """It ended the command after both had read everything, and no report was written."""
    files, tasks, *_ = asked
    rows = [
        {"query": f"Q{i}", "choices": ["b" * (60 if i < 3 else 6), "c"], "gold": 0}
        for i in range(20)
    ]
    Path(tasks).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    long, short = (
        checkpoint(tmp_path / str(size), byte_model(3, context_length=size)) for size in (128, 32)
    )
    for first, second, n in ((long, short, 20), (short, long, 17)):
        report = report_of(first, files, against=second, tasks=(tasks,))
        own = report["tasks"]["files"]
        assert own["figures"]["two_sum"]["n"] == n
        assert report["against"]["tasks"]["files"]["two_sum"]["questions"] == 17
        said = " ".join([*own.get("notes", []), *report["compared_tasks"]["files"]["notes"]])
        assert "3 questions are left out" in said
    with pytest.raises(ValueError, match="line 1: an answer has 61 tokens"):
        report_of(short, files, tasks=(tasks,))
