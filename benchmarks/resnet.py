"""ResNet-18 for 32x32 images in plain PyTorch (He et al., arXiv 1512.03385, with the usual 3x3 stem)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    """(N, inputs, H, W) -> (N, outputs, H / stride, W / stride), beside a block's convolutions."""
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """(N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet18(nn.Sequential):
    """(N, 3, 32, 32) -> logits (N, classes)."""

    def __init__(self, classes: int) -> None:
        stages = [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]
        blocks = [b for i, o, stride in stages for b in (BasicBlock(i, o, stride), BasicBlock(o, o, 1))]
        super().__init__(
            nn.Conv2d(3, 64, 3, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            *blocks,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(512, classes),
        )
