"""Paired differences, their intervals, and the verdict that an audit draws from them."""

from __future__ import annotations

import math

import pytest
import torch

from cmim_kernels.audit import AuditReport
from cmim_kernels.audit.answers import Answers
from cmim_kernels.audit.data import LABELS_ONLY
from cmim_kernels.audit.render import cell
from cmim_kernels.audit.stats import holm, paired_difference, t_cdf, t_quantile


@pytest.mark.parametrize("df", [1, 2, 3, 4, 7, 11, 30])
def test_students_t_against_scipy(df: int) -> None:
    t = pytest.importorskip("scipy.stats").t
    for x in (-3.0, 0.0, 0.7, 2.0, 40.0):
        assert t_cdf(x, df) == pytest.approx(t.cdf(x, df), abs=1e-13)
    assert t_quantile(0.975, df) == pytest.approx(t.ppf(0.975, df), rel=1e-10)


def test_paired_difference() -> None:
    d = paired_difference([0.91, 0.93, 0.95], [0.90, 0.90, 0.90], resolution=1e-3)
    assert d.mean == pytest.approx(0.03)
    assert d.standard_error == pytest.approx(0.02 / math.sqrt(3))
    assert d.high - d.mean == pytest.approx(4.302652729911275 * d.standard_error)
    assert d.p == pytest.approx(1 - t_cdf(0.03 / d.standard_error, 2))
    some = paired_difference([0.9, math.nan, 0.8], [0.8, 0.1, 0.8], 1e-3)
    assert (some.n, some.left_out) == (2, 1)
    assert paired_difference([0.9], [0.8], 1e-3).low == -math.inf
    assert math.isnan(paired_difference([math.nan], [0.8], 1e-3).mean)


def test_equal_differences_are_no_certainty() -> None:
    """Two seeds that both gain one test row of a hundred, however the subtraction rounds."""
    d = paired_difference([0.71, 0.72], [0.70, 0.71], resolution=0.01)
    assert d.standard_error == pytest.approx(0.01 / math.sqrt(2))
    assert d.low < 0 < d.p
    assert 0.1 < d.p < 0.5


def test_holm() -> None:
    assert holm({"a": 0.01, "b": 0.03, "c": 0.012}, 0.05) == ["a", "c", "b"]
    assert holm({"a": 0.02, "b": 0.5, "c": 0.9}, 0.05) == []


def made_report(**accuracies: list[float]) -> AuditReport:
    """One teacher with these accuracies under attacks of these names; labels-only students at 0.9."""
    seeds = list(range(6))
    return AuditReport(
        teachers=["t"],
        seeds=seeds,
        label_smoothing=0.1,
        settings={"test_rows": 1000, "data_per_seed": True},
        fingerprint="",
        attacks={
            name: {"paper": "", "threat": "leakage" if name == "leak" else "published"} for name in accuracies
        },
        baselines={"0.1": [0.90, 0.91, 0.89, 0.90, 0.92, 0.90]},
        results={
            name: {"t": values, LABELS_ONLY: [0.90, 0.91, 0.89, 0.90, 0.92, 0.91]}
            for name, values in accuracies.items()
        },
    )


BETTER = [0.95, 0.96, 0.95, 0.95, 0.96, 0.95]
WORSE = [0.85, 0.88, 0.87, 0.88, 0.89, 0.87]


def test_verdicts() -> None:
    assert made_report(a=BETTER, b=WORSE).verdict("t") == (
        "distillable: 1 of 2 attacks beat the LS student, 1 beyond chance "
        "(worst: a, +5.0 ± 0.3 points [+4.3, +5.7])"
    )
    ends = 100 * made_report(a=WORSE).difference("t", "a").high
    assert (
        made_report(a=WORSE, b=[0.80] * 6)
        .verdict("t")
        .startswith(
            "undistillable by the attacks tried: none of 2 beats the LS student, intervals end at "
            f"{ends:+.1f} points (worst: a, "
        )
    )
    assert "none of 1 beats" in made_report(a=WORSE, leak=BETTER, diverged=[math.nan] * 6).verdict("t")
    slightly = [0.901, 0.912, 0.892, 0.900, 0.922, 0.902]  # above zero, but not after 20 attempts
    many = {f"a{i}": WORSE for i in range(19)}
    report = made_report(a=slightly, **many)
    assert report.beaten_by("t") == ["a"]
    assert report.verdict("t").startswith("not shown to be distillable: 1 of 20 attacks")
    assert report.worst("t") == "a"
    loss_alone = made_report(a=BETTER)
    loss_alone.results["a"][LABELS_ONLY] = BETTER
    assert loss_alone.verdict("t").startswith("not shown to be distillable")
    diverged = made_report(a=[math.nan] * 6)
    assert diverged.verdict("t").startswith("undecided")


def test_undecided_where_much_may_have_been_missed() -> None:
    """Few seeds, or few students that did not diverge, show nothing."""
    nan = math.nan
    scattered = made_report(a=[0.90, 0.91, 0.89, 0.90, 0.92, 0.90], b=[0.5, 1.0, nan, nan, nan, nan])
    assert scattered.verdict("t").startswith("undecided: none of 2 beats the LS student, intervals end at +")
    assert made_report(a=[0.9, nan, nan, nan, nan, nan]).verdict("t").startswith("undecided: none of 1")
    assert "(4 diverged)" in cell(scattered.difference("t", "b"))


def shared_report() -> AuditReport:
    """Students that gain the same three of a hundred rows over 80 that the LS students get right."""
    right = torch.zeros(6, 100, dtype=torch.bool)
    right[:, :80] = True
    better = right.clone()
    better[:, 80:83] = True
    report = made_report()
    report.settings = {"test_rows": 100, "data_per_seed": False}
    report.attacks["a"] = {"paper": "", "threat": "published"}
    finite = torch.ones(6, dtype=torch.bool)
    report.add_baseline("0.1", Answers(right, finite))
    report.add_attack("a", {"t": Answers(better, finite)})
    return report


def test_test_rows_that_all_seeds_share() -> None:
    """Sure of the seeds, not of the rows."""
    report = shared_report()
    found = report.difference("t", "a")
    assert found.mean == pytest.approx(0.03)
    parts = 0.01 / math.sqrt(6), math.sqrt(0.03 * 0.97 / 99)
    assert found.standard_error == pytest.approx(math.hypot(*parts))
    half = math.hypot(parts[0] * t_quantile(0.975, 5), parts[1] * t_quantile(0.975, 99))
    assert found.high - found.mean == pytest.approx(half)
    assert found.low < 0
    assert report.verdict("t").endswith("; more test rows would tell")
    own_rows = made_report(a=[0.83] * 6)
    own_rows.settings, own_rows.baselines = {"test_rows": 100, "data_per_seed": True}, {"0.1": [0.8] * 6}
    assert own_rows.difference("t", "a").low > 0
    assert AuditReport.from_json(report.to_json()) == report
    assert report.control("0.1").standard_error == pytest.approx(0.01 / math.sqrt(6))


def test_diverged_students_and_their_rows_are_left_out() -> None:
    rows = torch.tensor([[1.0, 0.0, 0.0, 1.0], [9.0, 9.0, 9.0, 9.0], [0.0, 0.0, 0.0, 1.0]])
    found = paired_difference([0.8, math.nan, 0.6], [0.3, 0.0, 0.35], 1e-3, rows)
    of_pairs = 0.25**2 / 2 / 2
    of_rows = (0.125**2 + 2 * 0.375**2 + 0.625**2) / 3 / 4
    assert found.standard_error == pytest.approx(math.sqrt(of_pairs + of_rows))
    assert (found.left_out, found.lacking) == (1, "seeds")
    one_row = paired_difference([0.8, 0.7], [0.3, 0.3], 1e-3, rows[:2, :1])
    assert (one_row.high, one_row.lacking) == (math.inf, "test rows")


@pytest.mark.parametrize("values", [[0.91, 0.93, 0.95], [0.85, 0.88, 0.87], [0.90, 0.90, 0.90]])
@pytest.mark.parametrize("shared", [False, True])
def test_p_is_that_of_the_interval_that_ends_at_zero(values: list[float], shared: bool) -> None:
    g = torch.Generator().manual_seed(2)
    rows = torch.randint(-1, 2, (3, 400), generator=g) if shared else None
    d = paired_difference(values, [0.9] * 3, 1e-3, rows)
    confidence = abs(1 - 2 * d.p)
    at_zero = paired_difference(values, [0.9] * 3, 1e-3, rows, confidence=confidence)
    end = at_zero.low if d.mean > 0 else at_zero.high
    assert end == pytest.approx(0, abs=1e-9)
    assert (d.p < 0.5) == (d.mean > 0)


@pytest.mark.parametrize(
    ("seeds", "spread", "seeds_alone"), [(5, 0.0, 0.85), (5, 0.2, 0.93), (3, 0.0, 0.93), (2, 0.1, 1.0)]
)
def test_intervals_over_shared_rows_cover_what_they_say(
    seeds: int, spread: float, seeds_alone: float
) -> None:
    """Two kinds of students equally good on rows at large, each better on rows of its own; and how seldom the
    interval over seeds alone has that in it.
    """
    g = torch.Generator().manual_seed(0)
    rows, trials = 300, 300
    covered, certain = torch.zeros(2), 0
    for _ in range(trials):
        ease, lead = 1 + 2 * torch.randn(rows, generator=g), 2 * torch.randn(rows, generator=g)
        a, b = (
            torch.rand(seeds, rows, generator=g)
            < (ease + sign * lead / 2 + spread * torch.randn(seeds, 1, generator=g)).sigmoid()
            for sign in (1, -1)
        )
        values, baseline = a.double().mean(1).tolist(), b.double().mean(1).tolist()
        for i, shared in enumerate((a.double() - b.double(), None)):
            d = paired_difference(values, baseline, 1 / rows, shared)
            covered[i] += d.low <= 0 <= d.high
            certain += shared is not None and d.p < 0.002
    assert certain <= 3
    assert covered[0] >= 0.93 * trials
    assert covered[1] < seeds_alone * trials


def test_the_best_smoothing_is_none_that_diverged() -> None:
    report = made_report(a=BETTER)
    report.baselines = {"0": [math.nan] * 6, **report.baselines}
    assert report.best_smoothing()[0] == "0.1"


@pytest.mark.parametrize(
    ("was", "becomes"),
    [
        ('"a | t": [', '"b | t": ['),
        ('"LS 0.1": [', '"LS 0.2": ['),
        (80 // 4 * "f", 79 // 4 * "f" + "0"),
        (80 // 4 * "f", "zz"),
        (80 // 4 * "f" + '000000"', '"'),
    ],
)
def test_damaged_answers(was: str, becomes: str) -> None:
    text = shared_report().to_json()
    assert was in text
    assert AuditReport.from_json(text) == shared_report()
    with pytest.raises(ValueError, match="a damaged audit report: "):
        AuditReport.from_json(text.replace(was, becomes, 1))


@pytest.mark.parametrize(
    ("was", "becomes"),
    [
        ('"baselines": {', '"baselines": null, "other": {'),
        ('"baselines": {', '"baselines": {"0.2": [0.5],'),
        ('"baselines": {', '"baselines": {"0.2": ["x", 1, 1, 1, 1, 1],'),
        ('"attacks": {', '"attacks": {}, "skipped": {"x": "'),
        ('"t": [', '"u": ['),
    ],
)
def test_damaged_reports(was: str, becomes: str) -> None:
    text = made_report(a=BETTER).to_json()
    assert AuditReport.from_json(text) == made_report(a=BETTER)
    with pytest.raises(ValueError, match="audit report: "):
        AuditReport.from_json(text.replace(was, becomes, 1))
