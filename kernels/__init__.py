"""The operators of BERT: Triton kernels, their CPU forms, and the plain-torch specification.

This folder is installed as `fastbert.kernels`. The bare name `kernels` belongs to another package that
transformers probes for, so it must never be importable from here under that name.
"""

import sys
from importlib.machinery import PathFinder

if __name__ != "fastbert.kernels":
    raise ImportError(
        f"this package is fastbert.kernels, not {__name__!r}: import fastbert before what looks for {__name__!r}, "
        "or run outside the repository's root"
    )

# With the repository's root on sys.path (python -m, a notebook there) transformers would find this folder, take it
# for that other package, and fail on the error above. None in sys.modules tells it that there is no such package.
_found = PathFinder.find_spec("kernels")
if _found is not None and _found.origin == __file__:
    sys.modules.setdefault("kernels", None)
