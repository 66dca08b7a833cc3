"""What an evaluation reads, and its checks: all of them before the first pass over a text.

A mistake that shows after hours of scoring costs these hours. So every file is found and begun,
and the other checkpoint is read, before a model scores anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from runtime.checkpoint.format import CheckpointError
from runtime.checkpoint.read import read_checkpoint, read_header, unpack
from runtime.data.file_sets import find_files
from runtime.data.sources import FileSource
from runtime.data.tokenizers import tokenizer_of
from runtime.evaluation.choice_formats import Task, read_tasks, spread
from runtime.evaluation.choices import check_task
from runtime.evaluation.config import EvaluateConfig
from runtime.evaluation.documents import (
    Documents,
    file_documents,
    shard_documents,
    whole_documents,
)
from runtime.evaluation.lm_eval import LmTasks, find_tasks, is_file_name
from runtime.evaluation.report import Section
from runtime.inference.predictor import Predictor

# Gives the sections of what a chat model answers: a script hands it in.
Chat = Callable[[Predictor], dict[str, Section]]


@dataclass(frozen=True)
class Asked:
    """What is asked of a checkpoint.

    chat: gives sections of what a chat model answers. lm_eval: tasks of that library.
    """

    documents: Documents | None = None
    tasks: Sequence[Task] = ()
    training: FileSource | None = None
    chat: Chat | None = None
    lm_eval: LmTasks | None = None


def read_inputs(config: EvaluateConfig, chat: Chat | None) -> Asked:
    """Read all that is asked, and check all that is named. Raise ValueError.

    The first checkpoint is checked when it is loaded, which is before anything is scored.
    """
    _check_outputs(config)
    column, documents, training = config.text_column, None, None
    if config.files:
        documents = file_documents(config.files, column, config.documents)
    elif config.has_text:
        documents = shard_documents(config.data_dir, config.documents)
    if config.train_files:
        training = FileSource(find_files(config.train_files), column)
        if not any(text.strip() for text in whole_documents(training)):
            files = ", ".join(config.train_files)
            raise ValueError(f"--train_files {files} holds no text: name files that hold some")
    tasks = [
        replace(task, questions=list(spread(task.questions, config.questions)))
        for task in (read_tasks(config.tasks) if config.tasks else [])
    ]
    if config.against:
        _check_other(config, tasks)
    # Last, because lm-eval's own tasks take half a minute to read.
    names = config.lm_eval_tasks()
    return Asked(documents, tasks, training, chat, find_tasks(names) if names else None)


def _check_outputs(config: EvaluateConfig) -> None:
    """Raise ValueError for a file of the report that is one of those that are read."""
    outputs = config.outputs()
    for flag, used in _read_paths(config) if outputs else ():
        for name, path in outputs.items():
            written = Path(path).resolve()
            if used.resolve() in (written, *written.parents):
                raise ValueError(f"--{name} {path} is the file of {flag}: give each its own")


def _read_paths(config: EvaluateConfig) -> Iterator[tuple[str, Path]]:
    """Yield (flag, path) of all that is read. A folder is one whose files are all its own."""
    for flag in ("files", "tasks", "train_files"):
        for file in find_files(getattr(config, flag)).files:
            yield f"--{flag}", file.path
    yield "--ckpt", Path(config.ckpt)
    if config.against:
        yield "--against", Path(config.against)
    if config.has_text and not config.files:
        yield "--data_dir", Path(config.data_dir) / "val"
    yield from (("--lm_eval", Path(task)) for task in config.lm_eval_tasks() if is_file_name(task))


def _check_other(config: EvaluateConfig, tasks: Sequence[Task]) -> None:
    """Read the other checkpoint, which is loaded only after the first one's work."""
    checkpoint = read_checkpoint(config.against, read_only=True)
    tokenizer = tokenizer_of(checkpoint, tokenizer_name(config, config.against))
    context = checkpoint.model_config.context_length
    if config.stride > context:
        raise ValueError(
            f"--stride {config.stride} is more than the context of {config.against}, which has "
            f"{context} tokens: give at most that"
        )
    for task in tasks:
        check_task(tokenizer, task, context, leave_out=True)


def tokenizer_name(config: EvaluateConfig, ckpt: str) -> str:
    """Return the --tokenizer that a checkpoint is loaded with, "" for its own.

    Of two checkpoints, one may say its tokenizer and the other not: --tokenizer is the other's.
    """
    if not (config.tokenizer and config.against):
        return config.tokenizer
    both = [_has_tokenizer(path) for path in (config.ckpt, config.against)]
    return "" if sum(both) == 1 and _has_tokenizer(ckpt) else config.tokenizer


def _has_tokenizer(path: str) -> bool:
    """Return whether a checkpoint says its tokenizer. No weight is read. Raise CheckpointError."""
    contents, _ = unpack(Path(path), read_only=True)
    try:
        return "format" in contents and bool(read_header(contents)["tokenizer"])
    except ValueError as error:
        raise CheckpointError(path, error) from error
