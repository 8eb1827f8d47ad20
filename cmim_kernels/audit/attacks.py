"""The attacks: how a student may learn from a teacher's logits, each a small function that names its paper.

An attack's loss sees every student at once. Shapes, with R students (one per seed and teacher), a batch of B
rows and C classes: student and teacher logits `(R, B, C)`, labels `(R, B)`; it returns one loss per
student, `(R,)`, and may use nothing but operations over the last two dimensions, so that students never see
one another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import check_name

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
QueryLoss = Callable[[Tensor, Tensor], Tensor]
Prepare = Callable[[Tensor, Tensor], Tensor]

Threat = Literal["published", "adaptive", "leakage"]
Queries = Literal["none", "mixup", "extra"]


@dataclass(frozen=True)
class Attack:
    """One way of teaching a student from a teacher's logits.

    Args:
        name: what the report and the command line call it.
        paper: where it comes from.
        loss: `(student (R, B, C), teacher (R, B, C), labels (R, B)) -> (R,)` on the attacker's labelled
            data.
        prepare: what the attacker does to the teacher's logits before training,
            `(logits (R, N, C), labels (R, N)) -> (R, N, C)`; None leaves them as they are.
        queries: `mixup` asks the teacher about mixtures of the attacker's inputs, `extra` about further
            unlabelled inputs. Both need `query_loss`.
        query_loss: `(student (R, B, C), teacher (R, B, C)) -> (R,)` on the queries' answers, added to
            `loss`.
        threat: `published` and `adaptive` attacks decide the verdict; `leakage` is another threat (the
            teacher labels data for the attacker) and is reported apart.
    """

    name: str
    paper: str
    loss: Loss
    prepare: Prepare | None = None
    queries: Queries = "none"
    query_loss: QueryLoss | None = None
    threat: Threat = "published"

    def __post_init__(self) -> None:
        check_name("attacks", self.name)
        if self.queries not in ("none", "mixup", "extra"):
            raise ValueError(f"queries must be 'none', 'mixup' or 'extra', got {self.queries!r}")
        if self.threat not in ("published", "adaptive", "leakage"):
            raise ValueError(f"threat must be 'published', 'adaptive' or 'leakage', got {self.threat!r}")
        if (self.queries == "none") != (self.query_loss is None):
            raise ValueError(
                f"attack {self.name!r}: query_loss and queries={self.queries!r} must be given together"
            )


_REGISTRY: dict[str, Attack] = {}


def register_attack(attack: Attack) -> Attack:
    """Makes an attack known by its name, for `audit(attacks=...)` and the command line; returns it.

    Raises:
        ValueError: the name is taken by another attack.
    """
    if _REGISTRY.get(attack.name, attack) != attack:
        raise ValueError(f"an attack named {attack.name!r} is registered already")
    _REGISTRY[attack.name] = attack
    return attack


def registered_attacks() -> dict[str, Attack]:
    """Every registered attack by name, in order of registration."""
    return dict(_REGISTRY)


def resolve_attacks(wanted: Iterable[str | Attack] | None) -> list[Attack]:
    """Names and attacks -> attacks; None means every registered one.

    Raises:
        TypeError: one name by itself.
        ValueError: a name that is not registered, the same name twice, or an empty selection.
    """
    if wanted is None:
        return list(_REGISTRY.values())
    if isinstance(wanted, str):
        raise TypeError(f"attacks must be a sequence of names and attacks, got the string {wanted!r}")
    chosen: list[Attack] = []
    for item in wanted:
        if isinstance(item, Attack):
            chosen.append(item)
        elif item in _REGISTRY:
            chosen.append(_REGISTRY[item])
        else:
            raise ValueError(f"no attack is named {item!r}; the registered ones are {', '.join(_REGISTRY)}")
    names = [attack.name for attack in chosen]
    if not names:
        raise ValueError("attacks must name at least one attack")
    if len(set(names)) != len(names):
        raise ValueError(f"attacks must be distinct, got {', '.join(names)}")
    return chosen


# ---------------------------------------------------------------------------------------- the building blocks


def cross_entropy(student: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross entropy of each student, (R, B, C), (R, B) -> (R,)."""
    rows = F.cross_entropy(
        student.flatten(0, 1), labels.flatten(), reduction="none", label_smoothing=label_smoothing
    )
    return rows.view(labels.shape).mean(1)


def kl_rows(target_log: Tensor, student_log: Tensor) -> Tensor:
    """KL(target || student) of each row's log-probabilities, (R, B, C) twice -> (R, B)."""
    # A target of probability 0 contributes 0, also where its logarithm is -inf.
    return torch.where(target_log.isneginf(), 0.0, target_log.exp() * (target_log - student_log)).sum(-1)


def kl(target_log: Tensor, student_log: Tensor) -> Tensor:
    """Mean KL(target || student) of log-probabilities, (R, B, C) twice -> (R,)."""
    return kl_rows(target_log, student_log).mean(-1)


def soft_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL at a temperature shared by both sides, (R, B, C) twice -> (R,)."""
    target = F.log_softmax(teacher / temperature, -1)
    return temperature**2 * kl(target, F.log_softmax(student / temperature, -1))


def kd(temperature: float, share: float = 0.9) -> Loss:
    """Hinton et al.: (1 - share) CE + share T^2 KL(teacher || student), both at temperature T."""

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return (1 - share) * cross_entropy(student, labels) + share * soft_kl(student, teacher, temperature)

    return loss


def dkd(temperature: float, alpha: float, beta: float) -> Loss:
    """Zhao et al.: KL split into the target's share and the distribution over the other classes."""

    def split(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        log = F.log_softmax(logits / temperature, -1)
        own = F.one_hot(labels, log.shape[-1]).bool()
        target = log.gather(-1, labels.unsqueeze(-1))
        rest = log.masked_fill(own, -torch.inf).logsumexp(-1, keepdim=True)
        # A finite stand-in for the target's entry: its probability is 0 on both sides, and so is its
        # gradient.
        others = F.log_softmax((logits / temperature).masked_fill(own, -1e4), -1)
        return torch.cat((target, rest), -1), others

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        student_pair, student_others = split(student, labels)
        teacher_pair, teacher_others = split(teacher, labels)
        distance = alpha * kl(teacher_pair, student_pair) + beta * kl(teacher_others, student_others)
        return cross_entropy(student, labels) + temperature**2 * distance

    return loss


def _pearson(a: Tensor, b: Tensor, dim: int) -> Tensor:
    a = a - a.mean(dim, keepdim=True)
    b = b - b.mean(dim, keepdim=True)
    return F.cosine_similarity(a, b, dim=dim)


def dist(temperature: float, beta: float, gamma: float) -> Loss:
    """Huang et al.: 1 - Pearson correlation of the probabilities, within rows and within columns."""

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
        inter = 1 - _pearson(p, q, -1).mean(-1)
        intra = 1 - _pearson(p, q, -2).mean(-1)
        return cross_entropy(student, labels) + temperature**2 * (beta * inter + gamma * intra)

    return loss


def ttm(gamma: float, beta: float, weighted: bool = False) -> Loss:
    """Zheng and Yang: KL(p^gamma normalised || student at T = 1); WTTM weighs each row by sum_j p_j^gamma."""

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        log_p = F.log_softmax(teacher, -1)
        target = F.log_softmax(gamma * log_p, -1)
        rows = kl_rows(target, F.log_softmax(student, -1))
        if weighted:
            rows = rows * (gamma * log_p).logsumexp(-1).exp()
        return cross_entropy(student, labels) + beta * rows.mean(-1)

    return loss


def standardise(logits: Tensor) -> Tensor:
    """Each row to mean 0 and standard deviation 1 over the classes."""
    return (logits - logits.mean(-1, keepdim=True)) / logits.std(-1, keepdim=True).clamp(min=1e-6)


def lskd(temperature: float, weight: float, ce_weight: float) -> Loss:
    """Sun et al.: KD between standardised logits, so that the student need not match the teacher's scale."""

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        distance = soft_kl(standardise(student), standardise(teacher), temperature)
        return ce_weight * cross_entropy(student, labels) + weight * distance

    return loss


def generalised_js(temperature: float, beta: float, share: float = 0.9) -> Loss:
    """Agarwal et al.: beta KL(P || M) + (1 - beta) KL(Q || M), M = beta P + (1 - beta) Q, teacher P."""

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        p, q = F.log_softmax(teacher / temperature, -1), F.log_softmax(student / temperature, -1)
        mixture = torch.logaddexp(p + math.log(beta), q + math.log1p(-beta))
        # Divided by beta (1 - beta): the divergence's curvature, so that every beta pulls about as hard as KL
        # does.
        divergence = (beta * kl(p, mixture) + (1 - beta) * kl(q, mixture)) / (beta * (1 - beta))
        return (1 - share) * cross_entropy(student, labels) + share * temperature**2 * divergence

    return loss


# ------------------------------------------------------------------ what an adaptive attacker does beforehand


def class_means(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean logits of each row's label, (R, N, C) twice: all that a fully collapsed teacher teaches."""
    one_hot = F.one_hot(labels, logits.shape[-1]).to(logits.dtype)  # (R, N, C)
    sums = one_hot.transpose(1, 2) @ logits  # (R, C, C)
    means = sums / one_hot.sum(1).clamp(min=1).unsqueeze(-1)
    return means.gather(1, labels.unsqueeze(-1).expand_as(logits))


def match_entropy(fraction: float) -> Prepare:
    """Divides each teacher's logits by one temperature, found by bisection, so that the mean entropy of its
    softmax is `fraction * log C`: undoes any choice of scale.
    """

    def prepare(logits: Tensor, labels: Tensor) -> Tensor:
        logits = logits - logits.amax(-1, keepdim=True)
        goal = fraction * math.log(logits.shape[-1])
        low = torch.full_like(logits[:, :1, :1], -10.0)  # (R, 1, 1), log inverse temperature
        high = torch.full_like(low, 10.0)
        for _ in range(40):
            middle = (low + high) / 2
            scaled = F.log_softmax(middle.exp() * logits, -1)
            entropy = -(scaled.exp() * scaled.clamp(min=-1e30)).sum(-1).mean(-1)[:, None, None]
            low, high = torch.where(entropy > goal, middle, low), torch.where(entropy > goal, high, middle)
        return low.exp() * logits

    return prepare


def amplify(ratio: float) -> Prepare:
    """Scales every row's deviation from its class mean by one gain per teacher, so that the deviations' root
    mean square is `ratio` times that of the class means' own spread: undoes the collapse, as far as
    anything is left. Where nothing is but what the logits round by, the class means.
    """

    def prepare(logits: Tensor, labels: Tensor) -> Tensor:
        logits = logits - logits.mean(-1, keepdim=True)
        means = class_means(logits, labels)
        residual = logits - means
        spread = (means - means.mean(1, keepdim=True)).square().mean((1, 2), keepdim=True).sqrt()
        size = residual.square().mean((1, 2), keepdim=True).sqrt()
        rounding = 4 * torch.finfo(logits.dtype).eps * logits.abs().amax((1, 2), keepdim=True)
        gain = torch.where(size > rounding, ratio * spread / size, 0)
        return means + residual * gain

    return prepare


# ----------------------------------------------------------------------------------------------- the registry

HINTON = "Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, arXiv 1503.02531"
DKD = "Zhao et al.: Decoupled Knowledge Distillation, CVPR 2022, arXiv 2203.08679"
DIST = "Huang et al.: Knowledge Distillation from A Stronger Teacher, NeurIPS 2022, arXiv 2205.10536"
TTM = "Zheng, Yang: Knowledge Distillation Based on Transformed Teacher Matching, ICLR 2024, arXiv 2402.11148"
LSKD = "Sun et al.: Logit Standardization in Knowledge Distillation, CVPR 2024, arXiv 2403.01427"
MIXKD = (
    "Liang et al.: MixKD: Towards Efficient Distillation of Large-scale Language Models, ICLR 2021, "
    "arXiv 2011.00593"
)
GKD = "Agarwal et al.: On-Policy Distillation of Language Models, ICLR 2024, arXiv 2306.13649"
OWN = "adaptive attacker of this library, with the loss of arXiv 1503.02531"
LEAKAGE = "label leakage: the teacher as a labelling service, with the loss of arXiv 1503.02531"


def _only_soft(temperature: float) -> QueryLoss:
    return lambda student, teacher: soft_kl(student, teacher, temperature)


def _hard_labels(student: Tensor, teacher: Tensor) -> Tensor:
    return cross_entropy(student, teacher.argmax(-1))


for _attack in (
    Attack("kd-t1", HINTON, kd(1.0)),
    Attack("kd-t4", HINTON, kd(4.0)),
    Attack("kd-t10", HINTON, kd(10.0)),
    Attack("kd-t20", HINTON, kd(20.0)),
    Attack("dkd-b1", DKD, dkd(4.0, alpha=1.0, beta=1.0)),
    Attack("dkd-b8", DKD, dkd(4.0, alpha=1.0, beta=8.0)),
    Attack("dist-t1", DIST, dist(1.0, beta=2.0, gamma=2.0)),
    Attack("dist-t4", DIST, dist(4.0, beta=2.0, gamma=2.0)),
    Attack("ttm-g4", TTM, ttm(1 / 4, beta=9.0)),
    Attack("ttm-g10", TTM, ttm(1 / 10, beta=9.0)),
    Attack("wttm-g10", TTM, ttm(1 / 10, beta=9.0, weighted=True)),
    Attack("lskd", LSKD, lskd(2.0, weight=9.0, ce_weight=0.1)),
    Attack("gkd-b0.1", GKD, generalised_js(4.0, beta=0.1)),
    Attack("gkd-b0.5", GKD, generalised_js(4.0, beta=0.5)),
    Attack("gkd-b0.9", GKD, generalised_js(4.0, beta=0.9)),
    Attack("mixkd", MIXKD, kd(4.0), queries="mixup", query_loss=_only_soft(4.0)),
    Attack("class-means", OWN, kd(4.0), prepare=class_means, threat="adaptive"),
    Attack("rescale-0.3", OWN, kd(1.0), prepare=match_entropy(0.3), threat="adaptive"),
    Attack("rescale-0.6", OWN, kd(1.0), prepare=match_entropy(0.6), threat="adaptive"),
    Attack("amplify-0.3", OWN, kd(4.0), prepare=amplify(0.3), threat="adaptive"),
    Attack("amplify-1", OWN, kd(4.0), prepare=amplify(1.0), threat="adaptive"),
    Attack("extra-soft", LEAKAGE, kd(4.0), queries="extra", query_loss=_only_soft(4.0), threat="leakage"),
    Attack("extra-hard", LEAKAGE, kd(4.0), queries="extra", query_loss=_hard_labels, threat="leakage"),
):
    register_attack(_attack)
