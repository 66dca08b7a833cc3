"""Reading chats: every published form is recognised, what is wrong is said with its line."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest

from runtime.posttraining import forms, messages
from runtime.posttraining.conversations import (
    Conversation,
    ExampleFiles,
    ExampleRows,
    Pair,
    Prompt,
    hold_out,
    opening_digest,
    read_examples,
)
from runtime.posttraining.forms import read_columns
from tests.promises import conversations as promise

USER, ANSWER = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}
WORSE = {"role": "assistant", "content": "You."}
SYSTEM = {"role": "system", "content": "Be brief."}


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_one(row, want="", **options):
    """Return the only example of a row, without where it is from."""
    rows = ExampleRows([row], "rows", want)
    rows.columns, rows.raw = options.get("columns", {}), options.get("raw", False)
    (example,) = rows
    return example


# ------------------------------------------------------------------------------- the forms
CONVERSATIONS = {
    "OpenAI": ({"messages": [SYSTEM, USER, ANSWER]}, [SYSTEM, USER, ANSWER]),
    "UltraChat": ({"prompt": "Who?", "prompt_id": "1", "messages": [USER, ANSWER]}, [USER, ANSWER]),
    "conversations with roles": ({"conversations": [USER, ANSWER]}, [USER, ANSWER]),
    "LMSYS": ({"conversation": [USER, ANSWER], "model": "x"}, [USER, ANSWER]),
    "ShareGPT": (
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "Who?"},
                {"from": "gpt", "value": "I."},
            ]
        },
        [SYSTEM, USER, ANSWER],
    ),
    "ShareGPT with a system column": (
        {
            "conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "I."}],
            "system": "Be brief.",
            "tools": "",
        },
        [SYSTEM, USER, ANSWER],
    ),
    "Alpaca": ({"instruction": "Who?", "input": "", "output": "I."}, [USER, ANSWER]),
    "Alpaca without input": ({"instruction": "Who?", "output": "I."}, [USER, ANSWER]),
    "Alpaca with all": (
        {
            "instruction": "Add.",
            "input": "1, 2",
            "output": "3",
            "system": "Be brief.",
            "history": [["Who?", "I."]],
        },
        [
            SYSTEM,
            USER,
            ANSWER,
            {"role": "user", "content": "Add.\n\n1, 2"},
            {"role": "assistant", "content": "3"},
        ],
    ),
    "prompt and completion": ({"prompt": "Who?", "completion": "I."}, [USER, ANSWER]),
    "with messages": ({"prompt": [SYSTEM, USER], "completion": [ANSWER]}, [SYSTEM, USER, ANSWER]),
    "a text after messages": ({"prompt": [USER], "completion": "I."}, [USER, ANSWER]),
    "parts of text": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": t} for t in ("Wh", "o?")]},
                ANSWER,
            ]
        },
        [USER, ANSWER],
    ),
    "messages as JSON, as a table has them": (
        {"messages": json.dumps([USER, ANSWER])},
        [USER, ANSWER],
    ),
    "an empty system": (
        {"messages": [{"role": "system", "content": ""}, USER, ANSWER]},
        [USER, ANSWER],
    ),
    "keys of both styles, as Parquet fills them": (
        {
            "messages": [
                m | {"from": None, "value": None, "tool_calls": None} for m in (USER, ANSWER)
            ]
        },
        [USER, ANSWER],
    ),
    "newlines of Windows": (
        {"prompt": "a\r\nb", "completion": "c<|endoftext|>"},
        [{"role": "user", "content": "a\nb"}, {"role": "assistant", "content": "c"}],
    ),
}


@pytest.mark.parametrize("row, said", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_conversations_are_recognised_by_their_keys(row, said):
    assert read_one(row) == Conversation(said, "rows row 0")
    assert read_one(row, "conversations") == Conversation(said, "rows row 0")


def test_flags_of_training_come_through():
    flags = ({"train": False}, {"weight": 0}, {"weight": 1.0}, {"train": True, "weight": None})
    said = [m for flag in flags for m in (USER, ANSWER | flag)]
    found = read_one({"messages": said}).messages
    assert [(m.get("train"), m.get("weight")) for m in found[1::2]] == [
        (False, None),
        (None, 0),
        (None, 1),
        (True, None),
    ]


def test_answers_in_a_prompt_are_not_learned():
    row = {"prompt": [USER, ANSWER, USER], "completion": "You."}
    assert [m.get("train") for m in read_one(row).messages] == [None, False, None, None]
    pair = read_one(
        {"chosen": [USER, ANSWER, USER, ANSWER], "rejected": [USER, ANSWER, USER, WORSE]}
    )
    assert pair.prompt == [USER, ANSWER | {"train": False}, USER]
    assert (pair.chosen, pair.rejected) == ([ANSWER], [WORSE])
    greeted = [ANSWER, USER]
    pair = read_one({"chosen": [*greeted, ANSWER], "rejected": [*greeted, WORSE]})
    assert pair.prompt == [ANSWER | {"train": False}, USER]


PAIRS = {
    "texts": {"prompt": "Who?", "chosen": "I.", "rejected": "You."},
    "messages": {"prompt": [USER], "chosen": [ANSWER], "rejected": [WORSE]},
    "whole conversations": {"chosen": [USER, ANSWER], "rejected": [USER, WORSE]},
    "UltraFeedback": {
        "prompt": "Who?",
        "chosen": [USER, ANSWER],
        "rejected": [USER, WORSE],
        "messages": [USER, ANSWER],
        "score_chosen": 8.0,
    },
    "no prompt, as Parquet has it": {
        "prompt": None,
        "chosen": [USER, ANSWER],
        "rejected": [USER, WORSE],
    },
}


@pytest.mark.parametrize("row", PAIRS.values(), ids=PAIRS)
def test_pairs_are_recognised_by_their_keys(row):
    for want in ("", "pairs"):
        assert read_one(row, want) == Pair([USER], [ANSWER], [WORSE], "rows row 0")


def test_the_conversation_of_a_row_with_a_pair_is_read_for_sft():
    assert read_one(PAIRS["UltraFeedback"], "conversations").messages == [USER, ANSWER]


def test_prompts_keep_their_other_columns():
    row = {"prompt": "Who?", "answer": 42, "tools": ["f"], "completion": "x", "system": "Be brief."}
    found = read_one(row, "prompts")
    columns = {name: value for name, value in row.items() if name != "prompt"}
    assert found == Prompt([SYSTEM, USER], columns, "rows row 0")
    assert read_one({"prompt": [USER]}, "prompts").messages == [USER]


def test_columns_have_other_names():
    columns = read_columns("prompt=question, completion=answer.text")
    row = {"question": "Who?", "answer": {"text": "I."}, "messages": "none"}
    found = read_one(row, columns=columns)
    assert found.messages == [USER, ANSWER]
    chosen = read_one(PAIRS["texts"], "conversations", columns=read_columns("completion=chosen"))
    assert chosen.messages == [USER, ANSWER]
    with pytest.raises(ValueError, match="rows row 0 has no 'question'.*--columns NAME=COLUMN"):
        read_one({"prompt": "Who?"}, columns=columns)


@pytest.mark.parametrize(
    "text, words",
    [
        ("prompt", "write NAME=COLUMN"),
        ("prompt=", "write NAME=COLUMN"),
        ("promt=question", "did you mean prompt"),
        ("prompt=a,prompt=b", "twice"),
    ],
)
def test_wrong_columns_are_refused(text, words):
    with pytest.raises(ValueError, match=words):
        read_columns(text)


def test_raw_takes_texts_alone():
    assert read_one({"prompt": "Who?", "completion": "I."}, raw=True).messages == [USER, ANSWER]
    assert read_one(PAIRS["texts"], "pairs", raw=True).chosen == [ANSWER]
    for row in ({"messages": [USER, ANSWER]}, {"prompt": [SYSTEM, USER], "completion": "I."}):
        with pytest.raises(ValueError, match="rows row 0: --raw joins prompt and completion"):
            read_one(row, raw=True)


def test_the_line_of_a_dialogue_as_text_says_how_to_make_messages():
    """HH-RLHF. The code in the error line is run here."""
    text = "\n\nHuman: Who?\n\nAssistant: I.\n\nHuman: Who?\n\nAssistant: You."
    with pytest.raises(ValueError, match="HH-RLHF") as caught:
        read_one({"chosen": text, "rejected": text})
    code = str(caught.value).split("first: ")[1]
    assert code == forms.DIALOGUE_TO_MESSAGES
    program = f"import json, re; text = {text!r}; {code}; print(json.dumps(messages))"
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert json.loads(printed.stdout) == [USER, ANSWER, USER, WORSE]


@pytest.mark.parametrize(
    "row, want, words",
    [
        (PAIRS["texts"], "conversations", "scripts.dpo; .*--columns prompt=prompt,completion=cho"),
        (PAIRS["whole conversations"], "conversations", "--columns messages=chosen"),
        ({"messages": [USER, ANSWER]}, "pairs", "scripts.sft"),
        ({"messages": [USER, ANSWER]}, "prompts", "scripts.sft"),
        ({"ask": "a", "say": "b"}, "", "the row has ask, say.*--columns prompt=ask,completion=say"),
        ({"ask": "a", "n": 1}, "prompts", "--columns prompt=ask$"),
        ({"n": 1}, "pairs", "--columns prompt=question,chosen=answer,rejected=other"),
        ({"text": "a"}, "", "pre-training"),
        ({"chosen": "a", "rejected": "b"}, "", "no prompt"),
        ({"prompt": "x"} | PAIRS["whole conversations"], "", "prompt is in neither"),
        ({"chosen": [USER, ANSWER], "rejected": [SYSTEM, WORSE]}, "", "need one prompt"),
        ({"messages": [USER, ANSWER], "instruction": "a", "output": "b"}, "", "mixed keys"),
        ({"conversations": [SYSTEM, USER, ANSWER], "system": "No."}, "", "column system"),
        ({"messages": "[{"}, "", "not JSON"),
    ],
)
def test_rows_of_another_kind_say_what_to_do(row, want, words):
    with pytest.raises(ValueError, match=words) as caught:
        read_one(row, want)
    assert "rows row 0" in str(caught.value) and "\n" not in str(caught.value)


# ------------------------------------------------------------------------------- the report
def test_the_report_counts_what_was_dropped(tmp_path):
    good, empty = {"messages": [USER, ANSWER]}, {"messages": [USER]}
    path = jsonl(tmp_path / "a.jsonl", [good] * 99 + [empty])
    found = read_examples(path)
    assert found.lines == ["100 conversations (messages), 1 dropped: 1 without an answer"]
    assert found.kind == "conversations" and len(found.examples) == 99
    assert found.dropped == {"without an answer": 1}
    assert found.examples[-1].where == f"{path} line 99"


def test_many_dropped_rows_have_a_line_of_their_own(tmp_path):
    good, last = {"messages": [USER, ANSWER]}, {"messages": [USER, ANSWER, USER]}
    path = jsonl(tmp_path / "a.jsonl", [good, last, good, last])
    assert read_examples(path).lines[1:] == [
        "50 % of the conversations are dropped; the first of each kind: "
        f"{path} line 2 ending with the user"
    ]
    with pytest.raises(ValueError, match=f"all 2 conversations of {path} are dropped: 2 ending"):
        read_examples(jsonl(path, [last, last]))


def test_the_columns_of_a_reward_are_named(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": "Who?", "answer": 1, "level": 2}] * 2)
    assert read_examples(path, "prompts").lines == [
        "2 prompts (prompt)",
        "columns that the reward is given: answer, level",
    ]


def test_fields_that_are_left_out_are_said(tmp_path):
    answer = ANSWER | {"thinking": "Hm.", "name": None}
    path = jsonl(tmp_path / "a.jsonl", [{"messages": [USER, answer]}] * 2)
    assert read_examples(path).lines[1:] == [
        "fields of messages that are not learned are left out: thinking in 2"
    ]


def test_files_of_several_forms(tmp_path):
    jsonl(tmp_path / "a.jsonl", [{"messages": [USER, ANSWER]}])
    (tmp_path / "b.csv").write_text("instruction,output\nWho?,I.\n", encoding="utf-8")
    (tmp_path / "notes.txt").write_text("about", encoding="utf-8")
    jsonl(tmp_path / "validation.jsonl", [{"messages": [USER, WORSE]}])
    found = read_examples(tmp_path)
    assert len(found.examples) == 3
    found = read_examples([tmp_path / "a.jsonl", tmp_path / "b.csv"])
    assert found.lines == ["2 conversations (messages; instruction, output)"]
    jsonl(tmp_path / "c.jsonl", [PAIRS["texts"]])
    with pytest.raises(ValueError, match=r"c.jsonl line 1: the row is one of pairs"):
        read_examples([tmp_path / "a.jsonl", tmp_path / "c.jsonl"])


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".jsonl.gz", ".parquet", ".csv", ".tsv"])
def test_every_format_gives_the_same_examples(tmp_path, ending):
    rows = [promise.FORMS["completion"][0](i) for i in range(20)]
    path = tmp_path / f"a{ending}"
    path.write_bytes(promise.written(rows, ending))
    found = [each.messages for each in read_examples(path).examples]
    assert found == [read_one(row).messages for row in rows]
    if ending in (".csv", ".tsv"):
        return
    # Lists of messages, with fields that only some messages have.
    rows = [
        {"messages": [USER, ANSWER, USER, WORSE | {"train": False}]},
        {"messages": [USER, WORSE]},
    ]
    path.write_bytes(promise.written(rows, ending))
    assert [each.messages for each in read_examples(path).examples] == [
        row["messages"] for row in rows
    ]


def test_of_a_folder_with_splits_those_for_training_are_read(tmp_path):
    jsonl(tmp_path / "train.jsonl", [{"messages": [USER, ANSWER]}])
    jsonl(tmp_path / "test.jsonl", [{"messages": [USER, WORSE]}])
    found = read_examples(tmp_path)
    assert [each.messages for each in found.examples] == [[USER, ANSWER]]
    assert found.lines[1] == "reading 1 files: 1 jsonl; ignored: test.jsonl"


def test_a_folder_without_rows_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("Once upon a time", encoding="utf-8")
    with pytest.raises(ValueError, match="holds no file with rows") as caught:
        ExampleFiles(tmp_path)
    # That flag is one of prepare_data.py.
    assert "--text_format" not in str(caught.value)


def test_json_lines_under_any_name_and_standard_input_are_read_twice(tmp_path, monkeypatch):
    path = jsonl(tmp_path / "chats", [{"messages": [USER, ANSWER]}])
    assert len(list(ExampleFiles(path))) == 1
    data = mock.Mock(buffer=io.BytesIO(path.read_bytes()))
    monkeypatch.setattr(sys, "stdin", data)
    files = ExampleFiles("-")
    assert len(list(files)) == len(list(files)) == 1


def test_a_comma_without_quotes_does_not_move_words_from_the_prompt_to_the_answer(tmp_path):
    """Text of the last column is read to the end of its line, which is right for a single text.

    Here the prompt was "Why" and the answer " oh why?,Because".
    """
    path = tmp_path / "a.csv"
    path.write_text('prompt,completion\n"Who?",I.\nWhy, oh why?,Because\n', encoding="utf-8")
    with pytest.raises(ValueError, match="a.csv line 3 has 3 fields, the header has 2"):
        read_examples(path)


def test_rows_with_null_for_the_columns_of_other_rows_are_mixed():
    rows = [
        {"messages": [USER, ANSWER], "prompt": None, "completion": None},
        {"messages": None, "prompt": "Who?", "completion": "I."},
    ]
    with pytest.raises(ValueError, match="rows row 1: mixed keys"):
        list(ExampleRows(rows, "rows"))


# ------------------------------------------------------------------------------- held out
def test_the_same_prompt_is_never_on_both_sides():
    """A validation loss of questions that were trained on says nothing.

    Conversations that begin alike, and both sides of a pair, belong together.
    """
    rows = [
        Conversation([{"role": "user", "content": f"ask {i % 500}"}, ANSWER, USER, WORSE])
        for i in range(2000)
    ]
    pairs = [
        Pair([{"role": "user", "content": f"ask  {i}"}], [ANSWER], [WORSE]) for i in range(500)
    ]
    digests = np.array([opening_digest(each) for each in rows + pairs], dtype=np.uint64)
    is_held, line = hold_out(digests, 0.02)
    assert line == "" and 0.005 < is_held.mean() < 0.05
    sides = is_held.reshape(5, 500)
    assert (sides == sides[0]).all()


def test_a_small_set_holds_out_its_rarest_prompt():
    digests = np.array([2**64 - 1] * 5 + [2**64 - 3] * 2 + [2**64 - 2] * 3, dtype=np.uint64)
    is_held, line = hold_out(digests, 0.02)
    assert is_held.tolist() == [False] * 5 + [True] * 2 + [False] * 3
    assert line == "few prompts: 2 of 10 examples held out"
    # And one whose prompts all fall on that side keeps something to train on.
    is_held, _ = hold_out(np.array([0, 1, 1], dtype=np.uint64), 0.02)
    assert is_held.tolist() == [True, False, False]


def test_with_one_prompt_none_is_held_out():
    is_held, line = hold_out(np.zeros(9, dtype=np.uint64), 0.02)
    assert not is_held.any() and "no validation loss" in line


# ------------------------------------------------------------------------------- the promise
def test_damaged_files_are_refused_or_counted():
    promise.damaged_files(120).check()


@pytest.mark.parametrize(
    "owner, name",
    [(messages, "refuse_tools"), (messages, "is_trained"), (forms, "check_conversation")],
)
def test_a_fault_that_is_accepted_is_found(owner, name):
    with mock.patch.object(owner, name, lambda *_: True):
        tally = promise.damaged_files(300)
    assert any("it was accepted" in failure or "counted" in failure for failure in tally.failures)
