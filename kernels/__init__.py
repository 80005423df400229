"""The operators of BERT: Triton kernels, their CPU forms, and the plain-torch specification.

This folder is installed as `fastbert.kernels`. The bare name `kernels` belongs to another package that transformers
looks for. Python finds this folder under that name when it is started in the repository's root; then the module is
inert: older than any real version, and with nothing in it to import. (An ImportError here would break transformers.)
"""

if __name__ != "fastbert.kernels":
    __version__ = "0"
    __path__ = []
