import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import each_isa, kernel_only

from pydiffseq.ops import reference, timestep_attention

FLOATS = ("q", "k", "v", "tau", "u", "w")


def literal(q, k, v, tau, u, w, key_mask=None, scale=None):
    """The published form: softmax(scale * (AC + BD)) v with AC = (q + u) k^T and BD = (q + w) tau^T."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = (q if u is None else q + u[:, None]) @ k.transpose(-1, -2)
    if tau is not None:
        scores = scores + (q if w is None else q + w[:, None]) @ tau.transpose(1, 2).transpose(-1, -2)
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None], -torch.inf)
    return (scores.softmax(-1).nan_to_num(0.0) @ v).transpose(1, 2)


def make(batch=2, heads=2, queries=9, keys=None, dim=16, tau="direct", biases=True, dtype=torch.float32, seed=0):
    """The op's float inputs by name (None where absent), and its timesteps."""
    g = torch.Generator().manual_seed(seed)
    keys = queries if keys is None else keys

    def randn(*shape):
        return torch.randn(shape, generator=g).to(dtype)

    x = dict.fromkeys(FLOATS)
    x.update(q=randn(batch, queries, heads, dim), k=randn(batch, keys, heads, dim), v=randn(batch, keys, heads, dim))
    timesteps = None
    if tau == "direct":
        x["tau"] = randn(batch, keys, heads, dim)
    elif tau == "table":
        x["tau"], timesteps = randn(11, heads, dim), torch.randint(0, 11, (batch, keys), generator=g)
    if biases:
        x["u"] = randn(heads, dim)
        x["w"] = None if tau is None else randn(heads, dim)
    return x, timesteps


def outputs_and_grads(attend, x, dtype=None):
    """[out, gradients...] of ``attend(*inputs)`` for a fixed gradient of the output."""
    leaves = [None if x[n] is None else x[n].detach().to(dtype or x[n].dtype).requires_grad_() for n in FLOATS]
    out = attend(*leaves)
    g = torch.randn(x["q"].shape, generator=torch.Generator().manual_seed(1)).to(x["q"].dtype)
    return [out.detach(), *torch.autograd.grad(out, [leaf for leaf in leaves if leaf is not None], g.to(out.dtype))]


def error(a, b):
    return ((a.double() - b).norm() / b.norm().clamp_min(1e-12)).item()


@kernel_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n,dim", [(1, 1), (7, 16), (41, 32), (64, 64), (127, 20), (129, 64)])
def test_error_against_float64_is_at_most_twice_torchs(n, dim, dtype):
    x, _ = make(queries=n, dim=dim, dtype=dtype)
    exact = outputs_and_grads(literal, x, torch.float64)
    torchs = outputs_and_grads(literal, x)
    for isa in each_isa():
        for ours, theirs, truth in zip(outputs_and_grads(timestep_attention, x), torchs, exact, strict=True):
            floor = 4 * torch.finfo(dtype).eps
            assert error(ours, truth) <= max(2 * error(theirs, truth), floor), isa


@kernel_only
@pytest.mark.parametrize(
    "tau,biases", [("direct", True), ("table", True), ("direct", False), (None, True), (None, False)])
@pytest.mark.parametrize("queries,keys", [(9, 9), (1, 7), (41, 5), (65, 300)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_kernels_match_the_float64_reference(tau, biases, queries, keys, masked, dropout_p):
    x, timesteps = make(queries=queries, keys=keys, tau=tau, biases=biases)
    key_mask = torch.rand(2, keys, generator=torch.Generator().manual_seed(3)) < 0.7 if masked else None
    if masked:
        key_mask[1] = False

    def attend(*inputs):
        return timestep_attention(*inputs, timesteps=timesteps, key_mask=key_mask, dropout_p=dropout_p, seed=-5)

    exact = outputs_and_grads(attend, x, torch.float64)  # the reference formulas
    for isa in each_isa():
        for ours, truth in zip(outputs_and_grads(attend, x), exact, strict=True):
            assert error(ours, truth) < 5e-6, isa
            if masked:
                assert ours.isfinite().all()


@kernel_only
@pytest.mark.parametrize("tau,biases", [("direct", True), ("table", True), ("direct", False), (None, False)])
@pytest.mark.parametrize("queries,keys,dim", [(9, 41, 20), (41, 18, 72), (129, 127, 64)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_bfloat16_kernels_match_the_float64_reference_and_ignore_padding(tau, biases, queries, keys, dim, dropout_p):
    x, timesteps = make(2, 3, queries, keys, dim, tau, biases, torch.bfloat16)
    key_mask = torch.rand(2, keys, generator=torch.Generator().manual_seed(3)) < 0.95
    key_mask[1, 12:] = False  # one sentence on the kernel for few keys
    more = torch.arange(keys + 7) % keys  # seven masked keys more

    def attend(*inputs):
        return timestep_attention(*inputs, timesteps=timesteps, key_mask=key_mask, dropout_p=dropout_p, seed=-5)

    longer = {n: t[:, more] if n in "kv" or (n, tau) == ("tau", "direct") else t for n, t in x.items()}
    exact = outputs_and_grads(attend, x, torch.float64)
    for isa in each_isa():
        ours = outputs_and_grads(attend, x)
        assert all(error(a, truth) < torch.finfo(torch.bfloat16).eps for a, truth in zip(ours, exact, strict=True)), isa
        padded = timestep_attention(
            *(longer[n] for n in FLOATS), timesteps=None if timesteps is None else timesteps[:, more],
            key_mask=torch.nn.functional.pad(key_mask, (0, 7)), dropout_p=dropout_p, seed=-5)
        assert torch.equal(padded, ours[0]), isa


@pytest.mark.parametrize("tau,biases", [("direct", True), ("table", False), (None, False)])
@pytest.mark.parametrize("masked", [False, True])
def test_reference_forward_is_the_literal_form_and_its_backward_is_autograds(tau, biases, masked):
    x, timesteps = make(tau=tau, biases=biases, dtype=torch.float64)
    key_mask = torch.tensor([[True] * 5 + [False] * 4, [False] * 9]) if masked else None

    def by_definition(q, k, v, tau, u, w):
        return literal(q, k, v, tau if timesteps is None else tau[timesteps], u, w, key_mask)

    ours = outputs_and_grads(lambda *a: timestep_attention(*a, timesteps=timesteps, key_mask=key_mask), x)
    for a, b in zip(ours, outputs_and_grads(by_definition, x), strict=True):
        torch.testing.assert_close(a, b.nan_to_num(0.0), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("tau", ["direct", "table", None])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck(tau, dropout_p):
    x, timesteps = make(queries=3, keys=5, dim=4, tau=tau, dtype=torch.float64)
    leaves = [None if x[n] is None else x[n].requires_grad_() for n in FLOATS]
    key_mask = torch.tensor([[True, True, False, True, True], [False] * 5])
    assert torch.autograd.gradcheck(
        lambda *a: timestep_attention(*a, timesteps=timesteps, key_mask=key_mask, dropout_p=dropout_p, seed=7), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tau", ["direct", "table", None])
def test_opcheck(tau, dtype):
    x, timesteps = make(tau=tau, dtype=dtype)
    leaves = [None if x[n] is None else x[n].requires_grad_() for n in FLOATS]
    seed, key_mask = torch.tensor([3]), torch.rand(2, 9) < 0.8
    arguments = (*leaves, timesteps, key_mask, seed, 0.2, 0.25)
    torch.library.opcheck(torch.ops.pydiffseq.timestep_attention.default, arguments)
    with torch.no_grad():
        out, lse = torch.ops.pydiffseq.timestep_attention(*arguments)
    detached = [None if leaf is None else leaf.detach() for leaf in leaves]
    torch.library.opcheck(torch.ops.pydiffseq.timestep_attention_backward.default,
                          (torch.randn_like(detached[0]), *detached, timesteps, key_mask, seed, out, lse, 0.2, 0.25))


def test_compiles_as_one_graph(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # graphs of other versions of the ops lie in the usual one
    x, timesteps = make(tau="table")

    def attend(*inputs):
        return timestep_attention(*inputs, timesteps=timesteps) * 2

    compiled = torch.compile(attend, fullgraph=True)
    for a, b in zip(outputs_and_grads(compiled, x), outputs_and_grads(attend, x), strict=True):
        torch.testing.assert_close(a, b)


@kernel_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_of_a_fused_projection_and_expanded_gradients(dtype):
    qkv = torch.randn(3, 13, 3, 2, 32).to(dtype).requires_grad_()
    tau = torch.randn(13, 3, 2, 32).to(dtype).transpose(0, 1).requires_grad_()
    sliced = timestep_attention(*qkv.unbind(2), tau)
    copied = timestep_attention(*(x.contiguous() for x in qkv.unbind(2)), tau.contiguous())
    assert torch.equal(sliced, copied)
    grads, expected = (torch.autograd.grad(out.sum(), (qkv, tau)) for out in (sliced, copied))
    assert torch.equal(grads[0], expected[0]) and torch.equal(grads[1], expected[1])
    q = torch.randn(3, 2, 32, 13).to(dtype).permute(0, 3, 1, 2)  # last dimension not contiguous
    assert torch.equal(timestep_attention(q, q, q), timestep_attention(*(q.contiguous(),) * 3))


@kernel_only
@pytest.mark.parametrize("keys", [5, 8, 33])
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.99999])
def test_dropout_bits_are_those_of_the_reference(keys, dropout_p):
    # With equal scores and v the identity, out[i, j] = keep / (keys * survival).
    q = torch.zeros(2, 19, 2, keys)
    v = torch.eye(keys)[None, :, None].expand(2, keys, 2, keys)
    threshold = reference.attention_drop_threshold(dropout_p)
    keep = reference.attention_keep_mask(torch.tensor([-99]), threshold, 2, 2, 19, keys).transpose(1, 2)
    for isa in each_isa():
        out = timestep_attention(q, torch.zeros_like(v), v, dropout_p=dropout_p, seed=-99)
        assert torch.equal(out != 0, keep), isa
        torch.testing.assert_close(out[keep], torch.full_like(out[keep], 1 / (keys * (1 - threshold / 65536))))


def test_dropout_rate_and_seed():
    keep = reference.attention_keep_mask(torch.tensor([1]), reference.attention_drop_threshold(0.1), 8, 4, 64, 64)
    assert abs(keep.float().mean().item() - 0.9) < 5 * (0.09 / keep.numel()) ** 0.5
    x, _ = make()
    args = [x[n] for n in FLOATS]
    one, again, two = (timestep_attention(*args, dropout_p=0.5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, two)
    torch.manual_seed(0)
    first = timestep_attention(*args, dropout_p=0.5)
    assert not torch.equal(first, timestep_attention(*args, dropout_p=0.5))
    torch.manual_seed(0)
    assert torch.equal(first, timestep_attention(*args, dropout_p=0.5))


@kernel_only
@pytest.mark.parametrize("batch,queries", [(1, 200), (9, 12)])
def test_same_bits_with_one_and_two_threads(batch, queries):
    x, timesteps = make(batch=batch, queries=queries, tau="table")
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            results.append(outputs_and_grads(
                lambda *a: timestep_attention(*a, timesteps=timesteps, dropout_p=0.1, seed=4), x))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@kernel_only
def test_a_sentence_does_not_depend_on_its_padding():
    x, _ = make(batch=1, queries=10)
    padded = {n: t if n in "uw" else torch.cat([t, torch.full_like(t[:, :6], 1e9)], 1) for n, t in x.items()}
    mask = torch.arange(16)[None] < 10
    out = timestep_attention(*(padded[n] for n in FLOATS), key_mask=mask)
    torch.testing.assert_close(out[:, :10], timestep_attention(*(x[n] for n in FLOATS)), rtol=1e-6, atol=1e-6)


@kernel_only
def test_nan_and_large_scores():
    x, _ = make()
    large = timestep_attention(x["q"] * 1e4, x["k"] * 1e4, x["v"])
    assert large.isfinite().all()
    x["q"][0, 3, 1, 2] = torch.nan
    out = timestep_attention(*(x[n] for n in FLOATS))
    assert out[0, 3, 1].isnan().all() and out.isnan().sum() == 16


@kernel_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_scores_that_grow_along_the_keys(dtype, scale):
    x, _ = make(queries=40, keys=200, dim=32, dtype=dtype)
    x["k"] *= torch.linspace(0.01, 3, 200)[:, None, None].to(dtype)  # each block of keys scores far above the last

    def attend(*inputs):
        return timestep_attention(*inputs, scale=scale)

    exact = outputs_and_grads(attend, x, torch.float64)
    for isa in each_isa():
        for ours, truth in zip(outputs_and_grads(attend, x), exact, strict=True):
            assert error(ours, truth) < 64 * torch.finfo(dtype).eps, isa


@kernel_only
@given(batch=st.integers(1, 3), heads=st.integers(1, 3), queries=st.integers(1, 70), keys=st.integers(1, 70),
       dim=st.integers(1, 70), tau=st.sampled_from(["direct", "table", None]), biases=st.booleans(),
       dtype=st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=40, deadline=None)
def test_any_shape(batch, heads, queries, keys, dim, tau, biases, dtype):
    x, timesteps = make(batch, heads, queries, keys, dim, tau, biases, dtype)

    def attend(*inputs):
        return timestep_attention(*inputs, timesteps=timesteps)

    for ours, truth in zip(outputs_and_grads(attend, x), outputs_and_grads(attend, x, torch.float64), strict=True):
        # absolute near zero: with one key the gradient of a score is a difference that is 0
        assert (ours.double() - truth).norm() <= 40 * torch.finfo(dtype).eps * (truth.norm() + truth.numel() ** 0.5)


def test_no_queries_keys_or_sentences():
    x, _ = make(queries=3, keys=0)
    assert torch.equal(timestep_attention(*(x[n] for n in FLOATS)), torch.zeros(2, 3, 2, 16))
    for sizes in ({"queries": 0, "keys": 4}, {"batch": 0}):
        x, _ = make(**sizes)
        assert timestep_attention(*(x[n] for n in FLOATS)).shape == x["q"].shape


def changed(**changes):
    x, timesteps = make(tau="table" if changes.pop("table", False) else "direct")
    return {**x, "timesteps": timesteps, **changes}


@pytest.mark.parametrize("inputs,kind,message", [
    (changed(q=torch.zeros(2, 9, 16)), ValueError, r"q must have shape \[B, Nq, H, D\], got \[2, 9, 16\]"),
    (changed(q=torch.zeros(2, 9, 2, 16, dtype=torch.int64)), TypeError, "q must be a floating-point tensor"),
    (changed(k=torch.zeros(2, 9, 4, 16)), ValueError, r"k must have shape \[2, Nk, 2, 16\]"),
    (changed(v=torch.zeros(2, 8, 2, 16)), ValueError, r"v must have shape \[2, 9, 2, 16\], got \[2, 8, 2, 16\]"),
    (changed(v=torch.zeros(2, 9, 2, 16, dtype=torch.bfloat16)), TypeError, "v must have the dtype of q, torch.float32"),
    (changed(tau=torch.zeros(2, 8, 2, 16)), ValueError, r"tau must have shape \[2, 9, 2, 16\]"),
    (changed(tau=None), ValueError, "w was given without tau"),
    (changed(u=torch.zeros(16)), ValueError, r"u must have shape \[2, 16\], got \[16\]"),
    (changed(key_mask=torch.ones(2, 8, dtype=torch.bool)), ValueError, r"key_mask must have shape \[2, 9\]"),
    (changed(key_mask=torch.ones(2, 9)), TypeError, "key_mask must be torch.bool"),
    (changed(timesteps=torch.zeros(2, 9, dtype=torch.int64)), ValueError, r"a table of shape \[R, 2, 16\]"),
    (changed(table=True, timesteps=torch.zeros(2, 9)), TypeError, "timesteps must be torch.int64"),
    (changed(table=True, timesteps=torch.full((2, 9), 11)), ValueError, r"must be in 0..10 \(rows of tau\), got 11"),
    (changed(table=True, timesteps=torch.full((2, 9), -1)), ValueError, "timesteps must be in 0..10"),
    (changed(dropout_p=1.0), ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
    (changed(dropout_p=0.1, seed=torch.zeros(2, dtype=torch.int64)), TypeError, "seed must be an int"),
    (changed(key_mask=torch.ones(2, 9, dtype=torch.bool, device="meta")), ValueError, "key_mask is on meta, but q is"),
])
def test_wrong_arguments_are_named(inputs, kind, message):
    with pytest.raises(kind, match=message):
        timestep_attention(**inputs)
