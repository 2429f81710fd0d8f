#!/usr/bin/env bash
# Trains on TPUs of a GKE cluster, through xpk (pip install xpk; https://github.com/AI-Hypercomputer/xpk).
#
#   launch/gke.sh COMMAND --project=P --zone=Z [--dry-run] [OPTIONS] [-- FLAGS OF llava_jax.main]
#
# example:
#   launch/gke.sh image --project=my-project --zone=us-east5-b --image=us-docker.pkg.dev/my-project/images/llava:1
#   launch/gke.sh cluster --project=my-project --zone=us-east5-b --cluster=tpus --accelerator=v6e-16 --spot
#   launch/gke.sh run --project=my-project --zone=us-east5-b --cluster=tpus --accelerator=v6e-16 --name=llava \
#     --image=us-docker.pkg.dev/my-project/images/llava:1 -- \
#     --config=configs/finetune.py --workdir=gs://bucket/finetune --config.init=gs://bucket/pretrain \
#     --config.data.json=gs://bucket/mix665k.json --config.data.images=gs://bucket/images
#
# commands:
#   image    builds launch/Dockerfile and pushes it (--image)
#   cluster  makes a cluster with one slice (--cluster, --accelerator)
#   run      trains (--cluster, --accelerator, --name, --image, -- FLAGS); restarts after a preemption and resumes
#   logs     prints the log of host 0 as it grows (--cluster, --name)
#   stop     SIGTERM: the step ends and is saved; `run` resumes (--cluster, --name)
#   delete   deletes the cluster (--cluster)
#
# options:
#   --image=I         registry/repository/name:tag
#   --accelerator=T   v4-8, v5litepod-16, v5p-8, v6e-8, ...
#   --spot            cluster: nodes that may be preempted and cost less; without it on-demand nodes
#   --restarts=N      run: gives up after so many preemptions (default 20)
#   --dry-run         prints the commands instead of running them

set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=launch/common.sh
source "$ROOT/launch/common.sh"

GRACE=300 # seconds that a step has to end and to be saved when the node goes away

parse() {
  COMMAND="${1:-}" NAME="" PROJECT="" ZONE="" CLUSTER="" ACCELERATOR="" IMAGE="" TIER=--on-demand RESTARTS=20
  case "$COMMAND" in
    image | cluster | run | logs | stop | delete) shift ;;
    -h | --help) usage "$0" && exit 0 ;;
    *) die "the first argument is $(quote "$COMMAND"), not one of image, cluster, run, logs, stop, delete" ;;
  esac
  while [ $# -gt 0 ]; do
    case "$1" in
      -h | --help) usage "$0" && exit 0 ;;
      --name=*) NAME="${1#*=}" ;;
      --project=*) PROJECT="${1#*=}" ;;
      --zone=*) ZONE="${1#*=}" ;;
      --cluster=*) CLUSTER="${1#*=}" ;;
      --accelerator=*) ACCELERATOR="${1#*=}" ;;
      --image=*) IMAGE="${1#*=}" ;;
      --restarts=*) RESTARTS="${1#*=}" ;;
      --spot) TIER="$1" ;;
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
  check_google_cloud "$PROJECT" "$ZONE"
  match restarts "$RESTARTS" '[0-9]{1,6}' 20
  [ "$COMMAND" = image ] || match cluster "$CLUSTER" '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' tpus
  case "$COMMAND" in
    run | logs | stop) check_name "$NAME" ;;
  esac
  case "$COMMAND" in
    cluster | run) check_accelerator "$ACCELERATOR" ;;
  esac
  case "$COMMAND" in
    image | run) match image "$IMAGE" '[a-z0-9.:-]+(/[a-zA-Z0-9._-]+)+:[a-zA-Z0-9._-]+' us-docker.pkg.dev/project/repository/llava:1 ;;
  esac
  case "$COMMAND" in
    run) check_training remote ;;
    *) [ ${#TRAINING[@]} -eq 0 ] || die "$COMMAND takes nothing after --" ;;
  esac
}

on_cluster() { # xpk's command in two words, then its options
  run xpk "$1" "$2" --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE" "${@:3}"
}

image() {
  run docker build --file="$ROOT/launch/Dockerfile" --build-arg=EXTRA=tpu --tag="$IMAGE" "$ROOT"
  run docker push "$IMAGE"
}

cluster() {
  on_cluster cluster create --tpu-type="$ACCELERATOR" --num-slices=1 "$TIER"
}

# exec, so that xpk's SIGTERM reaches the training. xpk restarts what ends by a signal, and nothing else.
start() {
  on_cluster workload create --workload="$NAME" --tpu-type="$ACCELERATOR" --num-slices=1 --docker-image="$IMAGE" \
    --max-restarts="$RESTARTS" --termination-grace-period-seconds="$GRACE" \
    --command="exec launch/train.sh $(flags_of "$ACCELERATOR") $(quote "${TRAINING[@]}")"
}

logs() {
  run gcloud container clusters get-credentials "$CLUSTER" --project="$PROJECT" --region="${ZONE%-*}"
  run kubectl logs --follow --tail=-1 \
    --selector="xpk.google.com/workload=$NAME,batch.kubernetes.io/job-completion-index=0"
}

stop() {
  on_cluster workload delete --workload="$NAME" --force
}

delete() {
  on_cluster cluster delete --force
}

parse "$@"
check
case "$COMMAND" in
  run) start ;;
  *) "$COMMAND" ;;
esac
