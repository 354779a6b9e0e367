"""The nearest-row search on a GPU: the ids of float64."""

import sys
import warnings

import pytest
import torch

from pydiffseq.ops import _cuda, nearest, nearest_topk, reference

pytestmark = pytest.mark.skipif(not (torch.cuda.is_available() and _cuda.compiled()),
                                reason="needs a GPU and the CUDA kernels")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
module = sys.modules["pydiffseq.ops.nearest"]


@pytest.fixture(scope="module", autouse=True)
def self_check_passes():
    """Without this the tests would compare the reference with itself."""
    device = torch.device("cuda", torch.cuda.current_device())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _cuda.trusted("nearest", device, module._cuda_cases)


def points(rows, vocab, dim, dtype=torch.float32, spread=0.5):
    g = torch.Generator().manual_seed(rows + vocab + dim)
    table = torch.randn(vocab, dim, generator=g)
    near = table[torch.randint(vocab, (rows,), generator=g)] + spread * torch.randn(rows, dim, generator=g)
    return (t.to("cuda", dtype) for t in (near, table, torch.randn(vocab, generator=g)))


def check(x, table, bias=None):
    """The ids of the float64 brute force; others only where float64's own rounding cannot tell them apart."""
    for b, metric in ((None, "l2"), (bias, "dot")):
        ids, embeddings = nearest(x, table, b, metric=metric)
        want, _ = reference.nearest(x, table, b, metric == "dot")
        differ = (ids != want).nonzero()[:, 0]
        if len(differ):
            rows = x[differ].double()
            scores = rows @ table.double().T + (0 if b is None else b.double())
            if metric == "l2":
                scores = -(rows[:, None] - table.double()).square().sum(-1)
            got, best = (scores.gather(1, i[differ, None]) for i in (ids, want))
            assert ((best - got).abs() <= 1e-13 * (1 + scores.abs().amax(1, keepdim=True))).all()
        assert torch.equal(embeddings.nan_to_num(7), table[ids].nan_to_num(7))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, vocab, dim", [(0, 9, 4), (1, 1, 1), (7, 41, 16), (127, 129, 33), (129, 127, 64),
                                              (300, 3000, 128), (300, 1000, 200), (60, 700, 768), (30, 300, 1024)])
def test_matches_float64(dtype, rows, vocab, dim):
    check(*points(rows, vocab, dim, dtype))
    check(*points(rows, vocab, dim, dtype, spread=5.0))


def test_a_large_vocabulary_and_many_rows():
    x, table, _ = points(20_000, 262_144, 64)
    ids, _ = nearest(x, table)
    sample = torch.arange(0, 20_000, 200, device="cuda")
    assert torch.equal(ids[sample], reference.nearest(x[sample], table)[0])


@pytest.mark.parametrize("distinct", [1, 3, 40])
def test_more_ties_than_slots_go_to_the_lowest_id(distinct):
    x, table, bias = points(200, 3000, 16)
    pick = torch.randint(distinct, (3000,), generator=torch.Generator().manual_seed(1)).cuda()
    check(x, table[pick], bias[pick])


def test_near_ties_clusters_and_values_that_the_product_cannot_take():
    x, table, bias = points(100, 700, 40)
    table[1::2] = table[::2] + 1e-7
    check(x, table, bias)
    check(1e-3 * x + 100, 1e-3 * table + 100, bias)
    sizes = torch.logspace(-40, 38, 700, device="cuda")[torch.randperm(700, device="cuda")][:, None]
    check(x * torch.logspace(-40, 38, 100, device="cuda")[:, None], table * sizes)
    for values in (x, table):
        values[torch.rand_like(values) < 0.01] = torch.nan
        values[torch.rand_like(values) < 0.01] = torch.inf
    check(x, table, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, vocab, dim, k", [(0, 9, 4, 2), (1, 1, 1, 1), (7, 41, 16, 5), (129, 127, 64, 16),
                                                 (300, 30_522, 128, 8), (20_000, 3000, 64, 4)])
def test_topk_matches_float64(dtype, rows, vocab, dim, k):
    x, table, bias = points(rows, vocab, dim, dtype)
    for b, metric in ((None, "l2"), (bias, "dot")):
        ids, scores = nearest_topk(x, table, b, k=k, metric=metric)
        want_scores, want = reference.nearest_topk(x, table, b, metric == "dot", k)
        assert (ids != want).any(-1).sum() <= rows / 1000  # float64's own rounding
        torch.testing.assert_close(scores, want_scores, rtol=1e-6, atol=1e-6)


def test_topk_of_ties_and_nan():
    x, table, _ = points(200, 3000, 16)
    table = table[torch.randint(3, (3000,), generator=torch.Generator().manual_seed(1)).cuda()]
    x[7] = torch.nan
    ids, _ = nearest_topk(x, table, k=6)
    assert torch.equal(ids, reference.nearest_topk(x, table, None, False, 6)[1]) and ids[7].tolist() == list(range(6))


def test_a_graph_follows_its_inputs_and_the_table():
    x, table, _ = points(50, 700, 64)
    nearest(x, table)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids, _ = nearest(x, table)
    for change in (lambda: x.mul_(0.5), lambda: table.mul_(-1)):
        change()
        graph.replay()
        assert torch.equal(ids, reference.nearest(x, table)[0])


def test_a_graph_of_the_k_best_follows_its_inputs():
    x, table, bias = points(50, 700, 64)
    nearest_topk(x, table, bias, k=5, metric="dot")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids, scores = nearest_topk(x, table, bias, k=5, metric="dot")
    for change in (lambda: x.mul_(0.5), lambda: table.mul_(-1)):
        change()
        graph.replay()
        want_scores, want = reference.nearest_topk(x, table, bias, True, 5)
        assert torch.equal(ids, want)
        torch.testing.assert_close(scores, want_scores, rtol=1e-6, atol=1e-6)


def test_the_packed_table_follows_changes_and_streams():
    x, table, _ = points(50, 700, 64)
    for _ in range(3):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            assert torch.equal(nearest(x, table)[0], reference.nearest(x, table)[0])
        torch.cuda.current_stream().wait_stream(side)
        table.mul_(-1)
        assert torch.equal(nearest(x, table)[0], reference.nearest(x, table)[0])


def test_opcheck_and_strides():
    x, table, bias = points(9, 50, 24)
    torch.library.opcheck(torch.ops.pydiffseq.nearest, (x, table.requires_grad_(), bias, True))
    assert torch.equal(nearest(x.T.contiguous().T, table)[0], nearest(x, table)[0])


def test_no_buffer_of_the_size_of_the_scores():
    x, table, _ = points(8192, 30_522, 64)
    nearest(x, table)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    nearest(x, table)
    assert torch.cuda.max_memory_allocated() - before < 8192 * 30_522 * 4 / 20
