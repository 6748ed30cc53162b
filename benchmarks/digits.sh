#!/bin/sh
# The record behind the README's figures: both bundled checkpoints, all 300 held-out digits, 64 samples a curve.
# Writes benchmarks/results/digits.json and docs/images/. A few minutes on two cores.
set -eu
cd "$(dirname "$0")/.."
out=$(mktemp -d)
.venv/bin/flowsolve demo --images 300 --samples 64 --out "$out"
cp "$out/demo.json" benchmarks/results/digits.json
cp "$out"/*.png docs/images/
rm -r "$out"
