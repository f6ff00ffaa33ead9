#!/bin/bash
# Train on several nodes under Slurm, from the repository's root, with its environment active:
#
#     sbatch train/configs/slurm.sh train/configs/large.yaml
#
# One task for each GPU; srun starts them, so neither ssh nor a hostfile is needed. Repository, corpora and 'out' lie on a
# file system that all nodes see. Other numbers of nodes: sbatch --nodes 4 ...; partition and account likewise.
# A job that ran out of time goes on when it is submitted again; several at once, one after the other:
#
#     sbatch --dependency=singleton train/configs/slurm.sh train/configs/large.yaml
#
#SBATCH --job-name=speechllm
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@1200
#SBATCH --output=slurm-%j.log
# 8 tasks a node for 8 GPUs; all memory of a node; SIGTERM 20 minutes before the end, on which a run saves its state.

set -euo pipefail
config=${1:?usage: sbatch train/configs/slurm.sh CONFIG}

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000)) # two jobs on a node must not meet
export MASTER_ADDR MASTER_PORT
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # loaders are processes
export DEEPSPEED_TIMEOUT=${DEEPSPEED_TIMEOUT:-120} # minutes: ranks wait while rank 0 rewrites a large state

# A task that dies ends the job: the others would wait for it. A task sees all GPUs of its node, so that NCCL can use the
# links between them, and takes the one of its LOCAL_RANK.
srun --kill-on-bad-exit=1 --gpu-bind=none --cpus-per-task="${SLURM_CPUS_PER_TASK:-8}" bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    exec python train/pretrain.py --config "$0" --resume
' "$config"
