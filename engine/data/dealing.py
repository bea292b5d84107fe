"""How the images of an update are dealt to ranks: nearly equal numbers of tokens, and exactly equal numbers of micro-batches.

Whole groups (an image and its captions) are dealt, longest first, each to the rank with the fewest tokens so far: the fullest rank then has at
most one group more than the emptiest, and at most 4/3 of the best possible (Graham, SIAM J. Appl. Math. 17(2), 1969).  Every rank deals the
whole update and gets the same answer, so nothing is communicated.  Each rank packs its own share into rows; a rank with fewer micro-batches than
another runs micro-batches without targets for the rest, because a gather inside a forward pass needs all ranks.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import TypeVar

from .packing import Batch, Group, TokenisedCaptions

T = TypeVar("T")


def deal(items: Sequence[T], sizes: Sequence[int], ranks: int) -> list[list[T]]:
    """Items for each rank, in their own order; equal sizes go to the lower rank first."""
    emptiest = [(0, 0, rank) for rank in range(ranks)]  # (size, items, rank): a heap
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for index in sorted(range(len(items)), key=lambda i: (-sizes[i], i)):
        size, count, rank = heapq.heappop(emptiest)
        shares[rank].append(index)
        heapq.heappush(emptiest, (size + sizes[index], count + 1, rank))
    return [[items[i] for i in sorted(share)] for share in shares]


def group_tokens(group: Group, data: TokenisedCaptions, queries: int, shares_prefix: bool) -> int:
    """Tokens that a language model computes for a group; shares_prefix: its captions stand behind one visual prefix, not one each."""
    prefix = len(data.lead(group.image)) + queries
    captions = sum(len(data.ids[group.image][caption]) for caption in group.captions)
    return captions + prefix * (1 if shares_prefix else len(group.captions))


def dealt_batches(
    groups: list[Group], tokens: Callable[[Group], int], pack: Callable[[list[Group]], Sequence[Batch]], ranks: int
) -> list[list[Batch]]:
    """The micro-batches of each rank, equally many, all of `groups` once; on one rank what `pack` gives."""
    if ranks == 1:
        return [list(pack(groups))]
    shares = deal(groups, [tokens(group) for group in groups], ranks)
    batches = [list(pack(share)) if share else [] for share in shares]
    return evened(batches, lambda: idle_batch(groups[0], pack))


def idle_batch(group: Group, pack: Callable[[list[Group]], Sequence[Batch]]) -> Batch:
    """The smallest micro-batch that runs everything and trains nothing: one caption, none of its tokens a target."""
    return pack([Group(group.image, group.epoch, group.captions[:1])])[0].without({group.image})


def evened(batches: list[list[Batch]], idle: Callable[[], Batch]) -> list[list[Batch]]:
    """The same with micro-batches of `idle` behind those of the ranks that have fewer."""
    most = max(len(own) for own in batches)
    return [[*own, *(idle() for _ in range(most - len(own)))] for own in batches]
