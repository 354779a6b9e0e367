import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import each_isa, kernel_only

from pydiffseq.ops import dropout, dropout_add, reference


@kernel_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 8, 127, 128, 50_001])
@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.99999, 1.0])
def test_bits_are_those_of_the_reference_on_every_instruction_set(dtype, n, p):
    g = torch.Generator().manual_seed(n)
    x, residual = torch.randn(2, n, generator=g).to(dtype).unbind()
    seed = torch.tensor([-987654321])
    alone, added = reference.dropout(x, p, seed), reference.dropout_add(x, residual, p, seed)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for isa in each_isa():
                assert torch.equal(dropout(x, p, seed=seed), alone), isa
                assert torch.equal(dropout_add(x, residual, p, seed=seed), added), isa
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_kept_share_scale_and_independence(p):
    n = 1 << 18
    kept = dropout(torch.ones(n), p, seed=11)
    exact = 1 - round(p * 65536) / 65536
    assert set(kept.unique().tolist()) == {0.0, torch.tensor(1 / exact).item()}
    share = (kept != 0).double()
    spread = math.sqrt(exact * (1 - exact) / n)
    assert abs(share.mean() - exact) < 4.5 * spread
    for lag in (1, 2, 7, 8, 64, 128):  # neighbours in a word, a block, a vector
        both = (share[lag:] * share[:-lag]).mean()
        assert abs(both - exact**2) < 6 * spread
    assert (dropout(torch.ones(n), p, seed=12) != kept).any()


@settings(max_examples=30, deadline=None)
@given(n=st.integers(0, 3000), p=st.floats(0.0, 1.0), seed=st.integers(-2**63, 2**63 - 1))
def test_the_mask_depends_on_the_flat_position_only(n, p, seed):
    x = torch.arange(1, n + 1, dtype=torch.float32)
    longer = dropout(torch.cat([x, torch.ones(77)]), p, seed=seed)
    assert torch.equal(dropout(x, p, seed=seed), longer[:n])
    assert torch.equal(dropout_add(x, 2 * x, p, seed=seed), 2 * x + longer[:n])


def test_limits_of_p_and_evaluation_mode():
    x, residual = torch.randn(5, 6), torch.randn(5, 6)
    assert torch.equal(dropout(x, 0.0), x) and torch.equal(dropout(x, 0.5, training=False), x)
    assert not dropout(x, 1.0).any() and torch.equal(dropout_add(x, residual, 1.0), residual)
    assert torch.equal(dropout_add(x, residual, 0.5, training=False), residual + x)
    assert dropout(torch.empty(0, 3), 0.5).shape == (0, 3)


def test_strided_inputs_give_the_values_of_contiguous_ones():
    x = torch.randn(17, 9)
    assert torch.equal(dropout(x.t(), 0.3, seed=1), dropout(x.t().contiguous(), 0.3, seed=1))
    assert torch.equal(dropout_add(x.t(), x.t(), 0.3, seed=1), dropout_add(x.t().contiguous(), x.t(), 0.3, seed=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_is_kept_where_the_element_is_kept(dtype):
    kept = dropout(torch.ones(1000), 0.5, seed=1) != 0
    for nan in (math.nan, -math.nan, math.inf - math.inf):
        assert torch.equal(dropout(torch.full((1000,), nan, dtype=dtype), 0.5, seed=1).isnan(), kept)
    worst = torch.full((1000,), -1, dtype=torch.int16).view(torch.bfloat16).to(dtype)  # the NaN with all bits set
    assert torch.equal(dropout(worst, 0.5, seed=1).isnan(), kept)
    infinite = torch.full((1000,), math.inf, dtype=dtype)
    assert torch.equal(dropout_add(infinite, -infinite, 0.5, seed=1).isnan(), kept)


def test_gradients():
    x, residual = (torch.randn(3, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda x: dropout(x, 0.4, seed=5), x)
    assert torch.autograd.gradgradcheck(lambda x: dropout(x, 0.4, seed=5).square(), x)
    assert torch.autograd.gradcheck(lambda x, r: dropout_add(x, r, 0.4, seed=5), (x, residual))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_uses_the_mask_of_the_forward_pass(dtype):
    x, residual = (torch.ones(1000, dtype=dtype, requires_grad=True) for _ in range(2))
    out = dropout_add(x, residual, 0.3)
    out.sum().backward()
    assert torch.equal(x.grad, (out - 1).detach().where(x.grad == 0, x.grad))
    assert torch.equal(x.grad != 0, out.detach() != 1)
    assert torch.equal(residual.grad, torch.ones_like(residual))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(dtype):
    x, residual = (torch.randn(4, 9, dtype=dtype, requires_grad=True) for _ in range(2))
    seed = torch.tensor([3])
    torch.library.opcheck(torch.ops.pydiffseq.dropout.default, (x, 0.2, seed))
    torch.library.opcheck(torch.ops.pydiffseq.dropout_add.default, (x, residual, 0.2, seed))
    torch.library.opcheck(torch.ops.pydiffseq.dropout.default, (x.t(), 0.2, seed))


def test_compiled_function_gives_the_same_values():
    x = torch.randn(16, 8, requires_grad=True)

    def function(x):
        return dropout_add(dropout(x, 0.5, seed=1), x, 0.1, seed=2).square().sum()

    results = [(loss := f(x), *torch.autograd.grad(loss, x))
               for f in (function, torch.compile(function, fullgraph=True, backend="aot_eager"))]
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled)


def test_compiled_function_draws_a_new_mask_each_time():
    function = torch.compile(lambda x: dropout(x, 0.5), fullgraph=True, backend="aot_eager")
    assert not torch.equal(function(torch.ones(200)), function(torch.ones(200)))


@pytest.mark.parametrize("error, message, call", [
    (ValueError, "^p must be in 0..1, got 1.5", lambda x: dropout(x, 1.5)),
    (ValueError, "^p must be in 0..1, got nan", lambda x: dropout(x, math.nan)),
    (TypeError, "^x must be a floating-point tensor", lambda x: dropout(x.long(), 0.5)),
    (TypeError, "^residual must have the dtype of x", lambda x: dropout_add(x, x.double(), 0.5)),
    (ValueError, "^residual must have shape", lambda x: dropout_add(x, x[:1], 0.5)),
    (ValueError, "^residual is on meta", lambda x: dropout_add(x, x.to("meta"), 0.5)),
])
def test_bad_arguments_are_named(error, message, call):
    with pytest.raises(error, match=message):
        call(torch.randn(2, 3))
