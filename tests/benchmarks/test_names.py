"""benchmarks.names counts names as a reader does, and its probabilities are the model's."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch

from benchmarks import common, names
from runtime.data import toy_stories
from runtime.data.tokenizers import train_bpe
from tests.builders_inference import biased_model, predictor_of, save

TALES = [toy_stories.story(index) for index in range(30)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(TALES, 300)


@pytest.fixture
def predictor(tmp_path, tokenizer, request):
    context = getattr(request, "param", 600)
    model = biased_model(vocabulary_size=tokenizer.vocabulary_size, context_length=context)
    return predictor_of(save(tmp_path, model, tokenizer))[0]


def test_the_generators_own_stories_keep_all_their_names():
    """Else the share of a perfect model would be below 1."""
    counted = names.share_introduced([toy_stories.story(index) for index in range(3000)])
    assert counted["share_introduced"] == counted["share_of_stories_with_all_introduced"] == 1
    assert counted["names"] > 9 * 3000


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("Ben was a boy. Ben ran.", "1"),
        ("Ben was a boy. Tom ran. Ben laughed.", "01"),
        ("Ben saw his friend Tom. Tom ran to Ben.", "111"),
        ("Ben met a girl named Lily. Mia laughed. Lily cried.", "101"),
        ("Soon, Ben came. Tom the fox, who lived nearby, said to Tom.", "11"),
        # A third character is none of a toy story: this is another name for the friend.
        ("Ben saw his friend Tom. Ben and his friend Max ran.", "110"),
        # A friend is not introduced by a later mention.
        ("Ben ran. Tom ran. His friend Tom fell.", "01"),
        ("The sun shone on Monday.", ""),
    ],
)
def test_a_name_is_kept_if_it_was_introduced(text, kept):
    assert names.names_kept(text) == [digit == "1" for digit in kept]


def test_the_shares_are_over_names_and_over_stories():
    counted = names.share_introduced(
        ["Ben was a boy. Ben ran. Ben sat.", "Ben ran. Tom ran. Ben fell."]
    )
    assert (counted["names"], counted["introduced"]) == (4, 3)
    assert counted["share_introduced"] == 0.75
    assert counted["share_of_stories_with_all_introduced"] == 0.5


@pytest.mark.parametrize("predictor", [600, 100], indirect=True)
def test_a_names_cost_is_that_of_all_its_tokens(predictor, tokenizer):
    """A rare name has several tokens, and a name after a quote other ones than after a space.

    Where a story exceeded the context, the start token was once taken for a part of it.
    """
    index = next(i for i in range(names.FIRST_HELD_OUT, names.FIRST_HELD_OUT + 100) if long(i))
    text = toy_stories.story(index)
    found = names.held_out_names(predictor, 1, index)
    ids = predictor.prompt_ids(text)
    ids = ids[: predictor.model.config.context_length + 1]
    with torch.no_grad():
        logits_TV = predictor.model(torch.tensor([ids[:-1]])).logits[0].double()
    log_TV = logits_TV.log_softmax(dim=-1)
    ends = [len(tokenizer.decode_bytes(ids[1 : k + 1])) for k in range(len(ids))]
    seen, wanted = set(), {"first": [], "repeated": []}
    for name in re.finditer("|".join(rf"\b{name}\b" for name in names.names()), text):
        if ends[-1] < name.end():
            continue
        # Row k - 1 gives token k, whose bytes are those from ends[k - 1] to ends[k].
        rows = [k - 1 for k in range(1, len(ids)) if ends[k] > name.start()]
        rows = [row for row in rows if ends[row] < name.end()]
        cost = -sum(float(log_TV[row, ids[row + 1]]) for row in rows)
        wanted["repeated" if name[0] in seen else "first"].append(cost)
        seen.add(name[0])
    fits = predictor.model.config.context_length == 600
    assert (ends[-1] == len(text)) == fits
    for kind, costs in wanted.items():
        assert found[kind]["names"] == len(costs) > 0
        assert found[kind]["nats"] == pytest.approx(sum(costs) / len(costs), rel=1e-4)
        mean = sum(math.exp(-cost) for cost in costs) / len(costs)
        assert found[kind]["probability"] == pytest.approx(mean, rel=1e-3)
    assert found["repeated_among_names"]["nats"] < found["repeated"]["nats"]
    assert 0 < found["probability_of_any_name"] < 1


def long(index: int) -> bool:
    """Return whether a story has many names, and is longer than 100 tokens of any kind."""
    text = toy_stories.story(index)
    return len(names.names_kept(text)) > 8 and len(text) > 600


def test_the_command_prints_and_stores_both_figures(tmp_path, monkeypatch, capsys, predictor):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    ckpt = next(tmp_path.glob("step_*.pt"))
    flags = ["--ckpt", str(ckpt), "--name", "tiny", "--stories", "3", "--prompt", "Ben and Ben"]
    assert names.main(flags) == 0
    stored = json.loads((tmp_path / "names_tiny.json").read_text())
    assert stored["generated"]["stories"] == stored["held_out"]["stories"] == 3
    # The prompt's second name is counted, too.
    assert stored["generated"]["names"] >= 3
    assert stored["story"].startswith("Ben and Ben")
    assert stored["checkpoint"]["step"] == 1 and stored["environment"]["command"]
    printed = capsys.readouterr().out
    assert f"{stored['held_out']['repeated']['probability']:.3f}" in printed
    assert f"{100 * stored['generated']['share_introduced']:.1f} %" in printed
    with pytest.raises(ValueError, match="--stories must be at least 1, not 0"):
        names.main(["--stories", "0"])
