"""The emulated CUDA operators, as tests call them, and on which kernels."""

from __future__ import annotations

import platform

import pytest
import torch
from cuda_emulated import FUSED, TILED, emulated
from operator_calls import Operators
from torch import Tensor

needs_x86 = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="the emulator switches between threads in x86-64 machine code"
)
both_paths = pytest.mark.parametrize("path", [FUSED, TILED], ids=["fused", "tiled"])

_operators = Operators(emulated)
run, check, check_together = _operators.run, _operators.check, _operators.check_together
check_norm = _operators.check_norm


def same_bits(x: Tensor, y: Tensor) -> bool:
    kind = {8: torch.int64, 4: torch.int32, 2: torch.int16}[x.element_size()]
    return torch.equal(x.view(kind), y.view(kind))
