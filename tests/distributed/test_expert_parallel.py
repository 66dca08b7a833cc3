"""Experts that several ranks share (the counted guarantees: tests/promises/expert_parallel.py)."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

from model import LLM
from model_parts import LocalDispatcher
from runtime.base.ranks import ONE_PROCESS, Ranks
from runtime.checkpoint.adapter import Adapter
from runtime.distributed import expert_parallel
from runtime.posttraining.lora import attach
from tests.builders import random_model, tiny_config
from tests.builders_experts import compare_with_one_process
from tests.builders_ranks import trained
from tests.promises.expert_parallel import MOST
from tests.promises.many_ranks import without_times
from tests.ranks import run_on

IDS_BS = torch.arange(4 * 17).view(4, 17) * 7 % 61


def loss_of(model: LLM, ids_BS: Tensor) -> Tensor:
    out = model(ids_BS[:, :-1], ids_BS[:, 1:])
    assert out.cross_entropy_sum is not None
    return out.cross_entropy_sum + out.aux_loss + out.z_loss


def gradients(ranks: Ranks, model: LLM) -> dict[str, Tensor]:
    return {
        name: ranks.whole(p.grad).clone()
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], most: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        off = (found[name] - tensor).abs().max() / tensor.abs().max()
        assert off <= most, (name, off)


# ---------------------------------------------------------------------------------------- the rows
@pytest.mark.parametrize("world, shared", [(2, 2), (4, 2)])
def test_shared_experts_are_those_of_one_process(world, shared):
    """Some routings are so skewed that a rank's experts get no row, or all of them."""
    by_rank = run_on(world, compare_with_one_process, [5, 6, 7, 11], shared)
    for found in zip(*by_rank, strict=True):
        worst = max((v, name) for one in found for name, v in one.worst.items())
        assert worst[0] <= MOST, worst
        assert sum(one.sent for one in found) == sum(one.computed for one in found) > 0
    assert any(not one.computed for found in by_rank for one in found)


def grouped(ranks: Ranks) -> tuple[int, dict[str, Tensor]]:
    """Return the rows that this rank computes, and the gradients of a step in bfloat16.

    All rows are for the first rank's experts. The products are those of Hopper cards' kernel.
    """
    config = tiny_config(router_bias_rate=0.01, expert_bias=True)
    model, rows = random_model(config).to(torch.bfloat16), 0

    def count(module, arguments) -> None:
        nonlocal rows
        rows += int(arguments[2].sum())

    for block in model.layers:
        block.moe.experts.grouped = True
        block.moe.experts.register_forward_pre_hook(count)
        block.moe.router.selection_bias.copy_(torch.tensor([9.0, 9.0, 0.0, 0.0]))
    if ranks.world > 1:
        ranks.arrange(2, "full", 4)
    ranks.shard(model, torch.bfloat16)
    for batch in IDS_BS.chunk(2)[ranks.rank :: ranks.world]:
        loss_of(model, batch).backward()
    return rows, gradients(ranks, model)


def test_a_rank_without_rows_takes_part():
    """Its experts get one row of zeros, which the grouped kernel knows, and gradients of 0."""
    _, expected = grouped(ONE_PROCESS)
    by_rank = run_on(2, grouped)
    # A row of zeros in each of two blocks.
    assert by_rank[1][0] == 2 < by_rank[0][0]
    for _, found in by_rank:
        for name, tensor in expected.items():
            # Sums of two micro-batches, each rounded to 8 bits, over two blocks.
            most = 4 * torch.finfo(torch.bfloat16).eps * tensor.abs().max()
            assert (found[name] - tensor).abs().max() <= most, name
            if ".experts." in name:
                assert not found[name][2:].any()


def half_precision(
    ranks: Ranks, gathers_half: bool = False
) -> tuple[set[torch.dtype], dict[str, Tensor]]:
    """Return the dtypes that rows travel in under autocast, and the gradients of a step."""
    dtypes, exchange = set(), expert_parallel._exchange

    def noted(rows: Tensor, *sizes) -> Tensor:
        dtypes.add(rows.dtype)
        return exchange(rows, *sizes)

    model = random_model(tiny_config(expert_bias=True, aux_loss_coef=0.01))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expert_parallel, "_exchange", noted)
        if ranks.world > 1:
            ranks.gathers_half = gathers_half  # type: ignore[attr-defined]  # a Parallel's
            ranks.arrange(2, "full", 4)
        ranks.shard(model, torch.bfloat16)
        for batch in IDS_BS.chunk(2)[ranks.rank :: ranks.world]:
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(model, batch)
            loss.backward()
    return dtypes, gradients(ranks, model)


def test_rows_travel_in_the_dtype_of_autocast():
    """That is half of the bytes, and no rounding that one process does not do.

    As on GPUs, weights may be gathered in half precision: that changes no bit.
    """
    none, expected = half_precision(ONE_PROCESS)
    assert none == set()
    for (dtypes, found), (_, in_half) in zip(
        run_on(2, half_precision), run_on(2, half_precision, True), strict=True
    ):
        assert dtypes == {torch.bfloat16}
        # A weight's gradient is rounded once for each micro-batch, or for all: two roundings.
        assert_close(found, expected, 2 * torch.finfo(torch.bfloat16).eps)
        assert all(torch.equal(found[name], in_half[name]) for name in found)


def adapted(ranks: Ranks) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]]]:
    """Return the gradients of adapters on experts, and the shapes of what this rank holds."""
    model = random_model(tiny_config(expert_bias=True), dtype=torch.float64)
    attach(model, Adapter(2, 2, alpha=3.0, first_row=0, num_rows=0, base="", base_digest=""))
    numbers = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=numbers) / 10)
    if ranks.world > 1:
        ranks.arrange(2, "full", 4)
    ranks.shard(model, torch.float64)
    for batch in IDS_BS.chunk(2)[ranks.rank :: ranks.world]:
        loss_of(model, batch).backward()
    held = model.layers[0].moe.experts.named_parameters()
    return gradients(ranks, model), {n: tuple(ranks.local(p).shape) for n, p in held}


def test_adapters_are_shared_with_their_experts():
    """A rank that kept the adapters of all experts would give its own the first ones'."""
    expected, shapes = adapted(ONE_PROCESS)
    for found, held in run_on(2, adapted):
        assert_close(found, expected, MOST)
        assert held == {name: (shape[0] // 2, *shape[1:]) for name, shape in shapes.items()}
        assert len(held) == 8


def compiled(ranks: Ranks) -> dict[str, Tensor]:
    """Return the gradients of a model whose blocks were compiled as one graph each."""
    model = random_model(tiny_config(), dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        # Without code generation, which takes a minute.
        eager = functools.partialmethod(nn.Module.compile, backend="aot_eager")
        patch.setattr(nn.Module, "compile", eager)
        if ranks.world > 1:
            for block in model.layers:
                block.compile(fullgraph=True, dynamic=False)
            ranks.arrange(2, "full", 4)
        ranks.shard(model, torch.float64)
        for batch in IDS_BS.chunk(2)[ranks.rank :: ranks.world]:
            loss_of(model, batch).backward()
    return gradients(ranks, model)


@pytest.mark.nightly
def test_compiled_blocks_exchange_rows_between_two_graphs():
    """One graph has no room for sizes that differ at each pass."""
    expected = compiled(ONE_PROCESS)
    for found in run_on(2, compiled):
        assert_close(found, expected, MOST)


# ----------------------------------------------------------------------------------------- training
def test_four_ranks_shard_the_experts_that_two_share():
    """Runs of the guarantee, with validation, expert biases and weights that end whole."""
    config = tiny_config(num_experts=6, router_bias_rate=0.01, capacity_factor=1.0)
    settings = dict(expert_parallel=2, optimizer="muon", grad_accum=4, max_steps=3)
    one = trained(ONE_PROCESS, config, settings)
    for other in run_on(4, trained, config, settings):
        # Each gradient is a sum of float32 roundings; Muon orthogonalises it in five steps.
        assert_close(other.gradients, one.gradients, 1e-5)
        assert_close(other.weights, one.weights, 1e-5)
        assert all(torch.equal(one.buffers[name], other.buffers[name]) for name in one.buffers)
        for a, b in zip(without_times(one.records), without_times(other.records), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)


def test_recomputed_dropout_is_that_of_the_first_pass():
    """Experts drop rows of other ranks, with random numbers of their own rank."""
    settings = dict(expert_parallel=2, max_steps=3)
    config = tiny_config(dropout=0.2)
    first, again = (
        run_on(2, trained, config, settings | dict(activation_checkpointing=recomputes))[0]
        for recomputes in (False, True)
    )
    assert all(torch.equal(first.weights[name], again.weights[name]) for name in first.weights)


def parts(ranks: Ranks) -> list[dict]:
    """Return for each stack of experts what this rank holds, and what it makes of it."""
    model, wholes = (random_model(tiny_config(num_experts=6, expert_bias=True)) for _ in range(2))
    ranks.arrange(2, "full", 6)
    ranks.shard(model, torch.float32)
    found = []
    for (name, p), whole in zip(model.named_parameters(), wholes.parameters(), strict=True):
        local = ranks.local(p.detach())
        zeros = torch.zeros_like(p.detach())
        ranks.fill_(zeros, whole.detach())
        if ".experts." in name:
            found.append(
                {
                    "rows": list(ranks.rows(p)),
                    "held": torch.equal(local, whole[list(ranks.rows(p))]),
                    "filled": torch.equal(ranks.local(zeros), local),
                    "whole": torch.equal(ranks.whole(p.detach()), whole),
                    "of another": torch.equal(ranks.whole(p, local * 2), whole * 2),
                    "shape": ranks.shape_of(p) == whole.shape,
                    "storage": local.untyped_storage().nbytes() < whole.untyped_storage().nbytes(),
                }
            )
    return found


def test_parts_of_stacks_make_up_the_whole():
    """Ranks 0 and 1 share the experts, and so do 2 and 3; three make a shard of two and one of one.

    So the weights of a stack are on the ranks in another order than theirs.
    """
    by_rank = run_on(4, parts)
    for stack in zip(*by_rank, strict=True):
        assert [part.pop("rows") for part in stack] == [[0, 1], [3, 4], [2], [5]]
        assert all(all(part.values()) for part in stack), stack
    assert len(by_rank[0]) == 8


# ---------------------------------------------------------------------------------------- refusals
def refusals(ranks: Ranks) -> list[str]:
    """Return the errors of models that have more than stacks, or another dispatcher."""
    ranks.arrange(2, "full", 4)
    lines = []
    for change in ("scale", "deeper", "dispatcher"):
        model = LLM(tiny_config())
        moe = model.layers[1].moe
        if change == "scale":
            moe.experts.scale = nn.Parameter(torch.ones(2))
        elif change == "deeper":
            moe.experts.inner = nn.Linear(4, 4)
        else:
            moe.dispatcher = type("Mine", (LocalDispatcher,), {})()
        with pytest.raises(ValueError) as raised:
            ranks.shard(model, torch.float32)
        lines.append(str(raised.value))
    return lines


def test_what_is_no_stack_of_experts_is_refused():
    """It would be cut, or left out, in silence."""
    scale, deeper, dispatcher = run_on(2, refusals)[0]
    assert "expert_parallel" in scale and "scale" in scale and "[2]" in scale
    assert "inner.weight" in deeper
    assert "dispatcher" in dispatcher and "Mine" in dispatcher


# ----------------------------------------------------------------------------------- balance losses
def balanced(ranks: Ranks, balance_over: str, compiles: bool = False) -> dict[str, Tensor]:
    """Return the gradients of the balance losses' mean over the ranks' micro-batches."""
    model = random_model(tiny_config(aux_loss_coef=1.0), dtype=torch.float64)
    if compiles:
        for block in model.layers:
            block.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    if ranks.world > 1:
        ranks.arrange(1, "full", 4, balance_over)
    ranks.shard(model, torch.float64)
    ids_BS = IDS_BS.chunk(ranks.world)[ranks.rank]
    (model(ids_BS[:, :-1], ids_BS[:, 1:]).aux_loss / ranks.world).backward()
    # A compiled block gives zeros to the last block's experts, which this loss does not reach.
    return {name: grad for name, grad in gradients(ranks, model).items() if grad.any()}


def test_a_global_balance_loss_is_that_of_one_large_micro_batch():
    """Also in a block that is compiled as one graph."""
    expected = balanced(ONE_PROCESS, "")
    for compiles in (False, True):
        for found in run_on(2, balanced, "global", compiles):
            assert_close(found, expected, MOST)
    for found in run_on(2, balanced, "micro_batch"):
        router = "layers.0.moe.router.weight"
        assert not torch.allclose(found[router], expected[router], rtol=1e-3)


def test_one_process_has_no_ranks_to_balance_over():
    with pytest.raises(ValueError, match="--balance_over micro_batch.*torchrun"):
        ONE_PROCESS.arrange(1, "full", 4, "global")
