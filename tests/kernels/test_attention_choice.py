"""Which kernel a GPU takes for attention: tables of cases, fake tensors, and emulated kernels."""

from __future__ import annotations

import functools
import re
import types

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch._functorch.aot_autograd import aot_module_simplified
from torch._subclasses.fake_tensor import FakeTensorMode

import runtime.kernels.attention_choice as attention_choice
import runtime.kernels.sink_attention as sinks_module
from model_parts import attention_mask, attention_with_sinks
from runtime.inference.decoder import Decoder
from runtime.kernels.attention_choice import Card, Choice, choose_attention, gpu_attention
from runtime.kernels.sink_attention import sink_attention
from tests.builders import random_model, tiny_config
from tests.nightly import nightly_but

HOPPER, AMPERE, TURING = Card((9, 0), 91900), Card((8, 0), 91900), Card((7, 5), 91900)
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
FLASH, EFFICIENT = Choice("flash", False, False), Choice("efficient", False, True)
FLASH_BY_NAME, EFFICIENT_BY_NAME = Choice("flash", True, False), Choice("efficient", True, True)
CUDNN, WHATEVER = Choice("cudnn", False, False), Choice("torch", False, True)


# --------------------------------------------------------------------------------------- the choice
@pytest.mark.parametrize(
    "card, dtype, mask, S, D, trains, expected",
    [
        # Training on Hopper: cuDNN, with masks too, but not where its gradient can be NaN.
        (HOPPER, BF16, "none", 1024, 64, True, CUDNN),
        (HOPPER, FP16, "none", 1024, 128, True, CUDNN),
        (HOPPER, BF16, "none", 704, 64, True, CUDNN),
        (HOPPER, BF16, "fixed", 1024, 64, True, CUDNN),
        (HOPPER, BF16, "fixed", 1000, 64, True, CUDNN),
        (Card((10, 0), 91900), BF16, "none", 1024, 64, True, CUDNN),
        *((HOPPER, BF16, "fixed", S, 64, True, EFFICIENT_BY_NAME) for S in (64, 192, 704, 1088)),
        # A mask that learns gets its gradient from the memory-efficient kernel alone.
        (HOPPER, BF16, "learned", 1024, 32, True, EFFICIENT),
        (AMPERE, BF16, "learned", 1024, 32, True, EFFICIENT),
        # Generating on Hopper: never cuDNN, which would build a plan for each new length.
        *((HOPPER, BF16, "none", S, 64, False, FLASH_BY_NAME) for S in (2, 7, 1024)),
        (HOPPER, BF16, "fixed", 300, 64, False, EFFICIENT_BY_NAME),
        (HOPPER, BF16, "none", 1, 64, False, FLASH),
        # Where PyTorch does not take cuDNN first, its own choice stands.
        (Card((9, 0), 91500), BF16, "none", 1024, 64, True, FLASH),
        (Card((9, 0), 0), BF16, "none", 7, 64, False, FLASH),
        (Card((9, 0), 91900, deterministic=True), BF16, "none", 1024, 64, True, FLASH),
        (Card((9, 0), 91900, deterministic=True), BF16, "fixed", 1024, 64, True, EFFICIENT),
        # Heads of 136 to 256 numbers: cuDNN takes them on Hopper, from 9.10 on.
        *((HOPPER, BF16, "none", 1024, D, True, CUDNN) for D in (160, 192, 256)),
        (HOPPER, BF16, "none", 7, 192, False, FLASH_BY_NAME),
        (HOPPER, BF16, "fixed", 64, 192, True, EFFICIENT_BY_NAME),
        (HOPPER, BF16, "none", 1024, 264, False, EFFICIENT),
        (Card((10, 0), 91900), BF16, "none", 1024, 160, True, FLASH),
        (HOPPER, FP32, "none", 1024, 64, True, EFFICIENT),
        (HOPPER, FP32, "fixed", 64, 64, True, EFFICIENT),
        (AMPERE, BF16, "none", 1024, 64, True, FLASH),
        (AMPERE, BF16, "fixed", 64, 64, True, EFFICIENT),
        (AMPERE, BF16, "none", 1024, 256, True, EFFICIENT),
        (AMPERE, BF16, "none", 1024, 256, False, FLASH),
        (TURING, FP16, "none", 1024, 64, True, EFFICIENT),
        (TURING, FP32, "fixed", 1024, 64, False, EFFICIENT),
        # Heads of odd sizes, and float64. PyTorch pads the former for flash.
        (HOPPER, BF16, "none", 1024, 10, True, Choice("torch", False, False)),
        (HOPPER, BF16, "fixed", 1024, 10, True, WHATEVER),
        (HOPPER, FP32, "none", 1024, 10, True, WHATEVER),
        (HOPPER, FP64, "none", 1024, 64, True, WHATEVER),
        (TURING, FP16, "none", 1024, 10, True, WHATEVER),
        (HOPPER, BF16, "learned", 1024, 10, True, WHATEVER),
    ],
)
def test_the_kernel_for_each_case(card, dtype, mask, S, D, trains, expected):
    assert choose_attention(card, dtype, mask, S, D, needs_gradient=trains) == expected


@pytest.mark.parametrize("dropout, expected", [(0.125, CUDNN), (0.1, FLASH)])
def test_cudnn_knows_sixteenths_of_dropout(dropout, expected):
    """With another dropout a mask goes to the memory-efficient kernel, which needs all heads."""
    assert choose_attention(HOPPER, BF16, "none", 1024, 64, True, dropout) == expected
    assert choose_attention(HOPPER, BF16, "fixed", 1024, 64, True, 0.1) == EFFICIENT


def test_sinks_give_cudnn_no_mask():
    """runtime/kernels/sink_attention.py calls cuDNN without a mask: it would ignore windows."""
    assert choose_attention(HOPPER, BF16, "none", 1024, 64, True, sinks=True) == CUDNN
    assert choose_attention(HOPPER, BF16, "fixed", 1024, 64, True, sinks=True).kernel == "efficient"


def test_the_card_is_asked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    assert attention_choice.card_of(torch.device("cuda")) == HOPPER
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: False)
    assert attention_choice.card_of(torch.device("cuda")).cudnn_version == 0


# ------------------------------------------------------------------------------------- fake tensors
@pytest.mark.parametrize(
    "card, mask_shape",
    [
        (HOPPER, None),
        (AMPERE, None),
        *((card, shape) for card in (HOPPER, AMPERE) for shape in ((40, 40), (2, 1, 40, 40))),
    ],
)
def test_sinks_train_in_half_precision_on_a_gpu(card, mask_shape):
    """CUDA's flash kernel returns None for the lengths that a dense call lacks.

    None was also the mark for a saved tensor. The backward pass took the random state for a length
    and ended with StopIteration: no gpt-oss preset could train on a GPU.
    """
    with FakeTensorMode():
        q = torch.empty(2, 40, 4, 16, dtype=BF16).transpose(1, 2).requires_grad_()
        k, v = (torch.empty(2, 2, 40, 16, dtype=BF16, requires_grad=True) for _ in range(2))
        sinks = torch.empty(4, requires_grad=True)
        mask = None if mask_shape is None else torch.empty(mask_shape, dtype=torch.bool)
        y = sink_attention(q, k, v, sinks, mask, mask is None, card)
        y.sum().backward()
        assert y.shape == q.shape and y.dtype == BF16
        assert all(x.grad.shape == x.shape and x.grad.dtype == x.dtype for x in (q, k, v, sinks))


def test_heads_that_no_kernel_takes_are_refused():
    with pytest.raises(
        ValueError,
        match="no kernel of a GPU knows sinks with heads of 10 numbers in torch.bfloat16: use "
        "model_parts.attention_with_sinks",
    ):
        sink_attention(
            *(torch.zeros(1, 2, 5, 10, dtype=BF16) for _ in range(3)),
            torch.zeros(2),
            torch.ones(5, 5, dtype=torch.bool),
            False,
            HOPPER,
        )


# --------------------------------------------------------------------------------- emulated kernels
class Emulated:
    """CUDA's attention operations on a CPU, in any float dtype: what they return and demand.

    called: their names, each with the number of key heads that it was given.
    """

    def __init__(self):
        self.called, self.state = [], (torch.tensor(3), torch.tensor(5))

    def _attend(self, name, q, k, v, is_causal, mask=None):
        self.called.append((name, k.shape[1]))
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, is_causal, attn_mask=mask
        )

    def _gradients(self, name, grad, q, k, v, y, log, is_causal, mask=None):
        self.called.append((f"{name} backward", k.shape[1]))
        G, repeated = (
            k.shape[1],
            [x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v)],
        )
        grad_q, *grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad.contiguous(), q, *repeated, y, log, 0.0, is_causal, attn_mask=mask
        )
        return grad_q, *(x.unflatten(1, (G, -1)).sum(2) for x in grads)

    def _scaled_dot_product_flash_attention(self, q, k, v, dropout, is_causal):
        y, log = self._attend("flash", q, k, v, is_causal)
        return y, log, None, None, q.shape[2], k.shape[2], *self.state, torch.empty(0)

    def _scaled_dot_product_flash_attention_backward(
        self,
        grad,
        q,
        k,
        v,
        y,
        log,
        lengths_q,
        lengths_k,
        longest_q,
        longest_k,
        dropout,
        is_causal,
        seed,
        offset,
    ):
        assert (lengths_q, lengths_k, longest_q, longest_k) == (
            None,
            None,
            q.shape[2],
            k.shape[2],
        ) and (seed, offset) == self.state
        return self._gradients("flash", grad, q, k, v, y, log, is_causal)

    def _scaled_dot_product_cudnn_attention(self, q, k, v, mask, with_log, dropout, is_causal):
        assert mask is None and with_log
        y, log = self._attend("cudnn", q, k, v, is_causal)
        return y, log[..., None], None, None, q.shape[2], k.shape[2], *self.state, None

    def _scaled_dot_product_cudnn_attention_backward(
        self,
        grad,
        q,
        k,
        v,
        y,
        log,
        seed,
        offset,
        mask,
        lengths_q,
        lengths_k,
        longest_q,
        longest_k,
        dropout,
        is_causal,
    ):
        assert log.shape == (*q.shape[:3], 1) and mask is None
        assert (lengths_q, lengths_k, longest_q, longest_k) == (
            None,
            None,
            q.shape[2],
            k.shape[2],
        ) and (seed, offset) == self.state
        return self._gradients("cudnn", grad, q, k, v, y, log[..., 0], is_causal)

    def _check_efficient(self, q, k, mask):
        assert k.shape[1] == q.shape[1], "the memory-efficient kernel takes no grouped heads"
        if mask is not None:
            assert mask.shape == (*q.shape[:3], k.shape[2]) and mask.dtype == q.dtype
            assert mask.stride(-1) == 1 and mask.stride(-2) % 8 == 0, "rows have to be aligned"

    def _scaled_dot_product_efficient_attention(self, q, k, v, mask, with_log, dropout, is_causal):
        self._check_efficient(q, k, mask)
        y, log = self._attend("efficient", q, k, v, is_causal, mask)
        padded = F.pad(log, (0, -log.shape[-1] % 32), value=torch.inf)
        return y, padded if with_log else torch.empty(0), *self.state

    def _scaled_dot_product_efficient_attention_backward(
        self, grad, q, k, v, mask, y, log, seed, offset, dropout, wanted, is_causal
    ):
        self._check_efficient(q, k, mask)
        assert (
            log.shape[-1] % 32 == 0
            and (seed, offset) == self.state
            and wanted == [True, True, True, False]
        )
        return *self._gradients(
            "efficient", grad, q, k, v, y, log[..., : q.shape[2]], is_causal, mask
        ), None


@pytest.fixture
def emulated(monkeypatch):
    emulated = Emulated()
    monkeypatch.setattr(attention_choice, "aten", emulated)
    monkeypatch.setattr(sinks_module, "aten", emulated)
    return emulated


def problem(dtype, T=40, mask=None):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, T, 16, dtype=dtype, requires_grad=True) for heads in (4, 2, 2))
    position, starts = torch.arange(T), torch.tensor([[0] * 15 + [15] * (T - 15), [0] * T])
    masks = {
        None: None,
        "window": attention_mask(position, position, 5),
        "documents": attention_mask(position, position, 0, starts),
    }
    return q, k, v, torch.randn(4, dtype=dtype, requires_grad=True), masks[mask]


@pytest.mark.parametrize(
    "kernel, mask",
    [
        ("flash", None),
        ("cudnn", None),
        ("efficient", None),
        ("efficient", "window"),
        ("efficient", "documents"),
    ],
)
def test_sinks_through_each_kernel_of_a_gpu(emulated, kernel, mask):
    """cuDNN's log of the sum has one dimension more, the memory-efficient kernel pads it."""
    q, k, v, sinks, mask = problem(FP64, 37, mask)
    heads = (x.repeat_interleave(2, dim=1) if kernel == "efficient" else x for x in (k, v))
    given = None if mask is None else attention_choice.aligned_mask(mask, q)
    y = sinks_module._SinkAttention.apply(q, *heads, sinks, given, mask is None, kernel)
    expected = attention_with_sinks(q, k, v, sinks, mask, mask is None)
    gradient = torch.randn_like(y)
    assert torch.allclose(y, expected, atol=1e-12)
    for got, want in zip(
        *(torch.autograd.grad(x, (q, k, v, sinks), gradient) for x in (y, expected)), strict=True
    ):
        assert torch.allclose(got, want, atol=1e-12)
    assert [name for name, _ in emulated.called] == [kernel, f"{kernel} backward"]


@pytest.mark.parametrize(
    "card, dtype, mask, with_gradient, called",
    [
        (HOPPER, BF16, None, True, ("cudnn", 2)),
        (HOPPER, BF16, None, False, ("flash", 2)),
        (AMPERE, BF16, None, True, ("flash", 2)),
        (HOPPER, BF16, "window", True, ("efficient", 4)),
        (AMPERE, BF16, "documents", False, ("efficient", 4)),
        (HOPPER, FP32, None, True, ("efficient", 4)),
    ],
)
def test_sinks_take_the_kernel_of_the_table(emulated, card, dtype, mask, with_gradient, called):
    """And copy keys and values to all heads for that kernel alone which takes no grouped heads."""
    q, k, v, sinks, mask = problem(dtype, mask=mask)
    with torch.set_grad_enabled(with_gradient):
        y = sink_attention(q, k, v, sinks, mask, mask is None, card)
    exact = attention_with_sinks(
        *(x.double() for x in (q, k, v)), sinks.double(), mask, mask is None
    )
    # The kernel rounds its weights and its result, which is then scaled and rounded again.
    assert (y.double() - exact).norm() <= 4 * torch.finfo(
        dtype
    ).eps * exact.norm() and emulated.called == [called]


@pytest.mark.parametrize(
    "mask, T, with_gradient, called",
    [
        (None, 40, False, [("flash", 2)]),
        ("window", 40, False, [("efficient", 4)]),
        ("documents", 64, False, [("efficient", 4)]),
        ("window", 64, True, [("efficient", 4)]),
        ("window", 40, True, []),
        (None, 64, True, []),
    ],
)
def test_what_hopper_is_kept_from(emulated, mask, T, with_gradient, called):
    """Generating never reaches PyTorch's own choice, which would be cuDNN.

    Nor does training where cuDNN's gradient can be NaN.
    """
    q, k, v, _, mask = problem(BF16, T, mask)
    with torch.set_grad_enabled(with_gradient):
        y = gpu_attention(q, k, v, mask, mask is None, 0.0, HOPPER)
    wide = (q.double(), *(x.double().repeat_interleave(2, dim=1) for x in (k, v)))
    exact = F.scaled_dot_product_attention(*wide, attn_mask=mask, is_causal=mask is None)
    assert (y.double() - exact).norm() <= 4 * torch.finfo(
        BF16
    ).eps * exact.norm() and emulated.called == called


def test_a_mask_of_numbers_keeps_them(emulated):
    """A learned bias in a forward pass without gradients: [1, H, T, S], S not aligned."""
    q, k, v, _, _ = problem(BF16)
    bias = torch.randn(1, 4, 40, 40, dtype=BF16).masked_fill(
        ~torch.ones(40, 40, dtype=torch.bool).tril(), -torch.inf
    )
    with torch.no_grad():
        y = gpu_attention(q, k, v, bias, False, 0.0, HOPPER)
    exact = F.scaled_dot_product_attention(
        q.double(),
        *(x.double().repeat_interleave(2, dim=1) for x in (k, v)),
        attn_mask=bias.double(),
    )
    assert (y.double() - exact).norm() <= 4 * torch.finfo(
        BF16
    ).eps * exact.norm() and emulated.called == [("efficient", 4)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_sinks": True},
        {"sliding_window": 5},
        {"use_attention_bias": True, "qk_norm": False},
    ],
    ids=str,
)
def test_no_prompt_waits_for_a_plan_of_cudnn(emulated, monkeypatch, changes):
    """cuDNN built a plan for each new length of a prompt, or of a tail that was not in the cache.

    0.4 s before the first token.
    """
    model = random_model(tiny_config(**changes)).to(BF16)
    for block in model.layers:
        block.attention.device_attention = functools.partial(gpu_attention, card=HOPPER)
        block.attention.sink_kernel = functools.partial(sink_attention, card=HOPPER)
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)
    decoder = Decoder(model, native=False)
    (text,) = decoder.texts(1, 32)
    # What the decoder was asked when it was made.
    emulated.called.clear()
    for length in (5, 9, 31):
        decoder.read(text, list(range(length)))
        decoder.forget()
    decoder.read(text, list(range(5)))
    decoder.read(text, list(range(17)))
    assert {name for name, _ in emulated.called} <= {"flash", "efficient"}
    assert len(emulated.called) == 5 * len(model.layers)


# ---------------------------------------------------------------------------------- compiled blocks
def traced(model, ids, names: str = "scaled_dot") -> tuple[set[str], set[str]]:
    """Attention operations in compiled blocks: of a step of training, of a pass without gradients.

    names: a regular expression that finds them.

    Nothing is computed, because a CPU has no such kernels.
    """
    seen: set[str] = set()

    def compiler(graph, inputs):
        seen.update(
            str(node.target).split(".")[1]
            for node in graph.graph.nodes
            if re.search(names, str(node.target))
        )
        output = next(node for node in graph.graph.nodes if node.op == "output")
        fakes = [
            node.meta["val"] if isinstance(node, torch.fx.Node) else node for node in output.args[0]
        ]
        empty = [
            functools.partial(
                torch.empty_strided, x.shape, x.stride(), dtype=x.dtype, device=x.device
            )
            if isinstance(x, torch.Tensor)
            else lambda x=x: x
            for x in fakes
        ]
        return make_boxed_func(lambda *args: [make() for make in empty])

    for block in model.layers:
        block.compile(
            backend=lambda graph, inputs: aot_module_simplified(
                graph, inputs, fw_compiler=compiler, bw_compiler=compiler
            ),
            fullgraph=True,
            dynamic=False,
        )
    with torch.autocast("cpu", BF16):
        out = model(ids, ids)
        (out.cross_entropy_sum + out.aux_loss).backward()
        training = seen.copy()
        seen.clear()
        with torch.no_grad():
            model(ids)
    return training, seen


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes, kernels",
    nightly_but(
        [
            ({"attention_sinks": True}, ("cudnn", "flash")),
            ({"attention_sinks": True, "sliding_window": 5}, ("efficient", "efficient")),
            ({"sliding_window": 5}, ("efficient", "efficient")),
            ({}, ("flash_attention_for_cpu", "flash")),
        ],
        1,
    ),
    ids=["sinks", "sinks-window", "window", "plain"],
)
def test_a_compiled_block_holds_the_kernel_forward_and_backward(changes, kernels):
    """One graph, whatever is chosen: a switch of the whole process inside it would break it."""
    torch.compiler.reset()
    model = random_model(tiny_config(context_length=64, transformer_blocks=1, **changes))
    for block in model.layers:
        block.attention.device_attention = functools.partial(gpu_attention, card=HOPPER)
        block.attention.sink_kernel = functools.partial(sink_attention, card=HOPPER)
    training, generating = traced(model, torch.randint(0, 61, (2, 64)))
    names = [
        f"_scaled_dot_product_{kernel}"
        if "cpu" in kernel
        else f"_scaled_dot_product_{kernel}_attention"
        for kernel in kernels
    ]
    assert training == {names[0], f"{names[0]}_backward"} and generating == {names[1]}


def test_without_a_choice_grouped_heads_are_copied_under_a_mask(monkeypatch):
    """A model that nobody called choose_kernels for, such as the published class.

    On a GPU a mask must not lead to all T x S scores.
    """
    model, seen = random_model(tiny_config(sliding_window=5)), []

    class Claims(torch.Tensor):
        is_cuda = True

    attention = model.layers[0].attention
    real = attention.project
    attention.project = lambda *given: tuple(x.as_subclass(Claims) for x in real(*given))
    monkeypatch.setattr(
        "model_parts.F",
        types.SimpleNamespace(
            scaled_dot_product_attention=lambda q, k, v, **more: (
                seen.append((k.shape[1], more["enable_gqa"])) or q
            )
        ),
    )
    attention(torch.randn(1, 16, 32), None)
    assert seen == [(4, False)]
