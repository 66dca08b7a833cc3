"""Export any config as custom modeling code for transformers (`trust_remote_code`).

Make the text of modeling_gptoss.py, and the config.json that names it. The modeling file consists
of this repo's own sources, word for word: what LLM needs of config_model.py, the kernels,
model_parts.py and model.py, then runtime/interop/modeling_gptoss.py, the transformers class around
them. There is no second copy of the mathematics.
"""

from __future__ import annotations

import ast
import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from runtime.data.hf_tokenizer import pad_id
from runtime.interop.export import Source
from runtime.interop.huggingface import pad_setting

REPO = Path(__file__).resolve().parents[2]
# Each may import those before it.
FILES = (
    "config_model.py",
    "runtime/kernels/grouped_linear.py",
    "runtime/kernels/trained_rows.py",
    "runtime/kernels/linear_cross_entropy.py",
    "runtime/kernels/target_log_probs.py",
    "model_parts.py",
    "model.py",
    "runtime/interop/modeling_gptoss.py",
)
MODELING_FILE = "modeling_gptoss.py"

HEADER = '''"""A Mixture-of-Experts language model for transformers.

Load it with from_pretrained(folder, trust_remote_code=True).
Written by gptoss (scripts/export_hf.py), under this licence. Word for word what the model needs of
{files}.

{licence}
"""
from __future__ import annotations

{imports}

# Operations are registered for the whole process. It may hold another copy of this file, and gptoss
# itself: take the first free name.
OPERATIONS = next(
    f"gptoss_{{n}}"
    for n in itertools.count()
    if not hasattr(getattr(torch.ops, f"gptoss_{{n}}"), "grouped_linear")
)
'''


def custom_config(source: Source, dtype: str) -> dict:
    """Return config.json: of the model only ModelConfig's fields.

    GptossConfig makes transformers' names from them.
    """
    module, tokenizer = MODELING_FILE.removesuffix(".py"), source.tokenizer
    return {
        "architectures": ["GptossForCausalLM"],
        "model_type": "gptoss",
        "auto_map": {
            "AutoConfig": f"{module}.GptossConfig",
            "AutoModelForCausalLM": f"{module}.GptossForCausalLM",
        },
        "gptoss": dataclasses.asdict(source.model.config),
        "bos_token_id": tokenizer.start_id,
        "eos_token_id": tokenizer.eos_id,
        **pad_setting(pad_id(tokenizer), tokenizer.end_of_text_id, tokenizer.start_id),
        # transformers 5's spelling and 4's
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def custom_tensors(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name in the safetensors file, tensor) of the model's tensors, one at a time."""
    return ((f"model.{name}", tensor) for name, tensor in weights.items())


# ----------------------------------------------------------------------------- the modeling file
@dataclass(frozen=True)
class Statement:
    """A statement of a module's top level: its lines, with the comment above it."""

    text: str
    defines: frozenset[str]
    # every name in it
    uses: frozenset[str]
    # if it defines nothing: the function that it registers something with
    belongs_to: str


def modeling_source() -> str:
    """Return the modeling file's text."""
    statements = [statement for file in FILES for statement in _statements(REPO / file)]
    names = [name for statement in statements for name in statement.defines]
    assert len(set(names)) == len(names), "two of the files define one name"
    last = (REPO / FILES[-1]).read_text(encoding="utf-8")
    needed = _names(ast.parse(last)).union(FILES)
    kept: list[Statement] = []
    # A kept statement needs others: repeat until no new one is found.
    while (
        found := [s for s in statements if s.defines & needed or s.belongs_to in needed]
    ) != kept:
        kept, needed = found, needed.union(*(s.uses for s in found))
    licence = (REPO / "LICENSE").read_text(encoding="utf-8").strip()
    header = HEADER.format(
        files=", ".join(FILES[:-1]) + f" and {FILES[-1]}", licence=licence, imports=_imports(needed)
    )
    return header + "".join(s.text for s in kept).replace('"gptoss::', 'f"{OPERATIONS}::')


def _names(node: ast.AST) -> frozenset[str]:
    """Return every name that is read or bound in `node`, annotations included."""
    defined = {n.name for n in ast.walk(node) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    return frozenset(defined | {n.id for n in ast.walk(node) if isinstance(n, ast.Name)})


def _statements(path: Path) -> Iterator[Statement]:
    """Yield a module's docstring as a comment, then its statements without the imports.

    The docstring counts as the definition of the file's name.
    """
    source, end = path.read_text(encoding="utf-8"), 0
    lines = source.splitlines(keepends=True)
    for node in ast.parse(source).body:
        text, end = "".join(lines[end : node.end_lineno]), node.end_lineno
        defines, belongs_to = set(), ""
        match node:
            case ast.Import() | ast.ImportFrom():
                continue
            case ast.Expr(value=ast.Constant(value=str(docstring))):
                defines = {path.relative_to(REPO).as_posix()}
                text = (
                    "\n\n# "
                    + "=" * 98
                    + "\n"
                    + "".join(
                        f"# {line}".rstrip() + "\n"
                        for line in f"{path.relative_to(REPO)}: {docstring}".splitlines()
                    )
                )
            # @operation.register_fake
            case ast.FunctionDef(name="_", decorator_list=[decorator]):
                belongs_to = decorator.value.id
            # operation.register_autograd(...)
            case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id=name)))):
                belongs_to = name
            case ast.FunctionDef() | ast.ClassDef():
                defines = {node.name}
            case ast.Assign(targets=[target]) | ast.AnnAssign(target=target):
                defines = _names(target)
            case _:
                raise AssertionError(f"{path}, line {node.lineno}: no rule for such a statement")
        yield Statement(text, frozenset(defines), _names(node), belongs_to)


def _imports(needed: frozenset[str]) -> str:
    """Return the imports of `needed` names that do not come from the files themselves."""
    ours = {file.removesuffix(".py").replace("/", ".") for file in FILES} | {"__future__"}
    modules, members = {"itertools"}, defaultdict(set)
    for file in FILES:
        for node in ast.parse((REPO / file).read_text(encoding="utf-8")).body:
            for alias in getattr(node, "names", ()):
                if (alias.asname or alias.name.partition(".")[0]) in needed and getattr(
                    node, "module", ""
                ) not in ours:
                    (members[node.module] if isinstance(node, ast.ImportFrom) else modules).add(
                        ast.unparse(alias)
                    )
    froms = [
        f"from {module} import {', '.join(sorted(members[module]))}" for module in sorted(members)
    ]
    return "\n".join([f"import {name}" for name in sorted(modules)] + froms)
