"""The example that audits teachers on the digits runs as it stands, and its pieces do what they say."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from cmim_kernels.audit import StudentTraining

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

ROOT = Path(__file__).parent.parent


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module("undistillable_digits")


def test_prints_a_report_and_plots(tmp_path: Path) -> None:
    few = ["--splits=2", "--steps=3", "--student-steps=3", "--attacks", "kd-t4", "mixkd", "extra-soft"]
    result = subprocess.run(
        [sys.executable, "examples/undistillable_digits.py", *few, f"--out={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    for piece in (
        "largest CMI",
        "Label leakage",
        "labels only",
        "What this does not show",
        "undistillable.png",
    ):
        assert piece in result.stdout
    assert "6/6" in result.stderr  # teachers, behind a progress bar
    assert (tmp_path / "undistillable.png").read_bytes().startswith(b"\x89PNG")
    assert "**CMIM**:" in (tmp_path / "undistillable.md").read_text()


def test_the_attackers_share(digits: ModuleType) -> None:
    models = [digits.common.new_model(seed) for seed in range(2)]
    data = digits.attacker_data({"a": models})
    assert data.inputs.shape == (2, 100, 1, 8, 8)
    for labels in data.labels:
        assert torch.bincount(labels).tolist() == [10] * 10
    assert data.extra_inputs.shape == (2, 300, 1, 8, 8)
    split = digits.common.load_digits(1)
    train = {image.numpy().tobytes() for image in split.train_images}
    assert all(image.numpy().tobytes() in train for image in data.inputs[1])
    own = {image.numpy().tobytes() for image in data.inputs[1]}
    assert not any(image.numpy().tobytes() in own for image in data.extra_inputs[1])
    with torch.no_grad():
        torch.testing.assert_close(data.teachers["a"][1], models[1](data.inputs[1]))
        torch.testing.assert_close(data.queries["a"](data.inputs)[1], models[1](data.inputs[1]))
    assert digits.attacker_data({"a": models}, labelled=800).extra_inputs is None


def test_cmim_lowers_the_spread(digits: ModuleType) -> None:
    data = digits.common.load_digits(0)
    peaks = [digits.curves([digits.RECIPES[name].train(data, 0, 60)]).train.max() for name in ("CE", "CMIM")]
    assert peaks[1] < 0.5 * peaks[0]


def test_every_ablation_trains(digits: ModuleType) -> None:
    data = digits.common.load_digits(0)
    for recipe in importlib.import_module("undistillable_ablations").VARIANTS.values():
        model = recipe.train(data, 0, 2)
        assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_ablations_tabulate_and_plot(
    digits: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ablations = importlib.import_module("undistillable_ablations")

    def train(recipes: dict[str, Any], splits: int, steps: int) -> dict[str, list[Any]]:
        """In this process."""
        data = [digits.common.load_digits(seed) for seed in range(splits)]
        return {name: [recipe.train(d, 0, steps) for d in data] for name, recipe in recipes.items()}

    few = {name: ablations.VARIANTS[name] for name in ("weight 1", "bank, re-estimated")}
    monkeypatch.setattr(ablations, "VARIANTS", few)
    monkeypatch.setattr(digits, "train_teachers", train)
    monkeypatch.setattr(digits, "STUDENT_TRAINING", StudentTraining(steps=2))
    monkeypatch.setattr(sys, "argv", ["ablations", "--splits=2", "--steps=1", f"--out={tmp_path}"])
    ablations.main()
    table = (tmp_path / "ablations.md").read_text().splitlines()
    assert [row.split(" | ")[0] for row in table[2:]] == ["| weight 1", "| bank, re-estimated"]
    assert all(row.count("|") == table[0].count("|") == 10 for row in table)
    assert (tmp_path / "ablations.png").read_bytes().startswith(b"\x89PNG")
    assert "bank, re-estimated  " in capsys.readouterr().out


def test_refuses_nonsense(digits: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for options in (["--splits", "0"], ["--labelled", "900"]):
        with pytest.raises(SystemExit):
            digits.main(options)
    assert "--labelled must lie in [10, 800]" in capsys.readouterr().err
