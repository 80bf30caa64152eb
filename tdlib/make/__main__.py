"""Makes a mini model, measures it and writes both into its folder: see ``tdlib.make``."""

import argparse
import logging
import math
import shlex
import sys
from functools import partial
from pathlib import Path

import torch

from tdlib.core.files import at_least
from tdlib.core.paths import ROOT
from tdlib.make.clip import make_clip
from tdlib.make.detector import evaluate_detector, train_mini_detector
from tdlib.make.kinds import KINDS
from tdlib.make.loop import check_weights, note_figures
from tdlib.make.measure import measure_clip, measure_student
from tdlib.make.page import write_page
from tdlib.make.students import make_student

MODELS = ROOT / "data/models"
FOLDERS = {name: kind.folder for name, kind in KINDS.items()} | {
    "clip": "mini-clip",
    "detector": "mini-detector",
}


def _positive(text: str) -> float:
    if not 0 < (number := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: expected a number above 0")
    return number


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tdlib.make", description=__doc__)
    parser.add_argument(
        "model", choices=[*FOLDERS, "page"], help="'page': bring the page of models up to date"
    )
    length, count = parser.add_mutually_exclusive_group(), partial(at_least, 1)
    length.add_argument(
        "--minutes",
        type=_positive,
        help="processor time that training takes (default: 80; not of the detector)",
    )
    length.add_argument("--steps", type=count, help="how many steps it takes, in place of minutes")
    parser.add_argument("--out", type=Path, help="folder to write (default: data/models/mini-...)")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "data/cache/make", help="where corpora and checkpoints lie"
    )
    parser.add_argument("--detector", type=Path, default=ROOT / "data/models/mini-detector")
    parser.add_argument("--scenes", type=count, help="of each corpus (default: 48000; detector: 16000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--measure", action="store_true", help="only measure what lies in the folder")
    options = parser.parse_args(arguments)
    if options.model == "detector" and options.minutes:
        parser.error("the detector is made in a number of steps: give --steps")
    asked = {name: getattr(options, name) for name in ("scenes", "steps", "minutes")}
    settings = {name: value for name, value in asked.items() if value is not None}
    if settings and (options.measure or options.model == "page"):
        parser.error(f"--{next(iter(settings))}: nothing is made here")
    if options.model == "page":
        write_page(options.out or MODELS)
        return
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.threads)
    folder = options.out or MODELS / FOLDERS[options.model]
    settings["seed"] = options.seed
    device = "cuda" if torch.cuda.is_available() else "cpu"
    command = ""
    if options.measure:
        check_weights(folder)
    else:
        command = shlex.join(["python", "-m", "tdlib.make", *(arguments or sys.argv[1:])])
        if options.model == "detector":
            train_mini_detector(folder, options.work, **settings)
        elif options.model == "clip":
            make_clip(folder, options.work, device=device, **settings)
        else:
            make_student(options.model, folder, options.work, options.detector, device=device, **settings)
    if options.model == "detector":
        figures = evaluate_detector(folder, options.work)
    elif options.model == "clip":
        figures = measure_clip(folder)
    else:
        figures = measure_student(folder, options.detector)
    note_figures(folder, figures, command)
    write_page(folder.parent)
    logging.getLogger("tdlib.make").info("held out: %s", figures)


if __name__ == "__main__":
    main()
