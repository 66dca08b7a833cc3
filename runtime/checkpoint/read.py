"""Read a checkpoint, trusting nothing in it, and build its model."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import mmap
import os
import pickletools
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from config_model import ModelConfig
from model import LLM
from runtime.base.files import is_utf8
from runtime.base.ranks import ONE_PROCESS, Ranks
from runtime.checkpoint.adapter import (
    KEY,
    AdaptedWeights,
    Adapter,
    adapter_of,
    saved_tensors,
    trained_shapes,
    weights_digest,
)
from runtime.checkpoint.format import (
    BEST,
    FORMAT,
    HEADER,
    LATEST,
    OPTIONAL_HEADER,
    TENSOR_KEYS,
    VERSION,
    Checkpoint,
    CheckpointError,
    check_header,
    config_from,
    dict_in,
    digests_of,
    expected_tensors,
    header_digest,
    meta_model,
    plain_tensors,
    plain_values,
    shapes_of,
)
from runtime.checkpoint.optimizer_state import check_tensors, fill_, load_state_by_name
from runtime.checkpoint.reference import (
    read_reference,
    reference_config,
)
from runtime.checkpoint.sharded import MANIFEST, Shards, is_folder, like, read_manifest

PICKLE_LIMIT_BYTES = 1 << 28
# In PyTorch's words for a map that the system refuses.
OUT_OF_ADDRESSES = "Cannot allocate memory"
# In PyTorch's words for a file that the system does not open or map: too many open files, a disk
# that gives no maps. The file may be whole.
SYSTEM_REFUSALS = ("unable to open file", "unable to mmap", "unable to stat")
# All that the pickle of a checkpoint may name. weights_only allows more, such as bytearray(10**12)
# and storages of any size.
STORAGES = ["Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool"]
PICKLE_GLOBALS = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2"} | {
    f"torch {kind}Storage" for kind in STORAGES
}
PICKLE_FORBIDDEN = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}


# Adapters of a base that is itself a file of adapters, and so on: pre-training, chats, preferences,
# rewards. A forged file could name files in a circle.
MOST_CHAINED = 4


def read_checkpoint(
    path: str | Path,
    optimizer: bool = False,
    read_only: bool = False,
    chained: int = 0,
    is_checked: bool = False,
) -> Checkpoint:
    """Read and check a file or folder of our format, or a file of the original implementation's.

    Raise CheckpointError (one line) for whatever is wrong with it. Checked: the zip, the pickle,
    every key and type, the config against the tensors, and digests and finiteness of what is read:
    the model always, the optimizer if it is asked for. Tensors are mapped, not copied; experts of
    the original implementation are stacked and so copied, and its optimizer state cannot be
    converted: asking for it is an error. read_only: the caller promises to write to no tensor; a
    file larger than memory and swap can then be read too (see _load_mapped).

    Of a file of adapters, the base is found and checked too, and the model is what both mean; with
    optimizer=True it is the base's, for a run to continue. chained: files of adapters that were
    read on the way to this one. is_checked: another rank compares the digests, of the same file,
    and they are not compared here; a folder's weights_digest is then unknown ("").
    """
    path = Path(path)
    contents, records = unpack(path, read_only)
    try:
        if "format" not in contents:
            return read_reference(path, contents, records, optimizer)
        checkpoint = _read_ours(path, contents, optimizer, is_checked)
        if checkpoint.adapter is None:
            return checkpoint
        how = dict(read_only=read_only, chained=chained + 1, is_checked=is_checked)
        return _with_base(checkpoint, merges=not optimizer, how=how)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(path, error) from error


def read_config(path: str | Path) -> ModelConfig:
    """Return the configuration in a file of either format. Raise CheckpointError.

    No weight is read, so it takes no longer for 44 GB.
    """
    path = Path(path)
    contents, _ = unpack(path)
    try:
        if "format" in contents:
            return config_from(read_header(contents)["cfg"])
        fields: Any = plain_values(dict_in(contents, "cfg"))
        return reference_config(fields)
    except ValueError as error:
        raise CheckpointError(path, error) from error


def unpack(path: Path, read_only: bool = False) -> tuple[dict, set[tuple[int, int]]]:
    """Return the dict in the file, and (bytes, CRC-32) of its records; of a folder no records.

    Every reader's failure becomes a CheckpointError.
    """
    if not path.exists():
        hint = ""
        if path.name == BEST and path.with_name(LATEST).exists():
            # A run that was stopped early has nothing to compare.
            hint = f": it is named at the first validation. {path.with_name(LATEST)} is there"
        raise CheckpointError(path, f"no such file{hint}")
    if is_folder(path):
        return _unpack_folder(path), set()
    if not path.is_file():
        raise CheckpointError(
            path, f"is a directory without {MANIFEST} or a device, not a checkpoint file"
        )
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
        if not magic:
            raise ValueError("the file is empty")
        if magic != b"PK\3\4":
            raise ValueError("not a checkpoint (no torch.save zip)")
        records = _scan_zip(path)
        contents = _load_mapped(path, read_only)
    except CheckpointError:
        raise
    except (zipfile.BadZipFile, UnicodeError) as error:
        raise CheckpointError(path, f"damaged or cut short: {error}") from error
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(path, error) from error
    # zipfile, pickle and torch raise nearly everything on damaged input; the cause is kept.
    except Exception as error:
        if OUT_OF_ADDRESSES in str(error) or isinstance(error, MemoryError):
            size = f"{path.stat().st_size / 1e9:.1f} GB"
            raise CheckpointError(
                path, f"has {size}, which this machine's memory and swap cannot hold"
            ) from error
        if str(error).startswith(SYSTEM_REFUSALS):
            raise CheckpointError(path, f"cannot be read: {str(error)[:200]}") from error
        raise CheckpointError(
            path, f"damaged, or no checkpoint: {type(error).__name__}: {str(error)[:200]}"
        ) from error
    if not isinstance(contents, dict):
        raise CheckpointError(
            path, f"not a checkpoint: it holds a {type(contents).__name__}, not a dict"
        )
    return contents, records


def _unpack_folder(path: Path) -> dict:
    """Return what a file's dict would hold: its tensors are Shards."""
    try:
        contents, files = read_manifest(path)
        for group in ("model", "optimizer"):
            own = [file for file in files if file.startswith(f"{group}/")]
            contents[group] = Shards(path, own)
    except ValueError as error:
        raise CheckpointError(path, error) from error
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror or error}") from error
    return contents


def _load_mapped(path: Path, read_only: bool) -> object:
    """Return the file's contents, tensors mapped: privately, so that training never writes to it.

    Linux refuses a private map of a file larger than memory and swap. read_only: it then falls back
    to a shared mapping; writing to a tensor would then change the file.
    """
    kinds: list[int | None] = [None]
    if sys.platform != "win32":
        kinds = [mmap.MAP_PRIVATE, mmap.MAP_SHARED] if read_only else [mmap.MAP_PRIVATE]
    for kind in kinds:
        options: Any = contextlib.nullcontext()
        if kind is not None:
            options = torch.serialization.set_default_mmap_options(kind)
        try:
            with options, _name_for_torch(path) as name:
                return torch.load(name, weights_only=True, mmap=True, map_location="cpu")
        except RuntimeError as error:
            if OUT_OF_ADDRESSES not in str(error) or kind == kinds[-1]:
                raise
    raise AssertionError("the last kind of map returns or raises")


@contextlib.contextmanager
def _name_for_torch(path: Path) -> Iterator[str]:
    """Yield a name of the file that PyTorch can open: it takes UTF-8 alone.

    A path that is not UTF-8 (an old archive's, another system's) gets the name of an open file of
    this process, if the system has such names. Raise CheckpointError where it has none.
    """
    if is_utf8(path):
        yield str(path)
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        name = f"/proc/self/fd/{descriptor}"
        if not os.path.exists(name):
            raise CheckpointError(
                path, "cannot be read: its path is not UTF-8, so rename the folder or the file"
            )
        # The maps stay after the file is closed.
        yield name
    finally:
        os.close(descriptor)


def _scan_zip(path: Path) -> set[tuple[int, int]]:
    """Return (bytes, CRC-32) of the records of a zip that torch.save wrote.

    Raise ValueError for other zips, and for pickles that name anything but tensors.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError(
                "not a checkpoint: its zip is compressed, and torch.save does not compress"
            )
        claimed_bytes = sum(entry.file_size for entry in entries)
        has_twins = len({entry.filename for entry in entries}) < len(entries)
        if claimed_bytes > path.stat().st_size or has_twins:
            raise ValueError("damaged or forged: its zip claims more than the file holds")
        pickles = [entry for entry in entries if entry.filename.split("/")[1:] == ["data.pkl"]]
        if len(pickles) != 1 or pickles[0].file_size > PICKLE_LIMIT_BYTES:
            raise ValueError("not a checkpoint: its zip has no data.pkl of a sensible size")
        if any(entry.filename.split("/")[1:] == ["constants.pkl"] for entry in entries):
            raise ValueError("refused: a TorchScript archive, which holds code")
        # genops reads the opcodes and executes nothing.
        for opcode, argument, _ in pickletools.genops(archive.read(pickles[0])):
            is_foreign = opcode.name == "GLOBAL" and argument not in PICKLE_GLOBALS
            if opcode.name in PICKLE_FORBIDDEN or is_foreign:
                raise ValueError(
                    "refused: a checkpoint holds tensors and plain values, and this file's pickle "
                    f"asks for {argument or opcode.name}"
                )
        return {(entry.file_size, entry.CRC) for entry in entries}


def read_header(contents: dict) -> dict:
    """Return everything in our format that is no tensor, checked against its digest."""
    header: Any = plain_values(
        {key: value for key, value in contents.items() if key not in TENSOR_KEYS}
    )
    if header["format"] != FORMAT:
        raise ValueError(
            f"not a checkpoint: its format is {header['format']!r:.60}, not {FORMAT!r}"
        )
    if type(version := header.get("version")) is int and version > VERSION:
        raise ValueError(
            f"written in format version {version}, and this program reads up to {VERSION}: update "
            "gptoss"
        )
    check_header(header)
    if header["version"] != VERSION:
        raise ValueError(f"version must be {VERSION}, not {header['version']}")
    if extra := header.keys() - HEADER.keys() - OPTIONAL_HEADER.keys():
        raise ValueError(f"unknown key {min(extra)!r:.60}")
    digests: Any = plain_values(dict_in(contents, "digests"))
    if digests.get("header") != header_digest(header):
        raise ValueError("damaged: the header does not match its digest")
    return header


def _read_ours(path: Path, contents: dict, optimizer: bool, is_checked: bool) -> Checkpoint:
    """Return what our format holds; of adapters the `trained` tensors, and no model."""
    header, digests = read_header(contents), contents["digests"]
    config = config_from(header["cfg"])
    file_bytes, model = _group(path, contents, "model")
    adapter: Adapter | None = None
    if KEY in header.get("stage", {}):
        adapter, _ = Adapter.from_header(header["stage"][KEY])
        check_tensors(trained_shapes(adapter, shapes_of(config)), model, "model")
    else:
        is_bfloat16 = (
            "embed.weight" in model and like(model, "embed.weight").dtype == torch.bfloat16
        )
        dtype = torch.bfloat16 if is_bfloat16 else torch.float32
        check_tensors(expected_tensors(config, dtype, file_bytes), model, "model")
    state = None
    if optimizer:
        _, state = _group(path, contents, "optimizer")
        if not state:
            raise ValueError(
                "holds weights but no optimizer state, so training cannot be resumed from it: "
                "start a new run with --init_from"
            )
    if isinstance(model, Shards):
        named = _checked_folder(model, state, digests, is_checked)
    else:
        if not is_checked:
            digests_of(model, "model", digests)
            digests_of(state or {}, "optimizer", digests)
        named = digests
    return Checkpoint(
        path=path,
        step=header["step"],
        model_config=config,
        model={} if adapter else model,
        optimizer=state,
        val_loss=header["val_loss"],
        train_config=header["train_cfg"],
        tokenizer_state=header["tokenizer"],
        data_fingerprint=header["data_fingerprint"],
        run=header["run"],
        versions=header["versions"],
        is_reference_format=False,
        digest=hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest(),
        stage=header.get("stage", {}),
        world=header.get("world", 1),
        weights_digest=weights_digest(named, adapter) if named else "",
        adapter=adapter,
        trained=model if adapter else {},
    )


def read_as_written(path: str | Path) -> tuple[dict, dict[str, Mapping[str, Tensor]]]:
    """Return a checkpoint's header and all of its tensors by group, checked, for a copy.

    Adapters are read without their base. Raise CheckpointError.
    """
    path = Path(path)
    contents, _ = unpack(path, read_only=True)
    try:
        if "format" not in contents:
            raise ValueError("is in the original implementation's format, which is one file alone")
        header = read_header(contents)
        checkpoint = _read_ours(path, contents, bool(contents.get("optimizer")), False)
    except ValueError as error:
        raise CheckpointError(path, error) from error
    weights = checkpoint.trained if checkpoint.adapter else checkpoint.model
    return header, {"model": weights, "optimizer": checkpoint.optimizer or {}}


def _group(path: Path, contents: dict, group: str) -> tuple[int, Any]:
    """Return the bytes that hold a group's tensors, at most, and the group, checked."""
    given = contents.get(group)
    if isinstance(given, Shards):
        return sum((path / file).stat().st_size for file in given.files), given
    file_bytes = path.stat().st_size
    return file_bytes, plain_tensors(dict_in(contents, group), group, file_bytes)


def _checked_folder(
    model: Shards, state: Shards | None, digests: dict, is_checked: bool
) -> dict[str, str]:
    """Compare the digests of a folder's files; return those of its weights as a file has them.

    is_checked: do neither.
    """
    if is_checked:
        return {}
    for shards in (model, state):
        if shards is not None:
            shards.check_files(digests)
    named: dict[str, str] = {}
    for name in model:
        # One at a time: together they may be more than the memory.
        named |= digests_of({name: model[name]}, "model")
    return named


def _with_base(checkpoint: Checkpoint, merges: bool, how: dict[str, Any]) -> Checkpoint:
    """Return a file of adapters with the model that it means: its base's weights and its own.

    how: the base is read, as in read_checkpoint. Raise CheckpointError where the base is missing
    or another one.
    """
    assert checkpoint.adapter is not None
    base = _find_base(checkpoint, how)
    weights = AdaptedWeights(
        shapes_of(checkpoint.model_config),
        checkpoint.adapter,
        base.model,
        shapes_of(base.model_config),
        checkpoint.trained,
        merges,
    )
    # Where it was found, which a resumed run writes down again.
    adapter = dataclasses.replace(checkpoint.adapter, base=str(base.path.resolve()))
    return dataclasses.replace(checkpoint, model=weights, adapter=adapter)


def _find_base(checkpoint: Checkpoint, how: dict[str, Any]) -> Checkpoint:
    """Return the base of a file of adapters, checked.

    It is looked for at its own path, at the same way from the adapters' folder, and next to them;
    then among the other files of its folder, because names such as best.pt move on.
    """
    adapter, near = Adapter.from_header(checkpoint.stage[KEY])
    if (chained := how["chained"] - 1) >= MOST_CHAINED:
        raise ValueError(
            f"is the base of {chained} files of adapters, one on the other: merge some with "
            "scripts.merge_lora"
        )
    folder, own = checkpoint.path.parent, Path(adapter.base)
    named = (own, folder / near, folder / own.name)
    others = (path for place in named[:2] for path in sorted(place.parent.glob("*.pt")))
    problems = []
    for path in dict.fromkeys(place.resolve() for place in (*named, *others)):
        if not (path.is_file() or is_folder(path)) or path.samefile(checkpoint.path):
            continue
        try:
            digest = _weights_digest_in(path)
            if digest == adapter.base_digest:
                return read_checkpoint(path, **how)
        except CheckpointError as error:
            # Of a chain, what is wrong at its end.
            problems.append(error.innermost or str(error))
            continue
        found, wanted = digest[:12], adapter.base_digest[:12]
        problems.append(f"{path} has other weights (digest {found}, not {wanted})")
    problem = problems[0] if own.exists() and problems else f"{adapter.base} is missing"
    failure = CheckpointError(
        checkpoint.path,
        f"holds adapters alone, and their base is not found: {problem}. Put it back, or next to "
        "its adapters under the same name",
    )
    failure.innermost = problem
    raise failure


def _weights_digest_in(path: Path) -> str:
    """Return what identifies the weights in a file, by its own word: they are not read."""
    contents, records = unpack(path)
    try:
        if "format" not in contents:
            return read_reference(path, contents, records, False).weights_digest
        stage = read_header(contents).get("stage", {})
        adapter = Adapter.from_header(stage[KEY])[0] if KEY in stage else None
        named = contents["digests"]
        if isinstance(shards := contents.get("model"), Shards):
            named = _checked_folder(shards, None, named, is_checked=False)
        return weights_digest(named, adapter)
    except ValueError as error:
        raise CheckpointError(path, error) from error


def load_model(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[LLM, Checkpoint]:
    """Return a model in eval mode on `device`, and the checkpoint that it came from.

    Its parameters are in `dtype`. Raise CheckpointError.
    """
    checkpoint = read_checkpoint(path)
    return build_model(checkpoint, device, dtype), checkpoint


def build_model(
    checkpoint: Checkpoint, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> LLM:
    """Return a model in eval mode with the checkpoint's weights, its parameters in `dtype`.

    Tensor by tensor from the map to `device`, so there is no second copy of it at any time. On the
    CPU in float32 the parameters stay mapped: pages are read when used and copied when written, so
    training on them is safe and the file is not changed. Buffers keep float32.
    """
    model = meta_model(checkpoint.model_config)
    parameters = {name for name, _ in model.named_parameters()}
    model.load_state_dict(
        {
            name: tensor.to(device=device, dtype=dtype if name in parameters else tensor.dtype)
            for name, tensor in checkpoint.model.items()
        },
        assign=True,
    )
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())), (
        "the model has tensors that no checkpoint holds"
    )
    return model.eval()


def load_training_state(
    checkpoint: Checkpoint, model: nn.Module, optimizer: Optimizer, ranks: Ranks = ONE_PROCESS
) -> None:
    """Copy weights and optimizer state into a model and its optimizer, wherever they are.

    Each of several ranks copies its own part, however many wrote the file. All is checked before
    anything is changed. Raise CheckpointError.
    """
    if checkpoint.optimizer is None:
        raise CheckpointError(checkpoint.path, "was read without its optimizer state")
    try:
        own = saved_tensors(model)
        given = checkpoint.trained if checkpoint.adapter else checkpoint.model
        check_tensors(
            {name: (ranks.shape_of(tensor), tensor.dtype) for name, tensor in own.items()},
            given,
            "model",
        )
        if adapter_of(model) != checkpoint.adapter:
            raise ValueError(f"its adapters are {checkpoint.adapter}, not {adapter_of(model)}")
        load_state_by_name(model, optimizer, checkpoint.optimizer, ranks)
        with torch.no_grad():
            for name, tensor in own.items():
                fill_(tensor, name, given, ranks)
    except ValueError as error:
        raise CheckpointError(checkpoint.path, f"does not fit this model: {error}") from error
