"""How fast is prepare_data.py? Against tiktoken's own batch encoding on the same cores, same text,
in turns.

    python -m benchmarks.prepare [--files FILE.jsonl ...] [--tokenizer o200k_base] [--repeats 7]

`pipeline` is what prepare_data does with text in memory (hash, split, tokenise, in order, ids as
arrays); `prepare_data` is the whole program after the tokenizer is loaded: reading JSON, pipeline,
shards, digests, syncing to disk, publishing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path

import prepare_data
from benchmarks.common import SHARED, alternate, save_results, summary
from runtime.base.cli import run_main
from runtime.base.process import usable_cores
from runtime.data.splits import split_by_hash
from runtime.data.tokenizers import load_tokenizer


class Texts:
    """Documents in memory, as a source."""

    fraction = None

    def __init__(self, texts: list[str]):
        self.texts = texts

    def documents(self):
        for text in self.texts:
            yield text, True


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument(
        "--files",
        nargs="+",
        default=[str(SHARED / "tinystories" / name) for name in ("train.jsonl", "valid.jsonl")],
        help="JSON lines with a text column",
    )
    p.add_argument("--tokenizer", default="o200k_base")
    p.add_argument("--repeats", type=int, default=7)
    p.add_argument("--num_proc", type=int, default=usable_cores(), help="cores for both sides")
    o = p.parse_args(argv)

    texts = [
        json.loads(line)["text"]
        for name in o.files
        for line in Path(name).read_text(encoding="utf-8").splitlines()
    ]
    num_bytes = sum(len(text.encode()) for text in texts)
    tokenizer = load_tokenizer(o.tokenizer)
    num_tokens = sum(
        len(ids) + 1
        for ids in tokenizer.encoding.encode_ordinary_batch(texts, num_threads=o.num_proc)
    )
    os.environ["TQDM_DISABLE"] = "1"
    prepare_data.load_tokenizer = lambda name: tokenizer  # both sides start with it loaded

    def pipeline() -> int:
        batches = prepare_data.make_batches(Texts(texts), split_by_hash(0.01))
        return sum(
            len(e.ids)
            for _, encoded in prepare_data.encode_in_order(tokenizer, batches, o.num_proc)
            for e in encoded.values()
        )

    with tempfile.TemporaryDirectory() as folder:

        def whole() -> int:
            options = prepare_data.parse_options(
                [
                    "--files",
                    *o.files,
                    "--out_dir",
                    f"{folder}/data",
                    "--tokenizer",
                    o.tokenizer,
                    "--num_proc",
                    str(o.num_proc),
                ]
            )
            return sum(
                manifest["total_tokens"] for manifest in prepare_data.prepare(options).values()
            )

        if not pipeline() == whole() == num_tokens:
            raise ValueError("the sides disagree on the number of tokens")
        seconds = alternate(
            {
                "tiktoken encode_ordinary_batch": lambda: tokenizer.encoding.encode_ordinary_batch(
                    texts, num_threads=o.num_proc
                ),
                "pipeline": pipeline,
                "prepare_data": whole,
            },
            o.repeats,
        )

    reference = seconds["tiktoken encode_ordinary_batch"]
    results = {
        "text": {"documents": len(texts), "bytes": num_bytes, "tokens": num_tokens},
        "tokenizer": o.tokenizer,
        "num_proc": o.num_proc,
        "repeats": o.repeats,
        "sides": {},
    }
    for name, values in seconds.items():
        ratio = statistics.median(
            r / v for r, v in zip(reference, values, strict=True)
        )  # of each round: both sides of it met the same machine
        results["sides"][name] = {
            "seconds": summary(values),
            "tokens_per_second": round(num_tokens / statistics.median(values)),
            "speed_against_tiktoken": round(ratio, 3),
        }
        print(
            f"{name:32} {num_tokens / statistics.median(values):12,.0f} tokens/s   {ratio:.2f} x "
            f"tiktoken   (median of {o.repeats})"
        )
    save_results("prepare", results)
    return 0


if __name__ == "__main__":
    run_main(main)
