"""The contract of every frozen vision tower: images (B, 3, side, side) -> features (B, tokens, width)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..data.images import CLIP_MEAN, CLIP_STD


@dataclass(frozen=True)
class PixelNorm:
    """What the tower expects of its pixels, channels scaled to 0..1 before."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


CLIP_NORM = PixelNorm(CLIP_MEAN, CLIP_STD)


class VisionTower(nn.Module):
    """A frozen tower in eval mode; `features` never builds a graph.

    layer_norm_eps: that of a stored BLIP-2, whose one value transformers uses for `post_layernorm` too; None elsewhere.
    """

    layer_norm_eps: float | None = None

    def __init__(self, module: nn.Module, width: int, tokens: int, image_size: int, norm: PixelNorm, path: str):
        super().__init__()
        self.module = module.requires_grad_(False)
        self.width, self.tokens, self.image_size, self.norm, self.path = width, tokens, image_size, norm, path
        self.eval()

    def train(self, mode: bool = True) -> VisionTower:
        """Always in eval mode, as in the reference."""
        return super().train(False)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """images (B, 3, side, side) normalised -> (B, tokens, width)."""
        return self.module(images)

    @property
    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())
