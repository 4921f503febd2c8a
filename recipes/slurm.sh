#!/bin/bash
# The whole pipeline on several machines of a Slurm cluster, one launcher a machine:
#
#     sbatch --nodes 2 recipes/slurm.sh --recipe d32 --run-dir /shared/runs/d32
#
# The run folder and HF_HOME must be on storage that all machines see. A minute before the time is up Slurm sends SIGTERM:
# pretraining saves and leaves; submitted again (or requeued) the same command resumes.
# NANOCHAT_ROOT: the folder of recipes/ and configs/, for a job that is submitted elsewhere.
#SBATCH --job-name=nanochat_hf
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@60
#SBATCH --requeue
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
export MACHINES=$SLURM_NNODES PROCESSES=$((SLURM_NNODES * ${SLURM_GPUS_ON_NODE:-8}))
export NANOCHAT_ROOT=${NANOCHAT_ROOT:-.}
export FIRST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) PORT=${MASTER_PORT:-29500}
exec srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch --config_file "$NANOCHAT_ROOT/configs/accelerate/multi_node.yaml" \
    --num_machines "$MACHINES" --num_processes "$PROCESSES" --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$FIRST" --main_process_port "$PORT" "$NANOCHAT_ROOT/recipes/speedrun.py" "$@"' launch "$@"
