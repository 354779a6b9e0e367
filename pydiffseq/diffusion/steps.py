"""Step lists: the timesteps a sampler visits, as data.

A step list is a list of transitions ``(t, t_next)``; a solver calls the model once for each. An entry is an int (one
timestep for all) or an int64 tensor that broadcasts to ``[B, N]``. Index -1 is the clean end (``abar = 1``).

``end`` says where the last transition goes. ``"clean"``: to -1, where the state equals the last prediction. ``"zero"``:
to timestep 0, where a few per cent of the previous state are left, as AR-Diffusion publishes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pydiffseq.diffusion.token_times import check_anchor_scale, xy_token_timesteps

Time = int | Tensor
StepList = list[tuple[Time, Time]]

ENDS = ("zero", "clean")


def _check_end(end: str) -> None:
    if end not in ENDS:
        raise ValueError(f"unknown end {end!r} of a step list; choose one of {', '.join(ENDS)}")


def uniform_steps(T: int, steps: int, end: str = "clean") -> StepList:
    """Transitions of one timestep per sentence, evenly spaced from T-1 down: ``steps`` model calls.

    Timestep i is ``floor(T (steps - i) / steps) - 1``. Where ``steps`` divides T this is the list T-1, T-1-T/steps, ...
    of DiffuSeq's and AR-Diffusion's code.

    Raises:
        ValueError: ``steps < 1`` or ``steps > T``.
    """
    _check_end(end)
    if not 1 <= steps <= T:
        raise ValueError(f"the number of steps must be in 1..{T} (T) with one timestep per sentence, got {steps}")
    visited = [T * (steps - i) // steps - 1 for i in range(steps)]
    if end == "clean" or visited[-1] > 0:
        visited.append(-1 if end == "clean" else 0)
    return list(zip(visited[:-1], visited[1:], strict=True))


def ancestral_steps(T: int) -> StepList:
    """Every transition of the Markov chain, (T-1, T-2), ..., (0, -1) (Ho et al. 2020, algorithm 2)."""
    return uniform_steps(T, T)


def skip_indices(total: Tensor, steps: int) -> Tensor:
    """Sentence indices that AR-Diffusion visits: ``total-1, total-1-stride, ...`` with ``stride = total // steps``.

    Args:
        total: int64 ``[B]``, T + N of each sentence.
        steps: number of model calls.

    Returns:
        int64 ``[steps, B]``, decreasing; its last row is not 0 in general.
    """
    i = torch.arange(steps, device=total.device)[:, None]
    return total - 1 - i * (total // steps)


def xy_steps(T: int, lengths: Tensor | int, max_len: int, steps: int, anchor_scale: float = 2.0,
             end: str = "zero") -> StepList:
    """AR-Diffusion's token-level step list (Wu et al. 2023, algorithm 2, with the indices of the published code).

    Each sentence has its own stride ``(T + N) // steps``, so all take the same number of model calls. ``steps = T + N``
    visits every sentence index.

    Args:
        T: number of timesteps.
        lengths: int64 ``[B]`` target lengths N, or one int shared by all sentences.
        max_len: padded target length.
        steps: number of model calls.
        anchor_scale: see :func:`pydiffseq.diffusion.xy_token_timesteps`.
        end: ``"zero"`` (published) or ``"clean"``; see the module.

    Returns:
        ``steps`` transitions of int64 tensors ``[B, max_len]`` (``[1, max_len]`` for an int length), on the device of
        ``lengths``; one less where every sentence visits index 0 by itself and ``end`` is ``"zero"``.

    Raises:
        ValueError: ``steps < 1``, ``steps > T + N`` for some sentence, or ``anchor_scale <= 0``.
    """
    _check_end(end)
    check_anchor_scale(anchor_scale)
    lengths = torch.tensor([lengths]) if isinstance(lengths, int) else lengths
    shortest = T + int(lengths.min())
    if not 1 <= steps <= shortest:
        raise ValueError(f"the number of steps must be in 1..{shortest} (T + the shortest target length), got {steps}")
    indices = skip_indices(T + lengths, steps)
    visited = [xy_token_timesteps(s, lengths, max_len, T, anchor_scale) for s in indices]
    if end == "clean":
        visited.append(torch.full_like(visited[0], -1))
    elif bool((indices[-1] > 0).any()):
        visited.append(xy_token_timesteps(torch.zeros_like(lengths), lengths, max_len, T, anchor_scale))
    return list(zip(visited[:-1], visited[1:], strict=True))
