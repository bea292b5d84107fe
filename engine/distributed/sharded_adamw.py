"""AdamW whose moments are spread over the ranks (ZeRO stage 1, Rajbhandari et al., arXiv 1910.02054).

Each parameter belongs to one rank, which alone keeps its moments and updates it; the new values are then gathered.  Whole tensors are dealt, not
slices, so that each is updated by the very instructions that update it on one process: results are the same bits as without sharding, given
the same gradients.  The norm is that of all gradients, which every rank has.  Memory of P parameters in float32 on N ranks: 8 P / N bytes of
moments instead of 8 P.  Bytes that a rank receives for the new values: (N - 1) / N x 4 P, P rounded up to N times the largest rank's share
(`part_elements`), which is much where N is large: 64 ranks cannot share out 400 tensors evenly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..data.dealing import deal
from ..runtime import Runtime
from .reduction import ALIGNMENT

# torch 2.13's name; 2.11 has the other one only, which 2.13 warns of.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class ShardedAdamW(torch.optim.AdamW):
    """In the place of `optimizer`, an AdamW without state: same groups and settings; its parameters move into one buffer.

    `step` is a collective.  `consolidate` is one too and must come before `state_dict`, which only rank 0 can give.
    """

    def __init__(self, optimizer: torch.optim.AdamW, runtime: Runtime):
        super().__init__([dict(group) for group in optimizer.param_groups], fused=optimizer.defaults["fused"])
        self._runtime = runtime
        parameters = [p for group in self.param_groups for p in group["params"]]
        dealt = deal(parameters, [p.numel() for p in parameters], runtime.world_size)
        self._owned = set(dealt[runtime.rank])
        self._others = [p for p in parameters if p not in self._owned]
        self._flat = _into_one_buffer(dealt)
        self._whole: dict[str, Any] | None = None
        self._is_consolidated = False  # the same on all ranks

    @property
    def state_bytes(self) -> int:
        """Of the moments and steps on this rank."""
        return sum(t.numel() * t.element_size() for entry in self.state.values() for t in entry.values())

    def step(self, closure: None = None) -> None:
        """Update this rank's parameters and gather the others'.  Skips as AdamW does where `found_inf` is 1."""
        self._whole, self._is_consolidated = None, False
        hidden = [(p, p.grad) for p in self._others]
        for parameter, _ in hidden:
            parameter.grad = None
        try:
            super().step(closure)
        finally:
            for parameter, gradient in hidden:
                parameter.grad = gradient
        own = self._flat.view(self._runtime.world_size, -1)[self._runtime.rank]
        _all_gather(self._flat, own.clone() if self._flat.device.type == "cpu" else own)

    def consolidate(self) -> None:
        """Bring the moments of all ranks together on rank 0, on the CPU, in the form that AdamW itself has; a collective, but for a second
        call after one step, which does nothing."""
        if self._is_consolidated:
            return
        self._is_consolidated = True
        state = super().state_dict()["state"]
        own = {i: {k: v.detach().cpu() for k, v in entry.items()} for i, entry in state.items()}
        found: list[Any] | None = [None] * self._runtime.world_size if self._runtime.is_main else None
        dist.gather_object(own, found)
        if found is not None:
            merged = {i: entry for of_rank in found for i, entry in of_rank.items()}
            self._whole = dict(sorted(merged.items()))

    def state_dict(self) -> dict[str, Any]:
        """As of an AdamW that is not sharded.  Raises RuntimeError on other ranks than 0 and where `consolidate` was not called since the step."""
        groups = super().state_dict()["param_groups"]
        if self._whole is None:
            if self.state:
                raise RuntimeError(
                    "state_dict: expected `consolidate` on all ranks after the last step, and the call on rank 0"
                )
            return {"state": {}, "param_groups": groups}
        return {"state": self._whole, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a whole state, as written on any number of ranks, and keep this rank's part."""
        super().load_state_dict(state_dict)
        for parameter in self._others:
            self.state.pop(parameter, None)
        self._whole, self._is_consolidated = None, False


def part_elements(sizes: Sequence[int], ranks: int) -> int:
    """Elements of each rank's part of the buffer for tensors of so many elements: the largest share that is dealt."""
    return max(sum(map(_aligned, own)) for own in deal(sizes, sizes, ranks))


def _aligned(elements: int) -> int:
    return -(-elements // ALIGNMENT) * ALIGNMENT


def _into_one_buffer(dealt: list[list[Tensor]]) -> Tensor:
    """Move parameters into a buffer of equal parts, one a rank, where gathering needs no copies; their values stay."""
    sizes = [[_aligned(p.numel()) for p in own] for own in dealt]
    part = max(sum(of_rank) for of_rank in sizes)
    first = next(p for own in dealt for p in own)
    flat = torch.zeros(part * len(dealt), dtype=first.dtype, device=first.device)
    for rank, own in enumerate(dealt):
        start = rank * part
        for parameter, size in zip(own, sizes[rank], strict=True):
            view = flat[start : start + parameter.numel()].view(parameter.shape)
            view.copy_(parameter.detach())
            parameter.data = view
            start += size
    return flat
