"""prepare_data.py: every document once, on one side, exactly as the tokenizer says.

And never half a dataset on disk.
"""

from __future__ import annotations

import csv
import errno
import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiktoken

import prepare_data
from config_model import TrainConfig
from prepare_data import (
    Batch,
    encode_in_order,
    main,
    make_batches,
    parse_options,
    prepare,
)
from runtime.checkpoint.write import save_checkpoint
from runtime.data import formats, toy_stories
from runtime.data import shards as data
from runtime.data.file_sets import find_files
from runtime.data.formats import safe_cut
from runtime.data.shards import open_data, read_manifest
from runtime.data.sources import FileSource
from runtime.data.splits import split_by_hash, text_digest
from runtime.data.tokenizer import Tokenizer
from runtime.data.tokenizers import load_tokenizer, read_tokenizer, tokenizer_from_state
from tests.builders import random_model, tiny_config
from tests.builders_data import BAD
from tests.builders_tokenizer import stand_in
from tests.conftest import REPO
from tests.nightly import nightly_but

BYTE = load_tokenizer("byte")


def stories(n: int, seed: int = 0) -> list[str]:
    """Distinct small texts, with quotes, commas, newlines, accents and emoji in them."""
    rng = random.Random(seed)
    words = [
        "cat",
        "dog's",
        "café",
        '"Hi,"',
        "ran\nfast",
        "tree.",
        "😀",
        "über",
        "1,234",
        "  two  spaces",
    ]
    return [
        f"story {seed}.{i} " + " ".join(rng.choices(words, k=rng.randrange(3, 30)))
        for i in range(n)
    ]


def write_jsonl(path: Path, texts: list[str | None]) -> Path:
    path.write_text(
        "".join(json.dumps({"n": i, "text": text}) + "\n" for i, text in enumerate(texts)),
        encoding="utf-8",
    )
    return path


def run(tmp_path: Path, *arguments, out: str = "out", tokenizer: str = "byte"):
    """Prepare, open, return (train, val)."""
    main([str(a) for a in arguments] + ["--out_dir", str(tmp_path / out), "--tokenizer", tokenizer])
    return open_data(tmp_path / out)


def documents(shards) -> list[str]:
    """The documents of a split, decoded; checks that each ends with end-of-text."""
    ids = shards.read(0, shards.num_tokens)
    ends = np.flatnonzero(ids == shards.end_of_text_id)
    assert ends[-1] == len(ids) - 1
    tokenizer = tokenizer_from_state(shards.tokenizer_state)
    return [tokenizer.decode(part[:-1]) for part in np.split(ids, ends[:-1] + 1)]


def tree(folder: Path) -> dict[str, str]:
    """Every file under a folder, hidden ones too, and the digest of its bytes."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


# ----------------------------------------------------------------------------------- what comes out
def test_every_document_once_in_order_followed_by_end_of_text(tmp_path):
    texts = stories(500)
    train, val = run(
        tmp_path,
        "--files",
        write_jsonl(tmp_path / "a.jsonl", texts),
        "--val_ratio",
        "0.1",
        "--shard_size",
        "1000",
    )
    to_val = split_by_hash(0.1)
    assert documents(train) == [text for text in texts if to_val(text_digest(text)) == "train"]
    assert documents(val) == [text for text in texts if to_val(text_digest(text)) == "val"]
    assert 25 < len(documents(val)) < 90
    assert all(shard["tokens"] == 1000 for shard in train.manifest["shards"][:-1])


def test_ids_are_tiktokens_own(tmp_path, shared_dir, o200k):
    """Real stories, o200k_base: the same ids as one call of tiktoken per story."""
    texts = [
        json.loads(line)["text"]
        for line in (shared_dir / "tinystories" / "valid.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()[:300]
    ]
    train, val = run(
        tmp_path,
        "--files",
        write_jsonl(tmp_path / "a.jsonl", texts),
        "--val_ratio",
        "0.05",
        tokenizer="o200k_base",
    )
    encoding, to_val = load_tokenizer("o200k_base").encoding, split_by_hash(0.05)
    for shards, split in (train, "train"), (val, "val"):
        expected = [
            i
            for text in texts
            if to_val(text_digest(text)) == split
            for i in [*encoding.encode_ordinary(text), 199_999]
        ]
        assert shards.read(0, shards.num_tokens).tolist() == expected
    assert (
        train.vocabulary_size == 200_019
        and train.manifest["tokenizer"] == load_tokenizer("o200k_base").summary()
    )


def test_manifest_says_where_it_all_comes_from(tmp_path):
    """D16: it was {num_shards, total_tokens}."""
    texts = stories(100)
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    train, val = run(tmp_path, "--files", path, "--val_ratio", "0.2")
    m = train.manifest
    assert (
        m["format"],
        m["version"],
        m["split"],
        m["dtype"],
        m["vocabulary_size"],
        m["end_of_text_id"],
    ) == ("gptoss-shards", 1, "train", "uint16", 257, 256)
    assert m["source"] == {
        "files": [{"name": path.as_posix(), "bytes": path.stat().st_size}],
        "text_column": "text",
        "validation": {"val_ratio": 0.2},
    }
    assert m["total_documents"] + val.manifest["total_documents"] == 100
    assert (
        m["total_bytes"]
        == sum(len(text.encode()) for text in documents(train))
        == m["total_tokens"] - m["total_documents"]
    )
    assert m["num_shards"] == 1 and m["shards"][0]["sha256"] == data.sha256_of_file(
        tmp_path / "out/train/shard_0000.npy"
    )
    assert (
        m["tokens_sha256"]
        == hashlib.sha256(train.read(0, m["total_tokens"]).astype("<u4").tobytes()).hexdigest()
    )


@pytest.mark.parametrize("tokenizer, num_files", [("byte", 6), ("gpt2:compact", 8)])
def test_the_same_input_gives_the_same_bytes(tmp_path, monkeypatch, tokenizer, num_files):
    monkeypatch.setitem(tiktoken.registry.ENCODINGS, "gpt2", stand_in())
    monkeypatch.setattr(prepare_data, "BATCH_CHARACTERS", 300)
    path = write_jsonl(tmp_path / "a.jsonl", stories(300))
    for out, cores in ("a", 1), ("b", 7):
        run(
            tmp_path,
            "--files",
            path,
            "--val_ratio",
            "0.1",
            "--max_tokens",
            "9000",
            "--shard_size",
            "4000",
            "--num_proc",
            cores,
            out=out,
            tokenizer=tokenizer,
        )
    assert tree(tmp_path / "a") == tree(tmp_path / "b") and len(tree(tmp_path / "a")) == num_files


def test_equal_documents_go_to_one_side(tmp_path):
    """D13: 3 % exact duplicates put 9 of 103 validation stories into train."""
    texts = stories(300)
    # White space around it makes no other story.
    copies = [f"\n {text}  " for text in texts]
    train, val = run(
        tmp_path, "--files", write_jsonl(tmp_path / "a.jsonl", texts + copies), "--val_ratio", "0.2"
    )
    sides = [{text.strip() for text in documents(shards)} for shards in (train, val)]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 300


def test_rerun_leaves_nothing_of_the_earlier_set(tmp_path):
    """D9: stale shards of a run with smaller ones were trained on.

    D15: with another val_ratio, 420 of 514 val stories were in train.
    """
    texts = stories(300)
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    run(tmp_path, "--files", path, "--val_ratio", "0.5", "--shard_size", "100", tokenizer="bpe:280")
    assert len(list((tmp_path / "out/train").iterdir())) > 20
    train, val = run(tmp_path, "--files", path, "--val_ratio", "0.1")
    assert sorted(tree(tmp_path / "out")) == [
        f"{split}/{name}" for split in ("train", "val") for name in ("meta.json", "shard_0000.npy")
    ]
    assert (
        not set(documents(train)) & set(documents(val))
        and len(documents(train)) + len(documents(val)) == 300
    )


def test_empty_documents_are_left_out(tmp_path):
    train, val = run(
        tmp_path,
        "--files",
        write_jsonl(tmp_path / "a.jsonl", ["", " \n\t", None, *stories(50)]),
        "--val_ratio",
        "0.3",
    )
    assert len(documents(train)) + len(documents(val)) == 50


def test_max_tokens_is_exact_and_counts_what_is_there(tmp_path):
    texts = stories(300)
    train, val = run(
        tmp_path,
        "--files",
        write_jsonl(tmp_path / "a.jsonl", texts),
        "--val_ratio",
        "0.1",
        "--max_tokens",
        "5e3",
    )
    assert train.num_tokens == 5000 >= val.num_tokens > 0
    ids = train.read(0, 5000)
    assert (
        train.manifest["total_documents"] == (ids == 256).sum() + 1
        and train.manifest["total_bytes"] == (ids != 256).sum()
    )
    whole = [text for text in texts if split_by_hash(0.1)(text_digest(text)) == "train"]
    assert "<|endoftext|>".join(whole).encode().startswith(BYTE.decode_bytes(ids))


def test_max_tokens_reads_no_further_than_it_must():
    """Constant memory and an endless source: only a bounded number of batches is ever ahead."""
    read = 0

    class Endless:
        fraction = None

        def documents(self):
            nonlocal read
            while True:
                read += 1
                yield f"{read} " + "x" * 1000, True

    results = encode_in_order(BYTE, make_batches(Endless(), lambda digest: "train"), num_proc=2)
    for _ in range(3):
        next(results)
    results.close()
    per_batch = prepare_data.BATCH_CHARACTERS // 1000 + 1
    assert read <= (3 + 2 * 2 + 3) * per_batch


def test_batches_keep_every_part():
    class Source:
        fraction = 0.5

        def documents(self):
            yield from [("a", False), ("", False), (" ", True), ("", True), ("b", True)]

    batches = list(
        make_batches(Source(), lambda digest: "val" if digest == text_digest("a") else "train")
    )
    assert batches == [
        Batch({"train": [("b", True)], "val": [("a", False), ("", False), (" ", True)]}, set(), 1.0)
    ]


# ------------------------------------------------------------------------------------------ formats
def test_all_formats_give_the_same_tokens(tmp_path):
    import pyarrow
    import pyarrow.parquet

    texts = [text.strip() for text in stories(80)]
    write_jsonl(tmp_path / "a.jsonl", texts)
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(texts) + "\n", encoding="utf-8")
    (tmp_path / "bom.txt").write_text(
        "<|endoftext|>".join(texts) + "<|endoftext|>", encoding="utf-8-sig", newline="\r\n"
    )
    with open(tmp_path / "a.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["id", "text"], *enumerate(texts)])
    pyarrow.parquet.write_table(
        pyarrow.table({"id": list(range(80)), "text": texts}), tmp_path / "a.parquet"
    )
    for name in ("a.jsonl", "a.txt", "a.csv"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    pairs = {
        name: run(tmp_path, "--files", tmp_path / name, "--val_ratio", "0.2")[0].manifest["pair"]
        for name in (
            "a.jsonl",
            "a.txt",
            "bom.txt",
            "a.csv",
            "a.parquet",
            "a.jsonl.gz",
            "a.txt.gz",
            "a.csv.gz",
        )
    }
    assert len(set(pairs.values())) == 1, pairs


def test_several_files_are_read_in_order(tmp_path):
    texts = stories(60)
    for i in range(3):
        write_jsonl(tmp_path / f"{i}.jsonl", texts[i * 20 : i * 20 + 20])
    val = write_jsonl(tmp_path / "val.jsonl", stories(5, seed=9))
    train, val = run(
        tmp_path, "--files", *(tmp_path / f"{i}.jsonl" for i in (2, 0, 1)), "--val_files", val
    )
    assert documents(train) == texts[40:] + texts[:40] and documents(val) == stories(5, seed=9)


def test_separator_can_be_anything_and_straddle_reads(tmp_path):
    texts = [text.replace("\n", " ").strip() for text in stories(2000)]
    (tmp_path / "a.txt").write_text("\n===\n".join(texts), encoding="utf-8")
    train, val = run(
        tmp_path,
        "--files",
        tmp_path / "a.txt",
        "--document_separator",
        "\\n===\\n",
        "--val_ratio",
        "0.1",
    )
    assert sorted(documents(train) + documents(val)) == sorted(texts)
    assert train.manifest["source"]["document_separator"] == "\n===\n"


def test_text_column(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"content": text, "text": 5}) + "\n" for text in stories(50))
    )
    train, _ = run(
        tmp_path, "--files", tmp_path / "a.jsonl", "--text_column", "content", "--val_ratio", "0.2"
    )
    assert documents(train)[0].startswith("story 0.")


def test_a_huge_text_file_is_read_in_parts(tmp_path, shared_dir, o200k, monkeypatch):
    """One document of any size, in constant memory.

    The tokens are those of the whole text, with one end-of-text at its end.
    """
    texts = [
        json.loads(line)["text"]
        for line in (shared_dir / "tinystories" / "valid.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()[:400]
    ]
    (tmp_path / "a.txt").write_text("\n".join(texts), encoding="utf-8")
    val = write_jsonl(tmp_path / "val.jsonl", stories(5))
    monkeypatch.setattr(formats, "PART_CHARACTERS", 5000)
    tokenizer = load_tokenizer("o200k_base")
    source = FileSource(find_files([str(tmp_path / "a.txt")]))
    parts = list(source.documents())
    assert (
        len(parts) > 50
        and all(len(text) <= 5000 for text, _ in parts[:-1])
        and [ends for _, ends in parts] == [False] * (len(parts) - 1) + [True]
    )
    train, _ = run(
        tmp_path, "--files", tmp_path / "a.txt", "--val_files", val, tokenizer="o200k_base"
    )
    assert train.read(0, train.num_tokens).tolist() == [
        *tokenizer.encode("\n".join(texts).strip()),
        tokenizer.end_of_text_id,
    ]
    assert train.manifest["total_documents"] == 1


def test_a_document_in_parts_is_left_out_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "PART_CHARACTERS", 100)
    long = ["one " * 200, "two " * 200, "three " * 200]
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(long))
    (tmp_path / "v.txt").write_text("<|endoftext|>".join([long[1], "four " * 200]))
    train, val = run(tmp_path, "--files", tmp_path / "a.txt", "--val_files", tmp_path / "v.txt")
    assert [text.split()[0] for text in documents(train)] == ["one", "two", "three"] and documents(
        val
    ) == [("four " * 200).strip()]


def test_safe_cut():
    assert safe_cut("one two three", 10) == 7
    assert safe_cut("one.\ntwo.\nthree", 12) == 10
    assert safe_cut("x" * 20, 10) == 10


# --------------------------------------------------------------------------------------- validation
def test_validation_files_lose_what_train_has(tmp_path):
    texts, own = stories(100), stories(30, seed=1)
    train, val = run(
        tmp_path,
        "--files",
        write_jsonl(tmp_path / "a.jsonl", texts),
        "--val_files",
        write_jsonl(tmp_path / "v.jsonl", own[:15] + texts[::10] + own[15:]),
    )
    assert documents(train) == texts and documents(val) == own


def test_an_empty_side_is_refused(tmp_path):
    one = write_jsonl(tmp_path / "a.jsonl", ["only this"])
    with pytest.raises(
        ValueError,
        match="only 1 document found, so no validation split is possible: use --val_files",
    ):
        run(tmp_path, "--files", one)
    two = write_jsonl(tmp_path / "e.jsonl", ["one", "two"])
    with pytest.raises(
        ValueError,
        match="all 2 documents went to the other split at val_ratio 1e-09, "
        "so val would be empty: raise --val_ratio, or use --val_files",
    ):
        run(tmp_path, "--files", two, "--val_ratio", "1e-9")
    with pytest.raises(ValueError, match="every validation document is also in train"):
        run(
            tmp_path,
            "--files",
            one,
            "--val_files",
            write_jsonl(tmp_path / "b.jsonl", ["only this"]),
        )
    with pytest.raises(ValueError, match="all documents are empty"):
        run(tmp_path, "--files", write_jsonl(tmp_path / "c.jsonl", ["", " "]))
    (tmp_path / "d.jsonl").write_text("")
    with pytest.raises(ValueError, match="all documents are empty"):
        run(tmp_path, "--files", tmp_path / "d.jsonl")
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------- tokenizers
def test_bpe_is_trained_on_train_alone_and_saved_beside_the_shards(tmp_path):
    texts = [f"the cat number {i} sat on the mat" for i in range(100)]
    train, val = run(
        tmp_path,
        "--files",
        write_jsonl(tmp_path / "a.jsonl", texts),
        "--val_files",
        write_jsonl(tmp_path / "v.jsonl", ["zqzqzqzq " * 50]),
        tokenizer="bpe:270",
    )
    tokenizer = load_tokenizer("bpe:270", tmp_path / "out" / "train")
    assert (
        train.tokenizer_state == val.tokenizer_state == tokenizer.to_state()
        and train.vocabulary_size == 270
    )
    assert documents(train) == texts
    assert not any(b"zq" in tokenizer.token_bytes(i) for i in range(269))
    (tmp_path / "out/val/tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json is missing or damaged"):
        open_data(tmp_path / "out")


def test_compact_shards_are_the_bases_renumbered(tmp_path, shared_dir, o200k, capsys):
    """Real stories: the same tokens, bytes and documents.

    Ids run from 0 up to as many as occur in train or val, plus the unused bytes and end-of-text.
    """
    texts = [
        json.loads(line)["text"]
        for line in (shared_dir / "tinystories" / "valid.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()[:300]
    ]
    files = (
        "--files",
        write_jsonl(tmp_path / "a.jsonl", texts),
        "--val_ratio",
        "0.1",
        "--shard_size",
        "20_000",
    )
    plain = run(tmp_path, *files, out="plain", tokenizer="o200k_base")
    assert (
        "of 200,019 ids occur (--tokenizer o200k_base:compact keeps only these)"
        in capsys.readouterr().out
    )
    compact = run(tmp_path, *files, tokenizer="o200k_base:compact")
    printed = capsys.readouterr().out
    tokenizer = load_tokenizer("o200k_base:compact", tmp_path / "out" / "val")
    occur = set()
    assert {shards.manifest["dtype"] for shards in plain} == {"uint32"}
    assert {shards.manifest["dtype"] for shards in compact} == {"uint16"}
    for old, new in zip(plain, compact, strict=True):
        base_ids = old.read(0, old.num_tokens)
        assert np.array_equal(np.array(tokenizer.base_ids)[new.read(0, new.num_tokens)], base_ids)
        assert all(
            new.manifest[key] == old.manifest[key]
            for key in ("total_tokens", "total_bytes", "total_documents", "source")
        )
        assert new.tokenizer_state == tokenizer.to_state() and documents(new) == documents(old)
        occur |= set(base_ids.tolist())
    assert len(compact[0].manifest["shards"]) > 1 and compact[0].fingerprint != plain[0].fingerprint
    every_byte = {tokenizer.base.encoding.encode_single_token(bytes([b])) for b in range(256)}
    assert tokenizer.base_ids == sorted(occur | every_byte) and compact[0].vocabulary_size == len(
        tokenizer.base_ids
    )
    assert (
        f"{len(occur):,} of 200,019 ids occur\n" in printed
        and f"o200k_base:compact, vocabulary {len(tokenizer.base_ids):,};" in printed
    )


def test_compact_knows_val_and_nothing_that_was_cut_off(tmp_path, monkeypatch):
    """Ids of validation text count, those beyond --max_tokens do not.

    They would be rows of the model that nothing trains.
    """
    base = Tokenizer("gpt2", stand_in([b"qzqzqz", b"xyxyxy"]))
    monkeypatch.setitem(tiktoken.registry.ENCODINGS, "gpt2", base.encoding)
    texts = ["the dog ran to the big tree", "the cat", "xyxyxy"]
    limit = len(base.encode(texts[0])) + 1
    train, val = run(
        tmp_path,
        "--files",
        write_jsonl(tmp_path / "a.jsonl", texts),
        "--val_files",
        write_jsonl(tmp_path / "v.jsonl", ["qzqzqz"]),
        "--max_tokens",
        limit,
        tokenizer="gpt2:compact",
    )
    tokenizer = tokenizer_from_state(train.tokenizer_state)
    longer = {tokenizer.token_bytes(i) for i in range(tokenizer.end_of_text_id)} - {
        bytes([b]) for b in range(256)
    }
    assert longer == {base.token_bytes(i) for i in base.encode(texts[0])} - {
        bytes([b]) for b in range(256)
    } | {b"qzqzqz"}
    assert documents(train) == texts[:1] and documents(val) == ["qzqzqz"] and val.num_tokens == 2


@pytest.mark.parametrize("name", ["mixtral", "qwen"])
def test_text_is_prepared_with_a_published_tokenizer(tmp_path, name, request):
    """For train.py --init_from an imported model.

    From its folder, a checkpoint, or text prepared with it. On any number of cores.
    """
    folder = request.getfixturevalue(name)
    tokenizer = read_tokenizer(folder)
    model = random_model(tiny_config(vocabulary_size=tokenizer.vocabulary_size + 3))
    checkpoint = save_checkpoint(
        tmp_path / "ckpt",
        1,
        model,
        None,
        train_config=TrainConfig(),
        tokenizer_state=tokenizer.to_state(),
    )
    texts = stories(400)
    path, digests = write_jsonl(tmp_path / "a.jsonl", texts), set()
    for i, source in enumerate((folder, checkpoint, tmp_path / "0", tmp_path / "0" / "val")):
        train, val = run(
            tmp_path,
            "--files",
            path,
            "--val_ratio",
            "0.1",
            "--num_proc",
            i + 1,
            out=str(i),
            tokenizer=str(source),
        )
        assert train.tokenizer_state == val.tokenizer_state == tokenizer.to_state()
        digests.add(train.fingerprint + val.fingerprint)
    assert len(digests) == 1 and train.end_of_text_id == tokenizer.end_of_text_id
    texts = [text for text in texts if split_by_hash(0.1)(text_digest(text)) == "train"]
    # Mixtral's: </s> <s>
    expected = [i for text in texts for i in tokenizer.encode(text) + tokenizer.between_documents]
    assert train.read(0, train.num_tokens).tolist() == expected and train.manifest[
        "total_bytes"
    ] == sum(len(text.encode()) for text in texts)


def test_tokenizer_paths_that_have_none(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", stories(5))
    nameless = save_checkpoint(
        tmp_path / "ckpt",
        1,
        random_model(tiny_config()),
        None,
        train_config=TrainConfig(),
        tokenizer_state=None,
    )
    for source, message in (
        (tmp_path, "meta.json does not exist"),
        (path, "not a checkpoint"),
        (nameless, "does not say which tokenizer it was trained with"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            run(tmp_path, "--files", path, tokenizer=str(source))
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_toy_stories(tmp_path):
    train, val = run(
        tmp_path,
        "--dataset",
        "toy",
        "--num_stories",
        "200",
        "--val_ratio",
        "0.1",
        tokenizer="bpe:512",
    )
    assert {*documents(train), *documents(val)} == {toy_stories.story(i) for i in range(200)}
    assert train.manifest["source"]["num_stories"] == 200
    with pytest.raises(ValueError, match="distinct stories"):
        run(tmp_path, "--dataset", "toy", "--num_stories", toy_stories.NUM_DISTINCT + 1)


# --------------------------------------------------------------------------------- datasets library
@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A folder that `datasets` loads as it would load one from the Hub.

    Train, validation (5 of its 20 stories also in train), extra columns.
    """
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "hub"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", stories(100))
    write_jsonl(folder / "validation.jsonl", stories(15, seed=1) + stories(100)[:5])
    # A local folder is read by us, not by `datasets`.
    monkeypatch.setattr(prepare_data, "is_folder", lambda name: False)
    return folder


@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
def test_datasets_own_validation_minus_train(tmp_path, hub, streaming):
    train, val = run(tmp_path, "--dataset", hub, *streaming)
    assert documents(train) == stories(100) and documents(val) == stories(15, seed=1)
    assert train.manifest["source"]["validation"]["split"] == "validation"


def test_datasets_options(tmp_path, hub):
    # Asked for: its own validation is not used.
    train, val = run(tmp_path, "--dataset", hub, "--val_ratio", "0.2")
    assert sorted(documents(train) + documents(val)) == sorted(stories(100))
    train, val = run(tmp_path, "--dataset", hub, "--split", "train[:10%]")
    assert documents(train) == stories(100)[:10] and set(stories(15, seed=1)) <= set(documents(val))
    train, val = run(
        tmp_path, "--dataset", hub, "--split", "train+validation", "--val_ratio", "0.2"
    )
    assert set(documents(train) + documents(val)) == {*stories(100), *stories(15, seed=1)}
    (hub / "validation.jsonl").unlink()
    train, val = run(tmp_path, "--dataset", hub, "--val_ratio", "0.2")
    assert len(documents(train)) + len(documents(val)) == 100


@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--split", "nope"], "has no split 'nope': give --split as one of train, validation"),
        (["--text_column", "nope"], "has no column 'nope': give --text_column as one of n, text"),
        (["--text_column", "n"], "column 'n' holds int, not text"),
        (["--dataset_config", "nope"], "BuilderConfig 'nope' not found"),
    ],
)
def test_datasets_mistakes_are_one_line(tmp_path, hub, arguments, message, streaming):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, "--dataset", hub, *arguments, *streaming)
    assert not (tmp_path / "out").exists()


def test_no_network_is_one_line_with_a_way_out(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")

    def offline(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "get_dataset_split_names", offline)
    with pytest.raises(
        ValueError,
        match=(
            "roneneldan/TinyStories could not be read .*Couldn't reach the Hub.*use --dataset "
            "toy or --files"
        ),
    ):
        run(tmp_path)
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("line", BAD)
def test_mistakes_are_refused_before_anything_happens(tmp_path, monkeypatch, line):
    """D10 (`--shard_size 0.5` wrote 35,846 empty files in 4 s and continued).

    And every flag that could not be honoured.
    """
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl"):
        write_jsonl(tmp_path / name, stories(10))
    for name in ("a.txt", "a.md", "a.zip", "a.parquet.gz"):
        (tmp_path / name).write_text("x")
    (tmp_path / "empty").mkdir()
    before = tree(tmp_path)
    with pytest.raises(ValueError) as caught:
        parse_options(line.split())
    assert "\n" not in str(caught.value)
    assert tree(tmp_path) == before


def test_counts_are_read_as_people_write_them():
    o = parse_options(
        ["--dataset", "toy", "--shard_size", "1e6", "--max_tokens", "2_000", "--num_proc", "3"]
    )
    assert (o.shard_size, o.max_tokens, o.num_proc) == (10**6, 2000, 3)
    assert (
        parse_options([]).shard_size == 10**8
        and parse_options([]).dataset == "roneneldan/TinyStories"
    )


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl line 2 is not JSON"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"txt": "y", "id": 1}\n',
            r"a.jsonl line 2 has no 'text' \(it has txt, id\): give --text_column",
        ),
        ("a.jsonl", b'["text"]\n', "a.jsonl line 1 has no 'text'"),
        ("a.jsonl", b'{"text": 5}\n', "a.jsonl line 1: column 'text' holds int, not text"),
        ("a.jsonl", b"[" * 200_000, "a.jsonl"),
        (
            "a.txt",
            b"good text\xff\xfe",
            "a.txt line 1, byte 9: 0xff is not utf-8 .*: give --encoding",
        ),
        (
            "a.csv",
            b"id,body\n1,x\n",
            r"a.csv has no column 'text' \(it has id, body\): give --text_column",
        ),
        ("a.csv", b"", r"a.csv has no column 'text' \(it has none\)"),
        ("a.parquet", b"not parquet at all", "a.parquet"),
        ("a.txt.gz", b"\x1f\x8bnot gzip", "a.txt.gz: Unknown compression method"),
        ("a.jsonl.xz", b"\xfd7zXZ\x00not xz", "a.jsonl.xz: "),
        ("a.jsonl.bz2", b"BZh91AY&SYnot bzip2", "a.jsonl.bz2: "),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfdnot zstd", "a.jsonl.zst: "),
        (
            "a.txt.gz",
            gzip.compress(os.urandom(5000).hex().encode())[:-900],
            "a.txt.gz: Compressed file ended",
        ),
    ],
)
def test_unreadable_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        run(tmp_path, "--files", tmp_path / name)
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def command(*arguments, **options):
    return subprocess.run(
        [sys.executable, "prepare_data.py", *map(str, arguments)],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=60,
        **options,
    )


def test_the_command_prints_one_line_and_exits_2(tmp_path):
    for arguments in (["--shard_size", "0.5"], ["--nope"], ["--files", "nothere.txt"]):
        result = command(*arguments, "--out_dir", tmp_path / "out")
        assert (
            result.returncode == 2
            and result.stdout == ""
            and result.stderr.startswith("error: ")
            and result.stderr.count("\n") == 1
        )
    path = write_jsonl(tmp_path / "a.jsonl", stories(50))
    result = command(
        "--files", path, "--val_ratio", "0.2", "--tokenizer", "byte", "--out_dir", tmp_path / "out"
    )
    assert (
        result.returncode == 0
        and result.stderr == ""
        and "Next: python train.py --data_dir" in result.stdout
    )
    help_text = command("--help").stdout
    for flag in vars(parse_options(["--dataset", "toy"])):
        assert f"--{flag}" in help_text


# ------------------------------------------------------------------- what is on disk, at any moment
@pytest.fixture
def old(tmp_path) -> tuple[Path, dict]:
    """A finished set, and its files."""
    run(
        tmp_path,
        "--files",
        write_jsonl(tmp_path / "old.jsonl", stories(60, seed=3)),
        "--val_ratio",
        "0.2",
        "--shard_size",
        "2000",
    )
    return tmp_path / "out", tree(tmp_path / "out")


@pytest.mark.parametrize("place", ["train/notes.txt", "val/shard_0099.npy", "train/.hidden"])
def test_files_of_others_are_never_removed(tmp_path, old, place):
    out, _ = old
    (out / place).write_text("mine")
    before = tree(out)
    with pytest.raises(ValueError, match=f"{Path(place).name}|did not write"):
        run(
            tmp_path,
            "--files",
            write_jsonl(tmp_path / "a.jsonl", stories(50)),
            "--val_ratio",
            "0.2",
        )
    assert tree(out) == before


def test_folders_that_hold_something_else_are_refused(tmp_path):
    files = ("--files", write_jsonl(tmp_path / "a.jsonl", stories(50)), "--val_ratio", "0.2")
    for name, fill in {
        "shards without a manifest": lambda folder: (folder / "shard_0000.npy").write_text("mine"),
        "the reference's set": lambda folder: (folder / "meta.json").write_text(
            '{"num_shards": 1, "total_tokens": 5}'
        ),
        "left over": lambda folder: (
            (folder.parent / ".partial").mkdir()
            or (folder.parent / ".partial" / "mine").write_text("mine")
        ),
    }.items():
        folder = tmp_path / name / "train"
        folder.mkdir(parents=True)
        fill(folder)
        before = tree(tmp_path / name)
        with pytest.raises(
            ValueError, match="did not write|delete it or give another --out_dir|was not written by"
        ):
            run(tmp_path, *files, out=name)
        assert tree(tmp_path / name) == before
    (tmp_path / "a file").write_text("mine")
    with pytest.raises(ValueError, match="is not a folder"):
        run(tmp_path, *files, out="a file")


def test_two_runs_at_once_are_refused(tmp_path, old):
    out, before = old
    pytest.importorskip("fcntl", reason="no folder locks on this system")
    with (
        data.folder_lock(out),
        pytest.raises(ValueError, match="another prepare_data.py is writing"),
    ):
        run(tmp_path, "--files", tmp_path / "old.jsonl", "--val_ratio", "0.3")
    assert tree(out) == before


@pytest.mark.parametrize("after", range(0, 12, 2))
def test_a_full_disk_leaves_the_earlier_set(tmp_path, old, monkeypatch, after):
    out, before = old
    append, calls = data.ShardWriter.append, []

    def full_disk(self, ids):
        calls.append(ids)
        if len(calls) > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, ids)

    monkeypatch.setattr(prepare_data, "BATCH_CHARACTERS", 500)
    monkeypatch.setattr(data.ShardWriter, "append", full_disk)
    with pytest.raises(OSError, match="No space left"):
        run(
            tmp_path,
            "--files",
            write_jsonl(tmp_path / "a.jsonl", stories(200)),
            "--val_ratio",
            "0.3",
        )
    assert tree(out) == before and sorted(p.name for p in out.iterdir()) == ["train", "val"]


@pytest.mark.parametrize("split", data.SPLITS)
def test_a_disk_that_fails_while_ids_are_renumbered_leaves_the_earlier_set(
    tmp_path, old, monkeypatch, split
):
    out, before = old
    monkeypatch.setitem(tiktoken.registry.ENCODINGS, "gpt2", stand_in())
    renumber = data.renumber

    def failing(folder, *args):
        renumber(folder, *args)
        if folder.name == split:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(data, "renumber", failing)
    with pytest.raises(OSError, match="Input/output error"):
        run(
            tmp_path,
            "--files",
            write_jsonl(tmp_path / "a.jsonl", stories(200)),
            "--val_ratio",
            "0.3",
            tokenizer="gpt2:compact",
        )
    assert tree(out) == before and sorted(p.name for p in out.iterdir()) == ["train", "val"]


def test_a_text_that_fails_midway_leaves_the_earlier_set(tmp_path, old):
    out, before = old
    path = write_jsonl(tmp_path / "a.jsonl", stories(5000))
    path.write_text(path.read_text() + "not json\n")
    with pytest.raises(ValueError, match="a.jsonl line 5001 is not JSON"):
        run(tmp_path, "--files", path, "--val_ratio", "0.3")
    assert tree(out) == before and sorted(p.name for p in out.iterdir()) == ["train", "val"]


# Runs prepare_data in forked children and ends each, without any clean-up, before its k-th
# operation on the output folder.
KILLER = """
import json, os, shutil, sys
from pathlib import Path
import tiktoken
import prepare_data
from runtime.data.shards import open_data
from tests.builders_tokenizer import stand_in
tiktoken.registry.ENCODINGS["gpt2"] = stand_in()
old, new, work = (Path(a) for a in sys.argv[1:4])
arguments = sys.argv[4:]

def child(action):
    pid = os.fork()
    if not pid:
        try:
            action()
            os._exit(0)
        except BaseException as error:
            print(type(error), error, file=sys.stderr, flush=True)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def prepare(kill_at=None):
    seen = 0
    def hook(event, args):
        nonlocal seen
        changes = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir")
        if event == "open" and isinstance(args[1], str):
            changes = set(args[1]) & set("wa+")
        if changes and str(args[0]).startswith(str(work)):
            seen += 1
            if seen == kill_at:
                os._exit(9)
    if kill_at:
        sys.addaudithook(hook)
    sys.stdout = open(os.devnull, "w")
    prepare_data.main(arguments + ["--out_dir", str(work)])

def files(folder):
    found = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in found}

pairs = [open_data(folder)[0].manifest["pair"] for folder in (old, new)]
assert pairs[0] != pairs[1]
left = [0, 0]
for kill_at in range(1, 1000):
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(old, work)
    code = child(lambda: prepare(kill_at))
    if code == 0:
        break
    assert code == 9, code
    train, val = open_data(work)  # whole and of one run, whatever moment it was
    left[pairs.index(train.manifest["pair"])] += 1
    assert child(prepare) == 0
    assert files(work) == files(new), kill_at
print(json.dumps({"kills": kill_at - 1, "old": left[0], "new": left[1]}))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked children")
@pytest.mark.parametrize("tokenizer", nightly_but(["bpe:270", "gpt2:compact"], 1))
def test_killed_before_any_operation_one_whole_set_remains(tmp_path, old, monkeypatch, tokenizer):
    """Reliability 20: a kill at every operation on the output folder leaves the old set or the new.

    A re-run gives the new one, byte for byte.
    """
    out, _ = old
    path = write_jsonl(tmp_path / "new.jsonl", stories(80))
    monkeypatch.setitem(tiktoken.registry.ENCODINGS, "gpt2", stand_in())
    arguments = [
        "--files",
        str(path),
        "--val_ratio",
        "0.3",
        "--tokenizer",
        tokenizer,
        "--shard_size",
        "1500",
        "--num_proc",
        "1",
    ]
    main([*arguments, "--out_dir", str(tmp_path / "new")])
    result = subprocess.run(
        [sys.executable, "-c", KILLER, out, tmp_path / "new", tmp_path / "work", *arguments],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["kills"] >= 30 and found["old"] >= 10 and found["new"] >= 10, found


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_ctrl_c_is_one_line_and_leaves_the_earlier_set(tmp_path, old):
    out, before = old
    process = (
        # A shell's background jobs ignore SIGINT, and children inherit that.
        subprocess.Popen(
            [
                sys.executable,
                "prepare_data.py",
                "--dataset",
                "toy",
                "--num_stories",
                "100000",
                "--tokenizer",
                "byte",
                "--out_dir",
                str(out),
            ],
            cwd=REPO,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    )
    deadline = time.monotonic() + 30
    while not list(out.glob(".partial/train/*.npy")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and errors.strip() == "interrupted"
    assert tree(out) == before and sorted(p.name for p in out.iterdir()) == ["train", "val"]


def test_prepare_returns_the_manifests(tmp_path):
    options = parse_options(
        [
            "--files",
            str(write_jsonl(tmp_path / "a.jsonl", stories(50))),
            "--val_ratio",
            "0.2",
            "--tokenizer",
            "byte",
            "--out_dir",
            str(tmp_path / "out"),
        ]
    )
    manifests = prepare(options)
    for split in ("train", "val"):
        assert read_manifest(tmp_path / "out" / split).items() >= manifests[split].items()
