"""The preference loss: against all logits in float64, its symmetries, its splits, its reference."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

import train
from runtime.checkpoint.changed import with_config
from runtime.checkpoint.read import build_model, read_checkpoint
from runtime.kernels.linear_cross_entropy import IGNORE
from runtime.posttraining.packing import PairLoader
from runtime.posttraining.preference import (
    ACCURACY,
    CHOSEN,
    REJECTED,
    DpoConfig,
    Preference,
    preference_losses,
    warnings_of,
)
from runtime.posttraining.reference import FILE, Reference
from runtime.training.metrics import HIGH, LOW
from tests.builders_posttraining import pairs, tiny_base

LOSSES = [
    {},
    {"dpo_loss": "ipo"},
    {"label_smoothing": 0.2},
    {"length_normalised": True},
    {"sft_coef": 0.7},
]


def task_and_model(tmp_path, pair_count: int = 24, **settings):
    """Return a task whose reference is random, and its model in float64 without other losses."""
    no_others = dict(aux_loss_coef=0.0, z_loss_coef=0.0)
    base = read_checkpoint(tiny_base(tmp_path, context_length=64, **no_others))
    values = dict(
        data=(str(pairs(tmp_path / "pairs.jsonl", pair_count)),),
        ckpt_dir=str(tmp_path / "ckpt"),
        data_dir=str(tmp_path / "none"),
        max_steps=2,
        warmup_steps=0,
        batch_size=2,
        dtype="float32",
    )
    task = Preference(DpoConfig(**(values | settings)), base)
    config = task.adapted(base.model_config, base)
    model = build_model(with_config(base, config, task.new_ids(base)))
    generator = np.random.default_rng(0)
    # About as likely as under an untrained model of 260 ids, and off by some nats.
    lengths = np.diff(task.train.offsets)
    task.reference.values[:] = (generator.normal(0, 3, len(lengths)) - 6 * lengths / 3).reshape(
        -1, 2
    )
    return task, model.double()


def gradients_of(model, loss) -> list[torch.Tensor]:
    parameters = list(model.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def assert_equal_gradients(ones, others):
    """To 1e-12 of the largest entry: sums in another order, of up to a hundred tokens."""
    bound = 1e-12 * max(float(g.abs().max()) for g in others)
    for one, other in zip(ones, others, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=bound)


def by_all_logits(model, task, numbers) -> torch.Tensor:
    """The loss of some pairs, each sequence by itself and from all logits, written down again."""
    config, total = task.config, 0.0
    for number in numbers:
        changes, means = [], []
        for side in (0, 1):
            ids, is_target = (torch.tensor(a) for a in task.train.sequence(2 * number + side))
            log_probs = model(ids[None, :-1].long()).logits[0].log_softmax(dim=1)
            own = log_probs.gather(1, ids[1:, None].long())[:, 0][is_target[1:].bool()]
            change = own.sum() - float(task.reference.values[number, side])
            changes.append(change / len(own) if config.length_normalised else change)
            means.append(own.mean())
        margin, beta, eps = changes[0] - changes[1], config.beta, config.label_smoothing
        if config.dpo_loss == "ipo":
            loss = (margin - 0.5 / beta) ** 2
        else:
            right = 1 / (1 + torch.exp(-beta * margin))
            loss = -(1 - eps) * right.log() - eps * (1 - right).log()
        total = total + loss - config.sft_coef * means[0]
    return total


@pytest.mark.parametrize("settings", LOSSES, ids=str)
def test_loss_and_gradient_are_those_of_all_logits(tmp_path, settings):
    task, model = task_and_model(tmp_path, **settings)
    batch = task.loader(model.config, task.config).batch(0)
    numbers = batch[5].tolist()
    assert len(numbers) > 2, "several pairs are to share a row"
    out = task.loss(model, batch)
    assert int(out.num_targets) == task.count(batch) == len(numbers)
    expected = by_all_logits(model, task, numbers)
    torch.testing.assert_close(out.cross_entropy_sum, expected, rtol=1e-13, atol=0)
    ones = gradients_of(model, out.cross_entropy_sum)
    assert max(float(g.abs().max()) for g in ones) > 1e-3
    assert_equal_gradients(ones, gradients_of(model, expected))


@pytest.mark.parametrize("settings", LOSSES, ids=str)
def test_a_pair_in_a_shared_row_is_a_pair_alone(tmp_path, settings):
    """And any split of a step into micro-batches has one gradient."""
    task, model = task_and_model(tmp_path, **settings)
    all_numbers = sorted(task.train.numbers.tolist())

    def gradient(share: bool, batch_size: int) -> list[torch.Tensor]:
        loader = PairLoader(task.train, task.row_tokens, batch_size, 0, share)
        samples = range(0, loader.samples_per_epoch, batch_size)
        assert loader.samples_per_epoch % batch_size == 0
        batches = [task.with_reference(loader.batch(first)) for first in samples]
        seen = sorted(number for batch in batches for number in batch[5].tolist())
        assert seen == all_numbers, "each pair once"
        divisor = sum(task.count(batch) for batch in batches)
        model.zero_grad()
        for batch in batches:
            train.forward_backward(model, task, batch, torch.float32, divisor, len(batches))
        return [p.grad.clone() for p in model.parameters()]

    num_rows = PairLoader(task.train, task.row_tokens, 1, 0).samples_per_epoch
    assert num_rows < len(all_numbers) / 2, "several pairs are to share a row"
    whole = gradient(True, num_rows)
    assert max(float(g.abs().max()) for g in whole) > 1e-3
    for batch_size in range(1, num_rows):
        if num_rows % batch_size == 0:
            assert_equal_gradients(gradient(True, batch_size), whole)
    assert_equal_gradients(gradient(False, 1), whole)


# ------------------------------------------------------------------------------ what the losses are
def losses(chosen: float, rejected: float, **settings) -> torch.Tensor:
    """The loss of a pair whose sequences changed by so many nats; ten and four tokens."""
    log_probs_S = torch.tensor([chosen - 20, rejected - 9], dtype=torch.float64)
    reference_S = torch.tensor([-20.0, -9.0])
    num_tokens_S = torch.tensor([10, 4])
    return preference_losses(log_probs_S, reference_S, num_tokens_S, DpoConfig(**settings))[0][0]


def test_the_sigmoid_loss_is_that_of_the_paper():
    """Chosen 2 nats up, rejected 1 down: -log sigmoid(0.1 x 3); by length 0.2 + 0.25."""
    assert float(losses(2, -1)) == pytest.approx(-math.log(1 / (1 + math.exp(-0.3))), abs=1e-12)
    expected = -math.log(1 / (1 + math.exp(-0.1 * 0.45)))
    assert float(losses(2, -1, length_normalised=True)) == pytest.approx(expected, abs=1e-12)
    assert float(losses(0, 0)) == pytest.approx(math.log(2), abs=1e-12)


def test_a_swapped_pair_has_the_mirrored_loss():
    """-log sigmoid(h) and -log sigmoid(-h) differ by h; smoothing 1 - e is e of the swapped one."""
    for h in (-7.0, 0.0, 3.0):
        assert float(losses(0, h) - losses(h, 0)) == pytest.approx(0.1 * h, abs=1e-12)
        straight, swapped = float(losses(h, 0)), float(losses(0, h))
        mixed = float(losses(h, 0, label_smoothing=0.25))
        assert mixed == pytest.approx(0.75 * straight + 0.25 * swapped, abs=1e-12)


@pytest.mark.parametrize(
    ("settings", "best"),
    [
        ({"dpo_loss": "ipo"}, 1 / (2 * 0.1)),
        ({"dpo_loss": "ipo", "beta": 0.25}, 2.0),
        # The margin at which a pair is the right way round with the chance that smoothing says.
        ({"label_smoothing": 0.2}, math.log(0.8 / 0.2) / 0.1),
    ],
)
def test_the_margin_has_an_optimum(settings, best):
    margin = torch.tensor(best, dtype=torch.float64, requires_grad=True)
    zero, tokens = torch.zeros((), dtype=torch.float64), torch.tensor([5, 5])
    values = torch.stack((margin, zero))
    losses_P, _ = preference_losses(values, torch.zeros(2), tokens, DpoConfig(**settings))
    (slope,) = torch.autograd.grad(losses_P.sum(), margin)
    assert abs(float(slope)) < 1e-12
    at_best = float(losses_P.detach())
    assert all(float(losses(best + off, 0, **settings)) > at_best for off in (-0.5, 0.5))


def test_sums_to_log_are_of_the_pairs():
    log_probs_S = torch.tensor([-18.0, -10.0, -30.0, -30.0])
    reference_S = torch.tensor([-20.0, -9.0, -29.0, -32.0])
    _, sums = preference_losses(log_probs_S, reference_S, torch.tensor([4, 5, 1, 2]), DpoConfig())
    found = {name: round(float(value), 6) for name, value in sums.items()}
    assert found == {
        "rewards/chosen": 0.1,
        "rewards/rejected": 0.1,
        "rewards/margins": 0.0,
        "rewards/accuracies": 1.0,
        "logps/chosen_change": -0.5,
        "logps/rejected_change": 0.8,
    }


# ------------------------------------------------------------------------------- the reference
def test_the_reference_is_that_of_the_start_and_of_the_pairs_that_are_used(tmp_path):
    task, model = task_and_model(tmp_path)
    task.reference.values[:] = np.nan
    model = model.float()
    task.started(model)
    used = {n for first in (0, 2) for n in task._pairs(task.config).batch(first)[5].tolist()}
    used |= set(task.held_out.numbers.tolist())
    known = set(np.flatnonzero(~np.isnan(task.reference.values).any(axis=1)).tolist())
    assert known == used and len(known) < len(task.reference.values)
    for number in used:
        ids, is_target = (torch.tensor(a) for a in task.train.sequence(2 * number))
        log_probs = model(ids[None, :-1].long()).logits[0].log_softmax(dim=1)
        own = log_probs.gather(1, ids[1:, None].long())[:, 0][is_target[1:].bool()].sum()
        assert float(own) == pytest.approx(float(task.reference.values[number, 0]), abs=1e-4)
    before = task.reference.values.copy()
    with torch.no_grad():
        model.embed.weight.mul_(1.5)
    task.started(model)
    assert np.array_equal(before, task.reference.values, equal_nan=True), "computed once"


def test_a_file_of_other_weights_or_data_or_a_damaged_one_is_not_taken(tmp_path):
    reference = Reference(3, "start", "data")
    assert "is missing" in reference.load(tmp_path)
    reference.add(np.array([2, 0]), np.array([1.0, 2.0, 3.0, 4.0], dtype=np.float32))
    assert reference.lacks(np.array([0, 1])) and not reference.lacks(np.array([0, 2]))
    reference.add(np.array([2]), np.array([9.0, 9.0], dtype=np.float32))
    assert reference.of(np.array([2, 0])).tolist() == [1.0, 2.0, 3.0, 4.0], "the first stays"
    reference.save(tmp_path)
    again = Reference(3, "start", "data")
    assert again.load(tmp_path) == ""
    assert np.array_equal(again.values, reference.values, equal_nan=True)
    assert "other weights" in Reference(3, "another", "data").load(tmp_path)
    assert "other data" in Reference(3, "start", "other").load(tmp_path)
    whole = (tmp_path / FILE).read_bytes()
    for damaged in (whole[:-3], whole[:-1] + bytes([whole[-1] ^ 1]), b"", b"no such file"):
        (tmp_path / FILE).write_bytes(damaged)
        assert "is damaged" in Reference(3, "start", "data").load(tmp_path)


# ------------------------------------------------------------------------------- the warnings
def numbers(requests: float, accuracy: float, chosen: float = 0.0) -> dict[str, float]:
    interval = {"requests" + LOW: requests - 0.08, "requests" + HIGH: requests + 0.08}
    return interval | {"requests": requests, ACCURACY: accuracy, CHOSEN: chosen, REJECTED: -0.2}


def test_it_is_said_when_accuracy_rises_and_the_score_falls():
    """A prototype did: accuracy 0.72 to 0.81, score 0.445 to 0.391, and its loss looked fine."""
    first = numbers(0.445, 0.72)
    (line,) = warnings_of(first, numbers(0.391, 0.81), "requests").values()
    assert "accuracy rose from 0.720 to 0.810, and requests fell from 0.445 to 0.391" in line
    for fine in (numbers(0.42, 0.81), numbers(0.5, 0.9), numbers(0.391, 0.7), first):
        assert not warnings_of(first, fine, "requests")
    assert not warnings_of({ACCURACY: 0.5}, {ACCURACY: 0.9, CHOSEN: 0.1}, "")


def test_it_is_said_when_chosen_answers_become_unlikely():
    (line,) = warnings_of({}, {CHOSEN: -0.031, REJECTED: -0.2, ACCURACY: 0.9}, "").values()
    assert "less likely than at the start, by 0.031 nats a token (rejected 0.200" in line
    assert not warnings_of({}, {CHOSEN: -0.019, REJECTED: -0.2, ACCURACY: 0.9}, "")


def test_a_sample_is_two_rows_for_the_estimate_of_memory(tmp_path):
    """Rows of two contexts each; a factor that was applied twice foretold twice the memory."""
    task, _ = task_and_model(tmp_path)
    batch = task._pairs(task.config).batch(0)
    assert batch[0].numel() == task.config.batch_size * task.rows_per_sample * task.context


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="--label_smoothing has no effect on --dpo_loss ipo"):
        DpoConfig(dpo_loss="ipo", label_smoothing=0.1)
    for name, value in (("beta", 0.0), ("label_smoothing", 0.5), ("sft_coef", -1.0)):
        with pytest.raises(ValueError, match=name):
            dataclasses.replace(DpoConfig(), **{name: value})
    with pytest.raises(ValueError, match="dpo_loss"):
        DpoConfig(dpo_loss="hinge")


def test_a_prompt_is_no_part_of_the_loss(tmp_path):
    """Both sides have it, and a long one would drown the answers' difference."""
    task, model = task_and_model(tmp_path)
    ids_BT, targets_BT, *_ = task.loader(model.config, task.config).batch(0)
    number = int(task.loader(model.config, task.config).batch(0)[5][0])
    answers = [task.train.sequence(2 * number + side) for side in (0, 1)]
    text = [task.tokenizer.decode(ids[mask.astype(bool)].tolist()) for ids, mask in answers]
    assert text[0] != text[1]
    assert int((targets_BT != IGNORE).sum()) < targets_BT.numel() / 2
