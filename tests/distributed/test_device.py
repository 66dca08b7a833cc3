"""Which device a rank computes on (runtime/distributed/device.py)."""

from __future__ import annotations

import pytest
import torch

from runtime.distributed.device import device_of_rank


@pytest.fixture
def gpus(monkeypatch):
    """Let this machine have four CUDA GPUs by its own account; return which one is chosen."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_rank_takes_a_gpu_of_its_own(gpus, name):
    device = torch.device("cuda", 3)
    assert device_of_rank(name, 3, 4) == (device, "cpu:gloo,cuda:nccl")
    assert gpus == [device]


@pytest.mark.parametrize("name", ["auto", "cpu"])
def test_ranks_without_gpus_are_cpus(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert device_of_rank(name, 1, 2) == (torch.device("cpu"), "gloo")


@pytest.mark.parametrize("name", ["auto", "mps"])
def test_apples_gpus_are_refused(monkeypatch, name):
    """A run on ranks would have been one on CPUs, without a word."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(ValueError, match="device is mps: give --device cpu"):
        device_of_rank(name, 0, 2)
    assert device_of_rank("cpu", 0, 2)[0].type == "cpu"


def test_what_cannot_be_shared_out_is_refused(gpus, monkeypatch):
    """--device cuda:1 put every rank elsewhere; a missing device was replaced by CPUs."""
    with pytest.raises(ValueError, match="cuda:1 is one GPU.*give --device cuda$"):
        device_of_rank("cuda:1", 0, 2)
    with pytest.raises(ValueError, match="5 ranks.*4 GPUs.*nproc_per_node 4"):
        device_of_rank("cuda", 0, 5)
    with pytest.raises(ValueError, match="unknown device 'gpu'"):
        device_of_rank("gpu", 0, 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="'cuda' is not here"):
        device_of_rank("cuda", 0, 2)
    assert gpus == []
