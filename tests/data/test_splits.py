"""Which side a document goes to: copies go together, and both sides have text."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest

from prepare_data import main
from runtime.data import formats
from runtime.data.shards import open_data
from runtime.data.splits import text_digest
from runtime.data.tokenizers import tokenizer_from_state
from tests.test_prepare_data import documents, run, stories, write_jsonl

STORY = "Löwe, one two.\nA café.\n\nThe end."
VARIANTS = {
    "CRLF": lambda text: text.replace("\n", "\r\n"),
    "CR": lambda text: text.replace("\n", "\r"),
    "byte order mark": lambda text: "\ufeff" + text,
    "blanks at the ends": lambda text: f" \n{text}\t \n",
    "blanks at the line ends": lambda text: text.replace("\n", "  \n"),
    "blanks for newlines": lambda text: text.replace("\n", " "),
    "no-break spaces": lambda text: text.replace(" ", "\u00a0"),
    "decomposed": lambda text: unicodedata.normalize("NFD", text),
    "end-of-text": lambda text: text + "<|endoftext|>",
    "end-of-text on a line": lambda text: text + "\n<|endoftext|>\n",
}


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet", "txt"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_copies_in_another_form_leave_validation(tmp_path, form, variant):
    """50 of 50 copies that differed by CRLF, a mark or NFD stayed in the validation text."""
    texts = [f"{i} {STORY}" for i in range(20)]
    changed = [VARIANTS[variant](text) for text in texts]
    path = tmp_path / f"train.{form}"
    if form == "jsonl":
        write_jsonl(path, changed)
    elif form == "csv":
        rows = "".join('"{}"\n'.format(text.replace('"', '""')) for text in changed)
        path.write_text("text\n" + rows, encoding="utf-8", newline="")
    elif form == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        import pyarrow

        parquet.write_table(pyarrow.table({"text": changed}), path)
    else:
        path.write_text("<|endoftext|>".join(changed), encoding="utf-8", newline="")
    own = write_jsonl(tmp_path / "val.jsonl", [*texts, "only here"])
    _, val = run(tmp_path, "--files", path, "--val_files", own)
    assert documents(val) == ["only here"]


def test_digests_tell_texts_apart():
    assert text_digest("one two") != text_digest("one too") != text_digest("")
    assert text_digest("é") == text_digest("e\u0301") != text_digest("e")
    assert text_digest("a\ud800") != text_digest("a\ud801")


def test_a_long_document_is_identified_by_its_start(tmp_path, monkeypatch):
    """In a .txt file it is read in parts, in .jsonl whole: copies must still meet."""
    long = " ".join(f"word{i}" for i in range(200_000))
    (tmp_path / "a.txt").write_text(long + "<|endoftext|>short")
    own = write_jsonl(tmp_path / "v.jsonl", [long, "other"])
    train, val = run(tmp_path, "--files", tmp_path / "a.txt", "--val_files", own)
    assert documents(val) == ["other"] and train.manifest["total_documents"] == 2


# ------------------------------------------------------------------------------------ few documents
def book(lines: int = 4000) -> str:
    return "\n".join(f"Line {i} of a long book about nothing." for i in range(lines))


@pytest.mark.parametrize("part", [1 << 20, 5000], ids=["whole", "in parts"])
def test_one_text_file_is_cut(tmp_path, capsys, monkeypatch, part):
    """A book, or Shakespeare: "all 1 documents went to the other side of val_ratio"."""
    monkeypatch.setattr(formats, "PART_CHARACTERS", part)
    (tmp_path / "book.txt").write_text(book())
    train, val = run(tmp_path, "--files", tmp_path / "book.txt")
    printed = capsys.readouterr().out
    assert "the text is one document, too few to choose among: its last 0.01 part" in printed
    assert "characters) is the validation text" in printed and "blank lines" not in printed
    ((head,), (tail,)) = documents(train), documents(val)
    assert head + tail == book() or f"{head}\n{tail}" == book() or f"{head} {tail}" == book()
    assert 0.005 < len(tail) / len(book()) < 0.03
    said = train.manifest["source"]["validation"]
    assert said["val_ratio"] == 0.01 and 0.97 < said["from_character"] / len(book()) < 1


def test_the_share_and_blank_lines_of_one_document(tmp_path, capsys):
    text = book(500).replace("\n", "\n\n")
    (tmp_path / "book.txt").write_text(text)
    _, val = run(tmp_path, "--files", tmp_path / "book.txt", "--val_ratio", "0.25")
    assert 0.23 < len(documents(val)[0]) / len(text) < 0.27
    assert (
        "blank lines occur 499 times, so --document_separator '\\n\\n'" in capsys.readouterr().out
    )
    train, val = run(tmp_path, "--files", tmp_path / "book.txt", "--document_separator", r"\n\n")
    assert len(documents(train)) + len(documents(val)) == 500


def test_few_documents_of_one_side_are_cut_too(tmp_path, capsys):
    """Three books: at 0.01, no hash says val."""
    texts = [f"{name}\n" + book(300) for name in ("first", "second", "third")]
    for name, text in zip("abc", texts, strict=True):
        (tmp_path / f"{name}.txt").write_text(text)
    train, val = run(tmp_path, "--files", tmp_path)
    assert "the text is 3 documents, too few" in capsys.readouterr().out
    *whole, third = documents(train)
    (tail,) = documents(val)
    assert whole == texts[:2] and third + "\n" + tail == texts[2] or third + tail == texts[2]


def test_bpe_learns_from_the_training_part_alone(tmp_path):
    lengths = []
    for where in ("{0}\n{1}", "{1}\n{0}"):
        (tmp_path / "a.txt").write_text(where.format(book(), " zebra" * 100))
        train, _ = run(tmp_path, "--files", tmp_path / "a.txt", tokenizer="bpe:320")
        tokenizer = tokenizer_from_state(train.tokenizer_state)
        lengths.append(len(tokenizer.encode(" zebra")))
    # At the end it is in the validation part, which no merge comes from.
    assert lengths[0] > 3 and lengths[1] == 1


def test_copies_of_one_document_are_not_cut(tmp_path):
    """A cut would put the same text on both sides."""
    path = write_jsonl(tmp_path / "a.jsonl", [book(50)] * 5)
    with pytest.raises(ValueError, match="all 5 documents went to the other split"):
        run(tmp_path, "--files", path)


# ---------------------------------------------------------------------------------------- a folder
def test_a_dataset_folder_gives_what_its_files_give(tmp_path, capsys):
    """A .txt file in --dataset FOLDER was a document per line; one format of several was read."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.txt").write_text("A fox\n\nran.\n<|endoftext|>\nNULL\n<|endoftext|>\nA hen sat.\n")
    write_jsonl(folder / "b.jsonl", ["None", *stories(20)])
    (folder / "c.csv").write_text("text\nNA\nnull\n")
    (folder / "README.md").write_text("about")
    sets = {}
    for flag in ("--dataset", "--files"):
        train, val = run(tmp_path, flag, folder, "--val_ratio", "0.2")
        sets[flag] = train.manifest["pair"]
        texts = sorted(documents(train) + documents(val))
        assert texts == sorted(
            ["A fox\n\nran.", "NULL", "A hen sat.", "None", "NA", "null", *stories(20)]
        )
        out = capsys.readouterr().out
        assert "reading 3 files: 1 csv, 1 jsonl, 1 txt; ignored: README.md" in out
    assert len(set(sets.values())) == 1


def test_a_dataset_folder_with_its_own_validation(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", stories(50))
    write_jsonl(folder / "validation.jsonl", stories(10, seed=1) + stories(50)[:5])
    train, val = run(tmp_path, "--dataset", folder)
    assert documents(train) == stories(50) and documents(val) == stories(10, seed=1)
    # A share is asked for: its own validation is left out.
    train, val = run(tmp_path, "--dataset", folder, "--val_ratio", "0.3")
    assert sorted(documents(train) + documents(val)) == sorted(stories(50))
    # It has none: a share of the training text.
    (folder / "validation.jsonl").unlink()
    write_jsonl(folder / "train.jsonl", stories(900))
    train, val = run(tmp_path, "--dataset", folder)
    assert sorted(documents(train) + documents(val)) == sorted(stories(900))


# -------------------------------------------------------------------------------------- real text
def test_tinystories_as_other_people_have_it(tmp_path, shared_dir):
    """The same stories as .txt with Windows newlines in UTF-16 and as gzipped .csv: one set."""
    import csv
    import gzip
    import io

    lines = (shared_dir / "tinystories" / "valid.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"].strip() for line in lines[:600]]
    text = "\n<|endoftext|>\n".join(texts).replace("\n", "\r\n")
    Path(tmp_path / "a.txt").write_bytes(text.encode("utf-16"))
    file = io.StringIO()
    csv.writer(file).writerows([["text"], *([text] for text in texts)])
    (tmp_path / "b.CSV.gz").write_bytes(gzip.compress(file.getvalue().encode()))
    write_jsonl(tmp_path / "c.jsonl", texts)
    pairs = set()
    for name in ("a.txt", "b.CSV.gz", "c.jsonl"):
        main(
            ["--files", str(tmp_path / name), "--out_dir", str(tmp_path / "out")]
            + ["--tokenizer", "byte", "--val_ratio", "0.1"]
        )
        train, val = open_data(tmp_path / "out")
        pairs.add(train.manifest["pair"])
        assert train.manifest["total_documents"] + val.manifest["total_documents"] == 600
    assert len(pairs) == 1
