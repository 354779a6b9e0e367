"""The noise kernels, emulated: the bits of the reference in float32, its values in 16-bit types."""

import pytest
import torch

from pydiffseq.diffusion import xy_token_timesteps
from pydiffseq.ops import _cuda, noise, reference

CPU = torch.device("cpu")
SIGNAL = torch.linspace(1.0, 0.1, 20)


def test_the_self_check_passes(every_order):
    for name, kernel, oracle, *tolerance in noise._cuda_cases(CPU):
        assert _cuda._same(kernel(), oracle(), *tolerance), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_quick_normals_round_to_those_of_the_reference(install, dtype):
    seed, shape = torch.tensor([11]), (4, 100, 512)
    quick = noise._philox_normal_kernel(torch.empty(shape, dtype=dtype), seed, 3, None, 1)
    exact = reference.philox_normal(seed, *shape, 3, None, 1, torch.float32, CPU)
    differing = quick != exact.to(dtype)
    assert differing.float().mean() < (0.003 if dtype == torch.bfloat16 else 0.02)
    torch.testing.assert_close(quick.float(), exact, rtol=0.51 * torch.finfo(dtype).eps, atol=2e-5)


@pytest.mark.parametrize("shape", [(1, 1, 1), (700, 3, 4), (2, 1, 4096)])
@pytest.mark.parametrize("on_device", [False, True])
def test_sizes_and_places_of_the_seed(install, shape, on_device, monkeypatch):
    seed = torch.tensor([-5])
    monkeypatch.setattr(_cuda, "key_arguments", lambda seed, device: (seed, on_device))
    out = noise._philox_normal_kernel(torch.full(shape, 7.0), seed, 3, None, 1)
    assert torch.equal(out, reference.philox_normal(seed, *shape, 3, None, 1, torch.float32, CPU))


def test_an_error_is_that_of_one_call(install, monkeypatch):
    arguments = (torch.empty(1, 2, 4), torch.tensor([-5]), 3, None, 1)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="philox_normal: CUDA error: invalid argument"):
        patch.setattr(_cuda, "launch", lambda kernel, device, *arguments: kernel(*arguments, 0, 1))
        noise._philox_normal_kernel(*arguments)
    noise._philox_normal_kernel(*arguments)


def test_out_of_range_becomes_nan(install):
    x0, t, schedule = torch.ones(2, 3, 8), torch.tensor([[0, 7, 1], [2, 0, -1]]), torch.full((7,), 0.5)
    out, _ = noise._q_sample_kernel(x0, t, schedule, schedule, None, torch.tensor([1]), 0, None, False)
    assert torch.equal(out.isnan().all(-1), (t < 0) | (t > 6)) and out.isnan().sum() == 16


@pytest.mark.parametrize("anchor_scale", [2.0, 1.3, 0.4])
def test_timesteps_of_a_sentence_index_are_the_same_integers(install, anchor_scale):
    """With signal[t] = t, sigma = 0 and x0 = 1, x_t is the timestep."""
    steps, width = 2000, 21
    lengths = torch.tensor([1, 2, 13, 20, 21]).repeat_interleave(400)
    index = torch.arange(len(lengths)) * 7 % (steps + lengths)
    signal = torch.arange(steps).float()
    out, _ = noise._q_sample_kernel(torch.ones(len(index), width, 1), index, signal, signal * 0, None, torch.tensor([0]), 0,
                                    None, False, None, None, lengths, anchor_scale)
    assert torch.equal(out[..., 0].long(), xy_token_timesteps(index, lengths, width, steps, anchor_scale))


def test_a_sentence_index_or_an_id_out_of_range_becomes_nan(install):
    lengths, seed = torch.tensor([3, 2, 3]), torch.tensor([1])
    out, _ = noise._q_sample_kernel(torch.ones(3, 3, 8), torch.tensor([-1, 22, 22]), SIGNAL, SIGNAL, None, seed, 0, None,
                                    False, None, None, lengths, 2.0)
    assert torch.equal(out.isnan().all(-1).all(-1), torch.tensor([True, True, False])) and out[2].isfinite().all()
    x, ones, ids = torch.zeros(2, 3, 8), torch.ones(2, 3), torch.tensor([[0, 4, 1], [2, -1, 3]])
    out = noise._sampler_step_kernel(x, x[0, :1].expand(4, 8), ones, ones, ones, seed, 0, None, None, ids)
    assert torch.equal(out.isnan().all(-1), (ids < 0) | (ids > 3)) and out.isnan().sum() == 16


def gradients(tokens, d, dtype=torch.float32, sentences=1):
    g = torch.Generator().manual_seed(tokens)
    grads = [torch.randn(sentences, tokens // sentences, d, generator=g).to(dtype) for _ in range(2)]
    t = torch.randint(0, 20, grads[0].shape[:2], generator=g)
    return grads, t, torch.rand(grads[0].shape[:2], generator=g) > 0.2


IDS = {"one": lambda n: torch.full((n,), 3), "all": lambda n: torch.arange(n).flip(0),
       "few": lambda n: torch.arange(n) * 7 % 5, "often one": lambda n: torch.arange(n) * (torch.arange(n) % 3 == 0)}


@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 64, 65, 300])
@pytest.mark.parametrize("kind", IDS)
@pytest.mark.parametrize("dtype, d", [(torch.float32, 5), (torch.bfloat16, 24)])
def test_gradients_of_the_table_against_float64(install, tokens, kind, dtype, d):
    (x0, x_t), t, mask = gradients(tokens, d, dtype)
    ids, vocab = IDS[kind](tokens)[None], max(tokens, 5)
    for given in ((x0, x_t), (x0, None), (None, x_t)):
        ours = noise._embed_backward_kernel(*given, ids, t, SIGNAL, mask, vocab, x0)
        wide = [None if grad is None else grad.double() for grad in given]
        want = reference.embed_q_sample_backward(*wide, ids, t, SIGNAL, mask, vocab, x0.double())
        torch.testing.assert_close(ours.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-5 * tokens**0.5)
        assert not ours[torch.bincount(ids[0], minlength=vocab) == 0].any()


def test_the_order_of_the_sums_does_not_depend_on_the_grid(install):
    """Large and small numbers, so that another order would give other bits; a row that one token has is exact."""
    (x0, x_t), t, mask = gradients(3000, 40, sentences=3)
    x0 = x0 * 10.0 ** (torch.arange(3000).view(3, 1000, 1) % 9 - 4)
    ids = torch.arange(3000).view(3, 1000) * 11 % 7
    ids[1, 5], ids[2, 0] = 8, -1   # nobody else's, and none
    results = []
    for processors in (1, 2, 7):
        install.set_processors(processors)
        results.append(noise._embed_backward_kernel(x0, x_t, ids, t, SIGNAL, mask, 10, x0))
    assert all(torch.equal(other, results[0]) for other in results[1:])
    alone = x0[1, 5].double() + (SIGNAL[t[1, 5]] if mask[1, 5] else 1.0) * x_t[1, 5].double()
    torch.testing.assert_close(results[0][8].double(), alone, rtol=1e-7, atol=0)
    ids[2, 0] = 9
    want = reference.embed_q_sample_backward(x0.double(), x_t.double(), ids, t, SIGNAL, mask, 10, x0.double())
    torch.testing.assert_close(results[0][:9].double(), want[:9], rtol=1e-5, atol=1e-2)
    assert not results[0][9].any()


def test_gradients_with_timesteps_of_a_sentence_index(install):
    (x0, x_t), _, mask = gradients(60, 8, sentences=3)
    ids, index, lengths = torch.arange(60).view(3, 20) % 9, torch.tensor([0, 17, 30]), torch.tensor([20, 3, 11])
    ours = noise._embed_backward_kernel(x0, x_t, ids, index, SIGNAL, mask, 9, x0, lengths, 1.5)
    t = xy_token_timesteps(index, lengths, 20, 20, 1.5)
    assert torch.equal(ours, noise._embed_backward_kernel(x0, x_t, ids, t, SIGNAL, mask, 9, x0))
    assert torch.equal(noise._q_sample_backward_kernel(x_t, index, SIGNAL, mask, lengths, 1.5),
                       noise._q_sample_backward_kernel(x_t, t, SIGNAL, mask))
