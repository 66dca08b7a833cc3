"""Checkpoints: exact round trips, damage and malice rejected in one line, links and pruning.

Also the original implementation's files.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import errno
import io
import json
import mmap
import os
import pickle
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from config_model import TrainConfig
from model import generate
from runtime.checkpoint import format as format_module
from runtime.checkpoint import read as read_module
from runtime.checkpoint import write as write_module
from runtime.checkpoint.folder import find_latest, folder_has_run, step_files
from runtime.checkpoint.format import CheckpointError
from runtime.checkpoint.optimizer_state import initialise_state, state_by_name
from runtime.checkpoint.read import load_model, load_training_state, read_checkpoint
from runtime.checkpoint.reference import _reference_sources, reference_config
from runtime.checkpoint.write import write_weights
from runtime.training.optimizer import build_adamw
from tests.builders_checkpoint import (
    CONFIG,
    RUN,
    TOKENIZER,
    TRAIN,
    Payload,
    bomb,
    forge,
    new_run,
    put,
    save,
    train,
)
from tests.conftest import REPO
from tests.numeric import assert_close, gradients_bound, logits_bound


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a trained model, its optimizer, and their checkpoint of step 2.

    Tests copy the file before they change it.
    """
    model, optimizer = new_run()
    train(model, optimizer, 2, seed=1)
    model.layers[0].moe.router.selection_bias += 0.125
    return SimpleNamespace(
        model=model,
        optimizer=optimizer,
        path=save(tmp_path_factory.mktemp("run"), 2, model, optimizer),
    )


def refused(path, match=None, **how) -> str:
    """The one line with which `path` is rejected; it names the file and prints on any terminal."""
    with pytest.raises(CheckpointError, match=match) as caught:
        read_checkpoint(path, **how)
    line = str(caught.value)
    assert line.startswith(str(path)) and line.isprintable() and len(line) < 700
    return line


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a
    )


# --------------------------------------------------------------------------------------- round trip
def test_round_trip_is_bitwise(saved):
    checkpoint = read_checkpoint(saved.path, optimizer=True)
    assert saved.path.name == "step_0000002.pt"
    assert (checkpoint.step, checkpoint.val_loss, checkpoint.model_config, checkpoint.run) == (
        2,
        3.25,
        CONFIG,
        RUN,
    )
    assert TrainConfig(**checkpoint.train_config) == TRAIN
    assert (
        checkpoint.tokenizer_state,
        checkpoint.data_fingerprint,
        checkpoint.is_reference_format,
    ) == (TOKENIZER, "abc", False)
    assert checkpoint.versions["torch"] == str(torch.__version__)
    assert same(checkpoint.model, saved.model.state_dict())
    assert same(checkpoint.optimizer, state_by_name(saved.model, saved.optimizer))


def test_file_is_readable_by_hand_under_the_references_keys(saved):
    contents = torch.load(saved.path, weights_only=True)
    assert list(contents)[:5] == ["step", "model", "optimizer", "val_loss", "cfg"]
    assert contents["cfg"] == dataclasses.asdict(CONFIG) and type(contents["model"]) is dict
    assert all(tensor.dtype == torch.float32 for tensor in contents["model"].values())
    assert contents["format"] == "gptoss-checkpoint" and contents["version"] == 1
    assert zipfile.ZipFile(saved.path).testzip() is None


def test_a_resumed_run_is_bitwise_the_run_that_was_not_stopped(saved, tmp_path):
    straight, straight_adamw = new_run()
    train(straight, straight_adamw, 3, seed=5)
    path = save(tmp_path, 3, straight, straight_adamw)
    train(straight, straight_adamw, 3, seed=6)
    resumed, resumed_adamw = new_run(seed=99)
    load_training_state(read_checkpoint(path, optimizer=True), resumed, resumed_adamw)
    train(resumed, resumed_adamw, 3, seed=6)
    assert same(straight.state_dict(), resumed.state_dict())
    assert same(state_by_name(straight, straight_adamw), state_by_name(resumed, resumed_adamw))


def test_every_variant_of_the_model_round_trips(tmp_path):
    for changes in (
        dict(tie_embeddings=True, head_bias=False),
        dict(use_attention_bias=False, qk_norm=True, qkv_bias=True),
        dict(
            expert_activation="swiglu", expert_bias=False, out_proj_bias=False, router_bias_rate=0.0
        ),
    ):
        model, optimizer = new_run(dataclasses.replace(CONFIG, **changes))
        initialise_state(optimizer)
        loaded, checkpoint = load_model(save(tmp_path, 1, model, optimizer))
        assert (
            same(loaded.state_dict(), model.state_dict())
            and checkpoint.model_config == model.config
        )


def test_compiled_blocks_leave_no_prefix(tmp_path):
    """T1: torch.compile's `_orig_mod.` went into the original implementation's files.

    Neither kind loaded in the other's place.
    """
    model, optimizer = new_run()
    for block in model.layers:
        block.compile()
    assert not any(
        "_orig_mod" in name for name in read_checkpoint(save(tmp_path, 1, model, optimizer)).model
    )


def test_reading_leaves_the_random_state_alone(saved):
    before = torch.get_rng_state()
    load_model(saved.path)
    assert torch.equal(before, torch.get_rng_state())


def test_numbers_of_other_types_are_saved_as_plain_ones(tmp_path):
    """A numpy or subclassed number in the pickle would name its class.

    No careful reader would load the file again.
    """
    run = {
        "loss": np.float64(2.5),
        "count": np.int64(3),
        "flag": np.bool_(True),
        "pair": (1, 2),
        "nan": float("nan"),
        "name": np.str_("x"),
        "rng": 2**128 - 1,
    }
    back = read_checkpoint(save(tmp_path, run=run)).run
    assert {key: type(value) for key, value in back.items()} == {
        "loss": float,
        "count": int,
        "flag": bool,
        "pair": list,
        "nan": float,
        "name": str,
        "rng": int,
    }
    assert back["pair"] == [1, 2] and back["nan"] != back["nan"] and back["rng"] == 2**128 - 1


@pytest.mark.parametrize(
    "run", [{"x": Path("a")}, {"x": {1: 2}}, {"x": torch.zeros(1)}, {"x": {1, 2}}]
)
def test_what_is_not_json_is_refused_by_name_and_nothing_is_written(tmp_path, run):
    with pytest.raises(CheckpointError, match=r"header\.run\.x"):
        save(tmp_path, run=run)
    assert not any(tmp_path.iterdir())


def test_views_of_larger_storages_are_written_alone(tmp_path):
    model, optimizer = new_run()
    big = torch.zeros(1_000_000)
    big[: model.embed.weight.numel()] = model.embed.weight.detach().flatten()
    model.embed.weight = torch.nn.Parameter(
        big[: model.embed.weight.numel()].view_as(model.embed.weight)
    )
    path = save(tmp_path, 1, model, build_adamw(model, TRAIN))
    assert path.stat().st_size < 500_000 and same(read_checkpoint(path).model, model.state_dict())


# ------------------------------------------------------------------------------------------- models
def test_load_model_maps_the_file_and_training_on_it_never_reaches_the_file(saved, tmp_path):
    path = tmp_path / "copy.pt"
    path.write_bytes(saved.path.read_bytes())
    shared = (
        contextlib.nullcontext()
        if os.name == "nt"
        else torch.serialization.set_default_mmap_options(mmap.MAP_SHARED)
    )
    # Even then.
    with shared:
        model, checkpoint = load_model(path)
    assert not model.training and all(parameter.requires_grad for parameter in model.parameters())
    # No copy was made.
    assert model.embed.weight.data_ptr() == checkpoint.model["embed.weight"].data_ptr()
    train(model, build_adamw(model, TRAIN), 2, seed=3)
    assert not torch.equal(model.embed.weight, saved.model.embed.weight)
    assert path.read_bytes() == saved.path.read_bytes()


@pytest.mark.skipif(os.name == "nt", reason="POSIX maps")
def test_a_file_that_cannot_be_mapped_privately_is_shared_with_those_who_only_read(
    saved, monkeypatch
):
    """Linux refuses a private map of a file larger than memory and swap.

    No export could read what import_hf had written. Sharing every map instead would need write
    access to the file, and a mistake in an export could change it.
    """
    real, asked = torch.load, []

    def load(path, **how):
        asked.append(torch.serialization.get_default_mmap_options())
        if asked[-1] == mmap.MAP_PRIVATE:
            raise RuntimeError(
                "unable to mmap 41800000000 bytes from file: Cannot allocate memory (12)"
            )
        return real(path, **how)

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(
        CheckpointError, match="GB, which this machine's memory and swap cannot hold"
    ):
        read_checkpoint(saved.path)
    assert asked == [mmap.MAP_PRIVATE]
    assert same(
        read_checkpoint(saved.path, read_only=True).model, saved.model.state_dict()
    ) and asked[1:] == [mmap.MAP_PRIVATE, mmap.MAP_SHARED]
    monkeypatch.setattr(
        torch,
        "load",
        lambda path, **how: (
            asked.append(torch.serialization.get_default_mmap_options()),
            real(path, **how),
        )[1],
    )
    read_checkpoint(saved.path, read_only=True)
    assert asked[3:] == [mmap.MAP_PRIVATE]


def test_load_model_in_another_dtype(saved):
    model, _ = load_model(saved.path, dtype=torch.bfloat16)
    assert all(
        torch.equal(parameter, saved.model.get_parameter(name).bfloat16())
        for name, parameter in model.named_parameters()
    )
    assert (
        model.layers[0].moe.router.selection_bias.dtype == torch.float32
        and model.layers[0].moe.router.selection_bias[0] == 0.125
    )


def test_loaded_model_computes_what_the_saved_one_does(saved):
    ids = torch.randint(0, 32, (2, 8))
    with torch.no_grad():
        assert torch.equal(load_model(saved.path)[0](ids).logits, saved.model.eval()(ids).logits)


def test_damage_to_the_optimizer_costs_a_resume_but_not_a_prediction(saved, tmp_path):
    contents = torch.load(saved.path, weights_only=True)
    needle = contents["optimizer"]["exp_avg.embed.weight"].numpy().tobytes()
    data = bytearray(saved.path.read_bytes())
    data[data.index(needle) + 100] ^= 16
    path = tmp_path / "x.pt"
    path.write_bytes(data)
    assert same(load_model(path)[1].model, saved.model.state_dict())
    refused(
        path, r"optimizer tensor exp_avg\.embed\.weight does not match its digest", optimizer=True
    )


def test_state_of_another_model_is_refused_and_changes_nothing(saved):
    model, optimizer = new_run(dataclasses.replace(CONFIG, d_ff=16))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(
        CheckpointError, match=r"does not fit this model: model layers\.0\.moe\.experts\.\w+ is"
    ):
        load_training_state(read_checkpoint(saved.path, optimizer=True), model, optimizer)
    assert same(before, model.state_dict())
    with pytest.raises(CheckpointError, match="read without its optimizer"):
        load_training_state(read_checkpoint(saved.path), *new_run())


def test_weights_alone_can_be_saved_and_predicted_from_but_not_resumed(tmp_path):
    model, _ = new_run()
    path = save(tmp_path, 1, model, None)
    assert same(load_model(path)[0].state_dict(), model.state_dict())
    refused(path, "no optimizer state", optimizer=True)


# ------------------------------------------------------------------------------------------- damage
@pytest.mark.nightly
def test_150_bit_flips_and_50_truncations(saved, tmp_path):
    """T4: 138 of 150 flips loaded silently with changed weights, and truncations were tracebacks.

    Here: one line, or (a flip in the zip's padding) exactly what was saved.
    """
    whole = read_checkpoint(saved.path, optimizer=True)
    data, generator, harmless = saved.path.read_bytes(), np.random.default_rng(0), 0
    path = tmp_path / "flipped.pt"
    for position, bit in zip(
        generator.integers(len(data), size=150), generator.integers(8, size=150), strict=True
    ):
        flipped = bytearray(data)
        flipped[position] ^= 1 << bit
        path.write_bytes(flipped)
        try:
            read = read_checkpoint(path, optimizer=True)
        except CheckpointError as error:
            assert str(error).isprintable() and str(path) in str(error)
        else:
            harmless += 1
            assert same(read.model, whole.model) and same(read.optimizer, whole.optimizer)
            assert dataclasses.replace(
                read, path=None, model={}, optimizer=None
            ) == dataclasses.replace(whole, path=None, model={}, optimizer=None)
    # The padding of a small file is a good part of it; that of a large one is nothing.
    assert harmless < 60
    for length in [0, 1, 3, 4, 22, len(data) - 1, *generator.integers(len(data), size=44)]:
        path.write_bytes(data[:length])
        refused(path, optimizer=True)


def test_one_flip_in_a_tensor_names_that_tensor(saved, tmp_path):
    data, contents = saved.path.read_bytes(), torch.load(saved.path, weights_only=True)
    path = tmp_path / "x.pt"
    for group in ("model", "optimizer"):
        for name, tensor in list(contents[group].items())[::3]:
            needle = tensor.numpy().tobytes()
            if tensor.numel() > 8 and data.count(needle) == 1:
                flipped = bytearray(data)
                flipped[data.index(needle) + len(needle) // 2] ^= 1
                path.write_bytes(flipped)
                refused(path, f"{group} tensor {name} does not match its digest", optimizer=True)


@pytest.mark.parametrize(
    "content, match",
    [
        (b"", "empty"),
        (b"hello\n", "not a checkpoint"),
        (b"PK\3\4" + b"\0" * 100, "cut short"),
        (pickle.dumps({"step": 1}), "not a checkpoint"),
    ],
)
def test_files_that_are_no_checkpoint(tmp_path, content, match):
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    refused(path, match)


def test_paths_that_are_no_file(tmp_path):
    refused(tmp_path, "directory")
    refused(tmp_path / "none.pt", "no such file")
    (tmp_path / "latest.pt").touch()
    refused(tmp_path / "none.pt", "no such file$")
    # As after Ctrl-C in the first steps.
    refused(tmp_path / "best.pt", "no such file: .* first validation. .*latest.pt is there")
    os.mkfifo(tmp_path / "pipe") if hasattr(os, "mkfifo") else (tmp_path / "pipe").mkdir()
    # And does not wait for someone to write into it.
    refused(tmp_path / "pipe", "device")


def drop(key):
    return lambda contents: contents.pop(key) and None


def put_model(name, value):
    return lambda contents: contents["model"].update({name: value})


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda c: [1, 2], "a list, not a dict"),
        (lambda c: {}, "cfg is missing"),
        (lambda c: torch.zeros(3), "a Tensor, not a dict"),
        (drop("model"), "model is missing"),
        (drop("digests"), "digests is missing"),
        (drop("run"), "run is missing"),
        (drop("cfg"), "cfg is missing"),
        (put("model", "weights"), "model must be a dict, not str"),
        (put("model", {}), "model lacks embed.weight, layers.0"),
        (put("optimizer", [1]), "optimizer must be a dict"),
        (put("optimizer", {}), "no optimizer state"),
        (put("extra", 1), "unknown key 'extra'"),
        (put("step", -9), "step must be at least 0, not -9"),
        (put("step", True), "step must be of type int, not bool"),
        (put("step", 2.0), "step must be of type int, not float"),
        (put("step", 1 << 70), "step must be"),
        (put("val_loss", "low"), "val_loss must be of type float or NoneType, not str"),
        (put("tokenizer", []), "tokenizer must be of type"),
        (put("run", {"x": torch.zeros(2)}), r"header\.run\.x is of type Tensor"),
        (put("run", {"x": {3: 4}}), "no text"),
        (put("format", "other"), "its format is 'other'"),
        (put("version", 2), r"format version 2, and this program reads up to 1: update"),
        (put("version", 0), "version must be 1, not 0"),
        (put("cfg", []), "cfg must be of type dict"),
        (lambda c: c["cfg"].update(d_model="16"), "cfg: d_model must be of type int, not '16'"),
        (lambda c: c["cfg"].update(top_k=0), "cfg: top_k must be at least 1"),
        (lambda c: c["cfg"].update(top_k=3), "cfg: top_k 3 must not exceed num_experts 2"),
        (lambda c: c["cfg"].update(nonsense=3), "cfg has unknown 'nonsense'"),
        (lambda c: c["cfg"].pop("d_ff") and None, "cfg describes .* more than the file"),
        (
            lambda c: c["cfg"].update(num_kv_heads=2),
            r"model layers.0.attention.W_k.weight is float32\[8, 16\], not float32\[16, 16\]",
        ),
        (lambda c: c["cfg"].update(transformer_blocks=3), "model lacks layers.2."),
        (
            put_model("embed.weight", torch.zeros(32, 16, dtype=torch.float64)),
            r"model embed.weight is float64\[32, 16\], not float32",
        ),
        (
            put_model("embed.weight", torch.zeros(16, 32)),
            r"float32\[16, 32\], not float32\[32, 16\]",
        ),
        (
            put_model("embed.weight", torch.zeros(32, 16).T.contiguous().T),
            "not a plain, contiguous",
        ),
        (put_model("embed.weight", torch.zeros(1).expand(32, 16)), "not a plain, contiguous"),
        (put_model("embed.weight", torch.zeros(32, 16).to_sparse()), "refused|damaged"),
        (put_model("embed.weight", torch.zeros(32, 16, device="meta")), "refused|damaged"),
        (put_model("embed.weight", torch.nn.Parameter(torch.zeros(32, 16))), "refused"),
        (put_model("embed.weight", [0.0]), "to a list"),
        (put_model(3, torch.zeros(1)), "not 3 to a Tensor"),
        (put_model("more", torch.zeros(1)), "model has unknown more"),
        (put_model("\x1b[2J\nmore", torch.zeros(1)), r"model has unknown \?\[2J more"),
        (
            put_model("embed.weight", torch.full((32, 16), float("nan"))),
            "model tensor embed.weight holds NaN",
        ),
        (
            lambda c: c["optimizer"].update(
                {"exp_avg.norm.weight": torch.full((16,), float("inf"))}
            ),
            "optimizer tensor exp_avg.norm.weight holds NaN or infinity",
        ),
    ],
    ids=range(44),
)
def test_malformed_checkpoints(saved, tmp_path, change, match):
    """T6, P8, S2: wrong containers, types, shapes, steps and NaN weights are rejected in one line.

    They were raw tracebacks, or were loaded.
    """
    refused(forge(saved.path, tmp_path / "x.pt", change), match, optimizer=True)


@pytest.mark.parametrize(
    "change, match",
    [
        (put("step", 3), "header does not match its digest"),
        (lambda c: c["run"].update(tokens_seen=1), "header does not match"),
        (
            lambda c: c["digests"].pop("model/norm.weight") and None,
            "model tensor norm.weight does not match",
        ),
        (put_model("norm.weight", torch.zeros(16)), "model tensor norm.weight does not match"),
        (lambda c: c.update(digests=dict.fromkeys(c["digests"], "x")), "header does not match"),
    ],
)
def test_changes_that_keep_the_old_digests(saved, tmp_path, change, match):
    refused(forge(saved.path, tmp_path / "x.pt", change, redo_digests=False), match)


# ------------------------------------------------------------------------------------------- malice


@pytest.mark.parametrize(
    "build",
    [
        lambda marker: Payload(os.system, f"touch {marker}"),
        lambda marker: Payload(eval, f"open({str(marker)!r}, 'w')"),
        lambda marker: Payload(bytearray, 1 << 44),
        lambda marker: Payload(torch.UntypedStorage, 1 << 44),
    ],
)
def test_hostile_pickles_do_nothing(saved, tmp_path, build):
    """T5: with an unguarded load the payload ran.

    bytearray and storages pass weights_only, and 16 TB then end the process.
    """
    marker = tmp_path / "marker"
    path = tmp_path / "x.pt"
    contents = torch.load(saved.path, weights_only=True)
    for place in ("run", "model"):
        torch.save(contents | {place: {"x": build(marker)}}, path)
        refused(path, "refused: .* asks for")
    torch.save(build(marker), path)
    refused(path, "refused")
    assert not marker.exists()


@pytest.mark.parametrize("protocol", [4, 5])
def test_newer_pickle_protocols_cannot_hide_a_name(saved, tmp_path, protocol):
    torch.save({"x": Payload(os.system, "true")}, tmp_path / "x.pt", pickle_protocol=protocol)
    refused(tmp_path / "x.pt", "refused: .* STACK_GLOBAL")


def test_zip_bombs_are_refused_before_anything_is_unpacked(tmp_path):
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(1 << 26))
    assert path.stat().st_size < 100_000
    refused(path, "compressed")


def test_zips_whose_entries_share_bytes_are_refused(saved, tmp_path):
    """Directory entries that share a record claim any amount of data in a small file."""
    data = saved.path.read_bytes()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", b"")
        for number in range(3):
            archive.writestr(f"x/data/{number}", b"0" * 10_000)
        for entry in archive.infolist()[1:]:
            entry.header_offset, entry.file_size, entry.compress_size = (
                archive.infolist()[1].header_offset,
                largest.file_size + 10_000,
                largest.file_size + 10_000,
            )
    refused(path, "claims more than the file holds")


def test_lists_that_contain_one_another_end_quickly(saved, tmp_path, monkeypatch):
    """2 ** 60 visits from a file of a few kilobytes."""
    monkeypatch.setattr(format_module, "HEADER_LIMIT", 1 << 18)
    for number, value in enumerate((bomb(), {"x": bomb()})):
        refused(
            forge(
                saved.path, tmp_path / f"{number}.pt", put("run", {"x": value}), redo_digests=False
            ),
            "too large or nested too deeply",
        )
    value = []
    for _ in range(200):
        value = [value]
    refused(
        forge(saved.path, tmp_path / "deep.pt", put("run", {"x": value}), redo_digests=False),
        "nested too deeply",
    )


@pytest.mark.parametrize(
    "cfg",
    [
        dict(d_model=65_536, num_heads=4, d_ff=262_144),
        dict(transformer_blocks=1_024, num_experts=4_096),
        dict(context_length=16_777_216),
    ],
)
def test_config_bombs_are_refused_before_the_module_is_built(saved, tmp_path, monkeypatch, cfg):
    """S2: a small file whose config asked for 3.36 TB."""
    path = forge(saved.path, tmp_path / "x.pt", lambda c: c["cfg"].update(cfg))
    monkeypatch.setattr(format_module, "LLM", None)
    start = time.perf_counter()
    refused(path, "cfg describes .* parameters, more than the file")
    assert time.perf_counter() - start < 1


def test_every_torch_load_in_the_repo_is_weights_only():
    """There is also no other unpickler.

    No pickle.load, no torch.jit.load, no numpy with allow_pickle, no name that hides one.
    """
    skipped = {".venv", ".git", "build", "dist"}
    # What a test and the processes that it has started tell each other: no file.
    own = REPO / "tests" / "ranks.py"
    files = [
        path
        for path in REPO.rglob("*.py")
        if path != own and not skipped & set(path.relative_to(REPO).parts)
    ]
    loads = 0
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, (ast.Import, ast.ImportFrom, ast.Call)):
                continue
            place = f"{path}:{node.lineno}"
            if (
                isinstance(node, ast.ImportFrom)
                and node.module
                and node.module.split(".")[0] in ("torch", "pickle", "dill", "joblib")
            ):
                assert not {alias.name for alias in node.names} & {"load", "loads", "Unpickler"}, (
                    place
                )
            if isinstance(node, ast.Import):
                assert all(
                    alias.asname is None
                    for alias in node.names
                    if alias.name in ("torch", "pickle")
                ), place
            if isinstance(node, ast.Call):
                keywords = {keyword.arg: keyword.value for keyword in node.keywords}
                name = ast.unparse(node.func)
                assert name not in (
                    "pickle.load",
                    "pickle.loads",
                    "pickle.Unpickler",
                    "torch.jit.load",
                ), place
                assert (
                    not name.endswith("load")
                    or "allow_pickle" not in keywords
                    or getattr(keywords["allow_pickle"], "value", True) is False
                ), place
                if name in ("torch.load", "torch.serialization.load"):
                    loads += 1
                    assert (
                        "weights_only" in keywords
                        and getattr(keywords["weights_only"], "value", None) is True
                    ), place
    # After this file had moved into a folder, the rule read the tests alone and stayed green.
    assert loads > 1 and REPO / "train.py" in files


# ----------------------------------------------------------------------- the folder and the writing
def test_leftovers_of_a_kill_are_removed(tmp_path):
    """A kill during a save left step_X.pt.partial, as large as a checkpoint, for good.

    Only a save of the same step replaced it.
    """
    save(tmp_path, 1)
    for name in (
        "step_0000007.pt.partial",
        "latest.pt.partial",
        "best.pt.partial",
        "mine.pt.partial",
    ):
        (tmp_path / name).write_bytes(b"x")
    save(tmp_path, 2)
    assert [path.name for path in tmp_path.glob("*.partial")] == ["mine.pt.partial"]


def test_a_kill_before_latest_was_renamed_loses_nothing(tmp_path):
    """latest.pt was tried first, so a newer good step file next to it was not found.

    Its steps were trained again.
    """
    save(tmp_path, 5)
    latest = (tmp_path / "latest.pt").read_bytes()
    save(tmp_path, 10)
    (tmp_path / "latest.pt").unlink()
    (tmp_path / "latest.pt").write_bytes(latest)
    assert find_latest(tmp_path)[0].step == 10


def test_latest_and_best_are_names_of_the_step_file(tmp_path):
    first = save(tmp_path, 1, is_best=True)
    second = save(tmp_path, 2)
    assert (tmp_path / "best.pt").samefile(first) and (tmp_path / "latest.pt").samefile(second)
    # No second copy of the bytes.
    assert second.stat().st_nlink == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "best.pt",
        "latest.pt",
        "step_0000001.pt",
        "step_0000002.pt",
    ]


def no_hard_links(monkeypatch):
    def link(source, target, **kwargs):
        raise OSError(errno.EPERM, "hard links are not supported")

    monkeypatch.setattr(os, "link", link)


@pytest.mark.parametrize("hard_links", [True, False])
def test_keep_last_prunes_and_never_what_latest_or_best_name(tmp_path, monkeypatch, hard_links):
    if not hard_links:
        no_hard_links(monkeypatch)
    others = [
        tmp_path / name
        for name in ("step_1.pt", "step_0000001.pt.bak", "my_step_0000001.pt", "notes.txt")
    ]
    for path in others:
        path.write_text("mine")
    for step in range(1, 6):
        save(tmp_path, step, keep_last=2, is_best=step == 2)
    kept = [step for step, _ in step_files(tmp_path)]
    # A symbolic best.pt needs its file.
    assert kept == ([4, 5] if hard_links else [2, 4, 5])
    assert (tmp_path / "latest.pt").is_symlink() != hard_links
    assert (
        read_checkpoint(tmp_path / "best.pt").step == 2
        and read_checkpoint(tmp_path / "latest.pt").step == 5
    )
    assert all(path.read_text() == "mine" for path in others)


def test_keep_last_0_keeps_all_and_steps_beyond_seven_digits_sort_as_numbers(tmp_path):
    for step in (9_999_999, 10_000_000, 5):
        save(tmp_path, step)
    assert [step for step, _ in step_files(tmp_path)] == [5, 9_999_999, 10_000_000]


def test_a_run_resumed_further_back_never_prunes_what_it_has_just_written(tmp_path):
    for step in (1, 2, 8, 9):
        save(tmp_path, step)
    save(tmp_path, 3, keep_last=2)
    assert [step for step, _ in step_files(tmp_path)] == [2, 3]


def test_a_full_disk_is_seen_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(
        write_module.shutil, "disk_usage", lambda folder: SimpleNamespace(free=40_000)
    )
    with pytest.raises(
        CheckpointError, match=r"needs 0\.\d\d GB, and .* has 0\.00 GB free: delete old checkpoints"
    ):
        save(tmp_path)
    assert not any(tmp_path.iterdir())


class Failing:
    """A file that fails after some bytes, as a full disk (or Ctrl-C) does."""

    def __init__(self, file, left, error):
        self.file, self.left, self.error = file, left, error

    def write(self, data):
        self.left -= len(data)
        if self.left < 0:
            raise self.error
        return self.file.write(data)

    def flush(self):
        self.file.flush()


@pytest.mark.parametrize("left", [0, 100, 20_000, 60_000])
@pytest.mark.parametrize(
    "error, raised, match",
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            CheckpointError,
            "step_0000002.pt: cannot be written: No space left on device; free some space",
        ),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
)
def test_an_interrupted_write_keeps_the_old_and_leaves_nothing_half_written(
    tmp_path, monkeypatch, error, raised, match, left
):
    """T3, T20: a kill tore latest.pt.

    A full disk left `[enforce fail at inline_container.cc]` and a torn step file.
    """
    save(tmp_path, 1, is_best=True), save(tmp_path, 2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write_atomic = write_module.write_atomic
    monkeypatch.setattr(
        write_module,
        "write_atomic",
        lambda path, write: write_atomic(path, lambda file: write(Failing(file, left, error))),
    )
    model, optimizer = new_run(seed=7)
    for step in (2, 3):
        with pytest.raises(raised, match=match and match.replace("2.pt", f"{step}.pt")):
            save(tmp_path, step, model, optimizer, is_best=True, keep_last=1)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert find_latest(tmp_path)[0].step == 2


def test_weights_or_moments_that_are_not_finite_are_not_saved(tmp_path):
    """T8: one NaN micro-batch, and latest.pt was NaN in 54 of 58 tensors."""
    model, optimizer = new_run()
    train(model, optimizer, 1, seed=1)
    for tensor, name in (
        (
            model.layers[1].norm2.weight.data,
            r"model tensor layers\.1\.norm2\.weight holds NaN or infinity",
        ),
        (
            optimizer.state[model.norm.weight]["exp_avg_sq"],
            r"optimizer tensor exp_avg_sq\.norm\.weight holds",
        ),
    ):
        before = tensor[3].item()
        tensor[3] = float("nan")
        with pytest.raises(CheckpointError, match=f"step_0000002.pt: not written: {name}"):
            save(tmp_path, 2, model, optimizer)
        tensor[3] = before
    assert not any(tmp_path.iterdir())


def test_weights_of_another_dtype_are_refused(tmp_path):
    model, _ = new_run()
    with pytest.raises(
        CheckpointError, match="hold float32 weights, and embed.weight is torch.bfloat16"
    ):
        save(tmp_path, 1, model.bfloat16(), None)
    with pytest.raises(CheckpointError, match="step must be at least 0"):
        save(tmp_path, -1, *new_run())


def test_find_latest_falls_back_and_says_what_it_skipped(tmp_path):
    """T3: a torn latest.pt ended the program, with two good step files next to it."""
    for step in (1, 2, 3):
        save(tmp_path, step, is_best=step == 1)
    checkpoint, skipped = find_latest(tmp_path)
    assert (checkpoint.step, checkpoint.path.name, skipped) == (3, "step_0000003.pt", [])
    data = (tmp_path / "latest.pt").read_bytes()
    # The same file as step 3: one line, not two.
    (tmp_path / "latest.pt").write_bytes(data[:-100])
    checkpoint, skipped = find_latest(tmp_path)
    assert checkpoint.step == 2 and len(skipped) == 1 and "step_0000003.pt: damaged" in skipped[0]
    (tmp_path / "latest.pt").unlink()
    (tmp_path / "step_0000002.pt").write_bytes(b"")
    checkpoint, skipped = find_latest(tmp_path)
    assert checkpoint.step == 1 and [line.split(":")[0][-15:] for line in skipped] == [
        "step_0000003.pt",
        "step_0000002.pt",
    ]
    (tmp_path / "step_0000001.pt").unlink()
    assert find_latest(tmp_path)[0].path.name == "best.pt"
    (tmp_path / "best.pt").write_bytes(b"")
    with pytest.raises(
        CheckpointError, match="no checkpoint can be read: .*step_0000003.pt.*best.pt"
    ):
        find_latest(tmp_path)


def test_a_latest_link_whose_file_is_gone_is_skipped_too(tmp_path, monkeypatch):
    no_hard_links(monkeypatch)
    save(tmp_path, 1), save(tmp_path, 2)
    (tmp_path / "step_0000002.pt").unlink()
    checkpoint, skipped = find_latest(tmp_path)
    assert checkpoint.step == 1 and skipped == []
    (tmp_path / "step_0000001.pt").unlink()
    with pytest.raises(CheckpointError, match="latest.pt: no such file"):
        find_latest(tmp_path)


def test_folder_has_run(tmp_path):
    assert not folder_has_run(tmp_path / "none") and not folder_has_run(tmp_path)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        find_latest(tmp_path / "none")
    (tmp_path / "step_12.pt").touch()
    assert not folder_has_run(tmp_path)
    (tmp_path / "step_0000012.pt").touch()
    assert folder_has_run(tmp_path)
    (tmp_path / "step_0000012.pt").unlink()
    os.symlink("gone.pt", tmp_path / "latest.pt")
    assert folder_has_run(tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_gpu_tensors_are_saved_and_read(tmp_path):
    model, _ = new_run()
    model.cuda()
    optimizer = build_adamw(model, TRAIN)
    generator = torch.Generator("cuda").manual_seed(1)
    for _ in range(2):
        ids = torch.randint(0, 32, (2, 9), generator=generator, device="cuda")
        model(ids[:, :-1], ids[:, 1:]).cross_entropy_sum.backward()
        optimizer.step()
    path = save(tmp_path, 2, model, optimizer)
    other, other_adamw = new_run(seed=5)
    other_adamw = build_adamw(other.cuda(), TRAIN)
    load_training_state(read_checkpoint(path, optimizer=True), other, other_adamw)
    assert same(other.state_dict(), model.state_dict()) and same(
        state_by_name(other, other_adamw), state_by_name(model, optimizer)
    )
    loaded, _ = load_model(path, "cuda", torch.bfloat16)
    assert all(
        p.device.type == "cuda" and torch.equal(p, model.get_parameter(name).bfloat16())
        for name, p in loaded.named_parameters()
    )


# -------------------------------------------------------------- the original implementation's files
REFERENCE = ("bias_gqa", "nobias_qkvbias")


@pytest.fixture(
    scope="module",
    params=[(name, prefix) for name in REFERENCE for prefix in ("", "_orig_mod.")],
    ids=lambda p: p[0] + p[1],
)
def reference(request, shared_dir, tmp_path_factory):
    """Return (path, expected arrays, gradient norms) of a checkpoint.

    The original implementation wrote it. As it is, and as if compiled.
    """
    name, prefix = request.param
    path = source = shared_dir / "upstream" / f"{name}.pt"
    if prefix:
        contents = torch.load(source, weights_only=True)
        contents["model"] = {prefix + key: tensor for key, tensor in contents["model"].items()}
        path = tmp_path_factory.mktemp("reference") / "compiled.pt"
        torch.save(contents, path)
    expected = np.load(source.with_name(f"{name}_expected.npz"))
    norms = json.loads(source.with_name(f"{name}_grad_norms.json").read_text())
    return SimpleNamespace(
        path=path,
        norms=norms,
        **{key: torch.from_numpy(np.asarray(expected[key])) for key in expected.files},
    )


def test_reference_checkpoints_compute_what_they_computed_there(reference):
    model, checkpoint = load_model(reference.path)
    assert checkpoint.is_reference_format and checkpoint.step == 1 and checkpoint.optimizer is None
    with torch.no_grad():
        logits = model(reference.input_ids).logits
        out = model(reference.input_ids, reference.targets)
    bound = logits_bound(model.config, reference.input_ids.shape[1])
    assert_close(logits, reference.logits, bound)
    assert_close(out.cross_entropy_sum / out.num_targets, reference.cross_entropy.squeeze(), bound)
    assert_close(out.aux_loss, reference.aux_loss.squeeze(), bound)
    greedy = [ids.item() for ids in generate(model, reference.greedy_ids[:, :8], 24, temperature=0)]
    assert greedy == reference.greedy_ids[0, 8:].tolist()


def test_reference_gradients(reference):
    model, checkpoint = load_model(reference.path)
    out = model.train()(reference.input_ids, reference.targets)
    (out.cross_entropy_sum / out.num_targets + out.aux_loss).backward()
    B, T = reference.input_ids.shape
    seen, bound = set(), gradients_bound(checkpoint.model_config, T, rows=B)
    for name, parameter in model.named_parameters():
        sources = _reference_sources(name, checkpoint.model_config.num_experts)
        parts = list(parameter.grad) if ".experts." in name else [parameter.grad]
        for source, part in zip(sources, parts, strict=True):
            assert_close(part.norm(), reference.norms[source], bound, source)
            seen.add(source)
    assert seen == set(reference.norms)


def test_reference_config_keeps_the_meaning():
    fields = dict(
        d_model=64,
        dropout=0.1,
        context_length=64,
        vocabulary_size=512,
        num_heads=4,
        transformer_blocks=2,
        num_kv_heads=2,
        qkv_bias=False,
        use_rope=True,
        use_attention_bias=True,
        d_ff=128,
        num_experts=8,
        top_k=3,
        aux_loss_coef=0.01,
        capacity_factor=1.25,
    )
    config = reference_config(fields)
    assert (config.aux_loss_coef, config.capacity_factor, config.rms_norm_eps) == (
        pytest.approx(0.03),
        0.0,
        torch.finfo(torch.float32).eps,
    )
    assert (
        config.expert_activation,
        config.expert_bias,
        config.head_bias,
        config.out_proj_bias,
    ) == ("gelu", True, True, True)
    assert reference_config(fields | {"capacity_factor": None}) == config
    for changes, match in (
        ({"d_model": "16"}, "d_model must be of type int"),
        ({"top_k": None}, "top_k must be of type int"),
        ({"more": 1}, "cfg has the fields"),
    ):
        with pytest.raises(ValueError, match=match):
            reference_config(fields | changes)


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda c: c["cfg"].update(num_experts=4), r"model has unknown layers\.0\.moe\.experts\.4"),
        (lambda c: c["cfg"].update(num_experts=9), r"model lacks layers\.0\.moe\.experts\.8"),
        (
            lambda c: c["cfg"].update(num_heads=8),
            r"attention_bias is float32\[1, 4, 64, 64\], not float32\[1, 8, 64, 64\]",
        ),
        (
            lambda c: c["cfg"].update(use_attention_bias=False),
            "unknown layers.0.gqa.attention_bias",
        ),
        (
            lambda c: c["cfg"].update(d_ff=64),
            r"fc1.weight is float32\[128, 64\], not float32\[64, 64\]",
        ),
        (
            lambda c: c["cfg"].update(context_length=1 << 24),
            "cfg describes .* parameters, more than the file",
        ),
        (lambda c: c["cfg"].update(d_model="64"), "d_model must be of type int"),
        (lambda c: c["cfg"].pop("top_k") and None, "cfg has the fields"),
        (drop("cfg"), "cfg is missing"),
        (drop("model"), "model is missing"),
        (put("step", -1), "step must be"),
        (put("val_loss", "x"), "val_loss a number"),
        (put_model("norm.weight", torch.full((64,), float("nan"))), "norm.weight holds NaN"),
        (put_model("embed.weight", torch.zeros(1).expand(512, 64)), "not a plain, contiguous"),
        (put_model("surplus", torch.zeros(1)), "unknown surplus"),
    ],
)
def test_malformed_reference_checkpoints(shared_dir, tmp_path, change, match):
    refused(forge(shared_dir / "upstream" / "bias_gqa.pt", tmp_path / "x.pt", change), match)


def test_flips_in_a_reference_checkpoint_are_caught_by_the_zips_own_checksums(shared_dir, tmp_path):
    """Its format has no digests, and a mapped load checks nothing.

    138 of 150 flips went unnoticed.
    """
    data = (shared_dir / "upstream" / "bias_gqa.pt").read_bytes()
    contents = torch.load(shared_dir / "upstream" / "bias_gqa.pt", weights_only=True)["model"]
    path = tmp_path / "x.pt"
    for name in (
        "embed.weight",
        "layers.1.moe.experts.5.fc2.weight",
        "layers.0.gqa.attention_bias",
        "layers.0.moe.router.W_r.weight",
    ):
        needle = contents[name].numpy().tobytes()
        flipped = bytearray(data)
        flipped[data.index(needle) + len(needle) // 3] ^= 1
        path.write_bytes(flipped)
        refused(path, f"model tensor {name} does not match the zip's checksum")


def test_the_references_optimizer_cannot_be_resumed_and_the_line_says_what_to_do(shared_dir):
    refused(
        shared_dir / "upstream" / "bias_gqa.pt",
        "start a new run from it with --init_from",
        optimizer=True,
    )


def test_a_reference_checkpoint_goes_on_as_ours(shared_dir, tmp_path):
    model, checkpoint = load_model(shared_dir / "upstream" / "nobias_qkvbias.pt")
    again, ours = load_model(save(tmp_path, 1, model, None))
    assert (
        same(again.state_dict(), checkpoint.model)
        and ours.model_config == checkpoint.model_config
        and not ours.is_reference_format
    )


# --------------------------------------------------------------------------- weights, one at a time
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_written_one_at_a_time_are_read_with_all_checks(tmp_path, dtype):
    model, path, asked = new_run()[0], tmp_path / "x.pt", []
    model.layers[0].moe.router.selection_bias += 0.1
    weights = model.state_dict()
    write_weights(path, CONFIG, lambda name: asked.append(name) or weights[name], dtype, TOKENIZER)
    checkpoint, parameters = read_checkpoint(path), dict(model.named_parameters())
    assert (
        asked == list(weights)
        and checkpoint.tokenizer_state == TOKENIZER
        and checkpoint.model_config == CONFIG
        and (checkpoint.run, checkpoint.train_config) == ({}, {})
    )
    assert same(
        checkpoint.model,
        {
            name: tensor.to(dtype) if name in parameters else tensor
            for name, tensor in weights.items()
        },
    )
    assert {p.dtype for p in load_model(path)[0].parameters()} == {torch.float32}
    refused(path, "no optimizer state", optimizer=True)
    data = bytearray(path.read_bytes())
    data[data.index(checkpoint.model["norm.weight"].view(torch.uint8).numpy().tobytes()) + 1] ^= 1
    (tmp_path / "flipped.pt").write_bytes(data)
    refused(tmp_path / "flipped.pt", "does not match its digest")


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda t: t[:-1], r"norm1.weight has the shape \[15\], not \[16\]"),
        (lambda t: t * float("nan"), "norm1.weight holds NaN or infinity"),
    ],
)
def test_weights_that_cannot_be_written_one_at_a_time(tmp_path, change, match):
    weights = new_run()[0].state_dict()
    with pytest.raises(ValueError, match=match):
        write_weights(
            tmp_path / "x.pt",
            CONFIG,
            lambda name: change(weights[name]) if name.endswith("norm1.weight") else weights[name],
        )


def test_bfloat16_weights_are_all_bfloat16(tmp_path):
    weights = new_run()[0].state_dict()
    write_weights(tmp_path / "x.pt", CONFIG, weights.__getitem__, torch.bfloat16)

    def widen(contents):
        contents["model"]["norm.weight"] = contents["model"]["norm.weight"].float()

    refused(
        forge(tmp_path / "x.pt", tmp_path / "y.pt", widen),
        r"norm.weight is float32\[16\], not bfloat16\[16\]",
    )


def test_a_file_beyond_the_machines_memory_says_so(saved, monkeypatch):
    def no_room(*args, **kwargs):
        raise RuntimeError("unable to mmap 42 bytes from file <x>: Cannot allocate memory (12)")

    monkeypatch.setattr(read_module.torch, "load", no_room)
    refused(saved.path, "GB, which this machine's memory and swap cannot hold")


# ------------------------------------------------------------------- not damaged, but not readable
def not_utf8(folder: Path) -> Path:
    """Return a new folder whose name is bytes of Latin-1. Skip where a system has no such names."""
    path = folder / os.fsdecode(b"caf\xe9")
    try:
        path.mkdir()
    except OSError:
        pytest.skip("this file system takes UTF-8 names alone")
    return path


def test_a_path_that_is_not_utf8_is_read(tmp_path):
    """Training saved into such a folder, and every reader then called the file damaged.

    PyTorch opens files by a UTF-8 name alone. Maps must outlive the name that stands in for it.
    """
    folder = not_utf8(tmp_path)
    if not os.path.exists("/proc/self/fd"):
        pytest.skip("open files have no names on this system")
    model, optimizer = new_run()
    train(model, optimizer, 1, seed=1)
    path = save(folder, 1, model, optimizer)
    before = len(os.listdir("/proc/self/fd"))
    found, skipped = find_latest(folder)
    assert found.path == path and skipped == []
    for name, tensor in model.state_dict().items():
        assert torch.equal(found.model[name], tensor)
    assert load_model(path)[1].step == found.step
    assert len(os.listdir("/proc/self/fd")) <= before
    # A private map: training on it never writes to the file.
    content = path.read_bytes()
    found.model["embed.weight"].zero_()
    assert path.read_bytes() == content


def test_without_names_of_open_files_the_folder_is_what_is_wrong(saved, tmp_path, monkeypatch):
    folder = not_utf8(tmp_path)
    path = save(folder, 2, saved.model, saved.optimizer)
    exists = os.path.exists
    monkeypatch.setattr(
        os.path, "exists", lambda name: not str(name).startswith("/proc/self/fd") and exists(name)
    )
    with pytest.raises(
        CheckpointError, match="its path is not UTF-8, so rename the folder"
    ) as told:
        read_checkpoint(path)
    assert "damaged" not in str(told.value)


@pytest.mark.parametrize(
    "error, said",
    [
        (RuntimeError("unable to open file <x.pt> in read-only mode: Too many open files (24)"), 0),
        (RuntimeError("unable to mmap 4096 bytes from file <x.pt>: No such device (19)"), 0),
        (PermissionError(13, "Permission denied"), "cannot be read: Permission denied"),
        (OSError(5, "Input/output error"), "cannot be read: Input/output error"),
        (MemoryError(), "which this machine's memory and swap cannot hold"),
        (
            RuntimeError("PytorchStreamReader failed reading zip archive"),
            "damaged, or no checkpoint",
        ),
    ],
)
def test_damaged_is_said_of_damaged_files_alone(saved, monkeypatch, error, said):
    """Too many open files, a disk without maps and too little memory were called damage.

    Somebody who believes that deletes a good checkpoint.
    """

    def load(*args, **kwargs):
        raise error

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(CheckpointError) as told:
        read_checkpoint(saved.path)
    assert (said or f"cannot be read: {error}") in str(told.value)
    assert ("damaged" in str(told.value)) == (said == "damaged, or no checkpoint")
