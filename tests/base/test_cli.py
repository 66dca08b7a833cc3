"""Command lines: every config field arrives as a flag and a TOML key; every mistake is one line."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest

import prepare_data
import train
from config_model import PRESETS, ModelConfig, TrainConfig, option
from runtime.base import cli
from tests.builders import NEEDS, as_flags, other_value
from tests.conftest import REPO
from tests.nightly import nightly_but

OWNERS = {"model": ModelConfig, "train": TrainConfig}
FIELDS = [(table, f.name) for table, owner in OWNERS.items() for f in dataclasses.fields(owner)]


def as_toml(values: dict) -> str:
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())


def settings(*argv: str, classes=(ModelConfig, TrainConfig)) -> cli.Settings:
    parser = cli.parser("test")
    cli.add_config_flags(parser, *classes)
    return cli.settings_from(parser.parse_args(argv), *classes)


@pytest.fixture
def toml(tmp_path):
    """Writes a TOML file and gives the flags that read it."""

    def write(text: str | bytes) -> list[str]:
        path = tmp_path / "run.toml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return ["--config", str(path)]

    return write


def test_no_name_is_a_field_of_two_configs():
    """Flags and flat TOML keys have no prefix, so one name must mean one thing."""
    assert len({name for _, name in FIELDS}) == len(FIELDS)


# ------------------------------------------------------------------------------------ values arrive
def test_every_field_has_help_with_text():
    for owner in OWNERS.values():
        for f in dataclasses.fields(owner):
            assert len(f.metadata["help"]) > 5, f.name


@pytest.mark.parametrize(("table", "name"), FIELDS)
def test_every_field_is_a_flag_that_reaches_the_config(monkeypatch, table, name):
    """Through train.py's own main: what its plan is made from."""
    seen = []
    monkeypatch.setattr(train, "make_plan", lambda settings, *_: seen.append(settings))
    monkeypatch.setattr(train, "run", lambda plan: 0)
    owner, value = OWNERS[table], other_value(OWNERS[table], name)
    assert train.main(as_flags(NEEDS.get(name, {}) | {name: value})) == 0
    built = getattr(seen[0].build(owner), name)
    assert built == value and type(built) is type(value) and name in seen[0].explicit
    others = (
        {f.name: f.default for f in dataclasses.fields(owner)} | NEEDS.get(name, {}) | {name: value}
    )
    # And nothing else changed.
    assert dataclasses.asdict(seen[0].build(owner)) == {
        k: v for k, v in others.items() if hasattr(owner, k)
    }


@pytest.mark.parametrize(("table", "name"), FIELDS)
def test_every_field_is_a_toml_key_in_its_table_and_without(toml, table, name):
    owner, value = OWNERS[table], other_value(OWNERS[table], name)
    needs = {
        t: {k: v for k, v in NEEDS.get(name, {}).items() if hasattr(o, k)}
        for t, o in OWNERS.items()
    }
    tables = "".join(
        f"[{t}]\n{as_toml(needs[t] | ({name: value} if t == table else {}))}" for t in OWNERS
    )
    for text in (tables, as_toml(NEEDS.get(name, {}) | {name: value})):
        given = settings(*toml(text))
        built = getattr(given.build(owner), name)
        assert (
            built == value
            and type(built) is type(value)
            and given.explicit == {name, *NEEDS.get(name, {})}
        )


@pytest.mark.parametrize(("table", "name"), FIELDS)
def test_a_flag_beats_the_file_beats_the_preset_beats_the_default(toml, monkeypatch, table, name):
    owner, needs = OWNERS[table], NEEDS.get(name, {})
    default = next(f.default for f in dataclasses.fields(owner) if f.name == name)
    in_preset = other_value(owner, name)
    in_file = (
        default
        if isinstance(default, bool)
        else other_value(owner, name, [in_preset])
        if not isinstance(default, str)
        else default
    )
    on_flag = (
        in_preset
        if isinstance(default, (bool, str))
        else other_value(owner, name, [in_preset, in_file])
    )
    preset = dataclasses.replace(PRESETS["nano"], model={}, train={})
    getattr(preset, table)[name] = in_preset
    monkeypatch.setitem(PRESETS, "nano", preset)
    chosen, file, extra = ["--preset", "nano"], toml(as_toml({name: in_file})), as_flags(needs)

    def built(*argv):
        return getattr(settings(*argv, *extra).build(owner), name)

    assert built() == default
    assert built(*chosen) == in_preset != default
    assert built(*chosen, *file) == in_file != in_preset
    assert built(*chosen, *file, *as_flags({name: on_flag})) == on_flag != in_file
    # The order on the line does not count.
    assert built(*as_flags({name: on_flag}), *file, *chosen) == on_flag


def test_presets_reach_both_configs_and_are_not_explicit():
    for name, preset in PRESETS.items():
        given = settings("--preset", name)
        assert dataclasses.asdict(given.build(ModelConfig)) == dataclasses.asdict(
            ModelConfig(**preset.model)
        )
        assert dataclasses.asdict(given.build(TrainConfig)) == dataclasses.asdict(
            TrainConfig(**preset.train)
        )
        assert given.explicit == set()
    assert (
        settings().build(ModelConfig) == ModelConfig()
        and settings().build(TrainConfig) == TrainConfig()
    )


def test_a_flag_with_the_default_value_is_explicit():
    """--resume must know what was said, also where it is what would have been anyway."""
    assert settings("--lr", "0.0003").explicit == {"lr"}
    assert settings("--no-resume").explicit == {"resume"}


def test_a_script_with_one_config_ignores_the_other_half_of_a_preset_only(toml):
    given = settings("--preset", "nano", classes=(ModelConfig,))
    assert given.build(ModelConfig).d_model == 128 and "batch_size" not in given.values
    with pytest.raises(ValueError, match="unknown keys: lr"):
        settings(*toml("[train]\nlr = 1.0"), classes=(ModelConfig,))


def test_the_config_checks_what_was_given():
    with pytest.raises(ValueError, match="d_model must be at least 1"):
        settings("--d_model", "0").build(ModelConfig)


# ----------------------------------------------------------------------------------------- mistakes
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--d_mode", "64"],
            "unrecognized arguments: --d_mode 64",
            # A short form of d_model: would change its meaning with the next new field.
        ),
        (["--res"], "unrecognized arguments: --res"),
        (["--pre", "nano"], "unrecognized arguments: --pre nano"),
        (["extra"], "unrecognized arguments: extra"),
        (["--d_model"], "argument --d_model: expected one argument"),
        (["--d_model", "x"], "argument --d_model: invalid int value: 'x'"),
        (["--d_model", "64.0"], "invalid int value: '64.0'"),
        (["--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
        (
            ["--schedule", "linear"],
            "argument --schedule: invalid choice: 'linear' .choose from 'cosine', 'wsd', "
            "'constant'",
        ),
        (
            ["--preset", "huge"],
            "argument --preset: invalid choice: 'huge' .choose from 'gpt-oss-20b', "
            "'gpt-oss-nano', 'gptoss', 'gptoss-modern', 'modern-24gb', 'modern-8gb', 'nano'",
        ),
        (["--use_rope=no"], "argument --use_rope/--no-use_rope: ignored explicit argument 'no'"),
        (["--lr", "nan"], "lr must be a finite number"),
        (["--grad_clip", "-1"], "grad_clip must be at least 0"),
        (["--seed", str(2**63)], "seed must be at most"),
    ],
)
def test_wrong_flags_are_one_line(argv, message):
    """argparse's own way was to print all 60 flags before the line that says what is wrong."""
    with pytest.raises(ValueError, match=message) as error:
        given = settings(*argv)
        given.build(ModelConfig), given.build(TrainConfig)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        (["--d_modle", "4"], "--d_model"),
        (["--d_modle=4"], "--d_model"),
        (["--d-model", "4"], "--d_model"),
        (["-preset", "nano"], "--preset"),
        (["--res"], "--resume"),
        (["--num_expert", "4", "--d_mode", "3"], "--num_experts and --d_model"),
        (["--no-compil"], "--no-compile"),
        (["--preset", "nanoo"], "nano"),
        (["--preset", "gpt_oss_nano"], "gpt-oss-nano"),
        (["--schedule", "cosin"], "cosine"),
        (["--dtype", "bf16"], "bfloat16"),
    ],
)
def test_a_misspelt_flag_or_value_says_what_was_meant(argv, meant):
    """`--d_modle` was only "unrecognized": with 70 flags, the right one had to be looked for."""
    with pytest.raises(ValueError, match=f"; did you mean {meant}\\?") as error:
        settings(*argv)
    assert "\n" not in str(error.value) and str(error.value).endswith("(--help lists the flags)")


@pytest.mark.parametrize(
    "argv",
    [["--zzzzz"], ["extra"], ["--preset", "zzzzz"], ["--device", "--lr"], ["--", "--d_mode"]],
)
def test_nothing_is_suggested_that_is_not_close(argv):
    with pytest.raises(ValueError) as error:
        settings(*argv)
    assert "did you mean" not in str(error.value)


def test_a_required_flag_that_is_misspelt_is_not_only_missing():
    """argparse says `--out is required` and not that `--otu` was given."""
    parser = cli.parser("test")
    parser.add_argument("--out", required=True)
    with pytest.raises(
        ValueError, match="required: --out; unrecognized: --otu; did you mean --out"
    ):
        parser.parse_args(["--otu", "x"])
    with pytest.raises(ValueError, match="required: --out .--help"):
        parser.parse_args([])


def test_a_misspelt_key_of_a_file_says_what_was_meant(toml):
    for text in ("d_modle = 64", "[model]\nd_modle = 64"):
        with pytest.raises(ValueError, match="did you mean d_model"):
            settings(*toml(text))


# ------------------------------------------------------------------------------------ a run's name
@pytest.mark.parametrize(
    ("argv", "folders"),
    [
        ([], ("checkpoints", "artifacts/graphs")),
        (["--run_name", "muon"], ("checkpoints/muon", "artifacts/graphs/muon")),
        (
            ["--run_name", "lr=3e-4_v1.2", "--ckpt_dir", "c"],
            ("c/lr=3e-4_v1.2", "artifacts/graphs/lr=3e-4_v1.2"),
        ),
        # The folder that train.py prints is found with the name and without it.
        (["--run_name", "muon", "--ckpt_dir", "c/muon/"], ("c/muon/", "artifacts/graphs/muon")),
    ],
)
def test_a_run_with_a_name_has_its_own_folders(argv, folders):
    config = settings(*argv).build(TrainConfig)
    assert (config.ckpt_dir, config.graph_dir) == folders
    assert config.run_name == (argv[1] if argv else "")


@pytest.mark.parametrize(
    "name", ["a/b", "..", ".", "/", "-x", "a b", "x.pt", "a\0", "$x$", ".hidden"]
)
def test_a_name_that_is_no_folder_of_its_own_is_refused(name, toml):
    """`--run_name ..` would put the run next to others, latest.pt in a checkpoint's place."""
    with pytest.raises(ValueError, match="run_name .* cannot be the name of the run's folder: use"):
        settings(*toml(as_toml({"run_name": name})))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("d_mode = 64", "unknown keys: d_mode; see --help"),
        (
            "[model]\nd_model = 64\nlr = 0.1\nzzz = 1",
            r"unknown keys in \[model\]: lr, zzz; see --help",
        ),
        ("[train]\nd_model = 64", r"unknown keys in \[train\]: d_model"),
        ("[data]\npath = 'x'", r"unknown table \[data\]: only \[model\] and \[train\] are read"),
        ("[[model]]\nd_model = 1", "unknown keys: model"),
        ("preset = 'nano'", "names a preset: give it on the command line"),
        ("config = 'x.toml'", "unknown keys: config"),
        (
            "d_model = 64\n[model]\nd_model = 128",
            r"gives d_model twice: in \[model\] and outside of it",
        ),
        ("d_model = '64'", "d_model must be of type int, not '64' .str"),
        ("d_model = 64.0", "d_model must be of type int, not 64.0 .float"),
        ("d_model = true", "d_model must be of type int, not True .bool"),
        ("lr = '3e-4'", "lr must be of type float"),
        ("lr = nan", "lr must be a finite number"),
        ("lr = [1, 2]", "lr must be of type float, not .1, 2. .list"),
        ("use_rope = 1", "use_rope must be of type bool, not 1 .int"),
        ("data_dir = 2020-01-01", "data_dir must be of type str"),
        ("[model.d_model]\nx = 1", "d_model must be of type int, not {'x': 1} .dict"),
        (
            "schedule = 'linear'",
            "schedule must be one of 'cosine', 'wsd', 'constant', not 'linear'",
        ),
        ("d_model = ", "is not valid TOML"),
        ("d_model = 1\nd_model = 2", "is not valid TOML"),
        (b"\xff\xfe\x00", "is not valid TOML"),
        (b"PK\x03\x04\x00", "is not valid TOML"),
    ],
)
def test_wrong_toml_files_are_one_line(toml, text, message):
    with pytest.raises(ValueError, match=message) as error:
        given = settings(*toml(text))
        given.build(ModelConfig), given.build(TrainConfig)
    assert "\n" not in str(error.value)


def test_a_key_given_twice_is_refused(toml):
    """Reject a key that stands outside the tables and again in one.

    The table's value won silently, although the other was nearer the top.
    """
    with pytest.raises(ValueError, match="lr, seed twice"):
        settings(*toml("seed = 1\nlr = 0.1\n[train]\nlr = 0.2\nseed = 2\n"))


def test_integers_are_good_floats_in_toml(toml):
    assert settings(*toml("grad_clip = 2")).build(TrainConfig).grad_clip == 2.0


def test_files_that_cannot_be_read_are_one_line(tmp_path, toml):
    with pytest.raises(ValueError, match=r"cannot read --config .*nowhere.toml: No such file"):
        settings("--config", str(tmp_path / "nowhere.toml"))
    with pytest.raises(ValueError, match="cannot read --config .*: Is a directory"):
        settings("--config", str(tmp_path))
    with pytest.raises(ValueError, match="cannot read --config .*: Not a directory"):
        settings("--config", toml("")[1] + "/x.toml")
    # An unset shell variable was no file at all, silently.
    with pytest.raises(ValueError, match="cannot read --config : No such file"):
        settings("--config", "")
    assert settings(*toml("")).explicit == set()


# --------------------------------------------------------------------------------------------- help
@pytest.mark.parametrize("module", ["train", "predict", "test", "prepare_data"])
def test_help_of_every_script_names_every_flag_with_its_default(module, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    script = __import__(module)
    with pytest.raises(SystemExit) as end:
        script.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    classes = {"train": [ModelConfig, TrainConfig], "test": [ModelConfig], "prepare_data": []}.get(
        module
    ) or []
    if module == "predict":
        classes = [script.PredictConfig]
    for config_class in classes:
        for f in dataclasses.fields(config_class):
            assert f"--{f.name}" in text, f.name
            assert f"(default: {'none' if f.default == () else repr(f.default)})" in " ".join(
                text.split()
            ), f.name
    assert ("--preset" in text and "--config" in text) == (module in ("train", "test"))
    if module in ("train", "test"):
        assert all(name in text for name in PRESETS)


FIRST = {
    "train": ["--preset", "--run_name"],
    "predict": ["--prompt", "--json, --no-json"],
    "test": ["--preset", "--batch_size"],
    "prepare_data": ["--files", "--num_proc"],
}


def help_of(module: str, capsys, monkeypatch, width: int) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    with pytest.raises(SystemExit):
        __import__(module).main(["--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize("module", FIRST)
def test_help_begins_with_one_line_of_usage_and_the_ten_most_used_flags(
    module, capsys, monkeypatch
):
    """The usage alone was 40 lines long, and --max_steps was the 34th flag below it."""
    text = help_of(module, capsys, monkeypatch, 80)
    usage, empty, *_ = text.splitlines()
    assert usage.startswith("usage: ") and usage.endswith(" [flags]") and not empty
    flags = re.findall(r"^  (-\S.*?)(?: [A-Z{]|  |$)", text, re.MULTILINE)
    assert flags.index("-h, --help") == 10
    assert [flags[0], flags[9]] == FIRST[module]
    assert re.findall(r"^(\S.*):$", text, re.MULTILINE)[0] == "most used"
    # None is there twice, none has gone.
    assert len(flags) == len(set(flags))


@pytest.mark.parametrize("width", [60, 80, 130])
@pytest.mark.parametrize("module", FIRST)
def test_help_is_wrapped_at_the_terminals_width(module, width, capsys, monkeypatch):
    """Paragraphs had the source's width of 100 columns, so a terminal of 80 broke each twice."""
    text = help_of(module, capsys, monkeypatch, width)
    # Commands, which are indented by 2 to 8, may be copied: they are never cut.
    wide = [line for line in text.splitlines() if len(line) > width]
    assert [line for line in wide if not re.match(r" {2,8}\S", line)] == []
    assert width == 60 or not wide
    longest = max(len(line) for line in text.splitlines())
    assert longest > width - 20
    if module in ("train", "test"):
        assert re.findall(r"^ {26}(\S+): ", text, re.MULTILINE) == list(PRESETS)
    # What a command does stays next to it if there is room, and comes below it if not.
    if module == "train":
        assert ("--resume           continue the run" in text) == (width == 130)
        assert ("--resume\n        continue the run" in text) == (width != 130)


def test_percent_signs_in_help_texts_are_printed(monkeypatch, capsys):
    """Escape % in help texts: argparse formats help with %.

    One "10 %" in a preset's description would have ended --help in a traceback.
    """

    @dataclasses.dataclass(frozen=True)
    class Config:
        """100 % of it."""

        share: float = option(0.5, "10 % of %(prog)s, or 5%")
        name: str = option("50%", "a %d thing")
        fast: bool = option(False, "100 % faster")

    monkeypatch.setitem(
        PRESETS, "nano", dataclasses.replace(PRESETS["nano"], description="10 % smaller")
    )
    parser = cli.parser("About 90 %.", "And 5 % more.")
    cli.add_config_flags(parser, Config)
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for said in (
        "About 90 %.",
        "And 5 % more.",
        "100 % of it.",
        "10 % of %(prog)s, or 5% (default: 0.5)",
        "a %d thing (default: '50%')",
        "100 % faster (default: False)",
        "10 % smaller",
    ):
        assert said in text, said


def test_only_some_fields():
    parser = argparse.ArgumentParser()
    cli.add_fields(parser, TrainConfig, only=["batch_size"])
    assert (
        vars(parser.parse_args(["--batch_size", "3"])) == {"batch_size": 3}
        and vars(parser.parse_args([])) == {}
    )


def test_prepare_data_reports_a_wrong_flag_in_a_line():
    with pytest.raises(ValueError, match="unrecognized arguments: --tokeniser"):
        prepare_data.main(["--tokeniser", "byte"])


# ----------------------------------------------------------------------------------------- run_main
class Explained(ValueError):
    exit_code = 3


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (ValueError("d_model must be\n at least   1"), 2, "error: d_model must be at least 1\n"),
        (
            FileNotFoundError(2, "No such file or directory", "x.txt"),
            2,
            "error: [Errno 2] No such file or directory: 'x.txt'\n",
        ),
        (ImportError("pip install wandb"), 2, "error: pip install wandb\n"),
        (Explained("diverged"), 3, "error: diverged\n"),
        (KeyboardInterrupt(), 130, "\ninterrupted\n"),
        (ValueError(), 2, "error: ValueError\n"),
    ],
)
def test_run_main_makes_a_line_and_an_exit_code_of_an_exception(
    monkeypatch, capsys, raised, code, line
):
    def main(argv):
        print("before")
        raise raised

    monkeypatch.delenv("GPTOSS_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as end:
        cli.run_main(main)
    out, err = capsys.readouterr()
    assert end.value.code == code and out == "before\n" and err == line


def test_error_lines_do_not_write_to_the_terminal(monkeypatch, capsys):
    """Escape control characters in errors.

    prepare_data.py quotes column names of downloaded files; an ESC in one would have been carried
    out.
    """
    monkeypatch.delenv("GPTOSS_TRACEBACK", raising=False)

    def main(argv):
        raise ValueError("no column text; there are \x1b]0;gotcha\x07, \u202ex and é")

    with pytest.raises(SystemExit):
        cli.run_main(main)
    assert (
        capsys.readouterr().err
        == "error: no column text; there are \\x1b]0;gotcha\\x07, \\u202ex and é\n"
    )


@pytest.mark.parametrize(("value", "code"), [(None, None), (0, 0), (143, 143)])
def test_run_main_exits_with_what_main_returns(monkeypatch, value, code):
    monkeypatch.setattr(sys, "argv", ["script", "--a", "b"])
    seen = []
    with pytest.raises(SystemExit) as end:
        cli.run_main(lambda argv: seen.append(argv) or value)
    assert end.value.code == code and seen == [["--a", "b"]]


def test_bugs_keep_their_traceback(monkeypatch):
    def bug(argv):
        raise KeyError("bug")

    with pytest.raises(KeyError):
        cli.run_main(bug)
    monkeypatch.setenv("GPTOSS_TRACEBACK", "1")
    with pytest.raises(ValueError, match="wanted"):
        cli.run_main(lambda argv: int("wanted"))


@pytest.fixture
def script(tmp_path):
    """Start a program whose main has the given body.

    It imports nothing heavy, so a start takes a tenth of a second.
    """

    def start(
        body: str, *argv: str, shell: str = "{}", env: dict | None = None, unread: bool = False
    ) -> subprocess.CompletedProcess:
        path = tmp_path / "script.py"
        path.write_text(
            "import sys\nfrom config_model import ModelConfig, TrainConfig\n"
            "from runtime.base import cli\n\n\n"
            f"def main(argv):\n    {body}\n\n\n"
            "cli.run_main(main)\n"
        )
        words = " ".join([f"'{sys.executable}'", f"'{path}'", *argv])
        stdout = subprocess.PIPE
        # A pipe whose reader has left before the program starts.
        if unread:
            reader, stdout = os.pipe()
            os.close(reader)
        try:
            return subprocess.run(
                ["bash", "-c", "set -o pipefail; " + shell.format(words)],
                stdout=stdout,
                stderr=subprocess.PIPE,
                timeout=60,
                env=os.environ
                | {"PYTHONPATH": str(REPO), "PYTHONIOENCODING": "utf-8", "PYTHONUNBUFFERED": ""}
                | (env or {}),
            )
        finally:
            if unread:
                os.close(stdout)

    return start


def test_output_cut_short_by_head_is_no_error(script):
    """`| head` closes our output: the run ends quietly, with the exit code of SIGPIPE."""
    done = script("for i in range(100_000): print('line', i)", shell="{} | head -1")
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGPIPE, b"line 0\n", b"")
    done = script("print('one line, still in the buffer when main returns')", unread=True)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


def test_help_cut_short_is_no_error_either(script):
    """--help leaves main by SystemExit: its text was not flushed while we caught BrokenPipeError.

    Python then complained at exit.
    """
    done = script("cli.parser('A short help.').parse_args(argv)", "--help", unread=True)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")
    done = script(
        "p = cli.parser('A long one.'); cli.add_config_flags(p, ModelConfig, TrainConfig); "
        "p.parse_args(argv)",
        "--help",
        unread=True,
    )
    # Argparse drops the error when it writes more than a buffer.
    assert done.returncode in (0, 128 + signal.SIGPIPE) and done.stderr == b""


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_any_console_can_show_any_text(script, encoding):
    """T21: a tick mark on a Windows console ended the original implementation's training.

    It died at its first checkpoint.
    """
    done = script(
        r"print('\u2713 na\u00efve \U0001f600 \ud800'); raise ValueError('\u2713')",
        env={"PYTHONIOENCODING": encoding},
    )
    assert (done.returncode, done.stdout, done.stderr) == (
        2,
        "? naïve ? ?\n".encode(encoding, "replace"),
        b"error: ?\n",
    )


def test_closed_streams_are_no_error(script):
    """With `>&-` Python has no sys.stdout.

    Flushing it was an AttributeError, after the work was done.
    """
    done = script(
        "print('gone', file=sys.stdout); sys.stdin.read(); print(sys.stdout.isatty())",
        shell="{} <&- >&-",
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    done = script("print('shown'); raise ValueError('gone')", shell="{} 2>&-")
    assert (done.returncode, done.stdout, done.stderr) == (2, b"shown\n", b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_output_to_a_full_disk_is_one_line(script):
    """Python tried again at exit, with three more lines and an exit code of 120."""
    done = script("print('lost')", shell="{} > /dev/full")
    assert done.stderr == b"error: [Errno 28] No space left on device\n" and done.returncode == 2


def test_a_mistake_in_a_real_process_is_one_line_and_exit_2(script):
    for argv in (
        ["--d_mode", "3"],
        ["--d_model", "-3"],
        ["--config", "nowhere.toml"],
        ["--preset", "x"],
    ):
        body = (
            "p = cli.parser('x'); cli.add_config_flags(p, ModelConfig, TrainConfig); "
            "cli.settings_from(p.parse_args(argv), ModelConfig, TrainConfig).build(ModelConfig)"
        )
        done = script(body, *argv)
        assert (
            done.returncode == 2
            and done.stdout == b""
            and done.stderr.startswith(b"error: ")
            and done.stderr.count(b"\n") == 1
        ), done


@pytest.mark.slow
@pytest.mark.parametrize(
    "module, usage",
    [("scripts.export_hf", "usage: python -m scripts.export_hf"), ("train", "usage: train.py")],
)
def test_help_says_how_it_is_called(module, usage):
    """`usage: export_hf.py` does not say where it is."""
    done = subprocess.run(
        [sys.executable, *(["-m", module] if "." in module else [f"{module}.py"]), "--help"],
        cwd=REPO,
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith(usage)


# ---------------------------------------------------------------------------- a script by its path
SCRIPTS = sorted((REPO / "scripts").glob("[a-z]*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_can_be_run_by_its_path(path):
    """Its first lines make it find the repository: before them, it may import nothing of ours.

    A process that it starts runs it again as __mp_main__, without the folder of scripts: there the
    first lines ended the check of GGUF files in llama.cpp.
    """
    body = [
        node
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if not (isinstance(node, ast.ImportFrom) and node.module == "__future__")
    ]
    # The docstring comes first.
    first = "if __name__ == '__main__' and (not __package__):\n    import _by_path"
    assert ast.unparse(body[1]) == first, f"{path.name} must begin as the other scripts do"


def by_path(path, cwd, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(path), *flags]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("path", nightly_but(SCRIPTS, 0), ids=lambda path: path.stem)
def test_a_script_run_by_its_path_finds_the_repository(path, tmp_path):
    """`python scripts/export_hf.py` ended in `ModuleNotFoundError: No module named 'runtime'`."""
    done = by_path(path, tmp_path, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: python -m scripts.{path.stem} ")


def test_the_folder_of_scripts_hides_no_installed_package(tmp_path):
    """Python puts a script's folder first: scripts/evaluate.py would be `import evaluate`."""
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    shutil.copy(REPO / "scripts" / "_by_path.py", scripts)
    (scripts / "numbers.py").write_text("raise SystemExit('the wrong one')")
    (scripts / "try.py").write_text(
        "import _by_path, numbers, sys; print(numbers.__file__, sys.path[0], sep='\\n')"
    )
    done = by_path(scripts / "try.py", tmp_path)
    assert done.returncode == 0, done.stderr
    found, first = done.stdout.splitlines()
    assert not found.startswith(str(tmp_path)) and first == str(tmp_path.resolve())
