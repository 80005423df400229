"""The operators of the encoder as functions of tensors. Each one checks its arguments, and calls an implementation.

`impl` names the implementation:

    "triton"     the hand-written kernels: CUDA tensors, or CPU tensors under TRITON_INTERPRET=1
    "native"     PyTorch's own fast operators (oneDNN, SDPA), on any device
    "reference"  plain torch as in the specification, on any device
    None         triton where the tensor lies on a CUDA device of compute capability 8.0 or newer (or the interpreter
                 is on), else native

An explicit `impl` runs that implementation or raises; only None may choose. Gradients flow through all three.
Shapes use T tokens in the packed batch, B sequences, H heads, D head_dim, C hidden width, F feed-forward width.
"""

from __future__ import annotations

from ..kernels._assembler import assembler as assembler
from ..kernels._checks import ACTIVATIONS as ACTIVATIONS
from ..kernels._checks import expect_indices as expect_indices
from ..kernels._checks import expect_sequences as expect_sequences
from ..kernels._invariance import is_batch_invariant as is_batch_invariant
from ..kernels._layer import LayerOptions as LayerOptions
from ..kernels._layer import LayerWeights as LayerWeights
from ..kernels.cpu import adamw as adamw
from ..kernels.cpu import kept_gradients as kept_gradients
from ._attention import *
from ._choice import IMPLS as IMPLS
from ._choice import OLDEST_CAPABILITY as OLDEST_CAPABILITY
from ._choice import OPERATORS as OPERATORS
from ._choice import TRITON_MODULES as TRITON_MODULES
from ._choice import Impl as Impl
from ._choice import choose_impl as choose_impl
from ._choice import describe_cpp as describe_cpp
from ._choice import engine as engine
from ._choice import machine as machine
from ._choice import why_not_cpp as why_not_cpp
from ._choice import why_not_triton as why_not_triton
from ._disentangled import *
from ._embedding_pooling_loss import *
from ._feed_forward import *
from ._layer import *
from ._norm import *
