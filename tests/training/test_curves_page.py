"""What the page of curves gets of a run: thinned tables, its state, its notes."""

from __future__ import annotations

import json
import math
import os

import pytest

from runtime.training import curves_page
from runtime.training.curves import read_run
from runtime.training.curves_page import (
    MOST_POINTS,
    STALE_SECONDS,
    finished_page,
    loads_data,
    more_data,
    page_data,
    run_data,
    settings_of,
    status_data,
)
from tests.builders_watch import MadeRun, info_of, train_record, write_long_run
from tests.conftest import REPO


def data_inside(page: str) -> dict:
    return json.loads(page.partition('id="data">')[2].partition("</script>")[0])


# ------------------------------------------------------------------------------------------ tables
def test_a_short_run_is_its_records(tmp_path):
    run = MadeRun(tmp_path).train(10, 100)
    tables = run_data(read_run(tmp_path), 3)["tables"]
    records = [record for record in run.log.records() if record["kind"] == "train"]
    train = tables["train"]
    assert train["step"] == [record["step"] for record in records]
    assert train["tokens"] == [record["tokens_seen"] for record in records]
    for name in ("loss", "grad_norm", "tokens_per_sec", "lr"):
        column = train["columns"][name]
        # The page gets 6 digits.
        assert column["mean"] == pytest.approx([record[name] for record in records], rel=5e-6)
        assert column["low"] is column["high"] is None and column["bad"] == []
    assert tables["val"]["step"] == [100] and "score" not in tables


def test_a_long_run_keeps_its_extremes_and_its_last_step(tmp_path):
    """Of 2,500 records each row stands for 2 or 3: a single spike stays visible."""
    run = MadeRun(tmp_path)
    for step in range(1, 2501):
        run.log.append(train_record(step) | {"loss": 50.0 if step == 1234 else 2.0})
    train = run_data(read_run(tmp_path), 0)["tables"]["train"]
    loss = train["columns"]["loss"]
    assert len(train["step"]) == MOST_POINTS and train["step"][-1] == 2500
    assert max(loss["high"]) == 50.0 and min(loss["low"]) == 2.0
    row = loss["high"].index(50.0)
    assert train["step"][row - 1] < 1234 <= train["step"][row]
    count = train["step"][row] - train["step"][row - 1]
    assert loss["mean"][row] == pytest.approx((50 + 2 * (count - 1)) / count, rel=5e-6)


def test_what_was_not_finite_is_marked_by_number(tmp_path):
    """A gradient that overflows in half precision is ordinary: the loss has no mark for it."""
    run = MadeRun(tmp_path).train(10, 50)
    run.train(60, 60, grad_norm=math.inf)
    run.train(70, 70, loss=math.nan)
    columns = run_data(read_run(tmp_path), 0)["tables"]["train"]["columns"]
    assert columns["grad_norm"]["bad"] == [60] and columns["loss"]["bad"] == [70]
    assert columns["loss"]["mean"][-1] is None and columns["lr"]["bad"] == []


def test_new_records_are_those_from_a_step_on(tmp_path):
    MadeRun(tmp_path).train(10, 200)
    run = read_run(tmp_path)
    more = more_data(run, 190)
    assert more["train"]["step"] == [190, 200] and more["val"]["step"] == [200]
    assert more["router"]["step"] == [190, 200]
    assert more_data(run, 201) == {}


def test_the_routers_are_shares_of_what_they_could_be(tmp_path):
    run = MadeRun(tmp_path).train(10, 20)
    record = run.log.records()[0]
    router = run_data(read_run(tmp_path), 0)["tables"]["router"]
    entropy, load = router["columns"]["entropy"], router["columns"]["load"]
    shares = [value / math.log(8) for value in record["router_entropy"]]
    assert entropy["mean"][0] == pytest.approx(sum(shares) / 4, rel=5e-6)
    assert [entropy["low"][0], entropy["high"][0]] == pytest.approx(
        [min(shares), max(shares)], rel=5e-6
    )
    every = [one for row in record["expert_load"] for one in row]
    assert [load["low"][0], load["high"][0]] == pytest.approx([min(every), max(every)], rel=5e-6)


def test_loads_are_hundredths_of_the_fair_share(tmp_path):
    MadeRun(tmp_path).train(10, 40)
    loads = loads_data(read_run(tmp_path))
    assert loads["step"] == [10, 20, 30, 40] and loads["seconds"] == [2.5, 5, 7.5, 10]
    expected = train_record(30)["expert_load"]
    assert loads["load"][2] == [[round(100 * one) for one in row] for row in expected]
    assert loads_data(read_run(tmp_path), 30)["step"] == [40]


def test_a_long_run_of_many_experts_stays_small(tmp_path):
    run = read_run(write_long_run(tmp_path / "run", 1500, 12, 32))
    loads = loads_data(run)
    assert len(loads["load"]) == curves_page.MOST_COLUMNS and loads["step"][-1] == 1500
    assert [len(loads["load"][0]), len(loads["load"][0][0])] == [12, 32]
    assert len(json.dumps([run_data(run, 0), loads])) < 1_500_000


# ------------------------------------------------------------------------------------------- state
def test_a_runs_state(tmp_path):
    made = MadeRun(tmp_path, max_steps=200).train(10, 100)
    run = read_run(tmp_path)

    def state(seconds_later: float | None) -> str:
        now = None if seconds_later is None else run.modified + seconds_later
        return status_data(run, 0, now)["state"]

    assert state(1) == "running" and state(STALE_SECONDS - 1) == "running"
    assert state(STALE_SECONDS + 1) == "stale" and state(None) == "ended"
    made.note("events", {"step": 100, "kind": "stop", "text": ""})
    run = read_run(tmp_path)
    assert state(1) == state(None) == "stopped"
    made.note("events", {"step": 100, "kind": "resume", "text": ""})
    run = read_run(tmp_path)
    assert state(1) == "running"
    made.train(110, 110, loss=math.nan)
    run = read_run(tmp_path)
    assert state(1) == "diverged" and not status_data(run, 0)["is_finite"]
    made.train(120, 200)
    run = read_run(tmp_path)
    assert state(10**6) == state(None) == "done"
    made.note("events", {"step": 200, "kind": "diverged", "text": ""})
    run = read_run(tmp_path)
    assert state(1) == "diverged"


def test_a_slow_run_is_not_stale_between_its_records(tmp_path):
    """A step of minutes, a record every ten: an hour without one is how it runs."""
    made = MadeRun(tmp_path, max_steps=1000)
    for step in range(10, 60, 10):
        made.log.append(train_record(step) | {"seconds": 60.0 * step})
    run = read_run(tmp_path)
    assert status_data(run, 0, run.modified + 3600)["state"] == "running"
    assert status_data(run, 0, run.modified + 6100)["state"] == "stale"


def test_the_time_left_is_that_of_the_newest_records(tmp_path):
    made = MadeRun(tmp_path, max_steps=1000)
    for step in range(10, 510, 10):
        # The first half took ten times as long.
        made.log.append(train_record(step) | {"seconds": min(step, 250) * 10 + max(step - 250, 0)})
    assert status_data(read_run(tmp_path), 0)["seconds_left"] == 500
    assert status_data(read_run(MadeRun(tmp_path / "new").folder), 0)["seconds_left"] is None


def test_a_run_that_has_begun_is_empty(tmp_path):
    MadeRun(tmp_path)
    status = status_data(read_run(tmp_path), 0)
    assert (status["state"], status["step"], status["max_steps"]) == ("empty", 0, 1000)


# -------------------------------------------------------------------------- what a file may hold
@pytest.mark.parametrize(
    "value, shown",
    [
        (1e400, "inf"),
        (float("nan"), None),
        (2**70, None),
        ("x" * 10_000, None),
        ([1, [2, {"a": None}]], '[1, [2, {"a": null}]]'),
        ({"a": float("inf")}, None),
        (True, True),
    ],
)
def test_any_setting_becomes_json(tmp_path, value, shown):
    MadeRun(tmp_path).train(10, 10)
    info = info_of("a")
    info["train"]["odd"] = value
    info["train"]["max_steps"] = value
    (tmp_path / "metrics.json").write_text(json.dumps({"run": info}))
    run = read_run(tmp_path)
    text = json.dumps([settings_of(run), status_data(run, 0)], allow_nan=False)
    assert len(text) < 5_000
    if shown is not None:
        assert settings_of(run)["odd"] == shown


def test_deep_settings_and_notes_are_no_error(tmp_path):
    """JSON of 900 lists in each other was read, and could not be written again."""
    made = MadeRun(tmp_path).train(10, 10)
    deep = "[" * 900 + "]" * 900
    text = json.dumps({"run": info_of("a")})
    (tmp_path / "metrics.json").write_text(text.replace('"lr":', f'"deep": {deep}, "lr":'))
    with open(tmp_path / "events.jsonl", "w") as file:
        file.write(f'{{"step": 10, "kind": {deep}, "text": {deep}, "time": {deep}}}\n')
        file.write('{"step": -5, "kind": "save"}\n{"step": 1e400}\n')
    made.note("samples", {"step": 2**60, "text": "x"}, {"step": 10, "prompt": None, "text": 5})
    page = finished_page("t", [read_run(tmp_path)])
    (data,) = data_inside(page)["runs"]
    assert [event["step"] for event in data["events"]] == [10]
    assert data["samples"] == [{"step": 10, "prompt": "", "text": ""}]


def test_a_deep_load_is_no_error(tmp_path):
    """It is parsed when it is shown, long after its line was taken for a record."""
    made = MadeRun(tmp_path).train(10, 20)
    deep = "[" * 100_000 + "]" * 100_000
    with open(made.log.path, "a") as file:
        file.write(f'{{"step": 30, "kind": "train", "expert_load": {deep}, "run_id": "a"}}\n')
    assert loads_data(read_run(tmp_path))["step"] == [10, 20]


def test_odd_routers_are_no_error(tmp_path):
    made = MadeRun(tmp_path).train(10, 20)
    lines = [
        {"step": 30, "kind": "train", "loss": 1, "expert_load": [[1, None, 3], [1]], "run_id": "a"},
        {"step": 40, "kind": "train", "loss": 1, "expert_load": [], "run_id": "a"},
        {"step": 50, "kind": "train", "loss": 1, "expert_load": 5, "router_entropy": "x"},
        {"step": 60, "kind": "train", "loss": 1, "expert_load": [[1e300, -1e300]], "run_id": "a"},
        {"step": 70, "kind": "train", "loss": 1, "router_entropy": [None], "run_id": "a"},
    ]
    with open(made.log.path, "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    run = read_run(tmp_path)
    json.dumps([run_data(run, 0), loads_data(run)], allow_nan=False)
    assert 30 in loads_data(run)["step"]


# --------------------------------------------------------------------------------------------- page
def test_the_page_holds_its_data_whatever_it_says(tmp_path):
    name = "</script><script>alert(1)</script><!--%%{data}$x"
    MadeRun(tmp_path, run_name=name).train(10, 20)
    page = finished_page(name, [read_run(tmp_path)], about=name, notices=[name])
    assert page.count("<script") == page.count("</script>") == 2
    data = data_inside(page)
    assert data["runs"][0]["name"] == name and data["notices"] == [name]
    assert data["healthy_load"] == [0.25, 4.0]
    assert page_data([], ["n" * 1000])["notices"][0].endswith("…")


def test_the_last_news_is_the_time_of_the_file(tmp_path):
    made = MadeRun(tmp_path).train(10, 20)
    os.utime(made.log.path, (1_700_000_000, 1_700_000_000))
    assert run_data(read_run(tmp_path), 0)["modified"] == 1_700_000_000


def test_the_template_has_lines_that_can_be_read():
    """As in all other files of the repository: at most 100 columns."""
    lines = (REPO / "runtime/training/curves_page.html").read_text("utf-8").splitlines()
    assert [number for number, line in enumerate(lines, 1) if len(line) > 100] == []
