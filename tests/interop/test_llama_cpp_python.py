"""scripts/export_gguf.py's files in llama.cpp itself: the same logits, greedy text and token ids.

Skipped where llama-cpp-python is not installed.
"""

from __future__ import annotations

import ctypes
import json
from pathlib import Path

import gguf
import pytest
import torch

from benchmarks import common
from benchmarks import llama_cpp as benchmark
from config_model import TrainConfig
from model import LLM, generate
from runtime.checkpoint.write import save_checkpoint
from runtime.data.tokenizer import Tokenizer
from runtime.data.tokenizers import load_tokenizer, train_bpe
from runtime.interop import gguf as interop
from runtime.interop.export import logits_of
from scripts.export_gguf import main
from tests.builders import random_model, tiny_config
from tests.builders_export import FAMILIES, GPT_OSS, LLAMA3, QWEN2, imported
from tests.numeric import logits_bound, share_of

llama_cpp = pytest.importorskip(
    "llama_cpp", reason="llama-cpp-python is not installed (make test-llamacpp)"
)
pytestmark = pytest.mark.llamacpp

BYTE = load_tokenizer("byte")
PROMPT = "Once upon a time"
ODD_TEXTS = [
    "",
    " ",
    "  \n\n \t x  ",
    "a\r\nb\r\n\r\nc",
    "I'M he'LL don't ''s 'S",
    "1 12 123 1234 12345.67",
    "x = {'a': [1, 2]}  # y\n\n\n    return",
    "https://a.b/c?d=e&f=%20#!//",
    "naïve café für Äpfel ß",
    "стоял туман над Москвой",
    "灯台は静かだった。你好，世界",
    "안녕하세요",
    "שלום مرحبا",
    "\N{SLEEPING FACE}\N{MAN}\N{ZERO WIDTH JOINER}\N{GIRL}",
    "¼ ⅻ ² ٣",
    "\0\1\x7f\xa0\N{IDEOGRAPHIC SPACE}\N{REPLACEMENT CHARACTER}",
    "<|endoftext|> is text",
    "HTTPServer iPhone McDonald",
    "-" * 50 + "=" * 30,
    "a" * 70,
    " " * 40 + "b",
    "\n" * 9,
]


def model_of(
    folder: Path,
    quantize: str = "f32",
    tokenizer: Tokenizer = BYTE,
    checked: bool = False,
    **changes,
) -> tuple[LLM, Path]:
    """A random model and its file; `checked`: written by the script, with its own checks."""
    model = random_model(tiny_config(**dict(vocabulary_size=260, context_length=96) | changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                # (at 1.0 rounding grows from block to block).
                parameter.mul_(0.6)
    path = folder / "model.gguf"
    if checked:
        ckpt = save_checkpoint(
            folder, 1, model, None, train_config=TrainConfig(), tokenizer_state=tokenizer.to_state()
        )
        assert main(["--ckpt", str(ckpt), "--out", str(path), "--quantize", quantize]) == 0
    else:
        family = interop.family_of(model.config)
        config, weights = interop.with_head(model.config, family, model.state_dict())
        entries, vocabulary = (
            interop.layout(config, family, weights, quantize),
            interop.vocabulary_of(gguf, tokenizer, config.vocabulary_size),
        )
        interop.write_gguf(
            gguf, path, "test", config, family, entries, weights, quantize, tokenizer, vocabulary
        )
    return model.eval(), path


def opened(path: Path, **options) -> llama_cpp.Llama:
    sizes = dict(n_ctx=96, n_batch=96, n_ubatch=96, n_threads=1, n_threads_batch=1)
    return llama_cpp.Llama(
        str(path),
        n_gpu_layers=0,
        logits_all=True,
        type_k=0,
        type_v=0,
        verbose=False,
        **sizes,
        **options,
    )


def difference(model: LLM, llama: llama_cpp.Llama, ids: list[int]) -> float:
    """Largest difference of the logits, over what rounding explains."""
    llama.reset()
    llama.eval(ids)
    ours = logits_of(model, torch.tensor([ids]))[0]
    return share_of(llama.scores[: len(ids)], ours, logits_bound(model.config, len(ids)))


def ids_of(text: str, length: int) -> list[int]:
    return [BYTE.start_id, *BYTE.encode(text)][:length]


def greedy(model: LLM, prompt: list[int], length: int) -> list[int]:
    return [i.item() for i in generate(model, torch.tensor([prompt]), length, temperature=0)]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("arch", FAMILIES)
def test_the_same_logits_and_the_same_greedy_text(tmp_path, arch, tied):
    """gpt-oss with factor 1, where llama.cpp's rounding of YaRN's ramp has no effect.

    Windows of 8 in 96 tokens.
    """
    model, path = model_of(
        tmp_path,
        tie_embeddings=tied,
        **FAMILIES[arch] | (dict(rope_scaling_factor=1.0) if arch == "gpt-oss" else {}),
    )
    llama = opened(path)
    assert difference(model, llama, ids_of(interop.export.CHECK_TEXT, 96)) <= 1
    # A plain prompt begins as predict.py's does.
    prompt = llama.tokenize(PROMPT.encode(), add_bos=True)
    assert prompt == ids_of(PROMPT, 96)
    theirs = []
    for token in llama.generate(prompt, temp=0.0, repeat_penalty=1.0):
        theirs.append(token)
        if len(theirs) == 50:
            break
    llama.close()
    assert theirs == greedy(model, prompt, 50)


@pytest.mark.parametrize(
    "arch, scaling", [("llama", "linear"), ("llama", "yarn"), ("qwen3moe", "linear")]
)
def test_scaled_positions(tmp_path, arch, scaling):
    model, path = model_of(
        tmp_path,
        **FAMILIES[arch] | dict(rope_scaling=scaling, rope_scaling_factor=4.0, rope_theta=500.0),
    )
    assert difference(model, opened(path), ids_of(interop.export.CHECK_TEXT, 96)) <= 1


def test_llama_cpp_rounds_yarns_ramp(tmp_path):
    """gpt-oss does not round the ends of its ramp (`truncate: false`); llama.cpp always does.

    No key of the file can change that: it computes our model with yarn_truncate, another function.
    OpenAI's own GGUF files have the same problem.
    """
    model, path = model_of(
        tmp_path, **GPT_OSS | dict(rope_scaling_factor=4.0, context_length=96, head_dim=16)
    )
    llama, ids = opened(path), ids_of(interop.export.CHECK_TEXT, 96)
    assert difference(model, llama, ids) > 10
    rounded = LLM(interop.dataclasses.replace(model.config, yarn_truncate=True)).eval()
    rounded.load_state_dict(model.state_dict())
    assert difference(rounded, llama, ids) <= 1


@pytest.mark.parametrize("quantize", ["f32", "f16", "bf16", "q8_0"])
def test_the_script_runs_its_file_in_llama_cpp(tmp_path, capsys, quantize):
    """(Not in the smallest shapes.)

    With fewer than 64 rows or columns llama.cpp's own products with q8_0 give NaN on CPUs with AMX.
    """
    _, path = model_of(tmp_path, quantize, checked=True, d_model=64, num_heads=8, d_ff=64)
    out = capsys.readouterr().out
    assert "check: llama.cpp: the same 778 token ids" in out and "check: llama.cpp: l" in out
    llama = opened(path)
    assert len(llama.create_completion(PROMPT, max_tokens=8, temperature=0.0)["choices"]) == 1
    llama.close()


# ---------------------------------------------------------------------------------------- token ids
def texts_of(shared: Path, count: int) -> list[str]:
    lines = (
        sorted((shared / "tinystories").glob("*.jsonl"))[0]
        .read_text(encoding="utf-8")
        .splitlines()[:count]
    )
    return [json.loads(line)["text"] for line in lines]


def piece(llama: llama_cpp.Llama, token: int) -> bytes:
    """Bytes that llama.cpp prints for a token."""
    buffer = ctypes.create_string_buffer(512)
    length = llama_cpp.llama_token_to_piece(llama._model.vocab, token, buffer, 512, 0, False)
    return buffer.raw[:length]


def differing(folder: Path, tokenizer: Tokenizer, texts: list[str]) -> list[str]:
    """The texts of which llama.cpp makes other ids."""
    _, path = model_of(folder, tokenizer=tokenizer, vocabulary_size=tokenizer.vocabulary_size + 3)
    llama = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    start = [] if tokenizer.start_id is None else [tokenizer.start_id]
    found = [
        text
        for text in texts
        if llama.tokenize(text.encode(), add_bos=True) != start + tokenizer.encode(text)
    ]
    # And back.
    for text in texts:
        assert b"".join(piece(llama, i) for i in tokenizer.encode(text)) == text.encode()
    llama.close()
    return found


def test_the_same_ids_with_o200k_base(tmp_path, shared_dir, o200k):
    """llama.cpp's rule does not count combining marks as part of a word.

    (Unicode's M, which its regular expressions do not have.) Hindi differs, as in any GGUF file.
    """
    hindi = "नमस्ते दुनिया"
    assert differing(
        tmp_path, load_tokenizer("o200k_base"), [*texts_of(shared_dir, 300), *ODD_TEXTS, hindi]
    ) == [hindi]


def test_the_same_ids_with_a_trained_bpe(tmp_path, shared_dir):
    texts = texts_of(shared_dir, 600)
    assert differing(tmp_path, train_bpe(texts[:300], 2000), texts + ODD_TEXTS) == []


def test_the_same_ids_with_bytes(tmp_path, shared_dir):
    assert differing(tmp_path, BYTE, texts_of(shared_dir, 50) + ODD_TEXTS) == []


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(pattern=QWEN2),
        dict(pattern=LLAMA3),
        dict(pattern=LLAMA3, ignore_merges=True),
        dict(start_id=None),
    ],
)
def test_the_same_ids_with_an_imported_tokenizer(tmp_path, options):
    assert (
        differing(tmp_path, imported(**options), [*ODD_TEXTS, "the <word> then<word>", "thththe"])
        == []
    )


# ---------------------------------------------------------------------------------------- benchmark
def test_the_benchmark_of_speeds(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(common, "REPO", tmp_path)
    # Samples are shorter than the clock's ticks.
    monkeypatch.setattr(
        benchmark,
        "alternate_undisturbed",
        lambda functions, repeats: common.alternate_undisturbed(functions, repeats, 99.0),
    )
    flags = {
        "name": "tiny",
        "context": 8,
        "prefill": 12,
        "new_tokens": 6,
        "repeats": 2,
        "min_sample_seconds": 1e-6,
        "num_threads": 1,
        "d_model": 64,
        "transformer_blocks": 2,
        "num_heads": 8,
        "num_kv_heads": 2,
        "d_ff": 64,
        "num_experts": 4,
        "vocabulary_size": 288,
        "context_length": 32,
        "expert_activation": "swiglu",
        "rms_norm_eps": 1e-6,
    }
    off = ("expert_bias", "out_proj_bias", "head_bias", "use_attention_bias")
    assert (
        benchmark.main(
            [part for name, value in flags.items() for part in (f"--{name}", str(value))]
            + [f"--no-{name}" for name in off]
        )
        == 0
    )
    stored = json.loads((tmp_path / "llama_cpp_tiny.json").read_text())
    for what in ("decode", "prefill"):
        speeds = {name: side["tokens_per_sec"]["median"] for name, side in stored[what].items()}
        assert (
            speeds.keys() == {"ours", "llama_f32", "ours_int8", "llama_q8_0"}
            and min(speeds.values()) > 0
        )
        for ours, theirs in (("ours", "llama_f32"), ("ours_int8", "llama_q8_0")):
            assert stored[what][ours]["ratio_to_llama_cpp"] == pytest.approx(
                speeds[ours] / speeds[theirs]
            )
    sides = stored["sides"]
    assert (
        sides["llama_f32"]["same_tokens"] == "6 of 6"
        and sides["llama_f32"]["file_bytes"] > 2 * sides["llama_q8_0"]["file_bytes"]
    )
    with pytest.raises(ValueError, match="do not fit the context_length 2048"):
        benchmark.main(
            [
                "--name",
                "tiny",
                "--context",
                "2040",
                "--no-use_attention_bias",
                "--vocabulary_size",
                "300",
                "--d_model",
                "64",
                "--transformer_blocks",
                "1",
                "--d_ff",
                "64",
                "--expert_activation",
                "swiglu",
                *(f"--no-{name}" for name in off),
            ]
        )
