"""The assertions that the other tests rest on fail where they should."""

from __future__ import annotations

import pytest
import torch
from calls import OPTIONS, judged, regime
from torch import Tensor

from cmim_kernels.testing import (
    assert_collapse_accuracy,
    assert_gradient_within_budget,
    assert_within_budget,
    regimes,
)

EPS = torch.finfo(torch.float32).eps


def results() -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by truth and by base, and the target, of a batch."""
    _, target = regime("random").make()
    (_, truth), (_, base) = judged(regime("random"), OPTIONS["default"], torch.float32, 0, "loss")
    return truth, base, target


def test_truth_rounded_and_base_itself_pass() -> None:
    truth, base, target = results()
    assert_gradient_within_budget(truth.float(), truth, base, target)
    assert_gradient_within_budget(base, truth, base, target)


@pytest.mark.parametrize(
    "spoil",
    [
        torch.zeros_like,
        torch.neg,
        lambda g: 1.001 * g,
        lambda g: g + 1e-5 * g.abs().max(),
        lambda g: g.roll(1, 0),
        lambda g: g.masked_fill(torch.arange(g.numel()).view_as(g) == 17, 0.0),
        lambda g: g.masked_fill(torch.arange(g.numel()).view_as(g) == 17, torch.nan),
    ],
    ids=["zero", "negative", "scaled", "shifted", "other_rows", "one_entry_missing", "one_entry_nan"],
)
def test_a_wrong_gradient_fails(spoil: object) -> None:
    truth, base, target = results()
    with pytest.raises(AssertionError, match="gradient"):
        assert_gradient_within_budget(spoil(base), truth, base, target)  # type: ignore[operator]


def test_three_times_the_error_fails_and_twice_passes() -> None:
    truth = torch.linspace(1, 2, 100, dtype=torch.float64)
    noise = 1e-4 * torch.sin(torch.arange(100.0, dtype=torch.float64))
    base = (truth + noise).float()
    assert_within_budget((truth + 2 * noise).float(), truth, base)
    with pytest.raises(AssertionError, match="in the max"):
        assert_within_budget((truth + 3 * noise).float(), truth, base)


def test_errors_in_many_small_entries_fail_in_the_two_norm() -> None:
    truth = torch.ones(100, dtype=torch.float64)
    base = truth.float()
    base[0] += 1e-3
    with pytest.raises(AssertionError, match="2-norm"):
        assert_within_budget((truth + 1e-3).float(), truth, base)


def test_target_entries_do_not_hide_the_others() -> None:
    truth, base, target = results()
    is_target = torch.nn.functional.one_hot(target, truth.shape[1]).bool()
    spoilt = torch.where(is_target, base, 0.0)
    with pytest.raises(AssertionError, match="non-target"):
        assert_gradient_within_budget(spoilt, truth, base, target)


def test_an_ignored_row_must_be_exactly_zero() -> None:
    truth, base, target = results()
    target = target.clone()
    target[3] = -100
    truth, base, out = truth.clone(), base.clone(), base.clone()
    truth[3] = base[3] = 0
    out[3] = 0
    assert_gradient_within_budget(out, truth, base, target)
    out[3, 2] = 1e-30
    with pytest.raises(AssertionError, match="ignored row"):
        assert_gradient_within_budget(out, truth, base, target)


def test_what_is_not_finite_must_be_the_same() -> None:
    truth = torch.tensor([1.0, torch.inf, torch.nan], dtype=torch.float64)
    base = torch.tensor([1.0, torch.nan, 0.0])
    assert_within_budget(truth.float(), truth, base)
    for wrong in ([1.0, torch.inf, 0.5], [1.0, -torch.inf, torch.nan], [1.0, 3.0, torch.nan]):
        with pytest.raises(AssertionError):
            assert_within_budget(torch.tensor(wrong), truth, base)


def test_where_base_fails_nothing_is_granted() -> None:
    truth = torch.ones(3, dtype=torch.float64)
    base = torch.tensor([1.0, torch.nan, 1.0])
    assert_within_budget(torch.ones(3), truth, base)
    with pytest.raises(AssertionError):
        assert_within_budget(torch.tensor([1.0, 1.0 + 8 * EPS, 1.0]), truth, base)


def test_shapes_must_agree() -> None:
    with pytest.raises(AssertionError, match="shapes"):
        assert_within_budget(torch.ones(3), torch.ones(3, 1), torch.ones(3))


def test_collapse_accuracy() -> None:
    cmi, grad = torch.tensor([1e-9, 1e-12]).double(), torch.randn(4, 5).double()
    assert_collapse_accuracy(cmi.float(), grad.float(), cmi, grad)
    assert_collapse_accuracy(torch.tensor([1e-9, 3e-12]), grad.float(), cmi, grad)  # too small to measure
    with pytest.raises(AssertionError, match="CMI is off"):
        assert_collapse_accuracy(torch.tensor([1.0001e-9, 1e-12]), grad.float(), cmi, grad)
    with pytest.raises(AssertionError, match="CMI is off"):
        assert_collapse_accuracy(torch.tensor([torch.nan, 1e-12]), grad.float(), cmi, grad)
    with pytest.raises(AssertionError, match="negative"):
        assert_collapse_accuracy(torch.tensor([1e-9, -1e-12]), grad.float(), cmi, grad)
    for wrong in (torch.zeros_like(grad), 1.0001 * grad, grad + torch.nan):
        with pytest.raises(AssertionError, match="gradient is off"):
            assert_collapse_accuracy(cmi, wrong, cmi, grad)


def test_regimes_are_named_once_and_repeat() -> None:
    names = [regime.name for regime in regimes()]
    assert len(set(names)) == len(names)
    for regime_ in regimes():
        first, second = regime_.make(seed=5), regime_.make(seed=5)
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])
        logits, target = first
        assert logits.shape[0] == target.shape[0]
        assert int(target.min()) >= 0
        assert int(target.max()) < logits.shape[1]
