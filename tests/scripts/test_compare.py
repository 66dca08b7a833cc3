"""scripts/compare.py: results of runs, what differs, what may be ranked, one page of curves."""

from __future__ import annotations

import dataclasses
import json
import math
import random

import pytest

from config_model import ModelConfig, TrainConfig, flops_per_token
from runtime.training.comparison import compare, lines
from runtime.training.curves import read_run
from runtime.training.metrics import MetricsLog
from scripts import compare as script
from tests.builders_runs import Run, prepared

SMALL = ModelConfig(d_model=32, transformer_blocks=2, num_heads=2, num_kv_heads=1, num_experts=4)
HELD_OUT = {"files": [{"name": "/a/v.jsonl", "bytes": 5}]}
TEXT = {"files": [{"name": "/a/train.jsonl", "bytes": 10}], "validation": HELD_OUT}


def info(run_id: str, model: dict, train: dict, **more) -> dict:
    """What a run of TrainConfig's defaults, but for `train`, writes into metrics.json."""
    values = dataclasses.asdict(TrainConfig(**({"max_steps": 40, "warmup_steps": 2} | train)))
    known = {
        "run_id": run_id,
        "model": dataclasses.asdict(dataclasses.replace(SMALL, **model)),
        "train": values,
        "kind": "pretraining",
        "source": TEXT,
        "fingerprint": "data",
        "tokenizer": {"name": "byte", "fingerprint": "bytes"},
        "parameters": 1000,
        "active_parameters": 500,
        "device": "cpu (1 thread)",
        "torch": "2.13.0",
        "command": f"train.py {run_id}",
    }
    return known | more


def write(folder, losses=(5.0, 4.0, 3.5, 3.6), model=None, train=None, bits=None, **more):
    """Write a run that is validated every 10 steps, and return its folder."""
    log = MetricsLog(folder, None, info(folder.name, model or {}, train or {}, **more))
    for i, loss in enumerate(losses, start=1):
        step = 10 * i
        known = {"step": step, "tokens_seen": 100 * step}
        log.append({"kind": "train", **known, "loss": loss, "seconds": step / 2, "lr": 1e-3})
        ratio = {"bits_per_byte": loss / 4 if bits is None else bits[i - 1]}
        log.append({"kind": "val", **known, "loss": loss, **ratio})
    log.finish()
    return folder


def compared(*folders):
    runs = [read_run(folder) for folder in folders]
    return compare(runs, [folder.name for folder in folders])


# ------------------------------------------------------------------------------------------ results
def test_the_results_of_runs(tmp_path):
    a = write(tmp_path / "a", (5.0, 4.0, 3.5, 3.6))
    b = write(tmp_path / "b", (4.5, 3.9, 3.8, 3.7), train=dict(lr=1e-3), model=dict(top_k=1))
    both = compared(a, b)
    first, second = both["runs"]
    assert first["loss"] == {"final": 3.6, "best": 3.5, "best_step": 30}
    assert first["bits_per_byte"]["best"] == 3.5 / 4
    assert (first["tokens"], first["seconds"], first["tokens_per_sec"]) == (4000, 20, 200)
    assert (first["step"], first["max_steps"]) == (40, 40)
    assert first["flops"] == 3 * flops_per_token(SMALL) * 4000
    assert second["flops"] < first["flops"]
    assert both["differences"] == {"lr": [TrainConfig.lr, 1e-3], "top_k": [SMALL.top_k, 1]}
    assert (both["ranked_by"], both["ranking"], both["notes"]) == ("loss", ["a", "b"], [])
    # Tokens and seconds until the other's loss: b reached 3.7 at its end, a at step 30.
    assert both["target"] == 3.7
    assert first["until"]["tokens"] == 3000 and second["until"]["tokens"] == 4000
    assert first["until"]["seconds"] == 15
    json.dumps(both, allow_nan=False)


def test_the_table_says_what_the_numbers_are(tmp_path):
    a = write(tmp_path / "a", (5.0, 4.0, 3.5, 3.6))
    b = write(tmp_path / "b", (4.5, 3.9, 3.8), train=dict(lr=1e-3))
    shown = lines(compared(a, b))
    head, first, second = (line.split() for line in shown[:3])
    assert head[:4] == ["run", "step", "val", "loss"] and first[:3] == ["a", "40", "3.6000"]
    assert second[:4] == ["b", "30", "of", "40"]
    assert "best first, by validation loss: a, b" in shown
    assert any(line.split() == ["lr", "0.0003", "0.001"] for line in shown)


@pytest.mark.nightly
def test_a_real_run_and_its_resumed_twin(tmp_path, capsys):
    data = prepared(tmp_path)
    one, two = Run(data, tmp_path / "one"), Run(data, tmp_path / "two")
    assert not one("--max_steps", "8", "--schedule", "constant")
    assert not two("--max_steps", "4", "--schedule", "constant", "--seed", "7")
    assert not two("--max_steps", "8", "--resume", fresh=False)
    capsys.readouterr()
    out = tmp_path / "report.json"
    assert script.main([str(one.graph_dir), str(two.graph_dir), "--json", str(out)]) == 0
    both = json.loads(out.read_text())
    assert list(both["differences"]) == ["seed"] and both["times_are_comparable"]
    assert [one["step"] for one in both["runs"]] == [8, 8] and both["ranked_by"] == "loss"
    (group,) = both["groups"]
    best = [one["loss"]["best"] for one in both["runs"]]
    assert group["seeds"] == [42, 7] and group["loss"]["low"] == min(best)
    assert math.isclose(group["loss"]["mean"], sum(best) / 2)
    assert "2 runs of seeds 42, 7, mean and range" in capsys.readouterr().out


# ------------------------------------------------------------------------- what may not be compared
@pytest.mark.parametrize(
    "changes, metric, words",
    [
        (dict(fingerprint="other"), "loss", ""),
        (
            dict(fingerprint="other", source={"validation": {"files": [{"name": "w.jsonl"}]}}),
            None,
            "validation data differ",
        ),
        (
            dict(fingerprint="o", tokenizer={"name": "b", "fingerprint": "c"}),
            "bits_per_byte",
            "vocabularies differ",
        ),
        (dict(kind="sft"), None, "different kinds of training"),
        (dict(torch="2.12.0"), "loss", "times are not ranked"),
        (dict(device="NVIDIA H100"), "loss", "times are not ranked"),
    ],
)
def test_what_may_not_be_compared_is_said(tmp_path, changes, metric, words):
    a = write(tmp_path / "a")
    # Better per token, worse per byte.
    b = write(tmp_path / "b", (1.0, 1.0, 1.0, 1.0), bits=(2.0, 2.0, 2.0, 2.0), **changes)
    both = compared(a, b)
    best = {"loss": ["b", "a"], "bits_per_byte": ["a", "b"], None: []}[metric]
    assert both["ranked_by"] == metric and both["ranking"] == best
    assert words in " ".join(both["notes"]) and bool(words) == bool(both["notes"])
    assert both["times_are_comparable"] == ("times" not in words)
    assert (both["target"] is None) == (metric is None)
    assert any(line.startswith("best first") for line in lines(both)) == (metric is not None)


def test_the_same_text_in_another_folder_is_the_same_text(tmp_path):
    moved = json.loads(json.dumps(TEXT).replace("/a/", "/home/me/"))
    a, b = (
        write(tmp_path / "a", fingerprint="1"),
        write(tmp_path / "b", source=moved, fingerprint="2"),
    )
    both = compared(a, b)
    assert both["ranked_by"] == "loss" and list(both["differences"]) == [
        "data: files",
        "data: validation",
    ]


def test_other_sequences_of_the_same_text_are_said(tmp_path):
    a, b = write(tmp_path / "a"), write(tmp_path / "b", train=dict(val_steps=7))
    (note,) = compared(a, b)["notes"]
    assert "val_steps" in note and "scripts.evaluate" in note


def test_seeds_are_grouped_and_other_settings_are_not(tmp_path):
    folders = [
        write(tmp_path / f"{name}{seed}", (loss,) * 4, train=dict(seed=seed, lr=lr))
        for name, lr, seeds in (("x", 1e-3, (1, 2, 3)), ("y", 2e-3, (1, 2)), ("z", 3e-3, (1,)))
        for seed, loss in zip(seeds, (3.0, 3.2, 3.1), strict=False)
    ]
    # Not finished, so no member of a group.
    folders.append(write(tmp_path / "short", (9.0,), train=dict(seed=9, lr=1e-3)))
    both = compared(*folders)
    assert [group["runs"] for group in both["groups"]] == [["x1", "x2", "x3"], ["y1", "y2"]]
    loss = both["groups"][0]["loss"]
    assert math.isclose(loss["mean"], 3.1) and (loss["low"], loss["high"], loss["n"]) == (3, 3.2, 3)


def test_a_loss_that_was_never_finite_is_no_result(tmp_path):
    a, b = write(tmp_path / "a"), write(tmp_path / "b", (math.nan,) * 4)
    both = compared(a, b)
    assert both["ranking"] == ["a"] and both["runs"][1]["loss"]["best"] is None
    assert not any(line.startswith("best first") for line in lines(both))


def test_a_run_without_settings_is_shown_and_not_ranked(tmp_path):
    a, b = write(tmp_path / "a"), write(tmp_path / "b")
    (b / "metrics.json").unlink()
    both = compared(a, b)
    assert both["ranked_by"] is None and "no settings" in both["notes"][0]
    assert both["runs"][1]["loss"]["best"] == 3.5 and both["runs"][1]["flops"] is None


def test_a_checkpoint_in_the_folder_knows_the_settings_too(tmp_path, capsys):
    """--ckpt_dir and --graph_dir may be one folder, and metrics.json may be lost."""
    data, folders = prepared(tmp_path), [tmp_path / "a", tmp_path / "b"]
    for seed, folder in enumerate(folders):
        one = ["--graph_dir", folder, "--ckpt_dir", folder, "--max_steps", 4, "--seed", seed]
        assert not Run(data, tmp_path)(*one)
        (folder / "metrics.json").unlink()
    both = compared(*folders)
    assert both["ranked_by"] == "loss" and both["runs"][0]["flops"]
    assert list(both["differences"]) == ["seed"] and both["runs"][0]["max_steps"] == 4
    # Those of another run are not this one's.
    (folders[0] / "metrics.jsonl").write_text(
        (folders[1] / "metrics.jsonl").read_text(encoding="utf-8"), encoding="utf-8"
    )
    assert read_run(folders[0]).info == {}


@pytest.mark.parametrize("odd", [None, 7, "text", [], [1, [2]], {"a": {"b": [None]}}, True, 1e308])
def test_settings_of_any_type_end_nothing(tmp_path, odd):
    """metrics.json is a file like any other: by hand, by another program, or damaged."""
    a = write(tmp_path / "a")
    known = info("b", {}, {})
    for name in known:
        folder = tmp_path / f"b-{name}"
        write(folder)
        (folder / "metrics.json").write_text(json.dumps({"run": known | {name: odd}}))
        both = compared(a, folder)
        assert lines(both) and json.dumps(both, allow_nan=False)
        assert len(both["runs"]) == 2 and both["runs"][1]["loss"]["best"] == 3.5


def test_unknown_data_are_no_others(tmp_path):
    a, b = (write(tmp_path / name, source=None, fingerprint=name) for name in "ab")
    assert compared(a, b)["ranked_by"] is None


def test_names_and_settings_cannot_write_to_the_terminal(tmp_path):
    a, b = write(tmp_path / "a"), write(tmp_path / "b", command="\x1b[2J", device="\x1b[31m")
    assert "\x1b" not in "".join(lines(compared(a, b)))


# ------------------------------------------------------------------------------------- the command
def test_a_damaged_run_is_a_message_and_the_others_stay(tmp_path, capsys):
    write(tmp_path / "a"), write(tmp_path / "b")
    damaged = tmp_path / "c"
    damaged.mkdir()
    (damaged / "metrics.jsonl").write_bytes(random.Random(0).randbytes(5_000))
    with open(tmp_path / "b" / "metrics.jsonl", "ab") as file:
        file.write(b"damage\n" + b'{"step": 50, "kind"')
    assert script.main([str(tmp_path / name) for name in "abc"]) == 0
    done = capsys.readouterr()
    assert "b: metrics.jsonl, line 9: not a metrics record" in done.out
    assert done.err.startswith("error: ") and done.err.endswith(": left out\n")
    assert done.err.count("\n") == 1 and str(damaged) in done.err


def test_a_folder_of_runs_stands_for_them(tmp_path, capsys):
    write(tmp_path / "a"), write(tmp_path / "b", (3.0, 2.0, 1.0, 0.5))
    assert script.main([str(tmp_path)]) == 0
    assert "best first, by validation loss: b, a" in capsys.readouterr().out


def test_a_damaged_run_in_a_folder_of_runs_costs_itself_alone(tmp_path, capsys):
    """A run that had just begun, without a record yet, left out all runs of its folder."""
    write(tmp_path / "a"), write(tmp_path / "c", (3.0, 2.0, 1.0, 0.5))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "metrics.jsonl").touch()
    assert script.main([str(tmp_path)]) == 0
    done = capsys.readouterr()
    assert "best first, by validation loss: c, a" in done.out
    assert done.err.count("\n") == 1 and str(tmp_path / "b") in done.err


def test_a_run_that_was_moved_aside_is_named_by_its_file(tmp_path, capsys):
    """A fresh run in the same folder leaves the old one as metrics-1.jsonl."""
    write(tmp_path / "a")
    write(tmp_path / "a", (3.0, 2.0, 1.0, 0.5))
    assert script.main([str(tmp_path / "a"), str(tmp_path / "a" / "metrics-1.jsonl")]) == 0
    assert "best first, by validation loss: a, a (metrics-1)" in capsys.readouterr().out


def test_runs_of_one_name_are_told_apart(tmp_path, capsys):
    for group in ("x", "y"):
        write(tmp_path / group / "same")
    assert script.main([str(tmp_path / "x"), str(tmp_path / "y")]) == 0
    out = capsys.readouterr().out
    assert f"same ({tmp_path / 'x' / 'same'})" in out and f"({tmp_path / 'y' / 'same'})" in out


@pytest.mark.parametrize("given, words", [((), "none"), (("a",), "only"), (("a", "a"), "only")])
def test_fewer_than_two_runs_are_one_line(tmp_path, given, words):
    write(tmp_path / "a")
    folders = [str(tmp_path / name) for name in given] or [str(tmp_path / "no")]
    with pytest.raises(ValueError, match=f"at least 2 runs, and here is {words}"):
        script.main(folders)


def test_the_page_holds_the_runs_and_the_notes(tmp_path, capsys):
    write(tmp_path / "a"), write(tmp_path / "b", torch="2.0")
    out = tmp_path / "page.html"
    assert script.main([str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(out)]) == 0
    page = out.read_text(encoding="utf-8")
    text = page.partition('<script type="application/json" id="data">')[2].partition("</script>")[0]
    data = json.loads(text)
    assert [run["name"] for run in data["runs"]] == ["a", "b"]
    assert data["runs"][0]["tables"]["val"]["columns"]["loss"]["mean"] == [5, 4, 3.5, 3.6]
    assert data["notices"] == [
        "note: times are not ranked: device or PyTorch differ",
        "best first, by validation loss: a, b",
    ]
