#!/bin/bash
# A job of Slurm, submitted by: sbatch THIS_FILE. Add what your cluster asks for, such as --account and --partition.
# All nodes must see this folder, the run folder and HF_HOME.
#SBATCH --job-name=$name
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=$gpus_per_node
#SBATCH --exclusive
#SBATCH --time=$hours:00:00
#SBATCH --signal=TERM@60
#SBATCH --requeue
NANOCHAT_ROOT=$root exec bash $root/recipes/slurm.sh $words
