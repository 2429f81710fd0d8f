#!/usr/bin/env bash
# What tpu_vm.sh runs on every worker, from the code that it copied there.
#
#   worker.sh setup EXTRA            .venv with llava_jax and an extra of setup.py (tpu, cuda)
#   worker.sh start PLATFORM ARGS    trains in the background, with the flags of llava_jax/xla_flags.py for the platform
#   worker.sh follow                 prints the log from its beginning until the training ends
#   worker.sh status                 one word: none (never started), running, done, failed (a mistake to mend) or
#                                    interrupted (by a signal from outside: starting again resumes)
#   worker.sh stop                   SIGTERM, which saves; SIGKILL after two minutes
#
# The log, the process id and the exit status are in $LLAVA_RUN, by default run/ beside the code.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
LLAVA_RUN="${LLAVA_RUN:-run}"

setup() {
  # The images have Python 3.10; uv brings its own where there is no 3.11.
  python3 -m pip install --quiet --user --upgrade uv
  [ -d .venv ] || python3 -m uv venv --quiet --python 3.11 .venv
  python3 -m uv pip install --quiet --python .venv/bin/python -e ".[$1]"
  echo "$(hostname): ready"
}

start() {
  if [ "$(status)" = running ]; then
    echo "error: $(hostname) is training already; stop it first" >&2
    exit 1
  fi
  mkdir -p "$LLAVA_RUN"
  rm -f "$LLAVA_RUN/exit_status"
  # In a session of its own, so that it outlives the connection that started it; `train` writes down how it ended.
  setsid nohup launch/worker.sh train "$@" >"$LLAVA_RUN/log.txt" 2>&1 </dev/null &
  echo "$!" >"$LLAVA_RUN/pid"
  echo "$(hostname): training"
}

train() {
  local status=0
  trap : TERM # outlives the training, which saves first
  launch/train.sh "$@" || status=$?
  echo "$status" >"$LLAVA_RUN/exit_status"
}

follow() {
  [ "$(status)" != none ] || {
    echo "error: $(hostname): nothing was started" >&2
    exit 1
  }
  tail -n +1 --pid="$(cat "$LLAVA_RUN/pid")" -F "$LLAVA_RUN/log.txt"
}

status() {
  if [ ! -f "$LLAVA_RUN/pid" ]; then
    echo none
  elif [ -f "$LLAVA_RUN/exit_status" ]; then
    case "$(cat "$LLAVA_RUN/exit_status")" in
      0) echo 'done' ;;
      ? | ?? | 1[01]? | 12[0-7]) echo failed ;;
      *) echo interrupted ;;
    esac
  elif kill -0 "$(cat "$LLAVA_RUN/pid")" 2>/dev/null; then
    echo running
  else
    echo interrupted
  fi
}

stop() {
  [ "$(status)" = running ] || return 0
  local group second
  group="$(cat "$LLAVA_RUN/pid")"
  kill -TERM -- "-$group"
  for ((second = 0; second < 120; second++)); do
    [ "$(status)" = running ] || return 0
    sleep 1
  done
  kill -KILL -- "-$group"
}

case "${1:-}" in
  setup | start | train) "$@" ;;
  follow | status | stop) "$1" ;;
  *)
    echo "error: worker.sh $(printf '%q' "${1:-}"): not one of setup, start, follow, status, stop" >&2
    exit 2
    ;;
esac
