"""The notebooks run from top to bottom; what they claim, they assert themselves."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("nbclient")

REPOSITORY = Path(__file__).resolve().parent.parent
NOTEBOOKS = ("01_quickstart", "02_windowed_backward", "03_scheduling_under_slo")


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs_clean(name):
    script = REPOSITORY / "scripts" / "run_notebooks.py"
    notebook = REPOSITORY / "notebooks" / f"{name}.ipynb"
    command = [sys.executable, str(script), "--check", str(notebook)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
