"""Join the ranks that torchrun started, and leave them: together, or at once if one fails.

torchrun restarts all ranks when one has ended early (--max_restarts). They meet again in the same
store, where the keys of their predecessors still are. So each generation agrees on a new prefix.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from runtime.base.ranks import START_SECONDS
from runtime.distributed.device import device_of_rank
from runtime.distributed.failure import FINAL_KEY, Report, value_of, watch
from runtime.distributed.parallel import Parallel

# How long ranks wait for each other to start, once torchrun has found all of their nodes.
MEETING_SECONDS = 300.0
# The store answers within milliseconds, unless its machine is gone.
STORE_SECONDS = 30.0
# In the store: the run that a restart is to continue.
RUN_KEY = "gptoss/run"


class StartedRanks(Parallel):
    """The ranks of torchrun. store: outlives them; run_before: that a restart is to continue."""

    def __init__(self, device: torch.device, local_world: int, store: dist.Store):
        super().__init__(device, local_world)
        self.store = store
        self.run_before = value_of(store, RUN_KEY)

    def began(self, run_id: str) -> None:
        if self.is_first:
            self.store.set(RUN_KEY, run_id)

    def stopped(self) -> None:
        self.store.set(FINAL_KEY, "the run was told to stop, and --resume continues it")


@contextlib.contextmanager
def joined(device: str) -> Iterator[Parallel]:
    """Yield this process's ranks, with the process group started. device: as in TrainConfig.

    Ranks other than the first print errors alone. A rank that fails ends its process here.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    ended = threading.Event()
    with _quiet() if rank else contextlib.nullcontext():
        report = Report(rank, world)
        try:
            store = _store()
            name = _agreed_name(store, rank, world)
            report.store, report.lasting = dist.PrefixStore(name, store), store
            threading.Thread(target=watch, args=(report.store, ended), daemon=True).start()
            if line := value_of(store, FINAL_KEY):
                raise EndedBefore(line)
            local_rank, local_world = (
                int(os.environ[f"LOCAL_{n}"]) for n in ("RANK", "WORLD_SIZE")
            )
            own, backend = device_of_rank(device, local_rank, local_world)
            dist.init_process_group(
                backend,
                store=_store_of_group(name, store),
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=START_SECONDS),
            )
            ranks = StartedRanks(own, local_world, store)
            ranks.are_mixed = len(set(ranks.in_order([_kind_of(own)]))) > 1
            ranks.check_equal({"code": _code_digest(), "torch version": str(torch.__version__)})
            yield ranks
            # The first rank may still draw plots.
            ranks.wait_at_most(START_SECONDS)
            # Without it, a rank that destroys its group early makes others hang.
            dist.barrier()
        except BaseException as error:
            report.leave(error)
        ended.set()
        dist.destroy_process_group()


class EndedBefore(ValueError):
    """The ranks were restarted after an error that they would only meet again."""

    def __init__(self, line: str):
        super().__init__(f"no restart would change this: {line}")


# ----------------------------------------------------------------------------------------- start-up
def _kind_of(device: torch.device) -> str:
    """Return what decides a device's random numbers, apart from the seed."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _store() -> dist.Store:
    """Return the store of torchrun, or that of the first rank where torchrun shares none."""
    is_shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=not is_shared and os.environ["RANK"] == "0",
        timeout=timedelta(seconds=STORE_SECONDS),
        multi_tenant=True,
        wait_for_workers=False,
    )


def _store_of_group(name: str, store: dist.Store) -> dist.Store:
    """Return the store in which the ranks' groups leave each other their addresses.

    NCCL looks for a group's there at its first exchange, and waits as long as the store does, not
    as the group. Such a wait keeps a connection busy, so it is another than that of `watch`.
    """
    own = store.clone()  # type: ignore[attr-defined]  # torch's stubs lack it
    own.set_timeout(timedelta(seconds=START_SECONDS))
    return dist.PrefixStore(name, own)


def _agreed_name(store: dist.Store, rank: int, world: int) -> str:
    """Return a name that these processes share and that no earlier ones had.

    torchrun counts its restarts on each node, so that nodes need not count alike. Instead every
    process shows a random number, and the first rank proposes a name for a list of them. A process
    agrees to a list with its own number. What an earlier process has left makes a list to which its
    successor does not agree; the first rank then sees the new number, and proposes again.
    """
    own, proposed = os.urandom(8).hex(), ""
    keys = [f"gptoss/here/{i}" for i in range(world)]
    store.set(keys[rank], own)
    agreed: set[str] = set()
    end = time.monotonic() + MEETING_SECONDS
    while time.monotonic() < end:
        if rank == 0 and store.check(keys):
            here = [value.decode() for value in store.multi_get(keys)]
            if json.dumps(here) != proposed:
                proposed = json.dumps(here)
                store.set("gptoss/proposal", json.dumps([os.urandom(8).hex(), here]))
        if value := value_of(store, "gptoss/proposal"):
            name, here = json.loads(value)
            if len(here) == world and here[rank] == own:
                count = store.add(f"gptoss/agreed/{name}", int(name not in agreed))
                agreed.add(name)
                if count == world:
                    return f"gptoss/{name}"
        time.sleep(0.02)
    raise ValueError(
        f"rank {rank} has waited {MEETING_SECONDS:.0f} s for the other {world - 1} to start: see "
        "what they say, and whether their nodes can reach each other"
    )


def _code_digest() -> str:
    """Return a digest of the code that a run is made of."""
    root = Path(__file__).parent.parent.parent
    files = [
        *(root / f"{name}.py" for name in ("config_model", "model_parts", "model", "train")),
        *(path for folder in ("runtime", "scripts") for path in (root / folder).rglob("*.py")),
        *(root / "runtime").rglob("*.c"),
    ]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Discard what is printed, and warnings: the first rank has the same ones."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        warnings.simplefilter("ignore")
        yield
