"""What all exports share: their arguments, an output that is whole or absent, and the final check.

An export writes under a temporary name, reads the file back and compares its logits on real text
with the model's. Only then is the file renamed. A wrong or unfinished one is deleted.
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
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from config_model import ModelConfig
from model import LLM
from runtime.base.cli import parser
from runtime.base.files import TEMPORARY_SUFFIX, fsync_folder, is_utf8, make_folder
from runtime.checkpoint.format import Checkpoint, meta_model
from runtime.checkpoint.read import build_model, read_checkpoint
from runtime.checks.known import Known
from runtime.checks.rounding import logits_bound, size_of
from runtime.data.tokenizer import Tokenizer
from runtime.data.tokenizers import tokenizer_of
from runtime.inference.decoder import router_choices
from runtime.interop.published import Published, logits, unclaimed

# What scripts.export_hf writes into a folder, with the files of a published model's tokenizer.
# --force may replace these, and nothing else.
FOLDER_FILES = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map)\.json|"
    r"model\.safetensors\.index\.json|model(-\d{5}-of-\d{5})?\.safetensors|"
    r"chat_template\.jinja|modeling_gptoss\.py|README\.md|(loss|expert_load)\.png"
)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MOST_CHECKED_TOKENS = 256
# How much more than usual a model's float32 may lose to steep softmaxes before an export fails.
MOST_STEEPNESS = 16
# Numbers, quotes, blank lines, four scripts and an emoji: what tokenizers split differently.
CHECK_TEXT = (
    "Once upon a time there was a lighthouse keeper called Noor, who counted ships. "
    "On Monday she saw 3; on Tuesday, 14 more.\n"
    '"That\'s too many," she said, "for a harbour that holds only 12!" Her cat didn\'t answer. '
    "It was asleep on the charts again.\n"
    "\n"
    "By 1927 the old lamp had burned for 21,900 nights. Noor wrote it all down: "
    "wind from the south-west, waves of 2.5 m, one café open.\n"
    "für Gäste geschlossen, стоял туман, 灯台は静かだった. "
    "Then she closed the book, put out the light (it was morning), and slept... "
    "\N{SLEEPING FACE}\n"
    "The ships went on without her. They knew the way, or thought they did; "
    "and the sea, which never reads what is written about it,\n"
    "rose a little, fell a little, and left the stones where they had been. "
    "When Noor woke up, the cat had caught a fish.\n"
)


class ExportError(ValueError):
    """An export that does not compute what the model computes."""

    exit_code = 1


@dataclass(frozen=True)
class Source:
    """What is exported."""

    path: Path
    # eval mode, float32 on the CPU; mapped from the file, or made by the block if that is bfloat16
    model: LLM
    checkpoint: Checkpoint
    tokenizer: Tokenizer
    # A report of scripts/evaluate.py; {} for none.
    evaluation: dict = field(default_factory=dict)


def export_parser(description: str, out: str) -> argparse.ArgumentParser:
    """Return a parser with the flags of all exports. out: what --out names, for its help."""
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
        help="tokenizer, for checkpoints that carry none: o200k_base, byte, ..., the path of "
        "a data folder, a published model or a checkpoint, or none: the export reads and gives "
        "token ids (default: the checkpoint's)",
    )
    p.add_argument("--force", action="store_true", help="replace an existing output")
    return p


def open_source(args: argparse.Namespace) -> Source:
    """Return the checked checkpoint and tokenizer that the arguments name. Raise ValueError."""
    # No export writes to a weight.
    checkpoint = read_checkpoint(args.ckpt, read_only=True)
    is_wide = checkpoint.model["embed.weight"].dtype == torch.float32
    model = (
        build_model(checkpoint)
        if is_wide
        else lazy_model(checkpoint.model_config, lambda name: checkpoint.model[name].float())
    )
    return Source(Path(args.ckpt), model, checkpoint, tokenizer_of(checkpoint, args.tokenizer))


# ---------------------------------------------------------------------------------------- output
def check_output(
    out: str | Path,
    force: bool,
    is_folder: bool = False,
    source: str | Path = "",
    files: re.Pattern = FOLDER_FILES,
) -> Path:
    """Return the path to write to, before any work.

    Raise ValueError if something exists there that may not be replaced. Without `force` that is
    anything. With `force` it is anything but a plain file, or for a folder: one that holds a file
    whose name does not match `files`, those that the export writes. `source`, a folder around it
    and a file inside it are never replaced.
    """
    path = Path(out)
    if not path.name or path.resolve() == Path.cwd():
        raise ValueError(f"--out {out} is no name for {'a new folder' if is_folder else 'a file'}")
    if (is_folder or path.suffix == ".onnx") and not is_utf8(path):
        raise ValueError(
            f"--out {out} is not UTF-8, and safetensors and ONNX Runtime open UTF-8 paths alone: "
            "choose another name"
        )
    if not os.path.lexists(path):
        return path
    if not force:
        raise ValueError(f"--out {out} exists: choose another name, or say --force to replace it")
    if not (path.is_dir() if is_folder else path.is_file()):
        raise ValueError(
            f"--out {out} is no {'folder' if is_folder else 'plain file'}, and this writes one: "
            "choose another name"
        )
    here, there = path.resolve(), Path(source).resolve()
    if source and (here == there or there in here.parents or here in there.parents):
        raise ValueError(
            f"--out {out} would replace {source} or a part of it, which is read: "
            "choose another name"
        )
    if is_folder and (
        others := sorted(entry.name for entry in path.iterdir() if not files.fullmatch(entry.name))
    ):
        raise ValueError(
            f"--out {out} holds {others[0]}, which no export writes, so the folder is not "
            "replaced: choose another name"
        )
    return path


@contextlib.contextmanager
def work_folder(out: Path, needed_bytes: int) -> Iterator[Path]:
    """Make a hidden folder next to `out` to write in, and remove it at the end.

    It is also removed if SIGTERM or SIGHUP ends the process. Raise ValueError if the disk has less
    than `needed_bytes` free.
    """
    make_folder(out.parent)
    prefix = f".{out.name}{TEMPORARY_SUFFIX}-"
    for left in sorted(out.parent.glob(f"{glob.escape(prefix)}*")):
        print(
            f"note: {left} is the leftover of an interrupted export; delete it if none is running",
            file=sys.stderr,
        )
    free = shutil.disk_usage(out.parent).free
    if needed_bytes > free:
        raise ValueError(
            f"{out} needs {needed_bytes / 1e9:.2f} GB, and its disk has {free / 1e9:.2f} GB free: "
            "free some space or choose another --out"
        )
    with _signals_raise(), tempfile.TemporaryDirectory(prefix=prefix, dir=out.parent) as folder:
        yield Path(folder)


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """Make SIGTERM and SIGHUP end the block with an exception, so that it cleans up.

    The process then exits with 128 + the signal's number.
    """

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
    """Give a path in a `work_folder` (for a folder: an empty one) that has the name of `out`.

    It becomes `out` if the block ends well and is removed if not. Everything is flushed before it
    is renamed. A folder to replace is moved aside first, and back if the renaming fails.
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


# ----------------------------------------------------------------------------------------- check
def check_ids(tokenizer: Tokenizer, config: ModelConfig) -> Tensor:
    """Return ids [1, T] of the text that checks every export, as long as the context allows.

    Without a tokenizer they are drawn, always the same, from the whole vocabulary.
    """
    length = min(config.context_length, MOST_CHECKED_TOKENS)
    if tokenizer.end_of_text_id is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(config.vocabulary_size, (1, length), generator=generator)
    return torch.tensor([[tokenizer.end_of_text_id, *tokenizer.encode(CHECK_TEXT)][:length]])


def lazy_model(config: ModelConfig, read: Callable[[str], Tensor]) -> LLM:
    """Return a model, in eval mode, that loads its tensors by `read(name)` when it needs them.

    A block's tensors are released when the block is done.
    """
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
    """Return logits [B, T, V] float32, computed without a cache."""
    return model(ids_BT).logits.float()


def largest_difference(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest absolute difference of two tensors; NaN if either holds one.

    Raise ExportError if their shapes differ.
    """
    if ours.shape != theirs.shape:
        raise ExportError(
            f"the export gives logits of shape {list(theirs.shape)}, the model {list(ours.shape)}"
        )
    return (ours.double() - theirs.double()).abs().max().item()


def allowed_difference(ours: Tensor, config: ModelConfig) -> float:
    """Return the largest difference from logits [B, T, V] that float32's rounding explains."""
    # The last tokens alone may be given: they attend to the whole text.
    keys = min(config.context_length, MOST_CHECKED_TOKENS)
    return logits_bound(config, keys) * size_of(ours)


def check_logits(
    route: str, ours: Tensor, theirs: Tensor, config: ModelConfig, allowed: float = 0.0
) -> float:
    """Print and return the largest difference of logits [B, T, V].

    Raise ExportError if float32's rounding does not explain it. The bound depends on the model's
    size (runtime/checks/rounding.py): 1.8e-4 of the logits' root mean square for nano, 1.6e-3 for
    gpt-oss-20b. allowed: a larger bound, if a caller knows that this model loses more.
    """
    difference, largest = largest_difference(ours, theirs), ours.abs().max().item()
    print(
        f"check: {route}: largest logit difference {difference:.1e} "
        f"(logits up to {largest:.3g}, {ours[..., 0].numel()} tokens)"
    )
    allowed = max(allowed, allowed_difference(ours, config))
    if not difference <= allowed:
        raise ExportError(
            f"{route}: logits differ by {difference:.1e}, more than the {allowed:.1e} "
            "that rounding explains: nothing was written"
        )
    return difference


@torch.inference_mode()
def check_published(
    route: str, known: Known, model: LLM, ours: Tensor, theirs: Published, ids_BT: Tensor
) -> float:
    """Compare with `check_logits` what a file's architecture computes by its own settings.

    ours: the logits that `model` gives for ids [1, T]. If the two differ, rounding may have sent a
    token to the other of two equally good experts: then the model's choice is used.
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
