"""Trains a small CNN on handwritten digits with cross entropy and with the CMIM loss, and compares the two.

Prints a table of accuracy, CMI and step times, and plots the CMI of the training images against temperature.
The peak of the CMI is sought beyond the training grid, which misleads where a model shifts its scale.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import digits_common as common
import matplotlib
import torch
from arguments import count
from torch import Tensor, nn

from cmim_kernels import TemperatureSpectrum, cmi_spectrum

matplotlib.use("Agg")
import matplotlib.pyplot as plt

EVERY_TEMPERATURE = TemperatureSpectrum.geometric(1 / 30, 1e3, 96)  # inverse temperatures 1e-3 to 30
TABLE_TEMPERATURES = (0.2, 0.5, 1.0, 2.0, 8.0)
LOSSES: dict[str, common.Loss] = {"cross entropy": common.cross_entropy, "CMIM": common.cmim}
COLOURS = {"cross entropy": "#c44e52", "CMIM": "#2f6db3"}


@dataclass(frozen=True)
class Result:
    """One trained model: test accuracy, and the CMI of the training images in nats."""

    accuracy: float
    curve: Tensor  # (96,), over EVERY_TEMPERATURE
    table: Tensor  # (5,), over TABLE_TEMPERATURES

    @property
    def peak(self) -> float:
        return self.curve.max().item()


def evaluate(model: nn.Module, data: common.Digits) -> Result:
    with torch.no_grad():
        logits = model(data.train_images)
        curve = cmi_spectrum(logits, data.train_labels, temperatures=EVERY_TEMPERATURE)
        table = cmi_spectrum(logits, data.train_labels, temperatures=TABLE_TEMPERATURES)
    return Result(common.accuracy(model, data.test_images, data.test_labels), curve, table)


def train_and_evaluate(name: str, seed: int, steps: int) -> Result:
    data = common.load_digits(seed)
    model = common.new_model(seed)
    label = f"{name:<13} seed {seed}"
    common.train(
        model, data.train_images, data.train_labels, LOSSES[name], steps=steps, seed=seed, name=label
    )
    return evaluate(model, data)


def step_times(losses: dict[str, common.Loss], repeats: int = 60, warmup: int = 10) -> dict[str, float]:
    """Median seconds of a training step with each loss, taken in turn so that all meet the same machine."""
    data = common.load_digits(seed=0)
    batches = common.balanced_batches(data.train_labels, seed=0)
    models = {name: common.new_model(seed=0) for name in losses}
    optimizers = {name: common.new_optimizer(model) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in losses}
    for repeat in range(warmup + repeats):
        rows = next(batches)
        images, labels = data.train_images[rows], data.train_labels[rows]
        for name, loss in losses.items():
            start = time.perf_counter()
            common.train_step(models[name], optimizers[name], loss, images, labels, common.RAMP_STEPS)
            if repeat >= warmup:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def spread(values: Sequence[float], form: Callable[[float], str]) -> str:
    """The mean, with the standard deviation where there are several seeds."""
    mean = form(statistics.fmean(values))
    return f"{mean} ± {form(statistics.stdev(values))}" if len(values) > 1 else mean


def percent(x: float) -> str:
    return f"{100 * x:.1f}"


def scientific(x: float) -> str:
    return f"{x:.1e}"


def table(results: dict[str, list[Result]], times: dict[str, float]) -> str:
    rows = [["", *results]]
    rows.append(["test accuracy, %", *(spread([r.accuracy for r in rs], percent) for rs in results.values())])
    rows.append(["largest CMI, nats", *(spread([r.peak for r in rs], scientific) for rs in results.values())])
    for k, temperature in enumerate(TABLE_TEMPERATURES):
        cells = (spread([r.table[k].item() for r in rs], scientific) for rs in results.values())
        rows.append([f"CMI at T = {temperature:g}", *cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    plain = times["F.cross_entropy"]
    lines.append("")
    lines += [
        f"training step with {name:<20} {1e3 * t:7.2f} ms  {t / plain:5.2f} x" for name, t in times.items()
    ]
    return "\n".join(lines)


def plot(results: dict[str, list[Result]], path: Path) -> None:
    """CMI against temperature, one line a seed, the temperatures trained on shaded."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    temperatures = EVERY_TEMPERATURE.temperatures
    trained = common.SPECTRUM.temperatures
    axes.axvspan(min(trained), max(trained), color="0.88", label="temperatures trained on")
    for name, runs in results.items():
        for seed, run in enumerate(runs):
            label = f"{name}: peak {statistics.fmean(r.peak for r in runs):.1e} nats" if seed == 0 else None
            axes.loglog(temperatures, run.curve, color=COLOURS[name], alpha=0.8, label=label)
    axes.set_xlabel("temperature")
    axes.set_ylabel("CMI of the training images (nats)")
    axes.set_title("Spread of the output clusters at every temperature, digits")
    axes.set_xlim(min(temperatures), max(temperatures))
    axes.set_ylim(1e-10, 10)
    axes.grid(True, which="major", color="0.8", linewidth=0.6)
    axes.legend(loc="lower center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=count, default=1, help="how many trainings of each kind (default 1)")
    parser.add_argument(
        "--steps", type=count, default=common.STEPS, help=f"steps of each (default {common.STEPS})"
    )
    parser.add_argument("--output", type=Path, default=Path("out/digits.png"), help="where the plot goes")
    options = parser.parse_args()

    results = {
        name: [train_and_evaluate(name, seed, options.steps) for seed in range(options.seeds)]
        for name in LOSSES
    }
    times = step_times(
        {
            "F.cross_entropy": common.cross_entropy,
            "the fused loss": common.cmim,
            "the eager formulation": common.eager_cmim,
        }
    )
    print()
    print(table(results, times))
    plot(results, options.output)
    print(f"\nplot of the CMI against temperature: {options.output.resolve()}")


if __name__ == "__main__":
    main()
