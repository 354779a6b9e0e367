"""The attention kernels, emulated: against float64, on sizes and arguments at the edges of their tiles."""

import sys

import pytest
import torch

from pydiffseq.ops import _cuda, reference

attention = sys.modules["pydiffseq.ops.timestep_attention"]
packed = sys.modules["pydiffseq.ops.packed_timestep_attention"]
CPU = torch.device("cpu")
DTYPES = [torch.bfloat16, torch.float16]


def make(dtype, queries, keys, dim, *, batch=2, heads=2, tau="table", biases=True, masked=True, seed=0):
    """The op's tensors, ``q`` to ``key_mask``."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=g).to(dtype)

    q, k, v = randn(batch, queries, heads, dim), *(randn(batch, keys, heads, dim) for _ in range(2))
    time = {"table": (11, heads, dim), "direct": (batch, keys, heads, dim)}.get(tau)
    time = None if time is None else randn(*time)
    timesteps = torch.randint(0, 11, (batch, keys), generator=g) if tau == "table" else None
    u = randn(heads, dim) if biases else None
    w = randn(heads, dim) if biases and tau else None
    return q, k, v, time, u, w, timesteps, torch.rand(batch, keys, generator=g) < 0.7 if masked else None


def make_rotary(dtype, tokens, dim, *, batch=2, heads=2, table=False, masked=True, seed=0):
    q, k, v, tau, _, _, timesteps, mask = make(
        dtype, tokens, tokens, dim, batch=batch, heads=heads, tau="table" if table else "direct", masked=masked, seed=seed)
    return q, k, v, tau, None, None, timesteps, mask


def run(tensors, dropout_p=0.0, scale=0.2, seed=None, rotary=False):
    """Output, log-sum-exp and gradients by the kernels, by the reference on the same numbers, and in float64."""
    seed = torch.tensor([-3]) if seed is None else seed
    *tensors, timesteps, mask = tensors
    grad = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(9)).to(tensors[0].dtype)
    results = []
    for forward, backward, dtype in (
            (attention._forward_kernel, attention._backward_kernel, None),
            (reference.timestep_attention, reference.timestep_attention_backward, None),
            (reference.timestep_attention, reference.timestep_attention_backward, torch.float64)):
        cast = [None if x is None else x.to(dtype or x.dtype) for x in tensors]
        rest = (timesteps, mask, seed)
        out, lse = forward(*cast, *rest, dropout_p, scale, rotary)
        grads = backward(grad.to(dtype or grad.dtype), *cast, *rest, out, lse, dropout_p, scale, rotary)
        results.append([out, lse, *(g for g in grads if g is not None)])
    return results


def torch_errors(tensors, scale):
    """Relative errors of the output and the gradients of plain torch in the tensors' own precision."""
    *tensors, timesteps, mask = tensors
    results = []
    for dtype in (tensors[0].dtype, torch.float64):
        q, k, v, tau, u, w = (None if x is None else x.to(dtype).requires_grad_() for x in tensors)
        with torch.enable_grad():
            scores = torch.einsum("bihd,bjhd->bhij", q + u, k) + torch.einsum("bihd,bjhd->bhij", q + w, tau[timesteps])
            p = (scores * scale).masked_fill(~mask[:, None, None], -torch.inf).softmax(-1)
            out = torch.einsum("bhij,bjhd->bihd", p, v)
        grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(9)).to(tensors[0].dtype).to(dtype)
        results.append([out, *torch.autograd.grad(out, (q, k, v, tau, u, w), grad)])
    return [error(a, b) for a, b in zip(*results, strict=True)]


def error(a, b):
    return ((a.double() - b).norm() / b.norm().clamp_min(1e-12)).item()


def test_the_self_check_passes(install):
    for name, kernel, oracle, tolerance in list(attention._cuda_cases(CPU))[::3]:
        assert _cuda._same(kernel(), oracle(), tolerance), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries, keys, dim", [(7, 41, 32), (129, 127, 64)])
def test_error_is_at_most_twice_torchs(install, dtype, queries, keys, dim):
    tensors = make(dtype, queries, keys, dim)
    ours, _, exact = run(tensors)
    ours = [error(a, b) for a, b in zip(ours, exact, strict=True)]
    assert ours[1] < 1e-5  # the log-sum-exp is float32
    for our, theirs in zip([ours[0], *ours[2:]], torch_errors(tensors, 0.2), strict=True):
        assert our <= max(2 * theirs, 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("queries, keys, dim", [(1, 1, 16), (1, 129, 8), (65, 7, 24), (41, 64, 80), (64, 33, 128),
                                                (70, 66, 128), (129, 41, 64)])
@pytest.mark.parametrize("tau, biases, masked", [("table", True, True), ("direct", True, False), ("direct", False, True),
                                                 (None, True, True), (None, False, False)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_every_kind_of_argument(install, queries, keys, dim, tau, biases, masked, dropout_p):
    tensors = make(torch.float16, queries, keys, dim, batch=1, tau=tau, biases=biases, masked=masked, seed=queries)
    ours, _, exact = run(tensors, dropout_p)
    for a, b in zip(ours, exact, strict=True):
        finite = b.isfinite()  # the log-sum-exp of a query without keys is -inf
        assert torch.equal(a[~finite].double(), b[~finite])
        # absolute near zero: with one key the gradient of a score is a difference that is 0
        assert (a.double() - b)[finite].norm() <= 4e-3 * (b[finite].norm() + 0.05 * b.numel() ** 0.5)


@pytest.mark.parametrize("tokens, dim", [(1, 16), (7, 128), (41, 24), (64, 96), (65, 64), (129, 32), (70, 128)])
@pytest.mark.parametrize("table, masked, dropout_p", [(False, True, 0.0), (True, True, 0.3), (True, False, 0.0)])
def test_rotary(install, tokens, dim, table, masked, dropout_p):
    tensors = make_rotary(torch.float16, tokens, dim, batch=1, table=table, masked=masked, seed=tokens)
    ours, _, exact = run(tensors, dropout_p, rotary=True)
    for a, b in zip(ours, exact, strict=True):
        finite = b.isfinite()
        assert torch.equal(a[~finite].double(), b[~finite])
        assert (a.double() - b)[finite].norm() <= 4e-3 * (b[finite].norm() + 0.05 * b.numel() ** 0.5)


@pytest.mark.parametrize("tokens", [41, 70])
def test_rotary_where_a_sentence_is_masked_or_a_timestep_is_outside_the_table(install, tokens):
    tensors = make_rotary(torch.bfloat16, tokens, 32, table=True)
    tensors[-1][0] = False
    ours, _, exact = run(tensors, rotary=True)
    for a, b in zip((ours[0], *ours[2:5]), (exact[0], *exact[2:5]), strict=True):
        assert not a[0].any() and error(a[1], b[1]) < 2e-2
    tensors[-1][0] = True
    tensors[-2][1, 3], tensors[-1][1, 3] = 11, True
    out, _ = attention._forward_kernel(*tensors, None, 0.0, 0.2, True)
    assert out[0].isfinite().all() and out[1].isnan().all()


@pytest.mark.parametrize("queries, keys", [(40, 64), (64, 9), (70, 130)])
@pytest.mark.parametrize("rotary", [False, True])
def test_the_bits_are_the_same_in_every_order_of_the_warps(install, queries, keys, rotary):
    tensors = make_rotary(torch.bfloat16, keys, 32, batch=1) if rotary else make(torch.bfloat16, queries, keys, 32, batch=1)
    results = []
    for order in range(3):
        install.set_order(order)
        results.append(run(tensors, 0.2, rotary=rotary)[0])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_self_check_of_packed_sentences_passes(install):
    for name, kernel, oracle, tolerance in packed._cuda_cases(CPU):
        assert _cuda._same(kernel(), oracle(), tolerance), name


@pytest.mark.parametrize("queries, keys", [([5, 0, 64, 1], [9, 3, 64, 0]), ([70, 7], [65, 130])])
@pytest.mark.parametrize("tau, dropout_p", [("table", 0.3), ("direct", 0.0), (None, 0.0)])
def test_packed_sentences(install, queries, keys, tau, dropout_p):
    q, k, v, time, u, w, timesteps, _ = make(torch.float16, sum(queries), sum(keys), 32, batch=1, tau=tau, masked=False)
    time = time[0] if tau == "direct" else time
    timesteps = None if timesteps is None else timesteps[0]
    offsets, key_offsets = (torch.tensor([0, *lengths]).cumsum(0) for lengths in (queries, keys))
    results = []
    for forward, backward, dtype in (
            (packed._forward_kernel, packed._backward_kernel, torch.float16),
            (reference.packed_timestep_attention, reference.packed_timestep_attention_backward, torch.float64)):
        cast = [None if x is None else x.to(dtype) for x in (q[0], k[0], v[0], time, u, w)]
        rest = (offsets, key_offsets, timesteps, torch.tensor([-3]))
        last = (max(queries), max(keys), dropout_p, 0.2)
        out, lse = forward(*cast, *rest, *last)
        grad = torch.randn(q[0].shape, generator=torch.Generator().manual_seed(9)).half().to(dtype)
        results.append([out, lse, *backward(grad, *cast, *rest, out, lse, *last)])
    for a, b in zip(*results, strict=True):
        if b is None:
            assert a is None
            continue
        finite = b.isfinite()
        assert torch.equal(a[~finite].double(), b[~finite])
        assert (a.double() - b)[finite].norm() <= 4e-3 * (b[finite].norm() + 0.05 * b.numel() ** 0.5)


@pytest.mark.parametrize("queries", [50, 70])
def test_dropout_bits_are_those_of_the_cpu(install, queries):
    """With equal scores and v the identity, the output is the mask; the same bits in the backward pass."""
    keys, q = 64, torch.zeros(1, queries, 2, 64, dtype=torch.float16)
    v = torch.eye(keys, dtype=torch.float16)[None, :, None].expand(1, keys, 2, keys)
    keep = reference.attention_keep_mask(torch.tensor([-3]), 32768, 1, 2, queries, keys).transpose(1, 2)
    out, lse = attention._forward_kernel(q, v * 0, v, *[None] * 5, torch.tensor([-3]), 0.5, 1.0)
    assert torch.equal(out != 0, keep) and torch.equal(out[keep], torch.full_like(out[keep], 2 / keys))
    ones = torch.ones_like(q)  # then dv_j = sum over the queries of the kept probabilities
    _, _, grad_v, *_ = attention._backward_kernel(ones, q, v * 0, v, *[None] * 5, torch.tensor([-3]), out, lse, 0.5, 1.0)
    torch.testing.assert_close(grad_v[0, :, :, 0].float(), keep[0].sum(0).T * 2 / keys, rtol=2e-3, atol=0)


def test_masked_keys_are_not_read(install):
    *tensors, mask = make(torch.bfloat16, 9, 70, 32, batch=1)
    mask[0, 40:] = False
    clean = run([*tensors, mask], 0.1)[0]
    for x in tensors[1:3]:
        x[0, ~mask[0]] = torch.nan
    tensors[6][0, ~mask[0]] = 10**9
    rest = (*tensors, mask, torch.tensor([-3]))
    out, lse = attention._forward_kernel(*rest, 0.1, 0.2)
    assert torch.equal(out, clean[0]) and torch.equal(lse, clean[1])


def test_a_timestep_outside_the_table_is_nan_where_it_is_attended_to(install):
    q, k, v, tau, u, w, timesteps, _ = make(torch.bfloat16, 9, 20, 32, masked=False)
    timesteps[1, 3] = 11
    out, _ = attention._forward_kernel(q, k, v, tau, u, w, timesteps, None, None, 0.0, 0.2)
    assert out[0].isfinite().all() and out[1].isnan().all()


@pytest.mark.parametrize("batch, queries, keys", [(0, 3, 3), (2, 0, 3), (2, 3, 0)])
def test_empty(install, batch, queries, keys):
    tensors = make(torch.bfloat16, queries, keys, 32, batch=batch)
    ours, _, exact = run(tensors)
    for a, b in zip(ours, exact, strict=True):
        assert torch.equal(a.double(), b)


@pytest.mark.parametrize("queries", [64, 70])
def test_queries_without_keys(every_order, queries):
    """Nothing is walked over, and still a warp must not overtake the copies of another into its rows."""
    ours, _, exact = run(make(torch.bfloat16, queries, 0, 64, batch=1))
    assert torch.equal(ours[0].double(), exact[0]) and not ours[2].any()


@pytest.mark.parametrize("form", ["txl", "rotary", "packed"])
def test_slices_of_a_fused_projection_and_unaligned_tensors(install, form):
    fused = torch.randn(2, 33, 4, 2, 32).bfloat16()
    fused = fused.flatten(0, 1) if form == "packed" else fused
    shifted = torch.empty(fused.numel() + 1, dtype=torch.bfloat16)[1:].view(fused.shape).copy_(fused)
    results = []
    for parts in ([x.contiguous() for x in fused.unbind(-3)], fused.unbind(-3), shifted.unbind(-3)):
        if form == "packed":
            rest = (*parts, None, None, torch.tensor([0, 45, 66]), torch.tensor([0, 45, 66]), None, None)
            out, lse = packed._forward_kernel(*rest, 45, 45, 0.0, 0.2)
            grads = packed._backward_kernel(parts[0], *rest, out, lse, 45, 45, 0.0, 0.2)
        else:
            rest = (*parts, *[None] * 5)
            out, lse = attention._forward_kernel(*rest, 0.0, 0.2, form == "rotary")
            grads = attention._backward_kernel(parts[0], *rest, out, lse, 0.0, 0.2, form == "rotary")
        results.append([out, lse, *(g for g in grads if g is not None)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_gradients_of_a_fused_projection(install):
    *_, tau, u, w, timesteps, mask = make(torch.bfloat16, 70, 70, 32)
    g = torch.Generator().manual_seed(1)
    qkv, grad = (torch.randn(*shape, generator=g).bfloat16() for shape in ((2, 70, 3, 2, 32), (2, 70, 2, 32)))
    rest = (tau, u, w, timesteps, mask, torch.tensor([-3]))
    out, lse = attention._forward_kernel(*qkv.unbind(2), *rest, 0.1, 0.2)
    grad_qkv = torch.empty_like(qkv)
    others = attention.cuda_backward_into(grad_qkv.unbind(2), grad, *qkv.unbind(2), *rest, out, lse, 0.1, 0.2)
    expected = attention._backward_kernel(grad, *qkv.unbind(2), *rest, out, lse, 0.1, 0.2)
    assert torch.equal(grad_qkv, torch.stack(expected[:3], 2))
    assert all(torch.equal(a, b) for a, b in zip(others, expected[3:], strict=True))


def test_a_seed_on_the_device_is_the_same_key(install, monkeypatch):
    tensors = make(torch.bfloat16, 9, 20, 32)
    host = attention._forward_kernel(*tensors, torch.tensor([-3]), 0.3, 0.2)
    monkeypatch.setattr(_cuda, "key_arguments", lambda seed, device: (seed, True))
    device = attention._forward_kernel(*tensors, torch.tensor([-3]), 0.3, 0.2)
    assert torch.equal(host[0], device[0])


def test_an_unsupported_head_dimension_is_an_error_of_the_launch(install):
    q = torch.zeros(1, 2, 1, 136, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="timestep_attention: CUDA error: invalid argument"):
        attention._forward_kernel(q, q, q, *[None] * 6, 0.0, 0.2)
