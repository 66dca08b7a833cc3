"""Checkpoints of several ranks: one file, the same as one process's, that any number opens."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from config_model import TrainConfig
from model import LLM
from runtime.base.ranks import ONE_PROCESS, Ranks
from runtime.checkpoint import write as write_module
from runtime.checkpoint.folder import find_latest
from runtime.checkpoint.format import CheckpointError
from runtime.checkpoint.optimizer_state import state_by_name
from runtime.checkpoint.read import load_training_state, read_checkpoint
from runtime.checkpoint.write import save_checkpoint
from runtime.training.optimizer import build_optimizer
from tests.builders import tiny_config
from tests.ranks import run_on

# Rows that neither 2 nor 4 ranks share evenly, fewer rows than ranks, an expert bias that moves.
CONFIG = tiny_config(vocabulary_size=61, num_experts=3, router_bias_rate=0.01, expert_bias=True)
SETTINGS = dict(optimizer="muon", state_dtype="bfloat16", warmup_steps=0)


def number(name: str, shape, dtype=torch.float32) -> Tensor:
    """Return random numbers that depend on a tensor's name alone."""
    random = torch.Generator().manual_seed(int.from_bytes(name.encode()) % 2**60)
    return torch.randn(shape, generator=random).abs().to(dtype)


def new_run(ranks: Ranks, numbers: bool = True):
    """Return a model in shards and its optimizer, with known numbers or with initial ones."""
    torch.manual_seed(0)
    model, config = LLM(CONFIG), TrainConfig(**SETTINGS)
    ranks.arrange(1, "full", CONFIG.num_experts)
    ranks.shard(model, torch.float32)
    optimizer = build_optimizer(model, config, ranks)
    if numbers:
        own = model.state_dict() | state_by_name(model, optimizer)
        with torch.no_grad():
            for name, tensor in own.items():
                ranks.fill_(tensor, number(name, ranks.shape_of(tensor), tensor.dtype))
    return model, optimizer


def save(ranks: Ranks, folder: Path, model, optimizer, step: int = 7) -> Path:
    return save_checkpoint(
        folder,
        step,
        model,
        optimizer,
        train_config=TrainConfig(**SETTINGS),
        tokenizer_state={"name": "byte", "vocabulary_size": 257},
        data_fingerprint="abc",
        val_loss=3.25,
        run={"step": step},
        keep_last=2,
        is_best=True,
        ranks=ranks,
    )


def saved(ranks: Ranks, folder: Path) -> str:
    return str(save(ranks, folder, *new_run(ranks)))


def loaded_and_saved(ranks: Ranks, path: Path, folder: Path) -> str:
    """Load a file into a run with other numbers, and save it again."""
    model, optimizer = new_run(ranks, numbers=False)
    load_training_state(read_checkpoint(path, optimizer=True), model, optimizer, ranks)
    return str(save(ranks, folder, model, optimizer))


def contents(path: str | Path) -> dict:
    return torch.load(path, weights_only=True)


def same(path: str | Path, other: str | Path) -> bool:
    """Return whether two files hold the same tensors, with their digests, and the same header.

    The number of ranks apart, and so the header's digest.
    """
    a, b = contents(path), contents(other)
    for file in (a, b):
        file.pop("world", None)
        del file["digests"]["header"]
    tensors = [file.pop(group) for group in ("model", "optimizer") for file in (a, b)]
    return a == b and all(
        one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
        for one, two in (tensors[:2], tensors[2:])
    )


@pytest.fixture(scope="module")
def of_one_process(tmp_path_factory) -> str:
    return saved(ONE_PROCESS, tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize("world, reads", [(1, 2), (2, 4), (4, 1)])
def test_any_number_of_ranks_writes_and_reads_the_file_of_one_process(
    world, reads, of_one_process, tmp_path
):
    """A run may continue on another number of ranks than it was started on."""
    path = run_on(world, saved, tmp_path / "a")[0]
    assert same(path, of_one_process)
    assert contents(path).get("world", 1) == read_checkpoint(path).world == world
    again = run_on(reads, loaded_and_saved, path, tmp_path / "b")[0]
    assert same(again, of_one_process)
    names = {"step_0000007.pt", "latest.pt", "best.pt"}
    assert {p.name for p in (tmp_path / "b").iterdir()} == names
    third = loaded_and_saved(ONE_PROCESS, Path(again), tmp_path / "c")
    assert Path(third).read_bytes() == Path(of_one_process).read_bytes()


def without_world(ranks: Ranks, folder: Path) -> None:
    """Save with a header that does not say how many ranks there are."""
    header = write_module._header

    def plain(*args, world=0, **values):
        return header(*args, **values)

    with mock.patch.object(write_module, "_header", plain):
        saved(ranks, folder)


def test_the_file_is_the_same_to_the_byte_from_2_and_4_ranks(tmp_path):
    files = []
    for world in (2, 4):
        run_on(world, without_world, tmp_path / str(world))
        files.append((tmp_path / str(world) / "latest.pt").read_bytes())
    assert files[0] == files[1]


# ------------------------------------------------------------------------------------------- faults
def failing(ranks: Ranks, folder: Path, fault: str) -> tuple[str, list[str]]:
    """Save step 7, then let the save of step 8 fail; return its error and what the folder holds."""
    model, optimizer = new_run(ranks)
    save(ranks, folder, model, optimizer)
    patch: contextlib.AbstractContextManager = contextlib.nullcontext()
    if fault == "nan":
        ranks.local(model.layers[1].norm1.weight.detach())[-1:] = float("nan")
    elif fault == "full disk":
        patch = full_disk_after(4)
    elif fault == "no room":
        patch = mock.patch.object(write_module, "check_disk_space", side_effect=ValueError("full"))
    with patch:
        try:
            save(ranks, folder, model, optimizer, step=8)
            error = ""
        except CheckpointError as raised:
            error = str(raised)
    # All ranks still answer each other.
    assert ranks.sum_on_host(1) == (ranks.world,)
    return error, sorted(path.name for path in folder.iterdir())


def full_disk_after(writes: int):
    """Let the file of a checkpoint have room for so many tensors only."""
    stream = write_module.stream

    class Full:
        def __init__(self, file):
            self.file, self.left = file, writes
            self.name = file.name

        def write(self, data):
            if len(data) > 1000 and not self.left:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.left -= len(data) > 1000
            return self.file.write(data)

        def __getattr__(self, name):
            return getattr(self.file, name)

    def full(file, *rest):
        return stream(Full(file), *rest)

    return mock.patch.object(write_module, "stream", full)


@pytest.mark.parametrize(
    "fault, said",
    [
        ("nan", "model tensor layers.1.norm1.weight holds NaN"),
        ("full disk", "No space left on device; free some space"),
        ("no room", "not written: full"),
    ],
)
def test_a_save_that_fails_on_the_first_rank_ends_on_all_of_them(fault, said, tmp_path):
    """The first rank left in the middle, and the others waited for it until their time-out."""
    (first, files), *others = run_on(4, failing, tmp_path, fault)
    assert said in first and "step_0000008.pt" in first
    assert [error for error, _ in others] == [first] * 3
    assert files == ["best.pt", "latest.pt", "step_0000007.pt"]
    assert find_latest(tmp_path)[0].step == 7


def test_ranks_can_send_each_other_the_error_of_a_checkpoint():
    """It was made of a path and a reason, and read back from its line alone: a TypeError."""
    error = CheckpointError("a.pt", "is gone")
    error.innermost = "x"
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is CheckpointError
    assert (str(again), again.innermost) == ("a.pt: is gone", "x")
