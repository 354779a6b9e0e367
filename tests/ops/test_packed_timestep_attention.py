import pytest
import torch
from instruction_sets import kernel_only

from pydiffseq.ops import packed_timestep_attention, reference, timestep_attention

FLOATS = ("q", "k", "v", "tau", "u", "w")
LENGTHS = [([5, 0, 9, 1], None), ([70, 3], [2, 66]), ([1], [7])]


def offsets_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def make(lengths, keys=None, heads=2, dim=16, tau="table", biases=True, dtype=torch.float32, seed=0):
    """The float inputs by name (None where absent), and the rest of the arguments."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=g).to(dtype)

    total = sum(lengths) if keys is None else sum(keys)
    x = dict.fromkeys(FLOATS)
    x.update(q=randn(sum(lengths), heads, dim), k=randn(total, heads, dim), v=randn(total, heads, dim))
    options = {"offsets": offsets_of(lengths), "key_offsets": None if keys is None else offsets_of(keys)}
    if tau == "direct":
        x["tau"] = randn(total, heads, dim)
    elif tau == "table":
        x["tau"], options["timesteps"] = randn(11, heads, dim), torch.randint(0, 11, (total,), generator=g)
    if biases:
        x["u"], x["w"] = randn(heads, dim), None if tau is None else randn(heads, dim)
    return x, options


def padded(q, k, v, tau, u, w, *, offsets, key_offsets=None, timesteps=None, **options):
    """The same by timestep_attention on padded sentences."""
    key_offsets = offsets if key_offsets is None else key_offsets

    def pad(x, at):
        parts = torch.tensor_split(x, at[1:-1])
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)

    mask = pad(torch.ones(len(k), dtype=torch.bool), key_offsets)
    tau = tau if tau is None or timesteps is not None else pad(tau, key_offsets)
    timesteps = None if timesteps is None else pad(timesteps, key_offsets)
    out = timestep_attention(pad(q, offsets), pad(k, key_offsets), pad(v, key_offsets), tau, u, w, timesteps=timesteps,
                             key_mask=mask, **options)
    return out[pad(torch.ones(len(q), dtype=torch.bool), offsets)]


def outputs_and_grads(attend, x, options, dtype=None):
    leaves = [None if x[n] is None else x[n].detach().to(dtype or x[n].dtype).requires_grad_() for n in FLOATS]
    out = attend(*leaves, **options)
    g = torch.randn(x["q"].shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, [leaf for leaf in leaves if leaf is not None], g)]


@pytest.mark.parametrize("lengths, keys", LENGTHS)
@pytest.mark.parametrize("tau, biases", [("table", True), ("direct", True), (None, False)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_it_is_the_padded_form(lengths, keys, tau, biases, dropout_p):
    x, options = make(lengths, keys, tau=tau, biases=biases)
    options |= {"dropout_p": dropout_p, "seed": -5}
    exact = outputs_and_grads(padded, x, options, torch.float64)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 5e-6)):
        for ours, truth in zip(outputs_and_grads(packed_timestep_attention, x, options, dtype), exact, strict=True):
            assert (ours.double() - truth).norm() <= tolerance * (1 + truth.norm())


@kernel_only
@pytest.mark.parametrize("lengths, keys", LENGTHS)
def test_bfloat16(lengths, keys):
    x, options = make(lengths, keys, dtype=torch.bfloat16)
    exact = outputs_and_grads(padded, x, options, torch.float64)
    for ours, truth in zip(outputs_and_grads(packed_timestep_attention, x, options), exact, strict=True):
        assert (ours.double() - truth).norm() <= torch.finfo(torch.bfloat16).eps * (1 + truth.norm())


@kernel_only
def test_log_sum_exps_lie_as_in_the_reference():
    x, options = make([5, 0, 9, 1])
    rest = (options["offsets"], options["offsets"], options["timesteps"], None, 9, 9, 0.0, 0.25)
    tensors = [x[n] for n in FLOATS]
    _, ours = torch.ops.pydiffseq.packed_timestep_attention.default(*tensors, *rest)
    _, theirs = reference.packed_timestep_attention(*tensors, *rest)
    torch.testing.assert_close(ours, theirs)


def test_strided_slices_of_a_projection_and_no_sentences():
    qkv = torch.randn(14, 3, 2, 16, generator=torch.Generator().manual_seed(0))
    offsets = offsets_of([6, 8])
    whole = packed_timestep_attention(*(x.contiguous() for x in qkv.unbind(1)), offsets=offsets)
    assert torch.equal(packed_timestep_attention(*qkv.unbind(1), offsets=offsets), whole)
    assert packed_timestep_attention(*qkv[:0].unbind(1), offsets=offsets[:1]).shape == (0, 2, 16)
    assert packed_timestep_attention(*qkv[:0].unbind(1), offsets=offsets[[0, 0]]).shape == (0, 2, 16)


@pytest.mark.parametrize("tau", ["table", "direct", None])
def test_gradcheck(tau):
    x, options = make([2, 3], [3, 4], dim=4, tau=tau, dtype=torch.float64)
    leaves = [None if x[n] is None else x[n].requires_grad_() for n in FLOATS]
    assert torch.autograd.gradcheck(
        lambda *a: packed_timestep_attention(*a, **options, dropout_p=0.3, seed=7), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype):
    x, options = make([2, 5], dtype=dtype)
    leaves = [x[n].requires_grad_() for n in FLOATS]
    torch.library.opcheck(torch.ops.pydiffseq.packed_timestep_attention.default, (
        *leaves, options["offsets"], options["offsets"], options["timesteps"], torch.tensor([3]), 5, 5, 0.2, 0.25))


def test_compile_without_graph_breaks(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    x, options = make([3, 6])
    tensors = [x[n] for n in FLOATS]

    def run(*tensors):
        return packed_timestep_attention(*tensors, **options, longest=6, dropout_p=0.2, seed=3) * 2

    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(*tensors), run(*tensors))


@pytest.mark.parametrize("change, error, words", [
    ({"offsets": torch.tensor([0, 3, 8], dtype=torch.int32)}, TypeError, "offsets must be int64"),
    ({"offsets": torch.tensor([[0, 8]])}, ValueError, r"offsets must have shape \[B \+ 1\]"),
    ({"offsets": torch.tensor([0, 9])}, ValueError, "number of tokens, 8, got"),
    ({"offsets": torch.tensor([0, 5, 3, 8])}, ValueError, "offsets must ascend"),
    ({"key_offsets": torch.tensor([0, 8])}, ValueError, "key_offsets must have the shape of offsets"),
    ({"longest": 4}, ValueError, "a sentence of 5 tokens, but the longest was said to have 4"),
    ({"timesteps": torch.zeros(7, dtype=torch.int64)}, ValueError, "timesteps must have shape"),
    ({"timesteps": torch.full((8,), 11)}, ValueError, r"timesteps must be in 0..10"),
])
def test_wrong_arguments_are_named(change, error, words):
    x, options = make([3, 5])
    with pytest.raises(error, match=words):
        packed_timestep_attention(*(x[n] for n in FLOATS), **options | change)
    with pytest.raises(ValueError, match=r"q must have shape \[queries, H, D\]"):
        packed_timestep_attention(*(x[n] if n != "q" else x[n][None] for n in FLOATS), **options)
