"""docs/post-training.md: its examples are read, its programs run, its ids and names are true."""

from __future__ import annotations

import dataclasses
import importlib
import re
import runpy

import pytest
import torch

from benchmarks.settings import COMMANDS
from runtime.base.shares import wilson
from runtime.data.chat import render, with_chat
from runtime.data.tokenizers import load_tokenizer
from runtime.inference.requests import read_messages
from runtime.inference.session import CHAT_COMMANDS
from runtime.posttraining import preference, sft, tasks
from runtime.posttraining.conversations import Conversation, Pair, Prompt, read_examples
from runtime.posttraining.forms import FORMS, KINDS
from runtime.posttraining.policy import Told
from runtime.posttraining.reward import load_reward
from runtime.training import closing
from runtime.training.metrics import HIGH, LOW
from tests.builders_posttraining import chats, tiny_base
from tests.conftest import REPO

PAGE = (REPO / "docs" / "post-training.md").read_text(encoding="utf-8")
GENERATION = (REPO / "docs" / "generation.md").read_text(encoding="utf-8")
MARKED = r"<!-- (example: [\w ]+|ids|reward) -->\n```(\w*)\n(.*?)```"
BLOCKS = {name: (kind, text) for name, kind, text in re.findall(MARKED, PAGE, re.DOTALL)}
PIP, SUE = {"role": "user", "content": "Who is Pip?"}, {"role": "user", "content": "Who is Sue?"}
BRIEF = {"role": "system", "content": "Be brief."}


def says(text: str, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


# Name of an example in the page -> the flag --columns, and what its rows are.
EXAMPLES = {
    "messages": (
        {},
        [
            Conversation([BRIEF, PIP, says("A rabbit.")]),
            Conversation(
                [
                    user("And Sue?"),
                    says("No idea.", train=False),
                    user("Look again."),
                    says("A girl."),
                ]
            ),
        ],
    ),
    "sharegpt": ({}, [Conversation([PIP, says("A rabbit.")])]),
    "alpaca": (
        {},
        [
            Conversation([user("Name the animal.\n\nPip is a rabbit."), says("A rabbit.")]),
            Conversation([BRIEF, PIP, says("A rabbit."), user("And now?"), says("A fox.")]),
        ],
    ),
    "completion": (
        {},
        [
            Conversation([PIP, says("A rabbit.")]),
            Conversation([BRIEF, SUE, says("A girl.")]),
        ],
    ),
    "table": (
        {"prompt": "question", "completion": "answer"},
        [
            Conversation([PIP, says("A rabbit.")]),
            Conversation([user("Who is Sue, and where?"), says("A girl, in the park.")]),
        ],
    ),
    "pairs": (
        {},
        [
            Pair([PIP], [says("A rabbit.")], [says("A fox.")]),
            Pair([SUE], [says("A girl.")], [says("A cat.")]),
        ],
    ),
    "whole pairs": ({}, [Pair([PIP], [says("A rabbit.")], [says("A fox.")])]),
    "prompts": (
        {},
        [
            Prompt([user("Tell a story about Pip.")], {"word": "rabbit"}),
            Prompt([BRIEF, SUE], {"word": "girl"}),
        ],
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_speaks_of_its_training(command, capsys):
    """best.pt was the lowest validation loss, of a run that its score decides."""
    with pytest.raises(SystemExit):
        importlib.import_module(f"scripts.{command}").main(["--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert "best.pt is the best of them" in words and "lowest validation loss" not in words
    assert "for its loss on its own text" in words and "seed of initial weights" not in words


# ------------------------------------------------------------------------------------------- files
@pytest.mark.parametrize("name", EXAMPLES)
def test_each_example_of_a_file_is_read(name, tmp_path):
    columns, wanted = EXAMPLES[name]
    kind, text = BLOCKS[f"example: {name}"]
    path = tmp_path / f"my.{'csv' if kind == 'csv' else 'jsonl'}"
    path.write_text(text, encoding="utf-8")
    found = read_examples(path, columns=columns)
    assert [dataclasses.replace(each, where="") for each in found.examples] == wanted
    assert not found.dropped


def test_every_form_that_is_read_has_a_row_and_an_example(tmp_path):
    """A form that the page lacks is one that nobody finds."""
    shown = {name.removeprefix("example: ") for name in BLOCKS if name.startswith("example: ")}
    assert shown == EXAMPLES.keys()
    kinds = {Conversation: "conversations", Pair: "pairs", Prompt: "prompts"}
    assert {kinds[type(rows[0])] for _, rows in EXAMPLES.values()} == KINDS.keys()
    (table,) = re.findall(r"^\| keys \|.*?(?=\n\n)", PAGE, re.MULTILINE | re.DOTALL)
    for form in FORMS:
        # Another name of `conversations`.
        if form.needs == ("conversation",):
            continue
        keys = ", ".join(f"`{name}`" for name in form.needs)
        row = rf"^\| {keys}(?: and any other columns)? \|.*\| `scripts\.{KINDS[form.kind]}` \|$"
        assert re.search(row, table, re.MULTILINE), form.name


# ------------------------------------------------------------------------------------------ layout
def test_the_ids_it_shows_are_those_of_the_layout():
    tokenizer = with_chat(load_tokenizer("byte"))
    rendered = render([user("Hi"), says("Hello.")], tokenizer)
    *context, learned = (line.split() for line in BLOCKS["ids"][1].splitlines())
    context = [int(i) for line in context for i in line]
    assert context + [int(i) for i in learned] == rendered.ids
    assert rendered.is_target == [False] * len(context) + [True] * len(learned)
    spelled = tokenizer.decode(rendered.ids)
    assert f"```\n{spelled}\n```" in PAGE


def test_the_ids_of_o200k_base_are_harmonys():
    from runtime.data.chat import HARMONY

    row = " | ".join(f"{i:,}" for i in (HARMONY.start, HARMONY.end, HARMONY.message))
    assert f"| o200k_base | {row} |" in PAGE


# ----------------------------------------------------------------------------------------- numbers
def test_every_number_of_a_log_or_score_is_explained():
    """A number without an explanation is read as what it is not."""
    explained = " ".join(line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| "))
    pair = (torch.zeros(2), torch.zeros(2), torch.ones(2), preference.DpoConfig())
    names = {*preference.preference_losses(*pair)[1], *preference.HELD_OUT_NAMES.values()}
    names |= {*Told.BASIC, "sampler_gap", "clipped", "kl", "exact match"}
    names |= {"questions", "requests", "ended", "reward", "length", "story loss", "base loss"}
    assert [name for name in sorted(names) if name not in explained] == []
    assert "questions: who" in explained and "who" in tasks.QUESTIONS
    assert "requests: hero" in explained and "hero" in tasks.PARTS


def test_the_figures_in_its_sentences_are_the_codes():
    assert f"{100 * sft.HELD_OUT:g} % of the examples are held out" in PAGE
    assert f"Below -{preference.MOST_FALL} nats a token" in PAGE
    low, high = wilson(70, 128)
    scores = {"hero": 70 / 128, "hero" + LOW: low, "hero" + HIGH: high}
    records = [{"kind": "score", "step": step, "score": scores} for step in (0, 1)]
    cell = closing.score_table(records)[1].split("  ")[1].strip()
    assert f"`{cell}`" in PAGE
    low, high = wilson(128, 256)
    assert (
        f"256 prompts decide nothing finer than about {100 * (high - low) / 2:.0f} points" in PAGE
    )


# ---------------------------------------------------------------------------------------- programs
def test_its_reward_works(tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text(BLOCKS["reward"][1], encoding="utf-8")
    reward = load_reward(f"{path}:score")
    prompt = Prompt([user("Tell a story about Pip.")], {"word": "rabbit"})
    assert reward(prompt, "A Rabbit.", True) == (
        2.0,
        {"has the word": 1.0, "short": 0.5, "ends": 0.5},
    )
    assert reward(prompt, "long " * 50, False).total == 0.0


def test_its_notebook_runs(tmp_path, monkeypatch, capsys):
    """The lines of "In a notebook", one after the other, on a tiny base and six steps."""
    section = PAGE.split("## In a notebook")[1].split("\n## ")[0]
    programs = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(programs) == 3
    base = tiny_base(tmp_path / "base")
    chats(tmp_path / "my.jsonl")
    monkeypatch.chdir(tmp_path)
    cells = "\n".join(programs).replace('"public/stories.pt"', repr(str(base)))
    assert "max_steps=50" in cells
    torch.set_num_threads(1)
    notebook = tmp_path / "notebook.py"
    notebook.write_text(cells.replace("max_steps=50", "max_steps=6, warmup_steps=1"))
    names = runpy.run_path(str(notebook))
    assert [r["step"] for r in names["records"] if r["kind"] == "train"] == [6]
    assert names["model"].config.vocabulary_size == names["source"].model_config.vocabulary_size + 3
    assert len(names["ids"][0]) >= 1 and names["found"].kind == "conversations"
    output = capsys.readouterr().out
    assert "40 conversations (messages)" in output and "held out" in output


def test_the_commands_of_a_chat_are_listed():
    for command in CHAT_COMMANDS:
        assert re.search(
            rf"^\| (?:`{re.escape(command)}`|{command}|.*`{command}`,)", GENERATION, re.M
        )


def test_the_messages_it_shows_are_read(tmp_path):
    (text,) = re.findall(r"<!-- example: messages -->\n```json\n(.*?)```", GENERATION, re.DOTALL)
    path = tmp_path / "messages.json"
    path.write_text(text, encoding="utf-8")
    assert read_messages(str(path)) == [[BRIEF, PIP]]
