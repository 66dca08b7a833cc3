"""scripts/convert_checkpoint: a file becomes a folder, and a folder the file that it was."""

from __future__ import annotations

import errno
import os
from unittest import mock

import pytest
import torch

from runtime.checkpoint.format import CheckpointError
from runtime.checkpoint.read import load_model, read_checkpoint
from runtime.distributed import sharded_checkpoint
from scripts.convert_checkpoint import main
from tests.builders_checkpoint import new_run, save, train


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    model, optimizer = new_run()
    train(model, optimizer, 2, 0)
    return save(tmp_path_factory.mktemp("run"), 2, model, optimizer)


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_both_ways_keep_every_tensor_and_the_header(file, tmp_path, capsys):
    folder, again = tmp_path / "step_0000002", tmp_path / "again.pt"
    assert main(["--ckpt", str(file), "--out", str(folder)]) == 0
    assert main(["--ckpt", str(folder), "--out", str(again)]) == 0
    said = capsys.readouterr().out
    assert "a folder, step 2" in said and "one file, step 2" in said
    before = read_checkpoint(file, optimizer=True)
    for path in (folder, again):
        after = read_checkpoint(path, optimizer=True)
        assert equal(before.model, after.model) and equal(before.optimizer, after.optimizer)
        for name in ("run", "step", "tokenizer_state", "train_config", "weights_digest"):
            assert getattr(before, name) == getattr(after, name), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.pt", "step_0000002"]


def test_several_files_of_a_rank(file, tmp_path, monkeypatch):
    """A file's tensors are in memory together, so a large checkpoint is written into several."""
    monkeypatch.setattr(sharded_checkpoint, "FILE_BYTES", 3000)
    main(["--ckpt", str(file), "--out", str(tmp_path / "f")])
    assert len(list((tmp_path / "f/model").iterdir())) > 3
    assert equal(read_checkpoint(file).model, read_checkpoint(tmp_path / "f").model)


def test_weights_alone_without_an_optimizer(tmp_path):
    model, _ = new_run()
    file = save(tmp_path / "a", 2, model, None)
    main(["--ckpt", str(file), "--out", str(tmp_path / "f")])
    main(["--ckpt", str(tmp_path / "f"), "--out", str(tmp_path / "b.pt")])
    assert equal(load_model(file)[0].state_dict(), load_model(tmp_path / "b.pt")[0].state_dict())
    with pytest.raises(CheckpointError, match="no optimizer state"):
        read_checkpoint(tmp_path / "f", optimizer=True)


def test_a_full_disk_leaves_nothing(file, tmp_path):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with (
        mock.patch("torch.distributed.checkpoint.filesystem.os.fsync", side_effect=full),
        pytest.raises(CheckpointError, match="No space left"),
    ):
        main(["--ckpt", str(file), "--out", str(tmp_path / "f")])
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="exists"):
        main(["--ckpt", str(file), "--out", str(file.parent / "latest.pt")])
