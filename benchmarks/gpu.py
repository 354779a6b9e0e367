"""Time every op on a CUDA device against what else a user would take; `make gpu-check` runs this.

    python benchmarks/gpu.py --json build/gpu/benchmarks.json [--seconds 200] [--device cpu --small]

Times are medians of groups of calls between CUDA events; `graph` is the same call replayed from a CUDA graph, so without
Python and launches. The ceilings (a copy, a bfloat16 matrix product) are measured in the same run. A contender that
fails or does not fit in the time says so and hides nothing else. The file is rewritten after every measurement.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pydiffseq import ops
from pydiffseq.ops import _cuda, reference

OURS = "pydiffseq"
LATE = ("compile", "flex")  # their compilers take seconds: after everything else
V, TOP = 30522, 8


@dataclasses.dataclass
class Case:
    """One op at one size: contender -> function; and what must move and be computed at least."""

    op: str
    name: str
    contenders: dict[str, Callable[[], Any]]
    bytes: float = 0.0
    flops: float = 0.0
    check: Callable[[], dict[str, Any]] | None = None


# --- Timing ---


def run_group(function: Callable[[], Any], calls: int, device: torch.device) -> float:
    """Seconds per call."""
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - started) / calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Median of 7 groups of at least about 5 ms, after a warm-up."""
    for _ in range(3):
        function()
    once = run_group(function, 1, device)
    calls = max(1, min(200, math.ceil(5e-3 / max(once, 1e-7))))
    return statistics.median(run_group(function, calls, device) for _ in range(3 if once > 0.1 else 7))


def graph_seconds(function: Callable[[], Any], device: torch.device) -> float | None:
    """The same from a CUDA graph; None where it cannot be captured."""
    if device.type != "cuda":
        return None
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            function()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        return seconds(graph.replay, device)
    except Exception:
        torch.cuda.synchronize()
        return None


def ceilings(device: torch.device, small: bool) -> dict[str, float]:
    """bytes/s of a copy (read and write) and FLOP/s of a bfloat16 matrix product."""
    source = torch.empty((1 << 20) if small else (256 << 20), dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    copy = 2 * source.numel() * 4 / seconds(lambda: target.copy_(source), device)
    n = 256 if small else 8192
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    return {"copy_bytes_per_s": copy, "bfloat16_flops_per_s": 2 * n**3 / seconds(lambda: a @ b, device)}


# --- Noise ---


def eager_q_sample(x0: Tensor, t: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
    return signal.to(x0.dtype)[t][..., None] * x0 + sigma.to(x0.dtype)[t][..., None] * torch.randn_like(x0)


def eager_step(x: Tensor, x0_hat: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    a, b, c = (value.to(x.dtype)[..., None] for value in (a, b, c))
    return a * x + b * x0_hat + c * torch.randn_like(x)


def noise_cases(device: torch.device, small: bool) -> list[Case]:
    sizes = [(2, 5, 16)] if small else [(128, 50, 128), (800, 50, 128), (1024, 512, 256)]
    cases = []
    for (B, N, d), dtype in ((size, dtype) for size in sizes for dtype in (torch.float32, torch.bfloat16)):
        signal = torch.linspace(1, 0, 2000, device=device)
        sigma = (1 - signal**2).sqrt()
        x, y = (torch.randn(B, N, d, device=device).to(dtype) for _ in range(2))
        t, seed = torch.randint(0, 2000, (B, N), device=device), torch.tensor([3], device=device)
        a, b, c = signal[t], sigma[t], sigma[t] * 0.5
        name, moved = f"B{B}-N{N}-d{d} {str(dtype)[6:]}", x.numel() * x.element_size()
        sample, step = (x, t, signal, sigma), (x, y, a, b, c)
        cases.append(Case("q_sample", name, {
            OURS: lambda s=sample, k=seed: ops.q_sample(*s, seed=k), "eager": functools.partial(eager_q_sample, *sample),
            "compile": functools.partial(torch.compile(eager_q_sample, dynamic=False), *sample)}, 2 * moved))
        cases.append(Case("sampler_step", name, {
            OURS: lambda s=step, k=seed: ops.sampler_step(*s, seed=k), "eager": functools.partial(eager_step, *step),
            "compile": functools.partial(torch.compile(eager_step, dynamic=False), *step)}, 3 * moved))
        table, ids = torch.randn(V, d, device=device).to(dtype), torch.randint(0, V, (B, N), device=device)
        embed = (ids, t, signal, sigma)

        def eager_embed(table=table, ids=ids, t=t, signal=signal, sigma=sigma):
            x0 = F.embedding(ids, table)
            x0 = x0 + 0.1 * torch.randn_like(x0)
            return x0, eager_q_sample(x0, t, signal, sigma)

        cases.append(Case("embed_q_sample", name, {
            OURS: lambda e=table, i=embed, k=seed: ops.embed_q_sample(e, *i, sigma0=0.1, seed=k), "eager": eager_embed},
            3 * moved))
        cases.append(rounded_step_case(name, x, table, ids, (a, b, c), seed))
        cases.append(embed_gradient_case(name, x, y, ids, t, signal))
    return cases


def rounded_step_case(name: str, x: Tensor, table: Tensor, ids: Tensor, factors: tuple[Tensor, ...], seed: Tensor) -> Case:
    """The update with the gather of the rounding; the table stays in the cache and is not counted."""
    def eager():
        return eager_step(x, F.embedding(ids, table), *factors)

    return Case("sampler_step of ids", name, {
        OURS: lambda: ops.sampler_step(x, table, *factors, ids=ids, seed=seed), "eager": eager},
        2 * x.numel() * x.element_size())


def embed_gradient_case(name: str, grad_x0: Tensor, grad_x_t: Tensor, ids: Tensor, t: Tensor, signal: Tensor) -> Case:
    """The gradient of the table of embed_q_sample; index_add is not deterministic."""
    def total():
        return (grad_x0.float() + signal[t][..., None] * grad_x_t.float()).flatten(0, 1)

    return Case("embed_q_sample gradient", name, {
        OURS: lambda: torch.ops.pydiffseq.embed_q_sample_backward(grad_x0, grad_x_t, ids, t, signal, None, V, grad_x0),
        "index_add": lambda: grad_x0.new_zeros(V, grad_x0.shape[-1], dtype=torch.float32).index_add_(
            0, ids.flatten(), total()),
        "sorted": lambda: torch.ops.aten.embedding_dense_backward(total(), ids, V, -1, False)},
        2 * grad_x0.numel() * grad_x0.element_size() + V * grad_x0.shape[-1] * grad_x0.element_size())


# --- Nearest ---


def matmul_argmax(x: Tensor, table: Tensor, bias: Tensor) -> Tensor:
    """Not exact: bfloat16 products."""
    return torch.addmm(bias, x, table.T).argmax(-1)


def matmul_topk(x: Tensor, table: Tensor, bias: Tensor) -> Tensor:
    return torch.addmm(bias, x, table.T).topk(TOP).indices


def nearest_cases(device: torch.device, small: bool) -> list[Case]:
    cases = []
    sizes = [(9, 16)] if small else [(512, 128), (6400, 64), (6400, 128), (40000, 128), (100000, 128), (6400, 768)]
    for rows, dim in sizes:
        vocab = 300 if small else V
        table = torch.randn(vocab, dim, device=device)
        x = table[torch.randint(vocab, (rows,), device=device)] + torch.randn(rows, dim, device=device)
        half = x.bfloat16(), table.bfloat16(), -0.5 * table.square().sum(-1).bfloat16()

        def check(x=x, table=table):
            part = x[:256]
            exact = -torch.cdist(part.double(), table.double(), compute_mode="donot_use_mm_for_euclid_dist")
            return {"wrong_of_256": int((ops.nearest(part, table)[0] != exact.argmax(-1)).sum())}

        cases.append(Case("nearest", f"M{rows}-d{dim}-V{vocab} float32", {
            OURS: lambda x=x, e=table: ops.nearest(x, e), "cdist": lambda x=x, e=table: torch.cdist(x, e).argmin(-1),
            "bf16 matmul+argmax": functools.partial(matmul_argmax, *half)},
            4.0 * (2 * rows * dim + vocab * dim), 2.0 * rows * dim * vocab, check))
        if rows <= 6400 and dim <= 128:
            cases.append(Case("nearest_topk", f"k{TOP}-M{rows}-d{dim}-V{vocab} float32", {
                OURS: lambda x=x, e=table: ops.nearest_topk(x, e, k=TOP),
                "cdist+topk": lambda x=x, e=table: torch.cdist(x, e).topk(TOP, largest=False).indices,
                "bf16 matmul+topk": functools.partial(matmul_topk, *half)},
                4.0 * (rows * dim + vocab * dim + 3 * rows * TOP), 2.0 * rows * dim * vocab))
    return cases


# --- Attention ---


def literal(q, k, v, tau, u, w):
    q, k, v, tau = (x.transpose(1, 2) for x in (q, k, v, tau))
    scores = (q + u[:, None]) @ k.transpose(-1, -2) + (q + w[:, None]) @ tau.transpose(-1, -2)
    return ((scores * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2)


def sdpa(q, k, v, backend: str, bias=None):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(getattr(SDPBackend, backend)):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)


def key_bias(k, tau, u, w):
    return (torch.einsum("bnhd,hd->bhn", k, u) + torch.einsum("bnhd,hd->bhn", tau, w)) * k.shape[-1] ** -0.5


def sdpa_sum(q, k, v, tau, u, w, backend="EFFICIENT_ATTENTION"):
    """k + tau and the keys' bias made first; the backend that takes a bias."""
    bias = key_bias(k, tau, u, w)[:, :, None].expand(-1, -1, q.shape[1], -1)
    return sdpa(q, k + tau, v, backend, bias)


@functools.cache
def compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex(q, k, v, tau, u, w):
    bias = key_bias(k, tau, u, w)
    heads = (x.transpose(1, 2) for x in (q, k + tau, v))
    return compiled_flex()(*heads, score_mod=lambda score, b, h, i, j: score + bias[b, h, j]).transpose(1, 2)


def with_backward(function: Callable[..., Tensor], inputs: tuple, grad: Tensor) -> Callable[[], Any]:
    leaves = [x.detach().requires_grad_() if x.is_floating_point() else x for x in inputs]
    wanted = [x for x in leaves if x.requires_grad]

    def run():
        with torch.enable_grad():
            return torch.autograd.grad(function(*leaves), wanted, grad, allow_unused=True)

    return run


def attention_cases(device: torch.device, small: bool) -> list[Case]:
    sizes = [(2, 2, 9, 16)] if small else [(128, 8, 50, 64), (800, 8, 50, 64), (128, 12, 128, 64), (32, 8, 512, 64),
                                          (16, 8, 1024, 64), (32, 12, 512, 128)]
    plain = "MATH" if device.type != "cuda" else "FLASH_ATTENTION"
    biased = "MATH" if device.type != "cuda" else "EFFICIENT_ATTENTION"
    cases = []
    for B, H, N, D in sizes:
        q, k, v, tau, grad = (torch.randn(B, N, H, D, device=device).bfloat16() for _ in range(5))
        u, w, table = (torch.rand(*shape, device=device).bfloat16() for shape in ((H, D), (H, D), (2000, H, D)))
        times = torch.randint(0, 2000, (B, N), device=device)
        direct, by_table = (q, k, v, tau, u, w), (q, k, v, table, u, w)
        functions: dict[str, tuple[Callable[..., Tensor], tuple]] = {
            OURS: (lambda *a, t=times: ops.timestep_attention(*a, timesteps=t), by_table),
            "pydiffseq, tau given": (ops.timestep_attention, direct), "eager": (literal, direct),
            "flash SDPA without time": (lambda q, k, v: sdpa(q, k, v, plain), (q, k, v)),
            "SDPA on k+tau with bias": (functools.partial(sdpa_sum, backend=biased), direct)}
        if small or ((B, N) in ((128, 50), (32, 512)) and D == 64):
            functions["compile"] = torch.compile(literal, dynamic=False), direct
            functions["flex"] = flex, direct
        moved, work, size = 2.0 * q.numel(), 2.0 * q.numel() * N, f"B{B}-H{H}-N{N}-D{D} bfloat16"
        cases.append(Case("timestep_attention forward", size, {
            name: functools.partial(f, *inputs) for name, (f, inputs) in functions.items()}, 5 * moved, 3 * work))
        cases.append(Case("timestep_attention forward+backward", size, {
            name: with_backward(f, inputs, grad) for name, (f, inputs) in functions.items()}, 15 * moved, 11 * work))
        dropped = {OURS: lambda a=by_table, t=times: ops.timestep_attention(*a, timesteps=t, dropout_p=0.1, seed=1)}
        cases.append(Case("timestep_attention forward, dropout 0.1", size, dropped, 5 * moved, 3 * work))
        cases += other_forms((q, k, v, tau), grad, size, moved, work)
    return cases


def rotary_literal(q, k, v, rotation):
    q, k, v = (reference.rotate_pairs(x, rotation).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def other_forms(inputs: tuple, grad: Tensor, size: str, moved: float, work: float) -> list[Case]:
    """Rotated rows; and packed sentences, each as long as the padded ones."""
    B, N, H, D = grad.shape
    packed, offsets = [x.flatten(0, 1) for x in inputs], torch.arange(0, B * N + 1, N, device=grad.device)
    cases = []
    attend_packed = functools.partial(ops.packed_timestep_attention, offsets=offsets, longest=N)
    for op, functions, given, upstream in (
            ("rotary_timestep_attention", {OURS: ops.rotary_timestep_attention, "eager, then SDPA": rotary_literal},
             inputs, grad),
            ("packed_timestep_attention", {OURS: attend_packed}, tuple(packed), grad.flatten(0, 1))):
        cases.append(Case(f"{op} forward+backward", size, {
            name: with_backward(f, given, upstream) for name, f in functions.items()}, 13 * moved, 9 * work))
    return cases


def eager_cross_entropy(x: Tensor, table: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, table, bias).float(), target, reduction="none")


def cross_entropy_cases(device: torch.device, small: bool) -> list[Case]:
    cases = []
    for rows, dim, vocab in [(9, 16, 300)] if small else [(6400, 128, V), (6400, 64, V), (25600, 128, V)]:
        x, table, bias = (torch.randn(*shape, device=device).bfloat16() for shape in ((rows, dim), (vocab, dim), (vocab,)))
        target, grad = torch.randint(0, vocab, (rows,), device=device), torch.full((rows,), 1 / rows, device=device)
        functions = {OURS: functools.partial(ops.linear_cross_entropy, target=target),
                     "eager": functools.partial(eager_cross_entropy, target=target),
                     "compile": functools.partial(torch.compile(eager_cross_entropy, dynamic=False), target=target)}
        size, inputs = f"M{rows}-d{dim}-V{vocab} bfloat16", (x, table, bias)
        moved, work = 2.0 * (rows * dim + vocab * dim), 2.0 * rows * dim * vocab
        cases.append(Case("linear_cross_entropy forward", size, {
            name: functools.partial(f, *inputs) for name, f in functions.items()}, moved, work))
        cases.append(Case("linear_cross_entropy forward+backward", size, {
            name: with_backward(f, inputs, grad) for name, f in functions.items()}, 2 * moved, 3 * work))
    return cases


# --- Dropout and GEGLU ---


def eager_dropout_add(x: Tensor, residual: Tensor) -> Tensor:
    return residual + F.dropout(x, 0.1)


def eager_geglu(x: Tensor) -> Tensor:
    a, gate = x.chunk(2, -1)
    return a * F.gelu(gate)


def elementwise_cases(device: torch.device, small: bool) -> list[Case]:
    cases = []
    for rows, columns in [(3, 8)] if small else [(6400, 2048), (40000, 2048)]:
        x, y = (torch.randn(rows, columns, device=device).bfloat16() for _ in range(2))
        seed, name, moved = torch.tensor([3], device=device), f"{rows} x {columns} bfloat16", 2 * x.numel()
        compiled = functools.partial(torch.compile, dynamic=False)
        cases.append(Case("dropout_add", name, {
            OURS: functools.partial(ops.dropout_add, x, y, 0.1, seed=seed),
            "eager": functools.partial(eager_dropout_add, x, y),
            "compile": functools.partial(compiled(eager_dropout_add), x, y)}, 3 * moved))
        functions = {OURS: ops.geglu, "eager": eager_geglu, "compile": compiled(eager_geglu)}
        cases.append(Case("geglu forward", name, {
            key: functools.partial(f, x) for key, f in functions.items()}, 1.5 * moved))
        grad = y[:, :columns // 2].contiguous()
        cases.append(Case("geglu forward+backward", name, {
            key: with_backward(f, (x,), grad) for key, f in functions.items()}, 4 * moved))
    return cases


# --- Report ---


def measure(case: Case, contender: str, device: torch.device) -> dict[str, Any]:
    try:
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            case.contenders[contender]()
            torch.cuda.synchronize()
            memory = torch.cuda.max_memory_allocated() - before
        else:
            memory = None
        result = {"seconds": seconds(case.contenders[contender], device), "memory_bytes": memory}
        if contender not in LATE and not case.op.startswith("nearest"):   # in a graph it packs the table at every replay
            result["graph_seconds"] = graph_seconds(case.contenders[contender], device)
        if contender == OURS and case.check is not None:
            result |= case.check()
        return result
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]}


def write(path: Path, report: dict[str, Any]) -> None:
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(report, indent=1), encoding="utf-8")
    os.replace(temporary, path)


def table(report: dict[str, Any]) -> list[str]:
    """Markdown: a row per case and contender."""
    limits = report["ceilings"]
    copy, product = limits["copy_bytes_per_s"] / 1e9, limits["bfloat16_flops_per_s"] / 1e12
    lines = [f"{report['device']}, torch {report['torch']}. Measured in the same run: copy {copy:.0f} GB/s, bfloat16 "
             f"product {product:.0f} TFLOP/s.", "",
             *(f"**The kernels of {family} are not in use here: pydiffseq's rows are the torch reference.**\n"
               for family, good in report.get("kernels", {}).items() if not good),
             "| op | size | contender | ms | graph ms | x pydiffseq | GB/s (of copy) | TFLOP/s (of product) | MB | note |",
             "|---|---|---|---:|---:|---:|---:|---:|---:|---|"]
    for case in report["cases"]:
        ours = case["results"].get(OURS, {}).get("seconds")
        for name, result in case["results"].items():
            lines.append(row(case, name, result, ours, limits))
    return lines


def row(case: dict[str, Any], name: str, result: dict[str, Any], ours: float | None, limits: dict[str, float]) -> str:
    taken, graph = result.get("seconds"), result.get("graph_seconds")
    note = ", ".join(f"{key} {result[key]}" for key in ("error", "wrong_of_256") if key in result)
    if taken is None:
        return f"| {case['op']} | {case['name']} | {name} | - | - | - | - | - | - | {note} |"
    memory = "-" if result.get("memory_bytes") is None else f"{result['memory_bytes'] / 1e6:.1f}"
    speed, rate = case["bytes"] / taken, case["flops"] / taken
    cells = [case["op"], case["name"], name, f"{taken * 1e3:.4f}", "-" if graph is None else f"{graph * 1e3:.4f}",
             "-" if ours is None else f"{taken / ours:.2f}",
             f"{speed / 1e9:.0f} ({speed / limits['copy_bytes_per_s']:.0%})",
             f"{rate / 1e12:.1f} ({rate / limits['bfloat16_flops_per_s']:.0%})", memory, note]
    return "| " + " | ".join(cells) + " |"


MAKERS = (attention_cases, nearest_cases, noise_cases, cross_entropy_cases, elementwise_cases)


FAMILIES = ("noise", "dropout", "geglu", "nearest", "cross_entropy", "timestep_attention",
            "packed_timestep_attention")


def verdict(family: str) -> bool:
    """Whether the CUDA kernels were built and pass their self-check here."""
    module = sys.modules[f"pydiffseq.ops.{family}"]
    return _cuda.compiled() and _cuda.trusted(family, torch.device("cuda", 0), module._cuda_cases)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=200.0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the program itself")
    args = parser.parse_args()
    end, device = time.monotonic() + args.seconds, torch.device(args.device)   # cuda: the first one
    torch.manual_seed(0)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU", "torch": torch.__version__,
        "ceilings": ceilings(device, args.small), "cases": []}
    failed = 0
    if device.type == "cuda":
        report["kernels"] = {family: verdict(family) for family in FAMILIES}
        failed = list(report["kernels"].values()).count(False)
    for late in (False, True):
        for maker in MAKERS:
            try:
                cases = maker(device, args.small)
            except Exception as error:
                report.setdefault("errors", []).append(f"{maker.__name__}: {type(error).__name__}: {error}")
                failed += 1
                continue
            for case in cases:
                failed += add(report, case, late, end, device)
                write(args.json, report)
            del cases
            if device.type == "cuda":
                torch.cuda.empty_cache()
    print("\n".join(table(report)))
    return 1 if failed else 0


def add(report: dict[str, Any], case: Case, late: bool, end: float, device: torch.device) -> int:
    """Measure a case's contenders of this pass into the report; the number of ours that failed."""
    entry = next((e for e in report["cases"] if (e["op"], e["name"]) == (case.op, case.name)), None)
    if entry is None:
        entry = {"op": case.op, "name": case.name, "bytes": case.bytes, "flops": case.flops, "results": {}}
        report["cases"].append(entry)
    failed = 0
    for contender in case.contenders:
        if (contender in LATE) != late:
            continue
        left_out = {"error": "left out: out of time"}
        with torch.no_grad():
            result = left_out if time.monotonic() > end else measure(case, contender, device)
        entry["results"][contender] = result
        failed += contender.startswith(OURS) and "error" in result
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
