"""The state of a run, and sums that a step adds to without waiting for the device."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model import LLM


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
    """Sums over the steps since the last log line, kept on the device: a step adds to them and only `read` waits for it."""

    def __init__(self, state: RunState, model: LLM, device: torch.device):
        dtype = torch.float32 if device.type == "mps" else torch.float64
        rows = (model.config.transformer_blocks, model.config.num_experts + 2)
        zeros = {"losses": torch.zeros(5), "router": torch.zeros(rows)}
        self.sums = {
            name: torch.tensor(state.window[name], dtype=torch.float64)
            if name in state.window
            else zero
            for name, zero in zeros.items()
        }
        self.sums = {name: tensor.to(dtype).to(device) for name, tensor in self.sums.items()}
        self.skipped = torch.tensor(
            [state.skipped_steps, state.skipped_in_a_row], dtype=dtype, device=device
        )
        self.host = {
            name: state.window.get(name, 0) for name in ("tokens", "seconds", "waiting_seconds")
        }
        self.grad_norm = torch.zeros((), dtype=dtype, device=device)

    def add(
        self, bad: Tensor, losses: Tensor, router: Tensor, grad_norm: Tensor, **host: float
    ) -> None:
        """Add a step. losses [5]: cross-entropy, valid targets, steps, auxiliary loss, z-loss; router [L, E + 2]: loads, entropy,
        dropped share. A step that is `bad` (0-dim bool), and so skipped, counts its time and tokens, not its losses."""
        for name, value in (("losses", losses), ("router", router)):
            self.sums[name] += torch.where(bad, 0.0, value.to(self.sums[name]))
        self.skipped[0] += bad
        self.skipped[1] = (self.skipped[1] + 1) * bad
        self.grad_norm = grad_norm.to(self.skipped)
        for name, value in host.items():
            self.host[name] += value

    def read(self, state: RunState) -> float:
        """Wait for the device, put everything into `state` and return the last step's gradient norm."""
        shape = self.sums["router"].shape
        *numbers, total, in_a_row, grad_norm = torch.cat(
            (self.sums["losses"], self.sums["router"].flatten(), self.skipped, self.grad_norm[None])
        ).tolist()
        state.window = self.host | {
            "losses": numbers[:5],
            "router": [numbers[5 + i * shape[1] : 5 + (i + 1) * shape[1]] for i in range(shape[0])],
        }
        state.skipped_steps, state.skipped_in_a_row = int(total), int(in_a_row)
        return grad_norm

    def clear(self) -> None:
        """Begin the next window."""
        for tensor in self.sums.values():
            tensor.zero_()
        self.host = dict.fromkeys(self.host, 0)


def perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def train_record(state: RunState, lr: float, grad_norm: float) -> dict:
    """A log record: means over the window, losses by valid targets, the rest by steps; a window of skipped steps has none."""
    cross_entropy, targets, steps, aux_loss, z_loss = state.window["losses"]
    seconds = max(state.window["seconds"], 1e-9)
    nan = math.nan
    loss = cross_entropy / targets if steps else nan
    router = [[value / steps if steps else nan for value in row] for row in state.window["router"]]
    return {
        "kind": "train",
        "step": state.step,
        "tokens_seen": state.tokens_seen,
        "loss": loss,
        "perplexity": perplexity(loss),
        "aux_loss": aux_loss / steps if steps else nan,
        "z_loss": z_loss / steps if steps else nan,
        "lr": lr,
        "grad_norm": grad_norm,
        "tokens_per_sec": state.window["tokens"] / seconds,
        "waiting_share": state.window["waiting_seconds"] / seconds,
        "seconds": state.train_seconds,
        "skipped_steps": state.skipped_steps,
        "expert_load": [row[:-2] for row in router],
        "router_entropy": [row[-2] for row in router],
        "dropped_share": [row[-1] for row in router],
    }
