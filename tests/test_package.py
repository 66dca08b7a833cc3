"""`pip install -e .`: the modules that pyproject.toml names, and what a build makes of them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest

from tests.conftest import REPO

PYPROJECT = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))
BUILD = """
import sys
from setuptools import build_meta
# A build replaces sys.argv.
editable, wheels = sys.argv[1:]
build_meta.build_editable(editable)
build_meta.build_wheel(wheels)
"""
IMPORT = """
import importlib.util, site, sys
site.addsitedir(sys.argv[1])
import model, runtime, scripts
for name in sys.argv[2:]:
    assert importlib.util.find_spec(name), name
print(model.__file__)
test = importlib.util.find_spec("test")
print(test.origin if test else "")
"""


def test_it_names_every_module_of_the_root_but_test():
    """A module called test would hide the standard library's."""
    named = PYPROJECT["tool"]["setuptools"]["py-modules"]
    assert sorted([*named, "test"]) == sorted(path.stem for path in REPO.glob("*.py"))


def test_version_and_requirements_have_one_home():
    project = PYPROJECT["project"]
    citation = (REPO / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.*)$", citation, re.MULTILINE)[1] == project["version"]
    assert f"## {project['version']} " in (REPO / "CHANGELOG.md").read_text(encoding="utf-8")
    assert project["dynamic"] == ["dependencies"] and "dependencies" not in project
    files = PYPROJECT["tool"]["setuptools"]["dynamic"]["dependencies"]["file"]
    assert files == ["requirements.txt"]


def test_every_folder_of_the_package_can_be_imported():
    """Packages are found by their __init__.py; a folder without one would be left out."""
    for top in ("runtime", "scripts"):
        for path in (REPO / top).rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), path.parent


def test_an_editable_install_works_from_any_folder(tmp_path):
    """pip's build backend makes the wheels, without a network; Python reads them elsewhere."""
    pytest.importorskip("setuptools")
    source, site, wheels = tmp_path / "source", tmp_path / "site", tmp_path / "wheels"
    source.mkdir()
    for path in [*REPO.glob("*.py"), *REPO.glob("*.toml"), *REPO.glob("*.txt")]:
        shutil.copyfile(path, source / path.name)
    for name in ("README.md", "LICENSE"):
        shutil.copyfile(REPO / name, source / name)
    for name in ("runtime", "scripts", "benchmarks", "tests"):
        ignore = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(REPO / name, source / name, ignore=ignore)

    def run(code: str, *arguments, cwd) -> str:
        command = [sys.executable, "-I", "-c", code, *map(str, arguments)]
        ran = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr[-3000:]
        return ran.stdout

    for folder in (site, wheels):
        folder.mkdir()
    run(BUILD, site, wheels, cwd=source)
    (editable,), (wheel,) = site.glob("*.whl"), wheels.glob("*.whl")
    with zipfile.ZipFile(editable) as archive:
        archive.extractall(site)
        (metadata,) = (name for name in archive.namelist() if name.endswith("METADATA"))
        requires = re.findall(r"^Requires-Dist: (.*)$", archive.read(metadata).decode(), re.M)
    pins = (REPO / "requirements.txt").read_text(encoding="utf-8").splitlines()
    base = [line for line in pins if line and not line.startswith("#")]
    extras = PYPROJECT["project"]["optional-dependencies"]
    asked = [f'{pin}; extra == "{extra}"' for extra, pins in extras.items() for pin in pins]
    assert requires == base + asked
    found = run(
        IMPORT, site, "train", "predict", "runtime.base.cli", "scripts.export_hf", cwd=tmp_path
    )
    model, test = found.splitlines()[0], "".join(found.splitlines()[1:])
    assert model == str(source / "model.py") and str(source) not in test
    # A wheel has all that is not Python too, and nothing of the tests.
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    data = [path for path in (REPO / "runtime").rglob("*") if path.suffix in DATA]
    assert data and {str(path.relative_to(REPO)) for path in data} <= names
    kept = {name.split("/")[0] for name in names if ".dist-info" not in name}
    modules = [f"{name}.py" for name in PYPROJECT["tool"]["setuptools"]["py-modules"]]
    assert kept == {*modules, "runtime", "scripts"}


DATA = {".c", ".h", ".txt", ".html", ".css", ".js"}


def test_no_other_kind_of_file_is_left_out():
    """A new kind of file in runtime needs a line in package-data."""
    kinds = {
        path.suffix
        for path in (REPO / "runtime").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert kinds <= DATA | {".py"}
    assert PYPROJECT["tool"]["setuptools"]["package-data"] == {
        "*": ["*.c", "*.h", "*.txt", "*.html", "*.css", "*.js"]
    }
