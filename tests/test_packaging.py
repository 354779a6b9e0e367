"""What ends up in the source archive, the wheel and the editable wheel, and installing without a compiler.

The builds run without a working compiler, so that they take seconds; the extension itself is what all other tests use.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("csrc", "pydiffseq", "hydra_plugins", "setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in",
           "LICENSE", "README.md", "pydiffseq.pth", "pydiffseq_autoload.py")

if int(version("setuptools").split(".")[0]) < 77:
    pytest.skip("the build needs setuptools >= 77", allow_module_level=True)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the sources, without what was compiled."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(source, folder / name)
    return folder


def build(checkout, hook, tmp_path, **environment):
    """Call a hook of the build backend as pip does, with a compiler that always fails."""
    code = f"import setuptools.build_meta as backend, sys; backend.{hook}(sys.argv[1])"
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYDIFFSEQ_")}
    env |= {"CXX": "/bin/false", "PYDIFFSEQ_CUDA": "0"} | environment
    command = [sys.executable, "-c", code, str(tmp_path)]
    return subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True)


def names(folder, pattern):
    (archive,) = folder.glob(pattern)
    if archive.suffix == ".whl":
        return zipfile.ZipFile(archive).namelist()
    return [name.partition("/")[2] for name in tarfile.open(archive).getnames()]


def test_wheel_without_a_compiler(checkout, tmp_path):
    """It is built, says once what is missing, and carries the files that stand outside the package."""
    done = build(checkout, "build_wheel", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the C++ extension was not built") == 1
    assert "Install a C++17 compiler" in done.stderr
    files = names(tmp_path, "*.whl")
    assert not [name for name in files if name.endswith(".so")]
    for name in ("pydiffseq.pth", "pydiffseq_autoload.py", "hydra_plugins/pydiffseq/__init__.py", "pydiffseq/py.typed",
                 "pydiffseq/cli/prepare.py", "pydiffseq/ops/reference.py", "pydiffseq/fairseq_plugin/compat.py"):
        assert name in files
    assert not [name for name in files if name.startswith(("tests", "csrc", "build", "hydra_plugins/__init__"))]


def test_editable_wheel_has_the_pth(checkout, tmp_path):
    done = build(checkout, "build_editable", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "pydiffseq.pth" in names(tmp_path, "*.whl")


def test_required_extension_fails_loudly(checkout, tmp_path):
    for environment in ({"PYDIFFSEQ_EXTENSION": "1"}, {"PYDIFFSEQ_CUDA": "1"}):
        assert build(checkout, "build_wheel", tmp_path, **environment).returncode != 0
    assert not list(tmp_path.glob("*.whl"))


def test_source_archive_can_be_built_from(checkout, tmp_path):
    done = build(checkout, "build_sdist", tmp_path)
    assert done.returncode == 0, done.stderr
    files = set(names(tmp_path, "*.tar.gz"))
    wanted = {str(path.relative_to(checkout)) for path in (checkout / "csrc").rglob("*") if path.is_file()}
    assert wanted <= files
    assert set(SOURCES) - {"csrc", "pydiffseq", "hydra_plugins"} <= files
    assert "hydra_plugins/pydiffseq/__init__.py" in files
