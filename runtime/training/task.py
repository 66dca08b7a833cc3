"""What a run learns from and what it minimises: the seam between the loop and its task.

`train.fit` knows one loop. A kind of training is a Task that the loop calls; fine-tuning adds
tasks, never loops. Pre-training on token shards is the first one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from config_model import ModelConfig, TrainConfig
from model import LLM, Output
from runtime.base.ranks import ONE_PROCESS, Ranks
from runtime.base.text import human_count
from runtime.checkpoint.format import Checkpoint
from runtime.data.loader import (
    ValidationBatches,
    WindowLoader,
    count_windows,
    validation_batches,
)
from runtime.data.shards import TokenShards
from runtime.kernels.linear_cross_entropy import IGNORE

# Up to 4 epochs teach nearly as much as new text, and more than 16 almost nothing (Muennighoff et
# al. 2023, "Scaling Data-Constrained Language Models").
MOST_EPOCHS = 10

Batch = tuple[Tensor, ...]
Loss = Callable[[LLM, Batch], Output]


class Loader(Protocol):
    """An endless, numbered stream of samples."""

    def batch(self, first_sample: int) -> Batch:
        """Return config.batch_size samples, the first of which has number `first_sample`."""


class Task:
    """What `train.fit` asks of a kind of training. A subclass gives at least `loader` and `loss`.

    vocabulary_size: ids in the data, which the model must have; 0 = any.
    tokenizer_state: saved with each checkpoint, so that a model never meets ids of another meaning.
    fingerprint: identifies the data; a resumed run must find the same.
    source, where: what the data was made from, for the log, and a name for it in error lines.
    bytes_per_token: of the validation text, for bits per byte; 0 = not known.
    fetch_ahead: whether batches may be made while earlier steps run. False where they depend on
        the model's weights, as sampled answers do.
    kind, command: of training, and what a user types for it; only the same kind resumes a run.
    is_likelihood: whether the loss is a cross-entropy in nats, which has a perplexity.
    best_score: name of the score whose highest value makes best.pt; "" = the validation loss does.
    balances: whether steps move the expert biases.
    chats: whether the model learns to answer messages, which is what to try at the end.
    rows_per_sample: sequences that a sample of the loader becomes, for the estimate of memory.
    takes_ranks: whether several ranks may carry it out.
    gathers_weights: whether a score needs whole weights on every rank, as decoders do.
    """

    vocabulary_size: int = 0
    tokenizer_state: dict | None = None
    fingerprint: str = ""
    source: object = None
    where: str = "the data"
    bytes_per_token: float = 0.0
    fetch_ahead: bool = True
    kind: str = "pretraining"
    command: str = "python train.py"
    is_likelihood: bool = True
    best_score: str = ""
    balances: bool = True
    chats: bool = False
    rows_per_sample: int = 1
    takes_ranks: bool = True
    gathers_weights: bool = False

    def loader(self, model_config: ModelConfig, config: TrainConfig) -> Loader:
        """Return the stream of training batches. Called several times: it must be cheap."""
        raise NotImplementedError

    def loss(self, model: LLM, batch: Batch) -> Output:
        """Return one forward pass with its loss; the step minimises the sum over its batches."""
        raise NotImplementedError

    def count(self, batch: Batch) -> int:
        """Return what a batch adds to the number its step's loss is divided by: valid targets."""
        return int((batch[1] != IGNORE).sum())

    def validation(
        self, model_config: ModelConfig, config: TrainConfig
    ) -> Sequence[Batch] | ValidationBatches:
        """Return the batches that `train.evaluate` is given: the same ones at each call."""
        return ()

    def samples_per_epoch(self, model_config: ModelConfig) -> int:
        """Return the samples of one pass over the data, for --epochs; 0 = it has no end."""
        return 0

    @property
    def scores(self) -> bool:
        """Return whether `score` is asked at each validation, also where nothing is held out."""
        return bool(self.best_score)

    def score(self, model: LLM) -> dict[str, float]:
        """Return further numbers of a validation, by name. Called in eval mode, without grad.

        Called before the first step too, so that a run shows what it changed.
        """
        return {}

    def is_idle(self, batches: Sequence[Batch]) -> bool:
        """Return whether a step's batches teach nothing, so that no weight may move.

        The step is counted and logged. It is no failure: TrainingDiverged does not count it.
        """
        return False

    def planned(self, config: TrainConfig, dtype: torch.dtype) -> None:
        """Take the settings that a run has in the end, before its model is made.

        Steps and micro-batch may differ from those that the task was made with.
        """

    def prepare(self, model: LLM) -> None:
        """Change a new model before its kernels and optimizer are made, as adapters do."""

    def started(self, model: LLM, ranks: Ranks = ONE_PROCESS) -> None:
        """Make what depends on the model as it starts. Called more than once for a model.

        A run that resumes has called `restore` before. ranks: that all call this, and share model.
        """

    def state(self) -> dict:
        """Return what a resumed run needs of this task, as plain JSON values."""
        return {}

    def restore(self, state: dict) -> None:
        """Take what `state` returned; {} at the start of a run."""

    def adapted(self, model_config: ModelConfig, source: Checkpoint) -> ModelConfig:
        """Return the model's config as this task needs it, for a run from the weights of source."""
        return model_config

    def new_ids(self, source: Checkpoint) -> list[int]:
        """Return the ids that this task adds to the vocabulary of the weights it starts from."""
        return []

    def known_fingerprints(self) -> set[str]:
        """Return the tokenizers whose models this task may start from."""
        return {self.tokenizer_state["fingerprint"]} if self.tokenizer_state else set()

    def stage(self, model: LLM) -> dict:
        """Return what a checkpoint's header says of this kind of training; {} = nothing."""
        return {}

    def needed_bytes(self, needed: dict[str, int], model_config: ModelConfig) -> dict[str, int]:
        """Return the estimate of memory by part, corrected by what this task does otherwise."""
        return needed

    def gradient_bytes(self, needed: dict[str, int]) -> int:
        """Return the bytes of all gradients: as large as the weights, unless some are frozen."""
        return needed["weights"]

    def describe(self, model_config: ModelConfig, config: TrainConfig) -> list[str]:
        """Return the lines about the data that are printed before step 1."""
        return []


def document_starts(ids_BT: Tensor, end_of_text_id: int) -> Tensor:
    """Return the position in its row where each token's document begins, [B, T] int64.

    An end-of-text token begins the document after it.
    """
    positions_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
    return torch.where(ids_BT == end_of_text_id, positions_T, 0).cummax(dim=1).values


class Pretraining(Task):
    """Predict the next token of the shards that prepare_data.py wrote.

    train, val: the two splits, of one tokenizer. loss_fn(model, (inputs, targets)) -> Output.
    """

    def __init__(self, train: TokenShards, val: TokenShards, loss_fn: Loss):
        self.train, self.val, self.loss_fn = train, val, loss_fn
        self.vocabulary_size = train.vocabulary_size
        self.tokenizer_state = train.tokenizer_state
        self.fingerprint = train.manifest["pair"]
        self.source = train.manifest["source"]
        self.where = str(train.folder)
        self.bytes_per_token = val.bytes_per_token

    def loader(self, model_config: ModelConfig, config: TrainConfig) -> WindowLoader:
        return WindowLoader(self.train, model_config.context_length, config.batch_size, config.seed)

    def loss(self, model: LLM, batch: Batch) -> Output:
        return self.loss_fn(model, batch)

    def validation(self, model_config: ModelConfig, config: TrainConfig) -> ValidationBatches:
        return validation_batches(
            self.val, model_config.context_length, config.batch_size, config.val_steps
        )

    def samples_per_epoch(self, model_config: ModelConfig) -> int:
        return count_windows(self.train, model_config.context_length)

    def describe(self, model_config: ModelConfig, config: TrainConfig) -> list[str]:
        T = model_config.context_length
        tokens = config.batch_size * config.grad_accum * T
        in_all, epoch = config.max_steps * tokens, self.train.num_tokens
        lines = [
            f"data     {epoch:,} training and {self.val.num_tokens:,} validation tokens "
            f"({self.train.tokenizer_state['name']}) in {config.data_dir}",
            f"steps    {config.max_steps:,} steps of {config.batch_size} x {config.grad_accum} "
            f"sequences x {T} = {tokens:,} tokens: {human_count(in_all)} tokens, "
            f"{in_all / epoch:.2f} epochs",
        ]
        if in_all > MOST_EPOCHS * epoch and not config.resume:
            lines.append(
                f"note     more than {MOST_EPOCHS} epochs teach little new: prepare more text, or "
                f"take --epochs {MOST_EPOCHS}"
            )
        return lines


class GivenTask(Task):
    """A task of given parts, for text that is in memory and for losses to try out.

    loader: `.batch(first_sample)`; loss_fn(model, batch) -> Output; val_batches: a sequence.
    """

    def __init__(self, loader: Loader, loss_fn: Loss, val_batches: Sequence[Batch] = ()):
        self.given_loader, self.loss_fn, self.val_batches = loader, loss_fn, val_batches

    def loader(self, model_config: ModelConfig, config: TrainConfig) -> Loader:
        return self.given_loader

    def loss(self, model: LLM, batch: Batch) -> Output:
        return self.loss_fn(model, batch)

    def validation(self, model_config: ModelConfig, config: TrainConfig) -> Sequence[Batch]:
        return self.val_batches
