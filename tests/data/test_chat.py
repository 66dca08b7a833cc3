"""runtime/data/chat.py: messages -> ids and targets, and the ids that no text contains."""

from __future__ import annotations

import copy
import json
import random

import pytest
import tiktoken

from runtime.data.chat import (
    HARMONY,
    check_messages,
    has_chat,
    prompt_ids,
    render,
    with_chat,
)
from runtime.data.hf_tokenizer import special_words
from runtime.data.tokenizer import CHAT_WORDS, NoTokenizer, Tokenizer, TokenStream
from runtime.data.tokenizers import (
    compacted,
    load_tokenizer,
    tokenizer_from_state,
    tokenizer_of,
    train_bpe,
)
from tests.builders_chat import PIECES, conversation
from tests.builders_tokenizer import TALE, stand_in

KINDS = ("byte", "bpe:300", "gpt2", "gpt2:compact", "o200k_base", "o200k_base:compact")


@pytest.fixture(params=KINDS)
def plain(request, monkeypatch) -> Tokenizer:
    """One tokenizer of each kind, without chat ids."""
    name = request.param
    monkeypatch.setitem(tiktoken.registry.ENCODINGS, "gpt2", stand_in())
    if name.startswith("o200k_base"):
        request.getfixturevalue("o200k")
    if name.startswith("bpe:"):
        return train_bpe(TALE * 20, 300)
    tokenizer = load_tokenizer(name.removesuffix(":compact"))
    return compacted(tokenizer, tokenizer.encode(TALE[0])) if ":compact" in name else tokenizer


def by_hand(messages, tokenizer):
    """The layout as a text's pieces, each encoded alone."""
    start, end, message = tokenizer.chat
    ids, is_target = [tokenizer.end_of_text_id], [False]
    for m in messages:
        trained = m["role"] == "assistant" and m.get("train", True) and m.get("weight", 1)
        for part, target in (
            ([start], False),
            (tokenizer.encode(m["role"]), False),
            ([message], False),
            (tokenizer.encode(m["content"]), trained),
            ([end], trained),
        ):
            ids += part
            is_target += [bool(target)] * len(part)
    return ids, is_target


def test_500_conversations_are_rendered_exactly(plain):
    """Peers trained on prompts, on nothing, or without the end token."""
    tokenizer, rng = with_chat(plain), random.Random(0)
    for _ in range(500):
        messages = conversation(rng)
        rendered = render(messages, tokenizer)
        assert (rendered.ids, rendered.is_target) == by_hand(messages, tokenizer)
        pairs = list(zip(rendered.ids, rendered.is_target, strict=True))
        answers = "".join(
            m["content"] + "<|end|>"
            for m in messages
            if m["role"] == "assistant" and m.get("train", True) and m.get("weight", 1)
        )
        assert tokenizer.decode([i for i, target in pairs if target]) == answers
        # As many control ids as the messages have, whatever their texts spell.
        assert [rendered.ids.count(i) for i in tokenizer.chat] == [len(messages)] * 3


def test_the_last_answer_alone_may_be_trained(plain):
    tokenizer = with_chat(plain)
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "c"},
    ]

    def targets(messages, train_on):
        ids, is_target = render(messages, tokenizer, train_on)
        return tokenizer.decode([i for i, target in zip(ids, is_target, strict=True) if target])

    assert targets(messages, "all") == "one<|end|>two<|end|>"
    assert targets(messages, "last") == "two<|end|>"
    messages[3]["train"] = False
    assert targets(messages, "last") == ""
    with pytest.raises(ValueError, match="^train_on must be all or last, not 'first'$"):
        render(messages, tokenizer, "first")


def test_a_prompt_is_the_beginning_of_its_conversation(plain):
    """Else the model would be asked in another way than it was trained."""
    tokenizer, rng = with_chat(plain), random.Random(1)
    for _ in range(100):
        messages = [*conversation(rng), {"role": "user", "content": rng.choice(PIECES)}]
        answer = {"role": "assistant", "content": rng.choice(PIECES)}
        prompt, (ids, is_target) = (
            prompt_ids(messages, tokenizer),
            render([*messages, answer], tokenizer, "last"),
        )
        assert ids[: len(prompt)] == prompt
        assert is_target == [False] * len(prompt) + [True] * (len(ids) - len(prompt))
    with pytest.raises(ValueError, match="^the last message is the assistant's: end with one .*$"):
        prompt_ids([*messages, answer], tokenizer)


def test_no_text_has_chat_ids(plain):
    tokenizer = with_chat(plain)
    for text in (*PIECES, *TALE, "".join(CHAT_WORDS) * 3):
        ids = tokenizer.encode(text)
        assert ids == plain.encode(text)
        assert tokenizer.encode_continuation(text) == ids
        assert not set(ids) & set(tokenizer.chat)


def test_where_the_chat_ids_are(plain):
    tokenizer, size = with_chat(plain), plain.vocabulary_size
    if plain.name == "o200k_base":
        # openai_harmony's HARMONY_GPT_OSS encoding gives these numbers.
        assert tokenizer.chat == HARMONY == (200_006, 200_007, 200_008)
        assert tokenizer.vocabulary_size == size == 200_019
        assert len(plain.undecodable_ids) - len(tokenizer.undecodable_ids) == 3
    else:
        assert tokenizer.chat == (size, size + 1, size + 2)
        assert tokenizer.vocabulary_size == size + 3
    assert not set(tokenizer.chat) & set(tokenizer.undecodable_ids)
    assert [tokenizer.decode([i]) for i in tokenizer.chat] == [
        "<|start|>",
        "<|end|>",
        "<|message|>",
    ]
    assert tokenizer.stop_ids == (tokenizer.chat.end,)
    assert set(tokenizer.banned_ids) == {
        *tokenizer.undecodable_ids,
        tokenizer.chat.start,
        tokenizer.chat.message,
    }
    words = special_words(tokenizer)
    assert [words[word] for word in CHAT_WORDS] == list(tokenizer.chat)
    # The plain one is as it was.
    assert plain.chat is None
    assert plain.stop_ids == (plain.end_of_text_id,)
    assert plain.banned_ids == plain.undecodable_ids
    assert "chat" not in plain.summary()


def test_chat_ids_are_in_state_and_fingerprint(plain):
    tokenizer = with_chat(plain)
    assert with_chat(tokenizer) is tokenizer
    assert tokenizer.fingerprint != plain.fingerprint == tokenizer.base_fingerprint
    state = json.loads(json.dumps(tokenizer.to_state()))
    for again in (tokenizer_from_state(state), copy.deepcopy(tokenizer)):
        assert again.summary() == tokenizer.summary()
        assert again.to_state() == tokenizer.to_state()
        assert again.stop_ids == tokenizer.stop_ids
        messages = conversation(random.Random(2))
        assert render(messages, again) == render(messages, tokenizer)
    assert has_chat(tokenizer)
    assert not has_chat(plain)


@pytest.mark.parametrize(
    "change",
    [
        {"chat": {"start": 257, "end": 258, "message": 259}},
        {"chat": None},
        {"chat": [257, 258, 259]},
        {"fingerprint": load_tokenizer("byte").fingerprint},
        {"vocabulary_size": 257},
    ],
)
def test_damaged_chat_states_are_refused(change):
    state = with_chat(load_tokenizer("byte")).to_state()
    with pytest.raises(ValueError, match="^the stored tokenizer byte is not the byte found here"):
        tokenizer_from_state(state | change)


def test_a_plain_state_with_a_chats_fingerprint_is_refused():
    """What a release without chats would have read: other ids under the same name."""
    state = with_chat(load_tokenizer("byte")).to_state()
    del state["chat"]
    with pytest.raises(ValueError, match="its fingerprint is"):
        tokenizer_from_state(state)


def test_a_chat_checkpoint_may_be_named_by_its_plain_tokenizer(tmp_path):
    class Chatting:
        path, tokenizer_state = "chat.pt", with_chat(load_tokenizer("byte")).to_state()

        class model_config:
            vocabulary_size = 260

    assert tokenizer_of(Chatting, "byte").chat == (257, 258, 259)
    train_bpe_state = train_bpe(TALE * 20, 300).to_state()
    Chatting.tokenizer_state = train_bpe_state
    with pytest.raises(ValueError, match="was trained with tokenizer bpe:300, not byte"):
        tokenizer_of(Chatting, "byte")


def test_a_stream_shows_no_chat_ids(plain):
    tokenizer = with_chat(plain)
    stream, start, end, message = TokenStream(tokenizer), *tokenizer.chat
    half = tokenizer.encode("灯")
    ids = [start, *tokenizer.encode("a"), message, *half, end]
    assert "".join(map(stream.push, ids)) + stream.flush() == "a灯"


def test_no_character_crosses_a_border():
    """Bytes of one character in two messages: two halves, as each message is encoded alone."""
    tokenizer = with_chat(load_tokenizer("byte"))
    messages = [{"role": "user", "content": "é"}, {"role": "assistant", "content": "灯"}]
    assert tokenizer.decode(render(messages, tokenizer).ids) == (
        "<|endoftext|><|start|>user<|message|>é<|end|><|start|>assistant<|message|>灯<|end|>"
    )
    # JSON can spell half a character; it is replaced within its message.
    messages[0]["content"] = "\ud83d"
    messages[1]["content"] = "\ude00"
    shown = tokenizer.decode(render(messages, tokenizer).ids)
    assert shown.count("\N{REPLACEMENT CHARACTER}") == 2


def test_an_empty_system_message_is_a_message():
    tokenizer = with_chat(load_tokenizer("byte"))
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": ""}]
    assert tokenizer.decode(prompt_ids(messages, tokenizer)) == (
        "<|endoftext|><|start|>system<|message|><|end|><|start|>user<|message|><|end|>"
        "<|start|>assistant<|message|>"
    )


GOOD = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    "messages, line",
    [
        ([], r"messages must be a list of messages with role and content, not \[\]"),
        ("hi", "messages must be a list of messages with role and content, not 'hi'"),
        ([GOOD, "hi"], "message 2: it must be an object with role and content, not 'hi'"),
        (
            [GOOD | {"role": "bot"}],
            "message 1: role must be one of system, developer, user, assistant, not 'bot'",
        ),
        ([{"content": "a"}], "message 1: role must be one of .*, not None"),
        ([GOOD | {"role": []}], r"message 1: role must be one of .*, not \[\]"),
        ([{"role": "user"}], "message 1: content must be a text, not None"),
        (
            [GOOD | {"content": [{"type": "text", "text": "x" * 99}]}],
            r"message 1: content must be a text, not \[\{'type': 'text'.*\.\.\.",
        ),
        (
            [{"role": "assistant", "content": None, "tool_calls": [1]}],
            "message 1: tool_calls has no counterpart in this chat layout: leave such chats out",
        ),
        (
            [{"role": "assistant", "content": "a", "train": 1}],
            "message 1: train must be true or false, not 1",
        ),
        (
            [{"role": "assistant", "content": "a", "weight": 0.5}],
            "message 1: weight must be 0 or 1, not 0.5",
        ),
        (
            [{"role": "assistant", "content": "a", "weight": True}],
            "message 1: weight must be 0 or 1, not True",
        ),
        (
            [{"role": "assistant", "content": "a", "weight": 0, "train": True}],
            "message 1: train true and weight 0 contradict each other",
        ),
        (
            [GOOD | {"train": True}],
            "message 1: only messages of the assistant are trained: leave train and weight out of "
            "the user's",
        ),
    ],
)
def test_wrong_messages_are_refused_in_a_line(messages, line):
    tokenizer = with_chat(load_tokenizer("byte"))
    for check in (
        check_messages,
        lambda m: render(m, tokenizer),
        lambda m: prompt_ids(m, tokenizer),
    ):
        with pytest.raises(ValueError, match=f"^{line}$"):
            check(messages)


def test_what_says_nothing_is_allowed():
    """Published chats have empty keys of what they do not use, and weights of other messages."""
    check_messages(
        [
            GOOD | {"tool_calls": None, "name": "Ann", "weight": 0, "train": False},
            {"role": "assistant", "content": "", "weight": 1, "train": True, "tool_calls": []},
        ]
    )


def test_a_tokenizer_without_a_layout_says_what_to_do():
    with pytest.raises(ValueError, match="^tokenizer byte has no chat layout: train the model on "):
        render([GOOD], load_tokenizer("byte"))
    with pytest.raises(ValueError, match="^a chat needs the model's tokenizer, and with "):
        with_chat(NoTokenizer(10))
