"""The model as a class of transformers: the end of the modeling file that custom_code.py writes.

It is read there as text; nothing of gptoss imports it.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from config_model import ModelConfig
from model import LLM


class GptossConfig(PretrainedConfig):
    """`gptoss` holds the fields of ModelConfig, which decide everything.

    The names that transformers' tools ask for follow from them.
    """

    model_type = "gptoss"

    def __init__(self, gptoss: dict | None = None, **kwargs):
        config = ModelConfig(**(gptoss or {}))
        self.gptoss = dataclasses.asdict(config)
        super().__init__(
            **kwargs
            | dict(
                vocab_size=config.vocabulary_size,
                hidden_size=config.d_model,
                intermediate_size=config.d_ff,
                num_hidden_layers=config.transformer_blocks,
                num_attention_heads=config.num_heads,
                num_key_value_heads=config.num_kv_heads,
                head_dim=config.attention_head_dim,
                num_local_experts=config.num_experts,
                num_experts_per_tok=config.top_k,
                max_position_embeddings=config.context_length,
                tie_word_embeddings=config.tie_embeddings,
            )
        )


class GrowingCache:
    """A cache of transformers with what KVCache offers to the model, for one forward pass.

    It keeps all keys, of windowed blocks too.
    """

    per_row = False

    def __init__(self, cache: Cache, config: ModelConfig):
        if cache.is_compileable:
            raise ValueError(
                "this model needs a cache that grows and forgets nothing, such as DynamicCache(), "
                f"not {type(cache).__name__}: leave cache_implementation out"
            )
        self.cache, self.length = cache, int(cache.get_seq_length())
        self.windows = [config.window(block) for block in range(config.transformer_blocks)]
        # Their keys do not begin at position 0.
        self.is_ring = [window > 0 for window in self.windows]

    def check_fits(self, B: int, T: int) -> None:
        """It grows."""

    def update(self, block: int, k_BGTD: Tensor, v_BGTD: Tensor) -> tuple[Tensor, Tensor]:
        """Store a block's new keys and values; return all that a query may need, [B, G, S, D]."""
        tokens = self.length + k_BGTD.shape[2]
        self.positions = torch.arange(tokens, device=k_BGTD.device)
        k_BGSD, v_BGSD = self.cache.update(k_BGTD, v_BGTD, block)
        if k_BGSD.shape[2] != tokens:
            raise ValueError(
                "this model needs a cache that grows and forgets nothing, such as DynamicCache(), "
                f"not one that keeps {k_BGSD.shape[2]} of {tokens} tokens"
            )
        first = self._first(block, k_BGTD.shape[2])
        return k_BGSD[:, :, first:], v_BGSD[:, :, first:]

    def query_positions(self, T: int, device) -> Tensor:
        """Positions [T] of the new tokens."""
        return torch.arange(self.length, self.length + T, device=device)

    def key_positions(self, block: int, T: int) -> Tensor:
        """Positions [S] of the keys that `update` returned."""
        return self.positions[self._first(block, T) :]

    def _first(self, block: int, T: int) -> int:
        """The first position that the first of T queries sees."""
        return max(0, self.length - self.windows[block] + 1) if self.windows[block] else 0

    def advance(self, T: int) -> None:
        """Count T tokens as seen."""
        self.length += T


class GptossForCausalLM(PreTrainedModel, GenerationMixin):
    """LLM under transformers' interface.

    The cache, the padding and the shifted labels are translated here; all else is LLM.
    """

    config_class = GptossConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing, gradient_checkpointing = True, False
    _supports_sdpa = True  # the kernel that LLM uses
    accepts_loss_kwargs = False  # the loss is a mean over this batch's tokens

    def __init__(self, config: GptossConfig):
        super().__init__(config)
        self.model = LLM(ModelConfig(**config.gptoss))
        if not self.model.embed.weight.is_meta:  # then LLM has given every weight its first value
            for module in self.modules():
                module._is_hf_initialized = True
        self.post_init()
        self._keep_in_fp32_modules_strict = {
            "selection_bias"
        }  # whose steps are smaller than a bfloat16's

    def _init_weights(self, module) -> None:
        """Called for weights that a file was to bring and did not."""
        if any(
            not tensor.is_meta
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
        ):
            raise ValueError(
                f"{type(module).__name__}: weights are missing in the file, or have another shape "
                "than the config says"
            )

    def get_input_embeddings(self):
        return self.model.embed

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs):
        if new_num_tokens not in (None, self.config.vocab_size):
            raise ValueError(
                f"this model has {self.config.vocab_size} token ids and cannot be given "
                f"{new_num_tokens}"
            )
        return self.model.embed

    def prepare_inputs_for_generation(self, *args, **kwargs) -> dict:
        """Drop None values and transformers 4's cache_position: the cache knows where it ends."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        return {
            name: value
            for name, value in inputs.items()
            if value is not None and name != "cache_position"
        }

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
    ):
        """Return logits [B, T, V] of ids [B, T], or of the last `logits_to_keep`.

        With `labels` [B, T], which are shifted here (-100: none), the loss too: mean cross-entropy,
        the routers' losses added as in the training of this model. attention_mask [B, S]: 0 for
        padding, at the ends of a row only.
        """
        if use_cache is None:
            use_cache = getattr(self.config, "use_cache", True) and not self.training
        self.model.activation_checkpointing = self.gradient_checkpointing
        # Each block runs twice and would fill the cache twice.
        if self.gradient_checkpointing and torch.is_grad_enabled():
            if past_key_values is not None:
                raise ValueError(
                    "a KV cache and gradient checkpointing do not go together: leave "
                    "past_key_values out, or use torch.no_grad()"
                )
            use_cache = False
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache()
        cache = (
            None if past_key_values is None else GrowingCache(past_key_values, self.model.config)
        )
        starts_BT = (
            None
            if attention_mask is None
            else self._starts(
                attention_mask, 0 if cache is None else cache.length, input_ids.shape[1]
            )
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        last_token_only = isinstance(logits_to_keep, int) and logits_to_keep == 1
        output = self.model(
            input_ids, cache=cache, last_token_only=last_token_only, starts_BT=starts_BT
        )
        logits, aux_loss, loss = output.logits[:, keep], output.aux_loss + output.z_loss, None
        if labels is not None:
            loss = (
                self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
                + aux_loss
            )
        result = MoeCausalLMOutputWithPast(
            loss=loss, aux_loss=aux_loss, logits=logits, past_key_values=past_key_values
        )
        return result.to_tuple() if return_dict is False else result

    def _starts(self, mask_BS: Tensor, start: int, T: int) -> Tensor | None:
        """Return LLM's starts [B, T] for T tokens after `start` others.

        None where no row is padded on its left. Padding sees padding: its softmax needs something.
        """
        if mask_BS.dim() != 2 or mask_BS.shape[1] != start + T:
            raise ValueError(
                f"attention_mask must be [rows, {start + T}], one number for each token so far, "
                f"not {list(mask_BS.shape)}"
            )
        mask_BS = mask_BS != 0
        first_B1 = mask_BS.int().argmax(dim=1, keepdim=True)
        if ((mask_BS[:, 1:] & ~mask_BS[:, :-1]).sum(dim=1) > 1 - mask_BS[:, 0].int()).any():
            raise ValueError(
                "attention_mask may mask the beginning and the end of a row only: pad prompts on "
                "the left (padding_side='left') to generate; with learned position biases, "
                "generate from one row at a time"
            )
        if not first_B1.any():
            return None
        if self.model.config.use_attention_bias:
            raise ValueError(
                "this model has learned biases for absolute positions: train on rows padded on the "
                "right, and generate from one row at a time (batch_size=1 in a pipeline)"
            )
        positions_T = torch.arange(start, start + T, device=mask_BS.device)
        return torch.where(positions_T < first_B1, 0, first_B1)
