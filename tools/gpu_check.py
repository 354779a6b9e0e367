"""One command for a machine with a CUDA GPU, without network: build, tests, benchmarks, decoding, compute-sanitizer.

    python tools/gpu_check.py [--out build/gpu] [--minutes 9]

Needs nvcc and a Python with torch for CUDA, pybind11, cmake, ninja and pytest. Builds the extension into pydiffseq/ of this
checkout. Every stage has its share of the time and its own exit status; none hides another. Writes gpu_check.json,
gpu_check.md, gpu_check.log, benchmarks.json and decoding.json to --out (by default $OUT, else build/gpu).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEAST_SECONDS = 5.0
MEASURED = ("benchmarks", "decoding")   # stages that write a file of figures, and whose output the markdown shows
TAIL = 3000   # characters of a stage's output that the markdown shows


@dataclasses.dataclass
class Stage:
    name: str
    command: Callable[[], list[str]]   # made when it is the stage's turn; an exception is the stage's failure
    seconds: float
    env: dict[str, str] = dataclasses.field(default_factory=dict)
    status: str = "not run"
    taken: float = 0.0
    output: str = ""

    @property
    def good(self) -> bool:
        return self.status in ("ok", "left out")


class LeftOut(Exception):
    """A stage that this machine cannot run, and why."""


# --- Stages ---


def environment() -> list[str]:
    code = ("import sys, torch; print('Python', sys.version); print('torch', torch.__version__, torch.version.cuda); "
            "print(torch.cuda.get_device_properties(0))")
    return ["bash", "-c", f"nvidia-smi; nvcc --version; {shlex.join([sys.executable, '-c', code])}"]


def architecture() -> str:
    """Of the first GPU, as CMake writes it."""
    done = subprocess.run([sys.executable, "-c", "import torch; print(*torch.cuda.get_device_capability(0), sep='')"],
                          capture_output=True, text=True, timeout=120)
    if done.returncode != 0:
        raise RuntimeError(f"torch sees no GPU: {done.stderr[-500:]}")
    return f"{done.stdout.strip()}-real"


def build() -> list[str]:
    if importlib.util.find_spec("pybind11") is None:
        raise RuntimeError("pybind11 is missing; the extension cannot be built")
    import pybind11

    folder = ROOT / "build" / f"gpu-{sys.implementation.cache_tag}"
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-DCMAKE_BUILD_TYPE=Release", "-DPYDIFFSEQ_CUDA=1",
                 f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                 f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={ROOT / 'pydiffseq'}", f"-DCMAKE_CUDA_ARCHITECTURES={architecture()}"]
    if shutil.which("ninja"):
        configure += ["-G", "Ninja"]
    compile_all = ["cmake", "--build", str(folder), "--parallel", str(os.cpu_count())]
    return ["bash", "-c", " && ".join(shlex.join(words) for words in (configure, compile_all))]


def tests(path: str, kernels: bool) -> list[str]:
    """pytest; where the CUDA kernels are needed and are not there, that is a failure and not a lot of skipped tests."""
    code = ("import sys, torch; from pydiffseq.ops import _cuda; there = torch.cuda.is_available() and _cuda.compiled(); "
            f"sys.exit(None if there or not {kernels} else 'no GPU, or no kernels')")
    run = [sys.executable, "-m", "pytest", path, "-o", "addopts=", "-q", "-p", "no:cacheprovider", "--tb=short",
           "--durations=5"]
    return ["bash", "-c", " && ".join(shlex.join(words) for words in ([sys.executable, "-c", code], run))]


def benchmarks(out: Path, seconds: float) -> list[str]:
    return [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--json", str(out / "benchmarks.json"),
            "--seconds", f"{seconds:.0f}"]


def decoding(out: Path) -> list[str]:
    """Sentences per second of whole decoding loops; against fairseq's Transformer where that is installed."""
    contenders = ["pydiffseq bfloat16", "pydiffseq bfloat16 without graphs"]
    if importlib.util.find_spec("fairseq") is not None:
        contenders.append("transformer float16")
    return [sys.executable, str(ROOT / "benchmarks" / "decode.py"), "--device", "cuda", "--sizes", "iwslt14",
            "--batches", "8", "64", "--candidates", "10", "--steps", "20", "--seconds", "2",
            "--json", str(out / "decoding.json"), "--contenders", *contenders]


def sanitizer(check: str) -> list[str]:
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if program is None:
        raise LeftOut("compute-sanitizer was not found")
    return [program, "--tool", check, "--error-exitcode", "9", sys.executable, str(Path(__file__).resolve()), "--exercise"]


def stages(out: Path, benchmark_seconds: float) -> list[Stage]:
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        Stage("environment", environment, 60),
        Stage("build", build, 240),
        Stage("CUDA tests", lambda: tests("tests/cuda", kernels=True), 150),
        Stage("benchmarks", lambda: benchmarks(out, benchmark_seconds), benchmark_seconds + 60),
        Stage("decoding", lambda: decoding(out), 100),
        Stage("memcheck", lambda: sanitizer("memcheck"), 90, uncached),
        Stage("racecheck", lambda: sanitizer("racecheck"), 90),
        Stage("synccheck", lambda: sanitizer("synccheck"), 60),
        Stage("op tests on the CPU", lambda: tests("tests/ops", kernels=False), 120),
    ]


# --- Running ---


def run(stage: Stage, log: Path, end: float) -> None:
    limit = min(stage.seconds, end - time.monotonic())
    if limit < LEAST_SECONDS:
        stage.status = "no time left"
        return
    started = time.monotonic()
    try:
        command = stage.command()
    except LeftOut as reason:
        stage.status, stage.output = "left out", str(reason)
    except Exception as error:
        stage.status, stage.output = "failed to start", f"{type(error).__name__}: {error}"
    else:
        stage.status, stage.output = execute(command, stage.env, limit)
    stage.taken = time.monotonic() - started
    with log.open("a", encoding="utf-8") as file:
        file.write(f"\n===== {stage.name}: {stage.status}, {stage.taken:.1f} s =====\n{stage.output}\n")


def execute(command: list[str], env: dict[str, str], limit: float) -> tuple[str, str]:
    """(status, output) of a command, which is ended with all its children where it takes too long."""
    # cmake may lie beside this Python, and nvcc where toolkits are usually put.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    env = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | env
    try:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                   errors="replace", start_new_session=True)
    except OSError as error:
        return "failed to start", str(error)
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return f"timed out after {limit:.0f} s", output
    return ("ok" if process.returncode == 0 else f"exit status {process.returncode}"), output


def report(done: list[Stage], out: Path) -> None:
    """gpu_check.json and gpu_check.md, also of a run that is not over yet."""
    files = {name: out / f"{name}.json" for name in MEASURED}
    measured = {name: json.loads(file.read_text(encoding="utf-8")) if file.exists() else {} for name, file in files.items()}
    listed = [{"name": s.name, "status": s.status, "seconds": round(s.taken, 1)} for s in done]
    content = json.dumps({"stages": listed, **measured}, indent=1)
    (out / "gpu_check.json").write_text(content, encoding="utf-8")
    lines = ["# GPU check", "", "| stage | result | s |", "|---|---|---:|",
             *(f"| {s.name} | {s.status} | {s.taken:.1f} |" for s in done), ""]
    for stage in done:
        if stage.name in MEASURED or not stage.good:
            shown = stage.output if stage.good else stage.output[-TAIL:]
            lines += [f"## {stage.name}", "", shown if stage.good else f"```\n{shown}\n```", ""]
    (out / "gpu_check.md").write_text("\n".join(lines), encoding="utf-8")


def exercise() -> int:
    """Every CUDA kernel on the small inputs of its self-check; for compute-sanitizer."""
    import torch

    from pydiffseq.ops import _cuda

    device, failed = torch.device("cuda", 0), 0
    for family in ("noise", "dropout", "geglu", "nearest", "cross_entropy", "timestep_attention",
                   "packed_timestep_attention"):
        for name, kernel, reference, *tolerance in sys.modules[f"pydiffseq.ops.{family}"]._cuda_cases(device):
            good = _cuda._same(kernel(), reference(), *tolerance)
            torch.cuda.synchronize()
            print(f"{family}: {name} {'agrees with' if good else 'DIFFERS FROM'} its reference", flush=True)
            failed += not good
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "build" / "gpu"))
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--benchmark-seconds", type=float, default=170.0)
    parser.add_argument("--exercise", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.exercise:
        sys.path.insert(0, str(ROOT))
        return exercise()
    args.out.mkdir(parents=True, exist_ok=True)
    for old in ("gpu_check.log", *(f"{name}.json" for name in MEASURED)):
        (args.out / old).unlink(missing_ok=True)
    end, done = time.monotonic() + 60 * args.minutes, []
    for stage in stages(args.out, args.benchmark_seconds):
        print(f"{stage.name} ...", flush=True)
        run(stage, args.out / "gpu_check.log", end)
        print(f"{stage.name}: {stage.status}, {stage.taken:.1f} s", flush=True)
        done.append(stage)
        report(done, args.out)
    print((args.out / "gpu_check.md").read_text(encoding="utf-8"))
    return 0 if all(stage.good for stage in done) else 1


if __name__ == "__main__":
    sys.exit(main())
