# shellcheck shell=bash
# Sourced by the scripts in this folder: `setup` makes .venv ready, or says in one line what is missing.
#
#   RAYALIGN_PYTHON  the Python to make .venv with (else python3.11, the best tested, python3.12, python3)
#   RAYALIGN_STACK   cpu (default) or gpu: which lock of versions .venv gets
#   RAYALIGN_CACHE   where models are kept (default ~/.cache/rayalign)

ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
VENV=$ROOT/.venv
LOG=$VENV/install.log
STAMP=$VENV/.installed
TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
NEEDED_KIB=$((6 * 1024 * 1024))

say() { printf '%s\n' "$*" >&2; }
die() { say "rayalign: $*"; exit 1; }

usable_python() { # a command → is it Python 3.11 or 3.12? (a pyenv shim exists for versions that it cannot run)
  "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1
}

find_python() { # prints the command of a Python that can make a virtual environment
  local candidate candidates=(python3.11 python3.12 python3) without_venv=
  if [[ -n ${RAYALIGN_PYTHON:-} ]]; then candidates=("$RAYALIGN_PYTHON"); fi
  for candidate in "${candidates[@]}"; do
    usable_python "$candidate" || continue
    if "$candidate" -c 'import venv, ensurepip' >/dev/null 2>&1; then printf '%s\n' "$candidate"; return; fi
    without_venv=$candidate
  done
  if [[ -n $without_venv ]]; then
    die "$without_venv has no venv module; install it (Debian, Ubuntu: apt install python3-venv)"
  elif [[ -n ${RAYALIGN_PYTHON:-} ]]; then
    die "RAYALIGN_PYTHON=$RAYALIGN_PYTHON is not a Python 3.11 or 3.12 that runs"
  fi
  die "no Python 3.11 or 3.12 was found; install one, or name it with RAYALIGN_PYTHON=/path/to/python3.11"
}

check_disk() { # free space, counting what an unfinished install already took
  local free used
  free=$(df -Pk "$ROOT" | awk 'NR == 2 { print $4 }')
  used=$(du -sk "$VENV" 2>/dev/null | awk '{ print $1 }')
  if ((free + ${used:-0} < NEEDED_KIB)); then
    die "the install needs 6 GiB of disk at $ROOT, and $((free / 1024 / 1024)) GiB are free"
  fi
}

wait_for_other_setup() { # two setups in one folder take turns; the lock ends with the process, however it ends
  mkdir -p "$VENV" 2>/dev/null || die "$VENV cannot be made: is the folder writable?"
  command -v flock >/dev/null || return 0
  exec 9>"$VENV/.lock"
  flock -n 9 || { say "rayalign: another setup is running in $ROOT, waiting for it"; flock 9; }
}

make_venv() { # a new .venv, unless there is one that works; one that was moved does not, its scripts name the old place
  local python place
  place=$(cat "$VENV/.place" 2>/dev/null || printf '%s\n' "$ROOT")
  if [[ $place == "$ROOT" ]] && usable_python "$VENV/bin/python" &&
    "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    say "rayalign: continuing the install in .venv"
    # pip writes INSTALLER last but one: a package without it was cut off while it was copied
    find "$VENV"/lib/python3*/site-packages -maxdepth 1 -name '*.dist-info' \
      ! -exec test -e '{}/INSTALLER' \; -exec rm -rf -- '{}' +
    return
  fi
  python=$(find_python) || exit 1
  say "rayalign: making .venv with $("$python" --version) and the locked versions (about 4 GB, a few minutes)"
  find "$VENV" -mindepth 1 -maxdepth 1 ! -name .lock -exec rm -rf -- '{}' +
  "$python" -m venv "$VENV" >"$LOG" 2>&1 || die "$python -m venv failed; see $LOG"
  printf '%s\n' "$ROOT" >"$VENV/.place"
}

progress() { # how many packages → how far pip has come, from its log: it first fetches all, then installs all
  local count what=fetched
  if grep -E '^(Collecting|Requirement already|Installing collected)' "$LOG" | tail -n 1 | grep -q '^Installing'; then
    what=installed
    count=$(find "$VENV"/lib/python3*/site-packages -maxdepth 1 -name '*.dist-info' | wc -l)
  else
    count=$(grep -cE '^(Collecting|Requirement already)' "$LOG" || true)
  fi
  printf '%d of %d packages %s' "$((count < $1 ? count : $1))" "$1" "$what"
}

watch_install() { # pip's process, packages, what is done → one line: rewritten on a terminal, else every half minute
  local start=$SECONDS shown=0 elapsed
  while kill -0 "$1" 2>/dev/null; do
    elapsed=$((SECONDS - start))
    if [[ -t 2 ]]; then
      printf '\r  %s: %s, %d s\033[K' "$3" "$(progress "$2")" "$elapsed" >&2
    elif ((elapsed - shown >= 30)); then
      shown=$elapsed
      say "  $3: $(progress "$2"), $elapsed s"
    fi
    sleep 1
  done
  if [[ -t 2 ]]; then printf '\r\033[K' >&2; fi
}

pip_install() { # what is being done, total, pip's arguments … → pip's exit code; its output goes to the log
  local what=$1 total=$2 pid
  shift 2
  "$VENV/bin/python" -m pip install --no-deps --no-input --disable-pip-version-check --progress-bar off "$@" \
    >>"$LOG" 2>&1 &
  pid=$!
  trap 'kill "$pid" 2>/dev/null; say; die "interrupted; the same command continues the install"' INT TERM
  watch_install "$pid" "$total" "$what"
  trap - INT TERM
  wait "$pid"
}

fail_install() {
  die "the install failed: $(grep -E '^ERROR|No space left' "$LOG" | tail -n 1) (all of pip's output: $LOG)"
}

install_lock() { # the lock's path
  local lock=$1 total torch
  total=$(grep -c '==' "$lock")
  torch=$(grep -E '^torch==' "$lock")
  # Alone and first: plain PyPI has no +cpu build of torch, an index set up on this machine may have one
  if ! pip_install "installing $torch" "$total" "$torch"; then
    if [[ $torch != *+cpu ]] || ! tail -n 20 "$LOG" | grep -q 'No matching distribution'; then fail_install; fi
    pip_install "installing $torch from $TORCH_CPU_INDEX" "$total" --extra-index-url "$TORCH_CPU_INDEX" "$torch" ||
      fail_install
  fi
  pip_install "installing" "$total" -r "$lock" || fail_install
  pip_install "installing rayalign" "$total" --no-build-isolation -e "$ROOT" || fail_install
}

fingerprint() { printf '%s %s %s\n' "$(cksum <"$1")" "$(cksum <"$ROOT/setup.py")" "$ROOT"; }
is_ready() { [[ -x $VENV/bin/python && $(cat "$STAMP" 2>/dev/null) == "$(fingerprint "$1")" ]]; }

setup() { # makes .venv what the lock says; returns at once when it already is
  local stack=${RAYALIGN_STACK:-cpu} lock started=$SECONDS
  lock=$ROOT/launch/requirements-$stack.lock
  [[ -f $lock ]] || die "RAYALIGN_STACK=$stack is not cpu or gpu"
  if is_ready "$lock"; then return; fi
  [[ $(uname -s) == Linux ]] || die "the locked versions are built for Linux, and this is $(uname -s)"
  wait_for_other_setup
  if ! is_ready "$lock"; then # asked again: another setup may have done it meanwhile
    check_disk
    rm -f "$STAMP"
    make_venv
    install_lock "$lock"
    fingerprint "$lock" >"$STAMP"
    say "rayalign: .venv is ready after $((SECONDS - started)) s"
  fi
  exec 9>&- # what is started from here on must not hold the lock
}

quiet_env() { # no usage reports, and no warnings about what is as it should be
  export RAY_USAGE_STATS_ENABLED=0 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
  export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0 RAY_DEDUP_LOGS=1 TOKENIZERS_PARALLELISM=false
}
