"""Runs a family's self-check on emulated kernels that see each tensor at the end of a page, with forbidden pages around.

    python guarded.py path/of/_C_emulation.so family ...

What reads or writes behind a tensor, or in front of the page where it begins, ends the process with a signal; the
families "behind" and "in front" do it on purpose.
"""

import ctypes
import faulthandler
import importlib
import importlib.util
import mmap
import sys

import torch

PAGE = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
real_data_ptr = torch.Tensor.data_ptr


class Copies:
    """Copies of tensors at the ends of pages; what a kernel changed goes back into the tensors."""

    def __init__(self):
        self.made = []

    def of(self, tensor):
        """Stands for ``Tensor.data_ptr``; the address has the same remainder by 16."""
        source = real_data_ptr(tensor)
        if tensor.numel() == 0:
            return source
        size = tensor.element_size() * (1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)))
        pages = -(-(size + 15) // PAGE) * PAGE
        start = libc.mmap(None, pages + 2 * PAGE, mmap.PROT_READ | mmap.PROT_WRITE,
                          mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        libc.mprotect(start, PAGE, 0)
        libc.mprotect(start + PAGE + pages, PAGE, 0)
        address = start + PAGE + pages - size
        address -= (address - source) % 16
        ctypes.memmove(address, source, size)
        self.made.append((tensor, source, address, size, start, pages + 2 * PAGE))
        return address

    def give_back(self):
        for tensor, source, address, size, start, whole in self.made:
            if ctypes.string_at(address, size) != ctypes.string_at(source, size):
                assert tensor.is_contiguous(), "a kernel wrote into a tensor with gaps"
                ctypes.memmove(source, address, size)
            libc.munmap(start, whole)
        self.made.clear()


def overrun(emulation, pages):
    """Random bits for one token too many, or a page too early."""
    seed, out = torch.tensor([1]), torch.empty(1, 1, 4)
    emulation.noise_philox_normal_cuda(out.data_ptr() - 2 * pages * PAGE, seed.data_ptr(), 0, 0, 3, 1, 2, 4, 0, False, 0, 0)


def main(path, families):
    from pydiffseq.ops import _cuda

    faulthandler.enable()
    spec = importlib.util.spec_from_file_location("_C_emulation", path)
    emulation = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(emulation)
    copies = Copies()
    torch.Tensor.data_ptr = lambda tensor: copies.of(tensor)

    def launch(kernel, device, *arguments):
        kernel(*arguments, 0, 0)
        copies.give_back()

    _cuda.C, _cuda.launch, _cuda.stream = emulation, launch, lambda device: 0
    if families[0] in ("behind", "in front"):
        overrun(emulation, families[0] == "in front")
    for family in families:
        importlib.import_module(f"pydiffseq.ops.{family}")
        module = sys.modules[f"pydiffseq.ops.{family}"]
        for name in ("noise", "dropout", "geglu", "nearest", "cross_entropy", "timestep_attention"):
            sys.modules[f"pydiffseq.ops.{name}"].C = emulation
        with torch.no_grad():
            cases = list(module._cuda_cases(torch.device("cpu")))
            for name, kernel, reference, *tolerance in cases[::3]:   # of every kind some
                expected = reference()
                assert _cuda._same(kernel(), expected, *tolerance), f"{family}: {name}"
        print(family, "ok", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
