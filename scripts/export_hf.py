"""Export a checkpoint as a Hugging Face folder, for transformers, vLLM and similar tools."""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    import _by_path  # noqa: F401

import dataclasses
import time

from runtime.base.cli import run_main
from runtime.base.text import parse_bytes
from runtime.interop.evaluation_rows import read_evaluation
from runtime.interop.export import DTYPES, check_output, export_parser, open_source
from runtime.interop.hf_export import export_folder
from runtime.interop.model_card import is_as_written


def main(argv: list[str] | None = None) -> int:
    p = export_parser(__doc__, "folder to write")
    p.add_argument(
        "--dtype",
        choices=sorted(DTYPES),
        help="dtype of the weights (default: the checkpoint's, which is exact: float32 unless it "
        "was imported as bfloat16)",
    )
    p.add_argument(
        "--max_shard_size",
        default="5GB",
        help="maximum size of a weights file, such as 500MB or 1GiB (default: 5GB)",
    )
    p.add_argument(
        "--custom_code",
        action="store_true",
        help="write any config with its own modeling file, which transformers loads with "
        "trust_remote_code=True",
    )
    p.add_argument(
        "--evaluation",
        default="",
        metavar="FILE",
        help="report of python -m scripts.evaluate --json FILE, whose figures the model card gets",
    )
    args = p.parse_args(argv)
    limit, started = parse_bytes(args.max_shard_size, "--max_shard_size"), time.perf_counter()
    out = check_output(args.out, args.force, is_folder=True, source=args.ckpt)
    if not is_as_written(out / "README.md"):
        raise ValueError(
            f"{out / 'README.md'} was changed since it was written: "
            "move it elsewhere, or choose another --out"
        )
    source = open_source(args)
    if args.evaluation:
        report = read_evaluation(args.evaluation, source.checkpoint)
        source = dataclasses.replace(source, evaluation=report)
    dtype = DTYPES.get(args.dtype, source.checkpoint.model["embed.weight"].dtype)
    written = export_folder(source, out, dtype, limit, args.custom_code)
    print(f"{out}: {written}, {time.perf_counter() - started:.1f} s")
    return 0


if __name__ == "__main__":
    run_main(main)
