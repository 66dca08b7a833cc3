"""Direct preference optimization: of two answers, the chosen one becomes the more likely one.

Rafailov et al. 2023, "Direct Preference Optimization". No reward model and no sampling: an answer's
reward is how much more likely it has become than under the weights that the run started from. A
falling loss does not say that answers get better, because it also falls while both become unlikely.
So the score by generation is taken next to it, and what goes wrong is said.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from config_model import ModelConfig, TrainConfig, option
from model import LLM, Output
from runtime.base.device import autocast, choose_dtype, to_device
from runtime.base.ranks import ONE_PROCESS, Ranks
from runtime.base.shares import wilson
from runtime.checkpoint.format import Checkpoint
from runtime.posttraining import tasks
from runtime.posttraining.config import PostTrainConfig, changed
from runtime.posttraining.conversations import HELD_OUT
from runtime.posttraining.encode import PAIRS
from runtime.posttraining.packing import PackedValidation, PairLoader, rows_of
from runtime.posttraining.reference import Reference
from runtime.posttraining.score import Exam
from runtime.posttraining.showing import show_example
from runtime.posttraining.tuning import FineTuning, many_epochs
from runtime.training.metrics import HIGH, LOW
from runtime.training.task import Batch

# The fall of a chosen answer's log-probability that is said, in nats a token: an answer of 100
# tokens is then a seventh as likely as it was.
MOST_FALL = 0.02
CHOSEN, REJECTED, ACCURACY = "chosen change", "rejected change", "accuracy"
# What is shown of the held-out pairs, by the names of the step's sums.
HELD_OUT_NAMES = {
    "rewards/accuracies": ACCURACY,
    "rewards/margins": "margin",
    "logps/chosen_change": CHOSEN,
    "logps/rejected_change": REJECTED,
}


@dataclass(frozen=True)
class DpoConfig(PostTrainConfig):
    """One run of direct preference optimization."""

    ckpt_dir: str = changed("ckpt_dir", "checkpoints/dpo")
    graph_dir: str = changed("graph_dir", "artifacts/graphs/dpo")
    batch_size: int = changed("batch_size", 4)
    grad_accum: int = changed("grad_accum", 1)
    max_steps: int = changed("max_steps", 100)
    lr: float = changed("lr", 1e-4)
    min_lr: float = changed("min_lr", 1e-5)
    warmup_steps: int = changed("warmup_steps", 10)
    val_interval: int = changed("val_interval", 50)
    save_interval: int = changed("save_interval", 50)
    # the preference
    beta: float = option(
        0.1, "how closely the model is kept to its start: higher = closer", above=0.0
    )
    dpo_loss: str = option(
        "sigmoid",
        "sigmoid: of the margin (DPO); ipo: squared distance of the margin from 1 / (2 beta)",
        choices=("sigmoid", "ipo"),
    )
    label_smoothing: float = option(
        0.0,
        "share of the pairs that are taken to be the wrong way round",
        minimum=0.0,
        maximum=0.49,
    )
    length_normalised: bool = option(
        False, "compare means of a token instead of sums, so that length decides nothing"
    )
    sft_coef: float = option(
        0.0, "weight of the chosen answers' own loss, a mean of their tokens", minimum=0.0
    )

    def __post_init__(self):
        super().__post_init__()
        if self.label_smoothing and self.dpo_loss != "sigmoid":
            raise ValueError(
                f"--label_smoothing has no effect on --dpo_loss {self.dpo_loss}: leave it out"
            )


# ----------------------------------------------------------------------------------------- the loss
def by_sequence(values_M: Tensor, segments_M: Tensor, num_sequences: int) -> Tensor:
    """Return the sum of each sequence's values, [S]. segments [M] int64: its number."""
    return values_M.new_zeros(num_sequences).index_add(0, segments_M, values_M)


def preference_losses(
    log_probs_S: Tensor, reference_S: Tensor, num_tokens_S: Tensor, config: DpoConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of each pair, [P], and sums to log.

    log_probs [S = 2 P]: of sequences, chosen before rejected; reference [S]: under the starting
    weights; num_tokens [S]: targets of each. sigmoid: equation 7 of Rafailov et al. 2023, with the
    label smoothing of cDPO (Mitchell 2023). ipo: equation 17 of Azar et al. 2023.
    """
    change_S = log_probs_S - reference_S
    per_token_S = change_S / num_tokens_S
    if config.length_normalised:
        change_S = per_token_S
    margin_P = change_S[0::2] - change_S[1::2]
    if config.dpo_loss == "ipo":
        losses_P = (margin_P - 1 / (2 * config.beta)).square()
    else:
        logits_P, smoothing = config.beta * margin_P, config.label_smoothing
        losses_P = -(1 - smoothing) * F.logsigmoid(logits_P) - smoothing * F.logsigmoid(-logits_P)
    if config.sft_coef:
        losses_P = losses_P - config.sft_coef * (log_probs_S / num_tokens_S)[0::2]
    with torch.no_grad():
        # A tie is half right, so that a run starts at one half.
        is_right_P = (margin_P > 0).to(margin_P) + 0.5 * (margin_P == 0)
        sums = {
            "rewards/chosen": config.beta * change_S[0::2].sum(),
            "rewards/rejected": config.beta * change_S[1::2].sum(),
            "rewards/margins": config.beta * margin_P.sum(),
            "rewards/accuracies": is_right_P.sum(),
            "logps/chosen_change": per_token_S[0::2].sum(),
            "logps/rejected_change": per_token_S[1::2].sum(),
        }
    return losses_P, sums


# ----------------------------------------------------------------------------------------- the task
class Preference(FineTuning):
    """Make chosen answers more likely than rejected ones. Units of the loss are pairs."""

    kind, command = "dpo", "python -m scripts.dpo"
    is_likelihood = balances = False

    def __init__(self, config: DpoConfig, source: Checkpoint | None):
        super().__init__(config, source)
        self.config: DpoConfig = config
        # Of chosen and of rejected answers.
        self.rows_per_sample *= 2
        # Settled by `planned`; else by the config.
        self.dtype: torch.dtype | None = None
        toy = tasks.pairs("preference", config.toy_examples) if config.is_toy else []
        encoded = self.encode(toy, PAIRS)
        self.train, self.held_out, self.split_line = encoded.split(HELD_OUT)
        self.report = encoded.report
        self.fingerprint = self.fingerprint_of(self.train, self.held_out)
        num_pairs = len(encoded.digests)
        self.reference = Reference(num_pairs, self.start["digest"], self.fingerprint)
        self._model: LLM | None = None
        # The starting weights, read again.
        self._again: LLM | None = None
        # Numbers of the first validation, which later ones are compared with.
        self.first: dict[str, float] = {}
        self.warned: set[str] = set()
        self.exam: Exam | None = None
        if config.score_prompts and config.is_toy:
            self.exam = Exam(self.tokenizer, config.score_prompts, config.max_new_tokens)
            self.best_score = "requests pass@1"
        self.gathers_weights = self.exam is not None

    def adapted(self, model_config: ModelConfig, source: Checkpoint) -> ModelConfig:
        if model_config.dropout:
            raise ValueError(
                f"dropout {model_config.dropout} (of {source.path}) would make answers more and "
                "less likely at random: give --dropout 0"
            )
        return super().adapted(model_config, source)

    def planned(self, config: TrainConfig, dtype: torch.dtype) -> None:
        super().planned(config, dtype)
        assert isinstance(config, DpoConfig)
        self.config, self.dtype, self._model = config, dtype, None

    def state(self) -> dict:
        return {"first": self.first}

    def restore(self, state: dict) -> None:
        self.first = dict(state.get("first", {}))

    # -------------------------------------------------------------------------- batches and loss
    def loader(self, model_config: ModelConfig, config: TrainConfig) -> _WithReference:
        return _WithReference(self, self._pairs(config))

    def validation(self, model_config: ModelConfig, config: TrainConfig) -> _AllWithReference:
        return _AllWithReference(self, self._held_out_pairs(config))

    def _pairs(self, config: TrainConfig) -> PairLoader:
        return PairLoader(
            self.train, self.row_tokens, config.batch_size, config.seed, self.shares_rows
        )

    def _held_out_pairs(self, config: TrainConfig) -> PackedValidation:
        return PackedValidation(self.held_out, self.row_tokens, config.batch_size, self.shares_rows)

    def samples_per_epoch(self, model_config: ModelConfig) -> int:
        return len(rows_of(self.train, self.row_tokens, self.shares_rows))

    def count(self, batch: Batch) -> int:
        return len(batch[5])

    def loss(self, model: LLM, batch: Batch) -> Output:
        *_, segments_M, _, reference_S, num_tokens_S = batch
        out = _forward(model, batch)
        assert out.log_probs is not None and out.num_targets is not None
        log_probs_S = by_sequence(out.log_probs, segments_M, len(reference_S))
        losses_P, sums = preference_losses(log_probs_S, reference_S, num_tokens_S, self.config)
        num_pairs = out.num_targets.new_full((), len(losses_P))
        return out._replace(cross_entropy_sum=losses_P.sum(), num_targets=num_pairs, metrics=sums)

    # -------------------------------------------------------------------------- the reference
    def started(self, model: LLM, ranks: Ranks = ONE_PROCESS) -> None:
        """Compute the reference of all pairs that the run will use, unless it is known."""
        super().started(model, ranks)
        self._model = model
        why, unknown = self._load(), self._unknown()
        if not unknown:
            return
        start = model
        if self.config.resume:
            start = ranks.together(lambda: self._start_again(why))
        own = [*ranks.share(unknown)]
        shown = tqdm(own, "reference", leave=False, disable=None if ranks.is_first else True)
        found = [self._reference_of(start, make()) for make, _ in shown]
        for numbers_P, log_probs_S in ranks.in_order(found):
            self.reference.add(numbers_P, log_probs_S)
        ranks.from_first(lambda: self.reference.save(self.config.ckpt_dir))

    def _load(self) -> str:
        """Take the reference that the run which is resumed has saved; return why not, else ""."""
        if not (self.config.resume and self.reference.is_empty):
            return ""
        # Every rank takes what the first one reads.
        load = functools.partial(self.reference.load, self.config.ckpt_dir)
        why, self.reference = self.ranks.from_first(lambda: (load(), self.reference))
        return why

    def _unknown(self) -> list[Callable[[], Batch]]:
        """Return what makes the batches of the run that have pairs without a reference.

        They are the very batches of the first epoch and of validation: the same products in the
        same order, so that the first margins are 0, not only nearly so.
        """
        config, loader = self.config, self._pairs(self.config)
        held_out = self._held_out_pairs(config)
        samples = config.max_steps * config.batch_size * config.grad_accum
        found: list[Callable[[], Batch]] = []
        for first in range(0, min(samples, loader.samples_per_epoch), config.batch_size):
            rows = [loader.examples(first + i) for i in range(config.batch_size)]
            if self.reference.lacks(np.concatenate(rows)):
                found.append(functools.partial(loader.batch, first))
        for i, batch in enumerate(held_out):
            if self.reference.lacks(batch[5].numpy()):
                found.append(functools.partial(held_out.__getitem__, i))
        return found

    @torch.no_grad()
    def _reference_of(self, model: LLM, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Return the numbers [P] of a batch's pairs, and their sums [2 P] by the starting weights.

        model: that has these weights.
        """
        numbers_P, device = batch[5].numpy(), model.embed.weight.device
        with autocast(device, self._dtype(device)):
            on_device = to_device(batch, device)
            log_probs_M = _forward(model, on_device).log_probs
            assert log_probs_M is not None
            log_probs_S = by_sequence(log_probs_M, on_device[4], 2 * len(numbers_P))
        return numbers_P, log_probs_S.float().cpu().numpy()

    def with_reference(self, batch: Batch) -> Batch:
        """Return a batch with the reference of its sequences, [S], and their targets, [S]."""
        segments_M, numbers_P = batch[4], batch[5].numpy()
        if self.reference.lacks(numbers_P):
            # A run that was rolled back continues after the pairs that it was to use. Each rank
            # makes its own batches ahead, so it asks a model that it has the whole of.
            self._again = self._again or self._start_again("")
            self.reference.add(*self._reference_of(self._again, batch))
        reference_S = torch.from_numpy(self.reference.of(numbers_P))
        num_tokens_S = torch.bincount(segments_M, minlength=len(reference_S))
        return *batch, reference_S, num_tokens_S

    def _start_again(self, why: str) -> LLM:
        """Return the starting weights, read again. why: the saved reference is of no use."""
        assert self._model is not None, "fit starts a task before it asks for batches"
        device = self._model.embed.weight.device
        try:
            return self.starting_model(self._model, self._dtype(device))
        except ValueError as error:
            why = why or "pairs without reference log-probabilities are to be used"
            raise ValueError(
                f"{why}, and they cannot be computed again: {error}. Put it back, or start a new "
                "run with --init_from and another --ckpt_dir"
            ) from None

    def _dtype(self, device: torch.device) -> torch.dtype:
        return self.dtype or choose_dtype(self.config.dtype, device)

    # -------------------------------------------------------------------------- what is said
    def score(self, model: LLM) -> dict[str, float]:
        numbers = self.base_loss(model)
        if self.exam is not None:
            score = self.exam.score(self.plain(model), ranks=self.ranks)
            numbers |= self.numbers_of(score)
        numbers |= self._held_out_numbers(model)
        self.first = self.first or numbers
        found = warnings_of(self.first, numbers, self.best_score)
        for kind, line in found.items():
            # Once, until it is over.
            if kind not in self.warned and self.ranks.is_first:
                tqdm.write(f"warning  {line}")
        self.warned = set(found)
        return numbers

    def _held_out_numbers(self, model: LLM) -> dict[str, float]:
        """Return the means of the held-out pairs' numbers; {} without any."""
        num_pairs, device = len(self.held_out), model.embed.weight.device
        if not num_pairs:
            return {}
        found = []
        for batch, counts in self.ranks.share(self.validation(model.config, self.config)):
            with autocast(device, self._dtype(device)):
                sums = self.loss(model, to_device(batch, device)).metrics
            found.append([float(sums[name]) * counts for name in HELD_OUT_NAMES])
        each = zip(*self.ranks.in_order(found), strict=True)
        totals = dict(zip(HELD_OUT_NAMES.values(), map(sum, each), strict=True))
        low, high = wilson(totals[ACCURACY], num_pairs)
        means = {name: total / num_pairs for name, total in totals.items()}
        return means | {ACCURACY + LOW: low, ACCURACY + HIGH: high}

    def describe(self, model_config: ModelConfig, config: TrainConfig) -> list[str]:
        rows = rows_of(self.train, self.row_tokens, self.shares_rows)
        steps = config.max_steps * config.batch_size * config.grad_accum
        head, *notes = self.report.lines()
        lines = [f"data     {head}", *(f"note     {note}" for note in notes)]
        if self.split_line:
            lines.append(f"note     {self.split_line}")
        tokens = rows.tokens_per_row
        lines += [
            f"held out {len(self.held_out):,} of them, by prompt; validation and score",
            f"rows     2 x {len(rows):,} of {tokens} tokens, {100 * rows.fill:.0f} % full",
            f"steps    {config.max_steps:,} steps of {config.batch_size} x {config.grad_accum} "
            f"rows of chosen and as many of rejected answers: {steps / len(rows):.2f} epochs",
            *many_epochs(steps / len(rows), config),
            "example  the first pair, what is compared "
            + ("in green:" if sys.stdout.isatty() else "in brackets:"),
            *self._first_pair(),
        ]
        return lines + super().describe(model_config, config)

    def _first_pair(self) -> list[str]:
        number = int(self.train.numbers[0])
        colour, sides = sys.stdout.isatty(), (self.train.sequence(2 * number + i) for i in (0, 1))
        return [
            f"{name}\n{show_example(ids.tolist(), is_target, self.tokenizer, colour)}"
            for name, (ids, is_target) in zip(("chosen", "rejected"), sides, strict=True)
        ]


def _forward(model: LLM, batch: Batch) -> Output:
    ids_BT, targets_BT, starts_BT, rows_M = batch[:4]
    return model(ids_BT, targets_BT, starts_BT=starts_BT, rows_M=rows_M, per_token=True)


def warnings_of(first: dict[str, float], now: dict[str, float], score: str) -> dict[str, str]:
    """Return what went wrong between two validations: lines by kind.

    score: name of the score by generation, or "". Its fall counts from a standard error on, a
    quarter of its interval.
    """
    lines = {}
    advice = "lower --lr, raise --beta, or give --sft_coef 1"
    if now.get(CHOSEN, 0.0) < -MOST_FALL:
        lines["chosen"] = (
            f"chosen answers are less likely than at the start, by {-now[CHOSEN]:.3f} nats a token "
            f"(rejected {-now[REJECTED]:.3f}; more than {MOST_FALL} is said): {advice}"
        )
    if score not in now or ACCURACY not in now:
        return lines
    error = (first[score + HIGH] - first[score + LOW]) / 4
    if now[score] < first[score] - error and now[ACCURACY] > first[ACCURACY]:
        lines["score"] = (
            f"accuracy rose from {first[ACCURACY]:.3f} to {now[ACCURACY]:.3f}, and {score} fell "
            f"from {first[score]:.3f} to {now[score]:.3f}: the pairs are learned, and the answers "
            f"get worse: {advice}"
        )
    return lines


class _WithReference:
    """A loader whose batches come with their reference."""

    def __init__(self, task: Preference, loader: PairLoader):
        self.task, self.loader = task, loader

    def batch(self, first_sample: int) -> Batch:
        return self.task.with_reference(self.loader.batch(first_sample))


class _AllWithReference(Sequence):
    """Batches of validation, with their reference."""

    def __init__(self, task: Preference, batches: PackedValidation):
        self.task, self.batches = task, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, i):
        return self.task.with_reference(self.batches[i])
