#!/usr/bin/env bash
# GPT-2 124M from raw text to a measured model, on one machine with 8 GPUs.
#
#   bash runs/gpt2_124m.sh                     # the same command again goes on where the run stopped
#   DATA=/data/edu RUN=/runs/124m GPUS=4 MICRO_BATCH=16 bash runs/gpt2_124m.sh
#
# A step      32 windows x 8 GPUs x 2 micro-steps = 512 windows x 1,024 tokens = 524,288 tokens
# The run     19,073 steps x 524,288 tokens = 10.0 B tokens, one epoch of FineWeb-Edu's 10BT sample
# FLOPs       10.0 B tokens x 855 MFLOP (6 x 124M and attention) = 8.55e18
# Expected    training alone; evaluation, saving and preparing the text come on top. By the list price of the table:
#   gpt2 plan --gpus 8 --gpu A100-80 --micro-batch 32      -> 1.8 h, $24.75
#   gpt2 plan --gpus 8 --gpu H100 --micro-batch 32         -> 45.3 min, $21.13
# Preparing   about 45 GB of text; one process of `gpt2 prepare` a core. The shards are 20 GB.
#
# 32 windows at once take 26 GB a GPU and fit a card of 40 GB; a card of 80 GB has room for 64, one of 24 GB for 16.
set -euo pipefail

DATA=${DATA:-data/edu}
RUN=${RUN:-runs/124m}
GPUS=${GPUS:-8}
MICRO_BATCH=${MICRO_BATCH:-32} # the results are the same with any that divides the batch

if [ ! -f "$DATA/dataset.json" ]; then
    gpt2 prepare hf:HuggingFaceFW/fineweb-edu:sample-10BT --out "$DATA" --val-fraction 0.01
fi

# --max-restarts: a dead or hung process makes torchrun start all of them again, from the newest good checkpoint.
# --signals-to-handle: without it SIGUSR1 kills torchrun and leaves its processes running.
# --shutdown-timeout: seconds for saving after a signal; torchrun's own 30 may cut a save short.
torchrun --standalone --nproc-per-node "$GPUS" --max-restarts 3 \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout 240 \
    -m gpt2 train --data "$DATA" --out "$RUN" --preset gpt2-124m --train.micro-batch "$MICRO_BATCH"

gpt2 eval "$RUN" --data "$DATA"
gpt2 sample "$RUN" --prompt "Hello, I'm a language model," -n 4 --max-tokens 32 --seed 42
