"""The command ``tdlib``: run a notebook, or a batch, as experiments; write the MiniWorld; check data."""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tdlib.core.paths import ROOT, ConfigError
from tdlib.data.examples import DataError

if TYPE_CHECKING:
    from tdlib.runs.batch import Batch


def _literal(text: str) -> Any:
    """A value from the command line: JSON where it parses, else the string itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _run(options: argparse.Namespace) -> int:
    from tdlib.runs.batch import NotebookFailed, notebook_parameters, run_notebook

    name = options.notebook
    path = Path(name) if name.endswith(".ipynb") else ROOT / "notebooks" / f"{name}.ipynb"
    parameters = {key: _literal(value) for key, value in options.parameters}
    folder = Path(options.folder) if options.folder else ROOT / "reports" / path.stem
    try:
        page = run_notebook(path, folder.resolve(), parameters)
        runs = ROOT / str((notebook_parameters(path) | parameters).get("runs_dir", ""))
    except NotebookFailed as error:
        print(f"tdlib run: {error}", file=sys.stderr)
        return 1
    print(f"page:      {page}\nnotebook:  {page.with_suffix('.ipynb')}")
    if runs != ROOT:
        print(f"runs:      {runs} ({len(list(runs.glob('*/metrics.json')))} folders)")
    return 0


def _world(options: argparse.Namespace) -> int:
    from tdlib.miniworld import writers

    folder, seed, pictures = Path(options.folder), options.seed, options.pictures
    few, fewer = max(pictures // 3, 30), max(pictures // 15, 30)
    if options.kind in ("web", "curated"):
        writers.write_captions(folder, options.kind, seed, pictures)
    elif options.kind == "vcr":
        writers.write_vcr(folder, seed, writers.VcrSize(train=pictures, val=few, test=fewer))
    elif options.kind == "snli_ve":
        writers.write_snli_ve(folder, seed, writers.SnliVeSize(train=pictures, dev=few, test=fewer))
    else:
        write = writers.write_vqa if options.kind == "vqa_v2" else writers.write_vqa_cp
        write(folder, seed, writers.VqaSize(train=pictures, val=few, test=fewer))
    print(folder.resolve())
    return 0


def _check(options: argparse.Namespace) -> int:
    from tdlib.data.tasks import check_folder

    bad = 0
    for task, split, number, problems in check_folder(Path(options.folder), options.decode):
        verdict = f"{len(problems)} problems" if problems else "ok"
        print(f"{task:<10} {split:<24} {number:>8,} examples  {verdict}", flush=True)
        for problem in problems:
            print(f"  - {problem}")
        bad += len(problems)
    return int(bad > 0)


def _mask(options: argparse.Namespace) -> int:
    from tdlib.training.masked_sets import write_masked

    print(write_masked(Path(options.folder), options.shift))
    return 0


def _batch(options: argparse.Namespace) -> int:
    """Every command of ``tdlib batch``; 0 where nothing failed."""
    from tdlib.runs import report as batch_reports
    from tdlib.runs.batch import Batch

    reports = Path(options.folder) if options.folder else None
    resources = {key: _literal(value) for key, value in getattr(options, "resources", [])}
    batch = Batch(options.file, reports=reports, resources=resources)
    if options.action == "plan":
        return _plan(batch)
    if options.action == "open":
        print(f"jupyter lab {shlex.quote(str(batch.open(options.run)))}")
        return 0
    batch.check()
    if options.action == "best":
        return _best(batch, options)
    if options.action == "cancel":
        left = batch.cancel()
        print(f"still running: {', '.join(left)}" if left else f"{batch.plan.name}: nothing runs any more")
        return int(bool(left))
    if options.action != "status":
        _execute(batch, options)
    states = batch.states()
    print(batch_reports.summary(batch.plan, states, batch.file, batch.folder))
    try:
        print(f"page: {batch.write_reports()}")
    except OSError as error:
        print(f"tdlib batch: no page was written: {error}", file=sys.stderr)
    good = {"done", "queued", "running"} if options.action == "status" else {"done", "running"}
    return int(any(state["state"] not in good for state in states.values()))


def _execute(batch: "Batch", options: argparse.Namespace) -> None:
    engine: dict[str, Any] = {"cpus": options.cpus}
    if options.gpus is not None:
        engine["gpus"] = [gpu for gpu in options.gpus.split(",") if gpu]
    if options.engine == "ray":
        engine = {"address": options.address}
    if options.action == "retry":
        if not options.failed and not options.runs:
            raise ConfigError("say what to try again: --failed, or the ids of runs")
        batch.retry(options.runs, options.engine, **engine)
    else:
        where = {key: _literal(value) for key, value in options.where}
        (batch.run if options.action == "run" else batch.resume)(options.engine, where, **engine)


def _best(batch: "Batch", options: argparse.Namespace) -> int:
    from tdlib.analysis.scores import ProtocolError
    from tdlib.analysis.tuning import CONTEXT, TUNED

    try:
        table = batch.best(options.split, options.uneven)
    except (ProtocolError, FileNotFoundError) as error:
        print(f"tdlib batch: {error}", file=sys.stderr)
        return 1
    print(table.to_string(index=False, na_rep="", float_format="{:.4g}".format))
    beyond = table[table["edge"] != ""]
    for row in beyond.to_dict("records"):
        where = " ".join(str(row[name]) for name in table if name in CONTEXT)
        print(f"at the edge of what was tried, so that better may lie beyond: {where} {row['edge']}")
    print(f"chosen: {batch.folder / TUNED}; a batch file takes it with tuned: {batch.plan.name}")
    return 0


def _plan(batch: "Batch") -> int:
    from tdlib.runs.engines import LocalEngine

    if batch.problems:
        print(f"{batch.file}: {len(batch.problems)} problems", file=sys.stderr)
        for problem in batch.problems:
            print(f"  - {problem}", file=sys.stderr)
        return 1
    table, engine, wanted = batch.planned(), LocalEngine(), batch.plan.resources
    print(table.drop(columns="expected_seconds").to_string(index=False))
    left = table[table["state"] != "done"]
    repeated = f" ({batch.plan.repeated} described twice)" if batch.plan.repeated else ""
    print(f"\n{len(table)} runs{repeated}, {len(left)} of them not done")
    known = left["expected_seconds"].dropna()
    if len(known):
        at_once = engine.at_once(wanted)
        hours = known.mean() * len(left) / at_once / 3600
        print(f"about {hours:.2g} hours here, {at_once} at once (from the durations of earlier runs)")
    for problem in engine.check(wanted):
        print(f"not on this machine: {problem}")
    return 0


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
        if name in ("run", "resume"):
            action.add_argument(
                "-w", "--where", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
                help="only runs with this value of a parameter, or one of a list: -w shots '[12, 24]'",
            )  # fmt: skip
        if name in ("plan", "run", "resume", "retry"):
            action.add_argument(
                "-r", "--resource", dest="resources", nargs=2, action="append", default=[],
                metavar=("NAME", "VALUE"),
                help="of each run, in place of the file's cpus, gpus, memory or time: -r gpus 0.25",
            )  # fmt: skip
        if name in ("run", "resume", "retry"):
            action.add_argument("--engine", choices=["local", "ray"], default="local")
            action.add_argument("--address", default="", help="of the Ray cluster; one is started without")
            action.add_argument("--cpus", type=float, help="processors for all runs together (default: all)")
            action.add_argument("--gpus", help="GPUs to use, such as 0,1 (default: all)")
        action.add_argument("--folder", help="where batches' folders lie (default: reports/batches)")
        action.set_defaults(call=_batch)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tdlib", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser(
        "run", help="execute a notebook and write it, its page and its runs under reports/"
    )
    run.add_argument("notebook", nargs="?", default="00_start_here", help="name in notebooks/, or a path")
    run.add_argument("-p", dest="parameters", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    run.add_argument("--folder", help="where the results go (default: reports/<notebook>)")
    run.set_defaults(call=_run)
    world = commands.add_parser("world", help="write MiniWorld data in the official formats")
    world.add_argument("kind", choices=["vcr", "snli_ve", "vqa_v2", "vqa_cp_v2", "web", "curated"])
    world.add_argument("folder")
    world.add_argument("--seed", type=int, default=0)
    world.add_argument("--pictures", type=int, default=900)
    world.set_defaults(call=_world)
    data = commands.add_parser("data", help="check a data set, make shifted sets").add_subparsers(
        required=True
    )
    check = data.add_parser("check", help="validate every split in a folder and list all problems")
    check.add_argument("folder")
    check.add_argument("--decode", action="store_true", help="also decode every picture (slow)")
    check.set_defaults(call=_check)
    mask = data.add_parser("mask", help="make a masked VCR set from what a trained student leans on")
    mask.add_argument("folder", help="run folder")
    mask.add_argument("shift", choices=["rmtop1", "keeptop1", "keeptop3", "keeptop5"])
    mask.set_defaults(call=_mask)
    _add_batch(commands)
    options = parser.parse_args(arguments)
    try:
        return options.call(options)
    except (ConfigError, DataError) as error:
        print(f"tdlib {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
