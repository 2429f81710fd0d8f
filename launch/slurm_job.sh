#!/usr/bin/env bash
# The job that slurm.sh submits. JAX finds the coordinator, the number of processes and this process's GPU in SLURM's
# variables, which takes one process a GPU.

set -euo pipefail

status=0
srun --kill-on-bad-exit=1 launch/train.sh gpu "$@" || status=$?
# 143 is an end by SIGTERM, after which everything is saved. The time limit sends it to a job that still runs, which is to
# be continued; scancel sends it, too, but to a job that is over by then.
if [ "$status" -eq 143 ] && [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
