"""MobileNetV2 with its batch norms folded into the convolutions: a tower of 2.2 M parameters for small machines."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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

    Parameter names follow the order of the layers: `body.N.c` and `body.N.l.M.c`.
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
