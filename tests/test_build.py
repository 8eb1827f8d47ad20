"""setup.py finds the environment's torch without importing it and says clearly what is missing."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sysconfig
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest
import setuptools
from cuda_emulated import run

import cmim_kernels
import setup

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def empty_environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that holds setuptools and nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    installed = Path(setuptools.__file__).parent.parent
    for part in ("setuptools", "_distutils_hack", f"setuptools-{setuptools.__version__}.dist-info"):
        (site_packages(folder) / part).symlink_to(installed / part)
    return folder


def site_packages(environment: Path) -> Path:
    return Path(sysconfig.get_path("purelib", "posix_prefix", {"base": str(environment)}))


def run_setup(environment: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    hidden = ("PYTHON", "CMIM_", "CUDA")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    python = environment / "bin" / "python"
    return subprocess.run(
        [str(python), "-s", "setup.py", "-q", *arguments],
        cwd=ROOT,
        env=clean | variables,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def torch_version(empty_environment: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """Puts what setup.py reads of a torch of this version into the environment."""
    folder = site_packages(empty_environment) / "torch"
    folder.mkdir()
    (folder / "version.py").write_text(f"__version__ = {request.param!r}\ncuda = None\n")
    yield str(request.param)
    shutil.rmtree(folder)


def the_only_line(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode != 0
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    return lines[0]


@pytest.mark.parametrize("command", ["dist_info", "build_ext"])
def test_no_torch_is_one_clear_sentence(empty_environment: Path, command: str, tmp_path: Path) -> None:
    where = ["--output-dir", str(tmp_path)] if command == "dist_info" else ["--build-lib", str(tmp_path)]
    line = the_only_line(run_setup(empty_environment, command, *where))
    assert str(site_packages(empty_environment)) in line
    assert "install torch first" in line


@pytest.mark.parametrize("torch_version", ["2.10.1+cpu", "1.13.0"], indirect=True)
def test_old_torch_is_named(empty_environment: Path, torch_version: str, tmp_path: Path) -> None:
    line = the_only_line(run_setup(empty_environment, "dist_info", "--output-dir", str(tmp_path)))
    assert "torch 2.11 or later" in line
    assert torch_version in line


@pytest.mark.parametrize("torch_version", ["2.11.0+cpu"], indirect=True)
def test_metadata_needs_no_compiler(empty_environment: Path, torch_version: str, tmp_path: Path) -> None:
    result = run_setup(empty_environment, "dist_info", "--output-dir", str(tmp_path))
    assert result.returncode == 0, result.stderr
    (metadata,) = tmp_path.glob("*.dist-info/METADATA")
    assert "Requires-Dist: torch>=2.11" in metadata.read_text()


@pytest.mark.parametrize("torch_version", ["2.11.0+cu128"], indirect=True)
def test_the_cuda_setting_is_refused_where_it_means_nothing(
    empty_environment: Path, torch_version: str, tmp_path: Path
) -> None:
    result = run_setup(empty_environment, "build_ext", "--build-lib", str(tmp_path), CMIM_KERNELS_CUDA="yes")
    assert "must be 0, 1 or unset" in the_only_line(result)


class TestCuda:
    """Whether the CUDA library is built, and for what: by setup.py's functions, with a toolkit of paper."""

    @pytest.fixture(autouse=True)
    def no_toolkit(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        for name in ("CUDA_HOME", "CUDA_ARCH_LIST", "CMIM_KERNELS_CUDA"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(setup, "USUAL_CUDA_HOME", str(tmp_path / "nowhere"))
        monkeypatch.setenv("PATH", str(tmp_path))

    def toolkit(self, folder: Path, release: str = "13.0", headers: bool = True) -> Path:
        (folder / "bin").mkdir(parents=True)
        nvcc = folder / "bin" / "nvcc"
        said = f"release {release}" if release else ""
        architectures = " ".join(f"compute_{n}" for n in (75, 80, 90, 100))
        nvcc.write_text(
            f'#!/bin/sh\nif [ "$1" = --version ]; then echo {said}; else echo {architectures}; fi\n'
        )
        nvcc.chmod(0o755)
        if headers:
            (folder / "include").mkdir()
            (folder / "include" / "cuda_runtime.h").touch()
        return folder

    def torch(self, cuda: str | None) -> setup.Torch:
        return setup.Torch(Path("torch"), "2.13.0", cuda)

    def test_by_itself_only_for_a_cuda_torch_with_a_toolkit(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        assert not setup.wants_cuda(self.torch("13.0"))
        monkeypatch.setenv("CUDA_HOME", str(self.toolkit(tmp_path / "cuda")))
        for visible in ("", "0", "-1"):
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
            assert setup.wants_cuda(self.torch("13.0"))
            assert not setup.wants_cuda(self.torch(None))

    def test_forced(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("CMIM_KERNELS_CUDA", "1")
        with pytest.raises(SystemExit, match="there is no nvcc"):
            setup.wants_cuda(self.torch("13.0"))
        monkeypatch.setenv("CUDA_HOME", str(self.toolkit(tmp_path / "cuda")))
        assert setup.wants_cuda(self.torch(None))
        monkeypatch.setenv("CMIM_KERNELS_CUDA", "0")
        assert not setup.wants_cuda(self.torch("13.0"))

    def test_an_old_toolkit(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("CUDA_HOME", str(self.toolkit(tmp_path / "cuda", release="11.8")))
        assert not setup.wants_cuda(self.torch("11.8"))
        monkeypatch.setenv("CMIM_KERNELS_CUDA", "1")
        with pytest.raises(SystemExit, match=r"holds CUDA 11\.8, 12\.0 or later is needed"):
            setup.wants_cuda(self.torch("11.8"))

    def test_a_script_on_the_path_is_no_toolkit(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        script = self.toolkit(tmp_path / "scripts", headers=False)
        monkeypatch.setenv("PATH", str(script / "bin"))
        assert setup.find_cuda_home() is None
        whole = self.toolkit(tmp_path / "cuda")
        monkeypatch.setattr(setup, "USUAL_CUDA_HOME", str(whole))
        assert setup.find_cuda_home() == whole

    def test_architectures(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        nvcc = self.toolkit(tmp_path / "cuda") / "bin" / "nvcc"
        monkeypatch.setenv("PATH", "/usr/bin:/bin")
        assert setup.cuda_architecture_flags(nvcc) == [  # it knows 80, 90 and 100
            "-gencode=arch=compute_80,code=[sm_80]",
            "-gencode=arch=compute_90,code=[sm_90,sm_100,compute_90]",
        ]
        monkeypatch.setenv("CUDA_ARCH_LIST", "9.0;12.0")
        assert setup.cuda_architecture_flags(nvcc) == [
            "-gencode=arch=compute_90,code=[sm_90,compute_90]",
        ]
        for unknown in ("75", "130"):
            monkeypatch.setenv("CUDA_ARCH_LIST", unknown)
            with pytest.raises(SystemExit, match=f"none of the architectures {unknown} from 80 on"):
                setup.cuda_architecture_flags(nvcc)


def test_the_build_asks_for_no_torch() -> None:
    """Named in the build system, torch would be downloaded into pip's isolated build environment."""
    text = (ROOT / "pyproject.toml").read_text()
    requires = text.split("[build-system]")[1].split("[project]")[0].split("requires = ")[1]
    assert "torch" not in requires


def test_the_versions_agree() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert f'\nversion = "{cmim_kernels.__version__}"\n' in text


def test_variants_share_no_function() -> None:
    """The linker keeps one of equal weak functions: an AVX-512 one would crash an older processor.

    In the library as it was built: only functions of a variant's own have instructions of its own.
    """
    if platform.machine() != "x86_64":
        pytest.skip("one variant only on this architecture")
    (library,) = Path(cmim_kernels.__file__).parent.glob("_cpu*.so")
    command = ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", str(library)]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    extensions = r"v(?!err|erw)\w+|(?:sar|shl|shr|ror|mul)x|andn|bextr|bls\w+|bzhi|pdep|pext|lzcnt|movbe"
    newer = {}  # an instruction of AVX, BMI or the like for each function that has any
    for function in re.split(r"\n\n[0-9a-f]+ ", listing):
        instruction = re.search(rf"\n *[0-9a-f]+:\t((?:{extensions}) .*)", function)
        if instruction:
            newer[function.split(">:\n")[0]] = instruction[1]
    own = [name for name in newer if "cmim::cpu::(anonymous namespace)::" in name]
    assert len(own) > 50
    assert {name: newer[name] for name in newer if name not in own} == {}


@pytest.mark.parametrize("compiler", ["g++-11", "clang++-14"])
def test_the_oldest_compilers_take_the_sources(
    compiler: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Those of README.md. To see them pass the tests: `make clean`, `CXX=clang++-14 make test`."""
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    commands: list[list[str]] = []

    def record(_: setup.NinjaFile, source: Path, name: str, command: list[str]) -> Path:
        commands.append([*command, str(source)])
        return tmp_path / name

    monkeypatch.setattr(setup.NinjaFile, "compile", record)
    for name, value in (("CXX", compiler), ("CXXFLAGS", "-fsyntax-only"), ("CMIM_KERNELS_WERROR", "1")):
        monkeypatch.setenv(name, value)
    setup.add_cpu_library(setup.NinjaFile(tmp_path), tmp_path / "_cpu.so", setup.find_torch())
    assert len(commands) > len(setup.PER_VARIANT) * len(setup.VARIANTS)
    for command in commands:
        run(command)
