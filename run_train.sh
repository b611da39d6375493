#!/usr/bin/env bash
# Train the job of a TOML file: [NGPU=2] [CONFIG_FILE=my.toml] ./run_train.sh [--any.option value]
#
# NGPU       processes on this machine, one per GPU (default 1); Slurm's h100:4 means 4
# NNODES     machines (default 1); with more, set RDZV_ENDPOINT=host:port, the same on all of them:
#            the address of one of them in a private network; and RDZV_ID where several jobs may meet
#            there; scripts/slurm.sbatch does both
# CONFIG_FILE  the job (default train_configs/debug_model.toml), relative to here or to the
#            repository; paths in it and in flags are relative to the same place
# TORCH_ELASTIC_SHUTDOWN_TIMEOUT  seconds to save in after SIGTERM (default 600)
# LOG_RANK   ranks whose output is shown, e.g. 0,1 (default: all); warnings and faults always are
#
# Ends with 0, 128 + signal after Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 (all save first), 2 for a wrong
# config, and 1 for any other fault.
set -euo pipefail
if [ ! -f "${CONFIG_FILE:=train_configs/debug_model.toml}" ]; then
    cd "$(dirname "$0")"  # the jobs of the repository have paths relative to it
fi
# One thread a process, as torchrun sets it for several: more only wait for each other on small
# models, and cost several times the time on a machine that is busy otherwise.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
exec python -m torchrft.launch --config_file "$CONFIG_FILE" "$@"
