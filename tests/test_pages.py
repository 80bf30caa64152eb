"""Tables, charts and pages of results: what they say, what they escape, and that they fit."""

import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest

from tdlib.core.pages import SCRIPT, STYLE, Html, Section, interval_chart, link, page_html, table_html
from tdlib.runs.plan import Plan, PlannedRun
from tdlib.runs.report import means_over_seeds, seed_interval

EVIL = '<script>alert("1")</script>'


def test_a_table_escapes_text_keeps_links_and_shows_shares_in_per_cent():
    table = pd.DataFrame({
        "name & more": [EVIL, "", "x" * 200],
        "file": [link('a"b/c.csv', "<data>"), "", ""],
        "accuracy": [0.5, float("nan"), 0.123456],
        "pairs": pd.array([7, None, 12], dtype="Int64"),
    })  # fmt: skip
    html = table_html(table, ["accuracy"], ["file"], True, row_class=lambda row: f"n{row['pairs']}")
    assert "<script" not in html and "&lt;script&gt;" in html
    assert '<a href="a&quot;b/c.csv">&lt;data&gt;</a>' in html and "name &amp; more" in html
    assert "accuracy (%)" in html and '<td class="n" data-v="0.5">50.0</td>' in html and ">12.3</td>" in html
    assert '<td class="n" data-v="-34.1">-34.1 [-31.4, 36.7]</td>' in table_html(
        pd.DataFrame({"a": ["-34.1 [-31.4, 36.7]", "34 things"]})
    )
    assert html.count('data-v=""') == 2, "both kinds of missing value are empty"
    assert "x" * 160 + "…" in html and "x" * 161 not in html
    assert '<tr class="n7">' in html and html.count('class="sorts"') == 4 and "overflow-x:auto" in STYLE
    assert table_html(table.iloc[:0]) == "<p>none</p>"


def test_an_inline_table_needs_no_style_sheet():
    html = table_html(pd.DataFrame({"a": [1], "b": ["x"]}), inline=True)
    assert html.startswith("<table style=") and "<div" not in html
    assert all("style=" in tag for tag in re.findall(r"<(?:table|t[rdh])\b[^>]*>", html))


def drawing(html: str) -> ElementTree.Element:
    return ElementTree.fromstring(html)


def test_a_chart_places_values_on_its_axis():
    rows = pd.DataFrame({
        "group": ["few", "few", "all"], "label": ["finetune", "clip_td", "a < b & " + "c" * 60],
        "value": [0.40, 0.50, 0.60], "low": [0.35, 0.40, np.nan], "high": [0.45, 0.60, np.nan],
        "filled": [True, False, True],
    })  # fmt: skip
    svg = drawing(interval_chart(rows, "accuracy (%)"))
    circles = [node for node in svg.iter() if node.tag.endswith("circle")]
    x = [float(node.get("cx")) for node in circles]
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2) and x[0] < x[1]
    assert "accent" in circles[0].get("fill") and "paper" in circles[1].get("fill")
    lines = [n for n in svg.iter() if n.tag.endswith("line") and n.get("class") != "grid"]
    assert len(lines) == 2 and float(lines[1].get("x2")) == pytest.approx(x[2], abs=0.2)
    texts = [node.text for node in svg.iter() if node.tag.endswith("text")]
    assert "few" in texts and texts.count("few") == 1 and "40.0 [35.0, 45.0]" in texts and "60.0" in texts
    titles = [node.text for node in svg.iter() if node.tag.endswith("title")]
    assert titles[2].startswith("a < b & cccc") and titles[2].endswith(": 60.0")
    assert svg.get("aria-label") == "accuracy (%)" and float(svg.get("width")) < 950
    long = [f"clip_td_repaired, head_learning_rate=6e-05, learning_rate={rate}" for rate in (3e-05, 0.0001)]
    svg = drawing(interval_chart(rows[:2].assign(label=long), "accuracy (%)"))
    shown = [node.text for node in svg.iter() if node.tag.endswith("text")]
    assert len({text for text in shown if text.startswith("clip_td")}) == 2, "ends of long names stay"


def test_a_chart_of_differences_holds_zero_and_signs():
    rows = pd.DataFrame({"label": ["one"], "value": [0.05], "low": [0.01], "high": [0.09]})
    svg = drawing(interval_chart(rows, "points", zero=True))
    texts = [node.text for node in svg.iter() if node.tag.endswith("text")]
    assert "0" in texts and "+5.0 [+1.0, +9.0]" in texts
    assert interval_chart(rows.assign(value=np.nan), "points") == "<p>none</p>"
    assert "circle" in interval_chart(rows.assign(value=0.0, low=0.0, high=0.0), "points")


def test_a_page_has_contents_that_lead_to_its_parts_and_loads_nothing():
    parts = [Section("One & two", table_html(pd.DataFrame({"a": [1]}))), Section("Data", "<p>x</p>", True)]
    page = page_html("A <b>", ["said <i> by `a <b>`", Html("<p id='as-is'></p>")], parts)
    targets = re.findall(r'href="#([\w-]+)"', page)
    assert len(targets) == 2 and all(f'id="{target}"' in page for target in targets)
    assert (
        "<title>A &lt;b&gt;</title>" in page
        and "said &lt;i&gt; by <code>a &lt;b&gt;</code>" in page
        and "<p id='as-is'></p>" in page
    )
    assert page.count("<details>") == 1 and "One &amp; two" in page and SCRIPT in page
    assert "http" not in page and "src=" not in page and "prefers-color-scheme:dark" in page


def test_a_list_that_goes_with_a_task_is_no_setting_but_an_arm_that_does_is():
    table = pd.DataFrame({
        "task": ["vcr_qa", "vcr_qa", "snli_ve"], "eval_splits": ['["val"]', '["val"]', '["dev"]'],
        "arm": ["finetune", "finetune", "clip_td"], "seed": [0, 1, 0], "state": "done",
        "accuracy.val": [0.5, 0.7, np.nan], "accuracy.dev": [np.nan, np.nan, 0.3],
        "measures.dev.accuracy": [np.nan, np.nan, 0.3], "detail.val.x": [0.1, 0.2, np.nan],
    })  # fmt: skip
    names = ["task", "eval_splits", "arm", "seed"]
    runs = [PlannedRun(row, row, {"id": ""}) for row in table[names].to_dict("records")]
    means = means_over_seeds(Plan("b", Path("t.ipynb"), runs), table)
    assert list(means.columns) == [
        "task", "arm", "seeds", "accuracy.val (%)", "detail.val.x (%)", "accuracy.dev (%)"
    ]  # fmt: skip
    assert means["accuracy.val (%)"][0] == "60 ± 14.1" and means["accuracy.dev (%)"][1] == "30"


def test_the_interval_over_seeds_is_students():
    values = np.array([0.40, 0.50, 0.60])
    mean, low, high = seed_interval(values)  # 4.303 * 0.1 / sqrt(3) = 0.2484
    assert mean == pytest.approx(0.5) and (low, high) == pytest.approx((0.2516, 0.7484), abs=1e-4)
    assert np.isnan(seed_interval(values[:2])[1]) and seed_interval(values[:1])[0] == 0.40
    _, low, high = seed_interval(np.arange(31.0))  # t of 30 degrees of freedom: 2.042
    assert high - low == pytest.approx(2 * 2.042 * np.std(np.arange(31), ddof=1) / 31**0.5)
