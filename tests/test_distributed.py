"""One run by several processes: the same updates as by one, errors that come back, no process left."""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from threading import Thread

import pandas as pd
import psutil
import pytest
from accelerate.data_loader import SeedableRandomSampler
from safetensors.torch import load_file
from torch.testing import assert_close
from training_helpers import settings_of

from tdlib.config import RunConfig, apply_arm
from tdlib.core.paths import ROOT, ConfigError
from tdlib.data.examples import low_shot
from tdlib.method.selection import SELECTORS
from tdlib.training import prepare as experiments
from tdlib.training import run as training
from tdlib.training.checkpoints import checkpoints_of
from tdlib.training.data import EpochBatches, SharedBatches
from tdlib.training.processes import must_launch
from tdlib.training.run import train_run

# The loader


def shared(
    examples: int, size: int, window: int, rank: int, processes: int, epoch: int = 0
) -> list[list[int]]:
    batches = EpochBatches(SeedableRandomSampler(range(examples), data_seed=3), size, drop_last=False)
    own = SharedBatches(batches, window, rank, processes)
    own.set_epoch(epoch)
    found = list(own)
    assert len(found) == len(own)
    return found


def windows(batches: list[list[int]], window: int) -> list[list[int]]:
    return [list(chain(*batches[start : start + window])) for start in range(0, len(batches), window)]


@pytest.mark.parametrize("processes", [2, 3, 4])
@pytest.mark.parametrize("window", [1, 2, 3])
def test_processes_share_the_examples_of_each_update(processes, window):
    for examples in range(1, 60):
        alone = windows(shared(examples, 12, window, 0, 1), window)
        parts = [shared(examples, 12, window, rank, processes) for rank in range(processes)]
        assert len({len(part) for part in parts}) == 1  # none waits for another
        assert all(batch for part in parts for batch in part)  # nor has nothing to do
        own = [windows(part, window) for part in parts]
        assert len(own[0]) == len(alone)
        for number, whole in enumerate(alone):
            together = list(chain(*(part[number] for part in own)))
            if sorted(together) == sorted(whole):
                continue
            # too few for all: each takes them all, and nothing else belongs to the update
            assert len(whole) < processes and all(part[number] == whole for part in own)
        if examples >= 12:
            largest = max(len(batch) for part in parts for batch in part)
            assert largest <= math.ceil(12 / processes) + 1


def test_the_order_is_the_epochs_own():
    first, again, other = (shared(30, 4, 1, 0, 2, epoch) for epoch in (0, 0, 1))
    assert first == again != other


# Parameters


@pytest.mark.parametrize(("size", "processes"), [(4, 3), (1, 2), (16, 5)])
def test_a_batch_must_have_equal_shares(size, processes):
    with pytest.raises(ConfigError, match=rf"processes={processes}.*divisor of batch_size, which is {size}"):
        RunConfig.from_parameters(batch_size=size, processes=processes)


def test_the_number_of_processes_must_be_the_settings(monkeypatch):
    two, one = RunConfig.from_parameters(processes=2), RunConfig.from_parameters()
    assert must_launch(two) and not must_launch(one)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not must_launch(two)
    for config in (one, RunConfig.from_parameters(processes=4)):
        with pytest.raises(ConfigError, match=r"but 2 were started together; set processes=2"):
            must_launch(config)


# Training


@pytest.fixture(scope="module")
def base(base):
    windows = {"shots": 0.4, "epochs": 3, "accumulation": 2}
    return settings_of(base, **windows, eval_splits=["val"], probe_every=2, diagnostics_every=2)


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_two_processes_train_as_one_does(base, prepared, tmp_path):
    found = {}
    for processes in (1, 2):
        config = settings_of(base, processes=processes)
        found[processes] = train_run(config, prepared, tmp_path / str(processes))
    one, two = tmp_path / "1", tmp_path / "2"
    assert found[1]["updates"] == found[2]["updates"] and found[1].keys() == found[2].keys()
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    for name in ("history.jsonl", "diagnostics.jsonl"):
        rows = rows_of(one / name), rows_of(two / name)
        assert len(rows[0]) == len(rows[1]) > 1
        for alone, together in zip(*rows, strict=True):
            assert alone.keys() == together.keys()
            for key in alone:
                assert together[key] == pytest.approx(alone[key], rel=1e-3, abs=5e-5), (name, key)
    weights = [load_file(folder / "student" / "model.safetensors") for folder in (one, two)]
    for name, value in weights[0].items():
        if not name.endswith(("classifier.bias", "key.bias")):  # a softmax does not see them: rounding alone
            assert_close(weights[1][name], value, rtol=1e-3, atol=1e-4, msg=name)
    tables = [pd.read_parquet(folder / "predictions.parquet") for folder in (one, two)]
    assert tables[0]["id"].tolist() == tables[1]["id"].tolist()
    assert_close(*(tables[i]["probability"].to_numpy() for i in (1, 0)), rtol=0, atol=1e-4)
    records = [pd.read_parquet(folder / "selections.parquet") for folder in (one, two)]
    assert records[0]["step"].tolist() == records[1]["step"].tolist()


@pytest.mark.slow
def test_a_killed_process_ends_all_and_together_they_continue(base, prepared, tmp_path):
    """Without a teacher: the test above has one."""
    changes = {"checkpoint_every": 2, "epochs": 6, "diagnostics_every": 0, "probe_every": 0}
    config = apply_arm(settings_of(base, arm="finetune", processes=2, **changes))
    folder, home = tmp_path / "run", checkpoints_of(tmp_path / "run")

    def kill_one() -> None:
        until = time.monotonic() + 300
        while not any(home.glob("step-*")) and time.monotonic() < until:
            time.sleep(0.02)
        _training(tmp_path)[-1].kill()

    killer = Thread(target=kill_one)
    killer.start()
    with pytest.raises(RuntimeError):
        train_run(config, prepared, folder)
    killer.join()
    assert not folder.exists() and not _training(tmp_path)
    train_run(config, prepared, folder)
    resumed = json.loads((folder / "environment.json").read_text())["resumed_after_updates"]
    assert len(resumed) == 1 and resumed[0] >= 2 and not home.parent.exists()
    train_run(settings_of(config, processes=1, checkpoint_every=0), prepared, tmp_path / "alone")
    rows = rows_of(folder / "history.jsonl"), rows_of(tmp_path / "alone" / "history.jsonl")
    assert len(rows[0]) == len(rows[1])
    for together, alone in zip(*rows, strict=True):
        assert together == pytest.approx(alone, rel=1e-3, abs=5e-5)


def _training(folder: Path) -> list[psutil.Process]:
    """The processes that train into a run folder below ``folder``, without the one that started them."""
    every = [p for p in psutil.process_iter() if str(folder / "run") in " ".join(_command(p))]
    return [p for p in every if "torch.distributed.run" not in _command(p)]


def test_what_fills_the_cache_is_done_by_the_first_process_first(base, prepared, tmp_path, monkeypatch):
    done = []

    @contextmanager
    def first():
        yield
        done.append("the others")

    monkeypatch.setattr(training, "first_process_first", first)
    for name in ("feature_reader_of", "picture_pool", "unlabelled_examples"):
        real = getattr(training, name)
        patched = partial(lambda real, name, *given: done.append(name) or real(*given), real, name)
        monkeypatch.setattr(training, name, patched)
    training._Run(base, prepared, low_shot(prepared.train, base.shots, base.seed), tmp_path)
    assert done == ["feature_reader_of", "picture_pool", "unlabelled_examples", "the others"]


def test_own_functions_are_refused_before_anything_starts(base, prepared, tmp_path, monkeypatch):
    monkeypatch.setitem(SELECTORS, "mine", lambda scores, valid, options=None, generator=None: valid)
    monkeypatch.setattr("tdlib.training.processes._run", lambda *_args: 1 / 0)
    with pytest.raises(ConfigError, match=r"selector='mine'.*processes=2.*set processes=1"):
        train_run(settings_of(base, selector="mine", processes=2), prepared, tmp_path / "run")


@pytest.mark.slow
def test_an_error_in_a_process_comes_back_and_leaves_nothing(base, prepared, tmp_path):
    student = tmp_path / "student"
    shutil.copytree(base.student, student)
    config = settings_of(base, student=str(student), processes=2, learning_rate=1e30, epochs=4)
    with pytest.raises(
        FloatingPointError, match=r"update \d+: .* not finite, examples .*lower learning_rate"
    ):
        train_run(config, replace(prepared, config=config), tmp_path / "run")  # of the same encoder
    assert sorted(os.listdir(tmp_path)) == ["student"]
    assert not [p for p in psutil.process_iter() if str(tmp_path) in " ".join(_command(p))]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.mark.slow
def test_the_processes_end_with_the_one_that_started_them(base, tmp_path):
    (tmp_path / "config.json").write_text(settings_of(base, processes=2, epochs=10_000).model_dump_json())
    code = (
        "import sys; from pathlib import Path; from tdlib.config import RunConfig; import json\n"
        "from tdlib.training.processes import launch\n"
        "config = RunConfig.from_parameters(**json.loads(Path(sys.argv[1]).read_text()))\n"
        "launch(config, Path(sys.argv[2]), Path(sys.argv[3]))"
    )
    given = [str(tmp_path / "config.json"), str(tmp_path / "run"), str(experiments.CACHE_ROOT)]
    starter = subprocess.Popen(
        [sys.executable, "-c", code, *given], env=os.environ | {"PYTHONPATH": str(ROOT)}
    )

    def workers() -> list[psutil.Process]:
        # the processes that train are those with a number; torchrun ends when they have ended
        every = [p for p in psutil.process_iter() if str(tmp_path / "run") in " ".join(_command(p))]
        return [p for p in every if p.pid != starter.pid]

    try:
        until = time.monotonic() + 240
        while len(workers()) < 3 and time.monotonic() < until:  # torchrun and two
            assert starter.poll() is None
            time.sleep(0.5)
        assert len(workers()) >= 3
    finally:
        starter.kill()
        starter.wait()
    until = time.monotonic() + 120
    while workers() and time.monotonic() < until:
        time.sleep(0.5)
    assert workers() == []
