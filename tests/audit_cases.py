"""A small problem to audit, and the file of it: what the tests of the audit share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cmim_kernels.audit import AuditData, StudentTraining, mlp

FAST = StudentTraining(steps=25, lr=2e-2)
STUDENT = mlp(6, [8], 3)


def clusters(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Three overlapping clouds in six dimensions."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (n,), generator=g)
    centres = 1.2 * torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    return centres[labels] + torch.randn(n, 6, generator=g), labels


def bayes_logits(x: Tensor) -> Tensor:
    """A teacher that knows how the clouds were made."""
    centres = 1.2 * torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    return -0.5 * (x.unsqueeze(-2) - centres).square().sum(-1)


def data(**changes: Any) -> AuditData:
    inputs, labels = clusters(24, 1)
    extra, _ = clusters(40, 3)
    test_inputs, test_labels = clusters(400, 2)
    fields: dict[str, Any] = {
        "inputs": inputs,
        "labels": labels,
        "teachers": {"bayes": bayes_logits(inputs), "noise": torch.randn(24, 3) * 8},
        "test_inputs": test_inputs,
        "test_labels": test_labels,
        "extra_inputs": extra,
        "extra_logits": {"bayes": bayes_logits(extra), "noise": torch.randn(40, 3) * 8},
        "queries": {"bayes": bayes_logits, "noise": bayes_logits},
    }
    return AuditData(**(fields | changes))


def saved(path: Path, **changes: Tensor | None) -> Path:
    source = data()
    entries: dict[str, Any] = {
        name: getattr(source, name) for name in ("inputs", "labels", "test_inputs", "test_labels")
    }
    entries |= {"teacher_logits": source.teachers["bayes"], **changes}
    entries = {name: value for name, value in entries.items() if value is not None}
    if path.suffix == ".npz":
        pytest.importorskip("numpy").savez(path, **{name: value.numpy() for name, value in entries.items()})
    else:
        torch.save(entries, path)
    return path
