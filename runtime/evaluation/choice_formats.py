"""Recognise the questions of published tasks by the keys of their rows.

A row of a file becomes a Question: contexts, continuations, and which of them is right. How each
published task joins its columns into text is as lm-evaluation-harness 0.4 has it, and CORE's tasks
are as nanochat has them, so that figures can be compared. No task is downloaded here: a user gives
files. What has no right answer, or more than one form, is refused with its file and line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from runtime.base.text import names_of, shown
from runtime.data.file_sets import FileSet, InputFile, find_files
from runtime.data.formats import Counts, cleaned
from runtime.data.sources import read_rows
from runtime.data.tokenizer import without_surrogates

# What kinds of questions there are. Several continuations of one context; one continuation of
# several contexts; a single continuation, which the model must find by itself.
CHOICES, SCHEMA, GREEDY = "choices", "schema", "greedy"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# Numbers of a longer text are no index of a choice.
LONGEST_INDEX = 9

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Question:
    """Contexts and continuations, of which one pair is right.

    kind: CHOICES has one context, SCHEMA one continuation; the other side has one text for each
    answer. GREEDY has one of both. A continuation follows its context after `delimiter`.
    """

    kind: str
    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    right: int
    where: str = ""
    delimiter: str = " "

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Each answer as (context, continuation), without the delimiter."""
        size = max(len(self.contexts), len(self.continuations))
        contexts = self.contexts if len(self.contexts) == size else self.contexts * size
        own = self.continuations if len(self.continuations) == size else self.continuations * size
        return list(zip(contexts, own, strict=True))


@dataclass(frozen=True)
class Form:
    """One form of rows: its name, the keys that it needs, and how a question is made."""

    name: str
    needs: tuple[str, ...]
    make: Callable[[Row], Question]

    @property
    def said(self) -> str:
        """The name and the keys, for an error line."""
        return f"{self.name} ({', '.join(self.needs)})"


@dataclass(frozen=True)
class Task:
    """The questions of one file. is_made: or those that a rule made of text."""

    name: str
    form: str
    questions: Sequence[Question]
    is_made: bool = False


# ------------------------------------------------------------------------------ values
def _text(value: object, what: str, may_be_empty: bool = False) -> str:
    """Return a text as all text is read. Raise ValueError for what is none, and for an empty one.

    A single backslash-u half of a character, which JSON can spell, becomes U+FFFD.
    """
    if not isinstance(value, str):
        raise ValueError(f"{what} must be text, not {shown(value)}")
    text = without_surrogates(cleaned(value, "the row", Counts()))
    if not may_be_empty and not text.strip():
        raise ValueError(f"{what} is empty")
    return text


def _texts(value: object, what: str) -> tuple[str, ...]:
    """Return a list of two texts or more. Raise ValueError for anything else."""
    if not isinstance(value, list):
        raise ValueError(f"{what} must be a list of texts, not {shown(value)}")
    if len(value) < 2:
        raise ValueError(f"{what} has {len(value)} entries, and a question needs at least 2")
    return tuple(_text(one, f"{what}, entry {number}") for number, one in enumerate(value, 1))


def _index(value: object, what: str, size: int, first: int = 0) -> int:
    """Return which of `size` answers a value names, counted from 0; the value counts from `first`.

    Raise ValueError for what is no whole number or is out of range.
    """
    number = None
    if isinstance(value, str) and len(value.strip()) <= LONGEST_INDEX:
        stripped = value.strip()
        number = int(stripped) if re.fullmatch(r"-?[0-9]+", stripped) else None
    elif type(value) is int or (type(value) is float and value.is_integer()):
        # Parquet makes decimals of a column with gaps.
        number = int(value)
    if number in (-1, None) and (number == -1 or value in ("", None)):
        raise ValueError(
            f"{what} is {shown(value)}, so the right answer is not known: test splits are often "
            "published without it, take the validation split"
        )
    if number is None or not first <= number < first + size:
        raise ValueError(
            f"{what} must be a number from {first} to {first + size - 1}, not {shown(value)}"
        )
    return number - first


# ------------------------------------------------------------------------------ the forms
def _hellaswag(row: Row) -> Question:
    endings = tuple(_without_brackets(text) for text in _texts(row["endings"], "endings"))
    if empty := [number for number, text in enumerate(endings, 1) if not text.strip()]:
        raise ValueError(f"endings, entry {empty[0]} is empty without its brackets")
    if row.get("ctx_a") is not None:
        second = _text(row.get("ctx_b") or "", "ctx_b", may_be_empty=True)
        context = f"{_text(row['ctx_a'], 'ctx_a')} {second.capitalize()}"
    elif row.get("ctx") is not None:
        context = _text(row["ctx"], "ctx")
    else:
        raise ValueError("it has endings, but neither ctx_a (with ctx_b) nor ctx")
    if row.get("activity_label") is not None:
        context = f"{_text(row['activity_label'], 'activity_label')}: {context}"
    right = _index(row["label"], "label", len(endings))
    return Question(CHOICES, (_without_brackets(context),), endings, right)


def _without_brackets(text: str) -> str:
    """Return a text of HellaSwag without what WikiHow's pages left in it: [title], [step].

    As lm-evaluation-harness does it, which leaves a blank before what followed a bracket.
    """
    lines = text.strip().replace(" [title]", ". ").split("\n")
    return "\n".join(map(_line_without_brackets, lines)).replace("  ", " ")


def _line_without_brackets(line: str) -> str:
    # By hand: a pattern would read a line of many open brackets once for each of them.
    kept, at = [], 0
    while (start := line.find("[", at)) >= 0 and (end := line.find("]", start)) >= 0:
        kept.append(line[at:start])
        at = end + 1
    return "".join(kept) + line[at:]


def _arc(row: Row) -> Question:
    """ARC, OpenBookQA, CommonsenseQA: answers with labels, flat or in the question."""
    question = row["question"] if row.get("question") is not None else row.get("question_stem")
    choices = row.get("choices")
    if isinstance(question, dict):
        choices = choices if choices is not None else question.get("choices")
        question = question.get("stem")
    if question is None or choices is None:
        raise ValueError("it has answerKey, but not both a question and choices")
    labels, texts = _labelled(choices)
    key = row["answerKey"]
    if key is None or key == "" or (isinstance(key, str) and not key.strip()):
        raise ValueError(
            f"answerKey is {shown(key)}, so the right answer is not known: test splits are often "
            "published without it, take the validation split"
        )
    if not isinstance(key, str) or key.strip() not in labels:
        raise ValueError(f"answerKey must be one of {', '.join(labels)}, not {shown(key)}")
    right = labels.index(key.strip())
    asked = _text(question, "the question")
    # OpenBookQA's stems are beginnings of sentences.
    context = asked if "question_stem" in row else _question(asked)
    return Question(CHOICES, (context,), texts, right)


def _labelled(choices: object) -> tuple[list[str], tuple[str, ...]]:
    """Return labels and texts: of {"text": [], "label": []}, of a list of both, of texts alone."""
    if isinstance(choices, dict):
        labels, texts = choices.get("label"), choices.get("text")
    elif isinstance(choices, list) and all(isinstance(one, dict) for one in choices):
        labels = [one.get("label") for one in choices]
        texts = [one.get("text") for one in choices]
    else:
        texts = choices
        labels = list(LETTERS[: len(choices)]) if isinstance(choices, list) else None
    found = _texts(texts, "choices")
    if not isinstance(labels, list) or not all(isinstance(one, str) for one in labels):
        raise ValueError(f"the labels of choices must be a list of texts, not {shown(labels)}")
    labels = [one.strip() for one in labels]
    if len(labels) != len(found) or len(set(labels)) != len(labels):
        raise ValueError(
            f"choices has {len(found)} texts and the labels {', '.join(labels)}: give each text a "
            "label of its own"
        )
    return labels, found


def _question(text: str) -> str:
    return f"Question: {text}\nAnswer:"


def _stripped_question(text: str) -> str:
    # As its mmlu_continuation asks: the answers' texts, not their letters.
    return _question(text.strip())


def _blimp(row: Row) -> Question:
    pair = tuple(_text(row[name], name) for name in ("sentence_good", "sentence_bad"))
    return Question(CHOICES, ("",), pair, 0)


def _piqa(row: Row) -> Question:
    pair = tuple(_text(row[name], name) for name in ("sol1", "sol2"))
    return Question(
        CHOICES, (_question(_text(row["goal"], "goal")),), pair, _index(row["label"], "label", 2)
    )


def _winogrande(row: Row) -> Question:
    before, gap, after = _text(row["sentence"], "sentence").partition("_")
    if not gap or not after.strip():
        raise ValueError("sentence needs a _ where the options go, and text after it")
    contexts = tuple(before + _text(row[name], name) for name in ("option1", "option2"))
    return Question(SCHEMA, contexts, (after.strip(),), _index(row["answer"], "answer", 2, 1))


def _plain(question: str, right: str, ask: Callable[[str], str]) -> Callable[[Row], Question]:
    def make(row: Row) -> Question:
        texts = _texts(row["choices"], "choices")
        context = _text(row[question], question, may_be_empty=True)
        return Question(CHOICES, (ask(context),), texts, _index(row[right], right, len(texts)))

    return make


def _schema(row: Row) -> Question:
    contexts = _texts(row["context_options"], "context_options")
    continuation = (_text(row["continuation"], "continuation"),)
    return Question(SCHEMA, contexts, continuation, _index(row["gold"], "gold", len(contexts)))


def _language_modeling(row: Row) -> Question:
    context = _text(row["context"], "context", may_be_empty=True).strip()
    return Question(GREEDY, (context,), (_text(row["continuation"], "continuation"),), 0)


FORMS = (
    Form("HellaSwag", ("endings", "label"), _hellaswag),
    Form("ARC", ("question", "choices", "answerKey"), _arc),
    Form("OpenBookQA", ("question_stem", "choices", "answerKey"), _arc),
    # AI2's own files have the choices in the question.
    Form("ARC", ("question", "answerKey"), _arc),
    Form("BLiMP", ("sentence_good", "sentence_bad"), _blimp),
    Form("PIQA", ("goal", "sol1", "sol2", "label"), _piqa),
    Form("WinoGrande", ("sentence", "option1", "option2", "answer"), _winogrande),
    Form("plain", ("query", "choices", "gold"), _plain("query", "gold", str)),
    Form(
        "MMLU", ("question", "choices", "answer"), _plain("question", "answer", _stripped_question)
    ),
    Form("schema", ("context_options", "continuation", "gold"), _schema),
    Form("language modeling", ("context", "continuation"), _language_modeling),
)


def recognise(row: Row) -> Form:
    """Return the form of a row. Raise ValueError for one of no form, or of several."""
    fitting = [form for form in FORMS if all(row.get(name) is not None for name in form.needs)]
    # A form whose keys another one has, too, is not meant.
    whole = [f for f in fitting if not any(set(f.needs) < set(other.needs) for other in fitting)]
    if len(whole) > 1:
        raise ValueError(
            f"the row has the keys of {whole[0].said} and of {whole[1].said}: keep those of one"
        )
    if whole:
        return whole[0]
    missing = {form: [name for name in form.needs if row.get(name) is None] for form in FORMS}
    near = min(FORMS, key=lambda form: (len(missing[form]), -len(form.needs)))
    if len(missing[near]) == 1 and len(near.needs) > 1:
        raise ValueError(
            f"the row lacks {missing[near][0]}, which {near.said} needs (it has {names_of(row)})"
        )
    known = "; ".join(form.said for form in FORMS)
    raise ValueError(f"the row has {names_of(row)}, none of the known forms: {known}")


# ------------------------------------------------------------------------------ files
def read_questions(rows: Iterable[tuple[str, object]], what: str) -> tuple[str, list[Question]]:
    """Return the form and the questions of rows (where, row), which are all of one form.

    Raise ValueError, with the file and the line, for a row that is no question.
    """
    questions: list[Question] = []
    first: Form | None = None
    for where, row in rows:
        try:
            if not isinstance(row, dict):
                raise ValueError(f"a question is an object with keys, not {shown(row)}")
            form = recognise(row)
            first = first or form
            if form.name != first.name:
                raise ValueError(
                    f"the row is {form.said}, those before are {first.said}: a file holds one form"
                )
            made = form.make(row)
        except ValueError as error:
            raise ValueError(f"{where}: {' '.join(str(error).split())}") from None
        questions.append(replace(made, where=where))
    if first is None:
        raise ValueError(f"{what} holds no questions")
    return first.name, questions


def read_tasks(names: Sequence[str]) -> list[Task]:
    """Return the task of each file that the names mean: files, folders, patterns.

    A task has its file's name without endings. Raise ValueError for files that cannot be read, and
    for two of one name.
    """
    files: FileSet = find_files(names)
    tasks: dict[str, Task] = {}
    for file in files.files:
        name = task_name(file)
        if name in tasks:
            raise ValueError(f"two tasks are named {name}: rename {file.name}")
        form, questions = read_questions(read_rows(file, Counts()), file.name)
        tasks[name] = Task(name, form, questions)
    return list(tasks.values())


def task_name(file: InputFile) -> str:
    """Return the name of a file's task: letters, digits, - and _ before its first dot."""
    name = re.sub(r"[^\w-]+", "_", file.path.name.partition(".")[0])
    return name.strip("_") or "task"


def spread(questions: Sequence[Question], most: int) -> Iterator[Question]:
    """Yield at most so many questions, evenly spread; all if `most` is 0."""
    if not most or len(questions) <= most:
        yield from questions
        return
    for number in range(most):
        yield questions[number * len(questions) // most]
