"""Running a batch: what is done is not repeated, and limits, failures and orders to stop are kept."""

import errno
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from textwrap import indent

import nbformat
import pytest
import torch
from batch_helpers import RESULT, command, make_batch, results_of, states_of, wait_for, write_template

from tdlib.cli import main
from tdlib.core.files import write_json
from tdlib.core.paths import ROOT, ConfigError
from tdlib.runs import states as run_states
from tdlib.runs.batch import BEGIN
from tdlib.runs.engines import ELSEWHERE, LocalEngine, RayEngine, RayWorker
from tdlib.runs.runner import Runner, specification
from tdlib.runs.worker import _failure_of

pytestmark = pytest.mark.usefixtures("no_orphans")
FULL = """\
import errno, os
replace = os.replace
def full(source, target, **options):
    if os.path.exists(os.environ["TDLIB_TEST_FULL"]):
        raise OSError(errno.ENOSPC, "No space left on device")
    return replace(source, target, **options)
os.replace = full
"""


@pytest.fixture
def full_disk(quick_start, tmp_path, monkeypatch) -> Iterator[Path]:
    """A file: while it is there, the disk is full to every process that the test starts."""
    (quick_start / "sitecustomize.py").write_text(FULL)
    monkeypatch.setenv("TDLIB_TEST_FULL", str(tmp_path / "full"))
    yield tmp_path / "full"
    (quick_start / "sitecustomize.py").unlink()


def test_what_is_done_is_not_repeated_and_what_changed_is_not_reused(tmp_path):
    batch = make_batch(tmp_path, grid={"a": [1]})
    batch.run()
    (first,) = batch.plan.runs
    (state,) = batch.states().values()
    assert state["state"] == "done"
    before = results_of(batch)
    again = make_batch(tmp_path, grid={"a": [1]})
    assert list(again.run()["attempt"]) == list(again.resume()["attempt"]) == [1]
    assert again.states()[first.id]["started"] == state["started"]
    # a changed parameter and a changed template are other runs
    assert states_of(make_batch(tmp_path, grid={"a": [1, 2]})) == ["done", "queued"]
    write_template(tmp_path, RESULT.replace("a / 4", "a / 2"))
    changed = make_batch(tmp_path, grid={"a": [1]})
    assert states_of(changed) == ["queued"]
    assert list(changed.run()["accuracy.val"]) == [0.5]
    assert results_of(batch).items() > before.items(), "the older run is as it was"
    # a result that was truncated later is made again, and is the same
    metrics = batch.folder / first.id / "output" / "a1-seed0" / "metrics.json"
    metrics.write_text(metrics.read_text()[:10])
    assert states_of(batch) == ["lost"] and "accuracy.val" not in batch.table()
    write_template(tmp_path)
    assert list(batch.resume()["attempt"]) == [2]
    assert before.items() <= results_of(batch).items()
    assert (batch.folder / first.id / "attempt-1" / "state.json").is_file()


def test_the_same_run_of_another_batch_is_taken_over_if_it_is_whole(tmp_path):
    first = make_batch(tmp_path, grid={"a": [1, 2, 3]}, name="first")
    first.run()
    one, two, three = first.plan.runs
    damaged = first.folder / one.id / "output" / "a1-seed0" / "metrics.json"
    damaged.write_text(damaged.read_text()[:10])
    second = make_batch(tmp_path, grid={"a": [1, 2, 4]}, name="second")
    second.run()
    assert states_of(second) == ["done"] * 3
    begun = (second.folder / "begun.txt").read_text().split()
    assert sorted(begun) == sorted(run.id for run in second.plan.runs if run.id != two.id)
    assert second.states()[two.id]["adopted_from"] == str(first.folder / two.id)
    taken = {name: value for name, value in results_of(second).items() if name.startswith(two.id)}
    assert taken.items() <= results_of(first).items() and len(taken) == 2
    assert not (second.folder / three.id).exists()


def test_a_command_is_judged_by_the_runs_that_it_was_asked_for(tmp_path, capsys):
    batch = make_batch(tmp_path, grid={"a": [1, 2, 3]})
    done, failed, _ = batch.plan.runs
    for run, state in ((done, "done"), (failed, "failed")):
        batch.folder_of(run).mkdir(parents=True)
        (batch.folder_of(run) / "parameters.json").write_text(json.dumps({"parameters": run.parameters}))
        run_states.write_state(batch.folder_of(run), {"state": state, "files": {}})

    def status(*words: str) -> int:
        action, *more = words
        return main(["batch", action, str(batch.file), *more, "--folder", str(batch.reports)])

    assert status("run", "-w", "a", "1") == status("resume", "-w", "a", "1") == status("retry", done.id) == 0
    assert status("run", "-w", "a", "[1, 2]") == status("status") == 1
    run_states.write_state(batch.folder_of(failed), {"state": "done", "files": {}})
    assert status("retry", "--failed") == status("status") == 0
    assert "queued" in states_of(batch)


def test_a_part_of_a_batch_can_be_run_by_itself(tmp_path):
    batch = make_batch(tmp_path, grid={"a": [1, 2, 4]}, parameters={"mode": "150"}, seeds=[0, 5])
    like = ["-w", "a", "[1, 4]", "-w", "seed", "5", "-w", "mode", "150"]
    assert command(batch, "run", *like).wait(120) == 0
    done = [run.overrides for run in batch.plan.runs if batch.states()[run.id]["state"] == "done"]
    assert done == [{"seed": 5, "a": 1, "mode": "150"}, {"seed": 5, "a": 4, "mode": "150"}]
    with pytest.raises(ConfigError, match=r"\{'a': 3\}: no run of small is like that"):
        batch.run(where={"a": 3})
    with pytest.raises(ConfigError, match=r"\{'a': 3, 'seed': 5\}: no run of small .*a is 1, 2, 4"):
        batch.run(where={"a": [1, 3], "seed": 5})


def test_a_template_that_changes_between_plan_and_start_is_noticed(tmp_path):
    batch = make_batch(tmp_path)
    write_template(tmp_path, "pass")
    table = batch.run()
    assert table["state"][0] == "failed" and "template changed since" in table["reason"][0]


def test_a_full_disk_harms_nothing_that_is_written(tmp_path, full_disk):
    batch = make_batch(tmp_path, include=[{"a": 2}, {"mode": "fill"}, {"a": 4}])
    runner = command(batch, "run", "--cpus", "1")
    text = runner.communicate()[0]
    assert runner.returncode == 1 and "No space left" in text
    assert states_of(batch) == ["done", "lost", "queued"]
    before = results_of(batch)
    full_disk.unlink()
    assert list(batch.resume(cpus=1)["state"]) == ["done"] * 3
    assert before.items() <= results_of(batch).items()
    begun = (batch.folder / "begun.txt").read_text().split()
    assert [begun.count(run.id) for run in batch.plan.runs] == [1, 2, 1]


def test_a_worker_that_breaks_before_its_first_state_says_why(tmp_path, quick_start):
    (quick_start / "sitecustomize.py").write_text("import sys\nsys.modules['psutil'] = None\n")
    try:
        (reason,) = make_batch(tmp_path).run()["reason"]
    finally:
        (quick_start / "sitecustomize.py").unlink()
    assert "ended with status 1" in reason and "import of psutil halted" in reason, reason


def test_after_an_order_to_stop_nothing_is_started(tmp_path):
    batch = make_batch(tmp_path, grid={"a": [1, 2]})
    runner = Runner(batch.plan, batch.folder, LocalEngine(), BEGIN, batch.plan.runs, lambda: None)
    runner.interrupts = 1
    runner.run()
    assert not batch.folder.exists()


class Elsewhere:
    """A worker that found its run's lock taken, by somebody who only looked at it."""

    def ended(self) -> bool:
        return True

    def ending(self) -> str:
        return ELSEWHERE


def test_a_worker_that_a_look_at_its_run_has_kept_out_starts_again(tmp_path):
    class Engine(LocalEngine):
        begun = 0

        def start(self, *given):
            self.begun += 1
            return Elsewhere() if self.begun == 1 else super().start(*given)

    batch = make_batch(tmp_path)
    assert list(batch.run(Engine())["state"]) == ["done"]


def test_a_run_that_another_runner_has_done_meanwhile_is_left_to_it(tmp_path):
    class Engine(LocalEngine):
        begun, folder = 0, None

        def start(self, folder, *_):
            """Another runner, whose lock cannot be seen here, was faster."""
            assert not self.begun
            self.begun, self.folder = self.begun + 1, folder
            state = {"state": "running", "host": "another", "heartbeat": time.time()}
            run_states.write_state(folder, state)
            return Elsewhere()

        def has_room(self, _):
            if self.folder:
                run_states.write_state(self.folder, {"state": "done", "files": {}})
            return True

    batch, engine = make_batch(tmp_path), Engine()
    assert list(batch.run(engine)["state"]) == ["done"] and engine.begun == 1


def test_a_task_that_breaks_on_its_node_says_why():
    engine = RayEngine.__new__(RayEngine)

    class Ray:
        def get(self, task):
            raise RuntimeError("Traceback\n  ...\nModuleNotFoundError: No module named 'tdlib'")

    engine.ray = Ray()
    assert "No module named 'tdlib'" in RayWorker(engine, Path(), None).ending()


def test_two_runners_execute_each_run_once(tmp_path):
    batch = make_batch(tmp_path, grid={"a": [1, 2, 3]}, parameters={"seconds": 0.3})
    runners = [command(batch, "run", "--cpus", "1") for _ in range(2)]
    texts = [runner.communicate()[0] for runner in runners]
    assert states_of(batch) == ["done"] * 3, texts
    begun = (batch.folder / "begun.txt").read_text().split()
    assert sorted(begun) == sorted(run.id for run in batch.plan.runs), texts


def test_folders_and_values_may_hold_any_sign(tmp_path):
    home = tmp_path / "x {a} 'q' \"é\" [v] %s"
    said = 'it\'s "{mode}" \\ \n é'
    batch = make_batch(home, grid={"mode": [said]})
    assert list(batch.run()["state"]) == ["done"], batch.table()["reason"][0]
    (run,) = batch.plan.runs
    assert nbformat.read(batch.folder_of(run) / "notebook.ipynb", 4) and run.parameters["mode"] == said
    assert batch.open(run.id).is_file()


def test_kernels_are_of_this_python_and_need_no_short_temporary_folder(tmp_path, monkeypatch):
    other = tmp_path / "jupyter" / "kernels" / "python3"
    other.mkdir(parents=True)
    spec = {"argv": ["/bin/false", "{connection_file}"], "display_name": "of mine", "language": "python"}
    (other / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    (tmp_path / ("long" * 20)).mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("long" * 20)))
    batch = make_batch(tmp_path)
    assert list(batch.run()["state"]) == ["done"], batch.table()["reason"][0]


SHARED = """\
data = bytearray(os.urandom(2**20)) * 300
for _ in range(3):
    if not os.fork():
        time.sleep(2)
        os._exit(0)
time.sleep(1.5)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell what processes share")
def test_memory_that_processes_share_counts_once(tmp_path):
    write_template(tmp_path, f"if a > 1:\n{indent(SHARED, '    ')}\n{RESULT}")
    batch = make_batch(tmp_path, grid={"a": [2]}, resources={"memory": "800MB"})
    assert list(batch.run()["state"]) == ["done"], batch.table()["reason"][0]
    batch = make_batch(tmp_path, grid={"a": [2]}, resources={"memory": "400MB"}, parameters={"seed": 1})
    table = batch.run()
    assert table["state"][0] == "killed" and "more than its limit" in table["reason"][0]


def test_torch_s_words_for_a_full_disk_are_known():
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    with pytest.raises(RuntimeError) as error:
        torch.save(torch.zeros(10**6), "/dev/full")
    found = _failure_of(error.value)
    assert found["state"] == "killed" and found["reason"].startswith("the disk is full: RuntimeError")
    assert _failure_of(RuntimeError("unexpected shape"))["state"] == "failed"


def test_a_reader_that_has_read_enough_and_a_folder_that_cannot_be_written_end_without_a_traceback(
    tmp_path, monkeypatch, capsys
):  # fmt: skip
    batch = make_batch(tmp_path)
    words = [sys.executable, "-m", "tdlib.cli", "batch", "plan", str(batch.file)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as plan:
        plan.stdout.close()
        assert "Error" not in plan.stderr.read()

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied", "/there/batch.json")

    monkeypatch.setattr("tdlib.runs.batch.write_json", refuse)
    assert main(["batch", "run", str(batch.file), "--folder", str(batch.reports)]) == 1
    assert "/there/batch.json: Permission denied" in capsys.readouterr().err


def test_a_worker_whose_run_was_taken_over_leaves_it_to_the_other(tmp_path):
    batch = make_batch(tmp_path, parameters={"seconds": 60.0})
    (run,) = batch.plan.runs
    runner = command(batch, "run")
    wait_for((batch.folder / "begun.txt").exists)
    folder = batch.folder_of(run)
    write_json(folder / "parameters.json", specification(batch.plan, run, 2))
    theirs = {"state": "running", "host": "another", "heartbeat": time.time(), "attempt": 2}
    run_states.write_state(folder, theirs)
    wait_for(lambda: not run_states.processes(folder), 30)
    runner.communicate(timeout=30)
    assert run_states.recorded_state(folder)["attempt"] == 2


def test_a_time_limit_ends_a_run(tmp_path):
    batch = make_batch(tmp_path, parameters={"seconds": 600.0}, resources={"time": "3s"}, retries=1)
    batch.run()
    (state,) = batch.states().values()
    assert (state["state"], state["attempt"]) == ("timed_out", 1) and "3 s" in state["reason"]
    assert list(batch.resume()["attempt"]) == [1], "resume leaves it, retry would not"


def test_retries_repeat_what_was_killed_but_not_what_failed(tmp_path):
    batch = make_batch(tmp_path, include=[{"mode": "die"}, {"mode": "raise"}], retries=1)
    batch.run(cpus=2)
    assert [(state["state"], state["attempt"]) for state in batch.states().values()] == [
        ("killed", 2), ("failed", 1),
    ]  # fmt: skip


def test_a_run_that_failed_is_tried_again_on_request(tmp_path):
    batch = make_batch(tmp_path, parameters={"mode": "raise"})
    (run,) = batch.plan.runs
    batch.folder_of(run).mkdir(parents=True)
    run_states.write_state(batch.folder_of(run), {"state": "failed", "attempt": 1})
    assert list(batch.resume()["attempt"]) == list(batch.run()["attempt"]) == [1]
    batch.retry()
    (state,) = batch.states().values()
    assert (state["state"], state["attempt"]) == ("failed", 2)
    with pytest.raises(ConfigError, match="no such run"):
        batch.retry(["zzz"])


@pytest.mark.parametrize("how", ["cancel", "twice", "once"])
def test_cancel_and_ctrl_c_leave_nothing_behind(tmp_path, how):
    batch = make_batch(tmp_path, grid={"a": [1, 2]}, parameters={"seconds": 60.0})
    runner = command(batch, "run", "--cpus", "1")
    wait_for((batch.folder / "begun.txt").exists)
    if how == "cancel":
        assert batch.cancel() == []
    else:
        runner.send_signal(signal.SIGINT)
        if how == "twice":
            time.sleep(0.1)
            runner.send_signal(signal.SIGINT)
    text = runner.communicate(timeout=30)[0]
    assert runner.returncode == 1 and "Traceback" not in text, text
    assert states_of(batch) == ["killed", "queued"]
    assert not any(run_states.processes(batch.folder_of(run)) for run in batch.plan.runs)
