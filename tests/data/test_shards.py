"""runtime/data/shards.py: what is not exactly as written is rejected, and every token is used.

D1 .. D16 are the original implementation's faults with data (damaged, stale or foreign shards that
it trained on silently).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.data import shards as data
from runtime.data.loader import WindowLoader, count_windows, prefetch, validation_batches
from runtime.data.shards import ShardWriter, TokenShards, open_data, read_manifest, write_manifest
from tests.builders_data import BYTE, write_pair, write_split

REPO = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """Thousands of tiny files: flushing each to the disk would be most of the time."""
    monkeypatch.setattr(data.os, "fsync", lambda descriptor: None)


def reseal(folder: Path, change) -> None:
    """Change the manifest and seal it again: an invention, not an accident."""
    manifest = read_manifest(folder)
    change(manifest)
    write_manifest(folder, manifest)


def set_vocabulary(manifest: dict, size: int) -> None:
    """Change the vocabulary of a manifest and of its tokenizer."""
    manifest["vocabulary_size"] = manifest["tokenizer"]["vocabulary_size"] = size


def replace_shard(folder: Path, array: np.ndarray, allow_pickle: bool = False) -> None:
    """Put another array in place of the first shard, with its right digest in the manifest."""
    np.save(folder / "shard_0000.npy", array, allow_pickle=allow_pickle)
    reseal(
        folder,
        lambda m: m["shards"][0].update(sha256=data.sha256_of_file(folder / "shard_0000.npy")),
    )


@pytest.fixture(params=["uint16", "uint32"])
def dtype(request) -> np.dtype:
    """That of the shards: as they are written now, and as all were written once."""
    return np.dtype(request.param)


@pytest.fixture
def split(tmp_path, dtype) -> Path:
    """2,500 tokens in three shards."""
    return write_split(tmp_path / "train", np.arange(2500) % 257, wide=dtype.itemsize == 4)


def refused(folder: Path, match: str) -> None:
    """TokenShards must reject the folder in one line that names a file in it."""
    with pytest.raises(ValueError, match=match) as caught:
        TokenShards(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


# ------------------------------------------------------------------------------------------- shards
def test_shards_are_plain_npy_files_and_read_as_one(split, dtype):
    shards = TokenShards(split)
    assert (
        shards.num_tokens == 2500 and shards.vocabulary_size == 257 and shards.end_of_text_id == 256
    )
    assert [np.load(split / f"shard_000{i}.npy", mmap_mode="r").shape for i in range(3)] == [
        (1000,),
        (1000,),
        (500,),
    ]
    assert np.load(split / "shard_0000.npy").dtype == dtype
    assert read_manifest(split)["dtype"] == dtype.name
    ids = shards.read(0, 2500)
    assert ids.dtype == np.int64 and (ids == np.arange(2500) % 257).all()
    assert shards.bytes_per_token == 1.0


@settings(deadline=None, max_examples=50)
@given(shard_size=st.integers(1, 40), start=st.integers(0, 99), count=st.integers(0, 100))
def test_reading_crosses_shard_borders(tmp_path_factory, shard_size, start, count):
    shards = TokenShards(
        write_split(tmp_path_factory.mktemp("s") / "train", np.arange(100), shard_size)
    )
    if start + count > 100:
        with pytest.raises(ValueError, match="has tokens 0 to 99"):
            shards.read(start, count)
    else:
        assert (shards.read(start, count) == np.arange(start, start + count)).all()


def test_appending_in_pieces_is_the_same_as_at_once(tmp_path):
    whole = write_split(tmp_path / "a", np.arange(100), 7)
    writer = ShardWriter(tmp_path / "b", 7, 257)
    for piece in np.array_split(np.arange(100, dtype=np.uint32), 13):
        writer.append(piece)
    assert writer.finish()["shards"] == read_manifest(whole)["shards"]


@pytest.mark.parametrize(
    ("size", "new_size"), [(1023, 1023), (200_019, 1023), (200_019, 65_537)], ids=str
)
def test_renumbered_shards_are_as_if_written_so(tmp_path, monkeypatch, size, new_size):
    """Across pieces and shards, narrower or not, and the digests are those of what is there."""
    monkeypatch.setattr(data, "CHUNK_BYTES", 5 * 4)
    ids = np.arange(100, dtype=np.uint32) % 23 + size - 23
    new_ids = np.zeros(size, dtype=np.uint32)
    new_ids[-23:] = np.arange(new_size - 23, new_size)[::-1]
    old = ShardWriter(tmp_path / "old", 17, size)
    new = ShardWriter(tmp_path / "new", 17, new_size)
    old.append(ids)
    new.append(new_ids[ids])
    counts = data.renumber(tmp_path / "old", old.finish(), new_ids, new_size)
    assert counts == new.finish()
    assert counts["dtype"] == ("uint16" if new_size == 1023 else "uint32")
    assert {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()
    }


def test_renumbering_never_wraps_an_id(tmp_path):
    writer = ShardWriter(tmp_path / "old", 17, 257)
    writer.append(np.arange(100, dtype=np.uint32))
    with pytest.raises(ValueError, match="uint16 shards have no room for 65,537 ids"):
        data.renumber(tmp_path / "old", writer.finish(), np.arange(65_537), 65_537)


@pytest.mark.parametrize("size", [2, 257, 65_536, 65_537, 200_019])
def test_shards_are_as_narrow_as_the_vocabulary_allows(tmp_path, size):
    """Shards of byte, bpe:8192 and gpt2 took 4 bytes per token, where 2 hold every id.

    The largest id of the vocabulary reads back, and an id beyond it is refused, not wrapped.
    """
    writer = ShardWriter(tmp_path / "train", 3, size)
    ids = np.array([0, size - 1, 1, size - 1, size // 2], dtype=np.uint32)
    writer.append(ids)
    counts = writer.finish()
    assert counts["dtype"] == ("uint16" if size <= 65_536 else "uint32")
    width = 2 if size <= 65_536 else 4
    assert [p.stat().st_size for p in sorted((tmp_path / "train").iterdir())] == [
        128 + 3 * width,
        128 + 2 * width,
    ]
    tokenizer = BYTE.to_state() | {"vocabulary_size": size}
    manifest = read_manifest(write_split(tmp_path / "like", ids % 257))
    changes = {"split": "train", "vocabulary_size": size, "tokenizer": tokenizer, **counts}
    write_manifest(tmp_path / "train", manifest | changes)
    assert (TokenShards(tmp_path / "train").read(0, 5) == ids).all()
    with pytest.raises(ValueError, match=f"id {size} is beyond the vocabulary of {size:,}"):
        ShardWriter(tmp_path / "x", 3, size).append(np.array([size], dtype=np.uint32))


def test_digests_of_the_text_do_not_depend_on_the_dtype(tmp_path):
    """A run that began on uint32 shards continues on the same text, prepared again as uint16.

    The digest is the one that uint32 shards always had: that of the little-endian uint32 ids.
    """
    ids = np.arange(2500) % 257
    wide = TokenShards(write_split(tmp_path / "a", ids, wide=True))
    narrow = TokenShards(write_split(tmp_path / "b", ids))
    assert (wide.dtype, narrow.dtype) == (np.uint32, np.uint16)
    expected = hashlib.sha256(ids.astype("<u4").tobytes()).hexdigest()
    assert wide.manifest["tokens_sha256"] == narrow.manifest["tokens_sha256"] == expected
    assert wide.fingerprint == narrow.fingerprint


def test_fingerprint_is_of_the_content(tmp_path):
    """A resumed run may see the same tokens in shards of another size, but no other tokens."""
    a, b, c = (
        TokenShards(write_split(tmp_path / name, np.arange(100) % n, size)).fingerprint
        for name, n, size in (("a", 90, 7), ("b", 90, 50), ("c", 91, 7))
    )
    assert a == b != c


@pytest.mark.nightly
@pytest.mark.slow
def test_ten_thousand_shards_keep_their_order_and_few_files_open(tmp_path):
    """D7: by name, shard_10000 came before shard_9999.

    And 10,000 memory maps need 10,000 open files, where 256 are usual.
    """
    resource = pytest.importorskip(
        "resource", reason="no limits on open files to set on this system"
    )
    folder = write_split(tmp_path / "train", np.arange(10_020) % 257, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, soft), hard))
    try:
        assert (TokenShards(folder).read(0, 10_020) == np.arange(10_020) % 257).all()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_files_that_the_manifest_does_not_list_are_not_read(split):
    """D9: the original implementation trained on every shard in the folder.

    Those of an earlier run included.
    """
    np.save(split / "shard_0003.npy", np.zeros(1000, dtype=np.uint32))
    assert TokenShards(split).num_tokens == 2500


@pytest.mark.parametrize(
    "text",
    [
        "",
        "garbage",
        "[]",
        "{}",
        '{"num_shards": 99, "total_tokens": 5}',
        "[" * 100_000,
        '{"format": "gptoss-shards", "version": 2}',
    ],
)
def test_a_manifest_that_is_none_is_refused(split, text):
    """D1: meta.json only had to exist; "99 shards / 5 tokens" was accepted."""
    (split / "meta.json").write_text(text)
    refused(split, "damaged|not written by this program|version 2")


def test_no_flipped_bit_in_a_manifest_goes_unnoticed(split):
    """Reliability 6: it is either rejected or reads as before.

    (A blank that became another blank.)
    """
    before, good, rng = read_manifest(split), (split / "meta.json").read_bytes(), random.Random(0)
    noticed = 0
    for _ in range(400):
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        (split / "meta.json").write_bytes(bad)
        try:
            assert read_manifest(split) == before
        except ValueError as error:
            noticed += 1
            assert "\n" not in str(error) and str(split) in str(error)
    assert noticed > 300


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(num_shards=99),
        lambda m: m.update(total_tokens=5),
        lambda m: m.update(dtype="int64"),
        lambda m: m.update(dtype=["uint16"]),
        lambda m: m.update(dtype="uint16") or set_vocabulary(m, 65_537),
        lambda m: m.update(shards=[]),
        lambda m: m.update(shards={}),
        lambda m: m.update(shards=m["shards"] + m["shards"][:1], num_shards=4, total_tokens=3500),
        lambda m: m["shards"][0].update(file="../train/shard_0000.npy"),
        lambda m: m["shards"][0].update(file="/etc/passwd"),
        lambda m: m["shards"][0].update(tokens=-1),
        lambda m: m["shards"][0].update(tokens=10**30),
        lambda m: m["shards"][0].update(tokens=True),
        lambda m: m["shards"][0].pop("sha256"),
        lambda m: m.update(vocabulary_size=0),
        lambda m: m.update(vocabulary_size="257"),
        lambda m: m.update(vocabulary_size=300),
        lambda m: m.update(end_of_text_id=0),
        lambda m: m.pop("total_bytes"),
        lambda m: m.pop("tokenizer"),
        lambda m: m.pop("pair"),
    ],
)
def test_an_invented_manifest_is_refused(split, change):
    reseal(split, change)
    refused(split, "meta.json is not usable")


def test_missing_and_empty_shards_are_refused(split, dtype):
    """D2: an empty file was a raw EOFError, a shard without tokens was silently skipped."""
    (split / "shard_0001.npy").write_bytes(b"")
    refused(split, f"shard_0001.npy has 0 bytes, not {128 + 1000 * dtype.itemsize:,}")
    np.save(split / "shard_0001.npy", np.zeros(0, dtype=dtype))
    refused(split, "shard_0001.npy has 128 bytes")
    (split / "shard_0001.npy").unlink()
    refused(split, "shard_0001.npy cannot be read")


@pytest.mark.parametrize(
    ("wide", "array"),
    [
        (True, np.full(500, np.nan)),
        (True, np.full(500, -5, dtype=np.int64)),
        (True, np.zeros(1000, dtype=np.float32)),
        (True, np.zeros(1000, dtype=np.int32)),
        (True, np.zeros(1000, dtype=">u4")),
        (True, np.zeros((10, 100), dtype=np.uint32)),
        (True, np.zeros((1000, 1), dtype=np.uint32)),
        (True, np.zeros(2000, dtype=np.uint16)),
        (False, np.full(250, np.nan)),
        (False, np.zeros(500, dtype=np.uint32)),
        (False, np.zeros(1000, dtype=np.int16)),
        (False, np.zeros(1000, dtype=">u2")),
        (False, np.zeros((10, 100), dtype=np.uint16)),
    ],
    ids=lambda value: f"{value.dtype}{value.shape}" if isinstance(value, np.ndarray) else "",
)
def test_other_dtypes_and_shapes_are_refused(tmp_path, wide, array):
    """D3: float64 NaN became token -9223372036854775808; a 2-D shard silently had no sequences.

    (The size of the file is right in each case.)
    """
    split = write_split(tmp_path / "train", np.arange(2500) % 257, wide=wide)
    replace_shard(split, array)
    refused(split, f"is not a uint{32 if wide else 16} array of 1,000 tokens")


def test_pickled_arrays_are_refused(split):
    replace_shard(split, np.array([{}] * 1000, dtype=object), allow_pickle=True)
    refused(split, "shard_0000.npy")


@pytest.mark.parametrize("keep", [0, 1, 127, 128, 129, -2, None])
def test_truncated_shards_are_refused(split, dtype, keep):
    """D4: a raw ValueError of mmap's."""
    path = split / "shard_0000.npy"
    path.write_bytes((path.read_bytes() + b"x")[:keep])
    refused(split, f"shard_0000.npy has .* bytes, not {128 + 1000 * dtype.itemsize:,}")


def test_no_flipped_bit_in_a_shard_goes_unnoticed(split, dtype):
    """D5: of 100 flips 97 were accepted, 22 of them as other tokens without a trace."""
    path, rng = split / "shard_0001.npy", random.Random(0)
    good = path.read_bytes()
    for _ in range(200):
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        refused(split, f"shard_0001.npy is (damaged|not a {dtype.name} array)")


def test_ids_beyond_the_vocabulary_are_refused(split, dtype):
    """D8: the embedding found it at the first batch, as a raw IndexError.

    (On a GPU: a device assert.)
    """
    replace_shard(split, np.full(1000, 257, dtype=dtype))
    refused(split, "shard_0000.npy holds id 257, beyond its vocabulary of 257")


def test_a_shard_replaced_while_in_use_is_noticed(split, dtype):
    shards = TokenShards(split, verify=False)
    np.save(split / "new.npy", np.zeros(1000, dtype=dtype))
    (split / "new.npy").rename(split / "shard_0002.npy")
    shards.read(0, 2000)
    with pytest.raises(ValueError, match="shard_0002.npy was changed while it was in use"):
        shards.read(1500, 1000)


# -------------------------------------------------------------------------------------------- pairs


def test_open_data(tmp_path):
    train, val = open_data(write_pair(tmp_path))
    assert (train.num_tokens, val.num_tokens) == (100, 50)


def test_halves_of_two_runs_are_refused(tmp_path):
    with pytest.raises(ValueError, match="were not written by the same run"):
        open_data(write_pair(tmp_path, pair="another"))
    other = BYTE.to_state() | {"fingerprint": "0" * 64}
    with pytest.raises(ValueError, match="different tokenizers"):
        open_data(write_pair(tmp_path / "b", tokenizer=other))


def test_swapped_and_missing_splits_are_refused(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"no prepared text .*train.*meta.json is missing\): run python prepare_data.py",
    ):
        open_data(tmp_path)
    write_pair(tmp_path)
    (tmp_path / "train").rename(tmp_path / "x")
    (tmp_path / "val").rename(tmp_path / "train")
    (tmp_path / "x").rename(tmp_path / "val")
    with pytest.raises(ValueError, match="holds the split 'val', not 'train'"):
        open_data(tmp_path)


def test_a_committed_set_is_read_before_it_is_in_place(tmp_path):
    """A run killed between its commit and its last rename: the new set is whole, in two places."""
    write_pair(tmp_path)
    write_split(tmp_path / ".ready" / "val", np.arange(60), pair="new")
    with pytest.raises(ValueError, match="same run"):
        open_data(tmp_path)
    write_split(tmp_path / ".ready" / "train", np.arange(70), pair="new")
    assert [shards.num_tokens for shards in open_data(tmp_path)] == [70, 60]
    data.finish_publishing(tmp_path)
    assert not (tmp_path / ".ready").exists() and [
        shards.num_tokens for shards in open_data(tmp_path)
    ] == [70, 60]


# ---------------------------------------------------------------------------------------- sequences
@settings(deadline=None, max_examples=100)
@given(
    num_tokens=st.integers(2, 300),
    shard_size=st.integers(1, 100),
    context=st.integers(1, 64),
    seed=st.integers(0, 2**63 - 1),
)
def test_an_epoch_uses_every_token_as_a_target(
    tmp_path_factory, num_tokens, shard_size, context, seed
):
    """D6: a shard of 64 tokens gave 32 of its 63 targets.

    No sequence crossed a shard (reliability 20).
    """
    shards = TokenShards(
        write_split(
            tmp_path_factory.mktemp("s") / "train", np.arange(num_tokens) % 257, shard_size
        ),
        verify=False,
    )
    if num_tokens < context + 1:
        with pytest.raises(ValueError, match="a sequence needs .* lower --context_length"):
            WindowLoader(shards, context, 1, seed)
        return
    loader = WindowLoader(shards, context, 1, seed)
    assert sorted(loader.window(i) for i in range(loader.num_windows)) == list(
        range(loader.num_windows)
    )
    used = np.zeros(num_tokens, dtype=int)
    for i in range(loader.num_windows):
        start = min(loader.window(i) * context, num_tokens - 1 - context)
        inputs, targets = loader.batch(i)
        assert (
            inputs.shape == targets.shape == (1, context)
            and inputs.dtype == targets.dtype == torch.int64
        )
        assert (inputs[0].numpy() == np.arange(start, start + context) % 257).all()
        assert (targets[0].numpy() == np.arange(start + 1, start + context + 1) % 257).all()
        used[start + 1 : start + context + 1] += 1
    assert used[0] == 0 and (used[1:] >= 1).all() and used.sum() - (num_tokens - 1) < context


@pytest.fixture
def long(tmp_path) -> TokenShards:
    return TokenShards(write_split(tmp_path / "train", np.arange(1001) % 257), verify=False)


def test_batches_are_a_pure_function_of_seed_and_index(long):
    a, b = WindowLoader(long, 10, 3, seed=1), WindowLoader(long, 10, 3, seed=1)
    ahead = [a.batch(i) for i in range(0, 400, 3)]
    for i in reversed(range(0, 400, 3)):
        assert all(torch.equal(x, y) for x, y in zip(b.batch(i), ahead[i // 3], strict=True))
    # Another batch size: the same stream.
    singles = WindowLoader(long, 10, 1, seed=1)
    assert torch.equal(torch.cat([singles.batch(i)[0] for i in range(99, 102)]), a.batch(99)[0])


def test_epochs_and_seeds_have_orders_of_their_own(long):
    def order(seed: int, epoch: int) -> list[int]:
        loader = WindowLoader(long, 10, 1, seed)
        return [loader.window(epoch * loader.num_windows + i) for i in range(loader.num_windows)]

    orders = [order(seed, epoch) for seed, epoch in itertools.product((0, 1), (0, 1, 2))]
    assert (
        all(sorted(o) == list(range(100)) for o in orders) and len({tuple(o) for o in orders}) == 6
    )


def test_the_order_never_changes(long):
    """A run resumed years later, with another numpy, must continue where it stopped."""
    loader = WindowLoader(long, 10, 1, seed=42)
    assert [loader.window(i) for i in range(8)] == GOLDEN_ORDER


GOLDEN_ORDER = [99, 95, 72, 46, 11, 7, 12, 44]


def test_validation_windows_are_fixed_whole_batches_spread_over_the_set(long):
    batches = validation_batches(long, 10, batch_size=4, max_batches=5)
    again = validation_batches(long, 10, batch_size=4, max_batches=5)
    assert len(batches) == len(list(batches)) == 5
    assert all(
        torch.equal(x, y)
        for a, b in zip(batches, again, strict=True)
        for x, y in zip(a, b, strict=True)
    )
    assert batches.windows == list(range(0, 100, 5))
    every = validation_batches(long, 10, batch_size=7, max_batches=1000)
    assert {inputs.shape for inputs, _ in every} == {(7, 10)} and len(every) == 14
    few = validation_batches(long, 500, batch_size=7, max_batches=1000)
    assert [inputs.shape for inputs, _ in few] == [(2, 500)] and count_windows(long, 500) == 2
    with pytest.raises(ValueError, match="lower --context_length"):
        validation_batches(long, 2000, 1, 1)


# ----------------------------------------------------------------------------------------- prefetch
def test_prefetch_keeps_order_and_raises():
    assert list(prefetch(range(100), depth=3)) == list(range(100))

    def broken():
        yield 1
        raise ValueError("at 2")

    items = prefetch(broken())
    assert next(items) == 1
    with pytest.raises(ValueError, match="at 2"):
        next(items)


def test_prefetch_ends_its_thread():
    items = prefetch(itertools.count(), depth=2)
    assert next(items) == 0
    items.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_import_needs_no_torch_and_no_datasets():
    """prepare_data starts without torch; train and predict without datasets and tokenizers."""
    code = (
        "import sys, runtime.data.shards, runtime.data.loader; assert not {'torch', 'datasets', "
        "'tokenizers', 'pyarrow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True)


def test_manifest_is_readable_json(split):
    assert json.loads((split / "meta.json").read_text())["num_shards"] == 3
