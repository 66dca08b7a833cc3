"""What all training after pre-training shares: chat ids, vocabulary, adapters."""

from __future__ import annotations

import dataclasses

from config_model import ModelConfig, TrainConfig
from model import LLM
from runtime.checkpoint.format import Checkpoint
from runtime.data.chat import has_chat, with_chat
from runtime.data.tokenizer import Tokenizer
from runtime.data.tokenizers import tokenizer_of
from runtime.posttraining.config import PostTrainConfig
from runtime.posttraining.lora import Adapters
from runtime.training.task import Task


class FineTuning(Task):
    """A task that starts from trained weights.

    config: the run's settings; source: the checkpoint that is started from or resumed. A subclass
    sets kind, command, where and fingerprint, and gives the loader, the loss and the score. Raise
    ValueError without a source, or for one whose tokenizer is unknown.
    """

    def __init__(self, config: PostTrainConfig, source: Checkpoint | None):
        if source is None:
            raise ValueError(
                f"{self.command} starts from trained weights: give --init_from CHECKPOINT"
            )
        self.config = config
        plain = tokenizer_of(source)
        # A run without the layout keeps a chat model's tokenizer.
        self.tokenizer: Tokenizer = plain if config.raw else with_chat(plain)
        self.had_chat = has_chat(plain)
        self.tokenizer_state = self.tokenizer.to_state()
        self.vocabulary_size = self.tokenizer.vocabulary_size
        self.base = source.stage.get("base") or {
            "path": str(source.path),
            "digest": source.digest,
            "step": source.step,
        }

        self.adapters = Adapters(config, source, self.new_ids(source))

    # -------------------------------------------------------------------------- the model
    def prepare(self, model: LLM) -> None:
        self.adapters.prepare(model)

    def needed_bytes(self, needed: dict[str, int], model_config: ModelConfig) -> dict[str, int]:
        return self.adapters.needed_bytes(needed, model_config)

    def gradient_bytes(self, needed: dict[str, int]) -> int:
        return self.adapters.gradient_bytes(needed)

    def describe(self, model_config: ModelConfig, config: TrainConfig) -> list[str]:
        """Return the lines on what is trained; a subclass adds its data."""
        return self.adapters.describe(model_config)

    def known_fingerprints(self) -> set[str]:
        base = getattr(self.tokenizer, "base_fingerprint", None)
        return {self.tokenizer.fingerprint, *([base] if base else [])}

    def new_ids(self, source: Checkpoint) -> list[int]:
        if self.had_chat or self.tokenizer.chat is None:
            return []
        return list(self.tokenizer.chat)

    def adapted(self, model_config: ModelConfig, source: Checkpoint) -> ModelConfig:
        """Return the config with rows for the chat ids, and without a capacity of the experts.

        What a full expert drops would depend on the batch, and so would each log-probability.
        """
        return dataclasses.replace(
            model_config,
            vocabulary_size=max(model_config.vocabulary_size, self.vocabulary_size),
            capacity_factor=0.0,
        )

    def stage(self, model: LLM) -> dict:
        return {"kind": self.kind, "base": self.base}
