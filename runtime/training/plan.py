"""What a training run will do, decided and checked before anything large is made."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
from runtime.base.files import is_utf8
from runtime.base.following import follow
from runtime.base.ranks import ONE_PROCESS, Ranks
from runtime.base.text import human_bytes, human_count
from runtime.checkpoint.format import Checkpoint
from runtime.checks import known
from runtime.data.advice import (
    fitting_vocabulary,
    vocabulary_is_too_large,
    vocabulary_parameters,
)
from runtime.training.agreed import (
    check_data,
    check_settings,
    newest_checkpoint,
    of_a_restart,
    restarted_run,
    weights_to_start_from,
)
from runtime.training.clocks import compute_dtype, muon_dtype
from runtime.training.memory import training_memory_bytes
from runtime.training.optimizer import ELEMENTS_ON_A_CPU
from runtime.training.placement import Placement
from runtime.training.scale import ranks_line
from runtime.training.split import with_split_for, with_validation_of
from runtime.training.state import RunState
from runtime.training.task import Task

# With --resume these may be given again. Every other setting belongs to the run and must not
# change, but for what _also_free names.
FREE_ON_RESUME = {
    "data_dir",
    "data",
    "ckpt_dir",
    "graph_dir",
    "run_name",
    "keep_plots",
    "plot_theme",
    "watch",
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
    "epochs",
    "micro_batch",
    "max_rollbacks",
    "resume",
    "wandb",
    "tensorboard",
    "sample_prompts",
    "expert_parallel",
    "shard",
    "checkpoint",
    "balance_over",
}
# Of the machine and not of the run: a resume that is not given them has the defaults.
OF_THE_MACHINE = ("expert_parallel", "shard", "checkpoint")
# Parts of the estimate of memory that are there also between steps.
KEPT_BETWEEN_STEPS = {"program", "weights", "frozen weights", "optimizer state"}


# With --init_from the weights decide the architecture. These settings change neither the shapes of
# the weights nor what they mean.
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
    # The checkpoint that is resumed or started from.
    source: Checkpoint | None
    notes: list[str]
    # Rows of logits that the loss holds at a time; 0 = the model's choice.
    loss_rows: int = 0
    # Whether --dtype auto chose the dtype.
    auto_dtype: bool = False
    # What a CPU's clock chose for Muon's products; "" = none was asked.
    muon_dtype: str = ""
    # That carry it out.
    ranks: Ranks = ONE_PROCESS


def make_plan(
    settings: cli.Settings,
    task_of: Callable[[Any, Checkpoint | None], Task],
    config_class: type[TrainConfig] = TrainConfig,
    ranks: Ranks = ONE_PROCESS,
) -> TrainPlan:
    """Return the plan for some settings. Raise ValueError for whatever cannot be honoured.

    ranks: that will carry it out.
    task_of(config, source): the task, made from the data that the settings name. config: a
    config_class; source: the checkpoint that is resumed or started from, if any.
    """
    notes: list[str] = []
    check_settings(settings, ranks)
    source, config, model_config = _configs(settings, config_class, notes, ranks)
    if config.profile and not is_utf8(config.graph_dir):
        raise ValueError(
            f"--profile: PyTorch writes its trace to UTF-8 paths alone, and {config.graph_dir} is "
            "none: give another --graph_dir"
        )
    device, dtype = _prepare_process(config, ranks)
    if config.init_from:
        source = weights_to_start_from(config.init_from, ranks)
    task = ranks.together(lambda: task_of(config, source))
    if ranks.world > 1 and not task.takes_ranks:
        raise ValueError(
            f"{task.command} is for one process, and these are {ranks.world} ranks: start it "
            "without torchrun"
        )
    check_data(task, source, ranks)
    task.command = ranks.command(task.command)
    if config.resume:
        assert source is not None
        check_kind(source, task)
        if source.data_fingerprint != task.fingerprint:
            raise ValueError(
                f"{task.where} is not the text that {source.path} was trained on: give the run's "
                "own, or start a new run with --init_from"
            )
        assert model_config is not None
        config = _with_epochs(config, settings, task, model_config, source, notes)
    else:
        if source is not None:
            model_config = _initial_config(settings, source)
            notes.append(_init_note(settings, source))
            model_config = task.adapted(model_config, source)
        elif task.vocabulary_size and "vocabulary_size" not in settings.explicit:
            assert model_config is not None
            model_config = dataclasses.replace(model_config, vocabulary_size=task.vocabulary_size)
        assert model_config is not None
        _check_vocabulary(model_config, task, source)
        config = _with_epochs(config, settings, task, model_config, None, notes)
    auto_dtype, of_products = config.dtype == "auto", ""
    if device.type == "cpu":
        dtype, of_products = _by_clock(config, model_config, dtype, source, notes, ranks)
    config = dataclasses.replace(config, dtype=str(dtype).removeprefix("torch."))
    ranks.arrange(
        config.expert_parallel, config.shard, model_config.num_experts, config.balance_over
    )
    if config.checkpoint == "sharded" and ranks is ONE_PROCESS:
        raise ValueError(
            "--checkpoint sharded is for runs on several ranks: leave it out, or start with "
            "torchrun --standalone --nproc_per_node RANKS train.py"
        )
    config = with_split_for(ranks.world, config, notes)
    plan = TrainPlan(model_config, config, device, dtype, task, source, notes, ranks=ranks)
    plan = dataclasses.replace(plan, auto_dtype=auto_dtype, muon_dtype=of_products)
    return ranks.together(lambda: with_loss_rows(plan))


def _with_epochs(
    config: TrainConfig,
    settings: cli.Settings,
    task: Task,
    model_config: ModelConfig,
    source: Checkpoint | None,
    notes: list[str],
) -> TrainConfig:
    """Return the config with the steps that its epochs take, rounded up; add lines to notes.

    source: the checkpoint that is resumed. Without one, the warm-up follows the steps.
    """
    if not config.epochs:
        return config
    samples = task.samples_per_epoch(model_config)
    if not samples:
        raise ValueError(f"--epochs: {task.where} has no end, so give --max_steps instead")
    # Rounded first: 1.1 * 10 is a little more than 11.
    steps = round(config.epochs * samples / (config.batch_size * config.grad_accum), 6)
    values = dataclasses.asdict(config) | {"epochs": 0.0, "max_steps": max(math.ceil(steps), 1)}
    said: tuple[str, ...] = ()
    if source is None:
        values, said = follow(values, settings.explicit, type(config))
    else:
        _check_steps(values, source)
    notes += [
        f"epochs {config.epochs:g} of {samples:,} sequences: max_steps {values['max_steps']:,}",
        *said,
    ]
    return type(config)(**values)


def check_kind(source: Checkpoint, task: Task) -> None:
    """Raise ValueError if a run of another kind is to be resumed."""
    kind = source.stage.get("kind", Task.kind)
    if kind != task.kind:
        raise ValueError(
            f"{source.path} is of another kind of training ({kind}) and cannot be resumed by "
            f"{task.command}: start a new run from its weights with --init_from {source.path} and "
            "another --ckpt_dir"
        )


def _configs(
    settings: cli.Settings, config_class: type[TrainConfig], notes: list[str], ranks: Ranks
) -> tuple[Checkpoint | None, TrainConfig, ModelConfig | None]:
    """Return the checkpoint to resume, if any, and both configs; add what is to be said to notes.

    The model's config is None with --init_from: the weights, not the defaults, decide it later.
    """
    if settings.values.get("epochs") and "max_steps" in settings.explicit:
        raise ValueError("give either --epochs or --max_steps, not both")
    if not settings.values.get("resume"):
        if settings.values.get("epochs"):
            # The data, which is not open yet, decides the steps: no warm-up is too long so far.
            values = settings.values | {"max_steps": 1_000_000_000}
            settings = dataclasses.replace(settings, values=values)
        config = settings.build(config_class)
        model_config = None if config.init_from else settings.build(ModelConfig)
        source, skipped = restarted_run(config.ckpt_dir, ranks)
        if source is None:
            notes += settings.notes
            return None, config, model_config
        settings = of_a_restart(settings, FREE_ON_RESUME)
    elif settings.values.get("init_from"):
        raise ValueError(
            "give either --resume (continue a run) or --init_from (start a new run from weights), "
            "not both"
        )
    elif settings.preset:
        raise ValueError(
            f"--resume continues with the run's own settings: leave out --preset {settings.preset}"
        )
    else:
        ckpt_dir = settings.values.get("ckpt_dir", config_class.ckpt_dir)
        source, skipped = newest_checkpoint(ckpt_dir, ranks)
    notes += [f"skipped a checkpoint that cannot be read: {line}" for line in skipped]
    notes.append(f"resuming {source.path} at step {source.step:,}")
    config, model_config = _resumed_configs(settings, source, config_class)
    return source, config, model_config


def _prepare_process(config: TrainConfig, ranks: Ranks) -> tuple[torch.device, torch.dtype]:
    """Set threads and determinism; return the device and the dtype to compute in."""
    # The ranks of a machine share its cores. Those that PyTorch was told to take are of a process.
    cores = max(process.usable_cores() // ranks.local_world, 1)
    threads = config.num_threads or min(torch.get_num_threads(), cores)
    torch.set_num_threads(threads)
    process.keep_freed_memory()
    device = ranks.device or choose_device(config.device)
    if config.deterministic:
        make_deterministic()
    # A CPU is timed later, on the model.
    name = "float32" if config.dtype == "auto" and device.type == "cpu" else config.dtype
    dtype = ranks.from_first(lambda: choose_dtype(name, device))
    if config.spike_sigmas and dtype == torch.float16:
        raise ValueError(
            "spike_sigmas skips steps that float16's loss scaler would take: "
            "use --dtype bfloat16 or float32"
        )
    return device, dtype


def _by_clock(
    config: TrainConfig,
    model_config: ModelConfig,
    dtype: torch.dtype,
    source: Checkpoint | None,
    notes: list[str],
    ranks: Ranks,
) -> tuple[torch.dtype, str]:
    """Return the dtypes of a run on a CPU: of the model, and the name of that of Muon's products.

    Add what clocks say to notes. A resumed run keeps what was chosen, and a deterministic one asks
    none: both are float32. dtype: that was given.
    """
    resumed = source.run.get("muon_dtype", "") if config.resume and source is not None else None
    if config.deterministic:
        return dtype, resumed or ""
    if config.dtype == "auto":
        dtype, line = ranks.from_first(lambda: compute_dtype(model_config, config.batch_size))
        notes += [line] * bool(line)
    if config.optimizer != "muon" or resumed is not None:
        return dtype, resumed or ""
    chosen, line = ranks.from_first(lambda: muon_dtype(model_config, ELEMENTS_ON_A_CPU))
    notes += [line] * bool(line)
    return dtype, str(chosen).removeprefix("torch.") if line else ""


def _init_note(settings: cli.Settings, source: Checkpoint) -> str:
    note = f"starting from the weights of {source.path} (step {source.step:,})"
    if settings.preset:
        note += f"; the architecture is theirs, preset {settings.preset} sets the training only"
    return note


def _resumed_configs(
    settings: cli.Settings, source: Checkpoint, config_class: type[TrainConfig]
) -> tuple[TrainConfig, ModelConfig]:
    """Return the checkpoint's configs with the settings that a resumed run may change.

    Raise ValueError for settings that it may not change.
    """
    if source.is_reference_format or not source.run:
        raise ValueError(
            f"{source.path} holds no run to continue: start a new one from its weights with "
            f"--init_from {source.path}"
        )
    saved = source.train_config | dataclasses.asdict(source.model_config)
    given = {name: settings.values[name] for name in settings.explicit}
    may_change = FREE_ON_RESUME | _also_free(given, source)
    for name, value in given.items():
        if name not in may_change and value != saved.get(name):
            if name in ("batch_size", "grad_accum"):
                raise ValueError(_other_batch(name, value, source))
            raise ValueError(
                f"--{name} {value} differs from the run in {source.path}, which has "
                f"{saved.get(name)}: leave it out to continue, or start a new run with another "
                "--ckpt_dir (and --init_from)"
            )
    free = {name: value for name, value in given.items() if name in may_change}
    # The run's folder may have been moved since it was saved.
    folder = {"ckpt_dir": settings.values.get("ckpt_dir", config_class.ckpt_dir)}
    defaults = {f.name: f.default for f in dataclasses.fields(config_class)}
    machine = {name: defaults[name] for name in OF_THE_MACHINE}
    values = source.train_config | machine | free | folder | {"resume": True, "init_from": ""}
    _check_steps(values, source)
    try:
        config = config_class(**values)
    except TypeError as error:
        raise ValueError(
            f"{source.path} has training settings that this version does not know: {error}"
        ) from error
    if "val_steps" not in given:
        config = with_validation_of(config, source.train_config["batch_size"])
    return config, source.model_config


def _also_free(given: dict, source: Checkpoint) -> set[str]:
    """Return further settings that this resume may change.

    The same sequences per step may be cut otherwise, and a dtype that auto chose may be another.
    """
    names = {"dtype"} if source.run.get("auto_dtype") else set()
    # A file can give anything, and what is not given is None.
    size, times = given.get("batch_size"), given.get("grad_accum")
    if type(size) is int and type(times) is int and size * times == _sequences(source):
        names |= {"batch_size", "grad_accum"}
    return names


def _sequences(source: Checkpoint) -> int:
    return source.train_config["batch_size"] * source.train_config["grad_accum"]


def _other_batch(name: str, value: object, source: Checkpoint) -> str:
    """Return the error line for another number of sequences per step than the run has."""
    before = source.train_config
    return (
        f"--{name} {value} differs from the run in {source.path}, which has "
        f"{before['batch_size']} x {before['grad_accum']} sequences a step: leave it out, or give "
        f"--batch_size and --grad_accum whose product is {_sequences(source)}"
    )


def _check_steps(values: dict, source: Checkpoint) -> None:
    """Raise ValueError for fewer steps than were taken, because they would rewrite history."""
    steps = values["max_steps"]
    # TrainConfig says what is wrong with another type.
    if type(steps) is int and steps < source.step:
        raise ValueError(
            f"the run in {values['ckpt_dir']} is at step {source.step}, beyond "
            f"--max_steps {steps}: raise it (or --epochs) to train further"
        )
    if type(steps) is int and values["schedule"] != "constant" and steps <= values["warmup_steps"]:
        raise ValueError(
            f"the run in {values['ckpt_dir']} warms up for {values['warmup_steps']} steps, which "
            f"a resume keeps: give --max_steps (or --epochs) above that, not {steps}"
        )


def saved_state(source: Checkpoint) -> RunState:
    """Return a checkpoint's run state. Raise ValueError if its fields are not this version's."""
    expected = dataclasses.asdict(RunState())
    # Earlier versions lacked these.
    added = {"rollbacks", "recent_loss", "best_step", "auto_dtype", "best_score", "task"}
    added |= {"skipped_spikes", "muon_dtype"}
    if source.run.keys() | added != expected.keys():
        different = ", ".join(sorted(source.run.keys() ^ expected.keys()))
        raise ValueError(
            f"{source.path} was saved by a version with another run state ({different}): "
            "start from its weights with --init_from"
        )
    return RunState(**source.run)


def _initial_config(settings: cli.Settings, source: Checkpoint) -> ModelConfig:
    """Return the weights' architecture, with explicit settings that do not change their shapes."""
    names = {f.name for f in dataclasses.fields(ModelConfig)} & settings.explicit
    saved = dataclasses.asdict(source.model_config)
    saved["head_dim"] = source.model_config.attention_head_dim
    # Equal shapes are not enough: 8 heads of 4 features and 4 of 8 are different functions.
    for name in sorted(names - FREE_ON_INIT):
        if settings.values[name] not in (saved[name], getattr(source.model_config, name)):
            raise ValueError(
                f"--{name} does not fit the weights in {source.path}, whose {name} is "
                f"{saved[name]}, not {settings.values[name]}: leave it out"
            )
    config = dataclasses.replace(
        source.model_config, **{name: settings.values[name] for name in names}
    )
    with torch.device("meta"):
        mine, theirs = (dict(LLM(c).named_parameters()) for c in (config, source.model_config))
    for name in mine.keys() | theirs.keys():
        if (name in mine) != (name in theirs) or mine[name].shape != theirs[name].shape:
            flags = ", ".join("--" + n for n in sorted(names))
            raise ValueError(
                f"{flags} does not fit the weights in {source.path} ({name} differs): leave it out"
            )
    return config


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
    if source and theirs and ours and theirs["fingerprint"] not in task.known_fingerprints():
        name = ours["name"] + (" of another text" if ours["name"] == theirs["name"] else "")
        raise ValueError(
            f"{source.path} was trained with tokenizer {theirs['name']} and {task.where} was made "
            f"with {name}: prepare the text with the former"
        )


def check_memory(plan: TrainPlan) -> dict[str, int]:
    """Return the estimated memory in bytes, by part.

    Raise ValueError if weights, gradients and optimizer state alone exceed the device's memory.
    """
    on_gpu = plan.device.type == "cuda"
    needed = needed_bytes(plan, placement_of(plan))
    # Gradients are as large as the weights, even where they do not exist at the step's peak.
    fixed = needed["weights"] + needed["optimizer state"] + plan.task.gradient_bytes(needed)
    memory = memory_bytes(plan.device)
    # Ranks on one machine share its memory, if it is not a GPU's.
    sharing = 1 if on_gpu else plan.ranks.local_world
    if memory and fixed * sharing > memory[1]:
        preset = _fitting_preset(memory[1]) if on_gpu else "nano"
        each = f" on each of {sharing} ranks" if sharing > 1 else ""
        raise ValueError(
            f"{human_count(total_parameters(plan.model_config))} parameters need "
            f"{human_bytes(fixed)} for weights, gradients and optimizer state{each}, and "
            f"{device_name(plan.device)} has {human_bytes(memory[1])}: choose a smaller model, "
            f"e.g. --preset {preset}"
        )
    return needed


def needed_bytes(plan: TrainPlan, placement: Placement | None) -> dict[str, int]:
    """Return the estimated memory of a plan's rank in bytes, by part; None: of one process."""
    rows = plan.config.batch_size * plan.task.rows_per_sample
    needed = training_memory_bytes(
        plan.model_config,
        dataclasses.replace(plan.config, batch_size=rows),
        plan.dtype.itemsize,
        plan.device.type == "cuda",
        plan.loss_rows,
        placement,
    )
    needed = plan.task.needed_bytes(needed, plan.model_config)
    if placement and "frozen weights" in needed:
        # A task knows its adapters as a whole.
        own = ("weights", "gradients", "optimizer state")
        needed |= {name: needed[name] // placement.sharding for name in own}
        # Adapters are merged into the whole weights below.
        needed.pop("merged weights", None)
    if placement and plan.task.gathers_weights:
        # When a step's own memory is free again.
        of_a_step = sum(size for name, size in needed.items() if name not in KEPT_BETWEEN_STEPS)
        whole = 4 * total_parameters(plan.model_config)
        needed["whole weights for a score"] = max(whole - of_a_step, 0)
    return needed


def placement_of(plan: TrainPlan) -> Placement | None:
    """Return how a plan's ranks share the model; None in one process."""
    ranks, config = plan.ranks, plan.config
    if ranks.world == 1:
        return None
    return Placement(
        ranks.world,
        # Nodes of unequal sizes are one, to a model that is sharded over all of them.
        ranks.world if ranks.world % ranks.local_world else ranks.local_world,
        plan.model_config.num_experts,
        config.expert_parallel,
        config.shard,
        plan.device.type == "cuda" and plan.dtype.itemsize == 2 and not config.compile,
    )


def _fitting_preset(total_bytes: int) -> str:
    """Return the name of the largest preset whose training fits, or nano."""
    cost = {}
    for name, preset in PRESETS.items():
        parts = training_memory_bytes(
            ModelConfig(**preset.model), TrainConfig(**preset.train), 2, on_gpu=True
        )
        cost[name] = sum(parts.values())
    fitting = (name for name in cost if cost[name] < 0.95 * total_bytes)
    return max(fitting, key=cost.__getitem__, default="nano")


def with_loss_rows(plan: TrainPlan) -> TrainPlan:
    """Return the plan with as many rows of logits at a time as its GPU has memory for.

    A deterministic run keeps the default, because the number of rows changes the bits.
    """
    if plan.device.type != "cuda" or plan.config.deterministic:
        return plan
    needed = check_memory(dataclasses.replace(plan, loss_rows=0))
    memory = memory_bytes(plan.device)
    assert memory is not None, "CUDA reports its memory"
    spare = memory[0] - sum(needed.values())
    return dataclasses.replace(plan, loss_rows=loss_chunk_rows(plan.model_config, True, spare))


def with_largest_micro_batch(plan: TrainPlan, runs: Callable[[TrainPlan], bool]) -> TrainPlan:
    """Return the plan with the largest micro-batch that fits; the sequences per step stay the same.

    runs(plan): whether one step of it fits on the GPU. A CPU goes by the estimate and 80 % of the
    free memory. A GPU tries, the largest whose estimate fits first, and uncompiled: compiling takes
    a minute and then needs less. So do not several ranks, because one that runs out of memory
    leaves the others waiting: they go by their estimates, each of which must fit. Raise ValueError
    if not one sequence fits.
    """
    ranks = plan.ranks
    sequences = plan.config.batch_size * plan.config.grad_accum
    sizes = [b for b in range(sequences, 0, -1) if sequences % (b * ranks.world) == 0]
    plans = [_with_micro_batch(plan, b) for b in sizes]
    memory = memory_bytes(plan.device)
    if memory is None:
        raise ValueError(
            f"the memory of {device_name(plan.device)} is not known: give --batch_size instead of "
            "--micro_batch auto"
        )
    on_gpu = plan.device.type == "cuda"
    tries = on_gpu and ranks.world == 1
    # The ranks on a machine share its memory, if it is not a GPU's.
    free = memory[0] if on_gpu else memory[0] // ranks.local_world
    for candidate in plans:
        estimate = _estimate(candidate)
        likely = estimate <= free or candidate is plans[-1] if tries else estimate < 0.8 * free
        if ranks.any(not likely):
            continue
        if not tries or runs(candidate):
            c = candidate.config
            note = (
                f"micro-batch {c.batch_size} x {c.grad_accum} is the largest that fits, "
                f"of {sequences} sequences a step"
            )
            chosen = ranks.together(functools.partial(with_loss_rows, candidate))
            return dataclasses.replace(chosen, notes=[*plan.notes, note])
    raise ValueError(
        f"not even one sequence of {plan.model_config.context_length} tokens fits "
        f"{device_name(plan.device)}, which has {human_bytes(free)} free and needs about "
        f"{human_bytes(estimate)}: lower --context_length, take --activation_checkpointing, or a "
        "smaller model"
    )


def _estimate(plan: TrainPlan) -> int:
    """Return the bytes that a plan needs more than this process holds, by estimate."""
    needed = plan.ranks.together(lambda: check_memory(plan))
    # The program already holds its share of a CPU's memory.
    return sum(needed.values()) - needed["program"]


def _with_micro_batch(plan: TrainPlan, batch_size: int) -> TrainPlan:
    """Return the plan with micro-batches of this size, and the same sequences."""
    config = plan.config
    changed = dataclasses.replace(
        config,
        batch_size=batch_size,
        grad_accum=config.batch_size * config.grad_accum // batch_size,
        micro_batch="batch_size",
    )
    changed = with_validation_of(changed, config.batch_size)
    return dataclasses.replace(plan, loss_rows=0, config=changed)


def describe(plan: TrainPlan, needed: dict[str, int]) -> list[str]:
    """Return the lines printed before step 1."""
    lines = [
        *_resume_lines(plan),
        *_model_lines(plan),
        *_ranks_lines(plan),
        *plan.task.describe(plan.model_config, plan.config),
    ]
    memory = memory_bytes(plan.device)
    parts = ", ".join(f"{name} {human_bytes(size)}" for name, size in needed.items() if size)
    each = " on each rank" if plan.ranks.world > 1 else ""
    lines.append(
        f"memory   about {human_bytes(sum(needed.values()))}{each} ({parts})"
        + (f"; {human_bytes(memory[0])} free" if memory else "")
    )
    return [*lines, _disk_line(plan), _device_line(plan)]


def _resume_lines(plan: TrainPlan) -> list[str]:
    """Return a line for each setting of a resumed run that changes its numbers but not its data."""
    if not plan.config.resume:
        return []
    assert plan.source is not None
    config, model, before, lines = plan.config, plan.model_config, plan.source.train_config, []
    if config.batch_size != before["batch_size"]:
        own = (
            (model.aux_loss_coef, "load-balance loss"),
            (model.capacity_factor, "capacity"),
            (model.dropout, "dropout"),
        )
        parts = [name for is_on, name in own if is_on]
        verb = "are" if len(parts) > 1 else "is"
        lines.append(
            f"batch    {config.batch_size} x {config.grad_accum} sequences a step instead of "
            f"{before['batch_size']} x {before['grad_accum']}: the same sequences, order and "
            "schedule" + (f"; {' and '.join(parts)} {verb} per micro-batch" if parts else "")
        )
    if config.dtype != before["dtype"]:
        lines.append(f"dtype    {config.dtype} instead of {before['dtype']}")
    if plan.ranks.world != plan.source.world:
        lines.append(
            f"ranks    {plan.ranks.world} instead of {plan.source.world}: the same data, order, "
            "dropout and schedule; sums are rounded otherwise"
        )
    return lines


def schedule_notes(
    plan: TrainPlan, learning_rate: Callable[[int, TrainConfig], float]
) -> list[str]:
    """Return a line about the learning rate where a resumed run has another max_steps."""
    if not plan.config.resume:
        return []
    assert plan.source is not None
    config = plan.config
    before = type(config)(**plan.source.train_config)
    if config.max_steps == before.max_steps:
        return []
    step = plan.source.step
    return [
        f"max_steps {before.max_steps:,} -> {config.max_steps:,}: the learning rate continues at "
        f"{learning_rate(step, config):.3g} (before: {learning_rate(step - 1, before):.3g})"
    ]


def _model_lines(plan: TrainPlan) -> list[str]:
    table = parameter_counts(plan.model_config)["attention bias table"]
    real = known.counts(plan.model_config)
    model = (
        f"model    {human_count(real.total)} parameters, "
        f"{human_count(real.active)} active per token"
    )
    if table > 0.1 * real.total:
        model += (
            f" ({human_count(real.total - table)} + {human_count(table)} learned attention bias; "
            "see --preset gptoss-modern)"
        )
    notes = [real.note]
    if plan.source is None:
        notes += [known.initial_note(plan.model_config), _vocabulary_note(plan.model_config)]
    return [model, *(f"note     {line}" for line in notes if line)]


def _vocabulary_note(config: ModelConfig) -> str:
    """Return what to type where most parameters belong to the vocabulary, else ""."""
    if not vocabulary_is_too_large(config):
        return ""
    size, total = vocabulary_parameters(config), total_parameters(config)
    return (
        f"{human_count(size)} of {human_count(total)} parameters are the embedding of "
        f"{config.vocabulary_size:,} ids: for a model of this size, prepare the text with "
        f"--tokenizer bpe:{fitting_vocabulary(config)}"
    )


def _ranks_lines(plan: TrainPlan) -> list[str]:
    """Return how the ranks of a run share the model, and what a step moves between them."""
    placement = placement_of(plan)
    if placement is None:
        return []
    given = (plan.model_config, plan.config, placement, plan.dtype.itemsize)
    return [ranks_line(*given)]


def _disk_line(plan: TrainPlan) -> str:
    config, size = plan.config, human_bytes(saved_bytes(plan))
    if config.keep_last:
        kept = f"{config.keep_last} and the best"
    else:
        kept = f"{max(config.max_steps // config.save_interval, 1)}"
    return (
        f"disk     {size} a checkpoint in {config.ckpt_dir}; {kept} are kept, "
        "and one more is written before an old one goes"
    )


def _device_line(plan: TrainPlan) -> str:
    config = plan.config
    parts = [config.optimizer]
    for name in ("document_mask", "activation_checkpointing", "deterministic"):
        if getattr(config, name):
            parts.append(name.replace("_", " "))
    compiled = ", compiled" if config.compile else ""
    return f"device   {device_name(plan.device)}, {config.dtype}{compiled}; {', '.join(parts)}"


def checkpoint_bytes(needed: dict[str, int]) -> int:
    """Return a checkpoint's bytes by a memory estimate: the weights and the optimizer's state."""
    return needed["weights"] + needed["optimizer state"]


def saved_bytes(plan: TrainPlan) -> int:
    """Return the bytes of a plan's checkpoint, which holds what all ranks hold."""
    return checkpoint_bytes(needed_bytes(plan, None))


def initial_state(plan: TrainPlan) -> RunState:
    """Return the state a run starts in: step 0, or the state of the checkpoint that it resumes."""
    if not plan.config.resume:
        ranks = plan.ranks
        # Ranks that are restarted before their first checkpoint begin the same run again.
        run_id = ranks.from_first(lambda: ranks.run_before or os.urandom(8).hex())
        ranks.began(run_id)
        return RunState(run_id=run_id, auto_dtype=plan.auto_dtype, muon_dtype=plan.muon_dtype)
    assert plan.source is not None
    state = saved_state(plan.source)
    # An average over other sequences cannot be compared with the old best.
    before = {name: plan.source.train_config[name] for name in ("batch_size", "val_steps")}
    if _validation(plan, plan.config) != _validation(
        plan, dataclasses.replace(plan.config, **before)
    ):
        state.best_val_loss, state.best_step = None, 0
    return state


def _validation(plan: TrainPlan, config: TrainConfig) -> object:
    """Return what a validation of a config averages over, to be compared with another's."""
    batches = plan.task.validation(plan.model_config, config)
    return getattr(batches, "windows", len(batches))
