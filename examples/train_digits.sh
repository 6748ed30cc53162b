#!/bin/sh
# The two bundled checkpoints, flowsolve/problems/checkpoints/{digits-ddpm,digits-condot}: half an hour on two cores.
# One thread each: the same seeds then give the same weights on the same processor and torch.
# Usage: examples/train_digits.sh [directory]
set -eu
root="${1:-checkpoints}"
export OMP_NUM_THREADS=1

flowsolve train --data digits --model ddpm --out "$root/digits-ddpm" \
  --steps 10000 --batch 64 --lr 1e-3 --warmup 200 --ema-decay 0.999 \
  --width 32 --layers 1 --dropout 0.1 --seed 0 --no-progress &
ddpm=$!

flowsolve train --data digits --model condot --out "$root/digits-condot" \
  --steps 10000 --batch 64 --lr 1e-3 --warmup 200 --ema-decay 0.999 \
  --width 32 --layers 1 --dropout 0.1 --seed 1 --no-progress &
condot=$!

wait "$ddpm"
wait "$condot"
