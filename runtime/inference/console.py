"""Print answers, and maps of the experts at work."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from config_model import PredictConfig
from runtime.base.device import explained_out_of_memory
from runtime.base.files import write_text_atomic
from runtime.base.text import visible
from runtime.inference.decoder import router_choices
from runtime.inference.expert_map import html_page, text_map
from runtime.inference.predictor import Answer, Predictor


def show_answer(
    predictor: Predictor, prompt: str, config: PredictConfig, ids: list[int] | None = None
) -> None:
    """Stream one answer to stdout, prompt first; what is about it, to stderr. ids: what the model is to continue, if that is more than the prompt."""
    terminal = sys.stdout.isatty()

    def show(text: str, style: str = "") -> None:
        text = visible(text) if terminal else text
        print(styled(text, style, sys.stdout) if text else "", end="", flush=True)

    def note(line: str) -> None:
        if not config.quiet:
            print(f"note: {line}", file=sys.stderr, flush=True)

    stream = predictor.stream(prompt if ids is None else ids, config, note)
    if not config.json:
        show(prompt, BOLD)
    try:
        with explained_out_of_memory(
            predictor.device, "lower --context_length or use --dtype bfloat16"
        ):
            for piece in stream:
                if not config.json:
                    show(piece)
    except KeyboardInterrupt:
        if config.json:
            print_json(predictor, prompt, predictor.last, config, config.seed)
        raise
    finally:
        if not config.json:
            print(flush=True)
    if config.json:
        print_json(predictor, prompt, predictor.last, config, config.seed)
    elif (
        not config.quiet
        and sys.stderr.isatty()
        and predictor.last
        and (rate := predictor.last.tokens_per_sec)
    ):
        print(
            styled(
                f"[{len(predictor.last.ids)} tokens, {rate:.1f} tokens/s, first after {1000 * predictor.last.first_s:.0f} ms]",
                DIM,
                sys.stderr,
            ),
            file=sys.stderr,
        )
    if config.show_experts and not config.json:
        print(experts_map(predictor))
    if config.experts_html:
        write_experts_page(predictor, config)


def show_answers(predictor: Predictor, prompts: Sequence[str], config: PredictConfig) -> None:
    """Answers to many prompts, batch_size at a time, in the prompts' order: JSON lines, or texts with an empty line between them."""
    jobs = [
        (prompt, config.seed if config.seed < 0 else (config.seed + i) % 2**63)
        for prompt in prompts
        for i in range(config.num_samples)
    ]
    for first in range(0, len(jobs), config.batch_size):
        batch = jobs[first : first + config.batch_size]
        answers = [Answer(predictor.prompt_ids(prompt)) for prompt, _ in batch]
        started, shown = time.perf_counter(), 0

        def show(all_of_them: bool, batch=batch, answers=answers, first=first) -> None:
            """Those that have ended, as far as all before them have too."""
            nonlocal shown
            while shown < len(answers) and (all_of_them or answers[shown].ended != "interrupted"):
                (prompt, seed), a = batch[shown], answers[shown]
                if config.json:
                    print_json(predictor, prompt, a, config, seed)
                else:
                    text = prompt + a.text
                    print(
                        ("\n" if first + shown else "")
                        + (visible(text) if sys.stdout.isatty() else text),
                        flush=True,
                    )
                shown += 1

        try:
            with explained_out_of_memory(
                predictor.device, "lower --batch_size or --context_length, or use --dtype bfloat16"
            ):
                for _ in predictor.answer(answers, config, [seed for _, seed in batch]):
                    show(False)
        except KeyboardInterrupt:
            show(True)
            raise
        seconds = time.perf_counter() - started
        show(True)
        if not config.quiet and sys.stderr.isatty():
            print(
                styled(
                    f"[{len(batch)} answers, {sum(len(a.ids) for a in answers) / seconds:.1f} tokens/s together]",
                    DIM,
                    sys.stderr,
                ),
                file=sys.stderr,
            )


def print_json(
    predictor: Predictor, prompt: str, a: Answer, config: PredictConfig, seed: int
) -> None:
    """One line: the answer, and what is about it. Everything outside ASCII is escaped, so any console can take it."""
    record = {
        "prompt": prompt,
        "text": a.text,
        "ended": a.ended,
        "seed": seed,
        "prompt_tokens": len(a.prompt_ids),
        "new_tokens": len(a.ids),
        "seconds_to_first_token": a.first_s,
        "tokens_per_sec": a.tokens_per_sec,
    }
    if config.show_experts:
        experts, gates = router_choices(predictor.model, last_text_ids(predictor))
        record |= {"experts": experts.tolist(), "gates": gates.tolist()}
    print(json.dumps(record), flush=True)


def read_prompts(path: str) -> list[str]:
    """The prompts of a file; empty lines are none. ValueError, naming the line, for what is no text or no such JSON."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} cannot be read as UTF-8 text: {getattr(error, 'strerror', None) or error}"
        ) from error
    prompts = []
    for number, line in enumerate(lines, 1):
        if line.strip() and path.endswith(".jsonl"):
            try:
                record = json.loads(line)
                line = record["prompt"] if "prompt" in record else record["text"]
                if not isinstance(line, str):
                    raise TypeError
            except (ValueError, TypeError, KeyError, RecursionError):
                raise ValueError(
                    f'{path}, line {number}: not a JSON object with a string as "prompt" or "text"'
                ) from None
            prompts.append(line)
        elif line.strip():
            prompts.append(line)
    if not prompts:
        raise ValueError(f"{path} holds no prompt: write one a line")
    return prompts


def last_text_ids(predictor: Predictor) -> list[int]:
    """Prompt and answer of the last text, as far as the context holds them."""
    return (predictor.last.prompt_ids + predictor.last.ids)[
        -predictor.model.config.context_length :
    ]


def experts_map(predictor: Predictor) -> str:
    """The last text's tokens and their experts, for stdout."""
    ids = last_text_ids(predictor)
    return text_map(
        [predictor.tokenizer.decode([i]) for i in ids],
        *router_choices(predictor.model, ids),
        predictor.model.config.num_experts,
        has_colour(sys.stdout),
        shutil.get_terminal_size((100, 24)).columns,
    )


def write_experts_page(predictor: Predictor, config: PredictConfig) -> None:
    """Write config.experts_html."""
    ids = last_text_ids(predictor)
    answer = predictor.last
    page = html_page(
        "Which experts a text went to",
        [predictor.tokenizer.decode([i]) for i in ids],
        *router_choices(predictor.model, ids),
        predictor.model.config.num_experts,
        max(0, len(ids) - len(answer.ids)),
        f"{os.path.basename(config.ckpt)}, temperature {config.temperature:g}",
    )
    try:
        write_text_atomic(Path(config.experts_html), page)
    except OSError as error:
        raise ValueError(
            f"{config.experts_html} cannot be written: {error.strerror or error}"
        ) from error
    if not config.quiet:
        print(f"wrote {config.experts_html}", file=sys.stderr)


BOLD, DIM = "1", "2"


def has_colour(stream) -> bool:
    """Whether a stream is a terminal that takes colours (https://no-color.org)."""
    return stream.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")


def styled(text: str, style: str, stream) -> str:
    """`text` in a style, on a terminal that has styles."""
    return f"\x1b[{style}m{text}\x1b[0m" if style and has_colour(stream) else text
