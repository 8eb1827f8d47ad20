"""The audit from data to report: every attack, own attacks, resumption, tables and plots."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from audit_cases import FAST, STUDENT, bayes_logits, clusters, data
from torch import Tensor, nn

from cmim_kernels.audit import (
    Attack,
    AuditData,
    AuditReport,
    StudentTraining,
    audit,
    mlp,
    plot_audit,
    registered_attacks,
    to_markdown,
)
from cmim_kernels.audit.answers import unpacked
from cmim_kernels.audit.attacks import cross_entropy
from cmim_kernels.audit.data import LABELS_ONLY
from cmim_kernels.audit.render import for_terminal, to_text


def test_every_attack_runs_and_the_report_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = audit(data(), STUDENT, seeds=3, training=FAST, out=tmp_path)
    assert list(report.results) == list(registered_attacks())
    for name, by_teacher in report.results.items():
        controlled = registered_attacks()[name].queries == "none"
        assert list(by_teacher) == ["bayes", "noise", *([LABELS_ONLY] if controlled else [])]
        assert all(len(accuracies) == 3 for accuracies in by_teacher.values())
    assert set(report.baselines) == {"0", "0.05", "0.1", "0.2", "0.3", "0.5"}
    text = (tmp_path / "audit.md").read_text()
    assert text == to_markdown(report)
    for piece in ("**bayes**:", "## Label leakage", "## Controls", "arXiv 2203.08679"):
        assert piece in text
    assert AuditReport.from_json((tmp_path / "audit.json").read_text()) == report
    if (tmp_path / "audit.png").exists():
        assert (tmp_path / "audit.png").read_bytes().startswith(b"\x89PNG")
    assert "29/29" in capsys.readouterr().err


def test_a_good_teacher_is_found_distillable() -> None:
    training = StudentTraining(steps=150, lr=2e-2)
    report = audit(
        data(), mlp(6, [32], 3), attacks=["kd-t1", "kd-t4"], seeds=5, training=training, progress=False
    )
    assert report.verdict("bayes").startswith("distillable")
    assert not report.verdict("noise").startswith("distillable")


def test_the_rows_that_were_right_are_kept_where_seeds_share_them() -> None:
    report = audit(data(), STUDENT, attacks=["kd-t4"], seeds=3, training=FAST, progress=False)
    for teacher, accuracies in report.results["kd-t4"].items():
        right = unpacked(report.right[f"kd-t4 | {teacher}"], 400)
        assert right.double().mean(1).tolist() == accuracies
    assert unpacked(report.right["LS 0.1"], 400).double().mean(1).tolist() == report.baseline
    wide = report.difference("bayes", "kd-t4").standard_error
    assert "All seeds share one test set" in to_markdown(report)
    report.right = {}
    assert report.difference("bayes", "kd-t4").standard_error < wide


def test_one_data_set_per_seed() -> None:
    single = data(extra_inputs=None, extra_logits=None, queries=None)
    other = clusters(24, 9)
    per_seed = AuditData(
        inputs=torch.stack([single.inputs, other[0]]),
        labels=torch.stack([single.labels, other[1]]),
        teachers={"bayes": torch.stack([single.teachers["bayes"], bayes_logits(other[0])])},
        test_inputs=single.test_inputs.expand(2, -1, -1),
        test_labels=single.test_labels.expand(2, -1),
        queries={"bayes": bayes_logits},
    )
    options: dict[str, Any] = {"attacks": ["kd-t4", "mixkd"], "training": FAST, "progress": False}
    both = audit(per_seed, STUDENT, seeds=[0, 1], **options)
    alone = audit(single, STUDENT, seeds=[0], **options)
    assert both.results["kd-t4"]["bayes"][0] == pytest.approx(alone.results["kd-t4"]["bayes"][0], abs=0.01)
    assert set(both.results) == {"kd-t4", "mixkd"}
    assert both.right == {}
    assert alone.skipped == {"mixkd": "needs the teacher as a function (queries)"}
    with pytest.raises(ValueError, match="2 data sets, one per seed, but there are 3 seeds"):
        audit(per_seed, STUDENT, seeds=3, **options)


def test_an_own_attack_and_what_it_may_not_return() -> None:
    own = Attack("mse", "my own", lambda s, t, y: (s - t).square().mean((1, 2)))
    report = audit(data(), STUDENT, attacks=[own, "kd-t4"], seeds=2, training=FAST, progress=False)
    assert set(report.results) == {"mse", "kd-t4"}
    wrong = Attack("wrong", "my own", lambda s, t, y: (s - t).square().mean())
    with pytest.raises(ValueError, match="'wrong': the loss must return one value per student"):
        audit(data(), STUDENT, attacks=[wrong], seeds=2, training=FAST, progress=False)
    wrong = Attack("wrong", "my own", own.loss, prepare=lambda t, y: t / 0)
    with pytest.raises(ValueError, match="'wrong': prepare must return finite logits"):
        audit(data(), STUDENT, attacks=[wrong], seeds=2, training=FAST, progress=False)


def test_resumes_after_an_interruption(tmp_path: Path) -> None:
    calls: list[str] = []

    def counted(name: str, fails: bool = False) -> Attack:
        def loss(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
            if not calls or calls[-1] != name:
                calls.append(name)
            if fails:
                raise KeyboardInterrupt
            return cross_entropy(s, y)

        return Attack(name, "counted", loss)

    shared = data()
    options: dict[str, Any] = {"seeds": 2, "training": FAST, "out": tmp_path, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        audit(shared, STUDENT, attacks=[counted("one"), counted("two", fails=True)], **options)
    calls.clear()
    report = audit(shared, STUDENT, attacks=[counted("one"), counted("two"), counted("three")], **options)
    assert calls == ["two", "three"]
    assert list(report.results) == ["one", "two", "three"]
    # Fewer attacks lose nothing that was found; another attack of the same name is tried again.
    other = Attack("two", "another paper", counted("two").loss)
    report = audit(shared, STUDENT, attacks=[other, counted("four")], **options)
    assert calls == ["two", "three", "two", "four"]
    assert set(report.results) == {"one", "two", "three", "four"}
    assert report.attacks["two"]["paper"] == "another paper"
    assert AuditReport.from_json((tmp_path / "audit.json").read_text()) == report
    report = audit(shared, STUDENT, attacks=[counted("one")], fresh=True, **options)
    assert calls[4:] == ["one"]
    assert list(report.results) == ["one"]


def with_activation(activation: type[nn.Module]) -> nn.Module:
    """`STUDENT` but for its ReLU, with the same weights."""
    flatten, first, _, last = STUDENT().children()
    return nn.Sequential(flatten, first, activation(), last)


def test_resumes_nothing_else(tmp_path: Path) -> None:
    options: dict[str, Any] = {"attacks": ["kd-t4"], "seeds": 2, "out": tmp_path, "progress": False}
    shared = data()
    audit(shared, STUDENT, training=FAST, **options)
    with pytest.raises(ValueError, match=r"audit of something else \(fingerprint, settings differ"):
        audit(shared, STUDENT, training=StudentTraining(steps=3), **options)
    moved = dataclasses.replace(shared, teachers={k: v + 0.1 for k, v in shared.teachers.items()})
    with pytest.raises(ValueError, match=r"something else \(fingerprint differ"):
        audit(moved, STUDENT, training=FAST, **options)
    for other in (nn.Tanh, nn.GELU):  # of the same weights
        with pytest.raises(ValueError, match=r"something else \(fingerprint differ"):
            audit(shared, partial(with_activation, other), training=FAST, **options)
    with pytest.raises(ValueError, match="out must be a folder that can be written to"):
        audit(shared, STUDENT, training=FAST, **options | {"out": tmp_path / "audit.json"})
    (tmp_path / "audit.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot resume from"):
        audit(shared, STUDENT, training=FAST, **options)


def test_another_version_is_not_mixed_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"attacks": ["kd-t4"], "seeds": 2, "out": tmp_path, "progress": False}
    shared = data()
    report = audit(shared, STUDENT, training=FAST, **options)
    assert report.versions["torch"] == torch.__version__
    monkeypatch.setattr("cmim_kernels.audit.run.__version__", "9.9")
    with pytest.raises(ValueError, match=r"something else \(versions differ"):
        audit(shared, STUDENT, training=FAST, **options)


def test_diverged_students_are_reported_as_such(tmp_path: Path) -> None:
    bad = Attack("bad", "none", lambda s, t, y: cross_entropy(s, y) * torch.nan)
    report = audit(data(), STUDENT, attacks=[bad], seeds=2, training=FAST, out=tmp_path, progress=False)
    assert "| bad | every student diverged | every student diverged |" in to_markdown(report)
    assert report.verdict("bayes").startswith("undecided")
    assert "null" in (tmp_path / "audit.json").read_text()


def test_text_for_a_terminal() -> None:
    text = for_terminal("**bold**\n| a | bb |\n|---|---|\n| **long** | 1 |\n- an **item** folded", width=12)
    assert text.split("\n") == [
        "starred",
        "a       bb",
        "------  --",
        "long *  1",
        "- an item",
        "  folded",
    ]
    report = audit(data(), STUDENT, attacks=["kd-t4"], seeds=2, training=FAST, progress=False)
    assert "kd-t4   " in to_text(report)
    assert "25 steps of AdamW" in to_text(report)
    assert "|" not in to_text(report)
    assert "arXiv" not in to_text(report)
    assert max(map(len, to_text(report).split("\n"))) <= 100


@pytest.mark.parametrize("count", [1, 9])
def test_plot(count: int, tmp_path: Path) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    teachers = {f"t{i}": torch.randn(24, 3) for i in range(count)}
    source = data(
        teachers=teachers, extra_logits={name: torch.randn(40, 3) for name in teachers}, queries=None
    )
    report = audit(source, STUDENT, attacks=["kd-t4", "extra-hard"], seeds=2, training=FAST, progress=False)
    axes = figure.subplots()
    plot_audit(report, axes)
    figure.savefig(tmp_path / "plot.png")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(teachers)
    assert len({bars[0].get_facecolor() for bars in axes.containers if hasattr(bars, "patches")}) == count
    heights = [bar.get_height() for bar in axes.patches]
    expected = [100 * report.difference(t, a).mean for t in teachers for a in ("kd-t4", "extra-hard")]
    assert heights == pytest.approx(expected)
