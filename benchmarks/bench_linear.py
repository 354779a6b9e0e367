"""The row-invariant linear layer, plain and with GEGLU, against torch's linear (and our GEGLU after it).

    pytest benchmarks/bench_linear.py --benchmark-enable --benchmark-group-by=group
"""

from __future__ import annotations

import pytest
import torch

from pydiffseq.ops import PackedLinear, geglu

SIZES = {"K256-N768": (256, 768, False), "K256-N2048-geglu": (256, 2048, True), "K1024-N256": (1024, 256, False),
         "K512-N4096-geglu": (512, 4096, True), "K2048-N512": (2048, 512, False)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.mark.parametrize("contender", ["pydiffseq", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [10, 320, 2880])
@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_linear(benchmark, size: str, rows: int, dtype: str, contender: str) -> None:
    depth, columns, gated = SIZES[size]
    x, weight = torch.randn(rows, depth).to(DTYPES[dtype]), torch.randn(columns, depth).to(DTYPES[dtype])
    bias = torch.randn(columns).to(DTYPES[dtype])
    benchmark.group = f"linear M{rows}-{size} {dtype}"
    benchmark.extra_info = {"op": "linear", "contender": contender, "flops": 2 * rows * depth * columns}
    packed = PackedLinear(weight, bias, geglu=gated)

    def eager() -> torch.Tensor:
        y = torch.nn.functional.linear(x, weight, bias)
        return geglu(y) if gated else y

    function = (lambda: packed(x)) if contender == "pydiffseq" else eager
    function()
    benchmark(function)
