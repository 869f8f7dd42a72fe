#!/usr/bin/env bash
# Sets up .venv and runs the tests that need no GPU, each for ten minutes at most, two at a time (those on Ray clusters
# first, they take longest). Arguments go to pytest: `launch/test.sh -k spin`, `launch/test.sh tests/unit -x`.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
setup
quiet_env
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1
cd -- "$ROOT"
suites=(tests/ray tests/contract tests/loop tests/unit tests/architecture -n 2 --dist loadfile --no-loadscope-reorder)
for argument in "$@"; do # paths that are named replace the suites
  if [[ $argument == tests/* && -e ${argument%%::*} ]]; then suites=(); fi
done
exec "$VENV/bin/python" -m pytest --timeout 600 "${suites[@]}" "$@"
