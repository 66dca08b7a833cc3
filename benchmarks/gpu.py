"""Everything that wants a GPU, in one command: tests, kernels, whole steps, generation, real runs, a resumed run.

    python prepare_data.py --files train.jsonl --val_files valid.jsonl --out_dir carried/data        # before, where the text is
    GPTOSS_DATA=carried/data python -m benchmarks.gpu --name h200 --out results_of_the_gpu
    GPTOSS_DATA=carried/data python -m benchmarks.gpu --name h200 --out results_of_the_gpu --stages loss attention   # a part

Each stage is some commands with an output of their own, OUT/STAGE.log, and a time that leaves MOST_LEFT seconds at most to each of
those that follow; one that fails, or takes too long, loses none of the others. The benchmarks' JSON files are copied to OUT besides. GPTOSS_DATA names prepared shards (o200k_base), GPTOSS_SHARED the tests'
fixtures, where they are at hand. --tiny replaces every size by one that a CPU does in seconds, to try the command itself.
"""
from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.common import REPO, RESULTS, environment
from runtime import cli
from runtime.checkpoint import read_checkpoint
from runtime.files import write_text_atomic

MODEL_SIZES = ["--d_model", "32", "--transformer_blocks", "2", "--num_heads", "4", "--num_kv_heads", "2", "--head_dim", "8", "--num_experts", "4", "--d_ff", "32", "--context_length", "32"]
TINY = [*MODEL_SIZES, "--batch_size", "2", "--grad_accum", "1", "--dtype", "float32"]
RESUME_STEPS = 40
MOST_LEFT = 60  # seconds kept for each stage still to come
PYTHON = sys.executable


def stages(name: str, folder: Path, tiny: bool) -> dict[str, list[list[str]]]:
    """The commands of each stage, in the order of what one would miss most."""
    def bench(module: str, what: str, flags: str, *tail: str) -> list[str]:
        return [PYTHON, "-m", f"benchmarks.{module}", "--name", f"{name}_{what}", *([] if tiny else flags.split()), *tail]

    size = TINY if tiny else []
    small = ["--repeats", "2", "--no-parts", "--no-memory", "--min_sample_seconds", "0.01"] if tiny else []
    steps = ["--max_steps", "8" if tiny else "150", "--warmup_steps", "2" if tiny else "50"]
    attention = ["--batch_size", "1", "--num_heads", "2", "--num_kv_heads", "1", "--context_length", "16", "--head_dim", "8", "--repeats", "1"] if tiny else []
    decode = ["--prompt_tokens", "4", "--new_tokens", "4", "--repeats", "1"] if tiny else []
    generation = [*MODEL_SIZES, "--dtype", "float32", "--variants", "ours", "ours_int8", "plain", "--batch_sizes", "1", "2", "--contexts", "8", "--prefill", "8", "--new_tokens", "4",
                  "--repeats", "1", "--min_sample_seconds", "0.001"] if tiny else []
    has_transformers = importlib.util.find_spec("transformers") is not None
    plain = ["--no-use_attention_bias"]
    modern = ["--preset", "gptoss-modern"]
    adamw = ["--optimizer", "adamw"]
    resume = [PYTHON, "train.py", "--preset", "modern-8gb", *(TINY if tiny else ["--batch_size", "16", "--grad_accum", "1"]), "--deterministic", "--lr", "1e-3",
              "--warmup_steps", "2", "--max_steps", str(RESUME_STEPS), "--save_interval", str(RESUME_STEPS // 2), "--val_interval", "1000", "--keep_last", "0"]
    return {
        "tests": [[PYTHON, "-m", "pytest", *(["tests/test_process.py"] if tiny else ["-m", "gpu", "-rs"])]],
        "steps": [
            bench("train", "default", "--dtype bfloat16 --batch_size 16 --grad_accum 1 --variants ours,ours_compiled,loop", *size, *small),
            bench("train", "no_table", "--dtype bfloat16 --batch_size 16 --grad_accum 1 --variants ours,ours_compiled,loop,dense_compiled", *plain, *size, *small),
            bench("train", "modern", "--dtype bfloat16 --batch_size 64 --grad_accum 1 --variants " + ("ours_compiled,hf_grouped_bf16" if has_transformers else "ours,ours_compiled"),
                  *modern, *adamw, *size, *small)],
        "experts": [bench("experts", "default", "--rows 65536 --dtype bfloat16", *(["--rows", "64", "--repeats", "1", *MODEL_SIZES] if tiny else []))],
        "loss": [bench("loss", "default", "--rows 32768 --d_model 1024 --chunk_rows 1024,2048,4096,8192 --head_bias --dtype bfloat16",
                       *(["--vocabulary_size", "301", "--d_model", "16", "--rows", "64", "--chunk_rows", "16", "--repeats", "1"] if tiny else []))],
        "attention": [bench("attention", "default", "--batch_size 16 --num_heads 32 --num_kv_heads 8 --context_length 2048 --head_dim 32 --dtype bfloat16", *attention),
                      bench("attention", "modern", "--batch_size 16 --num_heads 16 --num_kv_heads 4 --context_length 2048 --head_dim 64 --dtype bfloat16", *attention),
                      bench("attention", "gpt_oss", "--batch_size 4 --num_heads 64 --num_kv_heads 8 --context_length 4096 --head_dim 64 --dtype bfloat16", "--cases", "sinks",
                            "--variants", "manual,rescaled,flex", *attention)],
        "optimizer": [bench("optimizer", "modern", "--repeats 5 --variants adamw_fused,muon,muon_bfloat16", *modern, *(MODEL_SIZES if tiny else []), *(["--repeats", "1"] if tiny else []))],
        # A compiled side compiles anew for every batch size and context, half a minute each.
        "decode": [bench("decode", "default", "--dtype bfloat16 --variants ours ours_int8 ours_compiled plain --batch_sizes 1 8 32 --contexts 1024 --repeats 3", *generation),
                   bench("decode", "modern", "--dtype bfloat16 --variants ours ours_int8 ours_compiled plain" + " hf_grouped" * has_transformers + " --batch_sizes 1 32 --contexts 1024 --repeats 3",
                         *modern, *generation)],
        "runs": [bench("end_to_end", f"run_{what}", "--dtype bfloat16", *flags, *size, *steps, "--compile", *decode)
                 for what, flags in (("default", ["--batch_size", "16", "--grad_accum", "1"]), ("modern", [*modern, *adamw, "--batch_size", "16", "--grad_accum", "1"]),
                                     ("modern_muon", [*modern, "--batch_size", "16", "--grad_accum", "1"]))],
        "resume": [[*resume, "--ckpt_dir", str(folder / "straight"), "--graph_dir", str(folder / "graphs_straight")],
                   [*resume, "--ckpt_dir", str(folder / "resumed"), "--graph_dir", str(folder / "graphs_resumed")],
                   [PYTHON, "-m", "benchmarks.gpu", "--forget_after", str(RESUME_STEPS // 2), str(folder / "resumed")],
                   [PYTHON, "train.py", "--resume", "--ckpt_dir", str(folder / "resumed"), "--graph_dir", str(folder / "graphs_resumed")],
                   [PYTHON, "-m", "benchmarks.gpu", "--compare", str(folder / "straight"), str(folder / "resumed")]],
    }


def run_stage(stage: str, commands: list[list[str]], out: Path, limit_s: float) -> dict:
    """Run a stage's commands into OUT/STAGE.log until one fails or the time is up; returns how it went."""
    started, code = time.monotonic(), 0
    env = os.environ | {"PYTHONUNBUFFERED": "1"}
    if "GPTOSS_DATA" in env:
        env["GPTOSS_DATA"] = os.path.abspath(env["GPTOSS_DATA"])
    with open(out / f"{stage}.log", "w") as log:
        for command in commands:
            if command[1] == "train.py" and "--resume" not in command and "GPTOSS_DATA" in env:
                command = [*command, "--data_dir", env["GPTOSS_DATA"]]
            log.write("$ " + " ".join(command) + "\n")
            log.flush()
            left = limit_s - (time.monotonic() - started)
            try:
                code = subprocess.run(command, cwd=REPO, env=env, stdout=log, stderr=subprocess.STDOUT, timeout=max(left, 1)).returncode
            except subprocess.TimeoutExpired:
                code = 124
            if code:
                break
    return {"exit_code": code, "seconds": round(time.monotonic() - started, 1)}


def time_for(stage: int, num_stages: int, left_s: float) -> float:
    """Seconds that a stage may take: what is left, without MOST_LEFT (or an equal share, where that is less) for each one after it."""
    after = num_stages - stage - 1
    return left_s - after * min(MOST_LEFT, left_s / (after + 1))


def forget_after(step: int, folder: str) -> int:
    """Remove the checkpoints after `step`, as if the run had been killed there."""
    kept = 0
    for path in Path(folder).glob("*.pt"):
        if path.name == f"step_{step:07d}.pt":
            kept += 1
        else:
            path.unlink()
    if not kept:
        raise ValueError(f"{folder} has no checkpoint of step {step}")
    return 0


def compare(first: str, second: str) -> int:
    """Whether the last checkpoints of two folders are the same, bit for bit; the largest difference if not."""
    a, b = (read_checkpoint(Path(folder) / "latest.pt", optimizer=True) for folder in (first, second))
    tensors = [(name, x, getattr(b, group)[name]) for group in ("model", "optimizer") for name, x in getattr(a, group).items()]
    different = [(name, (x.double() - y.double()).abs().max().item()) for name, x, y in tensors if not torch.equal(x, y)]
    parameters = sum(x.numel() for x in a.model.values())
    print(f"step {a.step} and {b.step}, {parameters:,} parameters, {len(tensors)} tensors with the moments: "
          + ("all equal, bit for bit" if not different else f"{len(different)} differ, most in {max(different, key=lambda d: d[1])}"))
    return int(bool(different) or a.step != b.step)


def main(argv: list[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    parser.add_argument("--name", help="results go to benchmarks/results/..._NAME_....json")
    parser.add_argument("--out", help="folder for logs and copies of the results")
    parser.add_argument("--stages", nargs="+", help="which (default: all)")
    parser.add_argument("--limit_s", type=float, default=560, help="seconds that all stages may take together (default: 560)")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU, to try the command itself")
    parser.add_argument("--forget_after", nargs=2, metavar=("STEP", "CKPT_DIR"), help=argparse.SUPPRESS)
    parser.add_argument("--compare", nargs=2, metavar="CKPT_DIR", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.forget_after:
        return forget_after(int(args.forget_after[0]), args.forget_after[1])
    if args.compare:
        return compare(*args.compare)
    if not args.name or not args.out:
        raise ValueError("give --name NAME (of the machine) and --out FOLDER (for logs and results)")
    out = Path(args.out).resolve()
    (out / "work").mkdir(parents=True, exist_ok=True)
    all_stages = stages(args.name, out / "work", args.tiny)
    if unknown := set(args.stages or []) - all_stages.keys():
        raise ValueError(f"no such stage: {', '.join(sorted(unknown))}; there are {', '.join(all_stages)}")
    began, summary = time.time(), {}
    chosen = args.stages or list(all_stages)
    for i, stage in enumerate(chosen):
        left = time_for(i, len(chosen), args.limit_s - (time.time() - began))
        summary[stage] = run_stage(stage, all_stages[stage], out, left) if left > 5 else {"exit_code": None, "seconds": 0, "why": "no time left"}
        print(f"{stage:10} {summary[stage]}", flush=True)
        for path in RESULTS.glob(f"*{args.name}_*.json"):
            if path.stat().st_mtime >= began:
                shutil.copy(path, out / path.name)
        write_text_atomic(out / "summary.json", json.dumps({"environment": environment(), "stages": summary}, indent=1) + "\n")
    shutil.rmtree(out / "work")
    return int(any(stage["exit_code"] != 0 for stage in summary.values()))


if __name__ == "__main__":
    cli.run_main(main)
