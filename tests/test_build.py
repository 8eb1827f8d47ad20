"""setup.py finds the environment's torch without importing it and says clearly what is missing."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sysconfig
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest
import setuptools

import cmim_kernels

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
    return Path(sysconfig.get_path("purelib", "venv", {"base": str(environment)}))


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
@pytest.mark.parametrize(("setting", "says"), [("1", "there is no nvcc"), ("yes", "must be 0, 1 or unset")])
def test_forcing_cuda(
    empty_environment: Path, torch_version: str, setting: str, says: str, tmp_path: Path
) -> None:
    if setting == "1" and (shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()):
        pytest.skip("this machine has nvcc")
    result = run_setup(
        empty_environment, "build_ext", "--build-lib", str(tmp_path), CMIM_KERNELS_CUDA=setting
    )
    assert says in the_only_line(result)


def test_the_build_asks_for_no_torch() -> None:
    """Named in the build system, torch would be downloaded into pip's isolated build environment."""
    text = (ROOT / "pyproject.toml").read_text()
    requires = text.split("[build-system]")[1].split("[project]")[0].split("requires = ")[1]
    assert "torch" not in requires


def test_the_versions_agree() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert f'\nversion = "{cmim_kernels.__version__}"\n' in text


@pytest.mark.slow
def test_variants_share_no_function(tmp_path: Path) -> None:
    """The linker keeps one of equal weak functions: an AVX-512 one would crash an older processor."""
    if platform.machine() != "x86_64":
        pytest.skip("one variant only on this architecture")
    target = tmp_path / "kernel.o"
    compiler = os.environ.get("CXX", "g++")
    command = [compiler, "-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-march=x86-64-v4"]
    command += ["-DCMIM_VARIANT=avx512", f"-I{ROOT / 'csrc'}", "-o", str(target)]
    command += ["-c", str(ROOT / "csrc" / "cpu" / "kernel.cpp")]
    subprocess.run(command, check=True)
    symbols = subprocess.run(["nm", "-C", str(target)], check=True, capture_output=True, text=True).stdout
    weak_functions = [line for line in symbols.splitlines() if line.split()[1:2] == ["W"]]
    assert not weak_functions
