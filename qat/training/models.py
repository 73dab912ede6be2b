"""Small reference networks. Every other model comes by its ``_target_``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ConvBlock(nn.Sequential):
    """Convolution without bias, batch norm, and (unless the next thing is an addition) a ReLU of its own.

    Each ReLU is an instance of its own because a quantizer absorbs the one in front of it; a shared one it could not.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, relu: bool = True) -> None:
        layers: list[nn.Module] = [
            nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(outputs),
        ]
        super().__init__(*layers, *([nn.ReLU()] if relu else []))


class ResidualBlock(nn.Module):
    """``relu(body(x) + shortcut(x))``; (batch, inputs, h, w) -> (batch, outputs, h / stride, w / stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(ConvBlock(inputs, outputs, stride=stride), ConvBlock(outputs, outputs, relu=False))
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else ConvBlock(inputs, outputs, kernel=1, stride=stride, relu=False)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x) + self.shortcut(x))


class ResidualNet(nn.Module):
    """A residual network for small images: a stem and a block per stage, each twice as wide and half as large.

    Shapes: (batch, channels, h, w) -> (batch, num_classes) logits. Width 8 and three stages: 19,810 parameters.

    >>> sum(p.numel() for p in ResidualNet().parameters())
    19810
    """

    def __init__(self, num_classes: int = 10, channels: int = 1, width: int = 8, stages: int = 3) -> None:
        super().__init__()
        widths = [width * 2**i for i in range(stages)]
        self.stem = ConvBlock(channels, width)
        self.blocks = nn.Sequential(
            *(ResidualBlock(a, b, stride=1 if i == 0 else 2) for i, (a, b) in enumerate(zip([width, *widths], widths)))
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(self.pool(self.blocks(self.stem(x))), 1))


class MLP(nn.Sequential):
    """Linear layers with ReLU between them on the flattened input: (batch, ...) -> (batch, num_classes) logits."""

    def __init__(self, inputs: int = 256, hidden: Sequence[int] = (64, 64), num_classes: int = 10) -> None:
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in zip([inputs, *hidden], hidden):
            layers += [nn.Linear(before, after), nn.ReLU()]
        super().__init__(*layers, nn.Linear([inputs, *hidden][-1], num_classes))
