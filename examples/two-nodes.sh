#!/bin/bash
# Pretraining on two machines without a scheduler. On each of them:
#     examples/two-nodes.sh NUMBER ADDRESS [settings...]
# NUMBER is 0 on the first and 1 on the second, ADDRESS the first one's. RANKS is how many GPUs each has, or CPU ranks.
# `output` must be a folder that both see, on a shared disk. Where a machine has several networks, GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the one between them.
set -euo pipefail
exec torchrun --nnodes 2 --node-rank "$1" --nproc-per-node "${RANKS:-gpu}" --master-addr "$2" \
    --master-port "${PORT:-29500}" --shutdown-timeout 600 --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    -m mics_models.pretrain "${@:3}"
