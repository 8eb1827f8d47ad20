"""The benchmarks time the right thing and report what was measured."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.cases import HOST, MAIN, VARIED, Case
from benchmarks.contenders import CONTENDERS, LossFunction
from benchmarks.environment import environment
from benchmarks.measure import PHASES, check, timed_phase, truth
from benchmarks.memory import peak_bytes
from benchmarks.paired import Paired, Timed, paired, quantiles
from cmim_kernels import fused_cmi_loss

ROOT = Path(__file__).parent.parent
SMALL = Case(48, 12, 6)
PLAIN = ("eager loop", "eager vectorised", "moving-average loop", "reference", "fused[cpu]")


@pytest.mark.parametrize("grid", ["uniform", "general"])
@pytest.mark.parametrize("name", PLAIN)
def test_contenders_compute_the_loss(name: str, grid: str) -> None:
    check(name, replace(SMALL, grid=grid), "cpu")


def test_a_wrong_contender_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(case: Case, device: str) -> LossFunction:
        right = CONTENDERS["eager loop"](case, device)
        return lambda logits, target: 1.1 * right(logits, target)

    monkeypatch.setitem(CONTENDERS, "wrong", wrong)
    with pytest.raises(AssertionError):
        check("wrong", SMALL, "cpu")


def test_truth_in_parts_is_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A case too large for one call of the reference is summed over clusters."""
    whole = truth.__wrapped__(SMALL, "cpu")
    monkeypatch.setattr(measure, "ELEMENTS_AT_ONCE", 20 * SMALL.k * SMALL.c)  # two classes of eight rows
    calls = []

    def counted(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(len(logits))
        return fused_cmi_loss(logits, *args, **kwargs)

    monkeypatch.setattr(measure, "fused_cmi_loss", counted)
    in_parts = truth.__wrapped__(SMALL, "cpu")
    assert len(calls) == 3
    assert sum(calls) == SMALL.n
    torch.testing.assert_close(in_parts, whole, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("case", [*MAIN, *HOST, *VARIED], ids=lambda case: case.name)
def test_cases_hold_what_they_say(case: Case) -> None:
    if case.n * case.c > 2**20:
        pytest.skip("as the smaller ones")
    logits, target = case.data("cpu")
    assert logits.shape == (case.n, case.c)
    assert logits.dtype == case.dtype
    assert target.max() < case.classes
    # Drawn at random, this many classes are present on average.
    expected = case.classes * (1 - (1 - 1 / case.classes) ** case.n)
    assert abs(len(target.unique()) - (case.classes if case.balanced else expected)) <= 0.1 * case.classes + 1
    assert len(case.spectrum) == case.k


def test_collapsed_cases_are_as_narrow_as_they_say() -> None:
    case = Case(256, 64, 4, spread=1e-2)
    logits, target = case.data("cpu")
    spread = torch.stack([logits[target == c].std(0).mean() for c in range(4)])
    torch.testing.assert_close(spread, torch.full((4,), 1e-2), rtol=0.1, atol=0)


def test_pairs_alternate_and_prepare_off_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.paired.SAMPLE_SECONDS", 0.0)  # one call a sample
    calls: list[str] = []
    ours = Timed(calls.append, prepare=lambda: "ours")
    baseline = Timed(calls.append, prepare=lambda: "baseline")
    result = paired(ours, baseline, budget_seconds=0.0, min_pairs=4)
    assert result.pairs == 4
    assert calls[-8:] == ["baseline", "ours", "ours", "baseline"] * 2


def test_ratio_of_equal_work_is_one() -> None:
    x = torch.randn(2000)
    result = paired(Timed(lambda _: x.exp()), Timed(lambda _: x.exp()), budget_seconds=0.3)
    assert 0.7 < result.ratio_p50 < 1.4
    assert result.ratio_p20 <= result.ratio_p50 <= result.ratio_p80


def test_quantiles() -> None:
    assert quantiles([float(i) for i in range(11)]) == (2.0, 5.0, 8.0)


def test_peak_memory_is_that_of_the_call() -> None:
    """In a fresh process: at least the gradient, and what plain PyTorch keeps, many times as much."""
    case = Case(512, 1000, 32)
    fused, plain = (peak_bytes(name, case, "cpu") for name in ("fused[cpu]", "eager loop"))
    gradient = 4 * case.n * case.c
    assert gradient <= fused < plain
    assert plain > 8 * gradient


def test_peak_memory_on_a_gpu_takes_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that CUDA has been initialised in cannot be forked, and starting one takes seconds."""
    monkeypatch.delattr("multiprocessing.get_context")
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda: 100)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda: 350)
    data = Case.data
    monkeypatch.setattr(Case, "data", lambda case, device: data(case, "cpu"))
    assert peak_bytes("fused[cpu]", SMALL, "cuda") == 250


@pytest.mark.parametrize("phase", PHASES)
def test_phases_run_again_and_again(phase: str) -> None:
    timed = timed_phase(CONTENDERS["fused[cpu]"](SMALL, "cpu"), *SMALL.data("cpu"), phase)
    first = timed.run(timed.prepare())
    again = timed.run(timed.prepare())
    for a, b in zip(torch.atleast_1d(first), torch.atleast_1d(again), strict=True):
        assert torch.equal(a, b)


def result(kind: str, contender: str, case: Case = SMALL, phase: str = "both", **more: Any) -> dict[str, Any]:
    facts = asdict(case) | {"dtype": "float32", "case": case.name, "bytes_moved": case.bytes_moved}
    numbers = Paired(1.0, 1.25, 1.5, 1e-4, 1.25e-4, 1.5e-4, 1e-4, 10)
    facts |= {"kind": kind, "contender": contender, "phase": phase, "device": "cpu", "peak_bytes": 2**20}
    return facts | {"paired": asdict(numbers), "environment": environment()} | more


@pytest.fixture
def published(tmp_path: Path) -> Path:
    fused = "fused[cpu]"
    results = [result("shape", name, phase=phase) for name in (fused, "eager loop") for phase in PHASES]
    doubling = asdict(Paired(1.5, 1.6, 1.7, 1e-4, 1.25e-4, 1.5e-4, 1e-4, 10))
    for grid in ("uniform", "general"):
        results.append(result("temperatures", fused, Case(8, 4, 2, k=1, grid=grid)))
        results.append(result("temperatures", fused, Case(8, 4, 2, k=2, grid=grid), doubling=doubling))
    results += [result("size", fused, Case(n, 4, 2), copy_seconds=1e-5) for n in (8, 16)]
    results += [result("step", fused), result("variation", fused, replace(SMALL, grid="general"))]
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"benchmarks": [{"extra_info": r} for r in results]}))
    return path


def run_report(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "report.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_report_prints_updates_and_plots(published: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page = tmp_path / "page.md"
    parts = [f"<!-- benchmarks: {name} -->\nold\n<!-- end -->\n" for name in ("headline", "price")]
    page.write_text(f"before\n{parts[0]}between\n{parts[1]}after\n")
    done = run_report(str(published), "--plots", str(tmp_path / "plots"), "--update", str(page))
    assert done.returncode == 0, done.stderr
    assert "| 48x12, 6 classes: eager loop | 1.25 (1.00 to 1.50) |" in done.stdout
    assert "+25.00 % (+0.00 to +50.00)" in done.stdout
    assert "| 1, uniform grid | 125 µs | 1.25 (1.00 to 1.50) |  |" in done.stdout
    assert "| 2, uniform grid | 125 µs | 1.25 (1.00 to 1.50) | 1.60 (1.50 to 1.70) |" in done.stdout
    text = page.read_text()
    assert text.startswith("before\n<!-- benchmarks: headline -->\n| logits |")
    assert text.endswith("|\n<!-- end -->\nafter\n")
    assert "old" not in text
    headline, price = text.split("between\n")
    assert price.startswith("<!-- benchmarks: price -->\n| logits |")
    assert all(
        "| 48x12, 6 classes | 100 µs | 125 µs | 1.25 (1.00 to 1.50) |" in part for part in (headline, price)
    )
    assert ["general grid" in part for part in (headline, price)] == [False, True]
    plots = {path.name for path in (tmp_path / "plots").iterdir()}
    assert plots == {"ratio.png", "temperatures.png", "size.png", "step.png"}


def test_report_has_two_processors_side_by_side(tmp_path: Path) -> None:
    """Prices in one table; other tables and plots of the second are its own, and a GPU's are apart."""
    pytest.importorskip("matplotlib")
    paths = []
    for name, instructions, device in (("a", "AVX2", "cpu"), ("b", "AVX512", "cpu"), ("c", "AVX512", "cuda")):
        results = [
            result("shape", f"fused[{device}]", device=device),
            result("step", "fused[cpu]", device=device),
        ]
        results += [result("variation", "fused[cpu]", Case(9, 3, 3))] if name == "b" else []
        for r in results:
            r["environment"] = environment() | {"cpu_capability": instructions}
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps({"benchmarks": [{"extra_info": r} for r in results]}))
    page = tmp_path / "page.md"
    names = ("headline", "avx512-step", "avx512-machine", "cuda-headline")
    page.write_text("".join(f"<!-- benchmarks: {name} -->\n<!-- end -->\n" for name in names))
    done = run_report(*map(str, paths), "--plots", str(tmp_path / "plots"), "--update", str(page))
    assert done.returncode == 0, done.stderr
    headline, step, machine, of_gpu = page.read_text().split("<!-- end -->\n")[:-1]
    numbers = "100 µs | 125 µs | 1.25 (1.00 to 1.50)"
    assert "| AVX2: F.cross_entropy | fused | ratio | AVX512: F.cross_entropy | fused | ratio |" in headline
    assert f"| 48x12, 6 classes | {numbers} | {numbers} |" in headline
    assert f"| 9x3, 3 classes |  |  |  | {numbers} |" in done.stdout
    assert step.count("48x12") == 1
    assert "AVX512" in machine
    assert "AVX2" not in machine
    assert f"| 48x12, 6 classes, fused[cuda] | {numbers} |" in of_gpu
    plots = {path.name for path in (tmp_path / "plots").iterdir()}
    assert plots == {f"{of}{name}.png" for of in ("", "avx512-", "cuda-") for name in ("ratio", "step")}


def test_report_leaves_out_what_has_no_results(tmp_path: Path) -> None:
    """Such as of a run whose measurements of both phases together failed."""
    pytest.importorskip("matplotlib")
    path = tmp_path / "results.json"
    results = [result("shape", "fused[cpu]", phase=phase) for phase in ("forward", "backward")]
    results += [result("temperatures", "fused[cpu]", grid=grid) for grid in ("uniform", "general")]
    path.write_text(json.dumps({"benchmarks": [{"extra_info": r} for r in results]}))
    done = run_report(str(path), "--plots", str(tmp_path / "plots"))
    assert done.returncode == 0, done.stderr
    assert "## price" not in done.stdout
    assert "| 48x12, 6 classes: fused[cpu] | 1.25 (1.00 to 1.50) |" in done.stdout
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"temperatures.png"}
    assert "ratio.png: no contender has a time of forward and backward" in done.stderr


def test_report_refuses_an_unknown_table(published: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page = tmp_path / "page.md"
    page.write_text("<!-- benchmarks: prize -->\n<!-- end -->\n")
    done = run_report(str(published), "--plots", str(tmp_path), "--update", str(page))
    assert done.returncode != 0
    assert "'prize'" in done.stderr


def test_results_name_no_host(published: Path) -> None:
    assert set(environment()) >= {"cpu", "threads", "torch", "date"}
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        assert set(json.loads(path.read_text())["machine_info"]) == set(environment())
