import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import kernel_only

from pydiffseq.ops import _extension, linear_cross_entropy, linear_logsumexp, reference

DTYPES = [torch.float32, torch.bfloat16]
# Largest error of losses (nats) and of gradients, relative to the largest gradient. bfloat16: the gradients of the
# logits and the results are rounded to 2^-9.
LIMITS = {torch.float32: (3e-5, 1e-5), torch.bfloat16: (3e-5, 1e-2)}



def inputs(rows, dim, vocab, dtype=torch.float32, bias=True, ignored=0.2, seed=0):
    g = torch.Generator().manual_seed(seed)
    target = torch.randint(vocab, (rows,), generator=g)
    target[torch.rand(rows, generator=g) < ignored] = -100
    x, table = torch.randn(rows, dim, generator=g), torch.randn(vocab, dim, generator=g)
    return x.to(dtype), table.to(dtype), torch.randn(vocab, generator=g).to(dtype) if bias else None, target


def losses_and_gradients(function, x, table, bias, target, grad, smoothing):
    leaves = [t.detach().clone().requires_grad_() for t in (x, table, bias) if t is not None]
    losses = function(leaves[0], leaves[1], leaves[2] if bias is not None else None, target, smoothing)
    return losses.detach(), torch.autograd.grad(losses, leaves, grad.to(losses.dtype))


def fused(x, table, bias, target, smoothing):
    return linear_cross_entropy(x, table, bias, target, label_smoothing=smoothing)


def exact(x, table, bias, target, smoothing):
    return F.cross_entropy(F.linear(x, table, bias), target, label_smoothing=smoothing, reduction="none")


def check_against_float64(x, table, bias, target, smoothing):
    grad = torch.rand(len(target), generator=torch.Generator().manual_seed(1))
    losses, grads = losses_and_gradients(fused, x, table, bias, target, grad, smoothing)
    want, want_grads = losses_and_gradients(
        exact, x.double(), table.double(), None if bias is None else bias.double(), target, grad, smoothing)
    loss_limit, grad_limit = LIMITS[x.dtype]
    assert losses.dtype == torch.float32
    assert (losses - want).abs().max() <= loss_limit * max(1.0, float(want.abs().max()) / 10)
    for got, wanted in zip(grads, want_grads, strict=True):
        assert got.dtype == x.dtype
        # softmax - 1 cancels where the target is near certain: an error of 2^-24 of 1, not of the difference
        assert (got - wanted).abs().max() <= grad_limit * max(wanted.abs().max(), 0.1)
    return losses, grads


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("rows", "dim", "vocab"), [(1, 1, 1), (7, 5, 3), (97, 80, 401), (200, 64, 999), (13, 200, 97)])
def test_losses_and_gradients_match_float64(isa, dtype, smoothing, rows, dim, vocab):
    for bias in (True, False):
        check_against_float64(*inputs(rows, dim, vocab, dtype, bias), smoothing)


@kernel_only  # the reference has bfloat16 logits, as torch
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 70), dim=st.integers(1, 70), vocab=st.integers(1, 500), dtype=st.sampled_from(DTYPES),
       bias=st.booleans(), smoothing=st.floats(0.0, 1.0), ignored=st.sampled_from([0.0, 0.5, 1.0]))
def test_any_shape(rows, dim, vocab, dtype, bias, smoothing, ignored):
    check_against_float64(*inputs(rows, dim, vocab, dtype, bias, ignored), smoothing)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ignored_rows_cost_nothing_whatever_they_hold(isa, dtype):
    x, table, bias, target = inputs(50, 16, 300, dtype, ignored=0.5)
    x[target == -100] = torch.nan
    losses, (grad_x, grad_table, _) = losses_and_gradients(fused, x, table, bias, target, torch.ones(50), 0.1)
    assert (losses[target == -100] == 0).all() and (grad_x[target == -100] == 0).all()
    assert losses.isfinite().all() and grad_table.isfinite().all()
    target.fill_(7)
    assert (linear_cross_entropy(x[:0], table, bias, target[:0])).shape == (0,)
    assert (linear_cross_entropy(x, table, bias, target, ignore_index=7) == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_logits_do_not_overflow(isa, dtype):
    x, table, bias, target = inputs(30, 32, 500, dtype, ignored=0.0)
    check_against_float64(x * 64, table, bias * 64, target, 0.0)
    losses, _ = losses_and_gradients(fused, x * 1e12, table * 1e12, None, target, torch.ones(30), 0.0)
    assert losses.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_shows_in_losses_and_gradients(isa, dtype, value):
    x, table, bias, target = inputs(40, 16, 300, dtype, ignored=0.0)
    x[3] = value
    losses, (grad_x, _, _) = losses_and_gradients(fused, x, table, bias, target, torch.ones(40), 0.0)
    assert losses.isnan().tolist() == [i == 3 for i in range(40)]
    assert grad_x[3].isnan().any() and grad_x[4:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bias_of_minus_infinity_bans_a_word(isa, dtype):
    x, table, bias, target = inputs(40, 16, 300, dtype, ignored=0.0)
    target %= 150
    bias[150:] = -torch.inf
    losses, (grad_x, grad_table, grad_bias) = losses_and_gradients(fused, x, table, bias, target, torch.ones(40), 0.0)
    few = losses_and_gradients(fused, x, table[:150], bias[:150], target, torch.ones(40), 0.0)
    torch.testing.assert_close(losses, few[0], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(grad_x, few[1][0], atol=2e-2, rtol=2e-2)
    assert grad_table[150:].abs().max() < 1e-30 and grad_bias[150:].abs().max() < 1e-30


@kernel_only
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_threads(dtype):
    x, table, bias, target = inputs(500, 64, 3000, dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            losses, grads = losses_and_gradients(fused, x, table, bias, target, torch.ones(500), 0.1)
            results.append([losses, *grads])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_strided_inputs_and_expanded_gradient():
    x, table, bias, target = inputs(60, 32, 200)
    wide = torch.randn(60, 64)
    wide[:, ::2] = x
    losses = linear_cross_entropy(wide[:, ::2], table.T.contiguous().T, bias, target)
    assert torch.equal(losses, linear_cross_entropy(x, table, bias, target))
    table.requires_grad_()
    linear_cross_entropy(x, table, bias, target).sum().backward()
    assert table.grad.isfinite().all()


def test_reference_by_blocks(monkeypatch):
    monkeypatch.setattr(reference, "_LOGITS_AT_ONCE", 700)
    x, table, bias, target = inputs(20, 8, 100, torch.float64)
    check = losses_and_gradients(fused, x, table, bias, target, torch.ones(20), 0.1)
    want = losses_and_gradients(exact, x, table, bias, target, torch.ones(20), 0.1)
    torch.testing.assert_close(check, want)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_gradcheck(bias, smoothing):
    x, table, bias_, target = inputs(6, 4, 9, torch.float64, bias)
    leaves = [t.requires_grad_() for t in (x, table, bias_) if t is not None]
    assert torch.autograd.gradcheck(
        lambda x, table, b=None: linear_cross_entropy(x, table, b, target, label_smoothing=smoothing), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(dtype, bias):
    x, table, bias_, target = inputs(6, 8, 9, dtype, bias)
    leaves = [t if t is None else t.requires_grad_() for t in (x, table, bias_)]
    torch.library.opcheck(torch.ops.pydiffseq.linear_cross_entropy, (*leaves, target, 0.1, -100))
    losses, lse = torch.ops.pydiffseq.linear_cross_entropy(x, table, bias_, target, 0.1, -100)
    torch.library.opcheck(torch.ops.pydiffseq.linear_cross_entropy_backward, (
        torch.ones_like(losses), *(t if t is None else t.detach() for t in leaves), target, lse, 0.1, -100))


def test_compile_fullgraph():
    x, table, bias, target = inputs(12, 16, 50)

    def step(x, table, bias):
        return linear_cross_entropy(x * 2, table, bias, target, label_smoothing=0.1).mean()

    leaves = [t.requires_grad_() for t in (x, table, bias)]
    want = torch.autograd.grad(step(*leaves), leaves)
    got = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"x": torch.zeros(3, 2, dtype=torch.int64)}, TypeError, "x must be a floating-point"),
    ({"x": torch.zeros(3)}, ValueError, r"x must have shape \[M, d\], got \[3\]"),
    ({"table": torch.zeros(5, 3)}, ValueError, r"table must have shape \[V, 2\].*got \[5, 3\]"),
    ({"table": torch.zeros(5, 2).double()}, TypeError, "table must have the dtype of x"),
    ({"bias": torch.zeros(4)}, ValueError, r"bias must have shape \[5\], got \[4\]"),
    ({"target": torch.zeros(2, dtype=torch.int64)}, ValueError, r"target must have shape \[3\], got \[2\]"),
    ({"target": torch.zeros(3)}, TypeError, "target must be int64"),
    ({"target": torch.tensor([0, 5, 1])}, IndexError, r"target\[1\] is 5, but must be in 0..4 or ignore_index"),
    ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be in 0..1, got 1.5"),
])
def test_errors(change, error, message):
    arguments = {"x": torch.zeros(3, 2), "table": torch.zeros(5, 2), "bias": torch.zeros(5),
                 "target": torch.zeros(3, dtype=torch.int64), **change}
    if error is IndexError and _extension.C is None:
        message = ""
    with pytest.raises(error, match=message):
        linear_cross_entropy(**arguments)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
def test_logsumexp_matches_float64(dtype, bias):
    x, table, bias_, _ = inputs(30, 16, 300, dtype, bias)
    got = linear_logsumexp(x.requires_grad_(), table, bias_)
    want = F.linear(x.double(), table.double(), None if bias_ is None else bias_.double()).logsumexp(-1)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and not got.requires_grad
    torch.testing.assert_close(got.double(), want.detach(), rtol=1e-5, atol=3e-5)
    with pytest.raises(ValueError, match=r"x must have shape \[M, d\], got \[16\]"):
        linear_logsumexp(x[0], table, bias_)
