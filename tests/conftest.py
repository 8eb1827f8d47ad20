"""What every test shares: the backends to run on, uninitialised memory that shows itself, and --shard."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from cmim_kernels.backends._triton.plan import interpreting

if interpreting():
    import bearable_interpreter  # noqa: F401  # before any kernel runs

ALL = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NO_DOUBLE = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Place:
    """A backend and the device it is tried on."""

    name: str
    device: str
    dtypes: tuple[torch.dtype, ...]

    def __str__(self) -> str:
        return f"{self.name}-{self.device}"

    @property
    def interpreted(self) -> bool:
        """Triton's kernels on a CPU: a thousand times slower, so that tests try less of the same."""
        return self.name == "triton" and self.device == "cpu"

    @property
    def emulated(self) -> bool:
        """CUDA's kernels on a CPU: slow enough for tests to try fewer batches."""
        return self.name == "cuda" and self.device == "cpu"

    def needs(self, dtype: torch.dtype) -> None:
        """Skips the test where the backend does not serve this dtype."""
        if dtype not in self.dtypes:
            pytest.skip(f"{self} does not serve {dtype}")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", metavar="I/N", help="of N equal parts of the chosen tests, the I-th only")


@pytest.hookimpl(trylast=True)  # after -k and -m
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Neighbours stay together: they often need the same compiled kernels."""
    if config.getoption("--shard"):
        i, n = map(int, config.getoption("--shard").split("/"))
        items[:] = items[(i - 1) * len(items) // n : i * len(items) // n]


def places() -> list[object]:
    """The interpreter is slow, and chosen before Triton is imported: it has a run of its own."""
    if interpreting():
        return [
            pytest.param(Place("triton", "cpu", NO_DOUBLE), marks=pytest.mark.interpreter, id="interpreter")
        ]
    found = [Place("reference", "cpu", ALL), Place("cpu", "cpu", ALL)]
    parameters: list[object] = [pytest.param(place, id=str(place)) for place in found]
    if torch.cuda.is_available():
        on_gpu = [
            Place("cuda", "cuda", ALL),
            Place("triton", "cuda", NO_DOUBLE),
            Place("reference", "cuda", ALL),
        ]
        parameters += [pytest.param(place, marks=pytest.mark.gpu, id=str(place)) for place in on_gpu]
    return parameters


@pytest.fixture(params=places())
def place(request: pytest.FixtureRequest) -> Place:
    """Every backend that can run here, each on its device. One that is not built fails, it does not hide."""
    chosen: Place = request.param
    return chosen


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """`torch.empty` holds NaN, so that an entry that nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def repeatable() -> Iterator[None]:
    """One seed; and one thread, which small batches are faster on. test_determinism tries several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)
