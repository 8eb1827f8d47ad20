"""Class centroids kept across batches, for batches that hold too few rows of a class to estimate its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from .dispatch import check_backend
from .distributed import GroupHolder
from .functional import class_centroids
from .spectrum import DEFAULT_SPECTRUM, Numbers, TemperatureSpectrum, as_spectrum
from .tensors import keeping_dtype, without_data
from .validate import checked_count, checked_ignore_index, checked_number

Mode = Literal["ema", "epoch", "fixed"]
_MODES = ("ema", "epoch", "fixed")
_PAIRS = (("centroids", "counts"), ("pending", "pending_counts"))  # means, and the rows behind each class's
_ROW_SUM_TOLERANCE = 1e-3  # a loaded centroid is a distribution, up to the rounding of C float32 additions
_EPSILON = 2.0**-23  # and of an `ema`, whose steps towards a batch are lost where they are smaller


class CentroidBank(nn.Module):
    """Q[k, c], the mean softmax of class c at temperature k, kept across batches: `CMIMLoss(centroids=bank)`.

    The loss holds the bank's centroids fixed in its gradient (docs/math.md, given centroids). Modes:

    - `ema`: each training batch moves the centroids of its classes by `Q <- decay Q + (1 - decay) Q_batch`,
      before they are used. A class's first batch sets its centroid.
    - `epoch`: the centroids are those of the whole previous epoch; training batches only collect the next
      ones, which `end_epoch` puts in force.
    - `fixed`: the alternating scheme: hold Q and update the network; then update Q with `reestimate`.

    A centroid's entry that underflows to 0, in float32 where logits are 90 temperatures apart, makes every
    row with a probability there infinitely far away: for such logits, or temperatures far below 1, take batch
    centroids, or float64 for bank and logits.

    Every forward pass in training mode takes its batch in, and once more if activation checkpointing repeats
    it: leave the loss out of what is checkpointed.

    A class not seen yet falls back to the batch's own centroid, which is how the loss works without a bank.
    In eval mode nothing is updated. A batch in which a class's logits hold NaN or +inf does not update that
    class (mixed precision skips such steps); the loss of the batch is NaN all the same.

    Memory: K C^2 floats, 32 MB for C = 1000 and K = 8 in float32, twice that in mode `epoch`; an update holds
    twice as much again for a moment. Where that is too much, take balanced batches
    (`ClassBalancedBatchSampler`) and no bank.

    Args:
        num_classes: C.
        temperatures: the spectrum, the same as the loss's.
        mode: `ema`, `epoch` or `fixed`.
        decay: of mode `ema`, in [0, 1). In float32 an entry stays up to 1e-7 / (1 - decay) of itself behind:
            above 0.9999 take `dtype=torch.float64`.
        ignore_index: rows with this target count nowhere; the same as the loss's.
        process_group: the batches of all its ranks count as one (rows are gathered in every update; in modes
            `epoch` and `fixed` centroids are pooled once, in `end_epoch` and `reestimate`), and every rank
            holds the same bank. None: each rank keeps its own (but DistributedDataParallel overwrites the
            buffers of what it wraps, a bank's among them, with those of rank 0: keep the loss outside).
        dtype: of the bank, float32 or float64. `half()` and the like leave it as it is.
        backend: of the update, as in `class_centroids`.

    Raises:
        TypeError, ValueError: an argument is not what is described above.
    """

    centroids: Tensor  # (K, C, C), rows of classes not seen are 0
    counts: Tensor  # (C,) int64, rows that went into them
    inverse_temperatures: Tensor  # (K,) float64, to tell a bank of another spectrum
    pending: Tensor  # (K, C, C), mode epoch: the mean so far
    pending_counts: Tensor  # (C,) int64

    def __init__(
        self,
        num_classes: int,
        *,
        temperatures: TemperatureSpectrum | Numbers = DEFAULT_SPECTRUM,
        mode: Mode = "ema",
        decay: float = 0.9,
        ignore_index: int = -100,
        process_group: ProcessGroup | None = None,
        dtype: torch.dtype = torch.float32,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        num_classes = checked_count("num_classes", num_classes)
        if mode not in _MODES:
            raise ValueError(f"mode must be one of {list(_MODES)}, got {mode!r}")
        if not checked_number("decay", decay) < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay!r}")
        check_backend(backend)
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype must be float32 or float64, got {dtype}")
        self.spectrum = as_spectrum(temperatures)
        self.num_classes = num_classes
        self.mode: Mode = mode
        self.decay = float(decay)
        self.ignore_index = checked_ignore_index(ignore_index)
        self._group = GroupHolder(process_group)
        self.backend = backend
        shape = (len(self.spectrum), num_classes, num_classes)
        self.register_buffer("centroids", torch.zeros(shape, dtype=dtype))
        self.register_buffer("counts", torch.zeros(num_classes, dtype=torch.int64))
        self.register_buffer(
            "inverse_temperatures", torch.tensor(self.spectrum.inverse_temperatures, dtype=torch.float64)
        )
        if mode == "epoch":
            self.register_buffer("pending", torch.zeros(shape, dtype=dtype))
            self.register_buffer("pending_counts", torch.zeros(num_classes, dtype=torch.int64))
        self._complete = False  # every class known to be seen: no fallback to prepare

    process_group = GroupHolder.attribute()

    @torch.no_grad()
    def centroids_for(self, logits: Tensor, target: Tensor, inverse_temperatures: Sequence[float]) -> Tensor:
        """The centroids to hold this batch against; in training mode the batch is taken in first.

        Args:
            logits: (N, C).
            target: (N,) int64.
            inverse_temperatures: the loss's a_k, which must be the bank's.

        Returns:
            (K, C, C) in the loss's compute dtype: float64 for float64 logits, else float32. May be the bank
            itself.

        Raises:
            ValueError: the batch has another number of classes or the loss other temperatures than the bank.
        """
        self._check_classes(logits)
        if tuple(inverse_temperatures) != self.spectrum.inverse_temperatures:
            raise ValueError(
                f"the loss has inverse temperatures {list(inverse_temperatures)}, "
                f"the centroid bank {list(self.spectrum.inverse_temperatures)}"
            )
        result = self.centroids
        updating = self.training and self.mode != "fixed"
        if updating or not self._complete:
            collecting = updating and self.mode == "epoch"  # each rank its own rows, until the epoch's end
            batch, counts = self._batch_centroids(logits, target, gather=self.training and not collecting)
            if collecting:
                _merge(self.pending, self.pending_counts, batch, counts)
                if self.process_group is not None and not self._complete:
                    batch, counts = self._batch_centroids(logits, target, gather=True)
            elif updating:
                self._move(batch, counts)
            # A class without a finite row so far gets the uniform distribution: its loss is NaN anyway.
            batch.masked_fill_((counts == 0).unsqueeze(1), 1 / self.num_classes)
            result = torch.where((self.counts > 0).unsqueeze(1), self.centroids, batch)
        wide = isinstance(logits, Tensor) and logits.dtype is torch.float64
        return result.to(torch.float64 if wide else torch.float32)

    @torch.no_grad()
    def end_epoch(self) -> None:
        """Mode `epoch`: puts in force what was collected; classes without a row keep their centroid.

        With a process group every rank has to call this.

        Raises:
            RuntimeError: the bank is in another mode.
        """
        if self.mode != "epoch":
            raise RuntimeError(f"end_epoch is for mode 'epoch', this bank is in mode {self.mode!r}")
        self._put_in_force(self.pending, self.pending_counts)
        self.pending.zero_()
        self.pending_counts.zero_()

    @torch.no_grad()
    def reestimate(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Replaces the centroids by those of these batches of (logits (N, C), target (N,)), in any mode.

        Classes without a row keep theirs. With a process group every rank has to call this, each with its own
        batches. `bank.reestimate((model(x), y) for x, y in loader)` runs without gradient.

        Raises:
            TypeError, ValueError: as `class_centroids`; a batch is no pair, or has another number of classes
                than the bank. The bank is as it was then.
        """
        mean, counts = torch.zeros_like(self.centroids), torch.zeros_like(self.counts)
        for batch in batches:
            if not isinstance(batch, Sequence) or len(batch) != 2:
                raise TypeError(f"batches must hold pairs (logits, target), got {type(batch).__name__}")
            logits, target = batch
            self._check_classes(logits)
            _merge(mean, counts, *self._batch_centroids(logits, target))
        self._put_in_force(mean, counts)

    def _check_classes(self, logits: Tensor) -> None:
        if isinstance(logits, Tensor) and logits.dim() == 2 and logits.shape[1] != self.num_classes:
            raise ValueError(
                f"logits have {logits.shape[1]} classes, the centroid bank has {self.num_classes}"
            )

    def _batch_centroids(self, logits: Tensor, target: Tensor, gather: bool = False) -> tuple[Tensor, Tensor]:
        """Q (K, C, C) in the bank's dtype and counts (C,), both 0 where the centroid is not finite."""
        batch, counts = class_centroids(
            logits,
            target,
            temperatures=self.spectrum,
            ignore_index=self.ignore_index,
            process_group=self.process_group if gather else None,
            backend=self.backend,
        )
        finite = batch.isfinite().all(2).all(0)
        batch.masked_fill_(~finite.unsqueeze(1), 0)
        return batch.to(self.centroids.dtype), counts * finite

    def _move(self, batch: Tensor, counts: Tensor) -> None:
        seen = (self.counts > 0).to(batch)
        step = (1 - self.decay * seen) * (counts > 0)  # (C,)
        self.centroids.lerp_(batch, step.unsqueeze(1))
        self.counts += counts

    def _put_in_force(self, mean: Tensor, counts: Tensor) -> None:
        if self.process_group is not None:
            mean = mean * counts.unsqueeze(1)
            dist.all_reduce(mean, group=self.process_group)
            dist.all_reduce(counts, group=self.process_group)
            mean = mean / counts.clamp(min=1).unsqueeze(1)
        self.centroids.copy_(torch.where((counts > 0).unsqueeze(1), mean, self.centroids))
        self.counts.copy_(torch.where(counts > 0, counts, self.counts))
        self._find_out_whether_complete()

    def train(self, mode: bool = True) -> CentroidBank:
        """As any module's; eval mode, where nothing changes, finds out whether all classes are known."""
        super().train(mode)
        if not mode:
            self._find_out_whether_complete()
        return self

    def _find_out_whether_complete(self) -> None:
        unseen = self.counts.is_meta or without_data(self.counts)
        self._complete = not unseen and bool((self.counts > 0).all())

    def extra_repr(self) -> str:
        """Shown in `print(module)`."""
        decay = f", decay={self.decay:g}" if self.mode == "ema" else ""
        return f"num_classes={self.num_classes}, temperatures={len(self.spectrum)}, mode={self.mode}{decay}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CentroidBank:
        return super()._apply(keeping_dtype(fn), recurse)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        wrong = [
            f"{prefix}{name}: {problem}"
            for name, own in self._buffers.items()
            if own is not None and f"{prefix}{name}" in state_dict
            if (problem := self._problem(name, own, state_dict[f"{prefix}{name}"])) is not None
        ]
        if not wrong:
            wrong = [
                f"{prefix}{counts}: must be positive for the classes with a centroid, 0 for the others"
                for name, counts in _PAIRS
                if name in self._buffers and not self._agree(state_dict, prefix, name, counts)
            ]
        if wrong:  # all of it or nothing
            error_msgs.extend(wrong)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._find_out_whether_complete()

    def _agree(self, state_dict: dict[str, Any], prefix: str, name: str, counts: str) -> bool:
        """Whether a state, completed by the own buffers, has centroids where it has counts."""
        mean, count = (state_dict.get(f"{prefix}{key}", getattr(self, key)) for key in (name, counts))
        if mean.is_meta or count.is_meta:  # not loaded, so that there is nothing to agree
            return True
        mean, count = mean.cpu(), count.cpu()
        return torch.equal(mean.sum(2) > 0, (count > 0).expand(mean.shape[:2]))

    def _problem(self, name: str, own: Tensor, loaded: object) -> str | None:
        """Why `loaded` cannot become the buffer `name`; None if it can."""
        if not isinstance(loaded, Tensor) or loaded.dtype != own.dtype:
            return f"expected a {own.dtype} tensor, got {getattr(loaded, 'dtype', type(loaded).__name__)}"
        if loaded.shape != own.shape:
            return f"expected shape {tuple(own.shape)}, got {tuple(loaded.shape)}"
        if name == "inverse_temperatures":
            # not those of `own`: memory that is not filled yet, or none, where the bank is to be loaded
            known = list(self.spectrum.inverse_temperatures)
            return None if loaded.tolist() == known else f"the bank has {known}, the state {loaded.tolist()}"
        low, high = (float(value) for value in torch.aminmax(loaded))
        if loaded.dtype == torch.int64:
            return None if low >= 0 else f"counts must not be negative, got {low:g}"
        if not (low >= 0 and high < math.inf):
            return f"centroids must be finite and not negative, got values in [{low:g}, {high:g}]"
        sums = loaded.sum(2)
        drift = _EPSILON / (1 - self.decay) if self.mode == "ema" else 0.0
        distribution = ((sums - 1).abs() < _ROW_SUM_TOLERANCE + drift) | (sums == 0)
        return None if bool(distribution.all()) else "a centroid's entries must sum to 1 (or all be 0)"


def _merge(mean: Tensor, total: Tensor, batch: Tensor, counts: Tensor) -> None:
    """Takes a batch's centroids (K, C, C) with their counts (C,) into a running mean, in place."""
    total += counts
    share = counts.to(mean) / total.clamp(min=1)
    mean.lerp_(batch, share.unsqueeze(1))
