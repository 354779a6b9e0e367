"""Token timesteps: which noise level each token has, and how training draws it.

AR-Diffusion (Wu et al. 2023, section 3.1) moves all tokens of a sentence by one index ``s`` in ``0..T+N-1``. The token
times lie on a line in the (position n, timestep t) plane, through a start point that ``s`` moves and a fixed anchor, so
a token on the left is never noisier than one on its right.

Nearly all of its indices, T of T + N, move the line up or down, though, and only the last N move the noise across the
sentence: in few steps the right half of the sentence settles at once. *Rolling* token times (as in Rolling Diffusion,
Ruhe et al. 2024, over the frames of a video) are a line of fixed slope that moves across the sentence at constant speed,
so that every step settles as many tokens as any other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Generator, Tensor

from pydiffseq.diffusion.schedules import check_timesteps


def check_anchor_scale(anchor_scale: float) -> None:
    """Raise ``ValueError`` unless ``anchor_scale`` is a positive, finite number."""
    if not 0 < anchor_scale < float("inf"):
        raise ValueError(f"the anchor scale must be a positive number, got {anchor_scale}")


def xy_token_timesteps(s: Tensor, lengths: Tensor, max_len: int, T: int, anchor_scale: float = 2.0) -> Tensor:
    """Token timesteps of sentence index ``s`` (AR-Diffusion, eq. 4, with the indices of the published code).

    With N the length, the start point is ``(n_s, t_s) = (max(0, N-1-s), max(0, s-(N-1)))``, the anchor is
    ``(n_e, t_e) = (floor(anchor_scale N), T-1)``, and token n has the timestep of the line through both, rounded half
    to even and clamped to ``0..T-1``. So while ``s < N`` the tokens left of ``n_s`` are at timestep 0 and the noise
    begins further left as ``s`` grows; a larger ``s`` raises the noise of every token. The code has N-1 and T-1 where
    the paper has N and T.

    An anchor that would not lie to the right of the start point (``anchor_scale < 1``) is moved to ``n_s + 1``: in the
    limit one token after the other is denoised. Padding positions (``n >= N``) get the value of the same line, hence at
    least the timestep of the last token.

    Args:
        s: int64 ``[B]``, or ``[1]`` for one index shared by all, each in ``0..T+N-1``.
        lengths: int64 ``[B]`` or ``[1]``, the number N of tokens of each sentence.
        max_len: padded length of the result.
        T: number of timesteps.
        anchor_scale: position of the anchor in units of the length; 2 in the publication.

    Returns:
        int64 ``[B, max_len]``.

    Raises:
        ValueError: ``anchor_scale <= 0``, or ``s`` out of range.
    """
    check_anchor_scale(anchor_scale)
    check_timesteps("the sentence index s", s, 0, T - 1 + int(lengths.max()) if lengths.device.type == "cpu" else T)
    return xy_line(s, lengths, max_len, T, anchor_scale)


def xy_line(s: Tensor, lengths: Tensor, max_len: int, T: int, anchor_scale: float) -> Tensor:
    """:func:`xy_token_timesteps` without its checks; csrc/common/token_times.h takes the same steps."""
    last = lengths - 1
    # t_s reaches T at the last s; one less changes no token, and keeps padding beyond the anchor from falling
    start_n, start_t = (last - s).clamp_min(0), (s - last).clamp(0, T - 1)
    anchor_n = (lengths.double() * anchor_scale).floor().long()
    anchor_n = torch.maximum(anchor_n, start_n + 1)
    # float32 and this order of operations, because rounding half to even makes the last bit visible
    n = torch.arange(max_len, device=s.device, dtype=torch.float32)  # [max_len]
    x = (n - anchor_n.float()[:, None]) / (start_n - anchor_n).float()[:, None]
    t = x * (start_t - (T - 1)).float()[:, None] + (T - 1)
    return t.round().clamp(0, T - 1).long()


def rolling_token_timesteps(s: Tensor, lengths: Tensor, max_len: int, T: int, anchor_scale: float = 2.0) -> Tensor:
    """Token timesteps of rolling index ``s``: a ramp ``W = max(1, anchor_scale N)`` tokens wide.

    Token n has ``(T-1) (n - n_s) / W``, rounded half to even and clamped to ``0..T-1``, where ``n_s``, the last clean
    position, falls linearly in s: ``N-1`` at ``s = 0`` (all clean), ``-W`` at ``s = T-1`` (all noise). Where
    :func:`xy_token_timesteps` reaches its first clean token, its line has this width. Padding positions (``n >= N``) go on
    along the ramp.

    Args:
        s: int64 ``[B]``, or ``[1]`` for one index shared by all, each in ``0..T-1``.
        lengths: int64 ``[B]`` or ``[1]``, the number N of tokens of each sentence.
        max_len: padded length of the result.
        T: number of timesteps.
        anchor_scale: width of the ramp in units of the length.

    Returns:
        int64 ``[B, max_len]``.

    Raises:
        ValueError: ``anchor_scale <= 0``, or ``s`` out of range.
    """
    check_anchor_scale(anchor_scale)
    check_timesteps("the rolling index s", s, 0, T - 1)
    width = (anchor_scale * lengths.double()).clamp_min(1.0)
    clean = lengths - 1 - s.double() / max(1, T - 1) * (lengths - 1 + width)
    n = torch.arange(max_len, device=s.device, dtype=torch.float64)  # [max_len]
    t = (n - clean[:, None]) / width[:, None] * (T - 1)
    return t.round().clamp(0, T - 1).long()


class TimestepSampler(Protocol):
    """Draws the timesteps of a training batch."""

    def sample(self, lengths: Tensor, max_len: int, generator: Generator | None = None,
               uniform: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Draw timesteps for one batch.

        Args:
            lengths: int64 ``[B]`` target lengths.
            max_len: padded target length.
            generator: source of randomness; torch's default one on the device of ``lengths`` when ``None``.
            uniform: float ``[B]`` in [0, 1) to use instead, so that the caller decides what a draw depends on.

        Returns:
            int64 timesteps, ``[B]`` or ``[B, max_len]``, and float32 ``[B]`` weights of each sentence's loss.
        """

    def update(self, timesteps: Tensor, losses: Tensor) -> None:
        """Learn from the losses (``[B]``) of the drawn timesteps (``[B]``).

        With several processes every one must pass the same, gathered tensors, so that all keep the same state.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """State to store in a checkpoint; empty where there is none."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` returned."""


def _uniform(size: int, device: torch.device, generator: Generator | None) -> Tensor:
    """Float64 ``[size]`` uniform in [0, 1) on ``device``, drawn where the generator lives."""
    source = device if generator is None else generator.device
    return torch.rand(size, dtype=torch.float64, device=source, generator=generator).to(device)


class UniformSampler:
    """One timestep per sentence, uniform over ``0..T-1``; weight 1."""

    def __init__(self, T: int) -> None:
        self.T = T

    def sample(self, lengths: Tensor, max_len: int, generator: Generator | None = None,
               uniform: Tensor | None = None) -> tuple[Tensor, Tensor]:
        u = _uniform(len(lengths), lengths.device, generator) if uniform is None else uniform.double()
        return (u * self.T).long().clamp_max(self.T - 1), u.new_ones(len(u), dtype=torch.float32)

    def update(self, timesteps: Tensor, losses: Tensor) -> None:
        """Nothing to learn."""

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Nothing to restore."""


class TokenSampler(UniformSampler, ABC):
    """A timestep per token, which an index shared by the sentence decides; the index is uniform; weight 1."""

    def __init__(self, T: int, anchor_scale: float = 2.0) -> None:
        check_anchor_scale(anchor_scale)
        super().__init__(T)
        self.anchor_scale = anchor_scale

    @abstractmethod
    def indices(self, lengths: Tensor) -> Tensor:
        """How many indices sentences of ``lengths`` int64 ``[B]`` have: int64 ``[B]``. 0 is clean, the last all noise."""

    @abstractmethod
    def token_times(self, s: Tensor, lengths: Tensor, max_len: int) -> Tensor:
        """Timesteps int64 ``[B, max_len]`` at the indices ``s`` int64 ``[B]``."""

    def sample(self, lengths: Tensor, max_len: int, generator: Generator | None = None,
               uniform: Tensor | None = None) -> tuple[Tensor, Tensor]:
        u = _uniform(len(lengths), lengths.device, generator) if uniform is None else uniform.double()
        total = self.indices(lengths)
        s = torch.minimum((u * total).long(), total - 1)
        return self.token_times(s, lengths, max_len), u.new_ones(len(u), dtype=torch.float32)


class XYUniformSampler(TokenSampler):
    """AR-Diffusion's token timesteps: sentence index uniform over ``0..T+N-1`` with each sentence's own N; weight 1."""

    def indices(self, lengths: Tensor) -> Tensor:
        return self.T + lengths

    def token_times(self, s: Tensor, lengths: Tensor, max_len: int) -> Tensor:
        return xy_token_timesteps(s, lengths, max_len, self.T, self.anchor_scale)


class RollingSampler(TokenSampler):
    """Rolling token timesteps (:func:`rolling_token_timesteps`), the index uniform over ``0..T-1``; weight 1."""

    def indices(self, lengths: Tensor) -> Tensor:
        return torch.full_like(lengths, self.T)

    def token_times(self, s: Tensor, lengths: Tensor, max_len: int) -> Tensor:
        return rolling_token_timesteps(s, lengths, max_len, self.T, self.anchor_scale)


class LossAwareSampler:
    """One timestep per sentence, drawn in proportion to the root mean square of its recent losses.

    Importance sampling of Nichol and Dhariwal (2021, section 3.3): ``p_t`` is a mixture of that proportion (share
    ``1 - floor``) and the uniform distribution; a loss weighs ``1 / (T p_t)``, which leaves the expected loss as it
    was. Uniform until each timestep has seen ``history`` losses. The state stays on one device and is never read back.

    Args:
        T: number of timesteps.
        history: losses kept per timestep.
        floor: share of the uniform distribution.
    """

    def __init__(self, T: int, history: int = 10, floor: float = 0.001) -> None:
        self.T, self.floor = T, floor
        self.losses = torch.zeros(T, history, dtype=torch.float64)  # ring buffer of each timestep
        self.seen = torch.zeros(T, dtype=torch.int64)  # losses ever recorded for each timestep

    def to(self, device: torch.device | str) -> LossAwareSampler:
        """Move the state to ``device``, in place; sampling and updates do this by themselves."""
        self.losses, self.seen = self.losses.to(device), self.seen.to(device)
        return self

    def probabilities(self) -> Tensor:
        """Float64 ``[T]``: the probability of each timestep."""
        rms = self.losses.square().mean(1).sqrt()
        total = rms.sum()
        learned = (1 - self.floor) * rms / total + self.floor / self.T
        warm = (self.seen >= self.losses.shape[1]).all() & (total > 0)
        return torch.where(warm, learned, torch.full_like(learned, 1 / self.T))

    def sample(self, lengths: Tensor, max_len: int, generator: Generator | None = None,
               uniform: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.to(lengths.device)
        p = self.probabilities()
        u = _uniform(len(lengths), lengths.device, generator) if uniform is None else uniform.double()
        cumulative = p.cumsum(0)
        timesteps = torch.searchsorted(cumulative, u * cumulative[-1], right=True).clamp_max(self.T - 1)
        return timesteps, (1 / (self.T * p[timesteps])).float()

    def update(self, timesteps: Tensor, losses: Tensor) -> None:
        """Record ``losses`` ``[B]`` of ``timesteps`` ``[B]`` in order; the oldest of a timestep drop out."""
        check_timesteps("timesteps", timesteps, 0, self.T - 1)
        if timesteps.dim() != 1 or losses.shape != timesteps.shape:
            raise ValueError("timesteps and losses must both have shape [B], got "
                             f"{list(timesteps.shape)} and {list(losses.shape)}")
        self.to(timesteps.device)
        t, order = timesteps.sort(stable=True)
        values = losses.detach().to(self.losses.dtype)[order]
        position = torch.arange(len(t), device=t.device)
        rank = position - torch.searchsorted(t, t)  # among the entries of the same timestep
        slots = self.losses.shape[1]
        # Where a timestep occurs more than `slots` times, several entries meet in one slot; each writes the last one's
        # value, so that the result does not depend on the order of the writes.
        later = (torch.searchsorted(t, t, right=True) - 1 - position) // slots * slots
        self.losses[t, (self.seen[t] + rank) % slots] = values[position + later]
        self.seen.index_add_(0, t, torch.ones_like(t))

    def state_dict(self) -> dict[str, Tensor]:
        return {"losses": self.losses, "seen": self.seen}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the state.

        Raises:
            ValueError: the state is of another T or history.
        """
        if state["losses"].shape != self.losses.shape:
            raise ValueError(f"the sampler state must have shape {list(self.losses.shape)} (timesteps, history), "
                             f"got {list(state['losses'].shape)}")
        self.losses, self.seen = state["losses"].to(self.losses).clone(), state["seen"].to(self.seen).clone()


TOKEN_SAMPLERS: dict[str, type[TokenSampler]] = {"xy_uniform": XYUniformSampler, "rolling": RollingSampler}
TIMESTEP_SAMPLERS: dict[str, type[UniformSampler] | type[LossAwareSampler]] = {
    "uniform": UniformSampler,
    "lossaware": LossAwareSampler,
    **TOKEN_SAMPLERS,
}


def make_timestep_sampler(name: str, T: int = 2000, anchor_scale: float = 2.0) -> TimestepSampler:
    """The timestep sampler ``name``, a key of :data:`TIMESTEP_SAMPLERS`;
    those of :data:`TOKEN_SAMPLERS` read ``anchor_scale``.

    Raises:
        ValueError: unknown name, or ``anchor_scale <= 0``.
    """
    if name not in TIMESTEP_SAMPLERS:
        raise ValueError(f"unknown timestep sampler {name!r}; choose one of {', '.join(TIMESTEP_SAMPLERS)}")
    check_anchor_scale(anchor_scale)
    return TOKEN_SAMPLERS[name](T, anchor_scale) if name in TOKEN_SAMPLERS else TIMESTEP_SAMPLERS[name](T)
