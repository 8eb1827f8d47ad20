"""Every attack's formula against a plain one, and what all of them share."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cmim_kernels.audit import Attack, register_attack, registered_attacks
from cmim_kernels.audit.attacks import (
    amplify,
    class_means,
    cross_entropy,
    generalised_js,
    match_entropy,
    resolve_attacks,
    standardise,
)

R, B, C = 3, 8, 5


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, R, B, C, generator=g).double() * 2
    labels = torch.randint(0, C, (R, B), generator=g)
    return student.requires_grad_(), teacher, labels


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def published(name: str, s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """The losses of single students as the papers write them, (B, C) logits -> ()."""
    ce = F.cross_entropy(s, y)
    if name.startswith("kd-t") or name in ("mixkd", "extra-soft"):
        T = float(name[4:]) if name.startswith("kd-t") else 4.0
        return 0.1 * ce + 0.9 * T**2 * kl((t / T).softmax(1), (s / T).softmax(1)).mean()
    if name.startswith("dkd"):
        beta, T = float(name[5:]), 4.0
        total = torch.zeros((), dtype=s.dtype)
        for i in range(len(y)):
            p, q = (t[i] / T).softmax(0), (s[i] / T).softmax(0)
            rest = torch.arange(C) != y[i]
            pair = [torch.stack([v[y[i]], v[rest].sum()]) for v in (p, q)]
            others = [v[rest] / v[rest].sum() for v in (p, q)]
            total = total + kl(*pair) + beta * kl(*others)
        return ce + T**2 * total / len(y)
    if name.startswith("dist"):
        T = float(name[6:])
        p, q = (t / T).softmax(1), (s / T).softmax(1)

        def relation(a: Tensor, b: Tensor) -> Tensor:
            return torch.stack(
                [1 - torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(a, b, strict=True)]
            ).mean()

        return ce + T**2 * (2 * relation(p, q) + 2 * relation(p.T, q.T))
    if "ttm" in name:
        gamma = 1 / float(name.split("-g")[1])
        power = t.softmax(1) ** gamma
        rows = kl(power / power.sum(1, keepdim=True), s.softmax(1))
        return ce + 9 * (rows * power.sum(1) if name.startswith("w") else rows).mean()
    if name == "lskd":
        s, t = ((v - v.mean(1, keepdim=True)) / v.std(1, keepdim=True) for v in (s, t))
        return 0.1 * ce + 9 * 4 * kl((t / 2).softmax(1), (s / 2).softmax(1)).mean()
    if name.startswith("gkd"):
        beta = float(name[5:])
        p, q = (t / 4).softmax(1), (s / 4).softmax(1)
        m = beta * p + (1 - beta) * q
        divergence = (beta * kl(p, m) + (1 - beta) * kl(q, m)).mean() / (beta * (1 - beta))
        return 0.1 * ce + 0.9 * 16 * divergence
    raise KeyError(name)


PUBLISHED = [name for name, attack in registered_attacks().items() if attack.threat == "published"]


@pytest.mark.parametrize("name", [*PUBLISHED, "extra-soft"])
def test_the_loss_is_the_papers(name: str, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, labels = batch
    loss = registered_attacks()[name].loss(student, teacher, labels)
    expected = torch.stack([published(name, *one) for one in zip(student, teacher, labels, strict=True)])
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("name", list(registered_attacks()))
def test_students_do_not_see_one_another(name: str, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, labels = batch
    attack = registered_attacks()[name]
    if attack.prepare is not None:
        prepared = attack.prepare(teacher, labels)
        alone = attack.prepare(teacher[1:2], labels[1:2])
        torch.testing.assert_close(prepared[1:2], alone)
        teacher = prepared
    loss = attack.loss(student, teacher, labels)
    if attack.query_loss is not None:
        loss = loss + attack.query_loss(student, teacher)
    assert loss.shape == (R,)
    (grad,) = torch.autograd.grad(loss[1], student)
    assert grad[1].norm() > 0
    assert grad[0].count_nonzero() == grad[2].count_nonzero() == 0


@pytest.mark.parametrize("name", list(registered_attacks()))
def test_extreme_logits_stay_finite(name: str, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    _, teacher, labels = batch
    attack = registered_attacks()[name]
    for scale in (0.0, 300.0):
        student = torch.randn(R, B, C, generator=torch.Generator().manual_seed(1)).requires_grad_()
        logits = scale * teacher.float()
        prepared = logits if attack.prepare is None else attack.prepare(logits, labels)
        loss = attack.loss(student, prepared, labels)
        loss.sum().backward()
        assert student.grad is not None
        assert loss.isfinite().all()
        assert student.grad.isfinite().all()


def test_gkd_near_the_ends_is_kl(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, labels = batch
    p, q = (teacher / 4).softmax(-1), (student / 4).softmax(-1)
    small = generalised_js(4.0, beta=1e-6, share=1.0)(student, teacher, labels)
    torch.testing.assert_close(small, 16 * kl(p, q).mean(-1), rtol=1e-4, atol=0)
    large = generalised_js(4.0, beta=1 - 1e-6, share=1.0)(student, teacher, labels)
    torch.testing.assert_close(large, 16 * kl(q, p).mean(-1), rtol=1e-4, atol=0)


def test_class_means(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    _, teacher, labels = batch
    means = class_means(teacher, labels)
    for r in range(R):
        for i in range(B):
            torch.testing.assert_close(means[r, i], teacher[r, labels[r] == labels[r, i]].mean(0))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_match_entropy_undoes_the_scale(scale: float, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    _, teacher, labels = batch
    prepared = match_entropy(0.3)(scale * teacher, labels)
    p = prepared.softmax(-1)
    entropy = -(p * p.clamp(min=1e-300).log()).sum(-1).mean(-1)
    torch.testing.assert_close(entropy, torch.full((R,), 0.3 * math.log(C)).double(), rtol=1e-4, atol=0)


def test_amplify_restores_a_collapsed_spread(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    _, teacher, labels = batch
    means = class_means(teacher, labels)
    collapsed = means + 1e-6 * (teacher - means)
    torch.testing.assert_close(
        amplify(0.5)(collapsed, labels), amplify(0.5)(teacher, labels), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize(("classes", "rows"), [(7, 33), (10, 64), (100, 500)])
def test_amplify_amplifies_no_rounding(classes: int, rows: int) -> None:
    """A teacher that has collapsed altogether has nothing but class means."""
    labels = torch.arange(rows).remainder(classes)[None]
    logits = (3 * torch.randn(classes, classes))[labels]
    prepare = registered_attacks()["amplify-1"].prepare
    assert prepare is not None
    amplified = prepare(logits, labels)
    assert torch.equal(amplified.argmax(-1), logits.argmax(-1))
    torch.testing.assert_close(amplified, logits - logits.mean(-1, keepdim=True), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["", "a|b", "a\nb", " a"])
def test_names_that_break_a_table(name: str) -> None:
    with pytest.raises(ValueError, match="attacks must have printable names"):
        Attack(name, "paper", lambda s, t, y: s.sum((1, 2)))


def test_helpers(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    student, _, labels = batch
    each = torch.stack(
        [F.cross_entropy(s, y, label_smoothing=0.2) for s, y in zip(student, labels, strict=True)]
    )
    torch.testing.assert_close(cross_entropy(student, labels, 0.2), each)
    assert standardise(torch.zeros(1, 2, C)).isfinite().all()


def test_registry() -> None:
    named = registered_attacks()
    assert all(attack.paper for attack in named.values())
    assert [attack.name for attack in resolve_attacks(["dkd-b1", "kd-t4"])] == ["dkd-b1", "kd-t4"]
    assert [attack.name for attack in resolve_attacks(None)] == list(named)
    with pytest.raises(ValueError, match=r"no attack is named 'kd-t3'; the registered ones are kd-t1, kd-t4"):
        resolve_attacks(["kd-t3"])
    with pytest.raises(ValueError, match="distinct"):
        resolve_attacks(["kd-t4", "kd-t4"])
    with pytest.raises(ValueError, match="at least one"):
        resolve_attacks([])
    own = Attack("kd-t4", "my paper", named["kd-t4"].loss)
    with pytest.raises(ValueError, match="registered already"):
        register_attack(own)
    assert register_attack(named["kd-t4"]) is named["kd-t4"]
    with pytest.raises(ValueError, match="given together"):
        Attack("x", "y", named["kd-t4"].loss, queries="extra")
    with pytest.raises(ValueError, match="threat"):
        Attack("x", "y", named["kd-t4"].loss, threat="bad")  # type: ignore[arg-type]
