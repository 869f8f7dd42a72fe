#!/usr/bin/env bash
# Starts, joins or stops a Ray cluster by hand, with its token: who has no token cannot run code on the cluster.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

TOKEN_FILE=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
PORT=${RAYALIGN_RAY_PORT:-6379}

usage() {
  cat <<TEXT
usage: launch/ray_cluster.sh head   [ray start options]           on the first node
       launch/ray_cluster.sh worker HEAD_HOST[:PORT] [options]    on every other node
       launch/ray_cluster.sh status | stop                        on any node (stop ends Ray on this node only)

Then, on any node of the cluster:
  RAY_AUTH_MODE=token .venv/bin/rayalign train CONFIG placement.address=auto
  .venv/bin/rayalign submit CONFIG                                        as a job: it goes on when you log out
or from another machine that has the token, with 'head --dashboard-host 0.0.0.0':
  .venv/bin/rayalign submit CONFIG --address http://HEAD_HOST:8265

The cluster is guarded by a token, in $TOKEN_FILE. 'head' makes one when there is none. A worker needs
the same one first: copy the file (scp HEAD:.ray/auth_token ~/.ray/), share the home folder, or set RAY_AUTH_TOKEN.
Every node needs this repository at the same path; its .venv is made on the first call. RAYALIGN_STACK=gpu takes
the GPU versions, RAYALIGN_RAY_PORT another port than 6379.
TEXT
}

# jobs run `python`: the one of .venv
ray_command() { PATH=$VENV/bin:$PATH RAY_AUTH_MODE=token "$VENV/bin/ray" "$@"; }

start_ray() { # what failed, ray start's options … → one line instead of Ray's traceback
  local failure=$1 output
  shift
  # agents take any free port: with the fixed one, a second cluster on a node would have no jobs
  output=$(ray_command start --disable-usage-stats --dashboard-agent-listen-port 0 "$@" 2>&1) || die "$failure: $(tail -n 400 <<<"$output" |
    grep -E '^[A-Za-z.]*(Error|Exception)|already running|rror:' | tail -n 1)"
}

check_port() { # Ray gives 10002 to 19999 to its workers and fails late
  if [[ ! $1 =~ ^[0-9]+$ ]] || (($1 < 1024 || $1 > 65535 || ($1 > 10000 && $1 < 20000))); then
    die "port $1 cannot be the cluster's; take one from 1024 to 10000 or from 20000 to 65535 (RAYALIGN_RAY_PORT)"
  fi
}

make_token() { # one that exists stays; whoever can read it can run code as this user
  if [[ -n ${RAY_AUTH_TOKEN:-} || -s $TOKEN_FILE ]]; then return; fi
  mkdir -p -- "$(dirname -- "$TOKEN_FILE")"
  (umask 077 && "$VENV/bin/python" -c 'import secrets; print(secrets.token_hex(32), end="")' >"$TOKEN_FILE")
  say "rayalign: made the cluster's token in $TOKEN_FILE"
}

need_token() {
  if [[ -n ${RAY_AUTH_TOKEN:-} || -s $TOKEN_FILE ]]; then return; fi
  die "there is no token in $TOKEN_FILE; copy the head's: mkdir -p ~/.ray && scp $1:.ray/auth_token ~/.ray/auth_token"
}

main() {
  local command=${1:-help} head
  shift || true
  case $command in
    head)
      check_port "$PORT"
      setup
      quiet_env
      make_token
      start_ray "the head did not start" --head --port "$PORT" "$@"
      say "rayalign: the head runs. On the other nodes: launch/ray_cluster.sh worker $(hostname):$PORT"
      ;;
    worker)
      [[ $# -ge 1 && $1 != -* ]] || { usage >&2; exit 2; }
      head=$1 && shift
      if [[ $head != *:* ]]; then head=$head:$PORT; fi
      need_token "${head%:*}"
      setup
      quiet_env
      start_ray "the head at $head was not joined (does it run, is its port open, is its token the same?)" \
        --address "$head" "$@"
      say "rayalign: joined the cluster at $head"
      ;;
    status)
      setup
      quiet_env
      ray_command status
      ;;
    stop)
      setup
      quiet_env
      ray_command stop >/dev/null
      say "rayalign: Ray is stopped on this node"
      ;;
    help | -h | --help) usage ;;
    *) usage >&2; exit 2 ;;
  esac
}

main "$@"
