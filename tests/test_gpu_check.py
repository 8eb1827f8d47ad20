"""benchmarks/gpu_check.sh and what it calls, as far as they can be tried without a GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_calls import needs_x86
from cuda_emulated import emulated

from benchmarks import gpu_bars, gpu_cases, gpu_step
from cmim_kernels.backends import cuda

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu_check.sh"

# In place of python: says that there is a device, and leaves a trace of everything else; fails on demand.
PYTHON = f"""#!/bin/bash
case "$*" in
  "-c import torch, sys;"*) exit 0 ;;
  "-c import torch; print"*) echo 90; exit 0 ;;
  "-") exec {sys.executable} -c 'print("gpu-check: a device of paper")' ;;
esac
echo "$*" >> "$TRACE"
case "$*" in
  *--benchmark-json=*) echo '{{"benchmarks": []}}' > "$OUT/gpu.json" ;;
  benchmarks/gpu_bars.py*) echo "bars" > "$3" ;;
esac
if [ -n "$FAIL" ]; then case "$*" in *$FAIL*) echo "it failed"; exit 1 ;; esac; fi
echo "1 passed"
"""


def run_script(folder: Path, fail: str = "") -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """(what it did, the commands it called) with a device of paper."""
    tools = folder / "bin"
    tools.mkdir(parents=True)
    (tools / "python").write_text(PYTHON)
    (tools / "compute-sanitizer").write_text('#!/bin/bash\nshift 4\nexec "$@"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    trace = folder / "trace"
    trace.touch()
    variables = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "OUT": str(folder / "out"),
        "TRACE": str(trace),
        "FAIL": fail,
    }
    done = subprocess.run(
        ["bash", str(SCRIPT)], env=os.environ | variables, capture_output=True, text=True, check=False
    )
    return done, trace.read_text().splitlines()


def test_it_says_so_where_there_is_no_device(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    (tmp_path / "python").symlink_to(sys.executable)
    done = subprocess.run(
        ["bash", str(SCRIPT)],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "OUT": str(tmp_path / "out")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "torch finds no CUDA device on this machine; nothing was checked" in done.stderr


def test_the_order_of_its_checks(tmp_path: Path) -> None:
    done, called = run_script(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "gpu-check: passed" in done.stdout
    assert called[0] == "setup.py -q build_ext --inplace"
    tests = [c for c in called if "-m gpu" in c]
    assert called[1 : 1 + len(tests)] == tests
    assert any(c.endswith("tests/test_gpu.py") for c in tests)
    for name in ("cuda", "triton", "reference"):
        assert any(f"-k {name}-cuda tests/test_budget.py" in c for c in tests)
    assert called.count("benchmarks/gpu_cases.py") == 4
    assert "--benchmark-json" in called[-3]
    assert called[-2].startswith("benchmarks/gpu_bars.py")
    for check in ("build", "tests, device", "tests, cuda", "compute-sanitizer racecheck", "benchmarks"):
        assert f"{check}=passed" in called[-2]
    assert called[-1].startswith("benchmarks/report.py")
    assert (tmp_path / "out" / "gpu.md").read_text().startswith("bars")


@pytest.mark.parametrize(
    ("fail", "named"),
    [
        ("-k cuda-cuda tests/test_budget.py", "tests, cuda"),
        ("gpu_cases", "compute-sanitizer initcheck"),
        ("gpu_bars", "bars"),
    ],
)
def test_a_failure_is_named_and_the_rest_goes_on(tmp_path: Path, fail: str, named: str) -> None:
    done, called = run_script(tmp_path, fail)
    assert done.returncode == 1
    assert named in done.stderr.splitlines()[-1]
    assert called[-1].startswith("benchmarks/report.py")


def test_nothing_goes_on_without_a_build(tmp_path: Path) -> None:
    done, called = run_script(tmp_path, "build_ext")
    assert done.returncode == 1
    assert len(called) == 1


def test_the_tools_it_needs() -> None:
    assert shutil.which("timeout")
    assert shutil.which("xargs")


@needs_x86
def test_the_sanitizers_cases(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """All of them, in the emulator."""
    backend = emulated()
    monkeypatch.setattr(cuda, "unusable", lambda: None)
    for name in ("loss", "loss_backward", "class_centroids"):
        monkeypatch.setattr(cuda, name, getattr(backend, name), raising=False)
    monkeypatch.setattr(torch.ops.cmim_kernels, "set_cuda_path", backend.set_path, raising=False)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    try:
        gpu_cases.main()
    finally:
        backend.set_path(0)
    assert "calls" in capsys.readouterr().out


def test_the_table_of_bars() -> None:
    bars = [
        gpu_bars.Bar("256x1000, eager", "cuda", 6e-5, "F.cross_entropy", 1.2, 1.3),
        gpu_bars.Bar("256x1000, eager", "triton", 9e-5, "F.cross_entropy", 1.8, 1.3),
    ]
    assert [bar.met for bar in bars] == [True, False]
    table = gpu_bars.report(bars, {"build": "passed", "tests, cuda": "failed"})
    assert "| tests, cuda | failed |" in table
    assert "| 256x1000, eager | cuda | 60.0 us | F.cross_entropy | 1.20 | 1.30 | met |" in table
    assert "| 1.80 | 1.30 | **missed** |" in table


def test_the_training_step() -> None:
    """ResNet-50 has the parameters it is known for, and a step changes them."""
    with torch.device("meta"):
        model = gpu_step.ResNet50()
        assert sum(p.numel() for p in model.parameters()) == 25_557_032
        assert model(torch.empty(2, 3, 224, 224)).shape == (2, 1000)
    seen = []

    def loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        seen.append(logits.detach())
        return torch.nn.functional.cross_entropy(logits, target)

    (timed,) = gpu_step.steps([loss], n=2, size=32, device="cpu")
    timed.run(None)
    timed.run(None)
    assert seen[0].shape == (2, 1000)
    assert not torch.equal(seen[0], seen[1])
