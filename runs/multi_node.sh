#!/usr/bin/env bash
# GPT-2 124M on several machines of 8 GPUs: the same command on each of them, in any order.
#
#   HEAD=machine0:29400 NODES=2 bash runs/multi_node.sh
#
# A step      32 windows x 16 GPUs x 1 micro-step = 512 windows x 1,024 tokens = 524,288 tokens
# The run     19,073 steps x 524,288 tokens = 10.0 B tokens x 855 MFLOP = 8.55e18 FLOP
# Expected    with 8 network cards of 200 (A100) or 400 Gbit/s (H100) a machine, then with one of 25 Gbit/s:
#   gpt2 plan --gpus 16 --gpu A100-80                      -> 53.6 min, $25.01
#   gpt2 plan --gpus 16 --gpu H100                         -> 23.0 min, $21.44
#   gpt2 plan --gpus 16 --gpu H100 --network 25            -> 2.0 h, $111.29
# Each step sends 0.93 GB of gradients through each link: a slow network is what makes more machines useless, and
# `gpt2 plan --gpus 16 --network GBIT` says so beforehand.
#
# HEAD    host:port of any one of the machines; torchrun's rendezvous listens there
# NODES   machines; MIN:MAX lets the run go on with fewer when one is lost (the GPUs must divide the 512 windows)
# DATA    the same shards under the same path on each machine: copied, or on a disk that all see
# RUN     on a disk that all see. On disks of their own it works as long as the same machines take part: torchrun
#         numbers them by their names, and the first one writes.
set -euo pipefail

HEAD=${HEAD:?"set HEAD to host:port of one of the machines, the same on each"}
NODES=${NODES:-2}
GPUS=${GPUS:-8}
DATA=${DATA:-data/edu}
RUN=${RUN:-runs/124m}
MICRO_BATCH=${MICRO_BATCH:-32}
ID=${ID:-gpt2-124m} # one name for each run that shares the rendezvous

if [ ! -f "$DATA/dataset.json" ]; then
    echo "$DATA is not prepared: gpt2 prepare hf:HuggingFaceFW/fineweb-edu:sample-10BT --out $DATA --val-fraction 0.01" >&2
    exit 2
fi

# Where a cable is cut, the processes end after train.collective_timeout, but torchrun on a machine that does not hold
# the rendezvous only when TCP gives up: a quarter of an hour, or seconds after `sysctl -w net.ipv4.tcp_retries2=6`
# (benchmarks/two_hosts.py).
# Where machines have several networks: NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME name the one to use.
torchrun --nnodes "$NODES" --nproc-per-node "$GPUS" \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD" --rdzv-id "$ID" --max-restarts 3 \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout 240 \
    -m gpt2 train --data "$DATA" --out "$RUN" --preset gpt2-124m --train.micro-batch "$MICRO_BATCH"
