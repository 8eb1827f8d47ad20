"""Turns the JSON of `pytest benchmarks` into Markdown tables and plots.

    python benchmarks/report.py [JSON ...] [--plots FOLDER] [--update FILE ...]

Prints every table. With --update a file's parts between `<!-- benchmarks: NAME -->` and `<!-- end -->` are
replaced by the table of that name; names of a GPU's tables and plots begin with `cuda-`, those of a second
CPU with its instruction set (`avx512-`). Without JSON files, those in benchmarks/results are read.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullLocator

Result = dict[str, Any]  # extra_info of one benchmark

HERE = Path(__file__).parent
ORDER = [
    "fused",
    "eager vectorised",
    "eager loop",
    "compiled vectorised",
    "compiled loop",
    "moving-average loop",
    "reference",
    "Liger cross entropy",
]
COLOURS = {
    "fused[triton]": "#8fbce6",
    "fused": "#2f6db3",
    "eager vectorised": "#c44e52",
    "eager loop": "#dd8452",
    "compiled vectorised": "#8172b3",
    "compiled loop": "#ccb974",
    "moving-average loop": "#8c8c8c",
}


def load(paths: Iterable[Path]) -> list[Result]:
    results = []
    for path in paths:
        results += [benchmark["extra_info"] for benchmark in json.loads(path.read_text())["benchmarks"]]
    return results


def of_kind(results: list[Result], *kinds: str) -> list[Result]:
    return [r for r in results if r["kind"] in kinds]


def is_fused(contender: str) -> bool:
    return contender.startswith("fused")


def rank(contender: str) -> tuple[int, str]:
    return ORDER.index("fused" if is_fused(contender) else contender), contender


def colour(contender: str) -> str:
    """Triton's has a colour of its own, since it is drawn beside the CUDA kernels."""
    fused = is_fused(contender) and contender != "fused[triton]"
    return COLOURS.get("fused" if fused else contender, "0.4")


def instructions(result: Result) -> str:
    """The CPU's instruction set, by which CPUs are told apart."""
    return str(result["environment"]["cpu_capability"])


def unique(values: Iterable[str]) -> list[str]:
    """In order of first appearance."""
    return list(dict.fromkeys(values))


def seconds(value: float) -> str:
    scaled, unit = next(
        ((value * factor, unit) for factor, unit in ((1e6, "µs"), (1e3, "ms")) if value * factor < 1000),
        (value, "s"),
    )
    return f"{scaled:.3g} {unit}"


def megabytes(value: float) -> str:
    return f"{value / 2**20:.1f}"


def ratio(result: Result, key: str = "paired") -> str:
    p = result.get(key)
    if p is None:
        return ""
    digits = 2 if p["ratio_p50"] < 10 else 0
    low, middle, high = (f"{p[f'ratio_{q}']:.{digits}f}" for q in ("p20", "p50", "p80"))
    return f"{middle} ({low} to {high})"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *rows])


def machine_table(results: list[Result]) -> str:
    """One line a machine, with its versions and the day."""
    lines = []
    for environment in unique(json.dumps(r["environment"], sort_keys=True) for r in results):
        e = json.loads(environment)
        device = f"{e['cpu']}, {e['cores']} cores, {e['threads']} threads, {e['cpu_capability']}"
        if e["gpu"]:
            device += f"; {e['gpu']}, CUDA {e['cuda']}"
        versions = f"torch {e['torch']}, Python {e['python']}, cmim_kernels {e['cmim_kernels']}"
        versions += f", Triton {e['triton']}" if e["triton"] else ""
        lines.append(f"{device}; {e['system']}; {versions}; {e['date']}.")
    return "\n\n".join(lines)


def headline_table(results: list[Result]) -> str:
    """The shapes of the price table without their variations."""
    return price_table(of_kind(results, "shape", "host"))


def price_table(results: list[Result]) -> str:
    """Fused against F.cross_entropy, both ways: a row per shape and variation, CPUs side by side."""
    columns = ["F.cross_entropy", "fused, K = 8", "ratio (20th to 80th percentile)"]
    absent = [""] * len(columns)
    cpus = unique(instructions(r) for r in results)
    rows: dict[str, dict[str, list[str]]] = {}
    for r in of_kind(results, "shape", "host", "variation"):
        if is_fused(r["contender"]) and r["phase"] == "both":
            p = r["paired"]
            name = r["case"] if r["contender"] == "fused[cpu]" else f"{r['case']}, {r['contender']}"
            cells = [seconds(p["baseline_seconds_p50"]), seconds(p["seconds_p50"]), ratio(r)]
            rows.setdefault(name, {})[instructions(r)] = cells
    lines = [[n, *(cell for cpu in cpus for cell in found.get(cpu, absent))] for n, found in rows.items()]
    if len(cpus) > 1:  # a line has to fit a page
        columns = [column for cpu in cpus for column in (f"{cpu}: F.cross_entropy", "fused", "ratio")]
    return markdown(["logits", *columns], lines)


def contender_table(results: list[Result]) -> str:
    """Every contender at every shape: ratios to F.cross_entropy by phase, and the peak memory of both."""
    rows = []
    shapes = of_kind(results, "shape")
    for case in unique(r["case"] for r in shapes):
        here = [r for r in shapes if r["case"] == case]
        for contender in sorted({r["contender"] for r in here}, key=rank):
            phases = {r["phase"]: r for r in here if r["contender"] == contender}
            both = phases.get("both")
            peak = megabytes(both["peak_bytes"]) if both and both["peak_bytes"] is not None else ""
            speed = f"{both['bytes_moved'] / both['paired']['seconds_p50'] / 1e9:.1f}" if both else ""
            ratios = [ratio(phases[p]) if p in phases else "" for p in ("forward", "backward", "both")]
            time = seconds(both["paired"]["seconds_p50"]) if both else ""
            rows.append([f"{case}: {contender}", *ratios, time, speed, peak])
    header = ["logits: contender", "forward", "backward", "both", "time of both", "GB/s", "peak MB"]
    return markdown(header, rows)


def temperatures_table(results: list[Result]) -> str:
    rows = [
        [f"{r['k']}, {r['grid']} grid", seconds(r["paired"]["seconds_p50"]), ratio(r), ratio(r, "doubling")]
        for r in of_kind(results, "temperatures")
    ]
    return markdown(["temperatures", "fused", "ratio to F.cross_entropy", "ratio to half as many"], rows)


def size_table(results: list[Result]) -> str:
    rows = []
    for r in of_kind(results, "size"):
        p = r["paired"]
        times = [seconds(t) for t in (p["baseline_seconds_p50"], p["seconds_p50"], r["copy_seconds"])]
        rows.append([f"{r['n']}x{r['c']}", *times, ratio(r)])
    return markdown(["logits", "F.cross_entropy", "fused", "copy of the logits", "ratio"], rows)


def step_table(results: list[Result]) -> str:
    rows = []
    for r in of_kind(results, "step"):
        p = r["paired"]
        overhead = [f"{100 * (p[f'ratio_{q}'] - 1):+.2f}" for q in ("p20", "p50", "p80")]
        times = [seconds(p["baseline_seconds_p50"]), seconds(p["seconds_p50"])]
        name = f"{r['case']}, {r['contender']}"
        rows.append([name, *times, f"{overhead[1]} % ({overhead[0]} to {overhead[2]})", str(p["pairs"])])
    return markdown(["training step", "F.cross_entropy", "fused", "overhead", "pairs"], rows)


TABLES: dict[str, tuple[str, Callable[[list[Result]], str]]] = {
    "machine": ("", machine_table),
    "headline": ("shape", headline_table),
    "price": ("shape", price_table),
    "contenders": ("shape", contender_table),
    "temperatures": ("temperatures", temperatures_table),
    "size": ("size", size_table),
    "step": ("step", step_table),
}
# errors.py and ceilings.py write the last ones
KNOWN = (*TABLES, "errors-collapse", "errors-regimes", "errors-machine", "ceilings")


# What has a column for each CPU; other tables and plots are of one
SIDE_BY_SIDE = ("headline", "price")


def by_machine(results: list[Result]) -> dict[str, list[Result]]:
    """{prefix of the machine's table and plot names: its results}; the first CPU's names have none."""
    found: dict[str, list[Result]] = {}
    first = next((instructions(r) for r in results if r["device"] == "cpu"), None)
    for r in results:
        of_cpu = "" if instructions(r) == first else f"{instructions(r).lower()}-"
        found.setdefault(of_cpu if r["device"] == "cpu" else f"{r['device']}-", []).append(r)
    return found


def tables(results: list[Result]) -> dict[str, str]:
    """Only those for which there are results: a heading alone says nothing."""
    parts = {}
    for prefix, here in by_machine(results).items():
        device = [r for r in results if r["device"] == here[0]["device"]]
        for name, (kind, table) in TABLES.items():
            if name in SIDE_BY_SIDE and here[0] is not device[0]:
                continue  # it is in the first CPU's
            of = device if name in SIDE_BY_SIDE else here
            text = table(of) if not kind or of_kind(of, kind) else ""
            if text.count("\n") > 1 or not kind:
                parts[prefix + name] = text
    return parts


def update(path: Path, parts: dict[str, str]) -> None:
    """Puts the parts between their marks in a document."""
    text = path.read_text()
    for name in re.findall(r"<!-- benchmarks: ([\w-]+) -->", text):
        if not {name, name.partition("-")[2]} & set(KNOWN):
            raise SystemExit(f"{path} asks for the unknown table {name!r}; there are {', '.join(KNOWN)}")
        if name in parts:
            start = f"<!-- benchmarks: {name} -->\n"
            before, _, rest = text.partition(start)
            after = rest.partition("<!-- end -->")[2]
            text = f"{before}{start}{parts[name]}\n<!-- end -->{after}"
    path.write_text(text)


def is_plotted(result: Result) -> bool:
    """Of the shapes: forward and backward together, of those who compute the loss."""
    others = ("reference", "Liger cross entropy")
    return result["kind"] != "shape" or (result["phase"] == "both" and result["contender"] not in others)


def plot_ratios(points: list[Result], path: Path) -> None:
    """Bars, one group a shape: time of forward and backward in units of F.cross_entropy's."""
    contenders = sorted({r["contender"] for r in points}, key=rank)
    cases = unique(r["case"] for r in points)
    figure, axes = plt.subplots(figsize=(11, 5.5), layout="constrained")
    width = 0.8 / len(contenders)
    for i, contender in enumerate(contenders):
        found = {r["case"]: r["paired"] for r in points if r["contender"] == contender}
        at = [cases.index(case) + (i - (len(contenders) - 1) / 2) * width for case in found]
        middle = [p["ratio_p50"] for p in found.values()]
        error = [
            [p["ratio_p50"] - p["ratio_p20"] for p in found.values()],
            [p["ratio_p80"] - p["ratio_p50"] for p in found.values()],
        ]
        drawn = axes.bar(at, middle, 0.92 * width, yerr=error, color=colour(contender), label=contender)
        labels = [f"{m:.1f}" if m < 10 else f"{m:.0f}" for m in middle]
        axes.bar_label(drawn, labels, fontsize=7, padding=2)
    axes.axhline(1, color="black", linewidth=1)
    axes.text(len(cases) - 0.5, 1.08, "F.cross_entropy ", ha="right", va="bottom", fontsize=8)
    axes.set_xlim(-0.5, len(cases) - 0.5)
    axes.set_yscale("log")
    axes.set_xticks(range(len(cases)), [case.replace(", ", "\n") for case in cases])
    axes.set_ylabel("time in units of F.cross_entropy's (log)")
    axes.set_title("Forward and backward of the CMIM loss, 8 temperatures, float32")
    axes.legend(ncols=3, loc="upper left", fontsize=8)
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 0.1), 8 * high)
    save(figure, path)


def plot_temperatures(points: list[Result], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for contender in unique(r["contender"] for r in points):
        for grid, style in (("uniform", "-"), ("general", "--")):
            line = [r for r in points if r["contender"] == contender and r["grid"] == grid]
            times = [1e3 * r["paired"]["seconds_p50"] for r in line]
            label = f"{contender}, {grid} grid"
            axes.plot([r["k"] for r in line], times, style, marker="o", color=colour(contender), label=label)
    plain = sorted(1e3 * r["paired"]["baseline_seconds_p50"] for r in points)
    axes.axhline(plain[len(plain) // 2], color="black", linewidth=1, label="F.cross_entropy")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([r["k"] for r in points], [str(r["k"]) for r in points])
    axes.set_xlabel("temperatures K")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("forward and backward (ms)")
    axes.set_title(f"Time against the number of temperatures, {points[0]['n']}x{points[0]['c']} logits")
    axes.grid(True, color="0.85", linewidth=0.6)
    axes.legend()
    save(figure, path)


def plot_size(points: list[Result], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for contender in unique(r["contender"] for r in points):
        line = [r for r in points if r["contender"] == contender]
        sizes = [r["n"] * r["c"] for r in line]
        times = [1e3 * r["paired"]["seconds_p50"] for r in line]
        axes.loglog(sizes, times, marker="o", color=colour(contender), label=contender)
    sizes = [r["n"] * r["c"] for r in line]
    plain = [1e3 * r["paired"]["baseline_seconds_p50"] for r in line]
    roof = [1e3 * r["copy_seconds"] for r in line]
    axes.loglog(sizes, plain, marker="s", markersize=4, color="black", label="F.cross_entropy")
    axes.loglog(sizes, roof, linestyle=":", color="0.3", label="roofline: a copy of the logits")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("logits N C")
    axes.set_ylabel("forward and backward (ms)")
    axes.set_title(f"Time against size, {line[0]['c']} classes, 8 temperatures")
    axes.grid(True, color="0.85", linewidth=0.6)
    axes.legend()
    save(figure, path)


def plot_step(points: list[Result], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(9, 2.2), layout="constrained")
    names = ["\n".join([*r["case"].split(", ", 1), r["contender"]]) for r in points]
    overhead = [{q: 100 * (r["paired"][f"ratio_{q}"] - 1) for q in ("p20", "p50", "p80")} for r in points]
    error = [[o["p50"] - o["p20"] for o in overhead], [o["p80"] - o["p50"] for o in overhead]]
    colours = [colour(r["contender"]) for r in points]
    axes.barh(names, [o["p50"] for o in overhead], xerr=error, height=0.5, color=colours, capsize=4)
    axes.axvline(0, color="black", linewidth=1)
    axes.axvline(1, color="#c44e52", linestyle="--", linewidth=1, label="1 %")
    axes.set_xlabel("% longer than with F.cross_entropy (median, 20th to 80th percentile)")
    axes.set_title("Training step with the fused loss")
    axes.legend(loc="upper right")
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


PLOTS = {
    "shape": ("ratio", plot_ratios),
    "temperatures": ("temperatures", plot_temperatures),
    "size": ("size", plot_size),
    "step": ("step", plot_step),
}


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("json", nargs="*", type=Path, help="results (default: all in benchmarks/results)")
    parser.add_argument("--plots", type=Path, default=Path("out/benchmarks"), help="folder for the plots")
    parser.add_argument(
        "--update", nargs="+", type=Path, default=[], help="Markdown files to bring up to date"
    )
    options = parser.parse_args()
    paths = options.json or sorted((HERE / "results").glob("*.json"))
    if not paths:
        parser.error(
            "there are no results yet: run `pytest benchmarks --benchmark-only --benchmark-json=FILE`"
        )
    results = load(paths)
    parts = tables(results)
    for name, table in parts.items():
        print(f"## {name}\n\n{table}\n")
    for path in options.update:
        update(path, parts)
    for prefix, here in by_machine(results).items():
        for kind, (name, plot) in PLOTS.items():
            path = options.plots / f"{prefix}{name}.png"
            points = [r for r in of_kind(here, kind) if is_plotted(r)]
            if points:
                plot(points, path)
                print(f"plot: {path}", file=sys.stderr)
            elif of_kind(here, kind):
                print(f"no plot {path}: no contender has a time of forward and backward", file=sys.stderr)


if __name__ == "__main__":
    main()
