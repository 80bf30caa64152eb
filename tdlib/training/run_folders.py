"""What a run folder tells of its run: what the results depend on, and how far the run got.

``run`` writes these files and ``compare`` reads them to recognise runs that need not be trained again.
"""

import json
import logging
import platform
import secrets
from pathlib import Path
from typing import Any

import torch
import transformers

from tdlib.config import RunConfig, parameters_with
from tdlib.core.devices import usual_device
from tdlib.core.files import remove_tree
from tdlib.core.provenance import code_version, digest, git_version
from tdlib.data.examples import Examples
from tdlib.data.tasks import user_task
from tdlib.method.registry import user_functions
from tdlib.training.checkpoints import UNEVALUATED
from tdlib.training.provenance import data_manifest

log = logging.getLogger(__name__)

IDENTITY = "identity.json"  # everything that the run's results depend on


def run_identity(config: RunConfig, subset: Examples, files: bool = True) -> dict[str, Any]:
    """Everything that a run's results depend on: equal in two runs that may replace or continue each other.

    ``files`` says whether the files of data and models count. Parameters of the role "machine" never do.
    """
    settings = config.model_dump(exclude=set(parameters_with(role="machine")))
    return {
        **settings, "functions": user_parts(config),
        "training subset": digest(list(subset.ids)),
        **({"files of data and models": digest(data_manifest(settings))} if files else {}),
        "code of tdlib": code_version(), "torch": torch.__version__,
        "transformers": transformers.__version__, "device": torch.device(usual_device()).type,
    }  # fmt: skip


def user_parts(config: RunConfig) -> dict[str, dict[str, str]]:
    """What a run uses that is not the project's: functions and the task, by parameter, with their source."""
    task = user_task(config)
    return user_functions(config) | ({"task": task} if task else {})


def environment() -> dict[str, Any]:
    """Returns the versions and the hardware that this run used."""
    return {
        "code": git_version(), "python": platform.python_version(), "torch": torch.__version__,
        "transformers": transformers.__version__, "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "peak_gpu_memory": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
    }  # fmt: skip


def finished(folder: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the metrics of a folder that holds the finished run of this ``run_identity``; else None."""
    try:
        stored = json.loads((folder / IDENTITY).read_text(encoding="utf-8"))
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return metrics if stored == json.loads(json.dumps(identity)) else None


def pending_evaluation(folder: Path, config: RunConfig, subset: Examples) -> dict[str, Any] | None:
    """Returns the metrics so far of a folder whose trained student was not evaluated; None for other folders.

    The files of the data may have changed since training (somebody added the picture whose absence stopped
    the evaluation), so they are not compared; everything else must be the same.
    """
    try:
        marker = json.loads((Path(folder) / UNEVALUATED).read_text(encoding="utf-8"))
        stored, metrics = marker["run"], dict(marker["metrics"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    now = json.loads(json.dumps(run_identity(config, subset, files=False)))
    return metrics if stored == now else None


def archive_previous_run(folder: Path, config: RunConfig | None) -> None:
    """Renames a run folder that is about to be replaced to NAME-DIGEST beside it.

    A run of the same settings is not kept: the new one replaces it. With None, any earlier run is kept,
    because the new one is not finished; so is one whose settings cannot be read.
    """
    folder = folder.resolve()
    if not folder.exists():
        return
    unimportant = set(parameters_with(role="machine"))
    try:
        before = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = {}
    if config is not None:
        now = json.loads(config.model_dump_json(exclude=unimportant))
        # A parameter that there was none of when the earlier run was made has its default there.
        known = json.loads(RunConfig.from_parameters().model_dump_json()) | before
        if before and {name: value for name, value in known.items() if name not in unimportant} == now:
            return
    other = folder.with_name(f"{folder.name}-{digest(before)[:8] if before else secrets.token_hex(4)}")
    remove_tree(other)
    folder.rename(other)
    log.warning("%s held another run, which is now %s", folder, other.name)
