"""Timestep attention on a GPU: against float64, the CPU's dropout bits, graphs, streams, strides."""

import functools
import sys
import warnings

import pytest
import torch

from pydiffseq.ops import (
    _cuda,
    packed_timestep_attention,
    reference,
    rotary_timestep_attention,
    timestep_attention,
    timestep_self_attention,
)

pytestmark = pytest.mark.skipif(not (torch.cuda.is_available() and _cuda.compiled()),
                                reason="needs a GPU and the CUDA kernels")
DTYPES = [torch.bfloat16, torch.float16]
attention = sys.modules["pydiffseq.ops.timestep_attention"]


@pytest.fixture(scope="module", autouse=True)
def self_check_passes():
    """Without this the tests would compare the reference with itself."""
    device = torch.device("cuda", torch.cuda.current_device())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _cuda.trusted("timestep_attention", device, attention._cuda_cases)


def make(dtype, queries, keys, dim, batch=2, heads=3, tau="table", masked=True):
    g = torch.Generator().manual_seed(queries * 1000 + keys + dim)

    def randn(*shape):
        return torch.randn(shape, generator=g).to("cuda", dtype)

    x = {"q": randn(batch, queries, heads, dim), "k": randn(batch, keys, heads, dim), "v": randn(batch, keys, heads, dim)}
    x["tau"] = randn(11, heads, dim) if tau == "table" else randn(batch, keys, heads, dim)
    x |= {"u": randn(heads, dim), "w": randn(heads, dim)}
    timesteps = torch.randint(0, 11, (batch, keys), generator=g).cuda() if tau == "table" else None
    mask = (torch.rand(batch, keys, generator=g) < 0.8).cuda() if masked else None
    return x, {"timesteps": timesteps, "key_mask": mask}


def outputs_and_grads(attend, x, dtype=None):
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in x.values()]
    out = attend(*leaves)
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to("cuda", x["q"].dtype).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, g)]


def literal(q, k, v, tau, u, w, *, timesteps=None, key_mask=None):
    tau = tau if timesteps is None else tau[timesteps]
    scores = torch.einsum("bihd,bjhd->bhij", q + u, k) + torch.einsum("bihd,bjhd->bhij", q + w, tau)
    scores = scores * q.shape[-1] ** -0.5
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None], -torch.inf)
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1).nan_to_num(0.0), v)


def error(a, b):
    return ((a.double() - b).norm() / b.norm().clamp_min(1e-12)).item()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
@pytest.mark.parametrize("queries, keys", [(1, 1), (7, 41), (41, 7), (64, 64), (127, 129), (513, 300)])
@pytest.mark.parametrize("dim", [16, 32, 40, 64, 96, 128])
@pytest.mark.parametrize("tau", ["table", "direct"])
def test_error_against_float64_is_at_most_twice_torchs(dtype, queries, keys, dim, tau):
    x, options = make(dtype, queries, keys, dim, tau=tau, masked=keys > 7)
    exact = outputs_and_grads(lambda *a: literal(*a, **options), x, torch.float64)
    torchs = outputs_and_grads(lambda *a: literal(*a, **options), x)
    ours = outputs_and_grads(lambda *a: timestep_attention(*a, **options), x)
    for our, theirs, truth in zip(ours, torchs, exact, strict=True):
        small = (our.double() - truth).norm() <= 4 * torch.finfo(dtype).eps * truth.numel() ** 0.5
        assert small or error(our, truth) <= max(2 * error(theirs, truth), 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", [1024, 4096])
def test_long_sentences(dtype, keys):
    x, options = make(dtype, 129, keys, 64, batch=1, heads=1)
    exact = outputs_and_grads(lambda *a: literal(*a, **options), x, torch.float64)
    torchs = outputs_and_grads(lambda *a: literal(*a, **options), x)
    ours = outputs_and_grads(lambda *a: timestep_attention(*a, **options), x)
    for our, theirs, truth in zip(ours, torchs, exact, strict=True):
        assert error(our, truth) <= max(2 * error(theirs, truth), 4 * torch.finfo(dtype).eps)


def rotary_literal(q, k, v, rotation, timesteps, key_mask):
    rotation = rotation if timesteps is None else rotation[timesteps]
    q, k, v = (reference.rotate_pairs(x, rotation).transpose(1, 2) for x in (q, k, v))
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~key_mask[:, None, None], -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
@pytest.mark.parametrize("tokens", [1, 7, 41, 64, 127, 300])
@pytest.mark.parametrize("dim", [16, 32, 64, 96, 128])
@pytest.mark.parametrize("tau", ["table", "direct"])
def test_rotary_error_against_float64_is_at_most_twice_torchs(dtype, tokens, dim, tau):
    x, options = make(dtype, tokens, tokens, dim, tau=tau)
    options["key_mask"][:, 0] = True
    del x["u"], x["w"]

    def ours(*a):
        return rotary_timestep_attention(*a, **options)

    exact = outputs_and_grads(lambda *a: rotary_literal(*a, **options), x, torch.float64)
    torchs = outputs_and_grads(lambda *a: rotary_literal(*a, **options), x)
    for our, theirs, truth in zip(outputs_and_grads(ours, x), torchs, exact, strict=True):
        small = (our.double() - truth).norm() <= 4 * torch.finfo(dtype).eps * truth.numel() ** 0.5
        assert small or error(our, truth) <= max(2 * error(theirs, truth), 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
@pytest.mark.parametrize("lengths", [[50, 7, 64, 1], [300, 0, 41]])
def test_packed_sentences_are_the_padded_ones(dtype, lengths):
    x, options = make(dtype, max(lengths), max(lengths), 64, batch=len(lengths))
    mask = torch.arange(max(lengths), device="cuda") < torch.tensor(lengths, device="cuda")[:, None]
    tensors = [x[name][mask] if name in "qkv" else x[name] for name in x]
    offsets = torch.tensor([0, *lengths], device="cuda").cumsum(0)
    results = []
    for attend, inputs, rest in (
            (timestep_attention, [*x.values()], {"timesteps": options["timesteps"], "key_mask": mask}),
            (packed_timestep_attention, tensors, {"timesteps": options["timesteps"][mask], "offsets": offsets})):
        leaves = [t.detach().requires_grad_() for t in inputs]
        out = attend(*leaves, **rest, dropout_p=0.2, seed=5)
        kept = out[mask] if out.dim() == 4 else out
        grads = torch.autograd.grad(kept.float().square().sum(), leaves)
        results.append([kept, *(g[mask] if g.dim() == 4 else g for g in grads)])
    for padded, packed in zip(*results, strict=True):
        assert error(packed, padded.double()) <= 4 * torch.finfo(dtype).eps


def recorded(step):
    """A CUDA graph of ``step``, and the tensors that its replays write."""
    step()  # the self-check waits for the device
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


@pytest.mark.parametrize("tokens", [50, 90])
@pytest.mark.parametrize("packed", [False, True])
def test_a_graph_of_the_other_forms(tokens, packed):
    x, options = make(torch.bfloat16, tokens, tokens, 64, masked=False)
    seed, offsets = torch.tensor([5], device="cuda"), torch.tensor([0, tokens - 9, 2 * tokens], device="cuda")
    leaves = [(x[n].flatten(0, 1) if packed and n in "qkv" else x[n]).requires_grad_() for n in ("q", "k", "v", "tau")]

    def step():
        if packed:
            out = packed_timestep_attention(*leaves, timesteps=options["timesteps"].flatten(), offsets=offsets,
                                            longest=tokens + 9, dropout_p=0.3, seed=seed)
        else:
            out = rotary_timestep_attention(*leaves, timesteps=options["timesteps"], dropout_p=0.3, seed=seed)
        return out, *torch.autograd.grad(out.float().square().sum(), leaves)

    graph, results = recorded(step)
    for value in (5, 6):
        seed.fill_(value)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(results, step(), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_bits_are_those_of_the_cpu_in_both_directions(dtype):
    keys, q = 64, torch.zeros(1, 130, 2, 64, dtype=dtype, device="cuda", requires_grad=True)
    v = torch.eye(keys, dtype=dtype, device="cuda")[None, :, None].expand(1, keys, 2, keys).clone().requires_grad_()
    keep = reference.attention_keep_mask(torch.tensor([-3]), 32768, 1, 2, 130, keys, "cuda").transpose(1, 2)
    for seed in (-3, torch.tensor([-3], device="cuda")):
        out = timestep_attention(q, torch.zeros_like(v), v, dropout_p=0.5, seed=seed)
        assert torch.equal(out != 0, keep)
        grad_v, = torch.autograd.grad(out.sum(), v)
        torch.testing.assert_close(grad_v[0, :, :, 0].float(), keep[0].sum(0).T * 2 / keys, rtol=1e-2, atol=0)


def test_the_same_bits_every_time_also_for_a_table():
    x, options = make(torch.bfloat16, 300, 300, 64, batch=8)
    runs = [outputs_and_grads(lambda *a: timestep_attention(*a, **options, dropout_p=0.1, seed=4), x) for _ in range(3)]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_fully_masked_sentences_and_unread_padding():
    x, options = make(torch.bfloat16, 33, 90, 64)
    options["key_mask"][0] = False
    options["key_mask"][1, 50:] = False
    first = timestep_attention(*x.values(), **options)
    assert torch.equal(first[0], torch.zeros_like(first[0])) and first.isfinite().all()
    x["k"][1, 50:] = torch.nan
    x["v"][1, 50:] = torch.nan
    assert torch.equal(first, timestep_attention(*x.values(), **options))


def test_a_timestep_outside_the_table_is_nan_where_it_is_attended_to():
    x, options = make(torch.bfloat16, 9, 20, 32, masked=False)
    options["timesteps"][1, 3] = 11
    out = timestep_attention(*x.values(), **options)
    assert out[0].isfinite().all() and out[1].isnan().all()


def assert_empty(attend, x):
    for ours, like in zip(outputs_and_grads(attend, x), (x["q"], *x.values()), strict=True):
        assert ours.shape == like.shape and not ours.any()


@pytest.mark.parametrize("batch, queries, keys", [(0, 3, 3), (2, 0, 3), (2, 3, 0), (2, 64, 0), (2, 130, 0)])
def test_empty(batch, queries, keys):
    x, options = make(torch.bfloat16, queries, keys, 32, batch=batch)
    assert_empty(lambda *a: timestep_attention(*a, **options), x)
    offsets, key_offsets = (torch.arange(batch + 1, device="cuda") * tokens for tokens in (queries, keys))
    packed = {name: t.flatten(0, 1) if name in "qkv" else t for name, t in x.items()}
    assert_empty(lambda *a: packed_timestep_attention(*a, offsets=offsets, key_offsets=key_offsets,
                                                      timesteps=options["timesteps"].flatten()), packed)


@pytest.mark.parametrize("batch, tokens", [(0, 3), (2, 0)])
@pytest.mark.parametrize("tau", ["table", "direct"])
def test_empty_rotary(batch, tokens, tau):
    x, options = make(torch.bfloat16, tokens, tokens, 32, batch=batch, tau=tau)
    del x["u"], x["w"]
    assert_empty(lambda *a: rotary_timestep_attention(*a, **options), x)


@pytest.mark.parametrize("tokens", [50, 70])
@pytest.mark.parametrize("form", ["txl", "rotary", "packed"])
def test_strided_and_unaligned_inputs(form, tokens):
    """Parts of a fused projection and rows that begin between multiples of 16 bytes: the same bits, gradients included."""
    fused = torch.randn(3, tokens, 4, 2, 64, device="cuda").bfloat16()
    offsets = torch.tensor([0, tokens + 9, 3 * tokens], device="cuda")
    attend = {"txl": timestep_attention, "rotary": rotary_timestep_attention,
              "packed": functools.partial(packed_timestep_attention, offsets=offsets)}[form]
    fused = fused.flatten(0, 1) if form == "packed" else fused
    shifted = torch.empty(fused.numel() + 1, dtype=fused.dtype, device="cuda")[1:].view(fused.shape).copy_(fused)
    results = []
    for whole in (None, fused, shifted):
        parts = [x.contiguous() for x in fused.unbind(-3)] if whole is None else whole.unbind(-3)
        leaves = [x.detach().requires_grad_() for x in parts]
        out = attend(*leaves)
        grad = fused.unbind(-3)[0] if whole is None else whole.unbind(-3)[0]
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_fused_projection_gets_the_same_gradients():
    qkv = torch.randn(2, 70, 3, 3, 64, device="cuda").bfloat16().requires_grad_()
    x, options = make(torch.bfloat16, 70, 70, 64)
    rest = [x[name].requires_grad_() for name in ("tau", "u", "w")]
    results = []
    for attend in (timestep_self_attention, lambda qkv, *a, **k: timestep_attention(*qkv.unbind(2), *a, **k)):
        out = attend(qkv, *rest, **options, dropout_p=0.1, seed=3)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), [qkv, *rest])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_graph_replays_with_the_seed_of_the_device():
    x, options = make(torch.bfloat16, 40, 40, 64)
    seed, arguments = torch.tensor([5], device="cuda"), [t.requires_grad_() for t in x.values()]

    def step():
        out = timestep_attention(*arguments, **options, dropout_p=0.3, seed=seed)
        return out, torch.autograd.grad(out.float().square().sum(), arguments)

    graph, (out, grads) = recorded(step)
    for value in (5, 6):
        seed.fill_(value)
        graph.replay()
        expected, expected_grads = step()
        assert torch.equal(out, expected)
        assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))


def test_autocast_and_compile(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    x, options = make(torch.float32, 40, 40, 64)
    with torch.autocast("cuda", torch.bfloat16):
        out = timestep_attention(*x.values(), **options)
    half = {name: t.bfloat16() for name, t in x.items()}
    assert torch.equal(out, timestep_attention(*half.values(), **options))
    compiled = torch.compile(lambda *a: timestep_attention(*a, **options) * 2, fullgraph=True)
    assert torch.equal(compiled(*half.values()), out * 2)


def test_opcheck():
    x, options = make(torch.bfloat16, 9, 11, 32)
    leaves = [t.requires_grad_() for t in x.values()]
    arguments = (*leaves, options["timesteps"], options["key_mask"], torch.tensor([3]), 0.2, 0.25)
    torch.library.opcheck(torch.ops.pydiffseq.timestep_attention.default, arguments)


def packed_arguments(dtype, dim):
    x, options = make(dtype, 9, 11, dim, masked=False)
    leaves = [(t.flatten(0, 1) if name in "qkv" else t).requires_grad_() for name, t in x.items()]
    offsets, key_offsets = torch.tensor([0, 5, 18], device="cuda"), torch.tensor([0, 9, 22], device="cuda")
    return leaves, offsets, key_offsets, options["timesteps"].flatten()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_opcheck_of_packed_sentences(dtype):
    leaves, *rest = packed_arguments(dtype, 32)
    torch.library.opcheck(torch.ops.pydiffseq.packed_timestep_attention.default,
                          (*leaves, *rest, torch.tensor([3]), 13, 13, 0.2, 0.25))


def test_gradcheck_of_packed_sentences():
    leaves, offsets, key_offsets, timesteps = packed_arguments(torch.float64, 4)
    options = {"offsets": offsets, "key_offsets": key_offsets, "timesteps": timesteps, "dropout_p": 0.3, "seed": 7}
    assert torch.autograd.gradcheck(lambda *a: packed_timestep_attention(*a, **options), leaves, fast_mode=True)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one():
    x, options = make(torch.bfloat16, 40, 40, 64)
    moved = timestep_attention(*(t.to("cuda:1") for t in x.values()), **{k: v.to("cuda:1") for k, v in options.items()})
    assert torch.cuda.current_device() == 0 and torch.equal(moved.to("cuda:0"), timestep_attention(*x.values(), **options))
