"""Experts with adapters as one operation for CPUs: the plain path's numbers and gradients."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from runtime.checks.kernels import settle_kernels
from runtime.kernels import cpu_experts
from runtime.kernels.choose import choose_kernels
from runtime.posttraining.lora import attach
from tests.builders import random_model, tiny_config
from tests.builders_lora import NOWHERE, move_adapters

CPU = torch.device("cpu")


def experts_of(activation: str, biased: bool, dtype=torch.float64, dropout: float = 0.0):
    """Return experts with adapters twice: on the plain path, and with the CPU's operation."""
    config = tiny_config(
        expert_activation=activation, expert_bias=biased, num_experts=5, dropout=dropout
    )
    model = random_model(config, 1, dtype)
    attach(model, dataclasses.replace(NOWHERE, expert_rank=3))
    move_adapters(model, size=0.2)
    other = copy.deepcopy(model)
    choose_kernels(other, CPU, dtype)
    assert settle_kernels(other) == []
    pair = [one.layers[0].moe.experts for one in (model, other)]
    assert pair[0].feed_forward is None and pair[1].feed_forward is not None
    return pair


def results(experts, counts: list[int], dtype=torch.float64):
    """Return the output and all gradients for rows that are sorted by expert."""
    counts_E = torch.tensor(counts)
    experts_R = torch.repeat_interleave(torch.arange(len(counts)), counts_E)
    generator = torch.Generator().manual_seed(0)
    shape = (2, len(experts_R), experts.w_in.shape[2])
    x, weights = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).unbind()
    x = x.clone().requires_grad_()
    y = experts(x, experts_R, counts_E)
    (y * weights).sum().backward()
    trained = {name: p.grad for name, p in experts.named_parameters() if p.requires_grad}
    frozen = [name for name, p in experts.named_parameters() if not p.requires_grad]
    assert all(experts.get_parameter(name).grad is None for name in frozen)
    return {"output": y.detach(), "rows": x.grad, **trained}


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "swiglu", "swiglu_clamped"])
@pytest.mark.parametrize("counts", [[3, 0, 7, 1, 0], [0, 0, 0, 0, 4]], ids=["several", "one"])
def test_it_is_the_plain_path(activation, biased, counts):
    """In float64; an expert without rows gets gradients of zero, not memory that nobody wrote."""
    plain, ours = experts_of(activation, biased)
    expected, found = results(plain, counts), results(ours, counts)
    assert expected.keys() == found.keys() and len(found) == 6
    for name, tensor in expected.items():
        size = tensor.abs().max().item()
        assert size > 0 and (found[name] - tensor).abs().max() <= 1e-12 * size, name


def test_in_threads_and_in_half_precision(monkeypatch):
    """Rows are padded for oneDNN there, and each thread takes whole experts."""
    counts = [300, 40, 70, 9, 130]
    plain, ours = experts_of("swiglu", True, torch.float32)
    expected = results(plain, counts, torch.float32)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        monkeypatch.setattr(cpu_experts, "MOST_IMBALANCE", 9.0)
        threaded = results(ours, counts, torch.float32)
        for parameter in ours.parameters():
            parameter.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            half = results(ours, counts, torch.float32)
    finally:
        torch.set_num_threads(threads)
    for name, tensor in expected.items():
        size = tensor.norm()
        assert (threaded[name] - tensor).norm() <= 1e-5 * size, name
        # Some five products follow each other, each rounded to 8 bits.
        allowed = 5 * torch.finfo(torch.bfloat16).eps
        assert (half[name].float() - tensor).norm() <= allowed * size, name


def test_dropout_takes_the_plain_path():
    """The operation has none: it would be left out in silence."""
    plain, ours = experts_of("swiglu", False, dropout=0.5)
    plain.train(), ours.train()
    found = []
    for experts in (plain, ours):
        torch.manual_seed(0)
        found.append(results(experts, [3, 0, 7, 1, 0])["output"])
    assert torch.equal(*found)


def test_it_saves_no_more_than_without_adapters():
    """Sorted rows and the hidden layer before its activation; on the plain path three more."""

    def saved(experts) -> int:
        elements: dict[int, int] = {}

        def keep(tensor):
            elements[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 8
            return tensor

        x = torch.randn(600, experts.w_in.shape[2], dtype=torch.float64, requires_grad=True)
        counts_E = torch.tensor([120] * 5)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            experts(x, torch.repeat_interleave(torch.arange(5), counts_E), counts_E)
        parameters = {p.untyped_storage().data_ptr() for p in experts.parameters()}
        return sum(size for pointer, size in elements.items() if pointer not in parameters)

    plain, ours = experts_of("swiglu", False)
    rows_and_hidden = 600 * (ours.w_in.shape[2] + ours.w_in.shape[1])
    assert saved(ours) <= rows_and_hidden + 5 < saved(plain)


def test_a_changed_activation_is_noticed(monkeypatch):
    """It is asked before it is used, as the operation without adapters is."""
    model = random_model(tiny_config())
    attach(model, NOWHERE)
    choose_kernels(model, CPU, torch.float32)
    monkeypatch.setattr(cpu_experts, "_activation", lambda h, activation: h.chunk(2, dim=-1)[0])
    (line,) = settle_kernels(model)
    assert "another activation" in line
    assert all(block.moe.experts.feed_forward is None for block in model.layers)


def test_a_compiler_sees_one_operation():
    """Its shapes and its gradients: a graph of all of a block is one in training too."""
    plain, ours = experts_of("swiglu", True)
    expected = results(ours, [3, 0, 7, 1, 0])
    for parameter in ours.parameters():
        parameter.grad = None
    ours.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    for name, tensor in results(ours, [3, 0, 7, 1, 0]).items():
        assert torch.equal(tensor, expected[name]), name
