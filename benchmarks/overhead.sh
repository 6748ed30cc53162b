#!/bin/sh
# The record of what flowsolve costs beside the network, against its peers: a quarter of an hour on two quiet cores.
# Writes benchmarks/results/overhead.json and overhead-*.png. Options are those of overhead.py.
set -eu
cd "$(dirname "$0")/.."
exec .venv/bin/python benchmarks/overhead.py "$@"
