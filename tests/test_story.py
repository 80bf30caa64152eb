"""What the start page is made of: runs side by side and taken over, sentences, captions, the page itself."""

import json
import os
import shutil
import subprocess
import sys
import time

import nbformat
import pandas as pd
import psutil
import pytest
import torch

from tdlib.analysis.scores import read_predictions
from tdlib.analysis.summary import answer, score_table, summarise_within
from tdlib.config import RunConfig
from tdlib.core.paths import ROOT
from tdlib.data.examples import low_shot
from tdlib.miniworld.worlds import STRATA, strata_of
from tdlib.runs.page import export_html
from tdlib.training.prepare import prepare
from tdlib.training.run import compare
from tdlib.training.run_folders import finished, run_identity
from tdlib.training.workers import side_by_side
from tdlib.views.captions import Captioned
from tdlib.views.figures.style import Figure

TESTS = {"val": "the usual test", "val_shortcut": "the shortcut test"}


def test_jobs_side_by_side_use_other_processes_and_bring_back_what_closures_make():
    made = torch.arange(3)
    found = dict(side_by_side([lambda n=n: (n, os.getpid(), made.sum().item()) for n in range(3)], 2))
    assert {number: (n, total) for number, (n, _, total) in found.items()} == {n: (n, 3) for n in range(3)}
    cores = len(os.sched_getaffinity(0))
    assert (os.getpid() in {pid for _, pid, _ in found.values()}) == (cores < 2)
    alone = dict(side_by_side([os.getpid, os.getpid], 1))
    assert alone == {0: os.getpid(), 1: os.getpid()}


def test_an_error_of_a_job_is_raised():
    def fail() -> None:
        raise FloatingPointError("not finite")

    with pytest.raises(FloatingPointError, match="not finite"):
        list(side_by_side([fail, lambda: 1, fail], 2))


def runs_still(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_processes_end_with_the_one_that_started_them(tmp_path):
    source = f"""
import os, signal, time
from pathlib import Path
from tdlib.training.workers import side_by_side

def job(number):
    Path({str(tmp_path)!r}, str(os.getpid())).touch()
    while len(os.listdir({str(tmp_path)!r})) < 2:
        time.sleep(0.01)
    if number:
        os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)

list(side_by_side([lambda n=n: job(n) for n in range(2)], 2))
"""
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, timeout=300)
    assert done.returncode == -9
    until = time.monotonic() + 20
    while alive := [pid for pid in os.listdir(tmp_path) if runs_still(int(pid))]:
        assert time.monotonic() < until, alive
        time.sleep(0.1)


@pytest.fixture(scope="module")
def config(world, student_folder, teacher_folder) -> RunConfig:
    return RunConfig.from_parameters(
        data_dir=str(world), student=str(student_folder), teacher=f"local-dir:{teacher_folder}", shots=2,
        epochs=1, batch_size=4, probe_examples=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(config, own_cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return compare(config, ["finetune", "clip_td"], [0, 1], folder, workers=2)


def test_runs_side_by_side_are_those_that_run_one_after_the_other(config, own_cache, runs, tmp_path):
    for folder, other in zip(runs, compare(config, ["finetune", "clip_td"], [0, 1], tmp_path), strict=True):
        assert folder.name == other.name
        pd.testing.assert_frame_equal(
            pd.read_parquet(folder / "predictions.parquet"), pd.read_parquet(other / "predictions.parquet")
        )


def test_a_finished_run_is_taken_over_only_while_all_it_depends_on_is_the_same(
    config, own_cache, runs, tmp_path
):
    folder = shutil.copytree(runs[1].parent, tmp_path / "runs")
    said = []
    compare(config, ["finetune", "clip_td"], [0, 1], folder, said.append, reuse=True)
    assert len(said) == 4 and all(metrics["reused"] for metrics in said)
    assert said[1]["accuracy"] == json.loads((runs[1] / "metrics.json").read_text())["accuracy"]
    (folder / "clip_td-seed1" / "metrics.json").unlink()  # unfinished
    said.clear()
    compare(config, ["finetune", "clip_td"], [0, 1], folder, said.append, reuse=True)
    assert [metrics["arm"] for metrics in said if not metrics.get("reused")] == ["clip_td"]
    subset = low_shot(prepare(config, whole_splits=False).train, config.shots, 0)
    own, place = config.model_copy(update={"arm": "clip_td"}), folder / "clip_td-seed0"
    assert finished(place, run_identity(own, subset)) is not None
    assert finished(place, run_identity(own, subset[:-1])) is None
    assert finished(place, run_identity(own.model_copy(update={"mass": 0.5}), subset)) is None
    assert finished(place, run_identity(own.model_copy(update={"loader_workers": 1}), subset)) is not None


def gains(verdict: str, n: int = 3) -> pd.DataFrame:
    rows = [
        {"arm": arm, "split": split, "mean": 0.5 + gain, "low": 0.4, "high": 0.6, "n": 9, "pairs": n,
         "difference": gain if arm != "finetune" else float("nan"), "difference_low": gain - 0.01,
         "difference_high": gain + 0.02, "verdict": verdict if arm != "finetune" else ""}
        for split in ("val", "val_shortcut") for arm, gain in (("finetune", 0.0), ("clip_td", -0.031))
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_the_answer_has_numbers_intervals_and_a_plain_verdict():
    said = answer(gains("too few pairs"), TESTS)
    assert "right in 50.0 % on the usual test and 50.0 % on the shortcut test" in said
    assert said.count("**\u22123.1 points** [\u22124.1, \u22121.1]") == 2
    assert "**Not significant at this size**: the test over 3 seeds and 1 arms" in said
    assert "6 seeds are the fewest" in said
    assert "(95 % intervals)" in said
    assert "intervals, over pictures alone: there is one seed)" in answer(gains("too few pairs", 1), TESTS)
    assert "Not significant" in answer(gains("not distinguishable", 7), TESTS)
    found = answer(gains("worse", 7), TESTS)
    assert "`clip_td` worse on the usual test" in found and "Not significant" not in found
    assert "Nothing was compared" in answer(gains("too few pairs").assign(difference=float("nan")), TESTS)


def test_the_table_of_scores_has_no_hole_and_all_arms():
    reference = pd.DataFrame([{"arm": "teacher, zero-shot", "split": split, "mean": 0.9} for split in TESTS])
    table = score_table(gains("too few pairs"), reference, TESTS)
    assert list(table["arm"]) == ["teacher, zero-shot", "finetune", "clip_td"] and not table.isna().any(
        axis=None
    )
    assert table.iloc[2, 1] == "46.9 [40.0, 60.0]" and table.iloc[2, 2] == "\u22123.1 [\u22124.1, \u22121.1]"
    assert table.iloc[1, 2] == table.iloc[0, 2] == ""


def test_strata_part_the_examples_of_each_test(world, runs):
    predictions = read_predictions(runs)
    assert set(predictions["concept"]) == {"known", "unknown"}
    for split, own in predictions.groupby("split"):
        said = strata_of(world, split).loc[own["question"]]
        assert (own[STRATA].to_numpy() == said.to_numpy()).all()
    table = summarise_within(predictions, "concept")
    sizes = table.drop_duplicates(["concept", "split"]).groupby("split")["examples"].sum()
    assert dict(sizes) == dict(predictions.groupby("split")["id"].nunique())
    fewer = predictions[(predictions["split"] != "val_shortcut") | predictions["id"].str.endswith("1")]
    parts = summarise_within(fewer, "concept").groupby("split")["examples"]
    assert parts.max()["val_shortcut"] < parts.max()["val"], "each test has its own number of questions"
    by_hand = predictions[
        (predictions["concept"] == "known")
        & (predictions["split"] == "val")
        & (predictions["arm"] == "clip_td")
    ]
    row = table[(table["concept"] == "known") & (table["split"] == "val") & (table["arm"] == "clip_td")]
    assert row["mean"].item() == pytest.approx(by_hand["score"].mean())
    assert summarise_within(predictions.assign(concept=""), "concept").empty


def test_a_caption_is_escaped_and_stays_with_what_it_is_of():
    figure = Figure(figsize=(2, 1))
    shown = Captioned(figure, "Figure 1", "<script>")
    html = shown._repr_html_()
    assert repr(shown) == "Figure 1. <script>" and "<script>" not in html
    assert "data:image/png" in html and "page-break-inside: avoid" in html
    table = Captioned(pd.DataFrame({"<a>": [1]}), "Table 1", "numbers")._repr_html_()
    assert "&lt;a&gt;" in table


def test_a_page_folds_what_jupyterlab_hides_and_lists_its_parts(tmp_path):
    cell = nbformat.v4.new_code_cell
    hidden = {"jupyter": {"source_hidden": True}}
    notebook = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_markdown_cell("# A <b>title</b> & more"),
            cell("seed: int = 0", metadata=hidden | {"tags": ["parameters"]}),
            cell("seed = 1", metadata={"tags": ["injected-parameters"]}),
            nbformat.v4.new_markdown_cell("## One part"),
            cell("shown = 1"),
            nbformat.v4.new_markdown_cell("## `Another` part"),
            cell("hidden = 2", metadata=hidden),
        ]
    )
    nbformat.write(notebook, tmp_path / "x.ipynb")
    export_html(tmp_path / "x.ipynb", tmp_path / "x.html")
    text = (tmp_path / "x.html").read_text(encoding="utf-8")
    folds = [part.split("</details>")[0] for part in text.split('<details class="code">')[1:]]
    assert len(folds) == 3 and not any("shown" in fold for fold in folds) and "hidden" in folds[2]
    listed = text.split('<nav class="contents"')[1].split("</nav>")[0]
    assert ">One part</a>" in listed and ">Another part</a>" in listed
    assert "prefers-color-scheme: dark" in text and "@media print" in text
