"""runtime/evaluation/documents: the same texts, from files or from shards, in any order."""

from __future__ import annotations

import pytest

import prepare_data
from runtime.evaluation import documents as documents_module
from runtime.evaluation.config import EvaluateConfig
from runtime.evaluation.documents import file_documents, shard_documents, sorted_documents
from runtime.evaluation.evaluate import evaluate
from tests.builders_evaluation import checkpoint as checkpoint_of
from tests.builders_evaluation import report_of, texts, uniform_model, write_texts


@pytest.fixture
def data(tmp_path, capsys):
    """Return (a dataset's folder, the file of its validation text)."""
    train = write_texts(tmp_path / "train.jsonl", texts(30, seed=1))
    val = write_texts(tmp_path / "val.jsonl", [*dict.fromkeys(texts(25, seed=2)), "the end"])
    argv = ["--files", train, "--val_files", val, "--tokenizer", "byte"]
    prepare_data.main([*argv, "--out_dir", str(tmp_path / "data")])
    capsys.readouterr()
    return str(tmp_path / "data"), val


@pytest.mark.parametrize("at_once", [7, documents_module.READ_TOKENS])
def test_shards_hold_the_texts_of_their_files(data, monkeypatch, at_once):
    """Whatever part of the shards is read at a time, also one that ends inside a character."""
    monkeypatch.setattr(documents_module, "READ_TOKENS", at_once)
    folder, val = data
    from_shards, from_file = shard_documents(folder), file_documents([val])
    assert from_shards.texts == from_file.texts
    assert from_shards.digest == from_file.digest
    assert from_shards.sources == ["data/val"] and from_file.sources == ["val.jsonl"]


def test_a_checkpoint_is_judged_on_the_shards_of_data_dir(data, tmp_path):
    folder, val = data
    ckpt = checkpoint_of(tmp_path / "model", uniform_model())
    from_file = report_of(ckpt, val)
    settings = dict(device="cpu", resamples=200, num_threads=1)
    from_shards = evaluate(EvaluateConfig(ckpt=ckpt, data_dir=folder, **settings))
    assert from_shards["bits_per_byte"] == from_file["bits_per_byte"]


def test_order_does_not_matter_and_empty_texts_do_not_count():
    one, two = (sorted_documents(some, ["b", "a"]) for some in (["x", "", "y"], ["y", "x"]))
    assert (one.texts, one.digest, one.sources) == (two.texts, two.digest, ["a", "b"])
    assert sorted_documents(["x", "y", "y"], []).digest != one.digest


def test_the_first_documents_are_read_and_no_more():
    def endless():
        while True:
            yield "a"

    assert sorted_documents(endless(), ["x"], most=3).texts == ["a"] * 3


def test_lone_surrogates_are_counted_as_what_is_read():
    found = sorted_documents(["a\ud800"], ["name\udcff"])
    assert found.texts == ["a\N{REPLACEMENT CHARACTER}"] and found.num_bytes == 4
    found.sources[0].encode()


def test_long_documents_come_whole(tmp_path):
    """A .txt file is read in parts; a document is one all the same."""
    text = "word " * 400_000 + "end"
    path = tmp_path / "long.txt"
    path.write_text(text + "<|endoftext|>short", encoding="utf-8")
    found = file_documents([str(path)])
    assert sorted(map(len, found.texts)) == [5, len(text)]
