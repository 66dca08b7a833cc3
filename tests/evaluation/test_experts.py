"""Statistics of experts: next to chance, and the loss without one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from runtime.data.tokenizers import load_tokenizer
from runtime.evaluation import experts as experts_module
from runtime.evaluation.encoded import encode_documents
from runtime.evaluation.expert_off import expert_off_section, without_expert
from runtime.evaluation.experts import (
    ExpertChoices,
    Overlap,
    experts_section,
    membership,
    together_section,
)
from runtime.evaluation.held_out import read_documents
from runtime.inference.decoder import router_choices
from runtime.inference.scorer import Scorer
from tests.builders_evaluation import byte_model, texts

E, V = 8, 40
CLASSES = np.arange(V) % 4


def choices_of(rule, documents: int = 30, tokens: int = 60, seed: int = 0) -> ExpertChoices:
    """Return choices of one block. rule(ids, generator) -> the two experts of each token [T, 2]."""
    generator, choices = np.random.default_rng(seed), ExpertChoices(E)
    for d in range(documents):
        ids_T = generator.integers(0, V, tokens)
        choices.add(d, ids_T, rule(ids_T, generator)[None])
    return choices


def by_token(ids_T, generator):
    return np.stack([ids_T % E, (ids_T + 1) % E], axis=1)


def by_chance(ids_T, generator):
    first = generator.integers(0, E, len(ids_T))
    return np.stack([first, (first + generator.integers(1, E, len(ids_T))) % E], axis=1)


def values(section) -> dict[str, float]:
    return {key: one["value"] for key, one in section["figures"].items()}


def test_experts_by_token_are_told_by_the_token_alone():
    found = values(experts_section(choices_of(by_token), CLASSES))
    # Five of 40 ids for each of 8 experts: 3 bits, less what chance tells of 40 ids.
    assert found["block_0_entropy"] == pytest.approx(3.0, abs=0.02)
    assert found["block_0_token"] == pytest.approx(3.0, abs=0.2)
    # An id's class is its last two bits, and its expert its last three.
    assert found["block_0_class"] == pytest.approx(2.0, abs=0.1)
    for name in ("previous_token", "position", "document"):
        assert abs(found[f"block_0_{name}"]) < 0.06


def test_experts_by_chance_give_the_shuffled_value():
    """Every interval holds 0, whatever the variable: 1,770 tokens, 40 ids, 30 documents."""
    section = experts_section(choices_of(by_chance), CLASSES)
    for key, one in section["figures"].items():
        if not key.endswith("entropy"):
            assert one["low"] <= 0.0 <= one["high"], key
    measured = [row[5] for row in section["rows"]["rows"]]
    assert max(measured) > 0.05


def test_the_start_token_counts_in_no_figure():
    """All documents begin with it, so it would tell of the position and of its own expert."""

    def with_start(ids_T, generator):
        ids_T[0] = 0
        return by_chance(ids_T, generator)

    (key, one), *_ = experts_section(choices_of(with_start), CLASSES)["figures"].items()
    assert one["n"] == 30 * 59


def test_pairs_of_independent_experts_have_no_excess():
    section = together_section(choices_of(by_chance, documents=100))
    assert section is not None
    # 28 pairs of 5,900 tokens: chance alone moves the share of a pair by a tenth of itself.
    assert section["figures"]["block_0_excess"]["value"] < 0.05


def test_pairs_that_go_together_are_named_first():
    """Experts 2 and 3 always come as a pair, the others by chance."""

    def paired(ids_T, generator):
        first = generator.integers(4, E, len(ids_T))
        second = 4 + (first - 4 + generator.integers(1, 4, len(ids_T))) % 4
        rows = np.stack([first, second], axis=1)
        rows[generator.random(len(ids_T)) < 0.4] = [2, 3]
        return rows

    section = together_section(choices_of(paired))
    assert section is not None
    block, pair, measured, by_chance_, ratio, _ = section["rows"]["rows"][0]
    assert (block, pair) == (0, "2 and 3")
    assert measured == pytest.approx(0.4, abs=0.05) and ratio == pytest.approx(
        measured / by_chance_
    )
    assert section["figures"]["block_0_excess"]["value"] > 0.2


@pytest.mark.parametrize("loads", [[0.9, 0.5, 0.3, 0.2, 0.1], [0.4] * 5])
def test_expected_pairs_have_the_loads_of_the_experts(loads):
    pairs = experts_module._expected_pairs(np.array(loads), 2)
    assert np.allclose(pairs.sum(axis=1), loads, rtol=1e-6)
    assert np.array_equal(pairs, pairs.T) and not pairs.diagonal().any()


def test_one_expert_for_each_token_has_no_pairs():
    choices = ExpertChoices(E)
    choices.add(0, np.arange(5), np.zeros((1, 5, 1), dtype=int))
    assert together_section(choices) is None


def test_overlap_counts_experts_whatever_their_order():
    overlap = Overlap(2, 1, 4)
    mine = np.array([[[0, 1], [0, 1], [2, 3]]])
    overlap.add(0, mine, mine[..., ::-1])
    # Of the second document, one of two tokens' experts is shared by halves: the start is left out.
    overlap.add(1, mine, np.array([[[2, 3], [1, 2], [0, 1]]]))
    section = overlap.section(200)
    assert section["figures"]["block_0_overlap"]["value"] == pytest.approx((1 + 1 + 0.5 + 0) / 4)
    assert section["figures"]["block_0_overlap"]["n"] == 4


def test_overlap_by_chance_is_that_of_independent_experts():
    overlap, generator = Overlap(50, 1, E), np.random.default_rng(5)
    for d in range(50):
        pair = [by_chance(np.zeros(100, dtype=int), generator)[None] for _ in range(2)]
        overlap.add(d, *pair)
    _, shared, _, _, chance, _ = overlap.section(200)["rows"]["rows"][0]
    assert chance == pytest.approx(2 / E, rel=0.02)
    assert shared == pytest.approx(chance, rel=0.1)


def test_membership_is_of_each_token():
    found = membership(np.array([[0, 2], [3, 1]]), 4)
    assert found.tolist() == [[True, False, True, False], [False, True, False, True]]


def test_enough_tokens_are_kept_and_no_more(monkeypatch):
    monkeypatch.setattr(experts_module, "MOST_TOKENS", 100)
    choices = choices_of(by_chance, documents=9, tokens=60)
    assert choices.documents == [0, 1]


# ------------------------------------------------------------------------------ of models
def encoded(count: int = 6):
    return encode_documents(texts(count, longest=5), load_tokenizer("byte"))


def test_the_pass_keeps_what_the_routers_choose():
    """Strongest first, and each with the token that was read, not with the one it predicts."""
    model, documents, choices = byte_model(2), encoded(), ExpertChoices(4)
    read_documents(Scorer(model, with_experts=True), documents, choices)
    for d, ids_T, found_LTK in zip(choices.documents, choices.ids, choices.experts, strict=True):
        assert ids_T.tolist() == documents.ids[d][:-1].tolist()
        wanted, weights = router_choices(model, documents.ids[d][:-1].tolist())
        order = weights.argsort(dim=-1, descending=True, stable=True)
        assert np.array_equal(wanted.gather(-1, order).numpy(), found_LTK)


def test_without_an_expert_its_output_is_zero_and_comes_back():
    """The weights are the same bits afterwards, also after an error, and other experts keep
    theirs."""
    model = byte_model(2, expert_bias=True)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(KeyError), without_expert(model, 1, 2):
        experts = model.layers[1].moe.experts
        assert not experts.w_out[2].any() and not experts.b_out[2].any()
        assert experts.w_out[1].any() and model.layers[0].moe.experts.w_out[2].any()
        raise KeyError
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_the_loss_without_an_expert_is_that_of_a_model_whose_expert_is_zero():
    model, documents = byte_model(4), encoded()
    section = expert_off_section(Scorer(model), documents, 200)
    rows = {(row[0], row[1]): row[2] for row in section["rows"]["rows"]}
    assert set(rows) == {(block, expert) for block in range(2) for expert in range(4)}

    def loss(model) -> float:
        sums = read_documents(Scorer(model), documents)
        return sums["nats"].sum() / sums["tokens"].sum()

    changed = byte_model(4)
    with torch.no_grad():
        changed.layers[1].moe.experts.w_out[3] = 0
    assert rows[1, 3] == pytest.approx(loss(changed) - loss(model), abs=1e-5)
    assert len(set(rows.values())) == len(rows)


def test_an_expert_that_adds_nothing_is_worth_exactly_nothing():
    model = byte_model(4)
    with torch.no_grad():
        model.layers[0].moe.experts.w_out[1] = 0
    section = expert_off_section(Scorer(model), encoded(8), 200)
    (row,) = [row for row in section["rows"]["rows"] if row[:2] == [0, 1]]
    assert row[2:] == [0.0, 0.0, 0.0]


def test_experts_are_kept_up_to_a_limit_and_the_section_says_so(monkeypatch):
    """A single long document took memory for all of its tokens."""
    monkeypatch.setattr(experts_module, "MOST_TOKENS", 100)
    choices, r = ExpertChoices(4), np.random.default_rng(0)
    for d in range(3):
        choices.add(d, r.integers(9, size=70), r.integers(4, size=(1, 70, 1)))
    assert [len(ids) for ids in choices.ids] == [70, 30] and choices.num_tokens == 100
    assert [own.shape for own in choices.experts] == [(1, 70, 1), (1, 30, 1)]
    section = experts_section(choices, np.zeros(9, dtype=np.int64))
    assert any("first 100 tokens" in note for note in section["notes"])
    # Two documents: each that is left out would change all, so there is no interval.
    assert all("low" not in one for one in section["figures"].values())
