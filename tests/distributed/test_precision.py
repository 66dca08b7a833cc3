"""Half precision, compiled blocks and every --shard: several ranks are one process."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

import train
from config_model import ModelConfig, TrainConfig
from model import LLM
from runtime.base.ranks import ONE_PROCESS, Ranks
from runtime.training.optimizer import build_optimizer
from runtime.training.task import GivenTask
from tests.builders import tiny_config
from tests.builders_precision import EVERYTHING, dtypes_seen
from tests.builders_ranks import SPEED, Trained, Windows, trained
from tests.nightly import nightly_but
from tests.promises.many_ranks import FOUR_RANKS_LOSS, FULL_REGISTERS, differing, without_times
from tests.ranks import run_on

# Of a block, by the ends of their names: what is only used after a cast.
CAST = ("W_q", "W_k", "W_v", "out_proj", "experts")


def trained_in_half(ranks: Ranks, config: ModelConfig, changes: dict) -> Trained:
    """Return `trained` with matrices gathered in half precision, as on GPUs."""
    ranks.gathers_half = True  # type: ignore[attr-defined]  # a Parallel's
    return trained(ranks, config, changes)


@pytest.mark.parametrize(
    "config, changes",
    nightly_but(
        [
            (EVERYTHING, dict(dtype="bfloat16")),
            (EVERYTHING, dict(dtype="float16", optimizer="muon")),
            (
                tiny_config(**FULL_REGISTERS, tie_embeddings=True, dropout=0.1),
                dict(dtype="bfloat16", activation_checkpointing=True, shard="none"),
            ),
        ],
        0,
    ),
)
def test_gathering_in_half_precision_changes_no_bit(config, changes):
    """Autocast rounds the same weights after they are gathered; gradients are summed in float32."""
    changes = changes | dict(max_steps=4)
    one = trained(ONE_PROCESS, config, changes)
    for train_on in (trained, trained_in_half):
        for other in run_on(2, train_on, config, changes):
            assert differing(one, other) == []


@pytest.mark.nightly
def test_experts_on_several_ranks_are_gathered_in_half_precision():
    """Rows travel to them in autocast's dtype, and no bit is another than with float32 gathers."""
    changes = dict(dtype="bfloat16", expert_parallel=2, grad_accum=4, max_steps=3)
    one, *_ = run_on(4, trained, EVERYTHING, changes)
    for other in run_on(4, trained_in_half, EVERYTHING, changes):
        assert differing(one, other) == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_only_what_is_cast_before_use_is_gathered_in_half(dtype):
    """A router that chose by rounded weights would send tokens to other experts.

    Norms, sinks, the learned bias, embedding and head stay float32 too; so do shards, gradients.
    """
    found = run_on(2, dtypes_seen, dtype)[0]
    # The head is no module that is called: the loss reads its weights.
    names = {n for n, _ in LLM(EVERYTHING).named_parameters() if not n.startswith("out_head")}
    assert found.keys() == names
    halved = {name for name in found if any(f".{end}." in name for end in CAST)}
    assert len(halved) == 12 * EVERYTHING.transformer_blocks
    for name, used in found.items():
        assert used == (dtype if name in halved else "float32"), name


@pytest.mark.parametrize("kind", nightly_but(["compiled", "adapted"], 1))
def test_where_half_is_not_known_to_be_right_float32_is_gathered(kind):
    """A compiled block has no place for a gather inside; adapters compute in float32 first."""
    found = run_on(2, dtypes_seen, "bfloat16", kind)[0]
    assert found and set(found.values()) == {"float32"}


def split_after_a_validation(ranks: Ranks, shard: str) -> list[bool]:
    """Return of each parameter whether it is in shards after a pass without gradients."""
    model = LLM(EVERYTHING)
    ranks.arrange(1, shard, EVERYTHING.num_experts)
    ranks.shard(model, torch.float32)
    with torch.no_grad():
        model(*Windows(EVERYTHING, 2).batch(0))
    return [ranks.is_split(parameter) for parameter in model.parameters()]


@pytest.mark.parametrize("world, shard", [(2, "full"), (2, "none"), (4, "node")])
def test_weights_are_in_shards_again_after_a_validation(world, shard):
    """What is gathered stays whole until a backward pass, and a validation has none.

    A save after it met parameters that the optimizer did not know.
    """
    for found in run_on(world, split_after_a_validation, shard, local_world=2):
        assert all(found), f"{found.count(False)} are whole"


# --------------------------------------------------------------------------------------- the scaler
class _Overflowing(GivenTask):
    """A task of one step in which one rank's part of a gradient is not finite."""

    model: LLM
    ranks: Ranks
    bad_step = 1

    def is_idle(self, batches) -> bool:
        # Called between the backward pass and the update.
        self.steps = getattr(self, "steps", -1) + 1
        if self.steps == self.bad_step and self.ranks.rank == self.ranks.world - 1:
            gradient = self.model.layers[0].moe.experts.w_in.grad
            self.ranks.local(gradient)[-1, -1, -1] = float("inf")
        return False


def overflows(ranks: Ranks, optimizer_name: str) -> dict:
    """Return what a step with an overflow on the last rank changed, and the loss's scales."""
    config = tiny_config(**FULL_REGISTERS)
    settings = TrainConfig(**SPEED | dict(max_steps=3, optimizer=optimizer_name, dtype="float16"))
    torch.manual_seed(0)
    model = LLM(config)
    ranks.arrange(1, "full", config.num_experts)
    ranks.shard(model, torch.float16)
    optimizer = build_optimizer(model, settings, ranks)
    loader = Windows(config, settings.batch_size)
    task = _Overflowing(loader, train.next_token_loss, [])
    task.model, task.ranks = model, ranks
    kept: list[list[Tensor]] = []
    records: list[dict] = []

    def on_step() -> None:
        states = (t for state in optimizer.state.values() for t in state.values())
        kept.append([ranks.local(t.detach()).clone() for t in (*model.parameters(), *states)])

    hooks = train.Hooks(on_log=records.append, on_step=on_step)
    given = dict(optimizer=optimizer, dtype=torch.float16, ranks=ranks)
    state = train.fit(model, task, settings, hooks, **given)
    changed = [
        sum(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        for before, after in zip(kept, kept[1:], strict=False)
    ]
    return {
        "changed": changed,
        "scale": state.scaler["scale"],
        "skipped": state.skipped_steps,
        # As text: NaN is not NaN.
        "losses": [str(record["loss"]) for record in records],
    }


@pytest.mark.parametrize("optimizer_name", ["adamw", "muon"])
def test_an_overflow_on_one_rank_is_skipped_by_all(optimizer_name):
    """A rank that knew of its own gradients alone would take the step, and have other weights.

    The loss's scale is halved on all ranks, once, and no bit of weights or moments changes.
    """
    one = overflows(ONE_PROCESS, optimizer_name)
    assert one["changed"][0] == 0 and one["changed"][1] > 20
    assert one["skipped"] == 1 and one["scale"] == 2.0**15
    assert run_on(2, overflows, optimizer_name) == [one, one]


# ------------------------------------------------------------------------------ compiled, and nodes
def trained_compiled(ranks: Ranks, config: ModelConfig, changes: dict) -> Trained:
    """Return `trained` with compiled blocks, by a backend that takes seconds and not a minute."""
    with pytest.MonkeyPatch.context() as patch:
        compile_plainly = nn.Module.compile

        def compiled(module, **options):
            compile_plainly(module, backend="aot_eager", **options)

        patch.setattr(nn.Module, "compile", compiled)
        patch.setattr(torch, "compile", lambda function, **options: function)
        return trained(ranks, config, changes | dict(compile=True))


def test_compiled_blocks_on_ranks():
    """A block is one graph on ranks too: --compile allows no break in it, and the numbers stay."""
    config, changes = tiny_config(**FULL_REGISTERS), dict(max_steps=3)
    one = trained_compiled(ONE_PROCESS, config, changes)
    for other in run_on(2, trained_compiled, config, changes):
        assert differing(one, other) == []


@pytest.mark.parametrize(
    "changes", nightly_but([{}, {"optimizer": "muon", "state_dtype": "bfloat16"}], 0)
)
def test_weights_that_are_sharded_in_each_node(changes):
    """Four ranks that play two nodes (--shard node) train as one process does.

    They are the same to the bit. Sums of four numbers are not in one process's order.
    """
    config = dataclasses.replace(EVERYTHING, num_experts=6)
    changes = changes | dict(shard="node", grad_accum=4, max_steps=4)
    one = trained(ONE_PROCESS, config, changes)
    first, *others = run_on(4, trained, config, changes, local_world=2)
    for other in others:
        assert differing(first, other) == []
    expected, found = without_times(one.records), without_times(first.records)
    assert len(expected) == len(found)
    for a, b in zip(expected, found, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=FOUR_RANKS_LOSS)
