#!/bin/sh
# Several machines: run this on each of them, within ten minutes, with the same arguments.
#   NODES=2 HEAD=10.0.0.1 recipes/launch/several_nodes.sh RECIPE.yaml [section.key=value ...]
#   NODES   how many machines; 2:4 goes on with as few as two, and takes up to four
#   HEAD    name or address of one of them, which keeps the list;   PORT   free on it, default 29400
#   GPUS    of a machine, default all;   RESTARTS   default 3;   JOB   name of the run among others at HEAD, default vpgtrans
# The code, the recipe, its inputs and output.folder have to be the same everywhere: a shared file system, or copies of all but the output.
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
: "${NODES:?how many machines, for example NODES=2}" "${HEAD:?name or address of one of them, for example HEAD=10.0.0.1}"
gpus=${GPUS:-$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)}
[ "$gpus" != 0 ] || gpus=1
# torchrun dies of signals that it is not told to hand on to its processes
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
export TORCHELASTIC_SIGNALS_TO_HANDLE=$PET_SIGNALS_TO_HANDLE
# and kills them half a minute after a signal: two long updates and a checkpoint may take more
export PET_SHUTDOWN_TIMEOUT="${PET_SHUTDOWN_TIMEOUT:-110}"
exec torchrun --nnodes "$NODES" --nproc-per-node "$gpus" --rdzv-backend c10d --rdzv-id "${JOB:-vpgtrans}" \
	--rdzv-endpoint "$HEAD:${PORT:-29400}" --max-restarts "${RESTARTS:-3}" "$here/../../engine/train.py" "$@"
