"""Noise injection and the sampler's update against torch eager, torch.compile and numpy.

    pytest benchmarks/bench_noise.py --benchmark-enable --benchmark-group-by=group
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from pydiffseq.ops import embed_q_sample, philox_normal, q_sample, sampler_step

SIZES = {"B64-N64-d128": (64, 64, 128), "B128-N50-d128": (128, 50, 128), "B512-N128-d128": (512, 128, 128)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
T, V, SIGMA0 = 2000, 30522, 0.1
SIGNAL = torch.linspace(1.0, 0.0, T)
SIGMA = (1 - SIGNAL**2).sqrt()


# Each contender is a function of (x0 or table, ids, t, mask).


def eager_q_sample(x0: Tensor, ids: Tensor, t: Tensor, mask: Tensor) -> Tensor:
    signal, sigma = SIGNAL.to(x0.dtype)[t][..., None], SIGMA.to(x0.dtype)[t][..., None]
    return torch.where(mask[..., None], signal * x0 + sigma * torch.randn_like(x0), x0)


def eager_embed_q_sample(table: Tensor, ids: Tensor, t: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    x0 = torch.nn.functional.embedding(ids, table)
    x0 = x0 + SIGMA0 * torch.randn_like(x0)
    return x0, eager_q_sample(x0, ids, t, mask)


def eager_sampler_step(x: Tensor, ids: Tensor, t: Tensor, mask: Tensor) -> Tensor:
    a, b = SIGNAL.to(x.dtype)[t][..., None], SIGMA.to(x.dtype)[t][..., None]
    return a * x + b * x + b * torch.randn_like(x)


_generator = np.random.default_rng(0)


def numpy_q_sample(x0: Tensor, ids: Tensor, t: Tensor, mask: Tensor) -> np.ndarray:
    x, steps = x0.numpy(), t.numpy()
    noise = _generator.standard_normal(x.shape, dtype=np.float32)
    x_t = SIGNAL.numpy()[steps][..., None] * x + SIGMA.numpy()[steps][..., None] * noise
    return np.where(mask.numpy()[..., None], x_t, x)


def numpy_embed_q_sample(table: Tensor, ids: Tensor, t: Tensor, mask: Tensor) -> tuple[np.ndarray, np.ndarray]:
    x0 = table.numpy()[ids.numpy()]
    x0 += np.float32(SIGMA0) * _generator.standard_normal(x0.shape, dtype=np.float32)
    return x0, numpy_q_sample(torch.from_numpy(x0), ids, t, mask)


def numpy_sampler_step(x: Tensor, ids: Tensor, t: Tensor, mask: Tensor) -> np.ndarray:
    state, a, b = x.numpy(), SIGNAL.numpy()[t.numpy()][..., None], SIGMA.numpy()[t.numpy()][..., None]
    return a * state + b * state + b * _generator.standard_normal(state.shape, dtype=np.float32)


CONTENDERS: dict[str, dict[str, Callable[[], Callable]]] = {
    "q_sample": {
        "pydiffseq": lambda: lambda x0, ids, t, mask: q_sample(x0, t, SIGNAL, SIGMA, mask=mask),
        "eager": lambda: eager_q_sample,
        "compile": lambda: torch.compile(eager_q_sample),
        "numpy": lambda: numpy_q_sample,
    },
    "embed_q_sample": {
        "pydiffseq": lambda: lambda table, ids, t, mask: embed_q_sample(
            table, ids, t, SIGNAL, SIGMA, sigma0=SIGMA0, mask=mask),
        "eager": lambda: eager_embed_q_sample,
        "compile": lambda: torch.compile(eager_embed_q_sample),
        "numpy": lambda: numpy_embed_q_sample,
    },
    "sampler_step": {
        "pydiffseq": lambda: lambda x, ids, t, mask: sampler_step(x, x, SIGNAL[t], SIGMA[t], SIGMA[t]),
        "eager": lambda: eager_sampler_step,
        "compile": lambda: torch.compile(eager_sampler_step),
        "numpy": lambda: numpy_sampler_step,
    },
}
TENSORS_MOVED = {"q_sample": 2, "embed_q_sample": 3, "sampler_step": 3}
FLOPS = {"q_sample": 3, "embed_q_sample": 5, "sampler_step": 5}  # per element, without those of the normals


def make_inputs(op: str, size: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, N, d = SIZES[size]
    torch.manual_seed(0)
    first = torch.randn((V, d) if op == "embed_q_sample" else (B, N, d)).to(dtype)
    # No token stays clean, so that our op cannot save work by skipping any.
    return first, torch.randint(0, V, (B, N)), torch.randint(0, T, (B, N)), torch.ones(B, N, dtype=torch.bool)


def describe(benchmark, op: str, size: str, dtype: str, contender: str, variant: str = "forward") -> None:
    elements = int(np.prod(SIZES[size]))
    benchmark.group = f"{op} {size} {dtype} {variant}"
    benchmark.extra_info = {"op": op, "contender": contender, "flops": FLOPS.get(op, 0) * elements,
                            "bytes": TENSORS_MOVED.get(op, 1) * elements * DTYPES[dtype].itemsize}


@pytest.mark.parametrize("contender", ["pydiffseq", "eager", "compile", "numpy"])
@pytest.mark.parametrize("op", CONTENDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_noise(benchmark, size: str, dtype: str, op: str, contender: str) -> None:
    if contender == "numpy" and dtype != "float32":
        pytest.skip("numpy has no bfloat16")
    describe(benchmark, op, size, dtype, contender)
    inputs = make_inputs(op, size, DTYPES[dtype])
    function = CONTENDERS[op][contender]()
    with torch.no_grad():
        function(*inputs)  # compiles
        benchmark(function, *inputs)


NORMAL_CONTENDERS: dict[str, Callable[[tuple[int, int, int]], object]] = {
    "pydiffseq": lambda shape: philox_normal(shape),
    "eager": lambda shape: torch.randn(shape),
    "numpy": lambda shape: _generator.standard_normal(shape, dtype=np.float32),
}


@pytest.mark.parametrize("contender", NORMAL_CONTENDERS)
@pytest.mark.parametrize("size", SIZES)
def test_normal(benchmark, size: str, contender: str) -> None:
    describe(benchmark, "philox_normal", size, "float32", contender)
    benchmark(NORMAL_CONTENDERS[contender], SIZES[size])


@pytest.mark.parametrize("contender", ["pydiffseq", "eager", "compile"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_embed_backward(benchmark, size: str, dtype: str, contender: str) -> None:
    describe(benchmark, "embed_q_sample", size, dtype, contender, "forward-backward")
    table, ids, t, mask = make_inputs("embed_q_sample", size, DTYPES[dtype])
    table.requires_grad_()
    grads = [torch.randn(*SIZES[size]).to(table.dtype) for _ in range(2)]
    function = CONTENDERS["embed_q_sample"][contender]()

    def run() -> Tensor:
        return torch.autograd.grad(function(table, ids, t, mask), table, grads)[0]

    run()
    benchmark(run)
