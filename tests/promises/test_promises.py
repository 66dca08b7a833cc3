"""Every guarantee of tests/promises, with its counts for every push and for the night.

test_promises_*.py check that each can be broken.
"""

import os
from importlib.util import find_spec

import pytest

from benchmarks.reliability import promises
from tests.builders_server_process import HAS_FORK, HAS_PROC
from tests.promises import adapters, rank_faults, runs, server_process, tuning_runs

PROMISES = [
    pytest.param(
        p,
        id=f"{p.number}-{p.run.__name__}",
        marks=[
            pytest.mark.skipif(
                p in (*runs.PROMISES, *tuning_runs.PROMISES, *rank_faults.PROMISES)
                and not hasattr(os, "fork"),
                reason="the runs are children of a fork server",
            ),
            pytest.mark.skipif(
                p in server_process.PROMISES and not (HAS_FORK and HAS_PROC),
                reason="what Linux says about a process, and a fork server",
            ),
            pytest.mark.skipif(
                p.run is adapters.same_in_peft and find_spec("peft") is None,
                reason="peft is not installed (requirements-dev.txt)",
            ),
        ],
    )
    for p in promises()
]


@pytest.mark.slow
@pytest.mark.parametrize("promise", [p for p in PROMISES if p.values[0].at_push])
def test_it_holds(promise):
    """3 found that a new checkpoint folder's own name was never flushed.

    A power loss could take the folder with all checkpoints in it (82 of 366 states after two
    saves). 5 found that an old checkpoint that cannot be deleted ended the run.
    """
    promise.run(promise.at_push).check()


@pytest.mark.nightly
@pytest.mark.parametrize("promise", PROMISES)
def test_it_holds_many_times(promise):
    promise.run(promise.nightly).check()


def test_each_can_be_read_and_counted():
    for p in promises():
        assert 20 < len(p.text) <= 120 and 0 <= p.at_push <= p.nightly and p.nightly, p
