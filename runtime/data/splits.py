"""Decide which documents are for training and which for validation."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from runtime.data.formats import Part, safe_cut
from runtime.data.sources import FileSource, Source

# Documents are compared by so many characters, blanks not counted: a longer one is read in parts.
COMPARED_CHARACTERS = 1 << 19
# With more documents than this, a share that leaves one side empty is a mistake.
MOST_DOCUMENTS = 10_000


def text_digest(text: str) -> bytes:
    """Return 16 bytes that identify a text, however its copies differ in form.

    White space does not count, and characters are composed (Unicode NFC), as é of e and an accent.
    """
    if text.isascii():
        data = text.encode().translate(None, b" \t\n\v\f\r\x1c\x1d\x1e\x1f")
    else:
        text = "".join(unicodedata.normalize("NFC", text).split())
        data = text[:COMPARED_CHARACTERS].encode("utf-8", "surrogatepass")
    return hashlib.sha256(data[:COMPARED_CHARACTERS]).digest()[:16]


def split_by_hash(val_ratio: float) -> Callable[[bytes], str]:
    """Return a function from digest to split: equal texts go to one side, in constant memory."""
    threshold = round(val_ratio * 2**64)
    return lambda digest: "val" if int.from_bytes(digest[:8], "big") < threshold else "train"


@dataclass
class DataPlan:
    """What to read: training text, and a validation source or a share of the training text."""

    train: Source
    val: Source | None
    # Share of the training text that goes to val; no effect if `val` is a source.
    val_ratio: float
    # What the manifests say about the text.
    description: dict

    @property
    def split_train(self) -> Callable[[bytes], str]:
        """The function that gives a digest from the training source its split."""
        return split_by_hash(self.val_ratio) if self.val is None else lambda digest: "train"

    def notes(self) -> list[str]:
        """Return what the user should know about all of the text, a sentence each."""
        notes = self.train.notes()
        return notes + (self.val.notes() if self.val else [])


class Piece:
    """The text of a source from a character to another, as a source of its own."""

    def __init__(self, source: FileSource, start: int, end: int):
        self.source, self.start, self.end = source, start, end
        self.description: dict = source.description
        self.fraction: float | None = None

    def documents(self) -> Iterator[Part]:
        at = 0
        for text, ends in self.source.documents():
            here, at = at, at + len(text)
            self.fraction = min(1.0, max(0, at - self.start) / (self.end - self.start))
            if at <= self.start:
                continue
            if here >= self.end:
                return
            part = text[max(0, self.start - here) : self.end - here]
            # A document starts and ends where it is cut.
            part = part.lstrip() if here < self.start else part
            part = part.rstrip() if at > self.end else part
            yield part, ends or at >= self.end

    def notes(self) -> list[str]:
        return [] if self.start else self.source.notes()


def cut_if_few(plan: DataPlan) -> tuple[DataPlan, str | None]:
    """Return a plan whose sides both have text, and a line for the terminal if it changed.

    With few documents, a share of them can be none. Then the last part of the text is for
    validation, and the document in which it starts is cut. Files are read only until both sides
    have a document. Copies would be on both sides of a cut, so with them nothing changes.
    """
    if plan.val is not None or not isinstance(plan.train, FileSource):
        return plan, None
    sides, digests, position, blank_lines = set(), set(), 0, 0
    num_documents, begun = 0, False
    for text, ends in plan.train.documents():
        if not begun and text.strip():
            digest = text_digest(text)
            digests.add(digest)
            sides.add(plan.split_train(digest))
            num_documents += 1
            if len(sides) > 1 or num_documents > MOST_DOCUMENTS:
                return plan, None
        begun = not ends
        position += len(text)
        blank_lines += text.count("\n\n")
    if not num_documents or len(digests) < num_documents:
        return plan, None
    cut = _place_to_cut(plan.train, round(position * (1 - plan.val_ratio)))
    if not 0 < cut < position:
        return plan, None
    train, val = Piece(plan.train, 0, cut), Piece(plan.train, cut, position)
    description = plan.description | {
        "validation": {"val_ratio": plan.val_ratio, "from_character": cut}
    }
    what = "one document" if num_documents == 1 else f"{num_documents} documents"
    line = (
        f"the text is {what}, too few to choose among: its last {plan.val_ratio:.4g} part "
        f"({position - cut:,} of {position:,} characters) is the validation text"
    )
    if num_documents == 1 and blank_lines and plan.train.is_separable:
        line += (
            f"; blank lines occur {blank_lines:,} times, so --document_separator '\\n\\n' would "
            "make paragraphs of it"
        )
    return DataPlan(train, val, plan.val_ratio, description), line


def _place_to_cut(source: FileSource, wanted: int) -> int:
    """Return a character position at or before `wanted` where a cut changes no token."""
    at = 0
    for text, _ in source.documents():
        if at + len(text) > wanted:
            inside = wanted - at
            return at + (safe_cut(text, inside) if inside else 0)
        at += len(text)
    return at


def why_empty(split: str, plan: DataPlan, num_documents: int) -> str:
    """Return the error line for a split without tokens."""
    if not num_documents:
        return "there is no text to prepare: all documents are empty"
    if plan.val is None:
        separable = isinstance(plan.train, FileSource) and plan.train.is_separable
        if num_documents == 1 and split == "val":
            more = r", or --document_separator '\n\n' to split it" if separable else ""
            return (
                "only 1 document found, so no validation split is possible: use --val_files, or "
                f"give more text{more}"
            )
        other = "raise" if split == "val" else "lower"
        more = ", or split the text into more documents (--document_separator)" if separable else ""
        return (
            f"all {num_documents} documents went to the other split at val_ratio "
            f"{plan.val_ratio}, so {split} would be empty: {other} --val_ratio, "
            f"or use --val_files{more}"
        )
    if split == "val":
        return "val would be empty: every validation document is also in train, or empty"
    return "train would be empty: all its documents are empty"
