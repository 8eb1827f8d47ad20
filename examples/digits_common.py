"""What the examples on scikit-learn's handwritten digits share: data, model, batches, losses, training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits as load_sklearn_digits
from torch import Tensor, nn
from tqdm import tqdm

from cmim_kernels import TemperatureSpectrum, fused_cmi_loss

CLASSES = 10
STEPS = 600
SPECTRUM = TemperatureSpectrum.uniform(1.0, 8)  # the loss's default: inverse temperatures 1/8, 2/8, ... 1
CMI_WEIGHT = 1000.0
RAMP_STEPS = 150  # cmi_weight grows linearly over these: clusters form first, then they are pressed together
SAMPLES_PER_CLASS = 16  # a centroid of fewer rows is a poor one

# A loss of (logits (N, C), target (N,), step).
Loss = Callable[[Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class Digits:
    """8x8 grey images in [0, 1], (N, 1, 8, 8), and their labels (N,)."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits(seed: int, train_size: int = 800) -> Digits:
    """The 1797 images that come with scikit-learn, split at random."""
    bunch = load_sklearn_digits()
    images = torch.from_numpy(bunch.images).float().div(16).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    train, test = order[:train_size], order[train_size:]
    return Digits(images[train], labels[train], images[test], labels[test])


class SmallCNN(nn.Sequential):
    """Two convolutions and one hidden layer: (N, 1, 8, 8) -> logits (N, 10)."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, 128),
            nn.ReLU(),
            nn.Linear(128, CLASSES),
        )


def new_model(seed: int) -> SmallCNN:
    torch.manual_seed(seed)
    return SmallCNN()


def balanced_batches(labels: Tensor, seed: int, per_class: int = SAMPLES_PER_CLASS) -> Iterator[Tensor]:
    """Without end: indices of a batch with `per_class` samples of every class.

    Each class is dealt from its own shuffled deck: a sample comes again only after all others had their turn.
    """
    generator = torch.Generator().manual_seed(seed)
    members = [torch.nonzero(labels == c).flatten() for c in range(CLASSES)]
    decks = [torch.empty(0, dtype=torch.long)] * CLASSES
    while True:
        batch = []
        for c, rows in enumerate(members):
            while len(decks[c]) < per_class:
                decks[c] = torch.cat([decks[c], rows[torch.randperm(len(rows), generator=generator)]])
            batch.append(decks[c][:per_class])
            decks[c] = decks[c][per_class:]
        yield torch.cat(batch)


def cross_entropy(logits: Tensor, target: Tensor, step: int) -> Tensor:
    return F.cross_entropy(logits, target)


def cmim(logits: Tensor, target: Tensor, step: int) -> Tensor:
    """Cross entropy plus the CMI of the whole spectrum, cmi_weight growing linearly."""
    return fused_cmi_loss(
        logits, target, temperatures=SPECTRUM, cmi_weight=CMI_WEIGHT * min(1.0, step / RAMP_STEPS)
    )


def eager_cmim(logits: Tensor, target: Tensor, step: int) -> Tensor:
    """The same loss written out in PyTorch operations, for comparison of the times."""
    cmi = logits.new_zeros(())
    counts = torch.bincount(target, minlength=CLASSES).clamp(min=1).unsqueeze(1)
    for a, weight in zip(SPECTRUM.inverse_temperatures, SPECTRUM.weights, strict=True):
        log_p = F.log_softmax(a * logits, dim=1)
        p = log_p.exp()
        centroids = torch.zeros(CLASSES, CLASSES).index_add(0, target, p) / counts
        cmi = cmi + weight * F.kl_div(centroids[target].log(), log_p, reduction="batchmean", log_target=True)
    return F.cross_entropy(logits, target) + CMI_WEIGHT * min(1.0, step / RAMP_STEPS) * cmi


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss: Loss, x: Tensor, y: Tensor, step: int
) -> Tensor:
    optimizer.zero_grad()
    value = loss(model(x), y, step)
    value.backward()
    optimizer.step()
    return value.detach()


def new_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=1e-2)


def train(
    model: nn.Module, images: Tensor, labels: Tensor, loss: Loss, *, steps: int, seed: int, name: str
) -> None:
    """Trains in place, with AdamW, a cosine schedule and class-balanced batches, behind a progress bar."""
    optimizer = new_optimizer(model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    batches = balanced_batches(labels, seed)
    model.train()
    with tqdm(range(steps), desc=name, unit="step", dynamic_ncols=True) as bar:
        for step in bar:
            rows = next(batches)
            value = train_step(model, optimizer, loss, images[rows], labels[rows], step)
            schedule.step()
            if step % 50 == 0:
                bar.set_postfix(loss=f"{value.item():.3f}")
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (model(images).argmax(dim=1) == labels).double().mean().item()
