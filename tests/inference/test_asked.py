"""runtime/asked: a fast way that gives other logits than the plain model is not used.

One that gives the same always is.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import types

import pytest
import torch

import model_parts
import predict
from benchmarks import asked as benchmark
from config_model import TrainConfig, kv_cache_bytes_per_token
from model import generate as plain_generate
from model_parts import KVCache
from runtime.checkpoint.read import read_checkpoint
from runtime.checkpoint.write import save_checkpoint
from runtime.data.tokenizers import load_tokenizer
from runtime.inference import asked, cpu_decode, predictor
from runtime.inference import decoder as inference
from runtime.inference.decoder import KNOWS, Decoder, decode_step, generate
from runtime.inference.quantize import KINDS, quantize_
from runtime.kernels.choose import choose_kernels
from tests.builders import random_architecture, random_config, random_model, tiny_config
from tests.conftest import REPO
from tests.implementations import at_default
from tests.shared_checks import needs_code

BYTE = load_tokenizer("byte")
# All that attention, routers and experts may have; a window shorter than the texts that are read.
EVERYTHING = dict(
    context_length=128,
    qk_norm=True,
    qkv_bias=True,
    out_proj_bias=True,
    head_bias=True,
    expert_bias=True,
    router_bias=True,
    router_bias_rate=0.1,
    attention_sinks=True,
    sliding_window=5,
    window_pattern="alternating",
    use_attention_bias=True,
    transformer_blocks=2,
)


def everything(seed: int = 0, **changes):
    return random_model(tiny_config(**EVERYTHING | changes), seed).eval()


# ------------------------------------------------------------------------------ what is right stays
@pytest.mark.parametrize("seed", range(40))
def test_what_is_right_is_used(seed):
    """Over random architectures, packed or not: no fast way steps aside because of rounding."""
    r = random.Random(seed)
    config = random_config(seed) if seed % 2 else random_architecture(r)
    config = at_default(config, "C decoder", "decode_step")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = random_model(config, seed).to(dtype)
        choose_kernels(model, torch.device("cpu"), dtype)
        if seed % 3:
            quantize_(model, KINDS[seed % 3 - 1])
        decoder = Decoder(model, native=False)
        assert decoder.why_not_step == "", dtype
        if dtype == torch.float32 and cpu_decode.library()[0]:
            assert Decoder(model).native is not None, Decoder(model).why_not_native


def test_many_rows_and_one_are_asked_of_a_gpus_step(monkeypatch):
    """A GPU's step reads the chosen experts' matrices for few rows and all of them for many.

    Both are asked.
    """
    model, rows = everything(num_experts=8, top_k=2), []
    step = inference.decode_step
    monkeypatch.setattr(
        inference,
        "decode_step",
        lambda model, cache, ids_B, *rest: (
            rows.append(len(ids_B)) or step(model, cache, ids_B, *rest)
        ),
    )
    decoder = Decoder(model, native=False)
    assert rows == [2] and asked._rows(decoder) == [2]
    decoder.device = torch.device("cuda")
    assert asked._rows(decoder) == [1, 4]
    monkeypatch.setattr(asked, "_rows", lambda decoder: [1, 5])
    rows.clear()
    assert Decoder(model, native=False).why_not_step == "" and rows == [1, 5]


def test_asking_leaves_nothing_behind():
    """No hooks on the routers, the experts' operation in its place, no texts, no graphs."""
    model = everything()
    choose_kernels(model, torch.device("cpu"), torch.float32)
    before = [block.moe.experts.feed_forward for block in model.layers]
    decoder = Decoder(model)
    assert [block.moe.experts.feed_forward for block in model.layers] == before and before[
        0
    ] is not None
    assert not any(module._forward_hooks for module in model.modules())
    assert decoder._whole is None and "_replay" not in vars(decoder) and not decoder.compiles
    assert not model.training and all(p.requires_grad for p in model.parameters())
    assert decoder.native is None or decoder.native.planes == 1


def test_a_context_of_one_token_is_asked_too():
    for changes in (
        dict(context_length=1),
        dict(context_length=2, use_attention_bias=True),
        dict(context_length=3, sliding_window=1),
    ):
        decoder = Decoder(random_model(tiny_config(**changes)))
        assert decoder.why_not_step == "" and (decoder.native is not None) == (
            cpu_decode.library()[0] is not None
        )


@pytest.mark.slow
@needs_code
def test_asking_does_not_wait_for_pytorchs_compiler():
    """The first call of a custom operation imports it.

    predict.py would have started a second later, for a check.
    """
    code = (
        "import sys, torch; from tests.builders import *; from runtime.inference.decoder "
        "import Decoder\n"
        "from runtime.kernels.choose import choose_kernels\n"
        "from runtime.checkpoint.format import meta_model\n"
        "model = meta_model(tiny_config()).to_empty(device='cpu')\n"
        "[torch.nn.init.constant_(p, 0.1) for p in model.parameters()]\n"
        "choose_kernels(model, torch.device('cpu'), torch.float32)\n"
        "assert 'torch._dynamo' not in sys.modules\n"
        "assert Decoder(model).native is not None and 'torch._dynamo' not in sys.modules"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr[-2000:]


# ------------------------------------------------------------------------ what is wrong steps aside
def faulty_block(name: str, change):
    """NativeModel._block with one thing changed."""
    right = cpu_decode.NativeModel._block

    def block(self, given):
        made = right(self, given)
        setattr(made, name, change(getattr(made, name)))
        return made

    return block


@needs_code
@pytest.mark.parametrize(
    "name, change",
    [
        ("sinks", lambda p: None),
        ("router_bias", lambda p: None),
        ("selection_bias", lambda p: None),
        ("attention_bias", lambda p: None),
        ("q_norm", lambda p: None),
        ("window", lambda window: window and window - 1),
        ("window", lambda window: window and window + 1),
    ],
    ids=["sinks", "router bias", "expert bias", "table", "norm", "window shorter", "window longer"],
)
def test_each_part_of_the_c_decoder_is_asked(name, change, monkeypatch):
    """Left out or off by one, each part shows in the few tokens. What is used then is right."""
    monkeypatch.setattr(cpu_decode.NativeModel, "_block", faulty_block(name, change))
    decoder = Decoder(everything())
    assert (
        decoder.native is None
        and "the C decoder's logits are not the plain model's: they differ by"
        in decoder.why_not_native
    )
    assert (
        decoder.why_not_step == ""
        and decoder.note == f"PyTorch decodes, which is slower: {decoder.why_not_native}"
    )


@needs_code
def test_the_order_of_texts_is_asked(monkeypatch):
    """Two texts are continued together: answers that are exchanged are found."""
    right = cpu_decode.NativeModel.forward
    monkeypatch.setattr(
        cpu_decode.NativeModel, "forward", lambda self, *given: right(self, *given).flip(0)
    )
    assert "differ by" in Decoder(everything()).why_not_native


def wrong_step(change):
    right = inference.decode_step
    return lambda model, cache, ids_B, positions_B, span: change(
        right, model, cache, ids_B, positions_B, span
    )


STEPS = {
    "another position": lambda right, m, cache, ids, positions, span: right(
        m, cache, ids, positions + 1, span
    ),
    "the first row's position": lambda right, m, cache, ids, positions, span: right(
        m, cache, ids, positions[:1].expand(len(ids)), span
    ),
    "part of the keys": lambda right, m, cache, ids, positions, span: right(
        m, cache, ids, positions, span - 1
    ),
    "other numbers": lambda right, *given: right(*given) * 1.01,
}


@pytest.mark.parametrize("name", STEPS)
def test_a_wrong_step_gives_way_to_the_plain_model(name, monkeypatch):
    """Several texts of different lengths are then stepped one by one, some of them or all.

    Generated text is the plain model's.
    """
    model = everything(sliding_window=0, window_pattern="all")
    monkeypatch.setattr(inference, "decode_step", wrong_step(STEPS[name]))
    decoder = Decoder(model, native=False)
    assert decoder.why_not_step.startswith(
        "decode_step's logits are not the plain model's: they differ by"
    )
    assert (
        decoder.note
        == f"the plain model decodes, text by text, which is slowest: {decoder.why_not_step}"
    )
    prompts = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [10, 11], [12, 13, 14]]
    texts = decoder.texts(3, 60)
    drawn: list[list[int]] = [[], [], []]
    for pairs in generate(decoder, texts, prompts, 20, temperature=0):
        for row, token in pairs:
            drawn[row].append(token)
    for prompt, ids in zip(prompts, drawn, strict=True):
        assert ids == [
            int(i) for i in plain_generate(model, torch.tensor([prompt]), 20, temperature=0)
        ]
    lengths = [text.cache.length for text in texts]
    logits_BV = decoder.step([texts[2], texts[0]], torch.tensor([3, 4]))
    for row, id, logits_V in ((2, 3, logits_BV[0]), (0, 4, logits_BV[1])):
        ids = prompts[row] + drawn[row][: lengths[row] - len(prompts[row])] + [id]
        cache = KVCache(model.config, 1, 64)
        expected = model(torch.tensor([ids]), cache=cache).logits[0, -1]
        assert asked.difference(expected[None], logits_V[None]) <= asked.explained(model)
    assert [text.cache.length for text in texts] == [lengths[0] + 1, lengths[1], lengths[2] + 1]


def test_a_way_that_fails_steps_aside_with_a_line(monkeypatch):
    def fails(*given):
        raise RuntimeError("no such\n kernel")

    monkeypatch.setattr(inference, "decode_step", fails)
    assert (
        Decoder(everything(), native=False).why_not_step
        == "decode_step fails on this model: no such kernel"
    )

    def full(*given):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(inference, "decode_step", full)
    # It is no fault of the way.
    with pytest.raises(torch.OutOfMemoryError):
        Decoder(everything(), native=False)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_a_narrow_step_is_asked_with_the_same_experts(narrow, monkeypatch):
    """In bfloat16 rounding alone sends tokens to other experts.

    An error of a tenth has to be seen all the same.
    """
    model = everything(num_experts=8, top_k=2).to(narrow)
    assert Decoder(model, native=False).why_not_step == ""
    monkeypatch.setattr(inference, "decode_step", wrong_step(STEPS["the first row's position"]))
    assert "decode_step's logits" in Decoder(model, native=False).why_not_step


def test_a_step_is_asked_with_the_experts_that_the_plain_model_chose(monkeypatch):
    """Other routers in the fast way change nothing: what they choose is said to them.

    In bfloat16, rounding alone makes routers choose otherwise, and a right step would be left out.
    """
    right = inference.decode_step

    def with_other_routers(model, *given):
        weights = [block.moe.router.weight for block in model.layers]
        for weight in weights:
            weight.neg_()
        try:
            return right(model, *given)
        finally:
            for weight in weights:
                weight.neg_()

    monkeypatch.setattr(inference, "decode_step", with_other_routers)
    assert Decoder(everything(num_experts=8, top_k=2), native=False).why_not_step == ""


@needs_code
@pytest.mark.parametrize("is_tie", [True, False])
def test_two_experts_that_are_equally_good_are_no_difference(is_tie, monkeypatch):
    """The router gives experts 0 and 1 the same score, so either may be chosen.

    Here C has the two exchanged: that is no fault where they tie, and one where they do not. Tokens
    that went to expert 2 are compared in both cases.
    """
    model = random_model(tiny_config(num_experts=3, top_k=1), 3)
    # One block with a choice is enough.
    for block in model.layers[1:]:
        with torch.no_grad():
            block.moe.experts.w_in[:] = block.moe.experts.w_in[0]
            block.moe.experts.w_out[:] = block.moe.experts.w_out[0]
    if is_tie:
        with torch.no_grad():
            model.layers[0].moe.router.weight[1] = model.layers[0].moe.router.weight[0]
            model.layers[1].moe.router.weight[2] += 1.0
    right = cpu_decode.NativeModel._block

    def exchanged(self, block):
        made = right(self, block)
        for name in ("w_in", "w_out"):
            weight = getattr(block.moe.experts, name).detach()[[1, 0, 2]]
            setattr(made, name, self._matrix(types.SimpleNamespace(**{name: weight}), name))
        return made

    monkeypatch.setattr(cpu_decode.NativeModel, "_block", exchanged)
    said, real = [], asked.difference
    monkeypatch.setattr(
        asked,
        "difference",
        lambda *given: said.append((real(*given), len(given[0]))) or said[-1][0],
    )
    decoder, limit = Decoder(model), asked.explained(model)
    assert said[0][0] > limit and len(said) > 1, "the exchange has to show"
    assert (decoder.native is not None) == is_tie
    assert said[0][1] > said[1][1] > 0 if is_tie else said[1][0] > limit


def test_logits_that_are_not_numbers_count_where_one_side_has_them():
    nan, one = torch.full((1, 3), torch.nan), torch.ones(1, 3)
    assert asked.difference(torch.cat((nan, one)), torch.cat((nan, one))) == 0.0
    assert asked.difference(nan, torch.full((1, 3), torch.inf)) == 0.0
    assert asked.difference(torch.cat((nan, one)), torch.cat((one, one))) == torch.inf
    assert asked.difference(torch.cat((one, one)), torch.cat((nan, one))) == torch.inf
    assert asked.difference(one, one * 1.5) == pytest.approx(0.5)


@pytest.mark.parametrize("native", [True, False])
def test_damaged_weights_are_still_an_error_of_their_own(native):
    """Neither way has finite logits: no way steps aside.

    Drawing says that the weights are damaged.
    """
    model = everything()
    with torch.no_grad():
        model.layers[0].norm1.weight[0] = torch.nan
    decoder = Decoder(model, native=native)
    assert decoder.why_not_step == "" and (decoder.native is not None) == (
        native and cpu_decode.library()[0] is not None
    )
    with pytest.raises(ValueError, match="logits are not finite"):
        list(generate(decoder, decoder.texts(1, 32), [[1, 2, 3]], 4))


# ------------------------------------------------------------------------------------- what is kept
@pytest.fixture
def asks(tmp_path, monkeypatch):
    """How often a way was asked; every file is a large one, and the cache folder is a new one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(asked, "LARGE_BYTES", 0)
    calls, real = [], asked.ask
    monkeypatch.setattr(
        asked,
        "ask",
        lambda decoder, step, known: calls.append(known.what) or real(decoder, step, known),
    )
    return calls


def kept(folder) -> list:
    return sorted((folder / "gptoss").glob("asked_*.json"))


def test_a_large_file_is_asked_once_and_again_when_anything_changes(asks, tmp_path, monkeypatch):
    """Under the digests of the weights and of our sources, and all that chooses a way."""
    model = everything()
    for _ in range(3):
        Decoder(model, native=False, weights="a" * 64)
    assert asks == ["decode_step"] and len(kept(tmp_path)) == 1
    Decoder(model, native=False, weights="b" * 64)
    Decoder(everything(rope_theta=500.0), native=False, weights="a" * 64)
    Decoder(everything().bfloat16(), native=False, weights="a" * 64)
    for kind in KINDS:
        Decoder(quantize_(everything(), kind), native=False, weights="a" * 64)
    assert len(asks) == 6 and len(kept(tmp_path)) == 6
    monkeypatch.setattr(asked, "_sources", lambda: "another version")
    Decoder(model, native=False, weights="a" * 64)
    assert len(asks) == 7


def test_models_made_in_memory_and_small_files_are_always_asked(asks, tmp_path, monkeypatch):
    model = everything()
    for _ in range(2):
        Decoder(model, native=False)
    assert len(asks) == 2 and kept(tmp_path) == []
    monkeypatch.setattr(asked, "LARGE_BYTES", 1 << 26)
    for _ in range(2):
        Decoder(model, native=False, weights="a" * 64)
    assert len(asks) == 4 and kept(tmp_path) == []


def test_a_kept_refusal_is_said_again(asks, monkeypatch):
    with monkeypatch.context() as wrong:
        wrong.setattr(inference, "decode_step", wrong_step(STEPS["other numbers"]))
        first = Decoder(everything(), native=False, weights="a" * 64)
    second = Decoder(everything(), native=False, weights="a" * 64)
    assert len(asks) == 1 and first.why_not_step == second.why_not_step != ""


@pytest.mark.parametrize("text", ["", "{", "[]", '{"step": 3}', "\x00"])
def test_a_damaged_answer_is_asked_for_again(asks, tmp_path, text):
    Decoder(everything(), native=False, weights="a" * 64)
    (path,) = kept(tmp_path)
    path.write_text(text)
    assert Decoder(everything(), native=False, weights="a" * 64).why_not_step == ""
    assert len(asks) == 2 and json.loads(path.read_text()) == {"step": ""}


def test_old_answers_go_and_a_folder_that_cannot_be_written_costs_nothing_else(
    asks, tmp_path, monkeypatch
):
    monkeypatch.setattr(asked, "MOST_KEPT", 2)
    for number in range(5):
        Decoder(everything(), native=False, weights=str(number))
    assert len(kept(tmp_path)) <= 3
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert Decoder(everything(), native=False, weights="new").why_not_step == ""


@pytest.mark.parametrize(
    "changed",
    [
        "model_parts.py",
        "config_model.py",
        "model.py",
        "runtime/inference/cpu_decode.c",
        "runtime/inference/decoder.py",
    ],
)
def test_the_sources_digest_covers_what_computes(changed, tmp_path, monkeypatch):
    """An answer of an older version of any of these would be believed for ever."""
    shutil.copytree(REPO / "runtime", tmp_path / "runtime")
    for name in ("model_parts.py", "config_model.py", "model.py"):
        shutil.copyfile(REPO / name, tmp_path / name)
    monkeypatch.setattr(asked, "__file__", str(tmp_path / "runtime" / "inference" / "asked.py"))
    before = asked._sources.__wrapped__()
    (tmp_path / changed).write_text("# another\n")
    assert len(before) == 64 and asked._sources.__wrapped__() != before


# ---------------------------------------------------------------------------- predict.py, benchmark
@needs_code
def test_no_c_kernel_turns_the_c_code_off(tmp_path, capsys, monkeypatch):
    """The same text by PyTorch, without a note, for it was asked for; and no compiler is called."""
    model = random_model(tiny_config(vocabulary_size=260, context_length=64))
    path = save_checkpoint(
        tmp_path, 1, model, None, train_config=TrainConfig(), tokenizer_state=BYTE.to_state()
    )
    argv = ["--ckpt", str(path), "--prompt", "abc", "--temperature", "0", "--device", "cpu"]
    made = []
    real = predictor.Decoder
    monkeypatch.setattr(predictor, "Decoder", lambda *given: made.append(real(*given)) or made[-1])
    assert predict.main(argv) == 0
    by_c = capsys.readouterr()
    with monkeypatch.context() as without:
        without.setattr(cpu_decode, "library", lambda: pytest.fail("the C code was looked for"))
        assert predict.main([*argv, "--no-c_kernel"]) == 0
    by_torch = capsys.readouterr()
    assert [decoder.native is not None for decoder in made] == [True, False]
    assert by_c.out == by_torch.out != "" and by_torch.err == by_c.err
    assert made[1].model.embed.weight.dtype == torch.float32


def test_predict_hands_the_files_digest_on(tmp_path, monkeypatch, capsys):
    """Two checkpoints differ in their digests, and a large one is asked once for each."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(asked, "LARGE_BYTES", 0)
    digests = set()
    for seed in (1, 2):
        model = random_model(tiny_config(vocabulary_size=260, context_length=64), seed)
        path = save_checkpoint(
            tmp_path / str(seed),
            1,
            model,
            None,
            train_config=TrainConfig(),
            tokenizer_state=BYTE.to_state(),
        )
        digests.add(read_checkpoint(path).digest)
        for _ in range(2):
            argv = [
                "--ckpt",
                str(path),
                "--prompt",
                "abc",
                "--max_new_tokens",
                "2",
                "--no-c_kernel",
            ]
            assert predict.main([*argv, "--device", "cpu"]) == 0
        assert len(kept(tmp_path / "cache")) == seed
    assert len(digests) == 2 and all(len(digest) == 64 for digest in digests)


def test_the_benchmark_says_what_asking_costs(monkeypatch, capsys):
    stored = {}
    monkeypatch.setattr(
        benchmark, "save_results", lambda name, results: stored.update({name: results})
    )
    flags = "--name tiny --repeats 2 --d_model 16 --num_heads 2 --num_kv_heads 1 --d_ff 8"
    more = "--num_experts 2 --transformer_blocks 1 --vocabulary_size 50 --context_length 16"
    threads = torch.get_num_threads()
    assert benchmark.main([*flags.split(), *more.split()]) == 0
    torch.set_num_threads(threads)
    sides = stored["asked_tiny"]["sides"]
    assert sides["pytorch"]["way"] == "decode_step" and sides["pytorch"]["note"] == ""
    assert all(0 < side["least_ms"] <= side["median_ms"] for side in sides.values())
    assert "c_kernel" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--repeats must be at least 1, not 0"):
        benchmark.main(["--repeats", "0"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_step_has_no_room_for_rounded_inputs(kind, monkeypatch):
    """The C kernel alone rounds them. Its room was PyTorch's too, and hid faults of 0.2 %."""
    model = quantize_(random_model(tiny_config(), 7), kind)
    decoder = Decoder(model, native=False)
    assert asked.ask(decoder, decode_step, KNOWS) == ""
    monkeypatch.setattr(inference, "decode_step", lambda *given: 1.002 * decode_step(*given))
    why = asked.ask(decoder, inference.decode_step, KNOWS)
    assert "they differ by 0.2" in why


@needs_code
def test_a_change_that_begins_far_into_a_text_is_found(monkeypatch):
    """Attention in chunks of 128 tokens was the same up to token 127.

    A decoder was asked at token 77 at most, and wrote another text than the model's from token 128
    on.
    """

    def in_chunks(self, q_BHTD, cache, starts_BT):
        T = q_BHTD.shape[2]
        now_T = torch.arange(T) if cache is None else cache.query_positions(T, "cpu")
        keys_S = cache.key_positions(self.block, T) if cache is not None else now_T
        same_TS = now_T[..., :, None] // 128 == keys_S[..., None, :] // 128
        mask_TS = same_TS & (now_T[..., :, None] >= keys_S[..., None, :])
        return mask_TS if mask_TS.dim() == 2 else mask_TS[:, None], False

    monkeypatch.setattr(model_parts.Attention, "_mask", in_chunks)
    decoder = Decoder(random_model(tiny_config(context_length=256)))
    assert decoder.native is None and "differ by" in decoder.why_not_native
    # decode_step goes through the model's own attention.
    assert decoder.why_not_step == ""


def test_a_filled_cache_takes_no_more_memory_than_it_may(monkeypatch):
    """On a GPU with many experts its 32 rows were budgeted as two.

    A model that fitted its card ran out of memory.
    """
    decoder = Decoder(everything(context_length=512), native=False)
    monkeypatch.setattr(asked, "_rows", lambda decoder: [1, 32])
    token_bytes = 32 * kv_cache_bytes_per_token(decoder.config, 4)
    for most in (0, 40 * token_bytes, 300 * token_bytes):
        monkeypatch.setattr(asked, "MOST_CACHE_BYTES", most)
        far = asked._far_position(decoder)
        allowed = max(most, asked._weight_bytes(decoder.model) // 16)
        assert far <= 1 or (far + 2) * token_bytes <= allowed
    assert far > 200


@needs_code
def test_another_build_of_the_c_code_is_asked_again(asks, monkeypatch):
    """A library that was compiled with other flags was used on the word of the one before."""
    Decoder(everything(), weights="a" * 64)
    monkeypatch.setattr(cpu_decode, "library_digest", lambda: "another")
    Decoder(everything(), weights="a" * 64)
    assert len(asks) == 2
