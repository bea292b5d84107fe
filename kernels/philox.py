"""Reproducible dropout masks: Philox-4x32-10 (Salmon et al., SC 2011) by seed and position, the same bits in torch and in Triton.

An attention's row is (image, query, head), image slowest; its counter is (key // 8, row, 0, 0), its key the seed.  One call gives four
32-bit words, so the 16-bit numbers of 8 keys; a probability is dropped where its number is below p * 65536.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def philox(seed: Tensor, counter: Tensor, row: Tensor, rounds: int = 10) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words (int64 tensors holding 32 bits) of counters (counter, row, 0, 0), int64 tensors that broadcast; seed int64 ()."""
    c0, c1 = torch.broadcast_tensors(counter & _LOW, row & _LOW)
    c2 = c3 = torch.zeros_like(c0)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(rounds):
        # Products wrap at 64 bits, which leaves both halves right.
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32 & _LOW) ^ c1 ^ k0, b & _LOW, (a >> 32 & _LOW) ^ c3 ^ k1, a & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3


def dropout_threshold(dropout_p: float) -> tuple[int, float]:
    """(numbers below which drop, factor of what is kept): p rounded to 1/65536, and the factor of the rounded p."""
    threshold = min(round(dropout_p * 65536), 65535)
    return threshold, 65536 / (65536 - threshold)


def seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """int64 () on `device`, without a host sync; None draws from torch's generator of that device."""
    if seed is None:
        return torch.randint(0, 1 << 62, (), device=device)
    return seed if isinstance(seed, Tensor) else torch.full((), seed, dtype=torch.int64, device=device)


def dropout_keep(
    seed: int | Tensor, dropout_p: float, batch: int, heads: int, queries: int, keys: int, device: torch.device
) -> Tensor:
    """Which probabilities are kept: bool (batch, heads, queries, keys)."""
    rows = torch.arange(batch * queries * heads, device=device).view(batch, queries, heads).transpose(1, 2)
    groups = torch.arange(-(-keys // 8), device=device)
    words = torch.stack(philox(seed_tensor(seed, device), groups, rows[..., None]), -1)  # (..., groups, 4)
    numbers = torch.stack([words & 0xFFFF, words >> 16], -1)  # (..., groups, word, half)
    # Key 4 i + 2 j + half of a group takes word i + 2 j: the order in which the kernel's joins leave them.
    numbers = numbers.unflatten(-2, (2, 2)).transpose(-3, -2).flatten(-4)
    return numbers[..., :keys] >= dropout_threshold(dropout_p)[0]
