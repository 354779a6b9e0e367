"""Exponential moving average of a module's parameters, kept in float32 inside the model and read by generation."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class ModuleEMA(nn.Module):
    """A float32 copy of ``module`` that follows it: ``ema <- decay * ema + (1 - decay) * module``.

    It is part of the model's state dict, so checkpoints hold it and every fairseq command sees it. It stays float32
    when the model is cast to half or bfloat16. The decay starts low, ``min(rate, (1 + n) / (10 + n))`` after n updates,
    so that a short run is not dominated by its random start.
    """

    module: nn.Module
    updates: Tensor   # int64, the optimiser updates taken in

    def __init__(self, module: nn.Module, rate: float) -> None:
        super().__init__()
        if not 0.0 < rate < 1.0:
            raise ValueError(f"ema_rate must lie between 0 and 1 (0 switches it off), got {rate}")
        self.rate = rate
        self.module = copy.deepcopy(module).requires_grad_(False).eval()
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def _apply(self, fn, recurse: bool = True) -> ModuleEMA:
        """Follow moves to another device, but keep each tensor's dtype and value."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)

    def train(self, mode: bool = True) -> ModuleEMA:
        return super().train(False)

    @torch.no_grad()
    def update(self, module: nn.Module, num_updates: int) -> None:
        """Take in ``module`` after ``num_updates`` optimiser updates; a number seen before changes nothing."""
        if num_updates <= int(self.updates):
            return
        self.updates.fill_(num_updates)
        decay = min(self.rate, (1 + num_updates) / (10 + num_updates))
        average: list[Tensor] = [p.data for p in self.module.parameters()]
        current = [p.data.float() for p in module.parameters()]
        torch._foreach_lerp_(average, current, 1.0 - decay)
