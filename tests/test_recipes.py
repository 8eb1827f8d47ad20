"""The CIFAR-100 and ImageNet recipes run on random images: alone, resumed, and on two processes."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("tqdm")

ROOT = Path(__file__).parent.parent
RECIPES = ["train_cifar100", "train_imagenet"]

Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a recipe in this process; returns what it printed."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)

    def call(recipe: str, *options: object) -> str:
        importlib.import_module(recipe).main([str(option) for option in options])
        return capsys.readouterr().out

    return call


@pytest.mark.parametrize("recipe", RECIPES)
def test_resumes_where_it_stopped(recipe: str, run: Run, tmp_path: Path) -> None:
    synthetic = ("--synthetic", "--epochs", 2, "--batch-size", 32)
    straight = run(recipe, *synthetic, "--output", tmp_path / "a")
    assert "epoch 2: loss" in straight
    first = run(recipe, *synthetic, "--output", tmp_path / "b", "--stop-after", 1)
    assert "epoch 2" not in first
    second = run(recipe, *synthetic, "--output", tmp_path / "b", "--resume")
    assert "epoch 1:" not in second
    assert second.splitlines()[-1] == straight.splitlines()[-1]
    states = [torch.load(tmp_path / folder / "last.pt", weights_only=True) for folder in "ab"]
    for part in ("model", "loss"):
        for name, value in states[0][part].items():
            assert torch.equal(value, states[1][part][name]), name
    if recipe == "train_imagenet":
        assert states[0]["loss"]["centroids.counts"].sum() > 0


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_processes_in_half_precision(recipe: str, tmp_path: Path) -> None:
    options = ["--synthetic", "--epochs=1", "--batch-size=16", "--precision=float16", f"--output={tmp_path}"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [sys.executable, *launcher, f"examples/{recipe}.py", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("epoch 1: loss") == 1  # one process reports
    assert "nan" not in result.stdout
    assert (tmp_path / "last.pt").is_file()


def test_nothing_to_resume(run: Run, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no checkpoint"):
        run("train_cifar100", "--synthetic", "--resume", "--output", tmp_path)


def test_without_torchvision(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(SystemExit, match="pip install torchvision"):
        run("train_imagenet")
