"""Settings chosen for each arm: with equal effort, and never on a test that is reported."""

import json
from pathlib import Path

import pytest
from batch_folders import row_of, write_run

from tdlib.analysis.scores import ProtocolError, read_runs
from tdlib.analysis.tuning import rank_settings, write_tuned
from tdlib.cli import main

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
        # whose own distill_weight is 0
        ({"task": "vcr_qa", "student": "small", "arm": "finetune"}, {"rate": 0.2}),
        ({"task": "vcr_qa", "student": "small", "arm": "clip_td"}, {"rate": 0.1, "distill_weight": 5.0}),
    ]


@pytest.mark.parametrize(("weights", "edge"), [((0.0, 1.0, 10.0), ""), ((10.0, 30.0, 0.0), "repair_weight")])
def test_the_weight_of_the_arm_itself_may_be_best(tmp_path, weights, edge):
    for weight in weights:
        write_run(tmp_path / "b", arm="clip_td_repaired", share=0.3 if weight else 0.8,
                  splits=("train_held_out",), more={"repair_weight": weight})  # fmt: skip
    ranked = rank_settings(tmp_path / "b", resamples=50)
    assert ranked["edge"][0] == edge, "0 stands for the arm's 3"
    (chosen,) = json.loads(write_tuned(tmp_path / "b", ranked).read_text())["chosen"]
    assert chosen["settings"] == {}


def test_a_setting_written_in_two_ways_is_one(tmp_path):
    for seed, weight in ((100, 1), (101, 1.0)):
        for rate in (0.1, 0.2):
            write_run(tmp_path / "b", seed=seed, share=rate, splits=("train_held_out",),
                      more={"rate": rate, "distill_weight": weight})  # fmt: skip
    assert list(rank_settings(tmp_path / "b", resamples=50)["seeds"]) == [2, 2]
    assert set(read_runs(tmp_path / "b")["setting"]) == {"rate=0.1", "rate=0.2"}


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
    write_run(tmp_path / "b", "vqa_v2", splits=("val2014",), more={"rate": 0.1})
    with pytest.raises(ProtocolError, match="runs of vqa_v2 were not evaluated on train_held_out"):
        rank_settings(tmp_path / "b", "train_held_out", resamples=50)


def test_the_command_keeps_the_choice_and_says_what_lies_at_the_edge(tmp_path, capsys):
    write_tuning(tmp_path / "tune")
    (tmp_path / "tune.yaml").write_text("template: 04_distill\ngrid: {learning_rate: [5e-4, 1e-3]}\n")
    command = ["batch", "best", str(tmp_path / "tune.yaml"), "--folder", str(tmp_path)]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "beyond: clip_td rate\n" in out and "beyond: finetune" not in out
    assert f"note: 2 of the 2 runs that {command[2]} has are not in this ranking" in out
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
