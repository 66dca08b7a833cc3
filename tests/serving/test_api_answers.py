"""From the engine's events to text, scores and JSON: pure, byte by byte."""

from __future__ import annotations

import random

from runtime.data.chat import with_chat
from runtime.serving.answers import Answer, Delta, Entry, usage_of
from runtime.serving.asking import Asking
from runtime.serving.chat import ask_chat
from runtime.serving.completions import ask_completion
from runtime.serving.request import Experts, Finished, PromptScores, Started, Token
from runtime.serving.shapes import LEAST_LOG_PROB, Shapes, text_logprobs, token_text
from tests.builders_server import BYTE, END, served_of

CHAT = with_chat(BYTE)


def asking_of(**body) -> Asking:
    return ask_completion({"prompt": "ab"} | body, served_of())


def answered(asking: Asking, ids, reason="length", tokenizer=BYTE, index=0, **token):
    """Return (answer, its deltas) after events with these ids."""
    answer = Answer(asking, asking.jobs[index], tokenizer)
    request = asking.jobs[index].request
    events = [Started(len(request.ids), 0)]
    events += [Token(i, **token) for i in ids] + [Finished(reason)]
    return answer, [answer.take(event) for event in events]


def joined(deltas) -> Delta:
    whole = Delta()
    for delta in deltas:
        whole.text += delta.text
        whole.entries += delta.entries
        whole.finish_reason = delta.finish_reason or whole.finish_reason
    return whole


# ------------------------------------------------------------------------------------- stop texts
def test_a_stop_text_across_tokens_is_never_told():
    """Held until it is clear: "wor" may begin "world", and a client cannot take text back."""
    answer, deltas = answered(asking_of(stop="world"), BYTE.encode("a wor world! more"))
    told = [delta.text for delta in deltas]
    assert "".join(told) == "a wor " and answer.is_done
    assert all(len(piece) <= 5 for piece in told)
    assert joined(deltas).finish_reason == "stop"
    # What the engine drew before it was cancelled counts for nothing.
    assert answer.num_tokens == len("a wor world")
    assert len(joined(deltas).entries) == answer.num_tokens


def test_what_may_have_begun_a_stop_text_is_told_at_the_end():
    _, deltas = answered(asking_of(stop=["world"]), BYTE.encode("a wor"))
    assert [delta.text for delta in deltas][-1] == "wor"
    assert joined(deltas).text == "a wor" and deltas[-1].finish_reason == "length"


def test_random_texts_end_at_their_first_stop_however_they_are_cut():
    r = random.Random(1)
    for _ in range(300):
        text = "".join(r.choice("ab\u00e9") for _ in range(r.randint(0, 24)))
        stops = ["".join(r.choice("ab\u00e9") for _ in range(r.randint(1, 3))) for _ in range(2)]
        _, deltas = answered(asking_of(stop=stops), BYTE.encode(text))
        # The stop that is whole first; of two that end together, the one that began first.
        ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
        at = min(ends)[1] if ends else len(text)
        assert joined(deltas).text == text[:at], (text, stops)
        assert joined(deltas).finish_reason == ("stop" if ends else "length")


def test_characters_over_token_borders_come_whole_and_a_torn_one_at_the_end():
    _, deltas = answered(asking_of(), BYTE.encode("\u00e9\U0001f600"))
    assert [delta.text for delta in deltas] == ["", "", "\u00e9", "", "", "", "\U0001f600", ""]
    _, deltas = answered(asking_of(), BYTE.encode("\U0001f600")[:3])
    assert deltas[-1].text == "\ufffd" and deltas[-1].finish_reason == "length"


def test_a_stop_id_is_a_token_and_no_text():
    answer, deltas = answered(asking_of(logprobs=0), [97, END], "stop", log_prob=-1.0, top=[])
    assert joined(deltas).text == "a" and joined(deltas).finish_reason == "stop"
    assert answer.num_tokens == 2 and len(joined(deltas).entries) == 2


# ------------------------------------------------------------------------------------------ shapes
def whole(asking: Asking, *answers, served=None):
    shapes = Shapes(asking, served or served_of())
    return shapes.whole([a for a, _ in answers], [joined(deltas) for _, deltas in answers])


def test_a_completion_is_openais():
    asking = asking_of(n=2, seed=5)
    found = whole(asking, *(answered(asking, BYTE.encode("cat"), index=i) for i in range(2)))
    assert found["object"] == "text_completion" and found["id"].startswith("cmpl-")
    assert found["model"] == "toy" and found["system_fingerprint"] == "abc-123"
    assert [c["index"] for c in found["choices"]] == [0, 1] and found["seed"] == 5
    assert [c["seed"] for c in found["choices"]] == [5, 6]
    first = found["choices"][0]
    assert (first["text"], first["finish_reason"], first["logprobs"]) == ("cat", "length", None)
    # The prompt, with its start token, once; every drawn token.
    assert found["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 6,
        "total_tokens": 9,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_usage_counts_each_prompt_once_and_every_token():
    asking = asking_of(prompt=["a", "bcd"], n=2)
    answers = [
        answered(asking, BYTE.encode("x" * n), index=i)[0] for i, n in enumerate((1, 2, 3, 4))
    ]
    usage = usage_of(answers, 2)
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (2 + 4, 10)
    assert usage["total_tokens"] == 16


def test_no_more_of_a_prompt_can_have_been_cached_than_there_is():
    """With n 3, cached_tokens added up to three prompts: prompt minus cached was negative.

    The second and third answer read the prompt from the first one's cache, and it counts once.
    """
    asking = asking_of(prompt=["abc", "de"], n=3)
    answers = [Answer(asking, job, BYTE) for job in asking.jobs]
    for answer, num_reused in zip(answers, (1, 3, 3, 0, 2, 2), strict=True):
        answer.take(Started(len(answer.job.request.ids), num_reused))
    usage = usage_of(answers, 3)
    assert usage["prompt_tokens"] == 4 + 3
    assert usage["prompt_tokens_details"] == {"cached_tokens": 1}


def test_tokens_of_one_text_are_all_told():
    """Ids 1 and 2 are both "x" in some vocabularies: one of them was lost from the list.

    The drawn token keeps its text, because clients look it up there (lm-eval: is it greedy?).
    """

    class Twins:
        def token_bytes(self, token_id):
            return b"y" if token_id == 9 else b"x"

    def top_of(drawn, *top):
        entry = Entry(drawn, 0, dict(top).get(drawn, -7.0), list(top))
        return list(text_logprobs([entry], Twins())["top_logprobs"][0].items())

    three = (1, -0.5), (2, -1.0), (9, -2.0)
    assert top_of(1, *three) == [("x", -0.5), ("token_id:2", -1.0), ("y", -2.0)]
    assert top_of(2, *three) == [("token_id:1", -0.5), ("x", -1.0), ("y", -2.0)]
    assert top_of(9, *three) == [("x", -0.5), ("token_id:2", -1.0), ("y", -2.0)]
    # None of the most likely: it comes last.
    assert top_of(3, *three)[-1] == ("x", -7.0) and len(top_of(3, *three)) == 4


def test_scores_are_lists_by_token_and_the_same_float_stands_in_both():
    """lm-eval calls a token greedy if its log-probability is the largest of its top ones."""
    asking = asking_of(logprobs=2)
    top = [(98, -0.1), (97, -2.5)]
    found = whole(asking, answered(asking, [97, 98, 0xC3], log_prob=-2.5, top=top))
    scores = found["choices"][0]["logprobs"]
    assert scores["tokens"] == ["a", "b", "bytes:\\xc3"] and scores["text_offset"] == [0, 1, 2]
    assert scores["token_logprobs"] == [-2.5] * 3
    assert scores["top_logprobs"][0] == {"b": -0.1, "a": -2.5}
    # The token itself comes with them, where it is none of the most likely.
    assert scores["top_logprobs"][2] == {"b": -0.1, "a": -2.5, "bytes:\\xc3": -2.5}


def test_echo_tells_the_prompt_without_a_start_token_that_nobody_sent():
    asking = asking_of(prompt="a\u00e9", echo=True, logprobs=1, max_tokens=1)
    answer = Answer(asking, asking.jobs[0], BYTE)
    scores = PromptScores(
        log_probs=[None, -1.0, -2.0, -3.0], tops=[None, [(9, -0.5)], [], []], experts=None
    )
    first = answer.take(Started(4, 0, scores))
    assert first.text == "a\u00e9" and [e.log_prob for e in first.entries] == [-1.0, -2.0, -3.0]
    then = answer.take(Token(98, -4.0, [(98, -4.0)]))
    assert then.entries[0].offset == 2
    # Ids are told as they came: the first has no score, and the last is the drawn token.
    asking = asking_of(prompt=[97, 98], echo=True, logprobs=1, max_tokens=1)
    answer = Answer(asking, asking.jobs[0], BYTE)
    parts = [answer.take(Started(2, 0, PromptScores([None, -2.0], [None, [(98, -2.0)]], None)))]
    parts += [answer.take(Token(99, -4.0, [(99, -4.0)])), answer.take(Finished("length"))]
    found = whole(asking, (answer, parts))["choices"][0]
    assert found["text"] == "abc" and found["logprobs"]["token_logprobs"] == [None, -2.0, -4.0]
    assert found["logprobs"]["top_logprobs"][0] is None
    assert found["logprobs"]["text_offset"] == [0, 1, 2]


def test_a_prompts_last_character_may_end_in_the_answer():
    asking = asking_of(prompt=BYTE.encode("\u00e9")[:1], echo=True, max_tokens=1)
    _, deltas = answered(asking, BYTE.encode("\u00e9")[1:])
    assert joined(deltas).text == "\u00e9"


def test_experts_and_ids_come_by_token():
    asking = asking_of(experts=True, return_token_ids=True, logprobs=1)
    experts = Experts([[1, 0], [2, 3]], [[0.75, 0.25], [0.5, 0.5]])
    answer = Answer(asking, asking.jobs[0], BYTE)
    parts = [answer.take(Token(97, -1.0, [(98, -0.5)], experts)), answer.take(Token(98, -1.0, []))]
    parts.append(answer.take(Finished("length")))
    choice = whole(asking, (answer, parts))["choices"][0]
    assert choice["experts"] == {"ids": [experts.ids, None], "weights": [experts.weights, None]}
    assert choice["token_ids"] == [97, 98] and choice["top_tokens"] == [[[98, "b", -0.5]], []]


def test_a_chat_is_openais_and_its_end_is_no_content():
    served = served_of(tokenizer=CHAT)
    body = {"messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 1}
    asking = ask_chat(body, served)
    pair = answered(
        asking, [97, 0xC3, CHAT.chat.end], "stop", CHAT, log_prob=-1.0, top=[(97, -1.0)]
    )
    found = whole(asking, pair, served=served)
    choice = found["choices"][0]
    assert found["object"] == "chat.completion" and found["id"].startswith("chatcmpl-")
    assert choice["message"] == {"role": "assistant", "content": "a\ufffd", "refusal": None}
    content = choice["logprobs"]["content"]
    assert [one["token"] for one in content] == ["a", "bytes:\\xc3"]
    assert content[1]["bytes"] == [0xC3]
    assert content[0]["top_logprobs"] == [{"token": "a", "logprob": -1.0, "bytes": [97]}]
    assert choice["finish_reason"] == "stop" and found["usage"]["completion_tokens"] == 3


def test_chunks_say_who_speaks_once_and_usage_last():
    served = served_of(tokenizer=CHAT)
    body = {"messages": [{"role": "user", "content": "x"}], "stream": True}
    asking = ask_chat(body | {"stream_options": {"include_usage": True}}, served)
    shapes = Shapes(asking, served)
    first = shapes.chunk(0, Delta(), True)
    assert first["object"] == "chat.completion.chunk" and first["usage"] is None
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert shapes.chunk(0, Delta("x"))["choices"][0]["delta"] == {"content": "x"}
    last = shapes.chunk(0, Delta(finish_reason="stop"))["choices"][0]
    assert (last["delta"], last["finish_reason"]) == ({}, "stop")
    answer, _ = answered(asking, [97], tokenizer=CHAT)
    usage = shapes.last_chunk([answer])
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 1


def test_a_score_that_json_cannot_hold_is_the_least_number():
    asking = asking_of(logprobs=1)
    pair = answered(asking, [97], log_prob=-float("inf"), top=[(97, -float("inf"))])
    scores = whole(asking, pair)["choices"][0]["logprobs"]
    assert scores["token_logprobs"] == [LEAST_LOG_PROB] and scores["top_logprobs"] == [
        {"a": LEAST_LOG_PROB}
    ]


def test_every_token_has_a_text_of_its_own():
    texts = {token_text(i, BYTE) for i in range(BYTE.vocabulary_size)}
    assert len(texts) == BYTE.vocabulary_size
