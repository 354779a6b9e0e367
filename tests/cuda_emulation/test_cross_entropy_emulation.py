"""The cross-entropy kernels, emulated: losses and gradients of float64, for every shape of the tiles and every part."""

import sys

import pytest
import torch

from pydiffseq.ops import _cuda, reference

cross_entropy = sys.modules["pydiffseq.ops.cross_entropy"]
CPU = torch.device("cpu")
HALF = [torch.float16, torch.bfloat16]


def problem(rows, vocab, dim, dtype=torch.bfloat16, bias=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, table = torch.randn(rows, dim, generator=g).to(dtype), torch.randn(vocab, dim, generator=g).to(dtype)
    target = torch.randint(vocab, (rows,), generator=g)
    target[torch.rand(rows, generator=g) < 0.2] = -100
    return x, table, torch.randn(vocab, generator=g).to(dtype) if bias else None, target


def exact(x, table, bias, target, grad, smoothing, ignore=-100):
    inputs = x.double(), table.double(), None if bias is None else bias.double(), target
    losses, lse = reference.linear_cross_entropy(*inputs, smoothing, ignore)
    return losses, lse, reference.linear_cross_entropy_backward(grad.double(), *inputs, lse, smoothing, ignore)


def run(x, table, bias, target, grad, smoothing, ignore=-100):
    losses, lse = cross_entropy._forward_kernel(x, table, bias, target, smoothing, ignore)
    return losses, lse, cross_entropy._backward_kernel(grad, x, table, bias, target, lse, smoothing, ignore)


def check(x, table, bias, target, smoothing=0.1, scale=1.0):
    grad = scale * torch.rand(len(target), generator=torch.Generator().manual_seed(1))
    losses, lse, grads = run(x, table, bias, target, grad, smoothing)
    want_losses, want_lse, want_grads = exact(x, table, bias, target, grad, smoothing)
    torch.testing.assert_close(losses.double(), want_losses, rtol=1e-5, atol=3e-5)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=3e-5)
    for got, want in zip(grads, want_grads, strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            assert got.dtype == x.dtype
            assert (got.double() - want).abs().max() <= 0.01 * max(want.abs().max(), 0.1 * scale)
    return losses, grads


def test_the_self_check_passes(install):
    for name, kernel, oracle, tolerance in cross_entropy._cuda_cases(CPU):
        assert _cuda._same(kernel(), oracle(), tolerance), name


@pytest.mark.parametrize("rows, vocab, dim, dtype", [
    (1, 1, 1, torch.bfloat16), (7, 41, 16, torch.float16), (127, 129, 33, torch.bfloat16), (129, 127, 64, torch.float16),
    (41, 300, 128, torch.bfloat16), (130, 70, 100, torch.float16)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_matches_float64(install, rows, vocab, dim, dtype, smoothing):
    check(*problem(rows, vocab, dim, dtype, bias=rows != 41), smoothing)


def test_the_order_of_the_warps_does_not_matter(every_order):
    losses, grads = check(*problem(20, 150, 72))
    again = run(*problem(20, 150, 72), torch.rand(20, generator=torch.Generator().manual_seed(1)), 0.1)
    assert torch.equal(losses, again[0]) and all(torch.equal(a, b) for a, b in zip(grads, again[2], strict=True))


@pytest.mark.parametrize("parts", [1, 3])
def test_any_number_of_parts_gives_the_gradients(install, monkeypatch, parts):
    real = install.tile_parts_cuda
    monkeypatch.setattr(install, "tile_parts_cuda", lambda rows, tiles, device: min(parts, real(1, tiles, device)))
    check(*problem(140, 270, 24))


def test_gradients_of_a_mean_survive_float16(install):
    x, table, bias, target = problem(60, 200, 32, torch.float16, bias=False)
    _, grads = check(x, table, bias, target, scale=1e-3)
    assert (grads[0][target == -100] == 0).all()


def test_large_logits(install):
    x, table, bias, target = problem(30, 200, 32)
    check(x * 64, table, bias * 64, target, 0.0)
    losses = cross_entropy._forward_kernel(x * 1e12, table * 1e12, None, target.clamp_min(0), 0.0, -100)[0]
    assert losses.isfinite().all()


def test_what_is_not_finite_shows_where_it_counts(install):
    x, table, bias, target = problem(40, 150, 16)
    target[:4] = torch.tensor([-100, 5, 6, 150])  # left out, NaN, infinite, out of range
    x[0], x[1], x[2] = torch.nan, torch.nan, torch.inf
    losses, _, (grad_x, _, _) = run(x, table, bias, target, torch.ones(40), 0.0)
    assert losses.isnan().tolist() == [1 <= i <= 3 for i in range(40)] and losses[0] == 0
    assert grad_x[1:4].isnan().any(-1).all() and (grad_x[0] == 0).all() and grad_x[4:].isfinite().all()
    _, _, grads = run(x, table, bias, target.index_fill(0, torch.arange(4), -100), torch.ones(40), 0.0)
    assert all(grad.isfinite().all() for grad in grads)


def test_a_bias_of_minus_infinity_bans_a_word(install):
    x, table, bias, target = problem(40, 200, 16)
    target %= 150
    bias[150:] = -torch.inf
    losses, _, grads = run(x, table, bias, target, torch.ones(40), 0.0)
    few = run(x, table[:150], bias[:150], target, torch.ones(40), 0.0)
    torch.testing.assert_close(losses, few[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grads[0], few[2][0], atol=1e-2, rtol=1e-2)
    assert not grads[1][150:].any() and not grads[2][150:].any()


def test_nothing_to_do(install):
    x, table, bias, target = problem(5, 9, 8)
    losses, lse = cross_entropy._forward_kernel(x[:0], table, bias, target[:0], 0.0, -100)
    grads = cross_entropy._backward_kernel(losses, x[:0], table, bias, target[:0], lse, 0.0, -100)
    assert losses.shape == (0,) and grads[0].shape == (0, 8) and not grads[1].any() and not grads[2].any()
    losses, _, grads = run(x, table, bias, torch.full((5,), -100), torch.ones(5), 0.1)
    assert not losses.any() and not any(grad.any() for grad in grads)


def test_strided_inputs(install):
    x, table, bias, target = problem(20, 30, 16)
    want = run(x, table, bias, target, torch.ones(20), 0.1)
    got = run(x.T.contiguous().T, table.T.contiguous().T, bias, target, torch.ones(1).expand(20), 0.1)
    assert torch.equal(got[0], want[0]) and all(torch.equal(a, b) for a, b in zip(got[2], want[2], strict=True))
