"""The project holds together: dependencies agree, imports keep to their fences, notebooks to their form.

Each rule is a function from source text to a list of problems, so that the tests show it both silent on
the project and loud on a planted violation.
"""

import ast
import importlib.metadata
import importlib.util
import io
import os
import pkgutil
import re
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from papermill import inspect_notebook

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
LOCKED = [*PROJECT["dependencies"], *EXTRAS["dev"], *EXTRAS["regions"]]
SOURCES = sorted((ROOT / "tdlib").rglob("*.py"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


# Dependencies: pyproject.toml is the source, requirements.lock and environment.yml follow.


def locked() -> dict[str, Requirement]:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    by_name = {canonicalize_name(requirement.name): requirement for requirement in requirements}
    assert len(by_name) == len(requirements), "requirements.lock names a package twice"
    return by_name


def locked_version(requirement: Requirement) -> str:
    (specifier,) = requirement.specifier
    assert specifier.operator == "==" and "*" not in specifier.version, f"not exact: {requirement}"
    return specifier.version


def test_environment_yml_installs_the_project_with_all_extras():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    (python,) = [d for d in environment["dependencies"] if isinstance(d, str) and d.startswith("python=")]
    (pip,) = [d["pip"] for d in environment["dependencies"] if isinstance(d, dict)]

    assert SpecifierSet(PROJECT["requires-python"]).contains(python.removeprefix("python="))
    assert environment["channels"] == ["conda-forge"]
    assert pip == ["-e .[all]"], "dependencies belong in pyproject.toml only"
    (everything,) = map(Requirement, EXTRAS["all"])
    assert everything.name == PROJECT["name"] and everything.extras == set(EXTRAS) - {"all"}
    assert set(EXTRAS) == {"dev", "ray", "regions", "all"}


def test_the_lock_satisfies_each_direct_dependency():
    lock = locked()
    for wanted in map(Requirement, LOCKED):
        pinned = lock.get(canonicalize_name(wanted.name))
        assert pinned is not None, f"{wanted.name} is not in requirements.lock: run `make lock`"
        assert wanted.specifier.contains(locked_version(pinned)), f"{pinned} misses {wanted}: run `make lock`"


def test_the_lock_is_exact_and_without_addresses():
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert not re.search(r"://|@ |--", lock)
    for requirement in locked().values():
        assert locked_version(requirement) and requirement.url is None


def needed_on_linux() -> Iterator[tuple[str, Requirement]]:
    """Every (dependent, requirement) reachable from pyproject on the platform that the lock was made on."""
    platform = default_environment() | {
        "python_version": "3.11",
        "python_full_version": "3.11.7",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
    }
    todo = [("pyproject.toml", Requirement(line)) for line in LOCKED]
    seen = set()
    while todo:
        dependent, requirement = todo.pop()
        extras = requirement.extras or {""}
        yield dependent, requirement
        visit = {(canonicalize_name(requirement.name), extra) for extra in extras} - seen
        seen |= visit
        for name, extra in visit:
            for child in map(Requirement, importlib.metadata.requires(name) or []):
                if child.marker is None or child.marker.evaluate(platform | {"extra": extra}):
                    todo.append((name, child))


def test_the_lock_holds_all_that_is_needed_and_nothing_else():
    lock = locked()
    installed = {
        canonicalize_name(package.name): package.version for package in importlib.metadata.distributions()
    }
    if any(installed.get(name) != locked_version(pinned) for name, pinned in lock.items()):
        pytest.skip("this environment was not installed from requirements.lock for Linux")
    needed = set()
    for dependent, requirement in needed_on_linux():
        name = canonicalize_name(requirement.name)
        needed.add(name)
        assert name in lock, f"{name}, needed by {dependent}, is not locked: run `make lock`"
        assert requirement.specifier.contains(locked_version(lock[name]), prereleases=True), dependent
    assert set(lock) == needed, "locked without need: run `make lock` in a fresh .venv"


def test_every_locked_package_takes_the_oldest_python_that_the_project_takes():
    """A patch version counts: Debian 12 has Python 3.11.2."""
    (oldest,) = SpecifierSet(PROJECT["requires-python"])
    for name, pinned in locked().items():
        try:
            found = importlib.metadata.metadata(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform
        if found["Version"] == locked_version(pinned):
            wanted = SpecifierSet(found["Requires-Python"] or "")
            assert wanted.contains(f"{oldest.version}.0"), f"{pinned} needs Python {wanted}"


# Floors: a package imports from those before it in this list, and never from those after it.

FLOORS = [
    "core", "method", "arms", "config", "data", "miniworld", "teacher", "regions", "students", "training",
    "runs", "analysis", "views", "make", "cli",
]  # fmt: skip

WITH_TORCH = {"tdlib.analysis.masking", "tdlib.analysis.knowledge"}  # ask a student


@pytest.mark.parametrize("package", ["runs", "analysis", "cli"])
def test_tables_batches_and_commands_open_at_once(package):
    names = [
        path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        for path in SOURCES
        if path.relative_to(ROOT / "tdlib").parts[0].removesuffix(".py") == package
    ]
    wanted = [name for name in names if name not in WITH_TORCH]
    assert wanted
    source = (
        f"import importlib, sys\nfor name in {wanted}: importlib.import_module(name)\n"
        "heavy = {'torch', 'torchvision', 'transformers', 'open_clip', 'matplotlib'}\n"
        "assert not heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", source], check=True, cwd=ROOT)


# Fences: which library may be imported where.

FENCES = {
    "open_clip": ["teacher/*.py", "make/*.py"],
    "transformers": ["students/*.py", "training/*.py", "make/*.py"],
    "papermill": ["runs/notebook.py", "runs/worker.py"],
    "ray": ["runs/engines.py", "cli.py"],
    "ipywidgets": ["views/widgets.py", "views/controls.py"],
    "anywidget": ["views/controls.py"],
    "matplotlib": ["views/figures/*.py"],
}
METHOD_MAY_IMPORT = {"torch", "jaxtyping", "tdlib.method", *sys.stdlib_module_names}


def imported(source: str, file: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of each import in a file (given relative to tdlib/), at any depth of the code."""
    package = ["tdlib", *Path(file).parts[:-1]]
    for node in ast.walk(ast.parse(source, file)):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                base = package[: len(package) - level + 1] if level else []
                origin = ".".join([*base, module] if module else base)
                yield from ((node.lineno, f"{origin}.{alias.name}") for alias in names)
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield node.lineno, name


def fence_problems(source: str, file: str) -> list[str]:
    problems = []
    for line, name in imported(source, file):
        allowed = FENCES.get(name.split(".")[0])
        if allowed is not None and not any(fnmatch(file, pattern) for pattern in allowed):
            problems.append(f"tdlib/{file}:{line} imports {name}; allowed only in {', '.join(allowed)}")
        outside_method = not any(name == root or name.startswith(f"{root}.") for root in METHOD_MAY_IMPORT)
        if file.startswith("method/") and outside_method:
            problems.append(f"tdlib/{file}:{line} imports {name}; the method knows only torch")
    return problems


def upward(source: str, file: str) -> set[tuple[str, str]]:
    """Imports of a file (given relative to tdlib/) from a higher floor, as file and module."""
    here = FLOORS.index(Path(file).parts[0].removesuffix(".py"))
    modules = {name.rpartition(".")[0] for _, name in imported(source, file) if name.startswith("tdlib.")}
    return {
        (file, module)
        for module in modules
        if module != "tdlib" and FLOORS.index(module.split(".")[1]) > here
    }


def test_style_is_checked_in_every_module():
    command = [sys.executable, "-m", "ruff", "check", "--show-files"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {str(path) for path in SOURCES} <= {*shown.splitlines()}


def test_imports_go_downward_and_keep_to_their_fences():
    found = set()
    for path in SOURCES:
        file, source = path.relative_to(ROOT / "tdlib").as_posix(), path.read_text(encoding="utf-8")
        found |= {*fence_problems(source, file)}
        if file != "__init__.py":
            found |= upward(source, file)
    assert found == set()


def test_an_import_from_a_higher_floor_is_noticed():
    assert upward("def f():\n    from tdlib.training import run", "data/vcr.py") == {
        ("data/vcr.py", "tdlib.training")
    }
    assert not upward("from tdlib.core.files import write_json", "data/vcr.py")


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("teacher/cache.py", "def f():\n    from transformers.models import bert"),
        ("regions/computed.py", "import open_clip"),
        ("teacher/cache.py", "import importlib\nimportlib.import_module('ray')"),
        ("data/vcr.py", "import matplotlib.pyplot as plt"),
        ("method/losses.py", "import numpy as np"),
        ("method/losses.py", "from tdlib.teacher.cache import Cache"),
        ("method/losses.py", "from tdlib import config"),
    ],
)
def test_the_fences_notice_a_trespass(file, source):
    assert len(fence_problems(source, file)) == 1


def test_shapes_of_the_method_are_checked_at_run_time_under_pytest():
    for path in sorted((ROOT / "tdlib" / "method").glob("[!_]*.py")):
        spec = importlib.util.find_spec(f"tdlib.method.{path.stem}")
        assert type(spec.loader).__name__ == "_JaxtypingLoader", f"{path}: imported before conftest's hook"
        source = path.read_text(encoding="utf-8")
        assert "from __future__ import annotations" not in source, f"{path}: this turns the checks off"


# Notebooks.


def parameter_problems(source: str) -> list[str]:
    """What would confuse papermill or the reader in a cell tagged `parameters`."""
    lines = source.splitlines()
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    commented = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
    problems = []
    for statement in ast.parse(source).body:
        line = lines[statement.lineno - 1]
        match statement:
            case ast.AnnAssign(target=ast.Name(), value=ast.expr() as value):
                try:
                    ast.literal_eval(value)
                except ValueError:
                    problems.append(f"not a literal: {line}")
            case _:
                problems.append(f"not `name: type = literal  # meaning`: {line}")
        if statement.lineno != statement.end_lineno or line.count("=") != 1:
            problems.append(f"not one line with one '=': {line}")
        if statement.lineno not in commented:
            problems.append(f"no comment with meaning, unit or choices: {line}")
    return problems


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@each_notebook
def test_a_notebook_has_one_cell_of_parameters_that_papermill_understands(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert cell.cell_type == "code"
    assert not parameter_problems(cell.source)
    names = [statement.target.id for statement in ast.parse(cell.source).body]
    assert names and list(inspect_notebook(str(path))) == names, "papermill reads other parameters"


@pytest.mark.parametrize(
    "source",
    [
        "seed = 0  # an unannotated one",
        "seed: int  # without a value",
        "seed: int = 1 + len('a')  # not a literal",
        "seed: int = 0",
        "seed: int = 0  # the default, seed=0",
        "seeds: list = [  # over\n    0,  # several lines\n]",
        "import torch  # not a parameter",
    ],
)
def test_a_bad_parameter_is_noticed(source):
    assert parameter_problems("shots: int = 8  # examples per label\n" + source)


@each_notebook
def test_a_notebook_is_stripped_and_leaves_code_to_the_library(path):
    for number, cell in enumerate(code_cells(nbformat.read(path, as_version=4)), start=1):
        where = f"{path.name}, code cell {number}"
        assert not cell.outputs and cell.execution_count is None, f"{where}: run `make format`"
        assert "sys.path" not in cell.source, f"{where}: import from the installed tdlib"
        plain = re.sub(r"^(\s*)[%!].*", r"\1pass", cell.source, flags=re.MULTILINE)
        classes = [n.name for n in ast.walk(ast.parse(plain, where)) if isinstance(n, ast.ClassDef)]
        assert not classes, f"{where}: classes belong in tdlib"


# The root files.


def make(*arguments: str) -> str:
    # Under `make test` the outer make's flags would reach this one.
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))
    }
    done = subprocess.run(["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_make_help_describes_every_target_and_is_the_default():
    listed = dict(re.findall(r"^ +make (\w+) +(\S.*)$", make("help"), flags=re.MULTILINE))
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert {"run", "test", "lab", "lint", "types", "bench", "clean", "lock"} <= set(listed)
    assert set(listed) == set(targets)
    assert make() == make("help")


def test_running_a_notebook_changes_nothing_that_git_tracks(tmp_path):
    """The filter that `make` sets up, in a repository of its own."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    (command,) = set(re.findall(r"git config filter\.notebook\.clean '(.*)' 2>", make("-n", "lab")))
    git("init", "-q")
    git("config", "filter.notebook.clean", command)
    (tmp_path / ".venv").symlink_to(Path(sys.executable).parents[1])
    (tmp_path / ".gitattributes").write_bytes((ROOT / ".gitattributes").read_bytes())
    (tmp_path / "notebooks").mkdir()
    path = tmp_path / "notebooks" / "04_distill.ipynb"
    path.write_bytes((ROOT / "notebooks" / path.name).read_bytes())
    git("add", "notebooks")
    committed = git("show", f":notebooks/{path.name}")
    assert committed == (ROOT / "notebooks" / path.name).read_text(encoding="utf-8")
    notebook = nbformat.read(path, as_version=4)
    for number, cell in enumerate(code_cells(notebook), start=1):
        cell.execution_count = number
        cell.outputs = [nbformat.v4.new_output("stream", text="seen")]
    notebook.metadata.language_info = {  # as JupyterLab writes it
        "codemirror_mode": {"name": "ipython", "version": 3}, "file_extension": ".py", "version": "3.12.0",
        "mimetype": "text/x-python", "name": "python", "nbconvert_exporter": "python",
        "pygments_lexer": "ipython3",
    }  # fmt: skip
    notebook.metadata.kernelspec.display_name = "Python 3 (ipykernel)"
    nbformat.write(notebook, path)
    assert git("diff", "--name-only") == ""
    code_cells(notebook)[1].source += "\nchanged = True"
    nbformat.write(notebook, path)
    assert git("diff", "--name-only") == f"notebooks/{path.name}\n", "a change of the source is one"


INDEX_ADDRESS = re.compile(
    r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|conda\.anaconda\.org|npmjs\.org|"
    r"--(?:extra-)?index-url|--find-(?:links)"
)


def test_no_file_names_a_package_index():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: nothing tells the project's files from others")
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    paths = [ROOT / file for file in files if file and (ROOT / file).is_file()]
    assert ROOT / "pyproject.toml" in paths
    naming = [p for p in paths if INDEX_ADDRESS.search(p.read_text(encoding="utf-8", errors="ignore"))]
    assert naming == []


# Pages: what a README points to is there.

PAGES = [ROOT / place / "README.md" for place in (".", "data", "data/models", "reports", "notebooks/batches")]
COMMITTED = ("notebooks/", "tdlib/", "tests/", "data/models/", "reports/figures/", "reports/studies/")


def dead_ends(text: str, folder: Path) -> list[str]:
    """Links and paths of committed places that lead nowhere, and names in ``tdlib`` that nothing has."""
    spans = re.findall(r"`([^`\n]+)`", text)
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    paths = [span for span in spans if span.startswith(COMMITTED) and re.fullmatch(r"[\w./-]+", span)]
    dead = [link for link in links if not (folder / link).exists()]
    dead += [path for path in paths if not (ROOT / path).exists()]
    names = re.findall(r"\b(tdlib(?:\.\w+)+)", " ".join(spans))
    modules = re.findall(r"-m (tdlib(?:\.\w+)*)", text)
    return dead + [name for name in names + modules if not is_name(name)]


def is_name(dotted: str) -> bool:
    try:
        pkgutil.resolve_name(dotted)
    except (ImportError, AttributeError):
        return False
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_what_a_page_points_to_is_there(page):
    assert dead_ends(page.read_text(encoding="utf-8"), page.parent) == []


@pytest.mark.parametrize(
    "text",
    [
        "![figure](reports/studies/none.png)",
        "`reports/studies/none/index.html`",
        "`tdlib.arms.NONE`",
        "python -m tdlib.none FOLDER",
    ],
)
def test_a_dead_end_is_noticed(text):
    assert len(dead_ends(text, ROOT)) == 1
