"""Kernels, workers, runners and nodes are killed: each run is made once, and its result is the same."""

import json
from importlib.util import find_spec
from pathlib import Path
from threading import Thread

import pandas as pd
import psutil
import pytest
from batch_helpers import command, kill, make_batch, results_of, running, states_of, wait_for, wait_until_left

from tdlib.core.paths import ConfigError
from tdlib.runs import states as run_states
from tdlib.runs.batch import Batch

pytestmark = pytest.mark.usefixtures("no_orphans")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    batch = make_batch(tmp_path_factory.mktemp("undisturbed"), grid={"a": [2]}, parameters={"seconds": 0.7})
    batch.run()
    return results_of(batch)


@pytest.mark.parametrize(
    ("victim", "cell"),
    [
        ("worker", False), ("kernel", True), ("runner and worker", True),
        *(
            pytest.param(*victim, marks=pytest.mark.slow)
            for victim in [
                ("runner", False), ("runner and worker", False), ("runner", True), ("worker", True),
            ]
        ),
    ],
)  # fmt: skip
def test_whoever_is_killed_the_run_is_made_once_and_is_the_same(tmp_path, undisturbed, victim, cell):
    batch = make_batch(tmp_path, grid={"a": [2]}, parameters={"seconds": 0.7})
    (run,) = batch.plan.runs
    runner = command(batch, "run")
    wait_for(running(batch, cell))
    worker = psutil.Process(run_states.recorded_state(batch.folder_of(run))["pid"])
    kill(victim, runner=psutil.Process(runner.pid), worker=worker)
    runner.communicate()
    wait_until_left(batch, run)
    assert states_of(batch)[0] in (["lost"] if victim == "runner and worker" else ["killed"])
    text = command(batch, "run").communicate()[0]
    assert "left alone: 1 " in text and "`tdlib batch resume` executes them again" in text, text
    assert list(batch.resume()["state"]) == ["done"]
    assert results_of(batch) == undisturbed
    assert batch.states()[run.id]["attempt"] == 2


@pytest.fixture(scope="module")
def training(world, teacher_folder, student_folder):
    """Parameters of the template that trains: 40 updates, a checkpoint after each."""
    return {
        "data_dir": str(world), "teacher": f"local-dir:{teacher_folder}", "student": str(student_folder),
        "shots": 0.5, "epochs": 20, "batch_size": 10, "selector": "sample", "shift": "",
        "probe_examples": 1, "checkpoint_every": 1,
    }  # fmt: skip


@pytest.fixture(scope="module")
def trained(training, tmp_path_factory):
    batch = make_batch(tmp_path_factory.mktemp("trained"), template="04_distill", parameters=training)
    batch.run()
    return output_of(batch)


def output_of(batch: Batch) -> Path:
    (run,) = batch.plan.runs
    return batch.folder_of(run) / "output" / "clip_td-seed0"


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["runner", "kernel", "runner and worker and kernel"])
def test_a_training_that_is_killed_in_a_batch_goes_on_from_its_checkpoint(
    tmp_path, training, trained, victim
):
    batch = make_batch(tmp_path, template="04_distill", parameters=training)
    (run,) = batch.plan.runs
    runner = command(batch, "run")
    wait_for(lambda: list(output_of(batch).parent.glob(".checkpoints/*/step-*")), 120)
    worker = psutil.Process(run_states.recorded_state(batch.folder_of(run))["pid"])
    kill(victim, runner=psutil.Process(runner.pid), worker=worker)
    runner.communicate()
    wait_until_left(batch, run)
    assert not output_of(batch).exists()
    assert list(batch.resume()["state"]) == ["done"]
    around = json.loads((output_of(batch) / "environment.json").read_text())
    assert 0 < around["resumed_after_updates"][0] < 40
    for name in ("student/model.safetensors", "history.jsonl", "manifest.json"):
        assert (output_of(batch) / name).read_bytes() == (trained / name).read_bytes(), name
    for name in ("predictions.parquet", "selections.parquet"):
        pd.testing.assert_frame_equal(
            pd.read_parquet(output_of(batch) / name), pd.read_parquet(trained / name), check_exact=True
        )


# A cluster.

ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install '.[ray]'")


def test_without_ray_its_engine_says_what_to_install(tmp_path):
    if find_spec("ray") is not None:
        pytest.skip("Ray is installed")
    with pytest.raises(ConfigError, match=r"clip-td-workbench\[ray\]"):
        make_batch(tmp_path).run("ray")


@ray
@pytest.mark.parametrize("cell", [False, True])
@pytest.mark.parametrize("victim", ["task", "worker", "kernel", "task and worker and kernel"])
def test_whoever_is_killed_on_ray_the_run_is_made_once(tmp_path, undisturbed, victim, cell):
    batch = make_batch(tmp_path, grid={"a": [2]}, parameters={"seconds": 0.7}, retries=1)
    (run,) = batch.plan.runs

    killed = []

    def strike() -> None:
        wait_for(running(batch, cell))
        worker = psutil.Process(run_states.recorded_state(batch.folder_of(run))["pid"])
        killed.extend(kill(victim, task=worker.parent(), worker=worker))

    thread = Thread(target=strike)
    thread.start()
    table = batch.run("ray", num_cpus=1)
    thread.join()
    assert list(table["state"]) == ["done"] and results_of(batch) == undisturbed
    if cell or victim != "kernel":  # else its kernel may not have been there yet
        assert killed and list(table["attempt"]) == [2]


@ray
def test_a_batch_survives_the_loss_of_a_node(tmp_path, monkeypatch):
    from ray.cluster_utils import Cluster

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)  # its nodes say that they have one
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 1})
    node = cluster.add_node(num_cpus=1, num_gpus=1)
    try:
        batch = make_batch(
            tmp_path, grid={"a": [1, 2, 3]}, parameters={"seconds": 3.0}, retries=2,
            resources={"cpus": 1, "gpus": 1},
        )  # fmt: skip

        def lose() -> None:
            wait_for(lambda: states_of(batch).count("running") == 2)
            cluster.remove_node(node, allow_graceful=False)

        thread = Thread(target=lose)
        thread.start()
        table = batch.run("ray", address=cluster.address)
        thread.join()
        assert list(table["state"]) == ["done"] * 3
        assert set(table["gpus"]) == {"0"} and max(table["attempt"]) == 2
    finally:
        cluster.shutdown()
