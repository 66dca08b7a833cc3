"""Build command lines from the config dataclasses: a flag per field, one line per error.

Precedence, highest first: a flag, `--config FILE.toml`, `--preset NAME`, the field's default.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import re
import signal
import sys
import textwrap
import tomllib
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from config_model import PRESETS, ModelConfig, TrainConfig
from runtime.base import process
from runtime.base.following import follow
from runtime.base.text import visible


@dataclass(frozen=True)
class Settings:
    """What the user asked for.

    `values`: by field name, preset included. `explicit`: names given as flags or in the TOML file.
    `notes`: a line for each value that was adapted to those given.
    """

    values: dict
    explicit: frozenset
    preset: str | None = None
    notes: tuple[str, ...] = ()

    def build(self, config_class):
        """Return a `config_class` from the values that are its fields. Raise ValueError."""
        names = {f.name for f in dataclasses.fields(config_class)}
        return config_class(**{k: v for k, v in self.values.items() if k in names})


# The flags that --help shows first. A command shows the first list of which it has every flag.
MOST_USED = (
    # Whatever trains after pre-training.
    "init_from data dataset ckpt_dir max_steps epochs lr batch_size lora_rank run_name resume",
    # Whatever trains.
    "preset data_dir ckpt_dir max_steps batch_size grad_accum lr resume init_from run_name",
    # scripts.serve
    "ckpt host port slots max_waiting api_key_file plain_chat temperature quantize",
    # predict.py
    "prompt ckpt max_new_tokens temperature top_k top_p seed num_samples prompt_file json",
    # prepare_data.py
    "files dataset text_column val_files val_ratio document_separator tokenizer out_dir "
    "max_tokens num_proc",
    # test.py
    "preset presets ckpt d_model transformer_blocks context_length vocabulary_size num_experts "
    "top_k batch_size",
    # What else has the model's flags.
    "preset config d_model transformer_blocks context_length vocabulary_size num_heads "
    "num_experts top_k d_ff",
)


def did_you_mean(names: Iterable[str], known: Iterable[str]) -> str:
    """Return "; did you mean X?" with the known names that are close, or an empty string."""
    # The dashes that all flags share would make any two of them alike.
    bare = {name.lstrip("-"): name for name in known}
    meant = [
        bare[match]
        for name in names
        for match in difflib.get_close_matches(name.lstrip("-"), bare, 1, 0.65)
    ]
    return f"; did you mean {' and '.join(dict.fromkeys(meant))}?" if meant else ""


class _Formatter(argparse.HelpFormatter):
    """Wraps paragraphs at the terminal's width and keeps indented lines, such as commands."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines: list[str] = []
        paragraph: list[str] = []
        for line in [*text.splitlines(), ""]:
            if line.strip() and not line.startswith(" "):
                paragraph.append(line)
                continue
            lines += _wrapped(" ".join(paragraph), width)
            paragraph = []
            lines += _command_lines(line, width)
        return "\n".join(indent + line for line in lines).rstrip()

    def _split_lines(self, text: str, width: int) -> list[str]:
        # A help text of several lines is a list.
        first, *items = text.split("\n")
        lines = _wrapped(first, width)
        for item in items:
            lines += _wrapped(item, width, "  ", "  ")
        return lines


def _wrapped(text: str, width: int, indent: str = "", hanging: str = "") -> list[str]:
    # A flag, a path or a preset's name stays whole.
    return textwrap.wrap(
        text,
        max(width, 11),
        initial_indent=indent,
        subsequent_indent=indent + hanging,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _command_lines(line: str, width: int) -> list[str]:
    """Return a line of a command and what it does: in two parts, if it is wider than `width`."""
    parts = re.fullmatch(r"( +)(\S.*?) {2,}(\S.*)", line)
    if len(line) <= width or not parts:
        return [line]
    indent, command, comment = parts.groups()
    return [indent + command, *_wrapped(comment, width, 2 * indent)]


class _Parser(argparse.ArgumentParser):
    # Flags on the command line that this parser does not have, without their values.
    unknown: Sequence[str] = ()

    def parse_args(self, args=None, namespace=None):
        given = [str(arg) for arg in (sys.argv[1:] if args is None else args)]
        given = given[: given.index("--")] if "--" in given else given
        names = [arg.partition("=")[0] for arg in given if re.match(r"--?[A-Za-z]", arg)]
        self.unknown = [name for name in names if name not in self._option_string_actions]
        return super().parse_args(args, namespace)

    def error(self, message: str) -> typing.NoReturn:
        # argparse reports a misspelt flag that is required as missing, and says no more.
        is_missing = message.startswith("the following arguments are required")
        if is_missing and self.unknown:
            message += f"; unrecognized: {' '.join(self.unknown)}"
        if is_missing or message.startswith("unrecognized"):
            names = ["--" + name.lstrip("-").replace("-", "_") for name in self.unknown]
            message += did_you_mean(names, self._option_string_actions)
        # argparse would first print all of the flags, about 60.
        raise ValueError(f"{message} (--help lists the flags)")

    def _check_value(self, action: argparse.Action, value: typing.Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            hint = did_you_mean([str(value)], map(str, action.choices or ()))
            raise argparse.ArgumentError(action, error.message + hint) from None

    def format_help(self) -> str:
        """Return a usage in one line, the most used flags, then all others by group."""
        flags = {action.dest: action for action in self._actions if action.option_strings}
        lists = (names.split() for names in MOST_USED)
        first = [flags[name] for name in next((n for n in lists if flags.keys() >= set(n)), [])]
        formatter = self._get_formatter()
        formatter.add_usage(self._usage_line(), [], [])
        formatter.add_text(self.description)
        formatter.start_section("most used")
        formatter.add_arguments(first)
        formatter.end_section()
        for group in self._action_groups:
            formatter.start_section(group.title)
            formatter.add_text(group.description)
            formatter.add_arguments([a for a in group._group_actions if a not in first])
            formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()

    def _usage_line(self) -> str:
        required = []
        for action in self._actions:
            if action.required:
                value = action.metavar or action.dest.upper()
                required.append(" ".join((*action.option_strings[:1], str(value))))
        return " ".join(["%(prog)s", *required, "[flags]"])


def _program() -> str | None:
    """Return how the command that runs is called, if argparse would not know."""
    main = sys.modules.get("__main__")
    module = getattr(getattr(main, "__spec__", None), "name", "")
    # Run by its path, a script has no spec.
    path = os.path.abspath(getattr(main, "__file__", None) or "")
    if not module and os.path.basename(os.path.dirname(path)) == "scripts":
        module = f"scripts.{os.path.basename(path).removesuffix('.py')}"
    return f"python -m {module}" if module.startswith(("scripts.", "benchmarks.")) else None


def parser(description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    """Return the ArgumentParser of a command: no abbreviated flags, ValueError for a mistake."""
    return _Parser(
        prog=_program(),
        description=description,
        epilog=epilog,
        allow_abbrev=False,
        formatter_class=_Formatter,
    )


def add_config_flags(to: argparse.ArgumentParser, *config_classes) -> None:
    """Add `--preset`, `--config` and a flag per field of the dataclasses, with help and default."""
    presets = "\n".join(f"{name}: {preset.description}" for name, preset in PRESETS.items())
    to.add_argument(
        "--preset",
        choices=sorted(PRESETS),
        metavar="NAME",
        help=f"named model and training settings:\n{presets}".replace("%", "%%"),
    )
    add_config_file(to)
    for config_class in config_classes:
        add_fields(to.add_argument_group(config_class.__name__, config_class.__doc__), config_class)


def add_config_file(to: argparse.ArgumentParser) -> None:
    """Add `--config FILE.toml`."""
    to.add_argument(
        "--config",
        metavar="FILE.toml",
        help="TOML file of settings, named like the flags; tables [model] and [train] are optional",
    )


def add_fields(to, config_class, only: Iterable[str] | None = None) -> None:
    """Add a flag for each field of a dataclass, or for those named in `only`.

    A flag that is not given leaves nothing in the namespace, so we know what was given.
    """
    hints = typing.get_type_hints(config_class)
    for f in dataclasses.fields(config_class):
        if only is not None and f.name not in only:
            continue
        kind, choices = hints[f.name], f.metadata["choices"]
        help = f"{f.metadata['help']} (default: {f.default!r})".replace(
            "(default: ())", "(default: none)"
        ).replace("%", "%%")
        if kind is bool:
            to.add_argument(
                f"--{f.name}",
                action=argparse.BooleanOptionalAction,
                default=argparse.SUPPRESS,
                help=help,
            )
        elif kind is tuple:
            to.add_argument(
                f"--{f.name}", action="append", metavar="TEXT", default=argparse.SUPPRESS, help=help
            )
        else:
            to.add_argument(
                f"--{f.name}",
                type=kind,
                choices=choices,
                metavar=None if choices else kind.__name__.upper(),
                default=argparse.SUPPRESS,
                help=help,
            )


def settings_from(args: argparse.Namespace, *config_classes) -> Settings:
    """Merge preset, TOML file and flags. Raise ValueError for an unknown key or unreadable file."""
    known = {f.name for c in config_classes for f in dataclasses.fields(c)}
    # A command that starts from weights has no presets.
    name = getattr(args, "preset", None)
    preset = PRESETS[name] if name else PRESETS["gptoss"]
    training = next((c for c in config_classes if issubclass(c, TrainConfig)), None)
    owners: dict[str, type] = {"model": ModelConfig, "train": training or TrainConfig}
    file = _read_toml(args.config, known, owners) if args.config is not None else {}
    flags = {k: v for k, v in vars(args).items() if k in known}
    values = {k: v for k, v in (preset.model | preset.train).items() if k in known}
    values = _in_its_folders(values | file | flags, training or TrainConfig)
    explicit = frozenset(file) | frozenset(flags)
    notes: tuple[str, ...] = ()
    if training is not None:
        values, notes = follow(values, explicit, training)
    return Settings(values, explicit, name, notes)


def _in_its_folders(values: dict, config_class: type[TrainConfig]) -> dict:
    """Return settings whose ckpt_dir and graph_dir are the run's own folders, if it has a name.

    A folder that has the run's name already stays, so that a run is found by either.
    """
    name = values.get("run_name")
    if not name or not isinstance(name, str):
        return values
    if not re.fullmatch(r"\w[\w.+=-]*", name) or name.endswith(".pt"):
        raise ValueError(
            f"run_name {name!r} cannot be the name of the run's folder: use letters, digits and "
            "_ . + = -, and not the ending .pt"
        )
    folders = {}
    for key in ("ckpt_dir", "graph_dir"):
        folder = values.get(key, getattr(config_class, key))
        if isinstance(folder, str):
            is_there = os.path.basename(os.path.normpath(folder)) == name
            folders[key] = folder if is_there else os.path.join(folder, name)
    return values | folders


def _read_toml(path: str, known: Iterable[str], owners: dict[str, type]) -> dict:
    try:
        with open(path, "rb") as file:
            table = tomllib.load(file)
    except OSError as error:
        raise ValueError(f"cannot read --config {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path} is not valid TOML: {error}") from error
    flat = {k: v for k, v in table.items() if not isinstance(v, dict)}
    for name, section in table.items():
        if isinstance(section, dict):
            if name not in owners:
                raise ValueError(
                    f"--config {path} has an unknown table [{name}]: only [model] and [train] "
                    "are read"
                )
            allowed = {f.name for f in dataclasses.fields(owners[name])}
            if unknown := sorted(set(section) - allowed):
                raise ValueError(
                    f"--config {path} has unknown keys in [{name}]: {', '.join(unknown)}; "
                    f"see --help for the known names{did_you_mean(unknown, allowed)}"
                )
            if twice := sorted(set(section) & set(flat)):
                raise ValueError(
                    f"--config {path} gives {', '.join(twice)} twice: in [{name}] and outside of it"
                )
            flat |= section
    if "preset" in flat:
        raise ValueError(
            f"--config {path} names a preset: give it on the command line, "
            f"--preset {flat['preset']} --config {path}"
        )
    if unknown := sorted(set(flat) - set(known)):
        raise ValueError(
            f"--config {path} has unknown keys: {', '.join(unknown)}; "
            f"see --help for the known names{did_you_mean(unknown, known)}"
        )
    return flat


# A user's mistakes: printed as one line, without a traceback.
MISTAKES = (ValueError, OSError, ImportError)


def error_line(error: BaseException) -> str:
    """Return the line that is printed of an error."""
    return f"error: {visible(' '.join(str(error).split())) or type(error).__name__}"


def exit_code(error: BaseException) -> int:
    """Return the exit code of a user's mistake."""
    return getattr(error, "exit_code", 2)


def run_main(main: Callable[[list[str] | None], int | None]) -> typing.NoReturn:
    """Run `main(argv)` and exit: its return value or 0; 2 after a user's mistake; 130 for Ctrl-C.

    A user's mistake (ValueError, OSError, ImportError) is printed as one line, without traceback,
    unless GPTOSS_TRACEBACK is set.
    """
    for name in ("stdin", "stdout", "stderr"):
        # The shell closed it (`>&-`).
        if getattr(sys, name) is None:
            setattr(
                sys,
                name,
                os.fdopen(os.open(os.devnull, os.O_RDWR), "r" if name == "stdin" else "w"),
            )
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A cp1252 or ascii console must not end the program.
            stream.reconfigure(errors="replace")
    try:
        try:
            code = main(sys.argv[1:])
        finally:
            # --help leaves by SystemExit, and its reader may be gone as well.
            sys.stdout.flush()
    except BrokenPipeError:
        # `| head` closed our output: nothing is wrong. 13 is SIGPIPE, which Windows lacks.
        code = 128 + getattr(signal, "SIGPIPE", 13)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        code = 130
    except MISTAKES as error:
        if os.environ.get("GPTOSS_TRACEBACK"):
            raise
        # All ranks of a machine have read the same command: one of them says what is wrong with it.
        if process.local_rank() == 0:
            print(error_line(error), file=sys.stderr)
        code = exit_code(error)
    try:
        sys.stdout.flush()
    except OSError:
        # The rest cannot be written: Python must not try again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)
