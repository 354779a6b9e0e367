"""The compiled module ``pydiffseq._C`` and what every op shares: registration, pointers, argument checks.

Ops are registered from Python with ``torch.library``; kernels take raw pointers. Where ``_C`` was not built, ``C`` is
``None``, the ops run on :mod:`pydiffseq.ops.reference`, and the first op that is called says so once.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    if os.environ.get("PYDIFFSEQ_EXTENSION") == "0":  # lets a test or a user run the plain-torch fallback
        raise ImportError("switched off by PYDIFFSEQ_EXTENSION=0")
    import pydiffseq._C as C
except ImportError as error:
    C = None
    MISSING_REASON = str(error)
else:
    MISSING_REASON = ""

library = torch.library.Library("pydiffseq", "DEF")

KERNEL_DTYPES = (torch.float32, torch.bfloat16)


@functools.cache
def _share_torch_threads() -> None:
    """Make the kernels use the OpenMP pool that torch has loaded (see csrc/cpu/parallel.h)."""
    folder = Path(torch.__file__).parent
    candidates = [*sorted((folder / "lib").glob("libgomp*")), *sorted((folder.parent / "torch.libs").glob("libgomp*"))]
    any(C.use_openmp_library(str(path)) for path in candidates)


def kernels() -> bool:
    """Whether the CPU kernels can run; sets their thread count to torch's. Warns once where they were not built."""
    if C is None:
        _warn_missing()
        return False
    _share_torch_threads()
    C.set_num_threads(torch.get_num_threads())
    return True


@functools.cache
def _warn_missing() -> None:
    warnings.warn(
        f"pydiffseq._C is not available ({MISSING_REASON}); the ops run on plain torch, which is slower. "
        "Install a C++17 compiler and reinstall pydiffseq to get the kernels.", stacklevel=4)


def use_kernel(*tensors: Tensor | None) -> bool:
    """Whether all given tensors have a dtype that the CPU kernels take (float32 or bfloat16) and ``_C`` is there."""
    for tensor in tensors:   # no generator: this runs at every call of every op
        if tensor is not None and tensor.dtype not in KERNEL_DTYPES:
            return False
    return kernels()


def pointer(tensor: Tensor | None) -> int:
    """Address of the first element; 0 for ``None``. The caller keeps the tensor alive and contiguous."""
    return 0 if tensor is None else tensor.data_ptr()


# Tensors from here on are mapped afresh by glibc each time they are allocated, a page fault for each 4 kB: a third of the
# time of a kernel that only reads and writes.
_MAPPED_BYTES = 1 << 25


def output_pointer(tensor: Tensor | None) -> int:
    """:func:`pointer` of what a CPU kernel writes: new memory, which comes in large pages where there is much of it."""
    if tensor is None:
        return 0
    if tensor.nbytes >= _MAPPED_BYTES:
        C.use_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor.data_ptr()


def draw_seed(seed: int | Tensor | None = None) -> Tensor:
    """A Philox key as an int64 tensor ``[1]`` on the CPU; drawn from torch's generator when ``seed`` is ``None``."""
    if seed is None:
        return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64)
    if isinstance(seed, Tensor):
        if seed.numel() != 1 or seed.dtype != torch.int64:
            raise TypeError(
                f"seed must be an int or an int64 tensor of one element, got {seed.dtype} {tuple(seed.shape)}")
        return seed.reshape(1)
    return torch.tensor([seed], dtype=torch.int64)


def register_autograd(name: str, backward: Callable, setup_context: Callable) -> None:
    """As ``torch.library.register_autograd``, without that one's 40 us a call for looking up the arguments' defaults."""
    op = getattr(torch.ops.pydiffseq, name).default
    defaults = tuple(argument.default_value for argument in op._schema.arguments)

    def below_autograd(*args):
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            output = below_autograd(*args)
            # The dispatcher leaves out last arguments that have their default value.
            setup_context(ctx, (*args, *defaults[len(args):]), output)
            return output

        @staticmethod
        def backward(ctx, *grads):
            result = backward(ctx, *grads)
            return result[:len(ctx.needs_input_grad)] if isinstance(result, tuple) else result

    def dispatch(*args):
        differentiable = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
        return (Differentiable.apply if differentiable else below_autograd)(*args)

    Differentiable.__name__ = Differentiable.__qualname__ = f"Differentiable[{name}]"
    library.impl(name, dispatch, "Autograd")


def check_float(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}")


def check_shape(name: str, tensor: Tensor, *shapes: tuple[int, ...]) -> None:
    """Raise ``ValueError`` unless ``tensor`` has one of ``shapes``."""
    if tuple(tensor.shape) not in shapes:
        accepted = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"{name} must have shape {accepted}, got {list(tensor.shape)}")


def check_same_device(**tensors: Tensor | None) -> None:
    """Raise ``ValueError`` naming the first tensor whose device differs from the first one's."""
    first = device = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if device is None:
            first, device = name, tensor.device
        elif tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, but {first} is on {device}; put both on one device")


def autocast(*tensors: Tensor | None) -> list[Any]:
    """Inside ``torch.autocast`` the tensors in its dtype, as for a matrix product (float64 stays); else unchanged."""
    device = next(t.device.type for t in tensors if t is not None)
    if not torch.is_autocast_enabled(device) or any(t is not None and t.dtype == torch.float64 for t in tensors):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors]


def autocast_to_widest(*tensors: Tensor | None) -> list[Any]:
    """Inside ``torch.autocast`` the tensors in the widest of their dtypes; else unchanged."""
    present = [t for t in tensors if t is not None and t.is_floating_point()]
    if not present or not torch.is_autocast_enabled(present[0].device.type):
        return list(tensors)
    widest = functools.reduce(torch.promote_types, (t.dtype for t in present))
    return [t if t is None or not t.is_floating_point() else t.to(widest) for t in tensors]
