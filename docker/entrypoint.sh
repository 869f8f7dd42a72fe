#!/usr/bin/env bash
# What the images run: `demo`, `head`, `worker HEAD_HOST` (Ray nodes that stay up), `bash`, or a rayalign command.
# Ray nodes share a token: give every container the same RAY_AUTH_TOKEN.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

need_token() {
  export RAY_AUTH_MODE=token
  if [[ -z ${RAY_AUTH_TOKEN:-} && -z ${RAY_AUTH_TOKEN_PATH:-} && ! -s $HOME/.ray/auth_token ]]; then
    echo "rayalign: set RAY_AUTH_TOKEN, the same in every container (for instance: openssl rand -hex 32)" >&2
    exit 1
  fi
}

case ${1:-} in
  demo)
    shift
    model=$(python launch/fetch_model.py)
    exec rayalign train configs/demo.yaml "model.path=$model" "$@"
    ;;
  head)
    shift
    need_token
    exec ray start --head --port "${RAYALIGN_RAY_PORT:-6379}" --block --disable-usage-stats "$@"
    ;;
  worker)
    [[ $# -ge 2 ]] || { echo "usage: worker HEAD_HOST[:PORT]" >&2; exit 2; }
    need_token
    head=$2
    shift 2
    if [[ $head != *:* ]]; then head=$head:${RAYALIGN_RAY_PORT:-6379}; fi
    exec ray start --address "$head" --block --disable-usage-stats "$@"
    ;;
  bash | sh | python) exec "$@" ;;
  *) exec rayalign "$@" ;;
esac
