"""Mends Triton's interpreter (TRITON_INTERPRET=1) for the tests of kernels on machines without a GPU; `mend()` before the first launch.

In Triton 3.6.0 `tl.dot` of bf16 multiplies the raw 16 bits, a loop whose bound is a kernel argument fails with NumPy 2.4 or newer, and float32
rounded up to the next power of two in bf16 or e4m3 may lose its carry (124.8 becomes 64; NaN in e4m3 becomes 384).
Not mended: bf16 arithmetic and `tl.sum` of bf16, which are silently wrong too; kernels convert to float32 right after each load.
"""

from __future__ import annotations

import functools

import numpy as np


@functools.cache
def mend() -> None:
    """Replace the interpreter's dot and its rounding from float32, and make its scalars usable as loop bounds."""
    import torch
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

    rounded = {tl.bfloat16: (torch.bfloat16, torch.uint16), tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8)}
    convert_float = interpreter._convert_float

    def convert(data, source, target, rounding_mode):
        if source != tl.float32 or target not in rounded:
            return convert_float(data, source, target, rounding_mode)
        dtype, bits = rounded[target]
        return torch.from_numpy(np.ascontiguousarray(data)).to(dtype).view(bits).numpy()

    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter.InterpreterBuilder.create_dot = dot
    interpreter._convert_float = convert
    interpreter._patch_lang_tensor = patch_with_index
