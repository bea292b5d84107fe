"""Updates of exactly so many pairs, carried captions, resume of the position, and weights of mixed sets."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict

import pytest

from vpgtrans.engine.data.coco import DataError
from vpgtrans.engine.data.packing import CaptionData, Group, Position, Subset, UpdateOrder, pack_update

CAPTIONS = [5, 1, 7, 3, 2, 6, 4, 5]


def order(pairs: int = 4, **settings) -> UpdateOrder:
    return UpdateOrder(CAPTIONS, [Subset(0, len(CAPTIONS))], pairs, settings.pop("seed", 0), **settings)


@pytest.mark.parametrize("pairs", [1, 4, 7, 33, 100])
def test_every_update_has_exactly_its_pairs(pairs):
    deal = order(pairs)
    for _ in range(20):
        assert sum(len(g.captions) for g in deal.next_update()) == pairs


def test_an_epoch_deals_each_pair_once():
    deal = order(3)
    assert deal.epoch_pairs == sum(CAPTIONS) == 33
    dealt = Counter((g.image, c) for _ in range(11) for g in deal.next_update() for c in g.captions)
    assert dealt == Counter({(image, c): 1 for image, count in enumerate(CAPTIONS) for c in range(count)})


def test_the_order_does_not_depend_on_the_size_of_updates():
    def flat(pairs: int) -> list[tuple[int, int, int]]:
        deal = order(pairs)
        return [(g.image, g.epoch, c) for _ in range(66 // pairs) for g in deal.next_update() for c in g.captions]

    assert flat(1) == flat(6) == flat(66)
    assert [i for i, e, _ in flat(66) if e == 0] != [i for i, e, _ in flat(66) if e == 1]


def test_resume_in_the_middle_of_an_image():
    whole = order(4)
    expected = [whole.next_update() for _ in range(30)]
    for stop in range(1, 29):
        first = order(4)
        for _ in range(stop):
            first.next_update()
        again = order(4, position=Position(**asdict(first.position)))
        assert [again.next_update() for _ in range(stop, 30)] == expected[stop:]


def test_captions_per_image_limits_a_group_and_draws_anew():
    deal = order(6, captions_per_image=2)
    assert deal.epoch_pairs == sum(min(c, 2) for c in CAPTIONS)
    seen = {}
    for _ in range(15 * 8):
        for group in deal.next_update():
            assert len(group.captions) <= 2
            seen.setdefault((group.image, group.epoch), []).extend(group.captions)
    chosen = {tuple(sorted(c)) for (image, _), c in seen.items() if image == 2 and len(c) == 2}
    assert len(chosen) > 5


def test_weights_are_shares_of_pairs():
    """Set 1 has three times the captions an image, and still gets its quarter of the pairs."""
    captions_of = [1] * 50 + [3] * 50
    deal = UpdateOrder(captions_of, [Subset(0, 50, 0.75), Subset(50, 100, 0.25)], 100, 0)
    pairs = Counter()
    for _ in range(100):
        for group in deal.next_update():
            pairs[group.image >= 50] += len(group.captions)
    assert pairs[True] / pairs.total() == pytest.approx(0.25, abs=0.02)


def data(lengths: list[list[int]]) -> CaptionData:
    return CaptionData("t", [None] * len(lengths), [[[1] + [5] * (n - 2) + [4] for n in image] for image in lengths])


def test_rows_hold_every_caption_and_stay_within_budget():
    captions = data([[10, 7, 9], [30], [3, 3, 3, 3], [12, 12]])
    groups = [Group(i, 0, tuple(range(len(c)))) for i, c in enumerate(captions.ids)]
    batches = pack_update(groups, captions, 8, 40, 2, 0)
    assert all(b.ids.shape[0] <= 2 and b.ids.shape[1] <= 40 for b in batches)
    assert sum(b.labels.numel() for b in batches) == sum(len(ids) for image in captions.ids for ids in image)
    assert sum((b.labels == 1).sum().item() for b in batches) == 10  # one BOS target a caption


def test_a_caption_that_does_not_fit_in_a_row_is_named():
    with pytest.raises(DataError, match=r"row_tokens: expected at least 38 .* got 37"):
        pack_update([Group(0, 0, (0,))], data([[30]]), 8, 37, 1, 0)


def test_an_empty_set_is_an_error():
    with pytest.raises(DataError, match="at least one"):
        UpdateOrder([], [Subset(0, 0)], 4, 0)
