"""What the README says is checked where it can be: tables, flags, files."""

import importlib
import re

import pytest

import test as size_report
from benchmarks import tables
from config_model import ModelConfig, PredictConfig, TrainConfig
from prepare_data import parse_options
from runtime.base import cli
from tests.conftest import REPO
from tests.mutants import MUTANTS, names

README = (REPO / "README.md").read_text()
COMMANDS = re.findall(r"^(?:python3?|make) .*$", README, re.MULTILINE)


def between(name: str) -> str:
    return (
        re.search(rf"<!-- {name}\b.*?-->\n(.*?)<!-- /{name} -->", README, re.DOTALL)
        .group(1)
        .strip()
    )


def test_the_preset_table_is_computed():
    """Paste the output of `python test.py --presets` if this fails."""
    assert between("presets") == "\n".join(size_report.preset_table())


def test_the_speeds_are_the_stored_ones():
    """Run `python -m benchmarks.tables` if this fails."""
    assert (
        between("training speed") == tables.training_table()
        and between("allocator") == tables.allocator_line()
        and between("sinks") == tables.sinks_line()
    )
    assert (
        between("speed") == tables.speed_table()
        and between("decoding") == tables.decoding_table()
        and between("launch") == tables.launch_line()
    )
    assert between("reliability") == tables.reliability_table()
    assert (
        between("exports") == tables.exports_table()
        and between("export sizes") == tables.export_sizes_table()
        and between("llama.cpp") == tables.llama_cpp_table()
    )


def test_the_mutants_it_counts_are_those_there_are():
    """The README said 203 of 203 when there were 217: the stored run was of an older list."""
    result = tables.stored("mutants")
    tried = [(one["id"], one["what"]) for one in result["mutants"] if one["caught"]]
    stale = (
        "run `python -m tests.mutants`, then `python -m benchmarks.tables`: "
        "benchmarks/results/mutants.json or README.md is of another list of mutants"
    )
    assert result["made"] == result["caught"] == len(MUTANTS), stale
    assert tried == [(name, one.what) for name, one in zip(names(), MUTANTS, strict=True)], stale
    counts = re.findall(r"Mutants: (\d+) of (\d+) caught", README)
    assert counts == [(str(len(MUTANTS)), str(len(MUTANTS)))], stale


def test_every_picture_and_file_it_names_is_there():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (REPO / target).exists(), target
    for name in re.findall(r"^(\w+\.py|\w+/) ", README, re.MULTILINE):
        assert (REPO / name).exists(), name


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python ")])
def test_every_command_it_shows_is_understood(command, tmp_path, monkeypatch, capsys):
    """Flags and values are parsed by the script's own parser (nothing is run); the text files that it names are made."""
    monkeypatch.chdir(tmp_path)
    for name in re.findall(r"\S+\.(?:jsonl|txt\.gz)\b", command):
        (tmp_path / name).touch()
    words = re.sub(r"\s+#.*", "", command).replace('"', "").split()
    script, flags = (words[2], words[3:]) if words[1] == "-m" else (words[1], words[2:])
    assert (REPO / (script.replace(".", "/") + ".py" if words[1] == "-m" else script)).exists()
    if script == "prepare_data.py":
        parse_options(flags)
    elif script == "train.py":
        parser = cli.parser("")
        cli.add_config_flags(parser, ModelConfig, TrainConfig)
        settings = cli.settings_from(parser.parse_args(flags), ModelConfig, TrainConfig)
        settings.build(ModelConfig)
        settings.build(TrainConfig)
    elif script == "predict.py":
        parser = cli.parser("")
        parser.add_argument("--prompt")
        cli.add_fields(parser, PredictConfig)
        given = vars(
            parser.parse_args(re.findall(r"(?:\"[^\"]*\"|\S)+", re.sub(r"\s+#.*", "", command))[2:])
        )
        PredictConfig(**{k: v for k, v in given.items() if k != "prompt"})
    elif script.startswith("scripts."):
        with pytest.raises(SystemExit):
            importlib.import_module(script).main(["--help"])
        known = capsys.readouterr().out
        assert all(re.search(rf"{flag}\b", known) for flag in flags if flag.startswith("--"))


def test_the_defaults_it_lists_are_the_defaults():
    rows = re.findall(r"\| ([a-z_]+(?:, [a-z_]+)*) \| ([\d.,e -]+?)(?= \||  ?\(| experts)", README)
    assert len(rows) > 8
    for name, value in rows:
        values = [v.strip() for v in re.split(r", (?!\d{3}\b)", value)]
        for field, text in zip(name.split(", "), values, strict=True):
            owner = ModelConfig if hasattr(ModelConfig, field) else TrainConfig
            assert float(getattr(owner, field)) == float(text.replace(",", "")), field
