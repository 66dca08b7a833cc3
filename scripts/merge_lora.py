"""Merge the adapters of a LoRA run into their base, or write them for peft.

    python -m scripts.merge_lora --ckpt checkpoints/latest.pt --out merged.pt
    python -m scripts.merge_lora --ckpt checkpoints/latest.pt --peft adapter/

The first command writes a plain checkpoint, which needs no base any more. The second writes a
folder that peft loads next to the base, which scripts.export_hf exports. predict.py and all exports
read a checkpoint of adapters as it is: they find its base and merge as they read.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    import _by_path  # noqa: F401

import time
from pathlib import Path

from runtime.base.cli import parser, run_main
from runtime.checkpoint.format import Checkpoint
from runtime.checkpoint.read import read_checkpoint
from runtime.interop.adapters import PEFT_FILES, write_merged, write_peft
from runtime.interop.export import check_output


def _check_bases(out: Path, checkpoint: Checkpoint) -> None:
    """Raise ValueError if `out` is the base of a file of adapters, or the base of that, and so on.

    The adapters in between would lose their base.
    """
    above = checkpoint
    while out.exists() and (adapter := above.adapter) is not None:
        if out.samefile(adapter.base):
            raise ValueError(
                f"--out {out} would replace the base of {above.path}: choose another name"
            )
        above = read_checkpoint(adapter.base, read_only=True)


def main(argv: list[str] | None = None) -> int:
    p = parser(__doc__)
    p.add_argument(
        "--ckpt",
        default="checkpoints/latest.pt",
        help="checkpoint of adapters (default: checkpoints/latest.pt)",
    )
    p.add_argument("--out", default="", help="plain checkpoint to write, with merged weights")
    p.add_argument("--peft", default="", help="folder to write, for peft")
    p.add_argument("--force", action="store_true", help="replace an existing output")
    args = p.parse_args(argv)
    if not args.out and not args.peft:
        raise ValueError("give --out FILE for a merged checkpoint, --peft FOLDER, or both")
    started = time.perf_counter()
    if args.out:
        out = check_output(args.out, args.force, source=args.ckpt)
    if args.peft:
        folder = check_output(args.peft, args.force, True, args.ckpt, PEFT_FILES)
    checkpoint = read_checkpoint(args.ckpt, read_only=True)
    if checkpoint.adapter is None:
        raise ValueError(
            f"{args.ckpt} holds no adapters, so there is nothing to merge: its weights are whole"
        )
    if args.out:
        _check_bases(out, checkpoint)
        written = write_merged(checkpoint, out)
        print(f"{out}: {written}, {time.perf_counter() - started:.1f} s")
    if args.peft:
        written = write_peft(checkpoint, folder)
        print(f"{folder}: {written}; load it next to the export of {checkpoint.adapter.base}")
    return 0


if __name__ == "__main__":
    run_main(main)
