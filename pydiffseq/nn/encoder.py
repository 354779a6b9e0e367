"""Source encoder: token ids to states that the decoder's cross-attention reads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pydiffseq import ops
from pydiffseq.nn.transformer import LN_EPS, EncoderLayer


class Encoder(nn.Module):
    """BERT-style encoder (spec 2.2): word, position and token-type embeddings, LN, post-LN layers, optional pooler.

    ``pre_norm`` gives pre-LN layers and a final LN instead. The pooler takes part with weight zero, as published: it
    changes no value, but belongs to the parameter count and to the official checkpoints.
    """

    def __init__(self, hidden_dim: int, heads: int, ffn_dim: int, layers: int, max_positions: int, dropout: float,
                 attention_dropout: float, *, pre_norm: bool, pooler: bool) -> None:
        super().__init__()
        self.dropout = dropout
        self.positions = nn.Embedding(max_positions, hidden_dim)
        self.token_type = nn.Embedding(2, hidden_dim)
        self.norm = nn.LayerNorm(hidden_dim, LN_EPS)
        self.layers = nn.ModuleList(
            EncoderLayer(hidden_dim, heads, ffn_dim, dropout, attention_dropout, pre_norm=pre_norm)
            for _ in range(layers))
        self.final_norm = nn.LayerNorm(hidden_dim, LN_EPS) if pre_norm else None
        self.pooler = nn.Linear(hidden_dim, hidden_dim) if pooler else None
        self.apply(bert_init)

    def forward(self, words: Tensor, mask: Tensor) -> Tensor:
        """Word embeddings ``[B, S, H]`` and mask bool ``[B, S]`` -> states ``[B, S, H]``.

        Raises:
            ValueError: a source has more tokens than there are positions.
        """
        # Counted from the first real token, so that the side of the padding does not matter.
        position = (mask.cumsum(1) - 1).clamp_min(0)
        most = self.positions.num_embeddings
        longest = int(position.max()) + 1 if mask.size(1) > most else 0   # not read where it cannot be too long
        if longest > most:
            raise ValueError(f"a source must have at most {most} tokens (source_positions), got {longest}")
        x = words + nn.functional.embedding(position, self.positions.weight) + self.token_type.weight[0]
        x = ops.dropout(self.norm(x), self.dropout, training=self.training)
        for layer in self.layers:
            x = layer(x, mask)
        if self.final_norm is not None:
            x = self.final_norm(x)
        if self.pooler is not None:
            x = x + 0 * torch.tanh(self.pooler(x[:, :1]))
        return x


def bert_init(module: nn.Module) -> None:
    """BERT's initialisation: N(0, 0.02) weights, zero biases."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
