"""The rotary form: rotary_timestep_attention and rotary_timestep_self_attention."""

import pytest
import torch
from instruction_sets import each_isa, kernel_only

from pydiffseq.ops import rotary_timestep_attention, rotary_timestep_self_attention

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def make(batch=2, tokens=9, heads=2, dim=16, table=False, masked=False, dtype=torch.float32):
    """(qkv, rotation) as leaves and the other arguments by name."""
    g = torch.Generator().manual_seed(2)
    qkv = torch.randn(batch, tokens, 3, heads, dim, generator=g, dtype=torch.float64)
    rotation = torch.randn((11, heads, dim) if table else (batch, tokens, heads, dim), generator=g, dtype=torch.float64)
    timesteps = torch.randint(0, 11, (batch, tokens), generator=g) if table else None
    key_mask = torch.rand(batch, tokens, generator=g) < 0.7 if masked else None
    if masked:
        key_mask[1] = False
    return ([x.to(dtype).requires_grad_() for x in (qkv, rotation)], {"timesteps": timesteps, "key_mask": key_mask})


def by_definition(qkv, rotation, timesteps=None, key_mask=None):
    """Each pair (x1, x2) of q, k and v becomes (x1 c - x2 s, x2 c + x1 s); then plain attention."""
    half = qkv.shape[-1] // 2
    cos, sin = (rotation if timesteps is None else rotation[timesteps])[:, :, None].split(half, -1)
    turned = torch.empty_like(qkv)
    turned[..., ::2] = qkv[..., ::2] * cos - qkv[..., 1::2] * sin
    turned[..., 1::2] = qkv[..., 1::2] * cos + qkv[..., ::2] * sin
    q, k, v = (x.transpose(1, 2) for x in turned.unbind(2))
    scores = q @ k.transpose(-1, -2) * qkv.shape[-1] ** -0.5
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None], -torch.inf)
    return (scores.softmax(-1).nan_to_num(0.0) @ v).transpose(1, 2)


def of_parts(qkv, rotation, **options):
    return rotary_timestep_attention(*qkv.unbind(2), rotation, **options)


def outputs_and_grads(attend, leaves, **options):
    out = attend(*leaves, **options)
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [out.detach(), *(x.nan_to_num(0.0) for x in torch.autograd.grad(out, leaves, g.to(out.dtype)))]


def error(a, b):
    return ((a.double() - b).norm() / b.norm().clamp_min(1e-12)).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens,dim", [(1, 2), (7, 16), (41, 20), (130, 64), (18, 70)])
@pytest.mark.parametrize("table,masked", [(False, False), (True, True)])
def test_output_and_gradients_are_those_of_the_definition(dtype, tokens, dim, table, masked):
    leaves, options = make(tokens=tokens, dim=dim, table=table, masked=masked, dtype=dtype)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    truth = outputs_and_grads(by_definition, wide, **options)
    tolerance = {torch.float32: 3e-6, torch.bfloat16: 3 * torch.finfo(torch.bfloat16).eps, torch.float64: 1e-12}[dtype]
    for isa in each_isa():
        results = [outputs_and_grads(attend, leaves, **options) for attend in (rotary_timestep_self_attention, of_parts)]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), isa
        for ours, exact in zip(results[0], truth, strict=True):
            assert ours.dtype == dtype and error(ours, exact) < tolerance, isa


@kernel_only
@pytest.mark.parametrize("table", [False, True])
def test_dropout_is_that_of_the_float64_reference(table):
    leaves, options = make(tokens=41, dim=20, table=table)
    options |= {"dropout_p": 0.3, "seed": -5}
    wide = [x.detach().double().requires_grad_() for x in leaves]
    exact = outputs_and_grads(rotary_timestep_self_attention, wide, **options)
    for isa in each_isa():
        for ours, truth in zip(outputs_and_grads(rotary_timestep_self_attention, leaves, **options), exact, strict=True):
            assert error(ours, truth) < 5e-6, isa


@kernel_only
def test_error_against_float64_is_at_most_twice_torchs():
    leaves, _ = make(tokens=129, dim=64)
    truth = outputs_and_grads(by_definition, [x.detach().double().requires_grad_() for x in leaves])
    torchs = outputs_and_grads(by_definition, leaves)
    for isa in each_isa():
        results = outputs_and_grads(rotary_timestep_self_attention, leaves)
        for ours, theirs, exact in zip(results, torchs, truth, strict=True):
            assert error(ours, exact) <= 2 * error(theirs, exact), isa


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("attend", [rotary_timestep_self_attention, of_parts])
def test_gradcheck(table, attend):
    leaves, options = make(tokens=5, dim=4, table=table, masked=True, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *x: attend(*x, **options, dropout_p=0.4, seed=7), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("table", [False, True])
def test_opcheck(table, dtype):
    (qkv, rotation), options = make(table=table, masked=True, dtype=dtype)
    rest = None, None, options["timesteps"], options["key_mask"], torch.tensor([3]), 0.2, 0.25, True
    for name, inputs in (("timestep_attention", qkv.detach().unbind(2)), ("timestep_self_attention", (qkv.detach(),))):
        forward, backward = (getattr(torch.ops.pydiffseq, name + part).default for part in ("", "_backward"))
        leaves = [x.clone().requires_grad_() for x in inputs]
        torch.library.opcheck(forward, (*leaves, rotation, *rest))
        detached = (*inputs, rotation.detach(), *rest[:5])
        out, lse = forward(*detached, *rest[5:])
        torch.library.opcheck(backward, (torch.randn_like(out), *detached, out, lse, *rest[5:]))


def test_compiles_as_one_graph(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # graphs of other versions of the ops lie in the usual one
    leaves, options = make(table=True, masked=True)

    def attend(*inputs):
        return rotary_timestep_self_attention(*inputs, **options) * 2

    for a, b in zip(*(outputs_and_grads(f, leaves) for f in (torch.compile(attend, fullgraph=True), attend)), strict=True):
        torch.testing.assert_close(a, b)


def test_takes_slices_at_odd_offsets():
    wide = torch.randn(2, 5, 2, 17, generator=torch.Generator().manual_seed(4))
    odd, even = wide[..., 1:], wide[..., 1:].contiguous()
    assert torch.equal(rotary_timestep_attention(odd, odd, odd, odd), rotary_timestep_attention(even, even, even, even))


def test_wrong_arguments_are_named():
    q = torch.zeros(2, 9, 2, 16)
    with pytest.raises(ValueError, match="rotation must have the shape of q"):
        rotary_timestep_attention(q, q, q, q[:1])
    with pytest.raises(ValueError, match="even D"):
        rotary_timestep_attention(*(q[..., :15],) * 4)
    with pytest.raises(TypeError, match="rotation must have the dtype of q"):
        rotary_timestep_attention(q, q, q, q.double())
    with pytest.raises(ValueError, match="k and v must have the shape of q"):
        rotary_timestep_attention(q, q[:, :3], q[:, :3], q)
    with pytest.raises(ValueError, match=r"rotation with timesteps must be a table of shape \[R, 2, 16\]"):
        rotary_timestep_attention(q, q, q, q, timesteps=torch.zeros(2, 9, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"timesteps must be in 0..2 \(rows of tau\), got 3"):
        rotary_timestep_attention(q, q, q, q[0, :3], timesteps=torch.full((2, 9), 3))
    with pytest.raises(ValueError, match=r"qkv must have shape \[B, N, 3, H, D\]"):
        rotary_timestep_self_attention(q, q)
