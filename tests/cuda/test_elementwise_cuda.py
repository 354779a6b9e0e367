"""Dropout and GEGLU on a GPU: the bits of the CPU, and the accuracy of float64."""

import sys
import warnings

import pytest
import torch

from pydiffseq.ops import _cuda, dropout, dropout_add, geglu, reference

pytestmark = pytest.mark.skipif(not (torch.cuda.is_available() and _cuda.compiled()),
                                reason="needs a GPU and the CUDA kernels")
DTYPES = list(_cuda.DTYPES)


@pytest.fixture(scope="module", autouse=True)
def self_check_passes():
    """Without this the tests would compare the reference with itself."""
    device = torch.device("cuda", torch.cuda.current_device())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for family in ("dropout", "geglu"):
            assert _cuda.trusted(family, device, sys.modules[f"pydiffseq.ops.{family}"]._cuda_cases)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 7, 41, 127, 129, 1_000_003])
@pytest.mark.parametrize("p", [0.1, 0.99999, 1.0])
def test_dropout_has_the_bits_of_the_cpu(dtype, n, p):
    x, residual = torch.randn(2, n + 1).to(dtype).unbind()
    for part in (slice(0, n), slice(1, n + 1)):
        a, b = x[part], residual[part]
        assert torch.equal(dropout(a.cuda(), p, seed=-5).cpu(), dropout(a, p, seed=-5))
        want = dropout_add(a, b, p, seed=-5)
        assert torch.equal(dropout_add(a.cuda(), b.cuda(), p, seed=-5).cpu(), want)
        on_device = torch.tensor([-5], device="cuda")
        assert torch.equal(dropout_add(x.cuda()[part], residual.cuda()[part], p, seed=on_device).cpu(), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 6), (3, 0), (1, 2), (7, 82), (127, 2), (2, 3, 258), (300, 4096)])
def test_geglu_error_is_at_most_twice_that_of_torch(dtype, shape):
    x = (3 * torch.randn(shape, device="cuda")).to(dtype)
    grad = torch.randn(*shape[:-1], shape[-1] // 2, device="cuda").to(dtype)
    leaf = x.clone().requires_grad_()
    out = geglu(leaf)
    ours = out.detach(), torch.autograd.grad(out, leaf, grad)[0]
    theirs = reference.geglu(x), reference.geglu_backward(grad, x)
    exact = reference.geglu(x.double()), reference.geglu_backward(grad.double(), x.double())
    for got, other, want in zip(ours, theirs, exact, strict=True):
        assert got.dtype == dtype and got.shape == want.shape
        assert (got.double() - want).norm() <= 2 * (other.double() - want).norm()


def test_strided_inputs():
    x = torch.randn(18, 12, device="cuda")
    assert torch.equal(geglu(x.T), geglu(x.T.contiguous()))
    assert torch.equal(dropout(x.T, 0.3, seed=1), dropout(x.T.contiguous(), 0.3, seed=1))


def test_more_than_two_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GB of free device memory")
    n = (1 << 31) + 77
    x = torch.ones(n, dtype=torch.bfloat16, device="cuda")
    out = dropout(x, 0.5, seed=3)
    block = torch.arange(n // 8 - 100, n // 8 + 1)
    words = reference.philox_words((block & 0xFFFFFFFF, 2 << 24, block >> 32, 0), torch.tensor([3]))
    kept = torch.stack([piece >= 32768 for word in words for piece in (word & 0xFFFF, word >> 16)], -1).flatten()
    assert torch.equal(out[block[0] * 8:].cpu() != 0, kept[:n - block[0] * 8])
    del out
    x = x[:n // 4 * 4].view(-1, 4)
    assert torch.equal(geglu(x)[-9:], geglu(x[-9:]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_gradients_and_graphs(dtype):
    x, residual = (torch.randn(4, 10, dtype=dtype, device="cuda", requires_grad=True) for _ in range(2))
    seed = torch.tensor([3], device="cuda")
    torch.library.opcheck(torch.ops.pydiffseq.dropout_add.default, (x, residual, 0.2, seed))
    torch.library.opcheck(torch.ops.pydiffseq.geglu.default, (x,))
    with torch.no_grad():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = dropout_add(geglu(x), geglu(residual), 0.2, seed=seed)
        seed.fill_(9)
        graph.replay()
        assert torch.equal(out, dropout_add(geglu(x), geglu(residual), 0.2, seed=9))


def test_gradcheck():
    x = torch.randn(3, 8, dtype=torch.float64, device="cuda", requires_grad=True)
    assert torch.autograd.gradcheck(geglu, x)
    assert torch.autograd.gradcheck(lambda x: dropout(x, 0.4, seed=5), x)
