"""Two builds of the C kernel: how long a token takes with the one of this checkout, and with that
of another commit.

    python -m benchmarks.decode_builds --base main --preset plain-nano
    python -m benchmarks.decode_builds --base main --name modern --preset modern-8gb --texts 1 8

Takes every flag of the model. Both builds are in this process, run the same random weights in
float32 and in 8 bits, and take turns; a sample during which other processes used more than
0.15 core is measured again. A sample of decoding is STEPS tokens of each text after --context
tokens; one of reading is a prompt of --context tokens. `ratio`: the median of the new build's
seconds over that of the old one's. Saved: benchmarks/results/decode_builds_NAME.json.
"""

from __future__ import annotations

from runtime.base import process

# ruff: noqa: E402
process.before_torch()

import dataclasses
import importlib.util
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

from benchmarks.common import REPO, alternate_undisturbed, save_results, summary
from config_model import ModelConfig, total_parameters
from model import LLM
from model_parts import KVCache
from runtime.base import cli
from runtime.inference import cpu_decode
from runtime.inference.quantize import quantize_

SOURCES = ("runtime/inference/cpu_decode.py", "runtime/inference/cpu_decode.c")
STEPS = 16
SEED = 0


def build_of(commit: str, folder: Path) -> ModuleType:
    """Return the module runtime/inference/cpu_decode.py of a commit, next to its C code."""
    for name in SOURCES:
        shown = subprocess.run(["git", "show", f"{commit}:{name}"], cwd=REPO, capture_output=True)
        if shown.returncode:
            said = shown.stderr.decode(errors="replace").strip()
            raise ValueError(f"--base {commit}: git has no {name} there ({said})")
        (folder / Path(name).name).write_bytes(shown.stdout)
    name = "cpu_decode_of_base"
    spec = importlib.util.spec_from_file_location(name, folder / "cpu_decode.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def native_of(build: ModuleType, model: LLM):
    """Return the model for a build's C code."""
    native, why = build.native_model(model)
    if native is None:
        raise ValueError(f"there is no C kernel to measure: {why}")
    return native


def decoding(native, texts: int, context: int) -> Callable[[], float]:
    """Return a function that decodes STEPS tokens of each text: seconds a token of all texts."""
    caches = KVCache(native.config, texts, context + STEPS).rows()
    ids = [[(31 * text) % native.config.vocabulary_size] for text in range(texts)]

    def sample() -> float:
        for cache in caches:
            cache.length = context
        started = time.perf_counter()
        for _ in range(STEPS):
            native.forward(caches, ids)
        return (time.perf_counter() - started) / STEPS

    return sample


def reading(native, context: int) -> Callable[[], float]:
    """Return a function that reads a prompt: seconds."""
    # Without ring buffers, which take one token at a time.
    config = dataclasses.replace(native.config, sliding_window=0, window_pattern="all")
    cache = KVCache(config, 1, context)
    generator = torch.Generator().manual_seed(SEED)
    prompt = torch.randint(0, native.config.vocabulary_size, (context,), generator=generator)
    ids = [prompt.tolist()]

    def sample() -> float:
        cache.length = 0
        started = time.perf_counter()
        native.forward([cache], ids)
        return time.perf_counter() - started

    return sample


def measured(model: LLM, builds: dict[str, ModuleType], args) -> list[dict]:
    """Return the cells of a model: what was measured, medians in milliseconds, their ratio."""
    natives = {name: native_of(build, model) for name, build in builds.items()}
    cells = []
    for texts in (*args.texts, 0):
        functions = {
            name: decoding(native, texts, args.context) if texts else reading(native, args.context)
            for name, native in natives.items()
        }
        for function in functions.values():
            function()
        samples = alternate_undisturbed(functions, args.repeats)
        sides = {
            name: summary(one.values) | {"discarded": one.discarded, "disturbed": one.disturbed}
            for name, one in samples.items()
        }
        what = f"decoding {texts} texts" if texts else f"reading {args.context} tokens"
        ratio = sides["new"]["median"] / sides["old"]["median"]
        cells.append({"what": what, "texts": texts, "sides": sides, "ratio": ratio})
        old, new = (1000 * sides[name]["median"] for name in ("old", "new"))
        print(f"  {what:24} old {old:9.3f} ms  new {new:9.3f} ms  ratio {ratio:.3f}", flush=True)
    return cells


def main(argv: list[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    cli.add_config_flags(parser, ModelConfig)
    parser.add_argument("--name", default="nano", help="name of the results file (default: nano)")
    parser.add_argument("--base", default="main", help="commit of the old build (default: main)")
    parser.add_argument(
        "--texts", type=int, nargs="+", default=[1, 8, 32], help="texts at once (default: 1 8 32)"
    )
    parser.add_argument("--context", type=int, default=128, help="tokens before (default: 128)")
    parser.add_argument("--repeats", type=int, default=40, help="samples a side (default: 40)")
    args = parser.parse_args(argv)
    if min(*args.texts, args.context, args.repeats) < 1:
        raise ValueError("--texts, --context and --repeats must be at least 1")
    torch.set_num_threads(min(torch.get_num_threads(), process.usable_cores()))
    config = cli.settings_from(args, ModelConfig).build(ModelConfig)
    torch.manual_seed(SEED)
    model = LLM(config).eval()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        builds = {"old": build_of(args.base, Path(folder)), "new": cpu_decode}
        for dtype in ("float32", "int8"):
            print(f"{args.name} {dtype}, {torch.get_num_threads()} threads", flush=True)
            results[dtype] = measured(
                model if dtype == "float32" else quantize_(model), builds, args
            )
    save_results(
        f"decode_builds_{args.name}",
        {
            "parameters": total_parameters(config),
            "threads": torch.get_num_threads(),
            "base": args.base,
            "context": args.context,
            "cells": results,
        },
    )
    return 0


if __name__ == "__main__":
    cli.run_main(main)
