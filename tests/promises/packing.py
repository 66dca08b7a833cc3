"""Guarantees about what is learned of chats: the answers, whatever their form and company."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import torch

import train
from config_model import ModelConfig, TrainConfig
from model import LLM
from runtime.data.chat import with_chat
from runtime.data.loader import micro_batches
from runtime.data.tokenizers import load_tokenizer
from runtime.kernels.linear_cross_entropy import IGNORE
from runtime.posttraining.conversations import ExampleRows
from runtime.posttraining.encode import Encoded, encode_examples
from runtime.posttraining.packing import (
    PackedLoader,
    PackedValidation,
    PairLoader,
    can_share_rows,
    make_batch,
)
from runtime.training.task import GivenTask
from tests import builders_conversations as rows
from tests.builders import random_config, random_model, tiny_config, without_chance
from tests.promises import Promise, Tally
from tests.promises.common import FIRST_SEED, attempt

TOKENIZER = with_chat(load_tokenizer("byte"))
ROW = 1024


def _model(config: ModelConfig, seed: int) -> LLM:
    """Return a model in float64 without losses of its own, which have a gradient everywhere."""
    config = dataclasses.replace(
        without_chance(config),
        vocabulary_size=TOKENIZER.vocabulary_size,
        aux_loss_coef=0.0,
        z_loss_coef=0.0,
    )
    return random_model(config, seed, torch.float64)


def _sharing_config(seed: int) -> ModelConfig:
    """Return a random architecture whose examples may share rows."""
    config = dataclasses.replace(random_config(seed), use_attention_bias=False)
    return config if config.use_rope else tiny_config()


def loss(model: LLM, batch: tuple):
    """Return the output of the model for a batch of packed rows, or of (ids, targets) alone."""
    return model(batch[0], batch[1], starts_BT=batch[2] if len(batch) > 2 else None)


def _encoded(r: random.Random, count: int) -> tuple[Encoded, list]:
    """Return random conversations of all forms, and what is said and learned in each."""
    examples, said = [], []
    for i in range(count):
        make = rows.CONVERSATIONS[i % len(rows.CONVERSATIONS)]
        row, expected = make(r)
        examples += list(ExampleRows([row], "rows", "conversations"))
        said.append(expected)
    return encode_examples(examples, TOKENIZER, ROW), said


# ---------------------------------------------------------------------------- answers alone
def answers_only(count: int) -> Tally:
    """Pack `count` random conversations of all forms, and a fifth as many pairs.

    Held: the row holds the ids that a hand would write, and the gradient at the last hidden layer
    is exactly 0 where the next id is no answer, and not 0 where it is one.
    """
    tally, targets = Tally(), 0
    config, step = tiny_config(), 25
    model = _model(config, 0)
    for first in range(0, count, step):
        r = random.Random(FIRST_SEED + first)
        encoded, said = _encoded(r, min(step, count - first))
        expected = [rows.laid_out(each, TOKENIZER) for each in said]
        loader = PackedLoader(encoded, ROW, 2, first)
        targets += _check_gradients(tally, loader, model, expected, f"seed {FIRST_SEED + first}")
        pairs = [rows.pair(r) for _ in range(5)]
        found = [pair for row, _ in pairs for pair in ExampleRows([row], "rows", "pairs")]
        sides = [rows.laid_out(side, TOKENIZER) for _, both in pairs for side in both]
        pair_loader = PairLoader(encode_examples(found, TOKENIZER, ROW), ROW, 2, first)
        _check_gradients(tally, pair_loader, model, sides, f"pairs, seed {FIRST_SEED + first}")
    tally.detail = {"targets": targets}
    return tally


def _check_gradients(tally: Tally, loader, model: LLM, expected: list, what: str) -> int:
    """Count each example of an epoch; return the number of targets. expected: by sequence."""
    sides, targets = loader.encoded.sides, 0
    hidden = []
    hook = model.norm.register_forward_hook(lambda _, __, output: hidden.append(output))
    for first in range(0, loader.samples_per_epoch, loader.batch_size):
        batch = loader.batch(first)
        hidden.clear()
        (gradient_BTC,) = torch.autograd.grad(loss(model, batch).cross_entropy_sum, hidden)
        has_BT = gradient_BTC.abs().amax(dim=-1).numpy() > 0
        targets += len(batch[3])
        for i in range(min(loader.batch_size, loader.samples_per_epoch - first)):
            at = [0] * sides
            for number in loader.examples(first + i):
                for side in range(sides):
                    ids, learned = expected[sides * number + side]
                    here = sides * i + side, slice(at[side], at[side] + len(ids) - 1)
                    same = batch[0][here].tolist() == ids[:-1]
                    exact = has_BT[here].tolist() == learned[1:]
                    tally.add(same and exact, f"{what}, example {number}: ids {same}, mask {exact}")
                    at[side] += len(ids) - 1
            for side in range(sides):
                rest = has_BT[sides * i + side, at[side] :]
                if rest.any():
                    tally.add(False, f"{what}: padding has a gradient")
    hook.remove()
    return targets


# ---------------------------------------------------------------------------- packed = alone
def packed_is_alone(count: int) -> Tally:
    """Compare `count` random models on packed rows and on each example alone, in float64.

    Held: logits and the gradient of all parameters differ by at most 1e-12 of the largest.
    """
    tally = Tally()
    largest = 0.0
    for i in range(count):
        r = random.Random(FIRST_SEED + i)
        model = _model(_sharing_config(FIRST_SEED + i), i)
        assert can_share_rows(model.config)
        encoded, _ = _encoded(r, 6)
        packed = PackedValidation(encoded, ROW, 8)[0]
        difference = max(_logits_differ(model, packed), _gradients_differ(model, encoded, packed))
        largest = max(largest, difference)
        tally.add(difference <= 1e-12, f"seed {FIRST_SEED + i}: differs by {difference:.1e}")
    tally.detail = {"largest relative difference": f"{largest:.0e}"}
    return tally


@torch.no_grad()
def _logits_differ(model: LLM, batch: tuple) -> float:
    """Return the largest relative difference of logits between a packed row and its examples."""
    ids_BT, _, starts_BT = batch[:3]
    logits_BTV = model(ids_BT, starts_BT=starts_BT).logits
    most = 0.0
    for ids_T, starts_T, logits_TV in zip(ids_BT, starts_BT, logits_BTV, strict=True):
        starts, sizes = starts_T.unique(return_counts=True)
        # Each token of padding is an example of its own: the last one stands for them.
        for start in {*starts[sizes > 1].tolist(), int(starts_T[-1])}:
            is_here = starts_T == start
            alone_TV = model(ids_T[None, is_here]).logits[0]
            difference = (logits_TV[is_here] - alone_TV).abs().max() / alone_TV.abs().max()
            most = max(most, float(difference))
    return most


def gradient(model: LLM, batches: list[tuple], divisor: int) -> torch.Tensor:
    """Return the gradient of a step on these micro-batches, as one vector."""
    model.zero_grad(set_to_none=True)
    task = GivenTask(None, loss)
    for batch in batches:
        train.forward_backward(model, task, batch, torch.float64, divisor, len(batches))
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def _gradients_differ(model: LLM, encoded: Encoded, packed: tuple) -> float:
    alone = []
    for number in encoded.numbers:
        length = int(encoded.lengths[number])
        # Without starts, as a text of its own.
        alone.append(make_batch(encoded, [np.array([number])], length)[:2])
    count = int((packed[1] != IGNORE).sum())
    one, other = gradient(model, [packed], count), gradient(model, alone, count)
    return float((one - other).abs().max() / other.abs().max())


# ---------------------------------------------------------------------------- micro-batches
def any_split(count: int) -> Tally:
    """Take `count` steps of 8 rows in one micro-batch and in 2, 4 and 8, in float64.

    Held: the gradient is the same, to 1e-12 of the largest.
    """
    tally, largest = Tally(), 0.0
    for i in range(count):
        r = random.Random(FIRST_SEED + i)
        model = _model(_sharing_config(FIRST_SEED + i), i)
        encoded, _ = _encoded(r, 40)
        length = max(256, int(encoded.lengths.max()))
        whole = None
        for parts in (1, 2, 4, 8):
            config = TrainConfig(batch_size=8 // parts, grad_accum=parts)
            loader = PackedLoader(encoded, length, 8 // parts, i)
            batches, divisor = micro_batches(
                loader, GivenTask(loader, loss).count, config, 8, False
            )
            found = gradient(model, batches, divisor)
            whole = found if whole is None else whole
            difference = float((found - whole).abs().max() / whole.abs().max())
            largest = max(largest, difference)
            tally.add(difference <= 1e-12, f"seed {FIRST_SEED + i}, {parts}: {difference:.1e}")
    tally.detail = {"largest relative difference": f"{largest:.0e}"}
    return tally


# ---------------------------------------------------------------------------- epochs
def random_encoded(r: random.Random, num_examples: int, longest: int, kind: str) -> Encoded:
    """Return examples whose ids say which example and which position each is."""
    sides = 2 if kind == "pairs" else 1
    lengths = [r.randint(2, longest + 1) for _ in range(sides * num_examples)]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.concatenate([s * (longest + 1) + np.arange(n) for s, n in enumerate(lengths)])
    is_target = np.array([r.random() < 0.3 for _ in ids], dtype=np.uint8)
    # The last is always one; the first never is.
    is_target[offsets[1:] - 1], is_target[offsets[:-1]] = 1, 0
    digests = np.array([r.getrandbits(64) for _ in range(num_examples)], dtype=np.uint64)
    numbers = np.arange(num_examples)
    return Encoded(kind, ids.astype(np.uint32), is_target, offsets, digests, numbers)


def each_once(count: int) -> Tally:
    """Read two epochs of `count` random sets of examples, with rows of many lengths.

    Held: every example once an epoch, whole, in its own span; the same from any starting number;
    the second epoch has another order; validation has each once.
    """
    tally = Tally()
    num_rows = []
    for i in range(count):

        def check(i: int = i) -> None:
            r = random.Random(FIRST_SEED + i)
            longest = r.choice([1, 3, 20, 100])
            kind = r.choice(["conversations", "pairs"])
            encoded = random_encoded(r, r.randint(1, 60), longest, kind)
            row = longest + r.choice([0, 1, longest, 5 * longest])
            share, batch_size = r.random() < 0.8, r.choice([1, 2, 5])
            make = PairLoader if kind == "pairs" else PackedLoader
            loader = make(encoded, row, batch_size, i, share)
            num_rows.append(loader.samples_per_epoch)
            epoch = loader.samples_per_epoch
            for e in range(2):
                batch = make(encoded, row, epoch, i, share).batch(e * epoch)
                check_batch(encoded, batch, list(range(len(encoded))))
            first = r.randrange(2 * epoch)
            again = make(encoded, row, batch_size, i, share).batch(first)
            # A loader that was asked for other samples before.
            loader.batch(r.randrange(5 * epoch))
            assert all(map(torch.equal, loader.batch(first), again)), "not a function of the number"
            held = PackedValidation(encoded, row, batch_size, share)
            seen = [batch_numbers(encoded, batch) for batch in held]
            assert sorted(sum(seen, [])) == list(range(len(encoded))), "validation is not complete"
            assert len({tuple(batch[0].shape) for batch in held}) == 1, "shapes differ"

        attempt(tally, f"seed {FIRST_SEED + i}", check)
    tally.detail = {"rows": sum(num_rows)}
    return tally


def batch_numbers(encoded: Encoded, batch: tuple) -> list[int]:
    """Return the numbers of the examples in a batch of `random_encoded`, from their ids."""
    spans = encoded.offsets[:-1]
    first_ids = {int(encoded.ids[at]): s for s, at in enumerate(spans)}
    ids_BT, starts_BT = batch[0].numpy(), batch[2].numpy()
    is_start = (starts_BT == np.arange(ids_BT.shape[1])) & (_is_used(batch))
    found = [first_ids[int(i)] for i in ids_BT[is_start]]
    return sorted({s // encoded.sides for s in found})


def _is_used(batch: tuple) -> np.ndarray:
    """Return which tokens are no padding: those up to the last target of their row."""
    has = batch[1].numpy() != IGNORE
    return has[:, ::-1].cumsum(axis=1)[:, ::-1] > 0


def check_batch(encoded: Encoded, batch: tuple, numbers: list[int]) -> None:
    """Raise AssertionError unless a batch holds these examples, each whole and once."""
    ids_BT, targets_BT, starts_BT, rows_M, segments_M = (each.numpy() for each in batch[:5])
    sides, seen, segments = encoded.sides, [], {}
    T = ids_BT.shape[1]
    for b in range(len(ids_BT)):
        used = int(_is_used(batch)[b].sum())
        assert (starts_BT[b, used:] == np.arange(used, T)).all(), "padding sees something"
        assert (targets_BT[b, used:] == IGNORE).all()
        for start in np.unique(starts_BT[b, :used]):
            here = np.flatnonzero(starts_BT[b] == start)
            assert here[0] == start and here[-1] - start + 1 == len(here), "not one span"
            ids = ids_BT[b, here]
            sequence = int(np.flatnonzero(encoded.ids[encoded.offsets[:-1]] == ids[0])[0])
            whole, is_target = encoded.sequence(sequence)
            assert ids.tolist() == whole[:-1].tolist(), "cut, or not in order"
            wanted = np.where(is_target[1:], whole[1:].astype(int), IGNORE)
            assert targets_BT[b, here].tolist() == wanted.tolist(), "other targets"
            segment = set(segments_M[np.isin(rows_M, b * T + here)])
            assert len(segment) == 1, "an example has two segments"
            assert sides == 1 or b % 2 == sequence % 2, "chosen and rejected changed rows"
            segments[segment.pop()] = sequence
            seen.append(sequence)
    assert sorted(seen) == sorted(sides * n + s for n in numbers for s in range(sides))
    assert sorted(segments) == list(range(len(seen))), "segments are not 0, 1, 2 ..."
    if sides == 2:
        order = [segments[2 * j] // 2 for j in range(len(seen) // 2)]
        assert [segments[2 * j + 1] // 2 for j in range(len(seen) // 2)] == order
        assert [segments[2 * j] % 2 for j in range(len(seen) // 2)] == [0] * (len(seen) // 2)
        assert batch[5].tolist() == order, "the numbers of the pairs"
    assert (np.flatnonzero(targets_BT != IGNORE) == rows_M).all()


PROMISES: list[Promise] = [
    Promise(
        40,
        "No gradient comes from a token that is no answer: exactly 0, conversations and pairs of "
        "all forms",
        answers_only,
        100,
        500,
        500,
    ),
    Promise(
        41,
        "Packed into rows with others, an example is what it is alone: logits and gradients "
        "(fp64, 1e-12)",
        packed_is_alone,
        3,
        20,
        20,
    ),
    Promise(
        41,
        "A fine-tuning step in any number of micro-batches has the same gradient (fp64, 1e-12)",
        any_split,
        2,
        10,
        10,
    ),
    Promise(
        42,
        "Every example once an epoch, whole, whatever its length; a sample's number gives the same "
        "rows",
        each_once,
        100,
        1000,
        1000,
    ),
]
