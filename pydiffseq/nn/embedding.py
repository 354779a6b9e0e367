"""The target token table: embeds tokens into the latent space and, tied, scores them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pydiffseq import ops


class LatentEmbedding(nn.Module):
    """Table ``[V, d]`` with a tied head: ``logits = x . table^T + bias``, or minus the distance with ``distance``.

    ``norm`` puts an affine-free layer norm on every row, which keeps the embeddings on a sphere of radius sqrt(d), so
    that they cannot shrink to make the mean squared error small. ``scale`` multiplies embeddings (not the head) by
    sqrt(d), as the official ``scale_embedding``. The row ``padding_idx``, if any, starts at zero.
    """

    def __init__(self, vocabulary: int, dim: int, *, norm: bool = False, scale: bool = False, distance: bool = False,
                 padding_idx: int | None = None) -> None:
        super().__init__()
        self.norm, self.scale, self.distance = norm, scale, distance
        self.weight = nn.Parameter(torch.randn(vocabulary, dim))
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        if padding_idx is not None and not norm:
            with torch.no_grad():
                self.weight[padding_idx].zero_()

    def head_table(self) -> Tensor:
        """The rows that score tokens, ``[V, d]``."""
        return F.layer_norm(self.weight, self.weight.shape[-1:]) if self.norm else self.weight

    def table(self) -> Tensor:
        """The rows that embed tokens, ``[V, d]``."""
        table = self.head_table()
        return table * table.size(-1) ** 0.5 if self.scale else table

    def nll(self, x: Tensor, tokens: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Minus the log probability of ``tokens`` int64 ``[...]`` at ``x`` ``[..., d]``, float32 ``[...]``.

        A token of -100 costs nothing.
        """
        table, vectors, targets = self.head_table(), x.flatten(0, -2), tokens.flatten()
        if self.distance:
            # The bias takes part with weight zero, so that every parameter has a gradient (DistributedDataParallel).
            scores = 0.0 * self.bias.float() - torch.cdist(vectors.float(), table.float())
            losses = F.cross_entropy(scores, targets, reduction="none", label_smoothing=label_smoothing)
        else:
            losses = ops.linear_cross_entropy(vectors, table, self.bias, targets, label_smoothing=label_smoothing)
        return losses.view_as(tokens)

    def likeliest(self, x: Tensor) -> Tensor:
        """The token of the highest score at ``x`` ``[..., d]``, int64 ``[...]``."""
        table = self.head_table()
        if self.distance:
            return ops.nearest(x, table)[0]
        return ops.nearest(x, table, self.bias, metric="dot")[0]
