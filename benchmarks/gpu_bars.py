"""The fused loss on a GPU against what it has to reach; part of benchmarks/gpu_check.sh.

    python benchmarks/gpu_bars.py RESULTS.json BARS.md [CHECK=OUTCOME ...]

Puts the bars, and the outcomes of the checks before, into the JSON of `pytest benchmarks` under the key
`gpu_check`, writes them as a table, and ends with 1 where one was missed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.contenders import LossFunction, usable
from benchmarks.environment import environment
from benchmarks.gpu_step import steps
from benchmarks.paired import Timed, paired
from cmim_kernels import fused_cmi_loss

BACKENDS = ("cuda", "triton")
Way = Callable[[LossFunction, Tensor, Tensor], Timed]  # to call it
ROOFLINE_SHARE = 0.75  # to be reached where memory is the limit


@dataclass(frozen=True)
class Bar:
    """`ratio`: time in units of what `to` says; it is met at `limit` or below."""

    what: str
    backend: str
    seconds: float
    to: str
    ratio: float
    limit: float

    @property
    def met(self) -> bool:
        return self.ratio <= self.limit


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


def against(ours: Timed, baseline: Timed, seconds: float) -> tuple[float, float]:
    """(seconds, ratio), medians of pairs."""
    result = paired(ours, baseline, budget_seconds=seconds, synchronize=torch.cuda.synchronize)
    return result.seconds_p50, result.ratio_p50


def loss_of(backend: str) -> LossFunction:
    return lambda logits, target: fused_cmi_loss(logits, target, backend=backend)


def cross_entropy_bars(backend: str) -> list[Bar]:
    to = "F.cross_entropy"
    bars = []
    cases: list[
        tuple[str, Callable[[LossFunction, Tensor, Tensor], Timed], tuple[int, int], torch.dtype, float]
    ]
    cases = [
        ("256x1000 in a CUDA graph", in_a_graph, (256, 1000), torch.float32, 1.0),
        ("256x1000, eager", both_ways, (256, 1000), torch.float32, 1.3),
        ("4096x1000, float32", both_ways, (4096, 1000), torch.float32, 1.5),
        ("4096x1000, bfloat16", both_ways, (4096, 1000), torch.bfloat16, 1.5),
    ]
    for what, timed, (n, c), dtype, limit in cases:
        data = batch(n, c, c, dtype)
        seconds, ratio = against(timed(loss_of(backend), *data), timed(F.cross_entropy, *data), 1.5)
        bars.append(Bar(what, backend, seconds, to, ratio, limit))
    return bars


def roofline_bars(backend: str) -> list[Bar]:
    """Large vocabularies: three passes over the logits and the gradient written, at the rate of a copy."""
    bars = []
    for n, c in ((8192, 32_768), (4096, 128_256)):
        logits, target = batch(n, c, c, torch.bfloat16)
        copying = copies(logits.detach())
        seconds, ratio = against(both_ways(loss_of(backend), logits, target), copying, 2.0)
        what = f"{n}x{c}, bfloat16"
        bars.append(Bar(what, backend, seconds, "the roofline", ratio / 2, 1 / ROOFLINE_SHARE))
    return bars


def step_bar(backend: str) -> Bar:
    ours, baseline = steps([loss_of(backend), F.cross_entropy])
    seconds, ratio = against(ours, baseline, 8.0)
    return Bar("ResNet-50 training step, batch 256", backend, seconds, "F.cross_entropy's", ratio, 1.01)


def report(bars: list[Bar], checks: dict[str, str]) -> str:
    e = environment()
    lines = [
        f"{e['gpu']}, CUDA {e['cuda']}, torch {e['torch']}, cmim_kernels {e['cmim_kernels']}; {e['date']}."
    ]
    lines += ["", "| check | outcome |", "|---|---|", *(f"| {k} | {v} |" for k, v in checks.items())]
    lines += ["", "| forward and backward, K = 8 | backend | time | ratio to | ratio | at most | |"]
    lines += ["|---|---|---:|---|---:|---:|---|"]
    for b in bars:
        numbers = f"{b.seconds * 1e6:.1f} us | {b.to} | {b.ratio:.2f} | {b.limit:.2f}"
        lines.append(f"| {b.what} | {b.backend} | {numbers} | {'met' if b.met else '**missed**'} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    results, table, *outcomes = sys.argv[1:]
    checks = dict(outcome.split("=", 1) for outcome in outcomes)
    backends = [b for b in BACKENDS if usable([f"fused[{b}]"], "cuda")]
    bars = [bar for b in backends for bar in (*cross_entropy_bars(b), *roofline_bars(b), step_bar(b))]
    path = Path(results)
    data = json.loads(path.read_text()) if path.is_file() else {"benchmarks": []}
    data["gpu_check"] = {
        "environment": environment(),
        "checks": checks,
        "bars": [asdict(bar) | {"met": bar.met} for bar in bars],
    }
    path.write_text(json.dumps(data, indent=1) + "\n")
    text = report(bars, checks)
    Path(table).write_text(text)
    print(text)
    if not all(bar.met for bar in bars):
        raise SystemExit("gpu_bars.py: a bar was missed, see the table above.")


if __name__ == "__main__":
    main()
