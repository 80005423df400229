#!/usr/bin/env bash
# Everything worth running on an NVIDIA GPU in one go of under nine minutes, most valuable first.
#
#   benchmarks/gpu_day.sh [FOLDER]              results and logs go there (default: gpu_day)
#   benchmarks/gpu_day.sh --rehearse [FOLDER]   the same steps on a CPU with tiny shapes, to see that all of them run
#   PYTHON=python3.12 benchmarks/gpu_day.sh     another interpreter
#
# Works from a plain checkout: nothing is installed. Every step has a time limit and writes as it goes, so a run that is cut
# short loses nothing. Ends with a line a step and exits with 1 if a step failed (124 means: out of time).
set -uo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
rehearse=
if [ "${1:-}" = --rehearse ]; then rehearse=yes; shift; fi
out=${1:-gpu_day}
mkdir -p "$out"
out=$(cd "$out" && pwd)
python=${PYTHON:-python3}

# The package is put together from links, since fastbert.kernels lies in kernels/.
rm -rf "$out/source"
mkdir -p "$out/source/fastbert"
ln -s "$root"/fastbert/* "$out/source/fastbert/"
ln -s "$root/kernels" "$out/source/fastbert/kernels"
ln -s "$root/benchmarks" "$root/tests" "$out/source/"
export PYTHONPATH="$out/source${PYTHONPATH:+:$PYTHONPATH}"
cd "$out/source"

failed=0
summary="$out/summary.txt"
: > "$summary"

# step NAME SECONDS COMMAND...
step() {
    local name=$1 limit=$2 began=$SECONDS rc=0
    shift 2
    echo "== $name"
    timeout --signal=INT --kill-after=15 "$limit" "$@" > "$out/$name.log" 2>&1 || rc=$?
    tail -n 25 "$out/$name.log"
    printf '%-12s exit %3d  %4d s\n' "$name" "$rc" $((SECONDS - began)) | tee -a "$summary"
    [ "$rc" -eq 0 ] || failed=1
}

if [ -n "$rehearse" ]; then
    export TRITON_INTERPRET=1
    step verify 200 "$python" -m fastbert verify --op pool --op add_layer_norm
    unset TRITON_INTERPRET
    step models 90 "$python" -m fastbert bench --quick --device cpu --suite encoder,latency,training \
        --peers none --budget-minutes 1 --out "$out/models.json"
    step kernels 60 "$python" -m fastbert bench --quick --device cpu --suite kernels --peers none \
        --budget-minutes 0.7 --out "$out/kernels.json"
    step profile 60 "$python" -m benchmarks.profile_layer --quick --device cpu
else
    nvidia-smi > "$out/nvidia-smi.log" 2>&1 || echo "no nvidia-smi" > "$out/nvidia-smi.log"
    step verify 110 "$python" -m fastbert verify
    step models 170 "$python" -m fastbert bench --device cuda --suite encoder,latency,training --quick \
        --budget-minutes 2.5 --out "$out/models.json"
    step kernels 140 "$python" -m fastbert bench --device cuda --suite kernels --budget-minutes 2 \
        --out "$out/kernels.json"
    step profile 40 "$python" -m benchmarks.profile_layer --device cuda
    if command -v compute-sanitizer > /dev/null; then
        step sanitizer 70 compute-sanitizer --error-exitcode 1 "$python" -m fastbert verify --op pool
    else
        echo "sanitizer    not installed" | tee -a "$summary"
    fi
fi

echo
cat "$summary"
exit "$failed"
