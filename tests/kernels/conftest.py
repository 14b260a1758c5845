"""Kernels are tested as users run them."""

import pytest


@pytest.fixture(autouse=True)
def optimized(monkeypatch):
    """LLVM optimizes the CPU's kernels as much as it does by default."""
    monkeypatch.delenv("PALLAS_KERNELS_LLVM_LEVEL", raising=False)
