"""Write token shards from text: read documents, split them, tokenise on all cores.

Documents pass through in batches and in order, so memory does not grow with the corpus. The same
input gives the same bytes, on any number of cores. Nothing in --out_dir changes before the new set
is complete (see runtime/data/shards.py).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import Path

import numpy as np
from tqdm import tqdm

from runtime.base.cli import parser, run_main
from runtime.base.process import usable_cores
from runtime.data import shards as data
from runtime.data.advice import next_command
from runtime.data.file_sets import FileSet, dataset_folder, find_files, is_folder
from runtime.data.formats import FORMATS, Part, read_separator
from runtime.data.sources import (
    DEFAULT_COLUMN,
    DEFAULT_DATASET,
    DEFAULT_TOY_STORIES,
    DEFAULT_VAL_RATIO,
    FileSource,
    HubSource,
    Source,
    ToySource,
    own_validation,
)
from runtime.data.splits import DataPlan, cut_if_few, text_digest, why_empty
from runtime.data.text_files import known_encoding
from runtime.data.tokenizer import COMPACT, END_OF_TEXT, NAMED, Tokenizer
from runtime.data.tokenizers import (
    check_name,
    compacted,
    load_tokenizer,
    named_tokenizer,
    train_bpe,
)

# One unit of work for one core: about 15 ms.
BATCH_CHARACTERS = 1 << 17
# Above any corpus, and far enough below 2**63 that sums of counts fit an int64.
LARGEST_COUNT = 1 << 47


# ------------------------------------------------------------------------ split, tokenise
@dataclass
class Batch:
    """Consecutive documents: one unit of work."""

    parts: dict[str, list[Part]] = field(
        default_factory=lambda: {split: [] for split in data.SPLITS}
    )
    # Digests of this batch's documents that were looked for.
    met: set[bytes] = field(default_factory=set)
    # Share of the source that was read at the end of the batch; None: unknown.
    fraction: float | None = None


def make_batches(
    source: Source,
    route: Callable[[bytes], str | None],
    look_for: Set[bytes] = frozenset(),
) -> Iterator[Batch]:
    """Yield non-empty documents in order, each in the split that `route` gives its digest.

    `route` returns None to leave a document out. The first part of a document identifies it.
    """
    batch, size = Batch(), 0
    split: str | None = None
    # begun: the first part of this document is in a batch.
    begun = False
    for text, ends in source.documents():
        if not begun:
            if ends and not text.strip():
                continue
            digest = text_digest(text)
            split = route(digest)
            if digest in look_for:
                batch.met.add(digest)
        begun = not ends
        if split is not None:
            batch.parts[split].append((text, ends))
            size += len(text)
        if size >= BATCH_CHARACTERS:
            batch.fraction = source.fraction
            yield batch
            batch, size = Batch(), 0
    batch.fraction = 1.0
    yield batch


@dataclass
class Encoded:
    """The ids of one batch's documents in one split, uint32 [tokens], end-of-text after each.

    `parts` has (tokens, UTF-8 bytes, whether the document ends) for every part.
    """

    ids: np.ndarray
    parts: list[tuple[int, int, bool]]


def encode_batch(tokenizer: Tokenizer, batch: Batch) -> dict[str, Encoded]:
    """Return the ids of a batch by split.

    Runs in a thread: tiktoken releases the interpreter lock, and its arrays need no Python list.
    """
    end = np.array(tokenizer.between_documents, dtype=np.uint32)
    encoded = {}
    for split, parts in batch.parts.items():
        arrays, sizes = [], []
        for text, ends in parts:
            ids = tokenizer.encode_to_numpy(text)
            arrays += [ids, end] if ends else [ids]
            num_bytes = len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
            sizes.append((len(ids) + len(end) * ends, num_bytes, ends))
        if arrays:
            encoded[split] = Encoded(np.concatenate(arrays), sizes)
    return encoded


def encode_in_order(
    tokenizer: Tokenizer, batches: Iterable[Batch], num_proc: int
) -> Generator[tuple[Batch, dict[str, Encoded]], None, None]:
    """Yield batches and their ids in order; `num_proc` threads encode a few batches ahead."""
    waiting: deque[tuple[Batch, Future[dict[str, Encoded]]]] = deque()
    pool = ThreadPoolExecutor(num_proc)
    try:
        for batch in batches:
            waiting.append((batch, pool.submit(encode_batch, tokenizer, batch)))
            if len(waiting) > 2 * num_proc + 2:
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


class SplitWriter:
    """Writes one split, up to `limit` tokens: shards, counts and `used` ids, bool [vocabulary]."""

    def __init__(self, folder: Path, shard_size: int, limit: int, tokenizer: Tokenizer):
        self.writer = data.ShardWriter(folder, shard_size, tokenizer.vocabulary_size)
        self.limit, self.tokenizer = limit, tokenizer
        self.num_documents, self.num_bytes = 0, 0
        self.used = np.zeros(tokenizer.vocabulary_size, dtype=bool)

    @property
    def full(self) -> bool:
        return self.writer.total_tokens >= self.limit

    def add(self, encoded: Encoded) -> None:
        """Append ids; cut the document that reaches the limit."""
        room = self.limit - self.writer.total_tokens
        self.writer.append(encoded.ids[:room])
        self.used[encoded.ids[:room]] = True
        start = 0
        for num_tokens, num_bytes, ends in encoded.parts:
            if start >= room:
                break
            if cut := start + num_tokens > room:
                num_bytes = len(self.tokenizer.decode_bytes(encoded.ids[start:room].tolist()))
            self.num_bytes += num_bytes
            self.num_documents += ends or cut
            start += num_tokens

    def finish(self) -> dict:
        """Close the shards and return the split's part of the manifest."""
        return {
            "total_documents": self.num_documents,
            "total_bytes": self.num_bytes,
            **self.writer.finish(),
        }


def write_splits(
    tokenizer: Tokenizer,
    batches: Iterable[Batch],
    writers: dict[str, SplitWriter],
    until_full: str,
    num_proc: int,
) -> set[bytes]:
    """Tokenise batches into the writers until the batches end or `until_full` is full.

    Return the digests that were looked for and met.
    """
    met: set[bytes] = set()
    label = " + ".join(writers)
    with (
        contextlib.closing(encode_in_order(tokenizer, batches, num_proc)) as results,
        tqdm(desc=label, unit=" tokens", unit_scale=True, disable=None, dynamic_ncols=True) as bar,
    ):
        for batch, encoded in results:
            met |= batch.met
            before = sum(writer.writer.total_tokens for writer in writers.values())
            for split, ids in encoded.items():
                writers[split].add(ids)
            written = sum(writer.writer.total_tokens for writer in writers.values())
            if batch.fraction:
                most = writers[until_full].limit * len(writers)
                bar.total = round(min(written / batch.fraction, most))
            bar.update(written - before)
            if writers[until_full].full:
                break
    return met


# ------------------------------------------------------------------------------ the command
def open_sources(options: argparse.Namespace) -> DataPlan:
    """Open all sources. Raise ValueError for a missing file, dataset, column or split."""
    o = options
    column = o.text_column or DEFAULT_COLUMN
    separator = o.document_separator or END_OF_TEXT

    def local(files: FileSet) -> FileSource:
        source = FileSource(files, column, separator, o.encoding or "utf-8", o.text_format)
        if files.searched or any(file.is_guess for file in files.files):
            print(files.line(), flush=True)
        return source

    own: str | None = None
    train: Source
    val: Source | None = None
    if o.files:
        train = local(find_files(o.files, o.text_format))
    elif o.dataset == "toy":
        train = ToySource(o.num_stories or DEFAULT_TOY_STORIES)
    elif is_folder(o.dataset):
        with_own = not o.val_files and o.val_ratio is None
        files, own_files = dataset_folder(o.dataset, o.text_format, o.split, with_own)
        train = local(files)
        if own_files.files:
            val = local(own_files)
    else:
        print(f"opening dataset {o.dataset} ...", flush=True)
        own = own_validation(o.dataset, o.dataset_config, o.split)
        train = HubSource(o.dataset, o.dataset_config, o.split, column, o.streaming)
    if o.val_files:
        val = local(find_files(o.val_files, o.text_format))
    elif own and o.val_ratio is None:
        val = HubSource(o.dataset, o.dataset_config, own, column, o.streaming)

    ratio = o.val_ratio or DEFAULT_VAL_RATIO
    description = dict(train.description)
    if o.max_tokens:
        description["max_tokens"] = o.max_tokens
    description["validation"] = val.description if val else {"val_ratio": ratio}
    plan, line = cut_if_few(DataPlan(train, val, ratio, description))
    if line:
        print(line, flush=True)
    return plan


def is_path(name: str) -> bool:
    """Return whether --tokenizer names a folder or checkpoint that has a tokenizer."""
    return (
        name not in (*NAMED, "byte")
        and not name.startswith("bpe:")
        and not name.endswith(COMPACT)
        and os.path.exists(name)
    )


def ready_tokenizer(name: str) -> Tokenizer | None:
    """Return the tokenizer to encode with; None if it must first be trained on the text."""
    if is_path(name):
        return named_tokenizer(name)
    if name.startswith("bpe:"):
        return None
    return load_tokenizer(name.removesuffix(COMPACT))


def trained_tokenizer(name: str, plan: DataPlan) -> Tokenizer:
    """Return bpe:SIZE, trained on the training text only."""
    print(f"training {name} ...", flush=True)
    batches = make_batches(plan.train, plan.split_train)
    texts = (text for batch in batches for text, _ in batch.parts["train"])
    return train_bpe(texts, int(name.removeprefix("bpe:")))


def prepare(options: argparse.Namespace) -> dict[str, dict]:
    """Write the set to options.out_dir, return both manifests; an error keeps the earlier set."""
    o, out_dir = options, Path(options.out_dir)
    data.check_replaceable(out_dir)
    # Before any text is downloaded.
    tokenizer = ready_tokenizer(o.tokenizer)
    plan = open_sources(o)
    created = not out_dir.exists()
    out_dir.mkdir(parents=True, exist_ok=True)
    with data.folder_lock(out_dir):
        data.check_replaceable(out_dir)
        data.finish_publishing(out_dir)
        data.remove_partial(out_dir)
        try:
            tokenizer = tokenizer or trained_tokenizer(o.tokenizer, plan)
            manifests = write_partial(out_dir / data.PARTIAL, tokenizer, plan, o)
            for note in plan.notes():
                print(note)
            data.publish(out_dir)
        except BaseException:
            data.remove_partial(out_dir)
            if created:
                with contextlib.suppress(OSError):
                    out_dir.rmdir()
            raise
    return manifests


def write_partial(
    folder: Path, tokenizer: Tokenizer, plan: DataPlan, o: argparse.Namespace
) -> dict[str, dict]:
    """Write both splits into an empty folder, manifests last.

    The ids of a compact vocabulary are known only after all text is tokenised. Until then the
    shards hold the ids of its base, `tokenizer`.
    """
    with contextlib.ExitStack() as stack:
        limit = o.max_tokens or LARGEST_COUNT
        writers = {
            split: SplitWriter(folder / split, o.shard_size, limit, tokenizer)
            for split in data.SPLITS
        }
        for writer in writers.values():
            stack.callback(writer.writer.close)
        tokenise(tokenizer, plan, writers, o.num_proc)
        counts = {split: writer.finish() for split, writer in writers.items()}

    used = np.flatnonzero(writers["train"].used | writers["val"].used)
    occur = f"{len(used):,} of {tokenizer.vocabulary_size:,} ids occur"
    if o.tokenizer in NAMED:
        print(f"{occur} (--tokenizer {o.tokenizer}{COMPACT} keeps only these)")
    elif o.tokenizer.endswith(COMPACT):
        print(occur)
        compact = compacted(tokenizer, used)
        counts = {
            split: data.renumber(
                folder / split, counts[split], compact.new_ids, compact.vocabulary_size
            )
            for split in data.SPLITS
        }
        tokenizer = compact
    return write_manifests(folder, tokenizer, plan, counts)


def tokenise(
    tokenizer: Tokenizer, plan: DataPlan, writers: dict[str, SplitWriter], num_proc: int
) -> None:
    """Write all text of the plan into the writers. Raise ValueError if a split stays empty."""
    work = functools.partial(write_splits, tokenizer, num_proc=num_proc)
    if plan.val is None:
        work(make_batches(plan.train, plan.split_train), writers, "train")
    else:
        # Validation is small: remember its digests, find those in train, leave them out of val.
        val_batches = make_batches(plan.val, lambda digest: "val")
        wanted = {digest for batch in val_batches for digest in _digests(batch)}
        train_batches = make_batches(plan.train, plan.split_train, wanted)
        in_train = work(train_batches, {"train": writers["train"]}, "train")
        val_batches = make_batches(plan.val, lambda digest: None if digest in in_train else "val")
        work(val_batches, {"val": writers["val"]}, "val")
    num_documents = sum(writer.num_documents for writer in writers.values())
    for split, writer in writers.items():
        if not writer.writer.total_tokens:
            raise ValueError(why_empty(split, plan, num_documents))


def write_manifests(
    folder: Path, tokenizer: Tokenizer, plan: DataPlan, counts: dict[str, dict]
) -> dict[str, dict]:
    """Write and return both manifests; `counts` is what each split's writer returned."""
    pair = data.pair_id(tokenizer, [counts[split]["tokens_sha256"] for split in data.SPLITS])
    manifests = {}
    for split in data.SPLITS:
        manifests[split] = {
            "format": data.FORMAT,
            "version": data.VERSION,
            "split": split,
            "pair": pair,
            "tokenizer": data.write_tokenizer(folder / split, tokenizer),
            "vocabulary_size": tokenizer.vocabulary_size,
            "end_of_text_id": tokenizer.end_of_text_id,
            "source": plan.description,
            **counts[split],
        }
        data.write_manifest(folder / split, manifests[split])
    return manifests


def _digests(batch: Batch) -> Iterator[bytes]:
    """Yield the digests of a validation batch's documents, from their first parts."""
    begun = False
    for text, ends in batch.parts["val"]:
        if not begun:
            yield text_digest(text)
        begun = not ends


def _count(text: str) -> int:
    """Return a whole number from 1; 1e8 and 100_000 are allowed."""
    # Decimal: 1e8 is exact, and 1e999999999 costs nothing.
    try:
        number = Decimal(text.replace("_", ""))
        if 1 <= number <= LARGEST_COUNT and number == number.to_integral_value():
            return int(number)
    except InvalidOperation:
        pass
    raise argparse.ArgumentTypeError(
        f"must be a whole number from 1 to {LARGEST_COUNT:.0e}, such as 1e8 or 100000000, "
        f"not {text!r}"
    )


def _ratio(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < 1:
            return float(text)
    raise argparse.ArgumentTypeError(
        f"must be a number between 0 and 1, such as 0.01, not {text!r}"
    )


def add_flags() -> argparse.ArgumentParser:
    """Return the command's parser. Long, because it is one table of flags."""
    p = parser(
        "Write token shards for train.py from text.",
        epilog=(
            "examples:\n"
            "  python prepare_data.py\n"
            "      TinyStories, o200k_base (downloads both)\n"
            "  python prepare_data.py --tokenizer o200k_base:compact\n"
            "      the same tokens; only the ids that TinyStories uses are in the vocabulary\n"
            "  python prepare_data.py --dataset toy --tokenizer bpe:2048\n"
            "      generated stories, no network\n"
            "  python prepare_data.py --files a.jsonl b.txt.gz --val_ratio 0.02\n"
            "  python prepare_data.py --dataset HuggingFaceFW/fineweb-edu \\\n"
            "      --dataset_config sample-10BT --streaming --max_tokens 1e9"
        ),
    )

    add = p.add_argument
    add(
        "--dataset",
        metavar="NAME",
        help="dataset on the Hugging Face Hub; a local folder of text files (those whose names say "
        "validation are for validation, those that say test are left out); "
        f"or toy: generated stories (default: {DEFAULT_DATASET})",
    )
    add("--dataset_config", metavar="NAME", help="configuration of the dataset")
    add("--split", metavar="NAME", help="split of the dataset to train on (default: train)")
    add(
        "--text_column",
        metavar="NAME",
        help="column that holds the text, or a list of messages; a.b is b inside a "
        f"(default: {DEFAULT_COLUMN})",
    )
    add(
        "--streaming",
        action="store_true",
        help="read the dataset from the network while it is used, without storing it first",
    )
    add(
        "--num_stories",
        type=_count,
        metavar="STORIES",
        help=f"stories that --dataset toy generates (default: {DEFAULT_TOY_STORIES})",
    )
    add(
        "--files",
        nargs="+",
        metavar="FILE",
        help="local text instead of a dataset: files, folders, quoted patterns such as "
        "'books/*.txt', or - for standard input. Formats by name: .txt, .jsonl, .ndjson, .json, "
        ".csv, .tsv (each also .gz, .bz2, .xz, .zst), .parquet",
    )
    add(
        "--text_format",
        choices=FORMATS,
        help="format of all files, whatever their names: txt for .md and other plain text",
    )
    add(
        "--encoding",
        metavar="NAME",
        help="encoding of files without a byte order mark, such as cp1252 (default: utf-8)",
    )
    add(
        "--val_files",
        nargs="+",
        metavar="FILE",
        help="validation text; documents that are also in the training text are left out",
    )
    add(
        "--val_ratio",
        type=_ratio,
        metavar="SHARE",
        help="share of the documents for validation, chosen by a hash of their text "
        f"(default: the dataset's own validation split, else {DEFAULT_VAL_RATIO})",
    )
    add(
        "--document_separator",
        metavar="TEXT",
        help=r"text between the documents of a .txt file; \n, \t, \f and \x1e are read "
        f"(default: {END_OF_TEXT})",
    )
    add(
        "--max_tokens",
        type=_count,
        metavar="TOKENS",
        help="stop when train has this many tokens; val gets at most as many (default: all)",
    )
    add(
        "--out_dir",
        default="data",
        metavar="FOLDER",
        help="where to write train/ and val/; an earlier set is replaced (default: data)",
    )
    add(
        "--tokenizer",
        default="o200k_base",
        metavar="NAME",
        help=f"{', '.join(NAMED)} (downloaded once); NAME{COMPACT}: the same tokens, but the "
        "vocabulary has only the ids that occur in the text and the 256 bytes, numbered from 0; "
        "byte; bpe:SIZE: a byte-level BPE of SIZE ids, trained on the training text; or the path "
        "of a checkpoint, a published model's folder or another --out_dir, to use its tokenizer "
        "(default: o200k_base)",
    )
    add(
        "--shard_size",
        type=_count,
        default=10**8,
        metavar="TOKENS",
        help="tokens per shard, 2 or 4 bytes each (default: 1e8)",
    )
    add(
        "--num_proc",
        type=_count,
        default=usable_cores(),
        metavar="CORES",
        help="threads that tokenise (default: all cores)",
    )
    return p


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options. Raise ValueError for a wrong one or one without effect."""
    o = add_flags().parse_args(argv)

    def refuse(flags: Iterable[str], why: str) -> None:
        for flag in flags:
            if getattr(o, flag):
                raise ValueError(f"--{flag} has no effect {why}: leave it out")

    named = find_files((o.files or []) + (o.val_files or []), o.text_format)
    if o.files:
        refuse(("dataset", "dataset_config", "split", "streaming", "num_stories"), "with --files")
    elif o.dataset == "toy":
        refuse(("dataset_config", "split", "streaming"), "with --dataset toy")
    else:
        refuse(("num_stories",), "without --dataset toy")
        o.dataset, o.split = o.dataset or DEFAULT_DATASET, o.split or "train"
        if is_folder(o.dataset):
            refuse(("dataset_config", "streaming"), "with a local folder")
            for files in dataset_folder(o.dataset, o.text_format, o.split):
                named.files += files.files
    if o.val_files:
        refuse(("val_ratio",), "with --val_files")
    kinds = named.kinds
    if not named.files:
        refuse(("text_format", "encoding"), "without local files")
    if not kinds & {"txt", None}:
        refuse(("document_separator",), "without .txt files")
    if kinds <= {"txt"} and (named.files or o.dataset == "toy"):
        refuse(("text_column",), "on text without columns")
    if o.encoding:
        o.encoding = known_encoding(o.encoding)
    if o.document_separator is not None:
        o.document_separator = read_separator(o.document_separator)
        if not o.document_separator:
            raise ValueError("--document_separator is empty: give at least one character")
    if o.num_proc > 1024:
        raise ValueError(f"--num_proc {o.num_proc} is above the limit of 1024 threads: lower it")
    if not is_path(o.tokenizer):
        check_name(o.tokenizer)
    return o


def main(argv: list[str] | None = None) -> int:
    options = parse_options(argv)
    started = time.perf_counter()
    manifests = prepare(options)
    seconds = time.perf_counter() - started
    for split, m in manifests.items():
        documents, shards = m["total_documents"], m["num_shards"]
        tokens = m["total_tokens"]
        print(
            f"{Path(options.out_dir) / split}: {documents:,} documents, {tokens:,} tokens "
            f"({m['total_bytes'] / tokens:.2f} bytes each), {shards:,} shard{'s' * (shards > 1)}"
        )
    train = manifests["train"]
    tokens = sum(m["total_tokens"] for m in manifests.values())
    print(
        f"{train['tokenizer']['name']}, vocabulary {train['vocabulary_size']:,}; "
        f"{seconds:.1f} s, {tokens / seconds:,.0f} tokens/s\n"
        f"Next: {next_command(train['vocabulary_size'], options.out_dir)}"
    )
    return 0


if __name__ == "__main__":
    run_main(main)
