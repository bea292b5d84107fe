"""The order in which an epoch goes through the images of a set: random, quasi-random or as they are stored.

Quasi-random is for data on slow or remote disks, as in FFCV: neighbours of the file stay near each other in time, so that a page that was
read is used while it is in memory. Runs of `RUN_IMAGES` images are shuffled, and images are shuffled within `WINDOW_RUNS` runs at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

ImageOrder = Literal["random", "quasi_random", "sequential"]

RUN_IMAGES = 256  # about a page of 8 MiB of photographs
SHUFFLED_UP_TO = 1 << 22
_MASK_64 = (1 << 64) - 1
WINDOW_RUNS = 32  # so 8,192 images, about 256 MiB, are in use at a time


def image_order(kind: ImageOrder, size: int, rng: np.random.Generator) -> Sequence[int] | np.ndarray:
    """Place -> image, a permutation of 0 to size - 1 that depends on the generator's state only.

    Random is a shuffled list up to SHUFFLED_UP_TO images, 4 bytes each, and computed place by place beyond it.
    """
    if kind == "sequential":
        return range(size)
    if kind == "quasi_random":
        return QuasiRandomOrder(size, rng)
    if size > SHUFFLED_UP_TO:
        return FeistelOrder(size, rng)
    return rng.permutation(np.arange(size, dtype=np.int32))


class FeistelOrder(Sequence):
    """A pseudo-random permutation that is computed, not stored: a Feistel network over the next power of four, walked until it is inside.

    Six rounds of a 64-bit mixer (the multipliers of SplitMix64); some 10 us a place, where shuffling 10 million images takes a second.
    """

    def __init__(self, size: int, rng: np.random.Generator):
        self._size = size
        self._half_bits = max(1, -(-(size - 1).bit_length() // 2))
        self._keys = [int(key) for key in rng.integers(2**63, size=6)]

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, place: int) -> int:
        if not 0 <= place < self._size:
            raise IndexError(f"place: expected 0 to {self._size - 1:,}, got {place}")
        image = self._permuted(int(place))
        while (
            image >= self._size
        ):  # less than four steps on average: the domain has less than four times as many numbers
            image = self._permuted(image)
        return image

    def _permuted(self, number: int) -> int:
        bits, mask = self._half_bits, (1 << self._half_bits) - 1
        left, right = number >> bits, number & mask
        for key in self._keys:
            mixed = (right * 0x9E3779B97F4A7C15 + key) & _MASK_64
            mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
            mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK_64
            left, right = right, left ^ ((mixed >> 31) & mask)
        return (left << bits) | right


class QuasiRandomOrder(Sequence):
    """Windows of shuffled runs, shuffled within; a window's order is made when it is reached."""

    def __init__(
        self, size: int, rng: np.random.Generator, run_images: int = RUN_IMAGES, window_runs: int = WINDOW_RUNS
    ):
        self._size, self._run_images, self._window_runs = size, run_images, window_runs
        runs = -(-size // run_images)
        self._runs = rng.permutation(runs)
        self._seed = int(rng.integers(2**63))
        lengths = np.full(runs, run_images)
        lengths[self._runs == runs - 1] = size - (runs - 1) * run_images  # the last run of the file may be short
        self._starts = np.concatenate([[0], np.cumsum(lengths)])[::window_runs]
        self._window = -1
        self._images = np.empty(0, np.int64)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, place: int) -> int:
        if not 0 <= place < self._size:
            raise IndexError(f"place: expected 0 to {self._size - 1:,}, got {place}")
        window = int(np.searchsorted(self._starts, place, side="right")) - 1
        if window != self._window:
            self._window, self._images = window, self._shuffled(window)
        return int(self._images[place - int(self._starts[window])])

    def _shuffled(self, window: int) -> np.ndarray:
        runs = self._runs[window * self._window_runs : (window + 1) * self._window_runs]
        images = (runs[:, None] * self._run_images + np.arange(self._run_images)).ravel()
        return np.random.default_rng((self._seed, window)).permutation(images[images < self._size])
