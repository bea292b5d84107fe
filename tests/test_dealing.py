"""Dealing an update's images to ranks: balanced, complete, the same everywhere, and as many micro-batches on each rank."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vpgtrans.engine.data.dealing import deal, dealt_batches, evened, group_tokens, idle_batch
from vpgtrans.engine.data.packing import CaptionData, Group, pack_update
from vpgtrans.engine.data.pair_batches import pack_pairs

QUERIES, ROW = 4, 40


def captioned(seed: int = 0, images: int = 30) -> tuple[CaptionData, list[Group]]:
    """Plain captions and, every third image, a conversation; 1 to 5 captions of 3 to 20 tokens."""
    rng = np.random.default_rng(seed)
    ids = [
        [[int(t) for t in rng.integers(3, 50, rng.integers(4, 16))] for _ in range(rng.integers(1, 6))]
        for _ in range(images)
    ]
    leads = dict.fromkeys(range(0, images, 3), (1, 7, 8))
    data = CaptionData("x", [None] * images, ids, leads, {i: [2] * len(ids[i]) for i in leads})
    return data, [Group(i, 0, tuple(range(len(ids[i])))) for i in range(images)]


def packers(data: CaptionData) -> dict:
    return {
        "rows": lambda groups: pack_update(groups, data, QUERIES, ROW, 2, 0),
        "pairs": lambda groups: pack_pairs(
            groups, data, QUERIES, token_budget=80, starts_word=np.ones(50, bool), start=0, eos=1, pad=0, split_seed=3
        ),
    }


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_the_fullest_rank_has_at_most_one_item_more_than_the_emptiest(seed, ranks):
    sizes = np.random.default_rng(seed).integers(1, 100, 40).tolist()
    shares = deal(list(range(40)), sizes, ranks)
    assert sorted(i for share in shares for i in share) == list(range(40))
    assert all(share == sorted(share) for share in shares)
    loads = [sum(sizes[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes)
    assert max(loads) <= 4 / 3 * max(max(sizes), sum(sizes) / ranks)


def test_equal_sizes_go_round_from_the_lowest_rank():
    assert deal("abcde", [1] * 5, 2) == [["a", "c", "e"], ["b", "d"]]


def test_more_ranks_than_items():
    assert deal("ab", [1, 2], 4) == [["b"], ["a"], [], []]


@pytest.mark.parametrize("kind", ["rows", "pairs"])
@pytest.mark.parametrize("ranks", [1, 2, 4, 50])
def test_micro_batches_of_an_update(kind, ranks):
    """All targets once, equally many micro-batches a rank, tokens nearly equal; one rank packs as if nobody dealt."""
    data, groups = captioned()
    pack = packers(data)[kind]

    def tokens(group: Group) -> int:
        return group_tokens(group, data, QUERIES, shares_prefix=kind == "rows")

    dealt = dealt_batches(groups, tokens, pack, ranks)
    whole = list(pack(groups))
    assert len({len(own) for own in dealt}) == 1
    assert sorted(torch.cat([b.labels for own in dealt for b in own]).tolist()) == sorted(
        torch.cat([b.labels for b in whole]).tolist()
    )
    if ranks == 1:
        assert len(dealt[0]) == len(whole)
        assert all(torch.equal(a.labels, b.labels) for a, b in zip(dealt[0], whole, strict=True))
    loads = [
        sum(tokens(g) for g in {g.image: g for b in own if b.target_count for g in b.groups}.values()) for own in dealt
    ]
    assert sum(loads) == sum(map(tokens, groups))
    assert max(loads) - min(loads) <= max(map(tokens, groups))
    if ranks == 50:
        assert sum(load == 0 for load in loads) == 20 and all(own[0].groups for own in dealt)


def test_tokens_of_a_group_are_those_that_are_packed():
    data, groups = captioned()
    for group in groups:
        rows = pack_update([group], data, QUERIES, 400, 1, 0)
        assert group_tokens(group, data, QUERIES, shares_prefix=True) == rows[0].ids.shape[1]


@pytest.mark.parametrize("kind", ["rows", "pairs"])
def test_an_idle_micro_batch_has_an_image_and_no_target(kind):
    data, groups = captioned()
    idle = idle_batch(groups[5], packers(data)[kind])
    assert idle.target_count == 0 and idle.pair_count == 1 and [g.image for g in idle.groups] == [5]


def test_evened_leaves_equal_lists_alone():
    assert evened([["a"], ["b"]], lambda: "idle") == [["a"], ["b"]]
    assert evened([["a", "b"], []], lambda: "idle") == [["a", "b"], ["idle", "idle"]]
