#!/usr/bin/env bash
# Checks kernels and step on this machine's GPU and times them, in under ten minutes. Installs
# nothing and needs no network: uses $PYTHON, or python3, with whatever jax it has.
# $FLEXJAX_GPU_CHECK_OUT is the folder for the JSON lines. Arguments go to gpu_check.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1
# The pools of two choices of kernels never live at once, but what they leave is not always returned.
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
exec "${PYTHON:-python3}" scripts/gpu_check.py "$@"
