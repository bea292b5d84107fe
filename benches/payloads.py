"""What this process hands to collectives, in bytes, and what its network interface really sends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from vpgtrans.engine.distributed import sharded_adamw

# What torch 2.13 calls `single`.
GATHER, SCATTER = (
    new if hasattr(dist, new) else old
    for new, old in (
        ("all_gather_single", "all_gather_into_tensor"),
        ("reduce_scatter_single", "reduce_scatter_tensor"),
    )
)


def count_payloads() -> Counter[str]:
    """From here on every tensor collective adds the bytes of its whole tensor (of a gather: its output) to the counter that is returned.

    Keys: "all_reduce", "all_gather", "reduce_scatter", "broadcast"; "flags": sums in groups of their own, which the guards use; "weights":
    gathers of new weights by the sharded optimiser.  Objects, which travel at the start and in the first update, are not counted.
    """
    counts: Counter[str] = Counter()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(tensor: Tensor, *arguments: Any, **settings: Any) -> Any:
            what = "flags" if name == "all_reduce" and settings.get("group") is not None else name
            whole = arguments[0] if name == "reduce_scatter" else tensor
            counts[what] += whole.numel() * whole.element_size()
            return function(tensor, *arguments, **settings)

        return call

    dist.all_reduce = counted("all_reduce", dist.all_reduce)
    dist.broadcast = counted("broadcast", dist.broadcast)
    sharded_adamw._all_gather = counted("weights", sharded_adamw._all_gather)
    setattr(dist, GATHER, counted("all_gather", getattr(dist, GATHER)))
    setattr(dist, SCATTER, counted("reduce_scatter", getattr(dist, SCATTER)))
    return counts


def loopback_bytes() -> int | None:
    """Sent through `lo` since it is there, headers and acknowledgements included, by all of this network namespace; None where unknown."""
    try:
        lines = Path("/proc/self/net/dev").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split(":")[1].split()[8]) for line in lines if line.strip().startswith("lo:")), None)
