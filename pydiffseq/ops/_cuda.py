"""What the CUDA kernels share: dtype codes, the launch on torch's stream, and the self-check before their first use.

The kernels of a family (a file of ``csrc/cuda``) run on a device only after they have reproduced the plain-torch
reference there, once per process. Where they do not, or fail, one warning says so and the reference runs from then on.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from pydiffseq.ops._extension import C

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # FloatType in csrc/cuda/launch.h

Result = Tensor | tuple[Tensor, ...]
Exact = tuple[str, Callable[[], Result], Callable[[], Result]]  # of a self-check: the op's name, kernel and reference
Case = Exact | tuple[str, Callable[[], Result], Callable[[], Result], float]  # unless bits must agree: the relative error

_verdicts: dict[tuple[str, torch.device], bool] = {}


def compiled() -> bool:
    """Whether ``_C`` holds CUDA kernels."""
    return C is not None and C.has_cuda


def trusted(family: str, device: torch.device, cases: Callable[[torch.device], Iterable[Case]]) -> bool:
    """Whether the kernels of ``family`` reproduce the reference on ``device``; tried at the first call.

    The trial waits for the device, which a stream that records a CUDA graph may not do: until a call outside of one has
    made it, the reference runs.
    """
    verdict = _verdicts.get((family, device))
    if verdict is None:
        if capturing(device):
            return False
        verdict = _verdicts[family, device] = _self_check(family, device, cases)
    return verdict


def launch(kernel: Callable[..., None], device: torch.device, *arguments: int | float | bool | tuple) -> None:
    """Call a binding of a CUDA kernel with torch's current stream of ``device`` and the device's index at the end."""
    stream = torch.cuda.current_stream(device).cuda_stream
    if device.index == torch.cuda.current_device():
        kernel(*arguments, stream, device.index)
        return
    with torch.cuda.device(device):
        kernel(*arguments, stream, device.index)


def stream(device: torch.device) -> int:
    """Address of torch's current stream there."""
    return torch.cuda.current_stream(device).cuda_stream


def capturing(device: torch.device) -> bool:
    """Whether the current stream records a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@contextlib.contextmanager
def _any_algorithm() -> Iterator[None]:
    """Deterministic algorithms off: the reference may use an operation for which torch has none and would raise."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _self_check(family: str, device: torch.device, cases: Callable[[torch.device], Iterable[Case]]) -> bool:
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False), _any_algorithm():
            problem = next((f"{name} differs from its reference" for name, kernel, reference, *tolerance in cases(device)
                            if not _same(kernel(), reference(), *tolerance)), None)
    except Exception as error:  # whatever goes wrong in the trial, the reference is there to take over
        problem = f"{type(error).__name__}: {error}"
    if problem is not None:
        warnings.warn(f"the CUDA kernels of {family} failed their self-check on {device} ({problem}); "
                      "these ops run on plain torch there, which is slower", stacklevel=4)
    return problem is None


def key_arguments(seed: Tensor, device: torch.device) -> tuple[Tensor, bool]:
    """The seed where the binding (host) or the kernel (the same device) can read it, and whether it is the latter."""
    return (seed, False) if seed.device.type == "cpu" else (seed.to(device), True)


def _same(ours: Result, theirs: Result, tolerance: float = 0.0) -> bool:
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        return torch.equal(ours, theirs) if tolerance == 0.0 else _close(ours, theirs, tolerance)
    return all(_same(a, b, tolerance) for a, b in zip(ours, theirs, strict=True))


def _close(ours: Tensor, theirs: Tensor, tolerance: float) -> bool:
    """Whether the error's norm is at most ``tolerance`` of the reference's; NaN is not."""
    difference = (ours.double() - theirs.double()).norm()
    return ours.shape == theirs.shape and bool(difference <= tolerance * theirs.double().norm())
