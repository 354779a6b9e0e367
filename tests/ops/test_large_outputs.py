"""Outputs so large that kernels write them otherwise: in large pages, and past the caches."""

import sys
from pathlib import Path

import pytest
import torch
from instruction_sets import each_isa, kernel_only
from test_timestep_attention import FLOATS, make, outputs_and_grads

from pydiffseq.ops import dropout, timestep_attention
from pydiffseq.ops._extension import output_pointer

STREAMED = 32 << 20   # kStreamedBytes in csrc/cpu/timestep_attention_gradients.h


def flags_of(address):
    """The flags of the mapping that holds the address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first:
            begin, end = (int(part, 16) for part in first.split("-"))
            inside = begin <= address < end
        elif inside and first == "VmFlags:":
            return rest
    raise AssertionError(f"no mapping holds {address:x}")


@kernel_only
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux takes this advice")
def test_large_outputs_ask_for_large_pages():
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this kernel has no transparent huge pages")
    middle = 20 << 20
    assert "hg" in flags_of(dropout(torch.ones(10 << 20), 0.5, seed=1).data_ptr() + middle)
    untouched = torch.empty(10 << 20)
    assert "hg" not in flags_of(untouched.data_ptr() + middle)
    output_pointer(untouched)
    assert "hg" in flags_of(untouched.data_ptr() + middle)


@kernel_only
@pytest.mark.parametrize("dtype, dim", [(torch.float32, 64), (torch.float32, 63), (torch.bfloat16, 64)])
def test_streamed_gradients_are_those_of_each_sentence(dtype, dim):
    batch = 16 if dtype == torch.float32 else 32
    x, _ = make(batch, 8, 300, dim=dim, dtype=dtype)
    assert 4 * x["q"].nbytes >= STREAMED > 4 * x["q"][:9].nbytes
    for isa in each_isa():
        if not isa.startswith(("avx512", "amx")):
            continue
        whole = outputs_and_grads(timestep_attention, x)
        for first in (0, batch - 9):
            part = x | {name: x[name][first:first + 9] for name in ("q", "k", "v", "tau")}
            leaves = [part[name].detach().requires_grad_() for name in FLOATS]
            g = torch.randn(x["q"].shape, generator=torch.Generator().manual_seed(1)).to(dtype)[first:first + 9]
            out = timestep_attention(*leaves)
            few = [out.detach(), *torch.autograd.grad(out, leaves[:4], g)]
            for name, a, b in zip(("out", *FLOATS), few, [w[first:first + 9] for w in whole[:5]], strict=False):
                assert torch.equal(a, b), (isa, name, first)


@kernel_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keys", [97, 130, 300])
def test_few_heads_share_out_their_queries(dtype, keys):
    """A thread that begins within a head packs its keys anew."""
    x, _ = make(1, 1, 200, keys, 32, dtype=dtype)
    many = x | {name: x[name].expand(9, -1, -1, -1) for name in ("q", "k", "v", "tau")}
    for isa in each_isa():
        alone, among = timestep_attention(*x.values()), timestep_attention(*many.values())
        assert torch.equal(alone.expand_as(among), among), isa
