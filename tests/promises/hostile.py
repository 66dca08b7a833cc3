"""Guarantees about files that someone made to harm."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import torch

from tests import builders_checkpoint
from tests.promises import Promise, Tally
from tests.promises.common import REPO, attempt, folder

CHILD = r"""
import contextlib, io, json, os, resource, sys, warnings
sys.path.insert(0, {repo!r})
import torch
from runtime.checkpoint.format import CheckpointError
from runtime.checkpoint.read import read_checkpoint, read_config
torch.set_num_threads(1)
warnings.simplefilter("always")
{prelude}
page = resource.getpagesize()
used = int(open("/proc/self/statm").read().split()[0]) * page
resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30), used + (2 << 30)))
for line in sys.stdin:
    (path, is_slow), result = json.loads(line), []
    with_optimizer = lambda path: read_checkpoint(path, optimizer=True)
    for read in (with_optimizer, read_checkpoint, read_config)[:1 if is_slow else 3]:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            try:
                read(path)
                result.append("read")
            except CheckpointError as error:
                result.append("refused: " + str(error))
            except BaseException as error:
                result.append(type(error).__name__ + ": " + str(error)[:300])
        if said.getvalue():
            result.append("on stderr: " + said.getvalue()[:300])
    print(json.dumps(result), flush=True)
"""


class BySetState:
    """An object that is built by a class and a state."""


# Seconds, to see that there are too many: read in one way.
SLOW = {"lists that contain one another"}


def _pickle_zip(path: Path, pickle: bytes, records: dict[str, bytes] | None = None) -> None:
    """A torch.save-like zip around a pickle written by hand."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("x/data.pkl", pickle)
        archive.writestr("x/version", b"3\n")
        for name, content in (records or {}).items():
            archive.writestr(name, content)


def _short(text: str) -> bytes:
    """BINUNICODE."""
    return b"X" + len(text.encode()).to_bytes(4, "little") + text.encode()


def _number(n: int) -> bytes:
    """LONG1."""
    raw = n.to_bytes((n.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def hostile_files(at: Path, canary: Path) -> list[tuple[str, Path]]:
    """Yield (description, file) of hostile files.

    They try to run something (it would make `canary`), to take memory, or to pass for something
    else.
    """
    Payload, forge, put, bomb = (
        builders_checkpoint.Payload,
        builders_checkpoint.forge,
        builders_checkpoint.put,
        builders_checkpoint.bomb,
    )
    model, optimizer = builders_checkpoint.new_run()
    builders_checkpoint.train(model, optimizer, 1, seed=1)
    good = builders_checkpoint.save(at / "good", 1, model, optimizer)
    contents = torch.load(good, weights_only=True)
    command, files = f"touch {canary}", []

    def new(name: str) -> Path:
        files.append((name, at / f"{len(files):02d}.pt"))
        return files[-1][1]

    def saved(name: str, value, **how) -> None:
        torch.save(value, new(name), **how)

    # ---- code
    system, write = Payload(os.system, command), Payload(open, str(canary), "w")
    saved("reduce in the run", contents | {"run": {"x": system}})
    saved(
        "reduce among the weights",
        contents | {"model": contents["model"] | {"norm.weight": system}},
    )
    saved(
        "reduce among the moments", contents | {"optimizer": contents["optimizer"] | {"x": system}}
    )
    saved("reduce as a key", contents | {"run": {("k", system): 1}})
    saved("reduce for the file", system)
    saved("reduce in an unknown key", contents | {"zzz": [system]})
    saved("open for writing", contents | {"run": {"x": write}})
    saved("eval", contents | {"run": {"x": Payload(eval, f"__import__('os').system({command!r})")}})
    saved("exec", contents | {"run": {"x": Payload(exec, f"__import__('os').system({command!r})")}})
    saved(
        "subprocess", contents | {"run": {"x": Payload(subprocess.Popen, ["touch", str(canary)])}}
    )
    saved("import of a module", contents | {"run": {"x": Payload(__import__, "this")}})
    nested = system
    for i in range(40):
        nested = [nested] if i % 2 else {"x": nested}
    saved("reduce, nested 40 deep", contents | {"run": {"x": nested}})
    state = BySetState()
    state.__dict__.update(x=system)
    saved("build", contents | {"run": {"x": state}})
    module = torch.nn.Linear(2, 2)
    module.hook = system
    saved("a module", module)
    saved("protocol 4", contents | {"run": {"x": system}}, pickle_protocol=4)
    saved("legacy format", contents | {"run": {"x": system}}, _use_new_zipfile_serialization=False)
    call = _short(command) + b"\x85R"
    for name, pickle in (
        ("GLOBAL", b"\x80\x02cposix\nsystem\n" + call + b"."),
        ("INST", b"(" + _short(command) + b"iposix\nsystem\n."),
        ("OBJ", b"(cposix\nsystem\n" + _short(command) + b"o."),
        (
            "NEWOBJ",
            b"\x80\x02csubprocess\nPopen\n"
            + b"]"
            + _short("touch")
            + b"a"
            + _short(str(canary))
            + b"a\x85\x81.",
        ),
        ("STACK_GLOBAL", b"\x80\x04" + _short("posix") + _short("system") + b"\x93" + call + b"."),
        ("EXT1", b"\x80\x02\x82\x01" + call + b"."),
        (
            "BUILD",
            b"\x80\x02ctorch.nn\nModule\n)\x81}" + _short("__setstate__") + b"cposix\nsystem\nsb.",
        ),
        ("REDUCE of a getattr", b"\x80\x02cbuiltins\ngetattr\ncposix\nsystem\n" + call + b"."),
        (
            "persistent id with a function",
            b"\x80\x02("
            + _short("storage")
            + b"cposix\nsystem\n"
            + _short("0")
            + _short("cpu")
            + b"K\x01tQ.",
        ),
    ):
        _pickle_zip(new(f"{name} in a zip"), pickle)
    new("a bare pickle").write_bytes(b"cposix\nsystem\n(" + _short(command) + b"tR.")
    with warnings.catch_warnings():
        # It is deprecated; files of it are about.
        warnings.simplefilter("ignore")
        torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(str(new("TorchScript")))
    path = new("a checkpoint that is TorchScript too")
    shutil.copy(good, path)
    with zipfile.ZipFile(path, "a") as archive:
        top = archive.namelist()[0].split("/")[0]
        archive.writestr(f"{top}/constants.pkl", b"\x80\x02cposix\nsystem\n" + call + b".")
        archive.writestr(f"{top}/code/__torch__.py", "class M(Module):\n  pass\n")
    # ---- memory
    for name, function in (
        ("bytearray of 16 TB", bytearray),
        ("storage of 16 TB", torch.UntypedStorage),
    ):
        saved(name, contents | {"run": {"x": Payload(function, 1 << 44)}})
    huge = (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(("
        + _short("storage")
        + b"ctorch\nFloatStorage\n"
        + _short("0")
        + _short("cpu")
        + b"%s"
        + b"tQK\x00(%st(%st\x89ccollections\nOrderedDict\n)RtR."
    )
    for name, numel, size, stride in (
        ("stride 0, 4 TB", 1, 1 << 40, 0),
        ("a storage of 4 TB", 1 << 40, 1 << 40, 1),
        ("a negative stride", 4, 4, -1),
        ("a size beyond the storage", 4, 1 << 40, 1),
    ):
        _pickle_zip(
            new(f"tensor with {name}"),
            b"\x80\x02}"
            + _short("model")
            + huge.replace(b"%s", _number(numel), 1)
            .replace(b"%s", _number(size), 1)
            .replace(b"%s", _number(stride), 1)[2:-1]
            + b"s.",
            {"x/data/0": b"\0" * 16},
        )
    forge(
        good,
        new("an expanded weight"),
        lambda c: c["model"].update({"embed.weight": torch.zeros(1).expand(1 << 36)}),
        redo_digests=False,
    )
    forge(
        good,
        new("an expanded moment"),
        lambda c: c["optimizer"].update({"x": torch.zeros(1).expand(1 << 20, 1 << 20)}),
        redo_digests=False,
    )
    for cfg in (
        dict(d_model=65_536, num_heads=4, d_ff=262_144),
        dict(transformer_blocks=1_024, num_experts=4_096),
        dict(context_length=16_777_216),
        dict(vocabulary_size=16_777_216, d_model=65_536),
    ):
        forge(good, new(f"config bomb {cfg}"), lambda c, cfg=cfg: c["cfg"].update(cfg))
    forge(
        good, new("lists that contain one another"), put("run", {"x": bomb()}), redo_digests=False
    )
    forge(
        good,
        new("one text 65,536 times"),
        put("run", {"x": ["x" * (1 << 20)] * (1 << 16)}),
        redo_digests=False,
    )
    forge(
        good,
        new("an integer of a million bits"),
        put("run", {"x": 1 << 1_000_000}),
        redo_digests=False,
    )
    for depth in (500, 100_000):
        _pickle_zip(
            new(f"lists {depth} deep"),
            b"\x80\x02}" + _short("cfg") + b"]" * depth + b"a" * (depth - 1) + b"s.",
        )
    _pickle_zip(new("a memo index of two thousand million"), b"\x80\x02}r\xff\xff\xff\x7f.")
    _pickle_zip(
        new("bytes that claim to be 2^62"), b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b"x."
    )
    _pickle_zip(new("marks without end"), b"\x80\x02" + b"(" * 100_000 + b".")
    # ---- zips
    with zipfile.ZipFile(new("zip bomb"), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(1 << 26))
    path = new("zip bomb among the tensors")
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(path, "w") as archive:
        for entry in source.infolist():
            archive.writestr(
                entry.filename,
                source.read(entry),
                zipfile.ZIP_STORED if entry.filename.endswith(".pkl") else zipfile.ZIP_DEFLATED,
            )
    with zipfile.ZipFile(new("entries that share bytes"), "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02}.")
        for number in range(3):
            archive.writestr(f"x/data/{number}", b"0" * 10_000)
        for entry in archive.infolist()[1:]:
            entry.header_offset, entry.file_size, entry.compress_size = (
                archive.infolist()[1].header_offset,
                1 << 30,
                1 << 30,
            )
    for name, entries in (
        ("names that climb", ["../../../x/data.pkl", "x/data.pkl/../../y"]),
        ("names from the root", [f"/{at}/data.pkl"]),
        ("two pickles", ["x/data.pkl", "x/data.pkl"]),
        ("a pickle deeper down", ["x/y/data.pkl"]),
    ):
        with warnings.catch_warnings(), zipfile.ZipFile(new(name), "w") as archive:
            # About the double name.
            warnings.simplefilter("ignore")
            for entry in entries:
                archive.writestr(entry, b"\x80\x02cposix\nsystem\n" + call + b".")
    # ---- files that are none
    new("a link to a file of the system").symlink_to("/etc/passwd")
    loop = new("a link to itself")
    loop.symlink_to(loop)
    new("a link to a device without end").symlink_to("/dev/zero")
    os.mkfifo(new("a pipe that nobody writes to"))
    with open(new("a hole of 1 TB behind a zip's first bytes"), "wb") as file:
        file.write(b"PK\3\4")
        file.truncate(1 << 40)
    return files


def hostile(count: int, prelude: str = "") -> Tally:
    """Read every file, in all three ways, in a process limited to 2 GB above its imports.

    Nothing may be executed, and all must be rejected. Reading for prediction, or only the config,
    may succeed if the fault is in the rest. prelude: code for that process, for tests of this test.
    """
    tally = Tally()
    with folder() as at:
        canary = at / "canary"
        (at / "files").mkdir()
        files = hostile_files(at / "files", canary)[:count]
        lines = "".join(json.dumps([str(path), name in SLOW]) + "\n" for name, path in files)
        done = subprocess.run(
            [sys.executable, "-c", CHILD.format(repo=str(REPO), prelude=prelude)],
            input=lines,
            capture_output=True,
            text=True,
            timeout=600,
            cwd=at,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        results = [json.loads(line) for line in done.stdout.splitlines()]
        for i, (name, path) in enumerate(files):

            def check(i=i, path=path):
                assert i < len(results), (
                    f"the reader is gone: exit {done.returncode}, {done.stderr[-300:]}"
                )
                for line in results[i][:1] + [line for line in results[i][1:] if line != "read"]:
                    assert line.startswith(f"refused: {path}"), line
                    assert line.isprintable() and len(line) < 800, f"not one line: {line!r:.200}"
                    assert not re.search("memory|allocate", line, re.IGNORECASE), (
                        f"took the memory first: {line}"
                    )

            attempt(tally, f"{path.name}, {name}", check)
        if canary.exists():
            tally.held = 0
            tally.failures.insert(0, "something was executed: the canary file is there")
        tally.detail = {"files": len(files), "executed": int(canary.exists())}
    return tally


PROMISES: list[Promise] = [
    Promise(
        8,
        "A hostile file runs nothing, takes no memory (2 GB at most) and is refused in a line",
        hostile,
        40,
        100,
        100,
        "the payload runs with torch before 2.6; a 3.36 TB request",
    ),
]
