"""The examples and the README do what they say."""

from __future__ import annotations

import importlib
import re
import runpy
import subprocess
import sys
from itertools import islice
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCS = sorted((ROOT / "docs").glob("*.md"))


@pytest.fixture
def common(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module("digits_common")


def test_minimal_runs() -> None:
    names = runpy.run_path(str(ROOT / "examples" / "minimal.py"))
    assert names["loss"].isfinite()
    assert names["logits"].grad.norm() > 0


def test_readme_shows_minimal() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert code == (ROOT / "examples" / "minimal.py").read_text()


def test_readme_names_targets_of_the_makefile() -> None:
    text = README + (ROOT / "CONTRIBUTING.md").read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE))
    assert {"demo", "test"} <= named
    assert named <= targets


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in DOCS)])
def test_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", (ROOT / page).read_text())
    local = [link for link in links if "://" not in link]
    missing = [link for link in local if not (ROOT / page).parent.joinpath(link).exists()]
    assert not missing


def test_digits_prints_a_table_and_plots(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    plot = tmp_path / "plot.png"
    result = subprocess.run(
        [sys.executable, "examples/digits.py", "--seeds", "2", "--steps", "4", "--output", str(plot)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    for line in ("test accuracy", "largest CMI", "CMI at T = 1", "the fused loss", "the eager formulation"):
        assert line in result.stdout
    assert str(plot) in result.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "4/4" in result.stderr  # the progress bar


def test_digits_refuses_no_seeds() -> None:
    pytest.importorskip("sklearn")
    command = [sys.executable, "examples/digits.py", "--seeds", "0"]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(ROOT)}
    )
    assert result.returncode == 2
    assert "at least 1" in result.stderr


def test_digits_are_split_once(common: ModuleType) -> None:
    data = common.load_digits(seed=0)
    assert data.train_images.shape == (800, 1, 8, 8)
    assert data.test_images.shape == (997, 1, 8, 8)
    assert data.train_images.min() == 0
    assert data.train_images.max() == 1
    assert data.train_labels.unique().tolist() == list(range(10))


def test_batches_are_balanced_and_deal_every_sample(common: ModuleType) -> None:
    labels = common.load_digits(seed=0).train_labels
    batches = list(islice(common.balanced_batches(labels, seed=3), 10))
    for rows in batches:
        assert torch.bincount(labels[rows]).tolist() == [16] * 10
    dealt = torch.bincount(torch.cat(batches), minlength=len(labels))
    assert dealt.min() >= 1  # at most 100 samples a class, 160 dealt
    assert dealt.max() <= 3


def test_the_eager_formulation_is_the_same_loss(common: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(60, 10, generator=generator, requires_grad=True)
    target = torch.arange(60) % 10
    for step in (0, 75, 400):
        eager = common.eager_cmim(logits, target, step)
        fused = common.cmim(logits, target, step)
        torch.testing.assert_close(fused, eager, rtol=1e-4, atol=0)
        pair = [torch.autograd.grad(loss, logits)[0] for loss in (fused, eager)]
        torch.testing.assert_close(*pair, rtol=1e-3, atol=1e-5 * float(pair[1].norm()))
