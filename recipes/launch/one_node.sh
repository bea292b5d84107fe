#!/bin/sh
# One machine, all of its GPUs:   recipes/launch/one_node.sh RECIPE.yaml [section.key=value ...]
#   GPUS=4       fewer of them; on a machine without any, that many CPU processes (default 1)
#   RESTARTS=3   times that all processes are started again after one of them died; each time they go on from the last checkpoint
# Ends with 0, with 2 for a mistake in the recipe, with 75 where a signal stopped it (run it again to go on), otherwise with 1.
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
gpus=${GPUS:-$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)}
[ "$gpus" != 0 ] || gpus=1
# torchrun dies of signals that it is not told to hand on to its processes
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
export TORCHELASTIC_SIGNALS_TO_HANDLE=$PET_SIGNALS_TO_HANDLE
# and kills them half a minute after a signal: two long updates and a checkpoint may take more
export PET_SHUTDOWN_TIMEOUT="${PET_SHUTDOWN_TIMEOUT:-110}"
exec torchrun --nproc-per-node "$gpus" --rdzv-backend c10d --rdzv-endpoint localhost:0 --max-restarts "${RESTARTS:-3}" \
	"$here/../../engine/train.py" "$@"
