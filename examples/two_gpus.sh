#!/bin/sh
# One process per GPU: each takes its share of the rows, and gradients are averaged over all of them.
# with accelerate: accelerate launch --multi_gpu --num_processes 2 -m oribi train --model MODEL ...
# usage: examples/two_gpus.sh MODEL DATA OUTPUT [more settings]
set -e
model=$1 data=$2 output=$3
shift 3
torchrun --nproc-per-node 2 -m oribi train --model "$model" --dataset "$data" --output_dir "$output" "$@"
