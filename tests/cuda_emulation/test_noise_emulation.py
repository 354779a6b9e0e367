"""The noise kernels, emulated: the bits of the reference."""

import pytest
import torch

from pydiffseq.ops import _cuda, noise, reference

CPU = torch.device("cpu")


def test_the_self_check_passes(every_order):
    for name, kernel, oracle in noise._cuda_cases(CPU):
        assert _cuda._same(kernel(), oracle()), name


@pytest.mark.parametrize("shape", [(1, 1, 1), (700, 3, 4), (2, 1, 4096)])
@pytest.mark.parametrize("on_device", [False, True])
def test_sizes_and_places_of_the_seed(install, shape, on_device, monkeypatch):
    seed = torch.tensor([-5])
    monkeypatch.setattr(_cuda, "key_arguments", lambda seed, device: (seed, on_device))
    out = noise._philox_normal_kernel(torch.full(shape, 7.0), seed, 3, None, 1)
    assert torch.equal(out, reference.philox_normal(seed, *shape, 3, None, 1, torch.float32, CPU))


def test_an_error_is_that_of_one_call(install, monkeypatch):
    arguments = (torch.empty(1, 2, 4), torch.tensor([-5]), 3, None, 1)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="philox_normal: CUDA error: invalid argument"):
        patch.setattr(_cuda, "launch", lambda kernel, device, *arguments: kernel(*arguments, 0, 1))
        noise._philox_normal_kernel(*arguments)
    noise._philox_normal_kernel(*arguments)


def test_out_of_range_becomes_nan(install):
    x0, t, schedule = torch.ones(2, 3, 8), torch.tensor([[0, 7, 1], [2, 0, -1]]), torch.full((7,), 0.5)
    out, _ = noise._q_sample_kernel(x0, t, schedule, schedule, None, torch.tensor([1]), 0, None, False)
    assert torch.equal(out.isnan().all(-1), (t < 0) | (t > 6)) and out.isnan().sum() == 16
