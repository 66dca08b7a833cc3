"""Serve checkpoints over HTTP, as OpenAI's API does: many requests at a time.

    python -m scripts.serve --ckpt checkpoints/best.pt
    python -m scripts.serve --ckpt base=runs/a/best.pt chat=runs/b/best.pt    several, by name
    python -m scripts.serve --ckpt checkpoints/best.pt --host 0.0.0.0 --api_key_file key.txt

Then http://127.0.0.1:8000 is a base_url of openai-python (with /v1), of lm-eval and of Open WebUI.
It answers this machine alone unless --host says otherwise, and then it needs a key. docs/serving.md
has the routes and fields. Ctrl-C or SIGTERM finishes what is being answered; twice ends at once.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    import _by_path  # noqa: F401

from runtime.base import process

# Here, because PyTorch reads the environment when it is imported.
process.before_torch()
# ruff: noqa: E402

import importlib.util

from runtime.base import cli
from runtime.interop.release import commit
from runtime.serving.config import ServeConfig
from runtime.serving.served import named_checkpoints

NEEDED = ("starlette", "uvicorn", "h11")


def check_installed() -> None:
    """Raise ImportError, with what to type, if the server's packages are not there."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"serving needs {', '.join(missing)}: pip install {' '.join(NEEDED)}, or "
            'pip install -e ".[serve]" in a checkout'
        )


def main(argv: list[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--ckpt",
        nargs="+",
        metavar="NAME=FILE",
        default=["checkpoints/latest.pt"],
        help="checkpoints to serve, each with a name for `model` (default: the file's)",
    )
    cli.add_fields(parser, ServeConfig)
    args = vars(parser.parse_args(argv))
    checkpoints = named_checkpoints(args.pop("ckpt"))
    config = ServeConfig(**args)
    check_installed()
    # After the check, because it imports the server's packages.
    from runtime.serving.start import serve

    return serve(config, checkpoints, commit())


if __name__ == "__main__":
    cli.run_main(main)
