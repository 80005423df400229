"""Cards that are not there: the kernels launched through Triton's own launch path on a machine without a GPU."""
