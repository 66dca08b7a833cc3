"""runtime/interop/export.py: what may be replaced, and outputs that are whole or absent.

Also the check of logits.
"""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace

import pytest
import torch

import runtime.interop.export as export
from config_model import TrainConfig
from runtime.checkpoint.read import read_checkpoint
from runtime.checkpoint.write import save_checkpoint, write_weights
from runtime.data.tokenizers import load_tokenizer
from runtime.interop import huggingface
from runtime.interop.export import (
    ExportError,
    check_logits,
    check_output,
    open_source,
    staged,
    work_folder,
)
from runtime.interop.published import Published
from tests import children
from tests.builders import random_model, tiny_config
from tests.numeric import logits_bound, size_of


@pytest.mark.parametrize(
    "force, is_folder, made, message",
    [
        (False, False, "file", "exists: .*--force"),
        (False, True, "folder", "exists"),
        (True, True, "file", "is no folder"),
        (True, False, "folder", "is no plain file"),
        (True, False, "pipe", "is no plain file"),
        (True, True, "notes", "holds notes.txt, which no export writes"),
        (True, True, "checkpoint", "would replace .*latest.pt"),
    ],
)
def test_what_is_there_is_not_lost(tmp_path, force, is_folder, made, message):
    """With --force a folder was replaced if it held a config.json, whatever else it held.

    Notes, a git clone, the checkpoint that was being exported.
    """
    out, source = tmp_path / "out", tmp_path / "out" / "latest.pt"
    if made in ("folder", "notes", "checkpoint"):
        out.mkdir()
        (out / "config.json").write_text("{}")
        {"notes": out / "notes.txt", "checkpoint": source}.get(
            made, out / "config.json"
        ).write_text("mine")
    elif made == "pipe":
        os.mkfifo(out)
    else:
        out.write_text("mine")
    with pytest.raises(ValueError, match=message):
        check_output(out, force, is_folder, source=source if made == "checkpoint" else "")
    assert out.exists()


def test_an_earlier_export_and_an_empty_folder_may_be_replaced(tmp_path):
    (tmp_path / "a").mkdir()
    assert check_output(tmp_path / "a", True, is_folder=True) == tmp_path / "a"
    for name in (
        "config.json",
        "model-00001-of-00002.safetensors",
        "tokenizer.json",
        "README.md",
        "loss.png",
        "modeling_gptoss.py",
    ):
        (tmp_path / "a" / name).touch()
    check_output(tmp_path / "a", True, is_folder=True)
    (tmp_path / "b.gguf").touch()
    check_output(tmp_path / "b.gguf", True)


def test_a_source_is_no_output(tmp_path):
    """import_hf --out hf/model.safetensors --force with --model hf is rejected.

    It replaced the weights that it was reading.
    """
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "model.safetensors").touch()
    with pytest.raises(ValueError, match="would replace .*hf or a part of it"):
        check_output(tmp_path / "hf" / "model.safetensors", True, source=tmp_path / "hf")
    with pytest.raises(ValueError, match="is no name"):
        check_output(".", True)


def test_a_folder_takes_its_name_when_it_is_whole(tmp_path):
    out = tmp_path / "deep" / "out"
    for content in ("one", "two"):
        with staged(out, 10, is_folder=True) as folder:
            assert folder.name == "out" and not list(folder.iterdir())
            (folder / "config.json").write_text(content)
        assert (out / "config.json").read_text() == content and [
            p.name for p in out.parent.iterdir()
        ] == ["out"]
    with pytest.raises(ExportError), staged(out, 10, is_folder=True) as folder:
        (folder / "config.json").write_text("three")
        raise ExportError("off")
    assert (out / "config.json").read_text() == "two" and [
        p.name for p in out.parent.iterdir()
    ] == ["out"]


def test_a_folder_that_cannot_be_renamed_leaves_the_old_one(tmp_path, monkeypatch):
    with staged(tmp_path / "out", 10, is_folder=True) as folder:
        (folder / "config.json").write_text("old")
    real, calls = os.replace, []

    def replace(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(export.os, "replace", replace)
    with (
        pytest.raises(OSError, match="No space"),
        staged(tmp_path / "out", 10, is_folder=True) as folder,
    ):
        (folder / "config.json").write_text("new")
    assert (tmp_path / "out" / "config.json").read_text() == "old" and [
        p.name for p in tmp_path.iterdir()
    ] == ["out"]


def test_files_of_others_are_not_touched(tmp_path):
    """OUT.partial and OUT.replaced were removed without asking, whoever had put them there."""
    for name in ("out.partial", "out.replaced", "out.parts"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").touch()
    for _ in range(2):
        with staged(tmp_path / "out", 10, is_folder=True) as folder:
            (folder / "config.json").touch()
    assert all(
        (tmp_path / name / "mine").exists() for name in ("out.partial", "out.replaced", "out.parts")
    )


def test_a_disk_that_is_too_small_is_known_before(tmp_path, monkeypatch):
    monkeypatch.setattr(export.shutil, "disk_usage", lambda path: SimpleNamespace(free=99))
    with (
        pytest.raises(ValueError, match="needs 0.00 GB, and its disk has 0.00 GB free"),
        work_folder(tmp_path / "out", 100),
    ):
        pytest.fail("it began")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT", "SIGKILL"])
def test_a_signal_leaves_nothing(tmp_path, name):
    """SIGTERM and SIGHUP left a file as large as the model; only Ctrl-C cleaned up."""
    code = (
        "import os, signal, sys; from pathlib import Path; from runtime.base.cli import "
        "run_main; from runtime.interop.export import staged\n"
        "def main(argv):\n"
        "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"    with staged(Path({str(tmp_path / 'out')!r}), 10) as path:\n"
        f"        path.write_text('half'); os.kill(os.getpid(), signal.{name}); signal.pause()\n"
        "run_main(main)"
    )
    done = children.run(["-c", code])
    number = getattr(signal, name)
    assert (
        done.returncode == (-number if name == "SIGKILL" else 128 + number)
        and "Traceback" not in done.stderr
    )
    assert len(list(tmp_path.iterdir())) == (name == "SIGKILL")


def test_what_a_kill_left_is_named(tmp_path, capsys):
    (tmp_path / ".out.partial-abc").mkdir()
    with staged(tmp_path / "out", 10) as path:
        path.touch()
    assert (
        ".out.partial-abc is the leftover of an interrupted export" in capsys.readouterr().err
        and (tmp_path / ".out.partial-abc").exists()
    )


def test_logits_that_are_off_are_an_error(capsys):
    ours, config = torch.linspace(-20, 20, 60).view(1, 5, 12), tiny_config()
    # Between the two differences below.
    assert 2e-4 < logits_bound(config, 32) * size_of(ours) < 3e-3
    assert check_logits("copy", ours, ours + 2e-4, config) == pytest.approx(2e-4, rel=1e-2)
    assert (
        "copy: largest logit difference 2.0e-04 (logits up to 20, 5 tokens)"
        in capsys.readouterr().out
    )
    for theirs in (ours + 3e-3, ours * torch.nan, ours[:, :4]):
        with pytest.raises(ExportError) as error:
            check_logits("copy", ours, theirs, config)
        assert error.value.exit_code == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_source_computes_what_its_checkpoint_does_and_is_never_copied(tmp_path, dtype):
    """A file larger than memory may be mapped as shared (tests/checkpoint/test_checkpoint.py).

    Elsewhere a write to a weight stays in memory.
    """
    model, tokenizer = random_model(tiny_config(vocabulary_size=257)).eval(), load_tokenizer("byte")
    if dtype == torch.float32:
        path = save_checkpoint(
            tmp_path,
            1,
            model,
            None,
            train_config=TrainConfig(),
            tokenizer_state=tokenizer.to_state(),
        )
    else:
        path = tmp_path / "x.pt"
        write_weights(
            path, model.config, lambda name: model.state_dict()[name], dtype, tokenizer.to_state()
        )
    seen = []

    def read(path, **given):
        seen.append(given)
        return read_checkpoint(path, **given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "read_checkpoint", read)
        source = open_source(SimpleNamespace(ckpt=str(path), tokenizer=""))
    assert seen == [{"read_only": True}] and source.tokenizer.name == "byte"
    ids = torch.tensor([[256, *b"Once upon"]])
    with torch.no_grad():
        expected = model.to(dtype).float()(ids).logits
    for _ in range(2):
        assert torch.equal(export.logits_of(source.model, ids), expected)
    before = path.read_bytes()
    with torch.no_grad():
        source.checkpoint.model["norm.weight"].zero_()
    assert path.read_bytes() == before


def test_what_float32_loses_to_steep_softmaxes_is_allowed(monkeypatch, capsys):
    """Healthy models with attention scores of 60 were rejected.

    Their float32 is off by more than that of others. As far as float64 shows it, and no further.
    """
    model, ids_BT = random_model(tiny_config()).eval(), torch.arange(1, 9)[None]
    ours = export.logits_of(model, ids_BT)
    bound = export.allowed_difference(ours, model.config)
    theirs = Published(lambda name: torch.ones(1), 1, 1, 1, 1, 1, 1e-6, 1e4, (0,))

    def check(off, lost):
        def logits(published, ids, choices=None):
            is_exact = published.read("any").dtype == torch.float64
            return ours[0].double() + off + lost * is_exact

        monkeypatch.setattr(export, "logits", logits)
        return export.check_published("x", huggingface.KNOWS, model, ours, theirs, ids_BT)

    monkeypatch.setattr(export, "unclaimed", lambda published: [])
    assert check(3 * bound, bound) == pytest.approx(3 * bound, rel=1e-3)
    for off, lost in ((3 * bound, 0.0), (20 * bound, 100 * bound)):
        with pytest.raises(ExportError, match="rounding explains"):
            check(off, lost)


def test_a_name_that_is_not_utf8_is_refused_before_any_work(tmp_path):
    """safetensors called a folder of such a name "damaged"; ONNX Runtime ended in a traceback.

    A GGUF is written by Python, which opens any name.
    """
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    for out, is_folder in ((folder / "hf", True), (folder / "m.onnx", False)):
        with pytest.raises(ValueError, match="is not UTF-8, and safetensors and ONNX Runtime"):
            check_output(out, False, is_folder)
    assert check_output(folder / "m.gguf", False) == folder / "m.gguf"
    with pytest.raises(ValueError, match="safetensors opens UTF-8 paths alone: rename the folder"):
        huggingface.folder_tensors(folder)
