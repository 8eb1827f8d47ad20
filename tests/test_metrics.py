"""Streaming CMI, separation and NCMI equal their definitions, however the rows arrive."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import Tensor, nn

from cmim_kernels import TemperatureSpectrum, cmi_spectrum
from cmim_kernels.clusters import divergence
from cmim_kernels.metrics import (
    ConcentrationSpectrum,
    StreamingCMI,
    evaluate_concentration,
    plot_concentration,
)

SPECTRUM = TemperatureSpectrum([0.25, 1.0, 1.7, 8.0])
C = 6


def rows(width: float = 1.0, n: int = 97, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Clusters whose rows differ by `width` in the logits; class 4 is absent, class 5 has one row."""
    g = torch.Generator().manual_seed(seed)
    target = torch.randint(0, 4, (n,), generator=g)
    target[n // 2] = 5
    centres = 3 * torch.randn(C, C, generator=g)
    return centres[target] + width * torch.randn(n, C, generator=g), target


def two_pass(logits: Tensor, target: Tensor, a: float) -> tuple[float, float]:
    """CMI and Gamma by their definitions, every pair of rows written out."""
    log_p = torch.log_softmax(a * logits.double(), 1)
    p = log_p.exp()
    cmi = 0.0
    for c in target.unique():
        mine = target == c
        cmi += (p[mine] * (log_p[mine] - p[mine].mean(0).log())).sum().item() / len(target)
    differ = target[:, None] != target
    cross = -(p[:, None] * log_p).sum(2)  # (i, j): H(P_i, P_j)
    return cmi, (cross * differ).sum().item() / len(target) ** 2


def stream(logits: Tensor, target: Tensor, size: int) -> ConcentrationSpectrum:
    metric = StreamingCMI(C, SPECTRUM)
    for part in range(0, len(target), size):
        metric.update(logits[part : part + size], target[part : part + size])
    return metric.compute()


@pytest.mark.parametrize("size", [1, 10, 97])
def test_equals_the_two_pass_definition(size: int) -> None:
    logits, target = rows()
    found = stream(logits, target, size)
    for k, a in enumerate(SPECTRUM.inverse_temperatures):
        cmi, gamma = two_pass(logits, target, a)
        assert found.cmi[k].item() == pytest.approx(cmi, rel=1e-11)
        assert found.separation[k].item() == pytest.approx(gamma, rel=1e-12)
        assert found.ncmi[k].item() == pytest.approx(cmi / gamma, rel=1e-11)
    assert found.counts.tolist() == torch.bincount(target, minlength=C).tolist()
    assert found.class_cmi[:, 4].isnan().all()
    assert found.class_cmi[:, 5].tolist() == [0.0] * 4
    weighted = found.class_cmi.nan_to_num() @ found.counts.double() / len(target)
    torch.testing.assert_close(weighted, found.cmi)


@pytest.mark.parametrize("width", [1e-2, 1e-4, 1e-6, 1e-8])
@pytest.mark.parametrize("size", [1, 8, 97])
def test_collapsed_clusters_keep_their_digits(width: float, size: int) -> None:
    logits, target = rows(width)
    logits = logits.double() if width < 1e-5 else logits
    found = stream(logits, target, size)
    truth = exact_cmi(logits, target)
    assert truth[1] < 10 * width**2
    torch.testing.assert_close(found.cmi, truth, rtol=1e-6, atol=0.0)
    if width >= 1e-6:
        torch.testing.assert_close(found.cmi, truth, rtol=1e-9 * (1e-2 / width) ** 0.5, atol=0.0)


def exact_cmi(logits: Tensor, target: Tensor) -> Tensor:
    """CMI in rational-like precision: mpmath with 60 digits."""
    mpmath = pytest.importorskip("mpmath")
    result = []
    with mpmath.workdps(60):
        for a in SPECTRUM.inverse_temperatures:
            total = mpmath.mpf(0)
            for c in target.unique().tolist():
                z = [
                    [mpmath.mpf(a) * mpmath.mpf(v) for v in row]
                    for row in logits[target == c].double().tolist()
                ]
                p = []
                for row in z:
                    e = [mpmath.exp(v) for v in row]
                    p.append([v / mpmath.fsum(e) for v in e])
                q = [mpmath.fsum(column) / len(p) for column in zip(*p, strict=True)]
                total += mpmath.fsum(v * mpmath.log(v / m) for row in p for v, m in zip(row, q, strict=True))
            result.append(float(total / len(target)))
    return torch.tensor(result, dtype=torch.float64)


def test_agrees_with_the_loss() -> None:
    logits, target = rows(0.3)
    loss = cmi_spectrum(logits.double(), target, temperatures=SPECTRUM, backend="reference")
    torch.testing.assert_close(stream(logits, target, 13).cmi, loss)


def test_ignored_rows_and_half_precision() -> None:
    logits, target = rows()
    ignored = target.clone()
    ignored[::3] = -100
    some = logits.clone()
    some[::3] = torch.nan  # ignored rows are not looked at
    kept = ignored != -100
    torch.testing.assert_close(stream(some, ignored, 20).cmi, stream(logits[kept], target[kept], 20).cmi)
    torch.testing.assert_close(
        stream(logits.bfloat16(), target, 20).cmi, stream(logits.bfloat16().float(), target, 20).cmi
    )


def test_masked_classes() -> None:
    logits, target = rows()
    logits[:, 4] = -torch.inf  # everywhere: nobody gives it weight, nothing changes by leaving it out
    found = stream(logits, target, 10)
    for k, a in enumerate(SPECTRUM.inverse_temperatures):
        others = [0, 1, 2, 3, 5]
        relabelled = torch.where(target == 5, 4, target)
        cmi, gamma = two_pass(logits[:, others], relabelled, a)
        assert found.cmi[k].item() == pytest.approx(cmi, rel=1e-11)
        assert found.separation[k].item() == pytest.approx(gamma, rel=1e-11)
    logits[target == 2, 0] = -torch.inf  # class 2 excludes what others find possible
    assert stream(logits, target, 10).separation.isposinf().all()
    assert stream(logits, target, 10).cmi.isfinite().all()


def test_one_class_and_no_rows() -> None:
    logits, _ = rows()
    found = stream(logits, torch.full((97,), 2), 10)
    assert found.separation.tolist() == [0.0] * 4
    empty = StreamingCMI(C, SPECTRUM).compute()
    assert empty.cmi.isnan().all()


def test_far_shifted_logits() -> None:
    logits, target = rows()
    shifted = logits.double() + 1e4 * torch.arange(97).unsqueeze(1)
    torch.testing.assert_close(stream(shifted, target, 10).separation, stream(logits, target, 10).separation)


def test_merge_is_the_whole() -> None:
    logits, target = rows(1e-3)
    parts = [StreamingCMI(C, SPECTRUM), StreamingCMI(C, SPECTRUM)]
    parts[0].update(logits[:30], target[:30])
    parts[1].update(logits[30:], target[30:])
    parts[0].merge(parts[1])
    whole = stream(logits, target, 97)
    torch.testing.assert_close(parts[0].compute().cmi, whole.cmi, rtol=1e-9, atol=0.0)
    torch.testing.assert_close(parts[0].compute().separation, whole.separation)
    with pytest.raises(ValueError, match="other temperatures"):
        parts[0].merge(StreamingCMI(C, [1.0]))
    with pytest.raises(ValueError, match="5 classes into 6"):
        parts[0].merge(StreamingCMI(5, SPECTRUM))


def test_divergence_of_distributions() -> None:
    p, q = torch.tensor([0.0, 1.0, 0.0]).double(), torch.tensor([0.25, 0.75, 0.0]).double()
    assert divergence(p, q).item() == pytest.approx(math.log(4 / 3), rel=1e-14)
    near = q + torch.tensor([1e-3, -1e-3, 0.0]).double()
    plain = (near[:2] * (near[:2] / q[:2]).log()).sum().item()
    assert divergence(near, q).item() == pytest.approx(plain, rel=1e-10)


def wrong_classes(metric: StreamingCMI) -> None:
    metric.update(torch.zeros(3, C + 1), torch.zeros(3, dtype=torch.int64))


def wrong_label(metric: StreamingCMI) -> None:
    metric.update(torch.zeros(3, C), torch.tensor([0, C, 1]))


def nan_logits(metric: StreamingCMI) -> None:
    metric.update(torch.full((3, C), torch.nan), torch.zeros(3, dtype=torch.int64))


def wrong_rows(metric: StreamingCMI) -> None:
    metric.update(torch.zeros(3, C), torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (wrong_classes, "6 classes, got 7"),
        (wrong_label, "target must lie in"),
        (nan_logits, "finite maximum"),
        (wrong_rows, "target"),
    ],
)
def test_bad_input_is_refused_and_leaves_no_trace(
    misuse: Callable[[StreamingCMI], None], message: str
) -> None:
    logits, target = rows()
    metric = StreamingCMI(C, SPECTRUM)
    metric.update(logits, target)
    before = metric.compute().cmi
    with pytest.raises(ValueError, match=message):
        misuse(metric)
    assert torch.equal(metric.compute().cmi, before)


def test_evaluating_a_model() -> None:
    logits, target = rows()
    model = nn.Sequential(nn.Dropout(0.5), nn.Identity())  # changes the logits unless in eval mode
    model[1].eval()  # as what is frozen
    batches = [(logits[i : i + 10], target[i : i + 10], "more") for i in range(0, 97, 10)]
    found = evaluate_concentration(model, batches, temperatures=SPECTRUM)
    assert torch.equal(found.cmi, stream(logits, target, 10).cmi)
    assert [module.training for module in model.modules()] == [True, True, False]
    with pytest.raises(ValueError, match="at least one batch"):
        evaluate_concentration(model, [])


@pytest.mark.parametrize(
    ("loader", "model", "message"),
    [
        ([rows()[0]], nn.Identity(), r"loader must yield \(inputs, target, \.\.\.\), got Tensor"),
        ([(rows()[0],)], nn.Identity(), r"loader must yield \(inputs, target, \.\.\.\), got tuple"),
        ([rows()], nn.Flatten(0), rf"model must return logits of shape \(N, C\), got \({97 * C},\)"),
        ([rows()], nn.LSTM(C, C), r"model must return logits of shape \(N, C\), got tuple"),
    ],
    ids=["no_batch", "no_target", "shape", "tuple"],
)
def test_what_a_model_and_a_loader_may_not_give(loader: Any, model: nn.Module, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        evaluate_concentration(model, loader, temperatures=SPECTRUM)
    assert model.training


def test_modes_are_restored_by_the_modules_own_methods() -> None:
    class Adapter(nn.Identity):
        """Merged while it is not trained, as low-rank adapters are."""

        merged = False

        def train(self, mode: bool = True) -> Adapter:
            super().train(mode)
            self.merged = not mode
            return self

    logits, target = rows()
    model = nn.Sequential(Adapter(), nn.Sequential(Adapter(), nn.Identity()), Adapter())
    model[1].eval()
    model[1][0].train()
    model[2].eval()
    before = [(module.training, getattr(module, "merged", None)) for module in model.modules()]
    evaluate_concentration(model, [(logits, target)], temperatures=SPECTRUM)
    assert [(module.training, getattr(module, "merged", None)) for module in model.modules()] == before


def test_plot(tmp_path: Path) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    found = stream(*rows(), 10)
    axes = plot_concentration({"train": found}, figure.subplots(), trained_on=SPECTRUM)
    assert axes.get_xscale() == axes.get_yscale() == "log"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["trained on", "train"]
    figure.savefig(tmp_path / "plot.png")
    with pytest.raises(ValueError, match="quantity"):
        plot_concentration({"train": found}, axes, quantity="gamma")
    with pytest.raises(ValueError, match=r"spectra must hold at least one"):
        plot_concentration({}, axes)
    with pytest.raises(TypeError, match=r"spectra must map labels .* got ConcentrationSpectrum"):
        plot_concentration(found, axes)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"spectra\['train'\] must be a ConcentrationSpectrum, got Tensor"):
        plot_concentration({"train": found.cmi}, axes)  # type: ignore[dict-item]


def test_torchmetrics_metric() -> None:
    pytest.importorskip("torchmetrics")
    from cmim_kernels.metrics import CMIMetric

    logits, target = rows(1e-3)
    metric = CMIMetric(C, SPECTRUM)
    for part in range(0, 97, 10):
        metric(logits[part : part + 10], target[part : part + 10])
    whole = stream(logits, target, 97)
    found = metric.compute()
    torch.testing.assert_close(found["cmi"], whole.cmi, rtol=1e-9, atol=0.0)
    torch.testing.assert_close(found["ncmi"], whole.ncmi, rtol=1e-9, atol=0.0)
    metric.reset()
    assert metric.compute()["cmi"].isnan().all()


def test_torchmetrics_states_are_merged() -> None:
    """Of shards that were seen apart; what an instance has computed before is computed again."""
    pytest.importorskip("torchmetrics")
    from cmim_kernels.metrics import CMIMetric

    logits, target = rows(1e-3)
    shards = []
    for part in (slice(0, 31), slice(31, 60), slice(60, 97)):
        shards.append(CMIMetric(C, SPECTRUM))
        shards[-1].update(logits[part], target[part])
    before = shards[0].compute()["cmi"]
    fresh = CMIMetric(C, SPECTRUM)
    for shard in shards:
        fresh.merge_state(shard)
    for shard in shards[1:]:
        shards[0].merge_state(shard)
    whole = stream(logits, target, 97)
    assert not torch.equal(shards[0].compute()["cmi"], before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a metric that has seen nothing
        for found in (shards[0].compute(), fresh.compute()):
            for name in ("cmi", "separation", "ncmi"):
                torch.testing.assert_close(found[name], getattr(whole, name), rtol=1e-9, atol=0.0)
    with pytest.raises(TypeError, match="incoming_state must be a CMIMetric, got dict"):
        shards[0].merge_state({})
    with pytest.raises(ValueError, match="other temperatures"):
        shards[0].merge_state(CMIMetric(C))
    with pytest.raises(ValueError, match=f"{C + 1} classes into {C}"):
        shards[0].merge_state(CMIMetric(C + 1, SPECTRUM))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_torchmetrics_metric_in_a_model_that_is_cast(dtype: torch.dtype) -> None:
    pytest.importorskip("torchmetrics")
    from cmim_kernels.metrics import CMIMetric

    model = nn.ModuleDict({"cmi": CMIMetric(C, SPECTRUM)})
    model.to(dtype)
    model["cmi"].update(*rows(1e-3))
    assert model["cmi"].mean.dtype == torch.float64
    assert torch.equal(model["cmi"].compute()["cmi"], stream(*rows(1e-3), 97).cmi)


def test_torchmetrics_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    monkeypatch.delitem(sys.modules, "cmim_kernels.torchmetric", raising=False)
    with pytest.raises(ImportError, match="pip install"):
        from cmim_kernels.metrics import CMIMetric  # noqa: F401


def check_rank(rank: int) -> None:
    logits, target = rows(1e-3)
    own = slice(0, 31) if rank == 0 else slice(31, 97)
    metric = StreamingCMI(C, SPECTRUM)
    metric.update(logits[own], target[own])
    metric.all_reduce()
    whole = stream(logits, target, 97)
    torch.testing.assert_close(metric.compute().cmi, whole.cmi, rtol=1e-9, atol=0.0)
    torch.testing.assert_close(metric.compute().separation, whole.separation)
    assert torch.equal(metric.compute().counts, whole.counts)

    share = [(logits[own], target[own])]
    pooled = evaluate_concentration(
        nn.Identity(), share, temperatures=SPECTRUM, group=torch.distributed.group.WORLD
    )
    torch.testing.assert_close(pooled.cmi, whole.cmi, rtol=1e-9, atol=0.0)
    assert torch.equal(pooled.counts, whole.counts)

    from cmim_kernels.metrics import CMIMetric

    wrapped = CMIMetric(C, SPECTRUM)
    wrapped.update(logits[own], target[own])
    found = wrapped.compute()
    torch.testing.assert_close(found["cmi"], whole.cmi, rtol=1e-9, atol=0.0)
    torch.testing.assert_close(found["separation"], whole.separation)
    wrapped.update(logits[own], target[own])  # local sums again after compute
    assert wrapped.counts.shape == (C,)
    with wrapped.sync_context():
        with pytest.raises(RuntimeError, match="while it is synced"):
            wrapped.merge_state(CMIMetric(C, SPECTRUM))
        pooled = CMIMetric(C, SPECTRUM)
        pooled.merge_state(wrapped)
    torch.testing.assert_close(pooled._sums().figures(SPECTRUM).cmi, whole.cmi, rtol=1e-9, atol=0.0)
    assert pooled.counts.sum() == 2 * whole.counts.sum()


def test_two_processes(tmp_path: Path) -> None:
    pytest.importorskip("torchmetrics")
    on_ranks(2, check_rank, tmp_path)
