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
         "-Werror", "-Wno-unknown-pragmas", "-DPDS_X86=0",
         # A vector access that is not aligned ends the process, as it ends a kernel.
         "-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]


def sources():
    folders = (ROOT / "csrc" / "cuda", ROOT / "csrc" / "cuda" / "emulation", ROOT / "csrc" / "bindings" / "cuda")
    return [path for folder in folders for pattern in ("*.cu", "*.cpp") for path in sorted(folder.glob(pattern))]


def digest(*paths):
    content = hashlib.sha256(" ".join(FLAGS).encode())
    for path in paths:
        content.update(path.read_bytes())
    return content.hexdigest()[:16]


def compiler():
    found = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if found is None or importlib.util.find_spec("pybind11") is None:
        pytest.skip("needs a C++ compiler and pybind11")
    return found


def compile_one(program, source, out):
    import pybind11

    csrc = ROOT / "csrc"
    includes = [csrc, csrc / "cuda" / "emulation", pybind11.get_include(), sysconfig.get_paths()["include"]]
    language = ["-x", "c++", "-include", "cuda_runtime.h"] if source.suffix == ".cu" else []
    temporary = out.with_suffix(f".{os.getpid()}")
    command = [program, *FLAGS, *(f"-I{path}" for path in includes), *language, "-c", str(source), "-o", str(temporary)]
    subprocess.run(command, check=True)
    temporary.rename(out)


def build(program, folder, name, files):
    """The file of the module ``name``; what is compiled already, from the same sources, is not compiled again."""
    folder.mkdir(parents=True, exist_ok=True)
    headers = sorted(path for path in (ROOT / "csrc").rglob("*.*h") if path.parent.name != "cpu" or path.stem == "dispatch")
    tag = sysconfig.get_config_var("EXT_SUFFIX")
    objects = {source: folder / f"{source.parent.name}-{source.name}-{digest(*headers, source)}{tag}.o"
               for source in files}
    target = folder / f"{name}-{digest(*headers, *files)}{tag}"
    if not target.exists():
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda item: item[1].exists() or compile_one(program, *item), objects.items()))
        temporary = target.with_suffix(f".{os.getpid()}")
        subprocess.run([program, "-shared", "-o", str(temporary), *map(str, objects.values())], check=True)
        temporary.rename(target)
    for old in folder.glob(f"{name}-*"):
        if old != target:
            old.unlink()
    for path in files:
        for old in set(folder.glob(f"{path.parent.name}-{path.name}-*")) - {*objects.values()}:
            old.unlink()
    return target


@pytest.fixture(scope="session")
def load():
    """load(name, files): the module ``name``, compiled where its sources have changed."""
    def run(name, files):
        spec = importlib.util.spec_from_file_location(name, build(compiler(), ROOT / "build" / "emulation", name, files))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return run


@pytest.fixture(scope="session")
def emulation(load):
    """The CUDA bindings on emulated kernels; compiling them takes one to two minutes on one core."""
    return load("_C_emulation", sources())


@pytest.fixture
def install(emulation, monkeypatch):
    """Emulated kernels in the place of ``_C`` for the ops' CUDA functions, which then take CPU tensors."""
    for name in ("noise", "dropout", "geglu", "nearest", "cross_entropy", "timestep_attention"):
        monkeypatch.setattr(sys.modules[f"pydiffseq.ops.{name}"], "C", emulation)
    monkeypatch.setattr(_cuda, "C", emulation)
    monkeypatch.setattr(_cuda, "launch", lambda kernel, device, *arguments: kernel(*arguments, 0, 0))
    yield emulation
    emulation.set_order(0)
    emulation.set_processors(2)


@pytest.fixture(params=["together", "first warp ahead", "last warp ahead"])
def every_order(install, request):
    """Runs the test with the warps of a block in several orders: what races shows."""
    install.set_order(["together", "first warp ahead", "last warp ahead"].index(request.param))
    return install


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield
