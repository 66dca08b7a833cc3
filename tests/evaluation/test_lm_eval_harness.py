"""lm-evaluation-harness itself: its figures of our models are ours.

Skipped where it is not installed: `make test-lm-eval` installs it (about 330 MB). Its tasks are
read from files, and nothing is downloaded.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch

from runtime.data.tokenizers import load_tokenizer
from runtime.evaluation.choice_formats import read_tasks
from runtime.evaluation.choices import Request, answers
from runtime.evaluation.lm_eval import Reader, evaluate_lm_eval, find_tasks, model_of
from runtime.inference.scorer import Scorer
from scripts.export_hf import main as export_hf
from tests.builders import random_model, tiny_config
from tests.builders_evaluation import evaluate_choices
from tests.builders_inference import save
from tests.evaluation.test_choice_formats import (
    ARC,
    BLIMP,
    HELLASWAG,
    MMLU,
    OPENBOOK,
    PIQA,
    WINOGRANDE,
)
from tests.numeric import before_ties, logits_bound

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed (make test-lm-eval)")
pytestmark = [pytest.mark.lm_eval, pytest.mark.slow]

BYTE = load_tokenizer("byte")
END = BYTE.end_of_text_id
CONTEXT = 192
NUM = 40
WORDS = ("the", "cat", "Tom", "ran", "sat", "on", "a", "mat", "and", "was", "red", "\u00e9t\u00e9")
# lm-eval's own file of each task, and the row that ours are made like.
OWN = {
    "hellaswag": ("hellaswag/hellaswag.yaml", HELLASWAG),
    "arc": ("arc/arc_easy.yaml", ARC),
    "openbookqa": ("openbookqa/openbookqa.yaml", OPENBOOK),
    "blimp": ("blimp/_template_yaml", BLIMP),
    "piqa": ("piqa/piqa.yaml", PIQA),
    "winogrande": ("winogrande/default.yaml", WINOGRANDE),
    # Its task mmlu asks for a letter, and this one for the answer.
    "mmlu": ("mmlu/continuation/_continuation_template_yaml", MMLU),
}
# Its metrics, and our columns.
METRICS = {"acc": "sum", "acc_bytes": "per_byte", "acc_mutual_info": "pmi"}


@pytest.fixture(scope="module")
def reader() -> Reader:
    config = tiny_config(vocabulary_size=BYTE.vocabulary_size, context_length=CONTEXT)
    return Reader(Scorer(random_model(config, 5)), BYTE, BYTE.banned_ids)


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path_factory):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def text(r: random.Random, most: int = 9) -> str:
    return " ".join(r.choice(WORDS) for _ in range(r.randint(1, most)))


def texts(r: random.Random, number: int) -> list[str]:
    """Return distinct texts: of equal answers lm-eval takes the first, and we half of each."""
    found: dict[str, None] = {}
    while len(found) < number:
        found[text(r)] = None
    return list(found)


def rows_of(name: str) -> list[dict]:
    """Return rows with the keys of a published task, and random words."""
    r = random.Random(name)
    rows = []
    for _ in range(NUM):
        row = json.loads(json.dumps(OWN[name][1]))
        if name == "hellaswag":
            row |= {"ctx_a": f"{text(r)} [title] {text(r)}.", "ctx_b": text(r)}
            row |= {"endings": [f"[step] {one}." for one in texts(r, 4)], "label": r.randrange(4)}
        elif name in ("arc", "openbookqa"):
            row["question" if name == "arc" else "question_stem"] = text(r)
            row["choices"] = {"text": texts(r, 4), "label": list("ABCD")}
            row["answerKey"] = r.choice("ABCD")
        elif name == "mmlu":
            row = {"question": f" {text(r)}\n", "choices": texts(r, 4), "answer": r.randrange(4)}
        elif name == "blimp":
            row = dict(zip(("sentence_good", "sentence_bad"), texts(r, 2), strict=True))
        elif name == "piqa":
            row = {"goal": text(r), "label": r.randrange(2)}
            row |= dict(zip(("sol1", "sol2"), texts(r, 2), strict=True))
        else:
            row = {"sentence": f"{text(r)} _ {text(r)}.", "answer": r.choice("12")}
            row |= dict(zip(("option1", "option2"), texts(r, 2), strict=True))
        rows.append(row)
    return rows


def write_task(folder: Path, name: str, rows: list[dict], settings: dict) -> tuple[str, str]:
    """Write rows and a task over them; return the paths of both."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "task": f"own_{name}",
        "tag": [],
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"validation": str(data)}},
        "training_split": None,
        "validation_split": "validation",
        "test_split": None,
        "fewshot_split": None,
    } | settings
    path = folder / f"{name}.yaml"
    # JSON is YAML.
    path.write_text(json.dumps(settings))
    return str(data), str(path)


@pytest.mark.parametrize("name", OWN)
def test_its_figures_of_a_task_are_ours(name, reader, tmp_path):
    """acc, acc_bytes and acc_mutual_info, of its own task on the same rows, digit for digit."""
    theirs = Path(lm_eval.__file__).parent / "tasks" / OWN[name][0]
    metrics = [m for m in METRICS if name not in ("blimp", "winogrande") or m != "acc_mutual_info"]
    listed = [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in metrics]
    settings = {"include": str(theirs), "metric_list": listed}
    data, task = write_task(tmp_path, name, rows_of(name), settings)
    asked = evaluate_lm_eval(reader, find_tasks([task]))["figures"]
    own = evaluate_choices(reader.scorer, BYTE, read_tasks([data]))["figures"]
    for metric in metrics:
        # Its length of an answer is the context's where the contexts differ.
        if name == "winogrande" and metric == "acc_bytes":
            continue
        mine = own[f"{name}_{METRICS[metric]}"]
        assert asked[f"own_{name}_{metric}"]["value"] == pytest.approx(mine["value"], abs=1e-12)
        assert asked[f"own_{name}_{metric}"]["n"] == mine["n"] == NUM


def windows_of(ids: list[int]) -> list[Request]:
    """Return lm-eval's windows: each begins where the last one ended, but the last ends the text.

    It reads as many ids as the others, so its first ones are only read.
    """
    requests, done = [Request((END, *ids[:CONTEXT]), 1)], CONTEXT
    while done < len(ids):
        end = min(len(ids), done + CONTEXT)
        requests.append(Request(tuple(ids[end - CONTEXT - 1 : end]), done - (end - CONTEXT - 1)))
        done = end
    return requests


def test_bits_per_byte_of_texts_longer_than_the_context(reader, tmp_path):
    """The bounds of this test, 6 and 14, held for any windows."""
    r = random.Random(0)
    rows = [{"text": text(r, 120)} for _ in range(8)]
    listed = [
        {"metric": m, "aggregation": m, "higher_is_better": False} for m in ("bits_per_byte",)
    ]
    settings = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": listed,
    }
    _, task = write_task(tmp_path, "rolling", rows, settings)
    (one,) = evaluate_lm_eval(reader, find_tasks([task]))["figures"].values()
    assert max(len(row["text"].encode()) for row in rows) > 2 * CONTEXT
    all_bytes = [list(row["text"].encode()) for row in rows]
    windows = [window for ids in all_bytes for window in windows_of(ids)]
    total = sum(answer.log_prob for answer in answers(reader.scorer, windows))
    expected = -total / sum(map(len, all_bytes)) / math.log(2)
    assert one["value"] == pytest.approx(expected, rel=1e-9) and one["n"] == 8


def test_generated_answers_are_the_decoders(reader, tmp_path):
    r = random.Random(1)
    prompts = [text(r) for _ in range(6)]
    settings = {"max_gen_toks": 6, "until": ["\n"], "do_sample": False, "temperature": 0.0}
    expected = reader.all_generated(prompts, settings)
    rows = [
        {"q": prompt, "a": answer if i % 2 else "never"}
        for i, (prompt, answer) in enumerate(zip(prompts, expected, strict=True))
    ]
    _, task = write_task(
        tmp_path,
        "generate",
        rows,
        {
            "output_type": "generate_until",
            "doc_to_text": "{{q}}",
            "doc_to_target": "{{a}}",
            "generation_kwargs": settings,
            "metric_list": [
                {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
            ],
        },
    )
    (one,) = evaluate_lm_eval(reader, find_tasks([task]))["figures"].values()
    assert one["value"] == 0.5


def test_a_wrong_file_of_a_task_is_one_line(reader, tmp_path):
    """A YAML that does not end, and a template of a key that no row has: both were tracebacks."""
    torn = tmp_path / "torn.yaml"
    torn.write_text("task: [\n")
    settings = {"output_type": "multiple_choice", "doc_to_text": "{{nothing}}"}
    settings |= {"doc_to_choice": ["a", "b"], "doc_to_target": 0}
    _, no_key = write_task(tmp_path, "no_key", [{"q": "a"}], settings)
    for task, message in ((str(torn), "while parsing"), (no_key, "'nothing' is undefined")):
        with pytest.raises(ValueError, match=f"^--lm_eval .*{message}") as error:
            evaluate_lm_eval(reader, find_tasks([task]))
        assert "\n" not in str(error.value)


def test_data_that_a_task_names_and_that_is_missing_is_one_line(reader, tmp_path):
    """`datasets` raises FileNotFoundError itself, which was a traceback."""
    settings = {"output_type": "multiple_choice", "doc_to_text": "{{q}}"}
    settings |= {"doc_to_choice": ["a", "b"], "doc_to_target": 0}
    data, task = write_task(tmp_path, "gone", [{"q": "a"}], settings)
    Path(data).unlink()
    with pytest.raises(ValueError, match=f"^--lm_eval {task}: ") as error:
        evaluate_lm_eval(reader, find_tasks([task]))
    assert "\n" not in str(error.value)


def test_its_own_model_of_our_export_has_these_scores(reader, tmp_path):
    """The exported folder in transformers, asked the same with the start token.

    Rolling, lm-eval puts that token before a text itself. With add_bos_token its model then has two
    of them and scores the second one as text: -1,082 for -1,066, and that is theirs.
    """
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    model = reader.scorer.model
    ckpt = save(tmp_path, model)
    export_hf(["--ckpt", ckpt, "--out", str(tmp_path / "hf"), "--dtype", "float32"])
    theirs = huggingface.HFLM(
        pretrained=str(tmp_path / "hf"), add_bos_token=True, device="cpu", batch_size=4
    )
    mine, r = model_of(reader), random.Random(2)

    def is_clear(ids: list[int]) -> bool:
        return bool(before_ties(model, torch.tensor([ids])).all())

    def bound(tokens: int, total: float) -> float:
        # Logits of this model are below 8, and a log-probability is off by at most twice their
        # error. Theirs are added up in float32.
        each = 2 * 8 * logits_bound(model.config, CONTEXT)
        return tokens * (each + torch.finfo(torch.float32).eps * abs(total))

    drawn = [(text(r), f" {text(r)}") for _ in range(24)] + [("", text(r)) for _ in range(8)]
    pairs = [(a, b) for a, b in drawn if is_clear([reader.start, *BYTE.encode(a + b)])]
    assert len(pairs) >= len(drawn) // 2 and pairs[-1][0] == ""
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    answers = zip(mine.loglikelihood(asked), theirs.loglikelihood(asked), strict=True)
    for (_, answer), ((own, is_greedy), (other, is_theirs)) in zip(pairs, answers, strict=True):
        assert abs(own - other) <= bound(len(answer.encode()), other) and is_greedy == is_theirs

    def windows(whole: str) -> list[list[int]]:
        found = get_rolling_token_windows(BYTE.encode(whole), reader.start, CONTEXT, 1)
        return [[*before, *ids] for before, ids in map(make_disjoint_window, found)]

    drawn = [text(r, 120) for _ in range(40)]
    long = next(t for t in drawn if len(windows(t)) > 1 and all(map(is_clear, windows(t))))
    theirs.add_bos_token = False
    rolling = Instance("loglikelihood_rolling", {}, (long,), 0)
    (own,), (other,) = (one.loglikelihood_rolling([rolling]) for one in (mine, theirs))
    assert abs(own - other) <= bound(len(long.encode()), other)


def test_an_unknown_task_is_one_line(reader):
    for task, message in (("no_such_task", "has no task"), ("missing.yaml", "there is no file")):
        with pytest.raises(ValueError, match=message):
            evaluate_lm_eval(reader, find_tasks([task]))
