"""Writes a study: tables for readers and for programs, figures, and one page that leads with the result."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from tdlib.analysis.compare import USUAL, number_of_worlds, worlds_in_words
from tdlib.analysis.protocol import main_measure, together
from tdlib.analysis.statistics import FOUND, UNTESTED
from tdlib.core.files import whole_file, whole_path, write_json
from tdlib.core.pages import Html, Section, interval_chart, is_missing, link, page_html, table_html
from tdlib.data.tasks import SHIFTS

PERCENT = {
    "mean", "low", "high", "chance", "over_chance", "baseline_mean", "difference", "difference_low",
    "difference_high", "relative", "relative_low", "relative_high", "gain_over_chance", "paper", "largest",
}  # fmt: skip
SIGNED = {name for name in PERCENT if name.startswith(("difference", "relative"))} | {
    "gain_over_chance", "paper", "largest",
}  # fmt: skip
POINTS = {"difference", "gain_over_chance"}
INTERVALS = {
    "mean": ("low", "high"), "difference": ("difference_low", "difference_high"),
    "relative": ("relative_low", "relative_high"),
}  # fmt: skip
# Columns that a table leaves out if all their cells are empty.
SILENT = {"setting", "world", "worlds", "unpaired", "tuned", "of_size", "commit", "reason"}
# Columns that only the files have, because a page with all of them is too wide to read.
ONLY_IN_FILES = [
    "split", "over_chance", "baseline_mean", "gain_over_chance", "p_value", "arms_tested", "subset", "shots",
    "shared", "pictures",
]  # fmt: skip
MANY_ROWS = 40  # larger tables of a page are folded


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """Makes a table for readers: shares in per cent, intervals beside their value, no empty column."""
    limits = {name for pair in INTERVALS.values() for name in pair}
    columns: dict[str, list[str]] = {}
    for name in table:
        if name in limits and any(value in table and name in pair for value, pair in INTERVALS.items()):
            continue
        values = [_shown(name, value) for value in table[name]]
        pair = INTERVALS.get(name)
        if pair and set(pair) <= set(table.columns):
            bounds = zip(table[pair[0]], table[pair[1]], strict=True)
            values = [
                f"{value} [{_shown(name, low)}, {_shown(name, high)}]" if low == low else value
                for value, (low, high) in zip(values, bounds, strict=True)
            ]
        if name not in SILENT or any(values):
            unit = " (points)" if name in POINTS else " (%)" if name in PERCENT else ""
            columns[name.replace("_", " ") + unit] = values
    return pd.DataFrame(columns, index=table.index)


def _shown(name: str, value: Any) -> str:
    if is_missing(value):
        return ""
    if name in PERCENT:
        return f"{100 * value:{'+' if name in SIGNED else ''}.1f}"
    if name.startswith("p_"):
        return f"{value:.3g}"
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def lead_charts(compared: pd.DataFrame, baseline: str = "finetune") -> list[Html]:
    """Draws each arm's difference to the baseline and its score on the usual test.

    A group per task, setting, size and worlds (``protocol.together``), those of most worlds first. A filled
    mark is a difference that the paired test found. Empty where there is nothing to draw.
    """
    rows = main_measure(together(compared))
    rows = rows[rows["test"] == USUAL]
    if rows.empty:
        return []
    rows = rows.sort_values("world", key=lambda worlds: -worlds.map(number_of_worlds), kind="stable")
    group = rows["task"] + ", " + rows["train_examples"].map("{:.0f} examples".format)
    for part in (rows["setting"], rows["world"].map(worlds_in_words)):
        group += part.map(lambda words: f", {words}" if words else "")
    rows = rows.assign(group=group, label=rows["arm"])
    scores = interval_chart(rows.assign(value=rows["mean"]), "Score on the usual test, in per cent")
    guessed = rows.groupby("task", sort=False)["chance"].mean().dropna()
    chance = ", ".join(f"{100 * share:.1f} ({task})" for task, share in guessed.items())
    over = "seeds and pictures" if rows["seeds"].max() > 1 else "pictures alone (one seed)"
    said = f"Score on the usual test (%) with 95 % intervals over {over}"
    parts = [_figure(scores, f"{said}; chance: {chance}." if chance else f"{said}.")]
    apart = rows.dropna(subset=["difference"])
    if len(apart):
        named = {"value": "difference", "low": "difference_low", "high": "difference_high"}
        untested = apart["verdict"].eq(UNTESTED).map({True: f" ({UNTESTED})", False: ""})
        drawn = apart.assign(filled=apart["verdict"].isin(FOUND), **{k: apart[v] for k, v in named.items()})
        drawn["label"] += untested
        chart = interval_chart(drawn, f"Difference to {baseline}, in points", zero=True)
        said = f"Difference to {baseline} (points) on the usual test; filled: found by the paired test."
        parts.insert(0, _figure(chart, said))
    return parts


def reading_guide(compared: pd.DataFrame, baseline: str = "finetune") -> Html:
    """Explains in a folded list what the words of a study's page mean, and each test that occurs in it."""
    shifts = {test: SHIFTS[test] for test in dict.fromkeys(compared["test"]) if test in SHIFTS}
    lines = [
        f"Arm: one way to train a student; {baseline} is the baseline, and notebooks/README.md has all.",
        "Pair: an arm and the baseline with the same world, seed, training examples and test questions.",
        "World: a MiniWorld, generated data of that seed; all: together. Seeds are counted over worlds, each "
        "of which counts alike; few worlds do not say how much a world matters.",
        "Difference: points of accuracy over the pairs; relative: the same in per cent of the baseline's.",
        "Intervals (95 %) resample seeds and pictures. One that leaves out 0 is no verdict.",
        "Verdict: of the sign-flip test over the pairs, exact up to 14 of them; p adjusted is its p-value "
        "after Holm's correction over the tested arms. It is of these test questions, so that an interval, "
        "which draws pictures too, may hold 0 all the same. Filled marks are differences that it found.",
        "Family: each test, size, world and kind of examples is corrected by itself. Among twenty of them "
        "without any difference, about one has a verdict by chance.",
        "Test usual: the task's own.",
        *(f"Test {test}: {says}." for test, says in shifts.items()),
    ]
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return Html(f"<details><summary>How to read this page</summary><ul>{items}</ul></details>")


def _figure(drawing: str, caption: str) -> Html:
    return Html(f"<figure>{drawing}<figcaption>{escape(caption)}</figcaption></figure>")


def write_study(
    folder: Path,
    tables: Mapping[str, tuple[str, pd.DataFrame]],
    figures: Mapping[str, tuple[str, str, bytes, str]],
    title: str,
    notes: Sequence[str] = (),
    facts: Mapping[str, Any] | None = None,
    lead: Sequence[str] = (),
) -> Path:
    """Writes tables, figures and one page that loads nothing; returns the page.

    ``tables`` (caption and table, by name) become NAME.csv (full numbers), NAME.parquet and NAME.html (a
    fragment, readable), ``figures`` (caption, name of the table with its numbers, PNG and SVG, by name)
    NAME.png and NAME.svg; ``facts``, the parameters that they were made with, become study.json. The page
    begins with ``lead`` (text, or ``Html`` such as ``lead_charts``) and ``notes``. Other files in the folder
    stay as they are.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for name, (caption, source, png, svg) in figures.items():
        with whole_path(folder / f"{name}.png") as partial:
            partial.write_bytes(png)
        with whole_file(folder / f"{name}.svg") as out:
            out.write(svg)
        image = b64encode(svg.encode()).decode()
        shown = f'<img alt="{escape(caption)}" src="data:image/svg+xml;base64,{image}">'
        numbers = link(f"{source}.csv", f"{source}.csv")
        parts.append(Section(caption, f"<figure>{shown}<figcaption>Numbers: {numbers}</figcaption></figure>"))
    for name, (caption, table) in tables.items():
        with whole_file(folder / f"{name}.csv") as out:
            table.to_csv(out, index=False)
        with whole_path(folder / f"{name}.parquet") as partial:
            table.to_parquet(partial, index=False)
        alike = [name for name in ("batch", "measure") if name in table and table[name].nunique() < 2]
        on_page = table.drop(columns=[*ONLY_IN_FILES, *alike], errors="ignore")
        body = table_html(readable(on_page), sorts=True)
        with whole_file(folder / f"{name}.html") as out:
            out.write(f"<h2>{escape(caption)}</h2>{body}\n")
        files = f"<p>All columns: {link(f'{name}.csv', 'CSV')}, {link(f'{name}.parquet', 'Parquet')}</p>"
        parts.append(Section(caption, body + files, folded=len(table) > MANY_ROWS))
    write_json(folder / "study.json", dict(facts or {}))
    page = folder / "index.html"
    with whole_file(page) as out:
        out.write(page_html(title, [*lead, *notes], parts))
    return page
