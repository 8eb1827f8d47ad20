"""Builds the native libraries of cmim_kernels.

`_cpu.so` and, where it can be built, `_cuda.so` are plain shared libraries that
`torch.ops.load_library` loads. They use PyTorch's stable ABI only, so one binary serves every Python and
every torch from 2.11 on. They are built against the torch of the environment that the package goes into.
Where Python's headers are there, `_cpu.so` is also a module of its limited API: see csrc/direct.cpp.

Environment variables: CMIM_KERNELS_CUDA=1 builds the CUDA library or fails, 0 leaves it out, unset it is
built where torch is a CUDA build and nvcc is there; CUDA_ARCH_LIST ("80 90") narrows its architectures;
CMIM_KERNELS_WERROR=1 turns warnings into errors; CXX, CXXFLAGS, LDFLAGS, CUDA_HOME and MAX_JOBS as usual.
"""

from __future__ import annotations

import os
import platform
import re
import runpy
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.dist_info import dist_info

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
OLDEST_TORCH = (2, 11)
# No -ffast-math: NaN, infinities and the order of sums matter here.
CXXFLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
CXXFLAGS += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
# These of csrc/cpu are compiled once per instruction set; the library picks among the sets at run time.
PER_VARIANT = ("uncentred_double", "uncentred_float", "kernel")  # the slowest to compile first
VARIANTS: dict[str, list[str]] = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    VARIANTS["avx2"] = ["-march=x86-64-v3"]
    VARIANTS["avx512"] = ["-march=x86-64-v4", "-mprefer-vector-width=512"]
OLDEST_CUDA = (12, 0)
USUAL_CUDA_HOME = "/usr/local/cuda"
OLDEST_ARCHITECTURE = 80  # copies to shared memory without a stop in registers
CLUSTERS_FROM = 90  # where blocks may wait for each other, the only thing that the sources ask about
CUDA_ARCHITECTURES = ["80", "86", "89", "90", "100", "120"]


@dataclass(frozen=True)
class Torch:
    root: Path
    version: str
    cuda: str | None

    def includes(self) -> list[str]:
        include = self.root / "include"
        return ["-isystem", str(include), "-isystem", str(include / "torch" / "csrc" / "api" / "include")]

    def definitions(self) -> list[str]:
        major, minor = OLDEST_TORCH
        return [f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000"]


def find_torch() -> Torch:
    """The target environment's torch, read without importing it.

    Under pip's build isolation `import torch` fails, but sysconfig still names the environment's own folder.
    """
    folders = [
        sysconfig.get_path("platlib"),
        sysconfig.get_path("purelib"),
        *sys.path,
        site.getusersitepackages(),
    ]
    for folder in folders:
        root = Path(folder) / "torch"
        if not (root / "version.py").is_file():
            continue
        facts = runpy.run_path(str(root / "version.py"))
        version = str(facts["__version__"])
        if tuple(int(n) for n in re.findall(r"\d+", version)[:2]) < OLDEST_TORCH:
            oldest = ".".join(map(str, OLDEST_TORCH))
            raise SystemExit(
                f"cmim_kernels needs torch {oldest} or later, but {root.parent} holds torch {version}."
            )
        return Torch(root, version, facts.get("cuda"))
    raise SystemExit(
        f"cmim_kernels is built against the torch of the environment it goes into, but {folders[0]} holds "
        "none: install torch first, with --no-build-isolation if your installer builds in a place apart."
    )


def find_cuda_home() -> Path | None:
    """The CUDA toolkit's folder: CUDA_HOME, else nvcc's on PATH, else /usr/local/cuda."""
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parents[1], USUAL_CUDA_HOME]
    folders = [Path(c) for c in candidates if c]
    # nvcc on PATH may be a script that calls the one of another folder
    whole = [f for f in folders if (f / "bin/nvcc").is_file() and (f / "include/cuda_runtime.h").is_file()]
    return whole[0] if whole else None


def cuda_version(home: Path) -> tuple[int, int]:
    nvcc = str(home / "bin" / "nvcc")
    said = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    numbers = re.search(r"release (\d+)\.(\d+)", said)
    return (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)


def why_no_cuda() -> str | None:
    """What the CUDA library cannot be built for; never whether there is a GPU."""
    home = find_cuda_home()
    if home is None:
        return "there is no nvcc with its headers: set CUDA_HOME or put nvcc on PATH"
    if cuda_version(home) < OLDEST_CUDA:
        oldest, found = (".".join(map(str, v)) for v in (OLDEST_CUDA, cuda_version(home)))
        return f"{home} holds CUDA {found}, {oldest} or later is needed"
    return None


def wants_cuda(torch: Torch) -> bool:
    """CMIM_KERNELS_CUDA=1 or 0 decides; unset, whether torch is a CUDA build and there is an nvcc."""
    setting = os.environ.get("CMIM_KERNELS_CUDA", "")
    if setting not in ("", "0", "1"):
        raise SystemExit(f"CMIM_KERNELS_CUDA must be 0, 1 or unset, not {setting!r}.")
    if setting == "1":
        why = why_no_cuda()
        if why is not None:
            raise SystemExit(f"CMIM_KERNELS_CUDA=1, but {why}.")
        return True
    return setting == "" and torch.cuda is not None and why_no_cuda() is None


def cuda_architecture_flags(nvcc: Path) -> list[str]:
    """-gencode flags for the wanted architectures that this nvcc knows, with PTX for those that come after.

    Below and from CLUSTERS_FROM on the sources are the same for all, so that each family shares the code of
    its oldest up to the assembler, and the newer one's is the PTX, which saves two fifths of the time.
    """
    listed = subprocess.run([str(nvcc), "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout
    known = set(re.findall(r"compute_(\d+)", listed))
    wanted = re.findall(r"\d+", os.environ.get("CUDA_ARCH_LIST", "").replace(".", "")) or CUDA_ARCHITECTURES
    chosen = sorted((n for n in known.intersection(wanted) if int(n) >= OLDEST_ARCHITECTURE), key=int)
    if not chosen:
        raise SystemExit(
            f"{nvcc} knows none of the architectures {' '.join(wanted)} from {OLDEST_ARCHITECTURE} on: "
            "set CUDA_ARCH_LIST."
        )
    families = ([n for n in chosen if (int(n) >= CLUSTERS_FROM) == newer] for newer in (False, True))
    flags = []
    for family in filter(None, families):
        codes = [f"sm_{n}" for n in family]
        if family[-1] == chosen[-1]:
            codes.append(f"compute_{family[0]}")
        flags.append(f"-gencode=arch=compute_{family[0]},code=[{','.join(codes)}]")
    return flags


class NinjaFile:
    """Collects compile and link steps, each with its own flags, and has ninja run what is out of date."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.text = "rule compile\n  command = $cmd -MMD -MF $out.d -c $in -o $out\n"
        self.text += "  depfile = $out.d\n  deps = gcc\n"
        self.text += "rule link\n  command = $cmd -o $out $in $libs\n"

    @staticmethod
    def path(path: Path) -> str:
        return re.sub(r"([$ :])", r"$\1", str(path))

    @staticmethod
    def command(words: list[str]) -> str:
        return shlex.join(words).replace("$", "$$")

    def compile(self, source: Path, name: str, command: list[str]) -> Path:
        target = self.folder / f"{name}.o"
        self.text += (
            f"build {self.path(target)}: compile {self.path(source)}\n  cmd = {self.command(command)}\n"
        )
        return target

    def link(self, target: Path, objects: list[Path], command: list[str], libraries: list[str]) -> None:
        inputs = " ".join(map(self.path, objects))
        self.text += f"build {self.path(target)}: link {inputs}\n  cmd = {self.command(command)}\n"
        self.text += f"  libs = {self.command(libraries)}\n"

    def write(self) -> list[str]:
        """Writes the file; returns the command that does what it says."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "build.ninja").write_text(self.text)
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        return [sys.executable, "-m", "ninja", "-C", str(self.folder), *jobs]

    def run(self) -> None:
        if subprocess.run(self.write()).returncode:
            raise SystemExit(
                "cmim_kernels: the native libraries did not compile, see the compiler's messages above."
            )


def extra_flags(name: str) -> list[str]:
    return shlex.split(os.environ.get(name, ""))


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "g++" if shutil.which("g++") else "c++"))


def add_library(
    ninja: NinjaFile, target: Path, objects: list[Path], torch: Torch, libraries: list[str]
) -> None:
    # No rpath: the torch that is already loaded when this library is has the same sonames.
    link = [*compiler(), "-shared", "-Wl,--as-needed", *extra_flags("LDFLAGS")]
    ninja.link(target, objects, link, [f"-L{torch.root / 'lib'}", *libraries])


def python_includes() -> list[str]:
    """Empty where there are no headers, or none of the limited API: then every call takes the operators."""
    include = sysconfig.get_path("include")
    usable = (Path(include) / "Python.h").is_file() and not sysconfig.get_config_var("Py_GIL_DISABLED")
    return ["-isystem", include] if usable else []


def add_cpu_library(ninja: NinjaFile, target: Path, torch: Torch) -> None:
    werror = ["-Werror"] if os.environ.get("CMIM_KERNELS_WERROR") == "1" else []
    base = [*compiler(), *CXXFLAGS, *werror, f"-I{CSRC}"]
    objects = []
    for stem, (name, flags) in product(PER_VARIANT, VARIANTS.items()):
        command = [*base, f"-DCMIM_VARIANT={name}", *flags, *extra_flags("CXXFLAGS")]
        objects.append(ninja.compile(CSRC / "cpu" / f"{stem}.cpp", f"{stem}_{name}", command))
    once = [source for source in sorted((CSRC / "cpu").glob("*.cpp")) if source.stem not in PER_VARIANT]
    sources = {CSRC / "ops.cpp": torch.definitions()} | {source: [] for source in once}
    if includes := python_includes():
        sources[CSRC / "direct.cpp"] = includes
    for source, flags in sources.items():
        command = [*base, *flags, *torch.includes(), *extra_flags("CXXFLAGS")]
        objects.append(ninja.compile(source, f"cpu_{source.stem}", command))
    add_library(ninja, target, objects, torch, ["-ltorch_cpu"])


def add_cuda_library(ninja: NinjaFile, target: Path, torch: Torch) -> None:
    home = find_cuda_home()
    assert home is not None  # wants_cuda looked
    nvcc = home / "bin" / "nvcc"
    device = [str(nvcc), "-O3", "-std=c++17", f"-I{CSRC}", *cuda_architecture_flags(nvcc)]
    device += ["-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
    if len(compiler()) == 1:  # a command with arguments is none that nvcc could call
        device += [f"-ccbin={compiler()[0]}"]
    host = [*compiler(), *CXXFLAGS, f"-I{CSRC}", "-isystem", str(home / "include")]
    if os.environ.get("CMIM_KERNELS_WERROR") == "1":
        device += ["-Werror=all-warnings", "-Xcompiler=-Werror"]
        host += ["-Werror"]
    binding = [*host, "-DUSE_CUDA", *torch.definitions(), *torch.includes()]
    objects = [ninja.compile(s, f"cuda_{s.stem}", device) for s in sorted((CSRC / "cuda").glob("*.cu"))]
    for source in sorted((CSRC / "cuda").glob("*.cpp")):
        command = binding if source.stem == "binding" else host  # the only one that knows of torch
        objects.append(ninja.compile(source, f"cuda_{source.stem}", [*command, *extra_flags("CXXFLAGS")]))
    # A CPU-only torch has no libtorch_cuda: a build forced there shows only that the sources compile.
    torch_libraries = ["-ltorch_cpu"] + (["-ltorch_cuda"] if torch.cuda else [])
    cudart = [f"-L{home / 'lib64'}", "-lcudart_static", "-lpthread", "-ldl", "-lrt"]
    add_library(ninja, target, objects, torch, [*torch_libraries, *cudart])


def is_cuda(extension: Extension) -> bool:
    return bool(extension.name.endswith("_cuda"))


class BuildLibraries(build_ext):
    """Replaces setuptools' compiler driver, which has no flags per file and no nvcc."""

    extensions: list[Extension]

    def run(self) -> None:
        self.torch = find_torch()
        if not wants_cuda(self.torch):
            self.extensions = [e for e in self.extensions if not is_cuda(e)]
        super().run()

    def get_ext_filename(self, fullname: str) -> str:
        # no Python version in the name: of Python, a library uses the limited API at most
        return fullname.replace(".", os.sep) + ".so"

    def build_extensions(self) -> None:
        ninja = NinjaFile(Path(self.build_temp).resolve())
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name)).resolve()
            target.parent.mkdir(parents=True, exist_ok=True)
            add = add_cuda_library if is_cuda(extension) else add_cpu_library
            add(ninja, target, self.torch)
        ninja.run()


class Metadata(dist_info):
    """Looks for torch before the metadata is handed over, that is before pip would download one."""

    def run(self) -> None:
        find_torch()
        super().run()


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":
    setup(
        ext_modules=[Extension(f"cmim_kernels._{name}", sources=[]) for name in ("cpu", "cuda")],
        cmdclass={"build_ext": BuildLibraries, "dist_info": Metadata, "bdist_wheel": Wheel},
    )
