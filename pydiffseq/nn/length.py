"""Length prediction: how many target tokens a source sentence becomes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LENGTH_FEATURES = ("mean_pool", "token_embed")


class LengthHead(nn.Module):
    """Scores every target length 0..max_length from the encoder states (spec: AR-Diffusion's ``pred_len``).

    ``logits = feature . table^T``, where the feature is the first real token's encoder state (``token_embed``) or the
    masked mean (``mean_pool``). With ``relative``, a learned bias on ``target length - source length`` is added, which
    learns the rough length from the first updates on.
    """

    def __init__(self, hidden_dim: int, max_length: int, feature: str, *, relative: bool) -> None:
        super().__init__()
        if feature not in LENGTH_FEATURES:
            raise ValueError(f"length feature must be one of {', '.join(LENGTH_FEATURES)}, got {feature!r}")
        self.feature, self.max_length = feature, max_length
        self.table = nn.Embedding(max_length + 1, hidden_dim)
        nn.init.normal_(self.table.weight, std=0.02)
        self.offset_bias = nn.Parameter(torch.zeros(2 * max_length + 1)) if relative else None

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Encoder states ``[B, S, H]``, mask bool ``[B, S]`` -> logits ``[B, max_length + 1]`` (float32)."""
        if self.feature == "token_embed":
            first = mask.long().argmax(1)   # not 0: the source may be padded on the left
            feature = states[torch.arange(len(states), device=mask.device), first]
        else:
            feature = self.mean(states, mask)
        return self.add_bias(self.scores(feature).float(), mask)

    def mean(self, states: Tensor, mask: Tensor) -> Tensor:
        """Mean of the states at real positions, ``[B, H]``."""
        keep = mask.to(states.dtype)[..., None]
        return (states * keep).sum(1) / keep.sum(1).clamp_min(1)

    def scores(self, feature: Tensor) -> Tensor:
        """``[B, H] -> [B, max_length + 1]``."""
        return F.linear(feature, self.table.weight)

    def add_bias(self, logits: Tensor, mask: Tensor) -> Tensor:
        """The learned bias on the difference of the lengths, where there is one."""
        if self.offset_bias is None:
            return logits
        offset = torch.arange(self.max_length + 1, device=mask.device) - mask.sum(1, keepdim=True)
        index = offset.clamp(-self.max_length, self.max_length) + self.max_length
        return logits + self.offset_bias.float()[index]
