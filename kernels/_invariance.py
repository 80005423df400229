"""The switch for bits that do not depend on the batch. Its own file, so that reading it needs no Triton."""

_enabled = False


def is_batch_invariant() -> bool:
    """Whether linear layers avoid the vendor library, whose kernel, and thus the bits, depend on the number of rows."""
    return _enabled


class batch_invariant:
    """Makes a text's bits depend only on that text, and not on the rest of its batch.

        with fastbert.batch_invariant():
            vectors = encoder.encode(texts)         # the same bits in any batch, order and padding

    Products then run in our own GEMM, whose tiles depend on the model's shape and the device and never on the number of
    rows, or, on a CPU, in blocks with a fixed number of rows. Attention, normalisation, embeddings and pooling always
    have this property. It also holds for the gradient of a text's output with respect to its embeddings, if the
    backward pass runs while this is on (a layer of the Triton kernels uses the setting of its forward pass). Weight
    gradients are sums over the batch, so they depend on the batch; they are the same from run to run.

    This assumes the same machine, number of threads and versions. The cost on two cores of an AMD EPYC (Zen 4), MiniLM,
    64 texts of natural lengths: 1.00 to 1.01 times the plain pass, bfloat16 and float32; one text of 10 tokens 1.25 and
    1.37 times. Where products go in blocks, 1.17 to 1.30 times, and 2.6 to 2.8 times for one text of 10 tokens, which
    takes a whole block (benchmarks/log/cpu.md). The cost on a GPU is not measured.

    While this is on, impl="reference", and "native" on a GPU, raise RuntimeError. Plain calls of
    `batch_invariant(True)` and `batch_invariant(False)` switch permanently.
    """

    def __init__(self, enabled: bool = True):
        global _enabled
        self.before, _enabled = _enabled, enabled

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: object) -> None:
        global _enabled
        _enabled = self.before
