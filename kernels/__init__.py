"""The operators of BERT: Triton kernels, their CPU forms, and the plain-torch specification.

This folder is installed as `fastbert.kernels`. The bare name `kernels` belongs to another package that
transformers probes for, so it must never be importable from here under that name.
"""

if __name__ != "fastbert.kernels":
    raise ImportError(f"this package is fastbert.kernels, not {__name__!r}: install fastbert and import that")
