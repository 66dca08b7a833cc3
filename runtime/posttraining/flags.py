"""The command line of every training after pre-training."""

from __future__ import annotations

import dataclasses

from config_model import ModelConfig
from runtime.base import cli
from runtime.posttraining.config import MODEL_FLAGS, NOT_HERE, PostTrainConfig


def settings_of(
    description: str | None, argv: list[str] | None, config_class: type[PostTrainConfig]
) -> cli.Settings:
    """Return what the user asked for: the config's flags, and the model's that may still change."""
    parser = cli.parser(
        description or "", "Settings: a flag beats --config, which beats the default."
    )
    cli.add_config_file(parser)
    cli.add_fields(parser.add_argument_group("model"), ModelConfig, only=MODEL_FLAGS)
    group = parser.add_argument_group(config_class.__name__, config_class.__doc__)
    names = [f.name for f in dataclasses.fields(config_class) if f.name not in NOT_HERE]
    cli.add_fields(group, config_class, names)
    return cli.settings_from(parser.parse_args(argv), ModelConfig, config_class)
