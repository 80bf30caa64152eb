"""Tables, figures, claims and the page of a study, and the notebook that writes one."""

import itertools
import json
import re
from itertools import product

import numpy as np
import pandas as pd
import pytest
from batch_folders import compare, row_of, write_run
from matplotlib.backends.backend_agg import FigureCanvasAgg

from notebooks import execute
from tdlib.analysis.compare import summarise
from tdlib.analysis.costs import cost_table
from tdlib.analysis.protocol import (
    CLAIMS,
    claim_sentences,
    claims_table,
    sentences,
    shift_table,
    shots_table,
)
from tdlib.analysis.scores import read_predictions, read_runs
from tdlib.analysis.statistics import pooled_difference
from tdlib.analysis.study import readable, write_study
from tdlib.views.figures.differences import plot_differences
from tdlib.views.figures.protocol import plot_shots
from tdlib.views.figures.style import to_png, to_svg


def test_a_summary_of_run_folders_has_the_numbers_of_the_comparison(reports):
    folders = [
        reports / "wide" / f"vcr_qa-{arm}-{seed}-24/output/{arm}-seed{seed}"
        for seed, arm in product(range(3), ("finetune", "clip_td"))
    ]
    for folder in folders:
        arm, seed = folder.name.split("-seed")
        (folder / "config.json").write_text(json.dumps({"arm": arm, "seed": int(seed)}))
    predictions = read_predictions(folders)
    table = summarise(predictions)
    for folder in folders:
        (folder / "config.json").unlink()
    row = row_of(table, arm="clip_td", split="val")
    parts = {arm: rows for arm, rows in predictions[predictions["split"] == "val"].groupby("arm")}
    wide = {arm: rows.pivot(index="seed", columns="id", values="score") for arm, rows in parts.items()}
    pictures = parts["finetune"].drop_duplicates("id").set_index("id")["image"][wide["clip_td"].columns]
    pair = *(wide[arm].to_numpy() for arm in ("clip_td", "finetune")), pictures.to_numpy()
    expected = pooled_difference([pair])
    assert (row["mean"], row["difference"], row["n"]) == pytest.approx(
        (expected.mean, expected.difference, 3)
    )
    figure = plot_differences(table)
    assert [axes.get_title() for axes in figure.axes] == [""], "a summary is of one task: one panel"
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == list(
        dict.fromkeys(table["split"])
    )
    assert row["verdict"] == "too few pairs" and np.isnan(
        row_of(table, arm="finetune", split="val")["difference"]
    )


# Tables, figures and the page.


def test_curves_have_every_size_and_shifts_the_one_with_most_tests(compared):
    shots, shifts = shots_table(compared), shift_table(compared)
    assert set(shots["test"]) == {"usual"} and len(shots) == 7 * 2
    assert list(shots["train_examples"][:2]) == [12, 24]
    vcr = shifts[shifts["task"] == "vcr_qa"]
    assert set(vcr["shots"]) == {24} and vcr["test"].iloc[0] == "usual"
    assert len(vcr) == 4 * 3 and list(vcr["arm"][:3]) == list(dict.fromkeys(compared["arm"]))


def test_costs_stand_beside_every_arm(tmp_path):
    arms = (("finetune", 8.0, 1, 10), ("repair_only", 16.0, 2, 10), ("finetune_double", 17.0, 1, 20))
    for arm, seconds, passes, updates in arms:
        for seed in range(3):
            run = write_run(tmp_path / "b", arm=arm, seed=seed)
            output = tmp_path / "b" / run / "output" / f"{arm}-seed{seed}"
            metrics = {"updates": updates, "train_seconds": seconds + seed, "passes_per_update": passes}
            (output / "metrics.json").write_text(json.dumps(metrics))
    write_run(tmp_path / "b", arm="naive")  # of a version that recorded none
    table = cost_table(read_runs(tmp_path / "b"), tmp_path).set_index("arm")
    assert list(table.index) == [arm for arm, *_ in arms] and list(table["runs"]) == [3, 3, 3]
    assert list(table["passes_per_update"]) == [1, 2, 1]
    assert list(table["seconds_per_update"]) == [0.9, 1.7, 0.9]
    assert list(table["times_baseline"]) == pytest.approx([1, 17 / 9, 2]), (
        "an arm with more updates costs more"
    )
    assert cost_table(read_runs(tmp_path / "b")[:0], tmp_path).empty


def test_words_and_numbers_for_readers(compared):
    told = sentences(compared[compared["arm"] == "clip_td"])
    assert len(told) == 6 + 8 and all("7 pairs: **" in sentence for sentence in told)
    table = readable(compared)
    row = compared[compared["arm"] == "clip_td"].iloc[0]
    shown = table.loc[row.name]
    assert shown["mean (%)"] == f"{100 * row['mean']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
    assert shown["difference (points)"].startswith("+") and "setting" not in table and "low" not in table
    assert table.loc[compared.index[compared["arm"] == "finetune"][0], "difference (points)"] == ""


def test_a_study_is_written_whole_and_loads_nothing(compared, tmp_path):
    (tmp_path / "notes.md").write_text("kept")
    figure = plot_shots(shots_table(compared))
    figures = {"curves": ("Curves & more", "shots", to_png(figure), to_svg(figure))}
    nasty = compared.assign(task="<script>alert(1)</script>")
    tables = {"shots": ("Shots", shots_table(compared)), "all": ("All <b>", nasty)}
    page = write_study(tmp_path, tables, figures, "A & B", ["note <i>"], {"alpha": 0.05})
    text = page.read_text()
    assert "<script>alert" not in text and "&lt;script&gt;alert" in text and "note &lt;i&gt;" in text
    assert "http" not in text.replace("http://www.w3.org", "")
    targets = re.findall(r'href="([^"#]+)"', text)
    assert len(targets) == 1 + 2 * 2 and all((tmp_path / target).is_file() for target in targets)
    assert {path.name for path in tmp_path.iterdir()} == {
        "notes.md", "index.html", "study.json", "curves.png", "curves.svg",
        *(f"{name}.{kind}" for name in ("shots", "all") for kind in ("csv", "parquet", "html")),
    }  # fmt: skip
    stored = pd.read_csv(tmp_path / "shots.csv")
    assert stored["mean"].to_numpy() == pytest.approx(shots_table(compared)["mean"].to_numpy())
    before = page.read_bytes(), (tmp_path / "curves.svg").read_bytes()
    write_study(tmp_path, tables, figures, "A & B", ["note <i>"], {"alpha": 0.05})
    assert (page.read_bytes(), (tmp_path / "curves.svg").read_bytes()) == before


def test_figures_draw_every_number_of_their_table(compared):
    shots = shots_table(compared)
    figure = plot_shots(shots)
    assert len(figure.axes) == 3
    lines = [line for axes in figure.axes for line in axes.lines if line.get_label() != "chance"]
    drawn = {round(float(y), 6) for line in lines for y in line.get_ydata()}
    assert drawn == {round(100 * value, 6) for value in shots["mean"]}
    shifts = shift_table(compared)
    figure = plot_differences(shifts, "test")
    dots = [line for axes in figure.axes for line in axes.lines if len(line.get_xdata()) == 1]
    marks = [(round(float(dot.get_xdata()[0]), 6), dot.get_markerfacecolor() != "white") for dot in dots]
    wanted = shifts.dropna(subset=["difference"])
    expected = [
        (round(100 * row.difference, 6), row.verdict in ("better", "worse")) for row in wanted.itertuples()
    ]
    assert sorted(marks) == sorted(expected)


def test_every_arm_looks_different_and_alike_in_both_figures():
    arms = [f"arm{place}" for place in range(12)]
    many = pd.DataFrame({
        "split": "val", "arm": arms, "verdict": "better", "difference": 0.1, "difference_low": 0.0,
        "difference_high": 0.2, "task": "vcr_qa", "setting": "", "world": "0", "train_examples": 12,
        "mean": 0.5, "low": 0.4, "high": 0.6, "chance": 0.25,
    })  # fmt: skip
    for figure in (plot_differences(many), plot_shots(many)):
        lines = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 1]
        assert len({(line.get_color(), line.get_marker()) for line in lines}) == len(arms)


def test_long_settings_are_wrapped_and_do_not_reach_into_the_next_panel(compared):
    setting = 'student="data/models/mini-uniter", teacher="local-dir:data/models/mini-clip", version=low_shot'
    baseline = "finetune, head_learning_rate=6e-05, learning_rate=3e-05"
    figure = plot_differences(shift_table(compared).assign(setting=setting), "test", baseline=baseline)
    renderer = FigureCanvasAgg(figure).get_renderer()
    for texts in ([a._left_title for a in figure.axes], [a.xaxis.label for a in figure.axes]):
        boxes = [text.get_window_extent(renderer) for text in texts]
        assert all(one.x1 < other.x0 for one, other in itertools.pairwise(boxes))


def test_figures_of_nothing_say_so(compared):
    for plot in (plot_shots, plot_differences):
        with pytest.raises(ValueError, match="no column"):
            plot(pd.DataFrame({"task": []}))
        with pytest.raises(ValueError, match="no rows"):
            plot(compared.iloc[:0])
    with pytest.raises(ValueError, match="no rows"):
        plot_differences(compared[compared["arm"] == "finetune"])


# The paper's claims.


def test_claims_are_read_in_cells_fixed_before_looking(compared):
    claims = claims_table(compared, ["clip_td"])
    assert len(claims) == 3 * 3
    few = row_of(claims, task="vcr_qa", condition="low-shot")
    cell = row_of(compared, task="vcr_qa", shots=12, split="val", arm="clip_td")
    assert few["paper"] == CLAIMS["VCR", "low-shot"] == 0.519
    assert few["relative"] == cell["relative"] and few["where"] == "12 examples, val"
    usual = compared[
        (compared["task"] == "vcr_qa") & (compared["test"] == "usual") & (compared["arm"] == "clip_td")
    ]
    assert few["largest"] == usual["relative"].max() and few["cells"] == len(usual) == 2
    shift = row_of(claims, task="vcr_qa", condition="domain shift")
    assert shift["where"] == "24 examples, val_shortcut" and shift["cells"] == 1 + 2  # not balanced
    assert row_of(claims, task="vqa_v2", condition="domain shift")["where"].endswith("val2014_prior")
    every = row_of(claims, task="vcr_qa", condition="fully supervised")
    assert every["verdict"] == "not run" and pd.isna(every["relative"])


def test_the_shift_of_a_users_own_data_is_another_one(tmp_path):
    """Real VCR has no shortcut test but the rule-based sets."""
    for arm, seed in product(("finetune", "clip_td"), range(2)):
        more = {"data_dir": str(tmp_path)}
        write_run(
            tmp_path / "b",
            arm=arm,
            seed=seed,
            splits=("val", "val_rule_singular"),
            more=more,
            run=f"{arm}{seed}",
        )
    claims = claims_table(compare(tmp_path / "b"), ["clip_td"])
    assert row_of(claims, condition="domain shift")["where"] == "12 examples, val_rule_singular"


def test_what_kinds_of_examples_gain_is_said_of_each_claim(compared):
    kinds = pd.concat([compared.assign(stratum=f"concept: {kind}") for kind in ("known", "unknown")])
    claims = claims_table(compared, ["clip_td"])
    row = row_of(claims, task="vcr_qa", condition="domain shift")
    said = next(s for s in claim_sentences(claims, kinds=kinds) if s.startswith("**VCR, domain shift"))
    points = f"{100 * row['difference']:+.1f} points"
    assert f"known concepts {points}" in said and f"unknown concepts {points}" in said
    full = next(s for s in claim_sentences(claims, kinds=kinds) if s.startswith("**VCR, fully"))
    assert "not run" in full and "concepts" not in full


# The notebook.


def test_the_notebook_writes_a_study(reports, tmp_path):
    found = execute(
        "07_protocol",
        batches=["low", "wide", "shift"],
        reports_dir=str(reports),
        output_dir=str(tmp_path),
        resamples=50,
    )
    assert found["page"] == tmp_path / "low-wide-shift" / "index.html"
    assert any("tdlib batch run shift" in sentence for sentence in found["missing"])
    files = {path.name for path in found["page"].parent.iterdir()}
    assert {"claims.csv", "shifts.parquet", "shots_figure.svg", "shifts_figure.png", "study.json"} <= files
    assert "tdlib batch run shift" in found["page"].read_text()


def test_the_notebook_without_any_batch_says_what_to_run(tmp_path, capsys):
    found = execute(
        "07_protocol",
        batches=["low_shot"],
        reports_dir=str(tmp_path),
        output_dir=str(tmp_path / "out"),
        fallback="",
    )
    assert found["compared"].empty and "tdlib batch run low_shot" in found["page"].read_text()


def test_the_notebook_names_its_baseline_everywhere(reports, tmp_path):
    found = execute(
        "07_protocol",
        batches=["low"],
        reports_dir=str(reports),
        output_dir=str(tmp_path),
        baseline="naive",
        resamples=10,
    )
    labels = {axes.get_xlabel() for axes in found["shifts_figure"].axes}
    assert labels == {"difference to naive (points)"}
    assert "21 finished runs of vcr_qa" in found["page"].read_text()


def test_a_size_that_has_hardly_begun_does_not_stand_for_one_that_is_done(compared):
    begun = compared[compared["shots"] == 24].assign(shots=48, train_examples=48.0, seeds=1)
    begun["pairs"] = begun["pairs"].clip(upper=1)
    both = pd.concat([begun, compared], ignore_index=True)
    assert set(shift_table(both)["train_examples"]) == {24}
    shift = row_of(claims_table(both, ["clip_td"]), task="vcr_qa", condition="domain shift")
    assert shift["where"].startswith("24 examples") and shift["pairs"] == 7
    half = compared.copy()
    half.loc[half["shots"] == 12, "seeds"] = 3
    titles = [axes.get_title(loc="left") for axes in plot_shots(shots_table(half)).axes]
    assert all("(3 to 7 seeds)" in title for title in titles)
