"""Compile every CUDA kernel with nvcc, on a machine with or without a GPU, and report what the assembler made of it.

    python tools/kernel_report.py [--arch 90a ...] [--markdown build/kernels/kernels.md]

For each architecture that the toolkit knows: registers, spills, stack and static shared memory of each kernel (dynamic
shared memory is chosen at the launch and limited to 99 KB there), and how many tensor-core instructions its machine code
has, where cuobjdump is found (in the toolkit, or in the pip package triton). Exit status 1 for a compile error, a warning,
a spill or a stack frame, or a matrix kernel without tensor-core instructions.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ("80", "86", "89", "90a", "100")
MATRIX_KERNELS = ("attention_forward_kernel", "attention_grad_query_kernel", "attention_grad_key_kernel",
                  "attention_grad_short_kernel", "nearest_filter_kernel", "cross_entropy_forward_kernel",
                  "cross_entropy_gradient_kernel")
FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-lineinfo", "-Icsrc", "-DPDS_X86=1",
         "-Xcompiler=-Wall,-Wextra,-Wno-unknown-pragmas", "-Xptxas=-v"]


@dataclasses.dataclass
class Kernel:
    file: str
    arch: str
    symbol: str
    name: str = ""
    registers: int = 0
    stack: int = 0
    spills: int = 0
    shared: int = 0
    tensor: int | None = None  # tensor-core instructions; None: not looked at

    def problems(self) -> list[str]:
        found = []
        if self.stack or self.spills:
            found.append(f"{self.stack} bytes of stack, {self.spills} bytes of spills")
        if self.tensor == 0 and self.is_matrix():
            found.append("no tensor-core instruction (HMMA, HGMMA)")
        return found

    def is_matrix(self) -> bool:
        return any(name in self.symbol for name in MATRIX_KERNELS)


def tool(name: str, nvcc: str) -> str | None:
    """A program of the toolkit: beside nvcc, on PATH, or in the pip package triton."""
    folders = [str(Path(nvcc).resolve().parent)]
    if "CUDA_HOME" in os.environ:
        folders.append(os.path.join(os.environ["CUDA_HOME"], "bin"))
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.submodule_search_locations:
        folders.append(os.path.join(next(iter(spec.submodule_search_locations)), "backends", "nvidia", "bin"))
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


def architectures(nvcc: str) -> list[str]:
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    return [arch for arch in ARCHITECTURES if f"sm_{arch.rstrip('a')}" in known.split()]


def compile_file(nvcc: str, file: Path, arch: str, folder: Path) -> tuple[list[Kernel], list[str], Path]:
    """The kernels of a file on one architecture, the problems, and the object."""
    target = folder / f"{file.stem}.sm_{arch}.o"
    command = [nvcc, *FLAGS, f"-gencode=arch=compute_{arch},code=sm_{arch}", "-c", str(file), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    output = done.stdout + done.stderr
    problems = [f"{file.name} sm_{arch}: {line.strip()}" for line in output.splitlines()
                if re.search(r"\bwarning\b|\berror\b", line)]
    if done.returncode != 0 and not problems:
        problems.append(f"{file.name} sm_{arch}: nvcc ended with status {done.returncode}: {output[-2000:]}")
    return parse(output, file.name, arch), problems, target


def parse(output: str, file: str, arch: str) -> list[Kernel]:
    """The kernels in what ``ptxas -v`` prints."""
    kernels: list[Kernel] = []
    for line in output.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)'", line):
            kernels.append(Kernel(file, arch, found[1]))
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            if kernels:  # those of a device function that was not inlined count, too
                kernels[-1].stack += int(found[1])
                kernels[-1].spills += int(found[2]) + int(found[3])
        elif found := re.search(r"Used (\d+) registers", line):
            kernels[-1].registers = int(found[1])
            shared = re.search(r"(\d+) bytes smem", line)
            kernels[-1].shared = int(shared[1]) if shared else 0
    return kernels


def count_tensor_instructions(cuobjdump: str, target: Path, kernels: list[Kernel]) -> list[str]:
    done = subprocess.run([cuobjdump, "--dump-sass", str(target)], capture_output=True, text=True,
                          env=os.environ | {"PATH": os.pathsep.join([str(Path(cuobjdump).parent), os.environ["PATH"]])})
    by_symbol = {kernel.symbol: kernel for kernel in kernels}
    current = None
    for line in done.stdout.splitlines():
        if found := re.search(r"Function : (\w+)", line):
            current = by_symbol.get(found[1])
            if current is not None:
                current.tensor = 0
        elif current is not None and re.search(r"\b[HQU]G?MMA\b|\bUTC[A-Z]*MMA\b", line):
            current.tensor = (current.tensor or 0) + 1
    return [f"{kernel.file} sm_{kernel.arch}: {cuobjdump} shows no machine code of {kernel.symbol}: {done.stderr[-500:]}"
            for kernel in kernels if kernel.tensor is None]


def demangle(kernels: list[Kernel]) -> None:
    names = [kernel.symbol for kernel in kernels]
    if shutil.which("c++filt"):
        names = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True).stdout.splitlines()
    for kernel, name in zip(kernels, names, strict=True):
        name = re.sub(r"\(anonymous namespace\)::|pds::cuda::|^void |\((int|bool)\)", "", name)
        kernel.name = re.sub(r"__nv_bfloat16", "bf16", re.sub(r"__half", "fp16", name.split("(")[0]))


def table(kernels: list[Kernel]) -> list[str]:
    lines = ["| kernel | arch | registers | stack + spills (bytes) | static shared (bytes) | tensor-core instructions |",
             "|---|---|---:|---:|---:|---:|"]
    for k in sorted(kernels, key=lambda k: (k.file, k.name, ARCHITECTURES.index(k.arch))):
        tensor = "not looked at" if k.tensor is None else k.tensor
        lines.append(f"| `{k.name}` | sm_{k.arch} | {k.registers} | {k.stack + k.spills} | {k.shared} | {tensor} |")
    return lines


def build(nvcc: str, archs: list[str], folder: Path) -> tuple[list[Kernel], list[str]]:
    """Compile and look at everything; the kernels and the problems."""
    cuobjdump = tool("cuobjdump", nvcc)
    jobs = [(file, arch) for file in sorted((ROOT / "csrc" / "cuda").glob("*.cu"), key=lambda f: -f.stat().st_size)
            for arch in archs]
    kernels: list[Kernel] = []
    problems: list[str] = []

    def work(job: tuple[Path, str]) -> tuple[list[Kernel], list[str]]:
        found, wrong, target = compile_file(nvcc, *job, folder)
        if cuobjdump and target.exists():
            wrong += count_tensor_instructions(cuobjdump, target, found)
        return found, wrong

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for job, (found, wrong) in zip(jobs, pool.map(work, jobs), strict=True):
            print(f"{job[0].name} sm_{job[1]}: {len(found)} kernels" + (f", {len(wrong)} problems" if wrong else ""),
                  file=sys.stderr, flush=True)
            kernels += found
            problems += wrong
    demangle(kernels)
    problems += [f"{k.name} sm_{k.arch}: {problem}" for k in kernels for problem in k.problems()]
    problems += [f"no kernel is called {name}" for name in MATRIX_KERNELS if not any(name in k.symbol for k in kernels)]
    if cuobjdump is None:
        print("cuobjdump was not found: the machine code was not searched for tensor-core instructions", file=sys.stderr)
    return kernels, problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="*", help=f"of {', '.join(ARCHITECTURES)}; default: what the toolkit knows of them")
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if nvcc is None:
        print("make kernels needs nvcc, which is not on PATH; install a CUDA toolkit or set CUDACXX", file=sys.stderr)
        return 1
    folder = ROOT / "build" / "kernels"
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    kernels, problems = build(nvcc, args.arch or architectures(nvcc), folder)
    lines = table(kernels)
    print("\n".join(lines))
    if args.markdown:
        args.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(kernels)} kernels in {time.monotonic() - started:.0f} s, {len(problems)} problems", file=sys.stderr)
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
