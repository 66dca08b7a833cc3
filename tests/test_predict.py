"""predict.py: every setting arrives, no text is lost, and no input or file ends a session."""

from __future__ import annotations

import dataclasses
import gzip
import io
import itertools
import json
import os
import random
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch

import predict
import prepare_data
from config_model import PRESETS, ModelConfig, PredictConfig
from model import LLM
from model import generate as plain_generate
from runtime.base.text import human_count
from runtime.checkpoint.read import load_model, read_checkpoint
from runtime.data.tokenizers import load_tokenizer, train_bpe
from runtime.inference import console, session
from runtime.inference import predictor as predictor_module
from runtime.inference.console import read_prompts
from runtime.inference.decoder import generate, router_choices
from runtime.inference.predictor import Predictor
from runtime.inference.session import COMMANDS, OTHER_COMMANDS, command_result
from tests.builders import as_flags, other_value
from tests.builders_inference import (
    BYTE,
    CONTEXT,
    END,
    biased_model,
    draw_given_ids,
    fuzz_line,
    predict_with,
    predictor_of,
    repl_with,
    save,
)
from tests.builders_tokenizer import stand_in

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def endless(tmp_path_factory) -> str:
    """Return a checkpoint that never says end-of-text, with three ids more than its tokenizer."""
    return save(tmp_path_factory.mktemp("endless"), biased_model(biases={END: -1e4}))


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> str:
    """The smallest of models, for tests that ask for thousands of answers."""
    return save(
        tmp_path_factory.mktemp("small"),
        biased_model(
            transformer_blocks=1,
            d_model=8,
            num_heads=1,
            num_kv_heads=1,
            num_experts=2,
            top_k=1,
            d_ff=4,
            context_length=8,
        ),
    )


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """(tokenizer, checkpoint) with a BPE that exists nowhere but in the checkpoint."""
    tokenizer = train_bpe(
        ["the cat sat on the mat and the dog ran after the cat again and again"] * 20, 280
    )
    return tokenizer, save(
        tmp_path_factory.mktemp("bpe"), biased_model(vocabulary_size=280), tokenizer
    )


@pytest.fixture
def run(capsys):
    return predict_with(capsys)


@pytest.fixture
def drawn(monkeypatch):
    return draw_given_ids(monkeypatch)


@pytest.fixture
def repl(monkeypatch, capsys):
    return repl_with(monkeypatch, capsys)


def greedy_ids(model: LLM, ids: list[int], count: int, **settings) -> list[int]:
    return [
        i.item()
        for i in plain_generate(model, torch.tensor([ids]), count, temperature=0, **settings)
    ]


# ---------------------------------------------------------------------------- every setting arrives
@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(PredictConfig)])
def test_every_field_is_a_flag_that_reaches_the_config(monkeypatch, tmp_path, name):
    seen = []
    monkeypatch.setattr(predict, "Predictor", lambda config: config)
    for function in (
        "show_completion",
        "show_completions",
        "repl",
        "write_experts_page",
        "experts_map",
    ):
        users = [module for module in (predict, console) if hasattr(module, function)]
        assert users, f"nobody calls {function}"
        for module in users:
            monkeypatch.setattr(
                module,
                function,
                lambda predictor, *rest: seen.append((predictor, rest[-1] if rest else predictor)),
            )
    (tmp_path / "prompts").write_text("p")
    (tmp_path / "messages").write_text('[{"role": "user", "content": "p"}]')
    needs = {"context_length": 4096} if name == "rope_scaling" else {}
    special = {
        "seed": 7,
        "context_length": 64,
        "rope_scaling": "linear",
        "prompt_file": str(tmp_path / "prompts"),
        "messages": str(tmp_path / "messages"),
    }
    asks = ("prompt_file", "messages", "interactive")
    value = special.get(name, other_value(PredictConfig, name))
    assert (
        predict.main(
            [
                *(() if name in asks else ("--prompt", "p")),
                *as_flags(needs | {name: value}),
            ]
        )
        == 0
    )
    assert seen[0] == (PredictConfig(**needs, **{name: value}),) * 2 and value != getattr(
        PredictConfig, name
    )


def test_sampling_settings_reach_generate(endless, run, drawn):
    drawn.ids = list(b" an answer")
    out = run(
        "--ckpt",
        endless,
        "--prompt",
        "ab",
        "--temperature",
        0.25,
        "--top_k",
        7,
        "--top_p",
        0.75,
        "--max_new_tokens",
        4,
        "--seed",
        11,
    )
    ((prompts, max_new_tokens, settings),) = drawn.calls
    assert out == "ab an \n" and prompts == [[END, *b"ab"]] and max_new_tokens == 4
    assert (settings["temperature"], settings["top_k"], settings["top_p"], settings["slide"]) == (
        0.25,
        7,
        0.75,
        True,
    )
    assert (
        settings["generators"][0].initial_seed() == 11
        and settings["stop_ids"] == [END]
        and settings["banned_ids"] == [257, 258, 259]
    )
    run("--ckpt", endless, "--prompt", "ab", "--when_full", "stop")
    run("--ckpt", endless, "--prompt", "ab")
    assert [call[2]["slide"] for call in drawn.calls] == [True, False, True]
    assert (
        drawn.calls[1][2]["generators"][0].initial_seed()
        != drawn.calls[2][2]["generators"][0].initial_seed()
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_dtype_works_on_a_cpu(endless, dtype):
    """P5: the original implementation said "bfloat16 not supported on cpu", which is false.

    The weights have the dtype that was asked for.
    """
    predictor, config = predictor_of(endless, dtype=dtype, temperature=0.0, max_new_tokens=12)
    assert (
        all(p.dtype is getattr(torch, dtype) for p in predictor.model.parameters())
        and not predictor.model.training
    )
    exact, _ = predictor_of(endless)
    pieces = list(predictor.stream("a prompt", config))
    assert len(pieces) == 13
    if dtype == "float32":
        assert "".join(pieces) == BYTE.decode(
            greedy_ids(exact.model, [END, *b"a prompt"], 12, banned_ids=exact.banned_ids)
        )


def test_the_device_is_asked_for_by_name(endless, monkeypatch):
    names = []
    monkeypatch.setattr(
        predictor_module, "choose_device", lambda name: names.append(name) or torch.device("cpu")
    )
    Predictor(PredictConfig(ckpt=endless, device="cuda:3"))
    assert names == ["cuda:3"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--device", "foo"], "unknown device 'foo': allowed are"),
        (["--device", "cuda:99"], "device 'cuda:99' is not here"),
        (["--dtype", "int8"], "argument --dtype: invalid choice"),
        (["--temperature", "-1"], "temperature must be at least 0"),
        (["--temperature", "nan"], "temperature must be a finite number"),
        (["--top_k", "-5"], "top_k must be at least 0"),
        (["--top_p", "0"], "top_p must be at least 1e-09"),
        (["--top_p", "1.5"], "top_p must be at most 1"),
        (["--seed", "-2"], "seed must be at least -1"),
        (["--max_new_tokens", "0"], "max_new_tokens must be at least 1"),
        (["--rope_scaling", "yarn"], "rope_scaling yarn needs a context_length"),
        (["--temp", "1"], "unrecognized arguments: --temp 1"),
        (["prompt"], "unrecognized arguments: prompt"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(endless, argv, message):
    with pytest.raises(ValueError, match=message) as error:
        predict.main(["--ckpt", endless, "--prompt", "p", *argv])
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------- one answer
def test_temperature_0_is_what_generate_says(endless, bpe, run):
    for ckpt, tokenizer in ((endless, BYTE), (bpe[1], bpe[0])):
        predictor, _ = predictor_of(ckpt)
        ids = greedy_ids(
            predictor.model,
            [tokenizer.end_of_text_id, *tokenizer.encode("the cat")],
            40,
            banned_ids=predictor.banned_ids,
            stop_ids=[tokenizer.end_of_text_id],
        )
        said = tokenizer.decode([i for i in ids if i != tokenizer.end_of_text_id])
        for seed in (-1, 1, 2):
            assert (
                run(
                    "--ckpt",
                    ckpt,
                    "--prompt",
                    "the cat",
                    "--temperature",
                    0,
                    "--max_new_tokens",
                    40,
                    "--seed",
                    seed,
                )
                == f"the cat{said}\n"
            )


def test_a_seed_repeats_an_answer_and_no_seed_does_not(endless, run):
    """P12: two identical calls of the original implementation differ, and it has no --seed."""
    argv = ["--ckpt", endless, "--prompt", "x", "--max_new_tokens", 30, "--temperature", 1]
    assert run(*argv, "--seed", 5) == run(*argv, "--seed", 5) != run(*argv, "--seed", 6)
    assert len({run(*argv) for _ in range(4)}) == 4


def test_the_answer_streams(endless, monkeypatch, drawn):
    """Each token is shown, and flushed, before the next is drawn."""

    class Stdout(io.StringIO):
        flushed = ""

        def flush(self):
            self.flushed = self.getvalue()

    stdout, seen = Stdout(), []

    def fake(*_, **__):
        for i in b"abc":
            seen.append(stdout.flushed)
            yield [(0, i)]

    monkeypatch.setattr(predictor_module, "generate", fake)
    monkeypatch.setattr(sys, "stdout", stdout)
    predict.main(["--ckpt", endless, "--prompt", "P"])
    assert seen == ["P", "Pa", "Pab"] and stdout.flushed == "Pabc\n"


def test_end_of_text_ends_the_answer_and_is_not_shown(tmp_path, run):
    ckpt = save(tmp_path, biased_model(biases={END: 100.0}))
    assert run("--ckpt", ckpt, "--prompt", "done", "--max_new_tokens", 50) == "done\n"
    ckpt = save(tmp_path / "later", biased_model(biases={END: 3.0}))
    answers = [
        run("--ckpt", ckpt, "--prompt", "", "--max_new_tokens", 200, "--seed", seed)
        for seed in range(8)
    ]
    assert all("endoftext" not in a for a in answers) and min(map(len, answers)) < 150


def test_no_half_character_is_ever_written(endless, monkeypatch, drawn):
    """A character of several tokens is written when its last one has come.

    One that never ends becomes U+FFFD, once.
    """
    writes = []

    class Stdout(io.StringIO):
        def write(self, text):
            writes.append(text)
            return len(text)

    drawn.ids = list("é漢😀!".encode()) + [0xE6, 0xBC]
    monkeypatch.setattr(sys, "stdout", Stdout())
    predict.main(["--ckpt", endless, "--prompt", ""])
    assert [w for w in writes if w] == ["é", "漢", "😀", "!", "\ufffd", "\n"]


def test_ids_beyond_the_tokenizer_are_never_drawn(tmp_path, run):
    """P1, and a vocabulary padded beyond its tokenizer: the model prefers ids that mean nothing."""
    ckpt = save(tmp_path, biased_model(biases={257: 90.0, 258: 95.0, 259: 99.0, END: -1e4}))
    for settings in (
        ["--temperature", 0],
        ["--temperature", 5, "--top_k", 0],
        ["--top_k", 2],
        ["--top_p", 0.1],
    ):
        out = run("--ckpt", ckpt, "--prompt", "p", "--max_new_tokens", 60, *settings)
        assert len(out) >= 20


def test_undecodable_ids_of_o200k_are_never_drawn(o200k, tmp_path, monkeypatch):
    """P1: 19 ids of o200k_base have no bytes.

    A model that drew one ended the original implementation with "Invalid token for decoding".
    """
    holes = [199_998, *range(200_000, 200_018)]
    model = biased_model(
        vocabulary_size=200_019,
        d_model=4,
        num_heads=1,
        num_kv_heads=1,
        head_dim=4,
        transformer_blocks=1,
        context_length=8,
        biases=dict.fromkeys(holes, 100.0),
    )
    # No tokenizer, 200,019 ids: the original implementation's.
    predictor, config = predictor_of(
        save(tmp_path, model, None), max_new_tokens=20, temperature=2.0, top_k=0
    )
    assert predictor.tokenizer.name == "o200k_base" and predictor.banned_ids == holes
    ids = []
    monkeypatch.setattr(
        predictor_module,
        "generate",
        lambda *a, **k: (ids.append(step[0][1]) or step for step in generate(*a, **k)),
    )
    list(predictor.stream("Once upon a time", config))
    assert len(set(ids)) > 10 and not set(ids) & set(holes)


# -------------------------------------------------------------------------------------- the context
@pytest.mark.parametrize("table", [False, True], ids=["rope", "table"])
@pytest.mark.parametrize("when_full", ["slide", "stop"])
def test_the_context_limit_is_a_policy_and_no_text_is_lost(tmp_path, when_full, table):
    """P4: a prompt beyond the context was a traceback.

    An answer that reached it by one token lost all its text.
    """
    predictor, config = predictor_of(
        save(
            tmp_path,
            biased_model(use_attention_bias=table, biases={END: -1e4}, transformer_blocks=1),
        ),
        temperature=0.0,
        when_full=when_full,
    )
    fills = (
        f"prompt and answer may fill the context of {CONTEXT} tokens: "
        + {
            "slide": "older text is forgotten if they do",
            "stop": "the answer ends there if they do",
        }[when_full]
    )
    for num_prompt, num_new in itertools.product(
        [1, CONTEXT - 1, CONTEXT, CONTEXT + 1, 10 * CONTEXT],
        [1, CONTEXT - 1, CONTEXT, CONTEXT + 1, 10 * CONTEXT],
    ):
        # Long answers to the shortest and the longest prompts will do.
        if num_new > 2 * CONTEXT and 1 < num_prompt <= CONTEXT:
            continue
        prompt, notes = "abcdefghij" * 40, []
        pieces = list(
            predictor.stream(
                prompt[: num_prompt - 1],
                dataclasses.replace(config, max_new_tokens=num_new),
                notes.append,
            )
        )
        # The last token is drawn from a full context.
        room = CONTEXT - min(num_prompt, CONTEXT) + 1
        assert len(pieces) - 1 == (num_new if when_full == "slide" else min(num_new, room)), (
            num_prompt,
            num_new,
        )
        cut = (
            f"the prompt has {num_prompt} tokens and the context {CONTEXT}: reading its last "
            f"{CONTEXT}"
        )
        assert notes == [cut] * (num_prompt > CONTEXT) + [fills] * (num_new > room), (
            num_prompt,
            num_new,
        )
        read = ([END] + BYTE.encode(prompt[: num_prompt - 1]))[-CONTEXT:]
        kept = greedy_ids(
            predictor.model, read, min(num_new, room), banned_ids=predictor.banned_ids
        )
        assert "".join(pieces).startswith(BYTE.decode(kept).rstrip("\ufffd"))


def test_sliding_goes_on_from_the_newer_half(tmp_path):
    """The documented policy, done by hand without a cache."""
    predictor, config = predictor_of(
        save(tmp_path, biased_model(3, use_attention_bias=True, biases={END: -1e4})),
        temperature=0.0,
        max_new_tokens=3 * CONTEXT,
    )
    window, expected = [END, *b"start"], []
    for _ in range(3 * CONTEXT):
        if len(window) > CONTEXT:
            window = window[-(CONTEXT // 2) :]
        logits = predictor.model(torch.tensor([window])).logits[0, -1]
        logits[predictor.banned_ids] = -torch.inf
        expected.append(logits.argmax().item())
        window.append(expected[-1])
    assert "".join(predictor.stream("start", config)) == BYTE.decode(expected)


def test_a_full_context_with_stop_says_so_too(endless):
    """A prompt longer than the context gets one token with --when_full stop.

    The note mentioned only the prompt, and the answer seemed broken.
    """
    predictor, config = predictor_of(endless, when_full="stop")
    notes = []
    assert len(list(predictor.stream("x" * 100, config, notes.append))) == 2
    assert notes == [
        "the prompt has 101 tokens and the context 32: reading its last 32",
        "prompt and answer may fill the context of 32 tokens: the answer ends there if they do",
    ]


def test_notes_come_before_the_text(tmp_path):
    """The notes came with the first piece, after the prompt was shown.

    A terminal showed "Once upon a timenote: prompt and answer may ...".
    """
    predictor, config = predictor_of(
        save(tmp_path, biased_model(biases={END: -1e4})), max_new_tokens=10 * CONTEXT
    )
    notes = []
    # Not one piece is asked for.
    predictor.stream("x", config, notes.append)
    assert len(notes) == 1


def test_notes_go_to_stderr(endless, capsys):
    predict.main(
        ["--ckpt", endless, "--prompt", "x" * 40, "--max_new_tokens", "3", "--when_full", "stop"]
    )
    out, err = capsys.readouterr()
    assert (
        out.startswith("x" * 40)
        and err.splitlines()[0]
        == "note: the prompt has 41 tokens and the context 32: reading its last 32"
    )


@pytest.mark.parametrize("scaling", ["none", "linear", "yarn"])
def test_a_longer_context_is_attended_over(endless, scaling):
    predictor, config = predictor_of(
        endless, context_length=3 * CONTEXT, rope_scaling=scaling, temperature=0.0, max_new_tokens=8
    )
    c = predictor.model.config
    assert (c.context_length, c.rope_scaling, c.rope_scaling_factor) == (
        3 * CONTEXT,
        scaling,
        1.0 if scaling == "none" else 3.0,
    )
    prompt = "a prompt that is longer than the 32 tokens this model was trained on, by far"
    plain = LLM(c).eval()
    plain.load_state_dict(predictor.model.state_dict())
    notes = []
    text = "".join(predictor.stream(prompt, config, notes.append))
    assert not notes and text == BYTE.decode(
        greedy_ids(plain, [END, *prompt.encode()], 8, banned_ids=predictor.banned_ids)
    )
    short, config = predictor_of(endless, temperature=0.0, max_new_tokens=8)
    assert text != "".join(short.stream(prompt, config))


def test_a_shorter_context_reads_the_table_right(tmp_path, monkeypatch):
    """The C kernel took the context for the size of the learned attention bias.

    That size stays what it was: wrong text, and no error.
    """
    ckpt = save(tmp_path, biased_model(5, use_attention_bias=True, biases={END: -1e4}))
    with torch.no_grad():
        predictor, config = predictor_of(
            ckpt, context_length=12, temperature=0.0, max_new_tokens=30
        )
        for block in predictor.model.layers:
            block.attention.attention_bias.data.normal_(0, 3.0)
    expected = greedy_ids(predictor.model, [END, *b"some"], 30, banned_ids=predictor.banned_ids)
    assert "".join(predictor.stream("some", config)) == BYTE.decode(expected)


def test_a_shorter_context_is_honoured(endless, tmp_path):
    for ckpt in (
        endless,
        save(tmp_path, biased_model(use_attention_bias=True, biases={END: -1e4})),
    ):
        for context in (1, 2, 9):
            predictor, config = predictor_of(ckpt, context_length=context, max_new_tokens=30)
            assert (
                predictor.model.config.context_length == context
                and len(list(predictor.stream("some prompt", config))) == 31
            )


def test_gpt_oss_can_be_stretched_either_way(tmp_path):
    """Its YaRN is not rounded; with linear scaling that option had no effect and was rejected.

    predict.py has no flag to leave it out.
    """
    path = save(
        tmp_path, biased_model(rope_scaling="yarn", rope_scaling_factor=2.0, yarn_truncate=False)
    )
    for scaling in ("linear", "yarn"):
        config = predictor_of(path, context_length=64, rope_scaling=scaling)[0].model.config
        assert (config.rope_scaling, config.rope_scaling_factor, config.yarn_truncate) == (
            scaling,
            4.0,
            scaling == "linear",
        )


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        (
            dict(use_attention_bias=True),
            dict(context_length=33),
            "context_length 33 is beyond the trained 32, and this model has a learned bias "
            "for each pair",
        ),
        (
            {},
            dict(context_length=32, rope_scaling="yarn"),
            "rope_scaling yarn stretches a context, and 32 is not more than the trained 32",
        ),
        (
            dict(use_rope=False),
            dict(context_length=64, rope_scaling="linear"),
            "rope_scaling linear needs use_rope",
        ),
        (
            dict(rope_scaling="linear", rope_scaling_factor=2.0),
            dict(context_length=16, rope_scaling="linear"),
            "not more than the trained 16",
        ),
    ],
)
def test_contexts_that_cannot_be_are_refused(tmp_path, changes, settings, message):
    with pytest.raises(ValueError, match=message):
        predictor_of(save(tmp_path, biased_model(**changes)), **settings)


def test_a_yarn_model_is_not_rescaled_behind_ones_back(tmp_path):
    """YaRN's frequencies depend on context_length / factor, the trained context.

    --context_length alone changed one and kept the other. The model saw positions that it was never
    trained on, silently.
    """
    ckpt = save(tmp_path, biased_model(rope_scaling="yarn", rope_scaling_factor=2.0))
    with pytest.raises(
        ValueError,
        match=(
            "positions are yarn-scaled from 16 to 32 tokens: with context_length, say "
            "--rope_scaling yarn or linear"
        ),
    ):
        predictor_of(ckpt, context_length=64)
    assert predictor_of(ckpt, context_length=32)[0].model.config.rope_scaling_factor == 2.0
    c = predictor_of(ckpt, context_length=64, rope_scaling="yarn")[0].model.config
    assert (c.context_length, c.rope_scaling_factor) == (64, 4.0)


# -------------------------------------------------------------------------- checkpoints, tokenizers
def test_a_missing_default_checkpoint_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    missing = (
        r"there is no checkpoints/latest.pt yet: train a model first \(python train.py, or "
        r"make demo\), or give --ckpt FILE"
    )
    ready = tmp_path / "public" / "stories.pt"
    monkeypatch.setattr(predictor_module, "READY", ready)
    with pytest.raises(ValueError, match=f"{missing}$"):
        predict.main(["--prompt", "x"])
    # The model that comes with the repository is named where it is: not after a pip install.
    ready.parent.mkdir()
    ready.touch()
    with pytest.raises(ValueError, match=f"{missing}, or try --ckpt public/stories.pt$"):
        predict.main(["--prompt", "x"])
    with pytest.raises(ValueError, match="other.pt: no such file"):
        predict.main(["--prompt", "x", "--ckpt", "other.pt"])
    (tmp_path / "checkpoints").mkdir()
    save(tmp_path / "checkpoints", biased_model())
    assert predict.main(["--prompt", "x", "--max_new_tokens", "1"]) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is a directory without checkpoint.json or a device, not a checkpoint"),
        (b"", "the file is empty"),
        (b"Once upon a time", "not a checkpoint"),
        (os.urandom(5000), "not a checkpoint"),
        (b"PK\3\4" + b"\0" * 500, "damaged or cut short"),
    ],
)
def test_files_that_are_no_checkpoint_are_one_line(tmp_path, content, message):
    """P7: IsADirectoryError, `KeyError: 101` and EOFError."""
    path = tmp_path / "x.pt"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        predict.main(["--ckpt", str(path), "--prompt", "x"])
    assert "\n" not in str(error.value)


def test_a_checkpoint_without_tokenizer_needs_its_name(tmp_path, run):
    """P9: with another tokenizer than its own a model gave garbage and exit code 0."""
    ckpt = save(tmp_path, biased_model(), None)
    with pytest.raises(
        ValueError,
        match=(
            r"does not say which tokenizer it was trained with \(vocabulary 260\): name it with "
            r"--tokenizer, or say --tokenizer none to read and write token ids"
        ),
    ):
        predict.main(["--ckpt", ckpt, "--prompt", "x"])
    assert run(
        "--ckpt", ckpt, "--prompt", "x", "--tokenizer", "byte", "--max_new_tokens", 3
    ).startswith("x")
    with pytest.raises(
        ValueError,
        match="tokenizer 'words' is not one of o200k_base, gpt2, cl100k_base, byte, bpe:SIZE",
    ):
        predict.main(["--ckpt", ckpt, "--prompt", "x", "--tokenizer", "words"])
    with pytest.raises(ValueError, match="tokenizer bpe:300 is made from a text: give the folder"):
        predict.main(["--ckpt", ckpt, "--prompt", "x", "--tokenizer", "bpe:300"])
    smaller = save(tmp_path / "smaller", biased_model(vocabulary_size=97), None)
    with pytest.raises(
        ValueError,
        match=(
            "tokenizer byte has 257 ids, the model in .* only 97: use the tokenizer that it was "
            "trained with"
        ),
    ):
        predict.main(["--ckpt", smaller, "--prompt", "x", "--tokenizer", "byte"])


@pytest.fixture(scope="module")
def nameless(tmp_path_factory) -> str:
    """A checkpoint that says nothing of its tokenizer."""
    return save(tmp_path_factory.mktemp("nameless"), biased_model(), None)


def test_token_ids_in_and_out(nameless, run):
    """A checkpoint without a tokenizer, such as the original implementation's, was of no use.

    The ids are the model's: nothing is put before them, and none ends the answer.
    """
    expected = greedy_ids(biased_model(), [12, 7, 99], 6)
    flags = ("--ckpt", nameless, "--tokenizer", "none", "--max_new_tokens", 6, "--temperature", 0)
    text = " " + " ".join(map(str, expected))
    assert run(*flags, "--prompt", "12 7 99") == f"12 7 99{text}\n"
    record = json.loads(run(*flags, "--prompt", "[12, 7, 99]", "--json"))
    assert (record["ids"], record["text"], record["prompt_tokens"]) == (expected, text, 3)
    assert record["ended"] == "length" and record["new_tokens"] == 6


@pytest.mark.parametrize("name", ["bias_gqa", "nobias_qkvbias"])
def test_checkpoints_of_the_reference_take_token_ids(shared_dir, run, name):
    path = shared_dir / "upstream" / f"{name}.pt"
    model = load_model(path)[0]
    flags = ("--tokenizer", "none", "--max_new_tokens", 8, "--temperature", 0, "--json")
    record = json.loads(run("--ckpt", path, *flags, "--prompt", "12 7 99"))
    assert record["ids"] == greedy_ids(model, [12, 7, 99], 8)


def test_each_line_of_a_prompt_file_is_ids(nameless, run, tmp_path, capsys):
    """All are read before the first is completed: a wrong one prints nothing."""
    (tmp_path / "prompts").write_text("1 2\n3\n")
    flags = ["--ckpt", nameless, "--tokenizer", "none", "--max_new_tokens", "4"]
    out = run(*flags, "--prompt_file", tmp_path / "prompts", "--temperature", 0, "--json")
    model = biased_model()
    assert [json.loads(line)["ids"] for line in out.splitlines()] == [
        greedy_ids(model, ids, 4) for ids in ([1, 2], [3])
    ]
    (tmp_path / "prompts").write_text("1 2\n260\n")
    with pytest.raises(ValueError, match="token id 260 is beyond this model's vocabulary"):
        predict.main([*flags, "--prompt_file", str(tmp_path / "prompts"), "--batch_size", "1"])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--prompt", "12 260"],
            "token id 260 is beyond this model's vocabulary: its ids are 0 to",
        ),
        (["--prompt", "Once"], "'Once' is no token id: .* numbers from 0 to 259, such as 12 7 99"),
        (["--prompt", "-1"], "'-1' is no token id"),
        (["--prompt", "1.5"], "'1.5' is no token id"),
        (["--prompt", "٣"], "'٣' is no token id"),
        (["--prompt", "9" * 10_000], "'9{40}' is no token id"),
        (["--prompt", " "], "the prompt is empty: with --tokenizer none it needs a token id"),
        (["--prompt", "1", "--stop", "5"], "stop '5' ends an answer before a text"),
    ],
    ids=lambda value: "",
)
def test_what_is_no_token_id_is_one_line(nameless, flags, message, capsys):
    with pytest.raises(ValueError, match=message) as caught:
        predict.main(["--ckpt", nameless, "--tokenizer", "none", "--device", "cpu", *flags])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    assert capsys.readouterr().out == ""


def test_a_session_of_token_ids(nameless, repl, tmp_path):
    """What is continued is what was shown, and a mistake leaves the text as it was."""
    model, saved = biased_model(), tmp_path / "ids.txt"
    first = greedy_ids(model, [12, 7], 3)
    second = greedy_ids(model, [12, 7, *first, 99, 1], 3)
    script = f'12 7\n+99 1\n+300\n:stop 5\n1\n:stop ""\n:save {saved}\n:q\n'
    out, errors = repl(nameless, script, "--tokenizer", "none", "--temperature", 0)
    numbers = " ".join(map(str, [12, 7, *first, 99, 1, *second]))
    assert out.splitlines()[0] == " ".join(map(str, [12, 7, *first]))
    assert numbers in saved.read_text()
    assert [line.partition(":")[0] for line in errors.splitlines()] == ["error", "error"]
    assert "token id 300" in errors and "stop '5'" in errors


def test_text_stays_text_where_a_tokenizer_is_known(endless):
    with pytest.raises(
        ValueError, match="was trained with tokenizer byte, not none: leave --tokenizer out"
    ):
        predict.main(["--ckpt", endless, "--prompt", "1", "--tokenizer", "none"])


def test_the_checkpoints_own_tokenizer_cannot_be_overruled(endless, bpe, run):
    with pytest.raises(
        ValueError, match="was trained with tokenizer bpe:280, not byte: leave --tokenizer out"
    ):
        predict.main(["--ckpt", bpe[1], "--prompt", "x", "--tokenizer", "byte"])
    assert run("--ckpt", endless, "--prompt", "x", "--tokenizer", "byte", "--max_new_tokens", 1)


def test_the_tokenizer_of_a_data_folder_can_be_named(tmp_path, run, monkeypatch):
    """The folder was asked for a tokenizer of no name, so --tokenizer FOLDER could never work."""
    for name in ("byte", "bpe:280"):
        data = tmp_path / name
        assert (
            prepare_data.main(
                [
                    "--dataset",
                    "toy",
                    "--num_stories",
                    "60",
                    "--tokenizer",
                    name,
                    "--val_ratio",
                    "0.2",
                    "--out_dir",
                    str(data),
                ]
            )
            == 0
        )
        ckpt = save(tmp_path / f"ckpt-{name}", biased_model(vocabulary_size=280), None)
        for folder in (data, data / "train", data / "val"):
            predictor, _ = predictor_of(ckpt, tokenizer=str(folder))
            assert (
                predictor.tokenizer.name == name
                and predictor.tokenizer.decode(predictor.tokenizer.encode("the cat")) == "the cat"
            )
    with pytest.raises(ValueError, match="meta.json does not exist"):
        predictor_of(ckpt, tokenizer=str(tmp_path))
    # Here a folder is called byte: the name means what it always means.
    monkeypatch.chdir(tmp_path)
    assert predictor_of(ckpt, tokenizer="byte")[0].tokenizer.fingerprint == BYTE.fingerprint


def test_a_compact_vocabulary_travels_in_the_checkpoint(tmp_path, run, monkeypatch, capsys):
    """It reads tokens that its text never had.

    It is not mistaken for its base, or for what another text made of that.
    """
    monkeypatch.setitem(tiktoken.registry.ENCODINGS, "gpt2", stand_in())
    tokenizers = []
    for stories in ("60", "2"):
        out = tmp_path / stories
        assert (
            prepare_data.main(
                [
                    "--dataset",
                    "toy",
                    "--num_stories",
                    stories,
                    "--tokenizer",
                    "gpt2:compact",
                    "--val_ratio",
                    "0.5",
                    "--out_dir",
                    str(out),
                ]
            )
            == 0
        )
        tokenizers.append(load_tokenizer("gpt2:compact", out / "train"))
    assert tokenizers[0].fingerprint != tokenizers[1].fingerprint
    ckpt = save(
        tmp_path / "ckpt",
        biased_model(vocabulary_size=tokenizers[0].vocabulary_size),
        tokenizers[0],
    )
    capsys.readouterr()
    prompt = "The Xylophone \N{GRINNING FACE} 你好"
    assert run("--ckpt", ckpt, "--prompt", prompt, "--max_new_tokens", 3).startswith(prompt)
    predictor, _ = predictor_of(ckpt, tokenizer=str(tmp_path / "60"))
    assert (
        predictor.tokenizer.name == "gpt2:compact"
        and predictor.banned_ids == []
        and predictor.tokenizer.decode(predictor.tokenizer.encode(prompt)) == prompt
    )
    for other in ("gpt2", str(tmp_path / "2")):
        with pytest.raises(
            ValueError,
            match="was trained with tokenizer gpt2:compact, not .*: leave --tokenizer out",
        ):
            predictor_of(ckpt, tokenizer=other)


@pytest.mark.parametrize("name", ["bias_gqa", "nobias_qkvbias"])
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_checkpoints_of_the_reference_run_as_they_are(shared_dir, tmp_path, run, name, compiled):
    """M1: the original implementation's cached prefill had no causal mask.

    Its answers were not its model's. These are.
    """
    path = shared_dir / "upstream" / f"{name}.pt"
    expected = np.load(path.with_name(f"{name}_expected.npz"))
    if compiled:
        contents = torch.load(path, weights_only=True)
        contents["model"] = {
            f"_orig_mod.{key}": tensor for key, tensor in contents["model"].items()
        }
        torch.save(contents, tmp_path / "compiled.pt")
        path = tmp_path / "compiled.pt"
    assert run(
        "--ckpt",
        path,
        "--tokenizer",
        "byte",
        "--prompt",
        "ben was a brave boy",
        "--max_new_tokens",
        50,
    ).startswith("ben was a brave boy")
    predictor, _ = predictor_of(str(path), tokenizer="byte")
    answer = expected["greedy_ids"][0].tolist()
    assert (
        greedy_ids(predictor.model, answer[:8], len(answer) - 8) == answer[8:]
        and answer[:8] == expected["input_ids"][0, :8].tolist()
    )


def test_out_of_memory_is_one_line(endless, monkeypatch, capsys):
    """A model too large for the card ended in PyTorch's traceback.

    So did a --context_length too large for what is left.
    """

    def too_large(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 14.5 GiB.")

    with (
        monkeypatch.context() as patch,
        pytest.raises(
            ValueError,
            match=(
                "^out of memory on cpu .*: use --dtype bfloat16, --quantize int4, another "
                "--device or a smaller model$"
            ),
        ),
    ):
        patch.setattr(predictor_module, "load_model", too_large)
        predict.main(["--ckpt", endless, "--prompt", "x", "--device", "cpu"])
    with pytest.raises(
        ValueError,
        match="^out of memory on cpu .*: lower --context_length or use --dtype bfloat16$",
    ):
        monkeypatch.setattr(predictor_module, "generate", too_large)
        predict.main(["--ckpt", endless, "--prompt", "shown", "--device", "cpu"])
    assert capsys.readouterr().out == "shown\n"


# ------------------------------------------------------------------------------------- the terminal
def test_control_characters_are_spelled_out_on_a_terminal_only(endless, monkeypatch, drawn, capsys):
    """S1: an ESC that a model generates must not reach a terminal; a file gets the plain text."""
    drawn.ids = list("\x1b[31mred\x07 \u202eb\u009bc\n".encode())
    predict.main(["--ckpt", endless, "--prompt", "\x1b]0;p\x07"])
    assert capsys.readouterr().out == "\x1b]0;p\x07\x1b[31mred\x07 \u202eb\u009bc\n\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for variables, bold in (
        ({"NO_COLOR": "1"}, ("", "")),
        ({"TERM": "dumb", "NO_COLOR": ""}, ("", "")),
        ({"TERM": "xterm", "NO_COLOR": ""}, ("\x1b[1m", "\x1b[0m")),
    ):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        predict.main(["--ckpt", endless, "--prompt", "\x1b]0;p\x07"])
        assert (
            capsys.readouterr().out
            == bold[0] + "\\x1b]0;p\\x07" + bold[1] + "\\x1b[31mred\\x07 \\u202eb\\x9bc\n\n"
        )


def test_speed_is_told_on_a_terminal_only(endless, monkeypatch, drawn, capsys):
    drawn.ids = list(b"four")
    predict.main(["--ckpt", endless, "--prompt", "p"])
    assert capsys.readouterr().err.count("tokens/s") == 0
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    predict.main(["--ckpt", endless, "--prompt", "p"])
    assert "[4 tokens, " in capsys.readouterr().err
    # One token has no rate: it was given as 0.0 tokens/s.
    drawn.ids = list(b"1")
    predict.main(["--ckpt", endless, "--prompt", "p"])
    assert "tokens/s" not in capsys.readouterr().err


# ----------------------------------------------------------------------------------------- the REPL


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (":t 0.5", "temperature = 0.5"),
        (":t 0", "temperature = 0.0"),
        (":t", "temperature = 0.9"),
        (":t   1e-3  ", "temperature = 0.001"),
        (":k 3", "top_k = 3"),
        (":k", "top_k = 50"),
        (":k 0", "top_k = 0"),
        (":k 257", "top_k = 257"),
        *[
            (
                f":k {k}",
                f"top_k = {k}\ntop_k {k} samples from all tokens, as 0 does: "
                "the vocabulary has 257",
            )
            for k in (258, 999999, 10**30)
        ],
        (":p 0.5", "top_p = 0.5"),
        (":p", "top_p = 1.0"),
        (":n 7", "max_new_tokens = 7"),
        (":n", "max_new_tokens = 3"),
        (":seed 12", "seed = 12"),
        (":seed", "seed = -1"),
        (":seed -1", "seed = -1"),
        (":t -1", "temperature must be at least 0.0, not -1.0; it stays 0.9"),
        (":t nan", "temperature must be a finite number, not nan; it stays 0.9"),
        (":t inf", "temperature must be a finite number, not inf; it stays 0.9"),
        (":t 1e308", "temperature must be at most 1e+30, not 1e+308; it stays 0.9"),
        (":t 1e999", "temperature must be a finite number, not inf; it stays 0.9"),
        (":t warm", "temperature must be a number, not 'warm'; it stays 0.9"),
        (":t 1 2", ":t takes one value, not 2; it stays 0.9"),
        (":k -5", "top_k must be at least 0, not -5; it stays 50"),
        (":k 1.5", "top_k must be a whole number, not '1.5'; it stays 50"),
        (":k 1e3", "top_k must be a whole number, not '1e3'; it stays 50"),
        (":p 0", "top_p must be at least 1e-09, not 0.0; it stays 1.0"),
        (":p 1.1", "top_p must be at most 1.0, not 1.1; it stays 1.0"),
        (":p 1e-320", "top_p must be at least 1e-09, not 1e-320; it stays 1.0"),
        (":m 0.1", "min_p = 0.1"),
        (":m 2", "min_p must be at most 1.0, not 2.0; it stays 0.0"),
        (":r 1.2", "repetition_penalty = 1.2"),
        (":stop", "stop = no text"),
        (":stop . .", "stop = '. .'"),
        (r":stop a\nb", r"stop = 'a\nb'"),
        (':stop ""', "stop = no text"),
        (":stop  ", "stop = no text"),
        (":r 0", "repetition_penalty must be at least 0.001, not 0.0; it stays 1.0"),
        (":n 0", "max_new_tokens must be at least 1, not 0; it stays 3"),
        (":n 100000001", "max_new_tokens must be at most 100000000, not 100000001; it stays 3"),
        (":seed -2", "seed must be at least -1, not -2; it stays -1"),
        (f":seed {2**63}", f"seed must be at most {2**63 - 1}, not {2**63}; it stays -1"),
        (":quantum", "unknown command :quantum; :help lists them"),
        (":q now", "unknown command :q; :help lists them"),
        (":Q", "unknown command :Q; :help lists them"),
        (":", "unknown command :; :help lists them"),
        (": t 0", "unknown command :; :help lists them"),
        (":temperature 1", "unknown command :temperature; :help lists them"),
        (":\x1b[31m", "unknown command :\\x1b[31m; :help lists them"),
        (":t \x07", "temperature must be a number, not '\\\\x07'; it stays 0.9"),
        (":t \x00", "temperature must be a number, not '\\\\x00'; it stays 0.9"),
    ],
)
def test_every_command_answers_with_a_line_and_the_session_goes_on(
    endless, repl, drawn, script, said
):
    """P10: in the original implementation `:t 0` and `:k 999999` ended the session.

    `:quantum` quit it, and `:t` was used as a prompt.
    """
    drawn.ids = list(b"...")
    assert repl(endless, script + "\nstill here\n:q\nnot reached\n") == (
        f"{said}\nstill here...\n",
        "",
    )
    assert len(drawn.calls) == 1


def test_settings_reach_the_next_answer(endless, repl, drawn):
    repl(endless, ":t 0.5\n:k 7\n:p 0.5\n:m 0.25\n:r 1.5\n:n 2\n:seed 9\na\n:t x\n:k 8\nb\n")
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    assert [
        (c[1], *(c[2][name] for name in names), c[2]["generators"][0].initial_seed())
        for c in drawn.calls
    ] == [(2, 0.5, k, 0.5, 0.25, 1.5, 9) for k in (7, 8)]


def test_help_names_every_command(endless, repl, drawn):
    out, _ = repl(endless, ":help\n")
    assert all(f"  {command} " in out for command in (*COMMANDS, *OTHER_COMMANDS))
    assert ":experts" in OTHER_COMMANDS
    assert {field for field, _ in COMMANDS.values()} == {
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "max_new_tokens",
        "stop",
        "seed",
    } and not drawn.calls


@pytest.mark.parametrize(
    ("ids", "stop", "line"),
    [
        ([END], [], "the answer is empty: the model ended the text"),
        (list(b" \n") + [END], [], "the answer has only blanks: the model ended the text"),
        (list(b"  "), ["--max_new_tokens", 2], "has only blanks: its new tokens show nothing"),
        (list(b"!..."), ["--stop", "!"], "the answer is empty: a stop text came first"),
        (list("漢".encode())[:2], ["--max_new_tokens", 2], None),
        (list(b"text"), [], None),
    ],
)
def test_an_answer_without_a_visible_character_says_so(
    endless, repl, drawn, capsys, ids, stop, line
):
    """At a model's end of text nothing was printed: was it broken, slow or done?"""
    drawn.ids = ids
    said = [f"note: {line}"] if line and line.startswith("the") else [line] if line else []
    for err in (
        repl(endless, "ab\n", *stop)[1],
        predict.main(["--ckpt", endless, "--prompt", "ab", *map(str, stop)])
        or capsys.readouterr().err,
    ):
        assert [s for s in said if s not in err] == [] and ("the answer" in err) == bool(line), err
    # Only the text is asked for.
    assert "the answer" not in repl(endless, "ab\n", *stop, "--quiet")[1]


def test_a_top_k_above_the_vocabulary_is_said_once(endless, capsys, drawn):
    """A mistyped --top_k sampled from all tokens, and nothing told it from a working one."""
    predict.main(["--ckpt", endless, "--prompt", "p", "--top_k", "258"])
    line = "note: top_k 258 samples from all tokens, as 0 does: the vocabulary has 257\n"
    assert capsys.readouterr().err.count(line) == 1
    for top_k in (0, 50, 257):
        predict.main(["--ckpt", endless, "--prompt", "p", "--top_k", str(top_k)])
        assert "top_k" not in capsys.readouterr().err


@pytest.fixture
def typed(monkeypatch, tmp_path, capsys, endless):
    """Returns what the REPL prints when lines are typed on a terminal."""

    def type_lines(*lines: str, ckpt: str = endless, **settings) -> str:
        rest = iter(lines)
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
        monkeypatch.setattr("builtins.input", lambda prompt: next(rest))
        for stream in (sys.stdin, sys.stdout):
            monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
        session.repl(*predictor_of(ckpt, max_new_tokens=3, **settings))
        assert next(rest, "all were read") == "not reached"
        return capsys.readouterr().out

    return type_lines


@pytest.mark.parametrize("word", ["exit", "quit", "Exit", " quit ", "exit()", ":exit", ":q"])
def test_people_leave_a_terminal_as_they_leave_other_programs(typed, drawn, word):
    """`exit` was a prompt: the model went on with it, and only :help knew the way out."""
    assert "exit to leave" in typed(word, "not reached") and not drawn.calls


def test_help_is_found_on_a_terminal_and_a_text_may_hold_the_words(typed, drawn):
    out = typed("help", "?", "exit the room", "help me", ":q", "not reached")
    assert out.count(session.HELP) == 2
    prompts = [BYTE.decode(call[0][0][1:]) for call in drawn.calls]
    assert prompts == ["exit the room", "help me"]


def test_the_greeting_names_model_size_step_and_file(typed, endless, tmp_path):
    checkpoint = read_checkpoint(endless)
    parameters = sum(p.numel() for p in load_model(endless)[0].parameters())
    first = typed(":q", "not reached").splitlines()[0]
    assert first.startswith(f"{human_count(parameters)} parameters (") and " active)" in first
    assert first.endswith(f", step {checkpoint.step:,}, {endless}") and checkpoint.step > 0
    assert typed(":q", "not reached", quiet=True) == ""


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_known_by_its_architecture(name):
    """With whatever vocabulary: train.py takes the data's."""
    config = ModelConfig(**PRESETS[name].model)
    assert session.preset_of(config) == name
    assert session.preset_of(dataclasses.replace(config, vocabulary_size=1234)) == name
    # As `make demo` trains it.
    assert session.preset_of(dataclasses.replace(config, init_std=0.1)) == name
    assert session.preset_of(dataclasses.replace(config, d_ff=2 * config.d_ff)) == ""


@pytest.mark.parametrize(
    ("script", "prompts"),
    [
        (b"", []),
        (b"\n", []),
        (b"\n\n   \n\t\n", []),
        (b"a", ["a"]),
        (b"a\nb", ["a", "b"]),
        (b"a\r\nb\r\n", ["a", "b"]),
        (b"  spaces kept ", ["  spaces kept "]),
        (b" :q\n", [":q"]),
        (b" :t 1\n", [":t 1"]),
        (b"\t:q\n", ["\t:q"]),
        (b":q\nafter\n", []),
        (b"  :q  \n", ["  :q  "]),
        (b":q  \nafter\n", []),
        (b"q\nquit\nexit\n", ["q", "quit", "exit"]),
        (b"nul\0inside\n", ["nul\0inside"]),
        (b"\0\n", ["\0"]),
        (b"\xff\xfe bad\n", ["\ufffd\ufffd bad"]),
        (b"cut \xe6\xbc", ["cut \ufffd"]),
        (b"\xed\xa0\x80 surrogate\n", ["\ufffd\ufffd\ufffd surrogate"]),
        ("emoji 😀 👩‍👩‍👧 é漢".encode(), ["emoji 😀 👩‍👩‍👧 é漢"]),
        (b"x" * 10_000 + b"\n", ["x" * 10_000]),
        (b"<|endoftext|>\n", ["<|endoftext|>"]),
        (b"\x1b[A\x04\n", ["\x1b[A\x04"]),
    ],
)
def test_every_line_is_a_prompt_or_nothing_and_end_of_file_ends_quietly(
    endless, repl, drawn, script, prompts
):
    out, err = repl(endless, script)
    assert [BYTE.decode(call[0][0][1:]) for call in drawn.calls] == prompts
    assert all(call[0][0][0] == END for call in drawn.calls) and out == "".join(
        f"{p}\n" for p in prompts
    )


def test_lines_reach_a_real_model(endless, repl):
    """The same kinds of lines, through everything."""
    out, _ = repl(
        endless,
        b"plain\nnul\0 \xff \xed\xa0\x80\n" + b"y" * 10_000 + b"\n" + "😀".encode(),
        "--seed",
        "1",
    )
    assert out.startswith("plain") and "y" * 10_000 in out and "😀" in out and out.endswith("\n")


def test_text_with_lone_surrogates_is_answered(endless):
    """JSON and file names can spell them; UTF-8 cannot."""
    predictor, config = predictor_of(endless, max_new_tokens=2)
    assert len(list(predictor.stream("a \ud83d b \udcff", config))) == 3


def test_1000_fuzzed_lines_end_nothing_and_leave_valid_settings(
    small, monkeypatch, capsys, tmp_path
):
    """Every line is answered and leaves settings that a PredictConfig accepts."""
    # :save writes files.
    monkeypatch.chdir(tmp_path)
    r, left, states = random.Random(0), iter(range(1000)), []

    def fake_input(prompt=""):
        if next(left, None) is None:
            raise EOFError
        while (line := fuzz_line(r).replace("\n", " ").replace("\r", " ")).split() == [":q"]:
            pass
        return line

    def remember(config, command, arguments, real=command_result):
        config = real(config, command, arguments)
        # Checks every field again.
        states.append(dataclasses.replace(config))
        return config

    predictor, config = predictor_of(small, max_new_tokens=2)
    monkeypatch.setattr("builtins.input", fake_input)
    monkeypatch.setattr(session, "command_result", remember)
    # Whatever :n says.
    monkeypatch.setattr(
        predictor_module, "generate", lambda *a, **k: itertools.islice(generate(*a, **k), 2)
    )
    # As run_main sets it up.
    monkeypatch.setattr(
        sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="replace")
    )
    session.repl(predictor, config)
    assert next(left, None) is None and len(states) > 300 and len(set(states)) > 20
    assert [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")
    ] == []


def test_1000_random_sampler_settings_draw_or_are_refused(small):
    """P2, P3: temperature 0, nan, 1e-40 and a top_k above the vocabulary were tracebacks.

    -1 and -5 silently did something else. Here, temperature 1e308 made -inf / inf of the ids that
    are never drawn, and top_p 1e-320 kept no id at all: RuntimeErrors both.
    """
    r, refused = random.Random(1), 0
    predictor, config = predictor_of(small, max_new_tokens=2)
    for _ in range(1000):
        settings = dict(
            temperature=r.choice(
                [
                    0.0,
                    1.0,
                    -1.0,
                    float("nan"),
                    float("inf"),
                    5e-324,
                    1e39,
                    1e308,
                    10 ** r.uniform(-45, 38),
                    10 ** r.uniform(-2, 2),
                ]
            ),
            top_k=r.choice([0, 1, 2, 259, 260, 261, 10**9, 10**30, -5, r.randrange(300)]),
            top_p=r.choice([1.0, 1.0, 0.0, 2.0, -0.5, 5e-324, 1e-9, 10 ** r.uniform(-9, 0)]),
            min_p=r.choice([0.0] * 8 + [1.0, 1e-9, 5e-324, r.random(), -0.1, 1.1]),
            repetition_penalty=r.choice(
                [1.0] * 8 + [1e-3, 1e3, 10 ** r.uniform(-3, 3), 0.0, float("nan")]
            ),
            seed=r.choice([-1, 0, 2**63 - 1, r.randrange(2**63)]),
        )
        try:
            changed = dataclasses.replace(config, **settings)
        except ValueError:
            refused += 1
            continue
        assert len(list(predictor.stream("a", changed))) in (1, 2, 3), settings
    assert 200 < refused < 900


def test_an_answer_ends_before_a_stop(endless, run, repl, drawn):
    """Stop texts from flags, several of them, and at the prompt.

    If an answer's end only looks like one, it is shown.
    """
    drawn.ids = list(b"one. two. three.")
    flags = ("--ckpt", endless, "--prompt", "", "--max_new_tokens", 16)
    assert run(*flags, "--stop", "three", "--stop", "two") == "one. \n"
    assert run(*flags, "--stop", "three. And") == "one. two. three.\n"
    assert repl(endless, ":n 16\n:stop two\nx\n")[0].endswith("xone. \n")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("no"),
        RuntimeError("CUDA error: \x1b[31m\n unspecified"),
        torch.OutOfMemoryError("CUDA out of memory."),
        MemoryError(),
    ],
    ids=lambda e: type(e).__name__,
)
def test_an_answer_that_fails_does_not_end_the_session(endless, repl, monkeypatch, error):
    """The model took minutes to load; an answer that does not fit into memory must not lose it."""

    def stream(self, prompt, config, note):
        yield "first"
        if prompt == "bad":
            raise error

    monkeypatch.setattr(Predictor, "stream", stream)
    out, err = repl(endless, "bad\ngood\n")
    assert (
        out == "badfirst\ngoodfirst\n"
        and err.startswith("error: ")
        and err.count("\n") == 1
        and "\x1b" not in err
    )


def test_ctrl_c_stops_the_answer_and_not_the_session(endless, repl, monkeypatch):
    """P13: Ctrl-C while generating was a traceback, and session and text were lost."""

    def stream(self, prompt, config, note):
        yield "one "
        yield "two "
        if prompt == "stop me":
            raise KeyboardInterrupt
        yield "three"

    monkeypatch.setattr(Predictor, "stream", stream)
    assert repl(endless, ":t 0.5\nstop me\n:t\nand on\n") == (
        "temperature = 0.5\nstop meone two \ntemperature = 0.5\nand onone two three\n",
        "",
    )


def test_ctrl_c_at_the_prompt_or_in_a_command_does_not_end_the_session(
    endless, monkeypatch, capsys
):
    """A Ctrl-C while a command was answering ended the session: only answers were guarded."""
    lines = iter([KeyboardInterrupt, ":help", ":t 0.5", EOFError])

    def fake_input(prompt=""):
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    def interrupted(config, command, arguments, real=command_result):
        if command == ":help":
            raise KeyboardInterrupt
        return real(config, command, arguments)

    monkeypatch.setattr("builtins.input", fake_input)
    monkeypatch.setattr(session, "command_result", interrupted)
    session.repl(*predictor_of(endless))
    assert capsys.readouterr().out == "\ntemperature = 0.5\n" and next(lines, None) is None


def test_ctrl_c_in_one_shot_mode_keeps_the_text_and_is_told_to_the_shell(
    endless, monkeypatch, capsys
):
    def stream(self, prompt, config, note):
        yield "text"
        raise KeyboardInterrupt

    monkeypatch.setattr(Predictor, "stream", stream)
    # run_main makes exit code 130 of it.
    with pytest.raises(KeyboardInterrupt):
        predict.main(["--ckpt", endless, "--prompt", "p"])
    assert capsys.readouterr().out == "ptext\n"


def test_prompts_are_not_written_into_a_redirected_answer(endless, monkeypatch, capsys, drawn):
    """`python predict.py > story.txt` with typed prompts: the file began with "> ".

    Python writes input's prompt to stdout where that is no terminal.
    """
    stdin = io.TextIOWrapper(io.BytesIO(b"a\n"))
    stdin.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", stdin)
    drawn.ids = list(b"b")
    predict.main(["--ckpt", endless])
    assert capsys.readouterr().out == "ab\n"


# ------------------------------------------------------------------------------------- many answers
def test_a_file_of_prompts_gives_what_each_prompt_gives(endless, tmp_path, run):
    """Prompts of different lengths in batches, in the file's order.

    A seed means the same for each of them, in any batch.
    """
    prompts = ["Once", "a much longer prompt than that", "é", "x", "y y"]
    (tmp_path / "lines.txt").write_text(
        "\n".join(prompts[:2]) + "\n\n  \n" + "\r\n".join(prompts[2:])
    )
    (tmp_path / "p.jsonl").write_text(
        "\n".join(
            [json.dumps({"prompt": p}) for p in prompts[:3]]
            + [json.dumps({"text": p, "n": 1}) for p in prompts[3:]]
        )
        + "\n"
    )
    flags = ("--ckpt", endless, "--max_new_tokens", 12, "--seed", 4)
    alone = [run(*flags, "--prompt", p) for p in prompts]
    for name in ("lines.txt", "p.jsonl"):
        for size in (1, 2, 8):
            assert run(*flags, "--prompt_file", tmp_path / name, "--batch_size", size) == "\n".join(
                alone
            )


def test_samples_differ_and_each_has_a_seed_of_its_own(endless, run):
    flags = ("--ckpt", endless, "--max_new_tokens", 12, "--prompt", "p")
    records = [
        json.loads(line)
        for line in run(
            *flags, "--num_samples", 4, "--seed", 7, "--json", "--batch_size", 3
        ).splitlines()
    ]
    assert [r["seed"] for r in records] == [7, 8, 9, 10] and len({r["text"] for r in records}) == 4
    assert [r["text"] for r in records] == [
        json.loads(run(*flags, "--seed", seed, "--json"))["text"] for seed in (7, 8, 9, 10)
    ]
    # No seed: another each time.
    assert (
        len(
            {
                json.loads(line)["text"]
                for line in run(*flags, "--num_samples", 3, "--json").splitlines()
            }
        )
        == 3
    )


def test_json_says_how_an_answer_ended(endless, tmp_path, run):
    ends = save(tmp_path, biased_model(biases={END: 100.0}))
    flags = ("--prompt", "\x1bé", "--json", "--seed", 1)
    cases = [
        (ends, [], "end of text", 1),
        (endless, ["--max_new_tokens", 5], "length", 5),
        (endless, ["--when_full", "stop"], "context", CONTEXT - 3),
    ]
    for ckpt, more, ended, count in cases:
        out = run("--ckpt", ckpt, *flags, *more)
        record = json.loads(out)
        assert (
            out.isascii()
            and out.count("\n") == 1
            and record["prompt"] == "\x1bé"
            and (record["ended"], record["new_tokens"], record["prompt_tokens"])
            == (ended, count, 4)
        )
        assert record["seconds_to_first_token"] > 0 and (record["tokens_per_sec"] is None) == (
            count == 1
        )
    text = json.loads(run("--ckpt", endless, *flags))["text"]
    record = json.loads(run("--ckpt", endless, *flags, "--stop", text[5]))
    assert record["ended"] == "stop text" and record["text"] == text[: text.index(text[5])]


def test_json_keeps_an_interrupted_answer(endless, monkeypatch, capsys):
    def interrupted(*a, **k):
        yield [(0, ord("a"))]
        raise KeyboardInterrupt

    monkeypatch.setattr(predictor_module, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        predict.main(["--ckpt", endless, "--prompt", "p", "--json"])
    assert json.loads(capsys.readouterr().out) | {"seconds_to_first_token": 0} == {
        "prompt": "p",
        "text": "a",
        "ended": "interrupted",
        "seed": -1,
        "prompt_tokens": 2,
        "new_tokens": 1,
        "seconds_to_first_token": 0,
        "tokens_per_sec": None,
    }


def test_ctrl_c_keeps_the_answers_that_are_there(endless, tmp_path, monkeypatch, capsys):
    """Of a batch, the complete ones were lost with the others."""
    (tmp_path / "p.txt").write_text("a\nb\nc")

    def interrupted(decoder, texts, prompts, max_new_tokens, finished, **settings):
        finished.add(0)
        yield [(0, ord("x")), (1, ord("y")), (2, ord("z"))]
        # Shown when it is complete.
        assert capsys.readouterr().out == "ax\n"
        raise KeyboardInterrupt

    monkeypatch.setattr(predictor_module, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        predict.main(["--ckpt", endless, "--prompt_file", str(tmp_path / "p.txt")])
    assert capsys.readouterr().out == "\nby\n\ncz\n"


def test_a_byte_order_mark_is_no_part_of_a_prompt(endless, tmp_path):
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbfa\r\nb\r\n")
    (tmp_path / "p.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n{"text": "b"}')
    assert (
        read_prompts(str(tmp_path / "p.txt"))
        == read_prompts(str(tmp_path / "p.jsonl"))
        == ["a", "b"]
    )


@pytest.mark.parametrize(
    "name, content",
    [
        ("p.JSONL", b'{"prompt": "The"}\n{"text": "A"}\n'),
        ("p.ndjson", b'{"prompt": "The"}\n\n{"prompt": "A"}'),
        ("p.txt", b'{"prompt": "The"}\n{"prompt": "A"}\n'),
        ("p.txt", '{"prompt": "The"}\r\n{"prompt": "A"}\r\n'.encode("utf-16")),
        ("p.jsonl.gz", gzip.compress(b'{"prompt": "The"}\n{"prompt": "A"}\n', mtime=0)),
        ("p.json", b'[{"prompt": "The"},\n {"prompt": "A"}]'),
        ("p", b'[{"prompt": "The"}, {"prompt": "A"}]'),
        ("p", b"The\r\nA\r\n"),
    ],
)
def test_prompts_of_json_lines_whatever_the_name(tmp_path, name, content):
    """In a file named .JSONL or .ndjson, or a pipe, the JSON lines were taken as the prompts."""
    (tmp_path / name).write_bytes(content)
    assert read_prompts(str(tmp_path / name)) == ["The", "A"]
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=[content])
    writer.start()
    assert read_prompts(str(tmp_path / "pipe")) == ["The", "A"]
    writer.join()


def test_prompts_that_only_look_like_json(tmp_path):
    for lines in (["{", "The"], ["[1, 2]", "[3]"], ['[{"a": 1}, x', "]"], ['{"prompt": "a"}', "b"]):
        (tmp_path / "p.txt").write_text("\n".join(lines))
        assert read_prompts(str(tmp_path / "p.txt")) == lines


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no prompt: write one a line"),
        (b"\n \n", "holds no prompt"),
        (None, "cannot be read: No such file"),
        (b"a\n\xff", "line 2, byte 2: 0xff is not utf-8"),
        (b"a\0" * 20, "holds NUL bytes: it looks like utf-16-le .*; save the prompts as UTF-8"),
        (b'{"prompt": "a"}\n{"prompt": 1}\n', "line 2: not a JSON object"),
        (b"[]\n", "line 1.* not"),
        (b"{\n", "line 1.* not"),
        (b'{"a": 1}', "line 1.* not"),
        (b"[" * 100_000, "line 1.* not"),
    ],
)
def test_a_file_that_holds_no_prompts_is_one_line(endless, tmp_path, content, message):
    path = tmp_path / "p.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        predict.main(["--ckpt", endless, "--prompt_file", str(path)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prompt", "a", "--prompt_file", "b"], "give either prompt or prompt_file"),
        (["--prompt", "a", "--interactive"], "interactive asks for prompts itself"),
        (["--prompt", "a", "--compile"], "compile is for CUDA graphs, and this runs on cpu"),
        (
            ["--prompt", "a", "--num_samples", "2", "--show_experts"],
            "show_experts and experts_html are for one completion",
        ),
        (["--prompt_file", "a", "--experts_html", "x"], "are for one completion"),
        (["--interactive", "--num_samples", "2"], "num_samples is for a prompt"),
        (["--prompt", "a", "--quantize", "int2"], "invalid choice: 'int2'"),
    ],
)
def test_what_does_not_go_together_is_refused(endless, argv, message):
    with pytest.raises(ValueError, match=message):
        predict.main(["--ckpt", endless, "--device", "cpu", *argv])


def test_a_prompt_can_come_through_a_pipe(endless, monkeypatch, run):
    """All of it is one prompt, commands and newlines included, except for a file's last newline."""
    flags = ("--ckpt", endless, "--max_new_tokens", 4, "--seed", 1)
    for given, prompt in (
        (b"Once\n:q\nupon\n", "Once\n:q\nupon"),
        (b"a", "a"),
        (b"", ""),
        (b"\xff\r\n", "\ufffd"),
    ):
        monkeypatch.setattr(
            sys, "stdin", io.TextIOWrapper(io.BytesIO(given), encoding="utf-8", newline="")
        )
        assert run(*flags) == run(*flags, "--prompt", prompt)


# -------------------------------------------------------------------------------------- how it runs
@pytest.mark.parametrize("kind, dtype", [("int8", torch.int8), ("int4", torch.uint8)])
def test_quantized_weights_answer(endless, run, kind, dtype):
    predictor, config = predictor_of(endless, quantize=kind, temperature=0.0, max_new_tokens=8)
    assert (
        predictor.model.layers[0].moe.experts.w_in_packed.dtype is dtype
        and predictor.model.embed.weight.dtype is torch.float32
    )
    expected = greedy_ids(predictor.model, [END, *b"a prompt"], 8, banned_ids=predictor.banned_ids)
    assert "".join(predictor.stream("a prompt", config)) == BYTE.decode(expected)
    half, config = predictor_of(endless, quantize=kind, dtype="bfloat16", max_new_tokens=4)
    assert len(list(half.stream("a", config))) == 5


def test_look_up_gives_the_same_answer(endless, tmp_path, run):
    flags = (
        "--ckpt",
        endless,
        "--prompt",
        "abcabcabc",
        "--max_new_tokens",
        60,
        "--seed",
        2,
        "--temperature",
        0.5,
    )
    assert run(*flags, "--lookup", 4) == run(*flags)
    with pytest.raises(
        ValueError,
        match="lookup takes back tokens, and this model's windowed blocks keep only their window",
    ):
        predictor_of(save(tmp_path, biased_model(sliding_window=8)), lookup=2)


def test_threads_are_what_was_asked_for(endless):
    before = torch.get_num_threads()
    try:
        predictor_of(endless, num_threads=3)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_quiet_is_the_text_alone(endless, monkeypatch, capsys, run):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    predict.main(
        [
            "--ckpt",
            endless,
            "--prompt",
            "x" * 40,
            "--max_new_tokens",
            "50",
            "--quiet",
            "--device",
            "cpu",
        ]
    )
    out, err = capsys.readouterr()
    assert out.startswith("x" * 40) and err == ""
    predict.main(
        ["--ckpt", endless, "--prompt", "x" * 40, "--max_new_tokens", "50", "--device", "cpu"]
    )
    assert capsys.readouterr().err.count("note: ") == 2


# -------------------------------------------------------------------------------------- the experts
def test_experts_are_shown_for_the_text_that_was_generated(endless, tmp_path, run):
    """A map on stdout, a page in a file, numbers in JSON.

    All from the routers, for prompt and answer.
    """
    flags = ("--ckpt", endless, "--prompt", "ab", "--max_new_tokens", 4, "--seed", 3)
    text = run(*flags).removesuffix("\n")
    shown = run(*flags, "--show_experts", "--experts_html", tmp_path / "page.html")
    assert shown.startswith(text + "\n") and "block" in shown and "\x1b" not in shown
    page = (tmp_path / "page.html").read_text()
    assert page.lower().startswith("<!doctype html>") and "step_0000001.pt" in page
    record = json.loads(run(*flags, "--show_experts", "--json"))
    predictor, config = predictor_of(endless, max_new_tokens=4, seed=3)
    list(predictor.stream("ab", config))
    ids = [END, *b"ab"] + predictor.last.ids
    experts, gates = router_choices(predictor.model, ids)
    assert (
        record["experts"] == experts.tolist()
        and torch.allclose(torch.tensor(record["gates"]), gates)
        and experts.shape[1] == 7
    )
    with pytest.raises(ValueError, match="page.html/x cannot be written: "):
        run(*flags, "--experts_html", tmp_path / "page.html" / "x")


# -------------------------------------------------------------------------------------- the session
def test_a_text_can_be_gone_on_with_and_taken_back(endless, repl, drawn):
    """`+` continues prompt and answer; :undo takes back the last of both.

    A prompt begins a new text, and so does what follows :reset.
    """
    drawn.ids = list(b"xyz")
    out, err = repl(
        endless, "+\nab\n+ cd\n+\n:undo\n:undo\n+e\n:undo\n:undo\n:undo\n+\nnew\n:reset\n+\n"
    )
    prompts = [BYTE.decode(call[0][0][1:]) for call in drawn.calls]
    assert prompts == ["ab", "abxyz cd", "abxyz cdxyz", "abxyze", "new"] and err == ""
    assert out == (
        "there is no text to continue: type a prompt\nabxyz\n cdxyz\nxyz\ntaken back; the "
        "text so far: 'abxyz cdxyz'\ntaken back; the text so far: 'abxyz'\nexyz\n"
        "taken back; the text so far: 'abxyz'\ntaken back; there is no text now\nthere is no "
        "text yet\nthere is no text to continue: type a prompt\nnewxyz\n"
        "the next prompt starts a new text\nthere is no text to continue: type a prompt\n"
    )


def test_going_on_is_what_one_long_answer_is(endless, repl):
    """And what is in the cache is not read again."""
    long, _ = repl(endless, ":t 0\n:n 12\nstart\n")
    pieces, _ = repl(endless, ":t 0\n:n 4\nstart\n+\n+\n")
    assert "".join(pieces.splitlines()[2:]) == long.splitlines()[2]


def test_going_on_after_the_end_takes_the_end_away(endless, repl, drawn):
    drawn.ids = [*b"x", END]
    repl(endless, "ab\n+c\n")
    assert [call[0] for call in drawn.calls] == [[[END, *b"ab"]], [[END, *b"abxc"]]]


def test_going_on_after_a_stop_goes_on_from_what_is_shown(endless, repl, drawn):
    """The stop text was hidden from the reader but not from the model, which read "ab!x"."""
    drawn.ids = list(b"xy!z")
    repl(endless, ":n 9\n:stop !\nab\n+c\n")
    assert [BYTE.decode(call[0][0][1:]) for call in drawn.calls] == ["ab", "abxyc"]


def test_replies_do_not_stand_between_json_lines(endless, repl, drawn):
    drawn.ids = list(b"x")
    out, err = repl(endless, ":t 0\na\n:what\n:stats\n:undo\n", "--json")
    assert (
        [json.loads(line)["text"] for line in out.splitlines()] == ["x"]
        and "temperature = 0.0" in err
        and "unknown command :what" in err
    )


def test_an_answer_that_failed_can_be_asked_again(endless, repl, monkeypatch):
    def fails(*a, **k):
        raise RuntimeError("no memory")
        yield

    monkeypatch.setattr(predictor_module, "generate", fails)
    out, err = repl(endless, "ab\n+c\n:undo\n:undo\n")
    assert (
        err == "error: no memory\n" * 2
        and out == "ab\nc\ntaken back; the text so far: 'ab'\ntaken back; there is no text now\n"
    )


def test_a_session_can_be_saved(endless, repl, drawn, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    drawn.ids = list("é!".encode())
    out, _ = repl(
        endless,
        ":save a.txt\none\n+ two\nthree\n:save\n:save a.txt\n:save a.txt\n:save a.txt/b\n"
        ":save nul\0\n:reset\n:save b c.txt\n",
    )
    assert out.splitlines() == [
        "there is no text yet",
        "oneé!",
        " twoé!",
        "threeé!",
        "name a file: :save story.txt",
        "saved 2 texts in a.txt",
        "a.txt is there already: name another file",
        "a.txt/b cannot be written: File exists",
        "nul\\x00 cannot be written: embedded null byte",
        "the next prompt starts a new text",
        "saved 2 texts in b c.txt",
    ]
    assert (
        (tmp_path / "a.txt").read_text()
        == "oneé! twoé!\n\nthreeé!\n"
        == (tmp_path / "b c.txt").read_text()
    )


def test_stats_and_experts_answer(endless, repl):
    out, err = repl(endless, ":stats\n:experts\nab\n:stats\n:experts\n:stats 3\n:undo x\n")
    lines = out.splitlines()
    assert (
        lines[0] == "0 tokens drawn for 0 read"
        and "weights " in lines[1]
        and lines[2] == "there is no text yet"
        and err == ""
    )
    assert (
        lines[4].startswith("3 tokens drawn for 3 read, ")
        and lines[5].startswith("6 tokens of text, of which the model sees 6; weights ")
        and lines[-2:] == [":stats takes no value", ":undo takes no value"]
    )
    assert out.count("block") >= 1


def test_a_line_can_go_on_in_the_next(endless, repl, drawn):
    repl(endless, "one\\\ntwo\\\n\\\nthree\n:t \\\n0.5\nend\\")
    # What end-of-file cuts off is not a prompt.
    assert [BYTE.decode(call[0][0][1:]) for call in drawn.calls] == ["one\ntwo\n\nthree"]


# -------------------------------------------------------------------------------- as real processes
class Terminal:
    """predict.py on its own terminal (a pty), which passes all that is typed, Ctrl-C included."""

    def __init__(self, *argv: str, **variables: str):
        import fcntl
        import pty
        import termios

        self.ours, theirs = pty.openpty()

        def take_terminal():
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        environment = (
            os.environ
            | {
                "TERM": "dumb",
                "OMP_NUM_THREADS": "1",
                "INPUTRC": os.devnull,
                "XDG_STATE_HOME": os.devnull,
            }
            | variables
        )
        self.process = subprocess.Popen(
            [sys.executable, "predict.py", *argv],
            cwd=REPO,
            stdin=theirs,
            stdout=theirs,
            stderr=subprocess.DEVNULL,
            preexec_fn=take_terminal,
            env=environment,
        )
        os.close(theirs)
        self.seen = b""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.ours)

    def wait_for(self, text: bytes, seconds: float = 60) -> bytes:
        """Everything up to `text`, which must come."""
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            assert select.select([self.ours], [], [], max(0.0, deadline - time.monotonic()))[0], (
                f"{text!r} did not come after {self.seen[-500:]!r}"
            )
            try:
                self.seen += os.read(self.ours, 65536)
            except OSError:
                # Linux: the other end is closed.
                raise AssertionError(
                    f"the program ended before {text!r}, after {self.seen[-500:]!r}"
                ) from None
        before, _, self.seen = self.seen.partition(text)
        return before

    def type(self, keys: bytes) -> None:
        os.write(self.ours, keys)


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux", reason="needs a pty that can be a controlling terminal"
)
def test_a_session_on_a_terminal(tmp_path):
    """An endless answer, a real Ctrl-C, and the session continues.

    No control character of the model's reaches the terminal.
    """
    with Terminal(
        "--ckpt",
        save(tmp_path, biased_model(biases={END: -1e4} | dict.fromkeys(range(32), 3.0))),
        "--temperature",
        "2",
        "--top_k",
        "0",
        "--max_new_tokens",
        "100000000",
        "--seed",
        "1",
    ) as terminal:
        terminal.wait_for(b"active), step 1, ")
        terminal.wait_for(b":help for commands.")
        terminal.wait_for(b"> ")
        terminal.type(b"hello\n")
        # Its echo, then the answer.
        terminal.wait_for(b"hello\r\nhello")
        # An escape character, spelled out.
        answer = terminal.wait_for(b"\\x1b")
        terminal.type(b"\x03")
        answer += terminal.wait_for(b"\r\n> ")
        assert not set(answer) & set(range(32)) - set(b"\t\r\n"), answer
        terminal.type(b":t 0\n")
        # (Ctrl-C here is tested above: Python's readline can miss one that comes with the prompt.)
        terminal.wait_for(b"temperature = 0.0\r\n> ")
        terminal.type(b"exit\n")
        assert terminal.process.wait(60) == 0


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux", reason="needs a pty that can be a controlling terminal"
)
def test_what_was_typed_is_there_in_the_next_session(tmp_path, endless):
    """The up arrow returns the last session's last line; only this user can read the file."""
    # After it in the history is :q.
    for typed, seen in (
        (b"first prompt\n", b"first prompt\r\nfirst prompt"),
        (b"\x1b[A\x1b[A!\n", b"first prompt!"),
    ):
        with Terminal(
            "--ckpt",
            endless,
            "--max_new_tokens",
            "1",
            XDG_STATE_HOME=str(tmp_path),
            TERM="xterm",
            NO_COLOR="1",
        ) as terminal:
            terminal.wait_for(b"> ")
            terminal.type(typed)
            terminal.wait_for(seen)
            terminal.wait_for(b"> ")
            terminal.type(b":q\n")
            assert terminal.process.wait(60) == 0
    path = tmp_path / "gptoss" / "history"
    assert (
        path.read_text().splitlines() == ["first prompt", ":q", "first prompt!", ":q"]
        and path.stat().st_mode & 0o777 == 0o600
    )


ALONE = """
import socket, sys
from importlib.machinery import PathFinder

OPTIONAL = {
    "datasets", "tokenizers", "matplotlib", "transformers", "wandb", "tensorboard", "pyarrow",
    "pandas",
}

class Without:
    def find_spec(self, name, path=None, target=None):
        missing = name.split(".")[0] in OPTIONAL
        return None if missing else PathFinder.find_spec(name, path, target)

def no_network(*_):
    raise AssertionError("a connection was tried")

sys.meta_path[sys.meta_path.index(PathFinder)] = Without()
socket.socket.connect = socket.socket.connect_ex = no_network
socket.getaddrinfo = socket.create_connection = no_network

from runtime.base import cli
import predict
import test

def main(argv):
    byte, bpe, prompt = argv
    for ckpt in (byte, bpe):
        more = "--max_new_tokens", "5", "--seed", "1", "--device", "cpu"
        predict.main(["--ckpt", ckpt, "--prompt", prompt, *more])
    print("REPL")
    predict.main(["--ckpt", bpe, "--max_new_tokens", "2", "--device", "cpu", "--interactive"])
    test.main([])
    print("threads and no network: done")

cli.run_main(main)
"""


@pytest.mark.slow
def test_it_needs_no_network_and_no_optional_library_and_any_console_will_do(
    endless, bpe, tmp_path
):
    """Sockets and optional libraries blocked, an ascii console, a prompt that is not UTF-8.

    Also a REPL whose input is neither.
    """
    (tmp_path / "alone.py").write_text(ALONE)
    environment = os.environ | {
        "PYTHONPATH": str(REPO),
        "PYTHONIOENCODING": "ascii",
        "OMP_NUM_THREADS": "1",
        "TIKTOKEN_CACHE_DIR": str(tmp_path / "none"),
    }
    done = subprocess.run(
        [sys.executable, "alone.py", endless, bpe[1], b"caf\xc3\xa9 \xff"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        timeout=120,
        input="naïve \udcff\n:t 0\n:q\n".encode("utf-8", "surrogateescape"),
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.decode("ascii").splitlines()
    assert done.stdout.startswith(b"caf") and "REPL" in lines and "temperature = 0.0" in lines
    assert (
        any("3,664,132,435" in line for line in lines)
        and lines[-1] == "threads and no network: done"
    )
    assert all(line.startswith(b"note: ") for line in done.stderr.splitlines()), done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_gives_the_cpus_greedy_answer(endless):
    answers = []
    for device in ("cpu", "cuda"):
        config = PredictConfig(
            ckpt=endless, device=device, dtype="float32", temperature=0.0, max_new_tokens=20
        )
        answers.append("".join(Predictor(config).stream("a prompt", config)))
    assert answers[0] == answers[1]
    config = PredictConfig(ckpt=endless, device="cuda", seed=3, max_new_tokens=40)
    predictor = Predictor(config)
    assert predictor.model.embed.weight.dtype in (torch.bfloat16, torch.float16)
    assert list(predictor.stream("a", config)) == list(predictor.stream("a", config))
