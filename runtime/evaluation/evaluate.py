"""Judge a checkpoint: read the texts, ask for every part, and return one report.

The report is a function of the checkpoints, the texts and the settings in it. How documents are
batched, on how many threads and in which order the files have them changes none of its bytes where
the C kernel scores; where it does not, `computed_by` says so.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from runtime.checks.known import counts
from runtime.data.tokenizer import without_surrogates
from runtime.evaluation.choice_formats import Task
from runtime.evaluation.choices import Result, check_task, choices_section, score_task
from runtime.evaluation.config import EvaluateConfig
from runtime.evaluation.documents import Documents, whole_documents
from runtime.evaluation.encoded import token_classes
from runtime.evaluation.expert_off import expert_off_section
from runtime.evaluation.experts import (
    ExpertChoices,
    Overlap,
    experts_section,
    together_section,
)
from runtime.evaluation.held_out import encoded, read_documents
from runtime.evaluation.inputs import Asked, Chat, read_inputs, tokenizer_name
from runtime.evaluation.lm_eval import Reader, evaluate_lm_eval
from runtime.evaluation.own_tasks import own_tasks
from runtime.evaluation.parts import NAMES, against_parts, check_requirements, text_parts
from runtime.evaluation.report import Section
from runtime.evaluation.stories import Writer, evaluate_stories
from runtime.evaluation.text_sums import Sums
from runtime.evaluation.writing import FORMAT, VERSION
from runtime.inference.predictor import Predictor
from runtime.inference.scorer import Scorer

# Called with a line about what is being done.
Say = Callable[[str], object]


@dataclass
class Found:
    """What was found of one checkpoint. The model itself is gone: two need not fit in memory."""

    about: dict
    # Of the weights, whatever was asked for.
    dtype: str
    sums: Sums | None = None
    choices: ExpertChoices | None = None
    tasks: dict[str, Section] = field(default_factory=dict)
    # Of the tasks whose questions another checkpoint is asked, too.
    results: dict[str, list[Result]] = field(default_factory=dict)
    experts: dict[str, Section] = field(default_factory=dict)
    chat: dict[str, Section] = field(default_factory=dict)
    stories: Section | None = None


def judge(
    config: EvaluateConfig, ckpt: str, asked: Asked, say: Say, is_other: bool = False
) -> Found:
    """Load a checkpoint and return what is found of it. is_other: only what two are compared by."""
    predictor = Predictor(config.predict(ckpt, tokenizer_name(config, ckpt)))
    documents, tokenizer = asked.documents, predictor.tokenizer
    for task in asked.tasks:
        check_task(tokenizer, task, predictor.model.config.context_length, bool(config.against))
    scorer = Scorer(predictor.decoder, config.experts and documents is not None, config.stride)
    dtype = str(predictor.model.embed.weight.dtype).removeprefix("torch.")
    found, read = Found(_about(predictor, scorer), dtype), None
    if asked.chat is not None and not is_other:
        say(f"{ckpt}: answering exercises")
        found.chat = asked.chat(predictor)
    if documents is not None:
        read = encoded(documents, tokenizer)
        say(f"{ckpt}: {len(read.ids):,} documents, {read.num_tokens:,} tokens; {scorer.line}")
        if config.experts:
            found.choices = ExpertChoices(predictor.model.config.num_experts)
        found.sums = read_documents(scorer, read, found.choices, "documents")
    plain = Scorer(predictor.decoder, stride=config.stride)
    _answer(config, predictor, plain, asked, found, say)
    if is_other:
        return found
    if asked.lm_eval is not None:
        say(f"lm-eval: {config.lm_eval}")
        reader = Reader(plain, predictor.tokenizer, predictor.banned_ids)
        found.tasks["lm_eval"] = evaluate_lm_eval(reader, asked.lm_eval, config.questions)
    if config.stories and documents is not None:
        say(f"continuing {config.stories:,} stories")
        writer = Writer(predictor.decoder, predictor.tokenizer, predictor.banned_ids)
        training = None if asked.training is None else whole_documents(asked.training)
        found.stories = evaluate_stories(
            plain, writer, documents.texts, config.stories, training, config.resamples
        )
    if found.choices is not None:
        found.experts = _experts(predictor, found.choices)
    if config.expert_off and read is not None:
        say("reading documents without each expert")
        part = read.first_documents(config.expert_off)
        found.experts["off"] = expert_off_section(plain, part, config.resamples)
    return found


def evaluate(
    config: EvaluateConfig,
    say: Say = lambda line: None,
    commit: str = "",
    chat: Chat | None = None,
) -> dict:
    """Return the report. Raise ValueError.

    commit: of the code, if it is known. chat: gives sections of what a chat model answers.
    """
    check_requirements(config)
    asked = read_inputs(config, chat)
    if asked.documents is not None and not asked.documents.are_all:
        say(f"only the first {config.documents:,} documents are read; --documents 0 reads all")
    found = judge(config, config.ckpt, asked, say)
    report = _head(config, found, asked.documents, commit)
    if found.sums is not None:
        report |= text_parts(found.sums, config.resamples)
    for name in ("tasks", "chat", "stories"):
        if sections := getattr(found, name):
            report[name] = sections
    if config.against:
        other = judge(config, config.against, asked, say, is_other=True)
        report["other_checkpoint"] = other.about
        results = {name: (own, other.results[name]) for name, own in found.results.items()}
        both = found.sums, other.sums
        are_same = _are_same(found.about, other.about)
        report |= against_parts(both, results, config.resamples, are_same)
        found.experts |= _shared(found, other, config.resamples)
    if found.experts:
        report["experts"] = found.experts
    return report


# -------------------------------------------------------------------------------------- parts
def _about(predictor: Predictor, scorer: Scorer) -> dict:
    """Return what a report says of a checkpoint: no path of this machine."""
    origin, c = predictor.origin, predictor.model.config
    size = counts(origin.model_config)
    return {
        "name": without_surrogates(Path(origin.path).name),
        "step": origin.step,
        "parameters": size.total,
        "active_parameters": size.active,
        "context_length": c.context_length,
        "vocabulary_size": c.vocabulary_size,
        "tokenizer": predictor.tokenizer.name,
        "weights_digest": origin.weights_digest,
        "computed_by": {"line": scorer.line, "is_exact": scorer.is_exact},
    }


def _are_same(mine: dict, other: dict) -> bool:
    """Return whether two checkpoints are known to be one model. Old files have no digest."""
    names = ("weights_digest", "tokenizer", "context_length")
    return bool(mine["weights_digest"]) and all(mine[name] == other[name] for name in names)


def _head(config: EvaluateConfig, found: Found, documents: Documents | None, commit: str) -> dict:
    """Return what the figures of a report are of. Nothing here depends on batches or threads."""
    names = ("stride", "resamples", "quantize", "questions", "expert_off")
    return {
        "format": FORMAT,
        "version": VERSION,
        "checkpoint": found.about,
        "data": None if documents is None else documents.about(),
        "settings": {"dtype": found.dtype} | {name: getattr(config, name) for name in names},
        "commit": commit,
        "versions": {"torch": str(torch.__version__), "python": platform.python_version()},
    }


def _answer(
    config: EvaluateConfig,
    predictor: Predictor,
    scorer: Scorer,
    asked: Asked,
    found: Found,
    say: Say,
) -> None:
    """Let a model answer multiple choice, and keep its results and their sections."""
    for name, tasks, notes in _questions(config, asked):
        say(f"answering {', '.join(task.name for task in tasks)}" if tasks else "no questions")
        found.results[name] = [
            score_task(scorer, predictor.tokenizer, task, bool(config.against)) for task in tasks
        ]
        found.tasks[name] = choices_section(found.results[name], NAMES[name])
        for note in notes:
            _add_note(found.tasks[name], note)


def _questions(
    config: EvaluateConfig, asked: Asked
) -> Iterator[tuple[str, Sequence[Task], Sequence[str]]]:
    """Yield (name in NAMES, tasks, notes) of the multiple choice that is asked for."""
    if asked.tasks:
        yield "files", asked.tasks, []
    if config.own_tasks and asked.documents is not None:
        most = {"num_questions": config.questions} if config.questions else {}
        yield "own", *own_tasks(asked.documents.texts, **most)


def _experts(predictor: Predictor, choices: ExpertChoices) -> dict[str, Section]:
    """Return what the experts specialise in, and which are chosen together."""
    if not choices.num_tokens:
        raise ValueError("--experts needs a document of at least two tokens")
    classes = token_classes(predictor.tokenizer, predictor.model.config.vocabulary_size)
    found = {"specialities": experts_section(choices, classes)}
    together = together_section(choices)
    if together is not None:
        return found | {"together": together}
    _add_note(
        found["specialities"],
        "There is no section of pairs of experts: they need at least 2 chosen experts for each "
        "token, and at least 1 that is not chosen.",
    )
    return found


def _add_note(section: Section, note: str) -> None:
    section["notes"] = [*section.get("notes", []), note]


def _shared(found: Found, others: Found, resamples: int) -> dict[str, Section]:
    """Return how many experts two checkpoints share, if their tokens and experts are alike.

    If they are not, a note says so.
    """
    choices, other = found.choices, others.choices
    if choices is None or other is None:
        return {}
    if not choices.is_like(other):
        _add_note(
            found.experts["specialities"],
            "There is no section of shared experts: the two checkpoints differ in their tokens, "
            "or in the number of blocks, experts or chosen experts.",
        )
        return {}
    overlap = Overlap(len(choices.ids), choices.experts[0].shape[0], choices.num_experts)
    pairs = zip(choices.experts, other.experts, strict=True)
    for d, (mine, theirs) in enumerate(pairs):
        overlap.add(d, mine, theirs)
    return {"shared": overlap.section(resamples)}
