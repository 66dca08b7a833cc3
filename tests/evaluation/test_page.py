"""The page and the Markdown of a report: they show its figures, and names stay text."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from runtime.evaluation.drawing import svg, ticks
from runtime.evaluation.page import as_page
from runtime.evaluation.report import figure, section
from runtime.evaluation.writing import as_json, as_lines, as_markdown, shown
from tests import chromium

HOSTILE = [
    "<script>alert(1)</script>",
    "</style><img src=x onerror=alert(1)>",
    '" onload="alert(1)" x="',
    "--></svg><b>|`a`|\\",
    "\u202eright to left\x1b[2J\x00 \ud800",
    "%%{policy} $x {0}",
]


def report_of(name: str = "a.pt", points: int = 3) -> dict:
    """Return a report whose every text is `name`."""
    labels = [f"{name}{i}" for i in range(points)]
    plots = [
        {
            "title": name,
            "kind": kind,
            "x_label": name,
            "y_label": name,
            "series": [
                {
                    "name": f"{name}{i}",
                    "x": [0.1, 0.5, 0.9] if kind == "diagonal" else labels,
                    "y": [0.2, None, 0.8][:points],
                    "low": [0.1, None, float("nan")][:points],
                    "high": [0.3, None, 0.9][:points],
                }
                for i in range(2)
            ],
        }
        for kind in ("points", "diagonal", "line")
    ]
    part = section(
        name,
        {name.replace(".", "_"): figure(0.5, 1234, 0.25, 0.75, name)},
        {"columns": [name, "number"], "rows": [[name, 0.125]] * 20},
        plots,  # type: ignore[arg-type]
        [name],
    )
    ckpt = {"name": name, "step": 7, "parameters": 5000, "active_parameters": 4000}
    ckpt["computed_by"] = {"line": name, "is_exact": True}
    return {
        "checkpoint": ckpt,
        "other_checkpoint": ckpt,
        "data": {"sources": [name], "documents": 3, "bytes": 4567, "sha256": "ab" * 32},
        "commit": "c" * 40,
        "stories": part,
        "tasks": {name: part},
    }


class Elements(HTMLParser):
    """The elements of a page and their attributes."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


@pytest.mark.parametrize("name", HOSTILE)
def test_names_stay_text_on_the_page(name):
    page = as_page(report_of(name))
    plain, hostile = Elements(as_page(report_of())).found, Elements(page).found
    assert [tag for tag, _ in hostile] == [tag for tag, _ in plain]
    assert [set(attrs) for _, attrs in hostile] == [set(attrs) for _, attrs in plain]
    page.encode()


@pytest.mark.parametrize("name", HOSTILE)
def test_names_stay_text_in_markdown_and_on_a_terminal(name):
    text = as_markdown(report_of(name))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    counts = {len(re.findall(r"(?<!\\)\|", row)) for row in rows}
    assert counts == {6, 3}
    assert not re.search(r"(?<!\\)[<`]", text)
    for line in as_lines(report_of(name)):
        assert line.isprintable() or "\ud800" in line


def test_the_page_asks_nobody_for_anything():
    page = as_page(report_of())
    policy = next(a for tag, a in Elements(page).found if a.get("http-equiv"))["content"]
    assert policy.startswith("default-src 'none'")
    assert not any({"src", "href", "style"} & set(a) - {"href"} for _, a in Elements(page).found)
    assert {a["href"] for _, a in Elements(page).found if "href" in a} == {"#main"}
    assert "http://" not in page and "https://" not in page


def test_figures_are_as_exact_as_they_are_known():
    assert shown(0.812345, 0.02) == "0.8123"
    assert shown(1234.5678, 100) == "1,235"
    assert shown(0.5) == "0.5000" and shown(12) == "12" and shown(None) == "" and shown(0.0) == "0"
    text = as_markdown(report_of())
    assert "| 0.500 | 0.250 to 0.750 | 1,234 |" in text


def test_what_is_not_finite_is_null_in_json_and_blank_elsewhere():
    report = report_of()
    report["stories"]["figures"]["none"] = figure(float("nan"), 0, float("nan"), 1.0)
    assert '"value": null' in as_json(report) and "NaN" not in as_json(report)
    for text in (as_page(report), as_markdown(report)):
        assert "not defined" in text and "nan" not in text


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (-3.0, 7.0, [-4.0, -2.0, 0.0, 2.0, 4.0, 6.0, 8.0]),
        (5.0, 5.0, [4.4, 4.6, 4.8, 5.0, 5.2, 5.4, 5.6]),
    ],
)
def test_ticks_are_round_and_cover_the_points(low, high, expected):
    found = ticks(low, high)
    assert found[0] <= low and found[-1] >= high
    assert all(abs(tick * 10 - round(tick * 10)) < 1e-9 for tick in found)
    assert len(found) <= len(expected) + 1


def test_marks_are_where_their_numbers_are():
    """The middle of the axis is the middle of the plot, and more is higher."""
    series = [{"name": "a", "x": [0.0, 0.5, 1.0], "y": [0.0, 0.5, 1.0]}]
    drawing = svg(
        {"title": "t", "kind": "diagonal", "x_label": "", "y_label": "", "series": series}  # type: ignore[typeddict-item]
    )
    points = re.findall(r'transform="translate\(([\d.]+) ([\d.]+)\)"', drawing)
    (x0, y0), (x1, y1), (x2, y2) = ((float(x), float(y)) for x, y in points)
    assert x0 < x1 < x2 and y0 > y1 > y2
    assert abs(2 * x1 - x0 - x2) < 0.21 and abs(2 * y1 - y0 - y2) < 0.21


def test_a_plot_without_points_is_not_drawn():
    series = [{"name": "a", "x": ["b"], "y": [None]}]
    plot = {"title": "t", "kind": "points", "x_label": "", "y_label": "", "series": series}
    assert svg(plot) == ""  # type: ignore[arg-type]


# ------------------------------------------------------------------------------ in a browser
def test_the_page_in_a_browser(tmp_path):
    """Nothing runs, nothing is refused or asked for, and a phone needs no sideways scrolling."""
    with chromium.Browser(tmp_path) as browser:
        for number, name in enumerate([*HOSTILE, "a" * 300]):
            path = tmp_path / f"{number}.html"
            path.write_text(as_page(report_of(name, 3)), encoding="utf-8")
            page = browser.open(path.as_uri(), width=320, dark=bool(number % 2))
            width = page.run("document.documentElement.scrollWidth")
            assert page.errors == [] and page.violations() == [] and width <= 320, name
            assert page.requests == [path.as_uri()]
            assert page.run("document.querySelectorAll('svg[role=img]').length") == 6
            page.close()


def test_dark_and_light_differ_and_both_can_be_read(tmp_path):
    """Text has a contrast of at least 4.5 with its background (WCAG 2.2, 1.4.3)."""
    path = tmp_path / "page.html"
    path.write_text(as_page(report_of()), encoding="utf-8")
    contrast = """(() => {
      const light = c => { const v = c.match(/[\\d.]+/g).slice(0, 3).map(n => n / 255)
        .map(n => n <= .04045 ? n / 12.92 : ((n + .055) / 1.055) ** 2.4);
        return .2126 * v[0] + .7152 * v[1] + .0722 * v[2]; };
      const pairs = [["h1", "body"], ["td", ".card"], [".note", ".card"], [".address", ".card"]];
      return pairs.map(([text, back]) => {
        const of = s => getComputedStyle(document.querySelector(s));
        const [a, b] = [light(of(text).color), light(of(back).backgroundColor)];
        return (Math.max(a, b) + .05) / (Math.min(a, b) + .05); });
    })()"""
    with chromium.Browser(tmp_path) as browser:
        backgrounds = []
        for dark in (False, True):
            page = browser.open(path.as_uri(), dark=dark)
            assert min(page.run(contrast)) >= 4.5
            backgrounds.append(page.run("getComputedStyle(document.body).backgroundColor"))
            page.close()
    assert backgrounds[0] != backgrounds[1]
