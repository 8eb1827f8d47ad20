"""An audit's report for people: a Markdown page and a plot."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .data import LABELS_ONLY
from .report import AuditReport
from .stats import Difference

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("#d1495b", "#edae49", "#00798c", "#5b5f97", "#6b8f71", "#30323d")
_THREATS = {
    "published": "Published attacks",
    "adaptive": "Adaptive attackers",
    "leakage": "Label leakage (another threat: the teacher labels further data; not part of the verdict)",
}


def write_report(report: AuditReport, folder: Path) -> None:
    """Writes folder/audit.json and audit.md, and audit.png where matplotlib is installed."""
    report.save(folder)
    (folder / "audit.md").write_text(to_markdown(report))
    if find_spec("matplotlib") is not None and report.results:
        from matplotlib.figure import Figure

        bars = len(report.results) * (len(report.teachers) + 1)
        figure = Figure(figsize=(min(max(10.0, 0.12 * bars), 24.0), 4.5), layout="constrained")
        plot_audit(report, figure.subplots())
        figure.savefig(folder / "audit.png", dpi=150)


def to_markdown(report: AuditReport) -> str:
    """The whole report as a Markdown page; differences in percentage points of test accuracy."""
    settings = report.settings
    runs = "splits, each with its own data and teachers" if settings["data_per_seed"] else "seeds"
    lines = [
        "# Audit: are these teachers undistillable?",
        "",
        *(f"- **{teacher}**: {report.verdict(teacher)}." for teacher in report.teachers),
        "",
        f"The attacker holds {settings['training_rows']} labelled rows of {settings['classes']} classes; "
        f"{settings['test_rows']} test rows; {len(report.seeds)} {runs}. "
        f"LS student (label smoothing {report.label_smoothing:g}): {_accuracy(report.baseline)}. "
        f"Every student: {_training(settings['student_training'])}.",
        "",
        "Differences to the LS student of the same seed in percentage points: mean ± standard error "
        "[95 % t-interval], **bold** where the whole interval lies above zero. Of many such intervals one in "
        "forty lies above zero by chance. The last column is a control: the same loss with a teacher that "
        "knows nothing but the labels; what it gains is the loss's doing, not a teacher's. Beyond chance is "
        "what remains after Holm's correction for the number of attacks and also beats this control.",
    ]
    if not settings["data_per_seed"]:
        lines += [
            "",
            "All seeds share one test set: to the chance of initial weights and batches the intervals add "
            "that of the test rows. They are about these teachers and this attacker's data.",
        ]
    for threat, title in _THREATS.items():
        names = [name for name in report.results if report.attacks[name]["threat"] == threat]
        if names:
            lines += ["", f"## {title}", "", *attack_table(report, names)]
    best, difference = report.best_smoothing()
    lines += [
        "",
        "## Controls: students that never saw a teacher",
        "",
        "| label smoothing | accuracy | against the LS student |",
        "|---|---|---|",
        *(
            f"| {key} | {_accuracy(values)} | {cell(report.control(key))} |"
            for key, values in report.baselines.items()
        ),
        "",
        f"The best of them, chosen on the test data and therefore flattered, is {best}: {cell(difference)}.",
        "",
        "## Papers",
        "",
        *(f"- {name}: {attack['paper']}" for name, attack in report.attacks.items()),
    ]
    if report.skipped:
        lines += ["", "## Not run", "", *(f"- {name}: {reason}" for name, reason in report.skipped.items())]
    return "\n".join(lines) + "\n"


def to_text(report: AuditReport) -> str:
    """The report for a terminal: without the list of papers, see `for_terminal`."""
    return for_terminal(to_markdown(report).split("\n## Papers")[0])


def for_terminal(markdown: str, width: int = 100) -> str:
    """Aligns the columns of Markdown tables, folds long lines, and puts a star where type was bold."""
    lines: list[str] = []
    table: list[list[str]] = []
    for line in [*markdown.replace("**bold**", "starred").split("\n"), ""]:
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            table.append(
                ["" if c == "---" else f"{c.strip('*')} *" if c.startswith("**") else c for c in cells]
            )
            continue
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for row in table:
            ruled = not any(row)
            padded = ("-" * w if ruled else c.ljust(w) for c, w in zip(row, widths, strict=True))
            lines.append("  ".join(padded).rstrip())
        table = []
        indent = "  " if line.startswith("- ") else ""
        lines += textwrap.wrap(line.replace("**", ""), width, subsequent_indent=indent) or [""]
    return "\n".join(lines[:-1])


def attack_table(report: AuditReport, names: Sequence[str]) -> list[str]:
    """Lines of a Markdown table: attacks down; across, the teachers and the labels-only control."""
    columns = [*report.teachers, LABELS_ONLY]
    lines = ["| attack | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in names:
        ran = report.results[name]
        cells = [cell(report.difference(column, name)) if column in ran else "" for column in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def cell(difference: Difference) -> str:
    """One difference in points: mean, standard error, interval; bold above zero."""
    if difference.n == 0:
        return "every student diverged"
    if difference.n == 1:
        return f"{100 * difference.mean:+.1f} (one seed)"
    d = difference
    text = f"{100 * d.mean:+.1f} ± {100 * d.standard_error:.1f} [{100 * d.low:+.1f}, {100 * d.high:+.1f}]"
    if d.left_out:
        text += f" ({d.left_out} diverged)"
    return f"**{text}**" if d.low > 0 else text


def plot_audit(report: AuditReport, axes: Axes) -> None:
    """Bars: every attack's mean difference to the LS student in points, with 95 % intervals."""
    names = list(report.results)
    width = 0.8 / len(report.teachers)
    for i, (teacher, colour) in enumerate(zip(report.teachers, _colours(len(report.teachers)), strict=True)):
        differences = [report.difference(teacher, name) for name in names]
        centres = [k + (i - (len(report.teachers) - 1) / 2) * width for k in range(len(names))]
        axes.bar(
            centres,
            [100 * d.mean for d in differences],
            width,
            yerr=[100 * (d.high - d.mean) if d.n > 1 else 0.0 for d in differences],
            capsize=2,
            color=colour,
            error_kw={"elinewidth": 0.8},
            label=teacher,
        )
    first_leak = next(
        (k for k, name in enumerate(names) if report.attacks[name]["threat"] == "leakage"), None
    )
    if first_leak is not None:
        axes.axvline(first_leak - 0.5, color="grey", linewidth=0.8, linestyle="--")
        axes.annotate(
            "leakage", (first_leak - 0.4, 0.01), xycoords=("data", "axes fraction"), va="bottom", fontsize=8
        )
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_ylabel("accuracy over the LS student (points)")
    what = "splits" if report.settings["data_per_seed"] else "seeds"
    axes.set_title(f"Knockoff students, {len(report.seeds)} {what}, 95 % t-intervals", fontsize=10)
    axes.legend(
        title="teacher", fontsize=8, title_fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), frameon=False
    )


def _colours(count: int) -> list[Any]:
    """Fixed ones for a few teachers, a scale for many."""
    if count <= len(_COLOURS):
        return list(_COLOURS[:count])
    from matplotlib import colormaps

    return [colormaps["turbo"](i / (count - 1)) for i in range(count)]


def _training(student: Mapping[str, float]) -> str:
    return (
        f"{student['steps']} steps of AdamW, {student['batch_size']} rows at most in each, learning rate "
        f"{student['lr']:g} falling to 0, weight decay {student['weight_decay']:g}"
    )


def _accuracy(values: Sequence[float]) -> str:
    mean = sum(values) / len(values)
    return f"{100 * mean:.1f} %"
