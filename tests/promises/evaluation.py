"""Guarantees about scripts.evaluate: intervals, exact zeros, equal bytes, known answers."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from config_model import ModelConfig
from runtime.base.cli import error_line, exit_code
from runtime.evaluation.bootstrap import FEWEST_DOCUMENTS, difference_intervals, ratio_intervals
from runtime.evaluation.calibration import calibration_intervals
from runtime.evaluation.compared import paired_difference
from runtime.evaluation.copied import RUN_WORDS, CopySearch
from runtime.evaluation.experts import ExpertChoices, experts_section
from runtime.evaluation.sentences import words
from runtime.evaluation.story_measures import repeated
from runtime.evaluation.text_sums import CONFIDENCE_BINS
from runtime.evaluation.writing import as_json
from runtime.inference import scorer as scorer_module
from scripts import evaluate as command
from tests.builders import random_config, random_model
from tests.builders_evaluation import (
    byte_model,
    checkpoint,
    report_of,
    texts,
    uniform_model,
    write_texts,
)
from tests.promises import Promise, Tally
from tests.promises.common import FIRST_SEED, attempt, folder, one_line

# ------------------------------------------------------------------------------------ coverage
COVERAGE, MOST_OFF = 0.95, 0.02
# Documents of the sets that are made up.
SIZES = (12, 30, 100)
TRUE_RATE, TRUE_DIFFERENCE, TRUE_GAIN, TRUE_RARE_GAIN = 0.8, -0.02, 0.1, 0.02
# Of a document whose calibration is measured.
TOKENS = 50


def _bits(D: int, r: np.random.Generator, seed: int) -> bool:
    """Bits per byte, of documents whose lengths and rates vary."""
    sizes_D1 = r.lognormal(6.0, 0.5, (D, 1))
    bits_D1 = sizes_D1 * (TRUE_RATE + 0.15 * r.standard_normal((D, 1)))
    (one,) = ratio_intervals(bits_D1, sizes_D1, 400, seed)
    return one.low <= TRUE_RATE <= one.high


def _paired(D: int, r: np.random.Generator, seed: int) -> bool:
    """The difference of two models, whose bits of one document are alike."""
    sizes_D1 = r.lognormal(6.0, 0.5, (D, 1))
    bits_D1 = sizes_D1 * (TRUE_RATE + 0.15 * r.standard_normal((D, 1)))
    other_D1 = bits_D1 - sizes_D1 * (TRUE_DIFFERENCE + 0.01 * r.standard_normal((D, 1)))
    (one,) = difference_intervals(bits_D1, sizes_D1, other_D1, sizes_D1, 400, seed)
    return one.low <= TRUE_DIFFERENCE <= one.high


def _answers(D: int, r: np.random.Generator, seed: int) -> bool:
    """The difference of two accuracies, on 5 D questions of which the models share most answers."""
    drawn_Q = r.random(5 * D)
    # Of all questions: 45 % both, 25 % the first alone, 15 % the second alone.
    mine_Q, other_Q = drawn_Q < 0.70, (drawn_Q < 0.45) | (drawn_Q > 0.85)
    one = paired_difference(mine_Q.astype(float), other_Q.astype(float))
    # Ends are rounded.
    return one.low - 1e-9 <= TRUE_GAIN <= one.high + 1e-9


def _rarely(D: int, r: np.random.Generator, seed: int) -> bool:
    """The same on D questions, of which the first model alone is right on 2 %, and no other."""
    drawn_Q = r.random(D)
    one = paired_difference((drawn_Q < 0.52).astype(float), (drawn_Q < 0.50).astype(float))
    return one.low <= TRUE_RARE_GAIN <= one.high


def _calibrated(D: int, r: np.random.Generator, seed: int) -> bool:
    """The calibration error of a model that is as often right as it is sure: 0."""
    sure = r.uniform(0.05, 0.95, D * TOKENS)
    right = r.random(D * TOKENS) < sure
    bins = np.arange(D * TOKENS) // TOKENS * CONFIDENCE_BINS + (sure * CONFIDENCE_BINS).astype(int)
    size = D * CONFIDENCE_BINS
    sums = [np.bincount(bins, w, size).reshape(D, -1) for w in (sure, right, np.ones(len(sure)))]
    error, _ = calibration_intervals(np.concatenate(sums, axis=1), 400, seed)
    return error.low == 0.0 <= error.high


# Share of sets that hold the true value: at least, and at most, of each kind. An interval from 0
# holds whatever is above it, and few questions give few different intervals: those hold it in more.
KINDS: dict[Callable[[int, np.random.Generator, int], bool], tuple[float, float]] = {
    _bits: (COVERAGE - MOST_OFF, COVERAGE + MOST_OFF),
    _paired: (COVERAGE - MOST_OFF, COVERAGE + MOST_OFF),
    _answers: (COVERAGE - MOST_OFF, COVERAGE + MOST_OFF),
    _rarely: (COVERAGE - MOST_OFF, 1.0),
    _calibrated: (COVERAGE - MOST_OFF, 1.0),
}


def coverage(count: int) -> Tally:
    """Count how many of `count` made-up sets have the true value in their interval.

    Held: 93 to 97 % of 1,000, or at least 93 % of the two kinds whose intervals are wider than they
    need to be; of fewer, within 3.5 standard deviations of such a count.
    """
    tally, shares = Tally(), []
    more = max(0.0, 3.5 * math.sqrt(COVERAGE * (1 - COVERAGE) / count) - MOST_OFF)
    for kind, (least, most) in KINDS.items():
        for D in SIZES:
            r = np.random.default_rng(FIRST_SEED + D)
            shares.append(sum(kind(D, r, seed) for seed in range(count)) / count)
            what = f"{kind.__name__} of {D} documents: {shares[-1]:.3f}"
            tally.add(least - more <= shares[-1] <= most + more, what)
    tally.detail = {
        "sets each": count,
        "lowest": f"{100 * min(shares):.1f} %",
        "highest": f"{100 * max(shares):.1f} %",
    }
    return tally


# ------------------------------------------------------------------------------------ itself
def _tasks(path: Path, some: list[str]) -> str:
    """Write questions of four answers, one to each text."""
    rows = [
        {"query": text[:20], "choices": [f"{text[20:30]}{end}" for end in "abcd"], "gold": i % 4}
        for i, text in enumerate(some)
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(path)


def _config(seed: int) -> ModelConfig:
    """Return a random model of bytes whose context holds the questions."""
    return dataclasses.replace(random_config(seed), vocabulary_size=260, context_length=64)


def _is_zero(against: dict) -> None:
    """Hold that every difference is exactly 0, from 0 to 0; few questions have no interval."""
    made, own = against["tasks"]["files"], against["tasks"]["own"]
    assert len(made) == 4 and own, "no task was compared"
    for one in (against, *made.values(), *own.values()):
        found = (one["difference"], one["low"], one["high"])
        is_few = one.get("questions", FEWEST_DOCUMENTS) < FEWEST_DOCUMENTS
        assert found == ((0.0, None, None) if is_few else (0.0, 0.0, 0.0)), f"{one}"


def _itself(at: Path, seed: int) -> None:
    some = texts(30, seed)
    ckpt = checkpoint(at / "m", random_model(_config(seed), seed))
    files = write_texts(at / "valid.jsonl", some)
    tasks = _tasks(at / "made.jsonl", some)
    report = report_of(ckpt, files, against=ckpt, tasks=(tasks,), own_tasks=True)
    _is_zero(report["against"])


def against_itself(count: int) -> Tally:
    """Compare `count` random models with themselves, on texts and on tasks."""
    tally = Tally()
    for seed in range(FIRST_SEED, FIRST_SEED + count):
        with folder() as at:
            attempt(tally, f"seed {seed}", functools.partial(_itself, at, seed))
    return tally


# ------------------------------------------------------------------------------------ equal bytes
@contextlib.contextmanager
def _threads_kept() -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _same_bytes(at: Path, seed: int) -> None:
    """Hold that a report does not depend on batches, threads and the order of documents."""
    r = random.Random(seed)
    context = r.choice([16, 24, 48])
    model = byte_model(
        seed,
        context_length=context,
        sliding_window=r.choice([0, 3, 8]),
        transformer_blocks=r.choice([1, 2]),
        attention_sinks=r.random() < 0.3,
    )
    some = texts(30, seed, longest=r.choice([5, 12]))
    # Many documents that begin alike.
    some += [some[0] + text for text in some[:5]]
    settings = dict(
        experts=r.random() < 0.5,
        quantize=r.choice(["none", "none", "int8"]),
        stride=r.choice([0, 1, 5, context]),
        own_tasks=context == 48,
    )
    ckpt, path = checkpoint(at / "m", model), at / "valid.jsonl"
    first = report_of(ckpt, write_texts(path, some), **settings)
    assert first["checkpoint"]["computed_by"]["is_exact"], "the C kernel does not score"
    for _ in range(2):
        r.shuffle(some)
        changes = dict(
            BUFFER_TOKENS=r.choice([1, 64, 1 << 16]),
            SLOTS=r.choice([1, 3, 32]),
            PASS_ROWS=r.choice([1, 7, 256]),
            LEAST_SHARED=r.choice([1, 8, 10**9]),
        )
        threads = r.choice([1, 2, 3])
        with mock.patch.multiple(scorer_module, **changes):
            again = report_of(ckpt, write_texts(path, some), num_threads=threads, **settings)
        assert as_json(again) == as_json(first), f"{changes}, {threads} threads, {settings}"


def same_bytes(count: int) -> Tally:
    """Write the reports of `count` random models twice again, each time computed otherwise."""
    tally = Tally()
    for seed in range(FIRST_SEED, FIRST_SEED + count):
        with folder() as at, _threads_kept():
            attempt(tally, f"seed {seed}", functools.partial(_same_bytes, at, seed))
    return tally


# ------------------------------------------------------------------------------------ known answers
def _uniform(at: Path, r: random.Random) -> None:
    """Equal logits: ln V nats a token, and a task's accuracy is chance."""
    V, seed = r.choice([259, 260, 300]), r.randrange(10**6)
    some = texts(20, seed)
    ckpt = checkpoint(at / "u", uniform_model(vocabulary_size=V, context_length=64))
    tasks = _tasks(at / "made.jsonl", some)
    report = report_of(ckpt, write_texts(at / "v.jsonl", some), tasks=(tasks,))
    loss = report["text"]["figures"]["loss"]["value"]
    assert math.isclose(loss, math.log(V), rel_tol=1e-6), f"{loss} nats of {V} tokens"
    figures = report["tasks"]["files"]["figures"]
    for name in ("sum", "per_byte", "per_token"):
        assert figures[f"made_{name}"]["value"] == 0.25, f"{name}: {figures[f'made_{name}']}"
        assert figures[f"made_{name}_centered"]["value"] == 0.0


def _word(number: int) -> str:
    """Return a word of letters for each number."""
    return "".join(chr(ord("a") + int(digit)) for digit in str(number)) + "word"


def _fourgrams(at: Path, r: random.Random) -> None:
    """A text of a period: of n - 3 runs of four words, all but the first period's are repeated."""
    period, n = r.randint(4, 30), r.randint(60, 200)
    text = " ".join(_word(i % period) for i in range(n))
    found = repeated(words(text))
    assert found == (n - 3 - period, n - 3), f"{found} of period {period}, {n} words"


def _copied(at: Path, r: random.Random) -> None:
    """A run of known length, copied from the training text into words that it lacks."""
    run, n = r.randint(RUN_WORDS, 60), r.randint(80, 300)
    training = [f"old{_word(r.randrange(10**9))}" for _ in range(n)]
    start, at_word = r.randrange(n - run), r.randint(0, 40)
    text = [f"new{_word(i)}" for i in range(50)]
    text[at_word:at_word] = training[start : start + run]
    search = CopySearch([" ".join(text), "nothing of it is in the training text at all"])
    search.read([" ".join(training[: n // 2]), " ".join(training)])
    found = search.longest.tolist(), search.num_copied.tolist(), search.num_runs[0]
    assert found == ([run, 0], [run - RUN_WORDS + 1, 0], len(text) - RUN_WORDS + 1), f"{found}"


def _independent(at: Path, r: random.Random) -> None:
    """An expert that depends on nothing has the shuffled value: the difference is noise.

    Its standard deviation is about sqrt(2 x 2 (A - 1) (B - 1)) / (2 N ln 2) bits, for A experts and
    B values (the counted information is half a chi-square over N, in nats).
    """
    generator, E, values = np.random.default_rng(r.randrange(10**9)), 8, 50
    choices = ExpertChoices(E)
    for d in range(100):
        ids_T = generator.integers(values, size=101)
        choices.add(d, ids_T, generator.integers(E, size=(1, 101, 1)))
    section = experts_section(choices, np.arange(values) % 5)
    rows = {row[1]: row for row in section["rows"]["rows"]}
    N = 100 * 100
    for name, count in (("token", values), ("previous token", values), ("class", 5)):
        bound = 5 * math.sqrt(4 * (E - 1) * (count - 1)) / (2 * N * math.log(2))
        value, measured, shuffled = (rows[name][i] for i in (2, 5, 6))
        assert abs(value) <= bound, f"{name}: {value} bits, at most {bound}"
        # The value by chance is no small one: it would be taken for information.
        assert measured > 0 and shuffled > 0


KNOWN: tuple[Callable[[Path, random.Random], None], ...] = (
    _uniform,
    _fourgrams,
    _copied,
    _independent,
)


def known_answers(count: int) -> Tally:
    """Measure what was made so that the answer is known, in `count` ways."""
    tally = Tally()
    for i in range(count):
        kind, r = KNOWN[i % len(KNOWN)], random.Random(FIRST_SEED + i)
        with folder() as at:
            attempt(tally, f"{kind.__name__} {i}", functools.partial(kind, at, r))
    return tally


# ------------------------------------------------------------------------------------ hostile tasks
ROWS: tuple[dict, ...] = (
    {"ctx": "A man sits.", "endings": ["He runs.", "He eats."], "label": 1},
    {
        "question": "What is hot?",
        "choices": {"text": ["ice", "fire"], "label": ["A", "B"]},
        "answerKey": "B",
    },
    {
        "question_stem": "The sun is",
        "choices": {"text": ["cold", "hot"], "label": ["A", "B"]},
        "answerKey": "B",
    },
    {"sentence_good": "The cats run.", "sentence_bad": "The cats runs."},
    {"goal": "Open a can", "sol1": "Use an opener.", "sol2": "Use a spoon.", "label": 0},
    {"sentence": "Tom hit Bob, so _ cried.", "option1": "Tom", "option2": "Bob", "answer": "2"},
    {"question": "2 + 2", "choices": ["3", "4", "5"], "answer": 1},
    {"query": "A dog", "choices": ["barks", "meows"], "gold": 0},
    {"context_options": ["A dog", "A cat"], "continuation": "barks", "gold": 0},
    {"context": "One two", "continuation": "three"},
)
# No form has a question in these lines.
LINES = (
    b"{",
    b"null",
    b"7",
    b'"text"',
    b"[1, 2]",
    b"{}",
    b'{"a": 1}',
    b'{"query": "A dog", "choices": ["barks"',
    b"[" * 5_000,
    b'{"query": ' + b"[" * 5_000 + b"]" * 5_000 + b', "choices": ["a", "b"], "gold": 0}',
    b'{"query": "a", "choices": ["a", "b"], "gold": ' + b"9" * 5_000 + b"}",
    b'{"query": "a", "choices": ["a", "b"], "gold": NaN}',
)
# No key that a form needs can have one of these values; -1 and "" are known from test splits.
VALUES = (None, True, 1.5, -1, {}, [], [None], [["a"], ["b"]], {"text": [], "label": []}, "", " ")


def _bad_line(row: dict, r: random.Random) -> bytes:
    """Return a line that is no question: none at all, or a row with one bad value or key less."""
    how = r.randrange(3)
    if how == 0:
        return r.choice(LINES)
    key = r.choice(sorted(row))
    changed = {name: value for name, value in row.items() if name != key}
    if how == 1:
        return json.dumps(changed).encode()
    # Contexts may be empty texts.
    fits = [
        v for v in VALUES if not (isinstance(v, str) and key in ("query", "context", "question"))
    ]
    return json.dumps(changed | {key: r.choice(fits)}).encode()


def _refused(at: Path, seed: int) -> None:
    """Hold that a bad line among good ones ends the command with its file and its number."""
    r = random.Random(seed)
    row = ROWS[seed % len(ROWS)]
    lines = [json.dumps(row).encode()] * r.randint(1, 20)
    bad, number = _bad_line(row, r), r.randint(2, len(lines) + 1)
    lines.insert(number - 1, bad)
    path = at / f"task{seed}.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    argv = ["--ckpt", str(at / "none.pt"), "--data_dir", str(at / "none"), "--tasks", str(path)]
    try:
        command.main(argv)
    except ValueError as error:
        assert exit_code(error) == 2
        assert "\n" not in error_line(error)
        try:
            one_line(error, str(path), f"line {number}")
        except AssertionError as wrong:
            raise AssertionError(f"{bad[:80]!r} in line {number}: {wrong}") from error
    else:
        raise AssertionError(f"{bad[:80]!r} was taken for a question")


def hostile_tasks(count: int) -> Tally:
    """Put a line that is no question into `count` task files."""
    tally = Tally()
    with folder() as at:
        for seed in range(FIRST_SEED, FIRST_SEED + count):
            attempt(tally, f"seed {seed}", lambda seed=seed: _refused(at, seed))  # type: ignore
    return tally


PROMISES: list[Promise] = [
    Promise(
        72,
        "A 95 % interval of an evaluation holds the true value in at least 93 % of made-up sets, "
        "most kinds in at most 97 %",
        coverage,
        200,
        1000,
        1000,
    ),
    Promise(
        73,
        "A model compared with itself: exactly 0, from 0 to 0, on texts and on tasks",
        against_itself,
        3,
        25,
        100,
    ),
    Promise(
        74,
        "The report of an evaluation is the same bytes in any batch, on any threads, in any order",
        same_bytes,
        3,
        25,
        100,
    ),
    Promise(
        75,
        "What has a known answer gets it: equal logits, repeated runs, copies, experts of chance",
        known_answers,
        8,
        80,
        200,
    ),
    Promise(
        76,
        "A task file with a line that is no question: one line with file and line number, exit 2",
        hostile_tasks,
        60,
        1000,
        1000,
    ),
]
