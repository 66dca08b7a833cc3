"""Which preset a vocabulary fits, and what to type next."""

from __future__ import annotations

import shlex

from config_model import PRESETS, ModelConfig, parameter_counts

# From small to large: the preset, and what it is for.
LADDER = (
    ("nano", "a laptop"),
    ("modern-8gb --compile", "a GPU with 8 GB"),
    ("modern-24gb --compile", "a GPU with 24 GB"),
)
# Of all parameters. Above it most of the model is a table, of which a token uses one row.
LARGEST_SHARE = 0.5
# No smaller vocabulary is proposed.
FEWEST_IDS = 512


def vocabulary_parameters(config: ModelConfig) -> int:
    """Return the parameters of the embedding and the output head."""
    counts = parameter_counts(config)
    return counts["embedding"] + counts["head"]


def fitting_vocabulary(config: ModelConfig) -> int:
    """Return a vocabulary size, a power of two, whose parameters are a fifth or less of all."""
    each = vocabulary_parameters(config) // config.vocabulary_size
    others = sum(parameter_counts(config).values()) - vocabulary_parameters(config)
    most = max(others // (4 * each), FEWEST_IDS)
    return 1 << (most.bit_length() - 1)


def vocabulary_is_too_large(config: ModelConfig) -> bool:
    """Return whether most parameters belong to the vocabulary, and a smaller one would help."""
    share = vocabulary_parameters(config) / sum(parameter_counts(config).values())
    return share > LARGEST_SHARE and config.vocabulary_size >= 2 * fitting_vocabulary(config)


def next_command(vocabulary_size: int, out_dir: str) -> str:
    """Return the command that trains on a prepared set, with presets that fit its vocabulary.

    It comes with what each preset is for, and with what a laptop needs if nothing fits it.
    """
    fitting = [
        (preset, use)
        for preset, use in LADDER
        if not vocabulary_is_too_large(_config(preset, vocabulary_size))
    ]
    # No vocabulary is too large for the largest one.
    (first, use), *others = fitting or LADDER[-1:]
    line = f"python train.py --data_dir {shlex.quote(str(out_dir))} --preset {first} ({use}"
    line += "".join(f"; --preset {preset}: {use}" for preset, use in others[:1]) + ")"
    if first != "nano":
        ids = fitting_vocabulary(_config("nano", vocabulary_size))
        line += f"; for a laptop, prepare the text with --tokenizer bpe:{ids}"
    return line


def _config(preset: str, vocabulary_size: int) -> ModelConfig:
    model = PRESETS[preset.split()[0]].model
    return ModelConfig(**model | {"vocabulary_size": vocabulary_size})
