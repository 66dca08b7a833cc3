"""Checkpoint -> text.

    python predict.py --prompt "Once upon a time"       one answer, streamed as it is drawn
    python predict.py                                   a prompt to type at (:help says what it understands)
    echo "Once upon a time" | python predict.py         the prompt comes through a pipe
    python predict.py --prompt_file prompts.jsonl --num_samples 4 --json

A prompt begins a document: it is put behind an end-of-text token, as in training (an imported model: behind what its tokenizer puts there). When prompt and answer fill the context,
generation goes on from the newer half of it (--when_full slide) or ends (--when_full stop); a prompt that is longer than
the context is read from its last tokens on. What was printed stays printed. Text goes to stdout, what is about it to stderr.
"""

from __future__ import annotations

from runtime.base import process

process.before_torch()  # here, for PyTorch reads it when it loads
# ruff: noqa: E402

import gc
import os
import sys
from pathlib import Path

from config_model import PredictConfig
from runtime.base import cli
from runtime.inference.console import (
    read_prompts,
    show_answer,
    show_answers,
)
from runtime.inference.predictor import Predictor
from runtime.inference.session import (
    repl,
)


def main(argv: list[str] | None = None) -> int:
    gc.freeze()  # what is imported stays: to look for garbage in it takes a tenth of a second
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--prompt",
        help="text to continue; without it, stdin if that is a pipe, else a prompt to type at",
    )
    cli.add_fields(parser, PredictConfig)
    args = vars(parser.parse_args(argv))
    prompt = args.pop("prompt")
    config = PredictConfig(**args)
    if prompt is not None and config.prompt_file:
        raise ValueError("give either prompt or prompt_file, not both")
    prompts = read_prompts(config.prompt_file) if config.prompt_file else [prompt]
    if config.interactive and prompts != [None]:
        raise ValueError("interactive asks for prompts itself: leave prompt and prompt_file out")
    if prompts == [None] and config.num_samples > 1 and (config.interactive or sys.stdin.isatty()):
        raise ValueError(
            "num_samples is for a prompt or a prompt_file, not for a prompt to type at"
        )
    if (
        config.experts_html
        and (
            folder := next(
                p for p in Path(os.path.abspath(config.experts_html)).parents if os.path.lexists(p)
            )
        )
        and not (folder.is_dir() and os.access(folder, os.W_OK))
    ):
        raise ValueError(
            f"{config.experts_html} cannot be written: {folder} is no folder that can be written to"
        )
    predictor = Predictor(config)
    if prompts == [None] and not config.interactive and not sys.stdin.isatty():
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="replace")
        prompts = [sys.stdin.read().removesuffix("\n").removesuffix("\r")]
    if prompts == [None]:
        repl(predictor, config)
    elif len(prompts) > 1 or config.num_samples > 1 or config.prompt_file:
        show_answers(predictor, prompts, config)
    else:
        show_answer(predictor, prompts[0], config)
    return 0


if __name__ == "__main__":
    cli.run_main(main)
