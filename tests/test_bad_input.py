"""Whatever is wrong with an argument is said by name, before native code sees it; also without assertions."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Place
from torch import Tensor

import cmim_kernels as ck

N, C, K = 6, 4, 8
LOGITS = torch.linspace(-1, 1, N * C).view(N, C)
TARGET = torch.tensor([0, 1, 1, 2, 2, 2])
CENTROIDS = torch.full((K, C, C), 1 / C)
NAN, INF = float("nan"), float("inf")


def changed(t: Tensor, index: Any, value: float) -> Tensor:
    t = t.clone()
    t[index] = value
    return t


# name: (arguments, error, what its message must hold)
LOSS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "logits_list": ({"logits": [[1.0]]}, TypeError, "logits.*list"),
    "logits_int": ({"logits": LOGITS.long()}, TypeError, "logits.*float32.*int64"),
    "logits_complex": ({"logits": LOGITS.to(torch.complex64)}, TypeError, "logits.*complex64"),
    "logits_sparse": ({"logits": LOGITS.to_sparse()}, TypeError, "logits.*dense.*sparse"),
    "logits_1d": ({"logits": LOGITS[0]}, ValueError, r"logits.*\(N, C\).*\(4,\)"),
    "logits_3d": ({"logits": LOGITS[None]}, ValueError, r"logits.*\(N, C\).*\(1, 6, 4\)"),
    "logits_no_class": ({"logits": LOGITS[:, :0]}, ValueError, r"logits.*C >= 1.*\(6, 0\)"),
    "target_list": ({"target": [0, 1]}, TypeError, "target.*list"),
    "target_int32": ({"target": TARGET.int()}, TypeError, "target.*int64.*int32"),
    "target_probabilities": ({"target": LOGITS.softmax(1)}, TypeError, "target.*int64.*float32"),
    "target_sparse": ({"target": TARGET.to_sparse()}, TypeError, "target.*dense.*sparse"),
    "target_2d": ({"target": TARGET[:, None]}, ValueError, r"target.*\(6,\).*\(6, 1\)"),
    "target_short": ({"target": TARGET[:5]}, ValueError, r"target.*\(6,\).*\(5,\)"),
    "target_device": ({"target": TARGET.to("meta")}, ValueError, "target.*cpu.*meta"),
    "label_high": ({"target": changed(TARGET, 3, C)}, ValueError, r"target.*\[0, 4\).*got 4 at row 3"),
    "label_low": ({"target": changed(TARGET, 0, -1)}, ValueError, r"target.*\[0, 4\).*got -1 at row 0"),
    "label_highest": ({"target": changed(TARGET, 5, 2**63 - 1)}, ValueError, "target.*9223372036854775807"),
    "label_lowest": ({"target": changed(TARGET, 5, -(2**63))}, ValueError, "target.*-9223372036854775808"),
    "label_low_half": ({"target": changed(TARGET, 5, 2**32)}, ValueError, "target.*4294967296"),
    "label_ignored_elsewhere": (
        {"target": changed(TARGET, 1, -100), "ignore_index": -1},
        ValueError,
        "target.*ignore_index = -1.*got -100",
    ),
    "temperature_zero": ({"temperatures": [1.0, 0.0]}, ValueError, "temperatures must lie in.*0.0"),
    "temperature_negative": ({"temperatures": [-1.0]}, ValueError, "temperatures must lie in.*-1.0"),
    "temperature_nan": ({"temperatures": [NAN]}, ValueError, "temperatures must lie in.*nan"),
    "temperature_beyond_floats": ({"temperatures": [10**400]}, ValueError, "temperatures must lie in.*inf"),
    "ce_weight_beyond_floats": ({"ce_weight": 10**400}, ValueError, "ce_weight.*finite"),
    "weight_sparse": ({"weight": torch.ones(C).to_sparse()}, TypeError, "weight.*dense.*sparse"),
    "centroids_sparse": ({"centroids": CENTROIDS.to_sparse()}, TypeError, "centroids.*dense.*sparse"),
    "temperature_infinite": ({"temperatures": [INF]}, ValueError, "temperatures must lie in.*inf"),
    "temperature_subnormal": ({"temperatures": [1e-310]}, ValueError, "temperatures"),
    "temperatures_empty": ({"temperatures": []}, ValueError, "temperatures.*empty"),
    "temperatures_no_numbers": ({"temperatures": ["1"]}, TypeError, "temperatures.*str"),
    "temperatures_bool": ({"temperatures": [True]}, TypeError, "temperatures.*bool"),
    "temperatures_text": ({"temperatures": "12"}, TypeError, "temperatures.*str"),
    "temperatures_number": ({"temperatures": 1.0}, TypeError, "temperatures.*float"),
    "temperatures_2d": ({"temperatures": torch.ones(2, 2)}, ValueError, r"temperatures.*1-D.*\(2, 2\)"),
    "temperatures_0d": ({"temperatures": torch.tensor(1.0)}, ValueError, "temperatures.*1-D"),
    "temperatures_grad": (
        {"temperatures": torch.ones(2, requires_grad=True)},
        ValueError,
        "temperatures must not require grad",
    ),
    "temperatures_device": ({"temperatures": torch.ones(2, device="meta")}, ValueError, "temperatures.*meta"),
    "temperature_weights_length": (
        {"temperature_weights": [1.0]},
        ValueError,
        "temperature_weights.*8.*got 1",
    ),
    "temperature_weights_sign": (
        {"temperature_weights": [1.0] * 7 + [-1.0]},
        ValueError,
        "temperature_weights.*non-negative.*-1.0",
    ),
    "temperature_weights_nan": (
        {"temperature_weights": [NAN] * 8},
        ValueError,
        "temperature_weights.*finite",
    ),
    "ce_weight_negative": ({"ce_weight": -1.0}, ValueError, "ce_weight.*non-negative.*-1.0"),
    "ce_weight_nan": ({"ce_weight": NAN}, ValueError, "ce_weight.*finite.*nan"),
    "cmi_weight_infinite": ({"cmi_weight": INF}, ValueError, "cmi_weight.*finite.*inf"),
    "cmi_weight_tensor": ({"cmi_weight": torch.tensor(1.0)}, TypeError, "cmi_weight.*Tensor"),
    "cmi_weight_bool": ({"cmi_weight": True}, TypeError, "cmi_weight.*bool"),
    "cmi_weight_none": ({"cmi_weight": None}, TypeError, "cmi_weight.*NoneType"),
    "centroids_list": ({"centroids": [1.0]}, TypeError, "centroids.*list"),
    "centroids_dtype": ({"centroids": CENTROIDS.double()}, TypeError, "centroids.*float32.*float64"),
    "centroids_shape": ({"centroids": CENTROIDS[:7]}, ValueError, r"centroids.*\(8, 4, 4\).*\(7, 4, 4\)"),
    "centroids_device": ({"centroids": CENTROIDS.to("meta")}, ValueError, "centroids.*cpu.*meta"),
    "centroids_negative": (
        {"centroids": changed(CENTROIDS, (0, 1, 2), -0.1)},
        ValueError,
        "centroids.*non-negative.*-0.1",
    ),
    "centroids_nan": (
        {"centroids": changed(CENTROIDS, (7, 3, 3), NAN)},
        ValueError,
        "centroids.*finite.*nan",
    ),
    "centroids_infinite": ({"centroids": changed(CENTROIDS, 0, INF)}, ValueError, "centroids.*finite.*inf"),
    "centroids_grad": (
        {"centroids": CENTROIDS.clone().requires_grad_()},
        ValueError,
        "centroids must not require grad",
    ),
    "weight_list": ({"weight": [1.0] * 4}, TypeError, "weight.*list"),
    "weight_int": ({"weight": torch.ones(4, dtype=torch.int64)}, TypeError, "weight.*int64"),
    "weight_wider": ({"weight": torch.ones(4).double()}, TypeError, "weight.*float32.*float64"),
    "weight_length": ({"weight": torch.ones(3)}, ValueError, r"weight.*\(4,\).*\(3,\)"),
    "weight_sign": ({"weight": torch.tensor([1.0, 1, 1, -1])}, ValueError, "weight.*non-negative.*-1"),
    "weight_nan": ({"weight": torch.tensor([1.0, 1, 1, NAN])}, ValueError, "weight.*finite"),
    "weight_grad": (
        {"weight": torch.ones(4, requires_grad=True)},
        ValueError,
        "weight must not",
    ),
    "smoothing_low": ({"label_smoothing": -0.1}, ValueError, r"label_smoothing.*\[0, 1\].*-0.1"),
    "smoothing_high": ({"label_smoothing": 1.1}, ValueError, r"label_smoothing.*\[0, 1\].*1.1"),
    "smoothing_nan": ({"label_smoothing": NAN}, ValueError, r"label_smoothing.*\[0, 1\].*nan"),
    "smoothing_text": ({"label_smoothing": "0"}, TypeError, "label_smoothing.*str"),
    "ignore_index_float": ({"ignore_index": 1.0}, TypeError, "ignore_index.*float"),
    "ignore_index_bool": ({"ignore_index": True}, TypeError, "ignore_index.*bool"),
    "ignore_index_small": (
        {"ignore_index": -(2**63) - 1},
        ValueError,
        "ignore_index.*int64.*-9223372036854775809",
    ),
    "ignore_index_large": ({"ignore_index": 2**63}, ValueError, "ignore_index.*int64.*9223372036854775808"),
    "reduction_unknown": ({"reduction": "avg"}, ValueError, "reduction.*'mean'.*'avg'"),
    "reduction_number": ({"reduction": 1}, ValueError, "reduction.*'mean'.*1"),
    "reduction_none": ({"reduction": None}, ValueError, "reduction.*'none'.*None"),
    "backend_unknown": ({"backend": "gpu"}, ValueError, "backend.*'auto'.*'gpu'"),
    "backend_list": ({"backend": ["cpu"]}, ValueError, "backend.*'auto'"),
}


def call(function: Callable[..., Any], **kwargs: Any) -> Any:
    return function(kwargs.pop("logits", LOGITS), kwargs.pop("target", TARGET), **kwargs)


@pytest.mark.parametrize("name", LOSS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_loss(name: str, backend: str) -> None:
    kwargs, error, message = LOSS[name]
    with pytest.raises(error, match=message):
        call(ck.fused_cmi_loss, **{"backend": backend, **kwargs})


SHARED = {"logits", "target", "temperatures", "ignore_index", "backend"}
OTHERS = [(ck.class_centroids, name) for name, case in LOSS.items() if set(case[0]) <= SHARED]
OTHERS += [(ck.cmi_spectrum, name) for name, case in LOSS.items() if set(case[0]) <= SHARED | {"centroids"}]


@pytest.mark.parametrize(("function", "name"), OTHERS)
def test_other_functions(function: Callable[..., Any], name: str) -> None:
    kwargs, error, message = LOSS[name]
    with pytest.raises(error, match=message):
        call(function, **kwargs)


def test_every_accepted_message_names_its_argument() -> None:
    for name, (kwargs, _, message) in LOSS.items():
        assert any(re.match(argument, message) for argument in kwargs), name


def test_a_backend_that_cannot_be_used_says_why() -> None:
    for backend, reason in ck.available_backends().items():
        if reason is None:
            continue
        with pytest.raises(RuntimeError, match=re.escape(f"backend {backend!r} cannot be used: {reason}")):
            ck.fused_cmi_loss(LOGITS, TARGET, backend=backend)
    with pytest.raises(RuntimeError, match=r"backend 'cpu' cannot be used.*meta"):
        ck.fused_cmi_loss(LOGITS.to("meta"), TARGET.to("meta"), backend="cpu")


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_label_changed_before_backward(place: Place, reduction: str) -> None:
    """It is refused where backward reads the labels again, and changes nothing where the gradient is done."""
    logits = LOGITS.to(place.device, copy=True).requires_grad_()
    target = TARGET.to(place.device, copy=True)
    call = lambda: ck.fused_cmi_loss(logits, target, reduction=reduction, backend=place.name).sum()  # noqa: E731
    (expected,) = torch.autograd.grad(call(), logits)
    value = call()
    target[2] = 77
    try:
        (gradient,) = torch.autograd.grad(value, logits)
    except RuntimeError as error:
        refusal = str(error)
    else:
        torch.testing.assert_close(gradient, expected)
        return
    assert "inplace operation" in refusal


def test_a_centroid_changed_in_place_is_looked_at_again() -> None:
    centroids = CENTROIDS.clone()
    ck.fused_cmi_loss(LOGITS, TARGET, centroids=centroids)
    centroids[0, 0, 0] = NAN
    for _ in range(2):  # a refusal is no approval
        with pytest.raises(ValueError, match="centroids"):
            ck.fused_cmi_loss(LOGITS, TARGET, centroids=centroids)


def test_nothing_is_kept_alive_by_having_been_checked() -> None:
    from cmim_kernels import validate

    before = len(validate._valid)
    for _ in range(5):
        ck.fused_cmi_loss(LOGITS, TARGET, centroids=CENTROIDS.clone(), weight=torch.rand(C))
    assert len(validate._valid) == before


def test_inference_tensors_are_checked_every_time() -> None:
    with torch.inference_mode():
        centroids = CENTROIDS.clone()
        ck.fused_cmi_loss(LOGITS, TARGET, centroids=centroids)
        centroids[0, 0, 0] = -1
        with pytest.raises(ValueError, match="centroids"):
            ck.fused_cmi_loss(LOGITS, TARGET, centroids=centroids)


def test_module_refuses_at_construction() -> None:
    for kwargs in (
        {"cmi_weight": -1.0},
        {"reduction": "avg"},
        {"backend": "gpu"},
        {"label_smoothing": 2.0},
        {"temperatures": []},
        {"temperature_weights": [1.0]},
    ):
        with pytest.raises(ValueError, match=next(iter(kwargs))):
            ck.CMIMLoss(**kwargs)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="centroids"):
        ck.CMIMLoss(centroids="bank")  # type: ignore[arg-type]
    for name, value, error, message in (
        ("weight", [1.0], TypeError, "floating point tensor, got list"),
        ("weight", torch.rand(0), ValueError, r"shape \(C,\) with C >= 1, got \(0,\)"),
        ("centroids", ck.CentroidBank(4, ignore_index=5), ValueError, "ignore.*-100, got .* 5"),
        ("weight", torch.ones(4, dtype=torch.int64), TypeError, "floating point tensor, got a torch.int64"),
        ("weight", -torch.ones(4), ValueError, "non-negative"),
        ("weight", torch.ones(4).to_sparse(), TypeError, "dense tensor, got layout torch.sparse"),
        ("weight", torch.ones(4, 4), ValueError, r"shape \(C,\) .*, got \(4, 4\)"),
        ("centroids", torch.ones(3), ValueError, r"shape \(8, C, C\) .*, got \(3,\)"),
        ("centroids", torch.ones(8, 3, 4), ValueError, r"shape \(8, C, C\) .*, got \(8, 3, 4\)"),
        ("centroids", torch.ones(7, 3, 3), ValueError, r"shape \(8, C, C\) .*, got \(7, 3, 3\)"),
        ("centroids", torch.full((8, 3, 3), torch.nan), ValueError, "finite"),
    ):
        with pytest.raises(error, match=f"{name} must.*{message}"):
            ck.CMIMLoss(**{name: value})  # type: ignore[arg-type]


def test_bank_refuses_at_construction() -> None:
    for kwargs, error in (
        ({"decay": "x"}, TypeError),
        ({"decay": 1.0}, ValueError),
        ({"ignore_index": 1.5}, TypeError),
        ({"backend": "gpu"}, ValueError),
    ):
        with pytest.raises(error, match=next(iter(kwargs))):
            ck.CentroidBank(4, **kwargs)  # type: ignore[arg-type]


def test_without_assertions() -> None:
    """Under `python -O` an `assert` is gone; every check has to be there still."""
    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "import test_bad_input as t\n"
        "for name, (kwargs, error, message) in t.LOSS.items():\n"
        "    for backend in ('auto', 'reference'):\n"
        "        try:\n"
        "            t.call(t.ck.fused_cmi_loss, **{'backend': backend, **kwargs})\n"
        "        except error as raised:\n"
        "            if not t.re.search(message, str(raised)): sys.exit(f'{name}: {raised}')\n"
        "        else:\n"
        "            sys.exit(f'{name}: accepted')\n"
        "print('checked', len(t.LOSS), __debug__)\n"
    )
    root = Path(__file__).parent.parent
    run = subprocess.run(
        [sys.executable, "-O", "-c", code], cwd=root, capture_output=True, text=True, check=False
    )
    assert run.stdout.strip() == f"checked {len(LOSS)} False", run.stdout + run.stderr
