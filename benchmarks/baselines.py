"""What `benchmarks/train.py` compares with, holding the same weights: a plain loop over experts,
Hugging Face's classes, a dense model.

`LoopMoE` is a language model of the same mathematics written the usual way: every score of the
attention and every logit of the loss is held, experts are modules visited one after another, each
with matrices of its own. Baselines are called `model(ids, targets) -> (mean cross-entropy,
auxiliary losses)` and take our weights with `load_from(model)`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config_model import ModelConfig
from model import LLM


def dense_config(config: ModelConfig) -> ModelConfig:
    """The dense model of the same active FLOPs: one expert, as wide as the top_k that a token meets
    together.
    """
    return dataclasses.replace(
        config,
        num_experts=1,
        top_k=1,
        d_ff=config.top_k * config.d_ff,
        capacity_factor=0.0,
        router_bias_rate=0.0,
    )


def _refuse(config: ModelConfig, who: str, required: dict) -> None:
    """ValueError if `config` has anything else than `required`."""
    if other := [name for name, value in required.items() if getattr(config, name) != value]:
        raise ValueError(
            f"{who} cannot have "
            f"{', '.join(f'{name} {getattr(config, name)}' for name in other)}: leave it out, or "
            "set " + ", ".join(f"{name} {required[name]}" for name in other)
        )


def check_loop(config: ModelConfig) -> None:
    """ValueError if LoopMoE cannot be this config."""
    _refuse(
        config,
        "the loop baseline",
        dict(rope_scaling="none", capacity_factor=0.0, router_bias_rate=0.0),
    )


def check_hf(config: ModelConfig) -> None:
    """ValueError if Hugging Face's classes cannot be this config, or are not installed."""
    _refuse(
        config,
        "Hugging Face's class",
        dict(
            expert_activation="swiglu",
            expert_bias=False,
            qkv_bias=False,
            out_proj_bias=False,
            head_bias=False,
            use_attention_bias=False,
            use_rope=True,
            rope_scaling="none",
            sliding_window=0,
            capacity_factor=0.0,
            router_bias_rate=0.0,
            z_loss_coef=0.0,
            dropout=0.0,
        ),
    )
    if importlib.util.find_spec("transformers") is None:
        raise ValueError("Hugging Face's classes need transformers: pip install transformers")


# ------------------------------------------------------------------------ a plain loop over experts
class LoopAttention(nn.Module):
    """Attention that holds all T x T scores: matmul, bias, mask, softmax in float32, matmul."""

    def __init__(self, config: ModelConfig, block: int):
        super().__init__()
        C, T, D, self.dropout = (
            config.d_model,
            config.context_length,
            config.attention_head_dim,
            config.dropout,
        )
        self.H, self.G, self.D = config.num_heads, config.num_kv_heads, D
        self.query = nn.Linear(C, self.H * D, bias=config.qkv_bias)
        self.key = nn.Linear(C, self.G * D, bias=config.qkv_bias)
        self.value = nn.Linear(C, self.G * D, bias=config.qkv_bias)
        self.out = nn.Linear(self.H * D, C, bias=config.out_proj_bias)
        self.query_norm = nn.RMSNorm(D, eps=config.rms_norm_eps) if config.qk_norm else None
        self.key_norm = nn.RMSNorm(D, eps=config.rms_norm_eps) if config.qk_norm else None
        self.table = nn.Parameter(torch.zeros(self.H, T, T)) if config.use_attention_bias else None
        window = config.window(block) or T
        visible_TT = torch.ones(T, T, dtype=torch.bool).tril().triu(1 - window)
        self.register_buffer("visible_TT", visible_TT, persistent=False)

    def forward(self, x_BTC: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        B, T, _ = x_BTC.shape
        q_BHTD = self.query(x_BTC).view(B, T, self.H, self.D).transpose(1, 2)
        k_BGTD = self.key(x_BTC).view(B, T, self.G, self.D).transpose(1, 2)
        v_BGTD = self.value(x_BTC).view(B, T, self.G, self.D).transpose(1, 2)
        if self.query_norm is not None:
            q_BHTD, k_BGTD = self.query_norm(q_BHTD.float()), self.key_norm(k_BGTD.float())
        if rope is not None:
            q_BHTD, k_BGTD = _rotate(q_BHTD, *rope), _rotate(k_BGTD, *rope)
        q_BHTD, k_BGTD = q_BHTD.to(v_BGTD.dtype), k_BGTD.to(v_BGTD.dtype)
        k_BHTD = k_BGTD.repeat_interleave(self.H // self.G, dim=1)
        v_BHTD = v_BGTD.repeat_interleave(self.H // self.G, dim=1)
        scores_BHTT = q_BHTD @ k_BHTD.transpose(2, 3) / math.sqrt(self.D)
        if self.table is not None:
            scores_BHTT = scores_BHTT + self.table[:, :T, :T]
        scores_BHTT = scores_BHTT.masked_fill(~self.visible_TT[:T, :T], -math.inf)
        weights_BHTT = F.dropout(
            scores_BHTT.softmax(dim=-1, dtype=torch.float32), self.dropout, self.training
        ).to(v_BHTD.dtype)
        return self.out((weights_BHTT @ v_BHTD).transpose(1, 2).reshape(B, T, self.H * self.D))


def _rotate(x_BHTD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotate-half RoPE."""
    T, half = x_BHTD.shape[2], x_BHTD.shape[3] // 2
    turned = torch.cat((-x_BHTD[..., half:], x_BHTD[..., :half]), dim=-1)
    return x_BHTD * cos_TD[:T] + turned * sin_TD[:T]


class LoopExpert(nn.Module):
    """One feed-forward network: Linear-GELU-Linear, or gated SiLU of three matrices."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = (
            nn.Linear(config.d_model, config.d_ff, bias=config.expert_bias)
            if config.expert_activation == "swiglu"
            else None
        )
        self.up = nn.Linear(config.d_model, config.d_ff, bias=config.expert_bias)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=config.expert_bias)
        self.dropout = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.up(x)) if self.gate is None else F.silu(self.gate(x)) * self.up(x)
        return self.down(F.dropout(hidden, self.dropout, self.training))


class LoopExperts(nn.Module):
    """Softmax router, top-k, and a Python loop: where does this expert appear, gather, compute, add
    back.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.num_experts, self.top_k = config.num_experts, config.top_k
        self.router = nn.Linear(config.d_model, config.num_experts, bias=False)
        self.experts = nn.ModuleList(LoopExpert(config) for _ in range(config.num_experts))

    def forward(self, x_BTC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, C] -> ([B, T, C], load-balance loss, z-loss), as the Router and MoE of
        model_parts.py define them.
        """
        x_NC = x_BTC.reshape(-1, x_BTC.shape[-1])
        logits_NE = self.router(x_NC).float()
        probabilities_NE = logits_NE.softmax(dim=-1)
        weights_NK, experts_NK = probabilities_NE.topk(self.top_k, dim=-1)
        weights_NK = weights_NK / weights_NK.sum(dim=-1, keepdim=True)
        y_NC = torch.zeros_like(x_NC)
        for e, expert in enumerate(self.experts):
            token, place = torch.where(experts_NK == e)
            if len(token):
                y_NC.index_add_(
                    0, token, (expert(x_NC[token]) * weights_NK[token, place, None]).to(y_NC.dtype)
                )
        share_E = F.one_hot(experts_NK.flatten(), self.num_experts).float().mean(dim=0)
        balance = self.num_experts * (share_E * probabilities_NE.mean(dim=0)).sum()
        return y_NC.view_as(x_BTC), balance, logits_NE.logsumexp(dim=-1).square().mean()


class LoopBlock(nn.Module):
    def __init__(self, config: ModelConfig, block: int):
        super().__init__()
        self.norm1 = nn.RMSNorm(config.d_model, eps=config.rms_norm_eps)
        self.attention = LoopAttention(config, block)
        self.norm2 = nn.RMSNorm(config.d_model, eps=config.rms_norm_eps)
        self.moe = LoopExperts(config)

    def forward(
        self, x_BTC: Tensor, rope: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        x_BTC = x_BTC + self.attention(self.norm1(x_BTC), rope)
        y_BTC, balance, z = self.moe(self.norm2(x_BTC))
        return x_BTC + y_BTC, balance, z


class LoopMoE(nn.Module):
    """The usual way to write the model of a ModelConfig; ValueError for the few choices that it
    does not have.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        check_loop(config)
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary_size, config.d_model)
        self.blocks = nn.ModuleList(
            LoopBlock(config, block) for block in range(config.transformer_blocks)
        )
        self.norm = nn.RMSNorm(config.d_model, eps=config.rms_norm_eps)
        self.head = nn.Linear(config.d_model, config.vocabulary_size, bias=config.head_bias)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        D = config.attention_head_dim
        frequencies = config.rope_theta ** -(
            torch.arange(0, D, 2, dtype=torch.float64, device="cpu") / D
        )  # float64, which MPS has not
        angles_TD = torch.outer(
            torch.arange(config.context_length, dtype=torch.float64, device="cpu"), frequencies
        ).repeat(1, 2)
        self.register_buffer("cos_TD", angles_TD.cos().float(), persistent=False)
        self.register_buffer("sin_TD", angles_TD.sin().float(), persistent=False)

    def forward(self, ids_BT: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
        """(mean cross-entropy in nats, auxiliary losses with their coefficients) of ids and
        targets, int64 [B, T].
        """
        x_BTC = self.embedding(ids_BT)
        rope = (self.cos_TD, self.sin_TD) if self.config.use_rope else None
        auxiliary = 0.0
        for block in self.blocks:
            x_BTC, balance, z = block(x_BTC, rope)
            auxiliary = (
                auxiliary + self.config.aux_loss_coef * balance + self.config.z_loss_coef * z
            )
        logits_BTV = self.head(self.norm(x_BTC)).float()
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten()), auxiliary

    def counterparts(self) -> Iterator[tuple[nn.Parameter, str, int | slice]]:
        """Every parameter, the name of ours that holds the same numbers, and where in it: (own,
        name, index).
        """
        whole, d_ff, config = slice(None), self.config.d_ff, self.config
        yield self.embedding.weight, "embed.weight", whole
        yield self.norm.weight, "norm.weight", whole
        if not config.tie_embeddings:
            yield self.head.weight, "out_head.weight", whole
        if config.head_bias:
            yield self.head.bias, "out_head.bias", whole
        for i, block in enumerate(self.blocks):
            a, name = block.attention, f"layers.{i}."
            pairs = {
                "norm1": block.norm1,
                "norm2": block.norm2,
                "attention.W_q": a.query,
                "attention.W_k": a.key,
                "attention.W_v": a.value,
                "attention.out_proj": a.out,
                "attention.q_norm": a.query_norm,
                "attention.k_norm": a.key_norm,
                "moe.router": block.moe.router,
            }
            for ours, own in pairs.items():
                for kind, parameter in own.named_parameters() if own is not None else ():
                    yield parameter, f"{name}{ours}.{kind}", whole
            if a.table is not None:
                yield a.table, name + "attention.attention_bias", whole
            for e, expert in enumerate(block.moe.experts):
                for kind, suffix in (("w", "weight"), ("b", "bias"))[: 1 + config.expert_bias]:
                    if expert.gate is not None:  # ours stacks the rows of gate and up
                        yield (
                            getattr(expert.gate, suffix),
                            f"{name}moe.experts.{kind}_in",
                            (e, slice(0, d_ff)),
                        )
                    yield (
                        getattr(expert.up, suffix),
                        f"{name}moe.experts.{kind}_in",
                        (e, slice(-d_ff, None)),
                    )
                    yield getattr(expert.down, suffix), f"{name}moe.experts.{kind}_out", e

    @torch.no_grad()
    def load_from(self, model: LLM) -> None:
        """Take over the weights of ours."""
        theirs = dict(model.named_parameters())
        for own, name, index in self.counterparts():
            own.copy_(theirs[name][index])


# ------------------------------------------------------------------------------------- Hugging Face
class HuggingFaceMoE(nn.Module):
    """transformers' Mixtral, or its Qwen3-MoE where there is QK-norm, of a config's numbers, with
    SDPA attention.

    experts: "eager" (their loop) or "grouped_mm" (their default). Their load-balance loss is over
    all blocks together and sums to top_k at balance, ours is per block and 1.0; its coefficient is
    scaled so that both are the same at balance.
    """

    def __init__(self, config: ModelConfig, experts: str):
        super().__init__()
        check_hf(config)
        import transformers

        common = dict(
            vocab_size=config.vocabulary_size,
            hidden_size=config.d_model,
            num_hidden_layers=config.transformer_blocks,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.attention_head_dim,
            max_position_embeddings=config.context_length,
            rms_norm_eps=config.rms_norm_eps,
            tie_word_embeddings=config.tie_embeddings,
            num_experts_per_tok=config.top_k,
            num_experts=config.num_experts,
            rope_parameters=dict(rope_type="default", rope_theta=config.rope_theta),
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
            output_router_logits=config.aux_loss_coef > 0,
            router_aux_loss_coef=config.aux_loss_coef * config.transformer_blocks / config.top_k,
        )
        if config.qk_norm:
            theirs = transformers.Qwen3MoeConfig(
                moe_intermediate_size=config.d_ff, norm_topk_prob=True, **common
            )
            model_class = transformers.Qwen3MoeForCausalLM
        else:
            theirs = transformers.MixtralConfig(intermediate_size=config.d_ff, **common)
            model_class = transformers.MixtralForCausalLM
        self.config = config
        self.model = model_class._from_config(
            theirs, attn_implementation="sdpa", experts_implementation=experts, dtype=torch.float32
        )

    def forward(self, ids_BT: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
        """As LoopMoE.forward."""
        targets_BT = targets_BT.contiguous()
        out = self.model(
            input_ids=ids_BT, labels=targets_BT, shift_labels=targets_BT
        )  # shift_labels: the targets are shifted already
        auxiliary = 0.0 if out.aux_loss is None else self.model.router_aux_loss_coef * out.aux_loss
        return out.loss - auxiliary, auxiliary

    def load_from(self, model: LLM) -> None:
        """Take over the weights of ours."""
        names = {
            "model.embed_tokens.weight": "embed.weight",
            "model.norm.weight": "norm.weight",
            "lm_head.weight": "embed.weight" if self.config.tie_embeddings else "out_head.weight",
        }
        inside = {
            "input_layernorm.weight": "norm1.weight",
            "post_attention_layernorm.weight": "norm2.weight",
            "mlp.gate.weight": "moe.router.weight",
            "mlp.experts.gate_up_proj": "moe.experts.w_in",
            "mlp.experts.down_proj": "moe.experts.w_out",
        }
        inside |= {
            f"self_attn.{theirs}.weight": f"attention.{own}.weight"
            for theirs, own in (
                ("q_proj", "W_q"),
                ("k_proj", "W_k"),
                ("v_proj", "W_v"),
                ("o_proj", "out_proj"),
            )
        }
        if self.config.qk_norm:
            inside |= {
                f"self_attn.{name}.weight": f"attention.{name}.weight"
                for name in ("q_norm", "k_norm")
            }
        for i in range(self.config.transformer_blocks):
            names |= {
                f"model.layers.{i}.{theirs}": f"layers.{i}.{own}" for theirs, own in inside.items()
            }
        weights = model.state_dict()
        self.model.load_state_dict({theirs: weights[own] for theirs, own in names.items()})


def build_hf(config: ModelConfig, experts: str = "grouped_mm") -> HuggingFaceMoE:
    """Hugging Face's model of this config (see HuggingFaceMoE).

    ValueError for what it cannot be, or if transformers is missing.
    """
    return HuggingFaceMoE(config, experts)
