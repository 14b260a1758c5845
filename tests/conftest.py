"""Settings that hold for the whole test run."""

import importlib.util
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Most of the run is compilation: LLVM's optimizations are left out (XLA's own passes are not).
# Tests of kernels have a conftest of theirs.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
os.environ.setdefault("PALLAS_KERNELS_LLVM_LEVEL", "0")

import jax
import pytest

jax.config.update("jax_enable_x64", False)
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")


_LONG = ("test_notebooks.py", "test_simulate_script.py")
"""Files of few tests that take minutes: begun last, they would keep one worker alone."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in _LONG)


@pytest.fixture(scope="session", autouse=True)
def _cpu_kernels():
    """Imports the kernels' code before any engine's threads do.

    Jaxtyping checks what is imported by way of `ast.parse`, which in Python 3.11 fails at times
    where several threads call it.
    """
    if importlib.util.find_spec("llvmlite") is None:
        return
    import pallas_kernels

    for path in Path(pallas_kernels.__file__).parent.glob("*/llvm_code.py"):
        importlib.import_module(f"pallas_kernels.{path.parent.name}.llvm_code")


@pytest.fixture
def rng(request):
    """A numpy generator that differs between tests and is the same between runs."""
    import zlib

    import numpy as np

    return np.random.default_rng(zlib.crc32(request.node.nodeid.encode()))
