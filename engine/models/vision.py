"""Frozen vision towers behind one contract: images (B, 3, side, side) -> features (B, tokens, width).  No final norm: `ln_vision` follows."""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Blip2VisionConfig, Blip2VisionModel

from ..checkpoint import check_fit, load_tensors
from ..data.images import CLIP_MEAN, CLIP_STD
from ..recipe import Vision
from .llm import ModelError


@dataclass(frozen=True)
class PixelNorm:
    """What the tower expects of its pixels, channels scaled to 0..1 before."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class VisionTower(nn.Module):
    """A frozen tower in eval mode; `features` never builds a graph."""

    def __init__(self, module: nn.Module, width: int, tokens: int, image_size: int, norm: PixelNorm, path: str):
        super().__init__()
        self.module = module.requires_grad_(False).eval()
        self.width, self.tokens, self.image_size, self.norm, self.path = width, tokens, image_size, norm, path

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


class _EvaViT(nn.Module):
    """transformers' BLIP-2 ViT (EVA-CLIP's layout) without its last norm, which is BLIP-2's `ln_vision`."""

    def __init__(self, config: Blip2VisionConfig):
        super().__init__()
        self.model = Blip2VisionModel(config)
        self.model.post_layernorm = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        return self.model(pixel_values=images).last_hidden_state


def eva_vit(config: Blip2VisionConfig) -> nn.Module:
    """A randomly initialised ViT of the given sizes; images (B, 3, side, side) -> (B, 1 + patches, width)."""
    config._attn_implementation = "sdpa"
    return _EvaViT(config)


class _ConvReLU6(nn.Module):
    def __init__(
        self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, activate: bool = True
    ):
        super().__init__()
        self.c = nn.Conv2d(inputs, outputs, kernel, stride, 0, groups=groups)
        # TensorFlow's SAME padding, which the weights were trained with, is uneven at stride 2.
        self.padding = (0, 0, 0, 0) if kernel == 1 else (0, 1, 0, 1) if stride == 2 else (1, 1, 1, 1)
        self.activate = activate

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(F.pad(x, self.padding))
        return F.relu6(x) if self.activate else x


class _InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int):
        super().__init__()
        inner = inputs * expansion
        widen = [_ConvReLU6(inputs, inner)] if expansion > 1 else []
        self.l = nn.Sequential(
            *widen, _ConvReLU6(inner, inner, 3, stride, inner), _ConvReLU6(inner, outputs, activate=False)
        )
        self.skips = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.l(x) if self.skips else self.l(x)


class MobileNetV2(nn.Module):
    """MobileNetV2 1.0 with folded batch norms (arXiv 1801.04381, table 2): pixels in -1..1 -> (B, 49, 1280) at 224 pixels.

    Parameter names follow the layer order of the weights in `shared/data/mobilenetv2_imagenet`: `body.N.c` and `body.N.l.M.c`.
    """

    # (expansion, output channels, repeats, stride of the first)
    STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [_ConvReLU6(3, 32, 3, 2)]
        channels = 32
        for expansion, outputs, repeats, stride in self.STAGES:
            for index in range(repeats):
                layers.append(_InvertedResidual(channels, outputs, expansion, stride if index == 0 else 1))
                channels = outputs
        self.body = nn.Sequential(*layers, _ConvReLU6(channels, 1280))

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images.contiguous(memory_format=torch.channels_last)).flatten(2).transpose(1, 2)


def load_tower(settings: Vision) -> VisionTower:
    """Load the frozen tower that a recipe names.

    Raises ModelError or CheckpointError naming what does not fit.
    """
    if settings.kind == "mobilenet_v2":
        module = MobileNetV2()
        stored = {
            k: v for k, v in load_tensors(settings.path / "model.safetensors").items() if not k.startswith("head.")
        }
        check_fit(stored, dict(module.state_dict()), str(settings.path))
        module.load_state_dict(stored)
        module.to(memory_format=torch.channels_last)  # depthwise convolutions: 31 against 72 CPU-ms an image
        side = -(-settings.image_size // 32)
        norm = PixelNorm((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        return VisionTower(module, 1280, side * side, settings.image_size, norm, str(settings.path))
    try:
        config = Blip2VisionConfig(**json.loads((settings.path / "config.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(
            f"vision.path: expected a folder with a ViT's config.json and model.safetensors, got {settings.path}: {error}"
        ) from error
    if config.image_size != settings.image_size:
        raise ModelError(
            f"vision.image_size: expected {config.image_size}, the size the tower was trained with, got {settings.image_size}"
        )
    module = eva_vit(config)
    stored = load_tensors(settings.path / "model.safetensors")
    check_fit(stored, dict(module.model.state_dict()), str(settings.path))
    module.model.load_state_dict(stored)
    tokens = 1 + (config.image_size // config.patch_size) ** 2
    return VisionTower(
        module, config.hidden_size, tokens, config.image_size, PixelNorm(CLIP_MEAN, CLIP_STD), str(settings.path)
    )
