"""The operators of BERT: Triton kernels, their CPU forms, and the plain-torch specification.

This folder is installed as `fastbert.kernels`. The bare name `kernels` belongs to another package, which transformers
looks for. A Python started in the repository's root finds this folder under that name. Then the module has a version
older than any real one and contains nothing to import, so transformers ignores it. (An ImportError here would break
transformers.)
"""

if __name__ != "fastbert.kernels":
    __version__ = "0"
    __path__ = []
