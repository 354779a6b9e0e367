"""A linear layer for inference whose rows do not depend on each other, with what follows it fused in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pydiffseq.ops import reference
from pydiffseq.ops._extension import C, library, output_pointer, pointer, use_kernel

library.define("linear(Tensor x, Tensor packed, Tensor weight, Tensor? bias, Tensor? residual, bool geglu) -> Tensor")


class PackedLinear:
    """``x weight^T + bias``, then ``+ residual`` or GEGLU, for a weight that does not change any more.

    The result for a row is a function of that row alone, bit for bit: every sum runs over the features in one order.
    torch's products choose their kernel by the number of rows, so that a sentence comes out a little differently in
    another batch. This holds for the CPU kernels in float32 and bfloat16 (float32 sums, rounded once); elsewhere
    ``torch.nn.functional.linear`` does the work. On AMX a float32 product is six products of bfloat16 parts, as exact as
    float32 products are; there a row of x with an infinite element gives NaN throughout, and so does a row of the weight
    in its column.

    Args:
        weight: float ``[columns, depth]``; copied.
        bias: ``[columns]`` or ``None``.
        geglu: the columns are ``[a, gate]``, and the result is ``a GELU(gate)`` (see :func:`pydiffseq.ops.geglu`).

    Raises:
        ValueError: shapes do not fit, or ``geglu`` with an odd number of columns.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, geglu: bool = False) -> None:
        if weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
            given = None if bias is None else list(bias.shape)
            raise ValueError(f"weight must be [columns, depth] and bias [columns], got {list(weight.shape)} and {given}")
        if geglu and len(weight) % 2:
            raise ValueError(f"geglu needs an even number of columns (a and gate), got {len(weight)}")
        self.weight = weight.detach().clone(memory_format=torch.contiguous_format)
        self.bias = None if bias is None else bias.detach().clone()
        self.geglu = geglu
        self._isa, self._packed = "", torch.empty(0, dtype=torch.int32)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``[..., depth] -> [..., columns]`` (half the columns with GEGLU); not differentiable.

        ``residual`` has the shape of the result; not with GEGLU.

        Raises:
            ValueError: a shape does not fit. TypeError: another dtype than the weight's.
        """
        columns, depth = self.weight.shape
        shape = (*x.shape[:-1], columns // 2 if self.geglu else columns)
        if x.dim() == 0 or x.shape[-1] != depth:
            raise ValueError(f"x must have shape [..., {depth}], got {list(x.shape)}")
        if x.dtype != self.weight.dtype:
            raise TypeError(f"x must have the dtype of the weight, {self.weight.dtype}, got {x.dtype}")
        if residual is not None and (self.geglu or residual.shape != shape or residual.dtype != x.dtype):
            raise ValueError(f"residual must be {x.dtype} {list(shape)} and without geglu, got {residual.dtype} "
                             f"{list(residual.shape)}")
        self._pack()
        return torch.ops.pydiffseq.linear.default(x, self._packed, self.weight, self.bias, residual, self.geglu)

    def _pack(self) -> None:
        """The layout depends on the instruction set, which tests change."""
        if self.weight.device.type != "cpu" or not use_kernel(self.weight) or self._isa == C.isa():
            return
        self._isa = C.isa()
        columns, depth = self.weight.shape
        self._packed = torch.empty(C.linear_packed_words(columns, depth), dtype=torch.int32)
        C.linear_pack(pointer(self.weight), pointer(self.bias), pointer(self._packed), columns, depth,
                      self.weight.dtype == torch.bfloat16, self.geglu)


def _linear_reference(x: Tensor, packed: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None,
                      geglu: bool) -> Tensor:
    y = F.linear(x, weight, bias)
    y = reference.geglu(y) if geglu else y
    return y if residual is None else y + residual


def _linear_cpu(x: Tensor, packed: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None,
                geglu: bool) -> Tensor:
    if not packed.numel() or not use_kernel(x):
        return _linear_reference(x, packed, weight, bias, residual, geglu)
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    out = _linear_fake(x, packed, weight, bias, residual, geglu)
    columns, depth = weight.shape
    C.linear(pointer(x), pointer(packed), pointer(residual), output_pointer(out), x.shape[:-1].numel(), columns, depth,
             x.dtype == torch.bfloat16, geglu)
    return out


def _linear_fake(x, packed, weight, bias, residual, geglu):
    return x.new_empty((*x.shape[:-1], weight.shape[0] // 2 if geglu else weight.shape[0]))


library.impl("linear", _linear_cpu, "CPU")
library.impl("linear", _linear_reference, "CompositeExplicitAutograd")
torch.library.register_fake("pydiffseq::linear", _linear_fake, lib=library)
