"""What the CMIM teachers of undistillable_digits.py owe to weight, grid, batch and centroids.

One setting is changed at a time. For every variant: the teacher's test accuracy, the largest CMI over all
temperatures on its training and test images, and what the attacks gain over the LS student.
docs/undistillability.md has the table.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import digits_common as common
import torch
import undistillable_digits as digits
from arguments import count
from matplotlib.figure import Figure
from undistillable_digits import Recipe

from cmim_kernels import TemperatureSpectrum
from cmim_kernels.audit import AuditReport, audit
from cmim_kernels.audit.render import for_terminal
from cmim_kernels.audit.stats import Difference

WEIGHT = common.CMI_WEIGHT
VARIANTS = {
    "cross entropy alone": digits.RECIPES["CE"],
    "label smoothing 0.1": digits.RECIPES["LS"],
    "CMIM as it is": digits.RECIPES["CMIM"],
    "weight 1": Recipe(cmi_weight=1.0),
    "weight 10": Recipe(cmi_weight=10.0),
    "weight 100": Recipe(cmi_weight=100.0),
    "weight 10000": Recipe(cmi_weight=10_000.0),
    "weight from the start": Recipe(cmi_weight=WEIGHT, ramp_steps=0),
    "T = 1 alone": Recipe(cmi_weight=WEIGHT, spectrum=TemperatureSpectrum([1.0])),
    "T = 4 alone": Recipe(cmi_weight=WEIGHT, spectrum=TemperatureSpectrum([4.0])),
    "uniform(1, 4)": Recipe(cmi_weight=WEIGHT, spectrum=TemperatureSpectrum.uniform(1.0, 4)),
    "uniform(1, 16)": Recipe(cmi_weight=WEIGHT, spectrum=TemperatureSpectrum.uniform(1.0, 16)),
    "uniform(4, 8)": Recipe(cmi_weight=WEIGHT, spectrum=TemperatureSpectrum.uniform(4.0, 8)),
    "gauss_legendre(1, 4)": Recipe(cmi_weight=WEIGHT, spectrum=TemperatureSpectrum.gauss_legendre(1.0, 4)),
    "2 of each class": Recipe(cmi_weight=WEIGHT, per_class=2),
    "4 of each class": Recipe(cmi_weight=WEIGHT, per_class=4),
    "8 of each class": Recipe(cmi_weight=WEIGHT, per_class=8),
    "32 of each class": Recipe(cmi_weight=WEIGHT, per_class=32),
    "bank, decay 0.5": Recipe(cmi_weight=WEIGHT, bank="ema", decay=0.5),
    "bank, decay 0.9": Recipe(cmi_weight=WEIGHT, bank="ema", decay=0.9),
    "bank, decay 0.99": Recipe(cmi_weight=WEIGHT, bank="ema", decay=0.99),
    "bank, previous epoch": Recipe(cmi_weight=WEIGHT, bank="epoch"),
    "bank, re-estimated": Recipe(cmi_weight=WEIGHT, bank="fixed"),
    "2 of each class, bank 0.9": Recipe(cmi_weight=WEIGHT, per_class=2, bank="ema", decay=0.9),
}
ATTACKS = ("kd-t4", "kd-t10", "dkd-b1", "ttm-g10", "lskd")


def points(gain: Difference) -> str:
    """Mean and interval in percentage points; bold above zero."""
    text = f"{100 * gain.mean:+.1f} [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]"
    return f"**{text}**" if gain.low > 0 else text


def plot(measured: Mapping[str, digits.Curves], report: AuditReport, path: Path) -> None:
    """A row per teacher: its largest CMI on the training images, and what the attacks gain."""
    figure = Figure(figsize=(12, 0.8 + 0.3 * len(measured)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1, 3))
    rows = range(len(measured))
    left.semilogx([curves.train.max() for curves in measured.values()], rows, "o", color="#30323d")
    left.set_xlabel("largest CMI on the training images (nats)")
    left.set_yticks(rows, list(measured))
    left.set_ylim(len(measured) - 0.5, -0.5)
    for i, attack in enumerate(ATTACKS):
        gains = [report.difference(name, attack) for name in measured]
        right.errorbar(
            [100 * gain.mean for gain in gains],
            [row + 0.13 * (i - (len(ATTACKS) - 1) / 2) for row in rows],
            xerr=[100 * (gain.high - gain.mean) if gain.n > 1 else 0.0 for gain in gains],
            fmt="o",
            markersize=3,
            linewidth=1,
            label=attack,
        )
    right.axvline(0, color="black", linewidth=0.8)
    right.set_xlim(-8, 8)  # what lies beyond is in the table
    right.set_xlabel("accuracy of knockoff students over the LS student (points), 95 % t-intervals")
    right.legend(fontsize=8, loc="lower right")
    for axes in (left, right):
        axes.grid(True, color="0.9", linewidth=0.6)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--splits", type=count, default=12)
    parser.add_argument("--steps", type=count, default=600, help="training steps of a teacher")
    parser.add_argument("--out", type=Path, default=Path("out/ablations"))
    options = parser.parse_args()

    torch.set_num_threads(1)  # as undistillable_digits.py
    teachers = digits.train_teachers(VARIANTS, options.splits, options.steps)
    report = audit(
        digits.attacker_data(teachers),
        digits.STUDENT,
        attacks=ATTACKS,
        seeds=options.splits,
        training=digits.STUDENT_TRAINING,
        out=options.out,
        fresh=True,
    )
    lines = [
        "| teacher | test accuracy, % | largest CMI, training | test | " + " | ".join(ATTACKS) + " |",
        "|---" * (4 + len(ATTACKS)) + "|",
    ]
    measured = {name: digits.curves(models) for name, models in teachers.items()}
    for name, curves in measured.items():
        gains = " | ".join(points(report.difference(name, attack)) for attack in ATTACKS)
        peaks = f"{curves.train.max():.1e} | {curves.test.max():.1e}"
        lines.append(f"| {name} | {digits.accuracy_cell(curves)} | {peaks} | {gains} |")
    text = "\n".join(lines)
    (options.out / "ablations.md").write_text(text + "\n")
    plot(measured, report, options.out / "ablations.png")
    print("\n" + for_terminal(text))
    print(f"\nreport: {options.out.resolve() / 'ablations.md'}")
    print(f"plot: {options.out.resolve() / 'ablations.png'}")


if __name__ == "__main__":
    main()
