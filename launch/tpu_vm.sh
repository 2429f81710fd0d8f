#!/usr/bin/env bash
# Trains on a Cloud TPU VM or pod slice, through queued resources.
#
#   launch/tpu_vm.sh COMMAND --name=N --project=P --zone=Z [--dry-run] [OPTIONS] [-- FLAGS OF llava_jax.main]
#
# example:
#   launch/tpu_vm.sh train --name=llava --project=my-project --zone=us-central2-b --accelerator=v4-32 --spot -- \
#     --config=configs/finetune.py --workdir=gs://bucket/finetune --config.init=gs://bucket/pretrain \
#     --config.data.json=gs://bucket/mix665k.json --config.data.images=gs://bucket/images
#
# commands:
#   train    everything: create, setup, start, logs; after a preemption again, until the training is done
#   create   asks for the slice and waits for it
#   setup    copies this directory to all workers and installs it there
#   start    starts the training on all workers (-- FLAGS) and returns
#   logs     prints the log of worker 0 from its beginning until the training ends
#   status   the state of the slice and of the training
#   stop     SIGTERM to all workers: the step ends and is saved; `start` resumes
#   delete   gives the slice back
#
# options:
#   --accelerator=T   v4-8, v5litepod-16, v5p-8, v6e-8, ... (train, create, start)
#   --runtime=V       image of the VMs; by default the one for the accelerator
#   --spot            may be preempted, costs less
#   --reserved        from a reservation
#   --restarts=N      train gives up after so many preemptions or crashes (default 20)
#   --dry-run         prints the commands instead of running them

set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=launch/common.sh
source "$ROOT/launch/common.sh"

REMOTE=llava_jax         # the directory on the workers, in the home
POLL="${LLAVA_POLL:-30}" # seconds between looks at the state

# ---------------------------------------------------------------------------------------------------- arguments

parse() {
  COMMAND="${1:-}" NAME="" PROJECT="" ZONE="" ACCELERATOR="" RUNTIME="" TIER="" RESTARTS=20
  case "$COMMAND" in
    train | create | setup | start | logs | status | stop | delete) shift ;;
    -h | --help) usage "$0" && exit 0 ;;
    *) die "the first argument is $(quote "$COMMAND"), not one of train, create, setup, start, logs, status, stop, delete" ;;
  esac
  while [ $# -gt 0 ]; do
    case "$1" in
      -h | --help) usage "$0" && exit 0 ;;
      --name=*) NAME="${1#*=}" ;;
      --project=*) PROJECT="${1#*=}" ;;
      --zone=*) ZONE="${1#*=}" ;;
      --accelerator=*) ACCELERATOR="${1#*=}" ;;
      --runtime=*) RUNTIME="${1#*=}" ;;
      --restarts=*) RESTARTS="${1#*=}" ;;
      --spot | --reserved)
        [ -z "$TIER" ] || [ "$TIER" = "$1" ] || die "--spot and --reserved exclude each other"
        TIER="$1"
        ;;
      --dry-run) DRY_RUN=true ;;
      --)
        shift
        TRAINING=("$@")
        break
        ;;
      *) die "unknown option $(quote "$1"); see --help" ;;
    esac
    shift
  done
}

check() {
  check_name "$NAME"
  check_google_cloud "$PROJECT" "$ZONE"
  match restarts "$RESTARTS" '[0-9]{1,6}' 20
  case "$COMMAND" in
    train | create | start) check_accelerator "$ACCELERATOR" ;;
  esac
  case "$COMMAND" in
    train | create)
      RUNTIME="${RUNTIME:-$(runtime_of "$ACCELERATOR")}"
      match runtime "$RUNTIME" '[a-z0-9][a-z0-9.-]*' v2-alpha-tpuv6e
      ;;
  esac
  case "$COMMAND" in
    train | start) check_training remote ;;
    *) [ ${#TRAINING[@]} -eq 0 ] || die "$COMMAND takes nothing after --" ;;
  esac
}

# https://cloud.google.com/tpu/docs/runtimes
runtime_of() {
  case "${1%-*}" in
    v4) echo tpu-ubuntu2204-base ;;
    v5litepod) echo v2-alpha-tpuv5-lite ;;
    v5p) echo v2-alpha-tpuv5 ;;
    v6e) echo v2-alpha-tpuv6e ;;
  esac
}

# -------------------------------------------------------------------------------------------------- the slice

queued() {
  run gcloud compute tpus queued-resources "$1" "$NAME" --project="$PROJECT" --zone="$ZONE" "${@:2}"
}

# ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED, ...; NONE if there is no such request. (Not called in a dry run.)
state() {
  local answer
  if answer="$(queued describe --format='value(state.state)' 2>&1)"; then
    printf '%s\n' "$answer"
  elif [[ $answer == *NOT_FOUND* || $answer == *"not found"* ]]; then
    echo NONE
  else
    printf 'error: %s\n' "$answer" >&2
    return 1
  fi
}

delete() {
  queued delete --quiet --force
}

request() {
  queued create --node-id="$NAME" --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" ${TIER:+"$TIER"}
}

# Returns when the slice is ours. What was preempted or failed is deleted and asked for again.
create() {
  if "$DRY_RUN"; then
    say "every $POLL seconds until the state is ACTIVE:"
    queued describe --format='value(state.state)'
    say "if the state is SUSPENDED or FAILED:"
    delete
    say "if there is no such request, or no longer:"
    request
    say "once it is ACTIVE:"
    return
  fi
  local state last=""
  while true; do
    state="$(state)" || return 1
    [ "$state" = "$last" ] || say "$(date '+%F %T') $NAME: $state"
    last="$state"
    case "$state" in
      ACTIVE) return ;;
      NONE) request || return 1 ;;
      SUSPENDED | FAILED) delete || return 1 ;;
      *) sleep "$POLL" ;;
    esac
  done
}

# --------------------------------------------------------------------------------------------------- the workers

# on WORKER COMMAND...: runs a command in the directory of the code on one worker or all. Its words arrive as they are.
on() {
  run gcloud compute tpus tpu-vm ssh "$NAME" --project="$PROJECT" --zone="$ZONE" --worker="$1" \
    --command="cd $REMOTE && $(quote "${@:2}")"
}

# Stops at the first command that fails, also where `set -e` is off because the caller asks for the status.
setup() {
  local archive=/tmp/llava_jax.tar.gz copied=0
  "$DRY_RUN" || archive="$(mktemp)" || return
  run tar -czf "$archive" -C "$ROOT" --exclude='./.venv*' --exclude=./.git --exclude=./runs --exclude=./run \
    --exclude=./dist --exclude=./build --exclude=./site \
    --exclude=./.pytest_cache --exclude=./.hypothesis --exclude=__pycache__ . &&
    run gcloud compute tpus tpu-vm scp "$archive" "$NAME:llava_jax.tar.gz" \
      --project="$PROJECT" --zone="$ZONE" --worker=all || copied=$?
  run rm "$archive"
  [ "$copied" -eq 0 ] || return "$copied"
  run gcloud compute tpus tpu-vm ssh "$NAME" --project="$PROJECT" --zone="$ZONE" --worker=all \
    --command="mkdir -p $REMOTE && tar -xzf llava_jax.tar.gz -C $REMOTE && $REMOTE/launch/worker.sh setup tpu"
}

start() {
  on all launch/worker.sh start "$(flags_of "$ACCELERATOR")" "${TRAINING[@]}"
}

logs() {
  on 0 launch/worker.sh follow
}

stop() {
  on all launch/worker.sh stop
}

status() {
  queued describe --format='value(state.state)'
  on all launch/worker.sh status
}

# ------------------------------------------------------------------------------------------------ all of it

train() {
  local restart
  for ((restart = 0; restart <= RESTARTS; restart++)); do
    create || exit 1
    if setup && stop && start && watch; then
      say "done; the slice is still there and costs money: launch/tpu_vm.sh delete --name=$NAME ..."
      return
    fi
    if "$DRY_RUN"; then
      say "if that was not the end: again from the top; the training resumes from its workdir"
      return
    fi
    say "$(date '+%F %T') $NAME: interrupted ($restart times before); again"
    sleep "$POLL"
  done
  say "error: interrupted more than $RESTARTS times (--restarts)"
  exit 1
}

# Prints the log as long as the training runs, over any number of connections. False if it was interrupted.
watch() {
  local outcome
  if "$DRY_RUN"; then
    logs
    on 0 launch/worker.sh status
    return 1
  fi
  while true; do
    logs || true
    outcome="$(on 0 launch/worker.sh status | tail -n 1)"
    case "$outcome" in
      done) return 0 ;;
      failed) say "error: the training failed; the last lines of its log say why" && exit 1 ;;
      running) sleep "$POLL" ;;
      *) return 1 ;;
    esac
  done
}

parse "$@"
check
"$COMMAND"
