"""Weights and whole passes at inference: weights laid out, joined or in 8 bits; all layers in one C++ call; CUDA
graphs.

Besides `fastbert.functional`, this is the only place of the package that imports `fastbert.kernels`."""
