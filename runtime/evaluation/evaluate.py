"""Judge a checkpoint: read the texts, ask for every part, and return one report.

The report is a function of the checkpoints, the texts and the settings in it. How documents are
batched, on how many threads and in which order the files have them changes none of its bytes where
the C kernel scores; where it does not, `computed_by` says so.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from runtime.checkpoint.read import read_config
from runtime.checks.known import counts
from runtime.data.file_sets import find_files
from runtime.data.sources import FileSource
from runtime.evaluation.bits_per_byte import against_section, bits_section
from runtime.evaluation.calibration import calibration_section, loss_section
from runtime.evaluation.choice_formats import Task, read_tasks, spread
from runtime.evaluation.choices import evaluate_choices
from runtime.evaluation.config import EvaluateConfig
from runtime.evaluation.documents import (
    Documents,
    file_documents,
    shard_documents,
    whole_documents,
)
from runtime.evaluation.encoded import token_classes
from runtime.evaluation.expert_off import expert_off_section
from runtime.evaluation.experts import (
    ExpertChoices,
    Overlap,
    experts_section,
    together_section,
)
from runtime.evaluation.held_out import encoded, read_documents
from runtime.evaluation.lm_eval import Reader, evaluate_lm_eval, library
from runtime.evaluation.own_tasks import own_tasks
from runtime.evaluation.report import Section
from runtime.evaluation.stories import Writer, evaluate_stories
from runtime.evaluation.text_sums import Sums
from runtime.evaluation.writing import FORMAT, VERSION
from runtime.inference.predictor import Predictor
from runtime.inference.scorer import Scorer

# Called with a line about what is being done.
Say = Callable[[str], object]
# Gives the sections of what a chat model answers: a script hands it in.
Chat = Callable[[Predictor], dict[str, Section]]


def read_texts(config: EvaluateConfig) -> Documents | None:
    """Return the held-out documents; None if there are none and none are needed."""
    if config.files:
        return file_documents(list(config.files), config.text_column, most=config.documents)
    return shard_documents(config.data_dir, config.documents) if config.has_text else None


@dataclass
class Found:
    """What was found of one checkpoint. The model itself is gone: two need not fit in memory."""

    about: dict
    computed_by: dict
    sums: Sums | None = None
    choices: ExpertChoices | None = None
    tasks: dict[str, Section] = field(default_factory=dict)
    experts: dict[str, Section] = field(default_factory=dict)
    chat: dict[str, Section] = field(default_factory=dict)
    stories: Section | None = None


def judge(
    config: EvaluateConfig,
    ckpt: str,
    documents: Documents | None,
    say: Say,
    tasks: Sequence[Task] | None = None,
    chat: Chat | None = None,
) -> Found:
    """Load a checkpoint and return what the texts say of it. tasks None: nothing but the texts."""
    predictor = Predictor(config.predict(ckpt))
    scorer = Scorer(predictor.decoder, config.experts and documents is not None, config.stride)
    found = Found(_about(predictor), {"line": scorer.line, "is_exact": scorer.is_exact})
    if chat is not None:
        say(f"{ckpt}: answering exercises")
        found.chat = chat(predictor)
    read = None
    if documents is not None:
        read = encoded(documents, predictor.tokenizer)
        say(f"{ckpt}: {len(read.ids):,} documents, {read.num_tokens:,} tokens; {scorer.line}")
        if config.experts:
            found.choices = ExpertChoices(predictor.model.config.num_experts)
        found.sums = read_documents(scorer, read, found.choices)
    if tasks is None:
        return found
    plain = Scorer(predictor.decoder, stride=config.stride)
    found.tasks = _tasks(config, predictor, plain, tasks, documents, say)
    if config.stories and documents is not None:
        say(f"continuing {config.stories:,} stories")
        found.stories = _stories(config, predictor, plain, documents)
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
    # Before the model, which may take minutes.
    if config.lm_eval:
        library()
    if config.against:
        read_config(config.against)
    tasks = read_tasks(list(config.tasks)) if config.tasks else []
    documents = read_texts(config)
    found = judge(config, config.ckpt, documents, say, tasks, chat)
    report = _head(config, found, documents, commit)
    if found.sums is not None:
        report |= _text(found.sums, config.resamples)
    for name in ("tasks", "chat", "stories"):
        if sections := getattr(found, name):
            report[name] = sections
    if config.against:
        other = judge(config, config.against, documents, say)
        assert found.sums is not None and other.sums is not None
        report["other_checkpoint"] = other.about
        comparison = against_section(found.sums, other.sums, config.resamples)
        report |= {"comparison": comparison}
        report["against"] = _named(comparison, "difference", "difference")
        found.experts |= _shared(found.choices, other.choices, config.resamples)
    if found.experts:
        report["experts"] = found.experts
    return report


# -------------------------------------------------------------------------------------- parts
def _about(predictor: Predictor) -> dict:
    """Return what a report says of a checkpoint: no path of this machine."""
    origin, c = predictor.origin, predictor.model.config
    size = counts(origin.model_config)
    return {
        "name": Path(origin.path).name,
        "step": origin.step,
        "parameters": size.total,
        "active_parameters": size.active,
        "context_length": c.context_length,
        "vocabulary_size": c.vocabulary_size,
        "tokenizer": predictor.tokenizer.name,
        "weights_digest": origin.weights_digest,
    }


def _head(config: EvaluateConfig, found: Found, documents: Documents | None, commit: str) -> dict:
    """Return what the figures of a report are of. Nothing here depends on batches or threads."""
    names = ("stride", "resamples", "dtype", "quantize", "questions", "expert_off")
    return {
        "format": FORMAT,
        "version": VERSION,
        "checkpoint": found.about,
        "data": None if documents is None else documents.about(),
        "settings": {name: getattr(config, name) for name in names},
        "computed_by": found.computed_by,
        "commit": commit,
        "versions": {"torch": str(torch.__version__), "python": platform.python_version()},
    }


def _named(section: Section, key: str, name: str = "value") -> dict:
    """Return a figure under the names that the report documents for it."""
    one = section["figures"][key]
    return {
        name: one["value"],
        "low": one.get("low"),
        "high": one.get("high"),
        "documents": one["n"],
    }


def _text(sums: Sums, resamples: int) -> dict:
    """Return the parts that held-out text gives."""
    text = bits_section(sums, resamples)
    return {
        "bits_per_byte": _named(text, "bits_per_byte"),
        "text": text,
        "calibration": calibration_section(sums, resamples),
        "loss": loss_section(sums, resamples),
    }


def _tasks(
    config: EvaluateConfig,
    predictor: Predictor,
    scorer: Scorer,
    tasks: Sequence[Task],
    documents: Documents | None,
    say: Say,
) -> dict[str, Section]:
    """Return the sections of multiple choice."""
    found = {}
    how = (scorer, predictor.tokenizer)
    if tasks:
        say(f"answering {', '.join(task.name for task in tasks)}")
        found["files"] = evaluate_choices(*how, _shortened(tasks, config.questions), "tasks")
    if config.own_tasks and documents is not None:
        say("answering tasks made of the text")
        most = {"num_questions": config.questions} if config.questions else {}
        made, notes = own_tasks(documents.texts, **most)
        found["own"] = evaluate_choices(*how, made, "tasks made of the text")
        found["own"]["notes"] = [*found["own"].get("notes", []), *notes]
    if config.lm_eval:
        say(f"lm-eval: {config.lm_eval}")
        reader = Reader(scorer, predictor.tokenizer, predictor.banned_ids)
        names = [name.strip() for name in config.lm_eval.split(",") if name.strip()]
        found["lm_eval"] = evaluate_lm_eval(reader, names, config.questions)
    return found


def _stories(
    config: EvaluateConfig, predictor: Predictor, scorer: Scorer, documents: Documents
) -> Section:
    """Return the section of generated stories."""
    writer = Writer(predictor.decoder, predictor.tokenizer, predictor.banned_ids)
    training = None
    if config.train_files:
        source = FileSource(find_files(config.train_files), config.text_column)
        training = whole_documents(source)
    return evaluate_stories(scorer, writer, documents.texts, config.stories, training)


def _shortened(tasks: Sequence[Task], most: int) -> list[Task]:
    return [replace(task, questions=list(spread(task.questions, most))) for task in tasks]


def _experts(predictor: Predictor, choices: ExpertChoices) -> dict[str, Section]:
    """Return what the experts specialise in, and which are chosen together."""
    if not choices.num_tokens:
        raise ValueError("--experts needs a document of at least two tokens")
    classes = token_classes(predictor.tokenizer, predictor.model.config.vocabulary_size)
    found = {"specialities": experts_section(choices, classes)}
    together = together_section(choices)
    return found if together is None else found | {"together": together}


def _shared(
    choices: ExpertChoices | None, other: ExpertChoices | None, resamples: int
) -> dict[str, Section]:
    """Return how many experts two checkpoints share, if their tokens and experts are alike."""
    if choices is None or other is None or not choices.is_like(other):
        return {}
    overlap = Overlap(len(choices.ids), choices.experts[0].shape[0], choices.num_experts)
    pairs = zip(choices.experts, other.experts, strict=True)
    for d, (mine, theirs) in enumerate(pairs):
        overlap.add(d, mine, theirs)
    return {"shared": overlap.section(resamples)}
