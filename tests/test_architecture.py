"""The import law: who may import whom, read from the imports themselves, those in functions too.

DESIGN in one line: config_model < base < kernels < model_parts < model < checkpoint < checks < data
< inference, training < evaluation, interop, posttraining, serving < the root's commands < scripts
< benchmarks, tests.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO

# Rooms by level, the lowest first. A room may import from lower levels and from itself.
LEVELS = [
    {"config_model"},
    {"runtime.base"},
    {"runtime.kernels"},
    {"model_parts"},
    {"model"},
    {"runtime.checkpoint"},
    {"runtime.checks"},
    {"runtime.data"},
    {"runtime.inference", "runtime.training", "runtime.distributed"},
    {"runtime.evaluation", "runtime.interop", "runtime.posttraining", "runtime.serving"},
    {"train", "predict", "prepare_data", "test"},
    {"scripts"},
    {"benchmarks", "tests"},
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
# The tests of a benchmark import it, and benchmarks count what the guarantees in tests hold.
TOP = len(LEVELS) - 1
FEWEST_FILES = 90
# What knows tensors in shards and talks to other ranks.
RANKS_ROOM = "runtime.distributed"
RANKS_ONLY = re.compile(
    r"^torch\.distributed|^(DTensor|DeviceMesh|FSDPModule|fully_shard|full_tensor|to_local)$"
)


def module_of(path: Path) -> str:
    """Return the dotted name of a file in the repository."""
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> str | None:
    """Return the room a module is in: a root module, a package of runtime, or a top folder."""
    parts = module.split(".")
    room = ".".join(parts[:2]) if parts[0] == "runtime" else parts[0]
    return room if room in LEVEL else None


def imported(tree: ast.AST, known: set[str]) -> set[str]:
    """Return the modules of the repository that a syntax tree imports, anywhere in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in known}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else node.module)
    return found & known


def read_trees() -> dict[str, ast.AST]:
    """Return module -> syntax tree, of all modules of the repository."""
    folders = ("runtime", "scripts", "benchmarks", "tests")
    patterns = ("*.py", *(f"{folder}/**/*.py" for folder in folders))
    return {
        module_of(path.relative_to(REPO)): ast.parse(path.read_text(encoding="utf-8"))
        for pattern in patterns
        for path in REPO.glob(pattern)
    }


def about_ranks(tree: ast.AST) -> list[str]:
    """Return what a syntax tree says of torch.distributed, of its tensors or of its sharding."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            found.append(ast.unparse(node) if node.attr == "distributed" else node.attr)
        elif isinstance(node, ast.Name):
            found.append(node.id)
    return [name for name in found if RANKS_ONLY.search(name)]


def broken(imports: dict[str, set[str]]) -> list[str]:
    """Return the arrows against the law, a line each."""
    arrows = []
    for module, targets in sorted(imports.items()):
        room = room_of(module)
        for target in sorted(targets):
            theirs = room_of(target)
            if room is None or theirs is None or module == target:
                continue
            if room == theirs == "scripts":
                arrows.append(f"{module} imports {target}: scripts never import each other")
            elif room != theirs and LEVEL[theirs] >= LEVEL[room] and LEVEL[room] != TOP:
                arrows.append(f"{module} imports {target}, which is not below it")
    return arrows


def circles(imports: dict[str, set[str]]) -> list[str]:
    """Return the circles among modules, as "a -> b -> a"."""
    found, done = [], set()

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            found.append(" -> ".join([*path[path.index(module) :], module]))
            return
        if module in done:
            return
        for target in sorted(imports.get(module, ())):
            visit(target, [*path, module])
        done.add(module)

    for module in sorted(imports):
        visit(module, [])
    return found


TREES = read_trees()
IMPORTS = {module: imported(tree, set(TREES)) for module, tree in TREES.items()}


def test_every_file_is_read():
    """A rule that looks into too few folders checks nothing and stays green."""
    assert len(IMPORTS) >= FEWEST_FILES
    assert "runtime.checkpoint.format" in IMPORTS
    assert IMPORTS["model"] >= {"config_model", "model_parts"}


def test_every_module_has_a_room():
    assert [module for module in IMPORTS if room_of(module) is None and module != "runtime"] == []


def test_nobody_imports_its_own_level_or_above():
    assert broken(IMPORTS) == []


def test_there_are_no_circles():
    assert circles(IMPORTS) == []


def test_only_one_room_knows_of_shards():
    """Code that meets a sharded tensor unawares does not crash, it computes something else.

    Muon did: its matrices were a rank's rows. All others go through base.ranks.Ranks.
    """
    of_ranks = {module: about_ranks(tree) for module, tree in TREES.items()}
    assert of_ranks["runtime.distributed.parallel"]
    inside = ("tests", "benchmarks", RANKS_ROOM)
    assert {m: names for m, names in of_ranks.items() if names and not m.startswith(inside)} == {}


def test_the_ranks_are_imported_where_they_are_used():
    """One process needs none of it, so no import of it stands at the top of a file."""
    early = {
        module
        for module, tree in TREES.items()
        if LEVEL.get(room_of(module), TOP) < TOP and not module.startswith((RANKS_ROOM, "scripts"))
        for node in ast.iter_child_nodes(tree)
        if any(name.startswith(RANKS_ROOM) for name in imported(node, set(TREES)))
        and not isinstance(node, (ast.FunctionDef, ast.ClassDef))
    }
    assert early == set()


def test_the_rules_see_their_faults():
    """Arrows up, sideways and in circles, made up."""
    up = {"runtime.base.files": {"model"}, "model": set()}
    assert broken(up) == ["runtime.base.files imports model, which is not below it"]
    sideways = {"runtime.training.plan": {"runtime.inference.decoder"}}
    assert "runtime.inference.decoder" in broken(sideways)[0]
    assert broken({"train": {"predict"}})
    assert broken({"scripts.a": {"scripts.b"}})
    assert broken({"scripts.a": {"train"}, "train": {"runtime.data.shards"}}) == []
    assert circles({"a": {"b"}, "b": {"a"}}) == ["a -> b -> a"]
    for line in (
        "import torch.distributed as dist",
        "from torch import distributed",
        "from torch.distributed.tensor import Shard",
        "torch.distributed.get_rank()",
        "weight.to_local()",
        "isinstance(weight, DTensor)",
    ):
        assert about_ranks(ast.parse(line)), line
    assert not about_ranks(ast.parse("from runtime.base import distributed"))
    tree = ast.parse("def f():\n    from runtime.data import shards\n")
    assert imported(tree, {"runtime.data", "runtime.data.shards"}) == {"runtime.data.shards"}


@pytest.mark.parametrize(
    "module",
    [
        "prepare_data",
        "runtime.data.shards",
        "runtime.data.loader",
        "runtime.data.sources",
        "runtime.data.tokenizers",
        "runtime.base.cli",
        "runtime.base.process",
    ],
)
def test_preparing_text_loads_no_torch(module):
    """PyTorch takes seconds to load, and preparing text needs none of it."""
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0
