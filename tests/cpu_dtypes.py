"""The dtypes in which the C++ operators compute; bfloat16 is skipped where this CPU has no instructions for it."""

import pytest
import torch

from fastbert.kernels.cpu import operators as cpp

_bf16 = pytest.mark.skipif(torch.bfloat16 not in cpp.dtypes(), reason="this CPU has no AVX512-BF16")
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=_bf16)]
# for products in training, which leave bfloat16 to a vendor library that multiplies it in tiles
needs_bf16 = pytest.mark.skipif(
    torch.bfloat16 not in cpp.dtypes() or not cpp.multiplies(torch.bfloat16),
    reason="this CPU has no AVX512-BF16, or the vendor library's tiles are ahead",
)
