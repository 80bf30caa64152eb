"""Several batches read as one: who is paired with whom, what counts once, and what is never a pair."""

import json

import pytest
from batch_folders import change_batch, compare, row_of, write_run

from tdlib.analysis.compare import compare_arms
from tdlib.analysis.protocol import claims_table, power_note, shots_table
from tdlib.analysis.scores import ProtocolError, collect, read_runs, read_scores
from tdlib.runs import states as run_states


def test_arms_of_one_batch_are_paired_with_the_baseline_of_another(tmp_path):
    """Controls are a batch of their own, and their baseline stands in the one that decides."""
    for seed in range(7):
        write_run(tmp_path / "decide", seed=seed, share=0.4, more={"loader_workers": 2})
        write_run(tmp_path / "decide", arm="clip_td", seed=seed, share=0.9, more={"loader_workers": 2})
        write_run(tmp_path / "controls", arm="naive", seed=seed, share=0.5, more={"loader_workers": 8})
    runs, scores, missing = collect(tmp_path, ["decide", "controls"])
    table = compare_arms(runs, scores, resamples=50)
    assert not missing and list(table["arm"]) == ["finetune", "clip_td", "naive"]
    assert list(table["pairs"]) == [0, 7, 7] and set(table["arms_tested"].dropna()) == {2}
    apart = compare(tmp_path / "decide", tested=["clip_td", "naive"])
    row, alone = row_of(table, arm="clip_td"), row_of(apart, arm="clip_td")
    assert row["p_adjusted"] == alone["p_adjusted"] == 2 * 2 / 2**7, "a family is what was said before"


def test_a_run_of_two_batches_counts_once_and_a_finished_one_before_others(tmp_path):
    for batch in ("first", "second"):
        write_run(tmp_path / batch, seed=0)
        write_run(tmp_path / batch, arm="clip_td", seed=0, state="done" if batch == "second" else "queued")
    runs, scores, _ = collect(tmp_path, ["first", "second"])
    assert list(zip(runs["batch"], runs["arm"], runs["state"], strict=True)) == [
        ("first", "finetune", "done"), ("second", "clip_td", "done"),
    ]  # fmt: skip
    assert (
        len(scores) == 2 * 24
        and row_of(compare_arms(runs, scores, resamples=50), arm="clip_td")["pairs"] == 1
    )


@pytest.mark.parametrize("changed", ["code", "data"])
def test_batches_of_other_code_or_weights_are_no_pairs(tmp_path, changed):
    """Finetuning of before a change says nothing of what an arm of after it would have gained."""
    for batch, arm in (
        ("old", "finetune"),
        ("old", "clip_td"),
        ("new", "naive"),
        ("third", "label_smoothing"),
    ):
        for world in (0, 1):
            run = write_run(tmp_path / batch, arm=arm, more={"world_seed": world})
            file = tmp_path / batch / run / "parameters.json"
            identity = {"code": "a", "template": "b", "data": f"weights and world {world}"}
            if batch == "new":
                identity |= {changed: f"{identity[changed]} changed"}
            file.write_text(json.dumps(json.loads(file.read_text()) | {"identity": identity}))
            state = json.loads((file.parent / "state.json").read_text())
            run_states.write_state(file.parent, state | {"files": run_states.file_sizes(file.parent)})
    runs, scores, missing = collect(tmp_path, ["old", "new", "third"])
    assert set(runs["state"]) == {"done"}
    settings = dict(zip(runs["batch"], runs["setting"], strict=True))
    assert settings == {"old": "version=old", "new": "version=new", "third": "version=old"}
    assert len(missing) == 1 and "version" in missing[0]
    table = compare_arms(runs, scores, resamples=50)
    pairs = table[table["world"] == "all"].set_index("arm")["pairs"]
    assert dict(pairs) == {"finetune": 0, "clip_td": 2, "label_smoothing": 2, "naive": 0}


def test_a_tuned_batch_is_not_the_same_as_one_that_was_not(tmp_path):
    for batch, rate in (("plain", 0.1), ("tuned", 0.5)):
        for arm in ("finetune", "clip_td"):
            write_run(tmp_path / batch, arm=arm, more={"rate": rate, "student": "small"})
    change_batch(tmp_path / "tuned", tuned=["rate"])
    runs, scores, _ = collect(tmp_path, ["plain", "tuned"])
    assert set(runs["setting"]) == {"rate=0.1", "tuned=rate"}
    assert list(compare_arms(runs, scores, resamples=50)["pairs"]) == [0, 1, 0, 1]


def test_a_batch_that_only_plans_runs_does_not_hide_of_which_code_they_are(tmp_path):
    for batch, arm, code in (("old", "finetune", "a"), ("new", "clip_td", "b")):
        for seed in range(2):
            run = write_run(tmp_path / batch, arm=arm, seed=seed)
            file = tmp_path / batch / run / "parameters.json"
            identity = {"code": code, "template": "t", "data": "d"}
            file.write_text(json.dumps(json.loads(file.read_text()) | {"identity": identity}))
            state = json.loads((file.parent / "state.json").read_text())
            run_states.write_state(file.parent, state | {"files": run_states.file_sizes(file.parent)})
    for arm in ("clip_td", "naive"):
        for seed in range(2):
            write_run(tmp_path / "more", arm=arm, seed=seed, state="failed")
    for batches in (["old", "new"], ["old", "new", "more"], ["more", "new", "old"]):
        runs, scores, missing = collect(tmp_path, batches)
        assert compare_arms(runs, scores, resamples=50)["pairs"].sum() == 0, batches
        assert any("version" in said for said in missing)


def test_a_run_that_one_batch_tuned_and_another_did_not_is_refused(tmp_path):
    for batch, rate in (("plain", 0.1), ("tuned", 0.5)):
        write_run(tmp_path / batch, more={"rate": 0.1})
        write_run(tmp_path / batch, arm="clip_td", more={"rate": rate})
    change_batch(tmp_path / "tuned", tuned=["rate"])
    with pytest.raises(ProtocolError, match=r"plain, tuned share runs \(such as vcr_qa-finetune.*a study"):
        read_runs(tmp_path / "plain", tmp_path / "tuned")


def test_a_variant_of_one_batch_names_the_arms_of_another(tmp_path):
    """So that a baseline with other settings stands beside the arms of a batch that all have the same."""
    for seed in range(2):
        for arm in ("finetune", "clip_td"):
            write_run(tmp_path / "decide", arm=arm, seed=seed, more={"epochs": 48})
        write_run(tmp_path / "gentle", seed=seed, more={"epochs": 8})
    change_batch(tmp_path / "gentle", variants=["epochs"])
    runs, scores, _ = collect(tmp_path, ["decide", "gentle"])
    table = compare_arms(runs, scores, "finetune, epochs=8", resamples=50)
    assert dict(zip(table["arm"], table["pairs"], strict=True)) == {
        "finetune, epochs=8": 0, "clip_td, epochs=48": 2, "finetune, epochs=48": 2,
    }  # fmt: skip
    missing = power_note(compare_arms(runs, scores, resamples=50))
    assert "the baseline was not run with their seeds and settings" in missing


def test_what_goes_with_the_size_parts_no_curve_and_what_all_share_is_said(tmp_path):
    """The fewer the examples, the more epochs: one curve, and one row of claims, whose size is the fewest."""
    for shots, epochs in ((12, 96), (24, 48), (0, 8)):
        for arm in ("finetune", "clip_td"):
            more = {"epochs": epochs, "student": "small", "learning_rate": 0.1}
            write_run(tmp_path / "b", arm=arm, shots=shots, more=more)
    runs = read_runs(tmp_path / "b")
    assert set(runs["setting"]) == {""} and list(runs["of_size"][::2]) == [
        "epochs=96",
        "epochs=48",
        "epochs=8",
    ]
    assert set(runs["shared"]) == {'student="small", learning_rate=0.1'}
    table = compare_arms(runs, read_scores(tmp_path / "b", runs), resamples=50)
    assert list(shots_table(table)["train_examples"]) == [12, 24, 100] * 2
    claims = claims_table(table, ["clip_td"])
    assert list(claims["condition"]) == ["low-shot", "domain shift", "fully supervised"]
    assert row_of(claims, condition="low-shot")["shots"] == 12
    write_run(tmp_path / "b", shots=12, more={"epochs": 8, "student": "small", "learning_rate": 0.1})
    assert "epochs=96" in set(read_runs(tmp_path / "b")["setting"]), (
        "two lengths at one size are two settings"
    )
