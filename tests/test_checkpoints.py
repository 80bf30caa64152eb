"""Checkpoints: whole or not there, damaged ones are passed over, and a killed training ends as any other."""

import importlib
import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import pytest
import torch
from training_helpers import settings_of
from transformers.trainer_pt_utils import safe_globals

from tdlib.core.paths import ConfigError
from tdlib.runs import states as run_states
from tdlib.training import run as training
from tdlib.training.checkpoints import checkpoints_of, damaged, newest, publish_checkpoint, remove, staging
from tdlib.training.objective import TargetedDistillation
from tdlib.training.run import train_run

# As folders


RUN = {"arm": "clip_td", "learning_rate": 0.1, "functions": {}, "splits": ("val", "test")}


def filled(home: Path, step: int, run: dict | None = None) -> Path:
    place = staging(home) / "anything"
    place.mkdir()
    (place / "model.safetensors").write_bytes(random.Random(step).randbytes(1000))
    (place / "state.json").write_text(json.dumps({"step": step}))
    return publish_checkpoint(place, home, step, run or RUN)


@pytest.fixture
def home(tmp_path) -> Path:
    return checkpoints_of(tmp_path / "runs" / "clip_td-seed0")


def test_they_lie_beside_the_run_folder_and_go_with_its_end(home, tmp_path):
    other = checkpoints_of(tmp_path / "runs" / "finetune-seed0")
    for place in (home, other):
        filled(place, 1)
    assert home == (tmp_path / "runs/.checkpoints/clip_td-seed0").resolve()
    remove(home)
    assert not home.exists() and newest(other, RUN) is not None
    remove(other)
    assert os.listdir(tmp_path / "runs") == []


def test_the_newest_two_are_kept(home):
    assert newest(home, RUN) is None
    for step in (5, 10, 100, 95):  # continued from 90 after 100 turned out damaged: 100 must not come back
        assert newest(home, RUN) is None or damaged(newest(home, RUN)) == ""
        assert filled(home, step).name == f"step-{step:08d}"
    assert sorted(path.name for path in home.glob("step-*")) == ["step-00000010", "step-00000095"]
    assert newest(home, RUN).name == "step-00000095"


def flip(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)


DAMAGES = {
    "bit": lambda f: flip(f, "model.safetensors"),
    "truncated": lambda f: os.truncate(f / "model.safetensors", 999),
    "empty": lambda f: os.truncate(f / "model.safetensors", 0),
    "missing": lambda f: (f / "state.json").unlink(),
    "run": lambda f: flip(f, "run.json"),
    "no manifest": lambda f: (f / "manifest.json").unlink(),
    "half a manifest": lambda f: os.truncate(f / "manifest.json", 50),
    "another manifest": lambda f: (f / "manifest.json").write_text("[]"),
    "a manifest of nothing": lambda f: (f / "manifest.json").write_text('{"files": {}}'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_named_and_the_one_before_is_taken(home, caplog, damage):
    first, second = filled(home, 1), filled(home, 2)
    assert damaged(second) == "" and newest(home, RUN) == second and not caplog.records
    DAMAGES[damage](second)
    assert newest(home, RUN) == first
    assert str(second) in caplog.text and "damaged" in caplog.text
    again = filled(home, 2)  # made anew
    assert newest(home, RUN) == again == second


def test_no_bit_of_any_file_can_change_unnoticed(home):
    whole = filled(home, 1)
    names = sorted(path.name for path in whole.iterdir())
    assert names == ["manifest.json", "model.safetensors", "run.json", "state.json"]
    for name in set(names) - {"manifest.json"}:
        before = (whole / name).read_bytes()
        for place in range(0, len(before), 41):
            changed = bytearray(before)
            changed[place] ^= 1 << (place % 8)
            (whole / name).write_bytes(changed)
            assert name in damaged(whole)
        (whole / name).write_bytes(before)
        assert damaged(whole) == ""


def test_one_that_was_being_written_is_none(home):
    filled(home, 1)
    place = staging(home) / "checkpoint-2"
    place.mkdir()
    (place / "model.safetensors").write_bytes(b"half")
    assert newest(home, RUN).name == "step-00000001"
    assert list(staging(home).iterdir()) == []  # what a killed run has left goes


def test_another_runs_is_refused_with_what_differs(home):
    filled(home, 1)
    with pytest.raises(
        ConfigError, match=r"learning_rate was 0.1 and is 0.2.*remove .*clip_td-seed0"
    ) as error:
        newest(home, RUN | {"learning_rate": 0.2, "functions": {"selector": {"name": "mine"}}})
    assert "functions.selector.name was absent and is 'mine'" in str(error.value)
    assert "arm" not in str(error.value).split(":")[1]
    assert newest(home, RUN) is not None


def test_an_attempt_of_a_batch_keeps_only_them(tmp_path):
    output = tmp_path / "run" / "output"
    homes = [checkpoints_of(output / "clip_td-seed0"), checkpoints_of(output / "inner" / "clip_td-seed1")]
    for place in homes:
        filled(place, 3)
    (output / "clip_td-seed0").mkdir()
    (output / "clip_td-seed0" / "metrics.json").write_text("{}")
    (output / "inner" / "table.csv").write_text("")
    (output / "link").symlink_to(tmp_path)
    run_states.clear_for_attempt(tmp_path / "run")
    left = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    assert left and all(".checkpoints" in name for name in left)
    assert all(newest(place, RUN) is not None for place in homes) and not (output / "link").is_symlink()


# In training


@pytest.fixture(scope="module")
def base(base, student_folder, tmp_path_factory):
    """Settings in which everything that has a state takes part: dropout, a selector that draws, windows."""
    student = tmp_path_factory.mktemp("students") / "vilt"
    shutil.copytree(student_folder, student)
    settings = json.loads((student / "config.json").read_text())
    settings["hidden_dropout_prob"] = 0.2
    (student / "config.json").write_text(json.dumps(settings))
    return settings_of(
        base, student=str(student), shots=0.4, epochs=3, accumulation=2, eval_splits=["val"], probe_every=1,
        diagnostics_every=2, selector="sample", distill_schedule="learned",
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(base, prepared, tmp_path_factory):
    """A run that keeps no checkpoints."""
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    train_run(base, prepared, folder)
    return folder


def assert_same_run(folder: Path, other: Path) -> None:
    for name in ("student/model.safetensors", "history.jsonl", "diagnostics.jsonl", "manifest.json"):
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name
    for name in ("predictions.parquet", "selections.parquet"):
        pd.testing.assert_frame_equal(
            pd.read_parquet(folder / name), pd.read_parquet(other / name), check_exact=True
        )
    found, known = (json.loads((f / "metrics.json").read_text()) for f in (folder, other))
    for metrics in (found, known):
        del metrics["seconds"], metrics["train_seconds"], metrics["seconds_per_update"]
    assert found == known


def killed_at(run: Callable[[], object], module: str, name: str, number: int) -> None:
    """Runs in a process of its own that is killed before the ``number``-th call of a function."""

    def until_killed() -> None:
        where = importlib.import_module(module)
        *path, last = name.split(".")
        for part in path:
            where = getattr(where, part)
        real, calls = getattr(where, last), []

        def killing(*args, **options):
            calls.append(1)
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        setattr(where, last, killing)
        run()

    process = get_context("fork").Process(target=until_killed)  # a copy of this one: nothing to import
    process.start()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL


def steps_at(home: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in home.glob("step-*"))


def test_a_run_that_is_killed_again_and_again_ends_as_if_nothing_had_been(
    base, prepared, undisturbed, tmp_path, monkeypatch
):
    """In the middle of writing a checkpoint, in the middle of an epoch and a window, after the training."""
    config, folder = settings_of(base, checkpoint_every=3), tmp_path / "run"
    home, total = checkpoints_of(folder), json.loads((undisturbed / "metrics.json").read_text())["updates"]
    assert total == 12 and base.epochs == 3  # after updates 3 and 6 an epoch is not over

    def run() -> None:
        train_run(config, prepared, folder)

    killed_at(run, "tdlib.training.checkpoints", "write_json", 4)  # the second one's manifest
    assert steps_at(home) == [3] and any((home / ".partial").iterdir())
    killed_at(run, "tdlib.training.objective", "TargetedDistillation.forward", 10)
    assert steps_at(home) == [3, 6]
    assert not folder.exists()
    with monkeypatch.context() as patch:
        patch.setattr(training, "save_manifest", lambda *_args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run()
    assert steps_at(home) == [9, 12]
    run()
    assert_same_run(folder, undisturbed)
    resumed = json.loads((folder / "environment.json").read_text())["resumed_after_updates"]
    assert resumed == [3, 6, 12]
    assert not home.parent.exists()


def test_processes_that_make_batches_change_nothing(base, prepared, undisturbed, tmp_path):
    train_run(settings_of(base, loader_workers=2), prepared, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["loader_workers"] == 2
    assert_same_run(tmp_path / "run", undisturbed)


@pytest.fixture
def interrupted(base, prepared, tmp_path, monkeypatch):
    """A run folder's name and settings, of a training that ended in an error after its last update."""
    config, folder = settings_of(base, checkpoint_every=4), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(training, "save_manifest", lambda *_args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train_run(config, prepared, folder)
    return config, folder


def test_training_goes_on_from_the_checkpoint_before_a_damaged_one(
    interrupted, prepared, undisturbed, caplog, monkeypatch
):
    config, folder = interrupted
    home = checkpoints_of(folder)
    older, newer = sorted(home.glob("step-*"))
    flip(newer, "optimizer.pt")
    monkeypatch.setattr(TargetedDistillation, "fit_phi", lambda *_args: 1 / 0)  # not from the start
    train_run(config, prepared, folder)
    assert f"{newer} is damaged (optimizer.pt" in caplog.text
    resumed = json.loads((folder / "environment.json").read_text())["resumed_after_updates"]
    assert resumed == [int(older.name.removeprefix("step-"))]
    assert_same_run(folder, undisturbed)


def test_checkpoints_of_other_settings_or_code_are_refused(interrupted, prepared, monkeypatch):
    config, folder = interrupted
    kept = steps_at(checkpoints_of(folder))
    for changes, named in (
        ({"learning_rate": 1e-4}, "learning_rate was 0.0005 and is 0.0001"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"shots": 0.3}, "training subset was"),
    ):
        with pytest.raises(ConfigError, match=named):
            train_run(settings_of(config, **changes), prepared, folder)
    with monkeypatch.context() as patch:
        patch.setattr("tdlib.training.run_folders.code_version", lambda: "other")
        with pytest.raises(ConfigError, match=r"code of tdlib was '.*' and is 'other'"):
            train_run(config, prepared, folder)
    assert steps_at(checkpoints_of(folder)) == kept and not folder.exists()
    train_run(settings_of(config, checkpoint_every=1), prepared, folder)  # how often does not matter


def test_nothing_in_a_checkpoint_needs_unpickling(interrupted):
    folder = max(checkpoints_of(interrupted[1]).glob("step-*"))
    suffixes = {path.suffix for path in folder.iterdir()}
    assert suffixes == {".json", ".safetensors", ".pt", ".pth", ".parquet"}
    for path in [*folder.glob("*.pt"), *folder.glob("*.pth")]:
        with safe_globals():
            torch.load(path, weights_only=True)
