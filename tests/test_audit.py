"""The audit: its statistics, students, verdicts, files, resumption, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cmim_kernels.audit import (
    Attack,
    AuditData,
    AuditReport,
    StudentTraining,
    audit,
    load_audit_data,
    mlp,
    registered_attacks,
    to_markdown,
)
from cmim_kernels.audit.__main__ import main
from cmim_kernels.audit.attacks import cross_entropy
from cmim_kernels.audit.data import LABELS_ONLY
from cmim_kernels.audit.stats import holm, paired_difference, t_cdf, t_quantile
from cmim_kernels.audit.students import Students, batches, take

FAST = StudentTraining(steps=25, lr=2e-2)
STUDENT = mlp(6, [8], 3)


def clusters(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Three overlapping clouds in six dimensions."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (n,), generator=g)
    centres = 1.2 * torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    return centres[labels] + torch.randn(n, 6, generator=g), labels


def bayes_logits(x: Tensor) -> Tensor:
    """A teacher that knows how the clouds were made."""
    centres = 1.2 * torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    return -0.5 * (x.unsqueeze(-2) - centres).square().sum(-1)


def data(**changes: Any) -> AuditData:
    inputs, labels = clusters(24, 1)
    extra, _ = clusters(40, 3)
    test_inputs, test_labels = clusters(400, 2)
    fields: dict[str, Any] = {
        "inputs": inputs,
        "labels": labels,
        "teachers": {"bayes": bayes_logits(inputs), "noise": torch.randn(24, 3) * 8},
        "test_inputs": test_inputs,
        "test_labels": test_labels,
        "extra_inputs": extra,
        "extra_logits": {"bayes": bayes_logits(extra), "noise": torch.randn(40, 3) * 8},
        "queries": {"bayes": bayes_logits, "noise": bayes_logits},
    }
    return AuditData(**(fields | changes))


# ------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("df", [1, 2, 3, 4, 7, 11, 30])
def test_students_t_against_scipy(df: int) -> None:
    t = pytest.importorskip("scipy.stats").t
    for x in (-3.0, 0.0, 0.7, 2.0, 40.0):
        assert t_cdf(x, df) == pytest.approx(t.cdf(x, df), abs=1e-13)
    assert t_quantile(0.975, df) == pytest.approx(t.ppf(0.975, df), rel=1e-10)


def test_paired_difference() -> None:
    d = paired_difference([0.91, 0.93, 0.95], [0.90, 0.90, 0.90])
    assert d.mean == pytest.approx(0.03)
    assert d.standard_error == pytest.approx(0.02 / math.sqrt(3))
    assert d.high - d.mean == pytest.approx(4.302652729911275 * d.standard_error)
    assert d.p == pytest.approx(1 - t_cdf(0.03 / d.standard_error, 2))
    assert paired_difference([0.9, math.nan, 0.8], [0.8, 0.1, 0.8]).n == 2
    assert paired_difference([0.9], [0.8]).low == -math.inf
    assert math.isnan(paired_difference([math.nan], [0.8]).mean)


def test_holm() -> None:
    assert holm({"a": 0.01, "b": 0.03, "c": 0.012}, 0.05) == ["a", "c", "b"]
    assert holm({"a": 0.02, "b": 0.5, "c": 0.9}, 0.05) == []


# --------------------------------------------------------------------------------------------------- students


def test_students_trained_together_are_those_trained_alone() -> None:
    x, y = clusters(24, 1)
    together = Students(STUDENT, [3, 4], 2, x.device)
    index = next(batches([3, 4], 24, 128, x.device))
    inputs, labels = x.expand(2, *x.shape), y.expand(2, *y.shape)
    together.train(
        FAST, lambda: cross_entropy(together(take(inputs, index)), take(labels.repeat(2, 1), index))
    )
    found = together(inputs)
    for r, seed in enumerate([3, 4, 3, 4]):
        torch.manual_seed(seed)
        alone = STUDENT()
        optimiser = torch.optim.AdamW(alone.parameters(), lr=FAST.lr, weight_decay=FAST.weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, FAST.steps)
        for _ in range(FAST.steps):
            optimiser.zero_grad()
            nn.functional.cross_entropy(alone(x), y).backward()
            optimiser.step()
            schedule.step()
        torch.testing.assert_close(found[r], alone(x), rtol=1e-3, atol=1e-3)


def test_accuracy_in_chunks_and_of_the_diverged() -> None:
    x, y = clusters(50, 1)
    students = Students(STUDENT, [0, 1], 1, x.device)
    inputs, labels = x.expand(2, *x.shape), y.expand(2, *y.shape)
    whole = students.accuracy(inputs, labels)
    torch.testing.assert_close(students.accuracy(inputs, labels, chunk=7), whole)
    with torch.no_grad():
        students.parameters()[0][1] = torch.nan
    now = students.accuracy(inputs, labels)
    assert now[0] == whole[0]
    assert now[1].isnan()


def test_batches_are_each_seeds_own_epochs() -> None:
    draws = batches([0, 1], 10, 4, torch.device("cpu"))
    first, second = next(draws), next(draws)
    assert first.shape == (2, 4)
    assert not torch.equal(first[0], first[1])
    assert len(set(first[0].tolist() + second[0].tolist())) == 8
    assert torch.equal(next(batches([0, 1], 10, 4, torch.device("cpu"))), first)


def test_running_statistics_are_refused() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))

    with pytest.raises(ValueError, match="keeps running statistics"):
        audit(data(), make, attacks=["kd-t4"], seeds=2, training=FAST, progress=False)


def test_students_of_any_kind() -> None:
    def make() -> nn.Module:
        return nn.Sequential(
            nn.Unflatten(1, (1, 6)),
            nn.Conv1d(1, 4, 3),
            nn.GroupNorm(2, 4),
            nn.Flatten(),
            nn.Dropout(0.1),
            nn.Linear(16, 3),
        )

    reports = [
        audit(data(), make, attacks=["kd-t4"], seeds=2, training=FAST, progress=False) for _ in range(2)
    ]
    assert reports[0].results["kd-t4"]["bayes"] == reports[1].results["kd-t4"]["bayes"]  # dropout is seeded


# -------------------------------------------------------------------------------------------------- the audit


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


def made_report(**accuracies: list[float]) -> AuditReport:
    """One teacher with these accuracies under attacks of these names; labels-only students at 0.9."""
    seeds = list(range(6))
    return AuditReport(
        teachers=["t"],
        seeds=seeds,
        label_smoothing=0.1,
        settings={},
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
    assert made_report(a=BETTER, b=WORSE).verdict("t").startswith("distillable: 1 of 2 attacks beat")
    assert made_report(a=WORSE, b=WORSE).verdict("t").startswith("undistillable by these 2 attacks")
    assert made_report(a=WORSE, leak=BETTER).verdict("t").startswith("undistillable by these 1 attacks")
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


def test_a_good_teacher_is_found_distillable() -> None:
    training = StudentTraining(steps=150, lr=2e-2)
    report = audit(
        data(), mlp(6, [32], 3), attacks=["kd-t1", "kd-t4"], seeds=5, training=training, progress=False
    )
    assert report.verdict("bayes").startswith("distillable")
    assert not report.verdict("noise").startswith("distillable")


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
    audit(shared, STUDENT, attacks=[counted("one")], fresh=True, **options)
    assert calls == ["two", "three", "one"]


def test_resumes_nothing_else(tmp_path: Path) -> None:
    options: dict[str, Any] = {"attacks": ["kd-t4"], "seeds": 2, "out": tmp_path, "progress": False}
    shared = data()
    audit(shared, STUDENT, training=FAST, **options)
    with pytest.raises(ValueError, match=r"audit of something else \(fingerprint, settings differ\)"):
        audit(shared, STUDENT, training=StudentTraining(steps=3), **options)
    moved = dataclasses.replace(shared, teachers={k: v + 0.1 for k, v in shared.teachers.items()})
    with pytest.raises(ValueError, match=r"something else \(fingerprint differ\)"):
        audit(moved, STUDENT, training=FAST, **options)
    (tmp_path / "audit.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot resume from"):
        audit(shared, STUDENT, training=FAST, **options)


def nan_logits() -> AuditData:
    logits = data().teachers["bayes"].clone()
    logits[3, 1] = torch.nan
    return data(teachers={"bayes": logits}, extra_inputs=None, extra_logits=None, queries=None)


@pytest.mark.parametrize(
    ("error", "message", "make"),
    [
        (ValueError, r"teachers\['bayes'\] must be finite, got 1 entries", nan_logits),
        (
            ValueError,
            r"must have shape \(24, 3\), got \(23, 3\)",
            lambda: data(teachers={"a": torch.zeros(23, 3)}),
        ),
        (
            TypeError,
            "must be a floating point tensor",
            lambda: data(teachers={"a": torch.zeros(24, 3).long()}),
        ),
        (TypeError, "teachers must map names", lambda: data(teachers=torch.zeros(24, 3))),
        (ValueError, "at least one teacher", lambda: data(teachers={})),
        (
            ValueError,
            "no teacher may be named 'labels only'",
            lambda: data(teachers={LABELS_ONLY: torch.zeros(24, 3)}),
        ),
        (ValueError, r"labels must lie in \[0, 3\)", lambda: data(labels=torch.full((24,), 3))),
        (TypeError, "labels must be int64", lambda: data(labels=torch.zeros(24))),
        (ValueError, "as many rows as labels", lambda: data(labels=torch.zeros(20, dtype=torch.int64))),
        (TypeError, "inputs must be floating point", lambda: data(inputs=torch.zeros(24, 6).long())),
        (ValueError, "inputs must be finite", lambda: data(inputs=torch.full((24, 6), torch.inf))),
        (ValueError, "test_inputs must have shape", lambda: data(test_inputs=torch.zeros(400, 7))),
        (ValueError, "test_labels", lambda: data(test_labels=torch.zeros(2, 400, dtype=torch.int64))),
        (ValueError, "given together", lambda: data(extra_logits=None)),
        (
            ValueError,
            "extra_logits must name the teachers bayes, noise",
            lambda: data(extra_logits={"bayes": 0}),
        ),
        (ValueError, "queries must name the teachers", lambda: data(queries={})),
    ],
)
def test_bad_data(error: type[Exception], message: str, make: Callable[[], AuditData]) -> None:
    with pytest.raises(error, match=message):
        make()


def test_bad_arguments_and_answers() -> None:
    for options, message in (
        ({"seeds": 0}, "seeds must be"),
        ({"seeds": [1, 1]}, "seeds must be"),
        ({"label_smoothing": 1.0}, "label_smoothing must lie"),
        ({"attacks": ["none such"]}, "no attack is named 'none such'"),
    ):
        with pytest.raises(ValueError, match=message):
            audit(data(), STUDENT, progress=False, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="steps and batch_size"):
        StudentTraining(steps=0)
    with pytest.raises(ValueError, match="lr must be positive"):
        StudentTraining(lr=math.nan)
    bad = data(queries={"bayes": bayes_logits, "noise": lambda x: torch.zeros(len(x), 2)})
    with pytest.raises(ValueError, match=r"the answer of queries\['noise'\] must have shape"):
        audit(bad, STUDENT, attacks=["mixkd"], seeds=2, training=FAST, progress=False)


# ------------------------------------------------------------------------------------------- the command line


def saved(path: Path, **changes: Tensor | None) -> Path:
    source = data()
    entries: dict[str, Any] = {
        name: getattr(source, name) for name in ("inputs", "labels", "test_inputs", "test_labels")
    }
    entries |= {"teacher_logits": source.teachers["bayes"], **changes}
    entries = {name: value for name, value in entries.items() if value is not None}
    if path.suffix == ".npz":
        pytest.importorskip("numpy").savez(path, **{name: value.numpy() for name, value in entries.items()})
    else:
        torch.save(entries, path)
    return path


@pytest.mark.parametrize("suffix", [".pt", ".npz"])
def test_command_line(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = saved(tmp_path / f"teacher{suffix}")
    options = [
        "--attacks",
        "kd-t4",
        "--seeds",
        "2",
        "--steps",
        "5",
        "--hidden",
        "4",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([str(file), *options]) == 0
    out = capsys.readouterr().out
    assert "**teacher**:" in out
    report = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert set(report["results"]) == {"kd-t4"}
    assert main([str(file), *options, "--lr", "0.5"]) == 2
    assert "something else" in capsys.readouterr().err
    assert main([str(file), *options, "--lr", "0.5", "--fresh"]) == 0


def test_command_line_of_the_module() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "cmim_kernels.audit", "--list"],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(result.stdout.splitlines()) == len(registered_attacks())
    assert "kd-t10       published" in result.stdout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None}, "lacks labels"),
        ({"something": torch.zeros(1)}, "holds 'something', which no audit reads"),
        ({"teacher_logits": torch.zeros(20, 3)}, r"must have shape \(24, 3\), got \(20, 3\)"),
        ({"teacher_logits": torch.full((24, 3), torch.nan)}, "must be finite"),
    ],
)
def test_bad_files(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_audit_data(saved(tmp_path / "teacher.pt", **changes))


def test_several_teachers_in_a_file(tmp_path: Path) -> None:
    source = data()
    logits = {f"teachers.{name}": value for name, value in source.teachers.items()}
    extra = {f"extra_logits.{name}": value for name, value in (source.extra_logits or {}).items()}
    file = saved(tmp_path / "t.pt", teacher_logits=None, extra_inputs=source.extra_inputs, **logits, **extra)
    loaded = load_audit_data(file)
    assert loaded.teacher_names == ("bayes", "noise")
    assert loaded.extra_logits is not None
    assert torch.equal(loaded.extra_logits["noise"], source.extra_logits["noise"])  # type: ignore[index]


def test_no_such_file_or_student(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none.pt")]) == 2
    assert "no file" in capsys.readouterr().err
    (tmp_path / "junk.pt").write_text("junk")
    assert main([str(tmp_path / "junk.pt")]) == 2
    assert "neither a .npz archive nor a .pt file" in capsys.readouterr().err
    file = saved(tmp_path / "teacher.pt")
    assert main([str(file), "--student", "nowhere:make"]) == 2
    assert "--student 'nowhere:make'" in capsys.readouterr().err
    assert main([]) == 2


def test_the_documents_code_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import cmim_kernels.audit as package

    text = (Path(__file__).parent.parent / "docs" / "undistillability.md").read_text()
    inputs, labels = torch.randn(20, 64), torch.arange(20) % 10
    names: dict[str, Any] = {
        "torch": torch,
        "inputs": inputs,
        "labels": labels,
        "teacher_logits": torch.randn(20, 10),
        "logits": torch.randn(20, 10),
        "test_inputs": inputs,
        "test_labels": labels,
        "model": nn.Linear(64, 10),
        "loader": [(inputs, labels)],
    }
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        package, "audit", lambda *a: audit(*a, attacks=["mse"], training=FAST, progress=False)
    )
    monkeypatch.setattr("cmim_kernels.audit.attacks._REGISTRY", dict(registered_attacks()))
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(block, names)
    assert load_audit_data(tmp_path / "teacher.pt").num_classes == 10
    assert set(names["report"].results) == {"mse"}
