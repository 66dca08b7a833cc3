"""Join the ranks that torchrun started, and leave them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist

from runtime.distributed.parallel import Parallel


@contextlib.contextmanager
def joined(device: str) -> Iterator[Parallel]:
    """Yield this process's ranks, with the process group started. device: as in TrainConfig."""
    local_rank = int(os.environ["LOCAL_RANK"])
    if device == "cpu" or not torch.cuda.is_available():
        own, backend = torch.device("cpu"), "gloo"
    else:
        own, backend = torch.device("cuda", local_rank), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(own)
    dist.init_process_group(backend)
    yield Parallel(own, int(os.environ["LOCAL_WORLD_SIZE"]))
    dist.barrier()
    dist.destroy_process_group()
