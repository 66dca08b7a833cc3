"""The command line of every training after pre-training."""

from __future__ import annotations

from config_model import ModelConfig
from runtime.base import cli
from runtime.posttraining.config import MODEL_FLAGS, PostTrainConfig


def settings_of(
    description: str | None, argv: list[str] | None, config_class: type[PostTrainConfig]
) -> cli.Settings:
    """Return what the user asked for: the config's flags, and the model's that may still change."""
    parser = cli.parser(
        description or "", "Settings: a flag beats --config, which beats the default."
    )
    cli.add_config_file(parser)
    cli.add_fields(parser.add_argument_group("model"), ModelConfig, only=MODEL_FLAGS)
    cli.add_fields(
        parser.add_argument_group(config_class.__name__, config_class.__doc__), config_class
    )
    return cli.settings_from(parser.parse_args(argv), ModelConfig, config_class)
