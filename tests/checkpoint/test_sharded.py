"""Checkpoints in folders: damage and malice are refused in a line, and runs know their folders."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from config_model import TrainConfig
from runtime.base.ranks import Ranks
from runtime.checkpoint import sharded
from runtime.checkpoint.folder import find_latest, folder_has_run, restore_names, step_files
from runtime.checkpoint.format import CheckpointError
from runtime.checkpoint.read import load_model, read_checkpoint, read_config
from runtime.checkpoint.write import save_checkpoint
from runtime.training.agreed import check_is_shared
from tests.builders_rank_checkpoints import CONFIG, new_run
from tests.ranks import run_on


def save(ranks: Ranks, folder: Path, steps: list[int], best: int = 0, keep_last: int = 0) -> None:
    model, optimizer = new_run(ranks)
    for step in steps:
        save_checkpoint(
            folder,
            step,
            model,
            optimizer,
            train_config=TrainConfig(checkpoint="sharded"),
            tokenizer_state=None,
            run={"step": step},
            keep_last=keep_last,
            is_best=step == best,
            ranks=ranks,
        )


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    run_on(2, save, folder, [1])
    return folder / "step_0000001"


@pytest.fixture
def folder(written, tmp_path) -> Path:
    return shutil.copytree(written, tmp_path / written.name)


def forge(folder: Path, change) -> None:
    """Change a manifest, with its digest, as an attacker would."""
    path = folder / sharded.MANIFEST
    contents = json.loads(path.read_text())
    del contents["digest"]
    change(contents)
    path.write_text(json.dumps(contents | {"digest": sharded._digest_of(contents)}))


def rewritten(folder: Path, file: str, change) -> None:
    """Change a file's tensors and where they begin, with all digests."""
    path = folder / file
    with sharded.safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    tensors, info = load_file(path), json.loads(metadata[sharded.SHARDING_INFO])
    change(tensors, info)
    save_file(tensors, path, metadata | {sharded.SHARDING_INFO: json.dumps(info)})

    def digests(contents):
        contents["files"][file] = path.stat().st_size
        contents["digests"][file] = sharded.sha256_of_file(path)

    forge(folder, digests)


# -------------------------------------------------------------------------------------- damage
def refusal(folder: Path, optimizer: bool = True) -> str:
    with pytest.raises(CheckpointError) as raised:
        read_checkpoint(folder, optimizer)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_every_flipped_byte_is_noticed(folder):
    """Wherever it is: in a tensor, in what says where a tensor begins, or in the manifest."""
    torch.manual_seed(0)
    for path in files_of(folder):
        whole = path.read_bytes()
        for at in [0, 7, 100, *torch.randint(len(whole), (8,)).tolist()]:
            damaged = bytearray(whole)
            damaged[at] ^= 1 << (at % 8)
            path.write_bytes(damaged)
            refusal(folder)
        path.write_bytes(whole)
    assert read_checkpoint(folder, optimizer=True).step == 1


def test_a_file_that_is_cut_short_or_gone_is_named(folder):
    for path in files_of(folder):
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
        line = refusal(folder)
        path.unlink()
        gone = refusal(folder)
        if path.name != sharded.MANIFEST:
            assert path.name in line and path.name in gone
        path.write_bytes(whole)


def test_damage_to_the_optimizer_costs_a_resume_but_not_a_prediction(folder):
    path = next((folder / "optimizer").iterdir())
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "does not match its digest" in refusal(folder)
    model, _ = load_model(folder)
    assert model.config == read_config(folder) == CONFIG


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda c: c["files"].update({"../../x.safetensors": 1}), "must name the files"),
        (lambda c: c["files"].update({"model/.metadata": 1}), "must name the files"),
        (lambda c: c.update(files=[]), "must name the files"),
        (lambda c: c.update(format="other"), "its format is"),
        (lambda c: c.update(version=2), "update gptoss"),
        (lambda c: c.update(step=2), "does not match its digest"),
        (lambda c: c.pop("digests"), "digests is missing"),
        (lambda c: c.update(x=1), "unknown key"),
        (lambda c: c["files"].clear(), "more than the file's 0 bytes hold"),
    ],
)
def test_manifests_that_are_forged(folder, change, said):
    forge(folder, change)
    assert said in refusal(folder)


def without(name):
    return lambda tensors, info: (tensors.pop(name), info.pop(name))


def moved(rows):
    def change(tensors, info):
        info["embed.weight"] = {"saved_offsets": [rows, 0]}

    return change


@pytest.mark.parametrize(
    "change, said",
    [
        (without("embed.weight"), "embed.weight has no rows 0 to 31"),
        (moved(3), "embed.weight has no rows 0 to 3"),
        (moved(31), "has no rows 0 to 31"),
        (moved(-1), "neither where it begins"),
        (moved("0"), "neither where it begins"),
        (lambda tensors, info: info.clear(), "neither where it begins"),
        (
            lambda tensors, info: tensors.update({"embed.weight": tensors["embed.weight"].half()}),
            "nor a known dtype",
        ),
        (
            lambda tensors, info: tensors.update({"embed.weight": torch.zeros(31, 5)}),
            "another shape or dtype",
        ),
        (
            lambda tensors, info: tensors.update({"norm.weight": torch.full((16,), torch.nan)}),
            "NaN or infinity",
        ),
    ],
)
def test_pieces_that_do_not_make_up_the_model(folder, change, said):
    name = sorted(path.name for path in (folder / "model").iterdir())[0]
    rewritten(folder, f"model/{name}", change)
    assert said in refusal(folder)


def test_nothing_reads_an_index_of_pickles(folder, tmp_path):
    """torch.distributed.checkpoint would load .metadata by pickle."""

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    import pickle

    for place in (folder, folder / "model"):
        (place / ".metadata").write_bytes(pickle.dumps(Payload()))
    assert read_checkpoint(folder, optimizer=True).step == 1
    assert not (tmp_path / "harm").exists()


def test_a_directory_that_is_no_checkpoint(tmp_path):
    assert sharded.MANIFEST in refusal(tmp_path)


# ----------------------------------------------------------------------------------------- runs
def test_a_run_finds_names_and_prunes_its_folders(tmp_path):
    run_on(2, save, tmp_path, [1, 2, 3, 4], 2, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best.pt",
        "latest.pt",
        "step_0000002",
        "step_0000004",
    ]
    assert [step for step, _ in step_files(tmp_path)] == [2, 4] and folder_has_run(tmp_path)
    assert read_checkpoint(tmp_path / "best.pt").step == 2
    found, _ = find_latest(tmp_path)
    assert found.step == 4 and found.world == 2
    (tmp_path / "latest.pt").unlink()
    restore_names(found)
    assert read_checkpoint(tmp_path / "latest.pt").step == 4
    # What a kill left of a folder goes with the next save; the same step is written again.
    (tmp_path / "step_0000009.partial").mkdir()
    (tmp_path / "step_0000009.partial/x").touch()
    run_on(2, save, tmp_path, [4])
    assert not (tmp_path / "step_0000009.partial").exists()
    next((tmp_path / "step_0000004/optimizer").iterdir()).unlink()
    older, skipped = find_latest(tmp_path)
    assert older.step == 2 and "step_0000004" in skipped[0]


# ----------------------------------------------------------------------------------- shared folders
def shares(ranks: Ranks, folders: list[Path]) -> str:
    """Return what a rank is told whose working folder is its own of `folders`."""
    before = os.getcwd()
    os.chdir(folders[ranks.rank])
    try:
        check_is_shared("checkpoints", ranks)
    except ValueError as error:
        return str(error)
    finally:
        os.chdir(before)
    return ""


def test_a_folder_that_nodes_do_not_share_is_refused_before_the_first_step(tmp_path):
    """The run ended at its first save, hours after its start."""
    own = [tmp_path / "a", tmp_path / "b"]
    for folder in own:
        folder.mkdir()
    assert run_on(2, shares, [tmp_path, tmp_path]) == ["", ""]
    said = run_on(2, shares, own)
    assert said[0] == said[1] and said[0].startswith("rank 1: checkpoints is another folder")
    # Nothing is left.
    assert [path.name for path in tmp_path.rglob("*.*")] == []
    assert not (tmp_path / "b" / "checkpoints").exists()
