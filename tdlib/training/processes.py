"""Starts the processes that train one run together, and brings their errors back.

Each of them runs ``python -m tdlib.training.distributed``; what they compute is ``run``'s. This module and
that one are two, so that ``run`` can start processes which import ``run``.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections import deque
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from tdlib.config import RunConfig
from tdlib.core.files import write_json
from tdlib.core.paths import ConfigError
from tdlib.training.run_folders import user_parts

_ERRORS = {"ConfigError": ConfigError, "FloatingPointError": FloatingPointError}


def place_among_processes() -> int:
    """This process's number among those that train together, from 0."""
    return int(os.environ.get("RANK", 0))


def first_process_first() -> AbstractContextManager[Any]:
    """Lets the first of the processes that train together pass before the others, which find caches full."""
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return PartialState().main_process_first() if together else nullcontext()


def must_launch(config: RunConfig) -> bool:
    """True if this process must start the others; False inside one of them, and where one is enough.

    Raises:
        ConfigError: another number of processes was started than ``config.processes``.
    """
    together = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1
    if together == 1:
        return config.processes > 1
    if together != config.processes:
        raise ConfigError(
            f"processes={config.processes}, but {together} were started together; set "
            f"processes={together}, or start {config.processes}"
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
    if added := user_parts(config):
        named = ", ".join(f"{parameter}={found['name']!r}" for parameter, found in added.items())
        raise ConfigError(
            f"{named}: of this session, so the processes={config.processes} that would train do not know it; "
            "set processes=1, or add it to its table in tdlib"
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
