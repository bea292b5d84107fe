"""AdamW groups and learning-rate schedules as the authors' code has them."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .recipe import Optimizer


def build_adamw(named: Iterable[tuple[str, nn.Parameter]], settings: Optimizer) -> torch.optim.AdamW:
    """AdamW with two groups: decay on matrices, none on vectors (biases, norms).  Query tokens are 3-D, hence decayed.

    Fused on the CPU too: that variant skips an update on the device where `found_inf` is 1, without waiting for it.  The learning rate is
    set before every update by the schedule.  Raises ValueError when nothing trains.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in named:
        is_plain = parameter.ndim < 2 or any(part in ("bias", "ln", "bn") for part in name.split("."))
        (plain if is_plain else decayed).append(parameter)
    if not decayed and not plain:
        raise ValueError("optimizer: expected at least one parameter to train, got none")
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=0.0, betas=settings.betas, eps=settings.eps, fused=True
    )


def learning_rate(
    done: float,
    total: float,
    peak: float,
    *,
    schedule: str = "constant",
    minimum: float = 0.0,
    warmup: float = 0.0,
    warmup_start: float = 0.0,
) -> float:
    """The rate of the update that starts after `done` of `total` (pairs or steps): linear warm-up, then constant or cosine to `minimum`."""
    if done < warmup:
        return warmup_start + (peak - warmup_start) * done / warmup
    if schedule == "constant":
        return peak
    progress = min(1.0, (done - warmup) / max(1e-9, total - warmup))
    return minimum + 0.5 * (peak - minimum) * (1.0 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip_(parameters: list[nn.Parameter], limit: float | None) -> Tensor:
    """Global gradient norm, float32 on the device (no host sync); gradients are scaled down to `limit` where one is given."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    if limit is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm
