"""The next command fits the vocabulary."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest

from config_model import ModelConfig, TrainConfig, parameter_counts
from runtime.data.advice import (
    fitting_vocabulary,
    next_command,
    vocabulary_is_too_large,
    vocabulary_parameters,
)
from tests.builders_runs import settings_of
from tests.conftest import REPO


@pytest.mark.parametrize(
    "vocabulary_size, preset, for_a_laptop",
    [
        (257, "nano", False),
        (4096, "nano", False),
        (16_384, "nano", False),
        (50_257, "modern-8gb", True),
        (200_019, "modern-8gb", True),
        (1_000_000, "modern-24gb", True),
    ],
)
def test_the_next_command_fits_the_vocabulary(vocabulary_size, preset, for_a_laptop):
    """prepare_data.py named nano for a vocabulary of 200,019, which makes it 29 M parameters."""
    line = next_command(vocabulary_size, "my data")
    words = shlex.split(line.split(" (")[0])
    assert words[:4] == ["python", "train.py", "--data_dir", "my data"]
    settings = settings_of(*words[2:])
    assert settings.preset == preset
    assert settings.build(TrainConfig).data_dir == "my data"
    assert ("for a laptop, prepare the text with --tokenizer bpe:4096" in line) == for_a_laptop
    assert f"--preset {'nano' if for_a_laptop else 'modern-24gb'}" not in line or not for_a_laptop


@pytest.mark.parametrize("preset", ["nano", "gpt-oss-nano", "modern-8gb", "modern-24gb"])
def test_a_proposed_vocabulary_is_a_fifth_of_the_model_or_less(preset):
    config = settings_of("--preset", preset, "--vocabulary_size", "200019").build(ModelConfig)
    size = fitting_vocabulary(config)
    small = settings_of("--preset", preset, "--vocabulary_size", str(size)).build(ModelConfig)
    assert size & (size - 1) == 0 and not vocabulary_is_too_large(small)
    total = sum(parameter_counts(small).values())
    assert 0.09 < vocabulary_parameters(small) / total <= 0.2


def test_a_byte_vocabulary_is_never_too_large():
    """A tiny model is mostly embedding with 257 ids too, and no vocabulary is smaller."""
    flags = ["--d_model", "8", "--num_heads", "2", "--num_kv_heads", "1", "--num_experts", "2"]
    flags += ["--transformer_blocks", "1", "--d_ff", "8", "--context_length", "8"]
    config = settings_of(*flags, "--vocabulary_size", "257").build(ModelConfig)
    assert vocabulary_parameters(config) > sum(parameter_counts(config).values()) / 2
    assert not vocabulary_is_too_large(config)


def test_no_torch_is_imported():
    code = "import sys, runtime.data.advice; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0
