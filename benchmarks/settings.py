"""The settings of post-training as a table: the defaults are those of the code."""

from __future__ import annotations

import dataclasses

from config_model import TrainConfig
from runtime.posttraining.policy import GrpoConfig
from runtime.posttraining.preference import DpoConfig
from runtime.posttraining.sft import SftConfig

COMMANDS: dict[str, type[TrainConfig]] = {"sft": SftConfig, "dpo": DpoConfig, "grpo": GrpoConfig}
# What the page says elsewhere.
LEFT_OUT = ("ckpt_dir", "graph_dir", "dataset", "data")


def settings_table() -> str:
    """Return a row for each setting that post-training adds, or gives another default."""
    before = {f.name: f.default for f in dataclasses.fields(TrainConfig)}
    fields = {name: _fields(config) for name, config in COMMANDS.items()}
    names = dict.fromkeys(
        name
        for own in fields.values()
        for name, f in own.items()
        if name not in LEFT_OUT and (name not in before or before[name] != f.default)
    )
    lines = [f"| setting | {' | '.join(COMMANDS)} | what it is |", "|---" * 5 + "|"]
    for name in names:
        found = {command: own[name] for command, own in fields.items() if name in own}
        cells = [_shown(found[c].default) if c in found else "" for c in COMMANDS]
        lines.append(f"| `--{name}` | {' | '.join(cells)} | {_meaning(found)} |")
    return "\n".join(lines)


def _meaning(found: dict[str, dataclasses.Field]) -> str:
    """Return the help text of a setting; where a command has its own, that one too."""
    texts = {f.metadata["help"]: command for command, f in reversed(found.items())}
    first, *others = reversed(texts)
    return "; ".join([first, *(f"{texts[other]}: {other}" for other in others)])


def _fields(config: type[TrainConfig]) -> dict[str, dataclasses.Field]:
    return {f.name: f for f in dataclasses.fields(config)}


def _shown(default: object) -> str:
    """Return a default as a flag takes it."""
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, int):
        return f"{default:,}"
    return f"{default:g}" if isinstance(default, float) else str(default) or "none"


TABLES = {"post-training settings": settings_table}
