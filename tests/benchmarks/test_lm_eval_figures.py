"""lm-eval's figures next to ours: both are asked the same questions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import lm_eval_figures
from benchmarks.lm_eval_figures import main, markdown, pairs_of, write_tasks
from runtime.data import toy_stories
from runtime.data.tokenizers import load_tokenizer
from runtime.evaluation.choice_formats import read_tasks
from runtime.evaluation.own_tasks import OTHER_NUMBER, drawn_documents, endings
from tests.builders import random_model, tiny_config
from tests.builders_inference import save

TEXTS = [toy_stories.story(i) for i in range(40)]


def test_both_are_asked_the_questions_that_the_text_gives(tmp_path):
    write_tasks(tmp_path, [*TEXTS, "[step] of no text."], 8, 5, lambda text: len(text) > 700)
    (ours,) = read_tasks([str(tmp_path / "endings.jsonl")])
    made = endings(drawn_documents([" ".join(text.split()) for text in TEXTS], 40))[:8]
    places = set()
    for mine, own in zip(ours.questions, made, strict=True):
        assert mine.contexts == own.contexts and mine.delimiter == own.delimiter
        assert mine.continuations[mine.right] == own.continuations[0]
        assert sorted(mine.continuations) == sorted(own.continuations)
        places.add(mine.right)
    assert places == {0, 1, 2, 3} and ours.form == "HellaSwag"
    (verbs,) = read_tasks([str(tmp_path / "agreement.jsonl")])
    whole = " ".join(" ".join(text.split()) for text in TEXTS)
    assert verbs.form == "BLiMP" and len(verbs.questions) == 8
    for question in verbs.questions:
        good, bad = question.continuations
        words, others = good.split(), bad.split()
        (verb,) = [i for i, word in enumerate(words) if others[i] != word]
        assert good in whole and len(words) == len(others)
        assert OTHER_NUMBER[words[verb]] == others[verb]
    for name in ("endings", "agreement", "text"):
        task = json.loads((tmp_path / f"{name}.yaml").read_text())
        assert task["dataset_kwargs"]["data_files"]["validation"] == f"{tmp_path}/{name}.jsonl"
    written = [json.loads(line) for line in (tmp_path / "text.jsonl").read_text().splitlines()]
    assert len(written) == 5 and all(len(row["text"]) > 700 for row in written)


def test_texts_that_give_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match="8 verbs and 0 texts that fit"):
        write_tasks(tmp_path, TEXTS, 8, 5, lambda text: False)


def test_a_figure_that_differs_is_not_called_the_same(tmp_path, monkeypatch, capsys):
    def figures(value: float, n: int = 4) -> dict:
        return {"value": value, "n": n, "low": 0.0, "high": 1.0}

    report = {
        "bits_per_byte": {"value": 1.0, "low": None, "high": None, "documents": 5},
        "tasks": {
            "files": {"figures": {"endings_sum": figures(0.5), "agreement_sum": figures(0.5)}},
            "lm_eval": {
                "figures": {
                    "lm_endings_acc": figures(0.5),
                    "lm_agreement_acc": figures(0.5, 3),
                    "lm_text_bits_per_byte": {"value": 1.001, "n": 5},
                }
            },
        },
    }
    pairs = pairs_of(report)
    assert [one["same"] for one in pairs] == [True, False, False]
    assert [line.count("not the same") for line in markdown(pairs).splitlines()[2:]] == [0, 1, 1]
    monkeypatch.setattr(lm_eval_figures, "RESULTS", tmp_path)
    (tmp_path / "lm_eval_figures.json").write_text(json.dumps({"figures": pairs}))
    main(["--table"])
    assert capsys.readouterr().out == markdown(pairs) + "\n"


@pytest.mark.lm_eval
@pytest.mark.slow
def test_a_run_asks_both_and_stores_what_they_say(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (make test-lm-eval)")
    monkeypatch.setattr("benchmarks.common.RESULTS", tmp_path)
    byte = load_tokenizer("byte")
    config = tiny_config(vocabulary_size=byte.vocabulary_size, context_length=1024)
    ckpt = save(tmp_path, random_model(config, 5), byte)
    main(["--ckpt", str(ckpt), "--stories=60", "--questions=8", "--documents=6"])
    stored = json.loads((Path(tmp_path) / f"{lm_eval_figures.NAME}.json").read_text())
    same = {(one["task"], one["metric"]): one["same"] for one in stored["figures"]}
    # By character it is another measure, and of equal answers lm-eval takes the first.
    assert all(same[task, "acc"] for task in ("endings", "agreement"))
    assert same["text", "bits_per_byte"] and stored["lm_eval"]
    assert {"command", "commit", "hardware", "versions"} <= stored["environment"].keys()
