"""Models, decoders and prompts for tests of inference, and predict.py run in this process."""

from __future__ import annotations

import copy
import io
import random
import sys

import torch

import predict
from config_model import PredictConfig, TrainConfig
from model import LLM
from model import generate as plain_generate
from runtime.checkpoint.write import save_checkpoint
from runtime.data.tokenizer import Tokenizer
from runtime.data.tokenizers import load_tokenizer
from runtime.inference import predictor
from runtime.inference.decoder import Decoder, generate
from runtime.inference.predictor import Predictor
from runtime.inference.quantize import quantize_
from runtime.inference.session import COMMANDS
from runtime.kernels.choose import choose_kernels
from tests.builders import random_model, tiny_config

BYTE = load_tokenizer("byte")
END = BYTE.end_of_text_id
CONTEXT = 32


def save(folder, model: LLM, tokenizer: Tokenizer | None = BYTE) -> str:
    return str(
        save_checkpoint(
            folder,
            1,
            model,
            None,
            train_config=TrainConfig(),
            tokenizer_state=tokenizer and tokenizer.to_state(),
        )
    )


def biased_model(seed: int = 0, biases: dict[int, float] | None = None, **changes) -> LLM:
    """A random model whose head prefers or avoids ids as `biases` says."""
    model = random_model(tiny_config(**(dict(vocabulary_size=260, head_bias=True) | changes)), seed)
    with torch.no_grad():
        for i, bias in (biases or {}).items():
            model.out_head.bias[i] += bias
    return model


def predictor_of(ckpt: str, **settings) -> tuple[Predictor, PredictConfig]:
    config = PredictConfig(ckpt=ckpt, device="cpu", **settings)
    return Predictor(config), config


def predict_with(capsys):
    """Return a function that runs predict.py's main and returns what it printed."""

    def run_(*argv) -> str:
        assert predict.main([*map(str, argv), "--device", "cpu"]) == 0
        return capsys.readouterr().out

    return run_


def draw_given_ids(monkeypatch):
    """Replace generate by one that draws the given ids for every prompt.

    It records how it was called.
    """

    class Drawn:
        ids, calls = (), []

    def fake(decoder, texts, prompts, max_new_tokens, finished, **settings):
        Drawn.calls.append((prompts, max_new_tokens, settings))
        for i, token in enumerate(Drawn.ids[:max_new_tokens], 1):
            if i in (max_new_tokens, len(Drawn.ids)):
                finished.update(range(len(prompts)))
            yield [(row, token) for row in range(len(prompts))]
            if finished:
                return

    Drawn.calls = []
    monkeypatch.setattr(predictor, "generate", fake)
    return Drawn


def repl_with(monkeypatch, capsys):
    """Return a function that feeds bytes to the REPL through main and returns (stdout, stderr)."""

    def feed(ckpt: str, script: bytes | str, *argv) -> tuple[str, str]:
        script = script.encode() if isinstance(script, str) else script
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(script), encoding="utf-8"))
        assert (
            predict.main(
                [
                    "--ckpt",
                    ckpt,
                    "--device",
                    "cpu",
                    "--interactive",
                    "--max_new_tokens",
                    "3",
                    *map(str, argv),
                ]
            )
            == 0
        )
        return capsys.readouterr()

    return feed


def fuzz_line(r: random.Random) -> str:
    kind = r.random()
    if kind < 0.5:
        values = [
            "0",
            "1",
            "-1",
            "0.5",
            "1e-45",
            "1e-320",
            "1e308",
            "-0.0",
            "nan",
            "inf",
            "-inf",
            "999999",
            "1" * 25,
            "9" * 5000,
            "0x10",
            "1_000",
            "٣",
            "½",
            "",
            " ",
            "a",
            "\x00",
            "\x1b[2J",
            "2 3",
            "--",
            "True",
            "None",
            "1e5",
            "+3",
            ".5",
            "5.",
        ]
        return (
            r.choice(
                [
                    *COMMANDS,
                    ":undo",
                    ":reset",
                    ":stats",
                    ":experts",
                    ":save",
                    ":save /dev/null/x",
                    ":",
                    ":T",
                    ":help",
                    ":quantum",
                    ":q x",
                    "::",
                    ":t:",
                    ":\u00a0q",
                    ":;",
                ]
            )
            + r.choice([" ", "", "  ", "\t", "\u3000"])
            + r.choice(values)
        )
    if kind < 0.75:
        return "".join(
            chr(
                r.choice(
                    [
                        r.randrange(0x20),
                        r.randrange(0x20, 0x7F),
                        r.randrange(0x80, 0x3000),
                        r.randrange(0x1F300, 0x1F700),
                        r.randrange(0x10000),
                    ]
                )
            )
            for _ in range(r.randrange(40))
        )
    return r.choice(
        [
            "",
            " ",
            "+",
            "+ and",
            "+\x00",
            "go on\\\\",
            "Once upon a time",
            "<|endoftext|>",
            "\\",
            "'\"",
            "%s%n{}",
            "x" * r.randrange(300),
            " :q",
            "\u2028",
            "\ufeff",
            "\ud800",
            "a\tb",
            "é" * 50,
        ]
    )


MODELS = {
    "plain": {},
    "table": dict(use_attention_bias=True, qk_norm=False),
    "biases": dict(
        expert_activation="gelu",
        expert_bias=True,
        head_bias=True,
        qkv_bias=True,
        out_proj_bias=True,
    ),
    "window": dict(sliding_window=8),
    "alternating": dict(sliding_window=8, window_pattern="alternating", use_attention_bias=True),
    "tied": dict(tie_embeddings=True, router_bias_rate=0.1, use_rope=False),
    "yarn": dict(rope_scaling="yarn", rope_scaling_factor=2.0),
    "gpt-oss": dict(
        attention_sinks=True,
        router_bias=True,
        expert_activation="swiglu_clamped",
        expert_bias=True,
        qkv_bias=True,
        out_proj_bias=True,
        qk_norm=False,
        sliding_window=8,
        window_pattern="alternating",
        rope_scaling="yarn",
        rope_scaling_factor=2.0,
        yarn_truncate=False,
    ),
}
PROMPTS = [[1, 2, 3], [4] * 9, [7, 8, 9, 10, 11], [5], list(range(30))]


def generated(decoder: Decoder, prompts, count: int, texts=None, **settings) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in prompts]
    for step in generate(
        decoder,
        texts or decoder.texts(len(prompts), decoder.config.context_length),
        prompts,
        count,
        **settings,
    ):
        for row, token in step:
            rows[row].append(token)
    return rows


def alone(model, prompt, count: int, **settings) -> list[int]:
    return [i.item() for i in plain_generate(model, torch.tensor([prompt]), count, **settings)]


# What differs most from the plain model, and what is read most differently; spans of 16 and 32 of
# the cache's positions.
COMPILED_CASES = {"gpt-oss": (MODELS["gpt-oss"], False), "table-packed": (MODELS["table"], True)}
COMPILED_SPAN = 16


def decoder_on(device: torch.device, changes: dict, packed: bool, **options) -> tuple[LLM, Decoder]:
    """Return (a model on the CPU, a decoder of its copy on a device)."""
    model = random_model(tiny_config(context_length=CONTEXT, **changes), 3).eval()
    if packed:
        quantize_(model)
    on_device = copy.deepcopy(model).to(device)
    choose_kernels(on_device, device, torch.float32)
    return model, Decoder(on_device, **options)


def assert_same_texts(model: LLM, decoder: Decoder, **settings) -> None:
    """Ragged prompts, greedy, with the next step always on its way."""
    expected = [alone(model, prompt, 80, temperature=0, **settings) for prompt in PROMPTS]
    assert generated(decoder, PROMPTS, 80, temperature=0, **settings) == expected


def after_an_update(model) -> None:
    """Move every weight in place, as a fused optimizer does."""
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor += 0.1 * torch.randn_like(tensor)
