"""The fused loss on a GPU against what it has to reach; part of benchmarks/gpu_check.sh.

    python benchmarks/gpu_bars.py RESULTS.json BARS.md [CHECK=OUTCOME ...]
    python benchmarks/gpu_bars.py RESULTS.json BARS.md compiled

Puts the bars, and the outcomes of the checks before, into the JSON of `pytest benchmarks` under the key
`gpu_check`, writes them as a table, and ends with 1 where one was missed. The second form then adds the bars
against compiled PyTorch. Compiling takes a while and may be cut short: the table says what was not measured.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.cases import Case
from benchmarks.contenders import CONTENDERS, LossFunction, usable
from benchmarks.environment import environment
from benchmarks.gpu_step import steps
from benchmarks.paired import Timed, paired
from cmim_kernels import fused_cmi_loss

BACKENDS = ("cuda", "triton")
Way = Callable[[LossFunction, Tensor, Tensor], Timed]  # to call it
COMPILED = Case(256, 1000, 1000)


@dataclass(frozen=True)
class Limits:
    """Of the time in units of F.cross_entropy's; None: reported only."""

    graph: float
    eager: float | None
    large: float | None
    roofline_share: float  # to be reached where memory is the limit


LIMITS = {"cuda": Limits(1.0, 1.3, 1.5, 0.75), "triton": Limits(1.5, None, None, 0.60)}


@dataclass(frozen=True)
class Bar:
    """`ratio`: time in units of what `to` says, None until it is measured; met at `limit` or below."""

    what: str
    backend: str
    to: str
    limit: float | None
    seconds: float | None = None
    to_seconds: float | None = None
    ratio: float | None = None

    @property
    def met(self) -> bool | None:
        """None: nobody can say."""
        return None if self.ratio is None or self.limit is None else self.ratio <= self.limit


def batch(n: int, c: int, classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    logits = torch.randn(n, c, device="cuda", dtype=dtype)
    return logits.requires_grad_(), torch.randint(classes, (n,), device="cuda")


def both_ways(loss: LossFunction, logits: Tensor, target: Tensor) -> Timed:
    return Timed(lambda _: torch.autograd.grad(loss(logits, target), logits))


def in_a_graph(loss: LossFunction, logits: Tensor, target: Tensor) -> Timed:
    """Forward and backward captured once; what is timed is a replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(loss(logits, target), logits)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.autograd.grad(loss(logits, target), logits)
    return Timed(lambda _: graph.replay())


def copies(source: Tensor) -> Timed:
    """Reads and writes the tensor once."""
    to = torch.empty_like(source)
    return Timed(lambda _: to.copy_(source))


def against(ours: Timed, baseline: Timed, seconds: float, calls: int = 1) -> tuple[float, float, float]:
    """(seconds, those of `calls` of the baseline, ratio), medians of pairs."""
    result = paired(ours, baseline, budget_seconds=seconds, synchronize=torch.cuda.synchronize)
    return result.seconds_p50, calls * result.baseline_seconds_p50, result.ratio_p50 / calls


def loss_of(backend: str) -> LossFunction:
    return lambda logits, target: fused_cmi_loss(logits, target, backend=backend)


def cross_entropy_bars(backend: str) -> list[Bar]:
    limits = LIMITS[backend]
    cases: list[tuple[str, Way, tuple[int, int], torch.dtype, float | None]] = [
        ("256x1000 in a CUDA graph", in_a_graph, (256, 1000), torch.float32, limits.graph),
        ("256x1000, eager", both_ways, (256, 1000), torch.float32, limits.eager),
        ("4096x1000, float32", both_ways, (4096, 1000), torch.float32, limits.large),
        ("4096x1000, bfloat16", both_ways, (4096, 1000), torch.bfloat16, limits.large),
    ]
    bars = []
    for what, timed, (n, c), dtype, limit in cases:
        data = batch(n, c, c, dtype)
        times = against(timed(loss_of(backend), *data), timed(F.cross_entropy, *data), 1.5)
        bars.append(Bar(what, backend, "F.cross_entropy", limit, *times))
    return bars


def roofline_bars(backend: str) -> list[Bar]:
    """Large vocabularies. The roofline is three passes over the logits and the gradient written, at the rate
    of a copy: the time of two copies, each of which reads once and writes once.
    """
    bars = []
    for n, c in ((8192, 32_768), (4096, 128_256)):
        logits, target = batch(n, c, c, torch.bfloat16)
        ours, copying = both_ways(loss_of(backend), logits, target), copies(logits.detach())
        seconds, roofline, ratio = against(ours, copying, 2.0, calls=2)
        rate = 4 * logits.numel() * logits.element_size() / roofline
        to, limit = f"the roofline, {rate / 1e9:.0f} GB/s", 1 / LIMITS[backend].roofline_share
        bars.append(Bar(f"{n}x{c}, bfloat16", backend, to, limit, seconds, roofline, ratio))
    return bars


def step_bar(backend: str) -> Bar:
    ours, baseline = steps([loss_of(backend), F.cross_entropy])
    times = against(ours, baseline, 8.0)
    return Bar("ResNet-50 training step, batch 256", backend, "F.cross_entropy's", 1.01, *times)


def compiled_bar(backend: str, *times: float) -> Bar:
    return Bar(f"{COMPILED.name}, eager", backend, "torch.compile of plain PyTorch", 0.1, *times)


def compiled_bars(backends: list[str]) -> list[Bar]:
    data = COMPILED.data("cuda")
    compiled = both_ways(CONTENDERS["compiled loop"](COMPILED, "cuda"), *data)
    compiled.run(None)
    ours = {b: both_ways(CONTENDERS[f"fused[{b}]"](COMPILED, "cuda"), *data) for b in backends}
    return [compiled_bar(b, *against(ours[b], compiled, 2.0)) for b in backends]


def report(bars: list[Bar], checks: dict[str, str]) -> str:
    e = environment()
    lines = [
        f"{e['gpu']}, CUDA {e['cuda']}, torch {e['torch']}, cmim_kernels {e['cmim_kernels']}; {e['date']}."
    ]
    lines += ["", "| check | outcome |", "|---|---|", *(f"| {k} | {v} |" for k, v in checks.items())]
    lines += ["", "| forward and backward, K = 8 | backend | ms | in units of | ms | ratio | at most | |"]
    lines += ["|---|---|---:|---|---:|---:|---:|---|"]
    for b in bars:
        times = [milliseconds(b.seconds), b.to, milliseconds(b.to_seconds)]
        words = {True: "met", False: "**missed**", None: ""}
        how = "not measured" if b.ratio is None else words[b.met]
        row = [b.what, b.backend, *times, three_digits(b.ratio), three_digits(b.limit), how]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def milliseconds(seconds: float | None) -> str:
    return three_digits(None if seconds is None else 1e3 * seconds)


def three_digits(number: float | None) -> str:
    return "-" if number is None else f"{number:#.3g}"


def main() -> None:
    results, table, *words = sys.argv[1:]
    path = Path(results)
    data = json.loads(path.read_text()) if path.is_file() else {"benchmarks": []}
    backends = [b for b in BACKENDS if usable([f"fused[{b}]"], "cuda")]
    if not backends:
        raise SystemExit(f"gpu_bars.py: none of {', '.join(BACKENDS)} can be used")
    if words == ["compiled"]:
        before = data.get("gpu_check", {"checks": {}, "bars": []})
        checks = before["checks"]
        bars = [Bar(**{f.name: bar[f.name] for f in fields(Bar)}) for bar in before["bars"]]
        measured = compiled_bars(backends)
        bars = [*(bar for bar in bars if bar.ratio is not None), *measured]
    else:
        checks = dict(word.split("=", 1) for word in words)
        measured = [bar for b in backends for bar in (*cross_entropy_bars(b), *roofline_bars(b), step_bar(b))]
        bars = [*measured, *(compiled_bar(b) for b in backends)]
    data["gpu_check"] = {
        "environment": environment(),
        "checks": checks,
        "bars": [asdict(bar) | {"met": bar.met} for bar in bars],
    }
    path.write_text(json.dumps(data, indent=1) + "\n")
    Path(table).write_text(report(bars, checks))
    judged = [bar.met for bar in measured if bar.met is not None]
    print(f"{sum(judged)} of {len(judged)} bars met")
    sys.exit(not all(judged))


if __name__ == "__main__":
    main()
