"""Read prompts, and print completions and maps of the experts that generated them.

Reading order: `show_completion` streams one completion, `show_completions` prints many. Below them
are the prompts of a file or a pipe, and what the last text's experts were. Generated text goes to
stdout, messages to stderr.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from config_model import PredictConfig
from runtime.base.device import explained_out_of_memory
from runtime.base.files import write_text_atomic
from runtime.base.text import visible
from runtime.data.file_sets import format_of
from runtime.data.formats import looks_like_json_lines, read_json, read_jsonl
from runtime.data.text_files import check_nuls, open_text
from runtime.data.tokenizer import NoTokenizer
from runtime.inference.decoder import router_choices
from runtime.inference.expert_map import html_page, text_map
from runtime.inference.predictor import Completion, Predictor, Prompt

# ANSI codes.
BOLD, DIM = "1", "2"


def show_completion(
    predictor: Predictor, prompt: Prompt, config: PredictConfig, ids: list[int] | None = None
) -> None:
    """Stream one completion to stdout, a text's prompt first, and messages to stderr.

    ids: what the model is to continue, if that is more than the prompt.
    """
    read = predictor.prompt_ids(prompt) if isinstance(prompt, list) else prompt
    terminal = sys.stdout.isatty()

    def show(text: str, style: str = "") -> None:
        text = visible(text) if terminal else text
        print(styled(text, style, sys.stdout) if text else "", end="", flush=True)

    def note(line: str) -> None:
        if not config.quiet:
            print(f"note: {line}", file=sys.stderr, flush=True)

    stream = predictor.stream(read if ids is None else ids, config, note)
    if not config.json:
        show(_beginning(predictor, prompt), BOLD)
    try:
        with explained_out_of_memory(
            predictor.device, "lower --context_length or use --dtype bfloat16"
        ):
            for piece in stream:
                if not config.json:
                    show(piece)
    except KeyboardInterrupt:
        # What was generated until then is printed too.
        if config.json:
            print_json(predictor, prompt, predictor.last, config, config.seed)
        raise
    finally:
        if not config.json:
            print(flush=True)

    if not config.json and predictor.last and (line := why_nothing_shows(predictor.last)):
        note(line)
    if config.json:
        print_json(predictor, prompt, predictor.last, config, config.seed)
    elif predictor.last and (rate := predictor.last.tokens_per_sec):
        num_tokens, first_ms = len(predictor.last.ids), 1000 * (predictor.last.first_s or 0)
        show_speed(
            f"[{num_tokens} tokens, {rate:.1f} tokens/s, first after {first_ms:.0f} ms]", config
        )
    if config.show_experts and not config.json:
        print(experts_map(predictor))
    if config.experts_html:
        write_experts_page(predictor, config)


def why_nothing_shows(completion: Completion) -> str:
    """Return a line for a completion without a visible character, else an empty string."""
    if completion.text.strip():
        return ""
    kind = "has only blanks" if completion.text else "is empty"
    reasons = {
        "end of text": "the model ended the text",
        "stop text": "a stop text came first",
        "context": "the context is full",
    }
    because = reasons.get(completion.ended, "its new tokens show nothing")
    return f"the answer {kind}: {because}"


def _beginning(predictor: Predictor, prompt: Prompt) -> str:
    """Return what a completion continues: a text's prompt. An answer in a chat stands alone."""
    return prompt if isinstance(prompt, str) and not predictor.chats else ""


def show_completions(
    predictor: Predictor, prompts: Sequence[Prompt], config: PredictConfig
) -> None:
    """Print num_samples completions of each prompt, batch_size at a time, in the prompts' order.

    They are JSON lines, or texts with an empty line between them.
    """
    # All before the first is completed, because a prompt may be refused.
    all_ids = map(predictor.prompt_ids, prompts)
    jobs = [
        (prompt, ids, config.seed if config.seed < 0 else (config.seed + i) % 2**63)
        for prompt, ids in zip(prompts, all_ids, strict=True)
        for i in range(config.num_samples)
    ]
    for first in range(0, len(jobs), config.batch_size):
        batch = jobs[first : first + config.batch_size]
        completions = [Completion(ids) for _, ids, _ in batch]
        started = time.perf_counter()
        shown = 0

        def show(all_of_them: bool, batch=batch, completions=completions, first=first) -> None:
            """Print those that ended, up to the first that did not."""
            nonlocal shown
            while shown < len(completions):
                (prompt, _, seed), completion = batch[shown], completions[shown]
                if completion.ended == "interrupted" and not all_of_them:
                    return
                if config.json:
                    print_json(predictor, prompt, completion, config, seed)
                else:
                    if first + shown:
                        print()
                    text = _beginning(predictor, prompt) + completion.text
                    print((visible(text) if sys.stdout.isatty() else text), flush=True)
                shown += 1

        try:
            with explained_out_of_memory(
                predictor.device, "lower --batch_size or --context_length, or use --dtype bfloat16"
            ):
                for _ in predictor.complete(completions, config, [seed for _, _, seed in batch]):
                    show(False)
        except KeyboardInterrupt:
            show(True)
            raise
        seconds = time.perf_counter() - started
        show(True)
        rate = sum(len(completion.ids) for completion in completions) / seconds
        show_speed(f"[{len(batch)} answers, {rate:.1f} tokens/s together]", config)


def show_speed(line: str, config: PredictConfig) -> None:
    """Print a line about the speed to stderr, on a terminal only."""
    if not config.quiet and sys.stderr.isatty():
        print(styled(line, DIM, sys.stderr), file=sys.stderr)


def print_json(
    predictor: Predictor,
    prompt: Prompt,
    completion: Completion | None,
    config: PredictConfig,
    seed: int,
) -> None:
    """Print one JSON line: the completion, its tokens and its speed.

    Everything outside ASCII is escaped, so that any console can print it.
    """
    assert completion is not None
    record: dict[str, object] = {
        "prompt" if isinstance(prompt, str) else "messages": prompt,
        "text": completion.text,
        "ended": completion.ended,
        "seed": seed,
        "prompt_tokens": len(completion.prompt_ids),
        "new_tokens": len(completion.ids),
        "seconds_to_first_token": completion.first_s,
        "tokens_per_sec": completion.tokens_per_sec,
    }
    if isinstance(predictor.tokenizer, NoTokenizer):
        record["ids"] = completion.ids
    if config.show_experts:
        experts, weights = router_choices(predictor.model, last_text_ids(predictor))
        record |= {"experts": experts.tolist(), "gates": weights.tolist()}
    print(json.dumps(record), flush=True)


def read_piped_prompt() -> str:
    """Return all of stdin without its last line break; what is not UTF-8 is replaced."""
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    return sys.stdin.read().removesuffix("\n").removesuffix("\r")


def read_prompts(path: str) -> list[str]:
    """Return the prompts of a file, one a line; empty lines are skipped.

    JSON lines, and a JSON array, have objects with a "prompt" or a "text". Their name may say so
    (.jsonl, .ndjson, .json), else every line is an object. The file may be a pipe, compressed, and
    in UTF-8, UTF-16 or UTF-32. Raise ValueError, with the line's number, for anything else.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    advice = "save the prompts as UTF-8 text, one a line"
    with open_text(lambda: io.BytesIO(data), path, advice=advice) as file:
        text = file.read()
    check_nuls(text, path)
    kind, lines = format_of(Path(path)), text.split("\n")
    if kind == "json" or (kind != "jsonl" and _is_array_of_objects(text)):
        prompts = [_prompt_of(row, where) for where, row in read_json(io.StringIO(text), path)]
    elif kind == "jsonl" or looks_like_json_lines(lines):
        prompts = [_prompt_of(row, where) for where, row in read_jsonl(lines, path)]
    else:
        prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompt: write one a line")
    return prompts


def _is_array_of_objects(text: str) -> bool:
    if not re.match(r"\s*\[\s*\{", text):
        return False
    try:
        return all(isinstance(row, dict) for row in json.loads(text))
    except (ValueError, RecursionError):
        return False


def _prompt_of(row: object, where: str) -> str:
    """Return the prompt of one object of a prompt file."""
    if isinstance(row, dict):
        prompt = row.get("prompt", row.get("text"))
        if isinstance(prompt, str):
            return prompt
    raise ValueError(f'{where}: not a JSON object with a string as "prompt" or "text"')


def last_text_ids(predictor: Predictor) -> list[int]:
    """Return the ids of the last prompt and completion, as far as the context holds them."""
    last = predictor.last
    assert last is not None
    return (last.prompt_ids + last.ids)[-predictor.model.config.context_length :]


def experts_map(predictor: Predictor) -> str:
    """Return the last text's tokens and their experts as lines for stdout."""
    ids = last_text_ids(predictor)
    return text_map(
        [predictor.tokenizer.decode([i]) for i in ids],
        *router_choices(predictor.model, ids),
        predictor.model.config.num_experts,
        has_colour(sys.stdout),
        shutil.get_terminal_size((100, 24)).columns,
    )


def check_page_path(path: str) -> None:
    """Raise ValueError if the folder of `path`, or the nearest one that exists, is not writable."""
    parents = Path(os.path.abspath(path)).parents
    folder = next(parent for parent in parents if os.path.lexists(parent))
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise ValueError(f"{path} cannot be written: {folder} is no folder that can be written to")


def write_experts_page(predictor: Predictor, config: PredictConfig) -> None:
    """Write the last text's experts to config.experts_html."""
    ids = last_text_ids(predictor)
    assert predictor.last is not None
    num_prompt = max(0, len(ids) - len(predictor.last.ids))
    page = html_page(
        "Which experts a text went to",
        [predictor.tokenizer.decode([i]) for i in ids],
        *router_choices(predictor.model, ids),
        predictor.model.config.num_experts,
        num_prompt,
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


def has_colour(stream) -> bool:
    """Return whether a stream is a terminal that shows colours (https://no-color.org)."""
    return stream.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")


def styled(text: str, style: str, stream) -> str:
    """Return `text` in a style if the stream is a terminal that shows it."""
    return f"\x1b[{style}m{text}\x1b[0m" if style and has_colour(stream) else text
