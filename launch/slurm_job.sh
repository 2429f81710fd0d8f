#!/usr/bin/env bash
# The job that slurm.sh submits. JAX finds the coordinator, the number of processes and this process's GPU in SLURM's
# variables, which takes one process a GPU.

set -euo pipefail

status=0
srun --kill-on-bad-exit=1 launch/train.sh gpu "$@" || status=$?
# 143 is an end by SIGTERM, which the time limit sends and after which everything is saved: to be continued.
if [ "$status" -eq 143 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
