"""Row packing: the definition of the result, both implementations against it, fill, growth of time, errors."""

from __future__ import annotations

import logging
import threading
import time

import numpy as np
import pytest

from vpgtrans.kernels import pack_rows, row_packing
from vpgtrans.kernels.row_packing import reference_pack_rows, row_packing_unsupported_reason

IMPLS = ("reference", "cpp")


def naive_best_fit_decreasing(lengths: np.ndarray, budget: int) -> list[int]:
    """The definition: a look at every open row for every item, quadratic."""
    free_of_row: list[int] = []
    row_of_item = [-1] * len(lengths)
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = [(free, row) for row, free in enumerate(free_of_row) if free >= lengths[item]]
        if not fitting:
            free_of_row.append(budget)
            fitting = [(budget, len(free_of_row) - 1)]
        row = min(fitting)[1]
        free_of_row[row] -= int(lengths[item])
        row_of_item[item] = row
    return row_of_item


def caption_lengths(rng: np.random.Generator, items: int) -> np.ndarray:
    """Token counts like COCO's captions: 10 words at the middle, a long tail to the right."""
    return np.clip(10 + rng.negative_binomial(2, 0.4, items), 8, 50).astype(np.int32)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_equals_the_definition_item_by_item(impl: str, dtype: type) -> None:
    rng = np.random.default_rng(0)
    for _ in range(150):
        budget = int(rng.integers(1, 80))
        lengths = rng.integers(1, int(rng.integers(1, budget + 1)) + 1, int(rng.integers(0, 120))).astype(dtype)
        rows = pack_rows(lengths, budget, impl=impl)
        assert rows.dtype == np.int32
        assert rows.tolist() == naive_best_fit_decreasing(lengths, budget), (budget, lengths.tolist())


def test_cpp_equals_the_reference_on_large_inputs() -> None:
    rng = np.random.default_rng(1)
    for budget in (1, 63, 64, 512, 4096, 1 << 20):
        for longest in {1, max(1, budget // 37), budget}:
            lengths = rng.integers(1, longest + 1, 5000)
            np.testing.assert_array_equal(
                pack_rows(lengths, budget, impl="cpp"), pack_rows(lengths, budget, impl="reference")
            )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("budget", [512, 2048])
def test_caption_rows_are_full_and_within_budget(impl: str, budget: int) -> None:
    lengths = caption_lengths(np.random.default_rng(2), 20_000)
    rows = pack_rows(lengths, budget, impl=impl)
    tokens_of_row = np.bincount(rows, weights=lengths)
    assert tokens_of_row.min() > 0  # row numbers have no gap
    assert tokens_of_row.max() <= budget
    assert lengths.sum() / (len(tokens_of_row) * budget) >= 0.985


def test_time_grows_about_linearly() -> None:
    # Items that mostly open a row each: a scan over the open rows is quadratic here.
    lengths = np.random.default_rng(3).integers(100, 512, 1_600_000)

    def shortest_cpu_seconds(items: int) -> float:
        seconds = []
        for _ in range(5):
            start = time.thread_time()
            pack_rows(lengths[:items], 512, impl="cpp")
            seconds.append(time.thread_time() - start)
        return min(seconds)

    # 16 times the items: 16 if linear (more as they leave the caches), 256 if quadratic.
    assert shortest_cpu_seconds(1_600_000) / shortest_cpu_seconds(100_000) < 64


def test_cpp_leaves_the_interpreter_to_other_threads() -> None:
    lengths = np.random.default_rng(4).integers(1, 512, 3_000_000)

    def longest_pause() -> float:
        """Of a loop while another thread packs, as a share of the packing's time."""
        span: list[float] = []

        def pack() -> None:
            span.append(time.perf_counter())
            row_packing.compiled.C.pack_rows(lengths, 512)
            span.append(time.perf_counter())

        thread = threading.Thread(target=pack)
        ticks = [time.perf_counter()]
        thread.start()
        while thread.is_alive():
            ticks.append(time.perf_counter())
        thread.join()
        ticks.append(time.perf_counter())
        return np.diff(ticks).max() / (span[1] - span[0])

    # With the GIL held, the loop would stand still for as long as the call takes, every time.
    assert any(longest_pause() < 0.8 for _ in range(5))


@pytest.mark.parametrize("impl", IMPLS)
def test_inputs_of_other_layouts(impl: str) -> None:
    lengths = np.array([5, 9, 3, 9, 7, 9, 1, 9])
    assert pack_rows(lengths[::2], 8, impl=impl).tolist() == pack_rows([5, 3, 7, 1], 8, impl=impl).tolist()
    assert pack_rows([5, 3, 7, 1], 8, impl=impl).tolist() == [1, 1, 0, 0]
    assert pack_rows([], 8, impl=impl).tolist() == []
    assert pack_rows(np.empty(0, np.int32), 8, impl=impl).tolist() == []


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [9, 0, -3])
def test_length_out_of_range_names_item_length_and_budget(impl: str, bad: int) -> None:
    with pytest.raises(ValueError, match=rf"lengths\[2\] is {bad}, expected 1\.\.8 .*budget"):
        pack_rows([4, 8, bad, bad], 8, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("budget", [0, -1, (1 << 20) + 1, 1 << 70])
def test_budget_out_of_range(impl: str, budget: int) -> None:
    with pytest.raises(ValueError, match=rf"budget is {budget}, expected 1\.\.1048576"):
        pack_rows([1], budget, impl=impl)


@pytest.mark.parametrize("budget", [0, (1 << 20) + 1])
def test_the_compiled_function_guards_its_own_memory(budget: int) -> None:
    with pytest.raises(ValueError, match=f"budget is {budget}"):
        row_packing.compiled.C.pack_rows(np.array([1]), budget)
    with pytest.raises(ValueError, match="2 dimensions"):
        row_packing.compiled.C.pack_rows(np.array([[1]]), 8)
    with pytest.raises(TypeError):
        row_packing.compiled.C.pack_rows(np.array([1.0]), 8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.5], 8), TypeError, "dtype float64, expected int32 or int64"),
        ((np.array([1], np.uint8), 8), TypeError, "dtype uint8"),
        (([[1, 2]], 8), ValueError, r"shape \(1, 2\), expected one dimension"),
        (([1], 8.0), TypeError, r"budget is 8\.0 \(float\), expected an int"),
        (([1], 8, "cuda"), ValueError, "impl is 'cuda', expected None, 'reference' or 'cpp'"),
    ],
)
def test_arguments_of_the_wrong_kind(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pack_rows(*arguments)


def test_falls_back_with_a_reason_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert row_packing_unsupported_reason() is None
    monkeypatch.setattr(row_packing.compiled, "C", None)
    monkeypatch.setattr(row_packing.compiled, "IMPORT_ERROR", ImportError("no such file"))
    row_packing._log_fallback_once.cache_clear()
    lengths = np.array([4, 4, 3, 5])
    with caplog.at_level(logging.WARNING, logger=row_packing.__name__):
        for _ in range(2):
            np.testing.assert_array_equal(pack_rows(lengths, 8), reference_pack_rows(lengths, 8))
    assert [record.message for record in caplog.records] == [
        f"pack_rows runs its plain Python reference: {row_packing_unsupported_reason()}"
    ]
    assert "no such file" in caplog.text
    with pytest.raises(RuntimeError, match=r"impl='cpp' cannot run here: .*no such file"):
        pack_rows(lengths, 8, impl="cpp")
