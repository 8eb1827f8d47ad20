"""What the Triton kernels promise and can be shown without a GPU: machine code, launches, operations."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from operations import Operations
from torch._subclasses.fake_tensor import FakeTensorMode
from triton_offline import CASES, MI300, SHARED_LIMIT, Case, Launch, compiled, cuda, used

import cmim_kernels as ck
from cmim_kernels.backends import triton as backend
from cmim_kernels.backends._triton import plan
from cmim_kernels.backends._triton.launch import kernel
from cmim_kernels.reference import MEAN, NONE, SPECTRUM

pytestmark = pytest.mark.skipif(plan.interpreting(), reason="compiles what the interpreter replaces")


def names(launches: list[Launch]) -> list[str]:
    return [launch.kernel.split(".")[1].removesuffix("_kernel") for launch in launches]


LAUNCHES = {name: case.launches for name, case in CASES.items()} | {
    "class_centroids": Case(4096, 1000).centroids
}


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("call", LAUNCHES)
def test_no_spills_and_little_shared_memory(call: str, arch: int) -> None:
    for launch in LAUNCHES[call]():
        usage = used(compiled(launch, cuda(arch)))
        assert 16 <= usage.registers <= 255, launch.kernel  # that of a kernel that was compiled at all
        assert usage.stack == usage.local == 0, launch.kernel
        assert usage.shared <= SHARED_LIMIT, launch.kernel


@pytest.mark.parametrize(
    ("case", "forward", "backward"),
    [
        (Case(1, 2), ["rows", "forward"], ["gradient"]),
        (Case(256, 1000), ["rows", "forward"], ["gradient"]),
        (Case(4096, 1000), ["rows", "forward"], ["gradient"]),
        (Case(256, 1000, given=True), ["rows", "forward"], ["gradient"]),
        (Case(256, 1000, reduction=SPECTRUM), ["rows", "forward"], ["gradient"]),
        (Case(256, 1000, cmi_weight=0.0), ["rows", "forward"], ["gradient"]),
        (Case(256, 1000, ce_weight=0.0), ["rows", "forward"], ["gradient"]),
        (Case(256, 1000, reduction=NONE), ["rows", "forward"], ["pull", "gradient"]),
        (Case(8192, 32768), ["rows", "large_parts", "large_whole", "forward"], ["gradient"]),
        (Case(8192, 32768, given=True), ["rows", "forward"], ["gradient"]),
        (Case(8192, 32768, cmi_weight=0.0), ["rows", "forward"], ["gradient"]),
    ],
)
def test_launches(case: Case, forward: list[str], backward: list[str]) -> None:
    """Rows grouped by label, one launch forward, one backward, for up to some thousand rows."""
    assert names(case.forward()) == forward
    assert names(case.backward()) == backward


@pytest.mark.parametrize("reduction", [NONE, SPECTRUM, MEAN])
@pytest.mark.parametrize("given", [False, True])
def test_between_the_launches_of_a_typical_batch_memory_is_reserved_and_nothing_else(
    reduction: int, given: bool
) -> None:
    """Nothing waits for the device: these calls run on tensors that hold no data, where a wait would fail."""
    case = Case(256, 1000, reduction=reduction, given=given, weight=True, smoothing=0.1)
    case.forward()  # the table of temperatures is copied once
    arguments = case._arguments()
    with Operations() as operations:
        case.forward()
        case.backward()
    with Operations() as own:
        case._arguments()
    assert operations.seen <= own.seen | {"empty", "new_empty"}
    assert arguments[0].is_meta


def test_many_rows_are_sorted_without_a_wait() -> None:
    case = Case(8192, 1000)
    case.forward()
    with Operations() as operations:
        case.launches()
    assert "sort" in operations.seen
    waits = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "equal", "bincount"}
    assert not operations.seen & waits


IR_CASES = [
    "256x1000",
    "8192x32768 bfloat16, rows",
    "256x1000, centroids",
    "256x1000 strided, weights and smoothing",
    "256x1000, spectrum",
]


@pytest.mark.parametrize("case", IR_CASES)
def test_intermediate_representation(case: str) -> None:
    """No atomic operation on floating-point numbers, no assembly, no 32-bit product that could overflow."""
    for launch in CASES[case].launches():
        lines = compiled(launch, cuda(90)).asm["ttir"].splitlines()
        atomics = [line for line in lines if "atomic" in line]
        assert bool(atomics) == (launch.kernel == "forward.forward_kernel")
        assert all(re.search(r"tt\.atomic_rmw add,.*-> i32", line) for line in atomics)
        assert not [line for line in lines if "inline_asm" in line or "extern_elementwise" in line]
        products = [line for line in lines if re.search(r"arith\.muli .* : (tensor<[\dx]*x)?i32", line)]
        assert products, "the pattern has to find what it judges"
        constants = {line.split("=")[0].strip() for line in lines if "arith.constant" in line}
        for line in products:
            # By a constant, a block's size: the number of a chunk, tile or program, so that the result is N
            # or C at most, or little more. Whatever multiplies by a stride, N, K or C has to be 64 bits wide.
            factors = re.findall(r"%[\w-]+", line.split("muli")[1])[:2]
            assert len(factors) == 2
            assert constants & set(factors), line
        assert any(re.search(r"arith\.muli .* : (tensor<[\dx]*x)?i64", line) for line in lines)


def test_kernels_compile_for_amd() -> None:
    for launch in CASES["256x1000"].launches():
        made = compiled(launch, MI300)
        assert len(made.asm["hsaco"]) > 0
        assert re.search(r"\.vgpr_spill_count: 0\b", made.asm["amdgcn"]), launch.kernel
        assert made.metadata.shared <= 64 * 1024


@pytest.mark.parametrize("k", [1, 2, 8, 64])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(
    ("n", "c"),
    [(1, 1), (5, 2**21), (2**15, 2**21), (2**22, 2**14), (4096, 10), (4097, 10), (2**24, 10), (70000, 300)],
)
def test_plans_cover_the_problem(n: int, c: int, k: int, per_row: bool, given: bool) -> None:
    made = plan.make_plan(n, c, k, per_row, given)
    assert made.tiles * made.columns >= c > (made.tiles - 1) * made.columns
    assert made.chunks * made.chunk >= n > (made.chunks - 1) * made.chunk
    assert made.chunk >= made.rows
    assert made.chunks * made.tiles < 2**31
    for size in (made.rows, made.columns, made.row_block, made.row_columns):
        assert size == plan.next_power_of_two(size)
    if made.large:
        assert made.slots * made.large >= n


def test_tables_are_kept_but_not_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that change at every step make one each."""
    monkeypatch.setattr(plan, "_tables", {})
    monkeypatch.setattr(plan, "MOST_TABLES", 3)
    device = torch.device("cpu")
    made = [plan.table((2.0, 0.5), (1.0, float(w)), device) for w in range(5)]
    assert torch.equal(made[4], torch.tensor([[0.5, 2], [4, 1], [1, 0]], dtype=torch.float64))
    assert list(plan._tables.values()) == made[2:]
    assert plan.table((2.0, 0.5), (1.0, 3.0), device) is made[3]


def test_a_table_is_none_of_what_becomes_of_this_threads_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is kept, whereas they may be going into a CUDA graph's memory, or be no tensors at all."""
    monkeypatch.setattr(plan, "_tables", {})
    with FakeTensorMode():
        made = plan.table((2.0, 0.5), (1.0, 4.0), torch.device("cpu"))
    assert made.tolist() == [[0.5, 2], [4, 1], [1, 0]]
    with pytest.raises(IndexError):  # and what goes wrong there is told here
        plan.table((2.0, 0.5), (1.0,), torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_traces_for_a_gpu_that_is_not_there(
    dtype: torch.dtype, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shapes, dtypes and devices through the public functions, as torch.compile sees them.

    The backward operator is called by itself: autograd asks the device for its stream.
    """
    monkeypatch.setattr(backend, "unusable", lambda: None)
    with FakeTensorMode():
        logits = torch.empty(6, 10, dtype=dtype, device="cuda")
        target = torch.empty(6, dtype=torch.int64, device="cuda")
        value = ck.fused_cmi_loss(logits, target, reduction=reduction, backend="triton")
        assert value.shape == ((6,) if reduction == "none" else ())
        assert value.dtype == torch.float32
        spectrum = ck.cmi_spectrum(logits, target, backend="triton")
        assert (spectrum.shape, spectrum.dtype) == ((8,), torch.float32)
        centroids, counts = ck.class_centroids(logits, target, backend="triton")
        assert (centroids.shape, counts.shape) == ((8, 10, 10), (10,))
        assert (centroids.dtype, counts.dtype) == (torch.float32, torch.int64)
        numbers = (1.0, 1.0, 0.0, -100, {"mean": MEAN, "none": NONE}[reduction])
        arguments = (logits, target, [0.5, 1.0], [0.5, 0.5], None, None, *numbers)
        value, saved = backend.loss(*arguments, True)
        assert (saved.shape, saved.dtype) == backend.saved_like(logits, 2, numbers[-1], True)
        gradient = backend.loss_backward(value, saved, *arguments)
        assert (gradient.shape, gradient.dtype) == (logits.shape, dtype)
        for result in (value, spectrum, centroids, counts, saved, gradient):
            assert result.device.type == "cuda"


def test_what_it_refuses() -> None:
    with FakeTensorMode():
        logits = torch.empty(2, 3, device="cuda")
        assert backend.refuses(logits, 8) is None
        assert "float64" in str(backend.refuses(logits.double(), 8))
        assert "64 temperatures" in str(backend.refuses(logits, 65))
        assert "classes" in str(backend.refuses(torch.empty(1, 2**21 + 1, device="cuda"), 8))
        assert "rows" in str(backend.refuses(torch.empty(1, 1, device="cuda").expand(2**30 + 1, 1), 8))
    assert "on a GPU" in str(backend.refuses(torch.empty(2, 3), 8))


def test_no_kernel_specialises_on_its_integers() -> None:
    """What launch.py counts on: another number of rows is another kernel for nobody."""
    seen = set()
    for case in [*CASES.values(), Case(8192, 1000)]:
        for launch in case.launches():
            types = dict(launch.signature)
            for parameter in kernel(launch.kernel).function.params:
                if types[parameter.name].startswith("i"):
                    seen.add(parameter.name)
                    assert parameter.do_not_specialize, (launch.kernel, parameter.name)
    assert {"N", "ignore_index", "row_units", "up_stride", "out_units", "chunks"} <= seen


def test_a_compiled_kernel_is_launched_with_what_triton_would_have_given_it() -> None:
    script = Path(__file__).with_name("triton_launches.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # an import of it fails, and nobody finds it
import torch
import cmim_kernels as ck
reason = ck.available_backends()["triton"]
assert reason is not None and "cmim-kernels[triton]" in reason, reason
try:
    ck.fused_cmi_loss(torch.zeros(2, 3), torch.tensor([0, 1]), backend="triton")
except RuntimeError as error:
    assert "cmim-kernels[triton]" in str(error), error
else:
    raise AssertionError("served without Triton")
print(float(ck.fused_cmi_loss(torch.zeros(2, 3), torch.tensor([0, 1]))))
"""

IMPORTS_NO_TRITON = """
import sys
import torch
before = "triton" in sys.modules
import cmim_kernels as ck
ck.available_backends()
assert ("triton" in sys.modules) == before
"""


@pytest.mark.parametrize("script", [WITHOUT_TRITON, IMPORTS_NO_TRITON], ids=["without", "not_imported"])
def test_triton_is_optional(script: str) -> None:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
