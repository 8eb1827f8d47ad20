"""How correctness is judged: inputs of every regime, truth, the plain formulation, and the error budget
between them.

`truth` is the reference in float64 on the same, already rounded inputs. `base` is the loss as one would write
it in plain PyTorch, in float32. An implementation may err twice as much as `base` does, plus one rounding of
the result's dtype on each side; where the clusters have collapsed `base` is itself wrong, and the bound is
absolute.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from .reference import MEAN, NONE, SPECTRUM, SUM, reference_loss

COLLAPSE_TOLERANCE = 1e-5  # relative, for CMI >= MEASURABLE_CMI and for the 2-norm of its gradient
MEASURABLE_CMI = 1e-10  # nats
NEGLIGIBLE_GRADIENT = 1e-20  # a 2-norm that moves no float32 parameter, whatever the learning rate
COLLAPSED_CMI = 1e-4  # nats; below it the plain formulation in float32 is no yardstick

Batch = tuple[Tensor, Tensor]  # logits (N, C) float32, target (N,) int64


@dataclass(frozen=True)
class Regime:
    """A named kind of input; `make` builds one batch of it."""

    name: str
    build: Callable[[Generator], Batch]

    def make(self, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Batch:
        """Logits (N, C) rounded to `dtype` and target (N,) int64, the same for the same seed everywhere."""
        logits, target = self.build(torch.Generator().manual_seed(seed))
        return logits.to(dtype).to(device), target.to(device)

    def __str__(self) -> str:
        return self.name


def regimes() -> list[Regime]:
    """Every kind of input that an implementation has to get right, all small enough for an interpreter."""
    plain: dict[str, Callable[[Generator], Batch]] = {
        "random": lambda g: _random(g, 64, 10),
        "random_x10": lambda g: _random(g, 64, 10, scale=10.0),
        "shifted_up": lambda g: _shifted(g, 30.0),
        "shifted_down": lambda g: _shifted(g, -30.0),
        "shifted_rows": lambda g: _shifted(g, 30 * torch.randn(64, 1, generator=g)),
        "masked_by_large_numbers": _masked_by_large_numbers,
        "confident": _confident,
        "uniform": lambda g: (torch.full((64, 12), 0.7), _labels(g, 64, 4)),
        "ties": lambda g: (torch.randint(-1, 2, (64, 9), generator=g).float(), _labels(g, 64, 9)),
        "masked_by_cluster": lambda g: _masked(g, whole_cluster=True),
        "masked_in_some_rows": lambda g: _masked(g, whole_cluster=False),
        "one_row_per_class": lambda g: (torch.randn(20, 20, generator=g), torch.randperm(20, generator=g)),
        "one_class_present": lambda g: (torch.randn(40, 7, generator=g), torch.full((40,), 3)),
        "one_row": lambda g: _random(g, 1, 10),
        "two_rows": lambda g: (torch.randn(2, 10, generator=g), torch.tensor([4, 4])),
        "absent_classes": lambda g: (torch.randn(64, 50, generator=g), _labels(g, 64, 3) * 20),
        "one_large_cluster": lambda g: (torch.randn(150, 6, generator=g), torch.arange(150) // 140),
        "confident_collapsed": _confident_collapsed,
    }
    built = [Regime(name, build) for name, build in plain.items()]
    built += [Regime(f"classes_{c}", partial(_random, n=40 if c < 200 else 12, c=c)) for c in CLASS_COUNTS]
    built += [Regime(f"collapsed_{width:g}", partial(_collapsed, width=width)) for width in COLLAPSE_WIDTHS]
    return built


# On both sides of every vector width, unrolling and tile size in use.
# fmt: off
CLASS_COUNTS = (
    1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 65, 127, 128, 129, 255, 257, 511, 513, 1023, 1025,
    2049,
)
# fmt: on
# Logits of one cluster differ by this much, from the last bits of a float32 to several units.
COLLAPSE_WIDTHS = (1e-5, 1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 0.3, 1.0, 4.0)


def _labels(g: Generator, n: int, classes: int) -> Tensor:
    return torch.randint(0, classes, (n,), generator=g)


def _random(g: Generator, n: int, c: int, scale: float = 1.0) -> Batch:
    return scale * torch.randn(n, c, generator=g), _labels(g, n, min(c, 4))


def _shifted(g: Generator, by: float | Tensor) -> Batch:
    logits, target = _random(g, 64, 10)
    return logits + by, target


def _confident(g: Generator) -> Batch:
    logits, target = _random(g, 64, 10)
    return logits + 20 * F.one_hot(target, 10), target


def _masked(g: Generator, whole_cluster: bool) -> Batch:
    logits, target = _random(g, 64, 12)
    if whole_cluster:
        return logits.masked_fill((target[:, None] == 1) & (torch.arange(12) > 6), -torch.inf), target
    masked = torch.rand(64, 12, generator=g) < 0.25
    return logits.masked_fill(masked & ~F.one_hot(target, 12).bool(), -torch.inf), target


def _masked_by_large_numbers(g: Generator) -> Batch:
    """-1e9 or the most negative float32 for -inf, as some code has it, in some rows of a cluster or all."""
    logits, target = _masked(g, whole_cluster=False)
    logits = torch.where(logits == -torch.inf, -1e9, logits)
    logits[:, 0] = torch.where(target == 0, logits[:, 0], torch.finfo(torch.float32).min)
    return logits, target


def _collapsed(g: Generator, width: float, n: int = 32, c: int = 40) -> Batch:
    target = _labels(g, n, 4)
    return 2 * torch.randn(4, c, generator=g)[target] + width * torch.randn(n, c, generator=g), target


def _confident_collapsed(g: Generator) -> Batch:
    """One class carries all of the probability; the others differ widely between rows and are negligible."""
    target = _labels(g, 32, 4)
    logits = 4 * torch.randn(32, 20, generator=g) - 80
    return logits.scatter(1, target[:, None], 1e-3 * torch.randn(32, 1, generator=g)), target


def value_and_grad(
    loss: Callable[..., Tensor], logits: Tensor, *args: object, upstream: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Value of `loss(logits, *args)` and its gradient in the logits; `upstream` is 1 if not given."""
    leaf = logits.detach().requires_grad_()
    value = loss(leaf, *args)
    upstream = torch.ones_like(value) if upstream is None else upstream.to(value)
    (grad,) = torch.autograd.grad(value, leaf, upstream)
    return value.detach(), grad


def truth(logits: Tensor, *args: object, upstream: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Value and gradient of the reference in float64; `args` are those of `reference_loss` after logits."""
    wide = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    return value_and_grad(reference_loss, logits.double(), *wide, upstream=upstream)


def base(logits: Tensor, *args: object, upstream: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Value and gradient of the plain formulation; `args` are those of `reference_loss` after the logits."""
    return value_and_grad(base_loss, logits, *args, upstream=upstream)


def base_loss(
    logits: Tensor,
    target: Tensor,
    inverse_temperatures: Sequence[float],
    temperature_weights: Sequence[float],
    class_weight: Tensor | None,
    centroids: Tensor | None,
    ce_weight: float,
    cmi_weight: float,
    label_smoothing: float,
    ignore_index: int,
    reduction: int,
) -> Tensor:
    """The loss as one writes it, in float32 (float64 for float64): log_softmax, mean, P (log P - log Q)."""
    kept = target != ignore_index
    z = logits if logits.dtype == torch.float64 else logits.float()
    rows, y = z[kept], target[kept]
    log_p = F.log_softmax(z.new_tensor(inverse_temperatures)[:, None, None] * rows, dim=-1)  # (K, M, C)
    p = log_p.exp()
    if centroids is None:
        labels, cluster, counts = torch.unique(y, return_inverse=True, return_counts=True)
        total = p.new_zeros(len(p), len(labels), z.shape[1]).index_add(1, cluster, p)
        q = (total / counts[:, None])[:, cluster]  # (K, M, C)
    else:
        q = centroids[:, y]
    some = (p > 0) & (q > 0)
    log_ratio = torch.where(some, log_p, 0) - torch.where(some, q, 1).log()
    kl = (p * log_ratio).sum(-1)  # (K, M)
    if centroids is not None:
        kl = kl - p.sum(-1) + q.sum(-1)
    if reduction == SPECTRUM:
        return kl.mean(1)
    by_row = z.new_tensor(temperature_weights) @ kl  # (M,)
    ce = F.cross_entropy(
        z,
        target,
        class_weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction={NONE: "none", MEAN: "mean", SUM: "sum"}[reduction],
    )
    if reduction == NONE:
        return ce_weight * ce + cmi_weight * z.new_zeros(len(z)).masked_scatter(kept, by_row)
    return ce_weight * ce + cmi_weight * (by_row.mean() if reduction == MEAN else by_row.sum())


def assert_within_budget(
    out: Tensor, truth: Tensor, base: Tensor, what: str = "result", *, slack: float = 0.0
) -> None:
    """max|out - truth| <= 2 max|base - truth| + 2u max|truth|, u = eps(out.dtype)/2, and the same in the
    2-norm.

    Tensors of one shape. Where truth is not finite, `out` must be the same NaN or infinity; where `base`
    alone is not finite it counts as exact, so that its failures grant nothing. `slack`: what every entry may
    be off by beside the budget.
    """
    if not out.shape == truth.shape == base.shape:
        raise AssertionError(f"{what}: shapes differ: {out.shape}, truth {truth.shape}, base {base.shape}")
    u = torch.finfo(out.dtype).eps / 2
    out, truth, base = (t.detach().double().flatten() for t in (out, truth, base))
    finite = truth.isfinite()
    if not torch.isclose(out[~finite], truth[~finite], rtol=0, atol=0, equal_nan=True).all():
        raise AssertionError(f"{what}: {out[~finite].tolist()} where the truth is {truth[~finite].tolist()}")
    out, truth, base = out[finite], truth[finite], base[finite]
    if not out.isfinite().all():
        raise AssertionError(f"{what}: {int((~out.isfinite()).sum())} entries are not finite, the truth is")
    if out.numel() == 0:
        return
    base = torch.where(base.isfinite(), base, truth)
    for name, norm in (("max", torch.inf), ("2-norm", 2.0)):
        error = float(torch.linalg.vector_norm(out - truth, norm))
        yardstick = float(torch.linalg.vector_norm(base - truth, norm))
        size = float(torch.linalg.vector_norm(truth, norm))
        spare = float(torch.linalg.vector_norm(torch.full_like(out, slack), norm))
        allowed = 2 * yardstick + 2 * u * size + spare
        if not error <= allowed:
            raise AssertionError(
                f"{what}: error {error:.3e} in the {name}, at most {allowed:.3e} is accepted "
                f"(plain PyTorch errs {yardstick:.3e}, truth has size {size:.3e})"
            )


def assert_gradient_within_budget(
    out: Tensor, truth: Tensor, base: Tensor, target: Tensor, ignore_index: int = -100, what: str = "gradient"
) -> None:
    """The budget for (N, C) gradients, target and non-target entries apart; ignored rows must be exactly
    zero.

    A target entry is the difference of a probability and one: its size would hide errors of the others.
    """
    kept = target != ignore_index
    if out[~kept].count_nonzero() != 0:
        raise AssertionError(f"{what}: an ignored row has a gradient")
    is_target = torch.zeros(out.shape, dtype=torch.bool, device=out.device)
    is_target[kept] = F.one_hot(target[kept], out.shape[1]).bool()
    for name, entries in (("target", is_target), ("non-target", ~is_target & kept[:, None])):
        assert_within_budget(out[entries], truth[entries], base[entries], f"{what}, {name} entries")


def assert_collapse_accuracy(cmi: Tensor, grad: Tensor, true_cmi: Tensor, true_grad: Tensor) -> None:
    """Float32 results near collapse: a CMI in [1e-10, 1e-4] right to 1e-5, the gradient to 1e-5 (2-norm).

    A larger CMI is for `assert_within_budget`: there the plain formulation is a yardstick.

    cmi () or (K,), grad (N, C) of any combination of the CMI alone (`ce_weight=0`).
    """
    cmi, true_cmi, grad, true_grad = (t.detach().double() for t in (cmi, true_cmi, grad, true_grad))
    judged = (true_cmi >= MEASURABLE_CMI) & (true_cmi <= COLLAPSED_CMI)
    relative = ((cmi - true_cmi).abs() / true_cmi)[judged]
    if not (relative <= COLLAPSE_TOLERANCE).all():
        raise AssertionError(f"CMI is off by {float(relative.max()):.2e} (relative), truth {true_cmi}")
    if not (cmi >= 0).all():
        raise AssertionError(f"CMI is negative: {cmi}")
    error = torch.linalg.vector_norm(grad - true_grad)
    size = torch.linalg.vector_norm(true_grad)
    if not error <= COLLAPSE_TOLERANCE * size + NEGLIGIBLE_GRADIENT:
        raise AssertionError(
            f"gradient is off by {float(error / size):.2e} (relative, 2-norm), CMI {true_cmi}"
        )
