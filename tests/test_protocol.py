"""The protocol on folders of batches: who is paired with whom, what is refused, and what the tables say."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from batch_folders import SHARES, change_batch, compare, example, row_of, write_run

from tdlib.analysis.compare import COLUMNS, compare_arms, compare_within
from tdlib.analysis.protocol import (
    claim_sentences,
    claims_table,
    power_note,
    runs_in_words,
    sentences,
    shift_table,
    shots_table,
    together,
    unfinished,
)
from tdlib.analysis.scores import ProtocolError, collect, joint_predictions, read_runs, read_scores
from tdlib.analysis.statistics import bootstrap_interval, pooled_difference, sign_flip_test
from tdlib.analysis.study import lead_charts, readable, reading_guide
from tdlib.data.tasks import SHIFTS
from tdlib.miniworld.worlds import STRATA
from tdlib.runs import states as run_states
from tdlib.training.evaluation import Predictions, prediction_table
from tdlib.views.figures.differences import plot_differences
from tdlib.views.figures.protocol import plot_shots

# Reading and pairing.


def test_every_arm_stands_in_every_cell_on_every_test(compared):
    assert list(compared.columns) == COLUMNS
    assert len(compared) == (3 + 2 + 2) * 2 + 3 * 4 + 2 * 2 + 2 * 2
    keys = ["task", "setting", "shots", "split", "arm"]
    assert not compared.duplicated(keys).any() and (compared["seeds"] == 7).all()
    assert set(compared["test"]) == {"usual", "shortcut", "balanced", "style", "prior"}
    assert set(compared["setting"]) == {""}, "splits of different tasks are no setting"
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
    row = row_of(compared, shots=24, task="vcr_qa", split="val_shortcut", arm="clip_td")
    pair = tables["clip_td"], tables["finetune"], pictures
    expected = pooled_difference([pair], 0.25, resamples=100)
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
    assert row_of(compared, shots=24, task="vcr_qa", split="val_shortcut", arm="naive")["verdict"] == (
        "not distinguishable"
    )


def test_chance_is_what_the_runs_recorded(compared):
    chance = compared.groupby("task")["chance"].agg(["min", "max"])
    assert list(chance.loc["vcr_qa"]) == [0.25, 0.25]
    # always the training's label 1, which a quarter of the tested have; their own usual one is another half
    assert list(chance.loc["snli_ve"]) == [0.25, 0.25]
    over = row_of(compared, shots=24, task="snli_ve", split="dev", arm="clip_td")
    assert over["over_chance"] == pytest.approx((over["mean"] - 0.25) / 0.75)


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
    table = prediction_table("val", examples, Predictions.of(np.eye(4)[[0, 0, 0, 1]]))
    table = table.assign(arm="x", seed=0)
    assert list(table["image"]) == ["clipA/000.jpg"] * 2 + ["clipB/000.jpg"] * 2
    joint = joint_predictions(table)
    assert dict(zip(joint["id"], joint["score"], strict=True)) == {"a:r0": 1.0, "a:r1": 0.0}


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
    runs, scores, missing = collect(tmp_path, ["b", "low_shot"])
    assert "b: 3 of 8 runs are not done" in missing[0] and "tdlib batch resume b" in missing[0]
    assert missing[1].startswith("low_shot: was not run here") and "`tdlib batch run low_shot`" in missing[1]
    with pytest.raises(ProtocolError, match="lowshot: there is no such batch; did you mean 'low_shot'"):
        collect(tmp_path, ["b", "lowshot"])
    left = unfinished(runs)
    assert list(left["state"]) == ["failed", "queued", "lost"]
    assert left.loc[0, "reason"] == "it failed" and "missing" in left.loc[2, "reason"]
    assert left.loc[0, "arm"] == "clip_td" and pd.isna(left.loc[1, "arm"])
    assert list(left["runs"]) == [1, 1, 1] and list(left["seeds"]) == ["1", "", "0"]
    write_run(batch, arm="clip_td", seed=3, state="failed")
    again = row_of(unfinished(read_runs(batch)), state="failed")
    assert (again["runs"], again["seeds"], again["first"]) == (2, "1, 3", "vcr_qa-clip_td-1-12")
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


def test_settings_tuned_for_each_arm_are_part_of_it(tmp_path):
    for seed in range(2):
        write_run(tmp_path / "b", seed=seed, more={"rate": 0.1, "student": "small"})
        write_run(tmp_path / "b", arm="clip_td", seed=seed, more={"rate": 0.5, "student": "small"})
    assert compare(tmp_path / "b")["pairs"].max() == 0
    change_batch(tmp_path / "b", tuned=["rate"])
    assert set(read_runs(tmp_path / "b")["tuned"]) == {"rate=0.1", "rate=0.5"}
    assert row_of(compare(tmp_path / "b"), arm="clip_td")["pairs"] == 2


def test_variants_of_an_arm_are_compared_like_arms(tmp_path):
    """Several shares of the rows against one baseline, which has none."""
    for seed in range(2):
        write_run(tmp_path / "b", seed=seed, more={"repair_share": 1.0})
        for share, right in ((1.0, 0.9), (0.3, 0.8)):
            more = {"repair_share": share}
            write_run(tmp_path / "b", arm="repair_only", seed=seed, share=right, more=more)
    change_batch(tmp_path / "b", variants=["repair_share"])
    table = compare(tmp_path / "b")
    assert list(table["arm"]) == ["finetune", "repair_only", "repair_only, repair_share=0.3"]
    assert list(table["pairs"]) == [0, 2, 2] and set(table["setting"]) == {""}


# What is refused.


def test_an_arm_to_be_tested_that_does_not_exist_is_refused(tmp_path):
    write_run(tmp_path / "b")
    with pytest.raises(
        ProtocolError,
        match=r"tested: unknown cliptd; did you mean 'clip_td'\?; the runs have the arms finetune",
    ):
        compare(tmp_path / "b", tested=["cliptd"])
    with pytest.raises(ProtocolError, match=r"baseline: unknown finetun; did you mean 'finetune'"):
        compare(tmp_path / "b", baseline="finetun")
    for alpha in (0, 5, float("nan")):
        with pytest.raises(ProtocolError, match=r"alpha=.* between 0 and 1"):
            compare(tmp_path / "b", alpha=alpha)
    assert len(compare(tmp_path / "b", tested=["clip_td"])) == 1, "not run yet"


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
    assert "7 pairs are the fewest" in power_note(table) and "(at most 6)" in power_note(table)
    chosen = compare(tmp_path / "b", tested=["clip_td"])
    assert row_of(chosen, arm="clip_td")["verdict"] == "better" and power_note(chosen) == ""
    other = row_of(chosen, arm="naive")
    assert other["verdict"] == "not tested" and np.isnan(other["p_value"]) and other["pairs"] == 6
    (drawing, _) = lead_charts(chosen)
    assert ">naive (not tested)<" in drawing and ">clip_td<" in drawing
    (axes,) = plot_differences(chosen).axes
    sizes = {line.get_markersize() for line in axes.lines if len(line.get_xdata()) == 1}
    assert len(sizes) == 2, "what was not tested does not look like what was tested and not found"


def test_without_the_baseline_nothing_is_compared(tmp_path):
    write_run(tmp_path / "b", arm="clip_td")
    table = compare(tmp_path / "b")
    row = row_of(table, arm="clip_td")
    assert (row["pairs"], row["verdict"], row["unpaired"]) == (0, "too few pairs", "0")
    assert power_note(table) == "1 row has no pair: the baseline was not run with their seeds and settings."
    assert power_note(table, tested=["clip_td", "naive"]).endswith("without a finished run: naive.")
    (scores,) = lead_charts(table)
    assert "over pictures alone (one seed)" in scores
    assert np.isnan(row["difference"]) and row["mean"] > 0


# Several worlds, kinds of examples, claims in words.


@pytest.fixture(scope="module")
def two_worlds(tmp_path_factory) -> Path:
    """A batch of two worlds: re-pairing helps in both, the paper's reading hurts in one."""
    shares = {"finetune": (0.4, 0.4), "clip_td": (0.4, 0.1), "clip_td_repaired": (0.9, 0.9)}
    return write_worlds(tmp_path_factory.mktemp("batches") / "b", shares)


def write_worlds(batch: Path, shares: dict[str, tuple[float, ...]]) -> Path:
    """A batch of arms with seven seeds in each of the worlds "1", "2", ... that they have a share of."""
    for arm, of_worlds in shares.items():
        for seed, (world, share) in product(range(7), enumerate(of_worlds, start=1)):
            write_run(batch, arm=arm, seed=seed, share=share, more={"world_seed": world})
    return batch


def test_worlds_are_compared_apart_and_together(two_worlds):
    table = compare(two_worlds)
    assert set(table["world"]) == {"1", "2", "all"} and set(table["setting"]) == {""}
    apart = [row_of(table, arm="clip_td_repaired", world=world) for world in ("1", "2")]
    whole = row_of(table, arm="clip_td_repaired", world="all")
    assert whole["difference"] == pytest.approx(np.mean([row["difference"] for row in apart]))
    assert (whole["seeds"], whole["pairs"]) == (14, 14) and apart[0]["pairs"] == 7
    assert (whole["examples"], whole["pictures"]) == (48, 24) and apart[0]["examples"] == 24
    assert whole["p_value"] == 2 / 2**14 and whole["verdict"] == "better"
    assert len(together(table)) == 3 and set(together(table)["world"]) == {"all"}
    told = sentences(table[table["arm"] == "clip_td"])
    assert [", world 1:" in told[0], ", world 2:" in told[1], ", all worlds:" in told[2]] == [True] * 3


def test_an_arm_of_one_world_does_not_stand_in_the_correction_of_both(tmp_path):
    """It has no row there; what is found must not depend on how far its runs are."""
    shares = {"finetune": (0.4, 0.4), "clip_td": (0.5, 0.35), "naive": (0.9,)}
    table = compare(write_worlds(tmp_path / "b", shares), tested=["clip_td", "naive"])
    row = row_of(table, arm="clip_td", world="all")
    assert 2 / 2**7 < row["p_value"] < 0.4, "else both ways to correct give the same"
    assert row["p_adjusted"] == 2 * row["p_value"] and row["arms_tested"] == 2
    assert row_of(table, arm="naive", world="1")["verdict"] == "better"


def test_means_beside_each_other_are_of_the_same_worlds(tmp_path):
    """A control that was run in the easier world alone must not look good for that."""
    shares = {"finetune": (0.8, 0.2), "clip_td": (0.9, 0.3), "naive": (0.75,)}
    table = compare(write_worlds(tmp_path / "b", shares))
    whole = table[table["world"] == "all"]
    assert list(whole["arm"]) == ["finetune", "clip_td"] and set(whole["seeds"]) == {14}
    assert set(table["arms_tested"].dropna()) == {2}, "Holm counts the control too, in every world"
    shown = together(table)
    alone = shown[shown["world"] == "1"]
    assert len(shown) == 2 + 3 and set(alone["arm"]) == set(shares) and set(alone["seeds"]) == {7}
    assert row_of(alone, arm="naive")["mean"] < row_of(alone, arm="finetune")["mean"]
    assert row_of(alone, arm="naive")["mean"] > row_of(whole, arm="finetune")["mean"]
    shifts, shots = shift_table(table), shots_table(table)
    assert list(shifts["world"]) == list(shots["world"]) == ["all"] * 2 + ["1"] * 3
    titles = [axes.get_title(loc="left") for axes in plot_differences(shifts, "test").axes]
    assert titles == ["vcr_qa, all worlds", "vcr_qa, world 1"]
    titles = [axes.get_title(loc="left") for axes in plot_shots(shots).axes]
    assert titles == ["vcr_qa, all worlds (14 runs of an arm)", "vcr_qa, world 1 (7 seeds)"]
    assert all("vcr_qa, 12 examples, world 1" in chart for chart in lead_charts(table))
    claims = claims_table(table, ["clip_td", "naive"])
    assert row_of(claims, condition="low-shot", arm="clip_td")["where"] == "12 examples, val"
    assert row_of(claims, condition="low-shot", arm="naive")["where"] == "12 examples, val, world 1"


def test_an_arm_of_two_worlds_of_three_is_compared_in_these(tmp_path):
    shares = {"finetune": (0.8, 0.2, 0.5), "clip_td": (0.9, 0.3)}
    write_worlds(tmp_path / "b", shares)
    write_run(tmp_path / "b", arm="clip_td", seed=8, more={"world_seed": 3})  # has no partner yet
    table = compare(tmp_path / "b")
    assert list(table[table["world"] == "all"]["arm"]) == ["finetune"]
    both = table[table["world"] == "1, 2"].set_index("arm")
    assert list(both.index) == list(shares) and set(both["seeds"]) == {14}
    assert both.loc["clip_td", "baseline_mean"] == pytest.approx(both.loc["finetune", "mean"])
    assert ", worlds 1, 2: " in sentences(table)[-1]


def test_claims_say_what_is_shown_where_and_what_repairing_adds(two_worlds):
    runs = read_runs(two_worlds)
    scores = read_scores(two_worlds, runs)
    claims = claims_table(compare_arms(runs, scores, resamples=100))
    few = row_of(claims, condition="low-shot", arm="clip_td_repaired")
    assert (few["finding"], few["worlds"], few["pairs"]) == ("shown", "1, 2", 14)
    assert "clip_td_repaired, which the paper does not have, on" in claim_sentences(claims)[0]
    read = row_of(claims, condition="low-shot", arm="clip_td")
    assert (read["finding"], read["worlds"]) == ("contrary", "2"), "it hurts in the second world alone"
    added = claims_table(compare_arms(runs, scores, "clip_td", ["clip_td_repaired"], resamples=100))
    told = claim_sentences(claims, added)
    assert len(told) == 7
    assert told[0].startswith(
        "**VCR, low-shot**: the paper says up to +51.9 % relative. Here: clip_td on vcr_qa"
    )
    assert "**contrary**, in world 2 by itself" in told[0]
    assert "**shown**, in each of the worlds 1, 2 by itself" in told[0]
    gain = row_of(added, condition="low-shot", arm="clip_td_repaired")["difference"]
    assert f"re-pairing adds {100 * gain:+.1f} points" in told[0] and "] to clip_td on" in told[0]
    varied = {"arm": "clip_td_repaired, epochs=48"}
    other = claim_sentences(claims.assign(**varied), added.assign(**varied), over="naive")
    assert "clip_td_repaired, epochs=48, which the paper does not have, on" in other[0]
    assert f"re-pairing adds {100 * gain:+.1f} points" in other[0] and "] to naive on" in other[0]
    assert told[2].endswith(
        "clip_td on vcr_qa: not run; clip_td_repaired, which the paper does not have, on vcr_qa: not run."
    )
    assert told[6] == "**VQA, fully supervised**: the paper says up to +1.3 % relative. Here: not run."


def test_known_and_unknown_concepts_are_compared_apart(tmp_path):
    kinds = {
        "concept": ["known"] * 12 + ["unknown"] * 8 + [""] * 4,
        "style": ["flat"] * 6 + ["noir"] * 18, "style_known": ["known"] * 6 + ["unknown"] * 18,
    }  # fmt: skip
    for arm in ("finetune", "clip_td"):
        write_run(tmp_path / "b", run=arm, arm=arm, share=SHARES[arm], columns=kinds)
    runs = read_runs(tmp_path / "b")
    scores = read_scores(tmp_path / "b", runs)
    assert scores.groupby("concept")["id"].nunique().to_dict() == {"known": 12, "unknown": 8, "": 4}
    assert scores.groupby("style_known")["id"].nunique().to_dict() == {"known": 6, "unknown": 18}
    table = compare_within(runs, scores, "concept", resamples=50)
    assert list(table["stratum"].unique()) == ["concept: known", "concept: unknown"]
    row = row_of(table, stratum="concept: known", arm="clip_td")
    assert (row["examples"], row["pictures"]) == (12, 6)
    wanted = scores[(scores["concept"] == "known") & scores["run"].str.contains("clip_td")]
    assert row["mean"] == pytest.approx(wanted["score"].mean())
    assert set(compare_within(runs, scores, "style", resamples=50)["stratum"]) == {
        "style: flat",
        "style: noir",
    }
    write_run(tmp_path / "earlier", run="bare", arm="finetune")  # its predictions lack the columns
    bare = read_runs(tmp_path / "earlier")
    scores = read_scores(tmp_path / "earlier", bare)
    assert (scores[STRATA] == "").all(axis=None) and compare_within(bare, scores, "concept").empty


def test_the_page_leads_with_differences_and_scores(two_worlds):
    first, second = lead_charts(compare(two_worlds))
    assert first.count("<circle") == 2 and second.count("<circle") == 3
    assert "Difference to finetune" in first and "vcr_qa, 12 examples" in first
    assert lead_charts(compare(two_worlds).iloc[:0]) == []
    assert "chance: 25.0 (vcr_qa)" in second


def test_arms_that_have_no_pair_yet_count_in_the_correction(tmp_path):
    """A verdict must not vanish when the last of the arms that were to be tested is done."""
    write_worlds(tmp_path / "b", {"finetune": (0.4,), "clip_td": (0.9,)})
    row = row_of(
        compare(tmp_path / "b", tested=["finetune", "clip_td", "naive", "random_teacher"]), arm="clip_td"
    )
    assert (row["p_value"], row["p_adjusted"], row["arms_tested"]) == (2 / 2**7, 3 * 2 / 2**7, 3)
    four = ["clip_td", "naive", "random_teacher", "shuffled_teacher"]
    assert row_of(compare(tmp_path / "b", tested=four), arm="clip_td")["verdict"] == "too few pairs"


def test_the_page_says_what_its_runs_share(two_worlds):
    runs = read_runs(two_worlds)
    (said,) = runs_in_words(runs.assign(commit="abc"))
    assert said.startswith('42 finished runs of vcr_qa: student="small", all else default; code abc;')
    assert "MiniWorld 1, 2" in said
    assert runs_in_words(runs[:0]) == [] and "MiniWorld" not in runs_in_words(runs.assign(world=""))[0]


def test_the_guide_explains_the_tests_that_occur_and_no_others(compared):
    guide = reading_guide(compared)
    assert SHIFTS["shortcut"] in guide and SHIFTS["composition"] not in guide
    assert SHIFTS["shortcut"] not in reading_guide(compared[compared["test"] == "usual"])
