"""Exact nearest embedding: the rounding step from vectors back to tokens."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from pydiffseq.ops import reference
from pydiffseq.ops._extension import (
    C,
    autocast_to_widest,
    check_float,
    check_same_device,
    check_shape,
    library,
    pointer,
    use_kernel,
)

library.define("nearest(Tensor x, Tensor table, Tensor? bias, bool dot) -> (Tensor embeddings, Tensor ids)")


def nearest(x: Tensor, table: Tensor, bias: Tensor | None = None, *, metric: str = "l2") -> tuple[Tensor, Tensor]:
    """The row of ``table`` nearest to each vector of x, and that row: rounding (Li et al. 2022, section 4.2).

    Exact: the id is that of the smallest float64 distance ``|x - table[v]|`` (``metric="l2"``) or the largest float64
    ``x . table[v] + bias[v]`` (``"dot"``) of the values given, ties to the lowest id. The CPU kernel filters with a
    bfloat16 or float32 matrix product and a bound of its error, and decides in float64; [M, V] is never in memory. It
    keeps the table it packed until the table changes (a write through ``.data``, which autograd cannot see, is missed).

    Args:
        x: float [..., d].
        table: float [V, d] of x's dtype, V >= 1.
        bias: float [V] of x's dtype, or None; only for ``"dot"``.
        metric: ``"l2"`` or ``"dot"``.

    Returns:
        ids int64 [...] and embeddings [..., d] = ``table[ids]``, differentiable in the table only. A score that is NaN
        never wins; where no score beats minus infinity (x has NaN, or for l2 an infinity) the id is 0.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: shapes or devices do not fit, the table is empty, the metric is unknown, or l2 is given a bias.
    """
    x, table, bias = autocast_to_widest(x, table, bias)
    check_float("x", x)
    if metric not in ("l2", "dot"):
        raise ValueError(f"metric must be 'l2' or 'dot', got {metric!r}")
    if bias is not None and metric == "l2":
        raise ValueError("bias is only for metric='dot', got one with metric='l2'")
    if table.dim() != 2 or x.dim() == 0 or table.shape[1] != x.shape[-1]:
        raise ValueError(f"x must have shape [..., d] and table [V, d], got {list(x.shape)} and {list(table.shape)}")
    if table.shape[0] == 0 or table.shape[1] == 0:
        raise ValueError(f"table must have at least one row and one feature, got shape {list(table.shape)}")
    for name, tensor in (("table", table), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(f"{name} must have the dtype of x, {x.dtype}, got {tensor.dtype}")
    if bias is not None:
        check_shape("bias", bias, (table.shape[0],))
    check_same_device(x=x, table=table, bias=bias)
    embeddings, ids = torch.ops.pydiffseq.nearest(x, table, bias, metric == "dot")
    return ids, embeddings


class _Packed(NamedTuple):
    """A table ready for the search, and what it was packed from."""

    storages: tuple[StorageWeakRef, ...]
    versions: tuple[int, ...]
    panels: Tensor
    rest: Tensor
    wild: Tensor


_MOST_PACKED = 8
_packed_tables: OrderedDict[tuple, _Packed] = OrderedDict()


def _versions(tensors: list[Tensor]) -> tuple[int, ...] | None:
    """None for inference tensors, which do not count their changes: those are packed at every call."""
    return None if any(t.is_inference() for t in tensors) else tuple(t._version for t in tensors)


def _pack(table: Tensor, bias: Tensor | None, dot: bool) -> _Packed:
    sources = [table] if bias is None else [table, bias]
    key = (dot, table.dtype, table.shape, C.isa(), *(t.data_ptr() for t in sources))
    versions = _versions(sources)
    packed = _packed_tables.get(key)
    if packed is not None and packed.versions == versions and not any(s.expired() for s in packed.storages):
        _packed_tables.move_to_end(key)
        return packed
    words, floats = C.nearest_packed_sizes(*table.shape)
    packed = _Packed(tuple(StorageWeakRef(t.untyped_storage()) for t in sources), versions or (),
                     torch.empty(words, dtype=torch.int32), torch.empty(floats),
                     torch.empty(table.shape[0] + 1, dtype=torch.int32))
    C.nearest_pack(pointer(table), pointer(bias), table.dtype == torch.bfloat16, dot, *table.shape,
                   pointer(packed.panels), pointer(packed.rest), pointer(packed.wild))
    if versions is not None:
        for old in [k for k, p in _packed_tables.items() if any(s.expired() for s in p.storages)]:
            del _packed_tables[old]
        _packed_tables[key] = packed
        if len(_packed_tables) > _MOST_PACKED:
            _packed_tables.popitem(last=False)
    return packed


def _nearest_reference(x: Tensor, table: Tensor, bias: Tensor | None, dot: bool) -> tuple[Tensor, Tensor]:
    ids, embeddings = reference.nearest(x, table, bias, dot)
    return embeddings, ids


def _nearest_cpu(x: Tensor, table: Tensor, bias: Tensor | None, dot: bool) -> tuple[Tensor, Tensor]:
    if not use_kernel(x, table, bias):
        return _nearest_reference(x, table, bias, dot)
    x, source = x.contiguous(), table.contiguous()
    bias = None if bias is None else bias.contiguous()
    ids, embeddings = x.new_empty(x.shape[:-1], dtype=torch.int64), torch.empty_like(x)
    packed = _pack(source, bias, dot)
    C.nearest_search(pointer(x), ids.numel(), pointer(source), pointer(bias), x.dtype == torch.bfloat16, dot,
                     *source.shape, pointer(packed.panels), pointer(packed.rest), pointer(packed.wild), pointer(ids),
                     pointer(embeddings))
    return embeddings, ids


library.impl("nearest", _nearest_cpu, "CPU")
library.impl("nearest", _nearest_reference, "CompositeExplicitAutograd")


@torch.library.register_fake("pydiffseq::nearest", lib=library)
def _fake(x, table, bias, dot):
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.int64)


def _setup_context(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])
    ctx.rows = inputs[1].shape[0]


def _backward(ctx, grad: Tensor, _grad_ids: Tensor | None):
    ids, = ctx.saved_tensors
    return None, torch.ops.aten.embedding_dense_backward(grad.contiguous(), ids, ctx.rows, -1, False), None, None


torch.library.register_autograd("pydiffseq::nearest", _backward, setup_context=_setup_context, lib=library)
