"""The ranks that tests run on (tests/ranks.py)."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest
import torch
import torch.distributed as dist

from tests import ranks as pool
from tests.ranks import run_on


def who(ranks, number: int) -> tuple:
    print("printed on a rank")
    return ranks.rank, ranks.world, ranks.local_world, *ranks.sum_on_host(number + ranks.rank)


def pid(ranks) -> int:
    return os.getpid()


def threads(ranks) -> int:
    return torch.get_num_threads()


def tensor_of(ranks) -> torch.Tensor:
    return torch.full((2,), float(ranks.rank))


def fails(ranks, how: str) -> None:
    """Fail on rank 1, while rank 0 waits for it."""
    if ranks.rank == 1:
        print("last words", file=sys.stderr, flush=True)
        if how == "raises":
            raise RuntimeError("what rank 1 met")
        if how == "hangs":
            time.sleep(1000)
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def leaves_early(ranks) -> None:
    """Raise on every rank while a collective is open."""
    dist.all_reduce(torch.zeros(3), async_op=True)
    raise ValueError(f"on rank {ranks.rank}")


def test_results_come_by_rank_and_the_group_is_new_each_time(capfd):
    assert run_on(2, who, 10) == [(0, 2, 2, 21), (1, 2, 2, 21)]
    assert run_on(4, who, 0, local_world=2) == [(rank, 4, 2, 6) for rank in range(4)]
    assert run_on(1, who, 5) == [(0, 1, 1, 5)]
    assert [t.tolist() for t in run_on(2, tensor_of)] == [[0.0, 0.0], [1.0, 1.0]]
    assert capfd.readouterr() == ("", "")


def test_ranks_stay_and_compute_with_one_thread():
    """A rank costs seconds to start; one with two threads would wait for its neighbours."""
    first = run_on(2, pid)
    assert run_on(2, pid) == first == run_on(4, pid)[:2]
    assert os.getpid() not in first
    assert run_on(2, threads) == [1, 1]


@pytest.mark.parametrize(
    "how, what", [("raises", "what rank 1 met"), ("hangs", "still ran"), ("dies", "with code -9")]
)
def test_a_rank_that_fails_takes_the_others_with_it(how, what):
    """A failure says where every rank was; no process stays, and the next call finds new ranks."""
    before = run_on(2, pid)
    began = [process for process, _ in pool._pool]
    with pytest.raises(AssertionError) as caught:
        run_on(2, fails, how, seconds=3 if how == "hangs" else pool.SECONDS)
    said = str(caught.value)
    assert "rank 1: " in said and "last words" in said and what in said
    assert "in fails" in said, "the line of this file"
    assert not any(process.is_alive() for process in began)
    assert set(before).isdisjoint(run_on(2, pid))


def test_every_rank_can_raise():
    with pytest.raises(AssertionError, match="(?s)on rank 0.*on rank 1"):
        run_on(2, leaves_early)


def test_a_function_without_a_name_is_refused_at_once():
    with pytest.raises((AttributeError, TypeError, pool.pickle.PicklingError)):
        run_on(2, lambda ranks: None)
    assert run_on(2, who, 0)[0][0] == 0
