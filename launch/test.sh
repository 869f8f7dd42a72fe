#!/usr/bin/env bash
# Sets up .venv and runs the tests that need no GPU, each for ten minutes at most. Arguments go to pytest:
# `launch/test.sh -k spin`, `launch/test.sh tests/unit/test_config.py -x`.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
setup
quiet_env
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1
cd -- "$ROOT"
suites=(tests/unit tests/contract tests/loop tests/ray tests/architecture)
for argument in "$@"; do # paths that are named replace the suites
  if [[ $argument == tests/* && -e ${argument%%::*} ]]; then suites=(); fi
done
exec "$VENV/bin/python" -m pytest --timeout 600 "${suites[@]}" "$@"
