"""All checks and measurements that need a GPU, in one run: benchmarks/gpu_day.sh."""
