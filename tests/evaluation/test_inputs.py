"""What is wrong with an input is said before the first pass over a text."""

from __future__ import annotations

import json

import pytest

from runtime.checkpoint.read import unpack
from runtime.data.tokenizers import load_tokenizer
from runtime.evaluation import inputs, lm_eval
from runtime.evaluation.config import EvaluateConfig
from runtime.evaluation.parts import _known_names
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
        # Names were compared, and the report replaced the held-out text.
        (["--json", "valid.jsonl", "--files", "val*.jsonl"], "is the file of --files"),
        (
            ["--json", "inner/text.jsonl", "--train_files", "inner", "--stories=1"],
            "of --train_files",
        ),
        (["--json", "saved/report.json", "--ckpt", "saved"], "is the file of --ckpt"),
        (["--json", "task.yaml", "--lm_eval", "task.yaml"], "is the file of --lm_eval"),
        # It was noticed when the documents were read.
        (["--tasks", "long.jsonl"], "an answer has 41 tokens"),
        (["--require", "text.los<1"], "did you mean text.loss"),
        (["--require", "bits_per_byte.hi<1"], "did you mean bits_per_byte.high"),
        (["--require", "calibration.error<1"], "the report has no number"),
        (["--own_tasks", "--require", "tasks.files.a_sum>0"], "no tasks.files, only tasks.own"),
        (["--experts", "--require", "experts.off.block_0_most>0"], "no experts.off"),
        # All tasks of two checkpoints were taken for granted, and any name in these sections.
        (
            ["--against", "ckpt.pt", "--own_tasks", "--require", "against.tasks.files.q_sum>0"],
            "no against.tasks.files, only against.tasks.own",
        ),
        (
            ["--against", "ckpt.pt", "--lm_eval", "x.yaml", "--require", "against.tasks.own.q>0"],
            "no number 'against.tasks.own.q'",
        ),
        (["--stories=2", "--require", "stories.repeated_4gram<1"], "mean stories.repeated_4grams"),
        (
            ["--stories=2", "--require", "stories.longest_copy<9"],
            "no number 'stories.longest_copy'",
        ),
        (["--own_tasks", "--require", "tasks.own.endng_sum>0"], "mean tasks.own.ending_sum"),
        (
            ["--against", "ckpt.pt", "--own_tasks", "--require", "against.tasks.own.nam_sum>0"],
            "mean against.tasks.own.name_sum",
        ),
        (
            ["--against=ckpt.pt", "--own_tasks", "--require", "compared_tasks.own.a_sum.low>0"],
            "no number 'compared_tasks.own.a_sum.low'",
        ),
    ],
)
def test_a_bad_input_is_refused_before_anything_is_scored(
    tmp_path, monkeypatch, nothing_is_scored, ckpt, files, argv, said
):
    monkeypatch.chdir(tmp_path)
    for name in ("inner", "saved"):
        (tmp_path / name).mkdir()
    write_texts(tmp_path / "inner" / "text.jsonl", texts(3))
    for name, context, answer in (("bare", "", "a"), ("long", "Once", "b" * 40)):
        row = {"query": context, "choices": [answer, "c"], "gold": 0}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
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


def test_a_question_that_the_other_cannot_be_asked_is_refused_before_anything_is_scored(
    tmp_path, monkeypatch, nothing_is_scored, ckpt, files
):
    """It was noticed after both had read all documents. What is only too long is left out."""

    class Bare:
        start_id = end_of_text_id = None
        encode = load_tokenizer("byte").encode

    (tmp_path / "bare.jsonl").write_text('{"query": "", "choices": ["a", "c"], "gold": 0}\n')
    monkeypatch.setattr(inputs, "tokenizer_of", lambda *_: Bare())
    argv = ["--against", ckpt, "--tasks", str(tmp_path / "bare.jsonl")]
    assert "bare.jsonl line 1: an answer without a context" in refused(ckpt, files, *argv)


@pytest.mark.parametrize(
    "content, said", [("task: [\n", "while parsing"), ("- 1", "holds no task")]
)
def test_a_torn_task_of_lm_eval_is_refused_before_anything_is_scored(
    tmp_path, monkeypatch, nothing_is_scored, ckpt, files, content, said
):
    """Only its name was looked at, and its content read after hours of scoring."""
    pytest.importorskip("yaml", reason="it comes with lm-eval")
    monkeypatch.setattr(lm_eval, "library", lambda: None)
    task = tmp_path / "task.yaml"
    task.write_text(content)
    line = refused(ckpt, files, "--lm_eval", str(task))
    assert line.startswith(f"--lm_eval {task}") and said in line


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
    argv += ["--require", "tasks.own.name_pmi_centered.high<=1"]
    argv += ["--require", "against.tasks.own.name_sum<=0", "--resamples=100"]
    assert command.main(argv) == 0


def test_the_names_that_requirements_may_have_are_those_of_a_report(tmp_path):
    """They are known before anything is measured, so they are written down twice."""
    ckpt = checkpoint(tmp_path / "long", byte_model(context_length=256))
    some = [
        f"Tom was {i} and sad. Then Lily saw Tom. He ran to Lily. It was. He saw Tom and Lily {i}."
        for i in range(12)
    ]
    files = write_texts(tmp_path / "stories.jsonl", some)
    train = write_texts(tmp_path / "train.jsonl", some[:2])
    settings = dict(stories=3, train_files=(train,), own_tasks=True, against=ckpt)
    report = report_of(ckpt, files, **settings)
    config = EvaluateConfig(ckpt=ckpt, files=(files,), **settings)
    known = _known_names(config)
    assert known["stories"]["figures"].keys() == report["stories"]["figures"].keys()
    for part in ("tasks", "compared_tasks"):
        own = report[part]["own"]["figures"]
        assert known[f"{part}.own"]["figures"].keys() == own.keys()
    assert known["against.tasks.own"].keys() == report["against"]["tasks"]["own"].keys()


def test_a_tokenizer_is_for_the_checkpoint_of_two_that_says_none(tmp_path, ckpt, files):
    """The one that says its own refused --tokenizer, so no command could compare the two."""
    (tmp_path / "bare").mkdir()
    bare = save(tmp_path / "bare", byte_model(), None)
    for one, other in ((ckpt, bare), (bare, ckpt)):
        report = report_of(one, files, against=other, tokenizer="byte")
        assert report["against"]["difference"] == 0.0


def test_no_weight_is_copied_to_see_whether_a_checkpoint_says_its_tokenizer(
    monkeypatch, ckpt, files
):
    """Without read_only every page that is touched is a copy of this process."""
    asked = []
    monkeypatch.setattr(
        inputs, "unpack", lambda path, read_only=False: asked.append(read_only) or unpack(path)
    )
    report_of(ckpt, files, against=ckpt, tokenizer="byte")
    assert asked and all(asked)


def test_what_is_left_out_is_said(capsys, ckpt, files):
    """20 documents were read as 5, and nothing but their number said so."""
    argv = ["--ckpt", ckpt, "--files", files, "--device=cpu", "--resamples=100"]
    command.main([*argv, "--documents=5"])
    assert "only the first 5 documents are read" in capsys.readouterr().err
    for count, are_all in (("20", True), ("19", False), ("0", True)):
        report = report_of(ckpt, files, documents=int(count))
        assert report["data"]["are_all"] is are_all
