"""The flags of scripts.serve."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from config_model import PredictConfig, check_fields, option
from runtime.serving.fields import SAMPLING
from runtime.serving.request import as_in_predict

# What predict.py does with a model, the server does.
OF_THE_MODEL = (
    "context_length",
    "rope_scaling",
    "tokenizer",
    "device",
    "dtype",
    "quantize",
    "c_kernel",
    "compile",
    "num_threads",
)


@dataclass(frozen=True)
class ServeConfig:
    """Settings of the server."""

    # where
    host: str = option("127.0.0.1", "address to listen at; any but this machine's needs a key")
    port: int = option(8000, "port; 0 = any that is free, printed", minimum=0, maximum=65_535)
    api_key_file: str = option("", "file that holds the API key (or set GPTOSS_API_KEY)")
    allow_host: tuple = option(
        (), "further name by which clients call this server; may be given more than once"
    )
    allow_origin: tuple = option(
        (), "origin whose pages may use this server (CORS); may be given more than once"
    )
    # how much
    slots: int = option(8, "answers computed at the same time", minimum=1, maximum=4_096)
    max_waiting: int = option(
        64, "answers that may wait; more are told to come back (429)", minimum=0, maximum=65_536
    )
    prefill_chunk: int = option(
        128, "tokens of prompts in one pass: fewer = shorter gaps", minimum=1, maximum=65_536
    )
    max_new_tokens: int = option(
        0, "most new tokens of an answer; 0 = the context", minimum=0, maximum=100_000_000
    )
    max_body_bytes: int = option(
        1_048_576, "largest body of a request, in bytes", minimum=1, maximum=2**31 - 1
    )
    request_seconds: float = option(
        10.0, "seconds in which a request must come, and an answer be read", above=0.0
    )
    drain_seconds: float = option(
        30.0, "seconds that running answers have after SIGTERM or Ctrl-C", minimum=0.0
    )
    plain_chat: bool = option(
        False, "answer chats with a model that was not trained on chats: it continues their text"
    )
    log_requests: bool = option(True, "print a line for each request, without its text")
    # how tokens are drawn where a request does not say
    temperature: float = as_in_predict("temperature")
    top_k: int = as_in_predict("top_k")
    top_p: float = as_in_predict("top_p")
    min_p: float = as_in_predict("min_p")
    repetition_penalty: float = as_in_predict("repetition_penalty")
    when_full: str = as_in_predict("when_full", "stop")
    # the model
    context_length: int = as_in_predict("context_length")
    rope_scaling: str = as_in_predict("rope_scaling")
    tokenizer: str = as_in_predict("tokenizer")
    device: str = as_in_predict("device")
    dtype: str = as_in_predict("dtype")
    quantize: str = as_in_predict("quantize")
    c_kernel: bool = as_in_predict("c_kernel")
    compile: bool = as_in_predict("compile")
    num_threads: int = as_in_predict("num_threads")

    def __post_init__(self):
        check_fields(self)

    def predict(self, ckpt: str) -> PredictConfig:
        """Return predict.py's settings with these of the model."""
        settings = {name: getattr(self, name) for name in (*OF_THE_MODEL, *SAMPLING)}
        return PredictConfig(ckpt=ckpt, quiet=True, **settings)

    def sampling_defaults(self) -> dict:
        """Return how tokens are drawn where a request does not say."""
        return {name: getattr(self, name) for name in SAMPLING}

    def changed(self, **settings) -> ServeConfig:
        return dataclasses.replace(self, **settings)
