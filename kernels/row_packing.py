"""Packs sequences into rows of a fixed token budget (best-fit-decreasing), so that batches carry no padding.

It replaces `torch.nn.utils.rnn.pad_sequence(sequences)`, whose rows all cost as much as the longest one. Items are
placed longest first, equal lengths in the order of their index; each goes to the row with the least free space that
still holds it, the lowest-numbered one where several have the same; where none does, a row is opened.
Best-fit-decreasing needs at most 11/9 of the optimal number of rows plus a constant (Johnson et al., SIAM J. Comput.
3, 1974). Time is linear in the items but for the small heaps of rows with equal free space.

Bench: benches/bench_row_packing.py.
"""

from __future__ import annotations

import functools
import heapq
import logging
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from . import compiled

logger = logging.getLogger(__name__)

# kMaxRowBudget of csrc/row_packing.h.
MAX_ROW_BUDGET = 1 << 20


def pack_rows(
    lengths: Sequence[int] | NDArray[np.int32] | NDArray[np.int64],  # [items], tokens
    budget: int,
    impl: Literal["reference", "cpp"] | None = None,
) -> NDArray[np.int32]:
    """Row of each item when the items are packed into rows of at most `budget` tokens.

    Args:
        lengths: tokens of each item, each in 1..budget; an int32 or int64 array of one dimension, or plain ints.
        budget: tokens a row can hold, 1..1048576.
        impl: `None` takes the compiled one where it is there; the result is the same item by item.

    Returns:
        int32 array [items]: the 0-based row of each item; rows are numbered in the order they are opened, so there
        are `max() + 1` of them.

    Raises:
        ValueError: a length outside 1..budget (the message names the first one), a budget out of range, an unknown
            `impl`, or `lengths` not of one dimension.
        TypeError: `lengths` does not hold int32 or int64, or `budget` is not an int.
        RuntimeError: `impl="cpp"` where the compiled module is missing.
    """
    if isinstance(budget, bool) or not isinstance(budget, (int, np.integer)):
        raise TypeError(f"pack_rows: budget is {budget!r} ({type(budget).__name__}), expected an int of tokens")
    if not 1 <= budget <= MAX_ROW_BUDGET:
        raise ValueError(f"pack_rows: budget is {budget}, expected 1..{MAX_ROW_BUDGET} tokens a row")
    array = _as_length_array(lengths)
    if impl not in (None, "reference", "cpp"):
        raise ValueError(f"pack_rows: impl is {impl!r}, expected None, 'reference' or 'cpp'")
    reason = None if impl == "reference" else row_packing_unsupported_reason()
    if impl == "cpp" and reason is not None:
        raise RuntimeError(f"pack_rows: impl='cpp' cannot run here: {reason}")
    if impl == "reference" or reason is not None:
        if reason is not None:
            _log_fallback_once(reason)
        return reference_pack_rows(array, int(budget))
    return compiled.C.pack_rows(array, int(budget))


def reference_pack_rows(lengths: NDArray[np.int32] | NDArray[np.int64], budget: int) -> NDArray[np.int32]:
    """`pack_rows` in plain Python: the definition of the result, and the fallback.

    Args:
        lengths: int32 or int64 array [items], each in 1..budget, tokens.
        budget: tokens a row can hold.

    Raises:
        ValueError: a length outside 1..budget.
    """
    out_of_range = np.flatnonzero((lengths < 1) | (lengths > budget))
    if out_of_range.size:
        i = int(out_of_range[0])
        raise ValueError(
            f"pack_rows: lengths[{i}] is {lengths[i]}, expected 1..{budget} (the budget); "
            "drop or cut the item, or raise the budget"
        )
    row_of_item = np.empty(len(lengths), dtype=np.int32)
    rows_by_free: dict[int, list[int]] = {}  # free tokens -> min-heap of open rows
    free_amounts = 0  # bit f is set while an open row has f free tokens
    row_count = 0
    for item in np.argsort(-lengths.astype(np.int64), kind="stable").tolist():
        length = int(lengths[item])
        fitting = free_amounts >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            row = heapq.heappop(rows_by_free[free])
            if not rows_by_free[free]:
                free_amounts ^= 1 << free
        else:
            free, row = budget, row_count
            row_count += 1
        row_of_item[item] = row
        if free > length:
            heapq.heappush(rows_by_free.setdefault(free - length, []), row)
            free_amounts |= 1 << (free - length)
    return row_of_item


def row_packing_unsupported_reason() -> str | None:
    """Why the compiled implementation cannot run here; `None` where it can."""
    if reason := compiled.missing_reason():
        return reason
    return None


def _as_length_array(lengths: Sequence[int] | NDArray[np.int32] | NDArray[np.int64]) -> NDArray:
    array = np.asarray(lengths)
    if array.size == 0 and not isinstance(lengths, np.ndarray):
        array = array.astype(np.int64)
    if array.dtype not in (np.int32, np.int64):
        raise TypeError(f"pack_rows: lengths has dtype {array.dtype}, expected int32 or int64")
    if array.ndim != 1:
        raise ValueError(f"pack_rows: lengths has shape {array.shape}, expected one dimension, [items]")
    return np.ascontiguousarray(array)


@functools.cache
def _log_fallback_once(reason: str) -> None:
    logger.warning("pack_rows runs its plain Python reference: %s", reason)
