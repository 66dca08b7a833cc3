"""What names of files, folders and patterns mean, and what a folder's files are for."""

from __future__ import annotations

import io
import json
import os
import threading
from pathlib import Path

import pytest

from runtime.data.file_sets import FileSet, dataset_folder, find_files, format_of
from runtime.data.sources import FileSource


def write(folder: Path, *names: str) -> Path:
    """Write small files; each has one document, its own name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        row = json.dumps({"text": name})
        path.write_text(row if format_of(path) in ("json", "jsonl") else name)
    return folder


def names(found, folder: Path) -> list[str]:
    return [file.path.relative_to(folder).as_posix() for file in found.files]


def test_formats_by_name_whatever_its_case():
    """`a.jsonl.GZ` was read as text that is not UTF-8."""
    for name, kind in {
        "a.txt": "txt",
        "A.TXT.GZ": "txt",
        "a.jsonl.GZ": "jsonl",
        "a.NDJSON": "jsonl",
        "a.json.zst": "json",
        "a.csv.bz2": "csv",
        "a.tsv.xz": "tsv",
        "a.parquet": "parquet",
        "a.parquet.gz": None,
        "a.md": None,
        "txt": None,
        "a.gz": None,
    }.items():
        assert format_of(Path(name)) == kind, name


def test_a_folder_means_all_its_text_files(tmp_path):
    write(tmp_path, "b.txt", "a.jsonl", "sub/c.csv", "README.md", "x.zip", ".hidden.txt")
    write(tmp_path, ".git/d.txt", "__MACOSX/e.txt", "state.json", "sub/dataset_info.json")
    found = find_files([str(tmp_path)])
    assert names(found, tmp_path) == ["a.jsonl", "b.txt", "sub/c.csv"]
    assert found.line() == (
        "reading 3 files: 1 csv, 1 jsonl, 1 txt; "
        "ignored: README.md, state.json, sub/dataset_info.json, x.zip"
    )
    assert len(find_files([str(tmp_path)], "txt").files) == 5
    write(tmp_path / "many", *(f"{i}.pdf" for i in range(9)), "a.txt")
    assert find_files([str(tmp_path / "many")]).line().endswith("4.pdf and 4 more")


def test_nothing_in_a_folder_disappears(tmp_path):
    """Links to folders, names with __ and what is no file were neither read nor ignored."""
    write(tmp_path / "other", "c.txt")
    write(tmp_path / "a", "__n.txt", "b.txt")
    (tmp_path / "a" / "link").symlink_to(tmp_path / "other")
    (tmp_path / "a" / "circle").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "broken.txt").symlink_to("nowhere")
    found = find_files([str(tmp_path / "a")])
    assert names(found, tmp_path / "a") == ["__n.txt", "b.txt", "link/c.txt"]
    assert found.ignored == ["broken.txt"]


def test_links_to_one_file_are_files_of_a_folder(tmp_path):
    """The Hub's cache keeps equal files once, and links to them."""
    write(tmp_path, "blobs/0abc.txt")
    for name in ("a.txt", "b.txt"):
        (tmp_path / "snap").mkdir(exist_ok=True)
        (tmp_path / "snap" / name).symlink_to(tmp_path / "blobs" / "0abc.txt")
    assert names(find_files([str(tmp_path / "snap")]), tmp_path) == ["snap/a.txt", "snap/b.txt"]


def test_patterns(tmp_path):
    write(tmp_path, "b.txt", "a.txt", "c.md", "sub/d.txt", "odd[1].txt")
    assert names(find_files([f"{tmp_path}/*.txt"]), tmp_path) == ["a.txt", "b.txt", "odd[1].txt"]
    assert names(find_files([f"{tmp_path}/**/d*"]), tmp_path) == ["sub/d.txt"]
    assert names(find_files([f"{tmp_path}/s*"]), tmp_path) == ["sub/d.txt"]
    assert names(find_files([f"{tmp_path}/**/s*"]), tmp_path) == ["sub/d.txt"]
    assert len(find_files([f"{tmp_path}/**"]).files) == 4
    # A file that exists is no pattern.
    assert names(find_files([f"{tmp_path}/odd[1].txt"]), tmp_path) == ["odd[1].txt"]
    assert find_files([f"{tmp_path}/*"]).ignored == [f"{tmp_path}/c.md"]


@pytest.mark.parametrize(
    "wanted, message",
    [
        (["nothere.txt"], "nothere.txt does not exist"),
        ([""], "a name of a file is empty"),
        (["no*.txt"], r"no\*.txt matches no file \(known: .txt"),
        (["*.md"], r"\*.md matches only a.md, which is no known text file"),
        (["a.md"], r"the name of a.md says no format .*give --text_format txt\|jsonl"),
        (
            ["a.zip"],
            "a.zip is a zip archive: unpack it .unzip a.zip -d FOLDER., and give the folder",
        ),
        (["a.tar.gz"], "a.tar.gz is a tar archive: unpack it .tar -xf a.tar.gz"),
        (["empty"], "empty holds no text file .it is empty"),
        (["pdfs"], "pdfs holds no text file .it holds a.pdf; known: .txt"),
        (["a.txt", "./a.txt"], "a.txt is named twice: name each file once"),
        ([".", "a.txt"], "a.txt is named twice"),
    ],
)
def test_names_that_give_nothing(tmp_path, monkeypatch, wanted, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "a.txt", "a.md", "a.zip", "a.tar.gz", "pdfs/a.pdf")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        find_files(wanted)


def test_standard_input_and_pipes_are_read_as_often_as_needed(tmp_path, monkeypatch):
    data = '{"text": "one"}\n{"text": "two"}\n'
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data.encode())))
    source = FileSource(find_files(["-"]))
    for _ in range(2):
        assert [text for text, _ in source.documents()] == ["one", "two"]
    assert source.description["files"] == [{"name": "-", "bytes": len(data)}]
    assert source.description["text_column"] == "text"
    assert FileSet(source.files).line() == (
        "reading standard input as jsonl (--text_format says otherwise)"
    )

    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"plain text")))
    assert [t for t, _ in FileSource(find_files(["-"])).documents()] == ["plain text"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b' [ "a", "b" ]')))
    assert [t for t, _ in FileSource(find_files(["-"])).documents()] == ["a", "b"]

    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=[data])
    writer.start()
    source = FileSource(find_files([str(tmp_path / "pipe")]))
    writer.join()
    assert [text for text, _ in source.documents()] == ["one", "two"]


def test_a_dataset_folder_has_its_own_splits(tmp_path):
    write(tmp_path, "data/train-0.jsonl", "data/train-1.jsonl", "data/validation-0.jsonl")
    write(tmp_path, "data/test-0.jsonl", "extra.txt", "README.md", "TinyStories-valid.txt")
    train, own = dataset_folder(str(tmp_path), None, "train")
    assert names(train, tmp_path) == ["data/train-0.jsonl", "data/train-1.jsonl", "extra.txt"]
    assert names(own, tmp_path) == ["TinyStories-valid.txt", "data/validation-0.jsonl"]
    assert train.ignored == ["README.md", "data/test-0.jsonl"]
    train, own = dataset_folder(str(tmp_path), None, "test")
    assert names(train, tmp_path) == ["data/test-0.jsonl"] and len(own.files) == 2
    train, own = dataset_folder(str(tmp_path), None, "train", with_own=False)
    assert not own.files and len(train.ignored) == 4
    train, own = dataset_folder(str(tmp_path), None, "train+validation")
    assert len(train.files) == 5 and not own.files
    with pytest.raises(ValueError, match="has no split 'dev': its file names say test, train, val"):
        dataset_folder(str(tmp_path), None, "dev")


def test_a_folder_without_a_train_file_is_all_for_training(tmp_path):
    write(tmp_path, "my test.txt", "valid arguments.txt", "notes.txt")
    train, own = dataset_folder(str(tmp_path), None, "train")
    assert len(train.files) == 3 and not own.files and not train.ignored
