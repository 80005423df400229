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

total=530 # seconds for all steps; each gets what is left of them at most
summary="$out/summary.txt"
: > "$summary"

# step NAME SECONDS COMMAND...: fails where the command does
step() {
    local name=$1 limit=$2 began=$SECONDS rc=0
    shift 2
    if [ "$limit" -gt $((total - SECONDS)) ]; then limit=$((total - SECONDS)); fi
    if [ "$limit" -lt 5 ]; then
        echo "$name: no time left" | tee -a "$summary"
        return 1
    fi
    echo "== $name"
    timeout --kill-after=15 "$limit" "$@" > "$out/$name.log" 2>&1 || rc=$?
    tail -n 25 "$out/$name.log"
    printf '%-12s exit %3d  %4d s\n' "$name" "$rc" $((SECONDS - began)) | tee -a "$summary"
    return "$rc"
}

failed=0
if [ -n "$rehearse" ]; then
    export TRITON_INTERPRET=1
    for dtype in bf16 fp16 fp32; do
        step "verify-$dtype" 100 "$python" -m fastbert verify --dtype "$dtype" --op pool --op add_layer_norm || failed=1
    done
    unset TRITON_INTERPRET
    step kernels 90 "$python" -m fastbert bench --device cpu --suite kernels --quick --peers auto,-torch.compile \
        --budget-minutes 0.4 --out "$out/kernels.json" || failed=1
    step models 200 "$python" -m fastbert bench --device cpu --suite encoder,latency,training --quick \
        --peers transformers --workload minilm_natural --budget-minutes 2 --out "$out/models.json" || failed=1
    step latency 60 "$python" -m fastbert bench --device cpu --suite latency --quick --peers transformers \
        --workload minilm_1x16 --budget-minutes 0.3 --out "$out/latency.json" || failed=1
    step profile 60 "$python" -m benchmarks.profile_layer --quick --device cpu || failed=1
    step compile 90 "$python" -m fastbert bench --device cpu --suite kernels --operator pool --peers torch.compile \
        --budget-minutes 0.3 --out "$out/compile.json" || failed=1
else
    nvidia-smi > "$out/nvidia-smi.log" 2>&1 || echo "no nvidia-smi" > "$out/nvidia-smi.log"
    # Side by side: most of it is Triton compiling on the CPU.
    verifying=()
    for dtype in bf16 fp16 fp32; do
        step "verify-$dtype" 120 "$python" -m fastbert verify --dtype "$dtype" &
        verifying+=($!)
    done
    for process in "${verifying[@]}"; do wait "$process" || failed=1; done
    # torch.compile takes long to get ready, so it comes last.
    step kernels 130 "$python" -m fastbert bench --device cuda --suite kernels --peers auto,-torch.compile \
        --budget-minutes 1.9 --out "$out/kernels.json" || failed=1
    step models 120 "$python" -m fastbert bench --device cuda --suite encoder,training --peers auto,-torch.compile \
        --budget-minutes 1.7 --out "$out/models.json" || failed=1
    step latency 40 "$python" -m fastbert bench --device cuda --suite latency --peers auto,-torch.compile \
        --budget-minutes 0.5 --out "$out/latency.json" || failed=1
    step profile 40 "$python" -m benchmarks.profile_layer --device cuda || failed=1
    step compile 80 "$python" -m fastbert bench --device cuda --suite encoder,training --workload base_natural \
        --peers torch.compile --budget-minutes 1 --out "$out/compile.json" || failed=1
    if command -v compute-sanitizer > /dev/null; then
        step sanitizer 60 compute-sanitizer --error-exitcode 1 "$python" -m fastbert verify --shapes small --op pool \
            || failed=1
    else
        echo "sanitizer    not installed" | tee -a "$summary"
    fi
fi

echo
cat "$summary"
exit "$failed"
