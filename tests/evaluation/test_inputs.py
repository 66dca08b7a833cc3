"""What is wrong with an input is said before the first pass over a text."""

from __future__ import annotations

import pytest

from runtime.data.tokenizers import load_tokenizer
from runtime.evaluation import lm_eval
from runtime.inference.scorer import Scorer
from scripts import evaluate as command
from tests.builders_evaluation import byte_model, checkpoint, report_of, texts, write_texts
from tests.builders_inference import save


@pytest.fixture
def ckpt(tmp_path):
    return checkpoint(tmp_path / "model", byte_model())


@pytest.fixture
def files(tmp_path):
    return write_texts(tmp_path / "valid.jsonl", texts(20))


@pytest.fixture
def nothing_is_scored(monkeypatch):
    def scores(*_, **__):
        raise AssertionError("a text was scored before the inputs were checked")

    monkeypatch.setattr(Scorer, "scores", scores)


def refused(ckpt: str, files: str, *argv: str) -> str:
    """Return the line that a command ends with."""
    with pytest.raises(ValueError) as error:
        command.main(["--ckpt", ckpt, "--files", files, "--device=cpu", *argv])
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--stories=2", "--train_files", "none.txt"], "none.txt does not exist"),
        # It was read as a training text without copies: a model looked original.
        (["--stories=2", "--train_files", "empty.jsonl"], "empty.jsonl holds no text"),
        (["--stories=2", "--train_files", "other.jsonl"], "has no 'text'"),
        (["--tasks", "none.jsonl"], "none.jsonl does not exist"),
        (["--tasks", "empty.jsonl"], "no questions"),
        (["--against", "none.pt"], "none.pt: no such file"),
        (["--against", "torn.pt"], "torn.pt"),
        # It was noticed after the first checkpoint's hours.
        (["--against", "bare.pt"], "does not say which tokenizer"),
        (["--against", "short.pt", "--stride=12"], "--stride 12 is more than the context of short"),
        (["--lm_eval", " , "], "names no task"),
        (["--json", "."], "is a folder"),
        (["--json", "r.json", "--html", "./r.json"], "is the file of --json"),
        (["--json", "ckpt.pt", "--ckpt", "ckpt.pt"], "is the file of --ckpt"),
        (["--html", "valid.jsonl", "--files", "valid.jsonl"], "is the file of --files"),
        (["--require", "text.los<1"], "did you mean text.loss"),
        (["--require", "bits_per_byte.hi<1"], "did you mean bits_per_byte.high"),
        (["--require", "calibration.error<1"], "the report has no number"),
        (["--own_tasks", "--require", "tasks.files.a_sum>0"], "no tasks.files, only tasks.own"),
        (["--experts", "--require", "experts.off.block_0_most>0"], "no experts.off"),
    ],
)
def test_a_bad_input_is_refused_before_anything_is_scored(
    tmp_path, monkeypatch, nothing_is_scored, ckpt, files, argv, said
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "other.jsonl").write_text('{"story": "Once"}\n')
    made = tmp_path / "made"
    for name, model, tokenizer in (
        ("bare.pt", byte_model(1), None),
        ("short.pt", byte_model(1, context_length=8), load_tokenizer("byte")),
        ("ckpt.pt", byte_model(1), load_tokenizer("byte")),
    ):
        made.mkdir(exist_ok=True)
        (tmp_path / save(made, model, tokenizer)).rename(tmp_path / name)
    (tmp_path / "torn.pt").write_bytes((tmp_path / "ckpt.pt").read_bytes()[:-200])
    assert said in refused(ckpt, files, *argv)


def test_unknown_tasks_of_lm_eval_are_refused_before_anything_is_scored(
    monkeypatch, nothing_is_scored, ckpt, files
):
    class Library:
        class tasks:
            class TaskManager:
                def __init__(self, include_defaults):
                    pass

                def match_tasks(self, names):
                    return []

    monkeypatch.setattr(lm_eval, "library", lambda: Library)
    assert "no task 'mine'" in refused(ckpt, files, "--lm_eval", "mine")
    assert "there is no file mine.yaml" in refused(ckpt, files, "--lm_eval", "mine.yaml")


def test_a_requirement_on_what_will_be_there_is_accepted(tmp_path, files):
    ckpt = checkpoint(tmp_path / "long", byte_model(context_length=256))
    argv = ["--ckpt", ckpt, "--files", files, "--against", ckpt, "--device=cpu", "--own_tasks"]
    for wanted in ("against<=0", "comparison.other_bits_per_byte.high<99", "text.loss.n>1"):
        argv += ["--require", wanted]
    argv += ["--require", "compared_tasks.own.name_sum>=0"]
    argv += ["--require", "against.tasks.own.name_sum<=0", "--resamples=100"]
    assert command.main(argv) == 0


def test_a_tokenizer_is_for_the_checkpoint_of_two_that_says_none(tmp_path, ckpt, files):
    """The one that says its own refused --tokenizer, so no command could compare the two."""
    (tmp_path / "bare").mkdir()
    bare = save(tmp_path / "bare", byte_model(), None)
    for one, other in ((ckpt, bare), (bare, ckpt)):
        report = report_of(one, files, against=other, tokenizer="byte")
        assert report["against"]["difference"] == 0.0


def test_what_is_left_out_is_said(capsys, ckpt, files):
    """20 documents were read as 5, and nothing but their number said so."""
    argv = ["--ckpt", ckpt, "--files", files, "--device=cpu", "--resamples=100"]
    command.main([*argv, "--documents=5"])
    assert "only the first 5 documents are read" in capsys.readouterr().err
    for count, are_all in (("20", True), ("19", False), ("0", True)):
        report = report_of(ckpt, files, documents=int(count))
        assert report["data"]["are_all"] is are_all
