"""The last updates of a run, kept for the report of one that had to stop, and loss spikes among them."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .data.packing import Group

KEPT_UPDATES = 8
WINDOW_UPDATES = 100
FIRST_UPDATES = 20  # judged by none before there are as many
LEAST_RISE = 0.2  # of the median: a curve without noise has a deviation of nearly nothing
MAD_TO_DEVIATION = 1.4826  # of a normal distribution


@dataclass(frozen=True)
class Spike:
    """An update whose loss stands out: `median` and `deviation` of the updates before it."""

    update: int
    loss: float
    median: float
    deviation: float
    groups: Sequence[Group]


class SpikeFinder:
    """Finds losses above the running median by `deviations` times the running deviation (from the median absolute deviation).

    A spike is reported once, however many updates it lasts.
    """

    def __init__(self, deviations: float):
        self._deviations = deviations
        self._losses: deque[float] = deque(maxlen=WINDOW_UPDATES)
        self._inside = False

    def add(self, loss: float) -> tuple[float, float] | None:
        """(median, deviation) of the losses before this one where a spike begins with it."""
        found = None
        if len(self._losses) >= FIRST_UPDATES and math.isfinite(loss):
            median = statistics.median(self._losses)
            deviation = MAD_TO_DEVIATION * statistics.median(abs(x - median) for x in self._losses)
            high = loss > median + max(self._deviations * deviation, LEAST_RISE * abs(median))
            if high and not self._inside:
                found = median, deviation
            self._inside = high
        if math.isfinite(loss):
            self._losses.append(loss)
        return found


class LastUpdates:
    """Losses and norms stay on the device until `read`, which waits for it once."""

    def __init__(self, deviations: float | None):
        self._finder = SpikeFinder(deviations) if deviations else None
        self._unread: list[tuple[int, Tensor, Tensor, Sequence[Group]]] = []
        self._kept: deque[tuple[int, float, float, Sequence[Group]]] = deque(maxlen=KEPT_UPDATES)

    def add(self, update: int, loss: Tensor, norm: Tensor, groups: Sequence[Group]) -> None:
        """loss, norm: scalars on the device."""
        self._unread.append((update, loss.detach(), norm.detach(), groups))

    def read(self) -> list[Spike]:
        """Fetch what was added since the last call; returns the spikes that began in it."""
        spikes: list[Spike] = []
        if not self._unread:
            return spikes
        numbers = torch.stack([torch.stack([loss.double(), norm.double()]) for _, loss, norm, _ in self._unread])
        for (update, _, _, groups), (loss, norm) in zip(self._unread, numbers.tolist(), strict=True):
            self._kept.append((update, loss, norm, groups))
            if self._finder and (found := self._finder.add(loss)):
                spikes.append(Spike(update, loss, *found, groups))
        self._unread.clear()
        return spikes

    def report(self, records: Sequence[Any]) -> list[dict[str, Any]]:
        """The kept updates, oldest first, with their images and captions; numbers that JSON does not know as strings."""
        self.read()
        return [
            {"update": u, "loss": _plain(loss), "grad_norm": _plain(norm), "images": [_image(g, records) for g in groups]}
            for u, loss, norm, groups in self._kept
        ]  # fmt: skip


def files(groups: Sequence[Group], records: Sequence[Any]) -> list[str]:
    """The image files of an update."""
    return [str(_image(g, records).get("file")) for g in groups]


def _image(group: Group, records: Sequence[Any]) -> dict[str, Any]:
    found: dict[str, Any] = {**asdict(group), "captions": list(group.captions)}
    try:
        record = records[group.image]
        found |= {"image_id": record.image_id, "file": str(record.path)}
        texts = getattr(record, "captions", None)
        if texts is not None:
            found["captions"] = [texts[k] for k in group.captions]
    except (OSError, ValueError, IndexError) as error:  # a report must not fail on a sample that cannot be read
        found["error"] = str(error)
    return found


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
