"""All checks and measurements that need a GPU, in one run: benchmarks/gpu_day.sh."""

# Triton reads one or the other for a GPU, depending on its version: both are set.
PTXAS_VARIABLES = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH")
