#!/usr/bin/env bash
# Train the job of a TOML file: [NGPU=2] [CONFIG_FILE=my.toml] ./run_train.sh [--any.option value]
#
# NGPU       processes on this machine, one per GPU (default 1); Slurm's h100:4 means 4
# NNODES     machines (default 1); with more, set RDZV_ENDPOINT=host:port, the same on all of them,
#            and RDZV_ID where several jobs share that endpoint; scripts/slurm.sbatch does both
# CONFIG_FILE  the job (default train_configs/debug_model.toml), relative to here or to the
#            repository; paths in it and in flags are relative to the same place
# TORCH_ELASTIC_SHUTDOWN_TIMEOUT  seconds to save in after SIGTERM (default 600; torch 2.11: always 30)
# LOG_RANK   ranks whose output is shown, e.g. 0,1 (default: all; only rank 0 reports progress)
set -euo pipefail
if [ ! -f "${CONFIG_FILE:=train_configs/debug_model.toml}" ]; then
    cd "$(dirname "$0")"  # the jobs of the repository have paths relative to it
fi
# One thread a process, as torchrun sets it for several: more only wait for each other on small
# models, and cost several times the time on a machine that is busy otherwise.
export NGPU=${NGPU:-1} NNODES=${NNODES:-1} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
if ! [[ $NGPU =~ ^([A-Za-z0-9._-]+:)?[1-9][0-9]*$ && $NNODES =~ ^[1-9][0-9]*$ ]]; then
    echo "error: NGPU=$NGPU and NNODES=$NNODES must be numbers from 1, like NGPU=8 (or h100:8)" >&2
    exit 2
fi
NGPU=${NGPU##*:}
job=(--config_file "$CONFIG_FILE" "$@")

# A wrong config is refused here, in one process, before any other starts.
WORLD_SIZE=$((NGPU * NNODES)) python -m torchrft.config "${job[@]}" || { code=$?; [ "$code" = 10 ] && exit 0; exit "$code"; }

if [ "$NNODES" -gt 1 ] && [ -z "${RDZV_ENDPOINT:-}" ]; then
    echo "error: NNODES=$NNODES needs RDZV_ENDPOINT=host:port, the same on all machines" >&2
    exit 2
fi
exec torchrun --nnodes "$NNODES" --nproc_per_node "$NGPU" \
    --rdzv_backend c10d --rdzv_endpoint "${RDZV_ENDPOINT:-localhost:0}" --rdzv_id "${RDZV_ID:-torchrft}" \
    ${LOG_RANK:+--local-ranks-filter "$LOG_RANK" --tee 3} \
    -m torchrft.train "${job[@]}"
