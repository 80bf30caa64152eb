"""One run trained by several processes together, one per GPU (without GPUs: on the CPU).

``train_run`` starts them itself where ``processes`` is above 1. On several machines they are started by
hand, on each of them, with a file system that all share:

    torchrun --nnodes 2 --node-rank 0 --master-addr HOST --nproc-per-node 4 \\
        -m tdlib.training.distributed config.json reports/runs/distill/clip_td-seed0

(or ``accelerate launch ... -m tdlib.training.distributed ...``). ``config.json`` holds the parameters of
``RunConfig`` as a run folder's does; ``processes`` is the number of all of them (here 8).

This is what each process executes; ``processes`` starts them.
"""

import argparse
import json
import os
import sys
import time
import traceback
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from threading import Thread

import psutil
import torch
from accelerate import PartialState

from tdlib.arms import ARMS
from tdlib.config import RunConfig
from tdlib.core.files import write_json
from tdlib.training import prepare as preparation
from tdlib.training.processes import must_launch, place_among_processes
from tdlib.training.run import train_run


def _end_with(starter: int) -> None:
    """Ends this process soon after the one that wants its result is gone."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(starter)
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(1)
    os._exit(1)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="tdlib.training.distributed", description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, help="JSON with the parameters of RunConfig")
    parser.add_argument("folder", type=Path, help="the run folder to write")
    parser.add_argument("--cache", type=Path, help="folder of the teachers' caches")
    parser.add_argument("--progress", action="store_true")
    parser.add_argument("--errors", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--started-by", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.started_by:
        Thread(target=_end_with, args=(given.started_by,), daemon=True).start()
    try:
        train(given.config, given.folder, given.cache, given.progress)
    except Exception as error:
        if given.errors:
            found = {
                "kind": type(error).__name__, "message": str(error),
                "traceback": traceback.format_exc()[-8000:],
            }  # fmt: skip
            write_json(given.errors / f"error-{place_among_processes()}.json", found)
        raise


def train(config_file: Path, folder: Path, cache: Path | None = None, show_progress: bool = False) -> None:
    """This process's part of a run: prepares (the first process before the others) and trains."""
    settings = json.loads(config_file.read_text(encoding="utf-8"))
    ARMS.setdefault(str(settings.get("arm")), {})  # a label by now: what it sets stands in the settings
    config = RunConfig.from_parameters(**settings)
    must_launch(config)
    if cache is not None:
        preparation.CACHE_ROOT = cache
    # The first may have a large cache to fill.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=2))
    with state.main_process_first():
        prepared = preparation.prepare(config, whole_splits=False)
    train_run(config, prepared, folder, show_progress)
    state.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
