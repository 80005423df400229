"""The switch for bits that do not depend on the batch. Its own file, so that reading it needs no Triton."""

_enabled = False


def is_batch_invariant() -> bool:
    """Do linear layers avoid the vendor library, which picks its kernel, and so its bits, by the number of rows?"""
    return _enabled


class batch_invariant:
    """From here on, or within a `with` block: a text's bits depend on that text alone, whatever shares its batch.

        with fastbert.batch_invariant():
            vectors = encoder.encode(texts)         # the same bits in any batch, order and padding

    Every product that makes a token's output then runs in our own GEMM, whose tiles depend on the model's shape and the
    device, never on the number of rows, or else on a CPU in blocks of one number of rows; attention, normalisation,
    embeddings and pooling are so always. The same holds for the gradient that a text's own output sends back to its
    embeddings, where the backward pass too runs while this is on (a layer of the Triton kernels remembers for it what
    held in its forward pass). Weight gradients sum over the batch, so they depend on it; they are the same from run to
    run.

    The same machine, number of threads and versions are meant. Its price on two cores of an AMD EPYC (Zen 4), MiniLM,
    64 texts of natural lengths: 1.00 to 1.01 times the plain pass, bfloat16 and float32; one text of 10 tokens 1.25 and
    1.37 times. Where products go in blocks, 1.17 to 1.30 times, and 2.6 to 2.8 for one text of 10 tokens, which fills a
    block all the same (benchmarks/log/cpu.md). On a GPU it is not measured.

    impl="reference", and "native" on a GPU, raise RuntimeError while this is on. As a plain call,
    `batch_invariant(True)` and `batch_invariant(False)` switch for good.
    """

    def __init__(self, enabled: bool = True):
        global _enabled
        self.before, _enabled = _enabled, enabled

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: object) -> None:
        global _enabled
        _enabled = self.before
