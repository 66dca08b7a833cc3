"""scripts/make_stories.py: a run becomes one small file with its card, and public/stories.pt is so.

A fresh clone has nothing to generate from, and the first story once cost minutes of training.
"""

from __future__ import annotations

import json
import re
import subprocess

import pytest
import torch

import predict
import train
from benchmarks import names
from config_model import ModelConfig, TrainConfig
from runtime.checkpoint.read import load_model, read_checkpoint
from runtime.data import toy_stories
from runtime.data.tokenizers import tokenizer_of
from runtime.interop import release
from scripts import export_gguf, make_stories
from tests.builders_inference import predictor_of
from tests.conftest import REPO

READY = REPO / "public" / "stories.pt"
MOST_BYTES = 8_000_000
SMALL = ["--d_model=16", "--transformer_blocks=1", "--num_experts=2", "--d_ff=16", "--head_dim=8"]
SMALL += ["--context_length=32", "--warmup_steps=2", "--save_interval=4", "--val_steps=2"]
DATA = ["--num_stories=300", "--vocabulary=300"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return (work folder, file, flags of train.py) of the command with a smaller model."""
    work = tmp_path_factory.mktemp("work")
    given = []

    def smaller(argv):
        given.append(argv)
        return real([*argv, *([] if "--resume" in argv else SMALL)])

    real = train.main
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "main", smaller)
        flags = ["--out", str(work / "small.pt"), "--work_dir", str(work / "run")]
        assert make_stories.main([*flags, *DATA, "--max_steps=4", "--num_threads=1"]) == 0
        assert make_stories.main([*flags, "--max_steps=6", "--resume", "--force"]) == 0
    return work, work / "small.pt", given


def test_a_run_becomes_a_file_of_bfloat16_weights_and_its_card(made):
    work, path, _ = made
    best = read_checkpoint(work / "run" / "checkpoints" / "best.pt")
    released = read_checkpoint(path)
    assert released.step == best.step == 6 and released.val_loss == best.val_loss
    assert released.model_config == best.model_config
    assert released.train_config == best.train_config
    assert released.tokenizer_state == best.tokenizer_state
    assert released.data_fingerprint == best.data_fingerprint
    for name, tensor in best.model.items():
        stored = released.model[name]
        assert torch.equal(stored.float(), tensor.to(stored.dtype).float()), name
    assert {t.dtype for t in released.model.values()} >= {torch.bfloat16}
    run = released.run
    command = "python -m scripts.make_stories --max_steps"
    assert run["commands"] == [
        f"{command}=4 --num_stories=300 --vocabulary=300",
        f"{command}=6 --resume # from step 4",
    ]
    assert run["source"]["num_stories"] == 300
    assert path.with_suffix(".md").read_text() == release.card_of(released)


def test_the_command_trains_as_make_demo_does(made):
    """Else the file is not the demo's model, and the names' figures are not comparable."""
    (line,) = re.findall(r"DEMO_BASE = (.*) --max_steps", (REPO / "Makefile").read_text())
    recipe = [flag.replace("=", " ") for flag in make_stories.RECIPE]
    assert recipe == re.findall(r"--\w+(?: \w[\w.-]*)?", line)
    assert made[2][0][: len(recipe)] == make_stories.RECIPE
    vocabulary = re.findall(r"bpe:(\d+)", (REPO / "Makefile").read_text())
    assert {str(make_stories.VOCABULARY)} == {*vocabulary}


def test_what_the_command_cannot_honour_is_an_error(made, monkeypatch):
    monkeypatch.setattr(train, "main", None)
    with pytest.raises(ValueError, match="small.pt exists"):
        make_stories.main(["--out", str(made[1])])
    with pytest.raises(ValueError, match="have no effect with --resume"):
        make_stories.main(["--resume", "--vocabulary", "300"])


def test_a_run_that_was_stopped_writes_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "main", lambda argv: 130)
    flags = ["--work_dir", str(tmp_path / "run"), "--out", str(tmp_path / "x.pt")]
    assert make_stories.main([*flags, *DATA]) == 130
    assert not (tmp_path / "x.pt").exists()


def test_no_commit_is_recorded_where_there_is_no_git(monkeypatch):
    assert re.fullmatch("[0-9a-f]{40}|", release.commit())

    def missing(*args, **settings):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", missing)
    assert release.commit() == ""


# ---- the file that comes with the repository


@pytest.fixture(scope="module")
def ready():
    return read_checkpoint(READY)


def test_the_ready_model_is_small_bfloat16_and_in_the_repository(ready):
    assert READY.stat().st_size <= MOST_BYTES
    parameters = {name for name, _ in load_model(READY, torch.device("cpu"))[0].named_parameters()}
    assert {ready.model[name].dtype for name in parameters} == {torch.bfloat16}
    assert ready.optimizer is None
    # *.pt is ignored; this one must not be. 128: no checkout, as in a copy of the tree.
    ignored = subprocess.run(["git", "check-ignore", "-q", "public/stories.pt"], cwd=REPO)
    assert ignored.returncode in (1, 128)


def test_the_card_of_the_ready_model_is_its_record(ready):
    card = READY.with_suffix(".md").read_text(encoding="utf-8")
    assert card == release.card_of(ready)
    assert f"{ready.val_loss:.4f} nats" in card and f"{ready.step:,} of" in card
    assert ready.run["commit"] in card and len(ready.run["commit"]) == 40
    assert tokenizer_of(ready).vocabulary_size == make_stories.VOCABULARY
    assert ready.step == ready.train_config["max_steps"] == make_stories.STEPS
    # No folder of the machine that it was trained on.
    assert not re.search(r"/(home|work|tmp|root)\b", json.dumps([ready.run, ready.train_config]))


def test_the_ready_model_can_be_trained_further(ready):
    """Its settings are those of this version."""
    TrainConfig(**ready.train_config)
    assert isinstance(ready.model_config, ModelConfig)


def test_the_ready_model_gives_its_recorded_loss_and_keeps_names():
    """The recorded loss is of other held-out stories, and of windows that begin inside them."""
    predictor, _ = predictor_of(str(READY))
    found = names.held_out_names(predictor, 20, names.FIRST_HELD_OUT)
    ready = read_checkpoint(READY)
    assert found["loss"] == pytest.approx(ready.val_loss, abs=0.1)
    assert found["repeated_among_names"]["probability"] > 0.5


def test_the_ready_model_tells_a_story(capsys):
    flags = ["--prompt", "Once upon a time", "--temperature", "0.7", "--seed", "1", "--quiet"]
    assert predict.main(["--ckpt", str(READY), "--max_new_tokens", "240", *flags]) == 0
    told = capsys.readouterr().out
    known = set(re.findall(r"\w+", " ".join(map(toy_stories.story, range(3000)))))
    words = re.findall(r"\w+", told)
    assert len(words) > 80 and sum(word in known for word in words) > 0.97 * len(words)
    assert told.rstrip().endswith((".", "!", '"'))


def test_the_ready_model_is_exported_like_any_other(tmp_path):
    pytest.importorskip("gguf")
    out = tmp_path / "stories.gguf"
    assert export_gguf.main(["--ckpt", str(READY), "--out", str(out)]) == 0
    assert out.stat().st_size > 1_000_000
