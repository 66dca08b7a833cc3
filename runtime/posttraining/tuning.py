"""What all training after pre-training shares: data, chat ids, vocabulary, adapters, score."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import hashlib
import math
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from config_model import ModelConfig, TrainConfig
from model import LLM
from runtime.base.ranks import ONE_PROCESS, Ranks
from runtime.base.shares import wilson
from runtime.checkpoint.changed import with_config
from runtime.checkpoint.format import Checkpoint, meta_model
from runtime.checkpoint.read import build_model, read_checkpoint
from runtime.checks.kernels import settle_kernels
from runtime.data.chat import has_chat, with_chat
from runtime.data.hf_tokenizer import HuggingFaceTokenizer
from runtime.data.loader import validation_batches
from runtime.data.shards import MANIFEST, open_data
from runtime.data.tokenizer import Tokenizer
from runtime.data.tokenizers import tokenizer_of
from runtime.kernels.choose import choose_kernels
from runtime.posttraining.config import PostTrainConfig
from runtime.posttraining.conversations import ExampleFiles
from runtime.posttraining.encode import Encoded, encode_examples
from runtime.posttraining.forms import Example
from runtime.posttraining.lora import Adapters, gathered_model, merged_model
from runtime.posttraining.packing import can_share_rows
from runtime.posttraining.score import Score
from runtime.training.memory import hidden_matrices
from runtime.training.metrics import HIGH, LOW
from runtime.training.task import MOST_EPOCHS, Task, document_starts

# Batches of the base's own text that its loss is taken from.
BASE_BATCHES = 16
BASE_LOSS = "base loss"


class FineTuning(Task):
    """A task that starts from trained weights.

    config: the run's settings; source: the checkpoint that is started from or resumed. A subclass
    sets kind and command, and gives the loader, the loss and the score. Raise ValueError without a
    source, and for one whose tokenizer is unknown.
    """

    # What a subclass scores by generation with; None = nothing.
    exam: Any = None

    def __init__(self, config: PostTrainConfig, source: Checkpoint | None):
        if source is None:
            raise ValueError(
                f"{self.command} starts from trained weights: give --init_from CHECKPOINT"
            )
        self.config, self.context = config, source.model_config.context_length
        plain = tokenizer_of(source)
        # A run without the layout keeps a chat model's tokenizer.
        self.tokenizer: Tokenizer = plain if config.raw else with_chat(plain)
        self.had_chat, self.chats = has_chat(plain), not config.raw
        self.tokenizer_state = self.tokenizer.to_state()
        if config.raw and plain.chat is not None:
            # There an answer ends with end-of-text, not with the end of a message.
            self.tokenizer = copy.copy(plain)
            self.tokenizer.stop_ids = plain.all_stop_ids
        self.rendered_at = self._fix_clock(source)
        self.vocabulary_size = self.tokenizer.vocabulary_size
        self.base = source.stage.get("base") or {
            "path": str(source.path),
            "digest": source.digest,
            "step": source.step,
            "document_mask": source.train_config.get("document_mask", False),
        }
        # What this run starts from, which need not be what was pre-trained.
        own = {"path": str(source.path), "digest": source.digest}
        self.start: dict[str, str] = (config.resume and source.stage.get("start")) or own
        self.where = "the toy tasks" if config.is_toy else ", ".join(config.data)
        self.source = {"name": self.where}
        self.shares_rows = can_share_rows(source.model_config)
        self.row_tokens = self._row_tokens()
        # Of a model's contexts, for the estimate of memory.
        self.rows_per_sample = math.ceil(self.row_tokens / self.context)
        self.adapters = Adapters(config, source, self.new_ids(source))
        self._base_batches = self._open_base(config.data_dir)
        self._plain: LLM | None = None
        self.ranks = ONE_PROCESS

    def _fix_clock(self, source: Checkpoint) -> str:
        """Let a published model's template see one time in all of the run; return it, or "".

        Some templates write today's date. A resumed run must make the same ids on another day.
        """
        if not isinstance(self.tokenizer, HuggingFaceTokenizer):
            return ""
        saved = source.stage.get("rendered_at") if self.config.resume else ""
        now = saved or datetime.datetime.now().isoformat(timespec="seconds")
        self.tokenizer.now = datetime.datetime.fromisoformat(now)
        return now

    def _row_tokens(self) -> int:
        """Return the tokens of a row. A row of two contexts wastes less of itself.

        Only distances between positions count for a model whose examples share rows.
        """
        given = self.config.row_tokens
        if not self.shares_rows:
            if given not in (0, self.context):
                raise ValueError(
                    f"--row_tokens {given}: this model's examples share no rows (a learned "
                    "attention bias, or no RoPE), so leave it out"
                )
            return self.context
        if given and given < self.context:
            raise ValueError(
                f"--row_tokens {given} is less than the model's context of {self.context}, which "
                "an example may fill: raise it or leave it out"
            )
        return given or 2 * self.context

    # -------------------------------------------------------------------------- the data
    def encode(self, toy: Iterable[Example], want: str) -> Encoded:
        """Return the examples of the run's files, or `toy` without files, as ids.

        want: what they must be, conversations or pairs.
        """
        config = self.config
        examples = toy
        if not config.is_toy:
            examples = ExampleFiles(config.data, want, config.column_names(), config.raw)
        return encode_examples(
            examples, self.tokenizer, self.context, config.train_on, config.too_long, config.raw
        )

    def fingerprint_of(self, *encoded: Encoded) -> str:
        """Return a SHA-256 of the ids, targets and borders of examples."""
        digest = hashlib.sha256()
        for each in encoded:
            for array in (each.ids, each.is_target, each.offsets, each.numbers):
                digest.update(f"{array.dtype} {len(array)}\n".encode())
                digest.update(array.tobytes())
        return digest.hexdigest()

    # -------------------------------------------------------------------------- the model
    def known_fingerprints(self) -> set[str]:
        base = self.tokenizer.base_fingerprint
        return {self.tokenizer.fingerprint, *([base] if base else [])}

    def new_ids(self, source: Checkpoint) -> list[int]:
        if self.had_chat or self.tokenizer.chat is None:
            return []
        return sorted(self.tokenizer.chat)

    def adapted(self, model_config: ModelConfig, source: Checkpoint) -> ModelConfig:
        """Return the config with rows for the chat ids, and without a capacity of the experts.

        What a full expert drops would depend on the batch, and so would each log-probability.
        """
        return dataclasses.replace(
            model_config,
            vocabulary_size=max(model_config.vocabulary_size, self.vocabulary_size),
            capacity_factor=0.0,
        )

    def planned(self, config: TrainConfig, dtype: torch.dtype) -> None:
        """Let go of an earlier model: a roll back or a trial makes another, and needs its room."""
        self._plain = None

    def prepare(self, model: LLM) -> None:
        self.adapters.prepare(model)

    def needed_bytes(self, needed: dict[str, int], model_config: ModelConfig) -> dict[str, int]:
        """Add what a merged copy of a model with adapters holds, which answers are drawn with."""
        needed = self.adapters.needed_bytes(needed, model_config)
        if self.config.lora_rank and (self.exam is not None or not self.fetch_ahead):
            needed = needed | {"merged weights": 4 * hidden_matrices(model_config)}
        return needed

    def gradient_bytes(self, needed: dict[str, int]) -> int:
        return self.adapters.gradient_bytes(needed)

    def started(self, model: LLM, ranks: Ranks = ONE_PROCESS) -> None:
        self.ranks = ranks
        if ranks.any(self._base_batches is None):
            # Its shards must be on the disks of all.
            self._base_batches = None

    def plain(self, model: LLM) -> LLM:
        """Return a plain LLM, in eval mode, with the weights of now, for decoders.

        Adapters are merged in memory of their own. Otherwise it shares the model's memory, and is
        another module: decoders change a model's mode, and one that is compiled takes few shapes.
        The weights of a model in shards are gathered, on every rank.
        """
        if self.ranks.is_split(model.embed.weight):
            return _with_kernels(gathered_model(model, self.ranks))
        if self.config.lora_rank:
            return merged_model(model)
        if self._plain is None or self._plain.embed.weight.data_ptr() != _address(model):
            plain = meta_model(model.config)
            plain.load_state_dict(model.state_dict(), assign=True)
            self._plain = _with_kernels(plain.eval().requires_grad_(False))
        return self._plain

    def starting_model(self, like: LLM, dtype: torch.dtype) -> LLM:
        """Return a model with the weights that the run started from, read again.

        It computes to the bit what the run's model did then: like it, it has adapters if the run
        has. It is whole on each rank. Raise ValueError if the file is not there, or is another one
        by now.
        """
        source = read_checkpoint(self.start["path"])
        if source.digest != self.start["digest"]:
            raise ValueError(f"{source.path} is not the file that this run started from")
        is_new = self.tokenizer.chat is not None and not has_chat(tokenizer_of(source))
        new_ids = sorted(self.tokenizer.chat or ()) if is_new else []
        device = like.embed.weight.device
        model = build_model(with_config(source, like.config, new_ids), device)
        self.prepare(model)
        choose_kernels(model, device, dtype)
        settle_kernels(model)
        return model

    def stage(self, model: LLM) -> dict:
        stage = {"kind": self.kind, "base": self.base, "start": self.start}
        return stage | ({"rendered_at": self.rendered_at} if self.rendered_at else {})

    # -------------------------------------------------------------------------- the score
    @property
    def scores(self) -> bool:
        # What tuning cost is told by two losses on the base's text: one at the end is needed too.
        return bool(self.best_score or self._base_batches)

    def _open_base(self, data_dir: str):
        """Return batches of the base's own held-out text, if its shards are there."""
        folder = Path(data_dir)
        if not (folder / "val" / MANIFEST).is_file():
            return None
        _, val = open_data(folder)
        if val.tokenizer_state["fingerprint"] not in self.known_fingerprints():
            return None
        self._end_of_text_id = val.end_of_text_id
        return validation_batches(val, self.context, 8, BASE_BATCHES)

    @torch.no_grad()
    def base_loss(self, model: LLM) -> dict[str, float]:
        """Return the loss on the base's own text (nats), whose rise is what tuning cost.

        It is that of pre-training: a base that saw no other documents sees none here.
        {} without its shards in --data_dir.
        """
        if self._base_batches is None:
            return {}
        device, sums = model.embed.weight.device, []
        for (inputs_BT, targets_BT), counts in self.ranks.share(self._base_batches):
            inputs_BT, starts_BT = inputs_BT.to(device), None
            if self.base.get("document_mask"):
                starts_BT = document_starts(inputs_BT, self._end_of_text_id)
            out = model(inputs_BT, targets_BT.to(device), starts_BT=starts_BT)
            assert out.cross_entropy_sum is not None
            sums.append((float(out.cross_entropy_sum), targets_BT.numel()) if counts else (0.0, 0))
        sums = self.ranks.in_order(sums)
        return {BASE_LOSS: sum(total for total, _ in sums) / sum(count for _, count in sums)}

    def numbers_of(self, score: Score) -> dict[str, float]:
        """Return a score's numbers for a log record, with the ends of the shares' intervals."""
        numbers = score.numbers()
        for name, share in score.shares.items():
            # Parts of a share have names such as "questions: who".
            if ": " not in name:
                low, high = wilson(share.successes, share.trials)
                numbers |= {f"{name}{LOW}": low, f"{name}{HIGH}": high}
        return numbers

    def describe(self, model_config: ModelConfig, config: TrainConfig) -> list[str]:
        lines = self.adapters.describe(model_config)
        if self._base_batches is None and not self.config.is_toy:
            lines.append(
                f"base     no shards of its tokenizer in {shlex.quote(config.data_dir)}: what "
                "tuning costs on its own text is not measured (--data_dir)"
            )
        return lines


def many_epochs(epochs: float, config: TrainConfig) -> list[str]:
    """Return a note if a new run sees its examples more often than they teach something."""
    if epochs <= MOST_EPOCHS or config.resume:
        return []
    advice = f"give more examples, or take --epochs {MOST_EPOCHS}"
    return [f"note     more than {MOST_EPOCHS} epochs teach little new: {advice}"]


def _with_kernels(model: LLM) -> LLM:
    """Let a plain model in float32 compute by the kernels that suit its device; return it."""
    choose_kernels(model, model.embed.weight.device, model.embed.weight.dtype)
    settle_kernels(model)
    return model


def _address(model: LLM) -> int:
    return model.embed.weight.data_ptr()
