"""One sum of gradients over ranks an update, started while the last micro-batch's backward pass still runs.

Gradients live in a few flat buckets: autograd adds each micro-batch's into views of them, so nothing is copied, and no second copy exists.  In
the last backward pass a bucket is summed as soon as all of its gradients are there.  Buckets are filled from the last parameter to the first,
the order in which backward passes reach them, and are sent in the order of the buckets whatever the order of arrival, so that all ranks send the
same one and sums are the same every time.  The loss and the count of targets ride at the end of the last bucket: no sum of their own.

Bytes that a rank sends for P parameters in float32 on N ranks: 2 (N - 1) / N x 4 P by a ring, once an update, however many micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..runtime import Runtime

BUCKET_BYTES = 25 * 2**20  # large enough for a network's full rate; 108 M parameters are 17 of them
ALIGNMENT = 64  # elements between the starts of two gradients, so that kernels find each at a multiple of 16 bytes


@dataclass
class _Bucket:
    flat: Tensor
    views: dict[Tensor, Tensor]  # parameter -> its gradient
    missing: int = 0
    work: dist.Work | None = None


class GradientReduction:
    """Sums the gradients of `parameters`, all of one dtype, over the ranks of the run.  An update is `begin`, for each micro-batch a backward
    pass, `last` before the last of them, and `finish`.  Close it when other parameters train."""

    def __init__(
        self, parameters: Sequence[Tensor], runtime: Runtime, extra: int = 2, bucket_bytes: int = BUCKET_BYTES
    ):
        """extra: how many numbers ride along.  Raises ValueError where parameters differ in dtype, or there are none."""
        dtypes = {p.dtype for p in parameters}
        if len(dtypes) != 1:
            raise ValueError(
                f"parameters: expected some of one dtype, got {sorted(map(str, dtypes)) or 'none'}; train all in float32"
            )
        self._runtime, self._extra_count = runtime, extra
        self._parameters = list(parameters)
        self._buckets = _buckets(list(reversed(self._parameters)), extra, bucket_bytes)
        self._bucket_of = {p: bucket for bucket in self._buckets for p in bucket.views}
        self._extra = self._buckets[-1].flat[-extra:] if extra else self._buckets[-1].flat[:0]
        self._reached: set[Tensor] = set()
        self._used: set[Tensor] | None = None
        self._is_last, self._sent = False, 0
        self._hooks = [p.register_post_accumulate_grad_hook(self._ready) for p in self._parameters]

    @property
    def bucket_count(self) -> int:
        return len(self._buckets)

    @property
    def sent_bytes(self) -> int:
        """Bytes handed to the collective in one update, by each rank."""
        return sum(b.flat.numel() * b.flat.element_size() for b in self._buckets)

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def begin(self) -> None:
        """Zero gradients for a new update; those that the parameters had are dropped."""
        self._reached.clear()
        self._is_last, self._sent = False, 0
        for bucket in self._buckets:
            bucket.flat.zero_()
            bucket.missing, bucket.work = len(bucket.views), None
            for parameter, view in bucket.views.items():
                parameter.grad = view

    def last(self, extra: Tensor) -> None:
        """The next backward pass is this rank's last of the update.  extra (extra,): this rank's numbers to be summed along."""
        self._extra.copy_(extra)
        self._is_last = True

    def finish(self) -> Tensor:
        """Wait for all sums; every `grad` is then that of the whole update.  Returns the sums of the numbers that rode along.

        A gradient that this rank did not form counts as zero.  A parameter that had none on any rank in the first update has none here, as on
        one process, where the optimiser passes it over.  Raises RuntimeError where such a parameter gets one later.
        """
        while self._sent < len(self._buckets):  # what the last backward pass did not reach
            self._send()
        for bucket in self._buckets:
            assert bucket.work is not None
            bucket.work.wait()
        if self._used is None:
            reached = self._runtime.gather([i for i, p in enumerate(self._parameters) if p in self._reached])
            self._used = {self._parameters[i] for of_rank in reached for i in of_rank}
        if late := self._reached - self._used:
            shapes = ", ".join(str(tuple(p.shape)) for p in list(late)[:3])
            raise RuntimeError(f"parameters of shapes {shapes}: expected no gradient, as in the first update, got one")
        for parameter in self._parameters:
            if parameter not in self._used:
                parameter.grad = None
        return self._extra.clone()

    def _ready(self, parameter: Tensor) -> None:
        self._reached.add(parameter)
        if not self._is_last:
            return
        self._bucket_of[parameter].missing -= 1
        while self._sent < len(self._buckets) and self._buckets[self._sent].missing == 0:
            self._send()

    def _send(self) -> None:
        bucket = self._buckets[self._sent]
        bucket.work = dist.all_reduce(bucket.flat, async_op=True)
        self._sent += 1


def _buckets(parameters: list[Tensor], extra: int, bucket_bytes: int) -> list[_Bucket]:
    chosen: list[list[Tensor]] = [[]]
    size = 0
    for parameter in parameters:
        own = parameter.numel() * parameter.element_size()
        if chosen[-1] and size + own > bucket_bytes:
            chosen.append([])
            size = 0
        chosen[-1].append(parameter)
        size += own
    return [_bucket(members, extra if at == len(chosen) - 1 else 0) for at, members in enumerate(chosen)]


def _bucket(parameters: list[Tensor], extra: int) -> _Bucket:
    starts, end = [], 0
    for parameter in parameters:
        starts.append(end)
        end += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
    flat = torch.zeros(end + extra, dtype=parameters[0].dtype, device=parameters[0].device)
    views = {p: flat[start : start + p.numel()].view(p.shape) for p, start in zip(parameters, starts, strict=True)}
    return _Bucket(flat, views)
