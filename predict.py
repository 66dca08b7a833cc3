"""Generate text from a checkpoint.

    python predict.py --prompt "Once upon a time"       one completion, streamed
    python predict.py                                   interactive mode (:help lists the commands)
    echo "Once upon a time" | python predict.py         read the prompt from a pipe
    python predict.py --prompt_file prompts.jsonl --num_samples 4 --json
    python predict.py --chat                            talk to a model trained on chats
    python predict.py --messages messages.json          answer the messages of a file

A prompt starts a document, as in training: an end-of-text token is prepended (imported models:
their tokenizer's start token). When prompt and completion fill the context, generation continues
from its newer half (--when_full slide) or ends (--when_full stop). Of a prompt longer than the
context, the last tokens are read. Generated text goes to stdout, messages to stderr.
"""

from __future__ import annotations

from runtime.base import process

# Here, because PyTorch reads the environment when it is imported.
process.before_torch()
# ruff: noqa: E402

import gc
import sys

from config_model import PredictConfig
from runtime.base import cli
from runtime.inference.console import (
    check_page_path,
    read_piped_prompt,
    show_completion,
    show_completions,
)
from runtime.inference.predictor import Predictor
from runtime.inference.requests import requested_prompts
from runtime.inference.session import repl


def main(argv: list[str] | None = None) -> int:
    # Imported modules stay until the end: to search them for garbage takes a tenth of a second.
    gc.freeze()
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--prompt",
        help="text to continue; default: stdin if it is a pipe, else interactive mode",
    )
    cli.add_fields(parser, PredictConfig)
    args = vars(parser.parse_args(argv))
    prompt = args.pop("prompt")
    config = PredictConfig(**args)
    prompts = requested_prompts(prompt, config)
    # Before the model is loaded, which may take minutes.
    if config.experts_html:
        check_page_path(config.experts_html)

    predictor = Predictor(config)
    if prompts is None and not config.interactive and not sys.stdin.isatty():
        prompts = [read_piped_prompt()]

    if prompts is None:
        repl(predictor, config)
    elif len(prompts) > 1 or config.num_samples > 1 or config.prompt_file:
        show_completions(predictor, prompts, config)
    else:
        show_completion(predictor, prompts[0], config)
    return 0


if __name__ == "__main__":
    cli.run_main(main)
