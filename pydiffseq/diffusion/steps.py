"""Step lists: the timesteps a sampler visits, as data.

A step list is a list of transitions ``(t, t_next)``; a solver calls the model once for each. An entry is an int (one
timestep for all) or an int64 tensor that broadcasts to ``[B, N]``. Index -1 is the clean end (``abar = 1``).

``end`` says where the last transition goes. ``"clean"``: to -1, where the state equals the last prediction. ``"zero"``:
to timestep 0, where a few per cent of the previous state are left, as AR-Diffusion publishes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from pydiffseq.diffusion.schedules import NoiseSchedule
from pydiffseq.diffusion.token_times import TOKEN_SAMPLERS, check_anchor_scale, xy_token_timesteps

Time = int | Tensor
StepList = list[tuple[Time, Time]]

ENDS = ("zero", "clean")
SPACINGS = ("uniform", "halfstart", "quadratic", "logsnr", "stride")


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
    return sentence_steps([T * (steps - i) // steps - 1 for i in range(steps)], end)


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


def spaced_timesteps(spacing: str, schedule: NoiseSchedule, steps: int) -> list[int]:
    """The timesteps that a list of ``steps`` model calls visits, from T-1 down, each once.

    ``uniform``: evenly spaced (see :func:`uniform_steps`). ``halfstart``: the same with a first interval of half the
    length, as the first call sees noise alone; from the second on it is ``floor(T (steps - i) / (steps - 1/2)) - 1``.
    ``stride``: every ``T // steps``-th, as AR-Diffusion's and DiffuSeq's code.
    ``quadratic``: ``(T-1) ((steps - i) / steps)^2``, dense where little noise is left (Song et al. 2021, appendix D).
    ``logsnr``: evenly spaced in ``log(abar / (1 - abar))`` (Lu et al. 2022, DPM-Solver).

    Raises:
        ValueError: unknown spacing, ``steps < 1`` or ``steps > T``.
    """
    T = schedule.T
    if spacing not in SPACINGS:
        raise ValueError(f"unknown spacing {spacing!r} of a step list; choose one of {', '.join(SPACINGS)}")
    if not 1 <= steps <= T:
        raise ValueError(f"the number of steps must be in 1..{T} (T), got {steps}")
    if spacing == "uniform":
        return [T * (steps - i) // steps - 1 for i in range(steps)]
    if spacing == "halfstart":
        return [T - 1] + [2 * T * (steps - i) // (2 * steps - 1) - 1 for i in range(1, steps)]
    if spacing == "stride":
        return [T - 1 - i * (T // steps) for i in range(steps)]
    if spacing == "quadratic":
        return _distinct([round((T - 1) * ((steps - i) / steps) ** 2) for i in range(steps)], T)
    level = (schedule.abar / (1 - schedule.abar)).log().flip(0).contiguous().cpu()   # ascending; entry T-1-t is t's
    wanted = level[0] + (level[-1] - level[0]) * torch.arange(steps, dtype=level.dtype) / steps
    return _distinct([T - 1 - int(i) for i in torch.searchsorted(level, wanted)], T)


def _distinct(falling: list[int], T: int) -> list[int]:
    """The nearest list that falls by at least one and stays in 0..T-1."""
    highest = T
    for i, t in enumerate(falling):
        highest = falling[i] = min(t, highest - 1)
    lowest = -1
    for i in reversed(range(len(falling))):
        lowest = falling[i] = max(falling[i], lowest + 1)
    return falling


def check_visited(name: str, visited: Sequence[int], T: int) -> list[int]:
    """``visited`` as a list, if it falls and lies in 0..T-1.

    Raises:
        ValueError: it is empty, does not fall or leaves the range; ``name`` says which list it is.
    """
    if not visited:
        raise ValueError(f"{name} must have at least one timestep, got none")
    for i, t in enumerate(visited):
        if not 0 <= t < T:
            raise ValueError(f"{name} must hold timesteps in 0..{T - 1}, got {t} at place {i + 1}")
        if i and t >= visited[i - 1]:
            raise ValueError(f"{name} must fall, got {t} after {visited[i - 1]} at place {i + 1}")
    return list(visited)


def read_visited(path: str | Path) -> list[int]:
    """Timesteps of a file: integers between white space or commas; ``#`` starts a comment.

    Raises:
        OSError: no such file. ValueError: something in it is not an integer.
    """
    visited: list[int] = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        for word in re.split(r"[\s,]+", line.partition("#")[0].strip()):
            if word and not re.fullmatch(r"[+-]?\d+", word):
                raise ValueError(f"step list {path}, line {number}: must be integers, got {word!r}")
            visited += [int(word)] if word else []
    return visited


def sentence_steps(visited: Sequence[int], end: str = "clean") -> StepList:
    """Transitions of one timestep per sentence along ``visited``, which falls; one model call for each entry."""
    _check_end(end)
    last = -1 if end == "clean" else 0
    nodes = [*visited, last] if visited[-1] > last else list(visited)
    return list(zip(nodes[:-1], nodes[1:], strict=True))


def token_steps(T: int, visited: Sequence[int], lengths: Tensor, max_len: int, anchor_scale: float = 2.0,
                end: str = "clean", path: str = "xy_uniform") -> StepList:
    """Token timesteps along ``visited``: entry v stands for the share ``v / (T - 1)`` of a sentence's indices.

    Args, results and errors as :func:`xy_steps`, whose stride over the indices becomes any list, on any ``path``, a key
    of :data:`pydiffseq.diffusion.TOKEN_SAMPLERS`.
    """
    _check_end(end)
    sampler = TOKEN_SAMPLERS[path](T, anchor_scale)
    last = sampler.indices(lengths) - 1
    nodes = [sampler.token_times((v * last + (T - 1) // 2) // max(1, T - 1), lengths, max_len) for v in visited]
    if end == "clean":
        nodes.append(torch.full_like(nodes[0], -1))
    elif visited[-1] > 0:
        nodes.append(sampler.token_times(torch.zeros_like(lengths), lengths, max_len))
    return list(zip(nodes[:-1], nodes[1:], strict=True))
