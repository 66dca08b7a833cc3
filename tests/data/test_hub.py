"""prepare_data.py with a dataset of the Hub: the real download path, to a stand-in for the Hub.

The libraries read HF_ENDPOINT when they are loaded, so each preparation is a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from runtime.data.shards import open_data
from runtime.data.tokenizers import tokenizer_from_state
from tests.builders_hub import TOKEN, Hub, parquet, serving
from tests.conftest import REPO
from tests.nightly import nightly_but

# Each test starts processes that load `datasets`: a second of CPU for each.
pytestmark = pytest.mark.slow
pytest.importorskip("datasets")

STORIES, RAGGED = "someone/stories", "someone/ragged"
SHARDS = [f"data/train-0000{n}-of-00003.parquet" for n in range(3)]
VALIDATION = "data/validation-00000-of-00001.parquet"
SAMPLE = "sample/10BT/000.parquet"
CARD = b"""---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*.parquet
  - split: validation
    path: data/validation-*.parquet
  - split: test
    path: data/test-*.parquet
- config_name: sample-10BT
  data_files:
  - split: train
    path: sample/10BT/*.parquet
---
"""
TWO_CONFIGS = b"""---
configs:
- config_name: en
  data_files: en.parquet
- config_name: de
  data_files: de.parquet
---
"""


def texts(name: str, count: int) -> list[str]:
    return [
        f"Story {i} of {name}: once upon a time\nthere were {7 * i} cats." for i in range(count)
    ]


TRAIN = [texts(name, 120) for name in ("first", "second", "third")]
ALL = [text for shard in TRAIN for text in shard]


@pytest.fixture
def hub():
    """A stand-in for the Hub, as datasets there often are."""
    stories = {
        "README.md": CARD,
        **{path: parquet(shard) for path, shard in zip(SHARDS, TRAIN, strict=True)},
        # Five of these are also in train.
        VALIDATION: parquet(texts("validation", 10) + TRAIN[1][:5]),
        "data/test-00000-of-00001.parquet": parquet(texts("test", 10)),
        SAMPLE: parquet(texts("sample", 300)),
    }
    lines = [b'{"text": "a b c"}\n' * 5, b'{"text": "a b c", "more": 1}\n' * 5]
    datasets = {
        STORIES: stories,
        "someone/gated": {"train.parquet": parquet(texts("gated", 300))},
        "someone/two": {"README.md": TWO_CONFIGS, "en.parquet": parquet(["a"]), "de.parquet": b""},
        "someone/script": {"script.py": b"import datasets\n"},
        RAGGED: {"train-0.jsonl": lines[0], "train-1.jsonl": lines[1]},
    }
    with serving(Hub(datasets, gated={"someone/gated"})) as hub:
        yield hub


def environment(hub: Hub, home: Path, **more: str) -> dict[str, str]:
    """The child's variables: its Hub is `hub`, and what it keeps is in `home`."""
    ours = ("HF_", "HUGGING", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith(ours)}
    return kept | {"HF_ENDPOINT": hub.url, "HF_HOME": str(home / "hf")} | more


def command(home: Path, *flags: str) -> list[str]:
    return ["prepare_data.py", "--tokenizer", "byte", "--out_dir", str(home / "out"), *flags]


def prepared(hub: Hub, home: Path, *flags: str, **variables: str) -> subprocess.CompletedProcess:
    return ended(command(home, *flags), environment(hub, home, **variables))


def ended(argv: list[str], environ: dict[str, str]) -> subprocess.CompletedProcess:
    """Run Python in a process that has loaded nothing: a fork may have read another HF_ENDPOINT."""
    return subprocess.run(
        [sys.executable, *argv], cwd=REPO, env=environ, capture_output=True, text=True, timeout=240
    )


def documents(shards) -> list[str]:
    ids = shards.read(0, shards.num_tokens)
    ends = np.flatnonzero(ids == shards.end_of_text_id)
    tokenizer = tokenizer_from_state(shards.tokenizer_state)
    return [tokenizer.decode(part[:-1]) for part in np.split(ids, ends[:-1] + 1)]


def written(hub: Hub, home: Path, *flags: str, **variables: str) -> tuple[list[str], list[str]]:
    """Prepare; return the documents of (train, val)."""
    done = prepared(hub, home, *flags, **variables)
    assert done.returncode == 0, done.stderr
    train, val = open_data(home / "out")
    return documents(train), documents(val)


# -------------------------------------------------------------------------------- what is read
@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
def test_all_shards_in_order_and_the_datasets_own_validation(tmp_path, hub, streaming):
    train, val = written(hub, tmp_path, "--dataset", STORIES, *streaming)
    assert train == ALL and val == texts("validation", 10)


@pytest.mark.parametrize("streaming", nightly_but([[], ["--streaming"]], 0))
def test_a_configuration_reads_its_own_files_only(tmp_path, hub, streaming):
    flags = ["--dataset", STORIES, "--dataset_config", "sample-10BT", "--val_ratio", "0.1"]
    train, val = written(hub, tmp_path, *flags, *streaming)
    assert sorted(train + val) == sorted(texts("sample", 300)) and 10 < len(val) < 60
    assert set(hub.begun + hub.parts) == {"README.md", SAMPLE}


def test_several_splits_are_one_training_text(tmp_path, hub):
    train, val = written(hub, tmp_path, "--dataset", STORIES, "--split", "train+test")
    assert train == ALL + texts("test", 10) and val == texts("validation", 10)


def test_streaming_stops_at_max_tokens(tmp_path, hub):
    """Later shards are not asked for, and nothing is kept on the disk.

    A thousand rows and some batches of 131,072 characters are read ahead; a shard has more.
    """
    large = [parquet([f"{name} {i}" + " word" * 400 for i in range(1500)]) for name in "abc"]
    hub.datasets[STORIES] |= dict(zip(SHARDS, large, strict=True))
    flags = ["--dataset", STORIES, "--streaming", "--max_tokens", "2e5", "--val_ratio", "0.1"]
    train, _ = written(hub, tmp_path, *flags, "--num_proc", "1")
    assert train[0].startswith("a ") and SHARDS[0] in hub.parts + hub.begun
    assert not {*SHARDS[1:]} & {*hub.parts, *hub.begun}
    kept = [file.name for file in (tmp_path / "hf").rglob("*.*") if file.suffix != ".lock"]
    assert not [name for name in kept if name.endswith((".parquet", ".arrow", ".incomplete"))]


# -------------------------------------------------------------------------------- what goes wrong
@pytest.mark.parametrize("streaming", nightly_but([[], ["--streaming"]], 0))
def test_a_broken_connection_is_tried_again(tmp_path, hub, streaming):
    hub.broken = {SHARDS[1]: 1}
    train, val = written(hub, tmp_path, "--dataset", STORIES, *streaming)
    assert hub.broken == {SHARDS[1]: 0}
    assert train == ALL and val == texts("validation", 10)


@pytest.mark.nightly
def test_a_killed_preparation_downloads_no_finished_file_again(tmp_path, hub):
    """And a third one downloads nothing: it needs no network."""
    hub.held = {SHARDS[1]: threading.Event()}
    flags = ["--dataset", STORIES]
    killed = subprocess.Popen(
        [sys.executable, *command(tmp_path, *flags)],
        cwd=REPO,
        env=environment(hub, tmp_path),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    limit = time.monotonic() + 60
    # Each file's download begins when the one before it is finished.
    while SHARDS[1] not in hub.begun and killed.poll() is None and time.monotonic() < limit:
        time.sleep(0.02)
    killed.kill()
    assert killed.wait(60) != 0 and SHARDS[0] in hub.begun and SHARDS[1] in hub.begun
    hub.held.pop(SHARDS[1]).set()

    hub.begun.clear()
    assert written(hub, tmp_path, *flags) == (ALL, texts("validation", 10))
    assert SHARDS[0] not in hub.begun and {SHARDS[1], SHARDS[2]} <= set(hub.begun)

    hub.begun.clear(), hub.parts.clear()
    assert written(hub, tmp_path, *flags, HF_HUB_OFFLINE="1") == (ALL, texts("validation", 10))
    assert hub.begun + hub.parts == []


@pytest.mark.nightly
def test_after_a_lost_network_the_same_command_continues(tmp_path, hub):
    """The line said to do without a network, and not that the finished files are kept."""
    hub.broken = {SHARDS[1]: 99}
    flags = ["--dataset", STORIES]
    failed = prepared(hub, tmp_path, *flags)
    (line,) = failed.stderr.strip().splitlines()
    assert failed.returncode == 2 and line.startswith(f"error: dataset {STORIES} could not be read")
    assert "finished downloads are kept: the same command continues" in line
    assert not (tmp_path / "out").exists()

    hub.broken.clear(), hub.begun.clear()
    assert written(hub, tmp_path, *flags) == (ALL, texts("validation", 10))
    assert SHARDS[0] not in hub.begun and SHARDS[1] in hub.begun


# Flags, and what the one line says.
MISTAKES = {
    "gated": (
        ["--dataset", "someone/gated"],
        ["gated dataset", "accept its terms", "hf auth login", "HF_TOKEN"],
    ),
    "missing": (
        ["--dataset", "someone/storys"],
        ["doesn't exist on the Hub", "check the name", "HF_TOKEN"],
    ),
    "missing, streaming": (
        ["--dataset", "someone/storys", "--streaming"],
        ["doesn't exist on the Hub", "check the name", "HF_TOKEN"],
    ),
    "no configuration": (
        ["--dataset", "someone/two"],
        ["dataset someone/two: Config name is missing: give --dataset_config as one of en, de"],
    ),
    "another configuration": (
        ["--dataset", STORIES, "--dataset_config", "sample-1BT"],
        [
            f"dataset {STORIES}: BuilderConfig 'sample-1BT' not found: "
            "give --dataset_config as one of default, sample-10BT"
        ],
    ),
    "another split": (
        ["--dataset", STORIES, "--split", "dev"],
        ["has no split 'dev': give --split as one of train, validation, test"],
    ),
    "another column": (
        ["--dataset", STORIES, "--text_column", "story", "--streaming"],
        ["has no column 'story': give --text_column as one of n, text"],
    ),
    "a script": (
        ["--dataset", "someone/script"],
        ["scripts are no longer supported", "choose a dataset of Parquet or JSON files"],
    ),
    "other columns": (["--dataset", RAGGED], ["CastError: Couldn't cast", "more: int64"]),
}


# One process makes them all.
MAKE_MISTAKES = """
import json
import sys

from prepare_data import main

said = {}
for what, flags in json.loads(sys.argv[1]).items():
    try:
        main(flags)
    except ValueError as error:
        said[what] = str(error)
print(json.dumps(said))
"""


@pytest.mark.nightly
def test_a_mistake_is_told_with_what_to_do(tmp_path, hub):
    """All of them said "without a network use --dataset toy", with the network working.

    Some named Python's load_dataset instead of a flag, or hid the library's reason.
    """
    made = {
        what: [*command(tmp_path, *flags, "--val_ratio", "0.1")[1:]]
        for what, (flags, _) in MISTAKES.items()
    }
    done = ended(["-c", MAKE_MISTAKES, json.dumps(made)], environment(hub, tmp_path))
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    for what, (_, said) in MISTAKES.items():
        assert "without a network" not in answers[what]
        for part in said:
            assert part in " ".join(answers[what].split()), (what, answers[what])
    assert not (tmp_path / "out").exists()


def test_a_mistake_is_one_line(tmp_path, hub):
    done = prepared(hub, tmp_path, "--dataset", "someone/gated")
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 2 and line.startswith(
        "error: dataset someone/gated could not be read"
    )


def test_a_token_opens_a_gated_dataset(tmp_path, hub):
    train, val = written(
        hub, tmp_path, "--dataset", "someone/gated", "--val_ratio", "0.1", HF_TOKEN=TOKEN
    )
    assert sorted(train + val) == sorted(texts("gated", 300))
