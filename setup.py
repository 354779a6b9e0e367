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

    def build_extension(self, ext: Extension) -> None:
        cuda = os.environ.get("PYDIFFSEQ_CUDA", "AUTO")
        required = cuda == "1" or os.environ.get("PYDIFFSEQ_EXTENSION") == "1"
        # A CUDA toolkit that is found but does not work must not cost the CPU kernels.
        attempts = [cuda, "0"] if cuda == "AUTO" else [cuda]
        for attempt in attempts:
            try:
                self.cmake(Path(self.get_ext_fullpath(ext.name)).resolve(), attempt)
                return
            except (OSError, subprocess.CalledProcessError, ImportError) as error:
                if required and attempt == attempts[-1]:
                    raise
                reason = error
        ext.optional = True
        print(f"pydiffseq: the C++ extension was not built ({reason}); the ops will run on plain torch. "
              "Install a C++17 compiler and reinstall to get the kernels.", file=sys.stderr)

    def cmake(self, target: Path, cuda: str) -> None:
        import pybind11

        build = Path(self.build_temp).resolve() / f"cmake-{sys.implementation.cache_tag}-cuda-{cuda.lower()}"
        build.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        # Without build isolation cmake and ninja lie beside an interpreter whose environment need not be activated.
        env = os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])}
        subprocess.run([
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}", f"-DPYDIFFSEQ_CUDA={cuda}",
        ], check=True, env=env)
        subprocess.run(["cmake", "--build", str(build)], check=True, env=env)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if os.path.exists(path)]


class BuildWithPth(build_py):
    """Put pydiffseq.pth at the root of the wheel, so that it lands in site-packages (see pydiffseq_autoload.py)."""

    def run(self) -> None:
        super().run()
        # The wheel of an editable install is made from the folder of the install command, not from build_lib.
        root = self.distribution.get_command_obj("install").install_lib if self.editable_mode else self.build_lib
        self.copy_file(str(ROOT / PTH), str(Path(root) / PTH))


def version() -> str:
    text = (ROOT / "pydiffseq" / "version.py").read_text(encoding="utf-8")
    return re.search(r'__version__ = "([^"]+)"', text).group(1)


setup(
    version=version(),
    packages=[*find_packages(include=["pydiffseq", "pydiffseq.*"]), "hydra_plugins.pydiffseq"],
    py_modules=["pydiffseq_autoload"],
    package_data={"pydiffseq": ["py.typed"]},
    ext_modules=[Extension("pydiffseq._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "build_py": BuildWithPth},
)
