#!/usr/bin/env bash
# Trains a real 135M language model with preferences on this machine's CPU, from nothing: sets up .venv, makes the
# model's checkpoint and runs configs/demo.yaml. Arguments are overrides, e.g. `launch/demo.sh train.steps=5`.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
setup
quiet_env
cd -- "$ROOT"
model=$("$VENV/bin/python" launch/fetch_model.py)
if [[ -n ${RAYALIGN_CACHE:-} ]]; then set -- "model.path=$model" "$@"; fi
exec "$VENV/bin/rayalign" train configs/demo.yaml "$@"
