# Sourced by the other scripts: finds a Python, makes .venv, installs the project into it.
#
# Sets PYTHON to the environment's interpreter, and JAX_PLATFORMS=cpu where no NVIDIA GPU is visible.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

has_gpu() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; }

# Prints the first Python >= 3.11 that can make an environment. 3.11 comes first: the independent
# oracles of the tests are installed for it (see oracle_packages).
find_python() {
  local name
  for name in python3.11 python3.12 python3.13 python3 python; do
    if "$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
      >/dev/null 2>&1; then
      command -v "$name"
      return
    fi
  done
  echo "FlexJAX needs Python 3.11 or newer with the venv module; none was found." >&2
  return 1
}

# The rule for the tests' oracles, in this one place: torch, PEFT and accelerate are installed on
# Python 3.11, where this version of torch is the CPU wheel. Elsewhere their tests are skipped, and
# pytest lists them as skipped.
oracle_packages() {
  if "$PYTHON" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then
    echo "torch==2.13.0 peft accelerate"
  fi
}

# Prints the extra that compiles for GPUs without one, where its wheels exist: Linux.
aot_extra() {
  if [ "$(uname -s)" = Linux ]; then
    echo ",aot"
  fi
}

# install NAME ARGUMENTS...: pip-installs once per content of pyproject.toml.
install() {
  local stamp=".venv/.installed-$1" wanted
  shift
  wanted="$(cat pyproject.toml - <<<"$*" | "$PYTHON" -c \
    'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')"
  if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    return
  fi
  echo "Installing into .venv: $*" >&2
  "$PYTHON" -m pip --version >/dev/null 2>&1 || "$PYTHON" -m ensurepip >&2
  "$PYTHON" -m pip install --quiet "$@" >&2
  echo "$wanted" >"$stamp"
}

if [ ! -x .venv/bin/python ]; then
  FOUND="$(find_python)"
  "$FOUND" -m venv .venv
fi
PYTHON="$PWD/.venv/bin/python"
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "The Python in .venv is older than 3.11; remove .venv and run this again." >&2
  exit 1
fi
if ! has_gpu; then
  export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
fi
