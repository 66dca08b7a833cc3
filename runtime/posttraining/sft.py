"""Supervised fine-tuning: a model learns to answer, from conversations with right answers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from config_model import ModelConfig, TrainConfig
from model import LLM, Output
from runtime.base.ranks import ONE_PROCESS, Ranks
from runtime.checkpoint.format import Checkpoint
from runtime.posttraining import tasks
from runtime.posttraining.config import PostTrainConfig, changed
from runtime.posttraining.conversations import HELD_OUT
from runtime.posttraining.encode import CONVERSATIONS, Encoded
from runtime.posttraining.packing import PackedLoader, PackedValidation, rows_of
from runtime.posttraining.score import Exam, Score, greedy_answers
from runtime.posttraining.showing import show_example
from runtime.posttraining.tuning import FineTuning, many_epochs
from runtime.training.task import Batch


@dataclass(frozen=True)
class SftConfig(PostTrainConfig):
    """One run of supervised fine-tuning."""

    ckpt_dir: str = changed("ckpt_dir", "checkpoints/sft")
    graph_dir: str = changed("graph_dir", "artifacts/graphs/sft")
    batch_size: int = changed("batch_size", 4)
    grad_accum: int = changed("grad_accum", 1)
    max_steps: int = changed("max_steps", 1_000)
    optimizer: str = changed("optimizer", "muon")
    lr: float = changed("lr", 2e-3)
    min_lr: float = changed("min_lr", 1e-5)
    warmup_steps: int = changed("warmup_steps", 20)
    val_interval: int = changed("val_interval", 500)
    save_interval: int = changed("save_interval", 500)


class Sft(FineTuning):
    """Learn the answers of conversations; nothing else has a gradient of the task's own loss."""

    kind, command = "sft", "python -m scripts.sft"

    def __init__(self, config: SftConfig, source: Checkpoint | None):
        super().__init__(config, source)
        toy = tasks.conversations("sft", config.toy_examples) if config.is_toy else []
        encoded = self.encode(toy, CONVERSATIONS)
        self.train, self.held_out, self.split_line = encoded.split(HELD_OUT)
        self.report = encoded.report
        self.fingerprint = self.fingerprint_of(self.train, self.held_out)
        self.exam: Exam | Prompts | None = None
        if config.score_prompts and config.is_toy:
            self.exam = Exam(self.tokenizer, config.score_prompts, config.max_new_tokens)
            self.best_score = "score"
        elif config.score_prompts and len(self.held_out):
            self.exam = Prompts(self, config.score_prompts, config.max_new_tokens)
        self.gathers_weights = self.exam is not None

    # -------------------------------------------------------------------------- batches and loss
    def loader(self, model_config: ModelConfig, config: TrainConfig) -> PackedLoader:
        return PackedLoader(
            self.train, self.row_tokens, config.batch_size, config.seed, self.shares_rows
        )

    def validation(self, model_config: ModelConfig, config: TrainConfig) -> Sequence[Batch]:
        return PackedValidation(self.held_out, self.row_tokens, config.batch_size, self.shares_rows)

    def samples_per_epoch(self, model_config: ModelConfig) -> int:
        return len(rows_of(self.train, self.row_tokens, self.shares_rows))

    def loss(self, model: LLM, batch: Batch) -> Output:
        ids_BT, targets_BT, starts_BT, rows_M, _ = batch
        return model(ids_BT, targets_BT, starts_BT=starts_BT, rows_M=rows_M)

    def count(self, batch: Batch) -> int:
        return len(batch[3])

    # -------------------------------------------------------------------------- what is said
    def score(self, model: LLM) -> dict[str, float]:
        numbers = self.base_loss(model)
        if self.exam is None:
            return numbers
        score = self.exam.score(self.plain(model), ranks=self.ranks)
        numbers |= self.numbers_of(score)
        if self.best_score:
            numbers["score"] = (numbers["questions"] + numbers["requests"]) / 2
        return numbers

    def describe(self, model_config: ModelConfig, config: TrainConfig) -> list[str]:
        rows = rows_of(self.train, self.row_tokens, self.shares_rows)
        targets = int(self.train.is_target.sum())
        steps = config.max_steps * config.batch_size * config.grad_accum
        head, *notes = self.report.lines()
        lines = [f"data     {head}", *(f"note     {note}" for note in notes)]
        if self.split_line:
            lines.append(f"note     {self.split_line}")
        lines += [
            f"held out {len(self.held_out):,} of them, by prompt; validation and score",
            f"rows     {len(rows):,} of {rows.tokens_per_row} tokens, {100 * rows.fill:.0f} % "
            f"full; {100 * targets / len(self.train.ids):.0f} % of the tokens are answers",
            f"steps    {config.max_steps:,} steps of {config.batch_size} x {config.grad_accum} "
            f"rows: {steps / len(rows):.2f} epochs",
            *many_epochs(steps / len(rows), config),
            "example  the first, what is learned "
            + ("in green:" if sys.stdout.isatty() else "in brackets:"),
            self._first_example(),
        ]
        return lines + super().describe(model_config, config)

    def _first_example(self) -> str:
        ids, is_target = self.train.sequence(int(self.train.numbers[0]))
        return show_example(ids.tolist(), is_target.tolist(), self.tokenizer, sys.stdout.isatty())


class Prompts:
    """Held-out prompts of files, each with the last answer of its conversation."""

    def __init__(self, task: Sft, num_prompts: int, max_new_tokens: int):
        self.tokenizer, self.max_new_tokens = task.tokenizer, max_new_tokens
        found = [_prompt_and_answer(task.held_out, int(i)) for i in task.held_out.numbers]
        # An answer needs room.
        self.pairs = [pair for pair in found if len(pair[0]) < task.context][:num_prompts]

    def score(self, model: LLM, ranks: Ranks = ONE_PROCESS) -> Score:
        """Return the shares of greedy answers that are the file's, and that end.

        ranks: that share the prompts out, each with the whole model.
        """
        prompts, wanted = zip(*self.pairs, strict=True)
        given = greedy_answers(model, self.tokenizer, prompts, self.max_new_tokens, ranks)
        is_right = [
            float(answer.ended and answer.text == self.tokenizer.decode(right))
            for answer, right in zip(given, wanted, strict=True)
        ]
        score = Score()
        score.count("exact match", is_right)
        score.count("ended", [float(answer.ended) for answer in given])
        score.means["length"] = sum(answer.num_tokens for answer in given) / len(given)
        return score


def _prompt_and_answer(encoded: Encoded, number: int) -> tuple[list[int], list[int]]:
    """Return the ids before a conversation's last answer, and the answer's without its end."""
    ids, is_target = encoded.sequence(number)
    first = len(ids) - int(np.argmin(is_target[::-1])) if not is_target.all() else 0
    return ids[:first].tolist(), ids[first:-1].tolist()
