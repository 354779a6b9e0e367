import math

import pytest
import torch
from instruction_sets import each_isa, kernel_only

from pydiffseq.ops import geglu, reference

DTYPES = [torch.float32, torch.bfloat16]


def exact_cdf(gate):
    return torch.special.erfc(-gate / math.sqrt(2)) / 2


def exact(x, grad):
    """Output and gradient in float64, with a distribution function that is accurate in both tails."""
    a, gate = x.double().chunk(2, -1)
    cdf, grad = exact_cdf(gate), grad.double()
    slope = cdf + gate * torch.exp(-gate.square() / 2) / math.sqrt(2 * math.pi)
    return a * gate * cdf, torch.cat([grad * gate * cdf, grad * a * slope], -1)


def eager(x):
    a, gate = x.chunk(2, -1)
    return a * torch.nn.functional.gelu(gate)


def value_and_gradient(function, x, grad):
    x = x.detach().requires_grad_()
    out = function(x)
    return out.detach(), torch.autograd.grad(out, x, grad)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2,), (3, 2), (5, 34), (7, 13, 62), (1, 40_000), (300, 514)])
def test_error_is_at_most_twice_that_of_torch_on_every_instruction_set(dtype, shape):
    torch.manual_seed(shape[-1])
    x = (3 * torch.randn(shape)).to(dtype)
    grad = torch.randn(*shape[:-1], shape[-1] // 2).to(dtype)
    expected = exact(x, grad)
    torch_errors = [(y.double() - e).abs().max() for y, e in
                    zip(value_and_gradient(eager, x, grad), expected, strict=True)]
    rounding = torch.finfo(dtype).eps
    before = torch.get_num_threads()
    try:
        for isa in each_isa():
            for threads in (1, 2):
                torch.set_num_threads(threads)
                for y, e, error in zip(value_and_gradient(geglu, x, grad), expected, torch_errors, strict=True):
                    assert y.dtype == dtype and y.shape == e.shape
                    assert (y.double() - e).abs().max() <= 2 * error + rounding * e.abs().median(), isa
    finally:
        torch.set_num_threads(before)


@kernel_only
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 6e-7), (torch.bfloat16, 2**-8)])
def test_relative_accuracy_holds_in_the_tails(dtype, tolerance):
    gate = torch.linspace(-12, 12, 200_001).to(dtype)
    x = torch.stack([torch.ones_like(gate), gate], -1).requires_grad_()
    expected = (gate.double() * exact_cdf(gate.double()))
    nonzero = expected != 0
    for isa in each_isa():
        out = geglu(x)
        grad_a = torch.autograd.grad(out.sum(), x)[0][:, 0]
        for y in (out.detach()[:, 0], grad_a):
            assert ((y.double() - expected)[nonzero] / expected[nonzero]).abs().max() < tolerance, isa
            assert not y[~nonzero].any()


@kernel_only
@pytest.mark.parametrize("dtype", DTYPES)
def test_far_from_zero_it_is_the_identity_or_zero(dtype):
    x = torch.tensor([[2, 15], [2, 1e4], [2, 1e30], [2, -15], [2, -1e4], [2, -1e30]], dtype=dtype)
    for isa in each_isa():
        out, grad = value_and_gradient(geglu, x, torch.ones(6, 1, dtype=dtype))
        assert torch.equal(out[:3, 0], 2 * x[:3, 1]) and not out[3:].any(), isa
        assert torch.equal(grad[:, 0], torch.relu(x[:, 1])), isa
        assert torch.equal(grad[:, 1], 2.0 * (x[:, 1] > 0)), isa


@kernel_only
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_are_those_of_float64(dtype):
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -2.0, 3.0], dtype=dtype)
    x = torch.cartesian_prod(special, special)
    for isa in each_isa():
        for repeats in (1, 3):  # in the padded rest of a row, then in whole vectors
            wide = x.T.reshape(2, 1, -1).expand(2, repeats, -1).reshape(1, -1)
            out, grad = value_and_gradient(geglu, wide, torch.ones(1, wide.shape[1] // 2, dtype=dtype))
            out64, grad64 = value_and_gradient(reference.geglu, wide.double(), torch.ones_like(out).double())
            for y, expected in ((out, out64), (grad, grad64)):
                assert torch.equal(y.isnan(), expected.isnan()), isa
                assert torch.equal(y[y.isinf()].double(), expected[expected.isinf()]), isa


def test_all_bits_of_a_bfloat16_nan_survive_as_nan():
    worst = torch.full((2, 40), -1, dtype=torch.int16).view(torch.bfloat16)
    for isa in each_isa():
        out, grad = value_and_gradient(geglu, worst, torch.ones(2, 20, dtype=torch.bfloat16))
        assert out.isnan().all() and grad.isnan().all(), isa


@kernel_only
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_element_does_not_depend_on_its_place(dtype):
    x = torch.randn(40, 2 * 37).to(dtype)
    a, gate = x.chunk(2, -1)
    for isa in each_isa():
        whole = geglu(x)
        assert torch.equal(whole[11:12], geglu(x[11:12])), isa
        assert torch.equal(whole[:, 5:], geglu(torch.cat([a[:, 5:], gate[:, 5:]], -1))), isa


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_strided_and_empty_inputs(dtype):
    x, grad = torch.randn(18, 9).to(dtype), torch.randn(9, 9).to(dtype)
    for got, expected in zip(value_and_gradient(geglu, x.t(), grad.t()),
                             value_and_gradient(geglu, x.t().contiguous(), grad.t().contiguous()), strict=True):
        torch.testing.assert_close(got, expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)
    ones = torch.ones(9, 9, dtype=dtype)
    expanded = value_and_gradient(geglu, x.t(), ones[:1, :1].expand(9, 9))[1]  # the gradient that sum() passes back
    torch.testing.assert_close(expanded, value_and_gradient(geglu, x.t(), ones)[1])
    assert geglu(x[:0].reshape(0, 6)).shape == (0, 3) and geglu(x[:, :0]).shape == (18, 0)
    grad_empty = value_and_gradient(geglu, x[:, :0], torch.empty(18, 0, dtype=dtype))[1]
    assert grad_empty.shape == (18, 0)


def test_gradients_in_float64():
    x = (2 * torch.randn(3, 8, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(geglu, x)
    torch.testing.assert_close(geglu(x), eager(x))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64, torch.float16])
def test_opcheck(dtype):
    x = torch.randn(4, 10).to(dtype)
    torch.library.opcheck(torch.ops.pydiffseq.geglu.default, (x.requires_grad_(),))
    torch.library.opcheck(torch.ops.pydiffseq.geglu_backward.default, (torch.randn(4, 5).to(dtype), x.detach()))
    torch.library.opcheck(torch.ops.pydiffseq.geglu.default, (torch.randn(4, 10).to(dtype).t()[:, :2],))


def test_compiled_function_gives_the_same_values():
    x = torch.randn(16, 8, requires_grad=True)

    def function(x):
        return geglu(2 * x).square().sum()

    results = [(loss := f(x), *torch.autograd.grad(loss, x))
               for f in (function, torch.compile(function, fullgraph=True, backend="aot_eager"))]
    for eager_result, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager_result, compiled)


@pytest.mark.parametrize("error, message, x", [
    (TypeError, "^x must be a floating-point tensor, got torch.int64", torch.ones(2, 2, dtype=torch.int64)),
    (ValueError, r"^x must have a last dim of even size \(a and gate\), got shape \[4, 3\]", torch.ones(4, 3)),
    (ValueError, r"^x must have a last dim of even size \(a and gate\), got shape \[\]", torch.ones(())),
])
def test_bad_arguments_are_named(error, message, x):
    with pytest.raises(error, match=message):
        geglu(x)
