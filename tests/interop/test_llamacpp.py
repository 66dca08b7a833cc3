"""scripts/export_gguf.py's files in llama.cpp itself: logits, greedy text, token ids and chats.

llama.cpp comes in the wheel xllamacpp (tests/builders_llamacpp.py), without a compiler.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
from pathlib import Path

import gguf
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from config_model import TrainConfig
from model import LLM, generate
from runtime.checkpoint.write import save_checkpoint
from runtime.data.hf_tokenizer import CHECK_TEXTS, HuggingFaceTokenizer
from runtime.data.tokenizer import Tokenizer
from runtime.data.tokenizers import load_tokenizer, train_bpe
from runtime.data.toy_stories import story
from runtime.interop import gguf as interop
from runtime.interop.export import CHECK_TEXT, logits_of
from scripts.export_gguf import main
from tests.builders import random_model, tiny_config
from tests.builders_export import FAMILIES, GPT_OSS, LLAMA3, MIXTRAL, QWEN2, imported
from tests.builders_llamacpp import Engine, need_llama_cpp
from tests.nightly import nightly_but
from tests.numeric import logits_bound, share_of, size_of

need_llama_cpp()

BYTE = load_tokenizer("byte")
CONTEXT = 96
SENTENCE = "Once upon a time a lighthouse keeper counted ships."
# With a factor of 1, llama.cpp's rounding of YaRN's ramp has no effect.
EXACT = FAMILIES | {"gpt-oss": GPT_OSS | dict(rope_scaling_factor=1.0)}
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
HINDI = "नमस्ते दुनिया"


def random_file(
    folder: Path, tokenizer: Tokenizer = BYTE, quantize: str = "f32", **changes
) -> tuple[LLM, Path]:
    """A random model and its file."""
    model = random_model(tiny_config(**dict(vocabulary_size=260, context_length=CONTEXT) | changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                # (at 1.0 rounding grows from block to block).
                parameter.mul_(0.6)
    path, family = folder / "model.gguf", interop.family_of(model.config)
    config, weights = interop.with_head(model.config, family, model.state_dict())
    entries = interop.layout(config, family, weights, quantize)
    vocabulary = interop.vocabulary_of(gguf, tokenizer, config.vocabulary_size)
    interop.write_gguf(
        gguf, path, "test", config, family, entries, weights, quantize, tokenizer, vocabulary
    )
    return model.eval(), path


@functools.cache
def trained(arch: str) -> LLM:
    """A model that knows one sentence by heart: narrow weights do not change what it says.

    Not in the smallest shapes: q8_0 needs rows of 32 numbers.
    """
    shapes = dict(vocabulary_size=260, context_length=CONTEXT, d_model=64, num_heads=8, d_ff=64)
    torch.manual_seed(0)
    model = LLM(tiny_config(**shapes | EXACT[arch]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0)
    ids = torch.tensor([BYTE.start_id, *BYTE.encode(SENTENCE), BYTE.end_of_text_id])
    # 75 steps, or a few more.
    for _ in range(200):
        loss = cross_entropy(model(ids[None, :-1]).logits[0], ids[1:])
        if loss < 0.02:
            return model.eval()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    raise AssertionError(f"200 steps were not enough: loss {loss.item():.2g}")


def exported(folder: Path, model: LLM, tokenizer: Tokenizer = BYTE, quantize: str = "f32") -> Path:
    """The file that the script writes."""
    path, state = folder / f"{quantize}.gguf", tokenizer.to_state()
    ckpt = save_checkpoint(
        folder, 1, model, None, train_config=TrainConfig(), tokenizer_state=state
    )
    assert main(["--ckpt", str(ckpt), "--out", str(path), "--quantize", quantize]) == 0
    return path


def difference(model: LLM, engine: Engine, ids: list[int]) -> float:
    """Largest difference of the logits after each token, over what rounding explains.

    The server tells log-probabilities: logits up to a constant of each position.
    """
    theirs_TV = torch.stack([log_probabilities(engine, ids[: n + 1]) for n in range(len(ids))])
    ours_TV = logits_of(model, torch.tensor([ids]))[0].double()
    # Subtracting the mean makes the largest difference at most twice as large.
    bound = 2 * logits_bound(model.config, len(ids))
    return share_of(centred(theirs_TV), centred(ours_TV), bound, size_of(ours_TV))


def centred(logits_TV: Tensor) -> Tensor:
    return logits_TV - logits_TV.mean(dim=1, keepdim=True)


def log_probabilities(engine: Engine, ids: list[int]) -> Tensor:
    """Return llama.cpp's log-probabilities [V] of the token after `ids`.

    The drawn token is forced to be "A", because the server leaves out halves of characters. What it
    tells is from before that.
    """
    answer = engine.greedy(ids, 1, n_probs=260, logit_bias=[[65, 1000.0]], cache_prompt=True)
    (position,) = answer["completion_probabilities"]
    by_id = {one["id"]: one["logprob"] for one in position["top_logprobs"]}
    return torch.tensor([by_id[i] for i in range(260)], dtype=torch.float64)


def ids_of(text: str, length: int = CONTEXT) -> list[int]:
    return [BYTE.start_id, *BYTE.encode(text)][:length]


def greedy(model: LLM, prompt: list[int], length: int) -> list[int]:
    return [i.item() for i in generate(model, torch.tensor([prompt]), length, temperature=0)]


# --------------------------------------------------------------------------------- logits and text
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("arch", EXACT)
def test_the_same_logits_and_the_same_greedy_text(tmp_path, arch, tied):
    """Windows of 8 in 96 tokens in gpt-oss. The file puts the start token before a plain prompt."""
    model, path = random_file(tmp_path, tie_embeddings=tied, **EXACT[arch])
    with Engine(path) as engine:
        assert difference(model, engine, ids_of(CHECK_TEXT, CONTEXT - 1)) <= 1
        assert engine.ids("Once upon a time") == ids_of("Once upon a time")
        answer = engine.greedy("Once upon a time", 50)
    assert answer["tokens"] == greedy(model, ids_of("Once upon a time"), 50)


@pytest.mark.parametrize(
    "arch, scaling", [("llama", "linear"), ("llama", "yarn"), ("qwen3moe", "linear")]
)
def test_scaled_positions(tmp_path, arch, scaling):
    scaled = dict(rope_scaling=scaling, rope_scaling_factor=4.0, rope_theta=500.0)
    model, path = random_file(tmp_path, **FAMILIES[arch] | scaled)
    with Engine(path) as engine:
        assert difference(model, engine, ids_of(CHECK_TEXT, CONTEXT - 1)) <= 1


def test_llama_cpp_rounds_yarns_ramp(tmp_path):
    """gpt-oss does not round the ends of its ramp (`truncate: false`); llama.cpp always does.

    No key of the file can change that: it computes our model with yarn_truncate, another function.
    OpenAI's own GGUF files have the same problem.
    """
    model, path = random_file(tmp_path, **GPT_OSS | dict(rope_scaling_factor=4.0, head_dim=16))
    rounded = LLM(interop.dataclasses.replace(model.config, yarn_truncate=True)).eval()
    rounded.load_state_dict(model.state_dict())
    with Engine(path) as engine:
        assert difference(model, engine, ids_of(CHECK_TEXT, CONTEXT - 1)) > 10
        assert difference(rounded, engine, ids_of(CHECK_TEXT, CONTEXT - 1)) <= 1


@pytest.mark.parametrize(
    ("arch", "quantize"),
    nightly_but(itertools.product(EXACT, interop.QUANTIZE), 11),
)
def test_every_file_of_the_script_says_what_the_model_learned(tmp_path, arch, quantize):
    """All architectures in all types. It continues the sentence, and stops where the text ends."""
    model = trained(arch)
    path = exported(tmp_path, model, quantize=quantize)
    prompt = ids_of(SENTENCE, 10)
    rest = ids_of(SENTENCE)[10:]
    assert greedy(model, prompt, len(rest) + 1) == [*rest, BYTE.end_of_text_id]
    with Engine(path) as engine:
        answer = engine.greedy(BYTE.decode(prompt[1:]), 80)
    assert answer["content"] == BYTE.decode(rest) and answer["stop_type"] == "eos"


# ------------------------------------------------------------------------------------------- chats
def said_by(engine: Engine, *messages: tuple[str, object]) -> dict:
    """The server's answer to a chat client."""
    listed = [{"role": role, "content": content} for role, content in messages]
    return engine.ask("/v1/chat/completions", messages=listed, max_tokens=80, temperature=0)


def prompt_of(engine: Engine, *messages: tuple[str, object]) -> str:
    """The prompt that the server makes of a chat."""
    listed = [{"role": role, "content": content} for role, content in messages]
    return engine.ask("/apply-template", messages=listed)["prompt"]


def test_a_chat_client_continues_the_text_of_a_base_model(tmp_path):
    """Without a template in the file, llama.cpp takes ChatML's.

    A base model then continued "<|im_start|>user\\n", which it never saw.
    """
    with Engine(exported(tmp_path, trained("qwen3moe"))) as engine:
        answer = said_by(engine, ("user", "Once upon"))
        assert prompt_of(engine, ("user", "Once upon")) == "Once upon"
        assert (
            prompt_of(
                engine,
                ("system", "Once "),
                ("user", "up"),
                ("assistant", "on\n a"),
                ("user", [{"type": "text", "text": " time "}]),
            )
            == "Once upon\n a time "
        )
    (choice,) = answer["choices"]
    assert choice["message"]["content"] == SENTENCE.removeprefix("Once upon")
    assert choice["finish_reason"] == "stop"
    # The text and the start token.
    assert answer["usage"]["prompt_tokens"] == len(ids_of("Once upon"))


def test_a_chat_client_gets_an_imported_tokenizers_own_template(tmp_path):
    """It was lost in the file: llama.cpp marked the messages of every model as ChatML does."""
    plain = imported()
    template = "{% for m in messages %}<|turn|>{{ m.content }}<|end|>{% endfor %}<|start|>"
    own = HuggingFaceTokenizer(
        plain.text, {"chat_template": template}, plain.stop_ids, plain.start_id
    )
    _, path = random_file(tmp_path, own, vocabulary_size=264)
    with Engine(path) as engine:
        assert prompt_of(engine, ("system", "a"), ("user", "b")) == (
            "<|turn|>a<|end|><|turn|>b<|end|><|start|>"
        )


# --------------------------------------------------------------------------------------- token ids
def differing(folder: Path, tokenizer: Tokenizer, texts: list[str]) -> list[str]:
    """The texts of which llama.cpp makes other ids. And back: its text of our ids is the same."""
    _, path = random_file(folder, tokenizer, vocabulary_size=tokenizer.vocabulary_size + 3)
    start = [] if tokenizer.start_id is None else [tokenizer.start_id]
    with Engine(path) as engine:
        for text in texts:
            assert engine.text(tokenizer.encode(text)) == text
        return [text for text in texts if engine.ids(text) != start + tokenizer.encode(text)]


def texts_of(shared: Path, count: int) -> list[str]:
    """Real stories."""
    file = sorted((shared / "tinystories").glob("*.jsonl"))[0]
    with open(file, encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line, _ in zip(lines, range(count), strict=False)]


@pytest.mark.nightly
@pytest.mark.slow
def test_the_same_ids_with_o200k_base(tmp_path, shared_dir, o200k):
    """llama.cpp's rule does not count combining marks as part of a word.

    (Unicode's M, which its regular expressions do not have.) Hindi differs, as in any GGUF file.
    """
    texts = [*texts_of(shared_dir, 100), *ODD_TEXTS, HINDI]
    assert differing(tmp_path, load_tokenizer("o200k_base"), texts) == [HINDI]


def test_the_same_ids_with_a_trained_bpe(tmp_path):
    stories = [story(i) for i in range(100)]
    tokenizer = train_bpe([*stories[:60], *ODD_TEXTS], 600)
    assert differing(tmp_path, tokenizer, [*stories[40:], *ODD_TEXTS]) == []


def test_the_same_ids_with_bytes(tmp_path):
    assert differing(tmp_path, BYTE, [*ODD_TEXTS, *CHECK_TEXTS, HINDI]) == []


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
    texts = [*ODD_TEXTS, "the <word> then<word>", "thththe"]
    assert differing(tmp_path, imported(**options), texts) == []


# -------------------------------------------------------------------------------------- the package
@pytest.mark.parametrize(
    "ci, outcome", [("true", pytest.fail.Exception), ("", pytest.skip.Exception)]
)
def test_without_the_package_tests_are_skipped_but_not_under_ci(monkeypatch, ci, outcome):
    """A check that is always skipped would pass forever."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("CI", ci)
    with pytest.raises(outcome, match="xllamacpp is not installed"):
        need_llama_cpp()


def test_a_file_that_ends_llama_cpp_fails_one_test_with_its_last_lines(tmp_path):
    """What llama.cpp cannot load must not end the process of the tests."""
    _, path = random_file(tmp_path, **MIXTRAL)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(pytest.fail.Exception, match="(?s)llama.cpp did not start.*tensor"):
        Engine(path)
