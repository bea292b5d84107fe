"""Updates ahead of time: the same as in line, bounded, and gone when told to stop."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch

from vpgtrans.engine.data.packing import CaptionData, Position, Subset, UpdateOrder, pack_update
from vpgtrans.engine.data.stream import UpdateStream

DATA = CaptionData("x", [None] * 9, [[[1, 5 + i, 2, 3][: 2 + k] for k in range(1 + i % 3)] for i in range(9)])
LENGTHS = [5, 5, 5, 5, 2]


class Features:
    """Prepares the image numbers of a micro-batch; counts what it was asked for."""

    def __init__(self, fails_at: int | None = None):
        self.prepared, self.fails_at, self.unusable = 0, fails_at, {}

    def prepare(self, groups) -> torch.Tensor:
        self.prepared += 1
        if self.prepared == self.fails_at:
            raise OSError("the disk is gone")
        return torch.tensor([g.image for g in groups])


def stream(features=None, position: Position | None = None, lengths=LENGTHS, **settings) -> UpdateStream:
    order = UpdateOrder([len(i) for i in DATA.ids], [Subset(0, 9)], 5, seed=3, position=position)
    return UpdateStream(
        order, iter(lengths), lambda groups: pack_update(groups, DATA, 2, 8, 1, 0), features or Features(), **settings
    )


def consumed(stream_: UpdateStream) -> list:
    return [
        (u.pairs, u.targets, u.batch_count, u.position, [(b.ids.tolist(), p.tolist()) for b, p in batches])
        for u, batches in stream_
    ]


@pytest.mark.parametrize("depth", [1, 2, 50])
def test_ahead_is_as_in_line(depth):
    inline = consumed(stream(depth=0))
    assert [u[0] for u in inline] == LENGTHS and all(len(u[4]) == u[2] > 1 for u in inline)
    assert consumed(stream(depth=depth)) == inline


@pytest.mark.parametrize("depth", [0, 4])
def test_a_position_goes_on_where_its_update_ended(depth):
    """However far ahead the thread was, a stream from update k's position gives update k + 1 and what follows."""
    whole = consumed(stream(depth=depth))
    for k in range(4):
        assert (
            consumed(stream(position=Position(**whole[k][3]), lengths=LENGTHS[k + 1 :], depth=depth)) == whole[k + 1 :]
        )


def dealt(*ranks: UpdateStream) -> list:
    """For each update: pairs, targets, position, and for each rank its micro-batches as (sorted groups, targets)."""
    found = []
    for parts in zip(*([(u, list(b)) for u, b in rank] for rank in ranks), strict=True):
        first = parts[0][0]
        assert all(replace(u, position=first.position) == first for u, _ in parts)
        of_ranks = [[(b.groups, b.target_count) for b, _ in batches] for _, batches in parts]
        assert all(len(own) == first.own_batches for own in of_ranks)
        assert first.batch_count == sum(n > 0 for own in of_ranks for _, n in own)
        found.append((first.pairs, first.targets, first.position, of_ranks))
    return found


def trained(update) -> list:
    """Groups of an update that have targets, whichever rank had them."""
    return sorted((g.image, g.captions) for own in update[3] for groups, targets in own if targets for g in groups)


@pytest.mark.parametrize("world", [2, 3, 7])
def test_ranks_share_the_groups(world):
    """Each group once; as many micro-batches on each rank, those beyond its share without targets."""
    whole = dealt(stream(depth=0))
    shares = dealt(*(stream(rank=rank, world_size=world) for rank in range(world)))
    for one, many in zip(whole, shares, strict=True):
        assert one[:3] == many[:3]
        assert trained(one) == trained(many)
        assert sum(n for own in many[3] for _, n in own) == one[1]
    assert any(n == 0 for update in shares for own in update[3] for _, n in own)


def test_what_a_consumer_leaves_is_skipped():
    firsts = [(u.position, next(batches)[1].tolist()) for u, batches in stream()]
    assert firsts == [(u[3], u[4][0][1]) for u in consumed(stream(depth=0))]


def test_it_waits_when_it_is_far_enough_ahead():
    features = Features()
    ahead = stream(features, depth=3, lengths=[5] * 1000)
    _, batches = next(iter(ahead))
    next(batches)
    time.sleep(0.3)
    assert features.prepared <= 1 + 3 + 1  # taken, waiting, and the one in its hands
    ahead.close()
    assert not any(t.name == "update-stream" for t in threading.enumerate())


@pytest.mark.parametrize("depth", [0, 4])
def test_an_error_in_the_thread_reaches_the_loop(depth):
    with pytest.raises(OSError, match="the disk is gone"):
        consumed(stream(Features(fails_at=4), depth=depth))


def test_one_two_and_one_ranks_go_on_as_one_would():
    """Updates 0 and 1 by one process, 2 and 3 by two, 4 by one: every group once, in the updates of an uninterrupted process."""
    whole = dealt(stream())
    found = dealt(stream(lengths=LENGTHS[:2]))
    at = Position(**found[-1][2])
    found += dealt(*(stream(position=at, lengths=LENGTHS[2:4], rank=rank, world_size=2) for rank in (0, 1)))
    found += dealt(stream(position=Position(**found[-1][2]), lengths=LENGTHS[4:]))
    assert [u[:3] for u in found] == [u[:3] for u in whole]
    assert [trained(u) for u in found] == [trained(u) for u in whole]


GROWTH = """
import resource, sys
from vpgtrans.engine.data.packing import CaptionData, Subset, UpdateOrder, pack_update
from vpgtrans.engine.data.stream import UpdateStream
import torch

class Features:
    unusable = {}

    def prepare(self, groups):
        return torch.empty(len(groups), 3, 64, 64, dtype=torch.uint8)

data = CaptionData("x", [None] * 99, [[[1, 5 + i, 2, 3][: 2 + k] for k in range(1 + i % 3)] for i in range(99)])
order = UpdateOrder([len(i) for i in data.ids], [Subset(0, 99)], 5, seed=3)
batches = int(sys.argv[1])
stream = UpdateStream(order, iter([5] * batches), lambda groups: pack_update(groups, data, 2, 8, 8, 0), Features(), depth=4)
sizes, seen = [], 0
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
for update, own in stream:
    seen += sum(1 for _ in own)
    if seen >= (len(sizes) + 1) * batches // 10:
        sizes.append(resident())
print(seen, max(sizes[5:]) - sizes[1], order.position.epochs[0])
"""


@pytest.mark.parametrize("batches", [2_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_memory_stays_flat(batches):
    """Resident memory of the second half of a run against that after its first fifth."""
    command = [sys.executable, "-c", GROWTH, str(batches)]
    seen, grown, epochs = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert seen == batches and epochs > batches // 50
    assert grown < 2 * 2**20
