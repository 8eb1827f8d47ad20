"""One loss over the batches of several processes, whose gradients DistributedDataParallel averages right."""

from __future__ import annotations

import copy
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import cmim_kernels as ck

WORLD = 2
COUNTS = (5, 8)  # rows of each rank


def whole_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(sum(COUNTS), 6, generator=generator, dtype=torch.float64)
    target = torch.randint(0, 4, (sum(COUNTS),), generator=generator)
    target[2] = -100
    return x, target


def network() -> nn.Module:
    torch.manual_seed(5)
    return nn.Linear(6, 4).double()


OPTIONS = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "weighted": {"weight": torch.tensor([1.0, 2.0, 0.5, 1.0]).double(), "label_smoothing": 0.1},
    "reference": {"backend": "reference"},
}


MODES = ("ema", "epoch", "fixed")


def bank_losses(
    mode: str, model: nn.Module, x: Tensor, target: Tensor, group: dist.ProcessGroup | None
) -> list[Tensor]:
    """Before any class is known, and one step later."""
    bank = ck.CentroidBank(4, mode=mode, process_group=group, dtype=torch.float64)  # type: ignore[arg-type]
    module = ck.CMIMLoss(centroids=bank, process_group=group)
    return [module(model(step * x), target).detach() for step in (1, 2)]


def worker(rank: int, folder: str) -> None:
    group = dist.group.WORLD
    x, target = (t.split(COUNTS)[rank] for t in whole_batch())
    model = DistributedDataParallel(network())
    results = {}
    for name, options in OPTIONS.items():
        model.zero_grad()
        value = ck.fused_cmi_loss(model(x), target, process_group=group, **options)  # type: ignore[arg-type]
        value.backward()
        results[name] = (value.detach(), model.module.weight.grad.clone())
    model.zero_grad()
    spectrum = ck.cmi_spectrum(model(x), target, process_group=group)
    spectrum.logsumexp(0).backward()
    results["spectrum"] = (spectrum.detach(), model.module.weight.grad.clone())
    results["centroids"] = ck.class_centroids(model(x), target, process_group=group)
    module = ck.CMIMLoss(process_group=group)
    results["module"] = (module(model(x), target).detach(), module(model(x), target).detach())
    for mode in MODES:
        results[mode] = tuple(bank_losses(mode, model.module, x, target, group))
    for wrong in (x[:, : 3 + rank], x[:, :4].to((torch.float16, torch.bfloat16)[rank])):
        with pytest.raises(ValueError, match=r"logits must have the same classes and dtype.*\(5, .*\(8, "):
            ck.fused_cmi_loss(wrong, target % 3, process_group=group)
    with pytest.raises(TypeError, match=r"process_group must be a torch.distributed.ProcessGroup, got str"):
        ck.fused_cmi_loss(x[:, :4], target, process_group="x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"reduction.*process_group"):
        ck.fused_cmi_loss(model(x), target, process_group=group, reduction="none")
    mislabelled = target.index_fill(0, torch.tensor([4]), 7) if rank == 1 else target
    for call in (ck.fused_cmi_loss, ck.cmi_spectrum, ck.class_centroids):
        for backend in ("auto", "reference"):
            with pytest.raises(ValueError, match=r"labels in \[0, 4\) .*, got 7 at row 4 of rank 1$"):
                call(x[:, :4], mislabelled, process_group=group, backend=backend)  # type: ignore[operator]
    (gradient,) = torch.autograd.grad(
        ck.fused_cmi_loss(model(x), target, process_group=group), model.module.weight, create_graph=True
    )
    with pytest.raises(RuntimeError, match="process_group: the gradient cannot be differentiated again"):
        gradient.square().sum().backward()
    with pytest.raises(RuntimeError, match=r"process_group works by backward\(\) only"):
        torch.func.grad(lambda z: ck.fused_cmi_loss(z, target, process_group=group))(x[:, :4])
    averaged = copy.deepcopy(module)  # as an average of a model over its steps is
    assert averaged.process_group is group
    with pytest.raises(pickle.PicklingError, match=r"save its state_dict\(\)"):
        pickle.dumps(module)
    averaged.process_group = None
    assert pickle.loads(pickle.dumps(averaged)).process_group is None
    alone = dist.new_group([0])
    if rank == 1:
        with pytest.raises(RuntimeError, match="process_group does not contain this process"):
            ck.fused_cmi_loss(x[:, :4], target, process_group=alone)
    torch.save(results, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def results() -> list[dict[str, tuple[Tensor, Tensor]]]:
    with tempfile.TemporaryDirectory() as folder:
        on_ranks(WORLD, worker, folder, folder)
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(WORLD)]


def expected(name: str) -> tuple[Tensor, Tensor]:
    """The same on one process that sees the whole batch."""
    x, target = whole_batch()
    model = network()
    if name == "spectrum":
        value = ck.cmi_spectrum(model(x), target)
        value.logsumexp(0).backward()
    else:
        value = ck.fused_cmi_loss(model(x), target, **OPTIONS[name])  # type: ignore[arg-type]
        value.backward()
    return value.detach(), model.weight.grad  # type: ignore[return-value]


@pytest.mark.parametrize("name", [*OPTIONS, "spectrum"])
def test_values_and_averaged_gradients(results: list[dict[str, tuple[Tensor, Tensor]]], name: str) -> None:
    value, gradient = expected(name)
    for rank in range(WORLD):
        torch.testing.assert_close(results[rank][name][0], value)
        torch.testing.assert_close(results[rank][name][1], gradient)


def test_centroids_and_counts(results: list[dict[str, tuple[Tensor, Tensor]]]) -> None:
    x, target = whole_batch()
    centroids, counts = ck.class_centroids(network()(x), target)
    for rank in range(WORLD):
        torch.testing.assert_close(results[rank]["centroids"][0], centroids)
        assert torch.equal(results[rank]["centroids"][1], counts)


def test_module(results: list[dict[str, tuple[Tensor, Tensor]]]) -> None:
    for rank in range(WORLD):
        torch.testing.assert_close(results[rank]["module"][0], expected("mean")[0])


@pytest.mark.parametrize("mode", MODES)
def test_banks_fall_back_to_the_batch_of_all_ranks(
    results: list[dict[str, tuple[Tensor, Tensor]]], mode: str
) -> None:
    expected = bank_losses(mode, network(), *whole_batch(), None)
    for rank in range(WORLD):
        torch.testing.assert_close(results[rank][mode], tuple(expected))


@pytest.mark.parametrize("make", [ck.CMIMLoss, lambda **options: ck.CentroidBank(4, **options)])
def test_modules_take_process_groups_only(make: Callable[..., nn.Module]) -> None:
    with pytest.raises(TypeError, match=r"process_group must be a torch.distributed.ProcessGroup, got int"):
        make(process_group=3)


def test_without_a_process_group_initialised() -> None:
    with pytest.raises(RuntimeError, match=r"process_group.*initialised"):
        ck.fused_cmi_loss(torch.randn(2, 3), torch.tensor([0, 1]), process_group=object())  # type: ignore[arg-type]
