"""Guarantees of the serving engine: an answer is the same bits whoever else asks."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from runtime.checkpoint.read import load_model
from runtime.inference.decoder import Decoder
from runtime.inference.predictor import READY
from runtime.inference.quantize import quantize_
from runtime.serving.engine import Engine
from runtime.serving.request import Event, Request
from tests.builders_serving import answers_alone, answers_in_company, random_request
from tests.promises import Promise, Tally

CLIENTS = 32
# Tokens that prompts and answers are made for: some of each are shorter.
LENGTH = 64


def answers(
    packed: str, requests: list[Request], clients: int, r: random.Random
) -> tuple[list[list[Event]], int]:
    """Return what the trained nano answers, and how many tokens were reused.

    clients: 1 = one after the other, with nothing reused.
    """
    model, _ = load_model(str(Path(READY)), torch.device("cpu"), torch.float32)
    engine = Engine(
        Decoder(quantize_(model, packed) if packed else model),
        slots=clients,
        max_waiting=len(requests),
        prefill_chunk=r.choice((16, 64, 128)),
    )
    try:
        assert engine.is_exact, engine.line
        if clients == 1:
            return answers_alone(engine, requests), engine.statistics.num_reused_tokens
        found = answers_in_company(engine, requests, r, clients)
        return found, engine.statistics.num_reused_tokens
    finally:
        engine.close()


def same_in_company(count: int) -> Tally:
    """72. Random prompts, settings and seeds, a third each in 8 and 4 bits, by 32 at a time.

    Each client asks again when it has its answer, and now and then another comes and waits. Held:
    ids, log-probabilities, the most likely ids and experts are the bits of the request alone.
    """
    tally, tokens, reused = Tally(), 0, 0
    for packed in ("", "int8", "int4"):
        r = random.Random(72 + len(packed))
        requests = [random_request(r, 3072, LENGTH) for _ in range(-(-count // 3))]
        alone, _ = answers(packed, requests, 1, r)
        together, saved = answers(packed, requests, CLIENTS, r)
        reused += saved
        for i, (a, b) in enumerate(zip(alone, together, strict=True)):
            tokens += len(a) - 2
            tally.add(a == b, f"{packed or 'float32'}, request {i}: {requests[i]}")
    tally.detail = {"tokens": tokens, "prompt tokens taken from other answers": reused}
    return tally


PROMISES: list[Promise] = [
    Promise(
        77,
        "32 at a time: each answer, with log-probabilities and experts, has the bits of it alone",
        same_in_company,
        128,
        1000,
        1000,
    ),
]
