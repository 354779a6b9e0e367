"""GEGLU against torch eager (chunk, gelu, mul and their gradients) and torch.compile; ``clone`` is the limit.

    pytest benchmarks/bench_geglu.py --benchmark-enable --benchmark-group-by=group
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pydiffseq.ops import geglu

SIZES = {"M1600-F512": (1600, 512), "M2520-F1024": (2520, 1024), "M6400-F2048": (6400, 2048)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def eager(x: Tensor) -> Tensor:
    a, gate = x.chunk(2, -1)
    return a * torch.nn.functional.gelu(gate)


CONTENDERS: dict[str, Callable[[], Callable]] = {
    "pydiffseq": lambda: geglu, "eager": lambda: eager, "compile": lambda: torch.compile(eager),
    "clone": lambda: lambda x: x.chunk(2, -1)[0].clone(),
}


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("grad", [False, True], ids=["forward", "forward-backward"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_geglu(benchmark, size: str, dtype: str, grad: bool, contender: str) -> None:
    rows, columns = SIZES[size]
    x = torch.randn(rows, 2 * columns).to(DTYPES[dtype]).requires_grad_(grad)
    grad_out = torch.randn(rows, columns).to(DTYPES[dtype])
    benchmark.group = f"geglu {size} {dtype} {'forward-backward' if grad else 'forward'}"
    moved = 3 + (5 if grad else 0)   # in units of the output: x and out; then the gradient, x and its gradient
    benchmark.extra_info = {"op": "geglu", "contender": contender, "bytes": moved * grad_out.nbytes,
                            "flops": (5 if grad else 2) * grad_out.numel()}
    function = CONTENDERS[contender]()

    def run() -> Tensor:
        out = function(x)
        return torch.autograd.grad(out, x, grad_out)[0] if grad else out

    with torch.set_grad_enabled(grad):
        run()  # compiles
        benchmark(run)
