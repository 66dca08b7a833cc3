"""What a training run will do, decided and checked before anything large is made."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from config_model import (
    PRESETS,
    ModelConfig,
    TrainConfig,
    loss_chunk_rows,
    parameter_counts,
    total_parameters,
)
from model import LLM
from runtime.base import cli, process
from runtime.base.device import (
    choose_device,
    choose_dtype,
    device_name,
    make_deterministic,
    memory_bytes,
)
from runtime.base.text import human_bytes, human_count
from runtime.checkpoint.folder import find_latest, folder_has_run
from runtime.checkpoint.format import Checkpoint
from runtime.checkpoint.read import read_checkpoint
from runtime.checks import known
from runtime.training.memory import training_memory_bytes
from runtime.training.state import RunState
from runtime.training.task import Task

# With --resume these may be given anew; every other setting is the run's and must stay what it is.
FREE_ON_RESUME = {
    "data_dir",
    "ckpt_dir",
    "graph_dir",
    "device",
    "compile",
    "activation_checkpointing",
    "profile",
    "num_threads",
    "log_interval",
    "val_interval",
    "val_steps",
    "save_interval",
    "keep_last",
    "max_steps",
    "max_rollbacks",
    "resume",
    "wandb",
    "tensorboard",
}


# With --init_from the architecture is the weights' own; these change neither what they are nor what they mean.
FREE_ON_INIT = {
    "context_length",
    "sliding_window",
    "window_pattern",
    "rope_theta",
    "rope_scaling",
    "rope_scaling_factor",
    "top_k",
    "capacity_factor",
    "aux_loss_coef",
    "z_loss_coef",
    "router_bias_rate",
    "dropout",
}


@dataclass
class TrainPlan:
    """A run, decided and checked, before anything large is made."""

    model_config: ModelConfig
    config: TrainConfig
    device: torch.device
    dtype: torch.dtype
    task: Task
    source: Checkpoint | None  # what is resumed or started from
    notes: list[str]
    loss_rows: int = 0  # of logits that the loss holds at a time; 0 = the model's choice


def make_plan(settings: cli.Settings, task_of: Callable[[TrainConfig], Task]) -> TrainPlan:
    """Return the plan of some settings. Raises ValueError for whatever cannot be honoured.

    task_of(config): what is to be learnt, from the data that the settings name.
    """
    notes: list[str] = []
    source = None
    if settings.values.get("resume"):
        if settings.values.get("init_from"):
            raise ValueError(
                "give either --resume (go on with a run) or --init_from (start a new run from weights), not both"
            )
        if settings.preset:
            raise ValueError(
                f"--resume goes on with the run's own settings: leave out --preset {settings.preset}"
            )
        source, skipped = find_latest(settings.values.get("ckpt_dir", TrainConfig.ckpt_dir))
        notes += [f"skipped a damaged checkpoint: {line}" for line in skipped] + [
            f"resuming {source.path} at step {source.step:,}"
        ]
        config, model_config = _resumed_configs(settings, source)
    else:
        config = settings.build(TrainConfig)
        if folder_has_run(config.ckpt_dir):
            raise ValueError(
                f"{config.ckpt_dir} holds the checkpoints of another run: go on with it by --resume, or give this run another --ckpt_dir"
            )
        model_config = (
            None if config.init_from else settings.build(ModelConfig)
        )  # with it, settings are the weights' with some changes, not the default's
    torch.set_num_threads(
        config.num_threads or min(torch.get_num_threads(), process.usable_cores())
    )
    process.keep_freed_memory()
    device = choose_device(config.device)
    if config.deterministic:
        make_deterministic()
    dtype = choose_dtype(config.dtype, device)
    if config.spike_sigmas and dtype == torch.float16:
        raise ValueError(
            "spike_sigmas skips steps that float16's loss scaler would take: use --dtype bfloat16 or float32"
        )
    task = task_of(config)
    if config.resume:
        if source.data_fingerprint != task.fingerprint:
            raise ValueError(
                f"{config.data_dir} is not the text that {source.path} was trained on: give the run's own --data_dir, or start anew with --init_from"
            )
    else:
        if config.init_from:
            source = read_checkpoint(config.init_from)
            model_config = _initial_config(settings, source)
            notes.append(
                f"starting from the weights of {source.path} (step {source.step:,})"
                + (
                    f"; the architecture is theirs, preset {settings.preset} sets the training only"
                    if settings.preset
                    else ""
                )
            )
        elif task.vocabulary_size and "vocabulary_size" not in settings.explicit:
            model_config = dataclasses.replace(model_config, vocabulary_size=task.vocabulary_size)
        _check_vocabulary(model_config, task, source)
    config = dataclasses.replace(config, dtype=str(dtype).removeprefix("torch."))
    return with_loss_rows(TrainPlan(model_config, config, device, dtype, task, source, notes))


def _resumed_configs(settings: cli.Settings, source: Checkpoint) -> tuple[TrainConfig, ModelConfig]:
    """The checkpoint's settings, with those given anew that may be. Raises ValueError for the others, and for a finished run."""
    if source.is_reference_format or not source.run:
        raise ValueError(
            f"{source.path} holds no run to go on with: start a new one from its weights with --init_from {source.path}"
        )
    saved = source.train_config | dataclasses.asdict(source.model_config)
    given = {name: settings.values[name] for name in settings.explicit}
    for name, value in given.items():
        if name not in FREE_ON_RESUME and value != saved.get(name):
            raise ValueError(
                f"--{name} {value} differs from the run in {source.path}, which has {saved.get(name)}: leave it out to go on, or start "
                "a new run with another --ckpt_dir (and --init_from)"
            )
    free = {name: value for name, value in given.items() if name in FREE_ON_RESUME}
    folder = {
        "ckpt_dir": settings.values.get("ckpt_dir", TrainConfig.ckpt_dir)
    }  # the run may have been moved
    try:
        config = TrainConfig(
            **source.train_config | free | folder | {"resume": True, "init_from": ""}
        )
    except TypeError as error:
        raise ValueError(
            f"{source.path} has training settings that this version does not know: {error}"
        ) from error
    if config.max_steps < source.step:  # fewer steps would rewrite history
        raise ValueError(
            f"the run in {config.ckpt_dir} is at step {source.step}, beyond --max_steps {config.max_steps}: raise it to train further"
        )
    return config, source.model_config


def saved_state(source: Checkpoint) -> RunState:
    """The run state in a checkpoint. Raises ValueError if it is not one of this version."""
    expected = dataclasses.asdict(RunState())
    if (
        source.run.keys() | {"rollbacks", "recent_loss"} != expected.keys()
    ):  # the first versions had not these two
        raise ValueError(
            f"{source.path} was saved by a version with another run state ({', '.join(sorted(source.run.keys() ^ expected.keys()))}): start from its weights with --init_from"
        )
    return RunState(**source.run)


def _initial_config(settings: cli.Settings, source: Checkpoint) -> ModelConfig:
    """The architecture of the weights, with explicit settings that do not change their shapes."""
    names = {f.name for f in dataclasses.fields(ModelConfig)} & settings.explicit
    theirs = dataclasses.asdict(source.model_config) | {
        "head_dim": source.model_config.attention_head_dim
    }
    for name in sorted(
        names - FREE_ON_INIT
    ):  # 8 heads of 4 features have the shapes of 4 of 8, and are another function
        if settings.values[name] not in (theirs[name], getattr(source.model_config, name)):
            raise ValueError(
                f"--{name} does not fit the weights in {source.path}, whose {name} is {theirs[name]}, not {settings.values[name]}: leave it out"
            )
    config = dataclasses.replace(
        source.model_config, **{name: settings.values[name] for name in names}
    )
    with torch.device("meta"):
        mine, theirs = (dict(LLM(c).named_parameters()) for c in (config, source.model_config))
    for name in mine.keys() | theirs.keys():
        if (name in mine) != (name in theirs) or mine[name].shape != theirs[name].shape:
            raise ValueError(
                f"{', '.join('--' + n for n in sorted(names))} does not fit the weights in {source.path} ({name} differs): leave it out"
            )
    return config


def with_config(source: Checkpoint, config: ModelConfig) -> Checkpoint:
    """A checkpoint's weights under a config that may balance its experts otherwise: a selection bias comes (as 0) or goes."""
    biases = {
        f"layers.{block}.moe.router.selection_bias": torch.zeros(config.num_experts)
        for block in range(config.transformer_blocks)
    }
    model = {name: tensor for name, tensor in source.model.items() if name not in biases}
    model |= (
        {name: source.model.get(name, zero) for name, zero in biases.items()}
        if config.router_bias_rate
        else {}
    )
    return dataclasses.replace(source, model_config=config, model=model)


def _check_vocabulary(model_config: ModelConfig, task: Task, source: Checkpoint | None) -> None:
    """Raise ValueError unless model, data and starting weights agree on what the ids mean."""
    ours = task.tokenizer_state
    if model_config.vocabulary_size < task.vocabulary_size:
        tokenizer = f" ({ours['name']})" if ours else ""
        raise ValueError(
            f"vocabulary_size {model_config.vocabulary_size:,} is smaller than the data's "
            f"{task.vocabulary_size:,}{tokenizer}: leave --vocabulary_size out to take the data's, "
            "or prepare the text with the model's tokenizer"
        )
    theirs = source.tokenizer_state if source else None
    if source and theirs and ours and theirs["fingerprint"] != ours["fingerprint"]:
        name = ours["name"] + (" of another text" if ours["name"] == theirs["name"] else "")
        raise ValueError(
            f"{source.path} was trained with tokenizer {theirs['name']} and {task.where} was made with {name}: prepare the text with the former"
        )


def check_memory(plan: TrainPlan) -> dict[str, int]:
    """Estimated memory by part; ValueError if the weights, gradients and optimizer state alone exceed what the device has."""
    on_gpu = plan.device.type == "cuda"
    needed = training_memory_bytes(
        plan.model_config, plan.config, plan.dtype.itemsize, on_gpu, plan.loss_rows
    )
    # Gradients are as large as the weights, also where they are not there at the step's peak.
    fixed = 2 * needed["weights"] + needed["optimizer state"]
    memory = memory_bytes(plan.device)
    if memory and fixed > memory[1]:
        raise ValueError(
            f"{human_count(total_parameters(plan.model_config))} parameters need {human_bytes(fixed)} for weights, gradients and optimizer state, and "
            f"{device_name(plan.device)} has {human_bytes(memory[1])}: choose a smaller model, e.g. --preset {_fitting_preset(memory[1]) if plan.device.type == 'cuda' else 'nano'}"
        )
    return needed


def _fitting_preset(total_bytes: int) -> str:
    """The largest preset whose training fits."""
    cost = {
        name: sum(
            training_memory_bytes(
                ModelConfig(**p.model), TrainConfig(**p.train), 2, on_gpu=True
            ).values()
        )
        for name, p in PRESETS.items()
    }
    return max(
        (name for name in cost if cost[name] < 0.95 * total_bytes), key=cost.get, default="nano"
    )


def with_loss_rows(plan: TrainPlan) -> TrainPlan:
    """The plan with as many rows of logits at a time as its GPU has memory for; always the same where
    the run is to give the same bits."""
    if plan.device.type != "cuda" or plan.config.deterministic:
        return plan
    needed = check_memory(dataclasses.replace(plan, loss_rows=0))
    spare = memory_bytes(plan.device)[0] - sum(needed.values())
    return dataclasses.replace(plan, loss_rows=loss_chunk_rows(plan.model_config, True, spare))


def with_largest_micro_batch(plan: TrainPlan, runs: Callable[[TrainPlan], bool]) -> TrainPlan:
    """The plan with the largest micro-batch that fits its device, and as many of them as keep the sequences per step.

    A validation keeps its windows, rounded up
    to whole micro-batches. A CPU goes by the estimate and 80 % of the free memory. A GPU tries, the largest whose estimate fits first, and uncompiled:
    compiling takes a minute and then needs less.
    Raises ValueError if not one sequence fits.
    """
    config = plan.config
    sequences = config.batch_size * config.grad_accum
    plans = [
        dataclasses.replace(
            plan,
            loss_rows=0,
            config=dataclasses.replace(
                config,
                batch_size=b,
                grad_accum=sequences // b,
                micro_batch="batch_size",
                val_steps=-(-config.val_steps * config.batch_size // b),
            ),
        )
        for b in range(sequences, 0, -1)
        if sequences % b == 0
    ]
    memory = memory_bytes(plan.device)
    if memory is None:
        raise ValueError(
            f"the memory of {device_name(plan.device)} is not known: give --batch_size instead of --micro_batch auto"
        )
    on_gpu = plan.device.type == "cuda"
    for candidate in plans:
        needed = check_memory(candidate)
        # Of a CPU's memory the program has its share already.
        estimate = sum(needed.values()) - needed["program"]
        likely = (
            estimate < 0.8 * memory[0]
            if not on_gpu
            else estimate <= memory[0] or candidate is plans[-1]
        )
        if likely and (not on_gpu or runs(candidate)):
            c = candidate.config
            return dataclasses.replace(
                with_loss_rows(candidate),
                notes=[
                    *plan.notes,
                    f"micro-batch {c.batch_size} x {c.grad_accum} is the largest that fits, of {sequences} sequences a step",
                ],
            )
    raise ValueError(
        f"not even one sequence of {plan.model_config.context_length} tokens fits {device_name(plan.device)}, which has {human_bytes(memory[0])} free and needs about "
        f"{human_bytes(estimate)}: lower --context_length, take --activation_checkpointing, or a smaller model"
    )


def describe(plan: TrainPlan, needed: dict[str, int]) -> list[str]:
    """The lines printed before step 1."""
    c, t = plan.model_config, plan.config
    table = parameter_counts(c)["attention bias table"]
    real = known.counts(c)
    total = real.total
    lines = [
        f"model    {human_count(total)} parameters, {human_count(real.active)} active per token"
        + (
            f" ({human_count(total - table)} + {human_count(table)} position table; see --preset gptoss-modern)"
            if table > 0.1 * total
            else ""
        )
    ]
    lines += [
        f"note     {line}"
        for line in (real.note, "" if plan.source else known.initial_note(c))
        if line
    ]
    lines += plan.task.describe(c, t)
    memory = memory_bytes(plan.device)
    parts = ", ".join(f"{name} {human_bytes(size)}" for name, size in needed.items() if size)
    lines.append(
        f"memory   about {human_bytes(sum(needed.values()))} ({parts})"
        + (f"; {human_bytes(memory[0])} free" if memory else "")
    )
    checkpoint, kept = (
        human_bytes(checkpoint_bytes(needed)),
        f"{t.keep_last} and the best"
        if t.keep_last
        else f"{max(t.max_steps // t.save_interval, 1)}",
    )
    lines.append(
        f"disk     {checkpoint} a checkpoint in {t.ckpt_dir}; {kept} are kept, and one more is written before an old one goes"
    )
    options = [
        name.replace("_", " ")
        for name in ("document_mask", "activation_checkpointing", "deterministic")
        if getattr(t, name)
    ]
    lines.append(
        f"device   {device_name(plan.device)}, {t.dtype}{', compiled' if t.compile else ''}; {t.optimizer}{', ' if options else ''}{', '.join(options)}"
    )
    return lines


def checkpoint_bytes(needed: dict[str, int]) -> int:
    """Bytes of a checkpoint: the weights and the optimizer's state, of a memory estimate."""
    return needed["weights"] + needed["optimizer state"]


def initial_state(plan: TrainPlan) -> RunState:
    """Where the run starts: at step 0, or where the checkpoint that it resumes says."""
    if not plan.config.resume:
        return RunState(run_id=os.urandom(8).hex())
    state = saved_state(plan.source)
    if (
        plan.config.val_steps != plan.source.train_config["val_steps"]
    ):  # another average: not to be compared with
        state.best_val_loss = None
    return state
