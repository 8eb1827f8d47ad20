"""Students of all seeds and teachers trained together, with stacked weights and a vmapped forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.modules.batchnorm import _BatchNorm

from ..validate import checked_count, checked_number
from .answers import Answers

StudentFactory = Callable[[], nn.Module]


@dataclass(frozen=True)
class StudentTraining:
    """How every student is trained, the baseline's too: AdamW, cosine schedule down to 0.

    Args:
        steps: optimiser steps.
        batch_size: rows in a step; a data set no larger than that is taken whole in every step.
        lr: peak learning rate.
        weight_decay: AdamW's.
    """

    steps: int = 300
    batch_size: int = 128
    lr: float = 5e-3
    weight_decay: float = 1e-2

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            checked_count(name, getattr(self, name))
        for name in ("lr", "weight_decay"):
            checked_number(name, getattr(self, name))
        if self.lr == 0:
            raise ValueError("lr must be positive, got 0")


def mlp(inputs: int, hidden: Sequence[int], classes: int) -> StudentFactory:
    """A factory of perceptrons with ReLU on the flattened input, `inputs - hidden... - classes`.

    Raises:
        ValueError: a width below 1.
    """
    if min(inputs, *hidden, classes) < 1:
        raise ValueError(f"every width must be at least 1, got {inputs} - {list(hidden)} - {classes}")

    def make() -> nn.Module:
        layers: list[nn.Module] = [nn.Flatten()]
        width = inputs
        for size in hidden:
            layers += [nn.Linear(width, size), nn.ReLU()]
            width = size
        return nn.Sequential(*layers, nn.Linear(width, classes))

    return make


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds torch's generators for a while, and leaves them as they were."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


class Students:
    """R = copies * seeds students with stacked weights. Copies of one seed start from the same weights.

    Args:
        factory: makes one student; called once per seed, with torch's generator seeded by it.
        seeds: S seeds.
        copies: students per seed, ordered copy by copy: student r has seed r % S.
        device: where they live.

    Raises:
        TypeError: the factory is none, or makes something else than a module.
        ValueError: the students keep running statistics, which cannot be updated for stacked weights.
    """

    def __init__(
        self, factory: StudentFactory, seeds: Sequence[int], copies: int, device: torch.device
    ) -> None:
        if not callable(factory) or isinstance(factory, nn.Module):
            raise TypeError(
                "student must be a function without arguments that makes an untrained module, "
                f"got {type(factory).__name__}"
            )
        modules = []
        for seed in seeds:
            with seeded(seed):
                modules.append(factory())
        if not isinstance(modules[0], nn.Module):
            raise TypeError(f"student must make a torch.nn.Module, got {type(modules[0]).__name__}")
        for name, module in modules[0].named_modules():
            if isinstance(module, _BatchNorm) and module.track_running_stats:
                raise ValueError(
                    f"the student's {name or 'module'} keeps running statistics, which students trained "
                    "together cannot; use GroupNorm or LayerNorm, or track_running_stats=False"
                )
        params, buffers = stack_module_state([module.to(device) for module in modules])
        self._params = {
            key: value.detach().repeat(copies, *[1] * (value.dim() - 1)) for key, value in params.items()
        }
        self._buffers = {
            key: value.repeat(copies, *[1] * (value.dim() - 1)) for key, value in buffers.items()
        }
        for key, own in modules[0].named_parameters():
            self._params[key].requires_grad_(own.requires_grad)
        self._module = modules[0]
        self._seeds = list(seeds)
        self._copies = copies
        self._forward = vmap(self._one, in_dims=(0, 0, 0), randomness="different")

    def _one(self, params: dict[str, Tensor], buffers: dict[str, Tensor], inputs: Tensor) -> Tensor:
        return functional_call(self._module, (params, buffers), (inputs,))

    def __call__(self, inputs: Tensor) -> Tensor:
        """(S, B, ...) -> logits (R, B, C): copies of one seed see the same rows."""
        inputs = inputs.repeat(self._copies, *[1] * (inputs.dim() - 1))
        return self._forward(self._params, self._buffers, inputs)

    @torch.no_grad()
    def check(self, inputs: Tensor, classes: int) -> None:
        """Tries the students on a row or two of inputs (S, N, ...).

        Raises:
            ValueError: they do not take such rows, or do not give `classes` logits for each.
        """
        self._module.eval()
        some, row = inputs[:, :2], tuple(inputs.shape[2:])
        try:
            found = tuple(self(some).shape[1:])
        except (RuntimeError, ValueError, IndexError) as error:
            raise ValueError(f"the student does not take batches of rows {row}: {error}") from error
        wanted = (some.shape[1], classes)
        if found != wanted:
            raise ValueError(f"the student must give logits {wanted} for {wanted[0]} rows {row}, got {found}")

    def parameters(self) -> list[Tensor]:
        """The stacked weights, each (R, ...)."""
        return list(self._params.values())

    def describe(self, inputs: Tensor) -> tuple[str, list[Tensor]]:
        """What students are before training: their layers; weights, buffers and the classes that they give
        inputs (S, N, ...). For fingerprints: classes are the same however logits round.
        """
        self._module.eval()
        with torch.no_grad():
            classes = self(inputs).argmax(-1)
        return repr(self._module), [*self._params.values(), *self._buffers.values(), classes]

    def all_equal(self) -> bool:
        """Whether the students of several seeds have the same weights."""
        seeds = len(self._seeds)
        return seeds > 1 and all(bool((value[:seeds] == value[:1]).all()) for value in self.parameters())

    def train(self, training: StudentTraining, step_loss: Callable[[], Tensor]) -> None:
        """Minimises `step_loss() -> (R,)`; no weight is shared, so the sum's gradient is each one's own."""
        self._module.train()
        trained = [value for value in self.parameters() if value.requires_grad]
        optimiser = torch.optim.AdamW(trained, lr=training.lr, weight_decay=training.weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, training.steps)
        with seeded(self._seeds[0]):  # for dropout
            for _ in range(training.steps):
                optimiser.zero_grad()
                step_loss().sum().backward()
                optimiser.step()
                schedule.step()

    @torch.no_grad()
    def answers(self, inputs: Tensor, labels: Tensor, chunk: int = 4096) -> Answers:
        """What they say to test rows (S, M, ...), labels (S, M)."""
        self._module.eval()
        finite = torch.ones(self._copies * labels.shape[0], dtype=torch.bool, device=labels.device)
        right = []
        for start in range(0, labels.shape[1], chunk):
            logits = self(inputs[:, start : start + chunk])
            right.append(logits.argmax(-1) == labels[:, start : start + chunk].repeat(self._copies, 1))
            finite &= logits.isfinite().all(-1).all(-1)
        return Answers(torch.cat(right, 1), finite)


def batches(seeds: Sequence[int], rows: int, batch_size: int, device: torch.device) -> Iterator[Tensor]:
    """Endless (S, B) row numbers: each seed's own shuffled epochs, the same for every attack."""
    if rows <= batch_size:
        whole = torch.arange(rows, device=device).expand(len(seeds), rows)
        while True:
            yield whole
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    while True:
        order = torch.stack([torch.randperm(rows, generator=generator) for generator in generators]).to(
            device
        )
        for start in range(0, rows - batch_size + 1, batch_size):
            yield order[:, start : start + batch_size]


def take(rows: Tensor, index: Tensor) -> Tensor:
    """Rows (S, N, ...) at (S, B) -> (S, B, ...); rows (R, N, ...) take the index copy by copy."""
    index = index.repeat(rows.shape[0] // index.shape[0], 1)
    return rows[torch.arange(rows.shape[0], device=rows.device).unsqueeze(1), index]
