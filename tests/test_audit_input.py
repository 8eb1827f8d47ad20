"""What an audit refuses, in Python and on the command line, and what the command line does."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from audit_cases import FAST, STUDENT, bayes_logits, data, saved
from torch import nn

from cmim_kernels.audit import (
    AuditData,
    StudentTraining,
    audit,
    load_audit_data,
    registered_attacks,
)
from cmim_kernels.audit.__main__ import main
from cmim_kernels.audit.data import LABELS_ONLY


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
        (TypeError, "^inputs must be float32.*int64", lambda: data(inputs=torch.zeros(24, 6).long())),
        (TypeError, "test_inputs must be float32", lambda: data(test_inputs=torch.zeros(400, 6).double())),
        (
            ValueError,
            r"teachers\['a'\] must not require grad",
            lambda: data(teachers={"a": torch.zeros(24, 3, requires_grad=True)}),
        ),
        (ValueError, r"without '\|' .* got 'a\|b'", lambda: data(teachers={"a|b": torch.zeros(24, 3)})),
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
    with pytest.raises(ValueError, match="steps must be at least 1"):
        StudentTraining(steps=0)
    bad = data(queries={"bayes": bayes_logits, "noise": lambda x: torch.zeros(len(x), 2)})
    with pytest.raises(ValueError, match=r"the answer of queries\['noise'\] must have shape"):
        audit(bad, STUDENT, attacks=["mixkd"], seeds=2, training=FAST, progress=False)


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
    assert "- teacher: " in out
    report = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert set(report["results"]) == {"kd-t4"}
    assert main([str(file), *options, "--lr", "0.5"]) == 2
    assert "something else" in capsys.readouterr().err
    assert main([str(file), *options, "--lr", "0.5", "--fresh"]) == 0


def test_tuned_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = saved(tmp_path / "teacher.pt")
    options = ["--attacks", "kd-t4", "--seeds", "2", "--steps", "4", "--out", str(tmp_path / "out"), "--tune"]
    assert main([str(file), *options]) == 0
    (found,) = re.findall(r"tuned: --lr (\S+) --weight-decay (\S+)", capsys.readouterr().err)
    training = json.loads((tmp_path / "out" / "audit.json").read_text())["settings"]["student_training"]
    assert found == (f"{training['lr']:g}", f"{training['weight_decay']:g}")


def test_interrupted_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cmim_kernels.audit.__main__.audit", interrupt)
    assert main([str(saved(tmp_path / "teacher.pt")), "--out", "there"]) == 130
    assert "goes on from there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "0"], "seeds must be a positive number"),
        (["--hidden", "0"], "every width must be at least 1"),
        (["--steps", "-1"], "steps must be at least 1"),
        (["--attacks", "kd-t3", "--tune"], "no attack is named 'kd-t3'; the registered ones are kd-t1"),
        (["--label-smoothing", "1"], "label_smoothing must lie in"),
    ],
)
def test_bad_options(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(saved(tmp_path / "teacher.pt")), *options, "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert not captured.out
    assert not (tmp_path / "out").exists()


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
        ({"teachers.teacher": torch.zeros(24, 3)}, "holds teachers of 'teacher' twice"),
        ({"something": torch.zeros(1)}, "holds 'something', which no audit reads"),
        ({"teacher_logits": torch.zeros(20, 3)}, r"must have shape \(24, 3\), got \(20, 3\)"),
        ({"teacher_logits": torch.full((24, 3), torch.nan)}, "must be finite, got 72 entries"),
        ({"teacher_logits": torch.zeros(24, 2)}, r"labels must lie in \[0, 2\), the teachers' classes"),
        ({"labels": torch.zeros(24, dtype=torch.int32)}, "labels must be int64"),
    ],
)
def test_bad_files(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"teacher\.pt.*{message}"):
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
    assert main([str(file), "--student", "math:pi"]) == 2
    assert "--student 'math:pi' must be a function, got float" in capsys.readouterr().err
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
