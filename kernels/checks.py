"""How kernels are judged, in tests and before anything is timed: against float64, with the error that plain torch makes as the measure."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


def error_budget(exact: Tensor, plain: Tensor, factor: float = 2.0) -> float:
    """Largest error allowed: `factor` times that of `plain` (the reference in the kernel's dtype) to `exact` (float64), plus a small floor.

    The floor, a rounding step of the dtype at the size of the result, is for results where plain torch happens to be exact.
    """
    step = torch.finfo(plain.dtype).eps * float(exact.abs().amax()) if exact.numel() else 0.0
    return factor * largest_error(exact, plain) + step


def largest_error(exact: Tensor, result: Tensor) -> float:
    """Largest absolute difference; infinite where `result` is not finite."""
    if exact.shape != result.shape:
        raise AssertionError(f"expected shape {tuple(exact.shape)}, got {tuple(result.shape)}")
    if not result.numel():
        return 0.0
    difference = (result.detach().double() - exact.detach().double()).abs()
    return float(torch.nan_to_num(difference, nan=torch.inf).amax())


def assert_within_budget(name: str, result: Tensor, exact: Tensor, plain: Tensor, factor: float = 2.0) -> None:
    """Raise AssertionError with both errors where `result` misses the budget, its dtype or its shape."""
    if result.dtype != plain.dtype:
        raise AssertionError(f"{name}: expected dtype {plain.dtype}, got {result.dtype}")
    error, allowed = largest_error(exact, result), error_budget(exact, plain, factor)
    if not error <= allowed:
        raise AssertionError(
            f"{name}: error {error:.3e}, allowed {allowed:.3e} (plain torch: {largest_error(exact, plain):.3e})"
        )


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh memory is filled with NaN (or the largest integer), so that what a kernel forgets to write is seen."""
    deterministic, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill
