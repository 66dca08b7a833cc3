"""What the benchmark of serving compares: the server, generation without it, and predict.py."""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.decode import Setting, make_model
from benchmarks.serving_clients import Load, load
from benchmarks.serving_servers import Running
from config_model import ModelConfig, PredictConfig, TrainConfig
from model import LLM
from runtime.checkpoint.write import save_checkpoint
from runtime.data.tokenizer import Tokenizer
from runtime.data.tokenizers import train_bpe
from runtime.inference.decoder import generate
from runtime.inference.predictor import Predictor

WEIGHT_SCALE = 3.0
# As the server and predict.py draw unless they are told.
DEFAULT_DRAWING = {
    name: getattr(PredictConfig, name) for name in ("temperature", "top_k", "top_p", "min_p")
}


# ----------------------------------------------------------------------------------------- models
def made_up_words(count: int = 9_000) -> str:
    """Return a text whose words are made up, and always the same."""
    r = random.Random(0)
    syllables = [a + b for a in "bcdfghjklmnprstvwz" for b in "aeiou"]
    words = ["".join(r.choices(syllables, k=r.randint(1, 4))) for _ in range(count)]
    return " ".join(r.choices(words, k=13 * count))


def random_model(config: ModelConfig) -> LLM:
    """Return a model with random weights that never ends a text: that id's logit is 0."""
    cpu = torch.device("cpu")
    setting = Setting(config, cpu, torch.float32, [], {}, [1], [], [], [], "", torch.empty(0))
    model = make_model(setting, WEIGHT_SCALE)
    model.head_weight.data[config.vocabulary_size - 1] = 0
    return model


def save(folder: Path, model: LLM) -> tuple[str, Tokenizer]:
    """Write a checkpoint whose every id has a text; return its path and tokenizer."""
    tokenizer = train_bpe([made_up_words()], model.config.vocabulary_size)
    state = tokenizer.to_state()
    config = TrainConfig()
    path = save_checkpoint(folder, 1, model, None, train_config=config, tokenizer_state=state)
    return str(path), tokenizer


# --------------------------------------------------------------------------------------- requests
class Prompts:
    """Prompts of random ids, each a new one, so that no cache has its beginning."""

    def __init__(self, vocabulary: int, tokens: int):
        self.random, self.vocabulary, self.tokens = random.Random(0), vocabulary, tokens
        self.seeds = itertools.count()

    def new(self, tokens: int = 0) -> list[int]:
        # Without the last id, which ends a text.
        return self.random.choices(range(self.vocabulary - 1), k=tokens or self.tokens)

    def body(self, new_tokens: int, **settings: Any) -> dict[str, Any]:
        """Return a request for a prompt of its own."""
        seed = next(self.seeds)
        return {"prompt": self.new(), "max_tokens": new_tokens, "seed": seed, **settings}


@dataclass
class Sizes:
    """How much a sample asks for: at least `requests`, and one of each client."""

    new_tokens: int = 128
    prompt_tokens: int = 32
    requests: int = 16

    def rounds(self, clients: int) -> int:
        return max(1, self.requests // clients)


# ------------------------------------------------------------------------------------------ sides
@dataclass
class ServerSide:
    """Clients of a server: tokens/s, and what the clients cost."""

    server: Running
    prompts: Prompts
    sizes: Sizes
    clients: int
    settings: dict[str, Any]
    stream: bool = False
    loads: list[Load] = field(default_factory=list)

    def __call__(self) -> float:
        settings = dict(self.settings)
        if self.stream:
            settings |= {"stream": True, "stream_options": {"include_usage": True}}
        rounds = self.sizes.rounds(self.clients)
        bodies = [
            [self.prompts.body(self.sizes.new_tokens, **settings) for _ in range(rounds)]
            for _ in range(self.clients)
        ]
        one = load(self.server.address, bodies)
        self.loads.append(one)
        return one.tokens_per_sec

    @property
    def client_cores(self) -> float:
        return statistics.median(one.client_cores for one in self.loads)


@dataclass
class GenerateSide:
    """runtime/inference/decoder.generate in this process: tokens/s, prompts included."""

    predictor: Predictor
    prompts: Prompts
    sizes: Sizes
    texts: int
    settings: dict[str, Any]

    def __call__(self) -> float:
        rounds = self.sizes.rounds(self.texts)
        bodies = [
            [self.prompts.body(self.sizes.new_tokens) for _ in range(self.texts)]
            for _ in range(rounds)
        ]
        started = time.perf_counter()
        tokens = sum(self._generated(batch) for batch in bodies)
        return tokens / (time.perf_counter() - started)

    def _generated(self, bodies: Sequence[dict[str, Any]]) -> int:
        decoder = self.predictor.decoder
        texts = self.predictor._texts(self.texts, self.sizes.prompt_tokens + self.sizes.new_tokens)
        steps = generate(
            decoder,
            texts,
            [body["prompt"] for body in bodies],
            self.sizes.new_tokens,
            stop_ids=self.predictor.stop_ids,
            banned_ids=self.predictor.banned_ids,
            generators=[torch.Generator().manual_seed(body["seed"]) for body in bodies],
            **(DEFAULT_DRAWING | self.settings),
        )
        return sum(len(step) for step in steps)


@dataclass
class PredictSide:
    """predict.py's own way, without its start: one prompt after another, tokens/s."""

    predictor: Predictor
    prompts: Prompts
    sizes: Sizes
    settings: dict[str, Any]

    def __call__(self) -> float:
        bodies = [self.prompts.body(self.sizes.new_tokens) for _ in range(self.sizes.rounds(1))]
        tokens, started = 0, time.perf_counter()
        for body in bodies:
            config = PredictConfig(
                max_new_tokens=self.sizes.new_tokens, seed=body["seed"], **self.settings
            )
            for _ in self.predictor.stream(body["prompt"], config):
                pass
            assert self.predictor.last is not None
            tokens += len(self.predictor.last.ids)
        return tokens / (time.perf_counter() - started)
