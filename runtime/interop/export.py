"""What all exports share: their arguments, an output that is whole or not there, and the check at the end.

An export writes under a temporary name, reads back what it wrote, compares its logits on real text with the model's, and only
then renames it: what is off, or breaks off, is removed.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from config_model import ModelConfig
from model import LLM
from runtime.base.cli import parser
from runtime.base.files import TEMPORARY_SUFFIX, fsync_folder, make_folder
from runtime.checkpoint.format import Checkpoint, meta_model
from runtime.checkpoint.read import build_model, read_checkpoint
from runtime.checks.known import Known
from runtime.checks.rounding import logits_bound, size_of
from runtime.data.tokenizer import Tokenizer
from runtime.data.tokenizers import tokenizer_of
from runtime.inference.decoder import router_choices
from runtime.interop.published import Published, logits, unclaimed

# What scripts.export_hf writes into a folder, and what a published model's tokenizer brings along: all that --force may replace.
FOLDER_FILES = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|model\.safetensors\.index)\.json|"
    r"model(-\d{5}-of-\d{5})?\.safetensors|chat_template\.jinja|modeling_gptoss\.py|README\.md|(loss|expert_load)\.png"
)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MOST_CHECKED_TOKENS = 256
# How much more than usual a model's float32 may lose to steep softmaxes before an export is refused.
MOST_STEEPNESS = 16
CHECK_TEXT = """Once upon a time there was a lighthouse keeper called Noor, who counted ships. On Monday she saw 3; on Tuesday, 14 more.
"That's too many," she said, "for a harbour that holds only 12!" Her cat didn't answer. It was asleep on the charts again.

By 1927 the old lamp had burned for 21,900 nights. Noor wrote it all down: wind from the south-west, waves of 2.5 m, one café open.
für Gäste geschlossen, стоял туман, 灯台は静かだった. Then she closed the book, put out the light (it was morning), and slept... \N{SLEEPING FACE}
The ships went on without her. They knew the way, or thought they did; and the sea, which never reads what is written about it,
rose a little, fell a little, and left the stones where they had been. When Noor woke up, the cat had caught a fish.
"""


class ExportError(ValueError):
    """An export that does not compute what the model computes."""

    exit_code = 1


@dataclass(frozen=True)
class Source:
    """What is exported."""

    path: Path
    model: LLM  # eval mode, float32 on the CPU; mapped from the file, or, if it holds bfloat16, made for a block at a time
    checkpoint: Checkpoint
    tokenizer: Tokenizer


def export_parser(description: str, out: str) -> argparse.ArgumentParser:
    """A parser with the flags of all exports. `out`: what --out names, for its help."""
    p = parser(description)
    p.add_argument(
        "--ckpt",
        default="checkpoints/latest.pt",
        help="checkpoint to export (default: checkpoints/latest.pt)",
    )
    p.add_argument("--out", required=True, help=out)
    p.add_argument(
        "--tokenizer",
        default="",
        help="tokenizer, for checkpoints that carry none: o200k_base, byte, ..., or the path of a data folder, a published model "
        "or a checkpoint (default: the checkpoint's)",
    )
    p.add_argument("--force", action="store_true", help="replace an output that is there")
    return p


def open_source(args: argparse.Namespace) -> Source:
    """The checkpoint and tokenizer that the arguments name, checked. Raises ValueError."""
    checkpoint = read_checkpoint(args.ckpt, read_only=True)  # no export writes to a weight
    is_wide = checkpoint.model["embed.weight"].dtype == torch.float32
    model = (
        build_model(checkpoint)
        if is_wide
        else lazy_model(checkpoint.model_config, lambda name: checkpoint.model[name].float())
    )
    return Source(Path(args.ckpt), model, checkpoint, tokenizer_of(checkpoint, args.tokenizer))


# ------------------------------------------------------------------------------------------------------------------ output
def check_output(
    out: str | Path, force: bool, is_folder: bool = False, source: str | Path = ""
) -> Path:
    """The path to write to, before any work. ValueError if something is there and may not be replaced: without `force` anything; with it
    what is no plain file, a folder that holds anything but what an export writes, and `source` or what holds it or is part of it."""
    path = Path(out)
    if not path.name or path.resolve() == Path.cwd():
        raise ValueError(f"--out {out} is no name for {'a new folder' if is_folder else 'a file'}")
    if not os.path.lexists(path):
        return path
    if not force:
        raise ValueError(f"--out {out} exists: choose another name, or say --force to replace it")
    if not (path.is_dir() if is_folder else path.is_file()):
        raise ValueError(
            f"--out {out} is no {'folder' if is_folder else 'plain file'}, and this writes one: choose another name"
        )
    here, there = path.resolve(), Path(source).resolve()
    if source and (here == there or there in here.parents or here in there.parents):
        raise ValueError(
            f"--out {out} would replace {source} or a part of it, which is read: choose another name"
        )
    if is_folder and (
        others := sorted(
            entry.name for entry in path.iterdir() if not FOLDER_FILES.fullmatch(entry.name)
        )
    ):
        raise ValueError(
            f"--out {out} holds {others[0]}, which no export writes, so the folder is not replaced: choose another name"
        )
    return path


@contextlib.contextmanager
def work_folder(out: Path, needed_bytes: int) -> Iterator[Path]:
    """A new, hidden folder beside `out` to write in, which is removed at the end, also when the process is told to end (SIGTERM, SIGHUP).

    ValueError if the disk has less than `needed_bytes` free.
    """
    make_folder(out.parent)
    prefix = f".{out.name}{TEMPORARY_SUFFIX}-"
    for left in sorted(out.parent.glob(f"{glob.escape(prefix)}*")):
        print(
            f"note: {left} is of an export that was killed, or still runs: if it does not, remove it",
            file=sys.stderr,
        )
    free = shutil.disk_usage(out.parent).free
    if needed_bytes > free:
        raise ValueError(
            f"{out} needs {needed_bytes / 1e9:.2f} GB, and its disk has {free / 1e9:.2f} GB free: free some space or choose another --out"
        )
    with _signals_raise(), tempfile.TemporaryDirectory(prefix=prefix, dir=out.parent) as folder:
        yield Path(folder)


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block as an exception, so that it cleans up: the process then exits with 128 + the signal's number."""

    def leave(number, frame):
        raise SystemExit(128 + number)

    names = (
        [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
        if threading.current_thread() is threading.main_thread()
        else []
    )
    before = {
        name: signal.signal(getattr(signal, name), leave)
        for name in names
        if signal.getsignal(getattr(signal, name)) == signal.SIG_DFL
    }
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)


@contextlib.contextmanager
def staged(out: Path, needed_bytes: int, is_folder: bool = False) -> Iterator[Path]:
    """A path in a `work_folder` (for a folder: an empty one), called as `out`, which becomes `out` if the block ends well and is removed if not.

    Everything is flushed before it is renamed; a folder that is replaced is moved aside first, and back if the renaming fails.
    """
    with work_folder(out, needed_bytes) as work:
        temporary = work / out.name
        if is_folder:
            temporary.mkdir()
        yield temporary
        flush(temporary)
        if is_folder and out.exists():
            aside = work / "replaced"
            os.replace(out, aside)
            try:
                os.replace(temporary, out)
            except BaseException:
                os.replace(aside, out)
                raise
        else:
            os.replace(temporary, out)
        fsync_folder(out.parent)


def flush(path: Path) -> None:
    """Flush a file, or a folder and all in it, to the disk."""
    for each in [path, *path.rglob("*")]:
        if each.is_file():
            with open(each, "rb+") as file:
                os.fsync(file.fileno())
        else:
            fsync_folder(each)


# ------------------------------------------------------------------------------------------------------------------- check
def check_ids(tokenizer: Tokenizer, config: ModelConfig) -> Tensor:
    """Ids [1, T] of a real text that every export is checked on, as long as the context allows."""
    ids = [tokenizer.end_of_text_id, *tokenizer.encode(CHECK_TEXT)]
    return torch.tensor([ids[: min(config.context_length, MOST_CHECKED_TOKENS)]])


def lazy_model(config: ModelConfig, read: Callable[[str], Tensor]) -> LLM:
    """A model, in eval mode, whose tensors `read` gives by name when they are needed; a block's are forgotten when it is done."""
    model = meta_model(config).eval()

    def load(module: nn.Module, prefix: str) -> None:
        module.load_state_dict(
            {name: read(prefix + name) for name in module.state_dict()}, assign=True
        )

    for name, module in model.named_children():
        if name != "layers":
            load(module, f"{name}.")
    for n, block in enumerate(model.layers):
        block.register_forward_pre_hook(lambda block, given, n=n: load(block, f"layers.{n}."))
        block.register_forward_hook(
            lambda block, given, out: (block.to_empty(device="meta"), None)[1]
        )
    return model


@torch.inference_mode()
def logits_of(model: LLM, ids_BT: Tensor) -> Tensor:
    """Logits [B, T, V] float32, without a cache."""
    return model(ids_BT).logits.float()


def largest_difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference of two tensors of one shape; NaN where either holds one."""
    if ours.shape != theirs.shape:
        raise ExportError(
            f"the export gives logits of shape {list(theirs.shape)}, the model {list(ours.shape)}"
        )
    return (ours.double() - theirs.double()).abs().max().item()


def allowed_difference(ours: Tensor, config: ModelConfig) -> float:
    """The largest difference from logits [B, T, V] that float32's rounding explains."""
    # The last tokens alone may be given: they attend to the whole text.
    keys = min(config.context_length, MOST_CHECKED_TOKENS)
    return logits_bound(config, keys) * size_of(ours)


def check_logits(
    route: str, ours: Tensor, theirs: Tensor, config: ModelConfig, allowed: float = 0.0
) -> float:
    """Print and return the largest difference of logits [B, T, V]; ExportError if it is beyond what float32's rounding explains.

    That depends on the model's size (runtime/checks/rounding.py): 1.8e-4 of the logits' root mean square for nano, 1.6e-3 for gpt-oss-20b.
    allowed: more than that, where a caller knows that this model loses more.
    """
    difference, largest = largest_difference(ours, theirs), ours.abs().max().item()
    print(
        f"check: {route}: largest logit difference {difference:.1e} (logits up to {largest:.3g}, {ours[..., 0].numel()} tokens)"
    )
    allowed = max(allowed, allowed_difference(ours, config))
    if not difference <= allowed:
        raise ExportError(
            f"{route}: logits differ by {difference:.1e}, more than the {allowed:.1e} that rounding explains: nothing was written"
        )
    return difference


@torch.inference_mode()
def check_published(
    route: str, known: Known, model: LLM, ours: Tensor, theirs: Published, ids_BT: Tensor
) -> float:
    """check_logits of what a file's architecture computes by its own settings.

    ours: the logits that `model` gives for ids [1, T]. Where the two differ, rounding may have sent a
    token to the other of two experts that are equally good: then the model's choice is taken.
    """
    if left := unclaimed(theirs):
        raise ExportError(f"{route}: {known.what} has no place for {left[0]}: nothing was written")
    ids = ids_BT[0].tolist()
    found = logits(theirs, ids)[None]
    explained = allowed = allowed_difference(ours, model.config)
    if not largest_difference(ours, found) <= explained:
        choices = router_choices(model, ids)[0]
        found = logits(theirs, ids, choices)[None]
        # A steep softmax makes more of a rounding: as much as float32 loses here, which float64
        # shows. Both sides lose it (2), and the largest of many elements varies (4).
        lost = largest_difference(found, logits(theirs.in_float64(), ids, choices)[None])
        allowed = min(max(explained, 8 * lost), MOST_STEEPNESS * explained)
    try:
        return check_logits(route, ours, found, model.config, allowed)
    except ExportError as error:
        fields = known.undeclared(model.config)
        also = f"; {known.what} does not know ModelConfig.{', '.join(fields)}" if fields else ""
        raise ExportError(f"{error}{also}") from error
