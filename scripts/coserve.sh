#!/usr/bin/env bash
# Serves and finetunes at the same time: makes .venv, installs FlexJAX, runs `flexjax coserve "$@"`.
set -euo pipefail
CALLER="$PWD"
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
if has_gpu; then
  install run -e '.[cuda12]'
else
  install run -e .
fi
FLEXJAX="$PWD/.venv/bin/flexjax"
cd "$CALLER"
exec "$FLEXJAX" coserve "$@"
