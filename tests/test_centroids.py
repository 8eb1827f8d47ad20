"""The centroid bank: what each mode holds, classes not seen, persistence, several processes."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import Tensor

from cmim_kernels import CMIMLoss, TemperatureSpectrum, class_centroids, fused_cmi_loss
from cmim_kernels.centroids import CentroidBank

SPECTRUM = TemperatureSpectrum([0.5, 1.0, 4.0])
A = SPECTRUM.inverse_temperatures
C = 5


def batch(seed: int, n: int = 24, classes: int = C) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(n, C, generator=g), torch.randint(0, classes, (n,), generator=g)


def centroids(logits: Tensor, target: Tensor) -> Tensor:
    return class_centroids(logits, target, temperatures=SPECTRUM)[0]


def bank(**options: Any) -> CentroidBank:
    return CentroidBank(C, temperatures=SPECTRUM, **options)


def test_ema_moves_from_the_first_batch_on() -> None:
    b = bank(decay=0.75)
    first, second = batch(0), batch(1)
    assert torch.equal(b.centroids_for(*first, A), centroids(*first))
    expected = 0.75 * centroids(*first) + 0.25 * centroids(*second)
    torch.testing.assert_close(b.centroids_for(*second, A), expected)
    assert b.counts.tolist() == torch.bincount(torch.cat([first[1], second[1]]), minlength=C).tolist()


def test_ema_leaves_absent_classes_alone() -> None:
    b = bank(decay=0.5)
    b.centroids_for(*batch(0), A)
    before = b.centroids.clone()
    b.centroids_for(*batch(1, classes=2), A)
    assert torch.equal(b.centroids[:, 2:], before[:, 2:])
    assert not torch.equal(b.centroids[:, :2], before[:, :2])


def test_the_result_survives_the_next_update() -> None:
    b = bank()
    logits, target = batch(0)
    logits.requires_grad_()
    loss = fused_cmi_loss(logits, target, temperatures=SPECTRUM, centroids=b.centroids_for(logits, target, A))
    b.centroids_for(*batch(1), A)
    loss.backward()  # raises if the update changed what backward needs
    assert logits.grad is not None


def test_eval_mode_computes_no_centroids_where_all_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    b = bank()
    calls = []

    def counted(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        calls.append(args)
        return class_centroids(*args, **kwargs)

    monkeypatch.setattr("cmim_kernels.centroids.class_centroids", counted)
    for classes, expected in ((2, 2), (C, 1)):
        b.train()
        b.centroids_for(*batch(0, classes=classes), A)
        b.eval()
        b.centroids_for(*batch(1), A)
        assert len(calls) == expected
        calls.clear()


def test_eval_mode_and_unseen_classes() -> None:
    b = bank()
    b.centroids_for(*batch(0, classes=2), A)
    b.eval()
    before = copy.deepcopy(b.state_dict())
    logits, target = batch(1)
    used = b.centroids_for(logits, target, A)
    assert torch.equal(used[:, :2], b.centroids[:, :2])
    assert torch.equal(used[:, 2:], centroids(logits, target)[:, 2:])  # the batch's own
    assert all(torch.equal(before[name], value) for name, value in b.state_dict().items())


def test_an_empty_bank_gives_the_batch_loss() -> None:
    logits, target = batch(3)
    b = bank(mode="fixed")
    results = []
    for q in (None, b.centroids_for(logits, target, A)):
        leaf = logits.clone().requires_grad_()
        loss = fused_cmi_loss(leaf, target, temperatures=SPECTRUM, centroids=q)
        results.append((loss, *torch.autograd.grad(loss, leaf)))
    torch.testing.assert_close(results[0], results[1])


def test_epoch_mode_uses_the_previous_epoch() -> None:
    b = bank(mode="epoch")
    first, second = batch(0), batch(1, n=40)
    assert torch.equal(b.centroids_for(*first, A), centroids(*first))  # nothing in force yet
    b.centroids_for(*second, A)
    assert b.counts.sum() == 0
    b.end_epoch()
    whole = centroids(torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]]))
    torch.testing.assert_close(b.centroids, whole)
    assert torch.equal(b.centroids_for(*batch(2, classes=3), A), b.centroids)
    b.end_epoch()
    torch.testing.assert_close(b.centroids[:, 3:], whole[:, 3:])  # classes without a row keep theirs
    torch.testing.assert_close(b.centroids[:, :3], centroids(*batch(2, classes=3))[:, :3])
    with pytest.raises(RuntimeError, match="mode 'ema'"):
        bank().end_epoch()


def test_fixed_mode_and_reestimate() -> None:
    b = bank(mode="fixed")
    parts = [batch(i) for i in range(3)]
    b.reestimate(iter(parts))
    whole = centroids(torch.cat([z for z, _ in parts]), torch.cat([y for _, y in parts]))
    torch.testing.assert_close(b.centroids, whole)
    held = b.centroids.clone()
    assert (
        b.centroids_for(*batch(7), A).data_ptr() == b.centroids.data_ptr()
    )  # no pass over the batch, no copy
    assert torch.equal(b.centroids, held)


def test_reestimate_refuses_what_is_no_batch_of_the_bank() -> None:
    """Logits of one class would broadcast to any number of them."""
    b = bank()
    before = copy.deepcopy(b.state_dict())
    target = torch.zeros(4, dtype=torch.int64)
    for classes in (1, b.num_classes + 1):
        with pytest.raises(ValueError, match=f"logits have {classes} classes"):
            b.reestimate([batch(0), (torch.randn(4, classes), target)])
    with pytest.raises(TypeError, match=r"batches.*\(logits, target\).*Tensor"):
        b.reestimate([torch.randn(4, b.num_classes)])  # type: ignore[list-item]
    assert all(torch.equal(before[name], value) for name, value in b.state_dict().items())


@pytest.mark.parametrize("mode", ["ema", "epoch"])
def test_bad_logits_do_not_poison_the_bank(mode: str) -> None:
    b = bank(mode=mode)
    b.centroids_for(*batch(0), A)
    before = copy.deepcopy(b.state_dict())
    logits, target = batch(1)
    logits[target == 1, 3] = torch.inf
    logits[target == 2, 0] = torch.nan
    used = b.centroids_for(logits, target, A)
    assert used.isfinite().all()
    assert fused_cmi_loss(logits, target, temperatures=SPECTRUM, centroids=used).isnan()
    name = "centroids" if mode == "ema" else "pending"
    now = b.state_dict()
    assert torch.equal(now[name][:, 1:3], before[name][:, 1:3])
    assert not torch.equal(now[name][:, 0], before[name][:, 0])


def test_ignored_rows() -> None:
    b = bank(ignore_index=9)
    logits, target = batch(0)
    b.centroids_for(logits, torch.where(target == 1, 9, target), A)
    assert b.counts[1] == 0
    assert b.counts.sum() == (target != 1).sum()


@pytest.mark.parametrize("mode", ["ema", "epoch", "fixed"])
def test_resumes_bitwise(mode: str) -> None:
    straight, stopped = bank(mode=mode), bank(mode=mode)
    if mode == "fixed":
        for b in (straight, stopped):
            b.reestimate([batch(0, classes=3)])
    for seed in range(3):
        straight.centroids_for(*batch(seed), A)
        stopped.centroids_for(*batch(seed), A)
    file = io.BytesIO()
    torch.save(stopped.state_dict(), file)
    file.seek(0)
    resumed = bank(mode=mode)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for seed in range(3, 6):
        assert torch.equal(straight.centroids_for(*batch(seed), A), resumed.centroids_for(*batch(seed), A))
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def broken(name: str, value: Any) -> dict[str, Tensor]:
    b = bank()
    b.centroids_for(*batch(0), A)
    state = dict(b.state_dict())
    state[name] = value(state[name]) if callable(value) else value
    return state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            CentroidBank(C + 1, temperatures=SPECTRUM).state_dict(),
            r"expected shape \(3, 5, 5\), got \(3, 6, 6\)",
        ),
        (CentroidBank(C, temperatures=[1.0, 2.0, 3.0]).state_dict(), "inverse_temperatures: the bank has"),
        (broken("centroids", Tensor.double), "expected a torch.float32 tensor, got torch.float64"),
        (broken("centroids", lambda q: q.masked_fill(q == q.max(), torch.nan)), "finite and not negative"),
        (broken("centroids", lambda q: -q), "finite and not negative"),
        (broken("centroids", lambda q: 2 * q), "sum to 1"),
        (broken("counts", lambda n: n - 100), "counts must not be negative"),
        (broken("counts", "many"), "expected a torch.int64 tensor, got str"),
        (broken("counts", torch.zeros_like), "counts: must be positive for the classes with a centroid"),
        (broken("centroids", torch.zeros_like), "counts: must be positive for the classes with a centroid"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_whole(state: dict[str, Tensor], message: str) -> None:
    b = bank()
    b.centroids_for(*batch(4), A)
    before = copy.deepcopy(b.state_dict())
    with pytest.raises(RuntimeError, match=message):
        b.load_state_dict(state)
    assert all(torch.equal(before[name], value) for name, value in b.state_dict().items())


def test_keeps_its_precision_and_serves_the_compute_dtype() -> None:
    b = bank()
    b.half()
    assert b.centroids.dtype == torch.float32
    logits, target = batch(0)
    assert b.centroids_for(logits.bfloat16(), target, A).dtype == torch.float32
    assert b.centroids_for(logits.double(), target, A).dtype == torch.float64
    assert bank(dtype=torch.float64).centroids.dtype == torch.float64


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "num_classes", {"num_classes": 0}),
        (TypeError, "num_classes", {"num_classes": 2.0}),
        (ValueError, "mode must be one of", {"mode": "mean"}),
        (ValueError, r"decay must lie in \[0, 1\)", {"decay": 1.0}),
        (TypeError, "dtype", {"dtype": torch.float16}),
        (ValueError, "temperatures", {"temperatures": [0.0]}),
    ],
)
def test_bad_arguments(error: type[Exception], message: str, options: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        CentroidBank(**({"num_classes": C} | options))


def test_a_bank_of_other_classes_or_temperatures() -> None:
    with pytest.raises(ValueError, match="logits have 5 classes, the centroid bank has 7"):
        CentroidBank(7, temperatures=SPECTRUM).centroids_for(*batch(0), A)
    with pytest.raises(ValueError, match="the loss has inverse temperatures"):
        bank().centroids_for(*batch(0), (1.0, 2.0, 3.0))


@pytest.mark.parametrize("assign", [False, True])
def test_a_bank_made_without_memory_is_loaded(assign: bool) -> None:
    """As sharded models are made: on the meta device, and filled from a state."""
    b = bank(mode="epoch")
    b.centroids_for(*batch(0), A)
    b.end_epoch()
    with torch.device("meta"):
        other = bank(mode="epoch")
    other.eval()
    if not assign:
        other.to_empty(device="cpu")
    other.load_state_dict(b.state_dict(), assign=assign)
    logits, target = batch(1)
    assert torch.equal(other.centroids_for(logits, target, A), b.eval().centroids_for(logits, target, A))


def test_the_state_of_a_slow_average_is_accepted() -> None:
    """Steps towards a batch that are too small for float32 leave its sums a little beside one."""
    b = bank(decay=0.99999)
    b.centroids_for(*batch(0), A)
    state = b.state_dict()
    state["centroids"] = state["centroids"] * 1.005
    b.load_state_dict(state)
    with pytest.raises(RuntimeError, match="must sum to 1"):
        bank(decay=0.9).load_state_dict(state)


def test_the_loss_module_uses_and_keeps_the_bank() -> None:
    b = bank(decay=0.5)
    loss = CMIMLoss(temperatures=SPECTRUM, cmi_weight=3.0, centroids=b)
    assert set(loss.state_dict()) == {f"centroids.{name}" for name in b.state_dict()}
    twin = bank(decay=0.5)
    for seed in range(2):
        logits, target = batch(seed)
        leaves = [logits.clone().requires_grad_() for _ in range(2)]
        held = twin.centroids_for(logits, target, A)
        values = [
            loss(leaves[0], target),
            fused_cmi_loss(leaves[1], target, temperatures=SPECTRUM, cmi_weight=3.0, centroids=held),
        ]
        assert torch.equal(*values)
        assert torch.equal(*(torch.autograd.grad(v, z)[0] for v, z in zip(values, leaves, strict=True)))
    loss.eval()
    before = b.counts.clone()
    loss(*batch(5))
    assert torch.equal(b.counts, before)


def test_the_loss_module_refuses_what_does_not_fit() -> None:
    loss = CMIMLoss(temperatures=SPECTRUM, centroids=bank())
    with pytest.raises(ValueError, match="logits have 7 classes, the centroid bank has 5"):
        loss(torch.zeros(3, 7), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"the loss has inverse temperatures \[1.0\], the centroid bank"):
        CMIMLoss(temperatures=[1.0], centroids=bank())(*batch(0))
    with pytest.raises(TypeError, match="centroids must be a tensor or a CentroidBank, got str"):
        CMIMLoss(centroids="bank")  # type: ignore[arg-type]


def test_memory_is_as_documented() -> None:
    b = CentroidBank(1000)
    assert b.centroids.numel() * b.centroids.element_size() == 32_000_000


def check_rank(rank: int) -> None:
    group = dist.group.WORLD
    for mode in ("ema", "epoch"):
        shared, alone = bank(mode=mode, process_group=group), bank(mode=mode)
        for step in range(3):
            own = batch(10 * step + rank, n=20 + rank)
            both = [batch(10 * step + r, n=20 + r) for r in range(2)]
            used = shared.centroids_for(*own, A)
            whole = alone.centroids_for(torch.cat([z for z, _ in both]), torch.cat([y for _, y in both]), A)
            if mode == "ema":
                torch.testing.assert_close(used, whole)
        if mode == "epoch":
            shared.end_epoch()
            alone.end_epoch()
        torch.testing.assert_close(shared.centroids, alone.centroids)
        assert torch.equal(shared.counts, alone.counts)
    fixed = bank(mode="fixed", process_group=group)
    fixed.reestimate([batch(rank)])
    pooled = [batch(0), batch(1)]
    torch.testing.assert_close(
        fixed.centroids, centroids(torch.cat([z for z, _ in pooled]), torch.cat([y for _, y in pooled]))
    )
    if rank == 0:  # evaluation needs no other rank
        shared.eval()
        shared.centroids_for(*batch(5), A)


def test_two_processes(tmp_path: Any) -> None:
    on_ranks(2, check_rank, tmp_path)
