"""Models that no device holds: of shapes, shared out, then filled (runtime/training/placing)."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from config_model import ModelConfig
from model import LLM
from runtime.base.ranks import ONE_PROCESS, Ranks
from runtime.checkpoint import read as reading
from runtime.checkpoint.format import digests_of, meta_model
from runtime.checkpoint.read import build_model, read_checkpoint
from runtime.checkpoint.sharded import Shards
from runtime.checkpoint.write import write_weights
from runtime.training import agreed, placing, setup
from runtime.training.plan import make_plan
from tests.builders import random_model, tiny_config
from tests.builders_rank_checkpoints import saved
from tests.builders_runs import MODEL, SPEED, Run, settings_of
from tests.ranks import run_on

# The rate of SPEED, and float32's rounding.
LR, EPS = 1e-2, torch.finfo(torch.float32).eps
# Six experts and 61 ids: four ranks do not share them out evenly.
EVERYTHING = tiny_config(
    num_experts=6,
    router_bias_rate=0.01,
    router_bias=True,
    expert_bias=True,
    head_bias=True,
    qkv_bias=True,
    attention_sinks=True,
    use_attention_bias=True,
)


def whole_tensors(model: LLM, ranks: Ranks) -> dict[str, Tensor]:
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: ranks.whole(tensor.detach()).clone() for name, tensor in tensors.items()}


def drawn(
    ranks: Ranks,
    shard: str = "full",
    expert_parallel: int = 1,
    seed: int = 42,
    config: ModelConfig = EVERYTHING,
    together: int = 100,
) -> dict[str, Tensor]:
    """Return the initial weights of a model that is shared out first.

    together: random numbers that are drawn at a time; the groups do not begin where ranks' rows do.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placing, "DRAWN_TOGETHER", together)
        model = meta_model(config)
        if ranks.world > 1:
            ranks.arrange(expert_parallel, shard, config.num_experts)
        ranks.shard(model, torch.float32)
        placing.allocate(model, torch.device("cpu"))
        placing.draw_by_name(model, seed, ranks)
        return whole_tensors(model, ranks)


@pytest.mark.parametrize(
    "world, shard, expert_parallel, local_world",
    [(2, "full", 1, 2), (4, "full", 1, 4), (4, "none", 2, 4), (4, "node", 1, 2), (4, "node", 2, 2)],
)
def test_initial_weights_do_not_depend_on_the_ranks(world, shard, expert_parallel, local_world):
    """Each rank draws its own rows alone, and all together have what one process has."""
    one = drawn(ONE_PROCESS)
    for found in run_on(world, drawn, shard, expert_parallel, local_world=local_world):
        assert found.keys() == one.keys()
        assert [name for name in one if not torch.equal(found[name], one[name])] == []


def test_initial_weights_are_those_that_the_model_asks_for():
    """Constants are LLM.initialise's to the bit; random numbers have its standard deviations."""
    config = EVERYTHING
    expected = dict(LLM(config).state_dict())
    residual_std = config.init_std / math.sqrt(2 * config.transformer_blocks)
    found = drawn(ONE_PROCESS)
    assert found.keys() == expected.keys()
    random_names = 0
    for name, tensor in found.items():
        if expected[name].unique().numel() == 1:
            assert torch.equal(tensor, expected[name]), name
            continue
        random_names += 1
        std = residual_std if name.endswith(("out_proj.weight", "w_out")) else config.init_std
        # Six standard errors, of the mean and of a normal distribution's standard deviation.
        error = 6 / math.sqrt(tensor.numel())
        assert abs(tensor.mean()) < error * std, name
        assert abs(tensor.std() / std - 1) < error / math.sqrt(2), name
    assert random_names == 2 + 7 * config.transformer_blocks


def test_each_number_is_drawn_for_its_seed_name_and_row():
    """No two tensors, rows or seeds have the same random numbers; a seed gives them again."""
    first, again, other = (drawn(ONE_PROCESS, seed=seed) for seed in (1, 1, 2))
    w_in = "layers.0.moe.experts.w_in"
    assert torch.equal(first[w_in], again[w_in])
    assert not (first[w_in] == other[w_in]).any()
    assert not (first[w_in] == first["layers.1.moe.experts.w_in"]).any()
    rows = first[w_in].flatten(1)
    assert len(rows.unique(dim=0)) == len(rows)
    assert first[w_in].unique().numel() > 0.99 * first[w_in].numel()


def test_a_buffer_that_is_not_known_is_refused():
    """What a new kind of buffer starts at cannot be guessed."""
    model = meta_model(tiny_config())
    model.register_buffer("scale", torch.empty(3, device="meta"))
    placing.allocate(model, torch.device("cpu"))
    with pytest.raises(AssertionError, match="scale"):
        placing.draw_by_name(model, 1, ONE_PROCESS)


def test_a_way_to_draw_that_is_not_known_is_refused(monkeypatch):
    """It would come from the generator that all ranks share, or from each rank's own."""
    model = meta_model(tiny_config())
    placing.allocate(model, torch.device("cpu"))
    monkeypatch.setattr(model, "initialise", lambda: model.norm.weight.uniform_(0, 1))
    with pytest.raises(AssertionError, match="uniform_"):
        placing.draw_by_name(model, 1, ONE_PROCESS)


# ------------------------------------------------------------------------------------------- a run
class _Largest(TorchDispatchMode):
    """The most numbers of a tensor that was made, not as a view, off the meta device."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in _plain(tree_leaves((args, kwargs)))}
        for tensor in _plain(tree_leaves(result)):
            if tensor.untyped_storage()._cdata not in given:
                self.numbers = max(self.numbers, tensor.numel())
        return result


def _plain(values: list) -> list[Tensor]:
    return [v for v in values if type(v) in (Tensor, nn.Parameter) and not v.is_meta]


def run_of(ranks: Ranks, flags: list[str], large: bool, steps: int = 0) -> tuple:
    """Return the weights that a plan's run has after some steps, and the largest tensor made.

    large: whether its model counts as one that no device holds.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placing, "LARGE_PARAMETERS", 0 if large else 10**12)
        patch.setattr(placing, "DRAWN_TOGETHER", 64)
        plan = make_plan(settings_of(*flags), train.pretraining, ranks=ranks)
        largest = _Largest()
        with largest:
            model = setup.build(plan)
            setup.share_out(model, plan)
        if steps:
            model, optimizer, _ = setup.set_up(plan, train.forward_backward)
            stops = iter([False] * (steps - 1) + [True])
            hooks = train.Hooks(stop_requested=lambda: next(stops))
            train.fit(model, plan.task, plan.config, hooks, optimizer=optimizer, ranks=ranks)
        return whole_tensors(model, ranks), largest.numbers


def flags_of(data: Path, folder: Path, *more: str) -> list[str]:
    folders = ["--data_dir", str(data), "--ckpt_dir", str(folder / "ckpt"), "--graph_dir"]
    return [*SPEED, *folders, str(folder / "graphs"), "--max_steps", "8", *more]


def half_of_the_largest(tensors: dict[str, Tensor]) -> int:
    """Return the numbers in half of the rows, rounded up, of the largest tensor."""
    return max(-(-len(t) // 2) * t[0].numel() for t in tensors.values())


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def trained_apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Return the tensors that differ by more than the rounding of a few updates.

    Numbers that fill no vector register are computed without fused multiply-add. The last of 257
    of a bias is one of them in one process, and on its rank is not.
    """

    def is_near(a: Tensor, b: Tensor) -> bool:
        # False for what is not a number.
        return bool((a - b).abs().max() <= 8 * EPS * (LR + a.abs().max()))

    return [name for name in differing(one, other) if not is_near(one[name], other[name])]


def test_a_large_model_is_never_whole_on_a_rank(data, tmp_path):
    """Every rank held all of it once, before it was sharded; what is drawn is small too."""
    flags = flags_of(data, tmp_path, *MODEL, "--tie_embeddings")
    one, _ = run_of(ONE_PROCESS, flags, True, steps=3)
    for weights, largest in run_on(2, run_of, flags, True, 3):
        assert trained_apart(one, weights) == []
        assert largest <= half_of_the_largest(one)
    _, whole = run_of(ONE_PROCESS, flags, True)
    assert whole == max(tensor.numel() for tensor in one.values()), "what _Largest counts"


def test_a_smaller_model_begins_as_it_did(data, tmp_path):
    """Below LARGE_PARAMETERS the weights of a seed are those of LLM(config)."""
    flags = flags_of(data, tmp_path, *MODEL)
    torch.manual_seed(42)
    expected = LLM(make_plan(settings_of(*flags), train.pretraining).model_config).state_dict()
    for weights, _ in run_on(2, run_of, flags, False):
        assert differing(dict(expected), weights) == []
    assert len(differing(dict(expected), run_of(ONE_PROCESS, flags, True)[0])) > 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("large", [False, True])
def test_weights_of_a_file_are_read_by_each_rank_for_itself(data, tmp_path, dtype, large):
    """A rank copies its rows from the mapped file, and has no whole tensor of it.

    A file of bfloat16 is not widened as a whole either. Expert biases, which are whole on every
    rank, come along.
    """
    source = random_model(tiny_config(vocabulary_size=257, router_bias_rate=0.01, num_experts=6))
    path = tmp_path / "start.pt"
    write_weights(path, source.config, source.state_dict().__getitem__, dtype)
    flags = flags_of(data, tmp_path, "--init_from", str(path))
    one, _ = run_of(ONE_PROCESS, flags, large, steps=2)
    for weights, largest in run_on(2, run_of, flags, large, 2):
        assert trained_apart(one, weights) == []
        assert largest <= half_of_the_largest(one)
    before, _ = run_on(2, run_of, flags, large)[1]
    assert differing(dict(build_model(read_checkpoint(path)).state_dict()), before) == []


def of_a_folder(ranks: Ranks, flags: list[str]) -> tuple:
    """Return what run_of does, and the most numbers of a tensor that this rank read at once."""
    largest = 0

    def rows(shards: Shards, name: str, wanted: range) -> Tensor:
        nonlocal largest
        found = read(shards, name, wanted)
        largest = max(largest, found.numel())
        return found

    read = Shards.rows
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shards, "rows", rows)
        weights, made = run_of(ranks, flags, False)
    return weights, max(largest, made)


def test_weights_of_a_folder_are_read_by_each_rank_for_itself(data, tmp_path):
    """Every rank read all of a folder to start from it, and kept it: 240 GB each of a 60 B model.

    They are written in shards because no rank can hold them. Neither does a rank read the rest to
    compare digests, if another one of its machine does.
    """
    config = tiny_config(vocabulary_size=257, router_bias_rate=0.01, num_experts=6)
    path = run_on(2, partial(saved, config=config), tmp_path / "start", "sharded")[0]
    flags = flags_of(data, tmp_path, "--init_from", path)
    one, _ = run_of(ONE_PROCESS, flags, False)
    (first, _), (weights, largest) = run_on(2, of_a_folder, flags)
    assert differing(one, first) == differing(one, weights) == []
    assert largest <= half_of_the_largest(one)


def checks_of(ranks: Ranks, path: Path) -> tuple[int, str]:
    """Return how many groups of tensors this rank hashed to start from a file, and its weights."""
    compared = []

    def digests(tensors: dict, group: str, *recorded) -> dict[str, str]:
        compared.append(group)
        return digests_of(tensors, group, *recorded)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "digests_of", digests)
        source = agreed.weights_to_start_from(str(path), ranks)
    return len(compared), source.weights_digest


@pytest.mark.parametrize("checkpoint", ["file", "sharded"])
def test_one_rank_of_a_machine_compares_digests(tmp_path, checkpoint):
    """All of them did: 8 ranks hashed the same 44 GB. Another machine's file may be another one."""
    path = run_on(2, saved, tmp_path, checkpoint)[0]
    (first, digest), (second, same) = run_on(2, checks_of, path)
    assert first > 0 and second == 0 and digest == same != ""
    assert all(count > 0 for count, _ in run_on(2, checks_of, path, local_world=1))


def of_mixed_gpus(ranks: Ranks, flags: list[str]) -> dict[str, Tensor]:
    ranks.are_mixed = True
    return run_of(ranks, flags, False)[0]


def test_ranks_on_gpus_of_different_kinds_draw_on_the_cpu(data, tmp_path):
    """A GPU's random numbers depend on how many cores it has: replicas began with other weights."""
    flags = flags_of(data, tmp_path, *MODEL)
    by_name, _ = run_of(ONE_PROCESS, flags, True)
    for weights in run_on(2, of_mixed_gpus, flags):
        assert differing(by_name, weights) == []


def test_a_large_run_is_resumed(data, tmp_path):
    """Its weights come from the checkpoint, to which nothing was drawn; so do the expert biases."""
    run = Run(data, tmp_path)
    assert run("--router_bias_rate", "0.01", "--max_steps", "4") == 0
    flags = [*run.folders, "--resume", "--max_steps", "8"]
    one, _ = run_of(ONE_PROCESS, flags, False, steps=2)
    alone, _ = run_of(ONE_PROCESS, flags, True, steps=2)
    assert differing(one, alone) == []
    for weights, largest in run_on(2, run_of, flags, True, 2):
        assert trained_apart(one, weights) == []
        assert largest <= half_of_the_largest(one)
