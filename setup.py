"""Build script: drives CMakeLists.txt (ninja, pybind11); metadata is in pyproject.toml.

Without a working compiler the package is still built, without ``pydiffseq._C``: the ops then run on
``pydiffseq/ops/reference.py`` and say so once. ``PYDIFFSEQ_EXTENSION=1`` turns a failed build into an error.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PTH = "pydiffseq.pth"


class CMakeBuild(build_ext):
    """Configure and build ``_C`` with CMake, into the place where setuptools expects it."""

    def run(self) -> None:
        for extension in self.extensions:
            self.build_extension(extension)

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            self._cmake(target)
        except (OSError, subprocess.CalledProcessError, ImportError) as error:
            if os.environ.get("PYDIFFSEQ_EXTENSION") == "1" or os.environ.get("PYDIFFSEQ_CUDA") == "1":
                raise
            ext.optional = True
            print(f"pydiffseq: the C++ extension was not built ({error}); the ops will run on plain torch. "
                  "Install a C++17 compiler and reinstall to get the kernels.", file=sys.stderr)

    def _cmake(self, target: Path) -> None:
        import pybind11

        build = Path(self.build_temp).resolve() / f"cmake-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPYDIFFSEQ_CUDA={os.environ.get('PYDIFFSEQ_CUDA', 'AUTO')}",
        ], check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if os.path.exists(path)]

    def copy_extensions_to_source(self) -> None:
        """Nothing to copy for an editable install when the extension was not built."""
        if all(os.path.exists(self.get_ext_fullpath(ext.name)) for ext in self.extensions):
            super().copy_extensions_to_source()


class BuildWithPth(build_py):
    """Put pydiffseq.pth at the root of the wheel, so that it lands in site-packages (see pydiffseq_autoload.py)."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            self.copy_file(str(ROOT / PTH), str(Path(self.build_lib) / PTH))


def version() -> str:
    text = (ROOT / "pydiffseq" / "version.py").read_text(encoding="utf-8")
    return re.search(r'__version__ = "([^"]+)"', text).group(1)


setup(
    version=version(),
    packages=find_packages(include=["pydiffseq", "pydiffseq.*", "hydra_plugins.*"]),
    py_modules=["pydiffseq_autoload"],
    package_data={"pydiffseq": ["py.typed"]},
    ext_modules=[Extension("pydiffseq._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "build_py": BuildWithPth},
)
