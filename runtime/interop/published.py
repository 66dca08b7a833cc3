"""Compute what a file in a published architecture computes, to check an export.

Only the file's own settings and tensors are used. The code follows the definitions of Mixtral,
Qwen3-MoE and gpt-oss (transformers 5.23, models/; llama.cpp, src/llama-model.cpp). It uses none of
this repo's model code, so a model that an architecture cannot hold is found by its logits. It reads
a whole text at once, without a cache, with one block in memory at a time, in float32.
tests/interop/test_published.py compares it with transformers' own classes.

Shape letters: T tokens, C width, H query heads, G key/value heads, D head size, E experts, K
experts of a token, F hidden features.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Published:
    """A model as a file describes it."""

    # a float32 tensor or None, by the names that `logits` uses
    read: Reader
    blocks: int
    heads: int
    kv_heads: int
    head_size: int
    top_k: int
    eps: float
    theta: float
    # of each block, 0 for none
    windows: tuple[int, ...]
    # none, linear or yarn
    scaling: str = "none"
    factor: float = 1.0
    # yarn: the context before it was extended, and whether the ends of its ramp are rounded
    trained_tokens: int = 0
    truncate: bool = True
    # rotate features (2i, 2i + 1), not (i, i + D/2)
    neighbours: bool = False
    # softmax over the chosen experts' logits, clamped SwiGLU
    is_gpt_oss: bool = False

    def in_float64(self) -> Published:
        """Return the same model, computed in float64."""

        def read(name: str) -> Tensor | None:
            tensor = self.read(name)
            return None if tensor is None else tensor.double()

        return dataclasses.replace(self, read=read)


def logits(
    model: Published, ids_T: Sequence[int], choices: Sequence[Tensor] | None = None
) -> Tensor:
    """Return logits [T, V] of a text.

    choices: experts [T, K] of each block, which are used if they are as good as the best ones.
    Raise ValueError if a tensor is missing.
    """
    embedding = _tensor(model, "embed")
    x_TC = embedding[torch.tensor(list(ids_T))]
    T = len(x_TC)
    cos_TD, sin_TD = _rotations(model, T)
    for n, window in enumerate(model.windows):
        h_TC = _rms_norm(x_TC, _tensor(model, f"{n}.norm1"), model.eps)
        x_TC = x_TC + _attention(model, n, h_TC, cos_TD, sin_TD, window)
        h_TC = _rms_norm(x_TC, _tensor(model, f"{n}.norm2"), model.eps)
        x_TC = x_TC + _experts(model, n, h_TC, None if choices is None else choices[n])
    head = model.read("head")
    return (
        _rms_norm(x_TC, _tensor(model, "norm"), model.eps) @ (embedding if head is None else head).T
    )


def _tensor(model: Published, name: str) -> Tensor:
    tensor = model.read(name)
    if tensor is None:
        raise ValueError(f"the file has no tensor for {name}")
    return tensor


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight


def _linear(model: Published, name: str, x: Tensor) -> Tensor:
    y, bias = x @ _tensor(model, name).T, model.read(f"{name}_bias")
    return y if bias is None else y + bias


def _rotations(model: Published, T: int) -> tuple[Tensor, Tensor]:
    """Return cos and sin [T, D/2] of every position and pair.

    YaRN: Peng et al. 2023, sections 3.2 and 3.4, as in transformers and llama.cpp.
    """
    D = model.head_size
    pair = torch.arange(D // 2, dtype=torch.float64)
    turn, sharpened = model.theta ** (-2 * pair / D), 1.0
    if model.scaling == "linear":
        turn = turn / model.factor
    if model.scaling == "yarn":
        ends = [
            D * math.log(model.trained_tokens / (turns * 2 * math.pi)) / (2 * math.log(model.theta))
            for turns in (32, 1)
        ]
        if model.truncate:
            ends = [math.floor(ends[0]), math.ceil(ends[1])]
        low, high = max(ends[0], 0), min(ends[1], D - 1)
        slow = ((pair - low) / max(high - low, 0.001)).clamp(0, 1)
        turn = turn / model.factor * slow + turn * (1 - slow)
        sharpened = 1 + 0.1 * math.log(model.factor)
    angles_TP = torch.arange(T, dtype=torch.float64)[:, None] * turn
    return (angles_TP.cos() * sharpened).float(), (angles_TP.sin() * sharpened).float()


def _rotate(x_THD: Tensor, cos_TP: Tensor, sin_TP: Tensor, neighbours: bool) -> Tensor:
    pairs = (
        x_THD.unflatten(2, (-1, 2)) if neighbours else x_THD.unflatten(2, (2, -1)).transpose(2, 3)
    )
    a, b = pairs.unbind(dim=3)
    cos, sin = cos_TP[:, None], sin_TP[:, None]
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=3)
    return (turned if neighbours else turned.transpose(2, 3)).flatten(2)


def _attention(
    model: Published, n: int, x_TC: Tensor, cos: Tensor, sin: Tensor, window: int
) -> Tensor:
    T, H, G, D = len(x_TC), model.heads, model.kv_heads, model.head_size
    q_THD, k_TGD, v_TGD = (
        _linear(model, f"{n}.{name}", x_TC).view(T, -1, D) for name in ("q", "k", "v")
    )
    if (q_norm := model.read(f"{n}.q_norm")) is not None:
        q_THD, k_TGD = (
            _rms_norm(q_THD, q_norm, model.eps),
            _rms_norm(k_TGD, _tensor(model, f"{n}.k_norm"), model.eps),
        )
    q_THD, k_TGD = (_rotate(x, cos, sin, model.neighbours) for x in (q_THD, k_TGD))
    sinks_H = model.read(f"{n}.sinks")
    behind_TT = torch.arange(T)[:, None] - torch.arange(T)
    hidden_TT = (behind_TT < 0) | (behind_TT >= (window or T))
    heads = []
    for h in range(H):
        g = h // (H // G)
        scores_TT = (q_THD[:, h] @ k_TGD[:, g].T / math.sqrt(D)).masked_fill(hidden_TT, -math.inf)
        if sinks_H is not None:
            scores_TT = torch.cat((scores_TT, sinks_H[h].expand(T, 1)), dim=1)
        heads.append(scores_TT.softmax(dim=1)[:, :T] @ v_TGD[:, g])
    return _linear(model, f"{n}.out", torch.cat(heads, dim=1))


def _experts(model: Published, n: int, x_TC: Tensor, choice_TK: Tensor | None) -> Tensor:
    scores_TE, K = _linear(model, f"{n}.router", x_TC), model.top_k
    own_TK = scores_TE.topk(K, dim=1).indices
    if choice_TK is not None:
        # Rounding may swap two experts. A choice that costs more than that is not used.
        lost_T = scores_TE.gather(1, own_TK).sum(dim=1) - scores_TE.gather(1, choice_TK).sum(dim=1)
        own_TK = torch.where(
            (lost_T <= 1e-4 * scores_TE.abs().amax(dim=1))[:, None], choice_TK, own_TK
        )
    weights_TK = (
        scores_TE.gather(1, own_TK).softmax(dim=1)
        if model.is_gpt_oss
        else scores_TE.softmax(dim=1).gather(1, own_TK)
    )
    weights_TK = weights_TK / weights_TK.sum(dim=1, keepdim=True)
    y_TC = torch.zeros_like(x_TC)
    for e in own_TK.unique().tolist():
        token, place = (own_TK == e).nonzero(as_tuple=True)
        gate, up = (_linear(model, f"{n}.{name}.{e}", x_TC[token]) for name in ("gate", "up"))
        if model.is_gpt_oss:
            gate = gate.clamp(max=7.0)
            hidden = gate * torch.sigmoid(1.702 * gate) * (up.clamp(-7.0, 7.0) + 1)
        else:
            hidden = F.silu(gate) * up
        y_TC.index_add_(
            0, token, _linear(model, f"{n}.down.{e}", hidden) * weights_TK[token, place][:, None]
        )
    return y_TC


class Reader:
    """Reads tensors of a file by the names that `logits` uses.

    theirs(name): (name in the file, function that cuts our tensor out of it) or None.
    """

    def __init__(
        self,
        names: Sequence[str],
        read: Callable[[str], Tensor],
        theirs: Callable[[str], tuple | None],
    ):
        self.names, self.theirs, self._read = frozenset(names), theirs, read

    def __call__(self, name: str) -> Tensor | None:
        found = self.theirs(name)
        if found is None or found[0] not in self.names:
            return None
        return found[1](self._read(found[0])).float()


def unclaimed(model: Published) -> list[str]:
    """Return the tensors of the file that the architecture has no use for."""
    parts = [
        "norm1",
        "norm2",
        "q",
        "q_bias",
        "k",
        "k_bias",
        "v",
        "v_bias",
        "out",
        "out_bias",
        "q_norm",
        "k_norm",
        "sinks",
        "router",
        "router_bias",
    ]
    for e in range(len(_tensor(model, "0.router"))):
        parts += [f"{part}.{e}{bias}" for part in ("gate", "up", "down") for bias in ("", "_bias")]
    names = [
        "embed",
        "norm",
        "head",
        *(f"{n}.{part}" for n in range(model.blocks) for part in parts),
    ]
    claimed = {found[0] for found in map(model.read.theirs, names) if found}
    return sorted(model.read.names - claimed)


# ---------------------------------------------------------------------------------- Hugging Face
def from_folder(config: Mapping, names: Sequence[str], read: Callable[[str], Tensor]) -> Published:
    """Return a model of config.json and a folder's tensors as scripts.export_hf writes them.

    Experts are stored one by one, those of gpt-oss stacked.
    """
    family = config["model_type"]
    rope = config["rope_parameters"]
    is_gpt_oss, blocks = family == "gpt_oss", config["num_hidden_layers"]
    window = (config["sliding_window"] or 0) if config.get("use_sliding_window", True) else 0
    windows = (
        [window if kind == "sliding_attention" else 0 for kind in config["layer_types"]]
        if is_gpt_oss
        else [window] * blocks
    )
    trained = rope.get("original_max_position_embeddings", config["max_position_embeddings"])
    scaling = {"default": "none"}.get(rope["rope_type"], rope["rope_type"])
    return Published(
        Reader(names, read, functools.partial(_in_folder, family)),
        blocks,
        config["num_attention_heads"],
        config["num_key_value_heads"],
        config["head_dim"],
        config["num_experts_per_tok"],
        config["rms_norm_eps"],
        rope["rope_theta"],
        tuple(windows),
        scaling,
        rope.get("factor", 1.0),
        trained,
        rope.get("truncate", True),
        False,
        is_gpt_oss,
    )


_HF_OUTSIDE = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
_HF_INSIDE = {
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "out": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
}
_HF_EXPERT = {
    "mixtral": {"gate": "w1", "up": "w3", "down": "w2"},
    "qwen3_moe": {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
}


def _in_folder(family: str, name: str) -> tuple | None:
    def whole(tensor: Tensor) -> Tensor:
        return tensor

    if name in _HF_OUTSIDE:
        return f"{_HF_OUTSIDE[name]}.weight", whole
    n, part, *expert = name.split(".")
    plain, is_bias = part.removesuffix("_bias"), part.endswith("_bias")
    kind, layer = "bias" if is_bias else "weight", f"model.layers.{n}"
    moe = f"{layer}.{'block_sparse_moe' if family == 'mixtral' else 'mlp'}"
    if part == "sinks":
        return f"{layer}.self_attn.sinks", whole
    if plain in _HF_INSIDE:
        return f"{layer}.{_HF_INSIDE[plain]}.{kind}", whole
    if plain == "router":
        return f"{moe}.{'router' if family == 'gpt_oss' else 'gate'}.{kind}", whole
    e, is_bias = int(expert[0].removesuffix("_bias")), expert[0].endswith("_bias")
    if family != "gpt_oss":
        return None if is_bias else (f"{moe}.experts.{e}.{_HF_EXPERT[family][part]}.weight", whole)
    # [E, C, 2F] with gate and up columns in turn, and [E, F, C]; biases [E, 2F] and [E, C].
    stacked = (
        f"{moe}.experts.{'down_proj' if part == 'down' else 'gate_up_proj'}{'_bias' * is_bias}"
    )
    columns = {"gate": slice(0, None, 2), "up": slice(1, None, 2), "down": slice(None)}[part]
    return stacked, (lambda t: t[e, columns]) if is_bias else (lambda t: t[e, :, columns].T)


# ------------------------------------------------------------------------------------------ GGUF
def from_gguf(
    keys: Mapping[str, object], names: Sequence[str], read: Callable[[str], Tensor]
) -> Published:
    """Return a model of a GGUF file's keys and tensors.

    It computes what llama.cpp's llama (Mixtral), qwen3moe and gpt-oss compute.
    """
    arch = keys["general.architecture"]

    def of(name: str, default=None):
        return keys.get(f"{arch}.{name}", default)

    is_gpt_oss, blocks = arch == "gpt-oss", of("block_count")
    # Experts are read one at a time, each from a block's six tensors. Those of a narrow file are
    # widened first, so keep all six.
    stacked = functools.lru_cache(maxsize=6)(read)
    # gpt-oss's even blocks have the window; llama.cpp's two others see the whole context.
    windows = tuple(
        of("attention.sliding_window") if is_gpt_oss and n % 2 == 0 else 0 for n in range(blocks)
    )
    return Published(
        Reader(
            names,
            lambda name: stacked(name) if "_exps." in name else read(name),
            functools.partial(_in_gguf, arch),
        ),
        blocks,
        of("attention.head_count"),
        of("attention.head_count_kv"),
        of("attention.key_length"),
        of("expert_used_count"),
        of("attention.layer_norm_rms_epsilon"),
        of("rope.freq_base"),
        windows,
        of("rope.scaling.type", "none"),
        of("rope.scaling.factor", 1.0),
        of("rope.scaling.original_context_length", 0),
        True,
        arch == "llama",
        is_gpt_oss,
    )


_GGUF_OUTSIDE = {"embed": "token_embd", "norm": "output_norm", "head": "output"}
_GGUF_INSIDE = {
    "norm1": "attn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "out": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "router": "ffn_gate_inp",
    "sinks": "attn_sinks",
}


def _in_gguf(arch: str, name: str) -> tuple | None:
    if name in _GGUF_OUTSIDE:
        return f"{_GGUF_OUTSIDE[name]}.weight", lambda t: t
    n, part, *expert = name.split(".")
    if expert:
        e, is_bias = int(expert[0].removesuffix("_bias")), expert[0].endswith("_bias")
        return f"blk.{n}.ffn_{part}_exps.{'bias' if is_bias else 'weight'}", lambda t: t[e]
    plain, kind = part.removesuffix("_bias"), "bias" if part.endswith("_bias") else "weight"
    if part == "norm2":
        return (
            f"blk.{n}.{'post_attention_norm' if arch == 'gpt-oss' else 'ffn_norm'}.weight",
            lambda t: t,
        )
    return f"blk.{n}.{_GGUF_INSIDE[plain]}.{kind}", lambda t: t


# ------------------------------------------------------------------------------- our own weights
def of_weights(settings: Mapping, weights: Mapping[str, Tensor]) -> Published:
    """Return a published architecture with a config.json's settings and weights by our names."""
    half = settings.get("moe_intermediate_size", settings["intermediate_size"])
    reader = Reader(list(weights), weights.__getitem__, functools.partial(_in_ours, half))
    return dataclasses.replace(from_folder(settings, [], weights.__getitem__), read=reader)


_OURS = {
    "norm1": "norm1",
    "norm2": "norm2",
    "q": "attention.W_q",
    "k": "attention.W_k",
    "v": "attention.W_v",
    "out": "attention.out_proj",
    "q_norm": "attention.q_norm",
    "k_norm": "attention.k_norm",
    "router": "moe.router",
}


def _in_ours(half: int, name: str) -> tuple | None:
    if name in ("embed", "norm", "head"):
        return f"{'out_head' if name == 'head' else name}.weight", lambda t: t
    n, part, *expert = name.split(".")
    if part == "sinks":
        return f"layers.{n}.attention.sinks", lambda t: t
    if not expert:
        plain, kind = part.removesuffix("_bias"), "bias" if part.endswith("_bias") else "weight"
        return f"layers.{n}.{_OURS[plain]}.{kind}", lambda t: t
    e, is_bias = int(expert[0].removesuffix("_bias")), expert[0].endswith("_bias")
    stacked = (
        f"layers.{n}.moe.experts.{'b' if is_bias else 'w'}_{'out' if part == 'down' else 'in'}"
    )
    rows = {"gate": slice(half), "up": slice(half, None), "down": slice(None)}[part]
    return stacked, lambda t: t[e, rows]
