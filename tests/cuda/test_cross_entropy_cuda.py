"""The fused cross-entropy of a linear layer on a GPU: losses and gradients of float64."""

import sys
import warnings

import pytest
import torch
import torch.nn.functional as F

from pydiffseq.ops import _cuda, linear_cross_entropy

pytestmark = pytest.mark.skipif(not (torch.cuda.is_available() and _cuda.compiled()),
                                reason="needs a GPU and the CUDA kernels")
HALF = [torch.float16, torch.bfloat16]
module = sys.modules["pydiffseq.ops.cross_entropy"]


@pytest.fixture(scope="module", autouse=True)
def self_check_passes():
    """Without this the tests would compare the reference with itself."""
    device = torch.device("cuda", torch.cuda.current_device())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _cuda.trusted("cross_entropy", device, module._cuda_cases)


def problem(rows, vocab, dim, dtype=torch.bfloat16, ignored=0.2):
    g = torch.Generator().manual_seed(rows + vocab + dim)
    x, table, bias = (torch.randn(*shape, generator=g) for shape in ((rows, dim), (vocab, dim), (vocab,)))
    target = torch.randint(vocab, (rows,), generator=g)
    target[torch.rand(rows, generator=g) < ignored] = -100
    return *(t.to("cuda", dtype) for t in (x, table, bias)), target.cuda()


def eager(x, table, bias, target, label_smoothing=0.0):
    return F.cross_entropy(F.linear(x, table, bias).to(torch.promote_types(x.dtype, torch.float32)), target,
                           reduction="none", label_smoothing=label_smoothing)


def losses_and_gradients(function, x, table, bias, target, grad, smoothing):
    leaves = [t.detach().requires_grad_() for t in (x, table, bias) if t is not None]
    losses = function(leaves[0], leaves[1], leaves[2] if bias is not None else None, target, label_smoothing=smoothing)
    return [losses.detach(), *torch.autograd.grad(losses, leaves, grad.to(losses.dtype))]


def check(x, table, bias, target, smoothing=0.0, scale=1.0):
    """Errors at most twice those of eager torch in the same precision."""
    grad = scale * torch.rand(len(target), device="cuda")
    ours = losses_and_gradients(linear_cross_entropy, x, table, bias, target, grad, smoothing)
    theirs = losses_and_gradients(eager, x, table, bias, target, grad, smoothing)
    exact = (t if t is None else t.double() for t in (x, table, bias))
    want = losses_and_gradients(eager, *exact, target, grad, smoothing)
    for got, other, exact in zip(ours, theirs, want, strict=True):
        assert (got.double() - exact).norm() <= 2 * (other.double() - exact).norm() + 1e-5 * exact.norm()
    assert (ours[0].double() - want[0]).abs().max() <= 3e-5 * max(1.0, float(want[0].abs().max()) / 10)
    return ours


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("rows, vocab, dim", [(1, 1, 1), (7, 41, 16), (41, 7, 33), (127, 129, 64), (129, 127, 128),
                                              (700, 5000, 100), (3000, 30522, 128)])
def test_matches_float64(dtype, smoothing, rows, vocab, dim):
    check(*problem(rows, vocab, dim, dtype), smoothing)
    x, table, _, target = problem(rows, vocab, dim, dtype)
    check(x, table, None, target, smoothing, scale=1e-4)


@pytest.mark.parametrize("dtype, dim", [(torch.float32, 64), (torch.bfloat16, 200)])
def test_what_the_kernels_do_not_take_runs_on_torch(dtype, dim):
    x, table, bias, target = problem(50, 300, dim, dtype)
    want = eager(x.double(), table.double(), bias.double(), target)
    torch.testing.assert_close(linear_cross_entropy(x, table, bias, target).double(), want, rtol=0.02, atol=0.1)


def test_empty_ignored_and_strided():
    x, table, bias, target = problem(50, 300, 32)
    assert linear_cross_entropy(x[:0], table, bias, target[:0]).shape == (0,)
    x[target == -100] = torch.nan
    results = losses_and_gradients(linear_cross_entropy, x, table, bias, target, torch.ones(50, device="cuda"), 0.1)
    assert all(result.isfinite().all() for result in results) and not results[1][target == -100].any()
    again = losses_and_gradients(linear_cross_entropy, x.T.contiguous().T, table.T.contiguous().T, bias, target,
                                 torch.ones(1, device="cuda").expand(50), 0.1)
    assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True))


def test_a_target_out_of_range_is_nan():
    x, table, bias, target = problem(50, 300, 32, ignored=0.0)
    target[3] = 300
    assert linear_cross_entropy(x, table, bias, target).isnan().tolist() == [i == 3 for i in range(50)]


def test_the_same_bits_every_time():
    x, table, bias, target = problem(3000, 9000, 128)
    grad = torch.rand(3000, device="cuda")
    first = losses_and_gradients(linear_cross_entropy, x, table, bias, target, grad, 0.1)
    for _ in range(3):
        again = losses_and_gradients(linear_cross_entropy, x, table, bias, target, grad, 0.1)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_graph_follows_its_inputs():
    x, table, bias, target = problem(200, 700, 64)
    grad = torch.ones(200, device="cuda")
    losses_and_gradients(linear_cross_entropy, x, table, bias, target, grad, 0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = losses_and_gradients(linear_cross_entropy, x, table, bias, target, grad, 0.1)
    x.mul_(0.5)
    graph.replay()
    now = losses_and_gradients(linear_cross_entropy, x, table, bias, target, grad, 0.1)
    assert all(torch.equal(a, b) for a, b in zip(captured, now, strict=True))


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_opcheck_and_autocast(dtype):
    x, table, bias, target = problem(9, 50, 24, dtype)
    leaves = [t.requires_grad_() for t in (x, table, bias)]
    torch.library.opcheck(torch.ops.pydiffseq.linear_cross_entropy, (*leaves, target, 0.1, -100))
    with torch.autocast("cuda", torch.bfloat16):
        losses = linear_cross_entropy(*leaves, target)
    want = linear_cross_entropy(*(t.bfloat16() for t in leaves), target)
    assert torch.equal(losses, want) and losses.dtype == torch.float32


def test_memory_is_at_most_an_eighth_of_eager():
    x, table, bias, target = problem(6400, 30522, 128)
    peaks = []
    for function in (linear_cross_entropy, eager):
        losses_and_gradients(function, x, table, bias, target, torch.ones(6400, device="cuda"), 0.0)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        losses_and_gradients(function, x, table, bias, target, torch.ones(6400, device="cuda"), 0.0)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[0] <= peaks[1] / 8, peaks
