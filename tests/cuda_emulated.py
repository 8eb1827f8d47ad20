"""The CUDA kernels and their binding, compiled for the CPU over `cuda_emulator/` and loaded as operators.

    backend = emulated()              # serves CPU tensors in place of cmim_kernels.backends.cuda
    with settings(order=1): ...       # threads and blocks in descending order

It takes half a minute to compile, once for a state of the sources: build/cuda_emulator keeps the last one,
also for the processes that share the tests out.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from cmim_kernels.backends import cuda

ROOT = Path(__file__).parent.parent
EMULATOR = ROOT / "tests" / "cuda_emulator"
TORCH = Path(torch.__file__).parent
TORCH_FLAGS = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA"]
TORCH_FLAGS += ["-isystem", str(TORCH / "include"), "-isystem", str(TORCH / "include/torch/csrc/api/include")]
# Multiplications and additions are fused as nvcc fuses them. A vector that is not aligned is a trap.
FLAGS = ["-O1", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-march=native", "-ffp-contract=fast"]
FLAGS += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", f"-I{EMULATOR}", f"-I{ROOT / 'csrc'}"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]

AUTOMATIC, FUSED, TILED = range(3)


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def run(command: Sequence[str]) -> str:
    """Runs a compiler; returns what it says, and fails with that if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def compiled(folder: Path) -> Path:
    """The library, with what it is made of, in an empty folder."""
    sources = sorted((ROOT / "csrc/cuda").glob("*.cpp")) + sorted((ROOT / "csrc/cuda").glob("*.cu"))
    sources += [EMULATOR / "emulator.cpp"]

    def compile_one(source: Path) -> str:
        target = str(folder / f"{source.name}.o")
        torch_flags = TORCH_FLAGS if source.name == "binding.cpp" else []
        run([compiler(), *FLAGS, *torch_flags, "-x", "c++", "-c", str(source), "-o", target])
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    library = folder / "libcmim_emulated.so"
    run([compiler(), "-shared", *objects, "-o", str(library), f"-L{TORCH / 'lib'}", "-ltorch_cpu"])
    return library


def up_to_date() -> Path:
    """The library of these sources, flags and compiler on this processor; one process compiles, all wait."""
    made_of = hashlib.sha256(repr((FLAGS, TORCH_FLAGS, str(TORCH), torch.__version__)).encode())
    made_of.update(run([compiler(), *FLAGS, "-E", "-dM", "-x", "c", "/dev/null"]).encode())
    for folder in (ROOT / "csrc", EMULATOR):
        for source in sorted(path for path in folder.rglob("*") if path.is_file()):
            made_of.update(source.read_bytes())
    kept = ROOT / "build" / "cuda_emulator"
    kept.mkdir(parents=True, exist_ok=True)
    library = kept / f"{made_of.hexdigest()}.so"
    with (kept / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            for old in kept.glob("*.so"):
                old.unlink()
            with tempfile.TemporaryDirectory() as empty:
                shutil.move(compiled(Path(empty)), library)
    return library


@cache
def emulated() -> SimpleNamespace:
    """What `cmim_kernels.backends.cuda` is on a machine with a device, for CPU tensors."""
    library = str(up_to_date())
    native = ctypes.CDLL(library)
    definitions = torch.library.Library("cmim_emulated", "FRAGMENT")
    for name in ("loss", "loss_backward", "class_centroids"):
        schema = str(getattr(torch.ops.cmim_kernels, name).default._schema)
        definitions.define(schema.removeprefix("cmim_kernels::"))
    torch.ops.load_library(library)
    operators = torch.ops.cmim_emulated
    return SimpleNamespace(
        unusable=lambda: None,
        refuses=lambda logits, temperatures: None,
        keeps_gradient=cuda.keeps_gradient,
        saved_like=cuda.saved_like,
        loss=operators.loss.default,
        loss_backward=operators.loss_backward.default,
        class_centroids=operators.class_centroids.default,
        check_labels=operators.check_cuda_labels.default,
        set_path=operators.set_cuda_path.default,
        native=native,
        definitions=definitions,  # gone, the operators would be gone too
    )


@contextmanager
def settings(
    path: int = AUTOMATIC,
    order: int = 0,
    processors: int = 3,
    shared_kb: int = 227,
    capturing: bool = False,
    code: int = 90,
) -> Iterator[None]:
    """Which kernels run, for which architecture they were compiled; the order of threads (0 ascending, 1
    descending, else a seed); the device's size."""
    backend = emulated()
    try:
        backend.native.emulator_set(order, processors, shared_kb, int(capturing), code)
        backend.set_path(path)
        yield
    finally:
        backend.native.emulator_set(0, 3, 227, 0, 90)
        backend.set_path(AUTOMATIC)


def launches() -> int:
    """Kernels launched so far."""
    count = emulated().native.emulator_launches
    count.restype = ctypes.c_uint64
    return int(count())


def guarded(t: Tensor) -> Tensor:
    """A copy that ends where memory ends: to read on is a crash. Its memory is never given back."""
    if t.numel() == 0:
        return t
    size = t.numel() * t.element_size()
    allocate = emulated().native.emulator_guarded
    allocate.restype, allocate.argtypes = ctypes.c_void_p, [ctypes.c_uint64]
    memory = (ctypes.c_char * size).from_address(allocate(size))
    return torch.frombuffer(memory, dtype=t.dtype).view(t.shape).copy_(t)
