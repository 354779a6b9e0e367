"""The nearest-row kernels, emulated: the ids of float64, for every shape of the tiles and everything that can overflow."""

import sys

import pytest
import torch

from pydiffseq.ops import _cuda, reference

nearest = sys.modules["pydiffseq.ops.nearest"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    monkeypatch.setattr(_cuda, "stream", lambda device: 0)
    monkeypatch.setattr(nearest, "_packed_tables", type(nearest._packed_tables)())


def points(rows, vocab, dim, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    table = torch.randn(vocab, dim, generator=g)
    near = table[torch.randint(vocab, (rows,), generator=g)] + 0.5 * torch.randn(rows, dim, generator=g)
    return near.to(dtype), table.to(dtype), torch.randn(vocab, generator=g).to(dtype)


def check(x, table, bias=None):
    for b, dot in ((None, False), (bias, True)):
        embeddings, ids = nearest._nearest_kernel(x, table, b, dot)
        assert torch.equal(ids, reference.nearest(x, table, b, dot)[0])
        assert torch.equal(embeddings.nan_to_num(7), table[ids].nan_to_num(7))
    return ids


def test_the_self_check_passes(install):
    for name, kernel, oracle in nearest._cuda_cases(CPU):
        assert _cuda._same(kernel(), oracle()), name


def test_the_order_of_the_warps_does_not_matter(every_order):
    check(*points(9, 140, 136))


@pytest.mark.parametrize("rows, vocab, dim", [(0, 9, 4), (1, 1, 1), (7, 41, 16), (127, 129, 33), (129, 127, 64),
                                              (130, 400, 96), (5, 140, 200), (3, 130, 1024)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matches_float64(install, rows, vocab, dim, dtype):
    check(*points(rows, vocab, dim, dtype))


@pytest.mark.parametrize("distinct", [1, 3, 40])
def test_more_ties_than_slots_go_to_the_lowest_id(install, distinct):
    x, table, bias = points(20, 400, 16)
    pick = torch.randint(distinct, (400,), generator=torch.Generator().manual_seed(1))
    check(x, table[pick], bias[pick])


def check_topk(x, table, bias, k):
    for b, dot in ((None, False), (bias, True)):
        scores, ids = nearest._topk_kernel(x, table, b, dot, k)
        want_scores, want = reference.nearest_topk(x, table, b, dot, k)
        assert torch.equal(ids, want)
        torch.testing.assert_close(scores, want_scores, rtol=2e-7, atol=0)
    return ids


@pytest.mark.parametrize("rows, vocab, dim, k", [(0, 9, 4, 2), (1, 1, 1, 1), (7, 41, 16, 5), (129, 1300, 33, 8),
                                                 (5, 140, 200, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_topk_matches_float64(install, rows, vocab, dim, k, dtype):
    check_topk(*points(rows, vocab, dim, dtype), k)


@pytest.mark.parametrize("distinct", [1, 3, 40])
def test_topk_ties_go_to_the_lowest_ids(every_order, distinct):
    x, table, bias = points(9, 400, 16)
    pick = torch.randint(distinct, (400,), generator=torch.Generator().manual_seed(1))
    check_topk(x, table[pick], bias[pick], 6)


def test_topk_of_what_is_not_finite_and_by_pieces(install, monkeypatch):
    monkeypatch.setattr(nearest, "_SLOTS_AT_ONCE", 1)
    x, table, bias = points(150, 300, 24)
    g = torch.Generator().manual_seed(3)
    for values in (x, table):
        values[torch.rand(values.shape, generator=g) < 0.01] = torch.nan
        values[torch.rand(values.shape, generator=g) < 0.01] = torch.inf
    x[140] = torch.nan
    assert check_topk(x, table, bias, 8)[140].tolist() == list(range(8))


def test_near_ties_and_clusters_far_from_the_origin(install):
    x, table, bias = points(30, 300, 40)
    table[1::2] = table[::2] + 1e-7
    check(x, table, bias)
    check(1e-3 * x + 100, 1e-3 * table + 100, bias)


def test_nan_infinity_and_magnitudes(install):
    x, table, bias = points(60, 300, 24)
    g = torch.Generator().manual_seed(3)
    sizes = torch.logspace(-40, 38, 300)[torch.randperm(300, generator=g)][:, None]
    check(x * torch.logspace(-40, 38, 60)[:, None], table * sizes, bias)
    check(x * 1e-38, table * 1e-38)
    for values in (x, table):
        values[torch.rand(values.shape, generator=g) < 0.01] = torch.nan
        values[torch.rand(values.shape, generator=g) < 0.01] = torch.inf
    bias[5], bias[6], bias[7] = torch.nan, -torch.inf, 3e38
    check(x, table, bias)
    check(x, torch.full_like(table, torch.nan), bias)


def test_the_error_bound_holds_and_is_used(install, monkeypatch):
    """Scores of the rounded factors differ from the exact ones by less than eps, yet often by more than nothing."""
    x, table, _ = points(200, 300, 64)
    packed, bias, norm, slack, centre, _ = nearest._pack_cuda(table, None, False)
    shifted = (x - centre).double()
    exact = shifted @ (table - centre).double().T - 0.5 * (table - centre).double().square().sum(-1)
    rough = (shifted.bfloat16().float() @ packed[:300, :64].float().T + bias[:300]).double()
    share = shifted.norm(dim=-1) * (1 / 256 + 1 / 65536 + nearest._sum_error(64))
    eps = share[:, None] * norm.repeat_interleave(128)[:300] + slack.repeat_interleave(128)[:300]
    errors = (rough - exact).abs() / eps
    assert 0.02 < errors.max() < 1.0


def test_packed_tables_are_kept_until_they_change(install, monkeypatch):
    x, table, _ = points(5, 50, 8)
    packs, pack = [], nearest._pack_cuda
    monkeypatch.setattr(nearest, "_pack_cuda", lambda *a: packs.append(1) or pack(*a))
    for _ in range(2):
        nearest._nearest_kernel(x, table, None, False)
    assert len(packs) == 1
    table.mul_(-1)
    ids = nearest._nearest_kernel(x, table, None, False)[1]
    assert torch.equal(ids, reference.nearest(x, table)[0]) and len(packs) == 2
    monkeypatch.setattr(_cuda, "capturing", lambda device: True)
    nearest._nearest_kernel(x, table, None, False)
    assert len(packs) == 3
