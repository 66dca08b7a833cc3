"""The step of several ranks is the step of one process (the counted guarantee: tests/promises)."""

from __future__ import annotations

import pytest
import torch

import train
from config_model import TrainConfig
from model import LLM
from runtime.base.device import one_thread
from runtime.base.ranks import ONE_PROCESS, Ranks
from runtime.training.task import GivenTask
from tests import children
from tests.builders import tiny_config
from tests.builders_ranks import Windows, trained
from tests.builders_runs import MODEL, SPEED
from tests.promises.many_ranks import FULL_REGISTERS, differing
from tests.ranks import run_on


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_ranks_train_as_one_process(optimizer):
    """To the bit, with all that ranks must agree on: targets, dropout, expert biases, clipping.

    The global norm in float32 differed in its last bit, and with it nearly all weights.
    """
    config = tiny_config(**FULL_REGISTERS, dropout=0.1, router_bias_rate=0.01)
    settings = dict(optimizer=optimizer, grad_clip=0.1, max_steps=4)
    one = trained(ONE_PROCESS, config, settings)
    for other in run_on(2, trained, config, settings):
        assert differing(one, other) == []


def seeds(ranks: Ranks) -> list[int]:
    """Return the seed that each micro-batch of two steps is computed with on this rank."""
    model_config, found = tiny_config(context_length=16), []
    config = TrainConfig(batch_size=1, grad_accum=4, max_steps=2, warmup_steps=1, seed=3)

    def loss(model: LLM, batch):
        found.append(torch.initial_seed())
        return train.next_token_loss(model, batch)

    model = LLM(model_config)
    ranks.arrange(1, "full", model_config.num_experts)
    ranks.shard(model, torch.float32)
    optimizer = train.build_optimizer(model, config, ranks)
    task = GivenTask(Windows(model_config, 1), loss)
    train.fit(model, task, config, optimizer=optimizer, ranks=ranks)
    return found


def test_every_micro_batch_has_random_numbers_of_its_own_wherever_it_is():
    """One seed a step gave the micro-batches of two ranks the same masks."""
    alone = seeds(ONE_PROCESS)
    assert len(set(alone)) == 8
    first, second = run_on(2, seeds)
    assert (first, second) == (alone[::2], alone[1::2])


@one_thread()
def of_its_own_optimizer(ranks: Ranks) -> list[torch.Tensor]:
    """Return the weights after two steps with the optimizer that `fit` makes."""
    model_config = tiny_config(context_length=16)
    config = TrainConfig(
        batch_size=1, grad_accum=2, max_steps=2, warmup_steps=1, grad_clip=0.0, optimizer="muon"
    )
    torch.manual_seed(0)
    model = LLM(model_config)
    ranks.arrange(1, "full", model_config.num_experts)
    ranks.shard(model, torch.float32)
    task = GivenTask(Windows(model_config, 1), train.next_token_loss)
    train.fit(model, task, config, ranks=ranks)
    return [ranks.whole(parameter.detach()).clone() for parameter in model.parameters()]


def test_an_optimizer_that_fit_makes_knows_of_the_ranks():
    """It took rows of a matrix for the matrix, without an error."""
    expected = of_its_own_optimizer(ONE_PROCESS)
    for found in run_on(2, of_its_own_optimizer):
        assert all(map(torch.equal, found, expected))


def test_one_process_loads_and_starts_nothing_of_ranks(data, tmp_path):
    """A laptop pays nothing for the clusters that the code can train on."""
    flags = [*MODEL, *SPEED, "--max_steps", "2", "--warmup_steps", "1", "--optimizer", "muon"]
    flags += ["--data_dir", data, "--ckpt_dir", tmp_path / "c", "--graph_dir", tmp_path / "g"]
    code = (
        "import sys, torch, train\n"
        f"code = train.main({[str(flag) for flag in flags]})\n"
        "loaded = [name for name in sys.modules if name.startswith('runtime.distributed')]\n"
        "print(code, loaded, torch.distributed.is_initialized())\n"
    )
    done = children.run(["-c", code])
    assert done.stdout.splitlines()[-1] == "0 [] False", done.stdout + done.stderr
