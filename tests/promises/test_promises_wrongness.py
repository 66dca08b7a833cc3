"""Check that the guarantees about silent wrongness can be broken."""

from __future__ import annotations

import dataclasses
import json
from unittest import mock

import pytest
import torch

import train
from model_parts import Attention, KVCache
from runtime.checkpoint import read as read_module
from runtime.data import loader as loader_module
from runtime.data import shards as data
from runtime.inference import session
from runtime.training import agreed, metrics
from runtime.training import plan as plan_module
from runtime.training.metrics import MetricsLog, read_records
from runtime.training.plan import make_plan
from tests import builders_inference, builders_runs
from tests.promises import common, damage, flags, hostile, model, network, pairing, prompt, training


# -------------------------------------------------------------------- they notice what they are for
def broken(tally, words: str) -> None:
    """The tally has failures, and one says so."""
    assert tally.tried - tally.held > 0 and any(words in failure for failure in tally.failures), (
        tally
    )
    with pytest.raises(AssertionError):
        tally.check()


@pytest.mark.nightly
@pytest.mark.parametrize(
    "owner, name, fake, count, words",
    [
        (read_module, "digests_of", lambda *_: {}, 28, "checkpoint bit"),
        (data.TokenShards, "verify", lambda self: None, 28, "shard bit"),
        (MetricsLog, "_second_copy", lambda self: {}, 112, "metrics bit"),
    ],
    ids=["no digests", "no verification", "no second copy"],
)
def test_unchecked_files_are_found_silently_wrong(owner, name, fake, count, words):
    with mock.patch.object(owner, name, fake):
        tally = damage.corruption(count)
    broken(tally, words)
    assert any(
        "silently wrong" in failure or "nobody measured" in failure for failure in tally.failures
    )


def test_a_fallback_without_a_word_is_found():
    real = agreed.find_latest
    with mock.patch.object(agreed, "find_latest", lambda *a, **k: (real(*a, **k)[0], [])):
        broken(damage.fallback(2), "step_0000006.pt")


@pytest.mark.nightly
@pytest.mark.slow
def test_a_pairing_that_is_accepted_is_found():
    with mock.patch.object(plan_module, "_check_vocabulary", lambda *_: None):
        broken(pairing.pairings(1000), "accepted: work began")


@pytest.mark.nightly
@pytest.mark.slow
def test_a_payload_that_runs_is_found():
    """With the unpickler that the original implementation uses in place of ours."""
    prelude = (
        "import runtime.checkpoint.read as c, pickle\nreal = torch.load\nc._scan_zip = lambda "
        "path: set()\nc.torch.load = lambda path, **k: real(path, map_location='cpu', "
        "weights_only=False)"
    )
    tally = hostile.hostile(4, prelude)
    assert tally.held == 0 and "something was executed" in tally.failures[0]


def test_a_look_into_the_future_is_found():
    with mock.patch.object(Attention, "_mask", lambda *_: (None, False)):
        broken(model.causality(3), "logits before token")


def test_a_cache_that_changes_what_it_holds_is_found():
    real = KVCache.update

    def update(*args):
        keys, values = real(*args)
        return keys * 1.001, values

    with mock.patch.object(KVCache, "update", update):
        broken(model.cached(5), "differs by")


def test_a_loss_that_is_another_is_found():
    real = train.evaluate
    with mock.patch.object(train, "evaluate", lambda *a, **k: real(*a, **k) + 0.01):
        broken(training.loss(2), "by hand")


def test_a_validation_that_draws_random_numbers_is_found():
    real = train.evaluate

    def drawing(*args, **options):
        torch.rand(1)
        return real(*args, **options)

    with mock.patch.object(train, "evaluate", drawing):
        broken(training.loss(2), "draws random numbers")


def test_tokens_that_are_never_used_are_found():
    """The original implementation's sequences: whole ones only, and none that crosses the end."""
    with mock.patch.object(
        loader_module,
        "count_windows",
        lambda shards, context: max(1, (shards.num_tokens - 1) // context),
    ):
        broken(training.every_token_once(10), "are never a target")


def test_a_traceback_is_found():
    def fails(*_):
        raise KeyError("k")

    with mock.patch.object(session, "command_result", fails):
        broken(prompt.repl_lines(100), "KeyError")
    with mock.patch.object(train.cli, "settings_from", fails):
        broken(flags.fuzzed_argv(40), "KeyError")


def test_a_flag_that_is_ignored_is_found():
    with (
        mock.patch("config_model.check_fields", lambda config: None),
    ):
        broken(flags.flags(60), "accepted: its work began")


def test_a_connection_is_found():
    broken(
        network.alone(
            17,
            "import socket\nstep('a look-up', lambda: socket.getaddrinfo('example.org', "
            "80))\nsys.exit()",
        ),
        "a look-up: socket.getaddrinfo",
    )


# ----------------------------------------------------------------------------- what they have found
def _filled(folder, steps=(10, 20, 30, 40)) -> list[dict]:
    log = MetricsLog(folder, run_info={"run_id": "a"})
    for step in steps:
        log.append({"step": step, "kind": "train", "loss": 5.25 - step / 100})
    log.finish()
    return log.records()


def test_a_flipped_digit_in_the_metrics_is_noticed(tmp_path):
    """4.95 became 4.99 by one bit, which is valid JSON: a resumed run accepted and plotted it.

    metrics.json has every record once more, so the two are compared. Where they differ we cannot
    tell which is right, and neither is kept.
    """
    records = _filled(tmp_path)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes().replace(b"4.95", b"4.99"))
    log = MetricsLog(tmp_path, resume_step=40, run_info={"run_id": "a"})
    assert log.records() == [records[0], records[1], records[3]]
    assert (
        "line 3: not what metrics.json has of step 30" in log.messages[0]
        and "metrics-damaged-1.jsonl; 3 records of it kept" in log.messages[0]
    )
    assert (
        json.loads((tmp_path / "metrics.json").read_text())["train"] == log.records()
        and (tmp_path / "metrics-damaged-1.json").exists()
    )


def test_records_that_can_no_longer_be_read_are_put_back(tmp_path):
    """A damaged line, one with a changed step, and a cut-off last one.

    metrics.json has all three.
    """
    records = _filled(tmp_path)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(
        lines[0].replace(b'"step":10', b'"step":11')
        + lines[1].replace(b"{", b"[")
        + lines[2]
        + lines[3][:20]
    )
    log = MetricsLog(tmp_path, resume_step=40, run_info={"run_id": "a"})
    assert (
        log.records() == records
        and log.messages[-1] == f"3 records that {path} no longer has put back from metrics.json"
    )
    log.append({"step": 50, "kind": "train", "loss": 1.0})
    assert [r["step"] for r in read_records(path)] == [10, 20, 30, 40, 50]


def test_metrics_of_steps_that_come_again_are_not_compared(tmp_path):
    """Resumed at 20, killed at 35, resumed at 20 and then at 40.

    Steps of the first run beyond 20 are dropped from metrics.json in time.
    """
    _filled(tmp_path)
    for resume, steps in ((20, (25, 35)), (20, (30, 40)), (40, (50,))):
        log = MetricsLog(tmp_path, resume_step=resume, run_info={"run_id": "a"})
        for step in steps:
            log.append({"step": step, "kind": "train", "loss": 1.0 + resume})
        if resume == 40:
            assert not log.messages
        elif steps[-1] == 40:
            # As a checkpoint at 40 does.
            log.write_json()
    assert [r["step"] for r in log.records()] == [10, 20, 30, 40, 50] and metrics.KINDS == (
        "train",
        "val",
        "score",
    )


def test_what_the_weights_are_may_be_said_again(tmp_path):
    """--init_from with the weights' own --d_model was rejected.

    It was checked with 32 default heads. And --num_heads 8 --head_dim 4 on weights of 4 heads of 8
    was accepted silently (it is in the table of pairings): the shapes are the same, the function is
    not.
    """
    model = builders_inference.biased_model(vocabulary_size=257)
    with common.folder() as at:
        path, data_dir = builders_inference.save(at / "ckpt", model), common.byte_data(at)
        given = [
            "--init_from",
            path,
            "--data_dir",
            str(data_dir),
            "--ckpt_dir",
            str(at / "new"),
            "--d_model",
            "32",
            "--num_heads",
            "4",
            "--num_kv_heads",
            "2",
            "--head_dim",
            "8",
            "--top_k",
            "1",
        ]
        assert make_plan(
            builders_runs.settings_of(*given), train.pretraining
        ).model_config == dataclasses.replace(model.config, top_k=1)
