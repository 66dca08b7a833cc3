"""Progress bar, log lines, metrics, plots and the profile of a run."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from config_model import flops_per_token
from runtime.base import process
from runtime.base.device import device_name, peak_flops
from runtime.base.files import write_text_atomic
from runtime.base.text import human_count, human_seconds
from runtime.checks import known
from runtime.training.metrics import HEALTHY_LOAD, HIGH, LOW, MetricsLog, make_loggers
from runtime.training.plan import TrainPlan
from runtime.training.plots import draw_plots
from runtime.training.state import RunState

PROFILED_STEPS = (5, 1, 3)  # --profile: passed over, warming the profiler up, recorded


class Reporter:
    """Progress bar, log lines, metrics and plots of a run."""

    def __init__(self, plan: TrainPlan, state: RunState):
        config, resume_step = plan.config, state.step if plan.config.resume else None
        real = known.counts(plan.model_config)
        info = {
            "run_id": state.run_id,
            "model": dataclasses.asdict(plan.model_config),
            "train": dataclasses.asdict(config),
            "source": plan.task.source,
            "parameters": real.total,
            "active_parameters": real.active,
            "device": device_name(plan.device),
            "torch": torch.__version__,
            "command": " ".join(sys.argv),
        }
        loggers = make_loggers(
            config.graph_dir,
            wandb=config.wandb,
            tensorboard=config.tensorboard,
            run_info=info,
            resume_step=resume_step,
        )
        self.plan, self.state = plan, state
        self.log = MetricsLog(config.graph_dir, resume_step, info, loggers)
        for message in self.log.take_messages():
            print(message)
        self.flops_per_token = 3 * flops_per_token(plan.model_config)
        self.peak = peak_flops(plan.device, plan.dtype)
        self.can_plot = self.can_log = self.healthy = True
        self.bar = tqdm(
            total=config.max_steps,
            initial=state.step,
            unit="step",
            disable=None,
            dynamic_ncols=True,
        )

    def say(self, line: str) -> None:
        tqdm.write(line)
        sys.stdout.flush()

    def on_log(self, record: dict) -> None:
        """Complete a record of `fit`, then show and store it."""
        if record["kind"] == "score":
            self._show_score(record)
        elif record["kind"] == "val":
            line = f"validation loss {record['loss']:.4f}"
            if "perplexity" in record:
                line += f"  perplexity {record['perplexity']:.2f}"
            if bytes_per_token := self.plan.task.bytes_per_token:
                record["bits_per_byte"] = record["loss"] / math.log(2) / bytes_per_token
                line += f"  bits/byte {record['bits_per_byte']:.4f}"
            self.say(f"step {record['step']:>7,}  {line}")
        else:
            self._show_training(record)
        self._log(lambda: self.log.append(record))

    def _show_score(self, record: dict) -> None:
        """Say the scores, and their intervals where there are any. Parts are in the log alone."""
        score, parts = record["score"], []
        for name, value in score.items():
            if name.endswith((LOW, HIGH)) or ": " in name:
                continue
            part = f"{name} {value:.4f}"
            if f"{name}{LOW}" in score:
                part += f" ({score[f'{name}{LOW}']:.3f} to {score[f'{name}{HIGH}']:.3f})"
            parts.append(part)
        self.say(f"step {record['step']:>7,}  {'  '.join(parts)}")

    def _show_training(self, record: dict) -> None:
        shown = {
            "loss": f"{record['loss']:.4f}",
            "tok/s": human_count(record["tokens_per_sec"]),
        }
        shown |= {name: f"{value:.4g}" for name, value in record.get("metrics", {}).items()}
        if self.peak:
            record["mfu"] = record["tokens_per_sec"] * self.flops_per_token / self.peak
            shown["MFU"] = f"{100 * record['mfu']:.1f}%"
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(record["step"] - self.bar.n)
        steps_left = self.plan.config.max_steps - record["step"]
        seconds_left = steps_left * self.state.train_seconds / record["step"]
        numbers = "  ".join(f"{name} {value}" for name, value in shown.items())
        # On a terminal too: the bar shows the newest numbers only.
        self.say(
            f"step {record['step']:>7,}  {numbers}  lr {record['lr']:.2e}  "
            f"grad norm {record['grad_norm']:.2f}  ETA {human_seconds(seconds_left)}"
        )
        if record["step"] > self.plan.config.warmup_steps:
            self._watch_experts(record)

    def _watch_experts(self, record: dict) -> None:
        """Say when experts leave the healthy range and when all are back in it."""
        loads = [
            (load, block, expert)
            for block, row in enumerate(record["expert_load"])
            for expert, load in enumerate(row)
        ]
        low, high = HEALTHY_LOAD
        outside = [one for one in loads if math.isfinite(one[0]) and not low <= one[0] <= high]
        bounds = f"{100 * low:.0f} to {100 * high:.0f}"
        if outside and self.healthy:
            # The worst by ratio: a tenth of the fair share is as far from it as ten times.
            load, block, expert = max(outside, key=lambda one: abs(math.log(max(one[0], 1e-9))))
            self.say(
                f"step {record['step']:>7,}  warning: {len(outside)} of {len(loads)} experts get "
                f"less or more than {bounds} % of their fair share, expert {expert} of block "
                f"{block} {100 * load:.0f} %: if this persists, raise --aux_loss_coef or set "
                "--router_bias_rate (see latest_expert_load.png)"
            )
        elif not outside and not self.healthy:
            self.say(
                f"step {record['step']:>7,}  all experts are back at {bounds} % of their fair share"
            )
        self.healthy = not outside

    def write_json(self) -> None:
        self._log(self.log.write_json)

    def _log(self, write: Callable[[], None]) -> None:
        """Write metrics. If that fails, say so once: it must never stop the run."""
        if not self.can_log:
            return
        try:
            write()
        except OSError as error:
            self.can_log = False
            self.say(f"no more metrics: {error} (training continues)")
        for message in self.log.take_messages():
            self.say(message)

    def plots(self, step: int) -> None:
        """Draw the plots. If that fails, say so once: it must never stop the run."""
        if not self.can_plot:
            return
        try:
            config = self.plan.config
            draw_plots(
                self.log.stream(),
                config.graph_dir,
                step,
                keep=config.keep_plots,
                theme=config.plot_theme,
                run_name=config.run_name,
            )
            process.give_back_memory()
        except (ImportError, OSError, ValueError) as error:
            self.can_plot = False
            self.say(f"no plots: {error} (the metrics are in {self.log.path})")

    def scores(self) -> list[dict]:
        """Return the run's score records; none of a file that cannot be read."""
        try:
            return [record for record in self.log.stream() if record["kind"] == "score"]
        except (OSError, ValueError):
            return []

    def close(self) -> None:
        self.bar.close()
        self._log(self.log.finish)


class SilentReporter(Reporter):
    """The reporter of a rank that is not the first: it neither writes nor says anything."""

    def __init__(self):
        pass

    def say(self, line: str) -> None:
        pass

    def on_log(self, record: dict) -> None:
        pass

    def write_json(self) -> None:
        pass

    def plots(self, step: int) -> None:
        pass

    def scores(self) -> list[dict]:
        return []

    def close(self) -> None:
        pass


def reporter_of(plan: TrainPlan, state: RunState) -> Reporter:
    """Return what shows and stores a run: on the first of its ranks alone."""
    return Reporter(plan, state) if plan.ranks.is_first else SilentReporter()


@contextlib.contextmanager
def profiled(plan: TrainPlan, state: RunState, say: Callable[[str], None]):
    """Yield what to call after each step.

    With config.profile, write a trace and a table to graph_dir after the last of PROFILED_STEPS.
    Of several ranks the first one does.
    """
    if not (plan.config.profile and plan.ranks.is_first):
        yield lambda: None
        return
    from torch.profiler import profile, schedule

    folder = Path(plan.config.graph_dir)

    def write(profiler):
        column = "self_device_time_total" if plan.device.type == "cuda" else "self_cpu_time_total"
        profiler.export_chrome_trace(str(folder / "trace.json"))
        write_text_atomic(
            folder / "trace.txt",
            profiler.key_averages().table(sort_by=column, row_limit=40, max_name_column_width=60),
        )
        first = state.step - PROFILED_STEPS[-1] + 1
        say(
            f"profile  of steps {first} to {state.step}: {folder / 'trace.json'} "
            f"(open it at ui.perfetto.dev), {folder / 'trace.txt'}"
        )

    skip, warm_up, record = PROFILED_STEPS
    with profile(
        schedule=schedule(skip_first=skip, wait=0, warmup=warm_up, active=record, repeat=1),
        on_trace_ready=write,
    ) as profiler:
        yield profiler.step
