"""The part of a model that a rank holds, and what it gathers of the others, in closed form.

Standard library only. Tests hold it to a count of the tensors (benchmarks/fake_ranks.py).
"""

from __future__ import annotations

from typing import NamedTuple

from config_model import ModelConfig, parameter_counts, total_parameters
from runtime.training.placement import ROOT, Placement, shapes, units


class Share(NamedTuple):
    """What a process holds of a model all the time, in elements, and for a while, in bytes.

    cast: copies in half precision, which autograd keeps from the forward to the backward pass. The
    others are whole tensors that FSDP gathers and empties again; there are none in one process.
    """

    held: int
    held_hidden: int
    cast_bytes: int
    # Embedding, head and last norm, which are gathered together; their gradients are as large.
    root_bytes: int = 0
    # One block, and its gradients before they are summed.
    block_bytes: int = 0
    block_gradient_bytes: int = 0
    # The same gradients in float32, in which they are summed.
    sum_bytes: int = 0
    # Whether a block is gathered in one go, and so while another computes: FSDP gathers ahead the
    # one group that is next, and of several in a block the next is a small one.
    ahead: bool = False
    # Whether blocks stay whole from the forward to the backward pass.
    stays: bool = False


class Gathered(NamedTuple):
    """Bytes of whole weights, and of whole gradients on their way, at a moment of a step."""

    forward: int  # at the loss
    backward: int  # in the last block
    last: int  # in the first block, which is the last of the backward pass
    end: int  # when the gradients of embedding and head are summed


def gathered_bytes(share: Share, on_gpu: bool, blocks: int) -> Gathered:
    """Return what FSDP holds of other ranks' weights.

    A GPU sums a block's gradients while the next computes.
    """
    root, block = share.root_bytes, share.block_bytes
    next_block = block if share.ahead else 0
    gradients, sums = share.block_gradient_bytes, share.sum_bytes
    if on_gpu:
        computing = block + next_block + gradients + sums
    else:
        computing = next_block + gradients + max(block, sums)
    kept = root + (blocks * block if share.stays else 0)
    more = (blocks - 1) * block - next_block if share.stays else 0
    return Gathered(kept, root + computing + more, root + computing, 2 * root)


def whole_share(config: ModelConfig, hidden: int, compute_bytes: int) -> Share:
    """Return the share of one process: all of the model."""
    parameters, counts = total_parameters(config), parameter_counts(config)
    # The learned attention bias is cast on its way, and an embedding's rows not at all.
    cast = parameters - counts["attention bias table"] - counts["embedding"]
    return Share(parameters, hidden, (compute_bytes != 4) * compute_bytes * cast)


def share_of(
    config: ModelConfig, hidden: int, compute_bytes: int, placement: Placement | None
) -> Share:
    """Return what a process holds. hidden: elements of all hidden matrices; placement: its ranks.

    compute_bytes: of a number in the dtype that is computed in.
    """
    whole = whole_share(config, hidden, compute_bytes)
    if placement is None or placement.world == 1:
        return whole
    held = held_hidden = root = block = gradients = sums = cast = 0
    for shape in shapes(config):
        in_all = units(config, shape) * placement.held(shape)
        held += in_all
        held_hidden += in_all * shape.hidden
        gathered = placement.sharers(shape) * placement.held(shape)
        size = placement.gathered_bytes(shape)
        if shape.unit == ROOT:
            root += gathered * size
            continue
        block += gathered * size
        gradients += gathered * size
        sums += gathered * 4
        # What is gathered in half precision is emptied, and never copied.
        if shape.cast and size == 4:
            cast += units(config, shape) * gathered
    cast_bytes = (compute_bytes != 4) * compute_bytes * (cast + parameter_counts(config)["head"])
    stays = placement.shard == "none"
    ahead = not placement.in_half and placement.expert_parallel == 1
    return Share(held, held_hidden, cast_bytes, root, block, gradients, sums, ahead, stays)
