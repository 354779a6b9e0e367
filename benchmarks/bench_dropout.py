"""Dropout, alone and with the residual sum, against torch eager, torch.compile and numpy; ``copy_`` is the limit.

    pytest benchmarks/bench_dropout.py --benchmark-enable --benchmark-group-by=group
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from pydiffseq.ops import dropout, dropout_add

SIZES = {"M1536-d512": (1536, 512), "M3072-d512": (3072, 512), "M6400-d2048": (6400, 2048)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
P = 0.1

_generator = np.random.default_rng(0)


def eager_dropout(x: Tensor, residual: Tensor) -> Tensor:
    return torch.nn.functional.dropout(x, P)


def eager_dropout_add(x: Tensor, residual: Tensor) -> Tensor:
    return residual + torch.nn.functional.dropout(x, P)


def numpy_dropout(x: Tensor, residual: Tensor) -> np.ndarray:
    kept = _generator.random(x.shape, dtype=np.float32) >= P
    return x.numpy() * kept * np.float32(1 / (1 - P))


CONTENDERS: dict[str, dict[str, Callable[[], Callable]]] = {
    "dropout": {
        "pydiffseq": lambda: lambda x, residual: dropout(x, P),
        "eager": lambda: eager_dropout,
        "compile": lambda: torch.compile(eager_dropout),
        "numpy": lambda: numpy_dropout,
        "copy": lambda: lambda x, residual: x.clone(),
    },
    "dropout_add": {
        "pydiffseq": lambda: lambda x, residual: dropout_add(x, residual, P),
        "eager": lambda: eager_dropout_add,
        "compile": lambda: torch.compile(eager_dropout_add),
        "numpy": lambda: lambda x, residual: residual.numpy() + numpy_dropout(x, residual),
        "copy": lambda: lambda x, residual: x + residual,
    },
}


@pytest.mark.parametrize("contender", ["pydiffseq", "eager", "compile", "numpy", "copy"])
@pytest.mark.parametrize("grad", [False, True], ids=["forward", "forward-backward"])
@pytest.mark.parametrize("op", CONTENDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_dropout(benchmark, size: str, dtype: str, op: str, grad: bool, contender: str) -> None:
    if contender == "numpy" and (dtype != "float32" or grad):
        pytest.skip("numpy has neither bfloat16 nor gradients")
    x, residual, grad_out = (torch.randn(SIZES[size]).to(DTYPES[dtype]) for _ in range(3))
    x.requires_grad_(grad)
    moved = (2 if op == "dropout" else 3) + (2 if grad else 0)
    benchmark.group = f"{op} {size} {dtype} {'forward-backward' if grad else 'forward'}"
    benchmark.extra_info = {"op": op, "contender": contender, "bytes": moved * x.numel() * x.element_size(),
                            "flops": (2 if grad else 1) * x.numel()}
    function = CONTENDERS[op][contender]()

    def run() -> Tensor:
        out = function(x, residual)
        return torch.autograd.grad(out, x, grad_out)[0] if grad else out

    with torch.set_grad_enabled(grad):
        run()  # compiles
        benchmark(run)
