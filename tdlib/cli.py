"""The command ``tdlib``: run a notebook, or a batch, as experiments; write the MiniWorld; check data."""

# Slow imports stand in the command that needs them, after its first line is printed: a command that says
# nothing for seconds looks stuck.
import argparse
import errno
import importlib.metadata
import json
import os
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tdlib.core.files import at_least, parse_value
from tdlib.core.paths import ROOT, ConfigError
from tdlib.data.examples import DataError
from tdlib.method.registry import table_keys

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tdlib.data.examples import Example
    from tdlib.runs.batch import Batch
    from tdlib.runs.plan import PlannedRun

FIRST = "00_start_here"
_NO_FAULT_OF_OURS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)


def pairs_of(pairs: list[tuple[str, str]], option: str) -> dict[str, str]:
    """Makes a dict of a repeatable option; a name that is given twice is refused, as one would be lost."""
    for number, (name, text) in enumerate(pairs):
        earlier = [other for taken, other in pairs[:number] if taken == name]
        if earlier:
            raise ConfigError(f"{option} {name}: given twice, as {earlier[0]!r} and as {text!r}; keep one")
    return dict(pairs)


def refuse_unused(options: argparse.Namespace, names: "Sequence[str]", where: str) -> None:
    """Refuses options that mean nothing here: one that is ignored looks as if it had been followed."""
    if given := [f"--{name}" for name in names if getattr(options, name) not in (None, False)]:
        raise ConfigError(f"{', '.join(given)}: without effect {where}")


# One notebook.


def _run(options: argparse.Namespace) -> int:
    if options.help:
        named = options.notebook
        options.parser.epilog = parameters_help(named) if named else notebooks_help()
        options.parser.print_help()
        return 0
    from tdlib.runs.notebook import NotebookFailed, run_notebook
    from tdlib.runs.template import find_notebook, read_template

    path = find_notebook(options.notebook or FIRST, Path.cwd())
    template = read_template(path)
    texts = pairs_of(options.parameters, "-p")
    parameters = {name: template.from_text(name, text) for name, text in texts.items()}
    folder = Path(options.folder) if options.folder else ROOT / "reports" / path.stem
    try:
        page = run_notebook(path, folder.resolve(), parameters)
    except NotebookFailed as error:
        print(f"tdlib run: {error}", file=sys.stderr)
        return 1
    print(f"page:      {page}\nnotebook:  {page.with_suffix('.ipynb')}")
    runs = ROOT / str((template.defaults | parameters).get("runs_dir", ""))
    if runs != ROOT:
        print(f"runs:      {runs} ({len(list(runs.glob('*/metrics.json')))} folders)")
    return 0


def notebooks_help() -> str:
    """Lists the notebooks, a line each: name and title."""
    lines = ["notebooks (`tdlib run NAME --help` lists a notebook's parameters):"]
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        words = "".join(cells[0]["source"]).strip().splitlines() if cells else []
        lines.append(f"  {path.stem:<16} {words[0].lstrip('# ') if words else ''}")
    return "\n".join(lines)


def parameters_help(name: str) -> str:
    """Lists a notebook's parameters with their defaults and comments."""
    from tdlib.runs.template import find_notebook, read_template

    template = read_template(find_notebook(name, Path.cwd()))
    lines = [f"parameters of {name}, each set by -p NAME VALUE:"]
    for parameter in template.parameters.values():
        kind = parameter.kind or parameter.annotation
        lines.append(f"  {parameter.name:<22} {kind:<6} {parameter.source}")
        if parameter.comment:
            lines.append(f"{'':>32}{parameter.comment}")
    return "\n".join(lines)


# Data.


def _world(options: argparse.Namespace) -> int:
    print(f"writing {options.kind}, {options.pictures} pictures, seed {options.seed} ...", flush=True)
    from tdlib.miniworld import writers

    folder, seed, pictures = Path(options.folder), options.seed, options.pictures
    if options.kind in writers.WORLDS:
        writers.WORLDS[options.kind](folder, seed, writers.Size.of(pictures))
    else:
        writers.write_captions(folder, options.kind, seed, pictures)
    print(folder.resolve())
    return 0


def _check(options: argparse.Namespace) -> int:
    print(f"checking {options.path} ...", flush=True)
    from tdlib.data.check import check_folder, check_submission

    path = Path(options.path)
    if path.is_file():
        refuse_unused(options, ["decode", "teacher"], f"for {path}, which is a file; it is for folders")
        problems = check_submission(path, Path(options.data or path.parent), options.split or "")
        print(f"{path}: {f'{len(problems)} problems' if problems else 'ok'}")
        for problem in problems:
            print(f"  - {problem}")
        return int(bool(problems))
    refuse_unused(options, ["data", "split"], f"for {path}, whose every split is checked; it is for a file")
    bad = 0
    look = _count_cut_texts(options.teacher) if options.teacher else None
    for report in check_folder(path, options.decode, look):
        verdict = f"{len(report.problems)} problems" if report.problems else "ok"
        print(f"{report.task:<10} {report.split:<24} {report.examples:>8,} examples  {verdict}", flush=True)
        for note in report.notes:
            print(f"  {note}")
        for problem in report.problems:
            print(f"  - {problem}")
        bad += len(report.problems)
    return int(bad > 0)


def _count_cut_texts(teacher: str) -> "Callable[[Sequence[Example]], list[str]]":
    """Makes a check that counts the texts of a split that a teacher cuts; needs its tokenizer, no weights."""
    from tdlib.teacher.probe import count_cut
    from tdlib.teacher.text import open_tokenizer
    from tdlib.teacher.towers import TeacherError

    try:
        tokenize = open_tokenizer(teacher)
    except TeacherError as error:
        raise ConfigError(str(error)) from None

    def look(examples: "Sequence[Example]") -> list[str]:
        cut = count_cut(examples, lambda text: tokenize.read(text).cut)
        return [str(cut)] if cut.cut_examples else []

    return look


def _mask(options: argparse.Namespace) -> int:
    print(f"masking {options.shift} by the student of {options.folder} ...", flush=True)
    from tdlib.training.masked_sets import write_masked

    print(write_masked(Path(options.folder), options.shift))
    return 0


# Batches.


def _batch(options: argparse.Namespace) -> int:
    """Executes a command of ``tdlib batch``; returns 0 if all runs that it was asked for are done."""
    from tdlib.runs.batch import Batch, find_batch

    print(f"batch {options.action}: reading {find_batch(options.file)}", file=sys.stderr, flush=True)
    reports = Path(options.folder) if options.folder else None
    resources = pairs_of(getattr(options, "resources", []), "-r")
    batch = Batch(options.file, reports=reports, resources=resources)
    if options.action == "plan":
        return _plan(batch, options)
    if options.action == "open":
        print(f"jupyter lab {shlex.quote(str(batch.open(options.run)))}")
        return 0
    if options.action == "cancel":
        running = batch.cancel()
        print(
            f"still running: {', '.join(running)}" if running else f"{batch.plan.name}: nothing runs any more"
        )
        return int(bool(running))
    if options.action == "status" and batch.problems and (batch.folder / "batch.json").is_file():
        return _recorded_status(batch)
    batch.check()
    if options.action == "best":
        return _best(batch, options)
    asked = [run.id for run in (batch.plan.runs if options.action == "status" else _execute(batch, options))]
    from tdlib.runs.report import summary

    states = batch.states()
    print(summary(batch.plan, states, batch.file, batch.folder))
    if options.action == "status":
        for note in batch.done_otherwise():
            print(f"note: {note}")
    if page := batch.write_reports():
        print(f"page: {page}")
    good = {"done", "queued", "running"} if options.action == "status" else {"done", "running"}
    return int(any(states[run]["state"] not in good for run in asked))


def _recorded_status(batch: "Batch") -> int:
    """Says how the runs stand of a batch whose file has mistakes by now, or names files of other machines."""
    from tdlib.runs.report import batch_record, summary
    from tdlib.runs.states import current_state

    states = {run: current_state(batch.folder / run) for run in batch_record(batch.folder)["runs"]}
    print(summary(batch.plan, states, batch.file, batch.folder))
    problems = "".join(f"\n  - {problem}" for problem in batch.problems)
    print(f"as it was started last; no page was written, because {batch.file} has mistakes:{problems}")
    return 1


def _execute(batch: "Batch", options: argparse.Namespace) -> "list[PlannedRun]":
    """Executes runs of a batch; returns those that were asked for, by which the command is judged."""
    engine: dict[str, Any]
    if options.engine == "ray":
        refuse_unused(options, ["cpus", "gpus"], "with --engine ray, which asks its cluster")
        engine = {"address": options.address or ""}
    else:
        refuse_unused(options, ["address"], f"with --engine {options.engine}; it is for ray")
        engine = {"cpus": options.cpus}
        if options.gpus is not None:
            engine["gpus"] = [gpu for gpu in options.gpus.split(",") if gpu]
    if options.action == "retry":
        if bool(options.failed) == bool(options.runs):
            raise ConfigError("say what to try again: either --failed, or the ids of runs")
        asked = batch.to_retry(options.runs)  # before they are executed: then they have other states
        batch.retry(options.runs, options.engine, **engine)
        return asked
    where = _where(batch, options)
    (batch.run if options.action == "run" else batch.resume)(options.engine, where, **engine)
    return batch.like(where)


def _where(batch: "Batch", options: argparse.Namespace) -> dict[str, Any]:
    """Reads the values of ``-w``; a list means any of them, also where the parameter holds text."""
    from tdlib.runs.template import read_template

    template, where = read_template(batch.plan.template), {}
    for name, text in pairs_of(options.where, "-w").items():
        value = parse_value(text, name)
        where[name] = value if isinstance(value, list) else template.from_text(name, text)
    return where


def _best(batch: "Batch", options: argparse.Namespace) -> int:
    from tdlib.analysis.scores import ProtocolError
    from tdlib.analysis.tuning import CONTEXT, rank_settings, write_tuned
    from tdlib.runs.report import batch_record

    try:
        table = rank_settings(batch.folder, options.split, options.uneven)
        file = write_tuned(batch.folder, table)
    except (ProtocolError, FileNotFoundError) as error:
        print(f"tdlib batch: {error}", file=sys.stderr)
        return 1
    print(table.to_string(index=False, na_rep="", float_format="{:.4g}".format))
    ranked = batch_record(batch.folder)["runs"]
    if new := [run.id for run in batch.plan.runs if run.id not in ranked]:
        print(
            f"note: {len(new)} of the {len(batch.plan.runs)} runs that {options.file} has are not in "
            "this ranking, which is of the batch as it was started last: file, code or data have changed"
        )
    beyond = table[table["edge"] != ""]
    for row in beyond.to_dict("records"):
        where = " ".join(str(row[name]) for name in table if name in CONTEXT)
        print(f"at the edge of what was tried, so that better may lie beyond: {where} {row['edge']}")
    print(f"chosen: {file}; a batch file takes it with tuned: {batch.plan.name}")
    return 0


def _plan(batch: "Batch", options: argparse.Namespace) -> int:
    from tdlib.runs.engines import LocalEngine

    if batch.problems:
        print(f"{batch.file}: {len(batch.problems)} problems", file=sys.stderr)
        for problem in batch.problems:
            print(f"  - {problem}", file=sys.stderr)
        return 1
    where, engine = _where(batch, options), LocalEngine()
    table = batch.planned(where)
    wanted = batch.plan.resources
    print(table.drop(columns=["expected_seconds", "unlike"]).to_string(index=False))
    undone = table[table["state"] != "done"]
    repeated = f" ({batch.plan.repeated} described twice)" if batch.plan.repeated else ""
    print(f"\n{len(table)} runs{repeated}, {len(undone)} of them not done")
    seconds = undone["expected_seconds"].dropna()
    if len(seconds):
        at_once = engine.at_once(wanted)
        hours = max(seconds.max(), seconds.mean() * len(undone) / at_once) / 3600
        unlike = sorted({name for names in undone["unlike"] for name in names})
        but = f", which had other {', '.join(unlike)}" if unlike else ""
        print(f"about {hours:.2g} hours here, {at_once} at once (from the durations of earlier runs{but})")
    elif len(undone):
        print("no hours yet: no run of this notebook is finished here")
    for problem in engine.check(wanted):
        print(f"not on this machine: {problem}")
    told = dict.fromkeys(note for run in batch.like(where) for note in run.notes)
    for note in [*told, *batch.done_otherwise()]:
        print(f"note: {note}")
    return 0


# The parser.


def version() -> str:
    """Returns the package's version, with the commit if the project is a checkout."""
    from tdlib.core.provenance import git_version

    number, commit = importlib.metadata.version("clip-td-workbench"), git_version()
    return f"{number}, commit {commit}" if commit else number


class _Version(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        print(f"tdlib {version()}")
        parser.exit()


_PAIR: Any = {"nargs": 2, "action": "append", "default": [], "metavar": ("NAME", "VALUE")}


def _add_batch(commands: Any) -> None:
    actions = commands.add_parser("batch", help="plan and run a batch of experiments").add_subparsers(
        dest="action", required=True
    )
    texts = {
        "plan": "list the runs, how long they will take, and every mistake; starts nothing",
        "run": "execute what has not begun",
        "resume": "execute what has not begun, was killed or was lost",
        "retry": "execute again what failed or ran out of time",
        "best": "rank the settings of a finished batch for each arm, and keep the best for other batches",
        "status": "say how every run stands, write the page and results.parquet",
        "cancel": "stop the batch, whoever runs it",
        "open": "write a notebook with one run's parameters, to go through it in JupyterLab",
    }
    for name, text in texts.items():
        action = actions.add_parser(name, help=text, description=text)
        action.add_argument("file", help="a batch file, or its name in notebooks/batches/")
        if name == "open":
            action.add_argument("run", help="the run's id, or how it begins")
        if name == "retry":
            action.add_argument("runs", nargs="*", help="ids of runs, or how they begin")
            action.add_argument("--failed", action="store_true", help="all that failed or ran out of time")
        if name == "best":
            action.add_argument("--split", default="", help="evaluated on; default: the pictures held out")
            action.add_argument("--uneven", action="store_true", help="arms may have tried unequal numbers")
        if name in ("plan", "run", "resume"):
            action.add_argument(
                "-w", "--where", **_PAIR,
                help="only runs with this value of a parameter, or one of a list: -w shots '[12, 24]'",
            )  # fmt: skip
        if name in ("plan", "run", "resume", "retry"):
            action.add_argument(
                "-r", "--resource", dest="resources", **_PAIR,
                help="of each run, in place of the file's cpus, gpus, memory or time: -r gpus 0.25",
            )  # fmt: skip
        if name in ("run", "resume", "retry"):
            action.add_argument(
                "--engine", choices=table_keys("tdlib.runs.engines", "ENGINES"), default="local"
            )
            action.add_argument("--address", help="of the Ray cluster; one is started without")
            action.add_argument("--cpus", type=float, help="processors for all runs together (default: all)")
            action.add_argument("--gpus", help="GPUs to use, such as 0,1 (default: all)")
        action.add_argument("--folder", help="where batches' folders lie (default: reports/batches)")
        action.set_defaults(call=_batch)


def _add_run(commands: Any) -> None:
    text = "execute a notebook and write it, its page and its runs under reports/"
    run = commands.add_parser(
        "run", help=text, description=text, add_help=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    run.add_argument("notebook", nargs="?", default="", help=f"name in notebooks/, or a path ({FIRST})")
    run.add_argument("-h", "--help", action="store_true", help="this; with a notebook: its parameters")
    run.add_argument("-p", dest="parameters", **_PAIR, help="a parameter of the notebook; may be repeated")
    run.add_argument("--folder", help="where the results go (default: reports/<notebook>)")
    run.set_defaults(call=_run, parser=run)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tdlib", description=__doc__)
    parser.add_argument("--version", action=_Version, nargs=0, help="version and commit")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_run(commands)
    world = commands.add_parser("world", help="write MiniWorld data in the official formats")
    world.add_argument("kind", choices=["vcr", "snli_ve", "vqa_v2", "vqa_cp_v2", "web", "curated"])
    world.add_argument("folder")
    world.add_argument("--seed", type=partial(at_least, 0), default=0)
    world.add_argument("--pictures", type=partial(at_least, 1), default=900)
    world.set_defaults(call=_world)
    data = commands.add_parser("data", help="check a data set, make shifted sets").add_subparsers(
        required=True
    )
    check = data.add_parser(
        "check", help="validate every split in a folder, or a file for a benchmark, and list all problems"
    )
    check.add_argument("path", help="a folder, or a submission file")
    check.add_argument("--data", help="data set that a submission answers (default: the file's folder)")
    check.add_argument("--split", help="split that a submission answers (default: the test)")
    check.add_argument("--decode", action="store_true", help="also decode every picture (slow)")
    check.add_argument("--teacher", help="also count what this teacher cuts of the texts")
    check.set_defaults(call=_check)
    mask = data.add_parser("mask", help="make a masked VCR set from what a trained student leans on")
    mask.add_argument("folder", help="run folder")
    mask.add_argument("shift", choices=table_keys("tdlib.data.vcr_shifts", "MASKINGS"))
    mask.set_defaults(call=_mask)
    _add_batch(commands)
    options = parser.parse_args(arguments)
    try:
        status = options.call(options)
        sys.stdout.flush()
        return status
    except (ConfigError, DataError) as error:
        print(f"tdlib {options.command}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `tdlib batch plan NAME | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.filename is None or error.errno not in _NO_FAULT_OF_OURS:
            raise
        print(f"tdlib {options.command}: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
