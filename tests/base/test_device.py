"""What the machine can do, tested without a GPU: CUDA's answers are patched in."""

from __future__ import annotations

import os

import pytest
import torch

from model import LLM
from runtime.base import device as module
from runtime.base.device import (
    DTYPES,
    autocast,
    bfloat16_is_faster,
    choose_device,
    choose_dtype,
    device_name,
    explained_out_of_memory,
    has_room,
    is_out_of_memory,
    make_deterministic,
    memory_bytes,
    peak_flops,
    peak_memory_bytes,
    release_memory,
    synchronize,
)
from runtime.kernels.attention_choice import Card, gpu_attention
from runtime.kernels.choose import choose_kernels
from runtime.kernels.sink_attention import sink_attention
from tests.builders import tiny_config

CPU = torch.device("cpu")


@pytest.fixture
def cuda(monkeypatch):
    """A machine with two CUDA devices, as far as questions go."""
    answers = dict(name="NVIDIA H100 80GB HBM3", bf16=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: answers["bf16"] or including_emulation,
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: answers["name"])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10, 20))
    return answers


@pytest.fixture
def no_accelerator(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


# ------------------------------------------------------------------------------------------- device
def test_auto_takes_cuda_then_mps_then_the_cpu(no_accelerator, monkeypatch):
    assert choose_device("auto") == choose_device() == CPU
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto").type == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_device("auto").type == "cuda"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "foo",
        "xpu",
        "meta",
        "CPU",
        "gpu",
        "cuda:",
        "cuda:x",
        "cuda:-1",
        "cuda:1:2",
        "cuda:99999999999999",
        "cpu\n",
        "\ud800",
    ],
)
def test_unknown_devices_are_refused_in_a_line(name):
    """P5: `--device foo` and `xpu` ended in PyTorch's tracebacks."""
    with pytest.raises(
        ValueError, match="unknown device .*allowed are auto, cuda, cuda:N, mps and cpu"
    ):
        choose_device(name)


@pytest.mark.parametrize("name", ["cpu:0", "cpu:5", "mps:3"])
def test_only_cuda_devices_have_numbers(name):
    """Reject cpu:5, which does not exist.

    It was accepted, although the error line says otherwise.
    """
    with pytest.raises(ValueError, match="unknown device"):
        choose_device(name)


def test_devices_that_are_not_here_are_refused_in_a_line(no_accelerator):
    for name in ("cuda", "cuda:0", "cuda:7"):
        with pytest.raises(
            ValueError, match="is not here: this machine has 0 CUDA devices; try --device cpu"
        ):
            choose_device(name)
    with pytest.raises(ValueError, match="device 'mps' is not here; try --device cpu"):
        choose_device("mps")


def test_a_cuda_device_that_is_here_is_taken(cuda):
    assert choose_device("cuda").type == "cuda" and choose_device("cuda:1").index == 1
    with pytest.raises(ValueError, match="cuda:2.*has 2 CUDA devices"):
        choose_device("cuda:2")


# -------------------------------------------------------------------------------------------- dtype
def test_auto_dtype_is_the_best_that_is_in_hardware(cuda):
    assert choose_dtype("auto", CPU) is torch.float32
    assert choose_dtype("auto", torch.device("mps")) is torch.float32
    assert choose_dtype("auto", torch.device("cuda")) is torch.bfloat16
    cuda["bf16"] = False
    assert choose_dtype("auto", torch.device("cuda")) is torch.float16


def test_a_dtype_is_honoured_or_refused(cuda):
    for name, dtype in DTYPES.items():
        assert (
            choose_dtype(name, CPU) is dtype and choose_dtype(name, torch.device("cuda")) is dtype
        )
    for name in ("", "fp16", "float64", "int8"):
        with pytest.raises(
            ValueError, match="unknown dtype .*allowed are auto, bfloat16, float16, float32"
        ):
            choose_dtype(name, CPU)
    cuda.update(name="Tesla T4", bf16=False)
    with pytest.raises(
        ValueError, match="Tesla T4 has no bfloat16: use --dtype float16 or float32"
    ):
        choose_dtype("bfloat16", torch.device("cuda"))
    assert choose_dtype("float16", torch.device("cuda")) is torch.float16


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_autocast_changes_what_a_product_is_computed_in(dtype):
    """T12: float32 must mean no autocast at all.

    On a CPU the original implementation's float16 and bfloat16 runs were bit for bit its float32
    run.
    """
    a = torch.randn(8, 8)
    with autocast(CPU, dtype):
        assert torch.is_autocast_enabled("cpu") == (dtype != torch.float32)
        product = a @ a
    assert product.dtype is dtype and not torch.is_autocast_enabled("cpu")
    assert torch.equal(product, a @ a) == (dtype is torch.float32)
    assert (product.float() - a @ a).abs().max() < 0.2


# ------------------------------------------------------------------------------------------- memory
def test_memory_of_this_machine_is_plausible(cuda):
    if os.path.exists("/proc/meminfo"):
        free, total = memory_bytes(CPU)
        assert 1 << 20 < free <= total < 1 << 50
        assert peak_memory_bytes(CPU) < total
    assert memory_bytes(torch.device("cuda")) == (10, 20)


def test_memory_that_cannot_be_asked_is_none(monkeypatch):
    monkeypatch.setattr(
        "builtins.open", lambda *_: (_ for _ in ()).throw(FileNotFoundError())
    )  # macOS
    assert memory_bytes(CPU) is None
    monkeypatch.undo()
    monkeypatch.delattr(os, "sysconf")  # Windows
    assert memory_bytes(CPU) is None


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="asks Linux for the truth")
def test_peak_memory_is_at_least_what_is_held_now_and_is_in_bytes():
    held = torch.ones(64 << 20, dtype=torch.uint8)
    with open("/proc/self/statm") as file:
        held_now = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    assert held.nbytes < held_now and 0.9 * held_now <= peak_memory_bytes(CPU) < 100 * held_now


def test_out_of_memory_is_recognised_in_every_spelling():
    """Recognise every out-of-memory error.

    MPS ("MPS backend out of memory"), the CUDA driver ("CUDA error: out of memory") and cuBLAS
    raise a plain RuntimeError, which was taken for a bug and shown as a traceback.
    """
    with pytest.raises(RuntimeError) as real:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(real.value)
    for error in (
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ):
        assert is_out_of_memory(error)
    for error in (
        RuntimeError("expected scalar type Float but found Half"),
        ValueError("out of memory"),
        OSError("can't allocate memory"),
        KeyboardInterrupt(),
    ):
        assert not is_out_of_memory(error)


def test_out_of_memory_is_explained_and_nothing_else_is():
    with (
        pytest.raises(
            ValueError, match=r"^out of memory on cpu \(. threads?\).*: lower --batch_size$"
        ) as explained,
        explained_out_of_memory(CPU, "lower --batch_size"),
    ):
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(explained.value.__cause__) and "\n" not in str(explained.value)
    with (
        pytest.raises(RuntimeError, match="a bug"),
        explained_out_of_memory(CPU, "lower --batch_size"),
    ):
        raise RuntimeError("a bug")
    with (
        pytest.raises(ValueError, match="^out of memory on .* H100.* .20 B.: x$"),
        pytest.MonkeyPatch.context() as patch,
        explained_out_of_memory(torch.device("cuda"), "x"),
    ):
        patch.setattr(module, "device_name", lambda device: "an H100")
        patch.setattr(module, "memory_bytes", lambda device: (10, 20))
        raise torch.OutOfMemoryError("CUDA out of memory.")


# -------------------------------------------------------------------------------------------- speed
def test_names_and_peaks(cuda, monkeypatch):
    assert device_name(torch.device("cuda")) == "NVIDIA H100 80GB HBM3"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert device_name(CPU) == "cpu (1 thread)"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert device_name(CPU) == "cpu (2 threads)"
    for name, peak in [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("Tesla T4", 65e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce GTX 1080", None),
    ]:
        cuda["name"] = name
        assert peak_flops(torch.device("cuda"), torch.bfloat16) == peak, name
    assert (
        peak_flops(torch.device("cuda"), torch.float32) is None
        and peak_flops(CPU, torch.bfloat16) is None
    )


def test_synchronize_waits_for_gpus_only(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waited.append(device.type))
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waited.append("mps"))
    for name in ("cpu", "cuda", "mps"):
        synchronize(torch.device(name))
    assert waited == ["cuda", "mps"]


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA L40", None),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("Quadro T400 4GB", None),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 PCIe", 756e12),
    ],
)
def test_peak_speed_is_of_that_card_and_no_other(monkeypatch, name, peak):
    """Match whole names of GPUs.

    An L40 was taken for an L4, a T400 for a T4, a laptop's 4090 for a desktop's: their MFU was
    wrong.
    """
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), torch.bfloat16) == peak


@pytest.mark.parametrize(
    "capability, dtype, grouped",
    [
        ((9, 0), torch.bfloat16, True),
        ((9, 0), torch.float32, False),
        ((10, 0), torch.bfloat16, False),
        ((8, 0), torch.bfloat16, False),
        ((7, 5), torch.float16, False),
    ],
)
def test_kernels_are_chosen_for_the_card(monkeypatch, capability, dtype, grouped):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    model, card = LLM(tiny_config()), Card(capability, 91900)
    choose_kernels(model, torch.device("cuda"), dtype)
    assert all(
        b.moe.experts.grouped is grouped and b.moe.experts.feed_forward is None
        for b in model.layers
    )
    for attention in (block.attention for block in model.layers):
        assert attention.device_attention.func is gpu_attention
        assert attention.sink_kernel.func is sink_attention
        assert attention.device_attention.keywords == {"card": card}
        assert attention.sink_kernel.keywords == {"card": card}
        assert attention.kernel is None
    choose_kernels(model, torch.device("cpu"), torch.float32)
    assert all(
        not b.moe.experts.grouped and b.moe.experts.feed_forward is not None for b in model.layers
    )
    assert all(
        b.attention.device_attention is None and b.attention.sink_kernel is sink_attention
        for b in model.layers
    )


@pytest.mark.parametrize(
    "device, head_dim, dtype", [("cuda", 10, torch.bfloat16), ("mps", 8, torch.float16)]
)
def test_sinks_that_no_kernel_takes_are_plain(monkeypatch, device, head_dim, dtype):
    """Heads of 10 numbers ended a run on a GPU with the kernel's own error."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    model = LLM(tiny_config(head_dim=head_dim, attention_sinks=True))
    choose_kernels(model, torch.device(device), dtype)
    assert all(block.attention.sink_kernel is None for block in model.layers)


@pytest.mark.parametrize(
    "amx, seconds, expected",
    [
        (False, {}, False),
        (True, {torch.float32: 3.0, torch.bfloat16: 1.0}, True),
        (True, {torch.float32: 3.0, torch.bfloat16: 2.9}, False),
    ],
)
def test_bfloat16_on_a_cpu_only_where_it_is_faster(monkeypatch, amx, seconds, expected):
    """Measure bfloat16 on a CPU with a matrix unit; without one its products take twice as long.

    The clock is replaced here.
    """
    now, clock = [0.0], []
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(
        torch.Tensor, "__matmul__", lambda a, b: now.__setitem__(0, now[0] + seconds[a.dtype])
    )
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock.append(now[0]) or now[0])
    assert bfloat16_is_faster() == expected and bool(clock) == amx
    assert choose_dtype("auto", CPU) == (torch.bfloat16 if expected else torch.float32)


def test_room_on_a_gpu_is_what_was_never_held(monkeypatch, cuda):
    """A micro-batch that just fits leaves nothing for the optimizer's next surprise."""
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: type("properties", (), {"total_memory": 100})(),
    )
    for held, room in ((95, True), (96, False)):
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device, held=held: held)
        assert has_room(torch.device("cuda")) == room
    freed = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append("cache"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: freed.append("peak"))
    release_memory(torch.device("cuda"))
    assert freed == ["cache", "peak"]
    release_memory(CPU)


def test_deterministic_mode_does_not_fill_what_is_about_to_be_written(monkeypatch):
    """PyTorch would fill every fresh tensor with NaN, a pass over memory for each."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.utils.deterministic.fill_uninitialized_memory
    try:
        make_deterministic()
        assert (
            torch.are_deterministic_algorithms_enabled()
            and not torch.utils.deterministic.fill_uninitialized_memory
        )
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
