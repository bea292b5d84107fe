"""Updates ahead of time: a thread deals out pairs, packs rows and prepares images while the device works on earlier micro-batches.

Nothing random happens here, so a stream gives what dealing, packing and reading in line would, bit for bit; each update carries the data
position after it, which is what a checkpoint must remember, however far ahead the thread is.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from .dealing import dealt_batches
from .features import FeatureSource
from .packing import Batch, Group, UpdateOrder


@dataclass(frozen=True)
class Update:
    """One update's plan: pairs and targets over all ranks (of unusable images too), this rank's micro-batches (as many as any other rank's, those
    without targets counted) out of how many with targets, the data position after it, and the images with their captions, of all ranks."""

    pairs: int
    targets: int
    batch_count: int
    own_batches: int
    position: dict[str, Any]
    groups: Sequence[Group] = ()


@dataclass(frozen=True)
class _Failure:
    error: BaseException


class UpdateStream:
    """Iterate for (update, iterator of (micro-batch on the host, its prepared images)); close it when stopping early.

    lengths: pairs of each update to come.  tokens: of a group, by which groups are dealt to ranks (dealing.py); default: its captions.
    depth: micro-batches prepared ahead; 0 does everything in line.
    """

    def __init__(
        self, order: UpdateOrder, lengths: Iterator[int], pack: Callable[[list[Group]], Sequence[Batch]], features: FeatureSource, *,
        rank: int = 0, world_size: int = 1, depth: int = 4, tokens: Callable[[Group], int] = lambda group: len(group.captions),
    ):  # fmt: skip
        self._tokens = tokens
        self._order, self._lengths, self._pack, self._features = order, lengths, pack, features
        self._rank, self._world_size = rank, world_size
        self._stopped = threading.Event()
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=max(1, depth))
        self._thread = threading.Thread(target=self._fill, name="update-stream", daemon=True) if depth else None
        self._items = self._received() if depth else self._made()
        if self._thread:
            self._thread.start()

    def __iter__(self) -> Iterator[tuple[Update, Iterator[tuple[Batch, Tensor]]]]:
        for update in self._items:
            batches = self._batches(update.own_batches)
            yield update, batches
            for _ in batches:  # whatever the consumer left
                pass

    def _batches(self, count: int) -> Iterator[tuple[Batch, Tensor]]:
        for _ in range(count):
            yield next(self._items)

    def close(self) -> None:
        """Stop the thread and drop what it has prepared."""
        self._stopped.set()
        if self._thread:
            while self._thread.is_alive():
                try:
                    self._queue.get(timeout=0.05)
                except queue.Empty:
                    continue
            self._thread.join()

    def _made(self) -> Iterator[Any]:
        for pairs in self._lengths:
            groups = self._order.next_update(pairs)
            position = asdict(self._order.position)
            dealt = dealt_batches(groups, self._tokens, self._pack, self._world_size)
            targets = [b.target_count for of_rank in dealt for b in of_rank]
            own = dealt[self._rank]
            count = len(targets) if self._world_size == 1 else sum(n > 0 for n in targets)
            yield Update(sum(len(g.captions) for g in groups), sum(targets), count, len(own), position, groups)
            for batch in own:
                prepared = self._features.prepare(batch.groups)
                bad = self._features.unusable.keys() & {g.image for g in batch.groups}
                yield (batch.without(bad) if bad else batch), prepared

    def _fill(self) -> None:
        try:
            for item in self._made():
                if not self._put(item):
                    return
            self._put(None)
        except BaseException as error:
            self._put(_Failure(error))

    def _put(self, item: Any) -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def _received(self) -> Iterator[Any]:
        while True:
            item = self._queue.get()
            if item is None:
                return
            if isinstance(item, _Failure):
                raise item.error
            yield item
