"""The ops inside ``torch.autocast``, where linear layers give bfloat16 beside float32 parameters and residuals."""

import pytest
import torch

from pydiffseq import ops
from pydiffseq.ops import reference


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def attention(low):
    q, k, v, tau = (normal(2, 5, 3, 16 + 0 * i, dtype=low) for i in range(4))
    return ops.timestep_attention(q, k, v, tau, normal(3, 16), normal(3, 16))


def rotary(low):
    return ops.rotary_timestep_attention(*(normal(2, 5, 3, 16, dtype=low) for _ in range(3)), normal(2, 5, 3, 16))


def cross_entropy(low):
    return ops.linear_cross_entropy(normal(7, 16, dtype=low), normal(11, 16), normal(11), torch.arange(7))


def nearest(low):
    return ops.nearest(normal(7, 16, dtype=low), normal(11, 16))[1]


def dropout_add(low):
    return ops.dropout_add(normal(7, 16, dtype=low), normal(7, 16), 0.5, seed=3)


def sampler_step(low):
    return ops.sampler_step(normal(2, 3, 8, dtype=low), normal(2, 3, 8), 0.3, 0.7, 0.1, seed=3)


LOWERED = [attention, rotary]
WIDENED = [cross_entropy, nearest, dropout_add, sampler_step]   # the loss of the bfloat16 op is float32 anyway


@pytest.mark.parametrize("op", LOWERED + WIDENED, ids=lambda op: op.__name__)
def test_mixed_dtypes_are_accepted_inside_autocast_only(op):
    exact = op(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        result = op(torch.bfloat16)
    assert result.dtype == (torch.bfloat16 if op in LOWERED else torch.float32)
    assert torch.allclose(result.float(), exact, rtol=0.05, atol=0.05)
    with pytest.raises(TypeError, match="dtype"):
        op(torch.bfloat16)


def test_float64_stays_float64():
    with torch.autocast("cpu", torch.bfloat16):
        assert attention_of_float64().dtype == torch.float64


def attention_of_float64():
    return ops.timestep_attention(*(normal(2, 5, 3, 16, dtype=torch.float64) for _ in range(3)))


def test_gradients_reach_float32_parameters():
    table = normal(11, 16).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        ops.linear_cross_entropy(normal(7, 16, dtype=torch.bfloat16), table, None, torch.arange(7)).sum().backward()
    exact = normal(11, 16).requires_grad_()
    ops.linear_cross_entropy(normal(7, 16), exact, None, torch.arange(7)).sum().backward()
    assert table.grad.dtype == torch.float32
    assert torch.allclose(table.grad, exact.grad, rtol=0.05, atol=0.05)


def test_the_reference_computes_in_float32_inside_autocast():
    """It runs where there is no kernel, on inputs that the op has cast already."""
    q, k, v = (normal(2, 5, 3, 16, dtype=torch.float32) for _ in range(3))
    arguments = (q, k, v, *[None] * 6, 0.0, 0.25)
    expected = reference.timestep_attention(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        inside = reference.timestep_attention(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(inside, expected, strict=True))
