"""A network made ready for decoding: what its weights alone decide is computed once."""

from __future__ import annotations

import copy
import math
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from pydiffseq import ops
from pydiffseq.nn.attention import ResidualLinear
from pydiffseq.nn.embedding import LatentEmbedding
from pydiffseq.nn.length import LengthHead
from pydiffseq.nn.projection import Projection
from pydiffseq.nn.time import TimeFeatures, TimeMLP, Timesteps, TimeTable
from pydiffseq.nn.transformer import GEGLU

Network = TypeVar("Network", bound=nn.Module)


class FrozenEmbedding(LatentEmbedding):
    """A :class:`LatentEmbedding` with its tables as they are now; the ops that pack a table find the same one each time."""

    def __init__(self, embedding: LatentEmbedding) -> None:
        nn.Module.__init__(self)
        self.distance = embedding.distance
        self.register_buffer("bias", embedding.bias.detach().clone())
        self._head_table = embedding.head_table().detach().clone()
        self._table = embedding.table().detach().clone() if embedding.scale else self._head_table

    def head_table(self) -> Tensor:
        return self._head_table

    def table(self) -> Tensor:
        return self._table


class FrozenLinear(nn.Module):
    """A linear layer whose result for a token does not depend on the batch (see :class:`pydiffseq.ops.PackedLinear`)."""

    def __init__(self, linear: nn.Linear, *, geglu: bool = False) -> None:
        super().__init__()
        self.packed = ops.PackedLinear(linear.weight, linear.bias, geglu=geglu)

    def forward(self, x: Tensor, residual: Tensor | None = None, dropout: float = 0.0) -> Tensor:
        """``linear(x)``, plus the residual of a :class:`ResidualLinear`; nothing is dropped."""
        return self.packed(x, residual)


class FrozenGEGLU(nn.Module):
    """A :class:`GEGLU` whose first product is followed by the activation before it leaves the cache."""

    def __init__(self, ffn: GEGLU) -> None:
        super().__init__()
        self.up, self.down = FrozenLinear(ffn.up, geglu=True), FrozenLinear(ffn.down)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.down(self.up(x), residual)


class FrozenProjection(nn.Module):
    """A :class:`Projection`."""

    def __init__(self, projection: Projection) -> None:
        super().__init__()
        up, _, down = projection
        self.up, self.down = FrozenLinear(cast(nn.Linear, up)), FrozenLinear(cast(nn.Linear, down))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        residual = None if residual is None else residual.expand(*x.shape[:-1], -1)
        return self.down(torch.tanh(self.up(x)), residual)


class FrozenLengthHead(LengthHead):
    """A :class:`LengthHead` whose scores of a sentence do not depend on its batch and padding."""

    packed: ops.PackedLinear

    @classmethod
    def of(cls, head: LengthHead) -> FrozenLengthHead:
        frozen = cast(FrozenLengthHead, copy.copy(head))
        frozen.__class__ = cls
        frozen.packed = ops.PackedLinear(head.table.weight)
        return frozen

    def mean(self, states: Tensor, mask: Tensor) -> Tensor:
        """The mean is attention with a query of zeros, whose kernel adds the real positions alone, one after another."""
        heads = states.view(*states.shape[:2], -1, math.gcd(states.size(2), 64))
        return ops.timestep_attention(torch.zeros_like(heads[:, :1]), heads, heads, key_mask=mask).flatten(1)

    def scores(self, feature: Tensor) -> Tensor:
        return self.packed(feature)


@torch.no_grad()
def freeze(network: Network) -> Network:
    """A copy of ``network`` (in evaluation mode) that computes the same, for weights that do not change any more.

    Time MLPs become tables over the timesteps, the token embedding its present tables, and linear layers are packed, so
    that on the CPU kernels a sentence's numbers do not depend on its batch. Whatever else there is shares its parameters
    with ``network``, which stays as it is.
    """
    features = next((module for module in network.modules() if isinstance(module, TimeFeatures)), None)
    return cast(Network, _freeze(network, features))


def _freeze(module: nn.Module, features: TimeFeatures | None) -> nn.Module:
    if isinstance(module, LatentEmbedding):
        return FrozenEmbedding(module)
    if isinstance(module, TimeMLP) and features is not None:
        return TimeTable(module, features)
    if isinstance(module, TimeFeatures):
        return Timesteps()
    if isinstance(module, Projection):
        return FrozenProjection(module)
    if isinstance(module, GEGLU):
        return FrozenGEGLU(module)
    if isinstance(module, LengthHead):
        return FrozenLengthHead.of(module)
    if type(module) in (nn.Linear, ResidualLinear):
        return FrozenLinear(cast(nn.Linear, module))
    frozen = copy.copy(module)
    frozen.__dict__["_modules"] = {
        name: None if child is None else _freeze(child, features) for name, child in module._modules.items()}
    return frozen
