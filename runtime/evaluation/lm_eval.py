"""Let lm-evaluation-harness (lm-eval, an extra) ask a model: its tasks, our scores.

Every request is scored as training reads text: a start token comes before it. Without it, as
lm-eval sends ids to servers, figures differ a little.

Tasks are lm-eval's names, or YAML files of one's own. It downloads what its named tasks need.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from runtime.base.shares import NORMAL_975
from runtime.base.text import UntilText
from runtime.data.tokenizer import Tokenizer, TokenStream
from runtime.evaluation.choices import Request, answers, before_text, fitted
from runtime.evaluation.report import Figure, Section, Table, figure, section
from runtime.inference.decoder import Decoder, generate
from runtime.inference.scorer import Scorer

INSTALL = 'lm-eval is not installed: pip install -e ".[lm-eval]" (about 330 MB with what it needs)'
# Answers that are generated at a time, and their tokens where a task says no limit.
MOST_ROWS = 32
MAX_NEW_TOKENS = 256
# The names of files that hold a task.
TASK_FILES = (".yaml", ".yml")
# Libraries that read tasks: what these raise is a mistake in a task's file.
READERS_OF_TASKS = ("yaml", "jinja2", "datasets")
# What tasks may set of a generated answer.
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
KNOWN = {*SAMPLING, "until", "max_gen_toks", "do_sample"}


# ------------------------------------------------------------------------------ requests
class Reader:
    """A model and its tokenizer, as lm-eval's requests ask them; knows nothing of lm-eval.

    banned_ids: those that are never generated. Raise ValueError for a tokenizer without a token
    that comes before a text.
    """

    def __init__(self, scorer: Scorer, tokenizer: Tokenizer, banned_ids: Sequence[int] = ()):
        self.scorer, self.tokenizer, self.banned_ids = scorer, tokenizer, list(banned_ids)
        self.context = scorer.context
        start = before_text(tokenizer)
        if not start:
            raise ValueError(
                "lm-eval needs a token before a text, and this tokenizer has neither a start token "
                "nor end-of-text"
            )
        self.start = start[0]

    def log_likelihoods(
        self, pairs: Iterable[tuple[Sequence[int], Sequence[int]]], starts: bool = True
    ) -> list[tuple[float, bool]]:
        """Return of each (context ids, continuation ids) the log-probability, and if it is greedy.

        starts: put the start token first where it is not. A text longer than the context is cut
        at its start. An empty continuation is certain.
        """
        requests: list[Request | None] = []
        for context, continuation in pairs:
            before = [*context]
            if starts and before[:1] != [self.start]:
                before.insert(0, self.start)
            whole = [*before, *continuation]
            made = fitted(whole, len(before), self.context)[0] if continuation else None
            requests.append(made)
        given = iter(answers(self.scorer, [one for one in requests if one]))
        found = (next(given) if one else None for one in requests)
        return [(one.log_prob, one.is_greedy) if one else (0.0, True) for one in found]

    def all_generated(self, contexts: Sequence[str], settings: dict[str, Any]) -> list[str]:
        """Return what follows each text, up to a stop text or the end of text.

        settings: as lm-eval normalises them. Of a context that leaves no room, the end is read.
        Raise ValueError for a setting that is not known here.
        """
        if unknown := sorted(settings.keys() - KNOWN):
            raise ValueError(
                f"the task asks to generate with {', '.join(unknown)}, which is not known here "
                f"(known: {', '.join(sorted(KNOWN))})"
            )
        most = min(int(settings.get("max_gen_toks", MAX_NEW_TOKENS)), self.context - 1)
        prompts = []
        for text in contexts:
            ids = [self.start, *self.tokenizer.encode(text)]
            prompts.append(ids[-(self.context - most) :])
        result: list[str] = []
        for at in range(0, len(prompts), MOST_ROWS):
            result += self._generated(prompts[at : at + MOST_ROWS], most, settings)
        return result

    def _generated(
        self, prompts: list[list[int]], most: int, settings: dict[str, Any]
    ) -> list[str]:
        decoder: Decoder = self.scorer.decoder
        texts = decoder.texts(len(prompts), max(map(len, prompts)) + most)
        found = ["" for _ in prompts]
        streams = [TokenStream(self.tokenizer) for _ in prompts]
        untils = [UntilText(tuple(settings.get("until", ()))) for _ in prompts]
        stop_ids, finished, cut = self.tokenizer.all_stop_ids, set[int](), set[int]()
        for step in generate(
            decoder,
            texts,
            prompts,
            most,
            **_sampling(settings),
            stop_ids=stop_ids,
            banned_ids=self.banned_ids,
            generators=[_generator(prompt, decoder.device) for prompt in prompts],
            slide=False,
            finished=finished,
        ):
            for row, token in step:
                if token in stop_ids:
                    continue
                piece, stopped = untils[row].push(streams[row].push(token))
                found[row] += piece
                if stopped:
                    finished.add(row)
                    cut.add(row)
        for row in set(range(len(prompts))) - cut:
            # What waited for the rest of a character, or of a stop text.
            piece, stopped = untils[row].push(streams[row].flush())
            found[row] += piece if stopped else piece + untils[row].held
        return found


def _sampling(settings: dict[str, Any]) -> dict[str, Any]:
    """Return `generate`'s settings: greedy unless the task samples, then all that it says."""
    if not settings.get("do_sample"):
        return {"temperature": 0.0}
    given = {name: settings[name] for name in SAMPLING if settings.get(name) is not None}
    return {"temperature": 1.0, "top_k": 0} | given


def _generator(ids: Sequence[int], device: torch.device) -> torch.Generator:
    """Return a generator that depends on the prompt alone."""
    digest = hashlib.sha256(" ".join(map(str, ids)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


# ------------------------------------------------------------------------------ lm-eval
def library() -> Any:
    """Return lm-eval. Raise ValueError, with what to install, if it is missing."""
    try:
        import lm_eval
        import lm_eval.api.model
        import lm_eval.models.utils
        import lm_eval.tasks
        import lm_eval.utils
    except ImportError as error:
        raise ValueError(INSTALL if error.name == "lm_eval" else f"lm-eval: {error}") from None
    return lm_eval


def model_of(reader: Reader) -> Any:
    """Return lm-eval's model of a reader. Raise ValueError without lm-eval."""
    lm_eval = library()
    base: Any = lm_eval.api.model.TemplateLM

    class Model(base):
        """Answers lm-eval's four kinds of requests."""

        eot_token_id = reader.start
        prefix_token_id = reader.start

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
            return reader.tokenizer.encode(string)

        def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
            return reader.log_likelihoods((before, own) for _, before, own in requests)

        def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
            # As lm-eval cuts windows, so that figures are equal.
            sums = []
            for request in requests:
                windows = lm_eval.utils.get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=reader.start,
                    max_seq_len=reader.context,
                    context_len=1,
                )
                pairs = map(lm_eval.utils.make_disjoint_window, windows)
                sums.append(sum(one for one, _ in reader.log_likelihoods(pairs, starts=False)))
            return sums

        def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
            normalise = lm_eval.models.utils.normalize_gen_kwargs
            settings = [normalise(request.args[1], MAX_NEW_TOKENS) for request in requests]
            return _in_groups(reader, [request.args[0] for request in requests], settings)

    return Model()


def _in_groups(reader: Reader, contexts: list[str], settings: list[dict]) -> list[str]:
    """Return answers in order; those with equal settings are generated together."""
    found = [""] * len(contexts)
    groups: dict[str, list[int]] = {}
    for number, own in enumerate(settings):
        groups.setdefault(repr(sorted(own.items())), []).append(number)
    for numbers in groups.values():
        texts = reader.all_generated([contexts[i] for i in numbers], settings[numbers[0]])
        for number, text in zip(numbers, texts, strict=True):
            found[number] = text
    return found


@dataclass(frozen=True)
class LmTasks:
    """Tasks of lm-eval: as they were named, as it is given them, and what it knows of tasks."""

    names: Sequence[str]
    found: Sequence[str]
    manager: Any


def evaluate_lm_eval(reader: Reader, tasks: LmTasks, limit: int = 0) -> Section:
    """Return the section of lm-eval's tasks. limit: questions of each task, 0 = all.

    Raise ValueError for tasks whose files are wrong.
    """
    lm_eval = library()
    try:
        results = lm_eval.simple_evaluate(
            model=model_of(reader),
            tasks=list(tasks.found),
            task_manager=tasks.manager,
            limit=limit or None,
            log_samples=False,
        )
    except Exception as error:
        of_a_reader = type(error).__module__.partition(".")[0] in READERS_OF_TASKS
        # `datasets` raises it for data that a task names.
        if not (of_a_reader or isinstance(error, FileNotFoundError)):
            raise
        said = " ".join(str(error).split())
        raise ValueError(f"--lm_eval {', '.join(tasks.names)}: {said}") from error
    return _section(results, lm_eval.__version__)


def is_file_name(task: str) -> bool:
    """Return whether a task is named by its file."""
    return task.endswith(TASK_FILES)


def find_tasks(names: Sequence[str]) -> LmTasks:
    """Return the tasks of names, patterns or YAML files.

    Raise ValueError without lm-eval, and for what is neither a task nor a file of one.
    """
    lm_eval = library()
    for name in filter(is_file_name, names):
        _check_file(name)
    # Its own thousands of task files take half a minute to read.
    manager = lm_eval.tasks.TaskManager(include_defaults=not all(map(is_file_name, names)))
    return LmTasks(names, _found(manager, names), manager)


def _check_file(name: str) -> None:
    """Raise ValueError for a file that is missing or is no YAML of a task.

    Nothing in it is run: a tag such as !function names code.
    """
    if not Path(name).is_file():
        raise ValueError(f"--lm_eval: there is no file {name}")
    # lm-eval needs it, and nothing else here does.
    import yaml

    try:
        with open(name, encoding="utf-8") as file:
            root = yaml.compose(file, Loader=yaml.SafeLoader)
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise ValueError(f"--lm_eval {name}: {' '.join(str(error).split())}") from error
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"--lm_eval {name} holds no task: a task is keys and values, as YAML")


def _found(manager: Any, tasks: Sequence[str]) -> list[str]:
    """Return the names and files of tasks. Raise ValueError for a name that is not known."""
    found = []
    for task in tasks:
        if is_file_name(task):
            found.append(str(Path(task).absolute()))
        elif matches := manager.match_tasks([task]):
            found += matches
        else:
            raise ValueError(
                f"--lm_eval: lm-eval has no task {task!r}: `lm-eval ls tasks` lists its tasks, and "
                "a task of your own is a .yaml file"
            )
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Metric:
    """One of lm-eval's figures of a task, and its standard error (None: it has none)."""

    task: str
    name: str
    value: float
    error: float | None
    n: int


def _metrics(results: dict) -> Iterator[Metric]:
    for task, own in results["results"].items():
        n = results["n-samples"].get(task, {}).get("effective", own.get("sample_len", 0))
        for key, value in own.items():
            name, _, kind = key.partition(",")
            if not kind or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = own.get(f"{name}_stderr,{kind}")
            told = name if kind == "none" else f"{name}_{kind}"
            yield Metric(
                task, told, value, error if isinstance(error, int | float) else None, int(n)
            )


def _section(results: dict, version: str) -> Section:
    figures: dict[str, Figure] = {}
    rows: list[list] = []
    for one in _metrics(results):
        half = None if one.error is None else NORMAL_975 * one.error
        low, high = (None, None) if half is None else (one.value - half, one.value + half)
        key = f"{one.task}_{one.name}".replace(".", "_")
        figures[key] = figure(one.value, one.n, low, high)
        rows.append([one.task, one.name, one.value, low, high, one.n])
    columns = ["task", "metric", "value", "low", "high", "n"]
    notes = [f"lm-eval {version}. Intervals are 1.96 of its standard errors to each side."]
    return section("lm-eval", figures, Table(columns=columns, rows=rows), notes=notes)
