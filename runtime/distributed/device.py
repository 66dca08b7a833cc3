"""Which device a rank computes on."""

from __future__ import annotations

import torch

from runtime.base.device import choose_device


def device_of_rank(name: str, local_rank: int, local_world: int) -> tuple[torch.device, str]:
    """Return a rank's device, and the backend that its group sends tensors with.

    name: as in TrainConfig. local_rank, local_world: this rank's number on its machine, and how
    many there are. Raise ValueError for devices that ranks cannot share out.
    """
    device = choose_device(name)
    if device.type == "mps":
        raise ValueError(
            "several ranks train on CUDA GPUs or on CPUs, and this machine's device is mps: give "
            "--device cpu, or leave torchrun out to train on mps in one process"
        )
    if device.type == "cpu":
        return device, "gloo"
    if device.index is not None:
        raise ValueError(
            f"--device {name} is one GPU, and each rank takes one of its own: give --device cuda"
        )
    if local_world > torch.cuda.device_count():
        raise ValueError(
            f"these are {local_world} ranks on a machine with {torch.cuda.device_count()} GPUs: "
            f"give torchrun --nproc_per_node {torch.cuda.device_count()}, or take --device cpu"
        )
    own = torch.device("cuda", local_rank)
    torch.cuda.set_device(own)
    return own, "cpu:gloo,cuda:nccl"
