"""benchmarks/gpu_check.sh and what it calls, as far as they can be tried without a GPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import pytest_collection_modifyitems
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
if [ -n "$SLOW" ]; then case "$*" in *$SLOW*) sleep 60 ;; esac; fi
echo "2 passed, 1 skipped in 0.1s"
"""
SANITIZER = """#!/bin/bash
echo "$*" >> "$TRACE"
while [ "$1" != python ]; do shift; done
"$@"
status=$?
echo "========= ERROR SUMMARY: $status errors"
exit $status
"""


def run_script(folder: Path, **variables: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """(what it did, the commands it called) with a device of paper. FAIL and SLOW: commands that are."""
    tools = folder / "bin"
    tools.mkdir(parents=True)
    (tools / "python").write_text(PYTHON)
    (tools / "compute-sanitizer").write_text(SANITIZER)
    for tool in tools.iterdir():
        tool.chmod(0o755)
    trace = folder / "trace"
    trace.touch()
    variables = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "OUT": str(folder / "out"),
        "TRACE": str(trace),
        "FAIL": "",
        "SLOW": "",
    } | variables
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
    cases = [c for c in called if c.startswith("benchmarks/gpu_cases.py")]
    sanitized = [c for c in called if c.startswith("--tool")]
    pool = len(tests) + len(cases) + len(sanitized)
    assert sorted(called[1 : 1 + pool]) == sorted(tests + cases + sanitized)
    for i in (1, 2, 3):
        assert any(c.endswith(f"tests/test_gpu.py --shard {i}/3") and "-k" not in c for c in tests)
    for name, n in (("cuda", 3), ("triton", 8)):
        shards = [c.split()[-1] for c in tests if f"-k {name}-cuda tests/test_budget.py" in c]
        assert sorted(shards) == [f"{i}/{n}" for i in range(1, n + 1)]
    assert sum("-k reference-cuda" in c for c in tests) == 2
    assert len(cases) == len(sanitized) == 16
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        own = [c for c in sanitized if c.startswith(f"--tool {tool} ")]
        assert len({c.split("gpu_cases.py")[1] for c in own}) == 4
        assert all(("--kernel-name" in c) == (tool != "initcheck") for c in own)
        assert f"compute-sanitizer {tool}: passed" in done.stdout
    assert "4 ERROR SUMMARY: 0 errors" in done.stdout
    assert f"{2 * sum('-k triton' in c for c in tests)} passed" in done.stdout
    timed = called[1 + pool :]
    assert "--benchmark-json" in timed[0]
    assert timed[1].startswith("benchmarks/gpu_bars.py")
    for check in ("build", "tests, device", "tests, cuda", "compute-sanitizer racecheck", "benchmarks"):
        assert f"{check}=passed" in timed[1]
    assert timed[2].startswith("benchmarks/gpu_bars.py")
    assert timed[2].endswith(" compiled")
    assert timed[3].startswith("benchmarks/report.py")
    assert len(timed) == 4
    assert (tmp_path / "out" / "gpu.md").read_text().startswith("bars")


@pytest.mark.parametrize(
    ("fail", "named"),
    [
        ("-k cuda-cuda tests/test_budget.py --shard 2/3", "tests, cuda"),
        ("gpu_cases.py tiled bfloat16", "compute-sanitizer initcheck"),
        ("gpu_bars", "bars"),
        ("gpu.md compiled", "bars, compiled"),
    ],
)
def test_a_failure_is_named_and_the_rest_goes_on(tmp_path: Path, fail: str, named: str) -> None:
    done, called = run_script(tmp_path, FAIL=fail)
    assert done.returncode == 1
    assert named in done.stderr.splitlines()[-1]
    assert "it failed" in done.stdout
    assert called[-1].startswith("benchmarks/report.py")


def test_what_takes_too_long_is_cut_short(tmp_path: Path) -> None:
    done, called = run_script(tmp_path, SLOW="-k triton-cuda tests/test_untouched.py", POOL_SECONDS="4")
    assert done.returncode == 1
    assert "gpu-check: tests, triton: took too long" in done.stdout
    assert "tests, triton=took too long" in called[-3]
    assert called[-1].startswith("benchmarks/report.py")


def test_nothing_goes_on_without_a_build(tmp_path: Path) -> None:
    done, called = run_script(tmp_path, FAIL="build_ext")
    assert done.returncode == 1
    assert len(called) == 1


def test_the_tools_it_needs() -> None:
    assert shutil.which("timeout")
    assert shutil.which("xargs")


@pytest.mark.parametrize("n", [1, 3, 8, 20])
def test_shards_are_all_of_it(n: int) -> None:
    """Each test in one of them, as many in each, in the same order."""
    parts = []
    for i in range(1, n + 1):
        items: list[Any] = list(range(17))
        pytest_collection_modifyitems(SimpleNamespace(getoption={"--shard": f"{i}/{n}"}.get), items)
        parts.append(items)
    assert [item for part in parts for item in part] == list(range(17))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


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
        gpu_cases.main([])
        gpu_cases.main(["tiled", "float64"])
    finally:
        backend.set_path(0)
    both, one = (int(line.split()[0]) for line in capsys.readouterr().out.splitlines())
    assert both > 8 * len(gpu_cases.FORMS)
    assert one == len(gpu_cases.FORMS) + 2
    with pytest.raises(SystemExit, match="unknown: float8"):
        gpu_cases.main(["float8"])


def test_the_table_of_bars() -> None:
    to = "F.cross_entropy"
    bars = [
        gpu_bars.Bar("256x1000, eager", "cuda", to, 1.3, 6e-5, 5e-5, 1.2),
        gpu_bars.Bar("256x1000, eager", "triton", to, 1.3, 9e-5, 5e-5, 1.8),
        gpu_bars.Bar("4096x1000", "triton", to, None, 1e-3, 5e-4, 2.0),
        gpu_bars.compiled_bar("cuda"),
    ]
    assert [bar.met for bar in bars] == [True, False, None, None]
    table = gpu_bars.report(bars, {"build": "passed", "tests, cuda": "failed"})
    assert "| tests, cuda | failed |" in table
    assert "| 256x1000, eager | cuda | 0.0600 | F.cross_entropy | 0.0500 | 1.20 | 1.30 | met |" in table
    assert "| 1.80 | 1.30 | **missed** |" in table
    assert "| 4096x1000 | triton | 1.00 | F.cross_entropy | 0.500 | 2.00 | - |  |" in table
    assert "| - | 0.100 | not measured |" in table


def test_the_bars_of_compiled_pytorch_are_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To those measured before, in place of what said that they were not measured."""
    results, table = tmp_path / "gpu.json", tmp_path / "gpu.md"
    monkeypatch.setattr(gpu_bars, "usable", lambda names, device: names)
    bar = gpu_bars.Bar("256x1000, eager", "cuda", "F.cross_entropy", 1.3, 6e-5, 5e-5, 1.2)
    monkeypatch.setattr(gpu_bars, "cross_entropy_bars", lambda backend: [bar])
    monkeypatch.setattr(gpu_bars, "roofline_bars", lambda backend: [])
    monkeypatch.setattr(gpu_bars, "step_bar", lambda backend: bar)

    def run(*words: str) -> int | str | None:
        monkeypatch.setattr(sys, "argv", ["gpu_bars.py", str(results), str(table), *words])
        with pytest.raises(SystemExit) as ended:
            gpu_bars.main()
        return ended.value.code

    assert run("build=passed") == 0
    assert table.read_text().count("not measured") == 2
    for ratio, code in ((0.08, 0), (0.2, 1)):
        times = (1e-4, 1e-4 / ratio, ratio)
        monkeypatch.setattr(
            gpu_bars, "compiled_bars", lambda bs, t=times: [gpu_bars.compiled_bar(b, *t) for b in bs]
        )
        assert run("compiled") == code
        assert "| build | passed |" in table.read_text()
        assert "not measured" not in table.read_text()
    bars = json.loads(results.read_text())["gpu_check"]["bars"]
    assert [b["met"] for b in bars][:4] == [True] * 4


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
