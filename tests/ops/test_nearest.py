import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pydiffseq.ops import linear_logsumexp, nearest, nearest_topk, reference

DTYPES = [torch.float32, torch.bfloat16]


def scores(x, table, bias, dot):
    x, table = x.double(), table.double()
    if dot:
        return x @ table.T + (0.0 if bias is None else bias.double())
    return -(x[:, None] - table).square().sum(-1)


def check_exact(x, table, bias=None):
    """The id is that of the float64 brute force; another one only if float64's own rounding cannot tell them apart."""
    for metric in ("l2", "dot"):
        b = bias if metric == "dot" else None
        ids, embeddings = nearest(x, table, b, metric=metric)
        want, _ = reference.nearest(x, table, b, metric == "dot")
        differ = (ids != want).nonzero()[:, 0]
        if len(differ):
            s = scores(x[differ], table, b, metric == "dot")
            got, best = s.gather(1, ids[differ, None]), s.gather(1, want[differ, None])
            size = x[differ].double().square().sum(-1) + table.double().square().sum(-1).max()
            assert (best - got).le(1e-14 * size[:, None]).all(), (metric, differ)
            assert (got < best).logical_or(ids[differ, None] > want[differ, None]).all()
        assert torch.equal(embeddings.nan_to_num(7), table[ids].nan_to_num(7))
    return ids


def points(rows, vocab, dim, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, dim, generator=g), torch.randn(vocab, dim, generator=g), torch.randn(vocab, generator=g), g


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocab", "dim"), [(1, 1, 1), (33, 3, 5), (50, 401, 80), (200, 1000, 64), (0, 9, 4),
                                                    (5, 129, 33), (13, 128, 200)])
def test_matches_float64(isa, dtype, rows, vocab, dim):
    x, table, bias, g = points(rows, vocab, dim)
    check_exact(x.to(dtype), table.to(dtype), bias.to(dtype))
    near = table[torch.randint(vocab, (rows,), generator=g)] + 0.3 * x
    check_exact(near.to(dtype), table.to(dtype), bias.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_near_ties(isa, dtype):
    x, table, bias, g = points(100, 600, 64)
    table[1::2] = table[::2] + 1e-7
    x = table[torch.randint(600, (100,), generator=g)] + 0.1 * x
    check_exact(x.to(dtype), table.to(dtype), bias.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distinct", [1, 3, 40])
def test_duplicates_go_to_the_lowest_id(isa, dtype, distinct):
    x, table, _, g = points(60, 500, 16)
    table = table[torch.randint(distinct, (500,), generator=g)].to(dtype)  # more ties than candidates are kept
    ids = check_exact(x.to(dtype), table)
    first = [next(v for v in range(500) if torch.equal(table[v], table[i])) for i in ids.tolist()]
    assert ids.tolist() == first


@pytest.mark.parametrize("dtype", DTYPES)
def test_clusters_far_from_the_origin(isa, dtype):
    x, table, bias, _ = points(80, 700, 32)
    check_exact((1e-3 * x + 100).to(dtype), (1e-3 * table + 100).to(dtype), bias.to(dtype))
    check_exact((x + 1000).to(dtype), (table + 1000).to(dtype), bias.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_and_magnitudes_from_denormal_to_overflow(isa, dtype):
    x, table, bias, g = points(60, 300, 24)
    zero_x, zero_table = x.clone(), table.clone()
    zero_x[::2], zero_table[150:] = 0, 0
    check_exact(zero_x.to(dtype), zero_table.to(dtype), bias.to(dtype))
    check_exact((x * 1e-38).to(dtype), (table * 1e-38).to(dtype))
    check_exact((x * 1e37).to(dtype), (table * 1e37).to(dtype))
    sizes = torch.logspace(-40, 38, 300)[torch.randperm(300, generator=g)][:, None]
    check_exact((x * torch.logspace(-40, 38, 60)[:, None]).to(dtype), (table * sizes).to(dtype), bias.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity(isa, dtype):
    x, table, bias, g = points(90, 400, 12)
    for values in (x, table):
        values[torch.rand(values.shape, generator=g) < 0.01] = torch.nan
        values[torch.rand(values.shape, generator=g) < 0.01] = torch.inf
    bias[5], bias[6], bias[7] = torch.nan, -torch.inf, 3e38
    x[0] = torch.nan
    check_exact(x.to(dtype), table.to(dtype), bias.to(dtype))
    assert nearest(x.to(dtype), table.to(dtype))[0][0] == 0
    assert nearest(x.to(dtype), torch.full_like(table, torch.nan).to(dtype))[0].eq(0).all()


def test_one_huge_row_does_not_spoil_the_bound(isa):
    x, table, bias, _ = points(50, 300, 16)
    table[17] *= 1e25
    check_exact(x, table, bias)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(0, 40), vocab=st.integers(1, 300), dim=st.integers(1, 70), dtype=st.sampled_from(DTYPES),
       scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e6]), grid=st.booleans(), seed=st.integers(0, 99))
def test_any_shape(rows, vocab, dim, dtype, scale, grid, seed):
    x, table, bias, _ = points(rows, vocab, dim, seed)
    if grid:  # many exact ties
        x, table, bias = x.round(), table.round(), bias.round()
    check_exact((x * scale).to(dtype), (table * scale).to(dtype), bias.to(dtype))


def test_threads_and_leading_dimensions():
    x, table, _, _ = points(500, 900, 32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(nearest(x.view(5, 4, 25, 32), table)[0])
    finally:
        torch.set_num_threads(before)
    assert results[0].shape == (5, 4, 25)
    assert all(torch.equal(results[0], other) for other in results[1:])
    assert torch.equal(results[0].flatten(), nearest(x, table.T.contiguous().T)[0])


def test_the_packed_table_follows_changes():
    x, table, _, _ = points(20, 50, 8)
    first = nearest(x, table)[0]
    assert torch.equal(first, nearest(x, table.detach())[0])
    with torch.no_grad():
        table.mul_(-1)
    assert torch.equal(nearest(x, table)[0], reference.nearest(x, table)[0])
    for seed in range(20):  # freed memory is handed out again
        other = points(20, 50, 8, seed)[1]
        assert torch.equal(nearest(x, other)[0], reference.nearest(x, other)[0])
        del other
    with torch.inference_mode():
        frozen = table + 0
        nearest(x, frozen)
        frozen.mul_(-1)
        assert torch.equal(nearest(x, frozen)[0], reference.nearest(x, frozen)[0])


def test_gradient_goes_to_the_chosen_rows_only():
    x, table, _, _ = points(30, 10, 4)
    x.requires_grad_(), table.requires_grad_()
    ids, embeddings = nearest(x, table)
    assert not ids.requires_grad
    grad = torch.randn(30, 4)
    grad_x, grad_table = torch.autograd.grad(embeddings, (x, table), grad, allow_unused=True)
    assert grad_x is None
    torch.testing.assert_close(grad_table, torch.zeros(10, 4).index_add(0, ids, grad))


def test_gradcheck():
    x, table, _, _ = points(5, 6, 3)
    table = table.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda e: nearest(x.double(), e)[1], (table,))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("dot", [False, True])
def test_opcheck(dtype, dot):
    x, table, bias, _ = points(5, 6, 4)
    torch.library.opcheck(torch.ops.pydiffseq.nearest, (
        x.to(dtype), table.to(dtype).requires_grad_(), bias.to(dtype) if dot else None, dot))


def test_compile_fullgraph():
    x, table, _, _ = points(12, 40, 8)
    ids, rows = torch.compile(lambda x, e: nearest(x * 2, e), fullgraph=True, backend="aot_eager")(x, table)
    want = nearest(x * 2, table)
    assert torch.equal(ids, want[0]) and torch.equal(rows, want[1])


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"x": torch.zeros(3, 2, dtype=torch.int64)}, TypeError, "x must be a floating-point"),
    ({"x": torch.zeros(3, 4)}, ValueError, r"x must have shape \[..., d\] and table \[V, d\], got \[3, 4\] and"),
    ({"table": torch.zeros(0, 2)}, ValueError, r"table must have at least one row"),
    ({"table": torch.zeros(5, 2).double()}, TypeError, "table must have the dtype of x"),
    ({"bias": torch.zeros(5)}, ValueError, "bias is only for metric='dot'"),
    ({"bias": torch.zeros(4), "metric": "dot"}, ValueError, r"bias must have shape \[5\], got \[4\]"),
    ({"metric": "cosine"}, ValueError, "metric must be 'l2' or 'dot', got 'cosine'"),
])
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        nearest(**{"x": torch.zeros(3, 2), "table": torch.zeros(5, 2), **change})


# --- The k best ---


def check_topk(x, table, bias, k):
    """The ids of a stable sort of the float64 scores; others only where float64's own rounding cannot tell them apart."""
    for metric in ("l2", "dot"):
        b = bias if metric == "dot" else None
        ids, values = nearest_topk(x, table, b, k=k, metric=metric)
        double = (t if t is None else t.double() for t in (x, table, b))
        want_values, want = reference.nearest_topk(*double, metric == "dot", k)
        assert ids.shape == values.shape == (*x.shape[:-1], k) and values.dtype == torch.float32
        differ = (ids != want).any(-1).nonzero()[:, 0]
        if len(differ):
            s = scores(x[differ], table, b, metric == "dot")
            got, best = s.gather(1, ids[differ]), s.gather(1, want[differ])
            size = x[differ].double().square().sum(-1) + table.double().square().sum(-1).max()
            assert (best - got).abs().le(1e-14 * size[:, None]).logical_or(best == got).all(), (metric, differ)
        torch.testing.assert_close(values, want_values.float(), rtol=1e-6, atol=0)
        assert all(len(set(row)) == k for row in ids.flatten(0, -2).tolist())
    return ids


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocab", "dim", "k"), [(1, 1, 1, 1), (33, 8, 5, 8), (50, 401, 80, 3), (100, 1000, 64, 16),
                                                          (0, 9, 4, 2), (13, 128, 200, 8)])
def test_topk_matches_float64(isa, dtype, rows, vocab, dim, k):
    x, table, bias, g = points(rows, vocab, dim)
    near = table[torch.randint(vocab, (rows,), generator=g)] + 0.3 * x
    check_topk(near.to(dtype), table.to(dtype), bias.to(dtype), k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distinct", [1, 3, 40])
def test_topk_ties_go_to_the_lowest_ids(isa, dtype, distinct):
    x, table, bias, g = points(40, 500, 16)
    pick = torch.randint(distinct, (500,), generator=g)
    check_topk(x.to(dtype), table[pick].to(dtype), bias[pick].to(dtype), 5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_topk_of_what_is_not_finite_is_defined(isa, dtype):
    x, table, bias, g = points(60, 300, 12)
    for values in (x, table):
        values[torch.rand(values.shape, generator=g) < 0.02] = torch.nan
        values[torch.rand(values.shape, generator=g) < 0.02] = torch.inf
    x[0] = torch.nan
    ids = check_topk(x.to(dtype), table.to(dtype), bias.to(dtype), 8)
    assert ids[0].tolist() == list(range(8))
    few = torch.full_like(table, torch.nan)
    few[77] = 1.0
    ids, values = nearest_topk(x[1:2].nan_to_num(0, 0).to(dtype), few.to(dtype), k=3)
    assert ids.tolist() == [[77, 0, 1]] and values[0, 1:].tolist() == [-torch.inf] * 2


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(0, 30), vocab=st.integers(1, 300), dim=st.integers(1, 70), k=st.integers(1, 16),
       dtype=st.sampled_from(DTYPES), scale=st.sampled_from([1e-30, 1.0, 1e6]), grid=st.booleans(), seed=st.integers(0, 99))
def test_topk_of_any_shape(rows, vocab, dim, k, dtype, scale, grid, seed):
    x, table, bias, _ = points(rows, vocab, dim, seed)
    if grid:
        x, table, bias = x.round(), table.round(), bias.round()
    check_topk((x * scale).to(dtype), (table * scale).to(dtype), bias.to(dtype), min(k, vocab))


def test_topk_begins_with_nearest_and_gives_probabilities():
    x, table, bias, _ = points(30, 200, 16)
    ids, values = nearest_topk(x.view(5, 6, 16), table, bias, k=4, metric="dot")
    assert torch.equal(ids[..., 0], nearest(x.view(5, 6, 16), table, bias, metric="dot")[0])
    probabilities = (values.view(30, 4) - linear_logsumexp(x, table, bias)[:, None]).exp()
    want = (x @ table.T + bias).softmax(-1).topk(4).values
    torch.testing.assert_close(probabilities, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64, torch.float16])
def test_topk_opcheck(dtype):
    x, table, bias, _ = points(5, 6, 4)
    torch.library.opcheck(torch.ops.pydiffseq.nearest_topk, (
        x.to(dtype), table.to(dtype).requires_grad_(), bias.to(dtype), True, 3))
    assert not nearest_topk(x.to(dtype), table.to(dtype).requires_grad_(), k=2)[1].requires_grad


@pytest.mark.parametrize("k", [0, 6, 17])
def test_topk_names_a_bad_k(k):
    with pytest.raises(ValueError, match=r"k must be in 1..5 \(rows of the table, at most 16\), got"):
        nearest_topk(torch.zeros(3, 2), torch.zeros(5, 2), k=k)
