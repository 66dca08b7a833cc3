"""Turn a checkpoint that many ranks wrote as a folder into one file, or a file into a folder.

    python -m scripts.convert_checkpoint --ckpt checkpoints/step_0001000 --out step_0001000.pt
    python -m scripts.convert_checkpoint --ckpt step_0001000.pt --out step_0001000

Both hold the same tensors, to the bit, and a run continues from either on any number of ranks.
predict.py, --init_from and all exports read a folder as it is. It takes no GPU and little memory:
the largest tensor, or twice 4 GB of tensors where a folder is written.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    import _by_path  # noqa: F401

import time
from pathlib import Path

from runtime.base.cli import parser, run_main
from runtime.interop.convert import convert
from runtime.interop.export import check_output


def main(argv: list[str] | None = None) -> int:
    p = parser(__doc__)
    p.add_argument("--ckpt", required=True, help="checkpoint to convert: a file or a folder")
    p.add_argument("--out", required=True, help="what to write: a folder or a file; a new name")
    args = p.parse_args(argv)
    started = time.perf_counter()
    out = check_output(args.out, force=False, source=args.ckpt)
    print(f"{out}: {convert(Path(args.ckpt), out)}, {time.perf_counter() - started:.1f} s")
    return 0


if __name__ == "__main__":
    run_main(main)
