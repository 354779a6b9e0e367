import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import each_isa, kernel_only

from pydiffseq.ops import _extension, embed_q_sample, philox_normal, q_sample, reference, sampler_step

T = 50
SIGNAL = torch.linspace(1.0, 0.0, T)
SIGMA = (1 - SIGNAL**2).sqrt()
KNOWN_ANSWERS = [  # Random123's kat_vectors: counter, key (low word first), result
    ([0, 0, 0, 0], 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, 2**64 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], 0x299F31D0A4093822,
     [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
]


def batch(B=3, N=5, d=7, dtype=torch.float32, per_token=True):
    g = torch.Generator().manual_seed(B * 1000 + N * 100 + d)
    x0 = torch.randn(B, N, d, generator=g).to(dtype)
    t = torch.randint(0, T, (B, N) if per_token else (B,), generator=g)
    return x0, t, torch.rand(B, N, generator=g) > 0.3


@kernel_only
@pytest.mark.parametrize("counter, key, words", KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, words):
    signed = key - 2**64 if key >= 2**63 else key
    assert [int(w) for w in reference.philox_words(tuple(counter), torch.tensor([signed]))] == words
    for _ in each_isa():
        assert _extension.C.philox_words(counter, key, 1) == words


@kernel_only
def test_philox_words_are_those_of_the_reference_where_the_block_number_wraps():
    first = 2**32 - 5
    group = torch.arange(first, first + 21) & 0xFFFFFFFF
    expected = torch.stack(reference.philox_words((group, 7, 8, 9), torch.tensor([-3])), -1).flatten().tolist()
    for _ in each_isa():
        assert _extension.C.philox_words([first, 7, 8, 9], 2**64 - 3, 21) == expected


def test_normals_are_box_muller_of_the_words():
    """Against float64: words (r, a) give sqrt(-2 ln u), u a float32, times cosine and sine of the documented angle."""
    rows = torch.tensor([(5 << 32) | 77])
    got = philox_normal((1, 1000, 4), seed=9, step=3, rows=rows, stream="x_t").double()[0]
    words = reference.philox_words((torch.arange(1000), 3, 77, 5), torch.tensor([9]))
    for pair in (0, 1):
        radius_word, angle_word = words[2 * pair], words[2 * pair + 1]
        u = ((radius_word.float().double() + 0.5) / 2**32).float().double()
        radius = (-2 * u.log()).sqrt() * torch.where(angle_word >> 31 == 1, -1.0, 1.0)
        low = angle_word & 0x3FFFFFFF
        angle = (low - ((low >> 29) << 30)).double() / 2**30 * (math.pi / 2)
        swap = (angle_word >> 30) & 1 == 1
        first = torch.where(swap, angle.cos(), angle.sin())
        second = torch.where(swap, angle.sin(), angle.cos())
        assert (got[:, 2 * pair] - radius * first).abs().max() < 1e-6
        assert (got[:, 2 * pair + 1] - radius * second).abs().max() < 1e-6


def test_normals_have_the_moments_and_distribution_of_a_gaussian():
    x = philox_normal((64, 64, 128), seed=20, stream="initial").double().flatten()
    n = x.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(x.pow(power).mean() - moment) < 4.5 * math.sqrt(variance / n)
    cdf = torch.special.ndtr(x.sort().values)
    grid = torch.arange(1, n + 1, dtype=torch.float64) / n
    assert max((cdf - grid).abs().max(), (cdf - grid + 1 / n).abs().max()) < 1.95 / math.sqrt(n)  # p = 0.001
    neighbours = x[:-1] * x[1:]
    assert neighbours.mean().abs() < 4.5 / math.sqrt(n)


@pytest.mark.parametrize("change", [{"seed": 2}, {"step": 1}, {"rows": torch.tensor([0 | 1 << 32])},
                                    {"rows": torch.tensor([1])}, {"stream": "x_t"}, {"stream": "x_0"}])
def test_every_coordinate_gives_other_noise(change):
    base = philox_normal((1, 8, 64), seed=1)
    other = philox_normal((1, 8, 64), **{"seed": 1, **change})
    assert (base == other).float().mean() < 0.01
    assert torch.corrcoef(torch.stack([base.flatten(), other.flatten()]))[0, 1].abs() < 0.2


@kernel_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", [1, 7, 64, 130])
@pytest.mark.parametrize("threads", [1, 2])
def test_bits_are_those_of_the_reference_on_every_instruction_set(dtype, d, threads):
    x0, t, mask = batch(d=d, dtype=dtype)
    table, ids = x0.reshape(-1, d)[:6].contiguous(), torch.arange(15).reshape(3, 5) % 6
    seed, rows = torch.tensor([-(2**62) + 5]), torch.tensor([4, 3 << 32 | 9, 2])
    key = (seed, 6, rows)
    coefficients = (SIGNAL[t], SIGMA[t], SIGMA[t] * mask)
    expected = (*reference.q_sample(x0, t, SIGNAL, SIGMA, mask, *key, True),
                *reference.embed_q_sample(table, ids, t, SIGNAL, SIGMA, 0.1, mask, *key, True),
                reference.sampler_step(x0, x0.flip(0), *coefficients, *key))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for isa in each_isa():
            options = {"seed": seed, "step": 6, "rows": rows}
            got = (*q_sample(x0, t, SIGNAL, SIGMA, mask=mask, return_noise=True, **options),
                   *embed_q_sample(table, ids, t, SIGNAL, SIGMA, sigma0=0.1, mask=mask, return_noise=True, **options),
                   sampler_step(x0, x0.flip(0), *coefficients, **options))
            for ours, theirs in zip(got, expected, strict=True):
                assert ours.dtype == dtype and torch.equal(ours, theirs), isa
    finally:
        torch.set_num_threads(before)


@settings(max_examples=25, deadline=None)
@given(B=st.integers(1, 5), N=st.integers(1, 9), d=st.integers(1, 70), padding=st.integers(0, 5),
       step=st.integers(0, 2**24 - 1), seed=st.integers(-2**63, 2**63 - 1), data=st.data())
def test_a_sentence_keeps_its_noise_in_any_batch_and_padding(B, N, d, padding, step, seed, data):
    rows = torch.tensor(data.draw(st.lists(st.integers(0, 2**62), min_size=B, max_size=B)))
    pick = torch.tensor(data.draw(st.permutations(range(B)))[: data.draw(st.integers(1, B))])
    x0, t, _ = batch(B, N + padding, d)
    whole = q_sample(x0, t, SIGNAL, SIGMA, seed=seed, step=step, rows=rows)
    part = q_sample(x0[pick, :N], t[pick, :N], SIGNAL, SIGMA, seed=seed, step=step, rows=rows[pick])
    assert torch.equal(whole[pick, :N], part)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("per_token", [True, False])
def test_x_t_is_the_formula_with_the_returned_noise(dtype, per_token):
    x0, t, mask = batch(dtype=dtype, per_token=per_token)
    x_t, eps = q_sample(x0, t, SIGNAL, SIGMA, mask=mask, seed=3, return_noise=True)
    shape = (3, 5, 1) if per_token else (3, 1, 1)
    exact = SIGNAL[t].reshape(shape).double() * x0.double() + SIGMA[t].reshape(shape).double() * eps.double()
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 0.03, torch.float64: 1e-12}[dtype]
    assert x_t.dtype == eps.dtype == dtype
    assert (x_t.double() - exact)[mask].abs().max() < tolerance
    assert torch.equal(x_t[~mask], x0[~mask]) and not eps[~mask].any()


def test_embed_q_sample_is_q_sample_of_its_x0():
    table, (_, t, mask) = torch.randn(11, 12), batch()
    ids = torch.randint(0, 11, (3, 5))
    options = {"mask": mask, "seed": 8, "step": 2, "return_noise": True}
    x0, x_t, eps = embed_q_sample(table, ids, t, SIGNAL, SIGMA, sigma0=0.5, **options)
    again, eps_again = q_sample(x0, t, SIGNAL, SIGMA, **options)
    assert torch.equal(x_t, again) and torch.equal(eps, eps_again)
    noise = philox_normal((3, 5, 12), seed=8, step=2, stream="x_0")
    torch.testing.assert_close(x0, table[ids] + 0.5 * noise)
    clean, _ = embed_q_sample(table, ids, t, SIGNAL, SIGMA, sigma0=0.0)
    assert torch.equal(clean, table[ids])


@pytest.mark.parametrize("shape", [(), (3,), (1, 5), (3, 1), (3, 5)])
def test_sampler_step_broadcasts_its_coefficients(shape):
    x, x0_hat = batch()[0], batch(d=8)[0][..., :7]
    a, b, c = torch.rand(3, *shape) + 0.1
    full = [(v[:, None] if v.dim() == 1 else v).expand(3, 5)[..., None] for v in (a, b, c)]
    eps = philox_normal((3, 5, 7), seed=4, step=9, stream="x_t")
    torch.testing.assert_close(sampler_step(x, x0_hat, a, b, c, seed=4, step=9),
                               full[0] * x + full[1] * x0_hat + full[2] * eps)
    assert torch.equal(sampler_step(x, x0_hat, 1.0, 0.0, 0.0), x)


def test_nan_and_infinity_propagate():
    x0, t, _ = batch()
    x0[0, 0, 0], x0[1, 2, 3] = math.nan, math.inf
    t[:] = 10
    x_t = q_sample(x0, t, SIGNAL, SIGMA)
    assert x_t[0, 0, 0].isnan() and x_t[1, 2, 3] == math.inf
    assert x_t.isfinite().sum() == x0.numel() - 2


def test_strided_inputs_give_the_values_of_contiguous_ones():
    x0, t, mask = batch(5, 3, 6)
    strided = [v.transpose(0, 1).contiguous().transpose(0, 1) for v in (x0, t, mask)]
    assert not strided[0].is_contiguous()
    assert torch.equal(q_sample(strided[0], strided[1], SIGNAL, SIGMA, mask=strided[2], seed=1),
                       q_sample(x0, t, SIGNAL, SIGMA, mask=mask, seed=1))


def test_empty_batch():
    assert q_sample(torch.empty(0, 4, 8), torch.empty(0, dtype=torch.int64), SIGNAL, SIGMA).shape == (0, 4, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("per_token", [True, False])
def test_an_index_out_of_range_is_named(dtype, per_token):
    x0, t, _ = batch(dtype=dtype, per_token=per_token)
    t.view(-1)[2] = T
    with pytest.raises(ValueError, match=f"t must be in 0..{T - 1}, got {T}"):
        q_sample(x0, t, SIGNAL, SIGMA)
    ids = torch.zeros(3, 5, dtype=torch.int64)
    ids[1, 1] = -1
    with pytest.raises(ValueError, match="ids must be in 0..14, got -1"):
        embed_q_sample(x0.flatten(0, 1), ids, t.clamp(max=T - 1), SIGNAL, SIGMA, sigma0=0.1)


@pytest.mark.parametrize("error, name, change", [
    (TypeError, "x0", {"x0": torch.zeros(3, 5, 7, dtype=torch.int64)}),
    (ValueError, "x0", {"x0": torch.zeros(3, 5)}),
    (TypeError, "t", {"t": torch.zeros(3, 5)}),
    (ValueError, "t", {"t": torch.zeros(5, dtype=torch.int64)}),
    (TypeError, "signal", {"signal": SIGNAL.double()}),
    (ValueError, "sigma", {"sigma": SIGMA[:-1]}),
    (TypeError, "mask", {"mask": torch.ones(3, 5)}),
    (ValueError, "mask", {"mask": torch.ones(3, 4, dtype=torch.bool)}),
    (ValueError, "mask", {"mask": torch.ones(3, 5, dtype=torch.bool, device="meta")}),
    (TypeError, "rows", {"rows": torch.zeros(3)}),
    (ValueError, "rows", {"rows": torch.zeros(4, dtype=torch.int64)}),
    (ValueError, "step", {"step": -1}),
    (TypeError, "seed", {"seed": torch.zeros(2)}),
])
def test_bad_arguments_are_named(error, name, change):
    x0, t, _ = batch()
    arguments = {"x0": x0, "t": t, "signal": SIGNAL, "sigma": SIGMA, **change}
    with pytest.raises(error, match=f"^{name} "):
        q_sample(**arguments)


def test_bad_coefficients_and_streams_are_named():
    x = batch()[0]
    with pytest.raises(ValueError, match="^a must have shape"):
        sampler_step(x, x, torch.ones(5), 1.0, 1.0)
    with pytest.raises(ValueError, match="^c must be a number or have shape"):
        sampler_step(x, x, 1.0, 1.0, torch.ones(3, 4))
    with pytest.raises(TypeError, match="^x0_hat must have the dtype"):
        sampler_step(x, x.double(), 1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="^stream must be one of"):
        philox_normal((1, 1, 1), stream="dropout")


def test_gradients():
    x0, t, mask = batch(2, 3, 5, torch.float64)
    for m in (mask, None):
        assert torch.autograd.gradcheck(
            lambda x, m=m: q_sample(x, t, SIGNAL, SIGMA, mask=m, seed=1), x0.clone().requires_grad_())
    table, ids = torch.randn(4, 5, dtype=torch.float64, requires_grad=True), torch.randint(0, 4, (2, 3))
    assert torch.autograd.gradcheck(
        lambda e: embed_q_sample(e, ids, t[:, 0], SIGNAL, SIGMA, sigma0=0.1, mask=mask, seed=1), table)
    a = torch.rand(2, 3)
    assert torch.autograd.gradcheck(lambda x, y: sampler_step(x, y, a, 1.5, a, seed=1),
                                    (x0.clone().requires_grad_(), x0.flip(0).requires_grad_()))


@kernel_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", [7, 128])
@pytest.mark.parametrize("outputs", ["x0", "x_t", "both"])
def test_backward_kernels_match_the_reference(dtype, d, outputs):
    grad, t, mask = batch(6, 20, d, dtype)
    ids = torch.randint(0, 9, (6, 20))
    assert torch.equal(torch.ops.pydiffseq.q_sample_backward(grad, t, SIGNAL, mask),
                       reference.q_sample_backward(grad, t, SIGNAL, mask))
    grads = [grad if outputs in (name, "both") else None for name in ("x0", "x_t")]
    exact = reference.embed_q_sample_backward(
        *(None if g is None else g.double() for g in grads), ids, t, SIGNAL, mask, 9, grad.double())
    for _ in each_isa():
        got = torch.ops.pydiffseq.embed_q_sample_backward(*grads, ids, t, SIGNAL, mask, 9, grad)
        assert (got.double() - exact).abs().max() < (1e-5 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(dtype):
    x0, t, mask = batch(dtype=dtype)
    seed, rows = torch.tensor([5]), torch.tensor([1, 2, 3])
    a = torch.rand(3, 5)
    ids = torch.randint(0, 15, (3, 5))
    ops = torch.ops.pydiffseq
    grad = x0.clone().requires_grad_()
    torch.library.opcheck(ops.q_sample.default, (grad, t, SIGNAL, SIGMA, mask, seed, 1, rows, True))
    torch.library.opcheck(ops.q_sample.default, (grad, t, SIGNAL, SIGMA, None, seed, 1, None, False))
    torch.library.opcheck(ops.q_sample_backward.default, (grad, t, SIGNAL, mask))
    table = x0.flatten(0, 1).clone().requires_grad_()
    torch.library.opcheck(ops.embed_q_sample.default, (table, ids, t, SIGNAL, SIGMA, 0.1, mask, seed, 1, rows, True))
    torch.library.opcheck(ops.embed_q_sample_backward.default, (x0, x0, ids, t, SIGNAL, mask, 15, x0))
    torch.library.opcheck(ops.sampler_step.default, (grad, x0.flip(0), a, a, a, seed, 1, rows))
    torch.library.opcheck(ops.philox_normal.default, (seed, 3, 5, 7, 1, rows, 3, dtype, torch.device("cpu")))
    drift = x0[0, 0].clone().requires_grad_(), ids == 3
    torch.library.opcheck(ops.q_sample.default, (grad, t, SIGNAL, SIGMA, mask, seed, 1, rows, True, *drift))
    torch.library.opcheck(ops.embed_q_sample.default, (
        table, ids, t, SIGNAL, SIGMA, 0.1, None, seed, 1, rows, True, *drift))
    torch.library.opcheck(ops.sampler_step.default, (grad, x0.flip(0).requires_grad_(), a, a, a, seed, 1, rows, 0.5))


def test_compiled_functions_give_the_same_values():
    x0, t, mask = batch()
    table, ids = torch.randn(6, 7), torch.arange(15).reshape(3, 5) % 6
    a = torch.rand(3, 5)

    def everything(x0, table):
        x_t, eps = q_sample(x0, t, SIGNAL, SIGMA, mask=mask, seed=1, return_noise=True)
        e0, e_t = embed_q_sample(table, ids, t, SIGNAL, SIGMA, sigma0=0.1, seed=2)
        z = philox_normal((3, 5, 7), seed=3)
        return (x_t + eps + e0 * e_t + sampler_step(x_t, z, a, 0.5, a, seed=4)).square().sum()

    results = []
    for function in (everything, torch.compile(everything, fullgraph=True, backend="aot_eager")):
        inputs = x0.clone().requires_grad_(), table.clone().requires_grad_()
        loss = function(*inputs)
        results.append((loss, *torch.autograd.grad(loss, inputs)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled)


def test_seed_none_draws_from_torchs_generator():
    x0, t, _ = batch()
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(q_sample(x0, t, SIGNAL, SIGMA))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_other_devices_run_on_the_reference():
    """The meta device stands for a device without a kernel: shapes and dtypes only."""
    x0, t, _ = (v.to("meta") for v in batch())
    out = q_sample(x0, t, SIGNAL.to("meta"), SIGMA.to("meta"))
    assert out.device.type == "meta" and out.shape == x0.shape


# --- Noise that drifts to an absorbing vector, and a clamped prediction ---


@kernel_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", [1, 7, 41, 127, 129])
@pytest.mark.parametrize("per_token", [True, False])
def test_absorbing_bits_are_those_of_the_reference_on_every_instruction_set(dtype, d, per_token):
    x0, t, mask = batch(d=d, dtype=dtype, per_token=per_token)
    absorbing, gone = x0[0, 0] + 1, mask.flip(0)
    table, ids = x0.flatten(0, 1), torch.arange(15).view(3, 5)
    seed, rows = torch.tensor([9]), torch.tensor([4, 3 << 32 | 9, 2])
    want = reference.q_sample(x0, t, SIGNAL, SIGMA, mask, seed, 2, rows, True, absorbing, gone)
    embedded = reference.embed_q_sample(table, ids, t, SIGNAL, SIGMA, 0.1, None, seed, 2, rows, True, absorbing, gone)
    for isa in each_isa():
        got = q_sample(x0, t, SIGNAL, SIGMA, mask=mask, seed=seed, step=2, rows=rows, return_noise=True,
                       absorbing=absorbing, gone=gone)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), isa
        got = embed_q_sample(table, ids, t, SIGNAL, SIGMA, sigma0=0.1, seed=seed, step=2, rows=rows, return_noise=True,
                             absorbing=absorbing, gone=gone)
        assert all(torch.equal(a, b) for a, b in zip(got, embedded, strict=True)), isa


def test_absorbing_is_the_formula():
    x0, t, mask = batch(dtype=torch.float64)
    absorbing, gone = torch.randn(7, dtype=torch.float64), mask.flip(0)
    plain, eps = q_sample(x0, t, SIGNAL, SIGMA, mask=mask, seed=1, return_noise=True)
    got, same = q_sample(x0, t, SIGNAL, SIGMA, mask=mask, seed=1, return_noise=True, absorbing=absorbing, gone=gone)
    drifted = plain + (1 - SIGNAL[t].double())[..., None] * absorbing
    want = torch.where((gone & mask)[..., None], absorbing, torch.where(mask[..., None], drifted, x0))
    torch.testing.assert_close(got, want)
    assert torch.equal(eps, same)


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("with_mask", [True, False])
def test_gradients_of_absorbing_noise(per_token, with_mask):
    x0, t, mask = batch(dtype=torch.float64, per_token=per_token)
    mask, gone, ids = mask if with_mask else None, mask.flip(0), torch.arange(15).view(3, 5) % 6
    table, absorbing = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((6, 7), (7,)))
    assert torch.autograd.gradcheck(
        lambda x0, m: q_sample(x0, t, SIGNAL, SIGMA, mask=mask, seed=1, absorbing=m, gone=gone),
        (x0.requires_grad_(), absorbing))
    assert torch.autograd.gradcheck(
        lambda e, m: embed_q_sample(e, ids, t, SIGNAL, SIGMA, sigma0=0.1, mask=mask, seed=1, absorbing=m, gone=gone),
        (table, absorbing))
    assert torch.autograd.gradcheck(lambda m: embed_q_sample(
        table.detach(), ids, t, SIGNAL, SIGMA, sigma0=0.1, mask=mask, seed=1, absorbing=m)[1], absorbing)


@kernel_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_clamped_prediction_has_the_bits_of_the_reference(dtype):
    x, _, _ = batch(d=37, dtype=dtype)
    x0_hat, a = x.flip(0) * 2, torch.rand(3, 5)
    x0_hat[0, 0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    for c in (a, 0.0):
        coefficients = a, 1 - a, torch.zeros_like(a) + c
        want = reference.sampler_step(x, x0_hat, *coefficients, torch.tensor([4]), 1, None, 0.7)
        clamped = sampler_step(x, x0_hat.float().clamp(-0.7, 0.7).to(dtype), a, 1 - a, c, seed=4, step=1)
        for isa in each_isa():
            got = sampler_step(x, x0_hat, a, 1 - a, c, seed=4, step=1, limit=0.7)
            assert torch.equal(got.nan_to_num(5), want.nan_to_num(5)), isa
        assert got[0, 0, 0].isnan() and got.isfinite().sum() == got.numel() - 1
        torch.testing.assert_close(got.nan_to_num(5), clamped.nan_to_num(5), rtol=1e-2, atol=1e-2)


def test_gradient_of_a_clamped_prediction():
    x, y = (torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    a = torch.rand(2, 3)
    assert torch.autograd.gradcheck(lambda x, y: sampler_step(x, y, a, 0.5, a, seed=4, limit=0.6), (x, y))


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"absorbing": torch.zeros(6)}, ValueError, r"absorbing must have shape \[7\], got \[6\]"),
    ({"absorbing": torch.zeros(7).double()}, TypeError, "absorbing must have the dtype of what is noised"),
    ({"gone": torch.zeros(3, 5, dtype=torch.bool)}, ValueError, "gone is only for a noise with an absorbing vector"),
    ({"absorbing": torch.zeros(7), "gone": torch.zeros(3, 5)}, TypeError, "gone must be bool"),
    ({"absorbing": torch.zeros(7), "gone": torch.zeros(3, dtype=torch.bool)}, ValueError, r"gone must have shape \[3, 5\]"),
    ({"absorbing": torch.zeros(7, device="meta")}, ValueError, "absorbing is on meta"),
])
def test_bad_absorbing_arguments_are_named(change, error, message):
    x0, t, _ = batch()
    with pytest.raises(error, match=message):
        q_sample(x0, t, SIGNAL, SIGMA, **change)
    with pytest.raises(ValueError, match="limit must be at least 0, got -1"):
        sampler_step(x0, x0, 1.0, 1.0, 0.0, limit=-1)


# --- A prediction that is rows of a table ---


@kernel_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limit", [None, 0.7])
def test_a_rounded_prediction_is_gathered_in_the_update(dtype, limit):
    x, _, _ = batch(d=37, dtype=dtype)
    table, ids, a = x.flatten(0, 1)[:9] * 2, torch.randint(0, 9, (3, 5)), torch.rand(3, 5)
    table[4, 2], c = math.nan, a * (torch.rand(3, 5) > 0.5)
    for isa in each_isa():
        want = sampler_step(x, table[ids], a, 1 - a, c, seed=4, step=1, limit=limit)
        got = sampler_step(x, table, a, 1 - a, c, seed=4, step=1, limit=limit, ids=ids)
        assert torch.equal(got.nan_to_num(5), want.nan_to_num(5)), isa
    rest = (torch.tensor([4]), 1, None, limit, ids)
    assert torch.equal(reference.sampler_step(x, table, a, 1 - a, c, *rest).nan_to_num(5), want.nan_to_num(5))


@pytest.mark.parametrize("limit", [None, 0.6])
def test_gradient_and_opcheck_of_a_rounded_prediction(limit):
    x, table = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 5), (4, 5)))
    ids, a = torch.tensor([[0, 3, 3], [3, 1, 0]]), torch.rand(2, 3)
    assert torch.autograd.gradcheck(lambda x, e: sampler_step(x, e, a, 0.5, a, seed=4, limit=limit, ids=ids), (x, table))
    arguments = (a, a, a, torch.tensor([4]), 0, None, limit, ids)
    for dtype in (torch.float32, torch.float64):
        leaves = [v.detach().to(dtype).requires_grad_() for v in (x, table)]
        torch.library.opcheck(torch.ops.pydiffseq.sampler_step.default, (*leaves, *arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bad_ids_are_named(dtype):
    x, ids = batch(dtype=dtype)[0], torch.zeros(3, 5, dtype=torch.int64)
    for table, which, error, message in (
            (x, ids, ValueError, r"x0_hat must have shape \[V, 7\], as ids are given"),
            (x[0], ids.int(), TypeError, "ids must be int64"), (x[0], ids[0], ValueError, r"ids must have shape \[3, 5\]"),
            (x[0], ids - 1, ValueError, r"ids must be in 0\.\.4, got -1"), (x[0], ids + 5, ValueError, "got 5"),
            (x[0], ids.to("meta"), ValueError, "ids is on meta")):
        with pytest.raises(error, match=message):
            sampler_step(x, table, 1.0, 1.0, 0.0, ids=which)
