"""Count the peak memory of a training step on fake tensors: without its memory, without a GPU.

    python -m benchmarks.fake_memory --preset gptoss-modern --batch_size 16 --grad_accum 4

A fake tensor has shape, dtype and lifetime, and no numbers. Every storage that an operation makes
is counted, rounded up as CUDA's allocator does, until Python and autograd let go of it. What a
kernel allocates for itself is not seen, nor is the CUDA context (about 0.6 GiB); torch.compile
keeps less than this counts. `training_memory_bytes` is held to these counts.
"""

from __future__ import annotations

import contextlib
import weakref
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as model_module
import model_parts
import runtime.training.optimizer
import train
from config_model import ModelConfig, TrainConfig
from model import LLM
from runtime.base import cli
from runtime.base.device import DTYPES, autocast
from runtime.base.text import human_bytes
from runtime.checkpoint.optimizer_state import initialise_state
from runtime.kernels.choose import choose_kernels
from runtime.training.memory import training_memory_bytes
from runtime.training.optimizer import build_optimizer

ALIGNMENT = 512  # bytes: CUDA's allocator hands out multiples of it


class StorageCounter(TorchDispatchMode):
    """While it is entered: `held`, bytes of the storages made since then that are alive; `peak`,
    the most of it so far."""

    def __init__(self):
        super().__init__()
        self.held = self.peak = 0
        self.alive: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, -(-storage.nbytes() // ALIGNMENT) * ALIGNMENT
        if key in self.alive:
            return
        self.alive.add(key)
        # The storage's Python object lives as long as the storage itself.
        weakref.finalize(storage, self._remove, key, size)
        self.held += size
        self.peak = max(self.peak, self.held)

    def _remove(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.held -= size


# --------------------------------------------------------------------- what a GPU does instead
def _attention(
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    **_,
) -> Tensor:
    """F.scaled_dot_product_attention by CUDA's operations: flash without a mask (cuDNN's holds as
    much), else the memory-efficient one."""
    aten, (B, H, T, _) = torch.ops.aten, q_BHTD.shape
    if attn_mask is None:
        flash = aten._scaled_dot_product_flash_attention
        return flash(q_BHTD, k_BGSD, v_BGSD, dropout_p, is_causal)[0]
    if attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros((), dtype=q_BHTD.dtype).where(attn_mask, -torch.inf)
    k_BHSD, v_BHSD = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k_BGSD, v_BGSD))
    mask_BHTS = attn_mask.expand(B, H, T, k_BHSD.shape[2])
    efficient = aten._scaled_dot_product_efficient_attention
    return efficient(q_BHTD, k_BHSD, v_BHSD, mask_BHTS, True, dropout_p, is_causal)[0]


def _attention_with_sinks(q_BHTD, k_BGSD, v_BGSD, sinks_H, mask, is_causal) -> Tensor:
    """Sinks scale the result: what is saved for the backward pass is of the same size."""
    return _attention(q_BHTD, k_BGSD, v_BGSD, mask, is_causal)


class _RMSNorm(torch.autograd.Function):
    """What CUDA's fused kernel keeps: its input and a number per row, not its result. (On fake CPU
    tensors the same operation falls into its parts, which keep one tensor more.)"""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def _rms_norm(x: Tensor, normalized_shape, weight: Tensor, eps: float | None = None) -> Tensor:
    return _RMSNorm.apply(x, weight)


def row_bias(bias_EF: Tensor, experts_R: Tensor) -> Tensor:
    """model_parts._row_bias, whose one_hot reads values on a CPU."""
    one_hot_RE = torch.zeros(len(experts_R), len(bias_EF), dtype=torch.int64)
    return one_hot_RE.to(bias_EF.dtype) @ bias_EF


@contextlib.contextmanager
def _as_on_a_gpu(dtype: torch.dtype):
    """Everything that asks whether it is on a GPU answers yes."""
    rows = model_module.loss_chunk_rows
    half = dtype in (torch.bfloat16, torch.float16)
    with contextlib.ExitStack() as patches:
        for owner, name, value in (
            (F, "scaled_dot_product_attention", _attention),
            (F, "rms_norm", _rms_norm),
            (model_parts, "row_bias", row_bias),
            (model_module, "loss_chunk_rows", lambda config, _: rows(config, True)),
            (runtime.training.optimizer, "_elements_at_once", lambda _: 1 << 24),
            (
                runtime.training.optimizer,
                "_orthogonalise_dtype",
                lambda _: dtype if half else torch.float32,
            ),
        ):
            patches.enter_context(mock.patch.object(owner, name, value))
        yield


# ----------------------------------------------------------------------------------- the count
def _batch(model_config: ModelConfig, train_config: TrainConfig) -> tuple[Tensor, ...]:
    shape = (train_config.batch_size, model_config.context_length)
    return tuple(torch.zeros(shape, dtype=torch.int64) for _ in range(2))


def _step(model: LLM, optimizer, train_config: TrainConfig, dtype: torch.dtype) -> None:
    """train.fit's step; of more than two micro-batches the later ones repeat the second."""
    model.train()
    parameters = list(model.parameters())
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    losses = torch.zeros(())
    for _ in range(min(train_config.grad_accum, 2)):
        inputs_BT, targets_BT = _batch(model.config, train_config)
        with autocast(torch.device("cpu"), dtype):
            if train_config.document_mask:
                out = train.packed_documents_loss(model, (inputs_BT, targets_BT), 0)
            else:
                out = train.next_token_loss(model, (inputs_BT, targets_BT))
            loss = out.cross_entropy_sum / train_config.grad_accum + out.aux_loss + out.z_loss
        loss.backward()
        losses = losses + out.cross_entropy_sum.detach()
        del out, loss
    train._update(optimizer, scaler, parameters, losses, train_config.grad_clip)
    optimizer.zero_grad(set_to_none=True)


def counted_peak_bytes(
    model_config: ModelConfig,
    train_config: TrainConfig,
    compute_dtype: torch.dtype,
    on_gpu: bool = True,
) -> int:
    """Most bytes that one training step holds at once, weights and optimizer state included.

    compute_dtype: of the forward and backward pass (torch.bfloat16, ...). on_gpu: the kernels of a
    Hopper GPU, else a CPU's. Eager, not compiled.
    """
    patches = _as_on_a_gpu(compute_dtype) if on_gpu else contextlib.nullcontext()
    no_numbers = mock.patch.multiple(
        LLM, initialise=lambda self: None, _check_input=lambda *_: None
    )
    with patches, no_numbers, FakeTensorMode():
        return _count(model_config, train_config, compute_dtype, on_gpu)


def _count(
    model_config: ModelConfig, train_config: TrainConfig, dtype: torch.dtype, on_gpu: bool
) -> int:
    with StorageCounter() as counter:
        model = LLM(model_config)
        model.activation_checkpointing = train_config.activation_checkpointing
        choose_kernels(model, torch.device("cpu"), dtype)
        if on_gpu:
            for block in model.layers:
                block.moe.experts.feed_forward = None
                block.moe.dispatcher.kernel = None
                block.moe.experts.grouped = dtype == torch.bfloat16
                block.attention.kernel = None
                block.attention.sink_kernel = _attention_with_sinks
        optimizer = build_optimizer(model, train_config)
        initialise_state(optimizer)
        _step(model, optimizer, train_config, dtype)
    return counter.peak


def main(argv: list[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    cli.add_config_flags(parser, ModelConfig, TrainConfig)
    settings = cli.settings_from(parser.parse_args(argv), ModelConfig, TrainConfig)
    model_config, train_config = settings.build(ModelConfig), settings.build(TrainConfig)
    dtype, on_gpu = DTYPES.get(train_config.dtype, torch.bfloat16), train_config.device != "cpu"
    counted = counted_peak_bytes(model_config, train_config, dtype, on_gpu)
    estimate = sum(
        training_memory_bytes(model_config, train_config, dtype.itemsize, on_gpu).values()
    )
    where = f"{str(dtype).removeprefix('torch.')} on a {'GPU' if on_gpu else 'CPU'}"
    off, sizes = estimate / counted - 1, f"{train_config.batch_size} x {train_config.grad_accum}"
    print(
        f"counted {human_bytes(counted)}, estimated {human_bytes(estimate)} ({off:+.1%}), "
        f"{where}, micro-batches of {sizes}"
    )
    return 0


if __name__ == "__main__":
    cli.run_main(main)
