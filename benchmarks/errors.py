"""Errors of the fused loss against float64, beside those of the plain formulation.

    python benchmarks/errors.py [--backend NAME] [--device NAME] [--update FILE]

Prints Markdown tables; --update puts them between the marks of a document, as report.py does.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from environment import environment
from report import update
from torch import Tensor

from cmim_kernels import TemperatureSpectrum, cmi_spectrum, fused_cmi_loss
from cmim_kernels.reference import MEAN, SPECTRUM
from cmim_kernels.testing import base, regimes, truth, value_and_grad

SPECTRUM_8 = TemperatureSpectrum.uniform(1.0, 8)
WIDTHS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.2, 0.3, 1.0, 3.0)
SEEDS = 8


def arguments(
    target: Tensor, spectrum: TemperatureSpectrum, ce_weight: float, reduction: int
) -> tuple[object, ...]:
    a, w = spectrum.inverse_temperatures, spectrum.weights
    return (target, a, w, None, None, ce_weight, 1.0, 0.0, -100, reduction)


def relative(result: Tensor, exact: Tensor) -> float:
    """|result - exact| / |exact| in the 2-norm."""
    result, exact = result.double(), exact.double()
    return float(torch.linalg.vector_norm(result - exact) / torch.linalg.vector_norm(exact))


def collapse_table(backend: str, device: str) -> str:
    """4 clusters of 16 rows, 1000 classes, one temperature at a time: its CMI and its gradient."""
    lines = ["| width | T | true CMI | plain: CMI | plain: gradient | fused: CMI | fused: gradient |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for width in WIDTHS:
        generator = torch.Generator().manual_seed(0)
        target = torch.arange(64) // 16
        logits = 2 * torch.randn(4, 1000, generator=generator)[target]
        logits = (logits + width * torch.randn(64, 1000, generator=generator)).to(device)
        target = target.to(device)
        for temperature, k in ((8, 0), (1, 7)):
            upstream = torch.zeros(8, device=device)
            upstream[k] = 1
            call = arguments(target, SPECTRUM_8, 0.0, SPECTRUM)
            exact = truth(logits, *call, upstream=upstream)
            plain = base(logits, *call, upstream=upstream)
            loss = partial(cmi_spectrum, target=target, temperatures=SPECTRUM_8, backend=backend)
            fused = value_and_grad(loss, logits, upstream=upstream)
            cells = [f"{width:g}", f"{temperature}", f"{exact[0][k]:.1e}"]
            for value, grad in (plain, fused):
                cells += [f"{relative(value[k], exact[0][k]):.0e}", f"{relative(grad, exact[1]):.0e}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def regime_table(backend: str, device: str) -> str:
    """The whole loss: worst relative error of value and gradient over seeds, fused / plain."""
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    if backend == "triton":
        dtypes = dtypes[:3]
    header = [f"{str(d).removeprefix('torch.')}: {what}" for d in dtypes for what in ("value", "gradient")]
    lines = ["| regime | " + " | ".join(header) + " |", "|---" * (len(header) + 1) + "|"]
    for regime in regimes():
        cells = [regime.name]
        for dtype in dtypes:
            worst = torch.zeros(4)
            for seed in range(SEEDS):
                logits, target = regime.make(dtype, device, seed)
                call = arguments(target, SPECTRUM_8, 1.0, MEAN)
                exact, plain = truth(logits, *call), base(logits, *call)
                loss = partial(fused_cmi_loss, target=target, temperatures=SPECTRUM_8, backend=backend)
                fused = value_and_grad(loss, logits)
                errors = [relative(r[i], exact[i]) for i in (0, 1) for r in (fused, plain)]
                worst = torch.maximum(worst, torch.tensor(errors).nan_to_num(0.0))
            cells += [f"{worst[0]:.0e} / {worst[1]:.0e}", f"{worst[2]:.0e} / {worst[3]:.0e}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", default="cpu", choices=["cpu", "cuda", "triton"])
    parser.add_argument("--device", default=None, help="cpu, or cuda for a GPU's backends")
    parser.add_argument(
        "--update", type=Path, help="a Markdown file with the marks errors-collapse, errors-regimes"
    )
    options = parser.parse_args()
    device = options.device or ("cpu" if options.backend == "cpu" else "cuda")
    it = environment()
    machine = f"{it['cpu']}, {it['cpu_capability']}, PyTorch {it['torch']}, {it['date']}"
    machine = f"cmim_kernels {it['cmim_kernels']}, backend {options.backend} on {device}, {machine}"
    tables = {
        "errors-collapse": collapse_table(options.backend, device),
        "errors-regimes": regime_table(options.backend, device),
        "errors-machine": f"Command: `python benchmarks/errors.py --backend {options.backend}`; {machine}.",
    }
    for table in tables.values():
        print(f"\n{table}")
    if options.update:
        update(options.update, tables)


if __name__ == "__main__":
    main()
