"""One checkpoint through every way out and back: files, seconds, memory, logits, and the greedy
text of predict.py and of those who read the files.

    GPTOSS_SHARED=shared python -m benchmarks.exports --name qwen3_moe --ckpt checkpoints/best.pt
    python -m benchmarks.exports --name 300m --vocabulary_size 50304 --d_model 512 \\
        --transformer_blocks 8 --num_heads 8 --head_dim 64 ...   # random weights

Each script runs as a user would run it, in a process of its own. Logits are compared, in float32,
on the first stories of TinyStories' validation text, a story at a time; greedy texts are token ids,
up to --new_tokens after each prompt, those of predict.py the measure (a checkpoint's only).
transformers, onnxruntime and llama.cpp (where llama-cpp-python is installed) are given the prompt
as text, through the files' own tokenizer. Results go to benchmarks/results/exports_NAME.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import REPO, SHARED, save_results
from config_model import ModelConfig, PredictConfig, TrainConfig, total_parameters
from model import LLM
from runtime.base import cli
from runtime.checkpoint.read import load_model
from runtime.checkpoint.write import save_checkpoint
from runtime.data.tokenizers import load_tokenizer, tokenizer_of
from runtime.inference.predictor import Predictor
from runtime.interop.gguf import run_llama_cpp
from runtime.interop.huggingface import family_of
from scripts import export_onnx

PROMPTS = ("Once upon a time", "The little dog was", "One day, Lily and Tom")
ROUTES = {
    "hf": ("export_hf", "hf", []),
    "hf bfloat16": ("export_hf", "hf_bf16", ["--dtype", "bfloat16"]),
    "gguf f32": ("export_gguf", "f32.gguf", []),
    "gguf q8_0": ("export_gguf", "q8_0.gguf", ["--quantize", "q8_0"]),
    "onnx": ("export_onnx", "model.onnx", []),
}


def run(*command: object) -> dict:
    """Seconds and peak memory (with the pages of mapped files) of a Python process; RuntimeError
    with what it said if it fails.
    """
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=REPO,
            stdout=said,
            stderr=subprocess.STDOUT,
            text=True,
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        text = said.read()
    if process.returncode:
        raise RuntimeError(f"{command[:2]}: {text[-2000:]}")
    checks = [
        line.removeprefix("check: ")
        for line in text.splitlines()
        if line.startswith(("check:", "note:"))
    ]
    return {
        "seconds": time.perf_counter() - started,
        "peak_rss_bytes": usage.ru_maxrss * 1024,
        "says": checks,
    }


def size_of(path: Path) -> int:
    """Bytes of the weights' files: of a folder its safetensors, of a model file itself and its
    data.
    """
    return sum(
        file.stat().st_size
        for file in (
            path.glob("*.safetensors") if path.is_dir() else path.parent.glob(f"{path.name}*")
        )
    )


def random_checkpoint(config: ModelConfig, folder: Path) -> Path:
    """A checkpoint of the weights that training starts from, with the byte tokenizer."""
    torch.manual_seed(0)
    return save_checkpoint(
        folder,
        0,
        LLM(config),
        None,
        train_config=TrainConfig(),
        tokenizer_state=load_tokenizer("byte").to_state(),
    )


# ------------------------------------------------------------------------------ who reads the files
class Transformers:
    def __init__(self, folder: Path):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def logits(self, ids: list[int]) -> np.ndarray:
        with torch.inference_mode():
            return self.model(torch.tensor([ids])).logits[0].float().numpy()

    def greedy(self, prompt: str, count: int) -> list[int]:
        inputs = self.tokenizer(prompt, return_tensors="pt")
        return self.model.generate(
            **inputs,
            do_sample=False,
            temperature=None,
            top_k=None,
            top_p=None,
            max_new_tokens=count,
        )[0, inputs["input_ids"].shape[1] :].tolist()


class OnnxRuntime:
    def __init__(self, path: Path):
        from tokenizers import Tokenizer

        self.tokenizer, self.session = (
            Tokenizer.from_file(str(path.with_suffix(".tokenizer.json"))),
            export_onnx.open_session(path),
        )
        about = self.session.get_modelmeta().custom_metadata_map
        self.config, self.start, self.stops = (
            ModelConfig(**json.loads(about["config"])),
            [*map(int, about["start_id"].split())],
            json.loads(about["stop_ids"]),
        )

    def logits(self, ids: list[int]) -> np.ndarray:
        return export_onnx.run(self.session, self.config, torch.tensor([ids]))[0][0].numpy()

    def greedy(self, prompt: str, count: int) -> list[int]:
        new, ids, past = (
            [*self.start, *self.tokenizer.encode(prompt, add_special_tokens=False).ids],
            [],
            None,
        )
        while len(ids) < count and not set(ids) & set(self.stops):
            logits, past = export_onnx.run(self.session, self.config, torch.tensor([new]), past)
            new = [int(logits[0, -1].argmax())]
            ids += new
        return ids


class LlamaCpp:
    """In a process of its own: what fails in llama.cpp ends it."""

    def __init__(self, path: Path):
        self.path, self.pool = (
            str(path),
            ProcessPoolExecutor(1, multiprocessing.get_context("spawn")),
        )

    def logits(self, ids: list[int]) -> np.ndarray:
        return self.pool.submit(
            run_llama_cpp, self.path, ids, "", torch.get_num_threads()
        ).result()[0]

    def greedy(self, prompt: str, count: int) -> list[int]:
        return self.pool.submit(_llama_greedy, self.path, prompt, count).result()


def _llama_greedy(path: str, prompt: str, count: int) -> list[int]:
    import llama_cpp

    llama = llama_cpp.Llama(
        path,
        n_ctx=0,
        n_gpu_layers=0,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=False,
    )
    ids = []
    for token in llama.generate(
        llama.tokenize(prompt.encode(), add_bos=True, special=False), temp=0.0, repeat_penalty=1.0
    ):
        ids.append(token)
        if len(ids) == count or token == llama.token_eos():
            break
    llama.close()
    return ids


def compare(
    reader, model: LLM, stories: list[list[int]], expected: dict[str, list[int]], count: int
) -> dict:
    """Largest logit difference over the stories, and how many of the greedy tokens are
    predict.py's, up to the first that is not.
    """
    differences, largest = [], 0.0
    with torch.inference_mode():
        for ids in stories:
            ours = model(torch.tensor([ids])).logits[0].numpy()
            differences.append(float(np.abs(ours - reader.logits(ids)).max()))
            largest = max(largest, float(np.abs(ours).max()))
    same = {}
    for prompt, ids in expected.items():
        theirs = reader.greedy(prompt, count)
        same[prompt] = next(
            (i for i, (a, b) in enumerate(zip(ids, theirs, strict=False)) if a != b),
            min(len(ids), len(theirs)),
        )
    return {
        "largest_logit_difference": max(differences),
        "largest_logit": largest,
        "stories": len(stories),
        "tokens": sum(map(len, stories)),
        "same_greedy_tokens": same,
        "all_greedy_tokens_same": all(same[p] == len(ids) for p, ids in expected.items()),
    }


# --------------------------------------------------------------------------------------------- main
def main(argv: list[str] | None = None) -> int:
    p = cli.parser(__doc__)
    p.add_argument(
        "--name", required=True, help="results go to benchmarks/results/exports_NAME.json"
    )
    p.add_argument(
        "--ckpt", help="checkpoint to export (default: random weights, of the model's flags)"
    )
    p.add_argument(
        "--stories", type=int, default=20, help="stories to compare logits on (default: 20)"
    )
    p.add_argument(
        "--new_tokens", type=int, default=100, help="greedy tokens after each prompt (default: 100)"
    )
    cli.add_config_flags(p, ModelConfig)
    args = p.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        results = measure(args, Path(temporary))
    save_results(f"exports_{args.name}", results)
    return 0


def measure(args: argparse.Namespace, folder: Path) -> dict:
    """All routes of one checkpoint, as it is stored."""
    given = cli.settings_from(args, ModelConfig)
    if args.ckpt and (given.explicit or given.preset):
        raise ValueError("--ckpt has a model of its own: leave the model's flags out")
    ckpt = (
        Path(args.ckpt).absolute()
        if args.ckpt
        else random_checkpoint(given.build(ModelConfig), folder / "ckpt")
    )
    model, checkpoint = load_model(ckpt)
    config, tokenizer = model.config, tokenizer_of(checkpoint)
    lines = (
        (SHARED / "tinystories" / "valid.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()[: args.stories]
    )
    stories = [
        [tokenizer.start_id, *tokenizer.encode(json.loads(line)["text"])][: config.context_length]
        for line in lines
    ]
    expected = {}
    # Random weights with more rows than the byte tokenizer has ids say what only predict.py knows
    # to be nothing.
    if args.ckpt:
        settings = PredictConfig(
            ckpt=args.ckpt,
            temperature=0.0,
            max_new_tokens=args.new_tokens,
            device="cpu",
            dtype="float32",
        )
        predictor = Predictor(settings)
        for prompt in PROMPTS:
            list(predictor.stream(prompt, settings))
            expected[prompt] = predictor.last.ids
    results = {
        "family": family_of(config),
        "model": dataclasses.asdict(config),
        "parameters": total_parameters(config),
        "weights": "checkpoint" if args.ckpt else "random",
        "tokenizer": tokenizer.name,
        "checkpoint_step": checkpoint.step,
        "threads": torch.get_num_threads(),
        "device": "cpu",
        "new_tokens": args.new_tokens,
        "greedy_tokens": {prompt: len(ids) for prompt, ids in expected.items()},
        "routes": {},
    }
    for route, (script, name, flags) in ROUTES.items():
        out = folder / name
        results["routes"][route] = run(
            "-m", f"scripts.{script}", "--ckpt", ckpt, "--out", out, *flags
        ) | {"bytes": size_of(out)}
        print(
            route,
            {key: value for key, value in results["routes"][route].items() if key != "says"},
            flush=True,
        )
    back, again = folder / "back.pt", folder / "again"
    results["routes"]["import"] = run(
        "-m", "scripts.import_hf", "--model", folder / "hf", "--out", back
    ) | {"bytes": back.stat().st_size}
    run("-m", "scripts.export_hf", "--ckpt", back, "--out", again)
    files = sorted(
        path.name for path in again.iterdir() if path.suffix in (".safetensors", ".json")
    )
    results["export_import_export"] = {
        name: (folder / "hf" / name).read_bytes() == (again / name).read_bytes() for name in files
    }
    readers = {"transformers": (Transformers, "hf"), "onnxruntime": (OnnxRuntime, "model.onnx")}
    if importlib.util.find_spec("llama_cpp"):
        readers["llama.cpp"] = (LlamaCpp, "f32.gguf")
    results["readers"] = {}
    for reader, (kind, name) in readers.items():
        package = reader.replace("llama.cpp", "llama-cpp-python")
        results["readers"][reader] = {"version": importlib.metadata.version(package)} | compare(
            kind(folder / name), model, stories, expected, args.new_tokens
        )
        print(reader, results["readers"][reader], flush=True)
    return results


if __name__ == "__main__":
    cli.run_main(main)
