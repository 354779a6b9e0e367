"""Nearest embedding against torch (addmm + argmax, in chunks, compiled; cdist + argmin) and FAISS (where installed).

    pytest benchmarks/bench_nearest.py --benchmark-enable --benchmark-group-by=group

Only pydiffseq gives the float64 result; the others round in float32, and are wrong on near ties.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pydiffseq.ops import nearest, nearest_topk

# The last three are decoding: B * N vectors, a small vocabulary.
SIZES = {"M4096-d128-V30522": (4096, 128, 30522), "M4096-d768-V30522": (4096, 768, 30522),
         "M512-d128-V30522": (512, 128, 30522), "M800-d64-V6000": (800, 64, 6000), "M2000-d64-V6000": (2000, 64, 6000)}
ROWS = 256

Search = Callable[[Tensor], Tensor]


def pydiffseq(table: Tensor) -> Search:
    return lambda x: nearest(x, table)[0]


def addmm(table: Tensor, rows: int | None = None) -> Search:
    bias = -0.5 * table.square().sum(-1)
    return lambda x: torch.cat([torch.addmm(bias, part, table.T).argmax(-1) for part in x.split(rows or len(x))])


def compiled(table: Tensor) -> Search:
    bias = -0.5 * table.square().sum(-1)
    return torch.compile(lambda x: torch.addmm(bias, x, table.T).argmax(-1))


def cdist(table: Tensor) -> Search:
    return lambda x: torch.cdist(x, table).argmin(-1)


def faiss_flat(table: Tensor) -> Search:
    faiss = pytest.importorskip("faiss")
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(table.shape[1])
    index.add(table.numpy())
    return lambda x: torch.from_numpy(index.search(x.numpy(), 1)[1][:, 0])


CONTENDERS: dict[str, Callable[[Tensor], Search]] = {
    "pydiffseq": pydiffseq, "addmm": addmm, "addmm-chunks": lambda table: addmm(table, ROWS), "compile": compiled,
    "cdist": cdist, "faiss": faiss_flat,
}


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("size", SIZES)
def test_nearest(benchmark, size: str, contender: str) -> None:
    rows, dim, vocab = SIZES[size]
    table = torch.randn(vocab, dim)
    ids = torch.randint(vocab, (rows,))
    x = table[ids] + torch.randn(rows, dim)
    benchmark.group = f"nearest {size} float32"
    benchmark.extra_info = {"op": "nearest", "contender": contender, "bytes": 4 * (rows * dim + vocab * dim + 2 * rows),
                            "flops": 2 * rows * dim * vocab}
    search = CONTENDERS[contender](table)
    assert (search(x) == ids).float().mean() > 0.9  # packs or compiles, too
    benchmark(search, x)


K = 8


def addmm_topk(table: Tensor) -> Search:
    bias = -0.5 * table.square().sum(-1)
    return lambda x: torch.cat([torch.addmm(bias, part, table.T).topk(K).indices for part in x.split(ROWS)])


TOPK: dict[str, Callable[[Tensor], Search]] = {
    "pydiffseq": lambda table: lambda x: nearest_topk(x, table, k=K)[0], "addmm-chunks": addmm_topk,
    "cdist": lambda table: lambda x: torch.cdist(x, table).topk(K, largest=False).indices,
}


@pytest.mark.parametrize("contender", TOPK)
@pytest.mark.parametrize("size", ["M512-d128-V30522", "M2000-d64-V6000"])
def test_nearest_topk(benchmark, size: str, contender: str) -> None:
    rows, dim, vocab = SIZES[size]
    table = torch.randn(vocab, dim)
    x = table[torch.randint(vocab, (rows,))] + torch.randn(rows, dim)
    benchmark.group = f"nearest_topk k{K} {size} float32"
    benchmark.extra_info = {"op": "nearest_topk", "contender": contender, "flops": 2 * rows * dim * vocab,
                            "bytes": 4 * (rows * dim + vocab * dim + 3 * rows * K)}
    search = TOPK[contender](table)
    search(x)  # packs, too
    benchmark(search, x)
