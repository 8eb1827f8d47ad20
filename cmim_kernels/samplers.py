"""Batches with several rows of each of their classes, which centroids of a batch need."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Sampler

from .validate import checked_count, checked_int


class ClassBalancedBatchSampler(Sampler[list[int]]):
    """Batches of `classes_per_batch` classes with `samples_per_class` rows each: a `batch_sampler`.

    Classes and, within each class, its rows are dealt from shuffled decks: none comes again before all others
    had their turn, and the classes of one batch are distinct. A class with fewer rows than
    `samples_per_class` is dealt with repetitions. Several ranks share the decks: their batches are disjoint
    as far as the decks allow. Epochs are reproducible: `set_epoch(e)` and the seed decide everything.

    Args:
        labels: (number of rows,) class of every row, integers; classes are the distinct values.
        classes_per_batch: m, at most the number of classes; None takes all of them.
        samples_per_class: n; a batch has m * n rows.
        batches: batches of an epoch on each rank; None: as many full batches as the rows suffice for, at
            least one.
        seed: of the shuffling, the same on all ranks.
        rank, world_size: this process's place among those that share an epoch.

    Raises:
        TypeError, ValueError: an argument is not what is described above.
    """

    def __init__(
        self,
        labels: Sequence[int] | Tensor,
        *,
        classes_per_batch: int | None = None,
        samples_per_class: int = 4,
        batches: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        try:
            labels = torch.as_tensor(labels, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"labels must be a sequence of integers, got {labels!r:.60}") from error
        if labels.dim() != 1 or labels.numel() == 0:
            raise ValueError(
                f"labels must be of shape (rows,) with at least one row, got {tuple(labels.shape)}"
            )
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"labels must be integers, got {labels.dtype}")
        values, which = labels.cpu().unique(return_inverse=True)
        m = len(values) if classes_per_batch is None else checked_int("classes_per_batch", classes_per_batch)
        if not 1 <= m <= len(values):
            raise ValueError(f"classes_per_batch must lie in [1, {len(values)}], got {m}")
        n = checked_count("samples_per_class", samples_per_class)
        rank, world_size = checked_int("rank", rank), checked_count("world_size", world_size)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in [0, {world_size}), got {rank}")
        if batches is None:
            batches = max(1, len(labels) // (m * n * world_size))
        order = which.argsort(stable=True)
        self._members = [rows.tolist() for rows in order.split(which.bincount().tolist())]
        self._m, self._n = m, n
        self._batches = checked_count("batches", batches)
        self._seed, self._rank, self._world_size = checked_int("seed", seed), rank, world_size
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch that the next iteration deals; without it every iteration is the same."""
        self._epoch = checked_int("epoch", epoch)

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[list[int]]:
        # Generators use no more than 32 bits of a seed.
        generator = torch.Generator("cpu").manual_seed((self._seed * 2_654_435_761 + self._epoch) % 2**32)
        classes = _Deck(range(len(self._members)), generator)
        rows = [_Deck(members, generator) for members in self._members]
        for _ in range(self._batches):
            for rank in range(self._world_size):
                chosen = classes.deal(self._m)
                batch = [row for c in chosen for row in rows[c].deal(self._n)]
                if rank == self._rank:
                    yield batch


class _Deck:
    """Deals numbers in shuffled order, reshuffling when none is left."""

    def __init__(self, cards: Sequence[int], generator: torch.Generator) -> None:
        self._cards, self._generator = cards, generator
        self._deck: list[int] = []
        self._dealt = 0  # so many of it, from the front

    def deal(self, count: int) -> list[int]:
        """The next `count` numbers, all distinct unless there are fewer than that."""
        while len(self._deck) - self._dealt < count:
            left, fresh = self._deck[self._dealt :], self._shuffled()
            held = set(left)
            # Cards still in hand come last, so that none is dealt twice at once.
            self._deck = left + sorted(fresh, key=held.__contains__)
            self._dealt = 0
        self._dealt += count
        return self._deck[self._dealt - count : self._dealt]

    def _shuffled(self) -> list[int]:
        order = torch.randperm(len(self._cards), generator=self._generator, device="cpu").tolist()
        return [self._cards[i] for i in order]
