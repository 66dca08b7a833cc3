"""The state of a run, and sums that a step adds to without a host sync."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# What the names of a task's own sums begin with in a step's sums.
METRIC = "task/"
# The end of the names of those that are means over steps, not over the step's divisor.
PER_STEP = "_per_step"
# What Totals counts on the host.
HOST_SUMS = ("tokens", "seconds", "waiting_seconds")


def skipped_words(skipped: int, spikes: int) -> str:
    """Return how many steps were skipped and why, as "3 steps were skipped: 2 not finite, 1 spike".

    skipped: all of them; spikes: those of them whose loss was finite.
    """
    whole = f"{skipped} step{'s were' if skipped > 1 else ' was'} skipped: "
    others = skipped - spikes
    parts = [f"{others} not finite"] * bool(others)
    parts += [f"{spikes} spike{'s' * (spikes > 1)} of the loss"] * bool(spikes)
    return whole + ", ".join(parts)


class TrainingDiverged(ValueError):
    """The loss or its gradient is not finite and does not recover."""

    exit_code = 3


@dataclass
class RunState:
    """What a run needs to continue, apart from weights and optimizer state.

    Plain numbers, because it is saved as JSON in each checkpoint. A field that is renamed ends the
    resume of every older run (plan.saved_state).
    """

    # Optimizer steps done, skipped ones included.
    step: int = 0
    # Sequences taken from the loader.
    samples_seen: int = 0
    tokens_seen: int = 0
    # Steps without an update, because a gradient was not finite or the loss was a spike.
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    # Of skipped_steps, those with a finite loss and gradient: spikes of the loss.
    skipped_spikes: int = 0
    # Times that the run was rolled back to a checkpoint.
    rollbacks: int = 0
    best_val_loss: float | None = None
    # The step of best.pt; 0 = not known.
    best_step: int = 0
    # Of a task whose best.pt goes by a score: the highest.
    best_score: float | None = None
    # Whether --dtype auto chose the dtype, so that a resume may choose another.
    auto_dtype: bool = False
    # What a CPU's clock chose for Muon's products; "" = none was asked.
    muon_dtype: str = ""
    # Spent in steps, without validation, saving and plotting.
    train_seconds: float = 0.0
    run_id: str = ""
    # float16's loss scaler.
    scaler: dict = field(default_factory=dict)
    # Sums since the last log line (Totals).
    window: dict = field(default_factory=dict)
    # Steps, mean, variance (RecentLoss).
    recent_loss: list = field(default_factory=lambda: [0.0, 0.0, 0.0])
    # What the task needs to continue (Task.state).
    task: dict = field(default_factory=dict)

    def note_best(self, val_loss: float | None, score: float | None, by_score: str) -> bool:
        """Return whether this step is the best so far, and remember it.

        Best is the lowest finite validation loss. by_score: name of the score that decides instead,
        whose highest is best; "" = none does.
        """
        value = score if by_score else val_loss
        if value is None or not math.isfinite(value):
            return False
        best = self.best_score if by_score else self.best_val_loss
        if best is not None and (value <= best if by_score else value >= best):
            return False
        self.best_step = self.step
        if by_score:
            self.best_score = value
        else:
            self.best_val_loss = value
        return True


def sums_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype that sums over steps are kept in: float64, which MPS lacks."""
    return torch.float32 if device.type == "mps" else torch.float64


class RecentLoss:
    """Running mean and variance of the steps' losses, to tell a spike from noise.

    They are kept on the device, so that nothing waits for it.
    """

    # Share of the statistics that a step keeps: about 20 steps count, so that the steep fall at the
    # start is soon forgotten.
    KEEP = 0.95
    # No earlier step is a spike.
    FEWEST_STEPS = 50
    # Smallest standard deviation, as a share of the mean: late in training the loss hardly moves,
    # and a tiny rise is no spike.
    LEAST_DEVIATION = 0.01

    def __init__(self, state: RunState, sigmas: float, device: torch.device):
        self.sigmas = sigmas
        # Steps, mean, variance.
        self.numbers = torch.tensor(state.recent_loss, dtype=sums_dtype(device), device=device)

    def is_spike(self, loss: Tensor) -> Tensor | None:
        """Return whether a step's mean cross-entropy is a spike, 0-dim bool; or None."""
        if not self.sigmas:
            return None
        steps, mean, variance = self.numbers
        deviation = torch.maximum(variance.sqrt(), self.LEAST_DEVIATION * mean)
        return (steps >= self.FEWEST_STEPS) & (loss > mean + self.sigmas * deviation)

    def add(self, loss: Tensor, bad: Tensor) -> None:
        """Count a step, unless it is `bad`."""
        steps, mean, variance = self.numbers
        # A plain mean at first, a running one later.
        share = torch.maximum(1 / (steps + 1), torch.full_like(steps, 1 - self.KEEP))
        off = loss.to(mean) - mean
        new_variance = (1 - share) * (variance + share * off * off)
        self.numbers = torch.where(
            bad, self.numbers, torch.stack((steps + 1, mean + share * off, new_variance))
        )


class Totals:
    """Sums by name over the steps since the last log line, kept on the device.

    A step adds to them; only `wait` waits for the device. The names are the caller's: "targets" and
    "steps" divide the others (train_record).
    """

    def __init__(self, state: RunState, device: torch.device):
        self.device = device
        self.dtype = sums_dtype(device)
        # All sums in one tensor, one after the other, in the order of `shapes`.
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.flat = torch.zeros(0, dtype=self.dtype, device=device)
        saved = sums_of(state.window)
        if saved:
            tensors = {
                name: torch.tensor(value, dtype=torch.float64) for name, value in saved.items()
            }
            self.shapes = _shapes_of(tensors)
            self.flat = self._flatten(tensors)
        self.host = {name: state.window.get(name, 0) for name in HOST_SUMS}
        self.skipped = torch.tensor(
            [state.skipped_steps, state.skipped_in_a_row, state.skipped_spikes],
            dtype=self.dtype,
            device=device,
        )
        self.grad_norm = torch.zeros((), dtype=self.dtype, device=device)
        # What `wait` has fetched.
        self.numbers: list[float] = []

    def _flatten(self, sums: dict[str, Tensor]) -> Tensor:
        values = [sums[name].flatten() for name in self.shapes]
        return torch.cat(values).to(self.device, self.dtype)

    def add(self, sums: dict[str, Tensor], grad_norm: Tensor, bad: Tensor) -> None:
        """Add a step. One that is `bad` (0-dim bool) was skipped and adds nothing to the sums."""
        shapes = _shapes_of(sums)
        if shapes != self.shapes:
            # The first step, or the first after a resume whose checkpoint has other sums.
            self.shapes = shapes
            self.flat = torch.zeros_like(self._flatten(sums))
            self.host = dict.fromkeys(self.host, 0)
        self.flat += torch.where(bad, 0.0, self._flatten(sums))
        self.skipped[0] += bad
        self.skipped[1] = (self.skipped[1] + 1) * bad
        self.skipped[2] += bad & torch.isfinite(grad_norm + sums["cross_entropy"])
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
        *numbers, skipped, in_a_row, spikes, grad_norm = self.numbers
        sums = {}
        for name, shape in self.shapes.items():
            count = math.prod(shape)
            sums[name] = _nested(numbers[:count], shape)
            numbers = numbers[count:]
        state.window = self.host | {"sums": sums}
        state.skipped_steps = int(skipped)
        state.skipped_in_a_row = int(in_a_row)
        state.skipped_spikes = int(spikes)
        return grad_norm

    def clear(self) -> None:
        """Start the next interval."""
        self.flat.zero_()
        self.host = dict.fromkeys(self.host, 0)


def _shapes_of(sums: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in sums.items()}


def _nested(numbers: list[float], shape: tuple[int, ...]) -> Any:
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
    names = ("cross_entropy", "targets", "steps", "aux_loss", "z_loss")
    return dict(zip(names, window["losses"], strict=True)) | {
        "expert_load": [row[:-2] for row in router],
        "router_entropy": [row[-2] for row in router],
        "dropped_share": [row[-1] for row in router],
    }


def perplexity(loss: float) -> float:
    """Return exp(loss), or inf where a float64 cannot hold it."""
    return math.exp(loss) if loss < 700 else math.inf


def val_record(state: RunState, val_loss: float, is_likelihood: bool = True) -> dict:
    """Return the log record of a validation. is_likelihood: the loss is a cross-entropy (nats)."""
    record = {"kind": "val", "step": state.step, "tokens_seen": state.tokens_seen, "loss": val_loss}
    return record | _perplexity(val_loss, is_likelihood)


def _perplexity(loss: float, is_likelihood: bool) -> dict:
    """Return the perplexity for a log record; of a loss that is no cross-entropy, that it is none.

    Plots find the perplexity of older records, which lack it, by their loss.
    """
    return {"perplexity": perplexity(loss)} if is_likelihood else {"is_likelihood": False}


def train_record(state: RunState, lr: float, grad_norm: float, is_likelihood: bool = True) -> dict:
    """Return a log record: means over the interval, nan where all of its steps were skipped.

    The loss and a task's metrics are means over valid targets (what Task.count counts), all other
    sums are means over steps. is_likelihood: the loss is a cross-entropy and has a perplexity.
    """
    window = state.window
    sums = dict(window["sums"])
    cross_entropy, targets = sums.pop("cross_entropy"), sums.pop("targets")
    steps = sums.pop("steps")
    loss = cross_entropy / targets if targets else math.nan
    metrics = {
        name.removeprefix(METRIC).removesuffix(PER_STEP): _divided(
            sums.pop(name), steps if name.endswith(PER_STEP) else targets
        )
        for name in [*sums]
        if name.startswith(METRIC)
    }
    means = {name: _divided(value, steps) for name, value in sums.items()}
    seconds = max(window["seconds"], 1e-9)
    return {
        "kind": "train",
        "step": state.step,
        "tokens_seen": state.tokens_seen,
        "loss": loss,
        **_perplexity(loss, is_likelihood),
        "aux_loss": means.pop("aux_loss"),
        "z_loss": means.pop("z_loss"),
        "lr": lr,
        "grad_norm": grad_norm,
        "tokens_per_sec": window["tokens"] / seconds,
        "waiting_share": window["waiting_seconds"] / seconds,
        "seconds": state.train_seconds,
        "skipped_steps": state.skipped_steps,
        **means,
        **({"metrics": metrics} if metrics else {}),
    }


def _divided(value: Any, steps: float) -> Any:
    """Return a number, or each number in nested lists, over `steps`; nan if `steps` is 0."""
    if isinstance(value, list):
        return [_divided(part, steps) for part in value]
    return value / steps if steps else math.nan
