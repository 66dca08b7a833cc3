"""Guarantees about the model's calculations: the cache, causality, the mixture of experts."""

from __future__ import annotations

import functools
import random
from unittest import mock

import torch

from model import LLM
from model_parts import KVCache
from runtime.inference.cpu_decode import library
from runtime.inference.quantize import is_packed
from tests import builders
from tests import shared_checks as checks
from tests.builders import random_config, random_model, without_chance
from tests.numeric import before_ties
from tests.promises import Promise, Tally
from tests.promises.common import FIRST_SEED, attempt


def cached(count: int) -> Tally:
    """A text read whole, and in random pieces through a KV cache: the same logits.

    Over random architectures, batches and chunkings.
    """
    tally, worst = Tally(), {"float64": 0.0, "float32": 0.0}
    for seed in range(FIRST_SEED, FIRST_SEED + count):

        def check(seed=seed):
            r, config = random.Random(seed), random_config(seed)
            for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
                model = random_model(config, seed, dtype).eval()
                B, T = r.choice([1, 2, 3, 4]), r.randint(2, config.context_length)
                ids, parts = torch.randint(0, config.vocabulary_size, (B, T)), []
                with torch.no_grad():
                    whole, cache = (
                        model(ids).logits,
                        KVCache(config, B, r.choice([T, T + 3]), dtype),
                    )
                    for size in builders.chunks_of(T, r):
                        parts.append(
                            model(ids[:, cache.length : cache.length + size], cache=cache).logits
                        )
                # In float32 either expert is right where a router meets a near tie.
                sure = before_ties(model, ids)
                difference = (
                    _relative(torch.cat(parts, 1)[sure], whole[sure]) if sure.any() else 0.0
                )
                worst[str(dtype)[6:]] = max(worst[str(dtype)[6:]], difference)
                assert difference <= tolerance, f"{dtype} differs by {difference:.2g}"

        attempt(tally, f"seed {seed}", check)
    tally.detail = {
        f"largest relative difference, {name}": f"{value:.1g}" for name, value in worst.items()
    }
    return tally


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the largest difference of two tensors, relative to the second's largest value (or 1).

    Raise AssertionError if one is not finite.
    """
    assert torch.isfinite(a).all() and torch.isfinite(b).all(), "not finite"
    return ((a - b).abs().max() / b.abs().max().clamp(min=1)).item()


def native(count: int) -> Tally:
    """The C kernel that decodes on a CPU against the plain model.

    Over random architectures. Next to packed weights it rounds its inputs to 16 bits (to 8 next to
    weights of 4 bits, but in comparisons).
    """
    tally, worst = Tally(), {"float32": 0.0, "packed": 0.0}

    def close(a: torch.Tensor, b: torch.Tensor, of: LLM) -> bool:
        name = "packed" if is_packed(of) else "float32"
        difference = _relative(a, b)
        worst[name] = max(worst[name], difference)
        return difference <= {"float32": 1e-4, "packed": 2e-3}[name]

    with mock.patch.object(checks, "close", close), torch.no_grad():
        for seed in range(FIRST_SEED, FIRST_SEED + count):
            attempt(
                tally,
                f"seed {seed}",
                functools.partial(checks.check_native_logits, seed),
            )
    tally.detail = {
        f"largest relative difference, {name}": f"{value:.1g}" for name, value in worst.items()
    }
    return tally


def causality(count: int) -> Tally:
    """Each token t changed moves no logits before t by more than rounding, in float64.

    Over random architectures, read whole, in pieces, in eval and in train mode. The gradient of the
    logits at t with respect to later tokens is exactly 0; rows of a batch do not meet. Tokens are
    grouped by expert, so a matrix product may round otherwise when another token goes elsewhere:
    hence 1e-12 for values.
    """
    tally, worst = Tally(), [0.0]
    for seed in range(FIRST_SEED, FIRST_SEED + count):

        def check(seed=seed):
            r, config = random.Random(seed), without_chance(random_config(seed))
            model = random_model(config, seed, torch.float64).train(r.random() < 0.5)
            T = r.randint(2, 12)
            ids = torch.randint(0, config.vocabulary_size, (1, T))
            # Row t: token t is another.
            changed = ids.repeat(T, 1)
            changed[torch.arange(T), torch.arange(T)] += torch.randint(
                1, config.vocabulary_size, (T,)
            )
            changed %= config.vocabulary_size
            for in_pieces in (False, True):
                with torch.no_grad():
                    base, others = (
                        _read(model, rows, r if in_pieces else None) for rows in (ids, changed)
                    )
                for t in range(1, T):
                    worst.append(_relative(others[t, :t], base[0, :t]))
                    assert worst[-1] <= 1e-12, (
                        f"logits before token {t} of {T} move by {worst[-1]:.2g}, "
                        f"{'in pieces' if in_pieces else 'read whole'}"
                    )
                assert all((others[t, t] != base[0, t]).any() for t in range(T)), (
                    "a token that changes nothing proves nothing"
                )
            checks.check_no_gradient_from_later_tokens(seed)
            checks.check_rows_do_not_meet(seed)

        attempt(tally, f"seed {seed}", check)
    tally.detail = {"largest relative change": f"{max(worst):.1g}", "gradient from later tokens": 0}
    return tally


def _read(model, ids: torch.Tensor, r: random.Random | None) -> torch.Tensor:
    """Logits of all tokens, in random pieces where `r` is given."""
    if r is None:
        return model(ids).logits
    cache = KVCache(model.config, *ids.shape, torch.float64)
    return torch.cat(
        [
            model(ids[:, cache.length : cache.length + size], cache=cache).logits
            for size in builders.chunks_of(ids.shape[1], r)
        ],
        1,
    )


def experts(count: int) -> Tally:
    """The mixture of experts against a loop over tokens and experts.

    Output, load, capacity drops.
    """
    tally = Tally()
    for seed in range(FIRST_SEED, FIRST_SEED + count):
        attempt(
            tally,
            f"seed {seed}",
            functools.partial(checks.check_moe_against_a_loop, seed),
        )
    return tally


PROMISES: list[Promise] = [
    Promise(
        12,
        "Logits from the cache, however the text is cut, are those without it (fp64 to "
        "1e-12, fp32 to 1e-5)",
        cached,
        40,
        1000,
        1000,
        "21 of 50 continuations differ",
    ),
    *(
        [
            Promise(
                12,
                "The native CPU decoder's logits are the model's, to 1e-4; with packed weights and "
                "inputs of 16 bits, to 2e-3",
                native,
                3,
                100,
                100,
            )
        ]
        if library()[0] is not None
        else []
    ),
    Promise(
        13,
        "No token sees a later one (gradients exactly 0, logits to 1e-12), and rows of a "
        "batch do not meet",
        causality,
        20,
        200,
        200,
        "logits move by 0.037; rows by 0.32",
    ),
    Promise(
        16,
        "The mixture of experts keeps its books: outputs, loads and drops as in a loop over tokens",
        experts,
        30,
        500,
        500,
        "37.5 % dropped at perfect balance",
    ),
]
