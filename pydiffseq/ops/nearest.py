"""Exact nearest embedding: the rounding step from vectors back to tokens."""

from __future__ import annotations

import contextlib
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from pydiffseq.ops import _cuda, reference
from pydiffseq.ops._extension import (
    C,
    autocast_to_widest,
    check_float,
    check_same_device,
    check_shape,
    library,
    pointer,
    register_autograd,
    use_kernel,
)

library.define("nearest(Tensor x, Tensor table, Tensor? bias, bool dot) -> (Tensor embeddings, Tensor ids)")
library.define("nearest_topk(Tensor x, Tensor table, Tensor? bias, bool dot, int k) -> (Tensor scores, Tensor ids)")

MOST = 16  # kNearestMost in csrc/common/nearest.h


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
    _check(x, table, bias, metric)
    embeddings, ids = torch.ops.pydiffseq.nearest(x, table, bias, metric == "dot")
    return ids, embeddings


def nearest_topk(x: Tensor, table: Tensor, bias: Tensor | None = None, *, k: int,
                 metric: str = "l2") -> tuple[Tensor, Tensor]:
    """The k rows of ``table`` nearest to each vector of x and their scores, best first; as exact as :func:`nearest`.

    The order is that of the float64 scores ``-|x - table[v]|^2`` (``metric="l2"``) or ``x . table[v] + bias[v]``
    (``"dot"``), ties by id; a score that is NaN counts as minus infinity. The probability of a word among all is
    ``exp(score - lse)`` with :func:`pydiffseq.ops.linear_logsumexp`.

    Args:
        x, table, bias, metric: as in :func:`nearest`.
        k: in 1..min(V, 16).

    Returns:
        ids int64 [..., k] and scores [..., k], float32 (float64 for float64 inputs), rounded once. Not differentiable.

    Raises:
        TypeError, ValueError: as :func:`nearest`, and ValueError for k out of range.
    """
    x, table, bias = autocast_to_widest(x, table, bias)
    _check(x, table, bias, metric)
    if not 1 <= k <= min(MOST, table.shape[0]):
        raise ValueError(f"k must be in 1..{min(MOST, table.shape[0])} (rows of the table, at most {MOST}), got {k}")
    scores, ids = torch.ops.pydiffseq.nearest_topk(x, table, bias, metric == "dot", k)
    return ids, scores


def _check(x: Tensor, table: Tensor, bias: Tensor | None, metric: str) -> None:
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


class _Packed(NamedTuple):
    """A table ready for the search, and what it was packed from."""

    storages: tuple[StorageWeakRef, ...]
    versions: tuple[int, ...]
    tensors: tuple[Tensor, ...]


_MOST_PACKED = 8
_packed_tables: OrderedDict[tuple, _Packed] = OrderedDict()


def _versions(tensors: list[Tensor]) -> tuple[int, ...] | None:
    """None for inference tensors, which do not count their changes: those are packed at every call."""
    return None if any(t.is_inference() for t in tensors) else tuple(t._version for t in tensors)


def _keep_packed(table: Tensor, bias: Tensor | None, key: tuple,
                 pack: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """What ``pack`` gives for the table, or gave at an earlier call with this table, bias and ``key``."""
    sources = [table] if bias is None else [table, bias]
    key = (table.dtype, table.shape, *key, *(t.data_ptr() for t in sources))
    versions = _versions(sources)
    packed = _packed_tables.get(key)
    if packed is not None and packed.versions == versions and not any(s.expired() for s in packed.storages):
        _packed_tables.move_to_end(key)
        return packed.tensors
    tensors = pack()
    if versions is not None:
        for old in [k for k, p in _packed_tables.items() if any(s.expired() for s in p.storages)]:
            del _packed_tables[old]
        storages = tuple(StorageWeakRef(t.untyped_storage()) for t in sources)
        _packed_tables[key] = _Packed(storages, versions, tensors)
        if len(_packed_tables) > _MOST_PACKED:
            _packed_tables.popitem(last=False)
    return tensors


def _pack_cpu(table: Tensor, bias: Tensor | None, dot: bool) -> tuple[Tensor, Tensor, Tensor]:
    words, floats = C.nearest_packed_sizes(*table.shape)
    packed = (torch.empty(words, dtype=torch.int32), torch.empty(floats),
              torch.empty(table.shape[0] + 1, dtype=torch.int32))
    C.nearest_pack(pointer(table), pointer(bias), table.dtype == torch.bfloat16, dot, *table.shape,
                   *(pointer(tensor) for tensor in packed))
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
    packed = _keep_packed(source, bias, (dot, C.isa()), lambda: _pack_cpu(source, bias, dot))
    C.nearest_search(pointer(x), ids.numel(), pointer(source), pointer(bias), x.dtype == torch.bfloat16, dot,
                     *source.shape, *(pointer(tensor) for tensor in packed), pointer(ids), pointer(embeddings))
    return embeddings, ids


def _topk_cpu(x: Tensor, table: Tensor, bias: Tensor | None, dot: bool, k: int) -> tuple[Tensor, Tensor]:
    if not use_kernel(x, table, bias):
        return reference.nearest_topk(x, table, bias, dot, k)
    x, source = x.contiguous(), table.contiguous()
    bias = None if bias is None else bias.contiguous()
    ids, scores = (x.new_empty(*x.shape[:-1], k, dtype=dtype) for dtype in (torch.int64, torch.float64))
    packed = _keep_packed(source, bias, (dot, C.isa()), lambda: _pack_cpu(source, bias, dot))
    C.nearest_topk(pointer(x), ids.numel() // k, pointer(source), pointer(bias), x.dtype == torch.bfloat16, dot,
                   *source.shape, *(pointer(tensor) for tensor in packed), k, pointer(ids), pointer(scores))
    return scores.float(), ids


# --- CUDA kernels (csrc/cuda/nearest.cu, whose constants these are) ---

_TILE, _CHUNK, _SLOTS, _SLOT_WORDS, _MOST_TILES = 128, 64, 8, 5, 32767
_HUGE, _HUGE_BIAS = 2.0**61, 2.0**118
_ROUND_UP = 1 + 2.0**-20
_ELEMENTS_AT_ONCE = 1 << 24


def _sum_error(dim: int) -> float:
    return (dim + 8) / 2**21


def _flush_error(dim: int) -> float:
    return dim * 2.4e-38


def _pack_cuda(table: Tensor, bias: Tensor | None, dot: bool) -> tuple[Tensor, ...]:
    """(rows, bias, norm, slack, centre, wild) of csrc/cuda/nearest.h, by torch on the table's device without waiting."""
    vocab, dim = table.shape
    rows, features = -(-vocab // _TILE) * _TILE, -(-dim // _CHUNK) * _CHUNK
    blocks = range(0, vocab, max(1, _ELEMENTS_AT_ONCE // dim))
    parts = [slice(start, min(start + blocks.step, vocab)) for start in blocks]
    norms = torch.cat([table[part].double().square().sum(-1).sqrt() for part in parts])
    wild = ~(norms < _HUGE) if bias is None else ~((norms < _HUGE) & (bias.double().abs() < _HUGE_BIAS))
    centre = torch.zeros(dim, dtype=torch.float64, device=table.device)
    if not dot:
        for part in parts:
            centre += table[part].double().masked_fill(wild[part, None], 0.0).sum(0)
        centre /= (~wild).sum().clamp_min(1)
    centre = centre.float()
    packed = table.new_zeros(rows, features, dtype=torch.bfloat16)
    squares = torch.zeros(rows, dtype=torch.float64, device=table.device)
    for part in parts:
        shifted = (table[part].float() - centre).masked_fill(wild[part, None], 0.0)
        packed[part, :dim] = shifted.bfloat16()
        squares[part] = shifted.double().square().sum(-1)
    added = -0.5 * squares
    if dot:
        added = torch.zeros_like(squares)
        if bias is not None:
            added[:vocab] = bias.double()
    missing = torch.nn.functional.pad(wild, (0, rows - vocab), value=True)
    norm = squares.view(-1, _TILE).amax(1).sqrt() * _ROUND_UP
    largest = added.abs().masked_fill(missing, 0.0).view(-1, _TILE).amax(1)
    slack = (largest * _sum_error(dim) + _flush_error(dim)) * _ROUND_UP
    ids = torch.cat([wild.sum()[None], torch.argsort((~wild).int(), stable=True)]).int()
    return packed, added.float().masked_fill(missing, -torch.inf), norm.float(), slack.float(), centre, ids


_alive: list[tuple[Tensor, ...]] | None = None   # packs that the graph being recorded reads


@contextlib.contextmanager
def keeping_packs() -> Iterator[list[tuple[Tensor, ...]]]:
    """While a CUDA graph is recorded, use the packs that exist; they must live, in the list given, as long as the graph.

    Recording begins with a wait for the device, so packs made on any stream are ready.
    """
    global _alive
    before, _alive = _alive, []
    try:
        yield _alive
    finally:
        _alive = before


def _existing_pack(table: Tensor, bias: Tensor | None, dot: bool) -> tuple[Tensor, ...] | None:
    """A pack of the table as it is now, whatever the stream, or ``None``."""
    sources = [table] if bias is None else [table, bias]
    wanted = table.dtype, table.shape, dot, *(t.data_ptr() for t in sources)
    for (dtype, shape, made_for_dot, _, *pointers), packed in _packed_tables.items():
        fresh = packed.versions == _versions(sources) and not any(s.expired() for s in packed.storages)
        if (dtype, shape, made_for_dot, *pointers) == wanted and fresh:
            return packed.tensors
    return None


def _packed_for_cuda(table: Tensor, bias: Tensor | None, dot: bool) -> tuple[Tensor, ...]:
    """Kept per stream, on which later calls find it ready; a CUDA graph packs anew, but within :func:`keeping_packs`."""
    if _cuda.capturing(table.device):
        existing = None if _alive is None else _existing_pack(table, bias, dot)
        if _alive is None or existing is None:
            return _pack_cuda(table, bias, dot)
        _alive.append(existing)
        return existing
    return _keep_packed(table, bias, (dot, _cuda.stream(table.device)), lambda: _pack_cuda(table, bias, dot))


def _search(x: Tensor, table: Tensor, bias: Tensor | None, dot: bool, parts: int, k: int,
            out: tuple[Tensor | None, ...]) -> None:
    """Launch the search for the rows of x [rows, d]; ``out`` = (ids, embeddings, scores)."""
    packed = _packed_for_cuda(table, bias, dot)
    padded_rows, features = packed[0].shape
    workspace = (x.new_empty(x.shape[0], features, dtype=torch.bfloat16), x.new_empty(x.shape[0], 2, dtype=torch.float32),
                 x.new_empty(x.shape[0], parts, _SLOTS, _SLOT_WORDS, dtype=torch.float32))
    _cuda.launch(C.nearest_search_cuda, x.device, pointer(x), x.shape[0], pointer(table), pointer(bias), dot, *table.shape,
                 tuple(map(pointer, packed)), padded_rows // _TILE, features, tuple(map(pointer, workspace)), parts, k,
                 tuple(map(pointer, out)), _cuda.DTYPES[x.dtype])


def _tiles(table: Tensor) -> int:
    return -(-table.shape[0] // _TILE)


def _nearest_kernel(x: Tensor, table: Tensor, bias: Tensor | None, dot: bool) -> tuple[Tensor, Tensor]:
    x, table = x.contiguous(), table.contiguous()
    bias = None if bias is None else bias.contiguous()
    ids, embeddings = x.new_empty(x.shape[:-1], dtype=torch.int64), torch.empty_like(x)
    parts = C.tile_parts_cuda(ids.numel(), _tiles(table), x.device.index or 0)
    _search(x.view(-1, x.shape[-1]), table, bias, dot, parts, 1, (ids, embeddings, None))
    return embeddings, ids


_PARTS_PER_NEIGHBOUR = 4  # a slot keeps two groups: with 32 slots per neighbour a third one of the best is rare
_SLOTS_AT_ONCE = 1 << 22


def _topk_kernel(x: Tensor, table: Tensor, bias: Tensor | None, dot: bool, k: int) -> tuple[Tensor, Tensor]:
    x, table = x.contiguous(), table.contiguous()
    bias = None if bias is None else bias.contiguous()
    ids, scores = (x.new_empty(*x.shape[:-1], k, dtype=dtype) for dtype in (torch.int64, torch.float32))
    tiles, rows = _tiles(table), ids.numel() // k
    per_part = max(1, tiles // max(C.tile_parts_cuda(rows, tiles, x.device.index or 0), _PARTS_PER_NEIGHBOUR * k))
    parts = -(-tiles // per_part)
    step = max(_TILE, _SLOTS_AT_ONCE // (parts * _SLOTS) // _TILE * _TILE)
    pieces = (t.view(-1, t.shape[-1]).split(step) for t in (x, ids, scores))
    for part, part_ids, part_scores in zip(*pieces, strict=True):
        _search(part, table, bias, dot, parts, k, (part_ids, None, part_scores))
    return scores, ids


def _cuda_cases(device: torch.device):
    """The self-check: near ones and far ones, ties, rows that the product cannot take, both shapes of the filter."""
    for dtype, dim in ((torch.float32, 40), (torch.bfloat16, 136), (torch.float16, 72)):
        table = reference.philox_normal(torch.tensor([dim]), 1, 300, dim, 0, None, 3, torch.float32, device)[0]
        x = torch.cat([table[:130] + 0.3 * table.flip(0)[:130], table[100:101] * torch.inf, torch.zeros_like(table[:1])])
        table[200:] = table[:100]
        table[17], table[33, 5] = table[17] * 1e4, torch.nan
        x, table, bias = x.to(dtype), table.to(dtype), table[:, 0].nan_to_num(0.0).to(dtype)
        for b, dot in ((None, False), (bias, True)):
            yield ("nearest", functools.partial(_nearest_kernel, x, table, b, dot),
                   functools.partial(_nearest_reference, x, table, b, dot))
            yield ("nearest_topk", lambda a=(x, table, b, dot, 5): _topk_kernel(*a)[1],
                   lambda a=(x, table, b, dot, 5): reference.nearest_topk(*a)[1])


def _use_cuda(x: Tensor, table: Tensor) -> bool:
    return (x.is_cuda and x.dtype in _cuda.DTYPES and table.shape[0] <= _MOST_TILES * _TILE and _cuda.compiled()
            and _cuda.trusted("nearest", x.device, _cuda_cases))


def _nearest_cuda(x: Tensor, table: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    return (_nearest_kernel if _use_cuda(x, table) else _nearest_reference)(x, table, *arguments)


def _topk_cuda(x: Tensor, table: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    return (_topk_kernel if _use_cuda(x, table) else reference.nearest_topk)(x, table, *arguments)


library.impl("nearest_topk", _topk_cuda, "CUDA")
library.impl("nearest_topk", _topk_cpu, "CPU")
library.impl("nearest_topk", reference.nearest_topk, "CompositeExplicitAutograd")
library.impl("nearest", _nearest_cpu, "CPU")
library.impl("nearest", _nearest_cuda, "CUDA")
library.impl("nearest", _nearest_reference, "CompositeExplicitAutograd")


@torch.library.register_fake("pydiffseq::nearest", lib=library)
def _fake(x, table, bias, dot):
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.int64)


@torch.library.register_fake("pydiffseq::nearest_topk", lib=library)
def _topk_fake(x, table, bias, dot, k):
    shape = (*x.shape[:-1], k)
    return (x.new_empty(shape, dtype=torch.promote_types(x.dtype, torch.float32)),
            x.new_empty(shape, dtype=torch.int64))


def _topk_setup(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(*output)


def _topk_backward(ctx, _grad_scores, _grad_ids):
    return None, None, None, None, None


register_autograd("nearest_topk", _topk_backward, _topk_setup)


def _setup_context(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])
    ctx.rows = inputs[1].shape[0]


def _backward(ctx, grad: Tensor, _grad_ids: Tensor | None):
    ids, = ctx.saved_tensors
    return None, torch.ops.aten.embedding_dense_backward(grad.contiguous(), ids, ctx.rows, -1, False), None, None


register_autograd("nearest", _backward, _setup_context)
