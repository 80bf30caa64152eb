"""The protocol on folders of batches: who is paired with whom, what is refused, and what the tables say."""

import json
import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from notebooks import execute
from tdlib.analysis.compare import COLUMNS, compare_arms, compare_within, summarise
from tdlib.analysis.costs import cost_table
from tdlib.analysis.protocol import (
    CLAIMS,
    claim_sentences,
    claims_table,
    power_note,
    sentences,
    shift_table,
    shots_table,
    together,
    unfinished,
)
from tdlib.analysis.scores import (
    ProtocolError,
    collect,
    joint_predictions,
    read_predictions,
    read_runs,
    read_scores,
    with_strata,
)
from tdlib.analysis.statistics import bootstrap_interval, paired_difference, sign_flip_test
from tdlib.analysis.study import lead_charts, readable, write_study
from tdlib.analysis.tuning import rank_settings, write_tuned
from tdlib.cli import main
from tdlib.data.examples import Example, TextPart, save_manifest
from tdlib.miniworld.worlds import STRATA
from tdlib.runs import states as run_states
from tdlib.training.evaluation import prediction_table
from tdlib.views.figures.differences import plot_differences
from tdlib.views.figures.protocol import plot_shots
from tdlib.views.figures.style import to_png, to_svg

CLASSES = ("yes", "no", "maybe")
DEFAULTS = {"student": "small", "eval_splits": [], "interactive": False, "runs_dir": "somewhere"}


def example(name: str, task: str, label: int | None, picture: str, part: str = "") -> Example:
    choices = tuple(TextPart(f"answer {i}") for i in range(4)) if task.startswith("vcr") else ()
    identifier = f"{name}:{part}" if part else name
    return Example(
        identifier,
        Path(f"{picture}.png"),
        (),
        (),
        TextPart("why?"),
        choices,
        label,
        "",
        question=name,
        part=part,
    )


def examples_of(task: str, split: str, number: int = 24) -> list[Example]:
    """Two examples per picture; both halves of a question for task "vcr"."""
    labels = range(4) if task.startswith("vcr") else [0, 0, 1, 2]  # half of them are "yes"
    found = []
    for i in range(number):
        halves = ("", "r") if task == "vcr" else ("",)
        label = None if split == "test" else labels[i % 4]
        found += [example(f"{split}-{i}", task, label, f"{split}-{i // 2}", half) for half in halves]
    return found


def predict(examples: list[Example], share: float, seed: int) -> np.ndarray:
    """Probabilities that are right for about a share of the examples; the same ones for a larger share."""
    rng, width = np.random.default_rng(seed), len(examples[0].choices) or len(CLASSES)
    probabilities = np.full((len(examples), width), 0.1)
    for row, one, draw in zip(probabilities, examples, rng.random(len(examples)), strict=True):
        right = one.label or 0
        row[right if draw < share else (right + 1) % width] = 0.7
    return probabilities


def write_run(
    batch: Path, task="vcr_qa", arm="finetune", seed=0, shots=12, share=0.5, splits=("val",), state="done",
    ids=None, run="", more=None, number=24,
) -> str:  # fmt: skip
    """A run's folder as its worker leaves it, with predictions in the form that training writes."""
    run = run or f"{task}-{arm}-{seed}-{shots:g}" + "".join(f"-{value}" for value in (more or {}).values())
    folder, parameters = batch / run, DEFAULTS | (more or {})
    parameters |= {"task": task, "arm": arm, "seed": seed, "shots": shots}
    folder.mkdir(parents=True)
    if state != "queued":
        (folder / "parameters.json").write_text(json.dumps({"parameters": parameters, "output": "runs_dir"}))
    if state == "done":
        output = folder / "output" / f"{arm}-seed{seed}"
        output.mkdir(parents=True)
        labels = () if task.startswith("vcr") else CLASSES
        tables = []
        for split in splits:
            tested = examples_of(task, split, number)
            tables.append(prediction_table(split, tested, predict(tested, share, seed), labels, constant=1))
        pd.concat(tables).to_parquet(output / "predictions.parquet", index=False)
        many = 100 if shots == 0 else int(shots)
        learned = [example(name, task, 0, "p") for name in ids or [f"{seed}-{i}" for i in range(many)]]
        save_manifest(output / "manifest.json", learned, shots, seed)
    if state != "queued":
        reason = {} if state == "done" else {"reason": f"it {state}"}
        kept = run_states.file_sizes(folder) if state == "done" else {}
        run_states.write_state(folder, {"state": state, "files": kept} | reason)
    file = batch / "batch.json"
    known = json.loads(file.read_text()) if file.exists() else {"name": batch.name, "file": "", "runs": []}
    file.write_text(json.dumps(known | {"runs": [*known["runs"], run]}))
    return run


def compare(batch: Path, **options) -> pd.DataFrame:
    runs = read_runs(batch)
    return compare_arms(runs, read_scores(batch, runs), resamples=100, **options)


def row_of(table: pd.DataFrame, **wanted) -> pd.Series:
    (found,) = table[np.logical_and.reduce([table[name] == value for name, value in wanted.items()])].index
    return table.loc[found]


SHARES = {"finetune": 0.4, "clip_td": 0.75, "naive": 0.4}
TESTS = {
    "vcr_qa": ("val", "val_shortcut", "val_balanced", "val_style"),
    "snli_ve": ("dev", "dev_shortcut"),
    "vqa_v2": ("val2014", "val2014_prior"),
}


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> Path:
    """Two batches with seven seeds: three tasks, sizes and arms; and tests under shift."""
    home = tmp_path_factory.mktemp("batches")
    for seed, task, arm in product(range(7), TESTS, SHARES):
        if arm == "naive" and task != "vcr_qa":
            continue
        for shots in (12, 24):
            write_run(home / "low", task, arm, seed, shots, SHARES[arm] + shots / 200, TESTS[task][:2])
        write_run(home / "wide", task, arm, seed, 24, SHARES[arm], TESTS[task])
    return home


@pytest.fixture(scope="module")
def compared(reports) -> pd.DataFrame:
    runs, scores, missing = collect(reports, ["low", "wide"])
    assert not missing
    return compare_arms(runs, scores, resamples=100)


# Reading and pairing.


def test_every_arm_stands_in_every_cell_on_every_test(compared):
    assert list(compared.columns) == COLUMNS
    assert len(compared) == (3 + 2 + 2) * 2 * 2 + 3 * 4 + 2 * 2 + 2 * 2
    keys = ["batch", "task", "setting", "shots", "split", "arm"]
    assert not compared.duplicated(keys).any() and (compared["seeds"] == 7).all()
    assert set(compared["test"]) == {"usual", "shortcut", "balanced", "style", "prior"}
    baseline = compared["arm"] == "finetune"
    assert (compared.loc[~baseline, "pairs"] == 7).all() and (compared.loc[baseline, "pairs"] == 0).all()


def test_the_numbers_are_those_of_the_predictions(reports, compared):
    tables = {}
    for arm in ("finetune", "clip_td"):
        files = [
            reports / "wide" / f"vcr_qa-{arm}-{seed}-24/output/{arm}-seed{seed}/predictions.parquet"
            for seed in range(7)
        ]
        frames = [pd.read_parquet(file).query("split == 'val_shortcut'").sort_values("id") for file in files]
        tables[arm] = np.array([frame["score"] for frame in frames])
        pictures = frames[0]["image"].to_numpy()
    row = row_of(compared, batch="wide", task="vcr_qa", split="val_shortcut", arm="clip_td")
    expected = paired_difference(tables["clip_td"], tables["finetune"], pictures, 0.25, resamples=100)
    assert row["mean"] == pytest.approx(tables["clip_td"].mean())
    assert (row["low"], row["high"]) == pytest.approx(
        bootstrap_interval(tables["clip_td"], pictures, resamples=100)
    )
    for name, value in {
        "difference": expected.difference, "difference_low": expected.low, "difference_high": expected.high,
        "relative": expected.relative, "relative_low": expected.relative_low, "p_value": expected.p_value,
        "gain_over_chance": expected.gain_over_chance, "baseline_mean": expected.baseline,
    }.items():  # fmt: skip
        assert row[name] == pytest.approx(value), name
    gains = (tables["clip_td"] - tables["finetune"]).mean(1)
    assert row["p_value"] == sign_flip_test(gains) == 2 / 2**7
    assert row["p_adjusted"] == pytest.approx(2 * 2 / 2**7) and row["verdict"] == "better"
    assert row_of(compared, batch="wide", task="vcr_qa", split="val_shortcut", arm="naive")["verdict"] == (
        "not distinguishable"
    )


def test_chance_is_that_of_the_choices_or_what_the_runs_recorded(compared, tmp_path):
    chance = compared.groupby("task")["chance"].agg(["min", "max"])
    assert list(chance.loc["vcr_qa"]) == [0.25, 0.25]
    # always the training's label 1, which a quarter of the tested have; their own usual one is another half
    assert list(chance.loc["snli_ve"]) == [0.25, 0.25]
    over = row_of(compared, batch="wide", task="snli_ve", split="dev", arm="clip_td")
    assert over["over_chance"] == pytest.approx((over["mean"] - 0.25) / 0.75)
    for task in ("vcr_qa", "snli_ve"):  # runs of before chance was recorded
        run = write_run(tmp_path / "old", task, splits=("val",))
        file = next((tmp_path / "old" / run).rglob("predictions.parquet"))
        pd.read_parquet(file).drop(columns="chance").to_parquet(file, index=False)
        state = json.loads((file.parents[2] / "state.json").read_text())
        run_states.write_state(file.parents[2], state | {"files": run_states.file_sizes(file.parents[2])})
    (said,) = collect(tmp_path, ["old"])[2]
    assert said.startswith("old: 1 runs of snli_ve are") and "chance" in said
    found = compare(tmp_path / "old").set_index("task")["chance"]
    assert found["vcr_qa"] == 0.25 and np.isnan(found["snli_ve"])


def test_both_halves_of_a_question_count_as_one(tmp_path):
    for arm, seed in product(("finetune", "clip_td"), range(2)):
        write_run(tmp_path / "b", "vcr", arm, seed, share=0.5 if arm == "finetune" else 0.8)
    runs = read_runs(tmp_path / "b")
    scores = read_scores(tmp_path / "b", runs)
    joint = scores[scores["measure"] == "accuracy (Q->AR)"]
    assert set(joint["chance"]) == {1 / 16} and len(joint) == 4 * 24
    assert not joint["id"].str.endswith(":r").any()
    for name, rationale in (("accuracy (Q->A)", False), ("accuracy (QA->R)", True)):
        part = scores[scores["measure"] == name]
        assert set(part["chance"]) == {1 / 4} and len(part) == 4 * 24
        assert (part["id"].str.endswith(":r") == rationale).all()
    written = pd.read_parquet(next((tmp_path / "b" / "vcr-clip_td-0-12").rglob("predictions.parquet")))
    both = written.groupby("question")["score"].min()
    own = joint[joint["run"] == "vcr-clip_td-0-12"].set_index("id")["score"]
    assert own.sort_index().equals(both.sort_index().rename_axis("id"))
    table = compare_arms(runs, scores, resamples=50)
    assert len(table) == 3 * 2 and table["mean"].between(0.1, 0.9).all()
    assert set(shots_table(table)["measure"]) == {"accuracy (Q->AR)"}, "a task's table has its own measure"


def test_questions_and_pictures_are_told_apart_by_more_than_a_part_of_their_names():
    paths = [Path(f"clip{letter}/000.jpg") for letter in "AABB"]
    examples = [
        replace(example(f"a:r{i // 2}", "vcr", 0, "", ("", "r")[i % 2]), image=path)
        for i, path in enumerate(paths)
    ]
    table = prediction_table("val", examples, np.eye(4)[[0, 0, 0, 1]]).assign(arm="x", seed=0)
    assert list(table["image"]) == ["clipA/000.jpg"] * 2 + ["clipB/000.jpg"] * 2
    joint = joint_predictions(table)
    assert dict(zip(joint["id"], joint["score"], strict=True)) == {"a:r0": 1.0, "a:r1": 0.0}
    older = table.drop(columns=["question", "part"])  # as runs were written before these columns
    assert list(joint_predictions(older)["score"]) == [1.0, 0.0]


def test_a_test_without_labels_is_left_out_and_half_a_one_is_refused(tmp_path):
    run = write_run(tmp_path / "b", splits=("val", "test"))
    runs = read_runs(tmp_path / "b")
    assert set(read_scores(tmp_path / "b", runs)["split"]) == {"val"}
    file = next((tmp_path / "b" / run).rglob("predictions.parquet"))
    table = pd.read_parquet(file)
    table.loc[3, "score"] = float("nan")
    table.to_parquet(file, index=False)
    with pytest.raises(ProtocolError, match=rf"{run}: 1 of 24 scores of split 'val' are missing.*val-3"):
        read_scores(tmp_path / "b", runs)


def test_an_unfinished_batch_shows_what_it_has_and_lists_the_rest(tmp_path):
    batch = tmp_path / "b"
    for seed in range(3):
        write_run(batch, seed=seed)
    write_run(batch, arm="clip_td", seed=0, share=0.9)
    write_run(batch, arm="clip_td", seed=1, state="failed")
    write_run(batch, arm="clip_td", seed=7, share=0.9)
    write_run(batch, arm="clip_td", seed=2, state="queued")
    damaged = write_run(batch, arm="naive", seed=0)
    next((batch / damaged).rglob("metrics.json"), next((batch / damaged).rglob("manifest.json"))).unlink()
    runs, scores, missing = collect(tmp_path, ["b", "never"])
    assert "b: 3 of 8 runs are not done" in missing[0] and "tdlib batch resume b" in missing[0]
    assert missing[1].startswith("never: was not run here") and "`tdlib batch run never`" in missing[1]
    left = unfinished(runs)
    assert list(left["state"]) == ["failed", "queued", "lost"]
    assert left.loc[0, "reason"] == "it failed" and "missing" in left.loc[2, "reason"]
    assert left.loc[0, "arm"] == "clip_td" and pd.isna(left.loc[1, "arm"])
    row = row_of(compare_arms(runs, scores, resamples=50), arm="clip_td")
    assert (row["seeds"], row["pairs"], row["unpaired"]) == (2, 1, "1, 2, 7")
    assert row["verdict"] == "too few pairs" and row["difference"] > 0


def test_a_run_that_never_began_is_described_by_the_batchs_file(tmp_path):
    from tdlib.runs.batch import Batch

    file = tmp_path / "b.yaml"
    file.write_text("template: 04_distill\ngrid: {arm: [finetune, clip_td]}\nseeds: 1\n")
    batch = Batch(file, reports=tmp_path)
    batch.folder.mkdir()
    (batch.folder / "batch.json").write_text(json.dumps(batch._description()))
    runs, scores, _ = collect(tmp_path, ["b"])
    assert list(runs["arm"]) == ["finetune", "clip_td"] and set(runs["state"]) == {"queued"}
    assert scores.empty and compare_arms(runs, scores).empty


def test_nothing_at_all_gives_empty_tables(tmp_path):
    runs, scores, missing = collect(tmp_path, ["low_shot"])
    table = compare_arms(runs, scores)
    assert len(missing) == 1 and list(table.columns) == COLUMNS
    for empty in (table, shots_table(table), shift_table(table), claims_table(table), unfinished(runs)):
        assert empty.empty and readable(empty).empty
    assert power_note(table) == "" and not sentences(table)


def test_settings_that_differ_are_told_apart_and_never_paired(tmp_path):
    for student, share in (("small", 0.4), ("large", 0.9)):
        for arm in ("finetune", "clip_td"):
            write_run(tmp_path / "b", arm=arm, share=share, more={"student": student})
    table = compare(tmp_path / "b")
    assert set(table["setting"]) == {'student="small"', 'student="large"'} and len(table) == 4
    assert (table.loc[table["arm"] == "clip_td", "difference"] == 0).all()


def test_splits_of_different_tasks_are_no_setting(compared):
    assert set(compared["setting"]) == {""}


def test_settings_tuned_for_each_arm_are_part_of_it(tmp_path):
    for seed in range(2):
        write_run(tmp_path / "b", seed=seed, more={"rate": 0.1, "student": "small"})
        write_run(tmp_path / "b", arm="clip_td", seed=seed, more={"rate": 0.5, "student": "small"})
    assert compare(tmp_path / "b")["pairs"].max() == 0
    file = tmp_path / "b" / "batch.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tuned": ["rate"]}))
    assert set(read_runs(tmp_path / "b")["tuned"]) == {"rate=0.1", "rate=0.5"}
    assert row_of(compare(tmp_path / "b"), arm="clip_td")["pairs"] == 2


def test_variants_of_an_arm_are_compared_like_arms(tmp_path):
    """Several shares of the rows against one baseline, which has none."""
    for seed in range(2):
        write_run(tmp_path / "b", seed=seed, more={"repair_share": 1.0})
        for share, right in ((1.0, 0.9), (0.3, 0.8)):
            more = {"repair_share": share}
            write_run(tmp_path / "b", arm="repair_only", seed=seed, share=right, more=more)
    file = tmp_path / "b" / "batch.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"variants": ["repair_share"]}))
    table = compare(tmp_path / "b")
    assert list(table["arm"]) == ["finetune", "repair_only", "repair_only, repair_share=0.3"]
    assert list(table["pairs"]) == [0, 2, 2] and set(table["setting"]) == {""}


# Settings chosen for each arm.

RIGHT = {  # how often the runs are right, by arm and what they tried
    "finetune": {(0.1, 1.0): 0.3, (0.2, 1.0): 0.6, (0.3, 1.0): 0.4},
    "clip_td": {(0.3, 1.0): 0.5, (0.1, 5.0): 0.9, (0.2, 5.0): 0.2},
}


def write_tuning(batch: Path, right=RIGHT, seeds=(100, 101), splits=("train_held_out",), **changes) -> Path:
    for arm, tried in right.items():
        for (rate, weight), share in tried.items():
            for seed in seeds:
                more = {"rate": rate, "distill_weight": weight}
                write_run(batch, arm=arm, seed=seed, share=share, splits=splits, more=more, **changes)
    return batch


def test_each_arm_gets_the_setting_that_is_best_for_it(tmp_path):
    batch = write_tuning(tmp_path / "tune")
    ranked = rank_settings(batch, resamples=100)
    assert list(ranked.columns[:3]) == ["arm", "rate", "distill_weight"]
    assert list(ranked.loc[ranked["chosen"], "rate"]) == [0.2, 0.1]
    for _, own in ranked.groupby("arm", sort=False):
        assert own["mean"].is_monotonic_decreasing and list(own["chosen"]) == [True, False, False]
    assert (ranked["low"] <= ranked["mean"]).all() and (ranked["mean"] <= ranked["high"]).all()
    assert set(ranked["settings"]) == {3} and set(ranked["seeds"]) == {2}
    assert row_of(ranked, arm="finetune", chosen=True)["edge"] == ""  # 0.2 of 0.1 to 0.3
    assert (
        row_of(ranked, arm="clip_td", chosen=True)["edge"] == "rate"
    )  # of two weights one is always at an edge
    known = json.loads(write_tuned(batch, ranked).read_text())
    assert known["batch"] == "tune" and known["seeds"] == [100, 101]
    assert [(entry["where"], entry["settings"]) for entry in known["chosen"]] == [
        ({"arm": "finetune"}, {"rate": 0.2}),  # whose own distill_weight is 0
        ({"arm": "clip_td"}, {"rate": 0.1, "distill_weight": 5.0}),
    ]


def test_settings_are_chosen_apart_for_each_task_and_size(tmp_path):
    for task, split, (low, high) in (
        ("vcr_qa", "train_held_out", (0.2, 0.8)),
        ("snli_ve", "train_held_out", (0.8, 0.2)),
    ):
        for rate, share in ((0.1, low), (0.2, high)):
            write_run(tmp_path / "b", task, share=share, splits=(split,), more={"rate": rate})
    ranked = rank_settings(tmp_path / "b", resamples=50)
    assert list(ranked.columns[:3]) == ["task", "rate", "settings"]
    assert row_of(ranked, task="vcr_qa", chosen=True)["rate"] == 0.2
    assert row_of(ranked, task="snli_ve", chosen=True)["rate"] == 0.1


def test_the_command_keeps_the_choice_and_says_what_lies_at_the_edge(tmp_path, capsys):
    write_tuning(tmp_path / "tune")
    (tmp_path / "tune.yaml").write_text("template: 04_distill\ngrid: {learning_rate: [5e-4, 1e-3]}\n")
    command = ["batch", "best", str(tmp_path / "tune.yaml"), "--folder", str(tmp_path)]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "beyond: clip_td rate\n" in out and "beyond: finetune" not in out
    assert "tuned: tune" in out and len(json.loads((tmp_path / "tune" / "tuned.json").read_text())) == 3
    (tmp_path / "tune" / "tuned.json").unlink()
    write_run(tmp_path / "tune", seed=102, state="failed")
    assert main(command) == 1 and "are not done" in capsys.readouterr().err
    assert not (tmp_path / "tune" / "tuned.json").exists()


def test_a_choice_without_equal_effort_or_on_a_test_is_refused(tmp_path):
    def refused(name: str, expected: str, **options) -> None:
        with pytest.raises(ProtocolError, match=expected):
            rank_settings(tmp_path / name, resamples=50, **options)

    write_tuning(tmp_path / "tests", splits=("val",))
    refused("tests", "evaluated on val; settings are chosen on pictures set aside")
    refused("tests", "chosen on 'dev'", split="dev")
    assert rank_settings(tmp_path / "tests", split="val", resamples=50)["chosen"].sum() == 2
    write_tuning(tmp_path / "both", splits=("train_held_out", "val"))
    refused("both", "evaluated on train_held_out, val")
    fewer = RIGHT | {"clip_td": {(0.1, 1.0): 0.5}}
    write_tuning(tmp_path / "uneven", fewer)
    refused("uneven", r"different numbers of settings \(finetune 3, clip_td 1\)")
    assert rank_settings(tmp_path / "uneven", uneven=True, resamples=50)["chosen"].sum() == 2
    write_tuning(tmp_path / "same", RIGHT | {"finetune": {(0.1, 1.0): 0.3, (0.1, 5.0): 0.3, (0.2, 1.0): 0.3}})
    refused("same", r"are the same setting with the same seed \(arm 'finetune' may set")
    write_tuning(tmp_path / "seeds", {"finetune": {(0.1, 1.0): 0.3}}, (100, 101))
    write_tuning(tmp_path / "seeds", {"finetune": {(0.2, 1.0): 0.3}}, (100,))
    refused("seeds", r"different seeds: \[100, 101\], \[100\]")
    write_tuning(tmp_path / "alike", {"finetune": {(0.1, 1.0): 0.3}})
    refused("alike", "differ in no setting")
    write_tuning(tmp_path / "undone")
    write_run(tmp_path / "undone", seed=102, state="failed")
    refused("undone", "1 of 13 runs are not done; `tdlib batch resume undone`")


# What is refused.


def test_another_training_subset_is_an_error_that_names_the_runs(tmp_path):
    write_run(tmp_path / "b", seed=0)
    write_run(tmp_path / "b", arm="clip_td", seed=0, ids=["x", "y"])
    with pytest.raises(ProtocolError) as error:
        compare(tmp_path / "b")
    for expected in (
        "seed 0",
        "vcr_qa-clip_td-0-12",
        "2 examples",
        "vcr_qa-finetune-0-12",
        "from 12",
        "the same",
    ):
        assert expected in str(error.value), expected


def test_the_order_of_a_subset_does_not_matter_and_unpaired_seeds_may_differ(tmp_path):
    write_run(tmp_path / "b", seed=0, ids=["x", "y"])
    write_run(tmp_path / "b", arm="clip_td", seed=0, ids=["y", "x"])
    write_run(tmp_path / "b", arm="clip_td", seed=1, ids=["z"])
    assert row_of(compare(tmp_path / "b"), arm="clip_td")["pairs"] == 1


def test_other_tested_examples_are_an_error_that_names_the_runs(tmp_path):
    write_run(tmp_path / "b", seed=0)
    write_run(tmp_path / "b", arm="clip_td", seed=0, number=25)
    with pytest.raises(
        ProtocolError, match=r"split 'val'.*finetune-0-12 \(24 examples\).*clip_td.*\(25\).*val-24"
    ):
        compare(tmp_path / "b")


def test_two_runs_of_one_arm_and_seed_are_an_error(tmp_path):
    write_run(tmp_path / "b", run="one")
    write_run(tmp_path / "b", run="two")
    with pytest.raises(ProtocolError, match=r"one \(finetune, seed 0\), two \(finetune, seed 0\)"):
        compare(tmp_path / "b")


def test_a_run_without_predictions_or_of_another_kind_is_an_error(tmp_path):
    run = write_run(tmp_path / "b")
    next((tmp_path / "b" / run).rglob("predictions.parquet")).unlink()
    state = json.loads((tmp_path / "b" / run / "state.json").read_text())
    run_states.write_state(tmp_path / "b" / run, state | {"files": {}})
    runs = read_runs(tmp_path / "b")
    with pytest.raises(ProtocolError, match=rf"without predictions.parquet: {run}"):
        read_scores(tmp_path / "b", runs)
    next((tmp_path / "b" / run).rglob("manifest.json")).unlink()
    with pytest.raises(ProtocolError, match=r"0 files manifest.json"):
        read_runs(tmp_path / "b")
    (tmp_path / "b" / run / "parameters.json").write_text('{"parameters": {"task": "vcr_qa"}, "output": ""}')
    with pytest.raises(ProtocolError, match="no parameter shots, arm, seed"):
        read_runs(tmp_path / "b")
    with pytest.raises(FileNotFoundError, match="no batch was run there"):
        read_runs(tmp_path)


# Significance.


def test_six_seeds_and_two_arms_are_too_few_unless_one_was_chosen(tmp_path):
    for seed, arm in product(range(6), SHARES):
        write_run(tmp_path / "b", arm=arm, seed=seed, share=SHARES[arm])
    table = compare(tmp_path / "b")
    row = row_of(table, arm="clip_td")
    assert row["verdict"] == "too few pairs" and row["p_value"] == 2 / 64 and row["arms_tested"] == 2
    assert "7 seeds are the fewest" in power_note(table) and "(at most 6)" in power_note(table)
    chosen = compare(tmp_path / "b", tested=["clip_td"])
    assert row_of(chosen, arm="clip_td")["verdict"] == "better" and power_note(chosen) == ""
    other = row_of(chosen, arm="naive")
    assert other["verdict"] == "not tested" and np.isnan(other["p_value"]) and other["pairs"] == 6


def test_without_the_baseline_nothing_is_compared(tmp_path):
    write_run(tmp_path / "b", arm="clip_td")
    row = row_of(compare(tmp_path / "b"), arm="clip_td")
    assert (row["pairs"], row["verdict"], row["unpaired"]) == (0, "too few pairs", "0")
    assert np.isnan(row["difference"]) and row["mean"] > 0


# Several worlds, kinds of examples, claims in words.


@pytest.fixture(scope="module")
def two_worlds(tmp_path_factory) -> Path:
    """A batch of two worlds: re-pairing helps in both, the paper's reading hurts in one."""
    shares = {"finetune": (0.4, 0.4), "clip_td": (0.4, 0.1), "clip_td_repaired": (0.9, 0.9)}
    batch = tmp_path_factory.mktemp("batches") / "b"
    for seed, world, arm in product(range(7), (0, 1), shares):
        write_run(batch, arm=arm, seed=seed, share=shares[arm][world], more={"world_seed": world + 1})
    return batch


def test_worlds_are_compared_apart_and_together(two_worlds):
    table = compare(two_worlds)
    assert set(table["world"]) == {"1", "2", "all"} and set(table["setting"]) == {""}
    apart = [row_of(table, arm="clip_td_repaired", world=world) for world in ("1", "2")]
    whole = row_of(table, arm="clip_td_repaired", world="all")
    assert whole["difference"] == pytest.approx(np.mean([row["difference"] for row in apart]))
    assert (whole["seeds"], whole["pairs"]) == (14, 14) and apart[0]["pairs"] == 7
    assert whole["p_value"] == 2 / 2**14 and whole["verdict"] == "better"
    assert len(together(table)) == 3 and set(together(table)["world"]) == {"all"}
    told = sentences(table[table["arm"] == "clip_td"])
    assert [", world 1:" in told[0], ", world 2:" in told[1], ", all worlds:" in told[2]] == [True] * 3


def test_claims_say_what_is_shown_where_and_what_repairing_adds(two_worlds):
    runs = read_runs(two_worlds)
    scores = read_scores(two_worlds, runs)
    claims = claims_table(compare_arms(runs, scores, resamples=100))
    few = row_of(claims, condition="low-shot", arm="clip_td_repaired")
    assert (few["finding"], few["worlds"], few["pairs"]) == ("shown", "1, 2", 14)
    read = row_of(claims, condition="low-shot", arm="clip_td")
    assert (read["finding"], read["worlds"]) == ("contrary", "2"), "it hurts in the second world alone"
    added = claims_table(compare_arms(runs, scores, "clip_td", ["clip_td_repaired"], resamples=100))
    told = claim_sentences(claims, added)
    assert len(told) == 7
    assert told[0].startswith(
        "**VCR, low-shot**: the paper says up to +51.9 % relative. Here: clip_td on vcr_qa"
    )
    assert "**contrary**, alone in world 2" in told[0] and "**shown**, alone in world 1, 2" in told[0]
    gain = row_of(added, condition="low-shot", arm="clip_td_repaired")["difference"]
    assert f"re-pairing adds {100 * gain:+.1f} points" in told[0]
    assert told[2].endswith("Here: clip_td on vcr_qa: not run; clip_td_repaired on vcr_qa: not run.")
    assert told[6] == "**VQA, fully supervised**: the paper says up to +1.3 % relative. Here: not run."


def test_known_and_unknown_concepts_are_compared_apart(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    lines = [
        {"id": f"val-{i}", "style": "flat" if i < 6 else "noir", "style_known": i < 6,
         "right": {"concepts": ["a thing"], "known": i < 12 if i < 20 else None}} for i in range(24)
    ]  # fmt: skip
    (data / "val.concepts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for arm in ("finetune", "clip_td"):
        write_run(tmp_path / "b", run=arm, arm=arm, share=SHARES[arm], more={"data_dir": str(data)})
    runs = read_runs(tmp_path / "b")
    scores = with_strata(runs, read_scores(tmp_path / "b", runs), tmp_path)
    assert scores.groupby("concept")["id"].nunique().to_dict() == {"known": 12, "unknown": 8, "": 4}
    assert scores.groupby("style_known")["id"].nunique().to_dict() == {"known": 6, "unknown": 18}
    table = compare_within(runs, scores, "concept", resamples=50)
    assert list(table["stratum"].unique()) == ["concept: known", "concept: unknown"]
    row = row_of(table, stratum="concept: known", arm="clip_td")
    wanted = scores[(scores["concept"] == "known") & scores["run"].str.contains("clip_td")]
    assert row["mean"] == pytest.approx(wanted["score"].mean())
    assert set(compare_within(runs, scores, "style", resamples=50)["stratum"]) == {
        "style: flat",
        "style: noir",
    }
    bare = with_strata(runs, scores.drop(columns=STRATA), tmp_path / "elsewhere")
    assert compare_within(runs, bare, "concept").empty


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
    expected = paired_difference(wide["clip_td"].to_numpy(), wide["finetune"].to_numpy(), pictures.to_numpy())
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


def test_the_page_leads_with_differences_and_scores(two_worlds):
    first, second = lead_charts(compare(two_worlds))
    assert first.count("<circle") == 2 and second.count("<circle") == 3
    assert "Difference to finetune" in first and "vcr_qa, 12 examples" in first
    assert lead_charts(compare(two_worlds).iloc[:0]) == []


# Tables, figures and the page.


def test_curves_and_shifts_come_from_the_batches_made_for_them(compared):
    shots, shifts = shots_table(compared), shift_table(compared)
    assert set(shots["batch"]) == {"low"} and set(shots["test"]) == {"usual"} and len(shots) == 7 * 2
    assert list(shots["train_examples"][:2]) == [12, 24]
    vcr = shifts[shifts["task"] == "vcr_qa"]
    assert set(vcr["batch"]) == {"wide"} and vcr["test"].iloc[0] == "usual"
    assert len(vcr) == 4 * 3 and list(vcr["arm"][:3]) == list(dict.fromkeys(compared["arm"]))


def test_claims_are_read_in_cells_fixed_before_looking(compared):
    claims = claims_table(compared, ["clip_td"])
    assert len(claims) == 3 * 3
    few = row_of(claims, task="vcr_qa", condition="low-shot")
    cell = row_of(compared, batch="low", task="vcr_qa", shots=12, split="val", arm="clip_td")
    assert few["paper"] == CLAIMS["VCR"]["low-shot"] == 0.519
    assert few["relative"] == cell["relative"] and few["where"] == "low: 12 examples, val"
    usual = compared[
        (compared["task"] == "vcr_qa") & (compared["test"] == "usual") & (compared["arm"] == "clip_td")
    ]
    assert few["largest"] == usual["relative"].max() and few["cells"] == len(usual) == 3
    shift = row_of(claims, task="vcr_qa", condition="domain shift")
    assert shift["where"] == "wide: 24 examples, val_shortcut" and shift["cells"] == 2 + 2  # not balanced
    assert row_of(claims, task="vqa_v2", condition="domain shift")["where"].endswith("val2014_prior")
    every = row_of(claims, task="vcr_qa", condition="fully supervised")
    assert every["verdict"] == "not run" and pd.isna(every["relative"])


def test_what_kinds_of_examples_gain_is_said_of_each_claim(compared):
    kinds = pd.concat([compared.assign(stratum=f"concept: {kind}") for kind in ("known", "unknown")])
    claims = claims_table(compared, ["clip_td"])
    row = row_of(claims, task="vcr_qa", condition="domain shift")
    said = next(s for s in claim_sentences(claims, kinds=kinds) if s.startswith("**VCR, domain shift"))
    points = f"{100 * row['difference']:+.1f} points"
    assert f"known concepts {points}" in said and f"unknown concepts {points}" in said
    full = next(s for s in claim_sentences(claims, kinds=kinds) if s.startswith("**VCR, fully"))
    assert "not run" in full and "concepts" not in full


def test_costs_stand_beside_every_arm(tmp_path):
    for arm, seconds, passes in (("finetune", 8.0, 1), ("repair_only", 16.0, 2)):
        for seed in range(3):
            run = write_run(tmp_path / "b", arm=arm, seed=seed)
            output = tmp_path / "b" / run / "output" / f"{arm}-seed{seed}"
            metrics = {"updates": 10, "train_seconds": seconds + seed, "passes_per_update": passes}
            (output / "metrics.json").write_text(json.dumps(metrics))
    write_run(tmp_path / "b", arm="naive")  # of a version that recorded none
    table = cost_table(read_runs(tmp_path / "b"), tmp_path).set_index("arm")
    assert list(table.index) == ["finetune", "repair_only"] and list(table["runs"]) == [3, 3]
    assert list(table["passes_per_update"]) == [1, 2]
    assert list(table["seconds_per_update"]) == [0.9, 1.7]
    assert table.loc["repair_only", "times_baseline"] == pytest.approx(1.7 / 0.9)
    assert cost_table(read_runs(tmp_path / "b")[:0], tmp_path).empty


def test_a_size_that_has_hardly_begun_does_not_stand_for_one_that_is_done(compared):
    begun = compared[compared["batch"] == "wide"].assign(shots=48, train_examples=48.0, seeds=1)
    begun["pairs"] = begun["pairs"].clip(upper=1)
    both = pd.concat([begun, compared], ignore_index=True)
    assert set(shift_table(both)["train_examples"]) == {24}
    shift = row_of(claims_table(both, ["clip_td"]), task="vcr_qa", condition="domain shift")
    assert shift["where"].startswith("wide: 24 examples") and shift["pairs"] == 7
    half = compared.copy()
    half.loc[half["shots"] == 12, "seeds"] = 3
    titles = [axes.get_title(loc="left") for axes in plot_shots(shots_table(half)).axes]
    assert all("(3 to 7 seeds)" in title for title in titles)


def test_words_and_numbers_for_readers(compared):
    told = sentences(compared[compared["arm"] == "clip_td"])
    assert len(told) == 12 + 8 and all("7 pairs: **" in sentence for sentence in told)
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


def test_figures_of_nothing_say_so(compared):
    for plot in (plot_shots, plot_differences):
        with pytest.raises(ValueError, match="no column"):
            plot(pd.DataFrame({"task": []}))
        with pytest.raises(ValueError, match="no rows"):
            plot(compared.iloc[:0])
    with pytest.raises(ValueError, match="no rows"):
        plot_differences(compared[compared["arm"] == "finetune"])


# The notebook.


def test_the_notebook_writes_a_study(reports, tmp_path):
    found = execute(
        "07_protocol",
        batches=["low", "wide", "never"],
        reports_dir=str(reports),
        output_dir=str(tmp_path),
        resamples=50,
    )
    assert found["page"] == tmp_path / "low-wide-never" / "index.html"
    assert any("tdlib batch run never" in sentence for sentence in found["missing"])
    files = {path.name for path in found["page"].parent.iterdir()}
    assert {"claims.csv", "shifts.parquet", "shots_figure.svg", "shifts_figure.png", "study.json"} <= files
    assert "tdlib batch run never" in found["page"].read_text()


def test_the_notebook_without_any_batch_says_what_to_run(tmp_path, capsys):
    found = execute(
        "07_protocol",
        batches=["low_shot"],
        reports_dir=str(tmp_path),
        output_dir=str(tmp_path / "out"),
        fallback="",
    )
    assert found["compared"].empty and "tdlib batch run low_shot" in found["page"].read_text()
