"""Options of the benchmark suite, and what goes into its JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.contenders import CONTENDERS, why_not
from benchmarks.environment import environment


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("cmim_kernels")
    group.addoption(
        "--full", action="store_true", help="the curves, the training step and the slow contenders, too"
    )
    group.addoption("--device", default="cpu", choices=["cpu", "cuda"], help="where to run (default cpu)")


def pytest_report_header(config: pytest.Config) -> list[str]:
    device = config.getoption("--device")
    reasons = {name: why_not(name, device) for name in CONTENDERS}
    return [f"not timed: {name}: {reason}" for name, reason in reasons.items() if reason is not None]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if collection_path.name == "test_curves.py" and not config.getoption("--full") else None


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("--device"))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Results are published: they say what the machine is, not whose."""
    machine_info.clear()
    machine_info.update(environment())


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]
) -> None:
    for result in output_json["benchmarks"]:
        result["stats"].pop("data", None)
    output_json["commit_info"] = {"id": output_json["commit_info"].get("id")}
