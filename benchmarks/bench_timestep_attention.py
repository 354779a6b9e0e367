"""Timestep attention against torch: the literal two-product form, SDPA on k + tau with a bias mask, both compiled.

    pytest benchmarks/bench_timestep_attention.py --benchmark-enable --benchmark-group-by=group
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pydiffseq.ops import rotary_timestep_self_attention, timestep_self_attention

SIZES = {  # batch, heads, length, head_dim: a small machine-translation model, then the sizes of the published models
    "B160-H4-N10-D32": (160, 4, 10, 32), "B32-H8-N64-D64": (32, 8, 64, 64), "B32-H8-N128-D64": (32, 8, 128, 64),
    "B32-H8-N512-D64": (32, 8, 512, 64),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def literal(q: Tensor, k: Tensor, v: Tensor, tau: Tensor, u: Tensor, w: Tensor, mask: Tensor) -> Tensor:
    q, k, v, tau = (x.transpose(1, 2) for x in (q, k, v, tau))
    content = (q + u[:, None]) @ k.transpose(-1, -2)
    time = (q + w[:, None]) @ tau.transpose(-1, -2)
    scores = ((content + time) * q.shape[-1] ** -0.5).masked_fill(~mask[:, None, None], -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).contiguous()


def sdpa(q: Tensor, k: Tensor, v: Tensor, tau: Tensor, u: Tensor, w: Tensor, mask: Tensor) -> Tensor:
    bias = torch.einsum("bnhd,hd->bhn", k, u) + torch.einsum("bnhd,hd->bhn", tau, w)
    bias = (bias * q.shape[-1] ** -0.5).masked_fill(~mask[:, None], -torch.inf)[:, :, None]
    q, key, v = (x.transpose(1, 2) for x in (q, k + tau, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, key, v, attn_mask=bias.expand(-1, -1, q.shape[2], -1))
    return out.transpose(1, 2).contiguous()


def ours(qkv: Tensor, tau: Tensor, u: Tensor, w: Tensor, mask: Tensor) -> Tensor:
    return timestep_self_attention(qkv, tau, u, w, key_mask=mask)


def of_parts(attend: Callable) -> Callable:
    """``attend`` of q, k and v as a function of the projection that they are slices of."""
    return lambda qkv, *rest: attend(*qkv.unbind(2), *rest)


CONTENDERS: dict[str, Callable[[], Callable]] = {
    "pydiffseq": lambda: ours, "eager": lambda: of_parts(literal), "sdpa": lambda: of_parts(sdpa),
    "compile-eager": lambda: torch.compile(of_parts(literal)), "compile-sdpa": lambda: torch.compile(of_parts(sdpa)),
}


def contenders_at(size: str, dtype: str) -> list[str]:
    """All where it is quick. In bfloat16 and at N512 without those that compile (20 s each) or take seconds a call."""
    if "N512" in size:
        return ["pydiffseq", "sdpa"]
    return list(CONTENDERS) if dtype == "float32" else ["pydiffseq", "eager", "sdpa"]


CASES = [(size, dtype, contender) for size in SIZES for dtype in DTYPES for contender in contenders_at(size, dtype)]


def make_inputs(size: tuple[int, int, int, int], dtype: torch.dtype, grad: bool) -> tuple[list[Tensor], Tensor]:
    """(qkv, tau, u, w, mask), qkv as one projection gives it, and the gradient of the output."""
    batch, heads, length, dim = size
    torch.manual_seed(0)
    qkv = torch.randn(batch, length, 3, heads, dim, dtype=dtype, requires_grad=grad)
    tau = torch.randn(batch, length, heads, dim, dtype=dtype, requires_grad=grad)
    u, w = (torch.rand(heads, dim, dtype=dtype).requires_grad_(grad) for _ in range(2))
    mask = torch.ones(batch, length, dtype=torch.bool)
    return [qkv, tau, u, w, mask], torch.randn(batch, length, heads, dim, dtype=dtype)


def step(attend: Callable, inputs: list[Tensor], grad_out: Tensor, grad: bool) -> Tensor:
    out = attend(*inputs)
    return torch.autograd.grad(out, inputs[:4], grad_out)[0] if grad else out


def work(size: tuple[int, int, int, int], dtype: torch.dtype, grad: bool) -> dict[str, int]:
    """Bytes that must move (each tensor once) and floating-point operations (4 N^2 D forward, 10 more backward)."""
    batch, heads, length, dim = size
    tensor = batch * heads * length * dim
    return {"bytes": (5 + (10 if grad else 0)) * tensor * dtype.itemsize,
            "flops": (4 + (10 if grad else 0)) * tensor * length}


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "forward-backward"])
@pytest.mark.parametrize("size,dtype,contender", CASES)
def test_timestep_attention(benchmark, size: str, dtype: str, grad: bool, contender: str) -> None:
    benchmark.group = f"timestep_attention {size} {dtype} {'forward-backward' if grad else 'forward'}"
    dims = SIZES[size]
    benchmark.extra_info = {"op": "timestep_attention", "contender": contender, **work(dims, DTYPES[dtype], grad)}
    inputs, grad_out = make_inputs(dims, DTYPES[dtype], grad)
    torch.compiler.reset()  # so that every size is compiled for itself
    attend = CONTENDERS[contender]()
    with torch.set_grad_enabled(grad):
        step(attend, inputs, grad_out, grad)  # compiles
        benchmark(step, attend, inputs, grad_out, grad)


def rotary_literal(q: Tensor, k: Tensor, v: Tensor, rotation: Tensor, mask: Tensor) -> Tensor:
    cos, sin = rotation.chunk(2, -1)

    def rotate(x: Tensor) -> Tensor:
        x1, x2 = x[..., ::2], x[..., 1::2]
        return torch.stack((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1).flatten(-2)

    q, k, v = (rotate(x).transpose(1, 2) for x in (q, k, v))
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~mask[:, None, None], -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).contiguous()


ROTARY_CONTENDERS: dict[str, Callable[[], Callable]] = {
    "pydiffseq": lambda: lambda qkv, rotation, mask: rotary_timestep_self_attention(qkv, rotation, key_mask=mask),
    "eager": lambda: of_parts(rotary_literal), "compile-eager": lambda: torch.compile(of_parts(rotary_literal)),
}


@pytest.mark.parametrize("contender", ROTARY_CONTENDERS)
@pytest.mark.parametrize("grad", [False, True], ids=["forward", "forward-backward"])
@pytest.mark.parametrize("size", ["B160-H4-N10-D32", "B32-H8-N64-D64", "B32-H8-N128-D64"])
def test_rotary_timestep_attention(benchmark, size: str, grad: bool, contender: str) -> None:
    dims = SIZES[size]
    benchmark.group = f"rotary_timestep_attention {size} float32 {'forward-backward' if grad else 'forward'}"
    benchmark.extra_info = {
        "op": "rotary_timestep_attention", "contender": contender, **work(dims, torch.float32, grad)}
    (qkv, rotation, _, _, mask), grad_out = make_inputs(dims, torch.float32, grad)
    torch.compiler.reset()
    attend = ROTARY_CONTENDERS[contender]()

    def run() -> Tensor:
        out = attend(qkv, rotation, mask)
        return torch.autograd.grad(out, (qkv, rotation), grad_out)[0] if grad else out

    with torch.set_grad_enabled(grad):
        run()
        benchmark(run)
