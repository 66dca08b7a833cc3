"""Score the stages of post-training on exercises that no setting was chosen by.

    make demo-chat
    python -m benchmarks.tuned base=demo-chat/base/best.pt sft=demo-chat/sft/best.pt \\
        dpo=demo-chat/dpo/best.pt grpo=demo-chat/grpo/best.pt

The exercises are those of the runs' own score, from number FIRST on: the defaults were found by
looking at the first ones. Each model answers greedily and once at temperature 1. Preference
accuracy is the share of held-out pairs whose chosen answer is more likely than under the first
model that has chat ids, by more than the rejected one is. Saved: benchmarks/results/tuned.json.
"""

from __future__ import annotations

from runtime.base import process
from runtime.base.shares import wilson

# ruff: noqa: E402
process.before_torch()

import dataclasses
import json

import torch
from torch import Tensor

from benchmarks.common import RESULTS, save_results
from model import LLM
from runtime.base import cli
from runtime.checkpoint.changed import with_config
from runtime.checkpoint.format import Checkpoint
from runtime.checkpoint.read import build_model, read_checkpoint
from runtime.data.chat import has_chat, with_chat
from runtime.data.tokenizer import Tokenizer
from runtime.data.tokenizers import tokenizer_of
from runtime.posttraining import tasks
from runtime.posttraining.encode import encode_examples
from runtime.posttraining.forms import Pair
from runtime.posttraining.packing import make_batch
from runtime.posttraining.preference import by_sequence
from runtime.posttraining.score import Exam, Score

# Settings that say where a run's files were.
FOLDERS = ("data_dir", "ckpt_dir", "graph_dir", "init_from")
# Of the split "test".
FIRST = 100_000
# Held-out pairs, from the same numbers of the split "test" on.
PAIRS = 256


def load(path: str) -> tuple[LLM, Tokenizer, Checkpoint]:
    """Return a model with chat ids and its tokenizer; a base gets the rows that SFT gives it."""
    checkpoint = read_checkpoint(path)
    plain = tokenizer_of(checkpoint)
    tokenizer = with_chat(plain)
    if not has_chat(plain) and tokenizer.chat is not None:
        size = max(checkpoint.model_config.vocabulary_size, tokenizer.vocabulary_size)
        config = dataclasses.replace(checkpoint.model_config, vocabulary_size=size)
        checkpoint = with_config(checkpoint, config, sorted(tokenizer.chat))
    return build_model(checkpoint), tokenizer, checkpoint


@torch.no_grad()
def pair_log_probs(model: LLM, tokenizer: Tokenizer, first: int, count: int) -> Tensor:
    """Return the log-probability of each pair's answers, [count, 2]: chosen, rejected."""
    pairs = [_pair(number) for number in range(first, first + count)]
    encoded = encode_examples(pairs, tokenizer, model.config.context_length)
    found, longest = [], int(encoded.lengths.max())
    for number in encoded.numbers:
        batch = make_batch(encoded, [encoded.numbers[number : number + 1]], longest)
        ids_BT, targets_BT, starts_BT, rows_M, segments_M = batch[:5]
        out = model(ids_BT, targets_BT, starts_BT=starts_BT, rows_M=rows_M, per_token=True)
        assert out.log_probs is not None
        found.append(by_sequence(out.log_probs, segments_M, 2))
    return torch.stack(found)


def _pair(number: int) -> Pair:
    exercise, rejected = tasks.pair("test", number)
    sides = [[{"role": "assistant", "content": text}] for text in (exercise.answer, rejected)]
    return Pair(tasks.asked(exercise), *sides)


def shown(score: Score) -> dict:
    """Return a score as JSON: shares with their interval, and means."""
    shares = {
        name: {
            "share": share.value,
            "trials": share.trials,
            "interval": list(wilson(share.successes, share.trials)),
        }
        for name, share in score.shares.items()
    }
    return {"shares": shares, "means": score.means}


def answers(model: LLM, tokenizer: Tokenizer, first: int) -> dict[str, str]:
    """Return greedy answers to a question and to a request, by their prompt."""
    exam = Exam(tokenizer, 1, first=first)
    found = {}
    for sheet in (exam.questions, exam.requests):
        found[sheet.exercises[0].prompt] = sheet.greedy(model)[0].text
    return found


# ------------------------------------------------------------------------------------------ tables
STAGES = {
    "base": "base",
    "sft": "SFT",
    "dpo": "SFT, DPO",
    "control": "SFT, DPO with beta 1e-6",
    "grpo": "SFT, GRPO",
    "lora": "LoRA SFT",
}
SHARES = ("questions", "requests", "questions pass@1", "requests pass@1", "ended")
MEANS = ("reward", "sampled reward", "story loss")


def _stored() -> dict:
    return json.loads((RESULTS / "tuned.json").read_text(encoding="utf-8"))


def scores_table() -> str:
    """Return a column for each stage: shares with their 95 % interval, means."""
    result = _stored()
    stages = result["stages"]
    lines = ["| | " + " | ".join(STAGES.get(name, name) for name in stages) + " |"]
    lines.append("|---" * (len(stages) + 1) + "|")
    for name in (*SHARES, "preference accuracy"):
        found = [stage["shares"].get(name) for stage in stages.values()]
        cells = [
            ""
            if one is None
            else f"{one['share']:.3f} ({one['interval'][0]:.2f} to {one['interval'][1]:.2f})"
            for one in found
        ]
        lines.append(f"| {name.capitalize()} | {' | '.join(cells)} |")
    for name in MEANS:
        cells = [f"{stage['means'][name]:.3f}" for stage in stages.values()]
        lines.append(f"| {name.capitalize()} | {' | '.join(cells)} |")
    cpu = result["environment"]["hardware"]["cpu"]
    return "\n".join(
        [
            *lines,
            "",
            f"{result['prompts']} exercises of each form that no setting was chosen by, greedy and "
            f"at temperature 1 (pass@1, sampled reward). One run each, {cpu}; `tuned.json`.",
        ]
    )


def answers_list() -> str:
    """Return one exercise of each form with the answer of each stage."""
    stages = _stored()["stages"]
    lines = []
    for prompt in next(iter(stages.values()))["answers"]:
        lines += [f"> {line}" for line in prompt.splitlines()]
        lines += ["", "| stage | answer |", "|---|---|"]
        for name, stage in stages.items():
            answer = " ".join(stage["answers"][prompt].split())
            lines.append(f"| {STAGES.get(name, name)} | {_shortened(answer)} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def _shortened(text: str, most: int = 420) -> str:
    """Return the beginning of a text, whole words, without what Markdown would read."""
    text = text.replace("<", "&lt;").replace("|", "\\|") or "(nothing)"
    return text if len(text) <= most else text[:most].rsplit(" ", 1)[0] + " ..."


TABLES = {"post-training scores": scores_table, "post-training answers": answers_list}


# ----------------------------------------------------------------------------------- the command
def main(argv: list[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    parser.add_argument("stages", nargs="+", metavar="NAME=CHECKPOINT", help="models, in order")
    parser.add_argument("--prompts", type=int, default=256, help="of each form (256)")
    parser.add_argument("--pairs", type=int, default=PAIRS, help=f"held-out pairs ({PAIRS})")
    parser.add_argument("--first", type=int, default=FIRST, help=f"first exercise ({FIRST:,})")
    parser.add_argument("--num_threads", type=int, default=0, help="CPU threads; 0 = PyTorch's")
    args = parser.parse_args(argv)
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    stages, reference = {}, None
    for stage in args.stages:
        name, equals, path = stage.partition("=")
        if not equals:
            raise ValueError(f"{stage}: write NAME=CHECKPOINT, as in sft=demo-chat/sft/best.pt")
        model, tokenizer, checkpoint = load(path)
        score = Exam(tokenizer, args.prompts, first=args.first).score(model)
        log_probs_P2 = pair_log_probs(model, tokenizer, args.first, args.pairs)
        # What the tunings after the first start from.
        is_start = checkpoint.stage.get("kind") == "sft" and reference is None
        reference = log_probs_P2 if is_start else reference
        # Of others, such as adapters of the base, the start is another one.
        if reference is not None and (is_start or checkpoint.stage["kind"] in ("dpo", "grpo")):
            change_P2 = log_probs_P2 - reference
            margin_P = change_P2[:, 0] - change_P2[:, 1]
            right = float((margin_P > 0).sum() + 0.5 * (margin_P == 0).sum())
            score.count("preference accuracy", [right / len(margin_P)] * len(margin_P))
        stages[name] = {
            **shown(score),
            "answers": answers(model, tokenizer, args.first),
            "settings": {k: v for k, v in checkpoint.train_config.items() if k not in FOLDERS},
            "kind": checkpoint.stage.get("kind", "pretraining"),
            "step": checkpoint.step,
            "train_seconds": checkpoint.run.get("train_seconds"),
            "tokens_seen": checkpoint.run.get("tokens_seen"),
        }
        print(name, {n: round(s.value, 3) for n, s in score.shares.items()}, score.means)
    print(save_results("tuned", {"prompts": args.prompts, "first": args.first, "stages": stages}))
    return 0


if __name__ == "__main__":
    cli.run_main(main)
