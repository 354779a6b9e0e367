"""The dropout and GEGLU kernels, emulated: the bits of the reference, and the accuracy of float64."""

import math
import sys

import pytest
import torch

from pydiffseq.ops import _cuda, reference

dropout, geglu = (sys.modules[f"pydiffseq.ops.{name}"] for name in ("dropout", "geglu"))
CPU = torch.device("cpu")
DTYPES = list(_cuda.DTYPES)


@pytest.mark.parametrize("module", [dropout, geglu])
def test_the_self_check_passes(every_order, module):
    for name, kernel, oracle, *tolerance in module._cuda_cases(CPU):
        assert _cuda._same(kernel(), oracle(), *tolerance), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 7, 41, 127, 129, 140_001])
def test_dropout_has_the_bits_of_the_cpu(install, dtype, n):
    x, residual = torch.randn(2, n + 1, generator=torch.Generator().manual_seed(n)).to(dtype).unbind()
    for y in (None, residual):
        for part in (slice(0, n), slice(1, n + 1)):  # the latter at addresses that are not multiples of 16
            a, b = x[part], None if y is None else y[part]
            assert torch.equal(dropout._kernel(a, b, 0.3, torch.tensor([5])),
                               reference.dropout_add(a, b, 0.3, torch.tensor([5])))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 6), (3, 0), (1, 2), (7, 41 * 2), (127, 2), (2, 3, 258)])
def test_geglu_is_as_accurate_as_torch(install, dtype, shape):
    x = (3 * torch.randn(shape, generator=torch.Generator().manual_seed(1))).to(dtype)
    grad = torch.ones_like(geglu._geglu_fake(x))
    for ours, theirs, exact in (
            (geglu._geglu_kernel(x), reference.geglu(x), reference.geglu(x.double())),
            (geglu._geglu_backward_kernel(grad, x), reference.geglu_backward(grad, x),
             reference.geglu_backward(grad.double(), x.double()))):
        assert ours.shape == theirs.shape and ours.dtype == dtype
        assert (ours.double() - exact).norm() <= 2 * (theirs.double() - exact).norm()


def test_the_tails_of_geglu(install):
    gate = torch.linspace(-12, 12, 20_001)
    x = torch.stack([torch.ones_like(gate), gate], -1)
    cdf = torch.special.erfc(-gate.double() / math.sqrt(2)) / 2
    slope = cdf + gate.double() * torch.exp(-gate.double().square() / 2) / math.sqrt(2 * math.pi)
    out = geglu._geglu_kernel(x)[:, 0].double()
    assert ((out - gate.double() * cdf).abs() <= 1e-6 * (gate.double() * cdf).abs()).all()
    got = geglu._geglu_backward_kernel(torch.ones(20_001, 1), x)[:, 1].double()
    terms = cdf + (gate.double() * torch.exp(-gate.double().square() / 2)).abs()
    assert ((got - slope).abs() <= 2e-6 * terms).all()


def test_nan_and_infinity_are_those_of_float64(install):
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -2.0, 1e15])
    x = torch.cartesian_prod(special, special)
    grad = torch.ones(36, 1)
    for got, want in ((geglu._geglu_kernel(x), reference.geglu(x.double())),
                      (geglu._geglu_backward_kernel(grad, x), reference.geglu_backward(grad.double(), x.double()))):
        assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
