"""One run trained by several processes together, one per GPU (without GPUs: on the CPU).

``train_run`` starts them itself where ``processes`` is above 1. On several machines they are started by
hand, on each of them, with a file system that all share:

    torchrun --nnodes 2 --node-rank 0 --master-addr HOST --nproc-per-node 4 \\
        -m tdlib.training.distributed config.json reports/runs/distill/clip_td-seed0

(or ``accelerate launch ... -m tdlib.training.distributed ...``). ``config.json`` holds the parameters of
``RunConfig`` as a run folder's does; ``processes`` is the number of all of them (here 8).

Owns starting the processes and bringing their errors back; what they compute is ``training``'s.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import torch

from tdlib.config import RunConfig
from tdlib.core.files import write_json
from tdlib.core.paths import ConfigError
from tdlib.method.registry import own_functions

_ERRORS = {"ConfigError": ConfigError, "FloatingPointError": FloatingPointError}


def place_among_processes() -> int:
    """This process's number among those that train together, from 0."""
    return int(os.environ.get("RANK", 0))


def must_launch(config: RunConfig) -> bool:
    """True if this process must start the others; False in one of them, and where one is enough."""
    around = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1
    if around == 1:
        return config.processes > 1
    if around != config.processes:
        raise ConfigError(
            f"processes={config.processes}, but {around} were started together; set processes={around}, or "
            f"start {config.processes}"
        )
    return False


def launch(
    config: RunConfig, folder: Path, cache: Path | None, show_progress: bool = False
) -> dict[str, Any]:
    """Trains one run by ``config.processes`` processes on this machine; returns its metrics.

    They prepare the data for themselves, from the settings and the filled ``cache``. They end with
    this process, and if one of them fails all do: what it raised is raised here, or a RuntimeError with the
    end of what they printed.
    """
    if own := own_functions(config):
        named = ", ".join(f"{parameter}={found['name']!r}" for parameter, found in own.items())
        raise ConfigError(
            f"{named}: a function of this session, which the processes={config.processes} that would train "
            "do not know; set processes=1, or add it to its table in tdlib"
        )
    if torch.cuda.is_available() and torch.cuda.device_count() < config.processes:
        raise ConfigError(
            f"processes={config.processes}, but {torch.cuda.device_count()} GPUs are visible; each needs one"
        )
    threads = str(max(1, torch.get_num_threads() // config.processes))
    with tempfile.TemporaryDirectory(prefix="tdlib-") as temporary:
        home = Path(temporary)
        write_json(home / "config.json", config.model_dump())
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
            str(config.processes), "-m", "tdlib.training.distributed", str(home / "config.json"),
            str(Path(folder).resolve()), "--errors", str(home), "--started-by", str(os.getpid()),
            *(["--cache", str(cache)] if cache else []), *(["--progress"] if show_progress else []),
        ]  # fmt: skip
        said = _run(command, os.environ | {"OMP_NUM_THREADS": threads}, show_progress)
        if said is not None:
            raise _error(home, said)
    return json.loads((Path(folder) / "metrics.json").read_text(encoding="utf-8"))


def _run(command: list[str], environment: dict[str, str], show: bool) -> str | None:
    """Runs a command; None if it succeeds, else the end of what it printed. It does not outlive an error."""
    last: deque[str] = deque(maxlen=60)
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                last.append(line)
                if show:
                    print(line, end="", flush=True)
            status = process.wait()
        except BaseException:
            process.terminate()  # it ends its workers
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()
            raise
    return None if status == 0 else "".join(last)


def _error(home: Path, said: str) -> Exception:
    """What the first process that failed has raised."""
    found = sorted(home.glob("error-*.json"), key=lambda path: path.stat().st_mtime_ns)
    if found:
        first = json.loads(found[0].read_text(encoding="utf-8"))
        if first["kind"] in _ERRORS:
            return _ERRORS[first["kind"]](first["message"])
        return RuntimeError(f"{first['kind']}: {first['message']}\n{first['traceback']}")
    return RuntimeError(f"a process that trains was killed, or could not start; they said:\n{said}")


# In each of the processes.


def _end_with(starter: int) -> None:
    """Ends this process soon after the one that wants its result is gone."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(starter)
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(1)
    os._exit(1)


def main(arguments: list[str]) -> None:
    import traceback

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
    from accelerate import PartialState

    from tdlib.arms import ARMS
    from tdlib.training import prepare as experiments
    from tdlib.training.run import train_run

    settings = json.loads(config_file.read_text(encoding="utf-8"))
    ARMS.setdefault(str(settings.get("arm")), {})  # a label by now: what it sets stands in the settings
    config = RunConfig.from_parameters(**settings)
    must_launch(config)
    if cache is not None:
        experiments.CACHE_ROOT = cache
    # The first may have a large cache to fill.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=2))
    with state.main_process_first():
        prepared = experiments.prepare(config, whole_splits=False)
    train_run(config, prepared, folder, show_progress)
    state.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
