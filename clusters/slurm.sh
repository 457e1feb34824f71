#!/bin/bash
# Several machines of a SLURM cluster: one torchrun on each, a rank for each GPU.
#   sbatch clusters/slurm.sh --model Qwen/Qwen3-4B --data my.jsonl
# Submit it in the project's folder, on a file system that all machines share.
#SBATCH --job-name=twintune
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
set -euo pipefail
[[ " $* " == *" --resume"[\ =]* ]] || set -- --output "runs/slurm-$SLURM_JOB_ID" "$@"
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "$head:29500" --rdzv-id "$SLURM_JOB_ID" \
    cli.py train "$@"
