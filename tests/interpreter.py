"""Triton's interpreter in half the time: work that it repeats at every call of a device function is done once a launch.

At a launch the interpreter replaces the builtins of triton.language by its own (`_patch_lang`), and restores them
afterwards. Within the launch it goes through all builtins again at every call of a device function, though they are
already replaced; this takes 45% of the processor time of a small model's pass. For every operator it also builds a
dictionary to find numpy's name of a dtype: 10%. So do triton 3.6.0, 3.7.1 and 3.8.0. Results are the same to the bit.
"""

import functools
import inspect

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


@functools.cache
def _languages(fn) -> list:
    """The modules of triton.language that a device function sees, whose builtins the interpreter replaces for it."""
    return [value for value in fn.__globals__.values() if inspect.ismodule(value) and value in (tl, tl.core)]


def multiply_evenly(patch) -> None:
    """Replaces the interpreter's products by products in float64, rounded, while the pytest.MonkeyPatch lasts. numpy's
    BLAS for AVX2 sums a row in an order that depends on its place in the tile, which no GPU does."""

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64)).astype(d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def hasten() -> None:
    """Makes the interpreter faster for the rest of this process."""
    replace, np_dtype_of = interpreter._patch_lang, functools.cache(interpreter._get_np_dtype)
    address = interpreter._get_np_dtype(tl.pointer_type(tl.float32))

    def call(self, *args, **kwargs):
        if any(tl.core.is_builtin(language.load) for language in _languages(self.fn)):
            replace(self.fn)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as e:
            raise interpreter.InterpreterError(repr(e)) from e

    def np_dtype(dtype):
        scalar = dtype.scalar  # of a block, the type of its elements; types of blocks and of pointers have no hash
        return address if isinstance(scalar, tl.pointer_type) else np_dtype_of(scalar)

    interpreter.InterpretedFunction.__call__ = call
    interpreter._get_np_dtype = np_dtype


def broadcast_conditions() -> None:
    """Makes the interpreter broadcast the result of comparing numbers as a bool for the rest of this process. It takes
    it for a number of their type, and in Triton 3.9 refuses a mask that is made with it."""
    splat = interpreter.InterpreterBuilder.create_splat

    def create_splat(self, ret_ty, arg):
        return splat(self, ret_ty, interpreter.TensorHandle(arg.data, tl.int1) if arg.data.dtype == np.bool_ else arg)

    interpreter.InterpreterBuilder.create_splat = create_splat
