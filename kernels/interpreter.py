"""Mends Triton's interpreter (TRITON_INTERPRET=1) for the tests of kernels on machines without a GPU; `mend()` before the first launch.

In Triton 3.6.0 `tl.dot` of bf16 multiplies the raw 16 bits, and a loop whose bound is a kernel argument fails with NumPy 2.4 or newer.
Not mended: bf16 arithmetic and `tl.sum` of bf16, which are silently wrong too; kernels convert to float32 right after each load.
"""

from __future__ import annotations

import functools

import numpy as np


@functools.cache
def mend() -> None:
    """Replace the interpreter's dot and make its scalars usable as loop bounds."""
    import triton.language as tl
    from triton.runtime import interpreter

    def values(handle):
        scalar = handle.dtype.scalar
        if scalar == tl.bfloat16:
            return (handle.data.astype(np.uint32) << 16).view(np.float32)
        if scalar.is_floating() and scalar.primitive_bitwidth == 8:
            half = interpreter._convert_float(handle.data, scalar, tl.float16, None)
            return half.view(np.float16).astype(np.float32)
        return handle.data.astype(np.float32) if handle.data.dtype == np.float16 else handle.data

    def dot(self, a, b, accumulator, input_precision, max_num_imprecise_acc):
        scalar = accumulator.dtype.scalar
        if scalar.is_floating():
            product = np.matmul(values(a), values(b)).astype(accumulator.data.dtype, copy=False)
        else:
            product = np.matmul(values(a), values(b), dtype=accumulator.data.dtype)
        return interpreter.TensorHandle(product + accumulator.data, scalar)

    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter.InterpreterBuilder.create_dot = dot
    interpreter._patch_lang_tensor = patch_with_index
