#!/usr/bin/env bash
# Trains on GPU nodes of a SLURM cluster: submits slurm_job.sh, one process a GPU.
#
#   launch/slurm.sh --nodes=N --gpus=N [--dry-run] [OPTIONS] -- FLAGS OF llava_jax.main
#
# example, after `pip install -e '.[cuda]'` into .venv on a disk that the nodes share:
#   launch/slurm.sh --nodes=2 --gpus=8 --time=24:00:00 --partition=h100 -- \
#     --config=configs/finetune.py --workdir=/scratch/runs/finetune --config.init=/scratch/runs/pretrain \
#     --config.data.json=/scratch/mix665k.json --config.data.images=/scratch/images
#
# options:
#   --gpus=N        GPUs of a node, all of which are used
#   --cpus=N        CPUs a GPU (default 8)
#   --time=T        limit, as in 30, 2:00:00 or 1-12:00:00; five minutes before it the run saves and queues again
#   --partition=P --account=A --qos=Q   as sbatch has them
#   --name=N        of the job (default llava)
#   --dry-run       prints the command instead of running it

set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=launch/common.sh
source "$ROOT/launch/common.sh"

parse() {
  NAME=llava NODES="" GPUS="" CPUS=8 TIME="" OTHER=()
  while [ $# -gt 0 ]; do
    case "$1" in
      -h | --help) usage "$0" && exit 0 ;;
      --name=*) NAME="${1#*=}" ;;
      --nodes=*) NODES="${1#*=}" ;;
      --gpus=*) GPUS="${1#*=}" ;;
      --cpus=*) CPUS="${1#*=}" ;;
      --time=*) TIME="${1#*=}" ;;
      --partition=?* | --account=?* | --qos=?*) OTHER+=("$1") ;;
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
  match nodes "$NODES" '[1-9][0-9]{0,3}' 2
  match gpus "$GPUS" '[1-9]|1[0-6]' '8 (1 to 16)'
  match cpus "$CPUS" '[1-9][0-9]{0,2}' 8
  [ -z "$TIME" ] || match time "$TIME" '([0-9]+-)?[0-9]+(:[0-9]{2}){0,2}' '2:00:00 or 1-12:00:00'
  check_training local
}

parse "$@"
check
# --signal reaches the processes of the step, not this script's; --requeue brings the job back after a preemption or
# the loss of a node, and the log goes on where it was.
run sbatch --job-name="$NAME" --nodes="$NODES" --ntasks-per-node="$GPUS" --gpus-per-node="$GPUS" \
  --cpus-per-task="$CPUS" ${TIME:+--time="$TIME"} ${OTHER[@]+"${OTHER[@]}"} \
  --signal=TERM@300 --requeue --open-mode=append --output="$PWD/$NAME-%j.log" --chdir="$ROOT" \
  "$ROOT/launch/slurm_job.sh" "${TRAINING[@]}"
