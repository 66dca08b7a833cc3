"""POST /v1/completions, before the engine: a body becomes an `Asking`."""

from __future__ import annotations

from typing import Any

from runtime.serving.asking import (
    Asking,
    check_choices,
    check_ids,
    check_stops,
    draw_seed,
    jobs_of,
    most_new_tokens,
    stream_usage,
)
from runtime.serving.errors import refused, told
from runtime.serving.fields import CompletionFields, parse, without
from runtime.serving.served import Served

# As OpenAI's.
DEFAULT_TOKENS = 16


def ask_completion(body: dict[str, Any], served: Served) -> Asking:
    """Return what a body asks for. Raise ApiError that names the field which is wrong."""
    fields, unknown = parse(CompletionFields, without(_best_of(body), "prompt", "stream_options"))
    prompts = prompts_of(body.get("prompt"), served)
    check_stops(served, fields.stop)
    check_choices(served, len(prompts), fields.n)
    when_full = fields.when_full or served.limits.defaults["when_full"]
    most = [
        most_new_tokens(served, ids, fields.max_tokens, DEFAULT_TOKENS, when_full)
        for ids, _ in prompts
    ]
    seed = draw_seed(fields.seed)
    jobs = jobs_of(
        served,
        fields,
        prompts,
        most,
        seed,
        logprobs=fields.logprobs,
        prompt_logprobs=fields.echo and (fields.logprobs is not None or fields.experts),
    )
    return Asking(
        kind="text",
        jobs=jobs,
        num_per_prompt=fields.n,
        seed=seed,
        stops=fields.stop,
        stream=fields.stream,
        include_usage=stream_usage(body, fields.stream),
        echo=fields.echo,
        top=fields.logprobs,
        experts=fields.experts,
        token_ids=fields.return_token_ids,
        unknown=tuple(unknown),
    )


def _best_of(body: dict[str, Any]) -> dict[str, Any]:
    """Return the body without a best_of that equals n: all answers are returned then, too."""
    n = body.get("n")
    is_same = not isinstance(n, bool) and n is not None and body.get("best_of") == n
    return without(body, "best_of") if is_same else body


def prompts_of(prompt: Any, served: Served) -> list[tuple[tuple[int, ...], int]]:
    """Return (ids, ids that the client did not send) for each prompt. Raise ApiError.

    A text starts a document, as in predict.py. Ids are read as they are.
    """
    if isinstance(prompt, str):
        return [_of_text(prompt, served)]
    if not isinstance(prompt, list) or not prompt:
        raise refused(
            "prompt",
            "prompt must be a text, token ids, or a list of either, not "
            + ("absent" if prompt is None else told(prompt)),
        )
    if all(isinstance(one, str) for one in prompt):
        check_choices(served, len(prompt), 1)
        return [_of_text(one, served) for one in prompt]
    if all(isinstance(one, list) for one in prompt):
        check_choices(served, len(prompt), 1)
        return [_of_ids(one, served) for one in prompt]
    return [_of_ids(prompt, served)]


def _of_text(text: str, served: Served) -> tuple[tuple[int, ...], int]:
    try:
        ids = served.rendering.text_ids(text)
    except ValueError as error:
        raise refused("prompt", str(error)) from None
    # An empty prompt is its start token alone.
    hidden = served.tokenizer.start_id is not None or not text
    return check_ids(served, ids, "prompt"), int(hidden)


def _of_ids(ids: list, served: Served) -> tuple[tuple[int, ...], int]:
    if not ids:
        raise refused("prompt", "prompt holds an empty list of token ids: give at least one")
    return check_ids(served, ids, "prompt"), 0
