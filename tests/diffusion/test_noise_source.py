"""Distributions made of normal noise."""

import math

import pytest
import torch

from pydiffseq.diffusion.noise import to_uniform, truncate_normal


def test_uniform():
    u = to_uniform(torch.randn(100_000, generator=torch.Generator().manual_seed(0)))
    assert u.min() >= 0 and u.max() < 1
    histogram = torch.histc(u, 10, 0, 1) / len(u)
    assert (histogram - 0.1).abs().max() < 0.005
    assert to_uniform(torch.tensor([-40.0, 0.0, 40.0])).tolist() == [0.0, 0.5, 1 - 2**-24]


@pytest.mark.parametrize("limit", [0.5, 1.0, 2.0])
def test_truncated_normals_are_those_of_drawing_again(limit):
    """Quantiles against rejection sampling; the order of the noise is kept, and a wide limit changes nothing."""
    z = torch.randn(200_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = truncate_normal(z, limit)
    assert found.abs().max() <= limit and torch.equal(found.argsort(), z.argsort())
    rejected = z[z.abs() <= limit]
    levels = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    torch.testing.assert_close(found.quantile(levels), rejected.quantile(levels), rtol=0, atol=0.01)
    torch.testing.assert_close(truncate_normal(z, 12.0), z, rtol=1e-6, atol=1e-6)
    assert math.isfinite(float(truncate_normal(torch.tensor([9.0]), limit)))
