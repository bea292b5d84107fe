"""Random numbers of ranks: each update begins with a seed of its own on each rank.

Ranks that start with one seed would drop the same units for different images; and a checkpoint, which one rank writes, could not bring back the
states of all.  On one process the generators run on, as their checkpoint has them.
"""

from __future__ import annotations

import numpy as np
import torch

from ..runtime import Runtime


def seed_update(seed: int, update: int, runtime: Runtime) -> None:
    """Seed torch's generators by (seed, update, rank); nothing on one process."""
    if runtime.world_size > 1:
        drawn = np.random.default_rng([seed, update, runtime.rank]).integers(2**63)
        torch.manual_seed(int(drawn))
