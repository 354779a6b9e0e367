"""The linear layer for inference: as exact as torch's, fused or not, and each row by itself."""

import pytest
import torch
import torch.nn.functional as F
from instruction_sets import each_isa, kernel_only

from pydiffseq.ops import geglu
from pydiffseq.ops.linear import PackedLinear

DTYPES = [torch.float32, torch.bfloat16]


def error(found, expected):
    return float((found.double() - expected).abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "depth", "columns"), [
    (1, 1, 1), (3, 7, 5), (13, 32, 64), (40, 33, 31), (200, 64, 96), (25, 256, 130), (450, 96, 32)])
def test_error_is_at_most_twice_that_of_torch(dtype, rows, depth, columns):
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, depth).to(dtype), (torch.randn(columns, depth) * depth**-0.5).to(dtype)
    bias, residual = torch.randn(columns).to(dtype), torch.randn(rows, columns).to(dtype)
    for b, r in ((None, None), (bias, None), (bias, residual)):
        exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
        exact = exact if r is None else exact + r.double()
        theirs = F.linear(x, weight, b)
        allowed = 2 * error(theirs if r is None else theirs + r, exact) + 1e-6
        for isa in each_isa():
            found = PackedLinear(weight, b)(x, r)
            assert found.dtype == dtype and error(found, exact) <= allowed, isa


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "depth", "half"), [(1, 3, 1), (13, 32, 16), (30, 40, 37), (100, 64, 64)])
def test_geglu_follows_the_product(dtype, rows, depth, half):
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, depth).to(dtype), (torch.randn(2 * half, depth) * depth**-0.5).to(dtype)
    bias = torch.randn(2 * half).to(dtype)
    a, gate = F.linear(x.double(), weight.double(), bias.double()).chunk(2, -1)
    exact, theirs = a * F.gelu(gate), geglu(F.linear(x, weight, bias))
    for isa in each_isa():
        found = PackedLinear(weight, bias, geglu=True)(x)
        assert found.shape == (rows, half) and error(found, exact) <= 2 * error(theirs, exact) + 1e-6, isa


@kernel_only
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("geglu", [False, True])
@pytest.mark.parametrize(("depth", "columns"), [(64, 96), (200, 70), (1024, 256), (2080, 40)])
def test_a_row_comes_out_the_same_in_any_company(dtype, geglu, depth, columns):
    torch.manual_seed(0)
    x, layer = torch.randn(700, depth).to(dtype), None
    weight, bias = torch.randn(columns, depth).to(dtype), torch.randn(columns).to(dtype)
    threads = torch.get_num_threads()
    try:
        for isa in each_isa():
            layer = PackedLinear(weight, bias, geglu=geglu)
            whole = layer(x)
            for count in (1, 2, 5, 12, 13, 31, 32, 33, 100, 193, 385):
                torch.set_num_threads(1 + count % 2)
                assert torch.equal(layer(x[:count]), whole[:count]), (isa, count)
                assert torch.equal(layer(x[-count:]), whole[-count:]), (isa, count)
            assert torch.equal(layer(x.flip(0)), whole.flip(0))
    finally:
        torch.set_num_threads(threads)


def near_cancelling(x, weight):
    x[:, 1::2], weight[:, 1::2] = -x[:, ::2] * (1 + 1e-6 * weight[:1, ::2]), weight[:, ::2]
    return x, weight


DATA = {
    "positive": lambda x, w: (x.abs(), w.abs()),
    "large range": lambda x, w: (x * 10.0 ** (6 * x.roll(1, 1)), w * 10.0 ** (6 * w.roll(1, 1))),
    "near cancelling": near_cancelling,
    "subnormal and huge": lambda x, w: (x * 1e-40, w * 1e30),
    "tiny": lambda x, w: (x * 1e-20, w * 1e-17),
    "huge and tiny": lambda x, w: (x * 1e36, w * 1e-30),
    "full mantissas": lambda x, w: (x.sign() * (2 - 2.0**-23), w.sign() * (2 - 2.0**-23)),
}


@kernel_only
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("depth", [2, 64, 520])
def test_float32_is_as_exact_as_fused_multiply_adds(data, depth):
    """AMX multiplies floats as parts of bfloat16; nothing of them may be lost, whatever their size."""
    torch.manual_seed(depth)
    x, weight = DATA[data](torch.randn(45, depth), torch.randn(70, depth))
    exact = F.linear(x.double(), weight.double())
    errors = {isa: float((PackedLinear(weight)(x).double() - exact).square().mean().sqrt()) for isa in each_isa()}
    separate = errors.pop("baseline")   # rounds products, too
    assert all(error <= 1.5 * errors.get("avx2", separate) for error in errors.values()), errors


@kernel_only
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_what_is_not_finite_stays_in_its_row_and_column(bad):
    torch.manual_seed(0)
    x, weight = torch.randn(40, 70), torch.randn(50, 70)
    for isa in each_isa():
        clean = PackedLinear(weight)(x)
        rows, columns = x.clone(), weight.clone()
        rows[3, 69], rows[33, 0], columns[7, 5] = bad, bad, bad
        found, finite = PackedLinear(columns)(rows), torch.ones(40, 50, dtype=torch.bool)
        finite[3], finite[33], finite[:, 7] = False, False, False
        assert torch.equal(found.isfinite(), finite) and torch.equal(found[finite], clean[finite]), isa
        assert not PackedLinear(weight * 1e30)(x * 1e30).isfinite().any(), isa   # sums beyond the range


def test_it_keeps_the_weight_it_was_given():
    weight = torch.randn(4, 3)
    layer = PackedLinear(weight)
    before = layer(torch.ones(2, 3))
    weight.zero_()
    assert torch.equal(layer(torch.ones(2, 3)), before)


def test_other_dtypes_and_no_rows():
    weight = torch.randn(4, 3, dtype=torch.float64)
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    assert torch.equal(PackedLinear(weight)(x), F.linear(x, weight))
    assert PackedLinear(weight.float())(torch.empty(2, 0, 3)).shape == (2, 0, 4)
    for isa in each_isa():
        assert torch.equal(PackedLinear(torch.empty(4, 0), torch.ones(4))(torch.empty(3, 0)), torch.ones(3, 4)), isa


def test_bad_input():
    layer = PackedLinear(torch.ones(4, 3))
    with pytest.raises(ValueError, match=r"x must have shape \[..., 3\], got \[2, 4\]"):
        layer(torch.ones(2, 4))
    with pytest.raises(TypeError, match="dtype of the weight, torch.float32, got torch.bfloat16"):
        layer(torch.ones(2, 3).bfloat16())
    with pytest.raises(ValueError, match="residual must be"):
        layer(torch.ones(2, 3), torch.ones(2, 5))
    with pytest.raises(ValueError, match="even number of columns"):
        PackedLinear(torch.ones(3, 3), geglu=True)
    with pytest.raises(ValueError, match="weight must be"):
        PackedLinear(torch.ones(3, 3), torch.ones(4))
