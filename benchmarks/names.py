"""Whether a model of the toy stories keeps their names.

    make demo
    python -m benchmarks.names --ckpt demo/checkpoints/best.pt --name demo
    python -m benchmarks.names --ckpt public/stories.pt --name public

First, held-out stories, which no training set of fewer than a million stories has: the probability
that the model gives a name that the story has named before. It is given among all names, too,
because in its place a pronoun or an article may be as right. Second, generated stories: the share
of their names that belong to who was introduced. A story introduces its hero, the first name in it,
and one friend ("his friend Tom", "Tom, who lived nearby,"). The share is 1 for the generator's own
stories. Saved: benchmarks/results/names_NAME.json.
"""

from __future__ import annotations

from runtime.base import process

# ruff: noqa: E402
process.before_torch()

import functools
import math
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import save_results
from config_model import PredictConfig
from runtime.base import cli
from runtime.data import toy_stories
from runtime.data.tokenizer import Tokenizer
from runtime.inference.predictor import Completion, Predictor

# The first held-out story. `make demo` trains on the stories before 30,000.
FIRST_HELD_OUT = 1_000_000
NAME_TABLES = ("girl", "boy", "she", "he")
# What stands before or after a friend's first mention: "his friend Tom", "Tom, who lived nearby,".
BEFORE_A_FRIEND = re.compile(r"\b(friend|named) $")
AFTER_A_FRIEND = re.compile(r"( the \w+)?, (who lived nearby|a good friend of)\b")


@functools.cache
def names() -> tuple[str, ...]:
    """Return all names of the grammar."""
    tables = toy_stories.grammar().tables
    return tuple(dict.fromkeys(str(name) for table in NAME_TABLES for name in tables[table]))


@functools.cache
def name_pattern() -> re.Pattern:
    return re.compile(rf"\b({'|'.join(names())})\b")


# ------------------------------------------------------------------------------ generated stories
def names_kept(text: str) -> list[bool]:
    """Return for each name in a story, the hero's first one left out, whether it is introduced."""
    hero = friend = None
    kept = []
    for name in name_pattern().finditer(text):
        if hero is None:
            hero = name[0]
            continue
        introduces = BEFORE_A_FRIEND.search(text, 0, name.start()) or AFTER_A_FRIEND.match(
            text, name.end()
        )
        if friend is None and name[0] != hero and introduces:
            friend = name[0]
        kept.append(name[0] in (hero, friend))
    return kept


def generate_stories(predictor: Predictor, config: PredictConfig, prompt: str) -> list[str]:
    """Return config.num_samples completions of the prompt, prompt included."""
    ids = predictor.prompt_ids(prompt)
    texts: list[str] = []
    while len(texts) < config.num_samples:
        first = len(texts)
        seeds = [config.seed + i for i in range(first, min(first + 50, config.num_samples))]
        completions = [Completion(ids) for _ in seeds]
        for _ in predictor.complete(completions, config, seeds):
            pass
        texts += [prompt + completion.text for completion in completions]
    return texts


def share_introduced(stories: list[str]) -> dict:
    """Return the counts and the share of introduced names, and of stories that keep all."""
    kept = [names_kept(story) for story in stories]
    total = sum(map(len, kept))
    return {
        "stories": len(stories),
        "names": total,
        "introduced": sum(map(sum, kept)),
        "share_introduced": sum(map(sum, kept)) / max(total, 1),
        "share_of_stories_with_all_introduced": sum(map(all, kept)) / max(len(kept), 1),
    }


# ------------------------------------------------------------------------------- held-out stories
def token_spans(tokenizer: Tokenizer, ids: list[int]) -> Iterator[tuple[int, int]]:
    """Yield where each token's bytes begin and end in the text; stories are ASCII."""
    start = 0
    for token in ids:
        end = start + len(tokenizer.decode_bytes([token]))
        yield start, end
        start = end


@torch.no_grad()
def log_probabilities(predictor: Predictor, ids: list[int]) -> torch.Tensor:
    """Return the log-probabilities [T, V] of the token at each of `ids` but the first."""
    inputs_BT = torch.tensor([ids[:-1]], device=predictor.device)
    logits_TV = predictor.model(inputs_BT).logits[0].float()
    return logits_TV.log_softmax(dim=-1).cpu()


def first_tokens(tokenizer: Tokenizer, before: str) -> list[int]:
    """Return with which tokens the names begin; `before`: a space if that belongs to them."""
    return sorted({tokenizer.encode(before + name)[0] for name in names()})


def held_out_names(predictor: Predictor, stories: int, first: int) -> dict:
    """Return the mean probabilities and costs of first and repeated names in held-out stories."""
    tokenizer = predictor.tokenizer
    context = predictor.model.config.context_length
    starts = {before: first_tokens(tokenizer, before) for before in ("", " ")}
    costs: dict[str, list[float]] = {"first": [], "repeated": []}
    any_name: list[float] = []
    loss, tokens = 0.0, 0
    for index in range(first, first + stories):
        text = toy_stories.story(index)
        ids = predictor.prompt_ids(text)
        # The start token is no part of the text.
        offset = len(ids) - len(tokenizer.encode(text))
        ids = ids[: context + 1]
        log_TV = log_probabilities(predictor, ids)
        targets_T = torch.tensor(ids[1:])
        cost_T = -log_TV.gather(1, targets_T[:, None])[:, 0]
        loss, tokens = loss + float(cost_T.sum()), tokens + len(ids) - 1
        spans = np.array(list(token_spans(tokenizer, ids[offset:])))
        seen: set[str] = set()
        for name in name_pattern().finditer(text):
            inside = np.flatnonzero((spans[:, 0] < name.end()) & (spans[:, 1] > name.start()))
            # The token at ids[offset + i] is the target of row offset + i - 1.
            rows = inside + offset - 1
            if not len(rows) or rows[0] < 0 or spans[-1, 1] < name.end():
                continue
            costs["repeated" if name[0] in seen else "first"].append(float(cost_T[rows].sum()))
            if name[0] in seen:
                has_space = spans[inside[0], 0] < name.start()
                at = log_TV[rows[0], starts[" " if has_space else ""]]
                any_name.append(float(at.logsumexp(0)))
            seen.add(name[0])
    among = [cost + chance for cost, chance in zip(costs["repeated"], any_name, strict=True)]
    return {
        "stories": stories,
        "first_story": first,
        "loss": loss / tokens,
        "tokens": tokens,
        **{kind: summary_of(values) for kind, values in costs.items()},
        "repeated_among_names": summary_of(among),
        "probability_of_any_name": float(np.exp(any_name).mean()),
    }


def summary_of(costs: list[float]) -> dict:
    """Return the mean cost in nats, and the mean probability."""
    return {
        "names": len(costs),
        "nats": float(np.mean(costs)),
        "probability": float(np.mean([math.exp(-cost) for cost in costs])),
    }


# ------------------------------------------------------------------------------------ the command
def measure(predictor: Predictor, config: PredictConfig, prompt: str, held_out: int) -> dict:
    """Return both groups of figures, and the first generated story."""
    stories = generate_stories(predictor, config, prompt)
    return {
        "held_out": held_out_names(predictor, held_out, FIRST_HELD_OUT),
        "generated": share_introduced(stories),
        "prompt": prompt,
        "temperature": config.temperature,
        "seed": config.seed,
        "story": stories[0],
    }


def main(argv: list[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    parser.add_argument("--ckpt", default="demo/checkpoints/best.pt", help="checkpoint to measure")
    parser.add_argument("--name", default="demo", help="name of the results file (default: demo)")
    parser.add_argument("--prompt", default="Once upon a time", help="start of generated stories")
    parser.add_argument("--stories", type=int, default=200, help="stories of each kind (200)")
    parser.add_argument("--temperature", type=float, default=0.7, help="of generation (0.7)")
    args = parser.parse_args(argv)
    if args.stories < 1:
        raise ValueError(f"--stories must be at least 1, not {args.stories}")
    config = PredictConfig(
        ckpt=args.ckpt,
        temperature=args.temperature,
        max_new_tokens=240,
        seed=1,
        num_samples=args.stories,
        quiet=True,
    )
    predictor = Predictor(config)
    results = measure(predictor, config, args.prompt, args.stories)
    held_out, generated = results["held_out"], results["generated"]
    repeated, among = held_out["repeated"], held_out["repeated_among_names"]
    print(f"held-out loss             {held_out['loss']:.3f} nats per token")
    print(f"repeated names            {repeated['probability']:.3f}  {repeated['nats']:.2f} nats")
    print(f"  among all names         {among['probability']:.3f}  {among['nats']:.2f} nats")
    print(f"  any name                {held_out['probability_of_any_name']:.3f}")
    print(f"first mentions            {held_out['first']['nats']:.2f} nats")
    print(
        f"names introduced          {generated['introduced']} of {generated['names']}, "
        f"{100 * generated['share_introduced']:.1f} %"
    )
    whole = generated["share_of_stories_with_all_introduced"]
    print(f"stories that keep all     {100 * whole:.1f} %")
    save_results(f"names_{args.name}", {"checkpoint": checkpoint_of(args.ckpt), **results})
    return 0


def checkpoint_of(path: str) -> dict:
    """Return what tells a checkpoint from another: its file's name, step and data."""
    from runtime.checkpoint.read import read_checkpoint

    checkpoint = read_checkpoint(path)
    return {
        "file": Path(path).name,
        "step": checkpoint.step,
        "validation_loss": checkpoint.val_loss,
        "digest": checkpoint.digest,
    }


if __name__ == "__main__":
    cli.run_main(main)
