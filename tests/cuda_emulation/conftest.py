"""The CUDA kernels' own source, compiled for the host and run by csrc/cuda/emulation (see emulation.h there)."""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from pydiffseq.ops import _cuda

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-Wall", "-Wextra",
         "-Werror", "-Wno-unknown-pragmas", "-DPDS_X86=0"]


def sources():
    folders = (ROOT / "csrc" / "cuda", ROOT / "csrc" / "cuda" / "emulation", ROOT / "csrc" / "bindings" / "cuda")
    return [path for folder in folders for pattern in ("*.cu", "*.cpp") for path in sorted(folder.glob(pattern))]


def digest():
    """Of everything that the build reads."""
    content = hashlib.sha256(" ".join(FLAGS).encode())
    for path in sorted((ROOT / "csrc").rglob("*.*")):
        if path.parent.name not in ("cpu", "runtime"):
            content.update(path.read_bytes())
    return content.hexdigest()[:16]


def build(compiler, target):
    import pybind11

    target.parent.mkdir(parents=True, exist_ok=True)
    csrc = ROOT / "csrc"
    includes = [csrc, csrc / "cuda" / "emulation", pybind11.get_include(), sysconfig.get_paths()["include"]]

    def compile_one(source):
        out = target.with_name(f"{source.stem}{source.suffix}.{source.parent.name}.{target.name}.o")
        language = ["-x", "c++", "-include", "cuda_runtime.h"] if source.suffix == ".cu" else []
        command = [compiler, *FLAGS, *(f"-I{path}" for path in includes), *language, "-c", str(source), "-o", str(out)]
        subprocess.run(command, check=True)
        return out

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources()))
    temporary = target.with_suffix(".part")
    subprocess.run([compiler, "-shared", "-o", str(temporary), *map(str, objects)], check=True)
    for path in objects:
        path.unlink()
    temporary.rename(target)


@pytest.fixture(scope="session")
def emulation():
    """The module _C_emulation; compiled once per state of the sources (about half a minute on one core)."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None or importlib.util.find_spec("pybind11") is None:
        pytest.skip("needs a C++ compiler and pybind11")
    folder = ROOT / "build" / "emulation"
    target = folder / f"_C_emulation-{digest()}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not target.exists():
        build(compiler, target)
    for old in folder.glob("_C_emulation-*"):
        if old != target:
            old.unlink()
    spec = importlib.util.spec_from_file_location("_C_emulation", target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def install(emulation, monkeypatch):
    """Emulated kernels in the place of ``_C`` for the ops' CUDA functions, which then take CPU tensors."""
    for name in ("noise", "timestep_attention"):
        monkeypatch.setattr(sys.modules[f"pydiffseq.ops.{name}"], "C", emulation)
    monkeypatch.setattr(_cuda, "C", emulation)
    monkeypatch.setattr(_cuda, "launch", lambda kernel, device, *arguments: kernel(*arguments, 0, 0))
    yield emulation
    emulation.set_order(0)


@pytest.fixture(params=["together", "first warp ahead", "last warp ahead"])
def every_order(install, request):
    """Runs the test with the warps of a block in several orders: what races shows."""
    install.set_order(["together", "first warp ahead", "last warp ahead"].index(request.param))
    return install


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield
