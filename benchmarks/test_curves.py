"""With --full: time against the number of temperatures and of logits, and the price in a training step."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from benchmarks.cases import Case
from benchmarks.contenders import FUSED, LossFunction, cross_entropy, usable
from benchmarks.environment import environment
from benchmarks.measure import measure, synchronizer, timed_phase
from benchmarks.paired import Timed, paired
from benchmarks.resnet import ResNet18

TEMPERATURES = (1, 2, 4, 8, 16, 32, 64)
LOG_SIZES = range(14, 27)
CLASSES = 1024


def size_case(log_size: int) -> Case:
    """2 ** log_size logits of 1024 classes, 8 rows in a cluster while there are classes for that."""
    n = 2**log_size // CLASSES
    return Case(n, CLASSES, min(CLASSES, max(1, n // 8)))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("name", usable(FUSED, metafunc.config.getoption("--device")))


@pytest.mark.parametrize("grid", ["uniform", "general"])
@pytest.mark.parametrize("k", TEMPERATURES)
def test_time_against_temperatures(benchmark: Any, name: str, k: int, grid: str, device: str) -> None:
    """And in turn with half as many: what twice the temperatures cost."""
    case = Case(256, 1000, 32, k=k, grid=grid)
    loss = FUSED[name](case, device)
    measure(
        benchmark,
        name,
        loss,
        case,
        "both",
        kind="temperatures",
        device=device,
        budget_seconds=1.0,
    )
    if k > 1:
        half = FUSED[name](replace(case, k=k // 2), device)
        both = [timed_phase(function, *case.data(device), "both") for function in (loss, half)]
        doubling = paired(*both, budget_seconds=1.0, synchronize=synchronizer(device))
        benchmark.extra_info["doubling"] = asdict(doubling)


@pytest.mark.parametrize("log_size", LOG_SIZES)
def test_time_against_size(benchmark: Any, name: str, log_size: int, device: str) -> None:
    """The roofline is measured at each size: a copy of the logits moves the bytes that no loss can avoid."""
    case = size_case(log_size)
    measure(
        benchmark,
        name,
        FUSED[name](case, device),
        case,
        "both",
        kind="size",
        device=device,
        budget_seconds=2.0,
    )
    logits, _ = case.data(device)
    source, copy = logits.detach(), torch.empty_like(logits)
    copying = paired(
        Timed(lambda _: copy.copy_(source)),
        Timed(lambda _: copy.copy_(source)),
        budget_seconds=0.3,
        synchronize=synchronizer(device),
    )
    benchmark.extra_info["copy_seconds"] = copying.seconds_p50


def test_training_step(benchmark: Any, name: str, device: str) -> None:
    """ResNet-18 on 32x32 images, 100 classes: one model takes steps with either loss in turn."""
    case = Case(128, 100, 100)
    loss = FUSED[name](case, device)
    torch.manual_seed(0)
    model = ResNet18(case.c).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    images = torch.randn(case.n, 3, 32, 32, device=device)
    _, target = case.data(device)

    def step(function: LossFunction) -> None:
        optimizer.zero_grad()
        function(model(images), target).backward()
        optimizer.step()

    synchronize = synchronizer(device)
    result = paired(
        Timed(lambda _: step(loss)),
        Timed(lambda _: step(cross_entropy)),
        budget_seconds=150.0 if device == "cpu" else 30.0,
        synchronize=synchronize,
    )
    benchmark.group = "step: ResNet-18, 128x3x32x32, 100 classes"
    benchmark.extra_info.update(
        kind="step",
        contender=name,
        case="ResNet-18, batch 128 of 32x32, 100 classes",
        device=device,
        paired=asdict(result),
        environment=environment(),
    )
    benchmark.pedantic(step, args=(loss,), rounds=1)
