"""The kernels that stand in for parts of a block are asked before they are used.

On a CPU runtime/kernels/routed_experts.py, cpu_experts.py, router.py, norms.py, cpu_attention.py
and sink_attention.py compute again what model_parts.py says, on a GPU bias_attention.py does. Where
that was changed (another activation, one more parameter of the experts), they would train and
generate another function in silence. So each is compared with it on a few numbers; one that differs
is taken out of the model, which then computes as model_parts.py does, and a line says so.
"""

from __future__ import annotations

import copy
import functools

import torch
from torch import Tensor

from model_parts import activate, attention_mask, attention_with_sinks
from runtime.base.device import one_thread
from runtime.checks.rounding import rounding, size_of
from runtime.kernels import bias_attention, cpu_experts
from runtime.kernels.choose import leave_out, norms_of

# Parameters of Experts that runtime/kernels/cpu_experts.py is given.
EXPERTS = ("w_in", "b_in", "w_out", "b_out")
# Parameters and buffers of Router that runtime/kernels/router.py is given.
ROUTER = ("weight", "bias", "selection_bias")
# Rows and features of what is compared, and up to which values: beyond the limits of
# swiglu_clamped, and where the tails of the activations are.
ROWS, FEATURES, LARGEST = 9, 16, 9.0
NUM_EXPERTS, HIDDEN = 3, 8
# Makes classes whose packed matrices are properties.
PACKING = "runtime.inference.quantize"
TOKENS, WINDOW = 7, 3
# Sequences, tokens and side of the table for the kernels of a GPU: more than a tile, and what
# Triton compiles for these sizes serves those of a run too (multiples of 16).
GPU_ROWS, GPU_TOKENS, GPU_TABLE = 2, 80, 96


def settle_kernels(model, documents: bool = False) -> list[str]:
    """Take from the blocks of a model what does not compute their functions; lines that say why,
    for a user.

    documents: several share a sequence, and none sees another.
    """
    with one_thread():
        return [*_settle(model), *_settle_bias(model, documents)]


def _settle(model) -> list[str]:
    lines: dict[str, None] = {}
    slower = "plain operations compute {}, which is slower: {}"
    asked: dict[type, str] = {}
    for norm in norms_of(model):
        if norm.kernel is not None and (why := _why_not_norm(norm)):
            leave_out(norm, "kernel")
            lines[slower.format("norms", why)] = None
    for block in model.layers:
        experts, attention = block.moe.experts, block.attention
        if experts.w_in.device.type != "cpu":
            continue
        why = _why_not_experts(experts) if experts.feed_forward is not None else ""
        if why:
            leave_out(experts, "feed_forward")
            lines[slower.format("the experts", why)] = None
        if getattr(block.moe.dispatcher, "kernel", None) is not None:
            if type(experts) not in asked:
                asked[type(experts)] = why or _why_not_routed(block.moe)
            if why := asked[type(experts)]:
                leave_out(block.moe.dispatcher, "kernel")
                lines[slower.format("the experts", why)] = None
        if block.moe.route_kernel is not None and (why := _why_not_router(block.moe)):
            leave_out(block.moe, "route_kernel")
            lines[slower.format("routers", why)] = None
        if attention.turn_kernel is not None and (why := _why_not_turn(attention)):
            leave_out(attention, "turn_kernel")
            lines[slower.format("the rotation of heads", why)] = None
        has_sinks = attention.sink_kernel is not None and attention.sinks is not None
        if has_sinks and (why := _why_not_sinks(attention)):
            leave_out(attention, "sink_kernel")
            lines[slower.format("attention", why)] = None
        if attention.kernel is not None and (why := _why_not_attention(attention)):
            leave_out(attention, "kernel")
            lines[slower.format("attention", why)] = None
    return list(lines)


def _settle_bias(model, documents: bool) -> list[str]:
    """Say what computes attention with the learned bias, if Triton's kernels are asked for."""
    lines: dict[str, None] = {}
    if not bias_attention.is_asked_for():
        return []
    for block in model.layers:
        attention = block.attention
        if attention.attention_bias is None:
            continue
        bias = attention.attention_bias
        why = bias_attention.why_not(attention, bias.device, bias.dtype)
        if documents:
            why = "the kernels know no documents that share a sequence"
        # Another kernel may stand there where these cannot run.
        is_chosen = isinstance(attention.kernel, functools.partial)
        if is_chosen and why:
            attention.kernel = None
        elif is_chosen and (why := _why_not_bias(attention, bias.device)):
            leave_out(attention, "kernel")
        if why:
            why = f"plain operations compute attention with the learned bias: {why}"
        elif is_chosen:
            why = (
                "Triton computes attention with the learned bias, without a cache and where no "
                f"documents share a sequence ({bias_attention.VARIABLE})"
            )
        if why:
            lines[why] = None
    return list(lines)


@torch.inference_mode(False)
def _why_not_experts(experts) -> str:
    tensors = [*experts.named_parameters(), *experts.named_buffers()]
    # A packed matrix has two names (runtime/inference/quantize.py).
    names = {name.removesuffix("_packed").removesuffix("_scale") for name, _ in tensors}
    # Experts with adapters have an operation of their own, of the same parts.
    if unknown := sorted(names - set(getattr(experts, "cpu_parameters", EXPERTS))):
        return f"runtime/kernels/cpu_experts.py does not know {', '.join(unknown)}"
    generator = torch.Generator().manual_seed(0)
    h_RI = (torch.rand(ROWS, FEATURES, generator=generator) * 2 - 1) * LARGEST
    with torch.enable_grad():
        h_RI.requires_grad_()
        y_RF = activate(h_RI, experts.activation)
        grad_RF = torch.randn(y_RF.shape, generator=generator)
        # A sum has no gradient to be given: that would import sympy, which takes a second.
        (grad_RI,) = torch.autograd.grad((y_RF * grad_RF).sum(), h_RI)
    with torch.no_grad():
        ours_RF = cpu_experts._activation(h_RI, experts.activation)
        ours_RI = cpu_experts._activation_backward(grad_RF.clone(), h_RI, experts.activation)
        same = _is_same(ours_RF, y_RF.detach()) and _is_same(ours_RI, grad_RI)
    return (
        ""
        if same
        else "runtime/kernels/cpu_experts.py has another activation than model_parts.activate"
    )


@torch.inference_mode()
def _why_not_routed(moe) -> str:
    """Compare a dispatcher's kernel with the dispatcher, on small experts of the model's class."""
    generator, experts = torch.Generator().manual_seed(0), copy.copy(moe.experts)
    kinds = type(experts).__mro__
    experts.__class__ = next(kind for kind in kinds if kind.__module__ != PACKING)
    outer, inner = (1, 2)[experts.activation != "gelu"] * HIDDEN, FEATURES
    shapes = {
        "w_in": (NUM_EXPERTS, outer, inner),
        "w_out": (NUM_EXPERTS, inner, HIDDEN),
        "b_in": (NUM_EXPERTS, outer),
        "b_out": (NUM_EXPERTS, inner),
    }
    experts._parameters = {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator))
        if name.startswith("w") or experts._parameters[name] is not None
        else None
        for name, shape in shapes.items()
    }
    # The products of grouped_linear are a custom operation, whose first call imports PyTorch's
    # compiler: a second.
    experts._buffers, experts.feed_forward, experts.grouped = {}, None, True
    plain = copy.copy(moe.dispatcher)
    plain.kernel = None
    x_NC = torch.randn(ROWS, FEATURES, generator=generator)
    scores_NE = torch.rand(ROWS, NUM_EXPERTS, generator=generator)
    weights_NK, experts_NK = scores_NE.topk(2)
    counts_E = torch.bincount(experts_NK.flatten(), minlength=NUM_EXPERTS)
    given = (x_NC, weights_NK, experts_NK, counts_E, experts)
    ours_NC = moe.dispatcher.kernel(*given)
    if ours_NC is None or _is_same(ours_NC, plain(*given), FEATURES + HIDDEN):
        return ""
    return "runtime/kernels/routed_experts.py has other results than model_parts.LocalDispatcher"


@torch.inference_mode(False)
def _why_not_router(moe) -> str:
    """Compare the kernel of a block's router with the plain operations, results and a gradient.

    With random weights, as among equal scores each would choose another expert; with scores of
    about 1, as a softmax turns differences into ratios.
    """
    tensors = [*moe.router.named_parameters(), *moe.router.named_buffers()]
    if unknown := sorted({name for name, _ in tensors} - set(ROUTER)):
        return f"runtime/kernels/router.py does not know {', '.join(unknown)}"
    generator = torch.Generator().manual_seed(0)
    probe, router = copy.copy(moe), copy.copy(moe.router)
    for kind in ("_parameters", "_buffers"):
        drawn = dict(getattr(router, kind))
        for name, tensor in drawn.items():
            if tensor is not None:
                scale = tensor.shape[-1] ** -0.5
                drawn[name] = torch.randn(tensor.shape, generator=generator) * scale
        setattr(router, kind, drawn)
    probe._modules, probe.route_kernel = {**moe._modules, "router": router}, None
    E, C = router.weight.shape
    x_NC = torch.randn(ROWS, C, generator=generator)
    found = []
    with torch.enable_grad():
        x_NC.requires_grad_()
        for function in (functools.partial(moe.route_kernel, router), probe.routed):
            results = function(x_NC)
            if results is None:
                return ""
            weights_NK, _, _, mean_E, z_loss, _ = results
            loss = weights_NK.square().sum() + mean_E.square().sum() + z_loss
            found.append([*results, *torch.autograd.grad(loss, x_NC)])
    if all(_is_same(a.double(), b.double(), C + E) for a, b in zip(*found, strict=True)):
        return ""
    return "runtime/kernels/router.py has other results than MoE.routed"


@torch.inference_mode()
def _why_not_sinks(attention) -> str:
    generator = torch.Generator().manual_seed(0)
    sizes = (attention.H, attention.G, attention.G)
    q_BHTD, k_BGTD, v_BGTD = (
        torch.randn(1, heads, TOKENS, attention.D, generator=generator) for heads in sizes
    )
    sinks_H = torch.randn(attention.H, generator=generator)
    positions_T = torch.arange(TOKENS)
    window_TT = attention_mask(positions_T, positions_T, WINDOW)
    for mask, is_causal in ((None, True), (window_TT, False)):
        given = (q_BHTD, k_BGTD, v_BGTD, sinks_H, mask, is_causal)
        plain = attention_with_sinks(*given)
        if not _is_same(attention.sink_kernel(*given), plain, attention.D + TOKENS):
            return (
                "runtime/kernels/sink_attention.py has other results than "
                "model_parts.attention_with_sinks"
            )
    return ""


@torch.inference_mode()
def _why_not_norm(norm) -> str:
    generator = torch.Generator().manual_seed(0)
    probe = _with_drawn_weight(norm, generator)
    plain = copy.copy(probe)
    plain.kernel = None
    x = torch.randn(2, 3, *norm.normalized_shape, generator=generator)
    ours = norm.kernel(probe, x)
    if ours is not None and not _is_same(ours, plain(x), x.shape[-1]):
        return "runtime/kernels/norms.py has other results than model_parts.RMSNorm"
    return ""


def _with_drawn_weight(norm, generator: torch.Generator):
    """Return a copy of a norm with random weights: a run that resumes has not read its own yet."""
    probe = copy.copy(norm)
    probe._parameters = {
        name: None
        if weight is None
        else torch.nn.Parameter(torch.randn(norm.normalized_shape, generator=generator))
        for name, weight in norm._parameters.items()
    }
    return probe


@torch.inference_mode()
def _why_not_turn(attention) -> str:
    """Compare the kernel of queries and keys with the plain operations, with and without angles."""
    generator, probe = torch.Generator().manual_seed(0), copy.copy(attention)
    probe.turn_kernel = None
    D = attention.D
    x_BHTD = torch.randn(2, TOKENS, 3, D, generator=generator).transpose(1, 2)
    rope = tuple(torch.randn(TOKENS, D, generator=generator) for _ in range(2))
    for norm in {attention.q_norm, attention.k_norm}:
        norm = norm and _with_drawn_weight(norm, generator)
        for tables in (rope, None):
            ours = attention.turn_kernel(x_BHTD, norm, tables)
            plain = copy.copy(norm)
            if hasattr(plain, "kernel"):
                plain.kernel = None
            if ours is not None and not _is_same(ours, probe.turned(x_BHTD, plain, tables), D):
                return "runtime/kernels/norms.py has other results than Attention.turned"
    return ""


@torch.inference_mode()
def _why_not_attention(attention) -> str:
    """Compare an attention's kernel with its plain operations, on a few tokens."""
    generator, probe = torch.Generator().manual_seed(0), copy.copy(attention)
    H, shape = attention.H, (attention.H, TOKENS, TOKENS)
    others = {
        name: torch.nn.Parameter(torch.randn(size, generator=generator))
        for name, size in (("sinks", shape[:1]), ("attention_bias", shape))
        if getattr(attention, name) is not None
    }
    probe._parameters = {**attention._parameters, **others}
    probe.sink_kernel, probe.training = None, False
    probe.window = min(attention.window, WINDOW)
    sizes = (H, attention.G, attention.G)
    qkv = [torch.randn(1, heads, TOKENS, attention.D, generator=generator) for heads in sizes]
    documents_BT = torch.tensor([[0] * WINDOW + [WINDOW] * (TOKENS - WINDOW)])
    for starts_BT in (None, documents_BT):
        ours = attention.kernel(probe, *qkv, None, starts_BT)
        plain = probe.attend(*qkv, None, starts_BT)
        if ours is not None and not _is_same(ours, plain, attention.D + TOKENS):
            return "runtime/kernels/cpu_attention.py has other results than Attention.attend"
    return ""


@torch.inference_mode(False)
def _why_not_bias(attention, device: torch.device) -> str:
    """Results and gradients by the kernels, in the dtype that they were chosen for."""
    dtype, generator = attention.kernel.keywords["dtype"], torch.Generator().manual_seed(0)
    B, T, L, H, G, D = GPU_ROWS, GPU_TOKENS, GPU_TABLE, attention.H, attention.G, attention.D
    drawn = [torch.randn(B, T, n, D, generator=generator).transpose(1, 2) for n in (H, G, G, H)]
    *given, dy_BHTD = (x.to(device, dtype) for x in drawn)
    given.append(torch.randn(H, L, L, generator=generator).to(device))
    positions_T = torch.arange(T, device=device)
    hidden_TT = ~attention_mask(positions_T, positions_T, 0)

    def by_kernel(q, k, v, table):
        probe = copy.copy(attention)
        probe._parameters = {**attention._parameters, "attention_bias": table}
        return attention.kernel(probe, q, k, v, None, None)

    def plain(q, k, v, table):
        mask = table[:, :T, :T].masked_fill(hidden_TT, -torch.inf)
        return attention_with_sinks(q, k, v, None, mask, False)

    results = []
    for function, kind in ((by_kernel, None), (plain, torch.float64)):
        leaves = [x.to(kind or x.dtype).detach().requires_grad_() for x in given]
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            y = function(*leaves)
            results.append((y, *torch.autograd.grad(y, leaves, dy_BHTD.to(y.dtype))))
    for ours, exact in zip(*results, strict=True):
        if not _is_same(ours.detach(), exact.detach(), 2 * (D + T), dtype):
            return "runtime/kernels/bias_attention.py has other results than model_parts.py"
    return ""


def _is_same(
    ours: Tensor, plain: Tensor, length: int = FEATURES, dtype: torch.dtype = torch.float32
) -> bool:
    """Whether two results differ by no more than rounding; False where one is not finite."""
    if ours.shape != plain.shape:
        return False
    difference = (ours.double() - plain.double()).abs().max().item()
    return difference <= rounding(dtype, length) * size_of(plain)
