"""Shards for tests, and command lines that prepare_data.py rejects."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from runtime.data import shards as data
from runtime.data.shards import ShardWriter, write_manifest
from runtime.data.tokenizers import load_tokenizer

BYTE = load_tokenizer("byte")


def write_split(folder: Path, ids, shard_size: int = 1000, wide: bool = False, **changes) -> Path:
    """Write a split as prepare_data does, with the byte tokenizer, and return its folder.

    ids: those beyond the vocabulary are written too. wide: uint32, as all shards once were.
    `changes` replace values of the manifest before it is sealed.
    """
    ids = np.asarray(ids, dtype=np.uint32)
    largest = 1 << 16 if wide else max(256, int(ids.max()))
    writer = ShardWriter(folder, shard_size, largest + 1)
    writer.append(ids)
    counts = writer.finish()
    manifest = {
        "format": data.FORMAT,
        "version": data.VERSION,
        "split": folder.name,
        "pair": "p",
        "tokenizer": BYTE.to_state(),
        "vocabulary_size": 257,
        "end_of_text_id": 256,
        "source": {},
        "total_documents": 1,
        "total_bytes": max(1, len(ids)),
        **counts,
    }
    write_manifest(folder, manifest | changes)
    return folder


def write_pair(folder: Path, **val_changes) -> Path:
    write_split(folder / "train", np.arange(100))
    write_split(folder / "val", np.arange(50), **val_changes)
    return folder


BAD = [
    "--shard_size 0.5",
    "--shard_size 0",
    "--shard_size -1",
    "--shard_size nan",
    "--shard_size inf",
    "--shard_size 1e999999999",
    "--shard_size x",
    "--shard_size",
    "--max_tokens 0",
    "--max_tokens 1.5",
    "--num_proc 0",
    "--num_proc 1e9",
    "--val_ratio 0",
    "--val_ratio 1",
    "--val_ratio -0.1",
    "--val_ratio nan",
    "--val_ratio x",
    "--tokenizer o300k",
    "--tokenizer bpe:",
    "--tokenizer bpe:100",
    "--tokenizer bpe:1e4",
    "--tokenizer byte:compact",
    "--tokenizer bpe:300:compact",
    "--num_stories 5",
    "--dataset toy --num_stories 0",
    "--files a.jsonl --dataset toy",
    "--files a.jsonl --split train",
    "--files a.jsonl --streaming",
    "--files a.jsonl --dataset_config x",
    "--files a.jsonl --num_stories 5",
    "--dataset toy --streaming",
    "--dataset toy --split train",
    "--dataset toy --dataset_config x",
    "--dataset toy --text_column x",
    "--dataset toy --document_separator x",
    "--files a.jsonl --document_separator x",
    "--files a.txt --text_column x",
    "--files a.txt --document_separator=",
    "--files a.jsonl --val_files b.jsonl --val_ratio 0.1",
    "--files a.jsonl a.jsonl",
    "--files a.jsonl --val_files ./a.jsonl",
    "--files nothere.jsonl",
    "--files nothere/*.txt",
    "--files *.pdf",
    "--files empty",
    "--files a.md",
    "--files a.zip",
    "--files . a.jsonl",
    "--files a.jsonl *.jsonl",
    "--files - -",
    "--files a.txt --encoding nope",
    "--files a.txt --encoding base64",
    "--files a.txt --text_format md",
    "--dataset toy --text_format txt",
    "--dataset toy --encoding cp1252",
    "--dataset . --streaming",
    "--dataset . --dataset_config x",
    "--files a.parquet.gz",
    "--files",
    "--out",
    "--nope 1",
    "extra",
]
