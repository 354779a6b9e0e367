"""The instruction sets that the CPU kernels are compiled for: what the tests of the ops share."""

from collections.abc import Iterator

import pytest

from pydiffseq.ops import _extension

ISAS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")
kernel_only = pytest.mark.skipif(_extension.C is None, reason="the extension is not built")


def each_isa() -> Iterator[str]:
    """Sets each instruction set that this processor has, and names it; "reference" once without the extension."""
    if _extension.C is None:
        yield "reference"
        return
    before = _extension.C.isa()
    try:
        for name in ISAS:
            if _extension.C.set_isa(name):
                yield name
    finally:
        _extension.C.set_isa(before)
