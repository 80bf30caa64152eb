"""The command ``tdlib``: run a notebook as an experiment, write the MiniWorld."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tdlib.config import ROOT, ConfigError
from tdlib.examples import DataError


def _literal(text: str) -> Any:
    """A value from the command line: JSON where it parses, else the string itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _run(options: argparse.Namespace) -> int:
    from tdlib.batches import NotebookFailed, notebook_parameters, run_notebook

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
    from tdlib.tasks.catalogue import check_folder

    bad = 0
    for task, split, number, problems in check_folder(Path(options.folder), options.decode):
        verdict = f"{len(problems)} problems" if problems else "ok"
        print(f"{task:<10} {split:<24} {number:>8,} examples  {verdict}", flush=True)
        for problem in problems:
            print(f"  - {problem}")
        bad += len(problems)
    return int(bad > 0)


def _mask(options: argparse.Namespace) -> int:
    from tdlib.experiments import write_masked

    print(write_masked(Path(options.folder), options.shift))
    return 0


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
    options = parser.parse_args(arguments)
    try:
        return options.call(options)
    except (ConfigError, DataError) as error:
        print(f"tdlib {options.command}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
