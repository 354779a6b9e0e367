"""A network made ready for decoding: what its weights alone decide is computed once."""

from __future__ import annotations

import copy
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from pydiffseq.nn.embedding import LatentEmbedding
from pydiffseq.nn.time import TimeFeatures, TimeMLP, Timesteps, TimeTable

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


@torch.no_grad()
def freeze(network: Network) -> Network:
    """A copy of ``network`` (in evaluation mode) that computes the same, for weights that do not change any more.

    Time MLPs become tables over the timesteps and the token embedding its present tables. Whatever else there is shares
    its parameters with ``network``, which stays as it is.
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
    frozen = copy.copy(module)
    frozen.__dict__["_modules"] = {
        name: None if child is None else _freeze(child, features) for name, child in module._modules.items()}
    return frozen
