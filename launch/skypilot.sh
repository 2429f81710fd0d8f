#!/usr/bin/env bash
# Trains on GPUs or TPUs of any cloud that SkyPilot has (pip install skypilot), as a managed job: preempted machines are
# replaced, and the training resumes.
#
#   launch/skypilot.sh --name=N --accelerators=A [--dry-run] [OPTIONS] -- FLAGS OF llava_jax.main
#
# example:
#   launch/skypilot.sh --name=llava --accelerators=H100:8 --nodes=2 --spot -- \
#     --config=configs/finetune.py --workdir=gs://bucket/finetune --config.init=gs://bucket/pretrain \
#     --config.data.json=gs://bucket/mix665k.json --config.data.images=gs://bucket/images
#
# options:
#   --accelerators=A   of a node: H100:8, A100-80GB:8, ..., or tpu-v4-8, tpu-v5litepod-8, tpu-v6e-8, ...
#   --nodes=N          (default 1; GPUs only)
#   --infra=I          as in gcp/us-central1 or k8s
#   --spot             may be preempted, costs less
#   --dry-run          prints the command instead of running it

set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=launch/common.sh
source "$ROOT/launch/common.sh"

parse() {
  NAME="" ACCELERATORS="" NODES=1 INFRA="" TIER=""
  while [ $# -gt 0 ]; do
    case "$1" in
      -h | --help) usage "$0" && exit 0 ;;
      --name=*) NAME="${1#*=}" ;;
      --accelerators=*) ACCELERATORS="${1#*=}" ;;
      --nodes=*) NODES="${1#*=}" ;;
      --infra=*) INFRA="${1#*=}" ;;
      --spot) TIER=--use-spot ;;
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
  match nodes "$NODES" '[1-9][0-9]{0,2}' 2
  [ -z "$INFRA" ] || match infra "$INFRA" '[a-z0-9-]+(/[A-Za-z0-9_.*-]+){0,2}' gcp/us-central1
  need accelerators "$ACCELERATORS"
  case "$ACCELERATORS" in
    tpu-*)
      ACCELERATOR="${ACCELERATORS#tpu-}"
      check_accelerator "$ACCELERATOR"
      [ "$NODES" -eq 1 ] || die "--nodes is $NODES: a TPU slice is one node, however many hosts it has"
      PLATFORM="$(flags_of "$ACCELERATOR")" EXTRA=tpu
      ;;
    *)
      match accelerators "$ACCELERATORS" '[A-Z][A-Za-z0-9-]*:([1-9]|1[0-6])' 'H100:8 or tpu-v6e-8'
      PLATFORM=gpu EXTRA=cuda
      ;;
  esac
  check_training remote
}

parse "$@"
check
run sky jobs launch --name="$NAME" --gpus="$ACCELERATORS" --num-nodes="$NODES" ${INFRA:+--infra="$INFRA"} \
  ${TIER:+"$TIER"} --env=EXTRA="$EXTRA" --env=PLATFORM="$PLATFORM" --env=TRAINING="$(quote "${TRAINING[@]}")" \
  --workdir="$ROOT" --yes "$ROOT/launch/skypilot.yaml"
