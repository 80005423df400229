"""Searches for the fastest launch parameters of kernels."""
