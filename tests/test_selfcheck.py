"""What `auto` asks of a GPU backend before it trusts it, of backends that are right and that are not."""

from __future__ import annotations

import subprocess
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import cmim_kernels as ck
from cmim_kernels import __main__ as command
from cmim_kernels import dispatch
from cmim_kernels.backends import cpu
from cmim_kernels.selfcheck import mismatch


def broken(**changed: Any) -> Any:
    """The CPU backend with some of its functions replaced."""
    names = ("unusable", "refuses", "saved_like", "loss", "loss_backward", "class_centroids")
    functions = {name: getattr(cpu, name) for name in names}
    functions["keeps_gradient"] = lambda logits, reduction: False
    return SimpleNamespace(**functions | changed)


def wrong_gradient(*arguments: Any) -> Tensor:
    return 1.001 * cpu.loss_backward(*arguments)


def wrong_loss(*arguments: Any) -> tuple[Tensor, Tensor]:
    value, saved = cpu.loss(*arguments)
    return value + 1e-3, saved


def without_number(*arguments: Any) -> Tensor:
    return cpu.loss_backward(*arguments) * torch.nan


def failing(*arguments: Any) -> Tensor:
    raise subprocess.CalledProcessError(1, "gcc")  # as Triton's own compilers do


def test_a_right_backend_passes() -> None:
    assert mismatch(cpu, "cpu") is None
    with FakeTensorMode():
        assert mismatch(cpu, "cpu") is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"loss_backward": wrong_gradient}, "the gradient is off by 1.0e-03"),
        ({"loss_backward": without_number}, "the gradient is off by nan"),
        ({"loss": wrong_loss}, "the loss is off by"),
        ({"loss_backward": failing}, "it raised CalledProcessError: Command 'gcc' returned"),
    ],
    ids=["gradient", "nan", "loss", "raises"],
)
def test_what_is_wrong_is_said(changed: dict[str, Any], message: str) -> None:
    said = mismatch(broken(**changed), "cpu")
    assert said is not None
    assert message in said
    assert "64x1000" in said


@pytest.mark.parametrize("right", [True, False])
def test_auto_trusts_only_what_passed(right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    candidate = broken() if right else broken(loss_backward=wrong_gradient)
    monkeypatch.setattr(dispatch, "_PREFERENCE", {"cpu": ("cuda",)})
    monkeypatch.setattr(dispatch, "_modules", {"cuda": candidate})
    monkeypatch.setattr(dispatch, "_untrusted_on", {})
    logits = torch.randn(4, 3)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        chosen = dispatch.pick("auto", logits, 8)
        again = dispatch.pick("auto", logits, 8)
    assert chosen is again
    if right:
        assert chosen is candidate
        assert not said
    else:
        assert chosen is None  # the reference
        assert len(said) == 1
        assert "fails its check on this machine" in str(said[0].message)
    assert dispatch.pick("cuda", logits, 8) is candidate  # asked for by name, it is used


def test_auto_asks_no_further_than_it_has_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check of Triton's kernels compiles them."""
    asked = []

    def second(*arguments: Any) -> tuple[Tensor, Tensor]:
        asked.append(arguments)
        return cpu.loss(*arguments)

    only_eight = broken(refuses=lambda logits, temperatures: None if temperatures == 8 else "not so many")
    modules = {"cuda": only_eight, "triton": broken(loss=second)}
    monkeypatch.setattr(dispatch, "_PREFERENCE", {"cpu": ("cuda", "triton")})
    monkeypatch.setattr(dispatch, "_modules", modules)
    monkeypatch.setattr(dispatch, "_untrusted_on", {})
    assert dispatch.pick("auto", torch.randn(4, 3), 8) is modules["cuda"]
    assert not asked
    assert dispatch.pick("auto", torch.randn(4, 3), 9) is modules["triton"]
    assert asked


def test_a_call_that_auto_leaves_to_the_reference_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = broken(refuses=lambda logits, temperatures: f"it serves no {temperatures} temperatures")
    monkeypatch.setattr(dispatch, "_modules", {"cpu": refusing})
    monkeypatch.setattr(dispatch, "_untrusted_on", {("cpu", "cpu"): None})
    monkeypatch.setattr(dispatch, "_warned", set())
    logits, target = torch.randn(4, 3), torch.zeros(4, dtype=torch.int64)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            ck.fused_cmi_loss(logits, target)
    assert len(said) == 1
    assert "reference for this call (cpu: it serves no 8 temperatures)" in str(said[0].message)
    assert said[0].filename == __file__  # the caller's line


@pytest.mark.parametrize("inside", ["vmap", "float64", "meta"])
def test_the_callers_defaults_and_transforms_do_not_matter(
    inside: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_CHECKED_FIRST", ("cpu",))
    logits, target = torch.randn(2, 4, 3), torch.zeros(4, dtype=torch.int64)
    expected = ck.fused_cmi_loss(logits[0], target, backend="cpu")
    monkeypatch.setattr(dispatch, "_untrusted_on", {})
    if inside == "vmap":
        found = torch.vmap(lambda z: ck.fused_cmi_loss(z, target))(logits)[0]
    else:
        before = torch.get_default_dtype()
        try:
            torch.set_default_dtype(torch.float64)
            with torch.device("cpu" if inside == "float64" else "meta"):
                found = ck.fused_cmi_loss(logits[0], target)
        finally:
            torch.set_default_dtype(before)
    torch.testing.assert_close(found, expected)
    assert dispatch.pick("auto", logits[0], 8) is cpu


def test_auto_does_not_choose_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference, taken in passing, would be in the graph for good."""
    monkeypatch.setattr(dispatch, "_untrusted_on", {})
    with FakeTensorMode():
        logits = torch.empty(4, 3, device="cuda")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(RuntimeError, match="call the loss once before"):
            dispatch.pick("auto", logits, 8)
    assert dispatch._untrusted_on == {}


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert command.main([]) == 0
    assert "check against the reference" not in capsys.readouterr().out  # "check" may be in a path
    assert command.main(["--check"]) == 0
    checked = capsys.readouterr().out
    assert "check against the reference" in checked
    assert "cpu        right" in checked
    monkeypatch.setattr(command, "mismatch", lambda backend, device: "everything is wrong")
    assert command.main(["--check"]) == 1
    assert "everything is wrong" in capsys.readouterr().out


def test_auto_is_the_cpu_backend_here() -> None:
    assert dispatch.pick("auto", torch.randn(2, 3), 8) is cpu
    assert ck.available_backends()["cpu"] is None
