"""runtime/cpu_decode: the C kernel gives the plain model's logits, whatever the architecture.

It is built and kept with care.
"""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import weakref

import pytest
import torch

import runtime.inference.cpu_decode as cpu_decode
from model_parts import KVCache
from runtime.inference.cpu_decode import native_model
from runtime.inference.decoder import Decoder
from runtime.inference.quantize import KINDS, quantize_
from runtime.kernels import compile
from tests import children
from tests.builders import random_model, tiny_config
from tests.conftest import REPO
from tests.nightly import nightly_but
from tests.numeric import before_ties
from tests.shared_checks import HAS_CODE, WHY_NOT, check_native_logits, close, needs_code

if os.environ.get("CI") and sys.platform == "linux":
    assert HAS_CODE, WHY_NOT


@needs_code
@pytest.mark.parametrize("seed", range(60))
def test_it_gives_the_plain_models_logits(seed):
    """Random architectures, many texts of different lengths at once, in 1 to 3 threads.

    Packed or not. They are read in chunks of many tokens or one by one.
    """
    check_native_logits(seed)


@needs_code
def test_matrices_that_no_cache_holds_are_read_in_blocks():
    """One has more rows than stay in a cache while inputs pass (BLOCK_BYTES)."""
    config = tiny_config(d_model=40, d_ff=1100, num_experts=2, vocabulary_size=2000)
    model = random_model(config, 3)
    native, _ = native_model(model)
    ids = torch.randint(2000, (1, 30), generator=torch.Generator().manual_seed(0))
    is_sure = before_ties(model, ids)[0]
    assert is_sure.sum() > 20
    logits = native.forward(KVCache(config, 1, 30).rows(), ids.tolist(), True)
    assert close(logits[is_sure], model(ids).logits[0][is_sure], model)


@needs_code
def test_a_text_can_go_from_pytorch_to_c_and_back():
    """Texts share the cache; many rows are tiled, few are not: all chunk sizes agree."""
    model = random_model(
        tiny_config(d_model=32, d_ff=48, num_experts=4, context_length=300, vocabulary_size=50), 1
    )
    native, _ = native_model(model)
    ids = torch.randint(0, 50, (1, 250), generator=torch.Generator().manual_seed(0))
    cache, expected, at = KVCache(model.config, 1, 300), model(ids).logits[0], 0
    is_sure = before_ties(model, ids)[0]
    # Chunks of all sizes.
    assert is_sure[:130].all()
    for i, T in enumerate([3, 1, 9, 70, 8, 1, 129, 1, 4, 24]):
        chunk = ids[:, at : at + T]
        logits = (
            model(chunk, cache=cache).logits[0]
            if i % 2
            else native.forward([cache], chunk.tolist(), all_logits=True)
        )
        sure = is_sure[at : at + T]
        assert not sure.any() or close(logits[sure], expected[at : at + T][sure], model)
        at += T
    assert at == 250


@needs_code
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("chunk", [1, 12])
@pytest.mark.parametrize("packed", ["", *KINDS])
def test_what_is_not_a_number_is_not_hidden(bad, chunk, packed):
    """A bound on the softmax's exponent made NaN scores count as 0.

    A damaged weight gave text, and no error.
    """
    model = random_model(tiny_config(context_length=64))
    with torch.no_grad():
        model.embed.weight[7] = bad
    native, _ = native_model(quantize_(model, packed) if packed else model)
    cache, ids = KVCache(model.config, 1, 64), [1, 2, 3, 7, 4, 5, 6, 8, 9, 1, 2, 3]
    for first in range(0, 12, chunk):
        logits = native.forward([cache], [ids[first : first + chunk]])
    assert not torch.isfinite(logits.sum())


@needs_code
def test_scores_of_any_size_are_weighed_as_pytorch_does():
    """Softmax by our own exponential function, far below the largest, far above, and negative.

    Also over contexts that do not fill a vector.
    """
    model = random_model(tiny_config(context_length=128, use_attention_bias=True), 3)
    with torch.no_grad():
        for block, size in zip(model.layers, (30.0, 300.0), strict=False):
            block.attention.attention_bias.normal_(
                0, size, generator=torch.Generator().manual_seed(1)
            )
    native, _ = native_model(model)
    ids = torch.randint(
        0, model.config.vocabulary_size, (1, 77), generator=torch.Generator().manual_seed(0)
    )
    logits = native.forward([KVCache(model.config, 1, 128)], ids.tolist(), all_logits=True)
    assert close(logits, model(ids).logits[0], model)


@needs_code
def test_what_it_cannot_do_is_said_and_what_is_wrong_is_refused():
    config = tiny_config()
    assert (
        native_model(random_model(config).double())[1] == "native decoding is for float32 on a CPU"
    )
    assert native_model(random_model(config).bfloat16())[0] is None
    native, _ = native_model(random_model(config))
    cache = KVCache(config, 1, 4)
    for bad in ([-1], [config.vocabulary_size], []):
        with pytest.raises(ValueError, match="token ids must be from 0 to"):
            native.forward([cache], [bad])
    with pytest.raises(ValueError, match="the KV cache holds 4 tokens"):
        native.forward([cache], [[1] * 5])
    # Assertions stood for these, and python -O leaves them out.
    with pytest.raises(ValueError, match="one contiguous row of float32"):
        native.forward([KVCache(config, 1, 4, torch.float64)], [[1]])
    windows, _ = native_model(random_model(tiny_config(sliding_window=2)))
    ring = KVCache(windows.config, 1, 8)
    with pytest.raises(ValueError, match="a ring loses keys"):
        windows.forward([ring], [[1, 2]])
    assert cache.length == ring.length == 0
    native, _ = native_model(random_model(tiny_config(context_length=8, use_attention_bias=True)))
    # It read past the table.
    with pytest.raises(
        ValueError, match="9 tokens do not fit the context of 8: this model adds a learned bias"
    ):
        native.forward([KVCache(native.config, 1, 16)], [[1] * 9])


@needs_code
def test_bytes_per_token_are_those_of_the_weights_that_a_token_reads():
    config = tiny_config(expert_bias=True, head_bias=True, out_proj_bias=True)
    model = random_model(config)
    native, _ = native_model(model)
    expected = 0
    for name, p in model.named_parameters():
        share = 1.0
        if ".experts." in name:
            share = config.top_k / config.num_experts
        elif name == "embed.weight":
            share = 1 / config.vocabulary_size
        elif "norm" in name:
            share = 0.0
        expected += share * p.numel() * 4
    assert native.bytes_per_token() == pytest.approx(expected)
    quantized, _ = native_model(quantize_(random_model(config)))
    assert 0.25 * expected < quantized.bytes_per_token() < 0.5 * expected
    for kind in KINDS:
        model = quantize_(random_model(config), kind)
        expected = 0.0
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            share = 1.0
            if ".experts." in name:
                share = config.top_k / config.num_experts
            elif name == "embed.weight":
                share = 1 / config.vocabulary_size
            elif "norm" in name:
                share = 0.0
            expected += share * tensor.nbytes
        native, _ = native_model(model)
        assert native.bytes_per_token() == pytest.approx(expected)


@needs_code
def test_a_decoder_that_nobody_uses_is_gone():
    """A cache kept each one, its model and working memory: a run that is scored makes four a time.

    On a nano model each validation then held twenty megabytes more, and a roll back the old model.
    """
    model = random_model(tiny_config())
    native, _ = native_model(model)
    native.forward([KVCache(model.config, 1, 16)], [[1, 2, 3]])
    held = [weakref.ref(model), weakref.ref(native)]
    del model, native
    gc.collect()
    assert [one() for one in held] == [None, None]


# ------------------------------------------------------------------------------------- the compiler
@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """library() as in a new process, with a cache folder of its own; code that is soon compiled."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("GPTOSS_CFLAGS", "-O0")
    cpu_decode.library.cache_clear()
    yield tmp_path / "gptoss"
    cpu_decode.library.cache_clear()


@pytest.mark.slow
@needs_code
def test_it_is_compiled_once_and_kept(fresh, monkeypatch):
    assert cpu_decode.library()[0] is not None
    (path,) = fresh.iterdir()
    assert path.name.startswith("cpu_decode_") and fresh.stat().st_mode & 0o777 == 0o700
    cpu_decode.library.cache_clear()

    def no_compiler(*_, **__):
        raise AssertionError("compiled again")

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", no_compiler)
        assert cpu_decode.library()[0] is not None
    # Not written over: this process has it mapped.
    path.unlink()
    path.write_bytes(b"cut short")
    path.chmod(0o755)
    script = "import runtime.inference.cpu_decode as c; print(c.library()[0] is not None)"
    # It is made again.
    assert children.run(["-c", script]).stdout == "True\n" and path.stat().st_size > 1000


@needs_code
def test_flags_of_ones_own_come_last_and_make_another_file(fresh, monkeypatch):
    """GPTOSS_CFLAGS can undo -march=native only if it comes after it.

    Code compiled with other flags is never taken instead.
    """
    commands, real = [], subprocess.run
    monkeypatch.setattr(
        subprocess, "run", lambda command, **more: commands.append(command) or real(command, **more)
    )
    for flags in ("", "-O0 -fno-tree-vectorize"):
        monkeypatch.setenv("GPTOSS_CFLAGS", flags)
        cpu_decode.library.cache_clear()
        assert cpu_decode.library()[0] is not None
    assert len(list(fresh.iterdir())) == len(commands) == 2
    at = next(i for i, flag in enumerate(commands[1]) if flag.endswith("=native"))
    assert (
        commands[1][at + 1 : at + 3] == ["-O0", "-fno-tree-vectorize"] and "-O0" not in commands[0]
    )
    monkeypatch.setenv("GPTOSS_CFLAGS", "-no-such-flag")
    cpu_decode.library.cache_clear()
    assert "could not be compiled" in cpu_decode.library()[1]


@needs_code
@pytest.mark.parametrize("what", nightly_but(["folder", "file", "link"], 2))
def test_code_is_taken_from_nobody_else(fresh, what, tmp_path):
    """The name of the compiled code can be guessed.

    In a folder that others can write to, their code was loaded.
    """
    assert cpu_decode.library()[0] is not None
    (path,) = fresh.iterdir()
    if what == "link":
        path.rename(tmp_path / "elsewhere.so")
        path.symlink_to(tmp_path / "elsewhere.so")
    else:
        (fresh if what == "folder" else path).chmod(0o777)
    cpu_decode.library.cache_clear()
    code, why = cpu_decode.library()
    assert (
        code is None
        and why.startswith(str(fresh))
        and why.endswith(
            "is not this user's alone, and code is not taken from there: remove it, or set "
            "XDG_CACHE_HOME"
        )
    )


@pytest.mark.skipif(sys.platform == "win32", reason="has no native decoding")
@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("none", "there is no C compiler"),
        ("broken", "could not be compiled: this compiler is broken"),
        ("folder", "could not be compiled: .*"),
    ],
)
def test_without_a_working_compiler_pytorch_goes_on(fresh, monkeypatch, how, why, tmp_path):
    """Without a compiler, with a broken one, or with a read-only home the text is the same.

    `:stats` says why it is slower.
    """
    monkeypatch.delenv("CC", raising=False)
    if how == "none":
        monkeypatch.setattr(compile.shutil, "which", lambda name: None)
    elif how == "broken":
        (tmp_path / "cc").write_text("#!/bin/sh\necho this compiler is broken >&2\nexit 1\n")
        (tmp_path / "cc").chmod(0o755)
        monkeypatch.setenv("CC", str(tmp_path / "cc"))
    else:
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    decoder = Decoder(random_model(tiny_config()))
    assert decoder.native is None
    assert re.search(why, decoder.why_not_native)


@pytest.mark.nightly
@needs_code
@pytest.mark.parametrize("build", ["oldest", "checked"])
def test_any_processor_will_do_and_no_memory_is_overrun(tmp_path, build):
    """Compile for the oldest x86-64, without this machine's vectors.

    And with the compiler's checks on. Those check memory and arithmetic. Each buffer is an
    allocation of its own, so running out of one is seen.
    """
    if not sys.platform.startswith("linux"):
        pytest.skip("a Linux compiler's flags")

    def library_file(name: str) -> str:
        command = [*(os.environ.get("CC") or "cc").split(), f"-print-file-name={name}"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    variables = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    flags = ["-march=x86-64"] if os.uname().machine == "x86_64" else []
    if build == "checked":
        flags = ["-march=native", "-fsanitize=undefined", "-fno-sanitize-recover=all"]
        checker = library_file("libasan.so")
        if os.path.isabs(checker):
            flags.append("-fsanitize=address")
            # With the C++ library: Triton throws an exception when it is imported, and the checker
            # ends a process that throws without one.
            preload = f"{checker} {library_file('libstdc++.so')}"
            variables |= {"LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0"}
    script = tmp_path / "script.py"
    script.write_text(f"""
import subprocess, sys
sys.path.insert(0, {str(REPO)!r})
import torch
import runtime.inference.cpu_decode as c
real = subprocess.run
def run(command, **more):
    return real([a for a in command if a != "-march=native"] + {flags!r}, **more)
subprocess.run = run
from tests.inference.test_cpu_decode import test_it_gives_the_plain_models_logits as check
from tests.inference.test_cpu_decode import (
    test_a_text_can_go_from_pytorch_to_c_and_back as shared,
)
from tests.inference import test_company as company
code, why = c.library()
assert code is not None, why
for name in ("SwiGLU, 72", "sinks and windows"):
    company.test_each_text_names_its_rows_and_what_is_scored_there(code, name)
    company.test_a_token_is_the_same_bits_in_any_company(code, name, packed=False)
company.test_a_row_may_be_named_more_than_once(code)
for V in (3, 17):
    company.test_scores_of_equal_logits_are_those_of_the_vocabulary(code, V)
for seed in range(100, 112):
    check(seed)
shared()
from tests.kernels import test_cpu_attention, test_loss_in_c, test_newton_schulz
from tests.kernels import test_routed_experts
for shape in test_routed_experts.SHAPES:
    for activation in test_routed_experts.ACTIVATIONS:
        test_routed_experts.check(activation, True, shape, torch.float32)
for shape in test_loss_in_c.SHAPES:
    test_loss_in_c.check(shape, True, torch.float32)
for shape in test_newton_schulz.SHAPES:
    test_newton_schulz.check(shape, torch.float32)
for mask in test_cpu_attention.MASKS:
    for T in (1, 49, 97):
        test_cpu_attention.test_it_equals_plain_attention(mask, T)
print("the same")
""")
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | variables,
    )
    assert done.stdout == "the same\n", done.stderr[-2000:]
