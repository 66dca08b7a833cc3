"""predict.py --chat and --messages: turns, commands, files, and what the model is asked."""

from __future__ import annotations

import io
import json
import sys

import pytest

import predict
from runtime.data.chat import prompt_ids, render, with_chat
from runtime.inference.conversation import Conversation
from runtime.inference.requests import read_messages
from runtime.inference.session import CHAT_COMMANDS, COMMANDS
from tests.builders_inference import (
    BYTE,
    END,
    biased_model,
    draw_given_ids,
    predict_with,
    predictor_of,
    repl_with,
    save,
)

CHAT = with_chat(BYTE)
ASK = [{"role": "user", "content": "hi"}]


def message(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def asked(*messages) -> list[int]:
    """Return the ids of messages given as (role, content) in turn: user, assistant, user..."""
    return prompt_ids([message(*one) for one in messages], CHAT)


@pytest.fixture(scope="module")
def chatting(tmp_path_factory) -> str:
    """Return a checkpoint with chat ids, and a context that holds a few turns."""
    model = biased_model(vocabulary_size=263, context_length=512)
    return save(tmp_path_factory.mktemp("chatting"), model, CHAT)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> str:
    return save(tmp_path_factory.mktemp("plain"), biased_model())


@pytest.fixture
def run(capsys):
    return predict_with(capsys)


@pytest.fixture
def drawn(monkeypatch):
    return draw_given_ids(monkeypatch)


@pytest.fixture
def repl(monkeypatch, capsys):
    feed = repl_with(monkeypatch, capsys)
    return lambda ckpt, script, *flags: feed(ckpt, script, "--chat", "--max_new_tokens", 9, *flags)


def prompts(drawn) -> list[list[int]]:
    return [call[0][0] for call in drawn.calls]


# ------------------------------------------------------------------------------------- in turns
def test_each_line_is_a_message_and_the_turns_add_up(chatting, repl, drawn):
    drawn.ids = [*b"yes", CHAT.chat.end]
    assert repl(chatting, "hi\n+ more\n") == ("yes\nyes\n", "")
    assert prompts(drawn) == [
        asked(("user", "hi")),
        asked(("user", "hi"), ("assistant", "yes"), ("user", "+ more")),
    ]


def test_an_answer_that_was_cut_is_ended_before_the_next_message(chatting, repl, drawn):
    """Else the model would read the next message as part of its own answer."""
    drawn.ids = [*b"yes yes yes"]
    repl(chatting, "hi\nso\n", "--max_new_tokens", 3)
    assert prompts(drawn)[1] == asked(("user", "hi"), ("assistant", "yes"), ("user", "so"))
    drawn.calls.clear()
    drawn.ids = [*b"yes", END]
    repl(chatting, "hi\nso\n")
    assert prompts(drawn)[1] == asked(("user", "hi"), ("assistant", "yes"), ("user", "so"))


def test_a_stop_text_ends_the_message(chatting, repl, drawn):
    drawn.ids = [*b"yes, no"]
    assert repl(chatting, ":stop ,\nhi\nso\n")[0] == "stop = ','\nyes\nyes\n"
    assert prompts(drawn)[1] == asked(("user", "hi"), ("assistant", "yes"), ("user", "so"))


def test_generation_ends_at_end_and_draws_no_header(chatting, repl, drawn):
    drawn.ids = [*b"yes"]
    repl(chatting, "hi\n")
    settings = drawn.calls[0][2]
    assert settings["stop_ids"] == [CHAT.chat.end, END]
    # The header's ids, and the model's rows beyond the tokenizer.
    assert set(settings["banned_ids"]) == {CHAT.chat.start, CHAT.chat.message, 260, 261, 262}


def test_the_systems_message_comes_first(chatting, repl, drawn):
    drawn.ids = [*b"yes", CHAT.chat.end]
    script = ':system\n:system  be kind \nhi\n:system\nso\n:system ""\nand\n'
    out, _ = repl(chatting, script)
    assert out.splitlines() == [
        "system = no message",
        "system = 'be kind'",
        "yes",
        "system = 'be kind'",
        "yes",
        "system = no message",
        "yes",
    ]
    system, turn = ("system", "be kind"), (("user", "hi"), ("assistant", "yes"))
    assert prompts(drawn) == [
        asked(system, ("user", "hi")),
        asked(system, *turn, ("user", "so")),
        asked(*turn, ("user", "so"), ("assistant", "yes"), ("user", "and")),
    ]


def test_undo_takes_a_turn_back_and_reset_all_of_them(chatting, repl, drawn):
    drawn.ids = [*b"yes", CHAT.chat.end]
    out, err = repl(
        chatting, ":undo\n:system s\na\nb\n:undo\nc\n:undo\n:undo\n:undo\nd\n:reset\ne\n"
    )
    assert out.splitlines() == [
        "there is no text yet",
        "system = 's'",
        "yes",
        "yes",
        "taken back; 1 turn left",
        "yes",
        "taken back; 1 turn left",
        "taken back; no turns left",
        "there is no text yet",
        "yes",
        "the next prompt starts a new chat",
        "yes",
    ]
    system = ("system", "s")
    first = (system, ("user", "a"), ("assistant", "yes"))
    assert prompts(drawn) == [
        asked(system, ("user", "a")),
        asked(*first, ("user", "b")),
        asked(*first, ("user", "c")),
        asked(system, ("user", "d")),
        asked(system, ("user", "e")),
    ]
    assert not err


def test_an_answer_that_fails_is_no_turn(chatting, repl, drawn, monkeypatch):
    drawn.ids = [*b"yes", CHAT.chat.end]
    ids_for = Conversation.ids_for

    def fails_once(self, user, room):
        if user == "bad":
            raise ValueError("cannot")
        return ids_for(self, user, room)

    monkeypatch.setattr(Conversation, "ids_for", fails_once)
    assert repl(chatting, "a\nbad\nb\n") == ("yes\nyes\n", "error: cannot\n")
    assert prompts(drawn)[1] == asked(("user", "a"), ("assistant", "yes"), ("user", "b"))


def test_the_cache_is_used_between_turns(chatting, monkeypatch):
    """Only the new message is read: an answer's own ids are kept, not encoded again."""
    predictor, config = predictor_of(
        chatting, chat=True, temperature=0.0, max_new_tokens=20, seed=0
    )
    chat = Conversation(predictor.tokenizer, 512)
    read, read_all = [], predictor.decoder.read_all

    def counted(texts, prompts):
        held = texts[0].cache.length
        logits = read_all(texts, prompts)
        read.append(texts[0].cache.length - held)
        return logits

    monkeypatch.setattr(predictor.decoder, "read_all", counted)
    # Room for both turns, so that the second finds the first one's cache.
    predictor._texts(1, 512)
    for user in ("hello there", "and you?"):
        ids, _ = chat.ids_for(user, 20)
        list(predictor.stream(ids, config))
        chat.add(user, predictor.last.text, predictor.last.ids)
    first, second = (chat.turns[0].ids, chat.turns[1].ids)
    answer = len(predictor.last.ids)
    # The last id of an answer was drawn and not read, and its <|end|> may be new too.
    assert read[1] <= len(second) - answer + 2
    assert read[0] > len("hello there") and len(first) > len("hello there")


def test_old_turns_are_left_out_whole_and_the_system_stays(tmp_path, monkeypatch, capsys, drawn):
    """Cut at the left, a chat would begin in the middle of a message and without its system."""
    ckpt = save(tmp_path, biased_model(vocabulary_size=260, context_length=96), CHAT)
    drawn.ids = [*b"yes", CHAT.chat.end]
    feed = repl_with(monkeypatch, capsys)
    _, err = feed(ckpt, ":system s\na\nb\nc\nd\ne\n", "--chat", "--max_new_tokens", 9)
    left_out = []
    for number, ids in enumerate(prompts(drawn)):
        earlier = [[("user", u), ("assistant", "yes")] for u in "abcde"[:number]]
        kept = [
            asked(("system", "s"), *sum(earlier[first:], []), ("user", "abcde"[number]))
            for first in range(number + 1)
        ]
        # The most that leaves room for an answer.
        fitting = next(i for i, one in enumerate(kept) if len(one) + 9 <= 96)
        assert ids == kept[fitting]
        left_out.append(fitting)
    assert left_out[0] == 0 and left_out[-1] > 1
    assert err.splitlines() == [
        f"note: the context has 96 tokens: of the chat's {number} earlier turns, the oldest "
        f"{count} are left out"
        for number, count in enumerate(left_out)
        if count
    ]


def test_help_names_what_a_chat_has(chatting, repl, drawn):
    out, _ = repl(chatting, ":help\n")
    assert all(f"  {command} " in out for command in (*COMMANDS, *CHAT_COMMANDS))
    assert ":system" in out and "+<text>" not in out and not drawn.calls


def test_a_chat_is_saved_as_messages(chatting, repl, drawn, tmp_path):
    drawn.ids = [*b"yes", CHAT.chat.end]
    path = tmp_path / "chats.jsonl"
    out, _ = repl(chatting, f":system s\na\n:reset\nb\n:save {path}\n")
    assert out.splitlines()[-1] == f"saved 2 chats in {path}"
    chats = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    assert chats == [
        [message("system", "s"), message("user", letter), message("assistant", "yes")]
        for letter in "ab"
    ]
    # What it wrote can be trained on.
    for messages in chats:
        assert any(render(messages, CHAT).is_target)


def test_json_lines_of_a_chat_and_its_counters(chatting, repl, drawn):
    drawn.ids = [*b"yes", CHAT.chat.end]
    out, _ = repl(chatting, "hi\n", "--json")
    record = json.loads(out)
    assert (record["prompt"], record["text"], record["ended"]) == ("hi", "yes", "end of text")
    assert repl(chatting, "hi\n:stats\n:experts\n")[0].startswith("yes\n4 tokens drawn for ")


def test_control_ids_that_are_drawn_show_nothing(chatting, run, drawn):
    """Should a model draw a header in spite of all: no mark on the screen."""
    drawn.ids = [*b"a", CHAT.chat.message, *b"b", CHAT.chat.end]
    assert run("--ckpt", chatting, "--chat", "--prompt", "hi") == "ab\n"


# ------------------------------------------------------------------------------------- one shot
def test_a_prompt_is_one_message(chatting, run, drawn, tmp_path, monkeypatch):
    drawn.ids = [*b"yes", CHAT.chat.end]
    assert run("--ckpt", chatting, "--chat", "--prompt", "hi") == "yes\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
    assert run("--ckpt", chatting, "--chat") == "yes\n"
    (tmp_path / "p.txt").write_text("hi\nho\n")
    flags = ("--ckpt", chatting, "--chat", "--prompt_file", tmp_path / "p.txt")
    assert run(*flags) == "yes\n\nyes\n"
    assert prompts(drawn) == [asked(("user", "hi"))] * 3
    assert drawn.calls[2][0] == [asked(("user", "hi")), asked(("user", "ho"))]
    # Without --chat it is a text, as for any model.
    assert run("--ckpt", chatting, "--prompt", "hi") == "hiyes\n"
    assert prompts(drawn)[-1] == [END, *b"hi"]


LONG = [message("system", ""), *ASK, message("assistant", "<|end|>"), message("user", "é")]
FILES = {
    "one.json": json.dumps(ASK),
    "object.json": json.dumps({"messages": ASK, "id": 7}, indent=1),
    "several.json": json.dumps([{"messages": ASK}, LONG]),
    "lists.json": json.dumps([ASK, LONG]),
    "lines.jsonl": json.dumps({"messages": ASK}) + "\n\n" + json.dumps({"messages": LONG}) + "\n",
    "lists.jsonl": json.dumps(ASK) + "\n" + json.dumps(LONG),
    "one.jsonl": json.dumps(ASK) + "\n",
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_messages_of_a_file(tmp_path, name, encoding):
    path = tmp_path / name
    path.write_bytes(FILES[name].encode(encoding))
    two = name.startswith(("several", "lists", "lines"))
    assert read_messages(str(path)) == ([ASK, LONG] if two else [ASK])


def test_messages_are_answered(chatting, run, drawn, tmp_path, monkeypatch):
    drawn.ids = [*b"yes", CHAT.chat.end]
    path = tmp_path / "m.json"
    path.write_text(FILES["one.json"])
    assert run("--ckpt", chatting, "--messages", path) == "yes\n"
    path.write_text(FILES["several.json"])
    out = run("--ckpt", chatting, "--messages", path, "--json", "--num_samples", 2, "--seed", 5)
    records = [json.loads(line) for line in out.splitlines()]
    assert [(r["messages"], r["text"], r["seed"]) for r in records] == [
        (ASK, "yes", 5),
        (ASK, "yes", 6),
        (LONG, "yes", 5),
        (LONG, "yes", 6),
    ]
    monkeypatch.setattr(
        sys, "stdin", io.TextIOWrapper(io.BytesIO(FILES["one.json"].encode()), encoding="ascii")
    )
    assert run("--ckpt", chatting, "--messages", "-") == "yes\n"
    ids = [prompt for call in drawn.calls for prompt in call[0]]
    long = prompt_ids(LONG, CHAT)
    hi = prompt_ids(ASK, CHAT)
    assert ids == [hi, hi, hi, long, long, hi]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("", "m.json holds no messages: write"),
        ("[]", "m.json holds no messages: write"),
        ("hello", "m.json line 1 is not JSON"),
        ('{"prompt": "a"}', "m.json: messages must be a list of messages .*, not None"),
        ('[{"role": "bot", "content": "a"}]', "m.json: message 1: role must be one of"),
        (json.dumps([ASK, 5]), "m.json conversation 2: messages must be a list .*, not 5"),
        (
            json.dumps(ASK) + "\n" + json.dumps([*ASK, message("assistant", "a")]),
            "m.json line 2: the last message is the assistant's: end with one that it can answer",
        ),
        ("[" * 100_000, "m.json line 1 is not JSON"),
        ("\0", "m.json"),
        (None, "m.json cannot be read"),
    ],
)
def test_a_file_without_messages_is_one_line(chatting, tmp_path, monkeypatch, content, line):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "m.json").write_text(content)
    with pytest.raises(ValueError, match=f"^{line}") as caught:
        predict.main(["--ckpt", chatting, "--messages", "m.json"])
    assert "\n" not in str(caught.value)


def test_a_model_without_a_layout_says_what_to_do(plain, tmp_path):
    (tmp_path / "m.json").write_text(FILES["one.json"])
    for flags in (["--chat"], ["--messages", str(tmp_path / "m.json")]):
        with pytest.raises(ValueError) as caught:
            predict.main(["--ckpt", plain, *flags])
        assert str(caught.value) == (
            f"{plain} was not trained on chats, so it has no chat layout: train it with python -m "
            f"scripts.sft --init_from {plain}, or leave --chat and --messages out"
        )


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--messages", "m", "--prompt", "p"], "give either prompt or messages, not both"),
        (["--messages", "m", "--prompt_file", "p"], "give either prompt_file or messages, not"),
        (["--messages", "m", "--interactive"], "interactive asks for prompts itself: leave"),
        (["--messages", "m", "--show_experts"], "show_experts and experts_html are for one"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(chatting, flags, line):
    with pytest.raises(ValueError, match=f"^{line}"):
        predict.main(["--ckpt", chatting, *flags])


def test_real_answers_end_and_hold_no_marks(chatting, run):
    """A random model, for many seeds: no header's word is ever in its answers."""
    out = run(
        *("--ckpt", chatting, "--chat", "--prompt", "hi", "--num_samples", 64),
        *("--batch_size", 64, "--max_new_tokens", 40, "--top_k", 0, "--temperature", 5, "--json"),
    )
    records = [json.loads(line) for line in out.splitlines()]
    assert len(records) == 64
    assert not any("<|" in record["text"] for record in records)
    assert {"end of text"} <= {record["ended"] for record in records}
