"""Questions of published tasks: what each form becomes, and what a hostile file ends with."""

from __future__ import annotations

import gzip
import json
import re

import pytest

from runtime.data.file_sets import find_files
from runtime.evaluation.choice_formats import (
    CHOICES,
    FORMS,
    GREEDY,
    SCHEMA,
    Question,
    read_tasks,
    recognise,
    spread,
    task_name,
)

HELLASWAG = {
    "ind": 24,
    "activity_label": "Roof shingle removal",
    "ctx_a": "A man is sitting on a roof.",
    "ctx_b": "he",
    "ctx": "A man is sitting on a roof. he",
    "endings": [
        "is using wrap.",
        "is ripping tiles.",
        "holds a cube.",
        "starts pulling up [title] it.",
    ],
    "label": 3,
}
WIKIHOW = {
    "activity_label": "Home",
    "ctx_a": "[header] How to swim [title] Get in. [step] Jump",
    "ctx_b": "",
    "endings": ["[substeps] Walk.", "Run."],
    "label": "1",
}
ARC = {
    "id": "x",
    "question": "What is hot?",
    "choices": {"text": ["ice", "fire", "snow"], "label": ["A", "B", "C"]},
    "answerKey": "B",
}
AI2 = {
    "question": {
        "stem": "What is hot?",
        "choices": [{"text": "ice", "label": "1"}, {"text": "fire", "label": "2"}],
    },
    "answerKey": "2",
}
OPENBOOK = {
    "question_stem": "The sun is",
    "choices": {"text": ["cold", "hot"], "label": ["A", "B"]},
    "answerKey": "B ",
}
BLIMP = {"sentence_good": "The cats sleep.", "sentence_bad": "The cats sleeps.", "UID": "x"}
PIQA = {"goal": "Boil eggs", "sol1": "in water", "sol2": "in sand", "label": 0}
WINOGRANDE = {
    "sentence": "Tom thanked Sue because _ had helped.",
    "option1": "Tom",
    "option2": "Sue",
    "answer": "2",
}
PLAIN = {"query": "Two and two are", "choices": ["four", "five"], "gold": 0}
MMLU = {"question": " Two and two?\n", "choices": ["5", "4"], "answer": 1, "subject": "math"}
CORE_SCHEMA = {
    "context_options": ["The cup is full, so the cup", "The jug is full, so the jug"],
    "continuation": "spills",
    "gold": 1,
}
CORE_LM = {"context": "Tom had a ball. It was Tom's ", "continuation": "ball"}


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path, rows) -> list[Question]:
    (task,) = read_tasks([write(path, rows)])
    return list(task.questions)


# ------------------------------------------------------------------------------ what is asked
CASES = {
    "HellaSwag": (
        HELLASWAG,
        CHOICES,
        ["Roof shingle removal: A man is sitting on a roof. He"],
        ["is using wrap.", "is ripping tiles.", "holds a cube.", "starts pulling up.  it."],
        3,
    ),
    "ARC": (ARC, CHOICES, ["Question: What is hot?\nAnswer:"], ["ice", "fire", "snow"], 1),
    "AI2": (AI2, CHOICES, ["Question: What is hot?\nAnswer:"], ["ice", "fire"], 1),
    "OpenBookQA": (OPENBOOK, CHOICES, ["The sun is"], ["cold", "hot"], 1),
    "BLiMP": (BLIMP, CHOICES, [""], ["The cats sleep.", "The cats sleeps."], 0),
    "PIQA": (PIQA, CHOICES, ["Question: Boil eggs\nAnswer:"], ["in water", "in sand"], 0),
    "WinoGrande": (
        WINOGRANDE,
        SCHEMA,
        ["Tom thanked Sue because Tom", "Tom thanked Sue because Sue"],
        ["had helped."],
        1,
    ),
    "plain": (PLAIN, CHOICES, ["Two and two are"], ["four", "five"], 0),
    "MMLU": (MMLU, CHOICES, ["Question: Two and two?\nAnswer:"], ["5", "4"], 1),
    "schema": (CORE_SCHEMA, SCHEMA, CORE_SCHEMA["context_options"], ["spills"], 1),
    "language modeling": (CORE_LM, GREEDY, ["Tom had a ball. It was Tom's"], ["ball"], 0),
}


@pytest.mark.parametrize("name", CASES)
def test_each_form_becomes_its_question(name, tmp_path):
    row, kind, contexts, continuations, right = CASES[name]
    (question,) = read(tmp_path / "task.jsonl", [row])
    assert question.kind == kind and question.right == right
    assert list(question.contexts) == contexts
    assert [" ".join(text.split()) for text in question.continuations] == [
        " ".join(text.split()) for text in continuations
    ]
    assert question.where.endswith("task.jsonl line 1")


def test_every_form_has_a_case():
    """A form that no row becomes is dead."""
    met = {recognise(row).needs for row, *_ in CASES.values()}
    assert met == {form.needs for form in FORMS}


def test_pairs_join_each_answer_with_its_context():
    schema = Question(SCHEMA, ("a", "b"), ("c",), 0)
    assert schema.pairs == [("a", "c"), ("b", "c")]
    assert Question(CHOICES, ("a",), ("b", "c"), 0).pairs == [("a", "b"), ("a", "c")]


def test_brackets_of_wikihow_are_taken_out(tmp_path):
    """[header] and [step] are not text, and [title] ends a sentence."""
    (question,) = read(tmp_path / "h.jsonl", [WIKIHOW])
    assert question.contexts[0].split() == ["Home:", "How", "to", "swim.", "Get", "in.", "Jump"]
    assert question.continuations[0].split() == ["Walk."] and question.right == 1


def test_many_open_brackets_are_read_once(tmp_path):
    """The pattern of lm-eval reads a line again for each bracket that is not closed.

    That does not end: the square of the length is 10^12.
    """
    text = "[" * 1_000_000
    (question,) = read(tmp_path / "h.jsonl", [WIKIHOW | {"ctx_a": text, "endings": [text, "b"]}])
    assert question.continuations == (text, "b") and text in question.contexts[0]


@pytest.mark.parametrize("row", [HELLASWAG, WIKIHOW], ids=["plain", "wikihow"])
def test_hellaswag_is_cleaned_as_lm_eval_cleans_it(row, tmp_path):
    """The rule of lm-eval's task hellaswag, version 1.0, written down again."""

    def cleaned(text):
        text = text.strip().replace(" [title]", ". ")
        return re.sub(r"\[.*?\]", "", text).replace("  ", " ")

    (question,) = read(tmp_path / "h.jsonl", [row])
    asked = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    assert question.contexts == (cleaned(asked),)
    assert list(question.continuations) == [cleaned(text) for text in row["endings"]]


@pytest.mark.parametrize(
    "label, right", [(1, 1), ("1", 1), (" 1 ", 1), (1.0, 1), ("0", 0)], ids=repr
)
def test_a_label_may_be_a_number_or_its_digits(label, right, tmp_path):
    """HellaSwag has both, and Parquet makes decimals of a column with gaps."""
    (question,) = read(tmp_path / "p.jsonl", [PIQA | {"label": label}])
    assert question.right == right


def test_a_surrogate_that_json_spells_is_read(tmp_path):
    """It has no UTF-8, so bytes could not be counted: the run ended in a traceback."""
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(PLAIN | {"choices": ["\ud800 a", "b"]}) + "\n")
    (task,) = read_tasks([str(path)])
    assert task.questions[0].continuations[0] == "\N{REPLACEMENT CHARACTER} a"


# ------------------------------------------------------------------------------ hostile rows
BAD_ROWS = {
    "a list": ([1, 2], "an object with keys"),
    "a number": (3, "an object with keys"),
    "null": (None, "an object with keys"),
    "nothing known": ({"text": "a story"}, "none of the known forms"),
    "no keys": ({}, "has no columns"),
    "PIQA without a label": ({k: PIQA[k] for k in ("goal", "sol1", "sol2")}, "lacks label"),
    "null label": (PIQA | {"label": None}, "lacks label"),
    "hidden label": (PIQA | {"label": -1}, "the right answer is not known"),
    "hidden text label": (HELLASWAG | {"label": ""}, "the right answer is not known"),
    "hidden answerKey": (ARC | {"answerKey": ""}, "the right answer is not known"),
    "label out of range": (PIQA | {"label": 2}, "from 0 to 1, not int 2"),
    "label below": (PIQA | {"label": -2}, "from 0 to 1, not int -2"),
    "bool label": (PIQA | {"label": True}, "from 0 to 1, not bool True"),
    "half label": (PIQA | {"label": 0.5}, "from 0 to 1, not float 0.5"),
    "endless label": (PIQA | {"label": float("inf")}, "from 0 to 1, not float inf"),
    "long label": (PIQA | {"label": "1" * 5000}, "from 0 to 1, not str"),
    "Arabic digits": (PIQA | {"label": "\u0661"}, "from 0 to 1, not str"),
    "list label": (PIQA | {"label": [0]}, "from 0 to 1, not list"),
    "WinoGrande counts from 1": (WINOGRANDE | {"answer": "0"}, "from 1 to 2"),
    "WinoGrande without a gap": (WINOGRANDE | {"sentence": "No gap."}, "needs a _"),
    "WinoGrande gap at the end": (WINOGRANDE | {"sentence": "Ends in _ "}, "text after it"),
    "unknown answerKey": (ARC | {"answerKey": "D"}, "one of A, B, C, not str 'D'"),
    # It was said to be missing.
    "number as answerKey": (ARC | {"answerKey": 1}, "one of A, B, C, not int 1"),
    "list as answerKey": (ARC | {"answerKey": ["A"]}, "one of A, B, C, not list"),
    "blank answerKey": (ARC | {"answerKey": "  "}, "the right answer is not known"),
    "too few labels": (
        ARC | {"choices": {"text": ["a", "b"], "label": ["A"]}},
        "2 texts and the labels A",
    ),
    "equal labels": (
        ARC | {"choices": {"text": ["a", "b"], "label": ["A", "A"]}},
        "a label of its own",
    ),
    "labels of numbers": (
        ARC | {"choices": {"text": ["a", "b"], "label": [1, 2]}},
        "list of texts",
    ),
    "one choice": (PLAIN | {"choices": ["four"]}, "at least 2"),
    "no choice": (PLAIN | {"choices": []}, "at least 2"),
    "choices as text": (PLAIN | {"choices": "four five"}, "a list of texts, not str"),
    "choice is a number": (PLAIN | {"choices": ["four", 5]}, "choices, entry 2 must be text"),
    "choice is null": (PLAIN | {"choices": [None, "five"]}, "choices, entry 1 must be text"),
    "empty choice": (PLAIN | {"choices": ["four", "  "]}, "choices, entry 2 is empty"),
    "only brackets": (HELLASWAG | {"endings": ["[step]", "b"], "label": 0}, "entry 1 is empty"),
    "endings without context": ({"endings": ["a", "b"], "label": 0}, "neither ctx_a"),
    "NUL": (PLAIN | {"choices": ["fo\0ur", "five"]}, "NUL"),
    "context is a list": (CORE_LM | {"context": ["a"]}, "context must be text, not list"),
    "two forms": (PLAIN | PIQA, "keys of PIQA"),
    "deep": (PLAIN | {"choices": [[[["a"]]], "b"]}, "must be text, not list"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_ends_with_one_line_that_names_it(name, tmp_path):
    row, message = BAD_ROWS[name]
    # Before it, a good row of its own form, which the file's form is then.
    shared = row.keys() if isinstance(row, dict) else set()
    goods = (PLAIN, HELLASWAG, ARC, PIQA, WINOGRANDE, CORE_LM)
    good = max(goods, key=lambda other: len(shared & other.keys()))
    path = write(tmp_path / "task.jsonl", [good, row])
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_tasks([path])
    assert str(error.value).startswith(f"{path} line 2: ")
    assert "\n" not in str(error.value) and len(str(error.value)) < 900


BAD_FILES = {
    "torn": (b'{"query": "a", "choices": ["b"', "line 1 is not JSON"),
    "binary": (bytes(range(256)) * 4, None),
    "empty": (b"", "holds no questions"),
    "blank": (b"\n\n  \n", "holds no questions"),
    "nested": (b'{"query":' + b"[" * 100_000 + b"\n", "is not JSON"),
    "long number": (b'{"query": ' + b"9" * 10_000 + b"}\n", "is not JSON"),
    "NULs": (b"\0" * 4096, None),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_ends_with_one_line_that_names_it(name, tmp_path):
    content, message = BAD_FILES[name]
    path = tmp_path / "task.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_tasks([str(path)])
    assert str(path) in str(error.value) and "\n" not in str(error.value)


# ------------------------------------------------------------------------------ files
def test_a_file_holds_one_form(tmp_path):
    path = write(tmp_path / "task.jsonl", [PLAIN, PIQA])
    with pytest.raises(ValueError, match=r"line 2: the row is PIQA .* before are plain"):
        read_tasks([path])


def test_tasks_are_named_after_their_files(tmp_path):
    """A folder of files, as BLiMP is published, is one task for each file."""
    write(tmp_path / "noun agreement.jsonl", [BLIMP])
    (tmp_path / "piqa.dev.json").write_text(json.dumps([PIQA, PIQA]))
    with gzip.open(tmp_path / "arc.jsonl.gz", "wt") as file:
        file.write(json.dumps(ARC) + "\n")
    tasks = {task.name: task for task in read_tasks([str(tmp_path)])}
    assert list(tasks) == ["arc", "noun_agreement", "piqa"]
    assert len(tasks["piqa"].questions) == 2 and tasks["arc"].form == "ARC"
    for name in ("a.jsonl", ".x.jsonl", "\u00e4 b.c.jsonl"):
        (tmp_path / name).write_text("{}\n")
        (file,) = find_files([str(tmp_path / name)]).files
        assert re.fullmatch(r"[\w-]+", task_name(file))


def test_two_tasks_of_one_name_are_refused(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "task.jsonl", [PLAIN])
    with pytest.raises(ValueError, match="two tasks are named task"):
        read_tasks([str(tmp_path)])


def test_a_part_of_the_questions_is_spread_over_all():
    """Files are often sorted by subject: the first ones would be of one."""
    questions = [Question(CHOICES, ("a",), ("b", "c"), 0, str(i)) for i in range(10)]
    assert [q.where for q in spread(questions, 4)] == ["0", "2", "5", "7"]
    assert list(spread(questions, 0)) == list(spread(questions, 10)) == questions
