"""Imports run one way (DESIGN, section 8), host modules know no jax, and import is quick."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

BASE = {"axes", "errors", "config", "model_config", "builtin_models", "request", "layout", "data"}
BASE |= {"slo"}
HOST = {"scheduler", "metrics", "workload", "simulator"}
# Who may import whom inside flexjax, beside itself and BASE. A package that is not listed here
# fails the test: place it first.
ALLOWED: dict[str, set[str]] = {
    **{name: set() for name in BASE},
    "models": set(),
    "plotting": set(),
    "cache": set(),
    "lora": {"models"},
    "autodiff": {"models", "lora", "cache"},
    "optim": {"models", "lora"},
    "step": {"models", "lora", "cache", "autodiff", "optim"},
    "scheduler": {"optim.schedule"},
    "metrics": set(),
    "workload": set(),
    "simulator": {"scheduler", "workload", "metrics"},
    "memory": set(),
    "parallel": {"models", "lora", "cache"},
    "io": {"models", "lora"},
    "engine": {"models", "lora", "cache", "autodiff", "optim", "step", "scheduler", "io", "memory"},
}
TOP = {"server", "bench", "cli", "__init__"}


def imported(path):
    """Names of the modules that a file imports, conditional and lazy imports included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "flexjax":
                yield from (f"flexjax.{alias.name}" for alias in node.names)
            else:
                yield node.module or ""


def unit_of(path):
    parts = path.relative_to(ROOT / "flexjax").with_suffix("").parts
    return parts[0]


FILES = sorted((ROOT / "flexjax").rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    unit = unit_of(path)
    if unit in TOP:
        return
    assert unit in ALLOWED, f"{unit} has no place in tests/test_imports.py"
    for name in imported(path):
        parts = name.split(".")
        if parts[0] != "flexjax":
            continue
        target = parts[1] if len(parts) > 1 else ""
        is_allowed = target == unit or target in BASE | ALLOWED[unit]
        is_allowed |= ".".join(parts[1:]) in ALLOWED[unit]
        assert is_allowed, f"{path.relative_to(ROOT)} may not import {name}"


def test_kernels_know_nothing_of_flexjax():
    for path in (ROOT / "pallas_kernels").rglob("*.py"):
        assert not [name for name in imported(path) if name.split(".")[0] == "flexjax"], path


def test_lower_packages_do_not_import_upper_ones():
    """No file below the engine names it, the server or the command line."""
    for path in FILES:
        if unit_of(path) in ALLOWED and unit_of(path) != "engine":
            names = {name.split(".")[1] for name in imported(path) if name.startswith("flexjax.")}
            assert not names & ({"engine"} | TOP), path


def run_python(code):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "module",
    [
        "flexjax",
        "flexjax.config",
        "flexjax.model_config",
        "flexjax.request",
        "flexjax.layout",
        "flexjax.scheduler.scheduler",
        "flexjax.scheduler.training",
        "flexjax.scheduler.latency_model",
        "flexjax.workload",
        "flexjax.metrics",
        "flexjax.simulator",
        "flexjax.optim.schedule",
        "flexjax.engine.sizing",
    ],
)
def test_host_modules_import_no_jax(module):
    assert run_python(f"import sys, {module}; print('jax' in sys.modules)") == "False"


def test_import_is_quick():
    code = "import time; t = time.process_time(); import flexjax; print(time.process_time() - t)"
    assert min(float(run_python(code)) for _ in range(3)) < 1.5


def test_public_names_resolve():
    code = (
        "import flexjax as fj; print(fj.Engine, fj.Job, fj.Decoder, fj.autodiff)\n"
        "try:\n    fj.nothing\nexcept AttributeError as error:\n    print(error)"
    )
    assert "has no attribute 'nothing'" in run_python(code)
