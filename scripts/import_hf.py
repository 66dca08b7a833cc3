"""Make a checkpoint of a published model: Mixtral, Qwen3-MoE or gpt-oss.

    python -m scripts.import_hf --model DIR --out model.pt
    python -m scripts.import_hf --model openai/gpt-oss-20b --out model.pt

The second command downloads the model first. MXFP4 experts become bfloat16. The checkpoint holds
the tokenizer. predict.py, train.py --init_from and all exports read it.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    import _by_path  # noqa: F401

import os
import time

from runtime.base.cli import parser, run_main
from runtime.interop.export import check_output
from runtime.interop.hf_import import import_folder, model_folder


def main(argv: list[str] | None = None) -> int:
    p = parser(__doc__)
    p.add_argument(
        "--model",
        required=True,
        help="folder of a Hugging Face model (config.json, *.safetensors, tokenizer.json), "
        "or its name on the Hub",
    )
    p.add_argument("--out", required=True, help="checkpoint file to write")
    p.add_argument(
        "--dtype",
        choices=["auto", "bfloat16", "float32"],
        default="auto",
        help="dtype of the weights; auto = bfloat16 if all are bfloat16 or MXFP4 in the folder, "
        "else float32 (default: auto)",
    )
    p.add_argument("--force", action="store_true", help="replace an existing file")
    args = p.parse_args(argv)
    started, out = time.perf_counter(), check_output(args.out, args.force, source=args.model)
    folder = model_folder(args.model)
    run = {} if os.path.isdir(args.model) else {"imported_from": args.model}
    written = import_folder(folder, out, args.dtype, run)
    print(f"{out}: {written}; {time.perf_counter() - started:.1f} s")
    return 0


if __name__ == "__main__":
    run_main(main)
