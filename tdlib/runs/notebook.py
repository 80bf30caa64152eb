"""Executes one notebook as an experiment by papermill, and reports what papermill would keep silent."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tdlib.core.files import write_folder
from tdlib.core.paths import ROOT, ConfigError
from tdlib.runs.checks import check_parameters, difference_reason, differences
from tdlib.runs.page import export_html
from tdlib.runs.template import NOTEBOOKS, read_template

ANSI = re.compile(r"\x1b\[[0-9;]*m")


class NotebookFailed(RuntimeError):
    """Raised where a cell raised or the kernel died; names the notebook, the error and the partial copy."""


def run_notebook(path: Path, folder: Path, parameters: dict[str, Any]) -> Path:
    """Executes a notebook into ``folder`` as executed .ipynb and .html; returns the page.

    The folder appears (or replaces its predecessor) only after success.

    Raises:
        ConfigError: bad parameters, or a folder whose files would be lost (``refuse_folder``), before
            anything runs.
        NotebookFailed: a cell raised, the kernel was killed, or it was run with other parameters.
    """
    template = read_template(path)
    for note in check_parameters(template, parameters):
        print(f"note: {note}", flush=True)
    planned = template.defaults | parameters
    refuse_folder(path, folder, str(planned.get("runs_dir") or ""))
    print(f"{path.stem}: executing; its page goes to {folder}", flush=True)
    # With nbconvert they take a second to load, and bad parameters need neither.
    from nbclient.exceptions import DeadKernelError
    from papermill import PapermillExecutionError

    def fill(partial: Path) -> None:
        executed = partial / path.name
        failed = folder.with_name(f"{folder.name}-failed.ipynb")

        def give_up(reason: str, file: str) -> NotebookFailed:
            os.replace(executed, failed)
            return NotebookFailed(f"{path.name}: {reason}{file}{failed}")

        began, scratch = time.time(), scratch_folder()
        try:
            bars, interactive = sys.stderr.isatty(), bool(planned.get("interactive"))
            execute(path, executed, parameters, scratch, bars=interactive, progress_bar=bars)
        except PapermillExecutionError as error:
            raise give_up(f"{error.ename}: {error.evalue}", "\nExecuted so far: ") from None
        except DeadKernelError as error:
            raise give_up(f"the kernel was killed ({error}); out of memory?", " ") from None
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        if runs := str(planned.get("runs_dir") or ""):
            # A second of tolerance: some file systems keep whole seconds.
            if lines := differences(template, planned, ROOT / runs, since=began - 1):
                raise give_up(difference_reason(lines), "\nExecuted: ")
        failed.unlink(missing_ok=True)
        export_html(executed, partial / f"{path.stem}.html")

    return write_folder(folder, fill) / f"{path.stem}.html"


def refuse_folder(path: Path, folder: Path, runs_dir: str) -> None:
    """Raises ConfigError if a page that replaces ``folder`` would delete what ``run_notebook`` did not write.

    That is: the notebook itself, runs (``runs_dir``, "" for none) in or around the folder, and any other
    file in it. What JupyterLab and file browsers leave behind does not count.
    """
    folder, runs = folder.resolve(), (ROOT / runs_dir).resolve()
    advice = "the page would replace that folder; choose another one with --folder"
    if path.resolve().is_relative_to(folder):
        raise ConfigError(f"{folder}: holds the notebook {path.name} itself, and {advice}")
    if runs_dir and (runs.is_relative_to(folder) or folder.is_relative_to(runs)):
        raise ConfigError(f"{folder}: runs_dir={runs_dir!r} is the same folder or one in the other; {advice}")
    page = {path.name, f"{path.stem}.html"}
    there = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    there -= {".ipynb_checkpoints", ".DS_Store"}
    if there and there != page:
        other = sorted(there - page) or sorted(there)
        raise ConfigError(f"{folder}: holds {', '.join(other[:3])}, expected a page of {path.name}; {advice}")


def literal(path: Path) -> str:
    """Writes a path so that papermill, which fills parameters in for ``{name}``, leaves it as it is."""
    return str(path).replace("{", "{{").replace("}", "}}")


def scratch_folder() -> Path:
    """Makes a temporary folder for a kernel's sockets, whose paths may have 107 characters."""
    short = len(tempfile.gettempdir()) < 70
    return Path(tempfile.mkdtemp(prefix="tdlib-", dir=None if short else "/tmp"))


def execute(
    path: Path, target: Path, parameters: dict[str, Any], scratch: Path,
    launched: Callable[[subprocess.Popen | None], None] = lambda process: None, bars: bool = False,
    **options: Any,
) -> Any:  # fmt: skip
    """Executes a notebook by papermill, which saves it to ``target`` after every cell; returns it.

    It is a kernel of this Python, whatever a user's own "python3" of Jupyter starts. It is reached by sockets
    in the folder ``scratch`` (see ``scratch_folder``): another process may take a port, but no file, and with
    ports kernels warn in every run that nothing is encrypted.

    ``launched`` is called with the kernel's process. ``bars`` lets libraries draw progress bars, which fill a
    log with hundreds of partial lines. ``options`` are papermill's.
    """
    import papermill
    from ipykernel.kernelspec import get_kernel_dict
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager
    from traitlets.config import Config

    class Kernel(AsyncKernelManager):
        kernel_spec = KernelSpec(**get_kernel_dict())

        async def _async_launch_kernel(self, kernel_cmd: list[str], **options: Any) -> None:
            if not bars:
                quiet = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
                options["env"] = {**(options.get("env") or os.environ), **quiet}
            await super()._async_launch_kernel(kernel_cmd, **options)
            launched(getattr(self.provisioner, "process", None))

        _launch_kernel = _async_launch_kernel

    sockets = {"transport": "ipc", "ip": f"{scratch}/kernel", "connection_file": f"{scratch}/kernel.json"}
    return papermill.execute_notebook(
        literal(path), literal(target), parameters=parameters, cwd=str(NOTEBOOKS), kernel_name="python3",
        config=Config({"KernelManager": sockets}), kernel_manager_class=Kernel, **options,
    )  # fmt: skip


def write_prepared(path: Path, target: Path, parameters: dict[str, Any]) -> None:
    """Writes a notebook with parameters filled in, without executing it."""
    import papermill

    papermill.execute_notebook(
        literal(path), literal(target), parameters=parameters, prepare_only=True, progress_bar=False
    )
