"""In which dtype the modules of a model on ranks compute."""

from __future__ import annotations

import torch
from torch import nn

from model import LLM
from runtime.base.device import autocast
from runtime.base.ranks import Ranks
from runtime.checkpoint.adapter import Adapter
from runtime.posttraining.lora import attach
from tests.builders import tiny_config
from tests.builders_ranks import Windows
from tests.promises.many_ranks import FULL_REGISTERS

# Every kind of parameter.
EVERYTHING = tiny_config(
    **FULL_REGISTERS,
    attention_sinks=True,
    use_attention_bias=True,
    qkv_bias=True,
    out_proj_bias=True,
    router_bias=True,
    expert_bias=True,
    head_bias=True,
)


def dtypes_seen(ranks: Ranks, dtype: str, kind: str = "plain") -> dict[str, str]:
    """Return the dtype that each parameter has while its module computes.

    kind: plain, compiled, or adapted (with adapters).
    """
    # As on a GPU.
    ranks.gathers_half = True  # type: ignore[attr-defined]  # a Parallel's
    torch.manual_seed(0)
    device = ranks.device or torch.device("cpu")
    model = LLM(EVERYTHING).to(device)
    if kind == "adapted":
        attach(model, Adapter(2, 2, alpha=3.0, first_row=0, num_rows=0, base="", base_digest=""))
    if kind == "compiled":
        for block in model.layers:
            block.compile(backend="eager", fullgraph=True, dynamic=False)
    ranks.arrange(1, "full", EVERYTHING.num_experts)
    ranks.shard(model, getattr(torch, dtype))
    found = {}

    def note(module: nn.Module, prefix: str, recurse: bool) -> None:
        for name, parameter in module.named_parameters(prefix, recurse):
            found[name] = str(parameter.dtype).removeprefix("torch.")

    is_compiled = kind == "compiled"
    # Hooks inside of a compiled block would be parts of its graph.
    for name, module in model.named_modules():
        if not is_compiled or module in list(model.layers):
            module.register_forward_pre_hook(
                lambda module, _, name=name: note(module, name, recurse=is_compiled)
            )
    ids_BT, targets_BT = (t.to(device) for t in Windows(EVERYTHING, 2).batch(0))
    with autocast(device, getattr(torch, dtype)):
        model(ids_BT, targets_BT).cross_entropy_sum.backward()
    for parameter in model.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is None or parameter.grad.dtype == torch.float32
    return found
