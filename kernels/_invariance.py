"""The switch for bits that do not depend on the batch. Its own file, so that reading it needs no Triton."""

from collections.abc import Iterator
from contextlib import contextmanager

_invariant = False


def is_batch_invariant() -> bool:
    """Do linear layers avoid the vendor library, which picks its kernel, and so its bits, by the number of rows?"""
    return _invariant


@contextmanager
def batch_invariant(enabled: bool = True) -> Iterator[None]:
    """Within: every product that makes a token's output runs in our GEMM, so its bits do not depend on the batch.

    A layer remembers for its backward pass what held in its forward pass.
    """
    global _invariant
    before, _invariant = _invariant, enabled
    try:
        yield
    finally:
        _invariant = before
