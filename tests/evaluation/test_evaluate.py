"""scripts/evaluate: known answers, one report whatever the batches, and what a user sees."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch

from runtime.base.shares import wilson
from runtime.data.chat import with_chat
from runtime.data.tokenizers import load_tokenizer
from runtime.evaluation.writing import as_json, as_lines, as_markdown
from runtime.posttraining.score import Score, Share
from scripts import evaluate as command
from scripts import export_hf
from tests.builders_evaluation import (
    byte_model,
    checkpoint,
    report_of,
    texts,
    uniform_model,
    write_texts,
)
from tests.builders_inference import save


@pytest.fixture
def files(tmp_path):
    return write_texts(tmp_path / "valid.jsonl", texts(40))


@pytest.fixture
def ckpt(tmp_path):
    return checkpoint(tmp_path / "model", byte_model())


# ------------------------------------------------------------------------------ known answers
def test_a_uniform_model_needs_log_v_bits_a_token(tmp_path, files):
    """Tokens are bytes here, and the start token is not scored: exactly log2(260) a byte."""
    report = report_of(checkpoint(tmp_path / "u", uniform_model()), files)
    bits = report["bits_per_byte"]
    # Of sums of float32 logarithms, by as many roundings as a text has tokens.
    assert bits["value"] == pytest.approx(math.log2(260), rel=1e-6)
    assert bits["low"] == pytest.approx(bits["high"], rel=1e-6)
    assert bits["documents"] == 40
    assert report["text"]["figures"]["loss"]["value"] == pytest.approx(math.log(260), rel=1e-6)
    # No position, no part and no token is easier than another, and it is as sure as it is right.
    assert abs(report["loss"]["figures"]["slope_per_doubling"]["value"]) < 1e-6
    error = report["calibration"]["figures"]["confidence_minus_accuracy"]
    assert error["value"] == pytest.approx(
        1 / 260 - report["text"]["figures"]["accuracy"]["value"], abs=1e-6
    )


def test_bits_per_byte_is_that_of_the_plain_model(tmp_path):
    """Every byte of the text is counted once, also those of characters of several bytes."""
    some = ["Tom saw é.", "ab"]
    model = byte_model(3)
    report = report_of(checkpoint(tmp_path / "m", model), write_texts(tmp_path / "a.jsonl", some))
    nats = 0.0
    for text in some:
        ids = torch.tensor([[256, *text.encode()]])
        out = model(ids[:, :-1], ids[:, 1:])
        nats += out.cross_entropy_sum.item()
    size = sum(len(text.encode()) for text in some)
    assert report["data"]["bytes"] == size == 13
    assert report["bits_per_byte"]["value"] == pytest.approx(nats / math.log(2) / size, rel=1e-4)
    assert report["text"]["figures"]["loss"]["n"] == size


def test_against_itself_is_exactly_zero(ckpt, files):
    report = report_of(ckpt, files, against=ckpt)
    assert report["against"] == {"difference": 0.0, "low": 0.0, "high": 0.0, "documents": 40}
    better = report["comparison"]["figures"]["documents_better"]
    # It was on 0 of 40, which says that the other one is better.
    assert better["value"] == 0.5 and better["low"] + better["high"] == pytest.approx(1.0)


def test_the_better_of_two_has_the_difference_below_zero(tmp_path, ckpt, files):
    """The random model is confident and wrong; one that knows nothing is better."""
    report = report_of(checkpoint(tmp_path / "u", uniform_model()), files, against=ckpt)
    assert report["against"]["high"] < 0
    other = report["comparison"]["figures"]["other_bits_per_byte"]["value"]
    assert report["against"]["difference"] == pytest.approx(
        report["bits_per_byte"]["value"] - other
    )


def test_a_model_shares_all_experts_with_itself(ckpt, files):
    report = report_of(ckpt, files, against=ckpt, experts=True)
    shared = report["experts"]["shared"]["figures"]
    assert [one["value"] for one in shared.values()] == [1.0, 1.0]
    chance = [row[4] for row in report["experts"]["shared"]["rows"]["rows"]]
    assert all(0.5 <= share < 1 for share in chance)


# ------------------------------------------------------------------------------ the report
def test_a_note_says_why_a_section_of_experts_is_left_out(tmp_path, files):
    """It was missing without a word: two models with other experts, or one expert a token."""
    few, many = (
        checkpoint(tmp_path / str(count), byte_model(num_experts=count, top_k=1))
        for count in (2, 4)
    )
    experts = report_of(few, files, against=many, experts=True)["experts"]
    assert experts.keys() == {"specialities"}
    notes = " ".join(experts["specialities"]["notes"])
    assert "no section of pairs of experts" in notes and "no section of shared experts" in notes


def test_a_report_says_where_last_digits_depend_on_the_batch(ckpt, files):
    report = report_of(ckpt, files, c_kernel=False)
    assert not report["checkpoint"]["computed_by"]["is_exact"]
    assert "last digits depend" in report["checkpoint"]["computed_by"]["line"]


def test_a_report_names_no_folder_of_this_machine(tmp_path, ckpt, files):
    report = report_of(ckpt, files, against=ckpt)
    for text in (as_json(report), as_markdown(report)):
        assert str(tmp_path) not in text


# ------------------------------------------------------------------------------ the command
def run(capsys, *argv: str) -> tuple[int, str, str]:
    code = command.main(["--device=cpu", "--resamples=100", "--num_threads=1", *argv])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_command_writes_three_forms_and_prints_the_figures(tmp_path, capsys, ckpt, files):
    paths = {form: tmp_path / f"report.{form}" for form in ("json", "md", "html")}
    argv = [f"--json={paths['json']}", f"--markdown={paths['md']}", f"--html={paths['html']}"]
    code, out, _ = run(capsys, "--ckpt", ckpt, "--files", files, *argv, "--documents=7")
    report = json.loads(paths["json"].read_text(encoding="utf-8"))
    assert code == 0 and report["data"]["documents"] == 7
    assert "bits_per_byte" in out and "slope_per_doubling" in out
    shown = f"{report['bits_per_byte']['value']:.3f}"[:4]
    for form in ("md", "html"):
        text = paths[form].read_text(encoding="utf-8")
        assert shown in text and "95 % interval" in text


@pytest.mark.parametrize("bound, code", [("<=100", 0), ("<=0.001", 1)])
def test_the_exit_code_says_whether_requirements_are_met(capsys, ckpt, files, bound, code):
    argv = ("--ckpt", ckpt, "--files", files, "--documents=5")
    argv += ("--require", f"bits_per_byte{bound}", "--require", "text.loss.n>1")
    got, out, _ = run(capsys, *argv)
    assert got == code
    assert out.count("required  ") == 2 and ("NOT MET" in out) == bool(code)


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--require", "tasks.x>1"], "the flag that measures it"),
        (["--tokenizer=none"], "need text"),
        (["--expert_off=2", "--quantize=int8"], "omit --quantize"),
        (["--train_files", "x.txt"], "no effect without --stories"),
        (["--json", "none/report.json"], "there is no folder none"),
        (["--against", "none.pt"], "none.pt"),
        (["--stride=99"], "stride must be from 1 to the context"),
        (["--chat"], "was not trained on chats"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, monkeypatch, ckpt, files, argv, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=said) as error:
        run(capsys, "--ckpt", ckpt, "--files", files, *argv)
    assert "\n" not in str(error.value)


def test_without_text_or_tasks_there_is_nothing_to_measure(tmp_path, capsys, monkeypatch, ckpt):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="give --files, or --data_dir"):
        run(capsys, "--ckpt", ckpt)
    with pytest.raises(ValueError, match="--experts needs held-out text"):
        run(capsys, "--ckpt", ckpt, "--experts", "--chat")


def test_a_file_without_text_is_one_line(tmp_path, capsys, ckpt):
    empty = write_texts(tmp_path / "empty.jsonl", ["", ""])
    with pytest.raises(ValueError, match="there is no text in empty.jsonl"):
        run(capsys, "--ckpt", ckpt, "--files", empty)


def test_a_chat_model_answers_exercises(tmp_path, monkeypatch, capsys, files):
    """Shares have Wilson's interval and the number of their trials.

    A mean had no interval, so nobody could say whether two rewards differ.
    """
    asked: list = []
    losses = [(30.0, 20), (10.0, 20), (24.0, 10)] * 4

    class Exam:
        def __init__(self, tokenizer):
            asked.append(tokenizer)

        def score(self, model):
            score = Score({"questions": Share(3.0, 4)})
            score.average("story loss", losses)
            score.average("length", [(20, 1)] * 8)
            return score

    monkeypatch.setattr(command, "Exam", Exam)
    tokenizer = with_chat(load_tokenizer("byte"))
    model = byte_model(vocabulary_size=tokenizer.vocabulary_size)
    argv = ["--ckpt", save(tmp_path, model, tokenizer), "--files", files, "--chat"]
    argv += ["--device=cpu", "--documents=3", "--resamples=100", "--num_threads=1"]
    report = command.evaluate(command.settings_of(argv), chat=command.chat_sections)
    figures = report["chat"]["exercises"]["figures"]
    low, high = wilson(3, 4)
    assert figures["questions"] == {"value": 0.75, "n": 4, "low": low, "high": high}
    loss = figures["story_loss"]
    assert loss["value"] == 64 / 50 and loss["n"] == 12 and loss["unit"] == "nats"
    assert 10 / 20 <= loss["low"] < loss["value"] < loss["high"] <= 24 / 10
    same = {"value": 20, "n": 8, "low": 20, "high": 20, "unit": "tokens"}
    assert figures["length"] == same and len(asked) == 1
    assert "chat.exercises.questions" in "\n".join(as_lines(report))
    run(capsys, *argv, f"--json={tmp_path / 'r.json'}")
    again = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["chat"]["exercises"]
    # The command gave the exercises' means 2,000 resamples, whatever --resamples said.
    assert (
        again["figures"]["story_loss"]["high"]
        == command.mean_figure(losses, "nats", 100)["high"]
        != loss["high"]
    )


def test_a_report_of_the_command_goes_into_a_model_card(tmp_path, capsys, ckpt, files):
    report = tmp_path / "report.json"
    run(capsys, "--ckpt", ckpt, "--files", files, "--documents=5", f"--json={report}")
    out = tmp_path / "exported"
    export_hf.main(["--ckpt", ckpt, "--out", str(out), "--evaluation", str(report)])
    value = json.loads(report.read_text(encoding="utf-8"))["bits_per_byte"]["value"]
    card = (out / "README.md").read_text(encoding="utf-8")
    assert f"| bits per byte | {value:.4g} |" in card
    assert "Measured on the first 5 documents of valid.jsonl. " in card
    other = checkpoint(tmp_path / "other", byte_model(9))
    with pytest.raises(ValueError, match="of other weights"):
        export_hf.main(["--ckpt", other, "--out", str(out / "b"), "--evaluation", str(report)])


def test_a_card_says_that_the_weights_were_packed_when_they_were_measured(
    tmp_path, capsys, ckpt, files
):
    """Figures of int8 weights stood in a card of the whole ones as theirs."""
    report, out = tmp_path / "report.json", tmp_path / "exported"
    run(capsys, "--ckpt", ckpt, "--files", files, "--quantize=int8", f"--json={report}")
    export_hf.main(["--ckpt", ckpt, "--out", str(out), "--evaluation", str(report)])
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "Measured on 40 documents of valid.jsonl, with int8 weights. " in card


def test_a_card_says_so_for_a_report_of_tasks_alone_and_for_the_dtype_that_was_used(
    tmp_path, capsys, monkeypatch, ckpt
):
    """Of tasks a card never said int8; of --dtype auto it said "in auto"."""
    monkeypatch.chdir(tmp_path)
    tasks = tmp_path / "two.jsonl"
    row = {"query": "a", "choices": [" b", " c"], "gold": 1}
    tasks.write_text(f"{json.dumps(row)}\n", encoding="utf-8")
    said = []
    for flag in ("--quantize=int8", "--dtype=auto", "--dtype=bfloat16"):
        out = tmp_path / flag.strip("-")
        run(capsys, "--ckpt", ckpt, "--tasks", str(tasks), flag, f"--json={out}.json")
        export_hf.main(["--ckpt", ckpt, "--out", str(out), "--evaluation", f"{out}.json"])
        card = (out / "README.md").read_text(encoding="utf-8")
        said += re.findall(r"Measured on tasks.*", card)
    used = json.loads((tmp_path / "dtype=auto.json").read_text())["settings"]["dtype"]
    assert used in ("float32", "bfloat16")
    auto = "" if used == "float32" else f", in {used}"
    endings = (", with int8 weights", auto, ", in bfloat16")
    assert said == [f"Measured on tasks{ending}." for ending in endings]
