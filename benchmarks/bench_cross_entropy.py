"""Vocabulary cross-entropy from the vectors, against torch's linear + cross_entropy, eager and compiled.

    pytest benchmarks/bench_cross_entropy.py --benchmark-enable --benchmark-group-by=group
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pydiffseq.ops import linear_cross_entropy

SIZES = {"M1500-d64-V6000": (1500, 64, 6000), "M6000-d64-V6000": (6000, 64, 6000),
         "M1500-d128-V30522": (1500, 128, 30522)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def eager(x: Tensor, table: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, table, bias), target, reduction="none")


CONTENDERS = {"pydiffseq": lambda: linear_cross_entropy, "eager": lambda: eager,
              "compile": lambda: torch.compile(eager)}


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("grad", [False, True], ids=["forward", "forward-backward"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_cross_entropy(benchmark, size: str, dtype: str, grad: bool, contender: str) -> None:
    rows, dim, vocab = SIZES[size]
    shapes = (rows, dim), (vocab, dim), (vocab,)
    x, table, bias = (torch.randn(shape).to(DTYPES[dtype]).requires_grad_() for shape in shapes)
    target = torch.randint(vocab, (rows,))
    benchmark.group = f"linear_cross_entropy {size} {dtype} {'forward-backward' if grad else 'forward'}"
    benchmark.extra_info = {"op": "linear_cross_entropy", "contender": contender,
                            "bytes": (2 if grad else 1) * (rows + vocab) * dim * x.element_size(),
                            "flops": (3 if grad else 1) * 2 * rows * dim * vocab}
    function = CONTENDERS[contender]()

    def run() -> Tensor:
        losses = function(x, table, bias, target)
        return torch.autograd.grad(losses.sum(), (x, table, bias))[0] if grad else losses

    with torch.set_grad_enabled(grad):
        run()  # compiles
        benchmark(run)
