"""Export a checkpoint as GGUF, the file format of llama.cpp and Ollama.

Use the file, and the Modelfile next to it, like this:

    python -m scripts.export_gguf --ckpt checkpoints/latest.pt --out model.gguf [--quantize q8_0]
    ollama create NAME -f model.Modelfile
    llama-completion -m model.gguf -p "Once upon a time" --temp 0 -no-cnv
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    import _by_path  # noqa: F401

from runtime.base.cli import run_main
from runtime.interop.export import check_output, export_parser, open_source
from runtime.interop.gguf import QUANTIZE, check_name, export_model, import_gguf


def main(argv: list[str] | None = None) -> int:
    p = export_parser(
        __doc__.splitlines()[0], "file to write, NAME.gguf; NAME.Modelfile is written next to it"
    )
    p.add_argument(
        "--quantize",
        default="f32",
        choices=QUANTIZE,
        help="type of the matrices; norms, routers, biases and sinks stay float32 (default: f32)",
    )
    p.add_argument(
        "--accept_rounded_yarn",
        action="store_true",
        help="export a model with yarn_truncate False (gpt-oss-20b), although llama.cpp always "
        "rounds the ends of YaRN's ramp and so gives other logits; the difference is printed "
        "(default: exit with an error)",
    )
    args = p.parse_args(argv)
    import_gguf()
    check_name(args.out)
    out = check_output(args.out, args.force, source=args.ckpt)
    recipe = check_output(out.with_suffix(".Modelfile"), args.force, source=args.ckpt)
    export_model(open_source(args), out, recipe, args.quantize, args.accept_rounded_yarn)
    return 0


if __name__ == "__main__":
    run_main(main)
