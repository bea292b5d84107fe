"""The ground that the tests of kernels stand on: the mended interpreter, compiling without a GPU, and a budget that can fail."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from vpgtrans.kernels.checks import assert_within_budget, poisoned_memory
from vpgtrans.kernels.compile_only import local_accesses_in_loops
from vpgtrans.kernels.triton_support import architecture, is_interpreted, triton_unsupported_reason

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402


@triton.jit
def _matmul(a_ptr, b_ptr, c_ptr, inner, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.arange(0, SIZE)
    total = tl.zeros([SIZE, SIZE], tl.float32)
    for start in range(0, inner, BLOCK):
        steps = start + tl.arange(0, BLOCK)
        a = tl.load(a_ptr + rows[:, None] * inner + steps[None, :])
        b = tl.load(b_ptr + steps[:, None] * SIZE + rows[None, :])
        total = tl.dot(a, b, total)
    tl.store(c_ptr + rows[:, None] * SIZE + rows[None, :], total)


def test_the_interpreter_multiplies_bf16():
    """Fails without `mend`: the raw bits would be multiplied, and a loop bound known at run time would raise."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    a, b = torch.randn(16, 64, device=device).bfloat16(), torch.randn(64, 16, device=device).bfloat16()
    with poisoned_memory():
        c = torch.empty(16, 16, device=device)
        assert c.isnan().all()
        _matmul[(1,)](a, b, c, 64, SIZE=16, BLOCK=32)
    assert_within_budget("matmul", c, a.double() @ b.double(), a.float() @ b.float(), factor=4.0)


def test_a_budget_is_missed_by_what_is_wrong():
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    plain = exact.bfloat16()
    with pytest.raises(AssertionError, match=r"y: error 2\.000e\+00"):
        assert_within_budget("y", torch.zeros(2, dtype=torch.bfloat16), exact, plain)
    with pytest.raises(AssertionError, match="error inf"):
        assert_within_budget("y", torch.full((2,), float("nan"), dtype=torch.bfloat16), exact, plain)
    with pytest.raises(AssertionError, match="dtype"):
        assert_within_budget("y", torch.zeros(2), exact, plain)


def test_reasons_and_architecture():
    assert is_interpreted() != torch.cuda.is_available()
    assert (triton_unsupported_reason(torch.device("cpu")) is None) == is_interpreted()
    assert "NVIDIA" in triton_unsupported_reason(torch.device("meta"))
    assert architecture(torch.device("cpu")) == 90


def test_spills_in_loops_are_told_from_others():
    listing = """
        STL [R1+0x4], R2 ;
.L_x_1:
        HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
        LDL.64 R2, [R1] ;
.L_x_2:
        STL [R1], R3 ;
    @P0 BRA `(.L_x_2) ;
   @!P1 BRA `(.L_x_1) ;
        LDL R5, [R1+0x8] ;
   @!P2 BRA `(.L_x_3) ;
        LDL R6, [R1+0xc] ;
.L_x_3:
        BRA `(.L_x_3);
    """
    assert local_accesses_in_loops(listing) == 2


def test_compile_only_refuses_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "vpgtrans.kernels.compile_only", "nothing"], capture_output=True, text=True, check=False,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 2 and "unset it" in done.stderr
