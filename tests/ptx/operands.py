"""Operands of the matrix units in shared memory: images, descriptors, and the PTX that copies them in."""

import numpy as np

KINDS = {
    "bf16": lambda x: (np.asarray(x, np.float32).view(np.uint32) >> 16).astype(np.uint16),
    "f16": lambda x: np.asarray(x, np.float16).view(np.uint16),
}
SPANS = {128: 1, 64: 2, 32: 3, 0: 0}  # bytes of a swizzled row -> layout field of the descriptor


def laid_out(matrix: np.ndarray, span: int, transposed: bool) -> tuple[np.ndarray, int, int]:
    """An operand [rows, 16] as bytes of shared memory, element by element, and its leading and stride offsets.

    Not transposed, k lies in neighbouring bytes: eight rows of `span` bytes, then the next eight. Transposed, the rows
    do: eight k of `span` bytes, then the next eight k, then the next rows. The 16-byte pieces of the n-th line of
    `span` bytes change places: piece p goes to p xor (n div (128 / span)).
    """
    rows = len(matrix)
    size = rows * 16 * 2 if span in (0, 32) else rows * max(span, 32) if not transposed else rows * 32
    image = np.zeros(size, np.uint8)
    view = image.view(np.uint16)
    leading = stride = 0
    for row in range(rows):
        for k in range(16):
            if span == 0:  # 8 rows of 16 bytes, the two halves of k one after the other
                leading, stride = 128, 256
                at = row // 8 * 256 + k // 8 * 128 + row % 8 * 16 + k % 8 * 2
            elif not transposed:
                stride = 8 * span
                piece = (k * 2 // 16) ^ (row % 8 // (128 // span))
                at = row // 8 * stride + row % 8 * span + piece * 16 + k * 2 % 16
            else:
                per = span // 2
                stride, leading = 8 * span, 16 * span
                piece = (row % per * 2 // 16) ^ (k % 8 // (128 // span))
                at = row // per * leading + k // 8 * stride + k % 8 * span + piece * 16 + row * 2 % 16
            view[at // 2] = matrix[row, k]
    return image, leading, stride


def descriptor(start: int, leading: int, stride: int, span: int) -> int:
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | SPANS[span] << 62


def copy_in(size: int, threads: int = 128) -> str:
    """PTX that copies x to shared memory: all threads, 16 bytes each at a time."""
    return "\n".join(
        f"""
        mad.lo.s32 %r0, %t, 16, {start}; cvt.u64.u32 %d0, %r0; add.s64 %d0, %d0, %x; setp.lt.u32 %p0, %r0, {size};
        @%p0 ld.global.v2.b64 {{%d1, %d2}}, [%d0];
        @%p0 st.shared.v2.b64 [%r0], {{%d1, %d2}};
        """
        for start in range(0, size, threads * 16)
    )
