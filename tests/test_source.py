"""Rules for the source itself, read from its syntax trees."""

from __future__ import annotations

import ast
import io
import re
import socket
import tokenize

import pytest

from tests.conftest import REPO

TREES = {
    path.relative_to(REPO): ast.parse(path.read_text(encoding="utf-8"))
    for pattern in ("*.py", "runtime/**/*.py", "scripts/*.py", "benchmarks/*.py", "tests/**/*.py")
    for path in REPO.glob(pattern)
}
# A pattern that looks too shallow checks nothing and stays green.
FEWEST_FILES = 180
# Modules whose loading runs what a file says.
UNPICKLES = {
    "pickle",
    "cPickle",
    "dill",
    "joblib",
    "shelve",
    "marshal",
}


def faults(tree: ast.AST, is_test: bool) -> list[str]:
    """Places of a tree that could run what a file says, or swallow every error."""
    found = []
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "load"
            and getattr(node.func.value, "id", None) in ("torch", "np", "numpy")
        ):
            given = {
                keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords
            }
            if node.func.value.id == "torch" and given.get("weights_only") is not True:
                found.append(f"line {node.lineno}: torch.load without weights_only=True")
            if given.get("allow_pickle", False) is not False:
                found.append(f"line {node.lineno}: numpy.load with allow_pickle")
        if isinstance(node, (ast.Import, ast.ImportFrom)) and not is_test:
            modules = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
            )
            found += [
                f"line {node.lineno}: imports {module}"
                for module in modules
                if module.split(".")[0] in UNPICKLES
            ]
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) in ("eval", "exec"):
            found.append(f"line {node.lineno}: {node.func.id}")
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            found.append(f"line {node.lineno}: a bare except")
    return found


def test_every_file_is_read():
    assert len(TREES) >= FEWEST_FILES
    assert {path.parts[0] for path in TREES} >= {"runtime", "scripts", "benchmarks", "tests"}


@pytest.mark.parametrize("path", TREES, ids=str)
def test_nothing_runs_what_a_file_says_and_no_error_is_swallowed(path):
    assert faults(TREES[path], path.parts[0] == "tests") == []


@pytest.mark.parametrize(
    "code, fault",
    [
        ("torch.load(f)", "torch.load"),
        ("torch.load(f, weights_only=False)", "torch.load"),
        ("torch.load(f, weights_only=flag)", "torch.load"),
        ("np.load(f, allow_pickle=True)", "numpy.load"),
        ("np.load(f, allow_pickle=flag)", "numpy.load"),
        ("import pickle", "imports pickle"),
        ("from joblib import load", "imports joblib"),
        ("eval(text)", "eval"),
        ("try:\n f()\nexcept:\n pass", "bare except"),
    ],
)
def test_each_rule_sees_its_fault(code, fault):
    (found,) = faults(ast.parse(code), is_test=False)
    assert fault in found


def test_the_suite_reaches_no_network():
    """The original implementation downloaded a tokenizer at `import config_model`."""
    for reach in (
        lambda: socket.create_connection(("192.0.2.1", 80), timeout=1),
        lambda: socket.getaddrinfo("example.org", 80),
    ):
        with pytest.raises(OSError, match="tests reach no network"):
            reach()


# What the style of this project writes otherwise (CONTRIBUTING.md).
HOUSE_WORDS = re.compile(
    r"\b(anew|besides|beside|goes on|text set|position table|look-up|selection bias"
    r"|reference implementation)\b",
    re.IGNORECASE,
)


def house_words(source: str) -> list[str]:
    """Return the house words in the comments and strings of a source."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    texts = (t.string for t in tokens if t.type in (tokenize.COMMENT, tokenize.STRING))
    return [match[0] for text in texts for match in HOUSE_WORDS.finditer(" ".join(text.split()))]


@pytest.mark.parametrize(
    "path", [path for path in TREES if path.parts[0] not in ("tests", "benchmarks")], ids=str
)
def test_words_of_the_house_stay_out(path):
    """They had to be read twice: the field has its own words."""
    assert house_words((REPO / path).read_text(encoding="utf-8")) == []


def test_a_house_word_is_seen_in_comments_and_strings_alone():
    assert house_words('anew = 1  # begins Anew\nx = "goes\\n" "on"\n') == ["Anew"]
    assert house_words('"""It\n    goes on."""\n') == ["goes on"]
