"""The command line and the notebooks, executed for real on tiny models and a tiny world."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import nbformat
import pytest

from notebooks import execute
from tdlib.cli import main
from tdlib.config import RunConfig
from tdlib.core.paths import ROOT, ConfigError
from tdlib.data.tasks import TASKS
from tdlib.runs.notebook import run_notebook
from tdlib.runs.template import read_template
from tdlib.training.run import compare

NOTEBOOKS = ROOT / "notebooks"


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def tdlib(capfd, monkeypatch) -> Callable[..., Done]:
    """The command, called in this process; what kernels say is caught too."""
    monkeypatch.chdir(ROOT)

    def call(*arguments: str) -> Done:
        capfd.readouterr()
        try:
            status = main(list(arguments))
        except SystemExit as end:
            status = int(end.code or 0)
        return Done(status, *capfd.readouterr())

    return call


@pytest.fixture(scope="module")
def tiny(world, teacher_folder, student_folder):
    return {
        "data_dir": str(world), "teacher": f"local-dir:{teacher_folder}", "student": str(student_folder),
        "shots": 2, "epochs": 1,
    }  # fmt: skip


def arguments_of(parameters: dict) -> list[str]:
    return [word for name, value in parameters.items() for word in ("-p", name, json.dumps(value))]


class _Resources(HTMLParser):
    """Every address that a page would load by itself."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            loads = name == "src" or (tag == "link" and name == "href")
            if loads and value and not value.startswith("data:"):
                self.found.append(f"{tag} {value}")


def test_start_here_tells_the_whole_story(tdlib, tiny, tmp_path):
    parameters = tiny | {"seeds": [0, 1], "runs_dir": str(tmp_path / "runs")}
    asked = ("run", "00_start_here", "--folder", str(tmp_path / "page"), *arguments_of(parameters))
    done = tdlib(*asked)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "page") in done.stdout and str(tmp_path / "runs") in done.stdout
    runs = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert runs == sorted(
        f"{arm}-seed{seed}" for arm in ("finetune", "clip_td", "clip_td_repaired") for seed in (0, 1)
    )
    executed = nbformat.read(tmp_path / "page" / "00_start_here.ipynb", as_version=4)
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    assert {output.output_type for output in outputs} == {"display_data", "execute_result"}, "no stray words"
    said = [output["data"].get("text/markdown") or output["data"]["text/plain"] for output in outputs]
    assert "6 of 6 runs are there, 6 of them trained now" in said[0]
    assert "**Not significant at this size**" in said[1] and said[2].startswith("Figure 1. ")
    captions = [re.match(r"(Figure|Table) (\d+)\. ", text) for text in said]
    for kind in ("Figure", "Table"):
        numbers = [int(found[2]) for found in captions if found and found[1] == kind]
        assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) > 3
    shown = " ".join(output["data"].get("text/html", "") for output in outputs)
    lifts = re.findall(r">([\d.]+)</td>", re.search(r">lift</th>.*?</table>", shown, re.DOTALL)[0])
    assert {int(n) for n in lifts[1::3]} == {8 * 2}, "right answers of as many questions of two tests"
    assert not re.search(r"[ >\[]nan\b", re.sub(r'"data:[^"]*"', "", shown))
    text = (tmp_path / "page" / "00_start_here.html").read_text(encoding="utf-8")
    page = _Resources()
    page.feed(text)
    assert not page.found, "the page must not load anything"
    assert text.count('<details class="code">') == sum(cell.cell_type == "code" for cell in executed.cells)
    anchors = re.findall(r'href="#([^"]+)"', re.search(r"<nav.*?</nav>", text, re.DOTALL)[0])
    assert len(anchors) > 5 and all(f'<h2 id="{anchor}"' in text for anchor in anchors)

    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*")}
    assert tdlib(*asked).returncode == 0
    assert written == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*")}
    again = nbformat.read(tmp_path / "page" / "00_start_here.ipynb", as_version=4)
    assert any("0 of them trained now" in str(cell.get("outputs")) for cell in again.cells)


@pytest.mark.parametrize("task", ["vcr", "snli_ve", "vqa_v2"])
def test_template_runs_every_task_by_one_parameter(tdlib, tiny, worlds, task, own_cache, tmp_path):
    arm = "naive" if task == "vcr" else "clip_td"
    parameters = tiny | {
        "task": task, "data_dir": str(worlds[task]), "runs_dir": str(tmp_path / "runs"), "shots": 0.3,
        "probe_examples": 1, "submission": True, "arm": arm, "seed": 3,
    }  # fmt: skip
    if task == "vcr":
        done = tdlib("run", "04_distill", "--folder", str(tmp_path / "page"), *arguments_of(parameters))
        assert done.returncode == 0, done.stderr
    else:
        execute("04_distill", **parameters)
    folder = tmp_path / "runs" / f"{arm}-seed3"
    config = json.loads((folder / "config.json").read_text())
    assert (config["selector"], config["seed"]) == ("all" if task == "vcr" else "nucleus", 3)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert len(metrics["accuracy"]) >= 2  # the usual test and a shifted one
    assert task != "vcr" or set(metrics["accuracy"]) == {"val", "val_shortcut"}
    assert (folder / metrics["submission"]).stat().st_size > 0


def test_data_notebook_shows_every_task(tiny, worlds, own_cache, tmp_path):
    parameters = {
        "tasks": ["snli_ve"], "data_dir": str(worlds["snli_ve"]), "student": tiny["student"],
        "control_epochs": 1, "runs_dir": str(tmp_path / "runs"),
    }  # fmt: skip
    execute("02_data", **parameters)
    assert len(list((tmp_path / "runs").iterdir())) == 3  # what both, text and picture tell


@pytest.mark.parametrize("task", ["vcr_qa", "snli_ve", "vqa_v2"])
@pytest.mark.parametrize(
    ("notebook", "small"),
    [
        ("02_teacher", {"variants": ["value"], "measured": 4}),
        ("03_students", {"pictures": 4, "questions": 30, "policies": ["nucleus"]}),
        ("06_targeting", {"measured": 4, "masked": 2, "policies": ["nucleus"], "shots": 0.3, "epochs": 1}),
    ],
)
def test_notebooks_show_every_kind_of_task(tiny, worlds, own_cache, tmp_path, notebook, small, task):
    named = {"tasks": [task]} if notebook == "06_targeting" else {"task": task}
    own = {"students": [tiny["student"]]} if notebook == "03_students" else {"student": tiny["student"]}
    parameters = {"data_dir": str(worlds[TASKS[task].data_set]), "teacher": tiny["teacher"]}
    execute(notebook, **parameters, **named, **own, **small, runs_dir=str(tmp_path / "runs"))


def test_the_method_and_a_run_are_shown_token_by_token(tiny, tmp_path, own_cache):
    config = RunConfig.from_parameters(**tiny, probe_examples=2, probe_every=1)
    compare(config, ["clip_td", "clip_td_repaired"], [0], tmp_path)
    execute("05_tokens", runs=[str(tmp_path)])
    common = {name: tiny[name] for name in ("data_dir", "teacher", "student")}
    execute("01_method", **common, selector="sample")
    with pytest.raises(ConfigError, match="expected a task whose examples have choices"):
        execute("01_method", task="snli_ve", teacher=tiny["teacher"], student=tiny["student"])


def test_data_check_lists_problems_and_says_so_by_its_status(tdlib, worlds, tmp_path):
    done = tdlib("data", "check", str(worlds["snli_ve"]), "--decode")
    assert done.returncode == 0 and "dev_shortcut" in done.stdout, done.stdout + done.stderr
    broken = shutil.copytree(worlds["snli_ve"], tmp_path / "broken")
    lines = (broken / "snli_ve_dev.jsonl").read_text().splitlines()
    lines[1], lines[3] = lines[1][:50], lines[2]
    (broken / "snli_ve_dev.jsonl").write_text("\n".join(lines) + "\n")
    done = tdlib("data", "check", str(broken))
    assert done.returncode == 1
    assert "snli_ve_dev.jsonl:2:" in done.stdout and "snli_ve_dev.jsonl:4:" in done.stdout
    nothing = tdlib("data", "check", str(tmp_path / "nowhere"))
    assert nothing.returncode == 1 and "no data set there" in nothing.stderr


def test_data_check_counts_what_a_teacher_cuts(tdlib, worlds, teacher_folder, tmp_path):
    folder = shutil.copytree(worlds["snli_ve"], tmp_path / "snli_ve")
    lines = (folder / "snli_ve_dev.jsonl").read_text().splitlines()
    record = json.loads(lines[4])
    lines[4] = json.dumps(record | {"sentence2": "A person waits there. " * 30})
    (folder / "snli_ve_dev.jsonl").write_text("\n".join(lines) + "\n")
    done = tdlib("data", "check", str(folder), "--teacher", f"local-dir:{teacher_folder}")
    told = [line for line in done.stdout.splitlines() if "beyond the teacher's context" in line]
    assert done.returncode == 0
    assert len(told) == 1 and f"1 of {len(lines)} examples" in told[0]
    assert str(record["pairID"]) in told[0]
    done = tdlib("data", "check", str(folder), "--teacher", "ViT-Nothing")
    assert done.returncode == 1 and "ViT-Nothing" in done.stderr


def own_notebook(folder: Path, *sources: str) -> Path:
    """The training template's parameters, and other cells behind them."""
    notebook = nbformat.read(NOTEBOOKS / "04_distill.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    notebook.cells = cells + [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(notebook, folder / "own.ipynb")
    return folder / "own.ipynb"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("data", "check", "FOLDER", "--split", "dev"), "--split: without effect for"),
        (
            ("data", "check", "FILE", "--decode", "--teacher", "RN50"),
            "--decode, --teacher: without effect for",
        ),
        (("batch", "run", "smoke", "--address", "auto"), "--address: without effect with"),
        (("batch", "run", "smoke", "--engine", "ray", "--gpus", ""), "--gpus: without effect with"),
        (("batch", "retry", "smoke", "abc", "--failed"), "either --failed, or the ids of runs"),
        (("batch", "retry", "smoke"), "either --failed, or the ids of runs"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(command, said, tdlib, tmp_path):
    (tmp_path / "mine.jsonl").touch()
    paths = {"FOLDER": str(tmp_path), "FILE": str(tmp_path / "mine.jsonl")}
    done = tdlib(*(paths.get(word, word) for word in command))
    assert done.returncode == 1 and said in done.stderr


def test_failing_cell_fails_the_command_and_leaves_no_folder(tdlib, tmp_path):
    notebook = own_notebook(tmp_path, 'raise ValueError("no good")')
    done = tdlib("run", str(notebook), "--folder", str(tmp_path / "page"))
    assert done.returncode == 1
    assert "ValueError: no good" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "page").exists()
    assert (tmp_path / "page-failed.ipynb").is_file()


def test_data_that_are_not_there_are_found_before_a_kernel_starts(tdlib, tmp_path):
    given = ["-p", "data_dir", str(tmp_path / "nowhere"), "-p", "arm", "clip_dt"]
    done = tdlib("run", "04_distill", "--folder", str(tmp_path / "page"), *given)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"there is no {tmp_path / 'nowhere'}" in done.stderr and "did you mean 'clip_td'?" in done.stderr
    assert not list(tmp_path.iterdir()), "no kernel was started"


def test_a_page_replaces_no_folder_but_its_predecessor(tdlib, tmp_path):
    notebook = own_notebook(tmp_path, "raise ValueError(runs_dir)")
    page = tmp_path / "page"
    page.mkdir()

    def began(folder: Path = page, runs: Path = tmp_path / "runs") -> bool:
        before = sorted(path for path in tmp_path.rglob("*") if path.name != "page-failed.ipynb")
        done = tdlib("run", str(notebook), "--folder", str(folder), "-p", "runs_dir", str(runs))
        after = sorted(path for path in tmp_path.rglob("*") if path.name != "page-failed.ipynb")
        assert done.returncode == 1 and before == after
        return "ValueError" in done.stderr or str(folder) not in done.stderr

    assert not began(folder=tmp_path), "the notebook is in it"
    for runs in (page, page / "runs", tmp_path):
        assert not began(runs=runs), runs
    (page / "own.ipynb").write_text("{}")
    assert not began(), "a notebook of that name is no page"
    (page / "own.html").write_text("")
    (page / "notes.md").write_text("mine")
    assert not began()
    (page / "notes.md").unlink()
    (page / ".ipynb_checkpoints").mkdir()
    assert began()


def test_killed_kernel_is_a_failure(tdlib, tmp_path):
    notebook = own_notebook(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    done = tdlib("run", str(notebook), "--folder", str(tmp_path / "page"))
    assert done.returncode == 1 and "kernel" in done.stderr
    assert not (tmp_path / "page").exists()


def test_a_run_that_was_not_run_as_asked_fails(tdlib, tmp_path):
    own = 'from tdlib.method.selection import SELECTORS\nSELECTORS["mine"] = SELECTORS["all"]\n'
    own += 'selector = str("mine")  # no literal: only the run can tell'
    config = (
        "from pathlib import Path\nfrom tdlib.config import RunConfig\n"
        "config = RunConfig.from_notebook(globals())\n"
        'Path(runs_dir).mkdir()\n(Path(runs_dir) / "config.json").write_text(config.model_dump_json())'
    )
    notebook = own_notebook(tmp_path, own, config)
    runs = ["-p", "runs_dir", str(tmp_path / "runs"), "--folder", str(tmp_path / "page")]
    done = tdlib("run", str(notebook), "-p", "selector", "nucleus", *runs)
    assert done.returncode == 1 and "selector: planned 'nucleus', run with 'mine'" in done.stderr
    assert not (tmp_path / "page").exists() and (tmp_path / "page-failed.ipynb").is_file()
    shutil.rmtree(tmp_path / "runs")
    done = tdlib("run", str(notebook), "-p", "selector", "mine", *runs)
    assert done.returncode == 0, done.stderr
    assert "encrypt" not in done.stdout + done.stderr and "\r" not in done.stderr, "a log is no terminal"


def test_help_lists_notebooks_and_their_parameters(tdlib):
    every = tdlib("run", "--help").stdout
    assert "04_distill" in every and "Training template: one student" in every
    one = tdlib("run", "04_distill", "--help").stdout
    for known in read_template(NOTEBOOKS / "04_distill.ipynb").parameters.values():
        assert f"  {known.name} " in one and known.comment in one
    assert tdlib("run", "04_distil", "--help").returncode == 1


def test_the_version_is_told():
    done = subprocess.run([sys.executable, "-m", "tdlib.cli", "--version"], capture_output=True, text=True)
    assert re.fullmatch(r"tdlib \d+\.\d+\.\d+(, commit \S+)?\n", done.stdout)


def test_a_parameter_that_is_given_twice_is_refused(tdlib):
    done = tdlib("run", "04_distill", "-p", "seed", "1", "-p", "seed", "2")
    assert done.returncode == 1 and "-p seed: given twice, as '1' and as '2'" in done.stderr


def test_unknown_notebook_names_the_known_ones():
    with pytest.raises(ConfigError, match="00_start_here"):
        run_notebook(NOTEBOOKS / "missing.ipynb", ROOT / "reports" / "missing", {})
    assert not (ROOT / "reports" / "missing").exists()


def test_template_defaults_are_the_library_defaults():
    declared = read_template(NOTEBOOKS / "04_distill.ipynb").defaults
    defaults = RunConfig().model_dump()
    shared = {name: value for name, value in declared.items() if name in defaults}
    assert len(shared) >= 25
    assert shared == {name: defaults[name] for name in shared}


def test_world_command_writes_readable_data(tdlib, tmp_path):
    from tdlib.data.vcr import VcrReader

    done = tdlib("world", "vcr", str(tmp_path / "vcr"), "--seed", "3", "--pictures", "40")
    assert done.returncode == 0, done.stderr
    assert VcrReader(tmp_path / "vcr", "train").read()
    done = tdlib("world", "curated", str(tmp_path / "captions"), "--pictures", "3")
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "captions" / "captions.jsonl").read_text().splitlines()
    assert len(lines) == 3
    assert all((tmp_path / "captions" / json.loads(line)["image"]).is_file() for line in lines)
    for wrong in (("--pictures", "0"), ("--pictures", "-3"), ("--seed", "-1")):
        done = tdlib("world", "vcr", str(tmp_path / "none"), *wrong)
        assert done.returncode == 2 and "expected a number from" in done.stderr
        assert not (tmp_path / "none").exists()
    shutil.rmtree(tmp_path / "captions")
