"""One run as a folder: its identity, who has claimed it, how it stands, and the resources that it leases."""

import errno
import os
import shutil
import subprocess
import time

import nbformat
import pytest
from batch_helpers import RESULT, make_batch, write_template

from tdlib.core import provenance
from tdlib.core.paths import ROOT, ConfigError
from tdlib.core.provenance import code_version, executed_code
from tdlib.data import tasks
from tdlib.runs import states as run_states
from tdlib.runs.engines import GpuLeases, LocalEngine, Resources
from tdlib.runs.template import read_template
from tdlib.training import provenance as training_provenance
from tdlib.training.provenance import data_manifest


def test_an_id_changes_with_what_a_result_depends_on_and_with_nothing_else(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text("{}\n")
    model = tmp_path / "model"
    model.mkdir()
    (model / "weights").write_bytes(b"1")
    parameters = {"a": 1, "data_dir": str(data), "student": str(model), "runs_dir": "x", "interactive": False}
    template = write_template(tmp_path)

    def name(**changed) -> str:
        return run_states.identity(read_template(template), parameters | changed, "runs_dir")["id"]

    first = name()
    assert first == name(runs_dir="y", interactive=True) and first != name(a=2)
    notebook = nbformat.read(template, as_version=4)
    notebook.cells[0].source = "Other prose"
    nbformat.write(notebook, template)
    (data / "notes.txt").write_text("not data")
    assert name() == first
    for change in (
        lambda: (data / "train.jsonl").write_text("{}\n{}\n"),
        lambda: (model / "weights").write_bytes(b"2"),
        lambda: write_template(tmp_path, RESULT + "\n"),
    ):
        before = name()
        change()
        assert name() != before
    assert data_manifest({"data_dir": "", "world_seed": 3})[0][::2] == ["miniworld", 3]
    training = read_template(ROOT / "notebooks" / "04_distill.ipynb")
    code = run_states.identity(training, {})["code"]
    assert code == code_version() and not run_states.identity(read_template(template), {})["code"]


def test_files_of_regions_are_in_an_id_whatever_form_names_them(tmp_path, monkeypatch):
    parts = ["a/1.npz", "b/2.npz", "db/feat/data.mdb", "net.pth", "detector/model.safetensors"]
    files = [tmp_path / part for part in parts]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"1")
    npz, other, database, weights, detector = files
    named = {
        f"npz:{npz.parent},{other.parent}": [npz, other],
        f"lmdb:{database.parent.parent}, {npz.parent}": [database, npz],
        f"boxes:resnet50@{weights}": [weights], f"boxes+grid:resnet50@{weights}": [weights],
        f"grid:{detector.parent}": [detector],
    }  # fmt: skip
    for spec, read in named.items():
        for given in (spec, ["clip", spec]):  # notebooks list some parameters
            for file in files:
                before = data_manifest({"regions": given})
                file.write_bytes(file.read_bytes() + b"1")
                assert (data_manifest({"regions": given}) != before) == (file in read), (spec, file)
    monkeypatch.setattr(training_provenance, "ROOT", tmp_path)
    assert data_manifest({"regions": "boxes:resnet50@net.pth"})
    assert data_manifest({"student": "detector"}) and not data_manifest({"other": "detector"})


@pytest.mark.parametrize("evaluated", [{"shift": "rmtop1"}, {"eval_splits": ["val", "val_rmtop1"]}])
def test_masked_sets_are_in_an_id_by_the_words_they_mask(tmp_path, monkeypatch, evaluated):
    monkeypatch.setattr(tasks, "SHIFTED_FILES", tmp_path / "shifts")
    (tmp_path / "val.jsonl").write_text("{}\n")
    parameters = {"task": "vcr_qa", "data_dir": str(tmp_path), **evaluated}
    without = data_manifest(parameters)
    masked = tasks.generated_file(tmp_path / "val.jsonl", "rmtop1")
    masked.parent.mkdir(parents=True)
    masked.write_text('{"masked": 1}\n')
    first = data_manifest(parameters)
    assert first != without
    masked.write_text('{"masked": 2}\n')  # by another student: same settings, other words
    assert data_manifest(parameters) != first
    assert data_manifest(parameters | {"shift": "rule_plural", "eval_splits": []}) == without
    (tmp_path / "val_rmtop1.jsonl").write_text("{}\n")  # the user's own, which is read instead
    own = data_manifest(parameters)
    masked.unlink()
    assert data_manifest(parameters) == own


def test_folders_of_region_features_are_not_read_for_an_id(tmp_path, monkeypatch):
    (tmp_path / "1.npz").write_bytes(b"1")
    monkeypatch.setattr(training_provenance, "_content", lambda *_: 1 / 0)
    before = data_manifest({"regions": f"npz:{tmp_path}"})
    os.utime(tmp_path / "1.npz", ns=(1, 1))
    assert data_manifest({"regions": f"npz:{tmp_path}"}) != before


SOURCE = '"""Of a module."""\nimport math\n\n\ndef f(x):\n    """Doubles."""\n    return 2 * x  # why\n'


def test_an_id_changes_with_the_modules_that_cells_import(tmp_path, monkeypatch):
    monkeypatch.setattr("tdlib.runs.template.NOTEBOOKS", tmp_path)
    (tmp_path / "kit").mkdir()
    files = {"mine.py": "import kit.deep\n", "kit/deep.py": "from . import more\n", "kit/more.py": "A = 1\n"}
    files["ran.py"] = "A = 1\n"
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "other.py").write_text("A = 1\n")
    template = write_template(tmp_path, "%matplotlib inline\n%run -i ran.py\nfrom mine import x\n" + RESULT)

    def identity() -> dict[str, str]:
        return run_states.identity(read_template(template), {})

    first = identity()
    (tmp_path / "other.py").write_text("A = 2\n")
    (tmp_path / "mine.py").write_text("import kit.deep  # and more\n")
    assert identity() == first and not first["code"]
    for name, text in files.items():
        before = identity()
        (tmp_path / name).write_text(text + "B = 2\n")
        assert identity()["template"] != before["template"], name
    (tmp_path / "kit" / "more.py").write_text("import tdlib")
    assert identity()["code"] == code_version(), "the library counts where a module uses it"


def test_the_code_of_an_id_is_what_is_executed():
    same = ['import math\ndef f(x):\n    """Twice."""\n\n    # another reason\n    return (2 *\n  x)']
    other = [SOURCE.replace("2 * x", "3 * x"), SOURCE.replace("import math", "")]
    other.append(SOURCE.replace("2 * x", '"2 * x"'))
    assert all(executed_code(text) == executed_code(SOURCE) for text in same)
    assert len({executed_code(text) for text in [SOURCE, *other]}) == 4


def test_an_id_depends_on_the_packages_that_can_change_a_result(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "tdlib", tmp_path / "tdlib", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "tdlib" / "core" / "provenance.py"))
    before = provenance.code_version()
    packages = {path.parent.name for path in (ROOT / "tdlib").glob("*/__init__.py")}
    assert packages >= set(provenance.RESULT_PACKAGES) and {"views", "analysis", "runs", "make"} <= packages
    files = [f"{package}/__init__.py" for package in sorted(packages)]
    for file in [*files, "cli.py", "config.py", "arms.py", *provenance.NO_RESULT]:
        with (tmp_path / "tdlib" / file).open("a") as source:
            source.write("\nCHANGED = 1\n")
        matters = file.partition("/")[0].removesuffix(".py") in (
            *provenance.RESULT_PACKAGES,
            "config",
            "arms",
        )
        after = provenance.code_version()
        assert (after != before) == (matters and file not in provenance.NO_RESULT), file
        before = after


def test_a_claim_is_exclusive_and_ends_with_its_owner(tmp_path):
    lock = run_states.claim(tmp_path / "run")
    assert lock is not None and run_states.claim(tmp_path / "run") is None
    heir = subprocess.Popen(["sleep", "60"], pass_fds=[lock])
    os.close(lock)
    with run_states.claimed(tmp_path / "run") as free:
        assert not free, "a worker inherits its runner's claim"
    heir.kill()
    heir.wait()
    with run_states.claimed(tmp_path / "run") as free:
        assert free


@pytest.mark.parametrize("errno", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_ends_a_batch_with_a_word(tmp_path, monkeypatch, capsys, errno):
    def refuse(*_):
        raise OSError(errno, "No locks available")

    batch = make_batch(tmp_path)
    monkeypatch.setattr(run_states.fcntl, "flock", refuse)
    assert list(batch.run()["state"]) == ["queued"], "it would wait for ever for the lock's owner"
    assert "cannot lock files (No locks available)" in capsys.readouterr().out


def test_looking_at_runs_writes_nothing_and_keeps_nobody_from_them(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    run_states.write_state(folder, {"state": "running", "host": run_states.socket.gethostname()})
    lock = run_states.claim(folder)
    folder.chmod(0o555)
    assert run_states.current_state(folder)["state"] == "running"
    os.close(lock)
    (folder / ".lock").chmod(0o444)
    assert run_states.current_state(folder)["state"] == "lost"
    with run_states.unclaimed(folder) as free, run_states.unclaimed(folder) as too:
        assert free and too, "two may look at a time"
    folder.chmod(0o755)
    (folder / ".lock").unlink()
    assert run_states.current_state(folder)["state"] == "lost"
    assert [path.name for path in folder.iterdir()] == ["state.json"]


def test_states_that_cannot_be_true_are_lost(tmp_path):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "metrics.json").write_text("{}")
    assert run_states.current_state(tmp_path)["state"] == "queued"
    run_states.write_state(tmp_path, {"state": "running", "host": run_states.socket.gethostname()})
    assert run_states.current_state(tmp_path)["state"] == "lost"
    lock = run_states.claim(tmp_path)
    assert run_states.current_state(tmp_path)["state"] == "running"
    os.close(lock)
    elsewhere = {"state": "running", "host": "another", "heartbeat": time.time()}
    run_states.write_state(tmp_path, elsewhere)
    assert run_states.current_state(tmp_path)["state"] == "running"
    run_states.write_state(tmp_path, elsewhere | {"heartbeat": time.time() - 2 * run_states.STALE})
    assert run_states.current_state(tmp_path)["state"] == "lost"
    run_states.write_state(tmp_path, {"state": "done", "files": run_states.file_sizes(tmp_path)})
    assert "parameters.json cannot be read" in run_states.current_state(tmp_path)["reason"]
    (tmp_path / "parameters.json").write_text('{"parameters": {}}')
    assert run_states.current_state(tmp_path)["state"] == "done"
    whole = (tmp_path / "state.json").read_bytes()
    (tmp_path / "output" / "metrics.json").write_text("{")
    assert "metrics.json has 1 bytes" in run_states.current_state(tmp_path)["reason"]
    for broken in (whole[: len(whole) // 2], b"", b"3", b'{"state": "great"}'):
        (tmp_path / "state.json").write_bytes(broken)
        assert run_states.current_state(tmp_path)["state"] == "lost"


def test_a_notebook_that_was_saved_again_damages_no_run(tmp_path):
    notebook = write_template(tmp_path).rename(tmp_path / run_states.NOTEBOOK)
    (tmp_path / "parameters.json").write_text('{"parameters": {}}')
    run_states.write_state(tmp_path, {"state": "done", "files": run_states.file_sizes(tmp_path)})
    notebook.write_text(notebook.read_text() + "\n")
    assert run_states.current_state(tmp_path)["state"] == "done"
    notebook.unlink()
    assert run_states.current_state(tmp_path)["state"] == "lost"


@pytest.mark.parametrize("place", ["clip_td-seed0", "vcr/clip_td-seed0", "."])
def test_an_attempt_keeps_a_trained_student_that_was_not_evaluated(tmp_path, place):
    folder = tmp_path / "output" / place
    (folder / "student").mkdir(parents=True)
    (folder / "student" / "weights").write_bytes(b"1")
    (folder / "unevaluated.json").write_text("{}")
    other = tmp_path / "output" / "rest" / "metrics.json"
    if place != ".":
        other.parent.mkdir()
        other.write_text("{}")
    run_states.write_state(tmp_path, {"state": "failed"})
    assert run_states.clear_for_attempt(tmp_path) == 2
    assert (folder / "student" / "weights").is_file() and (folder / "unevaluated.json").is_file()
    assert not other.parent.exists()


def test_gpus_are_leased_in_parts_and_against_other_runners(tmp_path, monkeypatch):
    monkeypatch.setattr(GpuLeases, "folder", tmp_path)
    first, second = GpuLeases(["0", "1"]), GpuLeases(["0", "1"])
    assert first.take(0) == []
    assert first.take(0.5) == first.take(0.5) == ["0"], "a GPU is filled before another is opened"
    assert second.take(0.3) == ["1"] and first.take(0.5) is None and first.take(2) is None
    second.give_back(["1"], 0.3)
    assert first.take(1) == ["1"] and second.take(0.1) is None
    first.give_back(["0"], 0.5)
    assert first.take(0.6) is None and first.any_free(0.5) and first.take(0.5) == ["0"]
    assert not first.any_free(0.5) and second.any_free(0)


def test_where_no_gpu_is_free_no_run_is_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(GpuLeases, "folder", tmp_path / "gpus")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    wanted, first, second = Resources(gpus=0.5), LocalEngine(8, ["0"]), LocalEngine(8, ["0"])
    assert first.has_room(wanted) and second.has_room(wanted)
    assert first.leases.take(0.5) and first.has_room(wanted) and not second.has_room(wanted)
    assert first.leases.take(0.5) and not first.has_room(wanted)


def test_resources_that_are_not_there_are_a_mistake(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    batch = make_batch(tmp_path, resources={"cpus": 2, "gpus": 1, "memory": "900TB", "time": "1.5h"})
    assert batch.plan.resources == Resources(cpus=2, gpus=1, memory=900 * 2**40, time=5400)
    with pytest.raises(ConfigError) as error:
        batch.run(LocalEngine(cpus=1, gpus=[]))
    assert all(f"resources.{name}" in str(error.value) for name in ("cpus", "gpus", "memory"))
    engine = LocalEngine(cpus=8, gpus=["0", "1"])
    assert LocalEngine(cpus=8, gpus=["1", "1"]).gpus == ["1"]
    for wrong in ({"gpus": ["0", "7"]}, {"gpus": ["x"]}, {"cpus": float("nan")}, {"cpus": -1}):
        with pytest.raises(
            ConfigError, match=r"gpus=.*there is no [7x]; this machine has 0, 1|cpus=.*above 0"
        ):
            LocalEngine(**wrong)
    assert engine.at_once(Resources(cpus=2)) == 4 and engine.at_once(Resources(gpus=0.25)) == 8
    assert engine.at_once(Resources(gpus=2)) == 1
    assert engine.at_once(Resources(gpus=0.4)) == 4 and engine.at_once(Resources(gpus=0.6)) == 2
