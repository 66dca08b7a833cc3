"""That the count on fake tensors is the count of real ones."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import fake_memory
from benchmarks.fake_memory import StorageCounter, counted_peak_bytes
from config_model import ModelConfig, TrainConfig
from tests.util import tiny_config


def test_what_is_alive_at_once_is_counted():
    """Two of three tensors live together; a view and an update in place are no new memory."""
    with FakeTensorMode(), StorageCounter() as counter:
        a = torch.empty(1000)
        b = a.view(10, 100).add_(1)[3:]
        assert counter.held == 4096
        c = torch.empty(100, dtype=torch.bfloat16)
        assert counter.held == 4096 + 512
        del c
        d = b + 1
        assert (counter.held, counter.peak) == (4096 + 3072, 4096 + 3072)
        del a, d
        assert counter.held == 4096, "b still holds it"
    assert counter.peak == 4096 + 3072


@pytest.mark.parametrize(
    "changes, train",
    [
        (dict(), dict(grad_accum=2)),
        (
            dict(
                use_attention_bias=True, expert_activation="gelu", expert_bias=True, head_bias=True
            ),
            {},
        ),
        (dict(attention_sinks=True, sliding_window=8), dict(activation_checkpointing=True)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_tensors_are_as_many_as_real_ones(changes, train, dtype):
    """The same step of a small model on a CPU, counted twice: on fake tensors, and on tensors that are there."""
    config, train_config = (
        tiny_config(**changes),
        TrainConfig(**dict(batch_size=3, grad_accum=1) | train),
    )
    real = fake_memory._count(config, train_config, dtype, on_gpu=False)
    assert counted_peak_bytes(config, train_config, dtype, on_gpu=False) == pytest.approx(
        real, rel=0.01
    )


def test_a_gpu_holds_no_scores_and_a_cpu_does():
    """With a learned table a CPU keeps all scores; on a GPU the memory-efficient kernel keeps none of them."""
    config = ModelConfig(
        d_model=32,
        transformer_blocks=2,
        context_length=256,
        vocabulary_size=64,
        num_heads=4,
        num_kv_heads=4,
        num_experts=2,
        d_ff=16,
        use_attention_bias=True,
    )
    scores = 2 * 8 * 4 * 256 * 256 * 4
    train_config = TrainConfig(batch_size=8, grad_accum=1)
    on_cpu, on_gpu = (
        counted_peak_bytes(config, train_config, torch.float32, where) for where in (False, True)
    )
    assert on_cpu - on_gpu > 0.5 * scores
