#!/bin/bash
# The study on nodes of a SLURM cluster that share the folder it is in: sbatch conf/cluster/slurm.sh PROFILE=qwen3_4b, or
# sbatch --nodes=1 … for eight GPUs in place of sixteen. Other numbers: a file of conf/accelerate in $ACCELERATE_CONFIG.
# It goes on where it was when the job is pre-empted, or out of time, and queued again: two minutes before, SLURM tells this
# script, every stage at work writes its checkpoint, and the job asks for its next turn.
#SBATCH --job-name=featdiff
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
set -u
cd "${SLURM_SUBMIT_DIR:-.}" || exit 2
case "${SLURM_NNODES:-2}" in 1) usual=gpu_8_fsdp ;; *) usual=gpu_2x8_fsdp ;; esac
export ACCELERATE_CONFIG="${ACCELERATE_CONFIG:-conf/accelerate/$usual.yaml}"
export FEATDIFF_NODES="${FEATDIFF_NODES:-srun --ntasks-per-node=1 --overlap}"

asked= interrupted=
make repro "$@" &
study=$!
trap 'asked=yes interrupted=yes; pkill -TERM -P "$study"' TERM INT
while :; do  # a signal ends a wait with a status of its own, not the study's
    interrupted=
    wait "$study"
    status=$?
    [ -n "$interrupted" ] || break
done
if [ -n "$asked" ] && [ "$status" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
