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
if ! command -v nvidia-smi >/dev/null &&
  "$VENV/bin/python" -c 'import sys; from rayalign.cpu import slow_bfloat16; sys.exit(not slow_bfloat16())'; then
  say "rayalign: this CPU computes bfloat16 in software, so the demo runs in float32"
  set -- model.dtype=float32 "$@"
fi
exec "$VENV/bin/rayalign" train configs/demo.yaml "$@"
