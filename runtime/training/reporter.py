"""Progress bar, log lines, metrics, plots and the profile of a run."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from config_model import flops_per_token
from model import LLM
from runtime.base import process
from runtime.base.device import device_name, peak_flops, peak_memory_bytes
from runtime.base.files import write_text_atomic
from runtime.base.text import human_bytes, human_count, human_seconds
from runtime.checks import known
from runtime.training.diary import Diary
from runtime.training.metrics import HEALTHY_LOAD, HIGH, LOW, MetricsLog, make_loggers
from runtime.training.plan import TrainPlan
from runtime.training.plots import draw_plots
from runtime.training.state import RunState, skipped_words

PROFILED_STEPS = (5, 1, 3)  # --profile: passed over, warming the profiler up, recorded

# What the model that is trained answers to a few prompts: (prompt, text) of each.
Answers = Callable[[LLM], list[tuple[str, str]]]


class Reporter:
    """Progress bar, log lines, metrics, plots, events and samples of a run.

    answers: what is asked at each validation (runtime.inference.short_answers); None = nothing.
    """

    # Weak, because a rollback makes another model, and two may not fit the device.
    model: weakref.ref[LLM] | None = None
    # The step of the newest samples.
    sampled_step = -1

    def __init__(self, plan: TrainPlan, state: RunState, answers: Answers | None = None):
        self.answers = answers
        config, resume_step = plan.config, state.step if plan.config.resume else None
        real = known.counts(plan.model_config)
        tokenizer = plan.task.tokenizer_state or {}
        info = {
            "run_id": state.run_id,
            "model": dataclasses.asdict(plan.model_config),
            "train": dataclasses.asdict(config),
            "kind": plan.task.kind,
            "source": plan.task.source,
            "fingerprint": plan.task.fingerprint,
            "tokenizer": {k: tokenizer[k] for k in ("name", "fingerprint") if k in tokenizer},
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
        self.diary = Diary(config.graph_dir, state.run_id, self.say)
        self.skipped = state.skipped_steps, state.skipped_spikes
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
        if config.resume:
            self.diary.event(state.step, "resume", f"continues after step {state.step:,}")
        else:
            self.diary.event(state.step, "start", f"{config.max_steps:,} steps")

    def say(self, line: str) -> None:
        tqdm.write(line)
        sys.stdout.flush()

    def ready(self, model: LLM, seconds: float) -> None:
        """Say what a run will take. model: that is trained; seconds: of its first micro-batch."""
        self.model, config = weakref.ref(model), self.plan.config
        left = (config.max_steps - self.state.step) * config.grad_accum * seconds
        peak = peak_memory_bytes(self.plan.device)
        memory = f"; peak memory of the process so far {human_bytes(peak)}" if peak else ""
        self.say(
            f"ready    {seconds:.2f} s per micro-batch; rough total {human_seconds(left)} "
            f"(measured on a cold micro-batch){memory}"
        )

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
        self._sample(record)

    def _sample(self, record: dict) -> None:
        """Write what the model answers, once at each validation.

        Every rank takes part. A model whose logits are not finite has no answers.
        """
        if self.answers is None or record["kind"] == "train":
            return
        model = self.model() if self.model else None
        if record["step"] == self.sampled_step or model is None:
            return
        self.sampled_step = record["step"]
        try:
            self.diary.samples(record["step"], self.answers(model))
        except ValueError as error:
            self.say(f"step {record['step']:>7,}  no samples: {error}")

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
        if memory := peak_memory_bytes(self.plan.device):
            record["memory_bytes"] = memory
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
        self.note_skipped(record["step"])
        if record["step"] > self.plan.config.warmup_steps:
            self._watch_experts(record)

    def note_skipped(self, step: int) -> None:
        """Note how many steps since the last such note made no update, and why."""
        before, self.skipped = self.skipped, (self.state.skipped_steps, self.state.skipped_spikes)
        skipped, spikes = (new - old for new, old in zip(self.skipped, before, strict=True))
        if skipped:
            self.diary.event(step, "skipped", skipped_words(skipped, spikes))

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
            what = (
                f"{len(outside)} of {len(loads)} experts get "
                f"less or more than {bounds} % of their fair share, expert {expert} of block "
                f"{block} {100 * load:.0f} %"
            )
            self.diary.event(record["step"], "starved", what)
            self.say(
                f"step {record['step']:>7,}  warning: {what}: if this persists, raise "
                "--aux_loss_coef or set --router_bias_rate (see latest_expert_load.png)"
            )
        elif not outside and not self.healthy:
            what = f"all experts are back at {bounds} % of their fair share"
            self.diary.event(record["step"], "balanced", what)
            self.say(f"step {record['step']:>7,}  {what}")
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

    def saved(self, step: int, is_best: bool) -> None:
        """Note a checkpoint and draw the plots."""
        self.diary.event(step, "save", "checkpoint" + ", the best so far" * is_best)
        self.plots(step)

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

    def finish(self) -> None:
        """Note that the run has ended as it should, at its last step or by a signal; close."""
        step, last = self.state.step, self.plan.config.max_steps
        # A signal may come between two records.
        self.note_skipped(step)
        if step < last:
            self.diary.event(step, "stop", f"stopped after step {step:,} of {last:,}")
        else:
            self.diary.event(step, "done", f"{step:,} steps, {self.state.tokens_seen:,} tokens")
        self.close()

    def close(self) -> None:
        self.bar.close()
        self._log(self.log.finish)


class SilentReporter(Reporter):
    """The reporter of a rank that is not the first: it neither writes nor says anything.

    Where weights are shared it answers with the others.
    """

    def __init__(self, answers: Answers | None):
        self.answers, self.diary = answers, Diary(None, "", self.say)

    def say(self, line: str) -> None:
        pass

    def ready(self, model: LLM, seconds: float) -> None:
        self.model = weakref.ref(model)

    def on_log(self, record: dict) -> None:
        self._sample(record)

    def note_skipped(self, step: int) -> None:
        pass

    def saved(self, step: int, is_best: bool) -> None:
        pass

    def finish(self) -> None:
        pass

    def write_json(self) -> None:
        pass

    def plots(self, step: int) -> None:
        pass

    def scores(self) -> list[dict]:
        return []

    def close(self) -> None:
        pass


def reporter_of(plan: TrainPlan, state: RunState, answers: Answers | None = None) -> Reporter:
    """Return what shows and stores a run: on the first of its ranks alone."""
    return Reporter(plan, state, answers) if plan.ranks.is_first else SilentReporter(answers)


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
