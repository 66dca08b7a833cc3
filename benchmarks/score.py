"""Scoring: how long it takes to score stories with runtime/inference/scorer.py and with PyTorch.

    python -m benchmarks.score --ckpt public/stories.pt --files stories.jsonl
    python -m benchmarks.score --ckpt public/stories.pt --documents 2000 --name public

Three sides score the same documents in turns: `c_kernel`; `one_at_a_time`, a forward pass of the
plain model for each document, and the log-softmax of its logits; `batched`, the scorer without the
C kernel. Without --files the documents are held-out toy stories. Also what runs of the C kernel
with other batches give: the same bits. Saved: benchmarks/results/score_NAME.json.
"""

from __future__ import annotations

from runtime.base import process

# ruff: noqa: E402
process.before_torch()

import itertools
import os
import time
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.common import alternate_undisturbed, peak_resident_bytes, save_results, summary
from config_model import PredictConfig, total_parameters
from model import LLM
from runtime.base import cli
from runtime.data import toy_stories
from runtime.data.formats import read_jsonl
from runtime.inference.decoder import Decoder
from runtime.inference.predictor import Predictor
from runtime.inference.scorer import Scorer

# The first held-out story. No demo trains on it.
FIRST_HELD_OUT = 1_000_000


def texts_of(files: list[str], count: int) -> list[str]:
    """Return the first `count` documents of JSON lines ("text"), or held-out toy stories."""
    if not files:
        return [toy_stories.story(FIRST_HELD_OUT + number) for number in range(count)]
    texts: list[str] = []
    for path in files:
        with open(path, encoding="utf-8") as file:
            rows = itertools.islice(read_jsonl(file, path), count - len(texts))
            texts += [row["text"] for _, row in rows]
    return texts


@torch.inference_mode()
def one_at_a_time(model: LLM, documents: list[list[int]]) -> float:
    """Return the log-probability of all next tokens, by a forward pass for each document."""
    total = 0.0
    for ids in documents:
        log_probs_TV = model(torch.tensor([ids[:-1]])).logits[0].log_softmax(dim=1)
        targets_T1 = torch.tensor(ids[1:])[:, None]
        total += float(log_probs_TV.gather(1, targets_T1).double().sum())
    return total


def scored(scorer: Scorer, documents: list[list[int]]) -> float:
    return float(sum(one.log_probs_T.sum() for one in scorer.scores(documents)))


def timed(function: Callable[[], float], sums: list[float]) -> Callable[[], float]:
    """Return a function that gives the seconds of another, and keeps what that returned."""

    def sample() -> float:
        started = time.perf_counter()
        sums.append(function())
        return time.perf_counter() - started

    return sample


def main(argv: list[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    parser.add_argument("--ckpt", default="public/stories.pt", help="checkpoint that scores")
    parser.add_argument("--files", nargs="*", default=[], help='JSON lines with "text"')
    parser.add_argument("--documents", type=int, default=2000, help="documents (default: 2000)")
    parser.add_argument("--repeats", type=int, default=3, help="samples a side (default: 3)")
    parser.add_argument("--name", default="public", help="name of the results file (public)")
    args = parser.parse_args(argv)
    if min(args.documents, args.repeats) < 1:
        raise ValueError("--documents and --repeats must be at least 1")
    torch.set_num_threads(min(torch.get_num_threads(), process.usable_cores()))
    predictor = Predictor(PredictConfig(ckpt=args.ckpt, device="cpu", dtype="float32"))
    model, context = predictor.model, predictor.model.config.context_length
    # Cut to the context, so that no side has windows.
    texts = texts_of(args.files, args.documents)
    documents = [predictor.prompt_ids(text)[: context + 1] for text in texts]
    scorer, batched = Scorer(Decoder(model)), Scorer(Decoder(model, native=False))
    if not scorer.is_exact:
        raise ValueError(f"there is no C kernel to measure: {scorer.line}")
    sums: dict[str, list[float]] = {"c_kernel": [], "one_at_a_time": [], "batched": []}
    functions = {
        "c_kernel": timed(lambda: scored(scorer, documents), sums["c_kernel"]),
        "one_at_a_time": timed(lambda: one_at_a_time(model, documents), sums["one_at_a_time"]),
        "batched": timed(lambda: scored(batched, documents), sums["batched"]),
    }
    few = documents[: max(1, len(documents) // 10)]
    for one in (scorer, batched):
        scored(one, few)
    peaks = {
        "all": peak_resident_bytes(lambda: scored(scorer, documents)),
        "tenth": peak_resident_bytes(lambda: scored(scorer, few)),
    }
    samples = alternate_undisturbed(functions, args.repeats)
    sides = {
        name: summary(one.values) | {"discarded": one.discarded, "disturbed": one.disturbed}
        for name, one in samples.items()
    }
    tokens = sum(len(ids) - 1 for ids in documents)
    for name, side in sides.items():
        print(
            f"{name:14} {side['median']:8.2f} s  {tokens / side['median']:10,.0f} tokens/s  "
            f"{-sums[name][0] / tokens:.6f} nats a token"
        )
    shuffled = np.random.default_rng(0).permutation(len(documents))
    alone = {number: next(scorer.scores([documents[number]])) for number in shuffled[:50]}
    whole = dict(zip(shuffled, scorer.scores(documents[i] for i in shuffled), strict=True))
    same = sum(
        np.array_equal(one.log_probs_T, whole[number].log_probs_T) for number, one in alone.items()
    )
    print(f"the same bits alone and in a shuffled batch: {same} of {len(alone)} documents")
    save_results(
        f"score_{args.name}",
        {
            "parameters": total_parameters(model.config),
            "threads": torch.get_num_threads(),
            "documents": len(documents),
            "tokens": tokens,
            "source": "toy stories" if not args.files else "files",
            "sides": sides,
            "nats_a_token": {name: -some[0] / tokens for name, some in sums.items()},
            "ratio_to_one_at_a_time": sides["one_at_a_time"]["median"]
            / sides["c_kernel"]["median"],
            "ratio_to_batched": sides["batched"]["median"] / sides["c_kernel"]["median"],
            "peak_bytes": peaks,
            "same_bits": {"documents": len(alone), "same": int(same)},
            "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        },
    )
    return 0


if __name__ == "__main__":
    cli.run_main(main)
