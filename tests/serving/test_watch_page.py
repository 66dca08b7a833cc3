"""The page of runs in a real browser: what it shows while runs grow, stop, break and lie."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.base.text import visible
from runtime.serving.watch import Server, Watch, snapshot
from runtime.training import curves_page
from runtime.training.curves import read_run
from tests.builders_watch import MadeRun, train_record
from tests.chromium import Browser, Page
from tests.conftest import REPO

# Each would set window.pwned or end the page's data, if it were taken for markup or script.
HOSTILE = (
    "</script><img src=x onerror=\"window.pwned='image'\">",
    "<script>window.pwned='script'</script>",
    "<!--<script>",
    "javascript:window.pwned='url'",
    "'\"><svg onload=window.pwned='svg'>",
    "{{constructor.constructor('window.pwned=1')()}}%%{data}$title",
    "__proto__",
    "constructor",
    "\u202eevil\u2066\u0000\u001b[31m",
    "\ud800",
    "}body{display:none}",
    "x" * 100_000,
)
SHOWN = "+(document.documentElement.dataset.shown || 0)"
CONTRAST = """
(() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const luminance = color => {
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    const linear = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map(v => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const over = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  const style = element => getComputedStyle(element);
  const behind = element => {
    for (let e = element; e; e = e.parentElement)
      if (style(e).backgroundColor !== "rgba(0, 0, 0, 0)") return style(e).backgroundColor;
    return "white";
  };
  const texts = [...document.querySelectorAll("h1, h2, p, th, td, label, li, button, summary,"
    + " output, select, .unit")].filter(e => e.getClientRects().length && e.textContent.trim());
  const found = texts.map(e => over(luminance(style(e).color), luminance(behind(e))));
  const ticks = [...document.querySelectorAll(".plot text")].map(e =>
    over(luminance(style(e).fill), luminance(behind(e.closest(".plot")))));
  const lines = Array.from({length: 10}, (_, i) => {
    const row = document.createElement("span"), card = document.querySelector(".card");
    row.className = "c" + i;
    row.append(document.createElement("span"));
    row.firstChild.className = "swatch";
    card.append(row);
    const ratio = over(luminance(style(row.firstChild).borderTopColor), luminance(behind(card)));
    row.remove();
    return ratio;
  });
  return {text: Math.min(...found, ...ticks), line: Math.min(...lines), count: found.length};
})()
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture
def serve():
    servers = []

    def start(*folders: Path) -> Server:
        server = Server(Watch(folders), 0)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Ask for news often, so that the tests wait less."""
    monkeypatch.setattr(curves_page, "POLL_SECONDS", 0.1)


def opened(browser: Browser, url: str, **more) -> Page:
    page = browser.open(url, **more)
    page.until(f"{SHOWN} >= 1")
    return page


def redraw(page: Page, script: str) -> None:
    """Run a script that changes what the page shows, and wait until it is drawn."""
    drawn = page.run(SHOWN)
    page.run(script)
    page.until(f"{SHOWN} > {drawn}")


def cell(page: Page, row: int, column: int) -> str:
    return page.run(
        f"document.querySelector('#runs tbody').rows[{row}].cells[{column}].textContent"
    )


def notices(page: Page) -> list[str]:
    return page.run("[...document.querySelectorAll('#notices li')].map(one => one.textContent)")


def clean(page: Page) -> None:
    """Hold that a page made no error, broke no policy of its own and asked its server alone."""
    assert page.errors == []
    assert page.violations() == []
    assert page.run("window.pwned === undefined")
    own = page.run("location.href").rpartition("/")[0]
    assert [url for url in page.requests if not url.startswith((own, "blob:"))] == []


# -------------------------------------------------------------------------------- a run that grows
def test_what_a_run_appends_is_shown(browser, serve, tmp_path):
    """Also a run that begins after the page was opened; the tab's title has the newest loss."""
    run = MadeRun(tmp_path / "nano").train(10, 100)
    server = serve(tmp_path)
    page = opened(browser, server.url)
    assert cell(page, 0, 2) == "100 / 1,000" and cell(page, 0, 1) == "running"
    before = page.run("document.querySelector('.chart .raw').getAttribute('d')")
    run.train(110, 120, loss=2.3456)
    page.until("document.title === '2.3456 nano'")
    assert cell(page, 0, 2) == "120 / 1,000" and cell(page, 0, 4) == "2.3456"
    after = page.run("document.querySelector('.chart .raw').getAttribute('d')")
    assert after.count("L") == before.count("L") + 2
    MadeRun(tmp_path / "later", "b").train(10, 30)
    page.until("document.querySelectorAll('#runs tbody tr').length === 2")
    run.train(130, 1000)
    page.until("document.title.startsWith('\\u2713 ')")
    assert cell(page, 0, 1) == "finished" and "nano: finished." in notices(page)
    # The first page had everything, and each answer after it what was new.
    assert page.run("performance.getEntriesByType('resource').length") >= 3
    clean(page)
    page.close()


@pytest.mark.nightly
def test_the_server_is_asked_again_after_it_was_away(browser, tmp_path):
    """A tunnel breaks; another server of the same files then has another session."""
    run = MadeRun(tmp_path / "nano").train(10, 100)
    first, port = started(tmp_path, 0)
    page = opened(browser, f"http://127.0.0.1:{port}/")
    first.kill()
    first.communicate()
    page.until("document.querySelector('#notices').textContent.includes('does not answer')")
    run.train(110, 150)
    again, _ = started(tmp_path, port)
    try:
        page.until(
            "document.querySelector('#runs tbody tr').cells[2].textContent === '150 / 1,000'"
        )
        page.until("!document.querySelector('#notices').textContent.includes('does not answer')")
    finally:
        again.kill()
        again.communicate()
    assert page.errors == []
    page.close()


def started(folder: Path, port: int) -> tuple[subprocess.Popen, int]:
    """Return a server in a process of its own, and its port."""
    command = [sys.executable, "-m", "scripts.watch", str(folder), "--port", str(port)]
    process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, text=True)
    return process, int(process.stdout.readline().strip().rstrip("/").rpartition(":")[2])


def test_a_run_that_is_killed_and_resumed_has_one_curve(browser, serve, tmp_path):
    """Its steps after the checkpoint are made again: the curve is cut there, and turns nowhere."""
    MadeRun(tmp_path / "nano").train(10, 300)
    page = opened(browser, serve(tmp_path).url)
    resumed = MadeRun(tmp_path / "nano", seed=7, resume_step=200).train(210, 220)
    page.until("document.querySelector('#runs tbody tr').cells[2].textContent === '220 / 1,000'")
    xs = page.run(
        "document.querySelector('.chart .raw').getAttribute('d').split(/[ML]/).slice(1)"
        ".map(point => +point.split(' ')[0])"
    )
    assert len(xs) == 22 and xs == sorted(xs)
    resumed.train(230, 240)
    page.until("document.querySelector('#runs tbody tr').cells[2].textContent === '240 / 1,000'")
    page.until("document.querySelector('.chart .raw').getAttribute('d').split('L').length === 24")
    clean(page)
    page.close()


def test_a_loss_that_is_not_finite_is_a_gap_with_a_mark_and_a_notice(browser, serve, tmp_path):
    run = MadeRun(tmp_path / "nano").train(10, 100)
    page = opened(browser, serve(tmp_path).url)
    run.train(110, 120, loss=math.nan, perplexity=math.nan, grad_norm=math.inf)
    page.until("document.title.startsWith('\\u26A0 NaN')")
    assert cell(page, 0, 1) == "diverged" and cell(page, 0, 4) == "NaN"
    assert any("not finite at step 120" in line for line in notices(page))
    loss = "document.querySelector('.chart.wide')"
    assert page.run(f"{loss}.querySelectorAll('.nan').length") == 2
    assert page.run(f"{loss}.querySelector('.raw').getAttribute('d').split('L').length") == 10
    run.train(130, 150)
    page.until("/^[0-9]/.test(document.title)")
    assert page.run(f"{loss}.querySelector('.raw').getAttribute('d').split('M').length") == 3
    assert cell(page, 0, 1) == "running"
    clean(page)
    page.close()


def test_a_run_that_diverged_by_spikes_keeps_its_loss_in_the_title(browser, serve, tmp_path):
    """The title said NaN of each run that diverged, also where every loss is finite."""
    run = MadeRun(tmp_path / "nano").train(10, 100)
    run.note("events", {"step": 100, "kind": "diverged", "text": "6 steps were skipped"})
    page = opened(browser, serve(tmp_path).url)
    assert cell(page, 0, 1) == "diverged"
    assert page.run("document.title") == f"\u26a0 {cell(page, 0, 4)} nano"
    assert float(cell(page, 0, 4)) > 1
    clean(page)
    page.close()


def test_a_run_without_news_is_stale(browser, serve, tmp_path):
    run = MadeRun(tmp_path / "nano").train(10, 100)
    long_ago = time.time() - 4000
    os.utime(run.log.path, (long_ago, long_ago))
    page = opened(browser, serve(tmp_path).url)
    assert cell(page, 0, 1) == "no news" and cell(page, 0, 8) == "–"
    assert any("no new record for 1 h 06 min" in line for line in notices(page))
    clean(page)
    page.close()


def test_a_damaged_line_is_a_notice(browser, serve, tmp_path):
    run = MadeRun(tmp_path / "nano").train(10, 50)
    lines = run.log.path.read_bytes().splitlines(keepends=True)
    lines[2] = b"{<b>broken\n"
    run.log.path.write_bytes(b"".join(lines))
    page = opened(browser, serve(tmp_path).url)
    assert any("metrics.jsonl, line 3" in line for line in notices(page))
    assert cell(page, 0, 2) == "50 / 1,000"
    page.close()


# --------------------------------------------------------------------------------- what it shows
def tip(page: Page) -> list[str]:
    return page.run(
        "[...document.querySelectorAll('.tip:not([hidden]) > div')].map(row => row.textContent)"
    )


def focus_chart(page: Page, title: str) -> None:
    page.run(
        "[...document.querySelectorAll('.plot')].find(plot => plot.getAttribute('aria-label')"
        f".startsWith({json.dumps(title)})).focus()"
    )


def test_keys_read_the_values_of_every_axis(browser, tmp_path):
    """The values are those of the file; FLOPs are three forward passes of each token."""
    run = MadeRun(tmp_path / "nano").train(10, 200)
    (tmp_path / "page.html").write_text(snapshot(Watch([tmp_path])))
    page = opened(browser, (tmp_path / "page.html").as_uri())
    records = [record for record in run.log.records() if record["kind"] == "train"]
    focus_chart(page, "Gradient norm")
    # The smoothed line was read out, which has values that no record has.
    assert page.run("document.querySelector('output[for=smooth]').textContent") == "0.60"

    def read() -> tuple[str, float]:
        head, row = tip(page)
        assert page.run("document.querySelector('#said').textContent") == f"{head}; {row}"
        return head, float(row.removeprefix("nano"))

    for keys, i in ((("End",), 19), (("ArrowLeft",), 18), (("Home", "ArrowRight"), 1)):
        page.press(*keys)
        head, value = read()
        assert head == f"step {records[i]['step']}"
        assert value == pytest.approx(records[i]["grad_norm"], rel=5e-4)
    flops = read_run(tmp_path / "nano").flops_per_token
    for axis, shown in (
        ("tokens", 40.96e3),
        ("seconds", 5),
        ("flops", flops * records[1]["tokens_seen"]),
    ):
        redraw(page, f"document.querySelector('input[value={axis}]').click()")
        focus_chart(page, "Gradient norm")
        page.press("Home", "ArrowRight")
        text = read()[0].rpartition(" ")[0] if axis == "seconds" else read()[0]
        number = text.split(" ", 1)[1]
        sizes = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
        value = float(number.split()[0]) * sizes.get(number.split()[-1], 1)
        assert value == pytest.approx(shown, rel=1e-3), axis
    page.press("Escape")
    assert tip(page) == []
    clean(page)
    page.close()


def test_the_heat_map_is_the_records_loads(browser, serve, tmp_path):
    run = MadeRun(tmp_path / "nano").train(10, 100)
    page = opened(browser, serve(tmp_path).url)
    page.until("document.querySelector('#heat-marks').textContent")
    assert page.run("document.querySelector('#block').max") == "3"
    # 10 steps into the run, expert 1 of block 0 has a sixtieth of its share; at step 100 a sixth.
    marks = page.run("document.querySelector('#heat-marks').textContent")
    assert marks.startswith("Step 100: 1 of 32 experts are outside 25 to 400 %")
    assert "block 0 expert 1 ▼ 17 %" in marks
    page.run("document.querySelector('#heat').focus()")
    page.press("Home", "ArrowDown", "ArrowDown", "PageDown", "PageDown", "ArrowRight")
    load = train_record(20)["expert_load"][2][2]
    read = page.run("document.querySelector('#heat-read').textContent")
    assert read == f"Block 2, step 20, expert 2: {load:.2f} × its fair share"
    # The cells' colours: a starved expert is as blue as it gets, at the fair share it has no tint.
    page.run("document.querySelector('#block').value = 0;"
             "document.querySelector('#block').dispatchEvent(new Event('input'))")  # fmt: skip
    page.press("Escape")
    starved = page.run(
        "(() => { const c = document.querySelector('#heat canvas'), b = c.getContext('2d');"
        "const tall = (c.clientHeight - 22) / 8, x = 58 + 0.05 * (c.clientWidth - 68);"
        "return [...b.getImageData(x, 1.5 * tall, 1, 1).data].slice(0, 3); })()"
    )
    assert starved == [0x4F, 0x8F, 0xCE]
    run.train(110, 600)
    page.until("document.querySelector('#heat-marks').textContent.startsWith('Step 600: all 32')")
    clean(page)
    page.close()


def test_the_first_record_is_a_point(browser, tmp_path):
    """A path of one point draws nothing, so the page was empty for the first minutes of a run."""
    MadeRun(tmp_path / "young").train(10, 10)
    (tmp_path / "page.html").write_text(snapshot(Watch([tmp_path])))
    page = opened(browser, (tmp_path / "page.html").as_uri())
    plots = "[...document.querySelectorAll('.plot')].filter(plot => plot.querySelector('path'))"
    count = page.run(f"{plots}.length")
    assert count >= 5
    # That of the least and most loaded expert has a band and no line.
    seen = page.run(f"{plots}.filter(plot => plot.querySelector('circle.dot')).length")
    assert seen == count - 1
    page.close()


def test_a_run_has_no_value_after_its_end(browser, tmp_path):
    """The shorter run's last number was shown at every later step, as if it had got there."""
    MadeRun(tmp_path / "short", "a").train(10, 100)
    MadeRun(tmp_path / "long", "b").train(10, 400)
    (tmp_path / "page.html").write_text(snapshot(Watch([tmp_path])))
    page = opened(browser, (tmp_path / "page.html").as_uri())
    focus_chart(page, "Gradient norm")
    page.press("End")
    head, long, short = tip(page)
    assert (head, short) == ("step 400", "short–") and not long.endswith("–")
    page.press("Home")
    head, long, short = tip(page)
    assert head == "step 10" and not long.endswith("–") and not short.endswith("–")
    page.close()


def titles(page: Page) -> list[str]:
    return page.run(
        "[...document.querySelectorAll('.chart:not([hidden]) h2')]"
        ".map(h => h.firstChild.textContent)"
    )


def test_charts_keep_their_order_and_the_focus(browser, serve, tmp_path):
    """The first validation came after the first training records, and its chart at the end."""
    run = MadeRun(tmp_path / "nano").train(10, 50)
    page = opened(browser, serve(tmp_path).url)
    before = titles(page)
    assert "Bits per byte, validation" not in before
    focus_chart(page, "Learning rate")
    run.train(60, 100)
    page.until("document.querySelector('#runs tbody tr').cells[2].textContent === '100 / 1,000'")
    page.until("document.body.textContent.includes('Bits per byte, validation')")
    assert titles(page) == [before[0], "Bits per byte, validation", *before[1:]]
    assert page.run("document.activeElement.getAttribute('aria-label')").startswith("Learning rate")
    page.close()


@pytest.mark.nightly
def test_a_page_left_open_keeps_the_beginning_of_a_run(browser, serve, tmp_path, monkeypatch):
    """It halved its own rows when they were many, those of the beginning each time again.

    After some days the first half of a run was one point. Now the server thins the whole evenly.
    """
    monkeypatch.setattr(curves_page, "MOST_POINTS", 20)
    monkeypatch.setattr(curves_page, "MOST_COLUMNS", 10)
    run = MadeRun(tmp_path / "nano", max_steps=10_000).train(1, 10, every=1)
    page = opened(browser, serve(tmp_path).url)
    # Fewer at a time than the server would answer with the whole.
    for last in range(20, 331, 10):
        run.train(last - 9, last, every=1)
        page.until(f"+document.querySelector('#runs tbody tr').cells[2].textContent"
                   f".split(' ')[0].replace(',', '') === {last}")  # fmt: skip
    # Asked again once more than 40 rows have come.
    xs = page.run(
        "document.querySelector('.chart .raw').getAttribute('d').split(/[ML]/).slice(1)"
        ".map(point => +point.split(' ')[0])"
    )
    assert 20 <= len(xs) <= 60
    middle = (min(xs) + max(xs)) / 2
    # Halving would have left 2 of the rows to the first half.
    assert sum(x < middle for x in xs) >= 7
    clean(page)
    page.close()


def test_few_steps_have_whole_ticks_and_times_are_round(browser, serve, tmp_path):
    """After four steps the axis said 0 1 1 2 2 3 3 4 4, and times had ticks at 16 min 40 s."""
    ticks = "[...document.querySelectorAll('.chart.wide text[text-anchor=middle]')]"
    MadeRun(tmp_path / "nano").train(1, 4, every=1)
    page = opened(browser, serve(tmp_path).url, width=1280)
    said = page.run(f"{ticks}.map(one => one.textContent)")
    assert said[0] == "0" and len(said) == len(set(said)) >= 4
    page.close()
    MadeRun(tmp_path / "nano").train(10, 20_000, every=10)
    page = opened(browser, serve(tmp_path).url, width=1280)
    redraw(page, "document.querySelector('#axis input[value=seconds]').click()")
    said = page.run(f"{ticks}.map(one => one.textContent)")
    assert said[:4] == ["0 s", "10 min", "20 min", "30 min"] and "1 h 20 min" in said
    page.close()


def test_a_straight_line_stays_straight_when_it_is_smoothed(browser, tmp_path):
    """Smoothing over the past alone lags: a falling loss was drawn too high, at its ends most."""
    run = MadeRun(tmp_path / "nano")
    for step in range(10, 310, 10):
        run.log.append(train_record(step) | {"loss": 10 - 0.02 * step})
    (tmp_path / "page.html").write_text(snapshot(Watch([tmp_path])))
    page = opened(browser, (tmp_path / "page.html").as_uri())
    drawn = [
        page.run(f"document.querySelector('.chart.wide .{kind}').getAttribute('d')")
        for kind in ("raw", "line")
    ]
    assert drawn[0] == drawn[1] and drawn[0].count("L") == 29
    page.close()


def test_runs_can_be_hidden_and_their_differences_are_listed(browser, serve, tmp_path):
    MadeRun(tmp_path / "a", "a", lr=1e-3, run_name="a").train(10, 50)
    MadeRun(tmp_path / "b", "b", lr=2e-3, run_name="b").train(10, 50)
    page = opened(browser, serve(tmp_path).url)
    rows = "[...document.querySelectorAll('#differ tr')].map(r => r.textContent)"
    assert page.run(rows) == ["settingab", "lr0.0010.002"]
    assert page.run("document.querySelectorAll('.chart.wide .line').length") == 2
    page.click("#runs tbody tr:nth-child(2) input")
    page.until("document.querySelectorAll('.chart.wide .line').length === 1")
    assert page.run(rows) == []
    page.close()


def test_a_csv_holds_the_curve_and_no_formula(browser, tmp_path):
    """A spreadsheet runs a cell that begins with =: a run's name is anybody's."""
    run = MadeRun(tmp_path / "x", run_name='=1+1"').train(10, 30)
    (tmp_path / "page.html").write_text(snapshot(Watch([tmp_path])))
    keep = "URL.createObjectURL = blob => (window.blob = blob, 'blob:x');"
    page = opened(browser, (tmp_path / "page.html").as_uri(), before=keep)
    page.click(".chart.wide button")
    lines = page.run("window.blob.text()").splitlines()
    assert lines[0] == '"run","curve","step","tokens","seconds","mean","low","high"'
    first = lines[1].split(",")
    assert first[:2] == ['"\'=1+1"""', '"training"']
    record = run.log.records()[0]
    assert list(map(float, first[2:5])) == [10, record["tokens_seen"], record["seconds"]]
    assert float(first[5]) == pytest.approx(record["loss"], rel=1e-5)
    page.close()


def test_samples_and_events_are_shown(browser, serve, tmp_path):
    run = MadeRun(tmp_path / "nano").train(10, 100)
    run.note("samples", *({"step": s, "prompt": "Once", "text": f" upon {s}"} for s in (50, 100)))
    run.note("events", {"step": 70, "kind": "spike", "text": "loss 9.1"})
    page = opened(browser, serve(tmp_path).url)
    assert page.run("document.querySelector('#sample-texts').textContent") == "Once upon 100"
    page.run("document.querySelector('#sample-step').focus()")
    page.press("ArrowLeft")
    page.until("document.querySelector('#sample-texts').textContent === 'Once upon 50'")
    assert (
        page.run("document.querySelector('#event-list').textContent") == "step 70: spike, loss 9.1"
    )
    assert page.run("document.querySelectorAll('.chart.wide .event').length") == 1
    page.close()


# ----------------------------------------------------------------------------- whoever wrote it
def test_hostile_runs_run_nothing(browser, serve, tmp_path):
    """Names, settings, columns, events and samples are other people's text."""
    for i, text in enumerate(HOSTILE):
        run = MadeRun(
            tmp_path / f"run{i}", f"run{i}", run_name=text, optimizer=text, **{text: text}
        )
        run.train(10, 20, metrics={text: 1.5})
        run.log.append({"kind": "score", "step": 20, "score": {text: 0.5}})
        run.note("samples", {"step": 20, "prompt": text, "text": text})
        run.note("events", {"step": 20, "kind": text, "text": text, "time": text})
    server = serve(tmp_path)
    page = opened(browser, server.url)
    page.until("document.querySelector('#heat-marks').textContent")
    names = page.run("[...document.querySelectorAll('#runs .name')].map(e => e.textContent)")
    assert len(names) == len(HOSTILE)
    assert HOSTILE[0] in names and visible(HOSTILE[0]) == HOSTILE[0]
    assert page.run("document.scripts.length") == 2
    assert (
        page.run("document.querySelectorAll('img, main svg svg, iframe, #runs script').length") == 0
    )
    assert page.run("getComputedStyle(document.body).display") == "block"
    clean(page)
    page.close()
    (tmp_path / "page.html").write_text(snapshot(server.watch), encoding="utf-8")
    page = opened(browser, (tmp_path / "page.html").as_uri())
    assert page.run("document.querySelectorAll('#runs tbody tr').length") == len(HOSTILE)
    clean(page)
    page.close()


def test_text_cannot_become_markup_on_this_page(browser, serve, tmp_path):
    """The policy makes innerHTML throw, so that a later change cannot begin to use it."""
    MadeRun(tmp_path / "nano").train(10, 20)
    page = opened(browser, serve(tmp_path).url)
    for script in ("setAttribute('onclick', 'pwned=1')", "innerHTML = '<img src=x>'"):
        with pytest.raises(AssertionError, match="requires 'Trusted"):
            page.run(f"document.createElement('div').{script}")
    assert page.run("window.pwned === undefined")
    page.close()


# -------------------------------------------------------------------------------- for everybody
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_colours_can_be_read_and_nothing_leaves_a_narrow_screen(browser, serve, tmp_path, dark):
    run = MadeRun(tmp_path / "nano").train(10, 100)
    MadeRun(tmp_path / "a-run-with-quite-a-long-name-of-its-own", "b").train(10, 50, loss=math.nan)
    run.note("events", {"step": 70, "kind": "spike", "text": "x" * 300})
    run.note("samples", {"step": 100, "prompt": "Once", "text": "x" * 300})
    page = opened(browser, serve(tmp_path).url, width=1280, dark=dark)
    assert page.run("matchMedia('(prefers-color-scheme: dark)').matches") is dark
    page.until("document.querySelector('#heat-marks').textContent")
    found = page.run(CONTRAST)
    # WCAG 2.1 AA: 1.4.3 for text, 1.4.11 for what else is needed to understand the page.
    assert found["count"] > 50 and found["text"] >= 4.5 and found["line"] >= 3
    for width in (320, 640, 1280):
        page.resize(width, 800)
        page.until(f"innerWidth === {width}")
        wide = page.run("document.documentElement.scrollWidth")
        assert wide <= width, f"{wide} wide on a screen of {width}"
    clean(page)
    page.close()


def test_every_control_is_reached_by_the_tab_key_and_shows_it(browser, serve, tmp_path):
    run = MadeRun(tmp_path / "nano").train(10, 100)
    run.note("samples", *({"step": s, "prompt": "Once", "text": "x"} for s in (50, 100)))
    page = opened(browser, serve(tmp_path).url)
    page.until("document.querySelector('#heat-marks').textContent")
    # A window that is not in front has no focus otherwise.
    page.call("Emulation.setFocusEmulationEnabled", enabled=True)
    reached, outlines = [], []
    for _ in range(60):
        page.press("Tab")
        name, outline = page.run(
            "(() => { const e = document.activeElement; return [e.id || e.className || e.tagName,"
            "getComputedStyle(e).outlineStyle]; })()"
        )
        if name in ("BODY", "skip") and reached:
            break
        reached.append(name)
        outlines.append(outline)
    assert reached[0] == "skip"
    assert {"smooth", "from", "log", "heat", "block", "sample-step", "plot"} <= set(reached)
    assert set(outlines) == {"solid"}
    page.close()


def test_on_paper_it_has_the_curves_and_no_controls(browser, tmp_path):
    MadeRun(tmp_path / "nano").train(10, 100)
    (tmp_path / "page.html").write_text(snapshot(Watch([tmp_path])))
    page = opened(browser, (tmp_path / "page.html").as_uri(), media="print")
    drawn = page.run("document.querySelector('.chart.wide .line').getBoundingClientRect().width")
    assert drawn > 100
    assert page.run("document.querySelector('#smooth').getClientRects().length") == 0
    page.close()
