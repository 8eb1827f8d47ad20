"""ResNet-50 for 224x224 images in plain PyTorch (He et al., arXiv 1512.03385), and its training step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.contenders import LossFunction
from benchmarks.paired import Timed
from benchmarks.resnet import shortcut

CLASSES = 1000


class Bottleneck(nn.Module):
    """(N, inputs, H, W) -> (N, 4 width, H / stride, W / stride)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.reduce = nn.Conv2d(inputs, width, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.convolve = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.expand = nn.Conv2d(width, outputs, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(outputs)
        self.shortcut = shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.reduce(x)))
        y = F.relu(self.norm2(self.convolve(y)))
        return F.relu(self.norm3(self.expand(y)) + self.shortcut(x))


class ResNet50(nn.Sequential):
    """(N, 3, H, W) -> logits (N, 1000)."""

    def __init__(self) -> None:
        blocks: list[nn.Module] = []
        inputs = 64
        for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
            for i in range(count):
                blocks.append(Bottleneck(inputs, width, stride if i == 0 else 1))
                inputs = 4 * width
        super().__init__(
            nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1),
            *blocks,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(inputs, CLASSES),
        )


def steps(losses: list[LossFunction], n: int = 256, size: int = 224, device: str = "cuda") -> list[Timed]:
    """A step of one model with each loss, in bfloat16 autocast: forward, backward, SGD with momentum."""
    model = ResNet50().to(device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    images = torch.randn(n, 3, size, size, device=device).to(memory_format=torch.channels_last)
    target = torch.randint(CLASSES, (n,), device=device)

    def step(loss: LossFunction) -> None:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            logits = model(images)
        loss(logits.float(), target).backward()
        optimizer.step()

    def timed(loss: LossFunction) -> Timed:
        return Timed(lambda _: step(loss))

    return [timed(loss) for loss in losses]
