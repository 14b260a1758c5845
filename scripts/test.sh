#!/usr/bin/env bash
# Checks everything: lint, format, types, and all tests, slow ones included. Arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
# shellcheck disable=SC2046  # the list is meant to be split
install test -e ".[test,notebooks$(aot_extra)]" 'pyright[nodejs]' $(oracle_packages)

failed=""
check() {
  echo "$*" >&2
  "$PYTHON" -m "$@" || failed="$failed $1"
}
check ruff check .
check ruff format --check .
check pyright
if [ -n "$failed" ]; then
  echo "Failed:$failed" >&2
fi
status=0
"$PYTHON" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@" || status=$?
if [ "$status" -eq 0 ] && [ -n "$failed" ]; then
  status=1
fi
exit "$status"
