#!/usr/bin/env bash
# Everything worth running on an NVIDIA GPU in one go of at most eight minutes, most valuable first.
#
#   benchmarks/gpu_day.sh [FOLDER]              results go there, as gpu_day.tar.gz and summary.json (default: gpu_day)
#   benchmarks/gpu_day.sh --tune [FOLDER]       the second run: which launches are fastest on this card
#   benchmarks/gpu_day.sh --rehearse [FOLDER]   the same steps on a CPU with tiny shapes, to see that all of them run
#   PYTHON=python3.12 benchmarks/gpu_day.sh     another interpreter (exit code 2: the one it found has no torch or Triton)
#
# Works from a plain checkout with torch, Triton and numpy: nothing is installed. See benchmarks/gpu_day/day.py.
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_day/day.py" "$@"
