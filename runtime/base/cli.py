"""Build command lines from the config dataclasses: a flag per field, one line per error.

Precedence, highest first: a flag, `--config FILE.toml`, `--preset NAME`, the field's default.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
import tomllib
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from config_model import PRESETS, ModelConfig, TrainConfig
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


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        # argparse would first print all of the flags, about 60.
        raise ValueError(f"{message} (--help lists the flags)")


def parser(description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    """Return the ArgumentParser of a command: no abbreviated flags, ValueError for a mistake."""
    module = getattr(getattr(sys.modules.get("__main__"), "__spec__", None), "name", "")
    prog = f"python -m {module}" if module.startswith(("scripts.", "benchmarks.")) else None
    return _Parser(
        prog=prog,
        description=description,
        epilog=epilog,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_config_flags(to: argparse.ArgumentParser, *config_classes) -> None:
    """Add `--preset`, `--config` and a flag per field of the dataclasses, with help and default."""
    presets = "; ".join(f"{name}: {preset.description}" for name, preset in PRESETS.items())
    to.add_argument(
        "--preset",
        choices=sorted(PRESETS),
        help=f"named model and training settings: {presets}".replace("%", "%%"),
    )
    to.add_argument(
        "--config",
        metavar="FILE.toml",
        help="TOML file of settings, named like the flags; tables [model] and [train] are optional",
    )
    for config_class in config_classes:
        add_fields(to.add_argument_group(config_class.__name__, config_class.__doc__), config_class)


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
    preset = PRESETS[args.preset] if args.preset else PRESETS["gptoss"]
    file = _read_toml(args.config, known) if args.config is not None else {}
    flags = {k: v for k, v in vars(args).items() if k in known}
    values = {k: v for k, v in (preset.model | preset.train).items() if k in known}
    values, explicit = values | file | flags, frozenset(file) | frozenset(flags)
    notes: tuple[str, ...] = ()
    if TrainConfig in config_classes:
        values, notes = follow(values, explicit)
    return Settings(values, explicit, args.preset, notes)


def _read_toml(path: str, known: Iterable[str]) -> dict:
    try:
        with open(path, "rb") as file:
            table = tomllib.load(file)
    except OSError as error:
        raise ValueError(f"cannot read --config {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path} is not valid TOML: {error}") from error
    flat = {k: v for k, v in table.items() if not isinstance(v, dict)}
    owners = {"model": ModelConfig, "train": TrainConfig}
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
                    "see --help for the known names"
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
            "see --help for the known names"
        )
    return flat


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
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("GPTOSS_TRACEBACK"):
            raise
        print(
            f"error: {visible(' '.join(str(error).split())) or type(error).__name__}",
            file=sys.stderr,
        )
        code = getattr(error, "exit_code", 2)
    try:
        sys.stdout.flush()
    except OSError:
        # The rest cannot be written: Python must not try again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)
