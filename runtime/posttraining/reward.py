"""Rewards: what an answer earns, by a user's own function or by the embedded tasks.

A reward is a number, or a dict of parts: their sum is the reward, unless one is called "reward".
All parts are logged. An answer without an end is wrong: each of its parts earns at most 0, unless
the function has an argument `ended` and so decides itself.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from runtime.base.cli import did_you_mean
from runtime.posttraining import tasks
from runtime.posttraining.conversations import Prompt

TOTAL = "reward"
# What a function is tried with before the first step.
TRIED = ("", "An answer.")


class Earned(NamedTuple):
    """What one answer earned: in all, and by part."""

    total: float
    parts: dict[str, float]


class Reward:
    """Asks a function for rewards, and says in one line what is wrong with it.

    function(messages, text, **columns): messages and further columns are the prompt's. where: its
    name, for error lines. digest: of its file, "" without one.
    """

    def __init__(self, function: Callable[..., Any], where: str, digest: str = ""):
        self.function, self.where, self.digest = function, where, digest
        self.signature = _signature(function)
        self.takes_ended = self.signature is not None and "ended" in self.signature.parameters

    @property
    def rule(self) -> str:
        """What becomes of an answer without an end, in words."""
        if self.takes_ended:
            return "it decides about answers without an end, by its argument `ended`"
        return "an answer without an end earns at most 0"

    def __call__(self, prompt: Prompt, text: str, ended: bool) -> Earned:
        """Return what an answer earned. Raise ValueError for a function that fails."""
        more = {"ended": ended} if self.takes_ended else {}
        try:
            value = self.function(prompt.messages, text, **prompt.columns, **more)
        except Exception as error:
            raise ValueError(f"{self.where} failed: {_last_line(error)}") from error
        earned = self._earned(value)
        if ended or self.takes_ended:
            return earned
        parts = {name: min(part, 0.0) for name, part in earned.parts.items()}
        return Earned(min(earned.total, 0.0), parts)

    def _earned(self, value: object) -> Earned:
        """Return a function's value. Raise ValueError if it is no reward."""
        if not isinstance(value, Mapping):
            return Earned(self._number(value, "a reward"), {})
        if not value:
            raise ValueError(f"{self.where} returned a dict without parts: a part has a number")
        parts = {str(name): self._number(part, f"part {name}") for name, part in value.items()}
        total = parts.pop(TOTAL, None)
        return Earned(sum(parts.values()) if total is None else total, parts)

    def _number(self, value: object, what: str) -> float:
        try:
            number = float(value)  # type: ignore[arg-type]  # what it cannot take is refused
        except (TypeError, ValueError, OverflowError, RuntimeError):
            number = math.nan
        if not math.isfinite(number) or isinstance(value, str):
            raise ValueError(
                f"{self.where} returned {str(value)[:60]!r} as {what}: return a finite number, or "
                "a dict of them by part"
            )
        return number

    def check(self, prompt: Prompt) -> None:
        """Try the function before the first step. Raise ValueError if it fails."""
        for text in TRIED:
            self(prompt, text, True)
            if self.takes_ended:
                self(prompt, text, False)

    def check_columns(self, prompt: Prompt) -> None:
        """Raise ValueError, with its line, for a row that lacks a column of the function's."""
        if self.signature is None:
            return
        more = {"ended": True} if self.takes_ended else {}
        try:
            self.signature.bind(prompt.messages, "", **prompt.columns, **more)
        except TypeError as error:
            raise ValueError(
                f"{prompt.where}: {self.where} cannot take the row's columns: {error}"
            ) from None


def toy_reward() -> Reward:
    """Return the reward of the embedded requests: the share of what was asked for."""

    def share(messages: list, text: str, items: dict[str, str]) -> dict[str, float]:
        parts = tasks.parts(items, text)
        return {TOTAL: sum(parts.values()) / len(parts), **parts}

    return Reward(share, "the embedded reward")


def load_reward(name: str) -> Reward:
    """Return the reward called FILE.py:FUNCTION. Raise ValueError if there is none."""
    file, colon, function = name.rpartition(":")
    if not (colon and function and file.endswith(".py")):
        raise ValueError(f"--reward {name}: write FILE.py:FUNCTION, as in my_rewards.py:score")
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"--reward {name}: there is no file {file}")
    module = _load(path, name)
    functions = {
        key: value
        for key, value in vars(module).items()
        if callable(value) and not key.startswith("_")
    }
    if function not in functions:
        raise ValueError(
            f"--reward {name}: {file} has no function {function}"
            f"{did_you_mean([function], functions)}"
        )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Reward(functions[function], f"--reward {name}", digest)


def _load(path: Path, name: str) -> ModuleType:
    """Return a file's module. Raise ValueError if it cannot be run."""
    spec = importlib.util.spec_from_file_location(f"reward_{path.stem}", path)
    assert spec is not None and spec.loader is not None, "the name ends with .py"
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickle look a class's module up by its name.
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"--reward {name}: {_last_line(error)}") from error
    return module


def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        # A function of C without a signature.
        return None


def _last_line(error: Exception) -> str:
    """Return an error in one line, with the place in the user's file."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    frames = traceback.extract_tb(error.__traceback__)
    # The first frame is ours, which asked.
    place = f" (line {frames[-1].lineno} of {frames[-1].filename})" if len(frames) > 1 else ""
    return text[:200] + place
