"""Show versions, devices, which kernels are compiled for what, and what is missing with the command that mends it."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from pydiffseq.version import __version__

# Op -> the function of pydiffseq._C that runs it.
KERNELS = {
    "q_sample": "q_sample",
    "embed_q_sample": "q_sample",
    "sampler_step": "sampler_step",
    "philox_normal": "philox_normal",
    "dropout": "dropout",
    "dropout_add": "dropout",
    "geglu": "geglu",
    "PackedLinear": "linear",
    "nearest": "nearest_search",
    "nearest_topk": "nearest_search",   # and nearest_topk on the CPU, of the same file
    "linear_cross_entropy": "cross_entropy_forward",
    "linear_logsumexp": "cross_entropy_forward",
    "timestep_attention": "timestep_attention_forward",
    "packed_timestep_attention": "timestep_attention_forward",
    "rotary_timestep_attention": "timestep_attention_forward",
    "timestep_self_attention": "timestep_attention_forward",
    "rotary_timestep_self_attention": "timestep_attention_forward",
}
# Import name -> (distributions that provide it, what it is for); the first distribution is the one to install.
REQUIRED = {
    "numpy": (("numpy",), "arrays"),
    "sentencepiece": (("sentencepiece",), "subwords"),
    "sacrebleu": (("sacrebleu",), "BLEU"),
    "tqdm": (("tqdm",), "progress bars"),
}
OPTIONAL = {
    "fairseq": (("fairseq-fixed", "fairseq"), "training and translation with the fairseq commands, pydiffseq prepare"),
    "subword_nmt": (("subword-nmt",), "prepare --bpe-codes"),
}
REFERENCE = "plain torch"
REINSTALL = "pip install --force-reinstall --no-deps --no-cache-dir"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    report = collect()
    print(json.dumps(report, indent=2) if args.json else render(report))
    return 0


def collect() -> dict[str, Any]:
    """Everything that the command shows, as plain values."""
    torch = import_or_none("torch")
    extension, reason = compiled_module()
    return {
        "versions": {
            "pydiffseq": __version__,
            "python": f"{platform.python_version()} ({sys.executable})",
            "torch": torch.__version__ if torch else None,
            **{name: installed_version(name, provided) for name, (provided, _) in (REQUIRED | OPTIONAL).items()},
        },
        "devices": devices(torch),
        "extension": describe_extension(extension, reason),
        "ops": {op: op_targets(extension, kernel) for op, kernel in KERNELS.items()},
        "missing": missing(torch, extension, reason),
    }


def import_or_none(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def compiled_module() -> tuple[Any, str]:
    """``pydiffseq._C`` as the ops use it, or ``None`` and why not."""
    if os.environ.get("PYDIFFSEQ_EXTENSION") == "0":
        return None, "switched off by PYDIFFSEQ_EXTENSION=0"
    try:
        return importlib.import_module("pydiffseq._C"), ""
    except ImportError as error:
        return None, str(error)


def installed_version(name: str, distributions: tuple[str, ...]) -> str | None:
    """Version of the first installed distribution that provides the module ``name``; ``None`` when it is missing."""
    if importlib.util.find_spec(name) is None:
        return None
    for distribution in distributions:
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        return version if distribution == name else f"{version} ({distribution})"
    return "installed, version unknown"


def devices(torch: ModuleType | None) -> dict[str, str]:
    """Device name -> description: the processor and every CUDA device that torch can use."""
    found = {"cpu": f"{processor()}, {os.cpu_count()} logical cores"}
    if torch is None:
        return found
    found["cpu"] += f", {torch.get_num_threads()} torch threads"
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(i)
        found[f"cuda:{i}"] = (f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
                              f"compute capability {properties.major}.{properties.minor}")
    return found


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def describe_extension(extension: Any, reason: str) -> dict[str, Any]:
    if extension is None:
        return {"compiled": False, "reason": reason}
    return {"compiled": True, "file": extension.__file__, "isa": extension.isa(),
            "detected_isa": extension.detected_isa(), "cuda": bool(extension.has_cuda)}


def op_targets(extension: Any, kernel: str) -> dict[str, str]:
    """What an op runs on: the instruction set of its CPU kernel, and whether there is a CUDA kernel."""
    names = dir(extension) if extension is not None else []
    cuda = any(kernel in name and "cuda" in name for name in names)
    return {"cpu": extension.isa() if kernel in names else REFERENCE, "cuda": "compiled" if cuda else REFERENCE}


def missing(torch: ModuleType | None, extension: Any, reason: str) -> list[dict[str, str]]:
    """What is not there: ``{"what": ..., "mend": a command}``."""
    problems: list[tuple[str, str]] = []
    if torch is None:
        problems.append(("torch, which everything needs", "pip install torch"))
    if extension is None and os.environ.get("PYDIFFSEQ_EXTENSION") == "0":
        problems.append(("the compiled kernels, switched off by PYDIFFSEQ_EXTENSION=0", "unset PYDIFFSEQ_EXTENSION"))
    elif extension is None:
        problems.append((f"the compiled kernels ({reason}); the ops run on plain torch, slower",
                         f"install a C++17 compiler (apt-get install g++), then {REINSTALL} {install_target()}"))
    elif torch and torch.cuda.is_available() and not extension.has_cuda:
        problems.append(("CUDA kernels for the GPU of this machine; its ops run on plain torch",
                         f"PYDIFFSEQ_CUDA=1 {REINSTALL} {install_target()}   (needs nvcc)"))
    for name, (distributions, purpose) in (REQUIRED | OPTIONAL).items():
        if importlib.util.find_spec(name) is None:
            problems.append((f"{name}: {purpose}", f"pip install {distributions[0]}"))
    if importlib.util.find_spec("fairseq") is not None and "pydiffseq_autoload" not in sys.modules:
        problems.append(("pydiffseq.pth, by which the fairseq commands find the plug-in without --user-dir",
                         f"{REINSTALL} {install_target()}"))
    elif os.environ.get("PYDIFFSEQ_AUTOLOAD") == "0":
        problems.append(("the plug-in in the fairseq commands, switched off by PYDIFFSEQ_AUTOLOAD=0",
                         "unset PYDIFFSEQ_AUTOLOAD, or pass --user-dir pydiffseq"))
    return [{"what": what, "mend": command} for what, command in problems]


def install_target() -> str:
    """What to hand to pip: the source folder of an editable install (``-e ...``), or the package's name."""
    root = Path(__file__).resolve().parents[2]
    return f"-e {root}" if (root / "setup.py").is_file() else "pydiffseq"


def render(report: dict[str, Any]) -> str:
    """The report as text of aligned columns."""
    extension = report["extension"]
    lines = ["versions", *rows(report["versions"]), "", "devices", *rows(report["devices"]), "", "compiled kernels"]
    if extension["compiled"]:
        detected = extension["detected_isa"]
        active = extension["isa"] + ("" if extension["isa"] == detected else f" (the processor has {detected})")
        lines += rows({"file": extension["file"], "instruction set": active,
                       "CUDA": "compiled in" if extension["cuda"] else "not compiled in"})
    else:
        lines += rows({"none": extension["reason"]})
    lines += ["", f"{'op':<34}{'CPU':<16}CUDA"]
    lines += [f"  {op:<32}{targets['cpu']:<16}{targets['cuda']}" for op, targets in report["ops"].items()]
    lines += ["", "missing" if report["missing"] else "nothing is missing"]
    for problem in report["missing"]:
        lines += [f"  {problem['what']}", f"      {problem['mend']}"]
    return "\n".join(lines)


def rows(values: dict[str, Any]) -> list[str]:
    width = max(map(len, values)) + 2
    return [f"  {name:<{width}}{'not installed' if value is None else value}" for name, value in values.items()]
