"""The CIFAR-100 and ImageNet recipes run on random images: alone, resumed, and on two processes."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

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


class Residual(nn.Module):
    """As much of torchvision's ResNet as the recipes touch."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.fc = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1:] == (3, 32, 32)
        x = self.maxpool(self.conv1(x))
        assert isinstance(self.maxpool, nn.MaxPool2d) or x.shape[2:] == (32, 32)  # the stem for small images
        out: Tensor = self.fc(x.mean((2, 3)))
        return out


def torchvision(monkeypatch: pytest.MonkeyPatch, classes: int) -> None:
    """Stands in for torchvision: its names and signatures, small random images."""
    common = importlib.import_module("training_common")

    def images(root: Path, train: bool = True, transform: object = None, download: bool = False) -> object:
        if not root.is_dir():
            raise RuntimeError("Dataset not found or corrupted.")
        return common.SyntheticImages(200 if train else 40, classes, 32, int(train))

    def folder(root: Path, transform: object) -> object:
        if not root.is_dir():
            raise FileNotFoundError(f"Couldn't find any class folder in {root}.")
        return images(root, train=root.name == "train")

    makers = ("ToTensor", "Normalize", "RandomCrop", "RandomHorizontalFlip", "Compose")
    makers += ("RandomResizedCrop", "Resize", "CenterCrop")
    stand_in = {
        "datasets": {"CIFAR100": images, "ImageFolder": folder},
        "transforms": {name: lambda *a, **k: None for name in makers},
        "models": {"resnet18": Residual, "resnet50": Residual},
    }
    for name, members in stand_in.items():
        module = ModuleType(f"torchvision.{name}")
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, f"torchvision.{name}", module)
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))


@pytest.mark.parametrize(("recipe", "classes"), [("train_cifar100", 100), ("train_imagenet", 7)])
def test_as_on_the_real_data(
    recipe: str, classes: int, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torchvision(monkeypatch, classes)
    options = ["--epochs=1", "--batch-size=32", "--workers=0", f"--output={tmp_path}", f"--data={tmp_path}"]
    if recipe == "train_imagenet":
        with pytest.raises(SystemExit, match="must hold train and val"):
            run(recipe, *options)
        for name in ("train", "val"):
            (tmp_path / name).mkdir()
    assert "epoch 1: loss" in run(recipe, *options)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert state["model"]["fc.weight"].shape == (classes, 64)
    with pytest.raises(SystemExit, match=r"--data .*nowhere"):
        run(recipe, *options, f"--data={tmp_path / 'nowhere'}")


@pytest.mark.parametrize(
    ("recipe", "option"),
    [
        ("train_cifar100", "--samples-per-class=0"),
        ("train_cifar100", "--epochs=0"),
        ("train_cifar100", "--stop-after=half"),
        ("train_imagenet", "--lr=nan"),
        ("train_imagenet", "--cmi-weight=-1"),
        ("train_imagenet", "--warmup-epochs=inf"),
    ],
)
def test_options_that_make_no_sense(
    recipe: str, option: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    name, value = option.split("=")
    with pytest.raises(SystemExit):
        run(recipe, "--synthetic", option)
    assert f"argument {name}: expected a " in (error := capsys.readouterr().err)
    assert f", got '{value}'" in error


def test_nothing_to_resume(run: Run, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no checkpoint"):
        run("train_cifar100", "--synthetic", "--resume", "--output", tmp_path)


def test_without_torchvision(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(SystemExit, match="pip install torchvision"):
        run("train_imagenet")
