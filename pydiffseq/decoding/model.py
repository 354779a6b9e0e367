"""What decoding asks of a network: the seam between this package and :mod:`pydiffseq.models`."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from pydiffseq.diffusion import NoiseSchedule


class Encoded(Protocol):
    """What a network keeps of B sources while their candidates are denoised."""

    mask: Any   # bool [B, S]

    def select(self, index: Tensor) -> Encoded:
        """Sentences ``index``, int64 ``[b]``."""
        ...


class DenoisingNetwork(Protocol):
    """A network that can be decoded: :class:`pydiffseq.models.ARDiffusion` and ``DiffuSeq`` are.

    ``config`` has ``pad``, ``eos``, ``bos``, ``latent_dim``, ``diffusion_steps``, ``timestep_sampler`` and
    ``anchor_scale``; ``embedding`` has ``table()``, ``likeliest(x)`` and ``nll(x, tokens)``; ``length_head`` is ``None``
    where targets have a fixed length. ``absorbing``: ``[d]``, what its noise drifts to, or ``None`` for 0.
    """

    config: Any
    schedule: NoiseSchedule
    embedding: Any
    length_head: Any
    absorbing: Any
    training: bool

    def encode(self, src_tokens: Tensor) -> Any:
        """Source ids int64 ``[B, S]`` -> :class:`Encoded`."""
        ...

    def prepare(self, encoded: Any, mask: Tensor | None, lengths: Tensor, width: int) -> Any:
        """``encoded`` with what all denoising steps of its M candidates share; arguments as of :meth:`denoise`."""
        ...

    def denoise(self, x_t: Tensor, timesteps: Tensor, encoded: Any, mask: Tensor | None, x_self: Tensor | None,
                lengths: Tensor | None) -> Tensor:
        """x0_hat ``[M, N, d]``. Row ``m`` belongs to sentence ``m // (M / B)`` of ``encoded``, which is not copied.

        ``encoded``: as :meth:`encode` or :meth:`prepare` gives it. ``timesteps``: int64 ``[M, N]``. ``mask``: bool
        ``[M, N]`` or ``None``. ``lengths``: int64 ``[M]``.
        """
        ...

    def fixed_lengths(self, encoded: Any) -> Tensor:
        """Target lengths, padding included, where none are predicted: int64 ``[B]``."""
        ...

    def length_logits(self, encoded: Any) -> Tensor:
        """Scores of the target lengths 0, 1, .., float32 ``[B, longest + 1]``."""
        ...
