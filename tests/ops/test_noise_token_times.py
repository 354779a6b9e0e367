"""Noise injection whose token timesteps are made from the sentence index, not read."""

import pytest
import torch
from instruction_sets import each_isa, kernel_only

from pydiffseq.diffusion import xy_token_timesteps
from pydiffseq.ops import embed_q_sample, q_sample, reference

T, N = 50, 6
SIGNAL = torch.linspace(1.0, 0.0, T)
SIGMA = (1 - SIGNAL**2).sqrt()
LENGTHS = torch.tensor([6, 1, 4])
INDEX = torch.tensor([17, 50, 2])


def batch(dtype=torch.float32, d=7):
    g = torch.Generator().manual_seed(d)
    return torch.randn(3, N, d, generator=g).to(dtype), torch.rand(3, N, generator=g) > 0.3


@kernel_only
@pytest.mark.parametrize("anchor_scale", [2.0, 1.3, 0.4])
def test_the_timesteps_are_the_same_integers_for_every_index(anchor_scale):
    """With signal[t] = t, sigma = 0 and x0 = 1, x_t is the timestep."""
    steps, width = 2000, 40
    lengths = torch.arange(1, width + 1).repeat_interleave(steps)
    index = torch.arange(len(lengths)) * 7 % (steps + lengths)
    want = xy_token_timesteps(index, lengths, width, steps, anchor_scale)
    for isa in each_isa():
        got = q_sample(torch.ones(len(index), width, 1), index, torch.arange(steps).float(), torch.zeros(steps),
                       lengths=lengths, anchor_scale=anchor_scale, seed=0)
        assert torch.equal(got[..., 0].long(), want), isa


@kernel_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_are_those_of_given_timesteps(dtype):
    x0, mask = batch(dtype, 37)
    ids, options = torch.arange(3 * N).view(3, N) % 11, {"mask": mask, "seed": 3, "return_noise": True}
    t, times = xy_token_timesteps(INDEX, LENGTHS, N, T, 1.5), {"lengths": LENGTHS, "anchor_scale": 1.5}
    results = []
    for when, how in ((t, {}), (INDEX, times)):
        x, table = x0.clone().requires_grad_(), x0.flatten(0, 1)[:11].clone().requires_grad_()
        vector = x0[0, 0].clone().requires_grad_()
        x_t, eps = q_sample(x, when, SIGNAL, SIGMA, **options, **how, absorbing=vector)
        outputs = embed_q_sample(table, ids, when, SIGNAL, SIGMA, sigma0=0.1, **options, **how)
        loss = sum(out.float().square().sum() for out in (x_t, *outputs[:2]))
        results.append([x_t, eps, *outputs, *torch.autograd.grad(loss, (x, table, vector))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    want = reference.q_sample(x0, INDEX, SIGNAL, SIGMA, mask, torch.tensor([3]), 0, None, True, None, None, LENGTHS, 1.5)
    got = q_sample(x0, INDEX, SIGNAL, SIGMA, **options, **times)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_gradients():
    x0, mask = batch(torch.float64)
    ids, options = torch.arange(3 * N).view(3, N) % 5, {"mask": mask, "seed": 1, "lengths": LENGTHS}
    table, vector = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 7), (7,)))
    assert torch.autograd.gradcheck(
        lambda x, m: q_sample(x, INDEX, SIGNAL, SIGMA, **options, absorbing=m), (x0.requires_grad_(), vector))
    assert torch.autograd.gradcheck(
        lambda e: embed_q_sample(e, ids, INDEX, SIGNAL, SIGMA, sigma0=0.1, **options), table)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype):
    x0, mask = batch(dtype)
    ids, seed, ops = torch.arange(3 * N).view(3, N), torch.tensor([5]), torch.ops.pydiffseq
    x, table = x0.clone().requires_grad_(), x0.flatten(0, 1).clone().requires_grad_()
    key, times = (seed, 1, None, True), (None, None, LENGTHS, 1.5)
    torch.library.opcheck(ops.q_sample.default, (x, INDEX, SIGNAL, SIGMA, mask, *key, *times))
    torch.library.opcheck(ops.q_sample_backward.default, (x, INDEX, SIGNAL, mask, LENGTHS, 1.5))
    torch.library.opcheck(ops.embed_q_sample.default, (table, ids, INDEX, SIGNAL, SIGMA, 0.1, mask, *key, *times))
    torch.library.opcheck(ops.embed_q_sample_backward.default, (x0, x0, ids, INDEX, SIGNAL, mask, 3 * N, x0, LENGTHS, 1.5))


def test_compiled_without_a_graph_break(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    x0, _ = batch()
    vector = torch.randn(7)

    def run(x0, vector):
        x_t = q_sample(x0, INDEX, SIGNAL, SIGMA, lengths=LENGTHS, seed=2, absorbing=vector)
        return torch.autograd.grad(x_t.square().sum(), (x0, vector)) if x0.requires_grad else x_t * 2

    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(x0, vector), run(x0, vector))
    leaves = [t.clone().requires_grad_() for t in (x0, vector)]
    loss = torch.compile(lambda x0, vector: q_sample(
        x0, INDEX, SIGNAL, SIGMA, lengths=LENGTHS, seed=2, absorbing=vector).square().sum(), backend="aot_eager")
    for ours, eager in zip(torch.autograd.grad(loss(*leaves), leaves), run(*leaves), strict=True):
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("change, error, message", [
    ({"t": torch.tensor([17, 51, 2])}, ValueError, r"t must be in 0\.\.50, got 51"),
    ({"t": torch.tensor([17, 50, -1])}, ValueError, r"t must be in 0\.\.53, got -1"),
    ({"t": torch.zeros(3, N, dtype=torch.int64)}, ValueError, r"t must have shape \[3\], got \[3, 6\]"),
    ({"lengths": LENGTHS.int()}, TypeError, "lengths must be int64"),
    ({"lengths": LENGTHS[:2]}, ValueError, r"lengths must have shape \[3\]"),
    ({"lengths": LENGTHS.to("meta")}, ValueError, "lengths is on meta"),
    ({"anchor_scale": 0.0}, ValueError, "the anchor scale must be a positive number, got 0.0"),
])
def test_bad_arguments_are_named(dtype, change, error, message):
    arguments = {"t": INDEX, "lengths": LENGTHS} | change
    with pytest.raises(error, match=message):
        q_sample(batch(dtype)[0], signal=SIGNAL, sigma=SIGMA, **arguments)
