"""Guarantees about what is typed at the prompt, the sampler's settings and the context's limit."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch

from config_model import PredictConfig
from runtime.checks.rounding import logits_bound, size_of
from runtime.inference import predictor as predictor_module
from runtime.inference import session
from runtime.inference.decoder import generate
from runtime.inference.predictor import Predictor
from runtime.inference.session import repl
from tests import builders_inference
from tests.promises import Promise, Tally
from tests.promises.common import FIRST_SEED, attempt, folder, one_line


@contextlib.contextmanager
def _small_predictor(**settings) -> Iterator[tuple[Predictor, PredictConfig, Path]]:
    """The smallest of models, ready to answer, in a folder that is the current one."""
    with folder() as at, contextlib.chdir(at):
        model = builders_inference.biased_model(
            transformer_blocks=1,
            d_model=8,
            num_heads=1,
            num_kv_heads=1,
            num_experts=2,
            top_k=1,
            d_ff=4,
            context_length=8,
        )
        yield (
            *builders_inference.predictor_of(
                builders_inference.save(at / "ckpt", model), **settings
            ),
            at,
        )


def repl_lines(count: int) -> Tally:
    """Lines at the prompt, in sessions of 500.

    Each is answered, leaves valid settings, and the session continues.
    """
    tally, typed, answers = Tally(), [], [0]
    with _small_predictor(max_new_tokens=2) as (predictor, config, _):
        r = random.Random(FIRST_SEED + count)

        class Session(session.Session):
            def line(self, line: str) -> bool:
                typed.append(line)
                try:
                    goes_on = super().line(line)
                except (
                    ValueError,
                    RuntimeError,
                ) as error:
                    # It would be told in a line, but there is no need for one.
                    raise AssertionError(f"{type(error).__name__}: {error}") from error
                # Checks every field again.
                dataclasses.replace(self.config)
                assert goes_on, "the session ended"
                answers[0] += bool(line.strip()) and not line.startswith(":")
                return True

        def fake_input(prompt: str = "") -> str:
            if left[0] == 0:
                raise EOFError
            left[0] -= 1
            while (
                line := builders_inference.fuzz_line(r).replace("\n", " ").replace("\r", " ")
            ).split() == [":q"]:
                pass
            return line

        # As run_main sets them up.
        patches = [
            mock.patch("builtins.input", fake_input),
            mock.patch.object(session, "Session", Session),
            mock.patch.object(
                predictor_module, "generate", lambda *a, **k: itertools.islice(generate(*a, **k), 2)
            ),
            mock.patch.object(
                sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="replace")
            ),
            mock.patch.object(sys, "stderr", io.StringIO()),
        ]
        with contextlib.ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch)
            while len(typed) < count:
                left, first = [min(500, count - len(typed))], len(typed)
                try:
                    repl(predictor, config)
                    tally.tried, tally.held = (
                        tally.tried + len(typed) - first,
                        tally.held + len(typed) - first,
                    )
                except Exception as error:
                    # It ends the session; the lines before it were answered.
                    tally.tried, tally.held = (
                        tally.tried + len(typed) - first,
                        tally.held + len(typed) - first - 1,
                    )
                    tally.failures.append(
                        f"line {len(typed)}, {typed[-1]!r:.200}: {type(error).__name__}: {error}"
                    )
                sys.stdout.seek(0)
                sys.stdout.truncate()
    tally.detail = {"prompts answered": answers[0]}
    return tally


def sampler_settings(count: int) -> Tally:
    """Random settings of how tokens are drawn: rejected in a line, or two tokens are drawn."""
    tally, refused = Tally(), [0]
    with _small_predictor(max_new_tokens=2) as (predictor, config, _):
        for i in range(count):
            r = random.Random(FIRST_SEED + i)
            settings = dict(
                temperature=r.choice(
                    [0.0, 1.0, 5e-324, 10 ** r.uniform(-45, 30), 10 ** r.uniform(-2, 2)]
                ),
                top_k=r.choice([0, 1, 2, 259, 260, 261, 10**9, 10**30, r.randrange(300)]),
                top_p=r.choice([1.0, 1.0, 1e-9, 10 ** r.uniform(-9, 0)]),
                min_p=r.choice([0.0] * 4 + [1.0, 1e-9, 5e-324, r.random()]),
                repetition_penalty=r.choice([1.0] * 4 + [1e-3, 1e3, 10 ** r.uniform(-3, 3)]),
                seed=r.choice([-1, 0, 2**63 - 1, r.randrange(2**63)]),
                stop=r.choice([()] * 4 + [("a",), ("",), ("\x00", "é")]),
                lookup=r.choice([0, 0, 1, 64]),
                when_full=r.choice(["slide", "stop"]),
            )
            if r.random() < 0.4:
                odd = r.choice(
                    [
                        "temperature",
                        "top_k",
                        "top_p",
                        "min_p",
                        "repetition_penalty",
                        "seed",
                        "lookup",
                    ]
                )
                settings[odd] = r.choice(
                    [
                        -1,
                        -2,
                        -5,
                        -1.0,
                        0,
                        0.0,
                        0.5,
                        2.0,
                        float("nan"),
                        float("inf"),
                        5e-324,
                        1e39,
                        1e308,
                        2**63,
                        65,
                        True,
                        None,
                        "1",
                        "",
                        (1,),
                    ]
                )

            def check(settings=settings):
                try:
                    changed = dataclasses.replace(config, **settings)
                except ValueError as error:
                    refused[0] += 1
                    return one_line(error)
                # end-of-text may come first.
                assert len(list(predictor.stream("a", changed))) in (
                    1,
                    2,
                    3,
                )

            attempt(tally, f"case {i}, {settings}", check)
    tally.detail = {"refused": refused[0]}
    return tally


def context_policy(count: int) -> Tally:
    """Prompts of context - 1, context, context + 1 and 10 contexts, each with one token to draw.

    Many with stop, many with slide; a model with a learned attention bias comes after one without.
    Held: as many tokens, told in as many words, and the answer begins as the model without a cache
    says.
    """
    tally, C = Tally(), builders_inference.CONTEXT
    cases = [
        (table, num_prompt, policy)
        for table in (False, True)
        for num_prompt in (C - 1, C, C + 1, 10 * C)
        for policy in ("truncate", "stop", "slide")
    ]
    with folder() as at:
        predictors = {}
        for table, num_prompt, policy in cases[:count]:
            if table not in predictors:
                model = builders_inference.biased_model(
                    use_attention_bias=table,
                    biases={builders_inference.END: -1e4},
                    transformer_blocks=1,
                )
                predictors[table] = builders_inference.predictor_of(
                    builders_inference.save(at / str(table), model), temperature=0.0
                )

            def check(table=table, num_prompt=num_prompt, policy=policy):
                predictor, config = predictors[table]
                config = dataclasses.replace(
                    config,
                    max_new_tokens=1 if policy == "truncate" else 3 * C,
                    when_full="stop" if policy == "stop" else "slide",
                )
                # After an end-of-text token.
                prompt, notes = (
                    ("abcdefghij" * 40)[: num_prompt - 1],
                    [],
                )
                text = "".join(predictor.stream(prompt, config, notes.append))
                room = C - min(num_prompt, C) + 1
                drawn = predictor.last.ids
                assert len(drawn) == {"truncate": 1, "stop": room, "slide": 3 * C}[policy], (
                    f"{len(drawn)} tokens"
                )
                assert (
                    predictor.last.ended
                    == {"truncate": "length", "stop": "context", "slide": "length"}[policy]
                ), predictor.last.ended
                cut = (
                    f"the prompt has {num_prompt} tokens and the context {C}: reading its last {C}"
                )
                fills = (
                    f"prompt and answer may fill the context of {C} tokens: "
                    f"{'the answer ends there' if policy == 'stop' else 'older text is forgotten'} "
                    "if they do"
                )
                assert notes == [cut] * (num_prompt > C) + [fills] * (policy != "truncate"), notes
                window = ([builders_inference.END] + list(prompt.encode()))[-C:]
                for token in drawn:
                    window = window[-(C // 2) :] if len(window) > C else window
                    with torch.no_grad():
                        logits = predictor.model(torch.tensor([window])).logits[0, -1].clone()
                    logits[predictor.banned_ids] = -math.inf
                    # Of two that tie, rounding may put either first.
                    gap = logits.max() - logits[token]
                    tie = logits_bound(predictor.model.config, C) * size_of(
                        logits[logits.isfinite()]
                    )
                    assert gap <= tie, "not what the model says without a cache"
                    window.append(token)
                assert text == predictor.tokenizer.decode(drawn), "text was lost"

            attempt(
                tally,
                f"{'table' if table else 'no table'}, prompt of {num_prompt}, {policy}",
                check,
            )
    return tally


PROMISES: list[Promise] = [
    Promise(
        22,
        "No line typed at the prompt ends a session or leaves it with settings that are not valid",
        repl_lines,
        1000,
        10_000,
        10_000,
        "4 of 9 kinds of lines end the session",
    ),
    Promise(
        22,
        "No sampler setting fails: it draws, or is refused in a line",
        sampler_settings,
        1000,
        10_000,
        10_000,
        "temperature 0, nan and a large top_k are tracebacks",
    ),
    Promise(
        24,
        "The context's limit is a policy: cut, stop or slide, always with the text so far",
        context_policy,
        24,
        24,
        24,
        "3 of 4 end the program",
    ),
]
