"""Small models, held-out files and reports for tests of evaluation."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from model import LLM
from runtime.data.tokenizer import Tokenizer
from runtime.evaluation.choice_formats import Task
from runtime.evaluation.choices import choices_section, score_task
from runtime.evaluation.config import EvaluateConfig
from runtime.evaluation.evaluate import evaluate
from runtime.evaluation.report import Section
from runtime.evaluation.text_sums import Sums, add_document, empty_sums
from runtime.inference.scorer import Scorer
from tests.builders import random_model, tiny_config
from tests.builders_inference import save

WORDS = ["the", "a", "big", "dog", "cat", "ball", "ran", "saw", "to", "and", "Tom", "Lily", "."]
WORDS += [",", "\n", "é"]


def byte_model(seed: int = 0, **changes) -> LLM:
    """Return a random model of bytes."""
    return random_model(tiny_config(**(dict(vocabulary_size=260) | changes)), seed)


def uniform_model(**changes) -> LLM:
    """Return a model that finds all tokens equally likely."""
    model = byte_model(**(dict(tie_embeddings=False) | changes))
    with torch.no_grad():
        model.out_head.weight.zero_()
    return model


def texts(count: int, seed: int = 0, longest: int = 30) -> list[str]:
    """Return texts of words; some are longer than the context of the tiny models."""
    r = random.Random(seed)
    return [" ".join(r.choices(WORDS, k=r.randint(1, longest))) for _ in range(count)]


def write_texts(path: Path, some: list[str]) -> str:
    """Write texts as JSON lines; return the file's name."""
    lines = (json.dumps({"text": text}) for text in some)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def checkpoint(folder: Path, model: LLM) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    return save(folder, model)


def report_of(ckpt: str, files: str, **settings) -> dict:
    """Return the report on a file, in this process; files: "" for none."""
    defaults = dict(device="cpu", resamples=200, num_threads=1)
    named = (files,) if files else ()
    return evaluate(EvaluateConfig(ckpt=ckpt, files=named, **(defaults | settings)))


def evaluate_choices(scorer: Scorer, tokenizer: Tokenizer, tasks: Iterable[Task]) -> Section:
    """Return the section of what a model makes of some tasks."""
    return choices_section([score_task(scorer, tokenizer, task) for task in tasks])


def sums_of(documents: list[tuple[list[int], list[float], list[float], list[bool]]]) -> Sums:
    """Return the sums of documents (ids, log_probs, best log_probs, right), one byte a token."""
    sums = empty_sums(len(documents))
    every = np.concatenate([np.array(ids, dtype=np.int64) for ids, *_ in documents])
    counts_V = np.bincount(every, minlength=256)
    for d, (ids, log_probs, best, right) in enumerate(documents):
        arrays = (np.array(log_probs), np.array(best), np.array(right))
        add_document(sums, d, np.array(ids, dtype=np.int64), len(ids), *arrays, counts_V)
    return sums
