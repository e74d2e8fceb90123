#!/bin/sh
# The whole measurement on one GPU, in three calls of under ten minutes each: bench/gpu.sh 1|2|3 [flags of bench/gpu.py]
cd "$(dirname "$0")/.." && PYTHONUNBUFFERED=1 exec timeout 595 "${PYTHON:-python3}" bench/gpu.py "$@"
