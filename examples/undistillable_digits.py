"""Teachers trained with cross entropy, label smoothing and CMIM, and attempts to distil them.

Every split of the data has teachers of its own. The attacker holds 100 of the teacher's 800 training images
with their labels and asks the teacher for its logits; students are 64-64-10 multilayer perceptrons. Every
figure is the accuracy of students that learned from a teacher minus that of students trained alone with label
smoothing 0.1, paired by split: same images, same initial weights. docs/undistillability.md discusses the
result.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import digits_common as common
import torch
import torch.nn.functional as F
from arguments import count
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from cmim_kernels import CentroidBank, CMIMLoss, TemperatureSpectrum
from cmim_kernels.audit import (
    AuditData,
    AuditReport,
    StudentTraining,
    audit,
    mlp,
    plot_audit,
    to_markdown,
    tune_training,
)
from cmim_kernels.audit.render import for_terminal
from cmim_kernels.metrics import StreamingCMI

LABELLED = 100  # images of the attacker, as many of each digit
EXTRA = 300  # further images that the attacker may ask the teacher about, in the leakage attacks only
STUDENT = mlp(64, [64, 64], common.CLASSES)
# What --tune finds for 100 labelled images and 12 splits: the best LS student of a grid, no low bar.
STUDENT_TRAINING = StudentTraining(steps=300, lr=1e-2, weight_decay=1.0)
EVERYWHERE = TemperatureSpectrum.from_inverse([10 ** (-3 + 4.477 * i / 59) for i in range(60)])  # 1e-3 to 30
FEW_ATTACKS = (
    "kd-t4",
    "kd-t10",
    "dkd-b1",
    "dist-t1",
    "dist-t4",
    "ttm-g10",
    "lskd",
    "gkd-b0.5",
    "class-means",
    "rescale-0.6",
    "amplify-0.3",
    "extra-soft",
    "extra-hard",
)
CAVEATS = """\
What this does not show: further queries leak labels from every teacher, CMIM included (last table); a
teacher trained with label smoothing is as accurate as the CMIM one; with all 800 training images in the
attacker's hands (--labelled 800) not even the cross-entropy teacher is worth distilling; the splits share
1797 images, so the intervals are optimistic; the paper's CIFAR-100 and ImageNet are not reproduced here."""


@dataclass(frozen=True)
class Recipe:
    """How a teacher is trained: cross entropy, with label smoothing or CMI added."""

    label_smoothing: float = 0.0
    cmi_weight: float = 0.0
    spectrum: TemperatureSpectrum = common.SPECTRUM
    per_class: int = common.SAMPLES_PER_CLASS
    bank: Literal["ema", "epoch", "fixed"] | None = None  # None: each batch's own centroids
    decay: float = 0.9  # of mode ema
    ramp_steps: int = common.RAMP_STEPS  # cmi_weight grows linearly over these

    def train(self, data: common.Digits, seed: int, steps: int) -> common.SmallCNN:
        """As `digits_common.train`, without a progress bar."""
        model = common.new_model(seed)
        bank = None
        if self.bank is not None:
            bank = CentroidBank(common.CLASSES, temperatures=self.spectrum, mode=self.bank, decay=self.decay)
        criterion = CMIMLoss(temperatures=self.spectrum, label_smoothing=self.label_smoothing, centroids=bank)
        epoch = len(data.train_labels) // (self.per_class * common.CLASSES)

        def loss(logits: Tensor, target: Tensor, step: int) -> Tensor:
            criterion.cmi_weight = self.cmi_weight * min(1.0, step / max(self.ramp_steps, 1))
            if bank is not None and step % epoch == 0:
                if bank.mode == "epoch":
                    bank.end_epoch()
                elif bank.mode == "fixed":
                    bank.reestimate((model(data.train_images), data.train_labels) for _ in range(1))
            return criterion(logits, target)

        optimizer = common.new_optimizer(model)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        batches = common.balanced_batches(data.train_labels, seed, self.per_class)
        for step in range(steps):
            rows = next(batches)
            common.train_step(model, optimizer, loss, data.train_images[rows], data.train_labels[rows], step)
            schedule.step()
        return model.eval()


RECIPES = {
    "CE": Recipe(),
    "LS": Recipe(label_smoothing=0.1),
    "CMIM": Recipe(cmi_weight=common.CMI_WEIGHT),
}


def train_one(job: tuple[Recipe, int, int]) -> dict[str, Tensor]:
    """Weights of one teacher, for a worker process."""
    recipe, seed, steps = job
    torch.set_num_threads(1)
    return recipe.train(common.load_digits(seed), seed, steps).state_dict()


def train_teachers(
    recipes: Mapping[str, Recipe], splits: int, steps: int
) -> dict[str, list[common.SmallCNN]]:
    """Teachers by name, one per split, trained in as many processes as there are cores."""
    jobs = [(name, seed) for seed in range(splits) for name in recipes]
    teachers: dict[str, list[common.SmallCNN]] = {name: [] for name in recipes}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(len(jobs), os.cpu_count() or 1), mp_context=context) as pool:
        weights = pool.map(train_one, [(recipes[name], seed, steps) for name, seed in jobs])
        for name, _ in tqdm(jobs, desc="teachers", unit="model"):
            model = common.SmallCNN()
            model.load_state_dict(next(weights))
            teachers[name].append(model.eval())
    return teachers


@torch.no_grad()
def attacker_data(teachers: dict[str, list[common.SmallCNN]], labelled: int = LABELLED) -> AuditData:
    """What the attacker holds, split by split; the leakage attacks need images that are not labelled."""
    splits = [common.load_digits(seed) for seed in range(len(next(iter(teachers.values()))))]
    own, extra = [], []
    for split in splits:
        one_hot = F.one_hot(split.train_labels, common.CLASSES)
        turn = (one_hot.cumsum(0) * one_hot).sum(1)  # (800,): how many of its digit so far
        order = turn.argsort(stable=True)  # as many of each digit, then the rest
        own.append(order[:labelled])
        extra.append(order[labelled : labelled + EXTRA])

    def answers(models: list[common.SmallCNN], rows: list[Tensor]) -> Tensor:
        return torch.stack([m(s.train_images[r]) for m, s, r in zip(models, splits, rows, strict=True)])

    def ask(models: list[common.SmallCNN]) -> Callable[[Tensor], Tensor]:
        return lambda images: torch.stack([m(x) for m, x in zip(models, images, strict=True)])

    def images(rows: list[Tensor]) -> Tensor:
        return torch.stack([s.train_images[r] for s, r in zip(splits, rows, strict=True)])

    leak = len(extra[0]) > 0
    return AuditData(
        inputs=images(own),
        labels=torch.stack([s.train_labels[r] for s, r in zip(splits, own, strict=True)]),
        teachers={name: answers(models, own) for name, models in teachers.items()},
        test_inputs=torch.stack([s.test_images for s in splits]),
        test_labels=torch.stack([s.test_labels for s in splits]),
        extra_inputs=images(extra) if leak else None,
        extra_logits={name: answers(models, extra) for name, models in teachers.items()} if leak else None,
        queries={name: ask(models) for name, models in teachers.items()},
    )


@dataclass(frozen=True)
class Curves:
    """CMI in nats over `EVERYWHERE`, mean over the splits, and test accuracies, one per split."""

    train: Tensor
    test: Tensor
    accuracies: list[float]


@torch.no_grad()
def curves(models: list[common.SmallCNN]) -> Curves:
    train: list[Tensor] = []
    test: list[Tensor] = []
    accuracies = []
    for seed, model in enumerate(models):
        data = common.load_digits(seed)
        for images, labels, into in (
            (data.train_images, data.train_labels, train),
            (data.test_images, data.test_labels, test),
        ):
            metric = StreamingCMI(common.CLASSES, EVERYWHERE)
            metric.update(model(images), labels)
            into.append(metric.compute().cmi)
        accuracies.append(common.accuracy(model, data.test_images, data.test_labels))
    return Curves(torch.stack(train).mean(0), torch.stack(test).mean(0), accuracies)


def accuracy_cell(measured: Curves) -> str:
    """Mean test accuracy in per cent, with the standard deviation over the splits where there are several."""
    mean = 100 * statistics.fmean(measured.accuracies)
    several = len(measured.accuracies) > 1
    return f"{mean:.1f}" + (f" ± {100 * statistics.stdev(measured.accuracies):.1f}" if several else "")


def teacher_table(measured: dict[str, Curves]) -> str:
    lines = [
        "| teacher | test accuracy, % | largest CMI on the training images, nats | on the test images |",
        "|---|---|---|---|",
    ]
    for name, c in measured.items():
        lines.append(f"| {name} | {accuracy_cell(c)} | {c.train.max():.1e} | {c.test.max():.1e} |")
    return "\n".join(lines)


def plot(measured: dict[str, Curves], report: AuditReport, path: Path) -> None:
    """CMI against inverse temperature, and the students' gains."""
    figure = Figure(figsize=(15, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    grid = common.SPECTRUM.inverse_temperatures
    left.axvspan(min(grid), max(grid), color="0.9", label="trained on")
    for (name, c), colour in zip(measured.items(), ("#d1495b", "#edae49", "#00798c"), strict=True):
        for images, values, line in (("training", c.train, "-"), ("test", c.test, "--")):
            left.loglog(
                EVERYWHERE.inverse_temperatures, values, line, color=colour, label=f"{name}, {images} images"
            )
    left.set_ylim(bottom=1e-12)
    left.set_xlabel("inverse temperature 1/T")
    left.set_ylabel("CMI (nats)")
    left.set_title("Spread of the teachers' output clusters", fontsize=10)
    left.grid(True, which="major", color="0.85", linewidth=0.6)
    left.legend(fontsize=8, loc="lower center")
    plot_audit(report, right)
    figure.savefig(path, dpi=150)


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--splits", type=count, default=8, help="data splits, each with its own teachers (default 8)"
    )
    parser.add_argument(
        "--steps",
        type=count,
        default=common.STEPS,
        help=f"training steps of a teacher (default {common.STEPS})",
    )
    parser.add_argument("--student-steps", type=count, default=STUDENT_TRAINING.steps, help="of a student")
    parser.add_argument(
        "--attacks", nargs="+", default=FEW_ATTACKS, help="names, or all (default: the main ones)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("out/undistillable"), help="where the report and plot go"
    )
    parser.add_argument(
        "--labelled", type=count, default=LABELLED, help="images that the attacker holds (default 100)"
    )
    parser.add_argument(
        "--tune", action="store_true", help="choose the students' learning rate and weight decay anew"
    )
    options = parser.parse_args(None if arguments is None else list(arguments))
    if not 10 <= options.labelled <= 800:
        parser.error("--labelled must lie in [10, 800], the teachers' training images")

    torch.set_num_threads(1)  # tensors so small gain nothing from a second one
    teachers = train_teachers(RECIPES, options.splits, options.steps)
    data = attacker_data(teachers, options.labelled)
    training = dataclasses.replace(STUDENT_TRAINING, steps=options.student_steps)
    if options.tune:
        training = tune_training(data, STUDENT, seeds=options.splits, training=training)
    report = audit(
        data,
        STUDENT,
        attacks=None if list(options.attacks) == ["all"] else options.attacks,
        seeds=options.splits,
        training=training,
        out=options.out,
        fresh=True,
    )
    measured = {name: curves(models) for name, models in teachers.items()}
    text = teacher_table(measured) + "\n\n" + to_markdown(report).replace("# Audit", "## Audit", 1)
    (options.out / "undistillable.md").write_text(text)
    plot(measured, report, options.out / "undistillable.png")
    print("\n" + for_terminal(text.split("\n## Papers")[0]))
    print(CAVEATS)
    print(f"\nreport: {options.out.resolve() / 'undistillable.md'}")
    print(f"plot: {options.out.resolve() / 'undistillable.png'}")


if __name__ == "__main__":
    main()
