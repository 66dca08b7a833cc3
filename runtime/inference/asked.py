"""Check a fast way to decode: when a Decoder is made, a few tokens go through it and through the
plain model.

Reading order: `settle` decides, `ask` compares, below it are the probes and the kept outcomes.

What a way declares (runtime/checks/known.py) misses a change without a name, such as another
function in the router. So two short texts of different lengths are read and continued. Then one
token follows at positions far into caches that hold random keys and values: beyond a window and
before it is full, if blocks have one. After a difference beyond rounding the way is not used, and a
line says so.

For a large file the outcome is kept next to the compiled C code, under the digests of the weights,
of our sources, and of all that chooses a way. Models made in memory are always asked.

Shape letters as in model_parts.py, and V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json
import math
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from config_model import kv_cache_bytes_per_token
from model import LLM
from model_parts import KVCache, activate
from runtime.base.device import device_name, is_out_of_memory, one_thread
from runtime.base.files import write_text_atomic
from runtime.checks.kernels import settle_kernels
from runtime.checks.known import Known
from runtime.checks.rounding import MARGIN, logits_bound
from runtime.inference import cpu_decode
from runtime.inference.quantize import INPUT_EPS, is_packed, packed_kind
from runtime.kernels.compile import cache_folder, cpu_flags

# A text of so many tokens, of which the last STEPS come one by one; the other text is shorter.
TOKENS, STEPS = 9, 2
# Position of a token in a filled cache, or beyond the longest window, where its memory may be had:
# a change may begin far into a text. No multiple of a vector or a tile.
FAR = 511
# Memory for that cache, all rows of it: this, or a sixteenth of the weights.
MOST_CACHE_BYTES = 1 << 24
# Files with less than this in weights are asked each time, which takes milliseconds.
LARGE_BYTES = 1 << 26
# Files with outcomes in the cache folder; the oldest go.
MOST_KEPT = 256
# Router scores that float32 sums in another order may put the other way round, as a share of the
# largest.
NEAR = 1e-5


def settle(decoder, decode_step: Callable, step_knows: Known, weights: str = "") -> None:
    """Take from a Decoder those fast ways that do not compute what its model does.

    It then says why.

    decode_step, step_knows: of runtime.inference. weights: digest of the file that the model is
    from, "" for a model made in memory.
    """
    decoder.kernel_notes = settle_kernels(decoder.model)
    path = _kept(decoder, weights)
    answers = {} if path is None else _read(path)
    there = dict(answers)

    def answer(way: str, known: Known) -> str:
        if way not in answers:
            answers[way] = ask(decoder, decode_step, known)
        return answers[way]

    if decoder.native is not None and (why := answer("c_kernel", cpu_decode.KNOWS)):
        decoder.native, decoder.why_not_native = None, why
    if decoder.native is None and not decoder.why_not_step:
        decoder.why_not_step = answer("step", step_knows)
    if path is not None and answers != there:
        _keep(path, answers)


@torch.inference_mode()
def ask(decoder, decode_step: Callable, known: Known) -> str:
    """Return in a line why the way that `decoder` takes now is wrong; "" if it gives the plain
    model's logits.

    What --compile makes of decode_step is not asked: it is decode_step, and a minute's work.
    """
    model, generator = decoder.model, torch.Generator().manual_seed(0)
    compiles, decoder.compiles = decoder.compiles, False
    # On a GPU the step as it is, before anything is captured: a graph replays the same operations.
    decoder._replay = lambda ids_B, positions_B, span: decode_step(
        model, decoder._whole, ids_B, positions_B, span
    )
    dispatched = _without_dispatch(model)
    is_small = _weight_bytes(model) < LARGE_BYTES
    if decoder.native is not None:
        decoder.native.planes = 2
    try:
        with one_thread() if is_small else contextlib.nullcontext():
            probes = [_far_tokens(decoder, generator, rows) for rows in _rows(decoder)]
            if decoder.native is not None:
                probes.append(_short_texts(decoder, generator))
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        if is_out_of_memory(error):
            raise
        return f"{known.what} fails on this model: {' '.join(str(error).split())[:200]}"
    finally:
        del decoder._replay
        if decoder.native is not None:
            decoder.native.planes = 1
        for owner, name, kernel in dispatched:
            setattr(owner, name, kernel)
        decoder.compiles, decoder._whole, decoder._caches = compiles, None, []
        decoder._texts = []
    plain_NV, fast_NV = (
        torch.cat(values) for values in zip(*((p.plain_NV, p.fast_NV) for p in probes), strict=True)
    )
    limit = explained(model, _rounds_inputs(decoder))
    share = difference(plain_NV, fast_NV)
    if not share <= limit and decoder.native is not None:
        # The C decoder chooses experts itself. Where two were as good, it may have taken the other.
        clear_N = ~torch.cat([p.near_ties() for p in probes])
        share = difference(plain_NV[clear_N], fast_NV[clear_N]) if clear_N.any() else share
    if share <= limit:
        return ""
    fields = known.undeclared(model.config)
    also = f"; it does not know ModelConfig.{', '.join(fields)}" if fields else ""
    off = f"{known.what}'s logits are not the plain model's"
    if math.isinf(share):
        return f"{off}: one of them has NaN or infinities (are the weights damaged?){also}"
    percent = f"{100 * share:.2g}" if share < 0.1 else f"{100 * share:.0f}"
    return (
        f"{off}: they differ by {percent} % of their size, and rounding explains "
        f"{100 * limit:.2g} %{also}"
    )


def difference(plain_NV: Tensor, fast_NV: Tensor) -> float:
    """Return the largest over tokens of the root mean square of the difference, divided by the root
    mean square of all plain logits.

    Tokens whose logits are finite on neither side are left out; infinity where they are on one side
    only.
    """
    plain_NV, fast_NV = plain_NV.cpu().double(), fast_NV.cpu().double()
    finite_N, fast_finite_N = (logits_NV.isfinite().all(dim=1) for logits_NV in (plain_NV, fast_NV))
    if not torch.equal(finite_N, fast_finite_N):
        return math.inf
    plain_NV, fast_NV = plain_NV[finite_N], fast_NV[finite_N]
    if not len(plain_NV):
        return 0.0
    size = plain_NV.square().mean().sqrt().clamp(min=1e-30)
    return ((plain_NV - fast_NV).square().mean(dim=1).sqrt().amax() / size).item()


def explained(model: LLM, rounds_inputs: bool = False) -> float:
    """Return how far two orders of the same operations may put a token's logits apart, as a share
    of the logits' size.

    That of float32 (runtime/checks/rounding.py). In a narrower dtype, what each block stores is
    off by that dtype's eps too, and the errors of the blocks add up like a random walk. So do those
    of the inputs that one side rounds to 16 bits.
    """
    c, dtype = model.config, model.embed.weight.dtype
    stored = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
    if rounds_inputs:
        stored = max(stored, INPUT_EPS)
    return logits_bound(c, FAR) + MARGIN / 2 * math.sqrt(c.transformer_blocks + 1) * stored


def _rounds_inputs(decoder) -> bool:
    """Return whether the C decoder reads, and rounds the inputs of packed weights.

    To 16 bits while it is asked (NativeModel.planes). With 4-bit weights it takes 8 afterwards: the
    same code, but for the second plane.
    """
    return decoder.native is not None and is_packed(decoder.model)


def _without_dispatch(model: LLM) -> list[tuple]:
    """Replace the CPU's operations for experts by `_feed_forward`.

    Return what was there, to be put back: (owner, attribute, kernel). The first call of a custom
    operation imports PyTorch's compiler. That takes a second, and a C decoder never needs it.
    """
    found: list[tuple] = []
    for block in model.layers:
        experts, dispatcher = block.moe.experts, block.moe.dispatcher
        found.append((experts, "feed_forward", experts.feed_forward))
        experts.feed_forward = experts.feed_forward and _feed_forward
        if getattr(dispatcher, "kernel", None) is not None:
            found.append((dispatcher, "kernel", dispatcher.kernel))
            dispatcher.kernel = None
    return found


def _feed_forward(
    x_RC: Tensor, w_in, b_in, w_out, b_out, counts_E: Tensor, activation: str
) -> tuple[Tensor]:
    """Compute Experts.feed_forward in plain operations.

    Rows are sorted by expert: [R, C] -> ([R, C],).
    """
    y_RC, start = torch.empty_like(x_RC), 0
    for e, count in enumerate(counts_E.tolist()):
        rows = slice(start, start := start + count)
        if count:
            h_RF = activate(
                F.linear(x_RC[rows], w_in[e], None if b_in is None else b_in[e]), activation
            )
            y_RC[rows] = F.linear(h_RF, w_out[e], None if b_out is None else b_out[e])
    return (y_RC,)


# --------------------------------------------------------------------------------------- the probes
class _Probe(NamedTuple):
    """What a few tokens gave."""

    plain_NV: Tensor
    fast_NV: Tensor
    # [N]: whether rounding might have sent the token, or one before it in its text, elsewhere.
    near_ties: Callable[[], Tensor]


def _short_texts(decoder, generator: torch.Generator) -> _Probe:
    """Probe two texts, read together and continued token by token.

    Plain is one pass over both without a cache, the shorter row filled up on the right, where
    nothing is compared.
    """
    model, device = decoder.model, decoder.device
    T = min(TOKENS, model.config.context_length)
    num_steps = min(STEPS, T - 1)
    ids_BT = torch.randint(model.config.vocabulary_size, (2, T), generator=generator)
    lengths = [T - num_steps, max(1, T // 3)]
    with _Routers(decoder) as routers:
        plain_BTV = model(ids_BT.to(device)).logits
    texts = decoder.texts(2, T)
    places = [(row, length - 1) for row, length in enumerate(lengths)]
    new = [ids_BT[row, :length].tolist() for row, length in enumerate(lengths)]
    fast = [decoder.read_all(texts, new)]
    for step in range(num_steps):
        now = [(row, length + step) for row, length in enumerate(lengths)]
        fast.append(decoder.step(texts, torch.stack([ids_BT[place] for place in now]).to(device)))
        places += now
    rows, tokens = (torch.tensor(values, device=device) for values in zip(*places, strict=True))
    return _Probe(
        plain_BTV[rows, tokens],
        torch.cat(fast),
        lambda: (routers.near_ties().view(2, T).cumsum(dim=1) > 0)[rows, tokens],
    )


def _rows(decoder) -> list[int]:
    """Return how many texts a step gets, so that it takes each of its branches."""
    c = decoder.config
    if decoder.device.type == "cpu":
        return [2]
    # With few rows a GPU reads the chosen experts' matrices, with many it asks every expert.
    return [1, min(max(2, -(-c.num_experts // c.top_k)), 128)]


def _far_tokens(decoder, generator: torch.Generator, rows: int) -> _Probe:
    """Probe a token each at two positions of caches that hold random keys and values, also after
    the shorter text's end.

    This is all that there is to ask of decode_step, which reads no prompts. Rows after the second
    are the first two again.
    """
    model, device = decoder.model, decoder.device
    far = _far_position(decoder)
    positions = [(far, far // 2)[row % 2] for row in range(rows)]
    repeats = [row % 2 for row in range(rows)]
    ids_B = torch.randint(model.config.vocabulary_size, (2,), generator=generator)[repeats]
    ids_B = ids_B.to(device)
    texts = decoder.texts(rows, far + 1)
    for store in decoder._whole.keys + decoder._whole.values:
        content = torch.randn((2, *store.shape[1:]), generator=generator)
        store.copy_(content[repeats])
    for text, position in zip(texts, positions, strict=True):
        text.cache.length = position
    with _Routers(decoder) as routers:
        plain = [
            model(ids_B[row : row + 1, None], cache=_copy(texts[row].cache)).logits[0]
            for row in range(min(rows, 2))
        ]
        with routers.choosing(repeats) if decoder.native is None else contextlib.nullcontext():
            fast_BV = decoder.step(texts, ids_B)
    return _Probe(torch.cat(plain)[repeats], fast_BV, lambda: routers.near_ties()[repeats])


def _far_position(decoder) -> int:
    """Return FAR, or a position beyond the longest window.

    It is less if the context ends before that, or the memory for the cache.
    """
    c = decoder.config
    window = max(c.window(block) for block in range(c.transformer_blocks))
    element_bytes = decoder.model.embed.weight.element_size()
    token_bytes = max(_rows(decoder)) * kv_cache_bytes_per_token(c, element_bytes)
    most_bytes = max(MOST_CACHE_BYTES, _weight_bytes(decoder.model) // 16)
    # A Decoder keeps one place more than it is asked for, and so does the position itself.
    most = max(1, most_bytes // token_bytes - 2)
    return min(max(FAR, window + 2 if window else 0), most, c.context_length - 1)


def _copy(cache: KVCache) -> KVCache:
    """Return a copy of a cache with memory of its own."""
    own = copy.copy(cache)
    own.keys, own.values = [t.clone() for t in cache.keys], [t.clone() for t in cache.values]
    return own


class _Routers:
    """Listens to a model's routers while the plain model runs, and lets them repeat what they
    chose.

    A fast way that rounds otherwise may send a token to another expert where two are nearly as
    good, often so in bfloat16. Its logits are then those of another choice, and say nothing of its
    operations.
    """

    def __init__(self, decoder):
        self._routers = [block.moe.router for block in decoder.model.layers]
        self._near = MARGIN / 4 * INPUT_EPS if _rounds_inputs(decoder) else NEAR
        self._said: list[list[tuple]] = [[] for _ in self._routers]
        self._rows: Tensor | None = None

    def __enter__(self):
        self._hooks = [
            router.register_forward_hook(functools.partial(self._hook, block))
            for block, router in enumerate(self._routers)
        ]
        return self

    def __exit__(self, *_):
        for hook in self._hooks:
            hook.remove()

    def _hook(self, block: int, router, given, out):
        if self._rows is None:
            self._said[block].append(out)
            return None
        return tuple(
            torch.cat(values)[self._rows] for values in zip(*self._said[block], strict=True)
        )

    @contextlib.contextmanager
    def choosing(self, rows) -> Iterator[None]:
        """Within this context, let routers give what they gave for these rows of all tokens."""
        self._rows = torch.tensor(list(rows), device=self._routers[0].weight.device)
        try:
            yield
        finally:
            self._rows = None

    def near_ties(self) -> Tensor:
        """Return [N], for each token so far, whether another rounding might have sent it to other
        experts.
        """
        near_N = torch.zeros((), dtype=torch.bool)
        for router, said in zip(self._routers, self._said, strict=True):
            experts_NK, probabilities_NE = (
                torch.cat(values) for values in list(zip(*said, strict=True))[1:3]
            )
            K, E = experts_NK.shape[1], probabilities_NE.shape[1]
            scores_NE = (
                probabilities_NE
                if router.selection_bias is None
                else probabilities_NE + router.selection_bias
            )
            if K < E:
                best = scores_NE.topk(K + 1, dim=1).values
                near_N = near_N.to(best.device) | (
                    best[:, K - 1] - best[:, K] <= self._near * scores_NE.abs().amax(dim=1)
                )
        return near_N.to(experts_NK.device).expand(len(experts_NK))


# ------------------------------------------------------------------------------------ kept outcomes
def _kept(decoder, weights: str) -> Path | None:
    """Return where the outcome for a large file is kept; None for other models."""
    model = decoder.model
    if not weights or _weight_bytes(model) < LARGE_BYTES:
        return None
    chosen = [
        weights,
        repr(model.config),
        str(model.embed.weight.dtype),
        device_name(decoder.device),
        packed_kind(model),
        decoder.why_not_native,
        decoder.why_not_step,
        str(torch.__version__),
        platform.machine(),
        cpu_flags(),
        _sources(),
        # Compilers and their flags make other libraries of one source.
        "" if decoder.native is None else cpu_decode.library_digest(),
    ]
    digest = hashlib.sha256(json.dumps(chosen).encode()).hexdigest()
    return cache_folder() / f"asked_{digest[:32]}.json"


def _weight_bytes(model: LLM) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


@functools.cache
def _sources() -> str:
    """Return the digest of all that computes: the model's three files and all of runtime/."""
    runtime = Path(__file__).resolve().parents[1]
    files = [runtime.parent / name for name in ("config_model.py", "model_parts.py", "model.py")]
    files += sorted(path for kind in ("py", "c", "h") for path in runtime.glob(f"**/*.{kind}"))
    contents = (file.name.encode() + b"\0" + file.read_bytes() for file in files)
    return hashlib.sha256(b"\0".join(contents)).hexdigest()


def _read(path: Path) -> dict[str, str]:
    """Return what was found before; nothing if the file is missing or damaged."""
    try:
        answers = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    is_whole = isinstance(answers, dict) and all(isinstance(why, str) for why in answers.values())
    return answers if is_whole else {}


def _keep(path: Path, answers: dict[str, str]) -> None:
    """Store an outcome. A folder that cannot be written to costs the next start its milliseconds,
    nothing else.
    """
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        others = sorted(path.parent.glob("asked_*.json"), key=lambda file: file.stat().st_mtime)
        for old in others[:-MOST_KEPT]:
            old.unlink(missing_ok=True)
        write_text_atomic(path, json.dumps(answers) + "\n")
