"""What the machine can do: device, compute dtype, memory, peak speed.

Nothing outside runtime/ asks torch.cuda.
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
import sys
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from runtime.base.text import human_bytes

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# Dense bf16/fp16 peak in FLOP/s, without sparsity, from the vendors' data sheets. The first key
# that is a word of the device's name counts.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "T4": 65e12,
    "V100": 125e12,
}


def choose_device(name: str = "auto") -> torch.device:
    """Return a device; auto is CUDA, then MPS, then CPU. Raise ValueError if it is missing."""
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available():
            name = "mps"
        else:
            name = "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if (
        device is None
        or device.type not in ("cuda", "mps", "cpu")
        or (device.type != "cuda" and device.index is not None)
    ):
        raise ValueError(f"unknown device {name!r}: allowed are auto, cuda, cuda:N, mps and cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {name!r} is not here: this machine has {torch.cuda.device_count()} "
            "CUDA devices; try --device cpu"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device 'mps' is not here; try --device cpu")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the compute dtype called `name` on `device`.

    auto: bfloat16 if the GPU has it in hardware, else float16 on CUDA, else float32. On a CPU it is
    bfloat16 if the matrix unit (Intel's AMX) makes that faster; training asks about its own model
    instead (runtime/training/clocks.py).

    Raise ValueError for a dtype that the device lacks: the requested dtype is never replaced.
    """
    if name == "auto":
        if device.type == "cuda":
            return (
                torch.bfloat16
                if torch.cuda.is_bf16_supported(including_emulation=False)
                else torch.float16
            )
        return torch.bfloat16 if device.type == "cpu" and bfloat16_is_faster() else torch.float32
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}: allowed are auto, {', '.join(DTYPES)}")
    if (
        device.type == "cuda"
        and name == "bfloat16"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise ValueError(
            f"{torch.cuda.get_device_name(device)} has no bfloat16: use --dtype float16 or float32"
        )
    return DTYPES[name]


def has_bfloat16_products() -> bool:
    """Return whether this CPU has instructions that multiply bfloat16: AMX or AVX-512's."""
    asked = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in asked)


def bfloat16_is_faster() -> bool:
    """Return whether this CPU multiplies bfloat16 matrices much faster than float32 ones.

    Only CPUs with AMX are timed. Others gain on some shapes and lose on others, which this clock,
    on one large product, cannot tell.
    """
    if not getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)():
        return False
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(512, 512, dtype=dtype)
        tries = []
        for _ in range(6):
            started = time.perf_counter()
            a @ a
            tries.append(time.perf_counter() - started)
        seconds[dtype] = min(tries[1:])
    return seconds[torch.bfloat16] < 0.67 * seconds[torch.float32]


def autocast(device: torch.device, dtype: torch.dtype):
    """Return a context in which matrix products run in `dtype`; it does nothing for float32."""
    if dtype in (torch.bfloat16, torch.float16):
        return torch.autocast(device.type, dtype)
    return contextlib.nullcontext()


def make_deterministic() -> None:
    """Allow only kernels that give the same bits in every run; an operation without one raises.

    Call this before any work on a GPU.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Not needed: every element is written here before it is read.
    # PyTorch's stubs lack this attribute.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


def device_name(device: torch.device) -> str:
    """Return a name to print and record: the GPU's, or the device type with its thread count."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type} ({threads} thread{'s' if threads > 1 else ''})"


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let PyTorch compute on one thread: work so small is done before other threads are awake.

    A thread whose first question for their number comes meanwhile keeps to one for good. So threads
    of ours that compute ask (torch.get_num_threads()) before anything else.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the vendor's dense half-precision peak in FLOP/s; None: unknown, no MFU is shown."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(device)
    # A laptop GPU has the same number in its name, but another chip.
    if "Laptop" in name:
        return None
    return next((peak for key, peak in PEAK_FLOPS.items() if re.search(rf"\b{key}\b", name)), None)


def memory_bytes(device: torch.device) -> tuple[int, int] | None:
    """Return the device's (free, total) memory in bytes; None if it cannot be read.

    Free memory of a CPU is what a new process may take.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        with open("/proc/meminfo") as file:
            free = next(
                int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable")
            )
        return free, total
    except (OSError, ValueError, AttributeError, StopIteration):
        return None


def peak_memory_bytes(device: torch.device) -> int | None:
    """Return the most bytes that this process has held on the device; None if unknown.

    On a GPU its tensors count, on a CPU all that the process holds.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, StopIteration), open("/proc/self/status") as file:
        # Not getrusage: its value for a child starts at what the parent held.
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    try:
        import resource
    except ImportError:
        # Windows.
        return None
    # ru_maxrss is in bytes on macOS, in KiB elsewhere.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def peak_memory_line(device: torch.device, announced: int) -> str:
    """Return a line with the measured peak and the estimate from before the run."""
    measured = peak_memory_bytes(device)
    peak = human_bytes(measured) if measured else "unknown"
    what = "tensors on the GPU" if device.type == "cuda" else "the whole process"
    return f"memory   peak {peak} measured, {human_bytes(announced)} announced ({what})"


def has_room(device: torch.device, share: float = 0.04) -> bool:
    """Return whether a CUDA device has `share` of its memory left above this process's peak."""
    return (
        torch.cuda.max_memory_reserved(device)
        < (1 - share) * torch.cuda.get_device_properties(device).total_memory
    )


def release_memory(device: torch.device) -> None:
    """Free unused device memory and reset the peak counter."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception reports that a device is out of memory, in any wording."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # The CPU's allocator, MPS, the CUDA driver and cuBLAS raise a plain RuntimeError.
    return isinstance(error, RuntimeError) and any(
        words in str(error)
        for words in ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    )


@contextlib.contextmanager
def explained_out_of_memory(device: torch.device, advice: str):
    """Turn out-of-memory into a one-line ValueError: device, memory, `advice` on what to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        memory = memory_bytes(device)
        raise ValueError(
            f"out of memory on {device_name(device)}"
            f"{f' ({human_bytes(memory[1])})' if memory else ''}: {advice}"
        ) from error


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all its work, so that the next clock reading is right."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def to_device(batch: tuple[Tensor, ...], device: torch.device) -> tuple[Tensor, ...]:
    """Return a batch's tensors on `device`; pinned ones are copied to CUDA without blocking.

    Only CUDA: MPS might read memory that has been freed by then (PyTorch issue 139550).
    """
    return tuple(t.to(device, non_blocking=device.type == "cuda") for t in batch)
