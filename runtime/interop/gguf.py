"""Write a model as GGUF, the file format of llama.cpp and Ollama.

The architecture is llama (our Mixtral family), qwen3moe or gpt-oss, chosen from the config. Tensors
are written one at a time, so memory stays near the largest. The file is read back and must give the
model's logits. If llama-cpp-python is installed, llama.cpp itself must give them too, with the same
token ids.

A prompt begins a document, as in predict.py: the start token is the BOS token, and the file tells
llama.cpp to prepend it. llama.cpp's rule for splitting text ignores combining marks, so it finds
other ids than o200k_base in Hindi, for example. It also rounds YaRN's ramp, which gpt-oss does not
(see rounded_yarn).
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import math
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from config_model import ModelConfig, PredictConfig, total_parameters
from runtime.base.files import write_text_atomic
from runtime.base.text import human_bytes
from runtime.checks.known import ATTENTION, EXPERTS, OUTSIDE, POSITIONS, SIZES, TRAINING, Known
from runtime.data import chat_spellings
from runtime.data.chat_template import find_source
from runtime.data.hf_tokenizer import HuggingFaceTokenizer, byte_level_merges, special_words
from runtime.data.tokenizer import END_OF_TEXT, WORD_PATTERN, NoTokenizer, Tokenizer, spell
from runtime.interop import export, published
from runtime.interop.export import (
    ExportError,
    Source,
    check_logits,
    check_published,
    lazy_model,
    logits_of,
    staged,
)
from runtime.interop.huggingface import family_of

ARCHITECTURES = {"mixtral": "llama", "qwen3_moe": "qwen3moe", "gpt_oss": "gpt-oss"}
KNOWS = Known(
    "the export to GGUF",
    SIZES | ATTENTION | POSITIONS | EXPERTS | OUTSIDE | TRAINING,
)
QUANTIZE = ("f32", "f16", "bf16", "q8_0")
# llama.cpp's name (src/llama-vocab.cpp) for each rule that splits text before merging. "dbrx" is
# cl100k_base's rule, white space at the very end of a text aside. Single bytes never merge, so any
# rule will do for them.
PRE_TOKENIZERS = {"o200k_base": "gpt-4o", "cl100k_base": "dbrx", "gpt2": "gpt-2", "byte": "gpt-4o"}
_SUFFIXES = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_END = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Those after the first are of imported tokenizers: GPT-2's, Qwen's, and that of Llama 3 and DBRX
# (Llama 3 looks whole words up first).
PATTERNS = {
    WORD_PATTERN: "gpt-4o",
    _GPT2: "gpt-2",
    rf"{_SUFFIXES}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{_END}": "qwen2",
    rf"{_SUFFIXES}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{_END}": "dbrx",
}
# How far llama.cpp may be from our own logits with the same narrow weights: root mean square of the
# difference over that of the logits. It is 1.4 if the two have nothing in common. llama.cpp also
# rounds what it multiplies such weights with (f16: 11 bits; bf16 and q8_0: 8), so a router's near
# tie can fall the other way.
# Measured: 0.01 % to 1.7 % for trained models; for 4 to 48 untrained blocks up to 2.4 % (f16),
# 8.5 % (bf16) and 10 % (q8_0). Mistakes in a trained nano: swapped halves of its experts are 50 %
# off, a doubled RoPE base 5 % to 9 %, a top_k off by one 7 % to 25 %.
# So this finds a wrong layout, but no small mistake. check_keys compares the settings one by one,
# and a float32 file must agree to what rounding explains.
NARROW_TOLERANCE = {"f16": 0.05, "bf16": 0.15, "q8_0": 0.15}
# Numbers of a row that share a scale in q8_0.
BLOCK = 32
# The chat template of a model without a chat layout: the messages' contents, joined. A base model
# continues them. In a file without a template, llama.cpp marks each message as ChatML does, and a
# model that never saw these marks continues them badly.
PLAIN_CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"

# The same for Ollama.
PLAIN_PROMPT = "{{ .Prompt }}"


def import_gguf():
    """Return the gguf package. Raise ValueError if it is missing."""
    try:
        import gguf
        import gguf.quants
    except ImportError:
        raise ValueError("scripts.export_gguf needs gguf: pip install gguf") from None
    return gguf


# --------------------------------------------------------------------------------------- tensors
class Part(NamedTuple):
    """A tensor of the file: one of ours, or half of one."""

    # its name in the file
    name: str
    # its name here
    source: str
    # may be narrow; vectors, routers and biases stay float32
    is_matrix: bool
    # 0 or 1: first or second half of dimension 1, which holds the experts' gate and up rows
    half: int | None = None
    # number of heads whose rows are reordered, 0 for none: llama.cpp's `llama` rotates neighbours
    # (2i, 2i+1), we rotate (i, i + D/2)
    heads: int = 0


def parts(config: ModelConfig, family: str) -> Iterator[Part]:
    """Yield all tensors of the file, in order."""
    gpt_oss, H, G = family == "gpt_oss", config.num_heads, config.num_kv_heads
    yield Part("token_embd.weight", "embed.weight", True)
    for n in range(config.transformer_blocks):
        ours, theirs = f"layers.{n}.", f"blk.{n}."
        yield Part(theirs + "attn_norm.weight", ours + "norm1.weight", False)
        for name, source, heads in (
            ("attn_q", "W_q", H),
            ("attn_k", "W_k", G),
            ("attn_v", "W_v", 0),
            ("attn_output", "out_proj", 0),
        ):
            yield Part(
                f"{theirs}{name}.weight",
                f"{ours}attention.{source}.weight",
                True,
                heads=heads if family == "mixtral" else 0,
            )
            if gpt_oss:
                yield Part(f"{theirs}{name}.bias", f"{ours}attention.{source}.bias", False)
        if gpt_oss:
            yield Part(theirs + "attn_sinks.weight", ours + "attention.sinks", False)
        if config.qk_norm:
            yield Part(theirs + "attn_q_norm.weight", ours + "attention.q_norm.weight", False)
            yield Part(theirs + "attn_k_norm.weight", ours + "attention.k_norm.weight", False)
        yield Part(
            theirs + ("post_attention_norm.weight" if gpt_oss else "ffn_norm.weight"),
            ours + "norm2.weight",
            False,
        )
        yield Part(theirs + "ffn_gate_inp.weight", ours + "moe.router.weight", False)
        if gpt_oss:
            yield Part(theirs + "ffn_gate_inp.bias", ours + "moe.router.bias", False)
        for name, source, half in (
            ("ffn_gate_exps", "in", 0),
            ("ffn_up_exps", "in", 1),
            ("ffn_down_exps", "out", None),
        ):
            yield Part(f"{theirs}{name}.weight", f"{ours}moe.experts.w_{source}", True, half)
            if gpt_oss:
                yield Part(f"{theirs}{name}.bias", f"{ours}moe.experts.b_{source}", False, half)
    yield Part("output_norm.weight", "norm.weight", False)
    if not config.tie_embeddings:
        yield Part("output.weight", "out_head.weight", True)


def taken(part: Part, tensor: Tensor) -> Tensor:
    """Return the tensor of the file from ours (a view, unless rows are reordered)."""
    if part.half is not None:
        tensor = tensor.chunk(2, dim=1)[part.half]
    if part.heads:
        tensor = tensor.unflatten(0, (part.heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)
    return tensor


def with_head(
    config: ModelConfig, family: str, weights: Mapping[str, Tensor]
) -> tuple[ModelConfig, Mapping[str, Tensor]]:
    """Return the same model, untied if needed: llama.cpp's gpt-oss loads no file without a head."""
    if family == "gpt_oss" and config.tie_embeddings:
        return dataclasses.replace(config, tie_embeddings=False), {
            **weights,
            "out_head.weight": weights["embed.weight"],
        }
    return config, weights


class Entry(NamedTuple):
    """A tensor as it is in the file."""

    part: Part
    shape: torch.Size
    # one of QUANTIZE
    kind: str


def layout(
    config: ModelConfig, family: str, weights: Mapping[str, Tensor], quantize: str
) -> list[Entry]:
    """Return all tensors of the file, in order.

    Matrices have the type `quantize`, or f16 if q8_0's blocks do not divide their rows.
    """
    entries = []
    for part in parts(config, family):
        shape = taken(part, weights[part.source].to("meta")).shape
        kind = quantize if part.is_matrix else "f32"
        entries.append(Entry(part, shape, "f16" if kind == "q8_0" and shape[-1] % BLOCK else kind))
    assert {entry.part.source for entry in entries} == weights.keys(), (
        "a weight has no place in the file"
    )
    return entries


def bytes_of(gguf, entry: Entry) -> int:
    """Return the size of a tensor in the file."""
    numbers, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[entry.kind.upper()]]
    return math.prod(entry.shape) // numbers * size


def encoded(gguf, entry: Entry, tensor: Tensor) -> np.ndarray:
    """Return a tensor as the file holds it. Raise ValueError for a value beyond float16."""
    if (
        entry.kind == "f16"
        and (largest := tensor.abs().max().item()) > torch.finfo(torch.float16).max
    ):
        raise ValueError(
            f"{entry.part.name} holds {largest:.3g}, and float16 ends at 65504: "
            "say --quantize bf16 or f32"
        )
    return gguf.quants.quantize(
        tensor.float().contiguous().numpy(), gguf.GGMLQuantizationType[entry.kind.upper()]
    )


def rounded(gguf, tensor: Tensor, kind: str) -> Tensor:
    """Return a tensor rounded to `kind`, as float32.

    If PyTorch has the type, it does the rounding, independently of the code that writes the file.
    """
    if kind == "q8_0":
        q8_0 = gguf.GGMLQuantizationType.Q8_0
        return torch.from_numpy(
            gguf.quants.dequantize(
                gguf.quants.quantize(tensor.float().contiguous().numpy(), q8_0), q8_0
            )
        )
    return tensor.to(
        {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[kind]
    ).float()


# ------------------------------------------------------------------------------------- tokenizer
class Vocabulary(NamedTuple):
    """A byte-level BPE as llama.cpp has it."""

    # llama.cpp's name of the rule that splits text before merging
    pre: str
    tokens: list[str]
    kinds: list[int]
    merges: list[str]


def vocabulary_of(gguf, tokenizer: Tokenizer, size: int) -> Vocabulary:
    """Return the tokenizer for llama.cpp, padded to the `size` rows of the embedding.

    Raise ValueError for a tokenizer that llama.cpp cannot represent.
    """
    if isinstance(tokenizer, NoTokenizer):
        # It loads a file whose tokenizer.ggml.model is "none", and its server then ends with a
        # failed assertion at the first token that it should print.
        raise ValueError(
            "llama.cpp generates nothing without a vocabulary: give the model's --tokenizer, or "
            "use scripts.export_hf or scripts.export_onnx, which need none"
        )
    # llama.cpp loads no file without merges, so single bytes get one that never applies: nothing
    # makes its halves.
    merges = [f"{spell(left)} {spell(right)}" for left, right in byte_level_merges(tokenizer)] or [
        f"{END_OF_TEXT} {END_OF_TEXT}"
    ]
    kind = gguf.TokenType
    if isinstance(tokenizer, HuggingFaceTokenizer):
        data = json.loads(tokenizer.text)
        pre = pre_tokenizer_of(data, tokenizer.name)
        known = {i: (word, kind.NORMAL) for word, i in data["model"]["vocab"].items()}
        known |= {
            token["id"]: (token["content"], kind.CONTROL if token["special"] else kind.USER_DEFINED)
            for token in data.get("added_tokens") or []
        }
    else:
        pre = PRE_TOKENIZERS.get(tokenizer.name, "gpt-4o")
        known = {
            i: (spell(token), kind.NORMAL)
            for token, i in tokenizer.encoding._mergeable_ranks.items()
        }
        known |= {
            i: (word, kind.UNUSED if i in tokenizer.undecodable_ids else kind.CONTROL)
            for word, i in special_words(tokenizer).items()
        }
    tokens, kinds = map(
        list, zip(*(known.get(i, (f"[PAD{i}]", kind.UNUSED)) for i in range(size)), strict=True)
    )
    if len(set(tokens)) < size:
        raise ValueError(
            f"two ids of {tokenizer.name} have the same text, which llama.cpp does not take"
        )
    return Vocabulary(pre, tokens, kinds, merges)


def chat_template_of(tokenizer: Tokenizer) -> str:
    """Return the template of chat ids or an imported tokenizer's own, else PLAIN_CHAT."""
    if tokenizer.chat is not None:
        return chat_spellings.JINJA
    return find_source(tokenizer) or PLAIN_CHAT


def pre_tokenizer_of(data: dict, name: str) -> str:
    """Return llama.cpp's name of the rule by which a tokenizer.json splits text before merging.

    Raise ValueError if it has none.
    """
    step, normalizer = data.get("pre_tokenizer") or {}, data.get("normalizer")
    steps = [
        {key: value for key, value in part.items() if key != "trim_offsets"}
        for part in step.get("pretokenizers", [step])
    ]
    byte_level, pattern = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}, None
    if steps == [byte_level | {"use_regex": True}]:
        pattern = _GPT2
    elif (
        len(steps) == 2
        and steps[0].get("behavior") == "Isolated"
        and not steps[0].get("invert")
        and steps[1] == byte_level
    ):
        pattern = (steps[0].get("pattern") or {}).get("Regex")
    if (
        data["model"].get("type") != "BPE"
        or pattern not in PATTERNS
        or normalizer not in (None, {"type": "NFC"})
    ):
        raise ValueError(
            f"tokenizer {name} is no byte-level BPE that cuts text as GPT-2, GPT-4o, Qwen2 or "
            "Llama 3 do, and no other is written here: "
            "use scripts.export_hf, and llama.cpp's convert_hf_to_gguf.py on its folder"
        )
    if normalizer:
        print(
            "note: llama.cpp does not compose characters (NFC) before it looks tokens up, "
            "as this tokenizer does"
        )
    return (
        "llama-bpe"
        if PATTERNS[pattern] == "dbrx" and data["model"].get("ignore_merges")
        else PATTERNS[pattern]
    )


# -------------------------------------------------------------------------------------- the file
def check_windows(config: ModelConfig, family: str) -> None:
    """Raise ValueError for a sliding window that llama.cpp lacks: only its gpt-oss has one."""
    if family != "gpt_oss" and 0 < config.sliding_window < config.context_length:
        raise ValueError(
            f"llama.cpp's {ARCHITECTURES[family]} sees the whole context, and this model has "
            f"sliding_window {config.sliding_window}: it cannot be exported to GGUF"
        )


def add_keys(
    gguf,
    writer,
    name: str,
    config: ModelConfig,
    family: str,
    quantize: str,
    tokenizer: Tokenizer,
    vocabulary: Vocabulary,
) -> None:
    """Write everything in the file but the tensors."""
    c, kinds = config, gguf.LlamaFileType
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(
        {
            "f32": kinds.ALL_F32,
            "f16": kinds.MOSTLY_F16,
            "bf16": kinds.MOSTLY_BF16,
            "q8_0": kinds.MOSTLY_Q8_0,
        }[quantize]
    )
    if quantize == "q8_0":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(c.vocabulary_size)
    writer.add_context_length(c.context_length)
    writer.add_embedding_length(c.d_model)
    writer.add_block_count(c.transformer_blocks)
    writer.add_feed_forward_length(c.d_ff)
    writer.add_head_count(c.num_heads)
    writer.add_head_count_kv(c.num_kv_heads)
    writer.add_key_length(c.attention_head_dim)
    writer.add_value_length(c.attention_head_dim)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_expert_count(c.num_experts)
    writer.add_expert_used_count(c.top_k)
    writer.add_rope_dimension_count(c.attention_head_dim)
    writer.add_rope_freq_base(c.rope_theta)
    if c.rope_scaling != "none":
        writer.add_rope_scaling_type(gguf.RopeScalingType[c.rope_scaling.upper()])
        writer.add_rope_scaling_factor(c.rope_scaling_factor)
        writer.add_rope_scaling_orig_ctx_len(round(c.context_length / c.rope_scaling_factor))
    if family != "mixtral":
        writer.add_expert_feed_forward_length(c.d_ff)
    if family == "gpt_oss":
        writer.add_sliding_window(c.sliding_window)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    writer.add_token_merges(vocabulary.merges)
    if tokenizer.start_id is not None:
        writer.add_bos_token_id(tokenizer.start_id)
    writer.add_add_bos_token(tokenizer.start_id is not None)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_chat_template(chat_template_of(tokenizer))
    for add, i in zip(
        (writer.add_eot_token_id, writer.add_eom_token_id),
        (i for i in tokenizer.all_stop_ids if i != tokenizer.eos_id),
        strict=False,
    ):
        add(i)


def write_gguf(
    gguf,
    path: Path,
    name: str,
    config: ModelConfig,
    family: str,
    entries: Sequence[Entry],
    weights: Mapping[str, Tensor],
    quantize: str,
    tokenizer: Tokenizer,
    vocabulary: Vocabulary,
) -> None:
    """Write the file, one tensor at a time."""
    writer, types = gguf.GGUFWriter(path, ARCHITECTURES[family]), gguf.GGMLQuantizationType
    try:
        add_keys(gguf, writer, name, config, family, quantize, tokenizer, vocabulary)
        for entry in entries:
            writer.add_tensor_info(
                entry.part.name,
                entry.shape,
                np.dtype(np.float32),
                bytes_of(gguf, entry),
                raw_dtype=types[entry.kind.upper()],
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            writer.write_tensor_data(
                encoded(gguf, entry, taken(entry.part, weights[entry.part.source]))
            )
    finally:
        writer.close()


def needed_bytes(gguf, entries: Sequence[Entry], vocabulary: Vocabulary) -> int:
    """Return the size of the file, or a little more."""
    text = sum(len(string.encode()) + 12 for string in (*vocabulary.tokens, *vocabulary.merges))
    return sum(bytes_of(gguf, entry) + 256 for entry in entries) + text + (1 << 16)


def modelfile(
    gguf_name: str, config: ModelConfig, stops: Iterable[str], template: str = PLAIN_PROMPT
) -> str:
    """Return Ollama's Modelfile: a Go template, and predict.py's settings instead of its own."""
    d = PredictConfig()
    settings = {
        "num_ctx": config.context_length,
        "num_predict": d.max_new_tokens,
        "temperature": d.temperature,
        "top_k": d.top_k,
        "top_p": d.top_p,
        "min_p": d.min_p,
        "repeat_penalty": d.repetition_penalty,
    }
    lines = [
        f"FROM ./{gguf_name}",
        f'TEMPLATE "{template}"',
        *(f"PARAMETER {name} {value}" for name, value in settings.items()),
    ]
    return "\n".join([*lines, *(f'PARAMETER stop "{stop}"' for stop in stops)]) + "\n"


def fits_modelfile(text: str) -> bool:
    """Return whether a Modelfile can hold a text, which may come from someone else.

    A Modelfile has no escapes: what follows a quote or the end of a line is an instruction.
    """
    return text.isprintable() and not set(text) & {'"', "'", "\N{REPLACEMENT CHARACTER}"}


def stop_words(tokenizer: Tokenizer) -> list[str]:
    """Return the texts of the stop tokens. Leave out, with a line, what no Modelfile can hold."""
    words = [tokenizer.decode([i]) for i in tokenizer.all_stop_ids]
    for word in words:
        if not (word and fits_modelfile(word)):
            print(
                f"note: the Modelfile leaves out the stop word {word!r}, which it cannot hold; "
                "llama.cpp itself stops at the token"
            )
    return [word for word in words if word and fits_modelfile(word)]


# ----------------------------------------------------------------------------------------- check
def read_gguf(gguf, path: Path) -> tuple[dict[str, object], list[str], Callable[[str], Tensor]]:
    """Return (all keys, names of the tensors, read(name)) of a file that `write_gguf` wrote."""

    class Reader(gguf.GGUFReader):
        def _build_fields(self, *given):
            # Each token is a slice, and one of numpy's memmap costs four times as much.
            self.data = self.data.view(np.ndarray)
            return super()._build_fields(*given)

    reader = Reader(path)
    stored = {tensor.name: tensor for tensor in reader.tensors}

    def read(name: str) -> Tensor:
        return torch.tensor(gguf.quants.dequantize(stored[name].data, stored[name].tensor_type))

    return {name: field.contents() for name, field in reader.fields.items()}, list(stored), read


def said_by(keys: Mapping[str, object]) -> dict[str, object]:
    """Return what a file's keys say about the model, by our names, as llama.cpp reads them.

    A value is a set if several keys mean one thing and differ.
    """
    arch = keys.get("general.architecture")

    def of(*names: str) -> object:
        values = {keys.get(f"{arch}.{name}") for name in names}
        return values.pop() if len(values) == 1 else values

    def token(name: str) -> object:
        return keys.get(f"tokenizer.ggml.{name}_token_id")

    return {
        "architecture": arch,
        "d_model": of("embedding_length"),
        "transformer_blocks": of("block_count"),
        "context_length": of("context_length"),
        "vocabulary_size": of("vocab_size"),
        "num_heads": of("attention.head_count"),
        "num_kv_heads": of("attention.head_count_kv"),
        "head_dim": of("attention.key_length", "attention.value_length", "rope.dimension_count"),
        "sliding_window": of("attention.sliding_window") or 0,
        "rope_theta": of("rope.freq_base"),
        "rope_scaling": of("rope.scaling.type") or "none",
        "rope_scaling_factor": of("rope.scaling.factor") or 1.0,
        "trained_context": of("rope.scaling.original_context_length"),
        "num_experts": of("expert_count"),
        "top_k": of("expert_used_count"),
        "d_ff": of("feed_forward_length", *["expert_feed_forward_length"] * (arch != "llama")),
        "rms_norm_eps": of("attention.layer_norm_rms_epsilon"),
        "start_id": token("bos") if keys.get("tokenizer.ggml.add_bos_token") else None,
        "stop_ids": [i for i in map(token, ("eos", "eot", "eom")) if i is not None],
        "chat_template": keys.get("tokenizer.chat_template"),
    }


def check_keys(
    name: str,
    keys: Mapping[str, object],
    config: ModelConfig,
    family: str,
    tokenizer: Tokenizer,
    vocabulary: Vocabulary,
) -> None:
    """Compare the keys of a file with the model and its tokenizer.

    Raise ExportError if they differ. Nothing in the tensors would show a wrong key.
    """
    wanted = dataclasses.asdict(config) | {
        "architecture": ARCHITECTURES[family],
        "head_dim": config.attention_head_dim,
        "sliding_window": config.sliding_window if family == "gpt_oss" else 0,
        "trained_context": None
        if config.rope_scaling == "none"
        else round(config.context_length / config.rope_scaling_factor),
        "start_id": tokenizer.start_id,
        "stop_ids": [
            tokenizer.eos_id,
            *(i for i in tokenizer.all_stop_ids if i != tokenizer.eos_id),
        ][:3],
        "chat_template": chat_template_of(tokenizer),
    }
    wanted = {
        key: float(np.float32(value)) if type(value) is float else value
        for key, value in wanted.items()
    }
    said = said_by(keys)
    if wrong := [
        f"{key} {value} instead of {wanted[key]}"
        for key, value in said.items()
        if value != wanted[key]
    ]:
        raise ExportError(f"{name} says {', '.join(wrong)}: nothing was written")
    if (
        Vocabulary(
            *(
                keys.get(f"tokenizer.ggml.{key}")
                for key in ("pre", "tokens", "token_type", "merges")
            )
        )
        != vocabulary
    ):
        raise ExportError(
            f"{name} holds other tokens or merges than {tokenizer.name}: nothing was written"
        )
    print(
        f"check: {name}: {len(said)} settings and {len(vocabulary.tokens):,} tokens "
        "read back as the model's"
    )


def rounded_yarn(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    ids_BT: Tensor,
    ours_BTV: Tensor,
    accept: bool,
) -> tuple[ModelConfig, Tensor]:
    """Return (config, logits) as llama.cpp has them.

    llama.cpp rounds the ends of YaRN's ramp, gpt-oss does not, and no key of a file can say so.
    What it computes is the model with yarn_truncate, which is another function. Raise ExportError
    if the logits show it and `accept` is False.
    """
    if config.yarn_truncate or config.rope_scaling_factor == 1:
        return config, ours_BTV
    config = dataclasses.replace(config, yarn_truncate=True)
    theirs_BTV = logits_of(lazy_model(config, lambda name: weights[name].float()), ids_BT)
    what = "llama.cpp rounds the ends of YaRN's ramp, this model does not"
    if accept:
        difference = export.largest_difference(ours_BTV, theirs_BTV)
        print(
            f"note: {what}: there its logits differ by up to {difference:.1e} in "
            f"{ids_BT.shape[1]} tokens, perhaps by more in longer texts; "
            "the checks that follow are with them rounded"
        )
        return config, theirs_BTV
    try:
        check_logits("llama.cpp's YaRN", ours_BTV, theirs_BTV, config)
    except ExportError as error:
        raise ExportError(
            f"{what}, and no key of the file tells it; {error}. "
            "--accept_rounded_yarn writes the file all the same"
        ) from error
    return config, theirs_BTV


def check_file(
    gguf,
    path: Path,
    name: str,
    config: ModelConfig,
    family: str,
    entries: Sequence[Entry],
    weights: Mapping[str, Tensor],
    quantize: str,
    tokenizer: Tokenizer,
    vocabulary: Vocabulary,
    ids_BT: Tensor,
    ours_BTV: Tensor,
) -> None:
    """Compare the file's keys with the config, and what its architecture computes with the model.

    runtime/interop/published.py computes the former, without our model's code. The model's weights
    are rounded like those of the file. ours_BTV: the model's logits of ids_BT, nothing rounded.
    Raise ExportError if they differ.
    """
    keys, names, read = read_gguf(gguf, path)
    check_keys(name, keys, config, family, tokenizer, vocabulary)
    kinds, expected_BTV = {entry.part.source: entry.kind for entry in entries}, ours_BTV
    model = lazy_model(config, lambda name: rounded(gguf, weights[name], kinds[name]))
    if quantize != "f32":
        expected_BTV = logits_of(model, ids_BT)
    check_published(
        f"{name}, read back",
        KNOWS,
        model,
        expected_BTV,
        published.from_gguf(keys, names, read),
        ids_BT,
    )
    if quantize != "f32":
        print(
            f"check: {quantize} weights instead of float32: largest logit difference "
            f"{export.largest_difference(ours_BTV, expected_BTV):.1e}"
        )
    check_llama_cpp(path, tokenizer, ids_BT, expected_BTV, quantize, config)


def run_llama_cpp(
    path: str, ids: list[int], text: str, num_threads: int
) -> tuple[np.ndarray, list[int]]:
    """Return logits [T, V] of `ids` and the ids of `text` in llama.cpp, with a float32 cache."""
    import llama_cpp

    T, f32 = len(ids), llama_cpp.GGML_TYPE_F32
    with contextlib.closing(
        llama_cpp.Llama(
            path,
            n_ctx=T,
            n_batch=T,
            n_ubatch=T,
            n_threads=num_threads,
            n_threads_batch=num_threads,
            n_gpu_layers=0,
            logits_all=True,
            type_k=f32,
            type_v=f32,
            verbose=False,
        )
    ) as llama:
        llama.eval(ids)
        return llama.scores[:T].copy(), llama.tokenize(text.encode(), add_bos=True, special=False)


def check_llama_cpp(
    path: Path,
    tokenizer: Tokenizer,
    ids_BT: Tensor,
    expected_BTV: Tensor,
    quantize: str,
    config: ModelConfig,
) -> None:
    """Run the file in llama.cpp, if llama-cpp-python is installed.

    Raise ExportError unless the logits and the token ids are the same.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        print("note: not run in llama.cpp itself, because llama-cpp-python is not installed")
        return
    # A process of its own: a failure in llama.cpp ends the process.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            logits_TV, their_ids = pool.submit(
                run_llama_cpp,
                str(path),
                ids_BT[0].tolist(),
                export.CHECK_TEXT,
                torch.get_num_threads(),
            ).result()
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            raise ExportError(
                f"llama.cpp does not run the file: {error}. "
                "If its build is at fault, pip uninstall llama-cpp-python leaves this check out"
            ) from error
    theirs_BTV = torch.from_numpy(logits_TV)[None]
    start = [] if tokenizer.start_id is None else [tokenizer.start_id]
    our_ids = start + tokenizer.encode(export.CHECK_TEXT)
    if their_ids != our_ids:
        at = next(
            (i for i, (a, b) in enumerate(zip(our_ids, their_ids, strict=False)) if a != b),
            min(len(our_ids), len(their_ids)),
        )
        raise ExportError(
            f"llama.cpp's token {at} of the check's text is {their_ids[at : at + 1]}, "
            f"ours {our_ids[at : at + 1]}: nothing was written"
        )
    print(f"check: llama.cpp: the same {len(our_ids)} token ids")
    if quantize == "f32":
        check_logits("llama.cpp", expected_BTV, theirs_BTV, config)
        return
    tolerance = NARROW_TOLERANCE[quantize]
    mean_square = (theirs_BTV - expected_BTV).square().mean()
    share = (mean_square / expected_BTV.square().mean()).sqrt().item()
    print(
        f"check: llama.cpp: logits differ by {100 * share:.2g} % (root mean square; "
        f"{100 * tolerance:.2g} % is allowed), because its products with {quantize} weights are "
        "narrow themselves: this finds a wrong layout, but no small mistake; "
        f"largest difference {export.largest_difference(expected_BTV, theirs_BTV):.1e}"
    )
    if not share <= tolerance:
        raise ExportError(
            f"llama.cpp: logits differ by {100 * share:.2g} %, "
            f"more than {100 * tolerance:.2g} %: nothing was written"
        )


# ------------------------------------------------------------------------------------ the export
def check_name(out: str) -> None:
    """Raise ValueError if a file cannot have this name, or if a Modelfile cannot hold it."""
    if Path(out).suffix != ".gguf":
        raise ValueError(f"--out must end in .gguf, not {out!r}")
    if not fits_modelfile(Path(out).name):
        raise ValueError(
            f"--out {out!r}: the Modelfile names the file and can hold no quotes or control "
            "characters; choose another name"
        )


def export_model(
    source: Source, out: Path, recipe: Path, quantize: str, accept_rounded_yarn: bool
) -> None:
    """Write `source` to `out`, check it, and write its Modelfile to `recipe`."""
    gguf = import_gguf()
    config, tokenizer = source.checkpoint.model_config, source.tokenizer
    weights: Mapping[str, Tensor] = source.checkpoint.model
    KNOWS.check(source.model)
    family = family_of(config)
    check_windows(config, family)
    vocabulary = vocabulary_of(gguf, tokenizer, config.vocabulary_size)
    config, weights = with_head(config, family, weights)
    entries = layout(config, family, weights, quantize)
    matrices = [entry.kind for entry in entries if entry.part.is_matrix]
    if others := len(matrices) - matrices.count(quantize):
        print(
            f"note: {others} of {len(matrices)} matrices are f16: "
            f"{quantize} needs rows of a multiple of {BLOCK} numbers"
        )
    with staged(out, needed_bytes(gguf, entries, vocabulary)) as temporary:
        ids_BT = export.check_ids(tokenizer, config)
        config, ours_BTV = rounded_yarn(
            config, weights, ids_BT, logits_of(source.model, ids_BT), accept_rounded_yarn
        )
        write_gguf(
            gguf,
            temporary,
            out.stem,
            config,
            family,
            entries,
            weights,
            quantize,
            tokenizer,
            vocabulary,
        )
        check_file(
            gguf,
            temporary,
            out.name,
            config,
            family,
            entries,
            weights,
            quantize,
            tokenizer,
            vocabulary,
            ids_BT,
            ours_BTV,
        )
    template = PLAIN_PROMPT if tokenizer.chat is None else chat_spellings.GO
    write_text_atomic(recipe, modelfile(out.name, config, stop_words(tokenizer), template))
    print(
        f"{out}: {ARCHITECTURES[family]}, "
        f"{total_parameters(source.checkpoint.model_config):,} parameters, {quantize}, "
        f"{human_bytes(out.stat().st_size)}; {recipe} for Ollama"
    )
