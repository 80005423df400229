"""Everything worth running on a GPU in one go: benchmarks/gpu_day.sh."""
