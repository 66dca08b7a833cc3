"""What ranks tell each other, and who holds which rows (runtime/distributed/parallel.py)."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from config_model import TrainConfig
from model import LLM
from runtime.base.ranks import ONE_PROCESS, Ranks
from runtime.distributed import parallel
from runtime.training.optimizer import MuonAdamW, build_optimizer, total_norm
from tests.builders import tiny_config
from tests.ranks import run_on

# Rows that 2 and 4 ranks share evenly, unevenly, and that are fewer than the ranks.
ROWS = (8, 6, 5, 3, 1)


class Rows(nn.Module):
    """Parameters with known numbers and few rows, in what `Ranks.shard` takes for a model."""

    def __init__(self, rows: tuple[int, ...] = ROWS):
        super().__init__()
        self.layers = nn.ModuleList()
        for i, count in enumerate(rows):
            numbers = torch.arange(count * 3.0).view(count, 3) + 100 * i
            self.register_parameter(f"w{i}", nn.Parameter(numbers))


# ------------------------------------------------------------------------------------- on the host
def on_the_host(ranks: Ranks) -> dict:
    """Return what the methods for numbers and flags give here."""
    me = ranks.rank
    return {
        "is_first": ranks.is_first,
        "mine": list(ranks.mine(5)),
        # Beyond what float64 holds exactly.
        "sum": ranks.sum_on_host(2**53 + me, me),
        "none": ranks.any(False),
        "one": ranks.any(me == ranks.world - 1),
        "from_first": ranks.from_first(lambda: f"made on {me}"),
        "together": ranks.together(lambda: me * 10),
    }


def test_numbers_and_flags_are_those_of_all_ranks():
    for rank, found in enumerate(run_on(2, on_the_host)):
        assert found == {
            "is_first": rank == 0,
            "mine": [[0, 2, 4], [1, 3]][rank],
            "sum": (2**54 + 1, 1),
            "none": False,
            "one": True,
            "from_first": "made on 0",
            "together": rank * 10,
        }


def raised(do) -> str:
    """Return the class and the line of the error that `do` raises."""
    try:
        do()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def errors(ranks: Ranks) -> list[str]:
    """Return the errors that every rank raises where one, the first or all meet one."""

    def fail(on: set[int], text: str = "no such folder"):
        def do():
            if ranks.rank in on:
                raise ValueError(text)

        return do

    return [
        raised(lambda: ranks.from_first(fail({0}))),
        raised(lambda: ranks.together(fail({1}))),
        raised(lambda: ranks.together(fail({0, 1}))),
        raised(lambda: ranks.together(fail({0, 1}, f"rank's own {ranks.rank}"))),
        raised(lambda: ranks.check_equal({"data": "abc", "seed": 7})),
        raised(lambda: ranks.check_equal({"data": "abc", "seed": 7 + ranks.rank})),
    ]


def test_an_error_on_one_rank_is_raised_on_all_of_them():
    """A rank that raised alone would leave the others waiting for it until the time-out.

    What all ranks meet alike is a line without a rank, as in one process.
    """
    lines = run_on(2, errors)
    assert lines[0] == lines[1]
    first, one, all_alike, all_own, equal, unequal = lines[0]
    assert first == all_alike == "ValueError: no such folder"
    assert one == "ValueError: rank 1: no such folder"
    assert all_own == "ValueError: rank 0: rank's own 0"
    assert equal == ""
    assert unequal.startswith("ValueError: rank 1 has another seed than rank 0: 8, not 7")


# ----------------------------------------------------------------------------------- on the device
def shared_out(ranks: Ranks, count: int) -> tuple:
    """Return what this rank was given of `count` batches, and all rows put together again."""
    given = list(ranks.share(list(range(count))))
    rows = torch.tensor([[float(batch), float(counts)] for batch, counts in given])
    return given, ranks.concatenated(rows).tolist()


@pytest.mark.parametrize("world, count", [(2, 3), (2, 4), (4, 1), (4, 6)])
def test_batches_are_shared_out_once_each(world, count):
    """Ranks take part in every forward pass together, so each gets as many batches."""
    given, together = zip(*run_on(world, shared_out, count), strict=True)
    assert len({len(batches) for batches in given}) == 1
    for rows in together:
        assert [row[0] for row in rows if row[1]] == list(range(count))


def summed(ranks: Ranks) -> dict:
    return ranks.sum_of(
        {
            "wide": torch.full((2, 3), 0.1 + ranks.rank),
            "half": torch.tensor(1.0 + ranks.rank, dtype=torch.bfloat16),
        }
    )


def test_sums_keep_their_dtype_and_shape():
    for sums in run_on(2, summed):
        assert sums["wide"].tolist() == torch.full((2, 3), 1.2).tolist()
        assert sums["half"].dtype == torch.bfloat16 and sums["half"].item() == 3.0


# ------------------------------------------------------------------------------- weights in shards
def pieces(ranks: Ranks, shard: str = "full") -> list:
    """Return for each of Rows' parameters what this rank holds, and what it makes of it."""
    model, wholes = Rows(), Rows()
    ranks.arrange(1, shard, 4)
    ranks.shard(model, torch.float32)
    found = []
    for (name, p), (_, whole) in zip(
        model.named_parameters(), wholes.named_parameters(), strict=True
    ):
        local = ranks.local(p.detach())
        part = ranks.part_of(p, whole.detach())
        zeros = torch.zeros_like(p.detach())
        ranks.fill_(zeros, whole.detach())
        found.append(
            {
                "name": name,
                "local": local.clone(),
                "part": torch.equal(part, local),
                "split": ranks.is_split(p),
                "whole": torch.equal(ranks.whole(p.detach()), whole),
                "of another": torch.equal(ranks.whole(p, local * 2), whole * 2),
                "filled": torch.equal(ranks.local(zeros), local),
                "shape": tuple(ranks.shape_of(p)) == tuple(whole.shape),
            }
        )
    return found


@pytest.mark.parametrize("world, nodes", [(2, 1), (4, 1), (4, 2)])
def test_parts_are_rows_and_make_up_the_whole(world, nodes):
    """Also where rows do not divide, or are fewer than ranks: then some hold nothing."""
    shard = "node" if nodes > 1 else "full"
    by_rank = run_on(world, pieces, shard, local_world=world // nodes)
    for i, (name, whole) in enumerate(Rows().named_parameters()):
        of_this = [found[i] for found in by_rank]
        for one in of_this:
            flags = {k: v for k, v in one.items() if k not in ("name", "local")}
            assert all(flags.values()), (name, flags)
        for node in range(nodes):
            held = of_this[node * world // nodes : (node + 1) * world // nodes]
            assert torch.equal(torch.cat([one["local"] for one in held]), whole), name


def test_one_process_holds_all():
    tensor = torch.arange(6.0).view(2, 3)
    assert ONE_PROCESS.local(tensor) is ONE_PROCESS.whole(tensor) is tensor
    assert not ONE_PROCESS.is_split(tensor) and ONE_PROCESS.part_of(tensor, tensor) is tensor
    for flags in ((2, "full"), (1, "node"), (1, "none")):
        with pytest.raises(ValueError, match="several ranks.*torchrun"):
            ONE_PROCESS.arrange(*flags, 4)
    ONE_PROCESS.arrange(1, "full", 4)


def meshes_given(ranks: Ranks, expert_parallel: int) -> list[bool]:
    """Return for each mesh whether its numbers have the strides of a new tensor."""
    given = []

    def mesh(kind: str, numbers: torch.Tensor, **names) -> DeviceMesh:
        given.append(numbers.stride() == torch.empty(numbers.shape).stride())
        return DeviceMesh(kind, numbers, **names)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "DeviceMesh", mesh)
        ranks.arrange(expert_parallel, "full", 4)
    return given


def test_meshes_have_the_strides_that_torch_2_11_reads():
    """It refused to form the groups of shared experts.

    The numbers were transposed. A tensor with dimensions of 1 is contiguous with any strides of
    these, and 2.11 takes strides for the order of the dimensions.
    """
    assert run_on(2, meshes_given, 2) == [[True], [True]]


def refusals(ranks: Ranks) -> list[str]:
    return [
        raised(lambda: ranks.arrange(3, "full", 6)),
        raised(lambda: ranks.arrange(4, "full", 6)),
        raised(lambda: ranks.arrange(1, "node", 6)),
    ]


def test_arrangements_that_cannot_be_are_refused():
    three, four, node = run_on(4, refusals)[0]
    assert three.startswith("ValueError") and "4 ranks" in three and three.endswith("1 or 2")
    assert "--expert_parallel 4" in four and four.endswith("1 or 2")
    assert "--shard node" in node


# ----------------------------------------------------------------------------------- the optimizer
def norms(ranks: Ranks) -> tuple[float, float]:
    """Return the norm of gradients in shards, and of the same in one piece."""
    model = Rows()
    ranks.arrange(1, "full", 4)
    ranks.shard(model, torch.float32)
    whole = [p.detach() for p in Rows().parameters()]
    return (
        total_norm([ranks.local(p.detach()) for p in model.parameters()], ranks).item(),
        total_norm(whole).item(),
    )


@pytest.mark.parametrize("world", [2, 4])
def test_the_norm_is_that_of_all_shards(world):
    """A rank that clipped by its own norm would take another step than its neighbours."""
    for in_shards, in_one_piece in run_on(world, norms):
        assert in_shards == in_one_piece > 0


def one_row(ranks: Ranks, state_dtype: torch.dtype) -> torch.Tensor:
    """Return a parameter of one row after a step of AdamW in a group of its own."""
    model = Rows((1,))
    ranks.arrange(1, "full", 4)
    ranks.shard(model, torch.float32)
    parameters = list(model.parameters())
    optimizer = MuonAdamW(
        [{"params": parameters}], 0.5, (0.9, 0.95), 1e-8, state_dtype=state_dtype, ranks=ranks
    )
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return ranks.whole(parameters[0].detach())


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_a_rank_may_hold_nothing_of_a_group(state_dtype):
    """A group whose only tensor has fewer rows than there are ranks ended the step."""
    expected = one_row(ONE_PROCESS, state_dtype)
    assert not torch.equal(expected, next(Rows((1,)).parameters()))
    for found in run_on(2, one_row, state_dtype):
        assert torch.equal(found, expected)


def idle_expert(ranks: Ranks) -> tuple[bool, bool]:
    """Take two Muon steps; in the second some rows, and one whole matrix, have no gradient.

    Return whether the matrix stayed and whether the rows moved.
    """
    torch.manual_seed(0)
    model = LLM(tiny_config())
    ranks.arrange(1, "full", 4)
    ranks.shard(model, torch.float32)
    config = TrainConfig(optimizer="muon", lr=1e-2, weight_decay=0.0)
    optimizer: Optimizer = build_optimizer(model, config, ranks)
    block = model.layers[0]
    rows, matrix = block.attention.W_q.weight, block.attention.W_k.weight
    for step in range(2):
        for p in model.parameters():
            whole = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            if step and p is rows:
                # The first rank's rows.
                whole[: len(whole) // 2] = 0
            if step and p is matrix:
                whole.zero_()
            p.grad = torch.zeros_like(p)
            ranks.fill_(p.grad, whole)
        before = [ranks.whole(p.detach()).clone() for p in (rows, matrix)]
        optimizer.step()
    after = [ranks.whole(p.detach()) for p in (rows, matrix)]
    moved = (before[0] != after[0]).any(dim=1)
    return torch.equal(before[1], after[1]), bool(moved.all())


def test_muon_asks_of_the_whole_matrix_whether_it_has_a_gradient():
    """A matrix without a gradient stays; one with a gradient on another rank moves here too."""
    assert run_on(2, idle_expert) == [idle_expert(ONE_PROCESS)] * 2 == [(True, True)] * 2
