"""The network's entry and exit: between the latent space and its width."""

from __future__ import annotations

from torch import Tensor, nn


class Projection(nn.Sequential):
    """``Linear -> tanh -> Linear`` (spec 1.2, 2.1)."""

    def __init__(self, input_dim: int, middle_dim: int, output_dim: int) -> None:
        super().__init__(nn.Linear(input_dim, middle_dim), nn.Tanh(), nn.Linear(middle_dim, output_dim))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``[..., input_dim] -> [..., output_dim]``, plus the residual if there is one."""
        y = super().forward(x)
        return y if residual is None else y + residual
