"""The state of a run, and sums that a step adds to without waiting for the device."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

# What Totals counts on the host.
HOST_SUMS = ("tokens", "seconds", "waiting_seconds")


class TrainingDiverged(ValueError):
    """The loss or its gradient is not finite and does not recover."""

    exit_code = 3


@dataclass
class RunState:
    """Everything besides weights and optimizer state that a run needs to go on. Plain numbers: it is saved as JSON."""

    step: int = 0  # optimizer steps done, skipped ones included
    samples_seen: int = 0  # sequences taken from the loader
    tokens_seen: int = 0
    skipped_steps: int = (
        0  # steps without an update, because a gradient was not finite or the loss a spike
    )
    skipped_in_a_row: int = 0
    rollbacks: int = 0  # times that it went back to a checkpoint
    best_val_loss: float | None = None
    train_seconds: float = 0.0  # spent in steps; validation, saving and plotting excluded
    run_id: str = ""
    scaler: dict = field(default_factory=dict)  # float16's loss scaler
    window: dict = field(default_factory=dict)  # sums since the last log line (Totals)
    recent_loss: list = field(default_factory=lambda: [0.0, 0.0, 0.0])  # RecentLoss


class RecentLoss:
    """Running mean and variance of the steps' losses, kept on the device, to tell a spike from noise without waiting."""

    KEEP = 0.95  # of the statistics at each step: about 20 steps count, so that a fall at the start is soon forgotten
    FEWEST_STEPS = 50  # before which nothing is a spike
    LEAST_DEVIATION = 0.01  # of the mean: late in training the loss hardly moves, and a hair's breadth is no spike

    def __init__(self, state: RunState, sigmas: float, device: torch.device):
        self.sigmas = sigmas
        self.numbers = torch.tensor(
            state.recent_loss,
            dtype=torch.float32 if device.type == "mps" else torch.float64,
            device=device,
        )  # steps, mean, variance

    def is_spike(self, loss: Tensor) -> Tensor | None:
        """Whether a step's mean cross-entropy is one, 0-dim bool on the device; None where nobody asks."""
        if not self.sigmas:
            return None
        steps, mean, variance = self.numbers
        deviation = torch.maximum(variance.sqrt(), self.LEAST_DEVIATION * mean)
        return (steps >= self.FEWEST_STEPS) & (loss > mean + self.sigmas * deviation)

    def add(self, loss: Tensor, bad: Tensor) -> None:
        """Count a step, unless it is `bad`."""
        steps, mean, variance = self.numbers
        share = torch.maximum(
            1 / (steps + 1), torch.full_like(steps, 1 - self.KEEP)
        )  # a plain mean at first
        off = loss.to(mean) - mean
        self.numbers = torch.where(
            bad,
            self.numbers,
            torch.stack(
                (steps + 1, mean + share * off, (1 - share) * (variance + share * off * off))
            ),
        )


class Totals:
    """Sums by name over the steps since the last log line, kept on the device.

    A step adds to them; only `wait` waits for the device. The names are the caller's: "targets" and
    "steps" divide the others (train_record).
    """

    def __init__(self, state: RunState, device: torch.device):
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self.device = device
        saved = sums_of(state.window)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.flat: Tensor | None = None  # all sums, one after the other
        if saved:
            tensors = {
                name: torch.tensor(value, dtype=torch.float64) for name, value in saved.items()
            }
            self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            self.flat = self._flatten(tensors)
        self.skipped = torch.tensor(
            [state.skipped_steps, state.skipped_in_a_row], dtype=self.dtype, device=device
        )
        self.host = {name: state.window.get(name, 0) for name in HOST_SUMS}
        self.grad_norm = torch.zeros((), dtype=self.dtype, device=device)
        self.numbers: list[float] = []

    def _flatten(self, sums: dict[str, Tensor]) -> Tensor:
        return torch.cat([tensor.flatten() for tensor in sums.values()]).to(self.device, self.dtype)

    def add(self, sums: dict[str, Tensor], grad_norm: Tensor, bad: Tensor) -> None:
        """Add a step. One that is `bad` (0-dim bool), and so was skipped, adds nothing to the sums."""
        values = self._flatten(sums)
        if self.flat is None:
            self.shapes = {name: tuple(tensor.shape) for name, tensor in sums.items()}
            self.flat = torch.zeros_like(values)
        self.flat += torch.where(bad, 0.0, values)
        self.skipped[0] += bad
        self.skipped[1] = (self.skipped[1] + 1) * bad
        self.grad_norm = grad_norm.to(self.skipped)

    def add_on_host(self, **numbers: float) -> None:
        """Add what the host counts: tokens and seconds. Skipped steps count too."""
        for name, value in numbers.items():
            self.host[name] += value

    def wait(self) -> None:
        """Wait for the device and fetch its numbers, for `store`."""
        self.numbers = torch.cat((self.flat, self.skipped, self.grad_norm[None])).tolist()

    def store(self, state: RunState) -> float:
        """Put what `wait` fetched into `state` and return the last step's gradient norm."""
        *numbers, skipped, in_a_row, grad_norm = self.numbers
        sums = {}
        for name, shape in self.shapes.items():
            count = math.prod(shape)
            sums[name], numbers = _nested(numbers[:count], shape), numbers[count:]
        state.window = self.host | {"sums": sums}
        state.skipped_steps, state.skipped_in_a_row = int(skipped), int(in_a_row)
        return grad_norm

    def clear(self) -> None:
        """Start the next interval."""
        if self.flat is not None:
            self.flat.zero_()
        self.host = dict.fromkeys(self.host, 0)


def _nested(numbers: list[float], shape: tuple[int, ...]):
    """Return `numbers` as nested lists of a shape; as a number for shape ()."""
    if not shape:
        return numbers[0]
    size = len(numbers) // shape[0]
    return [_nested(numbers[i * size : (i + 1) * size], shape[1:]) for i in range(shape[0])]


def sums_of(window: dict) -> dict:
    """Return the sums in a saved `RunState.window` by name.

    Earlier versions saved them by position: five losses, and a row of loads, entropy and dropped
    share per block.
    """
    if "losses" not in window:
        return window.get("sums", {})
    router = window["router"]
    return dict(
        zip(
            ("cross_entropy", "targets", "steps", "aux_loss", "z_loss"),
            window["losses"],
            strict=True,
        )
    ) | {
        "expert_load": [row[:-2] for row in router],
        "router_entropy": [row[-2] for row in router],
        "dropped_share": [row[-1] for row in router],
    }


def perplexity(loss: float) -> float:
    """Return exp(loss), inf where that is beyond a double."""
    return math.exp(loss) if loss < 700 else math.inf


def train_record(state: RunState, lr: float, grad_norm: float) -> dict:
    """Return a log record: means over the interval, nan where all of its steps were skipped.

    The loss is the mean over valid targets, all other sums are means over steps.
    """
    window = state.window
    sums = dict(window["sums"])
    cross_entropy, targets, steps = (
        sums.pop(name) for name in ("cross_entropy", "targets", "steps")
    )
    loss = cross_entropy / targets if steps else math.nan
    means = {name: _divided(value, steps) for name, value in sums.items()}
    seconds = max(window["seconds"], 1e-9)
    return {
        "kind": "train",
        "step": state.step,
        "tokens_seen": state.tokens_seen,
        "loss": loss,
        "perplexity": perplexity(loss),
        "aux_loss": means.pop("aux_loss"),
        "z_loss": means.pop("z_loss"),
        "lr": lr,
        "grad_norm": grad_norm,
        "tokens_per_sec": window["tokens"] / seconds,
        "waiting_share": window["waiting_seconds"] / seconds,
        "seconds": state.train_seconds,
        "skipped_steps": state.skipped_steps,
        **means,
    }


def _divided(value, steps: float):
    """Return a number, or each number of nested lists, over `steps`; nan where there are none."""
    if isinstance(value, list):
        return [_divided(part, steps) for part in value]
    return value / steps if steps else math.nan
