"""Tables of results must open at once: what reads them loads no model library."""

import subprocess
import sys
from pathlib import Path

import pytest

from tdlib.core.paths import ROOT

HEAVY = ("torch", "transformers", "open_clip", "matplotlib", "torchvision")
TABLES = [
    f"tdlib.analysis.{name}" for name in ("scores", "statistics", "compare", "protocol", "study", "tuning")
]
BATCHES = [f"tdlib.runs.{path.stem}" for path in sorted(Path(ROOT / "tdlib" / "runs").glob("[!_]*.py"))]


@pytest.mark.parametrize("modules", [TABLES, BATCHES], ids=["tables", "batches"])
def test_what_reads_and_runs_batches_loads_no_model_library(modules):
    code = f"import {', '.join(modules)}; import sys; print(*sorted(set(sys.modules) & set({HEAVY})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "", f"importing {', '.join(modules)} loads {done.stdout}"
