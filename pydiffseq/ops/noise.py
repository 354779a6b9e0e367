"""Noise injection and the sampler's update; the noise depends on coordinates (seed, sentence, step, element) only."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from pydiffseq.ops import _cuda, reference
from pydiffseq.ops._extension import (
    C,
    autocast_to_widest,
    check_float,
    check_same_device,
    check_shape,
    draw_seed,
    library,
    output_pointer,
    pointer,
    register_autograd,
    use_kernel,
)

library.define(
    "q_sample(Tensor x0, Tensor t, Tensor signal, Tensor sigma, Tensor? mask, Tensor seed, int step, Tensor? rows, "
    "bool return_noise, Tensor? absorbing=None, Tensor? gone=None, Tensor? lengths=None, float anchor_scale=2.0)"
    " -> (Tensor x_t, Tensor eps)")
library.define(
    "q_sample_backward(Tensor grad, Tensor t, Tensor signal, Tensor? mask, Tensor? lengths=None, float anchor_scale=2.0)"
    " -> Tensor")
library.define(
    "embed_q_sample(Tensor table, Tensor ids, Tensor t, Tensor signal, Tensor sigma, float sigma0, Tensor? mask, "
    "Tensor seed, int step, Tensor? rows, bool return_noise, Tensor? absorbing=None, Tensor? gone=None, "
    "Tensor? lengths=None, float anchor_scale=2.0) -> (Tensor x0, Tensor x_t, Tensor eps)")
library.define(
    "embed_q_sample_backward(Tensor? grad_x0, Tensor? grad_x_t, Tensor ids, Tensor t, Tensor signal, Tensor? mask, "
    "SymInt vocab, Tensor like, Tensor? lengths=None, float anchor_scale=2.0) -> Tensor")
library.define(
    "sampler_step(Tensor x, Tensor x0_hat, Tensor a, Tensor b, Tensor c, Tensor seed, int step, Tensor? rows, "
    "float? limit=None, Tensor? ids=None) -> Tensor")
library.define(
    "philox_normal(Tensor seed, SymInt B, SymInt N, SymInt d, int step, Tensor? rows, int stream, ScalarType dtype, "
    "Device device) -> Tensor")


def q_sample(x0: Tensor, t: Tensor, signal: Tensor, sigma: Tensor, *, mask: Tensor | None = None,
             seed: int | Tensor | None = None, step: int = 0, rows: Tensor | None = None, return_noise: bool = False,
             absorbing: Tensor | None = None, gone: Tensor | None = None, lengths: Tensor | None = None,
             anchor_scale: float = 2.0) -> Tensor | tuple[Tensor, Tensor]:
    """``x_t = signal[t] * x0 + sigma[t] * eps`` in one pass; eps, from Philox, is in memory only if asked for.

    The forward process of DDPM (Ho et al. 2020, equation 4): ``signal = sqrt(abar)``, ``sigma = sqrt(1 - abar)``;
    AR-Diffusion (Wu et al. 2023, section 3.1) has one timestep per token. The bits of eps depend on (seed, step, row,
    token position, element) alone: not on the batch, the padding, the threads or the processor.

    Args:
        x0: float [B, N, d].
        t: int64 [B] (one timestep per sentence) or [B, N] (per token), in 0..T-1; with ``lengths`` the sentence index
            [B] of :func:`pydiffseq.diffusion.xy_token_timesteps`, in 0..T+length-1.
        signal, sigma: float32 [T].
        mask: bool [B, N]; True: noise the token, False: ``x_t = x0`` and ``eps = 0`` there. None: noise all.
        seed: the 64-bit key, an int or an int64 tensor of one element; None: drawn from torch's generator. On CUDA a
            seed in host memory is read at the call, one in device memory by the kernel (as a CUDA graph needs it).
        step: 0..2^24-1; calls with different steps draw independent noise.
        rows: int64 [B], ``candidate << 32 | sentence id``; None: 0..B-1.
        return_noise: return eps, too.
        absorbing: float [d] of x0's dtype, what noise drifts to (DiffuSeq-v2's soft absorbing state, Gong et al. 2023):
            ``(1 - signal[t]) * absorbing`` is added to x_t. None: 0.
        gone: bool [B, N]; True: x_t is ``absorbing`` alone, where the mask noises the token. Only with ``absorbing``.
        lengths: int64 [B]; the token timesteps are then those of ``xy_token_timesteps(t, lengths, N, T, anchor_scale)``,
            made where they are needed and not in memory.
        anchor_scale: position of the anchor in units of the length; only with ``lengths``.

    Returns:
        x_t [B, N, d] in x0's dtype, or ``(x_t, eps)``. Differentiable in x0 and absorbing.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: shapes do not fit, tensors are on different devices, or step or (on the CPU) a timestep is out of
            range. The CUDA kernels give NaN for a token whose timestep is out of range.
    """
    check_float("x0", x0)
    if x0.dim() != 3:
        raise ValueError(f"x0 must have shape [B, N, d], got {list(x0.shape)}")
    _check_schedule(x0.shape[0], x0.shape[1], t, signal, sigma, mask, lengths, anchor_scale)
    _check_key(x0.shape[0], step, rows)
    _check_absorbing(absorbing, gone, x0, tuple(x0.shape[:2]))
    check_same_device(x0=x0, t=t, signal=signal, sigma=sigma, mask=mask, rows=rows, absorbing=absorbing, gone=gone,
                      lengths=lengths)
    x_t, eps = _q_sample_op(x0, t, signal, sigma, mask, draw_seed(seed), step, rows, return_noise, absorbing, gone,
                            lengths, anchor_scale)
    return (x_t, eps) if return_noise else x_t


def embed_q_sample(table: Tensor, ids: Tensor, t: Tensor, signal: Tensor, sigma: Tensor, *, sigma0: float,
                   mask: Tensor | None = None, seed: int | Tensor | None = None, step: int = 0,
                   rows: Tensor | None = None, return_noise: bool = False, absorbing: Tensor | None = None,
                   gone: Tensor | None = None, lengths: Tensor | None = None,
                   anchor_scale: float = 2.0) -> tuple[Tensor, ...]:
    """``x0 = table[ids] + sigma0 * eps'``, and :func:`q_sample` of that x0, in one pass.

    The embedding step ``q(x_0 | w)`` of Diffusion-LM (Li et al. 2022, section 4.2) and the forward process after it.
    eps' and eps come from different Philox streams of the same seed.

    Args:
        table: float [V, d], the embeddings.
        ids: int64 [B, N] in 0..V-1.
        t, signal, sigma, seed, step, rows, return_noise, absorbing, gone, lengths, anchor_scale: as in :func:`q_sample`.
        sigma0: standard deviation of the noise of x0, the same for all tokens; 0 draws none.
        mask: bool [B, N], as in :func:`q_sample`; it does not stop the noise of x0.

    Returns:
        ``(x0, x_t)``, both [B, N, d] in the table's dtype, or ``(x0, x_t, eps)``. Differentiable in the table through
        x0 and x_t, and in absorbing; the table's gradient is summed in float32 in a fixed order, so it is the same bits
        every time.

    Raises:
        TypeError, ValueError: as :func:`q_sample`, and ValueError for an id outside the table (on the CPU; the CUDA
            kernels give NaN there).
    """
    check_float("table", table)
    if table.dim() != 2:
        raise ValueError(f"table must have shape [V, d], got {list(table.shape)}")
    if ids.dtype != torch.int64:
        raise TypeError(f"ids must be int64, got {ids.dtype}")
    if ids.dim() != 2:
        raise ValueError(f"ids must have shape [B, N], got {list(ids.shape)}")
    _check_schedule(ids.shape[0], ids.shape[1], t, signal, sigma, mask, lengths, anchor_scale)
    _check_key(ids.shape[0], step, rows)
    _check_absorbing(absorbing, gone, table, tuple(ids.shape))
    check_same_device(table=table, ids=ids, t=t, signal=signal, sigma=sigma, mask=mask, rows=rows, absorbing=absorbing,
                      gone=gone, lengths=lengths)
    x0, x_t, eps = _embed_op(table, ids, t, signal, sigma, sigma0, mask, draw_seed(seed), step, rows, return_noise,
                             absorbing, gone, lengths, anchor_scale)
    return (x0, x_t, eps) if return_noise else (x0, x_t)


def sampler_step(x: Tensor, x0_hat: Tensor, a: Tensor | float, b: Tensor | float, c: Tensor | float, *,
                 seed: int | Tensor | None = None, step: int = 0, rows: Tensor | None = None,
                 limit: float | None = None, ids: Tensor | None = None) -> Tensor:
    """``a * x + b * x0_hat + c * eps`` in one pass: the update of every Gaussian sampler.

    Args:
        x, x0_hat: float [B, N, d], of one dtype: the state and the prediction of x0. With ``ids``, x0_hat is a table
            [V, d] and the prediction its rows ``x0_hat[ids]`` (rounding), which are not in memory.
        a, b, c: the coefficients: a number, [B] (per sentence), or two-dimensional and broadcastable to [B, N] (write
            [1, N] for per-token coefficients that all sentences share). Used in float32. Tokens with c = 0 draw no
            noise.
        seed, step, rows: as in :func:`q_sample`; use the index of the denoising step as ``step``.
        limit: x0_hat is clamped to ``-limit..limit`` first; None: not at all.
        ids: int64 [B, N] in 0..V-1.

    Returns:
        [B, N, d] in x's dtype. Differentiable in x and x0_hat, not in the coefficients.

    Raises:
        TypeError: a dtype is not one of the above.
        ValueError: shapes do not fit, tensors are on different devices, step is out of range, or an id is outside the
            table (on the CPU; the CUDA kernel gives NaN there).
    """
    x, x0_hat = autocast_to_widest(x, x0_hat)
    check_float("x", x)
    if x.dim() != 3:
        raise ValueError(f"x must have shape [B, N, d], got {list(x.shape)}")
    if x0_hat.dtype != x.dtype:
        raise TypeError(f"x0_hat must have the dtype of x, {x.dtype}, got {x0_hat.dtype}")
    if ids is None:
        check_shape("x0_hat", x0_hat, tuple(x.shape))
    else:
        _check_rounded(x0_hat, ids, x)
    _check_key(x.shape[0], step, rows)
    if limit is not None and not limit >= 0:
        raise ValueError(f"limit must be at least 0, got {limit}")
    a, b, c = (_coefficient(name, value, x) for name, value in (("a", a), ("b", b), ("c", c)))
    check_same_device(x=x, x0_hat=x0_hat, a=a, b=b, c=c, rows=rows, ids=ids)
    return _step_op(x, x0_hat, a, b, c, draw_seed(seed), step, rows, limit, ids)


def philox_normal(shape: tuple[int, int, int], *, seed: int | Tensor | None = None, step: int = 0,
                  rows: Tensor | None = None, stream: str = "initial", dtype: torch.dtype = torch.float32,
                  device: torch.device | str = "cpu") -> Tensor:
    """Standard normals [B, N, d] at the given coordinates, e.g. the x_T that a sampler starts from.

    Philox 4x32-10 (Salmon et al. 2011) and Box-Muller. A sentence's values do not depend on B or N: a shorter N
    gives the first positions of a longer one.

    Args:
        shape: (B, N, d).
        seed, step, rows: as in :func:`q_sample`.
        stream: "initial", "x_t" (what :func:`q_sample` and :func:`sampler_step` draw) or "x_0" (the noise of x0).
        dtype, device: of the result.

    Returns:
        [B, N, d] of the given dtype.

    Raises:
        TypeError: dtype is not a floating-point type, or rows is not int64.
        ValueError: the shape does not have three sizes, the stream is unknown, or step is out of range.
    """
    if len(shape) != 3:
        raise ValueError(f"shape must be (B, N, d), got {tuple(shape)}")
    if stream not in ("initial", "x_t", "x_0"):
        raise ValueError(f"stream must be one of initial, x_t, x_0, got {stream!r}")
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point type, got {dtype}")
    _check_key(shape[0], step, rows)
    return _normal_op(draw_seed(seed), *shape, step, rows, reference.STREAMS[stream], dtype, torch.device(device))


_q_sample_op = torch.ops.pydiffseq.q_sample.default
_embed_op = torch.ops.pydiffseq.embed_q_sample.default
_step_op = torch.ops.pydiffseq.sampler_step.default
_normal_op = torch.ops.pydiffseq.philox_normal.default


# --- Checks ---


def _check_schedule(B: int, N: int, t: Tensor, signal: Tensor, sigma: Tensor, mask: Tensor | None,
                    lengths: Tensor | None, anchor_scale: float) -> None:
    if t.dtype != torch.int64:
        raise TypeError(f"t must be int64, got {t.dtype}")
    if lengths is None:
        check_shape("t", t, (B,), (B, N))
    else:
        if lengths.dtype != torch.int64:
            raise TypeError(f"lengths must be int64, got {lengths.dtype}")
        check_shape("lengths", lengths, (B,))
        check_shape("t", t, (B,))
        if not 0 < anchor_scale < math.inf:
            raise ValueError(f"the anchor scale must be a positive number, got {anchor_scale}")
    for name, schedule in (("signal", signal), ("sigma", sigma)):
        if schedule.dtype != torch.float32:
            raise TypeError(f"{name} must be float32, got {schedule.dtype}")
        if schedule.dim() != 1:
            raise ValueError(f"{name} must have shape [T], got {list(schedule.shape)}")
    check_shape("sigma", sigma, tuple(signal.shape))
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool, got {mask.dtype}")
        check_shape("mask", mask, (B, N))


def _check_key(B: int, step: int, rows: Tensor | None) -> None:
    if not 0 <= step < 1 << 24:
        raise ValueError(f"step must be in 0..{(1 << 24) - 1}, got {step}")
    if rows is not None:
        if rows.dtype != torch.int64:
            raise TypeError(f"rows must be int64, got {rows.dtype}")
        check_shape("rows", rows, (B,))


def _check_absorbing(absorbing: Tensor | None, gone: Tensor | None, like: Tensor, tokens: tuple[int, ...]) -> None:
    if absorbing is not None:
        if absorbing.dtype != like.dtype:
            raise TypeError(f"absorbing must have the dtype of what is noised, {like.dtype}, got {absorbing.dtype}")
        check_shape("absorbing", absorbing, (like.shape[-1],))
    if gone is not None:
        if absorbing is None:
            raise ValueError("gone is only for a noise with an absorbing vector, got one without")
        if gone.dtype != torch.bool:
            raise TypeError(f"gone must be bool, got {gone.dtype}")
        check_shape("gone", gone, tokens)


def _check_rounded(table: Tensor, ids: Tensor, x: Tensor) -> None:
    if table.dim() != 2 or table.shape[1] != x.shape[2]:
        raise ValueError(f"x0_hat must have shape [V, {x.shape[2]}], as ids are given, got {list(table.shape)}")
    if ids.dtype != torch.int64:
        raise TypeError(f"ids must be int64, got {ids.dtype}")
    check_shape("ids", ids, tuple(x.shape[:2]))


def _coefficient(name: str, value: Tensor | float, x: Tensor) -> Tensor:
    """``value`` as float32 [B, N]."""
    B, N = x.shape[:2]
    if not isinstance(value, Tensor):
        return torch.full((B, N), value, dtype=torch.float32, device=x.device)
    check_float(name, value)
    if value.dim() == 1:
        check_shape(name, value, (B,))
        value = value[:, None]
    if value.dim() > 2 or any(size not in (1, full) for size, full in zip(value.shape, (B, N), strict=False)):
        raise ValueError(f"{name} must be a number or have shape [{B}], [{B}, {N}], [{B}, 1] or [1, {N}], "
                         f"got {list(value.shape)}")
    return value.to(torch.float32).expand(B, N).contiguous()


def _raise_out_of_range(bad: tuple[int, int], t: Tensor, T: int, N: int, ids: Tensor | None, vocab: int,
                        lengths: Tensor | None) -> None:
    bad_t, bad_id = bad
    if bad_t >= 0:
        value = t.flatten()[bad_t if t.dim() == 2 else bad_t // N]
        most = T - 1 + (0 if lengths is None else int(lengths[bad_t // N]))
        raise ValueError(f"t must be in 0..{most}, got {int(value)}")
    if bad_id >= 0 and ids is not None:
        raise ValueError(f"ids must be in 0..{vocab - 1}, got {int(ids.flatten()[bad_id])}")


# --- CPU kernels ---


def _contiguous(*tensors: Tensor | None) -> list:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _times(t: Tensor, lengths: Tensor | None, anchor_scale: float) -> tuple[int, int, float, bool]:
    """Contiguous timesteps as the bindings take them."""
    return pointer(t), pointer(lengths), anchor_scale, t.dim() == 2


def _q_sample_cpu(x0: Tensor, t: Tensor, signal: Tensor, sigma: Tensor, mask: Tensor | None, seed: Tensor, step: int,
                  rows: Tensor | None, return_noise: bool, absorbing: Tensor | None = None, gone: Tensor | None = None,
                  lengths: Tensor | None = None, anchor_scale: float = 2.0) -> tuple[Tensor, Tensor]:
    if not use_kernel(x0):
        return reference.q_sample(x0, t, signal, sigma, mask, seed, step, rows, return_noise, absorbing, gone, lengths,
                                  anchor_scale)
    x0, t, signal, sigma, mask, rows = _contiguous(x0, t, signal, sigma, mask, rows)
    absorbing, gone, lengths = _contiguous(absorbing, gone, lengths)
    x_t, eps = _q_sample_fake(x0, t, signal, sigma, mask, seed, step, rows, return_noise)
    B, N, d = x0.shape
    T = signal.shape[0]
    bad = C.q_sample(
        pointer(x0), 0, _times(t, lengths, anchor_scale), pointer(signal), pointer(sigma), pointer(mask),
        pointer(absorbing), pointer(gone), 0, output_pointer(x_t), output_pointer(eps) if return_noise else 0,
        pointer(seed), pointer(rows), step, B, N, d, T, 0, 0.0, x0.dtype == torch.bfloat16)
    if bad != (-1, -1):
        _raise_out_of_range(bad, t, T, N, None, 0, lengths)
    return x_t, eps


def _q_sample_backward_cpu(grad: Tensor, t: Tensor, signal: Tensor, mask: Tensor | None, lengths: Tensor | None = None,
                           anchor_scale: float = 2.0) -> Tensor:
    if not use_kernel(grad):
        return reference.q_sample_backward(grad, t, signal, mask, lengths, anchor_scale)
    grad, t, signal, mask, lengths = _contiguous(grad, t, signal, mask, lengths)
    out = grad.new_empty(grad.shape)
    C.q_sample_backward(pointer(grad), _times(t, lengths, anchor_scale), pointer(signal), pointer(mask),
                        output_pointer(out), *grad.shape, signal.shape[0], grad.dtype == torch.bfloat16)
    return out


def _embed_cpu(table: Tensor, ids: Tensor, t: Tensor, signal: Tensor, sigma: Tensor, sigma0: float, mask: Tensor | None,
               seed: Tensor, step: int, rows: Tensor | None, return_noise: bool, absorbing: Tensor | None = None,
               gone: Tensor | None = None, lengths: Tensor | None = None,
               anchor_scale: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    if not use_kernel(table):
        return reference.embed_q_sample(table, ids, t, signal, sigma, sigma0, mask, seed, step, rows, return_noise,
                                        absorbing, gone, lengths, anchor_scale)
    table, ids, t, signal, sigma, mask, rows = _contiguous(table, ids, t, signal, sigma, mask, rows)
    absorbing, gone, lengths = _contiguous(absorbing, gone, lengths)
    x0, x_t, eps = _embed_fake(table, ids, t, signal, sigma, sigma0, mask, seed, step, rows, return_noise)
    T, vocab = signal.shape[0], table.shape[0]
    bad = C.q_sample(
        pointer(table), pointer(ids), _times(t, lengths, anchor_scale), pointer(signal), pointer(sigma), pointer(mask),
        pointer(absorbing), pointer(gone), output_pointer(x0), output_pointer(x_t),
        output_pointer(eps) if return_noise else 0, pointer(seed), pointer(rows), step, *x0.shape, T, vocab, sigma0,
        table.dtype == torch.bfloat16)
    if bad != (-1, -1):
        _raise_out_of_range(bad, t, T, ids.shape[1], ids, vocab, lengths)
    return x0, x_t, eps


def _embed_backward_cpu(grad_x0: Tensor | None, grad_x_t: Tensor | None, ids: Tensor, t: Tensor, signal: Tensor,
                        mask: Tensor | None, vocab: int, like: Tensor, lengths: Tensor | None = None,
                        anchor_scale: float = 2.0) -> Tensor:
    if not use_kernel(like):
        return reference.embed_q_sample_backward(grad_x0, grad_x_t, ids, t, signal, mask, vocab, like, lengths,
                                                 anchor_scale)
    grad_x0, grad_x_t, ids, t, signal, mask, lengths = _contiguous(grad_x0, grad_x_t, ids, t, signal, mask, lengths)
    d = like.shape[-1]
    table = torch.zeros(vocab, d)
    C.embed_backward(pointer(grad_x0), pointer(grad_x_t), pointer(ids), _times(t, lengths, anchor_scale), pointer(signal),
                     pointer(mask), pointer(table), *ids.shape, d, signal.shape[0], vocab, like.dtype == torch.bfloat16)
    return table.to(like.dtype)


def _sampler_step_cpu(x: Tensor, x0_hat: Tensor, a: Tensor, b: Tensor, c: Tensor, seed: Tensor, step: int,
                      rows: Tensor | None, limit: float | None = None, ids: Tensor | None = None) -> Tensor:
    if not use_kernel(x):
        return reference.sampler_step(x, x0_hat, a, b, c, seed, step, rows, limit, ids)
    x, x0_hat, a, b, c, rows, ids = _contiguous(x, x0_hat, a, b, c, rows, ids)
    out = x.new_empty(x.shape)
    bad = C.sampler_step(
        pointer(x), pointer(x0_hat), pointer(ids), pointer(a), pointer(b), pointer(c), output_pointer(out), pointer(seed),
        pointer(rows), step, *x.shape, x0_hat.shape[0], math.inf if limit is None else limit, x.dtype == torch.bfloat16)
    if bad >= 0 and ids is not None:
        raise ValueError(f"ids must be in 0..{x0_hat.shape[0] - 1}, got {int(ids.flatten()[bad])}")
    return out


def _philox_normal_cpu(seed: Tensor, B: int, N: int, d: int, step: int, rows: Tensor | None, stream: int,
                       dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type == "cuda":  # a seed on the CPU leads here
        return _philox_normal_cuda(seed, B, N, d, step, rows, stream, dtype, device)
    out = torch.empty(B, N, d, dtype=dtype, device=device)
    if device.type != "cpu" or not use_kernel(out):
        return reference.philox_normal(seed, B, N, d, step, rows, stream, dtype, device)
    (rows,) = _contiguous(rows)
    C.philox_normal(output_pointer(out), pointer(seed), pointer(rows), step, stream, B, N, d, dtype == torch.bfloat16)
    return out


# --- CUDA kernels (csrc/cuda/noise.cu) ---


def _use_cuda(like: Tensor) -> bool:
    """Whether ``like`` is for the CUDA kernels, and they have passed their self-check on its device."""
    return (like.is_cuda and like.dtype in _cuda.DTYPES and _cuda.compiled()
            and _cuda.trusted("noise", like.device, _cuda_cases))


def _q_sample_kernel(x0: Tensor, t: Tensor, signal: Tensor, sigma: Tensor, mask: Tensor | None, seed: Tensor, step: int,
                     rows: Tensor | None, return_noise: bool, absorbing: Tensor | None = None, gone: Tensor | None = None,
                     lengths: Tensor | None = None, anchor_scale: float = 2.0) -> tuple[Tensor, Tensor]:
    x0, t, signal, sigma, mask, rows = _contiguous(x0, t, signal, sigma, mask, rows)
    absorbing, gone, lengths = _contiguous(absorbing, gone, lengths)
    seed, on_device = _cuda.key_arguments(seed, x0.device)
    x_t, eps = _q_sample_fake(x0, t, signal, sigma, mask, seed, step, rows, return_noise)
    _cuda.launch(
        C.noise_q_sample_cuda, x0.device, pointer(x0), 0, _times(t, lengths, anchor_scale), pointer(signal),
        pointer(sigma), pointer(mask), pointer(absorbing), pointer(gone), 0, pointer(x_t),
        pointer(eps) if return_noise else 0, pointer(seed), pointer(rows), step, *x0.shape, signal.shape[0], 0, 0.0,
        _cuda.DTYPES[x0.dtype], on_device)
    return x_t, eps


def _embed_kernel(table: Tensor, ids: Tensor, t: Tensor, signal: Tensor, sigma: Tensor, sigma0: float,
                  mask: Tensor | None, seed: Tensor, step: int, rows: Tensor | None, return_noise: bool,
                  absorbing: Tensor | None = None, gone: Tensor | None = None, lengths: Tensor | None = None,
                  anchor_scale: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    table, ids, t, signal, sigma, mask, rows = _contiguous(table, ids, t, signal, sigma, mask, rows)
    absorbing, gone, lengths = _contiguous(absorbing, gone, lengths)
    seed, on_device = _cuda.key_arguments(seed, table.device)
    x0, x_t, eps = _embed_fake(table, ids, t, signal, sigma, sigma0, mask, seed, step, rows, return_noise)
    _cuda.launch(
        C.noise_q_sample_cuda, table.device, pointer(table), pointer(ids), _times(t, lengths, anchor_scale),
        pointer(signal), pointer(sigma), pointer(mask), pointer(absorbing), pointer(gone), pointer(x0), pointer(x_t),
        pointer(eps) if return_noise else 0, pointer(seed), pointer(rows), step, *x0.shape, signal.shape[0],
        table.shape[0], sigma0, _cuda.DTYPES[table.dtype], on_device)
    return x0, x_t, eps


def _q_sample_backward_kernel(grad: Tensor, t: Tensor, signal: Tensor, mask: Tensor | None,
                              lengths: Tensor | None = None, anchor_scale: float = 2.0) -> Tensor:
    grad, t, signal, mask, lengths = _contiguous(grad, t, signal, mask, lengths)
    out = grad.new_empty(grad.shape)
    _cuda.launch(
        C.noise_q_sample_backward_cuda, grad.device, pointer(grad), _times(t, lengths, anchor_scale), pointer(signal),
        pointer(mask), pointer(out), *grad.shape, signal.shape[0], _cuda.DTYPES[grad.dtype])
    return out


_EMBED_CHUNK = 32  # kEmbedChunk in csrc/cuda/noise.h


def _embed_backward_kernel(grad_x0: Tensor | None, grad_x_t: Tensor | None, ids: Tensor, t: Tensor, signal: Tensor,
                           mask: Tensor | None, vocab: int, like: Tensor, lengths: Tensor | None = None,
                           anchor_scale: float = 2.0) -> Tensor:
    """A stable sort puts the tokens of an id side by side, in order; so no two threads meet, and the bits repeat."""
    grad_x0, grad_x_t = (None if grad is None else grad.to(like.dtype).contiguous() for grad in (grad_x0, grad_x_t))
    t, signal, mask, lengths = _contiguous(t, signal, mask, lengths)
    sorted_ids, tokens = ids.flatten().sort(stable=True)
    d = like.shape[-1]
    table = like.new_zeros(vocab, d)
    partial = like.new_empty(-(-ids.numel() // _EMBED_CHUNK), 2, d, dtype=torch.float32)
    _cuda.launch(
        C.noise_embed_backward_cuda, like.device, pointer(grad_x0), pointer(grad_x_t), _times(t, lengths, anchor_scale),
        pointer(signal), pointer(mask), pointer(sorted_ids), pointer(tokens), pointer(partial), pointer(table), *ids.shape,
        d, signal.shape[0], vocab, _cuda.DTYPES[like.dtype])
    return table


def _sampler_step_kernel(x: Tensor, x0_hat: Tensor, a: Tensor, b: Tensor, c: Tensor, seed: Tensor, step: int,
                         rows: Tensor | None, limit: float | None = None, ids: Tensor | None = None) -> Tensor:
    x, x0_hat, a, b, c, rows, ids = _contiguous(x, x0_hat, a, b, c, rows, ids)
    seed, on_device = _cuda.key_arguments(seed, x.device)
    out = x.new_empty(x.shape)
    _cuda.launch(
        C.noise_sampler_step_cuda, x.device, pointer(x), pointer(x0_hat), pointer(ids), pointer(a), pointer(b), pointer(c),
        pointer(out), pointer(seed), pointer(rows), step, *x.shape, x0_hat.shape[0], math.inf if limit is None else limit,
        _cuda.DTYPES[x.dtype], on_device)
    return out


def _philox_normal_kernel(out: Tensor, seed: Tensor, step: int, rows: Tensor | None, stream: int) -> Tensor:
    """Fill ``out`` [B, N, d]."""
    seed, on_device = _cuda.key_arguments(seed, out.device)
    (rows,) = _contiguous(None if rows is None else rows.to(out.device))
    _cuda.launch(C.noise_philox_normal_cuda, out.device, pointer(out), pointer(seed), pointer(rows), step, stream,
                 *out.shape, _cuda.DTYPES[out.dtype], on_device)
    return out


def _cuda_cases(device: torch.device):
    """The self-check: every kernel and dtype, with rows that allow 16-byte accesses and rows that do not.

    The normals of 16-bit types may differ from the reference's in the last place.
    """
    schedule = torch.linspace(1.0, 0.1, 7, device=device)
    t = torch.arange(15, device=device).reshape(3, 5) % 7
    ids, mask = (t * 3) % 4, t != 2
    rows = torch.tensor([4, 3 << 32 | 9, 2], device=device)
    host_seed = torch.tensor([-(2**62) + 5])
    key = (host_seed, 6, rows)
    index, lengths = torch.tensor([0, 3, 9], device=device), torch.tensor([5, 2, 4], device=device)
    for dtype, d in ((dtype, d) for dtype in _cuda.DTYPES for d in (7, 72)):
        tolerance = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
        x = reference.philox_normal(host_seed, 3, 5, d, 0, rows, 3, dtype, device)
        sample = (t, schedule, schedule.flip(0), mask)
        embed = (x[0, :4].contiguous(), ids, *sample[:3], 0.1, mask)
        coefficients = (schedule[t], schedule[ids], schedule[t] * mask)
        seeds = host_seed, host_seed.to(device)
        for name, kernel, oracle, arguments in (
                ("q_sample", _q_sample_kernel, reference.q_sample, (x, *sample, *key, True)),
                ("embed_q_sample", _embed_kernel, reference.embed_q_sample, (*embed, seeds[1], *key[1:], True)),
                ("q_sample", _q_sample_kernel, reference.q_sample, (x, *sample, *key, True, x[0, 0].clone(), ids == 1)),
                ("q_sample", _q_sample_kernel, reference.q_sample,
                 (x, index, *sample[1:], *key, True, None, None, lengths, 1.5)),
                ("sampler_step", _sampler_step_kernel, reference.sampler_step, (x, x.flip(0), *coefficients, *key, 0.5)),
                ("sampler_step", _sampler_step_kernel, reference.sampler_step,
                 (x, x[0, :4].contiguous(), *coefficients, *key, None, ids)),
                ("sampler_step", _sampler_step_kernel, reference.sampler_step, (x, x.flip(0), *coefficients, *key))):
            yield name, functools.partial(kernel, *arguments), functools.partial(oracle, *arguments), tolerance
        sample_gradient = (x, *sample[:2], mask)
        yield ("q_sample_backward", functools.partial(_q_sample_backward_kernel, *sample_gradient),
               functools.partial(reference.q_sample_backward, *sample_gradient))
        gradients = (x, x.flip(0), ids, *sample[:2], mask, 4, x)
        yield ("embed_q_sample_backward", functools.partial(_embed_backward_kernel, *gradients),
               functools.partial(reference.embed_q_sample_backward, *gradients), 2 * torch.finfo(dtype).eps)
        yield ("philox_normal", functools.partial(_philox_normal_kernel, torch.empty_like(x), host_seed, 0, rows, 3),
               functools.partial(torch.clone, x), tolerance)


def _q_sample_cuda(x0: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    return (_q_sample_kernel if _use_cuda(x0) else reference.q_sample)(x0, *arguments)


def _q_sample_backward_cuda(grad: Tensor, *arguments) -> Tensor:
    return (_q_sample_backward_kernel if _use_cuda(grad) else reference.q_sample_backward)(grad, *arguments)


def _embed_cuda(table: Tensor, *arguments) -> tuple[Tensor, Tensor, Tensor]:
    return (_embed_kernel if _use_cuda(table) else reference.embed_q_sample)(table, *arguments)


def _embed_backward_cuda(grad_x0: Tensor | None, grad_x_t: Tensor | None, ids: Tensor, t: Tensor, signal: Tensor,
                         mask: Tensor | None, vocab: int, like: Tensor, lengths: Tensor | None = None,
                         anchor_scale: float = 2.0) -> Tensor:
    """Without the kernel it is torch's embedding gradient, which sorts, too, where index_add adds in any order."""
    if _use_cuda(like):
        return _embed_backward_kernel(grad_x0, grad_x_t, ids, t, signal, mask, vocab, like, lengths, anchor_scale)
    wide = torch.promote_types(like.dtype, torch.float32)
    total = None if grad_x0 is None else grad_x0.to(wide)
    if grad_x_t is not None:
        scaled = _q_sample_backward_cuda(grad_x_t.to(wide), t, signal, mask, lengths, anchor_scale)
        total = scaled if total is None else total + scaled
    if total is None:
        return like.new_zeros(vocab, like.shape[-1])
    return torch.ops.aten.embedding_dense_backward(total, ids, vocab, -1, False).to(like.dtype)


def _sampler_step_cuda(x: Tensor, *arguments) -> Tensor:
    return (_sampler_step_kernel if _use_cuda(x) else reference.sampler_step)(x, *arguments)


def _philox_normal_cuda(seed: Tensor, B: int, N: int, d: int, step: int, rows: Tensor | None, stream: int,
                        dtype: torch.dtype, device: torch.device) -> Tensor:
    out = torch.empty(B, N, d, dtype=dtype, device=device)
    if not _use_cuda(out):
        return reference.philox_normal(seed, B, N, d, step, rows, stream, dtype, device)
    return _philox_normal_kernel(out, seed, step, rows, stream)


for _name, _kernel, _cuda_kernel in (
        ("q_sample", _q_sample_cpu, _q_sample_cuda),
        ("q_sample_backward", _q_sample_backward_cpu, _q_sample_backward_cuda),
        ("embed_q_sample", _embed_cpu, _embed_cuda),
        ("embed_q_sample_backward", _embed_backward_cpu, _embed_backward_cuda),
        ("sampler_step", _sampler_step_cpu, _sampler_step_cuda),
        ("philox_normal", _philox_normal_cpu, _philox_normal_cuda)):
    library.impl(_name, _kernel, "CPU")
    library.impl(_name, _cuda_kernel, "CUDA")
    library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")


# --- Shapes ---


@torch.library.register_fake("pydiffseq::q_sample", lib=library)
def _q_sample_fake(x0, t, signal, sigma, mask, seed, step, rows, return_noise, absorbing=None, gone=None, lengths=None,
                   anchor_scale=2.0):
    return x0.new_empty(x0.shape), x0.new_empty(x0.shape if return_noise else 0)


@torch.library.register_fake("pydiffseq::q_sample_backward", lib=library)
def _q_sample_backward_fake(grad, t, signal, mask, lengths=None, anchor_scale=2.0):
    return grad.new_empty(grad.shape)


@torch.library.register_fake("pydiffseq::embed_q_sample", lib=library)
def _embed_fake(table, ids, t, signal, sigma, sigma0, mask, seed, step, rows, return_noise, absorbing=None, gone=None,
                lengths=None, anchor_scale=2.0):
    shape = (*ids.shape, table.shape[1])
    return table.new_empty(shape), table.new_empty(shape), table.new_empty(shape if return_noise else 0)


@torch.library.register_fake("pydiffseq::embed_q_sample_backward", lib=library)
def _embed_backward_fake(grad_x0, grad_x_t, ids, t, signal, mask, vocab, like, lengths=None, anchor_scale=2.0):
    return like.new_empty(vocab, like.shape[-1])


@torch.library.register_fake("pydiffseq::sampler_step", lib=library)
def _sampler_step_fake(x, x0_hat, a, b, c, seed, step, rows, limit=None, ids=None):
    return x.new_empty(x.shape)


@torch.library.register_fake("pydiffseq::philox_normal", lib=library)
def _philox_normal_fake(seed, B, N, d, step, rows, stream, dtype, device):
    return torch.empty(B, N, d, dtype=dtype, device=device)


# --- Gradients ---


def _absorbing_grads(grad: Tensor, times: tuple[Tensor, Tensor | None, float], signal: Tensor, mask: Tensor | None,
                     gone: Tensor | None, wanted: bool) -> tuple[Tensor, Tensor | None]:
    """The gradient of x_t less that of tokens that are gone, and the gradient of the absorbing vector."""
    if gone is not None and mask is not None:
        gone = gone & mask
    share = None
    if wanted:
        t = reference.token_times(*times, grad.shape[1], signal.shape[0])
        share = 1.0 - signal[t.clamp(0, signal.shape[0] - 1)]
        share = (share if t.dim() == 2 else share[:, None]).expand(grad.shape[:2])
        share = share if mask is None else share * mask
        share = share if gone is None else share.masked_fill(gone, 1.0)
        wide = torch.promote_types(grad.dtype, torch.float32)
        share = torch.einsum("bn,bnd->d", share.to(wide), grad.to(wide)).to(grad.dtype)
    return grad if gone is None else grad.masked_fill(gone[..., None], 0.0), share


def _q_sample_setup(ctx, inputs, output) -> None:
    _, t, signal, _, mask, *_, absorbing, gone, lengths, ctx.anchor_scale = inputs
    ctx.save_for_backward(t, signal, mask, gone, lengths)
    ctx.absorbs = absorbing is not None
    ctx.mark_non_differentiable(output[1])


def _q_sample_grad(ctx, grad_x_t: Tensor, _grad_eps: Tensor | None):
    t, signal, mask, gone, lengths = ctx.saved_tensors
    times = lengths, ctx.anchor_scale
    grad_x_t, grad_absorbing = _absorbing_grads(grad_x_t, (t, *times), signal, mask, gone, ctx.absorbs)
    grad = torch.ops.pydiffseq.q_sample_backward(grad_x_t, t, signal, mask, *times)
    return grad, *[None] * 8, grad_absorbing, None, None, None


def _scale_setup(ctx, inputs, output) -> None:
    *tensors, ctx.anchor_scale = inputs[1:]
    ctx.save_for_backward(*tensors)


def _scale_grad(ctx, grad: Tensor):
    return torch.ops.pydiffseq.q_sample_backward(grad, *ctx.saved_tensors, ctx.anchor_scale), *[None] * 5


def _embed_setup(ctx, inputs, output) -> None:
    table, ids, t, signal, _, _, mask, *_, absorbing, gone, lengths, ctx.anchor_scale = inputs
    ctx.vocab, ctx.absorbs = table.shape[0], absorbing is not None
    ctx.save_for_backward(ids, t, signal, mask, gone, lengths)
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _embed_grad(ctx, grad_x0: Tensor | None, grad_x_t: Tensor | None, _grad_eps: Tensor | None):
    ids, t, signal, mask, gone, lengths = ctx.saved_tensors
    times = lengths, ctx.anchor_scale
    like = grad_x0 if grad_x0 is not None else grad_x_t
    grad = grad_absorbing = None
    if grad_x_t is not None:
        grad_x_t, grad_absorbing = _absorbing_grads(grad_x_t, (t, *times), signal, mask, gone, ctx.absorbs)
    if like is not None:
        grad = torch.ops.pydiffseq.embed_q_sample_backward(
            grad_x0, grad_x_t, ids, t, signal, mask, ctx.vocab, like, *times)
    return grad, *[None] * 10, grad_absorbing, None, None, None


def _step_setup(ctx, inputs, output) -> None:
    _, x0_hat, a, b, *_, ctx.limit, ids = inputs
    ctx.vocab = x0_hat.shape[0]
    ctx.save_for_backward(a, b, None if ctx.limit is None else x0_hat, ids)


def _step_grad(ctx, grad: Tensor):
    a, b, x0_hat, ids = ctx.saved_tensors
    grads = [(grad * coefficient[..., None]).to(grad.dtype) if needed else None
             for coefficient, needed in zip((a, b), ctx.needs_input_grad[:2], strict=True)]
    if grads[1] is not None and ids is not None:
        grads[1] = torch.ops.aten.embedding_dense_backward(grads[1], ids, ctx.vocab, -1, False)
    if x0_hat is not None and grads[1] is not None:
        grads[1] = grads[1].masked_fill(x0_hat.abs() > ctx.limit, 0.0)
    return *grads, *[None] * 8


register_autograd("q_sample", _q_sample_grad, _q_sample_setup)
register_autograd("q_sample_backward", _scale_grad, _scale_setup)
register_autograd("embed_q_sample", _embed_grad, _embed_setup)
register_autograd("sampler_step", _step_grad, _step_setup)
