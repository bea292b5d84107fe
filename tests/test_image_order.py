"""The orders of an epoch: permutations that depend on the seed only, and what is near each other in quasi-random order."""

from __future__ import annotations

import numpy as np
import pytest

from vpgtrans.engine.data.image_order import SHUFFLED_UP_TO, FeistelOrder, QuasiRandomOrder, image_order
from vpgtrans.engine.data.packing import Position, Subset, UpdateOrder


@pytest.mark.parametrize("kind", ["random", "quasi_random", "sequential"])
@pytest.mark.parametrize("size", [1, 255, 256, 257, 20_000])
def test_every_image_comes_once(kind, size):
    order = image_order(kind, size, np.random.default_rng(1))
    places = [int(order[i]) for i in range(size)]
    assert sorted(places) == list(range(size)) and len(order) == size
    again = image_order(kind, size, np.random.default_rng(1))
    assert [int(again[i]) for i in range(size - 1, -1, -1)] == places[::-1]
    other = image_order(kind, size, np.random.default_rng(2))
    if size > 1:
        assert ([int(other[i]) for i in range(size)] == places) == (kind == "sequential")


def test_quasi_random_stays_within_a_window_and_mixes_it():
    order = QuasiRandomOrder(1000, np.random.default_rng(0), run_images=10, window_runs=5)
    images = np.array([order[i] for i in range(1000)])
    for window in images.reshape(20, 50):
        runs, counts = np.unique(window // 10, return_counts=True)
        assert len(runs) == 5 and (counts == 10).all()
        assert np.abs(np.diff(window // 10)).astype(bool).sum() > 20  # not run after run
    assert len(np.unique(images[:50] // 50)) > 2  # the runs of a window come from anywhere in the file
    with pytest.raises(IndexError, match="0 to 999"):
        order[1000]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 17, 1000, 4097])
def test_a_computed_order_is_a_permutation(size):
    order = FeistelOrder(size, np.random.default_rng(3))
    assert sorted(order[i] for i in range(size)) == list(range(size)) and len(order) == size


def test_a_computed_order_is_as_good_as_shuffled():
    """Neighbours in time are a third of the set apart on average, each tenth of an epoch draws from all of the set, and seeds differ."""
    size = 10_000
    images = np.array([FeistelOrder(size, np.random.default_rng(1))[i] for i in range(size)])
    assert abs(np.abs(np.diff(images)).mean() / size - 1 / 3) < 0.01
    counts = np.stack([np.bincount(part // 1000, minlength=10) for part in images.reshape(10, 1000)])
    assert ((counts - 100) ** 2 / 100).sum() < 140  # chi-squared, 81 degrees of freedom: 1 in 20,000 is above
    other = np.array([FeistelOrder(size, np.random.default_rng(2))[i] for i in range(size)])
    assert (images == other).sum() < 10
    assert isinstance(image_order("random", SHUFFLED_UP_TO + 1, np.random.default_rng(0)), FeistelOrder)


def test_the_random_order_of_small_and_large_numbers_is_the_same():
    """Four bytes an image instead of eight change nothing."""
    assert (image_order("random", 999, np.random.default_rng(5)) == np.random.default_rng(5).permutation(999)).all()


@pytest.mark.parametrize("kind", ["random", "quasi_random", "sequential"])
def test_updates_resume_in_any_order(kind):
    def order(position=None):
        return UpdateOrder([3, 1, 2] * 200, [Subset(0, 600)], 7, 11, position=position, order=kind)

    whole = order()
    dealt, positions = [], []
    for _ in range(400):
        dealt.append(whole.next_update())
        at = whole.position
        positions.append(Position(list(at.epochs), list(at.cursors), at.draws, at.carried, at.carrying))
    assert max(g.epoch for g in dealt[-1]) == 2
    for k in (0, 171, 250):
        resumed = order(positions[k])
        assert [resumed.next_update() for _ in range(400 - k - 1)] == dealt[k + 1 :]
