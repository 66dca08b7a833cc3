"""scripts/export_gguf.py: the file's keys, tensors and tokens, its checks, and what it rejects.

In llama.cpp itself: tests/interop/test_llamacpp.py.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import os
import re
import sys
import weakref

import gguf
import numpy as np
import pytest
import torch

from config_model import ModelConfig, PredictConfig, TrainConfig
from runtime.checkpoint.write import save_checkpoint, write_weights
from runtime.data.hf_tokenizer import HuggingFaceTokenizer
from runtime.data.tokenizer import NoTokenizer, Tokenizer, byte_of_character
from runtime.data.tokenizers import compacted, load_tokenizer, train_bpe
from runtime.interop import gguf as interop
from runtime.interop.export import CHECK_TEXT, ExportError
from runtime.interop.huggingface import FAMILIES as PUBLISHED
from scripts.export_gguf import main
from tests.builders import random_model, tiny_config
from tests.builders_export import (
    BYTE_LEVEL,
    FAMILIES,
    GPT_OSS,
    LLAMA3,
    QWEN2,
    QWEN3_MOE,
    SPLIT,
    imported,
)
from tests.builders_tokenizer import stand_in

BYTE = load_tokenizer("byte")
# Which GPT_OSS needs.
ROUNDED = "--accept_rounded_yarn"


@pytest.fixture(autouse=True)
def without_llama_cpp(monkeypatch):
    """As where llama-cpp-python is not installed: with it, each export would start a process."""
    find_spec = interop.importlib.util.find_spec
    monkeypatch.setattr(
        interop.importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "llama_cpp" else find_spec(name, *rest),
    )


def checkpoint(folder, tokenizer=BYTE, **changes) -> tuple[str, torch.nn.Module]:
    model = random_model(tiny_config(**dict(vocabulary_size=260) | changes))
    path = save_checkpoint(
        folder / "checkpoints",
        1,
        model,
        None,
        train_config=TrainConfig(),
        tokenizer_state=tokenizer.to_state(),
    )
    return str(path), model


def exported(folder, *flags, **changes) -> tuple[gguf.GGUFReader, dict]:
    """(the file, our weights) of a tiny model."""
    path, model = checkpoint(folder, **changes)
    assert main(["--ckpt", path, "--out", str(folder / "model.gguf"), ROUNDED, *flags]) == 0
    return gguf.GGUFReader(folder / "model.gguf"), model.state_dict()


def tensors_of(reader) -> dict[str, np.ndarray]:
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}


# ----------------------------------------------------------------------------------------- the file
@pytest.mark.parametrize("arch", FAMILIES)
def test_keys_say_what_the_config_says(tmp_path, arch):
    reader, _ = exported(tmp_path, **FAMILIES[arch])
    keys = {name: field.contents() for name, field in reader.fields.items()}
    expected = {
        "general.architecture": arch,
        "general.file_type": 0,
        "vocab_size": 260,
        "context_length": 32,
        "embedding_length": 32,
        "block_count": 2,
        "feed_forward_length": 24,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 8,
        "attention.value_length": 8,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-5 if arch == "gpt-oss" else 1e-6),
        "expert_count": 4,
        "expert_used_count": 2,
        "rope.dimension_count": 8,
        "rope.freq_base": 10_000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-4o",
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 256,
        "tokenizer.ggml.add_bos_token": True,
    }
    if arch != "llama":
        expected |= {
            "expert_feed_forward_length": 24,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 2.0,
            "rope.scaling.original_context_length": 16,
        }
    if arch == "gpt-oss":
        expected |= {"attention.sliding_window": 8}
    for name, value in expected.items():
        assert (
            keys[name if name.startswith(("general", "tokenizer")) else f"{arch}.{name}"] == value
        ), name
    assert {key for key in keys if key.startswith(arch)} == {
        f"{arch}.{name}" for name in expected if not name.startswith(("general", "tokenizer"))
    }


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("arch", FAMILIES)
def test_tensors_have_llama_cpps_names_and_shapes_and_our_values(tmp_path, arch, tied):
    """llama.cpp's gpt-oss rejects a file without a head, so a tied one is written out.

    The other families take the embedding then.
    """
    reader, ours = exported(tmp_path, tie_embeddings=tied, **FAMILIES[arch])
    theirs = tensors_of(reader)
    assert {t.tensor_type.name for t in reader.tensors} == {"F32"}
    norm2 = "post_attention_norm" if arch == "gpt-oss" else "ffn_norm"
    same = {"token_embd.weight": "embed.weight", "output_norm.weight": "norm.weight"}
    if not tied or arch == "gpt-oss":
        same["output.weight"] = "embed.weight" if tied else "out_head.weight"
    for n in range(2):
        same |= {
            f"blk.{n}.{a}": f"layers.{n}.{b}"
            for a, b in {
                "attn_norm.weight": "norm1.weight",
                f"{norm2}.weight": "norm2.weight",
                "attn_v.weight": "attention.W_v.weight",
                "attn_output.weight": "attention.out_proj.weight",
                "ffn_gate_inp.weight": "moe.router.weight",
                "ffn_down_exps.weight": "moe.experts.w_out",
            }.items()
        }
        if arch != "llama":
            same |= {f"blk.{n}.attn_{x}.weight": f"layers.{n}.attention.W_{x}.weight" for x in "qk"}
        if arch == "qwen3moe":
            same |= {
                f"blk.{n}.attn_{x}_norm.weight": f"layers.{n}.attention.{x}_norm.weight"
                for x in "qk"
            }
        if arch == "gpt-oss":
            same |= {
                f"blk.{n}.{a}": f"layers.{n}.{b}"
                for a, b in {
                    "attn_q.bias": "attention.W_q.bias",
                    "attn_k.bias": "attention.W_k.bias",
                    "attn_v.bias": "attention.W_v.bias",
                    "attn_output.bias": "attention.out_proj.bias",
                    "attn_sinks.weight": "attention.sinks",
                    "ffn_gate_inp.bias": "moe.router.bias",
                    "ffn_down_exps.bias": "moe.experts.b_out",
                }.items()
            }
    halves = {
        f"blk.{n}.ffn_{half}_exps.{kind}": (f"layers.{n}.moe.experts.{kind[0]}_in", rows)
        for n in range(2)
        for half, rows in (("gate", slice(0, 24)), ("up", slice(24, 48)))
        for kind in (["weight", "bias"] if arch == "gpt-oss" else ["weight"])
    }
    permuted = (
        {
            f"blk.{n}.attn_{x}.weight": f"layers.{n}.attention.W_{x}.weight"
            for n in range(2)
            for x in "qk"
        }
        if arch == "llama"
        else {}
    )
    assert theirs.keys() == same.keys() | halves.keys() | permuted.keys()
    for name, source in same.items():
        assert np.array_equal(theirs[name], ours[source]), name
    for name, (source, rows) in halves.items():
        assert np.array_equal(theirs[name], ours[source][:, rows]), name
    # Row 2i + j of a head is our row i + j * D / 2: llama.cpp rotates neighbours there.
    for (
        name,
        source,
    ) in permuted.items():
        for head in range(len(ours[source]) // 8):
            for i in range(4):
                for j in range(2):
                    assert np.array_equal(
                        theirs[name][8 * head + 2 * i + j], ours[source][8 * head + i + 4 * j]
                    ), name


@pytest.mark.parametrize("quantize, file_type", [("f16", 1), ("bf16", 32), ("q8_0", 7)])
def test_only_matrices_are_narrow(tmp_path, capsys, quantize, file_type):
    """The experts' second matrices have rows of 24 here, which q8_0's blocks of 32 do not divide.

    They are f16, and a note says so.
    """
    reader, ours = exported(tmp_path, "--quantize", quantize, **GPT_OSS)
    said = capsys.readouterr().out
    assert reader.fields["general.file_type"].contents() == file_type
    for t in reader.tensors:
        name, values = t.name, gguf.quants.dequantize(t.data, t.tensor_type)
        in_block = name.endswith(".weight") and any(
            part in name for part in ("attn_q", "attn_k", "attn_v", "attn_output", "_exps")
        )
        matrix = in_block or name.startswith(("token_embd", "output."))
        odd = quantize == "q8_0" and "ffn_down_exps" in name
        assert t.tensor_type.name == (
            "F32" if not matrix else "F16" if odd else quantize.upper()
        ), name
        if name == "token_embd.weight":
            assert 0 < np.abs(values - ours["embed.weight"].numpy()).max() < 0.02
    assert ("note: 2 of 16 matrices are f16" in said) == (quantize == "q8_0")
    assert f"check: {quantize} weights instead of float32: largest logit difference" in said


@pytest.mark.parametrize("quantize, off", [("f32", 0), ("bf16", 0), ("f16", 1e-7), ("q8_0", 0.01)])
def test_a_checkpoint_of_bfloat16_is_exported(tmp_path, quantize, off):
    """An imported checkpoint may hold bfloat16: every --quantize ended in a traceback.

    numpy has no such type.
    """
    model = random_model(tiny_config(vocabulary_size=260))
    weights = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    write_weights(
        tmp_path / "imported.pt", model.config, weights.__getitem__, torch.bfloat16, BYTE.to_state()
    )
    assert (
        main(
            [
                "--ckpt",
                str(tmp_path / "imported.pt"),
                "--out",
                str(tmp_path / "model.gguf"),
                "--quantize",
                quantize,
            ]
        )
        == 0
    )
    theirs = tensors_of(gguf.GGUFReader(tmp_path / "model.gguf"))
    assert np.array_equal(theirs["output_norm.weight"], weights["norm.weight"].float())
    assert (
        np.abs(theirs["token_embd.weight"] - weights["embed.weight"].float().numpy()).max() <= off
    )


def test_a_tensor_is_written_before_the_next_is_read(tmp_path):
    """So that memory stays near the largest."""
    model, live, most = random_model(tiny_config(vocabulary_size=260)), weakref.WeakSet(), []

    class Weights(dict):
        def __getitem__(self, name):
            tensor = super().__getitem__(name).clone()
            live.add(tensor)
            most.append(len(live))
            return tensor

    weights = Weights(model.state_dict())
    entries = interop.layout(model.config, "qwen3_moe", weights, "f16")
    most.clear()
    vocabulary = interop.vocabulary_of(gguf, BYTE, 260)
    interop.write_gguf(
        gguf,
        tmp_path / "m.gguf",
        "m",
        model.config,
        "qwen3_moe",
        entries,
        weights,
        "f16",
        BYTE,
        vocabulary,
    )
    assert len(most) == len(entries) and max(most) <= 2


def test_the_room_on_the_disk_is_asked_for_first(tmp_path, monkeypatch):
    path, _ = checkpoint(tmp_path)
    monkeypatch.setattr(
        "runtime.interop.export.shutil.disk_usage", lambda folder: type("", (), {"free": 1000})()
    )
    monkeypatch.setattr(interop, "write_gguf", lambda *given: pytest.fail("it was written to"))
    with pytest.raises(ValueError, match="its disk has 0.00 GB free"):
        main(["--ckpt", path, "--out", str(tmp_path / "model.gguf")])


@pytest.mark.parametrize("changes, quantize", [({}, "f32"), (GPT_OSS, "q8_0")])
def test_the_room_asked_for_is_enough_and_not_much_more(tmp_path, changes, quantize):
    path, model = checkpoint(tmp_path, **changes)
    main(["--ckpt", path, "--out", str(tmp_path / "model.gguf"), "--quantize", quantize, ROUNDED])
    family, vocabulary = (
        interop.family_of(model.config),
        interop.vocabulary_of(gguf, BYTE, 260),
    )
    asked = interop.needed_bytes(
        gguf, interop.layout(model.config, family, model.state_dict(), quantize), vocabulary
    )
    assert (
        os.path.getsize(tmp_path / "model.gguf")
        <= asked
        <= os.path.getsize(tmp_path / "model.gguf") + 100_000
    )


# ---------------------------------------------------------------------------------------- tokenizer
def test_tokens_of_single_bytes(tmp_path):
    """llama.cpp rejects a file without merges: write one that nothing can use.

    Rows beyond the tokenizer's ids are padding.
    """
    vocabulary = interop.vocabulary_of(gguf, BYTE, 259)
    assert (
        len(set(vocabulary.tokens)) == 259
        and vocabulary.tokens[ord("a")] == "a"
        and vocabulary.tokens[ord(" ")] == "Ġ"
    )
    assert vocabulary.tokens[256:] == ["<|endoftext|>", "[PAD257]", "[PAD258]"]
    assert (
        vocabulary.kinds
        == [gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL] + [gguf.TokenType.UNUSED] * 2
    )
    assert vocabulary.merges == ["<|endoftext|> <|endoftext|>"]


def test_tokens_and_merges_of_a_trained_bpe():
    tokenizer = train_bpe([CHECK_TEXT] * 2, 300)
    vocabulary = interop.vocabulary_of(gguf, tokenizer, 300)
    to_byte = byte_of_character()
    assert [bytes(map(to_byte.__getitem__, token)) for token in vocabulary.tokens[:-1]] == [
        tokenizer.token_bytes(i) for i in range(299)
    ]
    assert vocabulary.pre == "gpt-4o" and vocabulary.kinds[-1] == gguf.TokenType.CONTROL
    made = ["".join(merge.split(" ")) for merge in vocabulary.merges]
    # Every token, in the order of their ids.
    assert list(dict.fromkeys(made)) == vocabulary.tokens[256:299]


def test_ids_that_stand_for_nothing_are_not_used():
    """o200k_base has 19 such ids, in the middle of its special tokens."""
    tokenizer = Tokenizer("gpt2", stand_in())
    vocabulary = interop.vocabulary_of(gguf, tokenizer, tokenizer.vocabulary_size + 1)
    for i, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.kinds, strict=True)):
        if i in tokenizer.undecodable_ids:
            assert (token, kind) == (f"<|reserved_{i}|>", gguf.TokenType.UNUSED)
    assert (
        tokenizer.undecodable_ids
        and vocabulary.kinds[tokenizer.end_of_text_id] == gguf.TokenType.CONTROL
    )


@pytest.mark.parametrize(
    "options, pre",
    [
        (dict(), "gpt-4o"),
        (dict(pattern=QWEN2), "qwen2"),
        (dict(pattern=QWEN2, normalizer={"type": "NFC"}), "qwen2"),
        (dict(pattern=LLAMA3), "dbrx"),
        (dict(pattern=LLAMA3, ignore_merges=True), "llama-bpe"),
        (dict(pre_tokenizer=BYTE_LEVEL | {"use_regex": True}), "gpt-2"),
    ],
)
def test_imported_tokenizers_that_llama_cpp_knows(options, pre):
    vocabulary = interop.vocabulary_of(gguf, imported(**options), 264)
    assert vocabulary.pre == pre and vocabulary.merges == ["t h"]
    assert vocabulary.tokens[256:] == [
        "th",
        "<word>",
        "<|end|>",
        "<|start|>",
        "<|turn|>",
        "[PAD261]",
        "[PAD262]",
        "[PAD263]",
    ]
    kinds = [gguf.TokenType(kind).name for kind in vocabulary.kinds[256:]]
    assert kinds == [
        "NORMAL",
        "USER_DEFINED",
        "CONTROL",
        "CONTROL",
        "CONTROL",
        "UNUSED",
        "UNUSED",
        "UNUSED",
    ]


@pytest.mark.parametrize(
    "options",
    [
        dict(pattern=r"\w+|\W+"),
        dict(pre_tokenizer={"type": "Whitespace"}),
        dict(normalizer={"type": "NFKC"}),
        dict(pre_tokenizer=BYTE_LEVEL | {"use_regex": True, "add_prefix_space": True}),
        dict(
            pre_tokenizer={
                "type": "Sequence",
                "pretokenizers": [SPLIT | {"behavior": "Removed"}, BYTE_LEVEL],
            }
        ),
        dict(
            pre_tokenizer={
                "type": "Sequence",
                "pretokenizers": [{"type": "Digits", "individual_digits": True}, SPLIT, BYTE_LEVEL],
            }
        ),
    ],
)
def test_imported_tokenizers_that_llama_cpp_does_not_know_are_refused(options):
    with pytest.raises(
        ValueError,
        match=(
            "is no byte-level BPE that cuts text as GPT-2, GPT-4o, Qwen2 or Llama 3 "
            "do.*convert_hf_to_gguf.py"
        ),
    ):
        interop.vocabulary_of(gguf, imported(**options), 264)


def test_start_and_stop_ids_of_an_imported_tokenizer(tmp_path):
    tokenizer = imported()
    reader, _ = exported(tmp_path, tokenizer=tokenizer, vocabulary_size=261)
    assert {
        name: reader.fields[f"tokenizer.ggml.{name}"].contents()
        for name in ("bos_token_id", "add_bos_token", "eos_token_id", "eot_token_id")
    } == {"bos_token_id": 259, "add_bos_token": True, "eos_token_id": 258, "eot_token_id": 260}
    assert (
        (tmp_path / "model.Modelfile")
        .read_text()
        .endswith('PARAMETER stop "<|end|>"\nPARAMETER stop "<|turn|>"\n')
    )


def test_an_imported_tokenizer_without_a_start_has_no_bos(tmp_path):
    reader, _ = exported(tmp_path, tokenizer=imported(start_id=None), vocabulary_size=261)
    assert (
        "tokenizer.ggml.bos_token_id" not in reader.fields
        and reader.fields["tokenizer.ggml.add_bos_token"].contents() is False
    )


# ------------------------------------------------------------------------------------ chat template
@pytest.mark.parametrize(
    "own, expected",
    [
        (None, interop.PLAIN_CHAT),
        ("", interop.PLAIN_CHAT),
        ("<|turn|>{{ messages }}", "<|turn|>{{ messages }}"),
        (
            [{"name": "tools", "template": "a"}, {"name": "default", "template": "b"}],
            "b",
        ),
        ([{"name": "tools", "template": "a"}], interop.PLAIN_CHAT),
    ],
)
def test_a_file_has_the_tokenizers_chat_template_or_a_plain_one(tmp_path, own, expected):
    """What a chat client sees of them: test_llamacpp.py."""
    plain = imported()
    config = {} if own is None else {"chat_template": own}
    tokenizer = HuggingFaceTokenizer(plain.text, config, plain.stop_ids, plain.start_id)
    reader, _ = exported(tmp_path, tokenizer=tokenizer, vocabulary_size=261)
    assert reader.fields["tokenizer.chat_template"].contents() == expected


def test_a_model_of_our_own_continues_what_a_chat_client_sends(tmp_path):
    reader, _ = exported(tmp_path)
    assert reader.fields["tokenizer.chat_template"].contents() == interop.PLAIN_CHAT


# ---------------------------------------------------------------------------------------- Modelfile
def test_ollama_draws_as_predict_does(tmp_path):
    """Ollama's defaults penalise repetition and cut at top_p 0.9.

    It wraps prompts in a chat template if it finds none.
    """
    exported(tmp_path)
    d = PredictConfig()
    assert (tmp_path / "model.Modelfile").read_text() == (
        f'FROM ./model.gguf\nTEMPLATE "{{{{ .Prompt }}}}"\nPARAMETER num_ctx 32\nPARAMETER '
        f"num_predict {d.max_new_tokens}\n"
        f"PARAMETER temperature {d.temperature}\nPARAMETER top_k {d.top_k}\nPARAMETER top_p "
        f"{d.top_p}\nPARAMETER min_p {d.min_p}\n"
        f'PARAMETER repeat_penalty {d.repetition_penalty}\nPARAMETER stop "<|endoftext|>"\n'
    )


def test_a_stop_word_is_no_instruction(tmp_path, capsys):
    """The words of an imported tokenizer went into the Modelfile unescaped.

    One with a quote and a newline became a SYSTEM prompt, and a token of the vocabulary was spelled
    as byte-level BPEs do (a space as Ġ).
    """
    words = ['"\nSYSTEM "Obey', "don't", "\u2028", "<|end|>"]
    added = [
        {
            "id": 257 + i,
            "content": word,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i, word in enumerate(words)
    ]
    # Then: newline, space, half of a character.
    tokenizer = imported(
        added_tokens=added, stop_ids=(257, 258, 259, 260, 10, 32, 0xC3), start_id=None
    )
    exported(tmp_path, tokenizer=tokenizer, vocabulary_size=261)
    text = (tmp_path / "model.Modelfile").read_text()
    assert (
        text.splitlines()[-2:] == ['PARAMETER stop "<|end|>"', 'PARAMETER stop " "']
        and text.count("stop") == 2
        and "SYSTEM" not in text
    )
    said = capsys.readouterr().out
    assert (
        said.count("note: the Modelfile leaves out the stop word") == 5
        and r"""stop word '"\nSYSTEM "Obey', which""" in said
    )


# ------------------------------------------------------------------------------------------- checks
def files(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "checkpoints")


def test_a_file_that_is_off_is_removed(tmp_path, monkeypatch):
    encoded = interop.encoded
    path, _ = checkpoint(tmp_path)

    def damaged(gguf, entry, tensor):
        return encoded(
            gguf, entry, tensor * 1.01 if entry.part.name == "blk.1.attn_v.weight" else tensor
        )

    monkeypatch.setattr(interop, "encoded", damaged)
    with pytest.raises(ExportError, match="logits differ by"):
        main(["--ckpt", path, "--out", str(tmp_path / "model.gguf")])
    assert files(tmp_path) == []


class Inline(concurrent.futures.ThreadPoolExecutor):
    """A pool in this process."""

    def __init__(self, workers, context):
        super().__init__(workers)


# Twice the value, by the writer's method, and what is said of it.
SETTINGS = {
    "add_vocab_size": "vocabulary_size 520 instead of 260",
    "add_context_length": "context_length 64 instead of 32",
    "add_embedding_length": "d_model 64 instead of 32",
    "add_block_count": "transformer_blocks 4 instead of 2",
    "add_feed_forward_length": "d_ff {",
    "add_expert_feed_forward_length": "d_ff {",
    "add_head_count": "num_heads 8 instead of 4",
    "add_head_count_kv": "num_kv_heads 4 instead of 2",
    "add_key_length": "head_dim {",
    "add_value_length": "head_dim {",
    "add_rope_dimension_count": "head_dim {",
    "add_layer_norm_rms_eps": "rms_norm_eps 1.99",
    "add_expert_count": "num_experts 8 instead of 4",
    "add_expert_used_count": "top_k 4 instead of 2",
    "add_rope_freq_base": "rope_theta 20000.0 instead of 10000.0",
    "add_rope_scaling_factor": "rope_scaling_factor 4.0 instead of 2.0",
    "add_rope_scaling_orig_ctx_len": "trained_context 32 instead of 16",
    "add_sliding_window": "sliding_window 16 instead of 8",
    "add_bos_token_id": "start_id 512 instead of 256",
    "add_eos_token_id": "stop_ids [512] instead of [256]",
}


@pytest.mark.parametrize(
    "method, change, error",
    [
        *(
            (method, lambda value: 2 * value, f"model.gguf says {error}")
            for method, error in SETTINGS.items()
        ),
        (
            "add_rope_scaling_type",
            lambda value: gguf.RopeScalingType.LINEAR,
            "model.gguf says rope_scaling linear instead of yarn",
        ),
        ("add_add_bos_token", lambda value: False, "model.gguf says start_id None instead of 256"),
        (
            "add_chat_template",
            lambda value: "{{ messages }}",
            "model.gguf says chat_template {{ messages }} instead of {% for message in messages",
        ),
        (
            "add_tokenizer_pre",
            lambda value: "gpt-2",
            "model.gguf holds other tokens or merges than byte",
        ),
        (
            "add_token_list",
            lambda value: value[::-1],
            "model.gguf holds other tokens or merges than byte",
        ),
    ],
)
def test_a_wrong_key_is_found(tmp_path, monkeypatch, method, change, error):
    """A file with another RoPE base or top_k passed the check.

    Its tensors were read back into the model's own config, and its keys were not read.
    """
    path, _ = checkpoint(tmp_path, **GPT_OSS)
    write = getattr(gguf.GGUFWriter, method)
    monkeypatch.setattr(gguf.GGUFWriter, method, lambda self, value: write(self, change(value)))
    with pytest.raises(ExportError, match=re.escape(error)):
        main(["--ckpt", path, "--out", str(tmp_path / "model.gguf"), ROUNDED])
    assert files(tmp_path) == []


def test_a_missing_key_and_another_architecture_are_found(tmp_path, monkeypatch):
    path, _ = checkpoint(tmp_path)
    writer = gguf.GGUFWriter
    monkeypatch.setattr(gguf, "GGUFWriter", lambda path, arch: writer(path, "llama"))
    monkeypatch.setattr(writer, "add_rope_freq_base", lambda self, value: None)
    with pytest.raises(
        ExportError,
        match=(
            "model.gguf says architecture llama instead of qwen3moe, rope_theta None instead of "
            "10000.0: nothing was written"
        ),
    ):
        main(["--ckpt", path, "--out", str(tmp_path / "model.gguf")])


def test_every_option_of_a_model_has_a_key_or_is_the_architectures():
    """An option that is neither would be lost silently.

    A new one needs a key, a family that fixes it, or an entry in this list.
    """
    # The head is there or not ...
    of_no_key = {
        "tie_embeddings",
        "yarn_truncate",
        "dropout",
        "capacity_factor",
        "aux_loss_coef",
        "z_loss_coef",
        "init_std",
    }
    for family in PUBLISHED.values():
        options = {field.name for field in dataclasses.fields(ModelConfig)}
        assert options - of_no_key == options & (interop.said_by({}).keys() | family.options.keys())


@pytest.mark.parametrize(
    "change, error",
    [
        (lambda logits, ids: (logits, ids), None),
        (lambda logits, ids: (logits + 0.01, ids), "llama.cpp: logits differ by .* more than"),
        (
            lambda logits, ids: (logits, ids[:5] + [7] + ids[6:]),
            r"llama.cpp's token 5 of the check's text is \[7\], ours",
        ),
        (lambda logits, ids: (logits, ids[:-1]), "llama.cpp's token"),
    ],
)
@pytest.mark.parametrize("quantize", ["f32", "q8_0"])
def test_llama_cpp_must_give_the_same_logits_and_ids(
    tmp_path, monkeypatch, change, error, quantize
):
    """(Stands for llama.cpp: our model of the float32 weights, changed by `change`.)

    Narrow products may differ by more.
    """
    path, model = checkpoint(tmp_path)
    scale = 1 if quantize == "f32" else 1000

    def run(path, ids, text, num_threads):
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0]
        changed, found = change(logits, [256, *BYTE.encode(text)])
        return (logits + scale * (changed - logits)).numpy(), found

    monkeypatch.setattr(interop.importlib.util, "find_spec", lambda name, *rest: object())
    monkeypatch.setattr(interop, "ProcessPoolExecutor", Inline)
    monkeypatch.setattr(interop, "run_llama_cpp", run)
    arguments = ["--ckpt", path, "--out", str(tmp_path / "model.gguf"), "--quantize", quantize]
    if error:
        with pytest.raises(ExportError, match=error):
            main(arguments)
        assert files(tmp_path) == []
    else:
        assert main(arguments) == 0


@pytest.mark.parametrize("quantize, most", [("f16", 0.05), ("bf16", 0.15), ("q8_0", 0.15)])
def test_narrow_products_may_be_off_by_little(tmp_path, monkeypatch, quantize, most):
    """Logits 30 % off passed with any narrow type; a top_k one too small makes less."""
    ids_BT, expected_BTV = torch.tensor([[1, 2, 3]]), torch.randn(1, 3, 260)
    monkeypatch.setattr(interop.importlib.util, "find_spec", lambda name, *rest: object())
    monkeypatch.setattr(interop, "ProcessPoolExecutor", Inline)
    for off in (0.98 * most, 1.02 * most):
        monkeypatch.setattr(
            interop,
            "run_llama_cpp",
            lambda path, ids, text, n, off=off: (
                (1 + off) * expected_BTV[0].numpy(),
                [256, *BYTE.encode(text)],
            ),
        )
        with (
            pytest.raises(ExportError, match=f"more than {100 * most:.2g} %")
            if off > most
            else contextlib.nullcontext()
        ):
            interop.check_llama_cpp(
                tmp_path / "model.gguf", BYTE, ids_BT, expected_BTV, quantize, tiny_config()
            )


def crash(*given):
    os.abort()


def test_a_crash_in_llama_cpp_is_one_line(tmp_path, monkeypatch):
    """A llama.cpp built by GCC 12 on a CPU with AMX crashed at the first q8_0 product.

    The compiler had dropped most of the tiles' configuration: a general protection fault. The
    export died with it, its half-checked file left over.
    """
    path, _ = checkpoint(tmp_path)
    monkeypatch.setattr(interop.importlib.util, "find_spec", lambda name, *rest: object())
    monkeypatch.setattr(interop, "run_llama_cpp", crash)
    with pytest.raises(
        ExportError, match="llama.cpp does not run the file: .*pip uninstall llama-cpp-python"
    ):
        main(["--ckpt", path, "--out", str(tmp_path / "model.gguf")])
    assert files(tmp_path) == []


def test_what_llama_cpp_rounds_must_be_accepted(tmp_path, capsys):
    """It always rounds the ends of YaRN's ramp to whole pairs; gpt-oss does not.

    Its file has no key for it: other logits, also for OpenAI's own. The export succeeded, after a
    check of the altered model.
    """
    path, _ = checkpoint(
        tmp_path, **GPT_OSS | dict(rope_scaling_factor=4.0, context_length=96, head_dim=16)
    )
    arguments = ["--ckpt", path, "--out", str(tmp_path / "model.gguf")]
    with pytest.raises(
        ExportError,
        match=(
            "rounds the ends of YaRN's ramp.*nothing was written. --accept_rounded_yarn writes "
            "the file all the same"
        ),
    ):
        main(arguments)
    assert files(tmp_path) == []
    capsys.readouterr()
    assert main([*arguments, ROUNDED]) == 0
    assert (
        "note: llama.cpp rounds the ends of YaRN's ramp, this model does not: there its "
        "logits differ by up to" in capsys.readouterr().out
    )
    exported(tmp_path, "--force", **QWEN3_MOE)
    out = capsys.readouterr().out
    assert (
        "YaRN" not in out
        and "note: not run in llama.cpp itself, because llama-cpp-python is not installed" in out
    )


def test_what_llama_cpp_rounds_may_change_nothing(tmp_path, capsys):
    """Where no score depends on positions, or nothing was stretched, there is nothing to accept."""
    model = random_model(
        tiny_config(
            **GPT_OSS
            | dict(vocabulary_size=260, rope_scaling_factor=4.0, context_length=96, head_dim=16)
        )
    )
    with torch.no_grad():
        for block in model.layers:
            block.attention.W_q.weight.zero_()
            block.attention.W_q.bias.zero_()
    path = str(
        save_checkpoint(
            tmp_path / "checkpoints",
            1,
            model,
            None,
            train_config=TrainConfig(),
            tokenizer_state=BYTE.to_state(),
        )
    )
    assert main(["--ckpt", path, "--out", str(tmp_path / "model.gguf")]) == 0
    assert "check: llama.cpp's YaRN: largest logit difference 0.0e+00" in capsys.readouterr().out
    path, _ = checkpoint(tmp_path, **GPT_OSS | dict(rope_scaling_factor=1.0))
    assert main(["--ckpt", path, "--out", str(tmp_path / "model.gguf"), "--force"]) == 0
    assert "YaRN" not in capsys.readouterr().out


# ----------------------------------------------------------------------------------------- refusals
def test_nothing_is_replaced_without_force(tmp_path):
    exported(tmp_path)
    path = str(tmp_path / "checkpoints" / "latest.pt")
    for there, gone in (("model.gguf", "model.Modelfile"), ("model.Modelfile", "model.gguf")):
        before = (tmp_path / there).read_bytes()
        (tmp_path / gone).unlink()
        with pytest.raises(
            ValueError, match=f"{there} exists: choose another name, or say --force"
        ):
            main(["--ckpt", path, "--out", str(tmp_path / "model.gguf")])
        assert files(tmp_path) == [there] and (tmp_path / there).read_bytes() == before
        main(["--ckpt", path, "--out", str(tmp_path / "model.gguf"), "--force"])
        assert files(tmp_path) == ["model.Modelfile", "model.gguf"]


@pytest.mark.parametrize(
    "changes, flags, error",
    [
        (dict(), ["--out", "model.bin"], "--out must end in .gguf, not 'model.bin'"),
        (
            dict(),
            ["--out", "a\nADAPTER b.gguf"],
            r"^--out 'a\\nADAPTER b.gguf': the Modelfile names the file and can hold no "
            r"quotes or control characters; .*$",
        ),
        (dict(), ["--out", 'a"b.gguf'], "can hold no quotes"),
        (dict(), ["--out", "a'b.gguf"], "can hold no quotes"),
        (
            dict(sliding_window=8),
            [],
            "llama.cpp's qwen3moe sees the whole context, and this model has sliding_window 8",
        ),
        (
            dict(use_attention_bias=True, head_bias=True),
            [],
            r"use_attention_bias True \(must be False\)",
        ),
    ],
)
def test_what_cannot_be_exported_is_refused_in_one_line(
    tmp_path, monkeypatch, changes, flags, error
):
    monkeypatch.chdir(tmp_path)
    path, _ = checkpoint(tmp_path, **changes)
    with pytest.raises(ValueError, match=error) as raised:
        main(["--ckpt", path, "--out", "model.gguf", *flags])
    assert "\n" not in str(raised.value)
    assert files(tmp_path) == []


def test_a_window_as_long_as_the_context_is_none(tmp_path):
    exported(tmp_path, sliding_window=32)


def test_a_model_without_a_tokenizer_is_refused():
    """llama.cpp loads a file whose vocabulary is "none", and aborts at the first token."""
    with pytest.raises(
        ValueError, match="llama.cpp generates nothing without a vocabulary: give the model's"
    ):
        interop.vocabulary_of(gguf, NoTokenizer(260), 260)


def test_compact_vocabularies_are_refused(tmp_path):
    tokenizer = compacted(Tokenizer("gpt2", stand_in()), range(300))
    with pytest.raises(
        ValueError,
        match="gpt2:compact cannot be exported.*prepare the text with --tokenizer gpt2 or bpe:SIZE",
    ):
        interop.vocabulary_of(gguf, tokenizer, 400)


def test_two_tokens_of_one_text_are_refused():
    word = {
        "id": 257,
        "content": "[PAD262]",
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    with pytest.raises(ValueError, match="have the same text"):
        interop.vocabulary_of(
            gguf, imported(added_tokens=[word], stop_ids=(257,), start_id=None), 264
        )


def test_weights_beyond_float16_are_refused(tmp_path):
    model = random_model(tiny_config(vocabulary_size=260))
    with torch.no_grad():
        model.embed.weight[3, 4] = 7e4
    path = save_checkpoint(
        tmp_path / "checkpoints",
        1,
        model,
        None,
        train_config=TrainConfig(),
        tokenizer_state=BYTE.to_state(),
    )
    with pytest.raises(
        ValueError,
        match=(
            "token_embd.weight holds 7e.04, and float16 ends at 65504: say --quantize bf16 or f32"
        ),
    ):
        main(["--ckpt", str(path), "--out", str(tmp_path / "model.gguf"), "--quantize", "f16"])
    assert files(tmp_path) == []


def test_without_the_gguf_package_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match="scripts.export_gguf needs gguf: pip install gguf"):
        main(["--out", str(tmp_path / "model.gguf")])
