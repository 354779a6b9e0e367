"""The noise ops on a GPU: the bits of the CPU kernels in float32, their values in 16-bit types, in every size and place of
the seed."""

import math
import subprocess
import sys
import warnings

import pytest
import torch

from pydiffseq.diffusion import xy_token_timesteps
from pydiffseq.ops import _cuda, embed_q_sample, noise, philox_normal, q_sample, reference, sampler_step

pytestmark = pytest.mark.skipif(not (torch.cuda.is_available() and _cuda.compiled()),
                                reason="needs a GPU and the CUDA kernels")
T = 50
SIGNAL = torch.linspace(1.0, 0.0, T)
SIGMA = (1 - SIGNAL**2).sqrt()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module", autouse=True)
def self_check_passes():
    """Without this the tests would compare the reference with itself."""
    device = torch.device("cuda", torch.cuda.current_device())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _cuda.trusted("noise", device, noise._cuda_cases)


def batch(B, N, d, dtype, per_token=True):
    g = torch.Generator().manual_seed(B * 1000 + N * 100 + d)
    x0 = torch.randn(B, N, d, generator=g).to(dtype)
    t = torch.randint(0, T, (B, N) if per_token else (B,), generator=g)
    return x0, t, torch.rand(B, N, generator=g) > 0.3


def everything(device, B, N, d, dtype, per_token=True, masked=True, rows=None, seed=None):
    """All outputs of all ops, on the CPU."""
    x0, t, mask = batch(B, N, d, dtype, per_token)
    ids = torch.arange(B * N).reshape(B, N) % 6
    table = torch.randn(6, d, generator=torch.Generator().manual_seed(d)).to(dtype)
    a = torch.rand(B, N, generator=torch.Generator().manual_seed(1))
    x0, t, mask, ids, table, a, signal, sigma = (
        tensor.to(device) for tensor in (x0, t, mask, ids, table, a, SIGNAL, SIGMA))
    rows = None if rows is None else rows.to(device)
    options = {"seed": torch.tensor([-(2**62) + 5]) if seed is None else seed, "step": 6, "rows": rows}
    sample = {"mask": mask if masked else None, "return_noise": True} | options
    schedule = (t, signal, sigma)
    outputs = (*q_sample(x0, *schedule, **sample), *embed_q_sample(table, ids, *schedule, sigma0=0.1, **sample),
               *embed_q_sample(table, ids, *schedule, sigma0=0.0, **sample),
               *q_sample(x0, *schedule, **sample, absorbing=table[1].clone(), gone=ids == 2),
               *embed_q_sample(table, ids, *schedule, sigma0=0.1, **sample, absorbing=table[1].clone(), gone=ids == 2),
               sampler_step(x0, x0.flip(1), a, 1 - a, a * mask, **options),
               sampler_step(x0, x0.flip(1), a, 1 - a, a * mask, limit=0.5, **options),
               sampler_step(x0, table, a, 1 - a, a * mask, limit=0.5, ids=ids, **options),
               philox_normal((B, N, d), dtype=dtype, device=device, **options),
               torch.ops.pydiffseq.q_sample_backward(x0, t, signal, sample["mask"]))
    return [out.cpu() for out in outputs]


def assert_same_noise(ours, theirs):
    """The same bits in float32; in 16-bit types the normals may differ in the last place."""
    tolerance = 0.0 if ours.dtype == torch.float32 else 2 * torch.finfo(ours.dtype).eps   # checks the dtypes, too
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def assert_devices_agree(*arguments, **options):
    results = [everything(device, *arguments, **options) for device in ("cuda", "cpu")]
    for ours, theirs in zip(*results, strict=True):
        assert_same_noise(ours, theirs)
    gradients = [outputs[-1] for outputs in results]   # draw nothing, so they have the same bits in every dtype
    assert torch.equal(*gradients)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B, N, d", [(3, 5, 1), (3, 5, 7), (2, 9, 64), (3, 5, 130), (2, 3, 768), (1, 2, 4096),
                                     (4, 1, 12)])
def test_values_are_those_of_the_cpu(dtype, B, N, d):
    assert_devices_agree(B, N, d, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_every_kind_of_argument(dtype, per_token, masked):
    assert_devices_agree(3, 5, 24, dtype, per_token, masked, rows=torch.tensor([4, 3 << 32 | 9, 2]))


@pytest.mark.parametrize("N", [7, 1, 400_001])
def test_bits_where_the_grid_goes_round_more_than_once(N):
    """More tokens than the largest grid has threads."""
    assert_devices_agree(math.ceil(2_400_000 / N), N, 1, torch.float32)


def test_a_seed_on_the_device_is_the_same_key():
    host = everything("cuda", 3, 5, 24, torch.float32, seed=77)
    device = everything("cuda", 3, 5, 24, torch.float32, seed=torch.tensor([77], device="cuda"))
    assert all(torch.equal(a, b) for a, b in zip(host, device, strict=True))


@pytest.mark.parametrize("shape", [(0, 5, 8), (3, 0, 8), (3, 5, 0)])
def test_empty(shape):
    assert_devices_agree(*shape, torch.float32)


def test_unaligned_and_strided_inputs():
    x0, t, _ = batch(3, 5, 33, torch.float32)
    signal, sigma, t = SIGNAL.cuda(), SIGMA.cuda(), t.cuda()
    for view in (x0.cuda()[..., 1:], x0.cuda().flatten()[1:1 + 3 * 5 * 32].view(3, 5, 32), x0.cuda().transpose(0, 1)):
        times = t if view.shape[:2] == t.shape else t.t()
        ours = q_sample(view, times, signal, sigma, seed=1)
        assert torch.equal(ours.cpu(), q_sample(view.cpu(), times.cpu(), SIGNAL, SIGMA, seed=1))


def test_the_current_stream_is_used():
    """Work queued before on the same side stream is waited for, though the default stream is idle."""
    x0, t, _ = batch(16, 64, 128, torch.float32)
    expected = q_sample(x0 * 2, t, SIGNAL, SIGMA, seed=1)
    signal, sigma, t = SIGNAL.cuda(), SIGMA.cuda(), t.cuda()
    stream = torch.cuda.Stream()
    buffer = torch.zeros_like(x0, device="cuda")
    twice = (x0 * 2).cuda()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        buffer.copy_(twice)
        ours = q_sample(buffer, t, signal, sigma, seed=1)
    stream.synchronize()
    assert torch.equal(ours.cpu(), expected)


def test_a_graph_replays_with_the_seed_of_the_device():
    x0, t, _ = batch(4, 8, 32, torch.float32)
    x0, t, signal, sigma = x0.cuda(), t.cuda(), SIGNAL.cuda(), SIGMA.cuda()
    seed = torch.tensor([5], device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = q_sample(x0, t, signal, sigma, seed=seed)
    for value in (5, 6):
        seed.fill_(value)
        graph.replay()
        assert torch.equal(out, q_sample(x0, t, signal, sigma, seed=value))


def test_out_of_range_becomes_nan_and_leaves_the_rest():
    x0, t, _ = batch(2, 3, 8, torch.float32)
    good = q_sample(x0, t, SIGNAL, SIGMA, seed=1)
    t[0, 1], t[1, 2] = T, -1
    bad = q_sample(x0.cuda(), t.cuda(), SIGNAL.cuda(), SIGMA.cuda(), seed=1).cpu()
    assert bad[0, 1].isnan().all() and bad[1, 2].isnan().all()
    inside = (t >= 0) & (t < T)
    assert torch.equal(bad[inside], good[inside])
    ids = torch.tensor([[0, 99, 1], [-1, 0, 1]])
    x0, x_t = (v.cpu() for v in embed_q_sample(x0[0].cuda(), ids.cuda(), torch.zeros(2, dtype=torch.int64).cuda(),
                                               SIGNAL.cuda(), SIGMA.cuda(), sigma0=0.1, seed=1))
    expected = (ids < 0) | (ids > 2)
    assert torch.equal(x0.isnan().all(-1), expected) and torch.equal(x_t.isnan().any(-1), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_agree_with_the_cpu_and_repeat(dtype):
    grads = []
    for device in ("cuda", "cuda", "cpu"):
        g = torch.Generator().manual_seed(0)
        table = torch.randn(9, 24, generator=g).to(device, dtype).requires_grad_()
        ids, t = (torch.randint(0, size, (40, 50), generator=g).to(device) for size in (9, T))
        x0, x_t = embed_q_sample(table, ids, t, SIGNAL.to(device), SIGMA.to(device), sigma0=0.1, seed=3)
        (x0.float().sin().sum() + x_t.float().square().sum()).backward()
        grads.append(table.grad.cpu())
    assert torch.equal(grads[0], grads[1])
    rtol = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(grads[0].float(), grads[2].float(), rtol=rtol, atol=1e-2)


@pytest.mark.parametrize("anchor_scale", [2.0, 1.3, 0.4])
def test_timesteps_of_a_sentence_index_are_the_same_integers(anchor_scale):
    """With signal[t] = t, sigma = 0 and x0 = 1, x_t is the timestep."""
    steps, width = 2000, 64
    lengths = torch.arange(1, width + 1).repeat_interleave(steps)
    index = torch.arange(len(lengths)) * 7 % (steps + lengths)
    signal = torch.arange(steps).float().cuda()
    got = q_sample(torch.ones(len(index), width, 1).cuda(), index.cuda(), signal, signal * 0, lengths=lengths.cuda(),
                   anchor_scale=anchor_scale, seed=0)
    assert torch.equal(got[..., 0].long().cpu(), xy_token_timesteps(index, lengths, width, steps, anchor_scale))


def table_gradient(device, dtype, lengths=None):
    """Of a table of which three rows have nearly all tokens, so that sums are long."""
    g = torch.Generator().manual_seed(0)
    table = torch.randn(500, 40, generator=g).to(device, dtype).requires_grad_()
    ids = torch.where(torch.rand(96, 64, generator=g) < 0.95, torch.randint(0, 3, (96, 64), generator=g),
                      torch.randint(0, 500, (96, 64), generator=g))
    t = torch.randint(0, T, (96,) if lengths is not None else (96, 64), generator=g)
    mask, lengths = torch.rand(96, 64, generator=g) > 0.3, None if lengths is None else lengths.to(device)
    x0, x_t = embed_q_sample(table, ids.to(device), t.to(device), SIGNAL.to(device), SIGMA.to(device), sigma0=0.1, seed=3,
                             mask=mask.to(device), lengths=lengths)
    (x0.float().sin().sum() + x_t.float().square().sum()).backward()
    return table.grad.cpu()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index", [False, True])
def test_gradients_of_long_sums_repeat_whatever_torch_is_told(dtype, index):
    lengths = torch.arange(96) % 64 + 1 if index else None
    usual, cpu = table_gradient("cuda", dtype, lengths), table_gradient("cpu", dtype, lengths)
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(3):
            assert torch.equal(table_gradient("cuda", dtype, lengths), usual)
    finally:
        torch.use_deterministic_algorithms(False)
    difference = (usual.double() - cpu.double()).norm()
    assert difference <= 4 * torch.finfo(dtype).eps * cpu.double().norm() and usual.isfinite().all()


def test_a_graph_of_the_gradient_of_the_table():
    """More tokens than torch's own embedding gradient takes without a sort."""
    x0, t, mask = (v.cuda() for v in batch(64, 64, 32, torch.float32))
    ids, signal = (torch.arange(64 * 64) * 7 % 90).view(64, 64).cuda(), SIGNAL.cuda()
    arguments = (None, x0, ids, t, signal, mask, 90, x0)
    expected = torch.ops.pydiffseq.embed_q_sample_backward(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = torch.ops.pydiffseq.embed_q_sample_backward(*arguments)
    x0 *= 2
    graph.replay()
    assert torch.equal(out, 2 * expected)


def test_opcheck():
    x0, t, mask = (v.cuda() for v in batch(3, 5, 7, torch.float32))
    signal, sigma, rows, a = SIGNAL.cuda(), SIGMA.cuda(), torch.tensor([1, 2, 3]).cuda(), torch.rand(3, 5).cuda()
    ids, grad, seed = torch.randint(0, 15, (3, 5)).cuda(), x0.clone().requires_grad_(), torch.tensor([5])
    table = x0.flatten(0, 1).clone().requires_grad_()
    ops = torch.ops.pydiffseq
    torch.library.opcheck(ops.q_sample.default, (grad, t, signal, sigma, mask, seed, 1, rows, True))
    torch.library.opcheck(ops.q_sample_backward.default, (grad, t, signal, mask))
    torch.library.opcheck(ops.embed_q_sample.default, (table, ids, t, signal, sigma, 0.1, mask, seed, 1, rows, True))
    torch.library.opcheck(ops.embed_q_sample_backward.default, (x0, x0, ids, t, signal, mask, 15, x0))
    torch.library.opcheck(ops.sampler_step.default, (grad, x0.flip(0), a, a, a, seed, 1, rows))
    torch.library.opcheck(ops.sampler_step.default, (grad, table, a, a, a, seed, 1, rows, 0.5, ids))
    index, lengths = torch.tensor([3, 17, T]).cuda(), torch.tensor([5, 4, 1]).cuda()
    torch.library.opcheck(ops.embed_q_sample.default, (table, ids, index, signal, sigma, 0.1, mask, seed, 1, rows, True,
                                                       None, None, lengths, 1.5))
    torch.library.opcheck(ops.embed_q_sample_backward.default, (x0, x0, ids, index, signal, mask, 15, x0, lengths, 1.5))
    torch.library.opcheck(ops.philox_normal.default, (seed, 3, 5, 7, 1, rows, 3, torch.float32, x0.device))


def test_more_than_2_to_31_elements():
    B, N, d = 3, 90_001, 8192
    if torch.cuda.mem_get_info()[0] < 3 * 2 * B * N * d:
        pytest.skip("needs 13 GB of GPU memory")
    big = philox_normal((B, N, d), seed=4, dtype=torch.bfloat16, device="cuda")
    assert big.numel() > 2**31
    last = philox_normal((1, N, d), seed=4, rows=torch.tensor([B - 1]), dtype=torch.bfloat16, device="cuda")
    assert torch.equal(big[-1], last[0])
    group = torch.arange((N - 1) * (d // 4), N * (d // 4))
    words = reference.philox_words((group, reference.STREAMS["initial"] << 24, B - 1, 0), torch.tensor([4]))
    pairs = *reference._normal_pair(*words[:2]), *reference._normal_pair(*words[2:])
    assert_same_noise(big[-1, -1].cpu(), torch.stack(pairs, -1).flatten().bfloat16())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one():
    x0, t, _ = batch(3, 5, 24, torch.float32)
    ours = q_sample(*(v.to("cuda:1") for v in (x0, t, SIGNAL, SIGMA)), seed=1)
    assert torch.cuda.current_device() == 0 and ours.device.index == 1
    assert torch.equal(ours.cpu(), q_sample(x0, t, SIGNAL, SIGMA, seed=1))


def test_the_error_names_the_op_and_says_what_cuda_says():
    """In a process of its own: dtype code 9 does not exist."""
    code = ("from pydiffseq import _C\n"
            "try: _C.noise_philox_normal_cuda(0, 0, 0, 0, 3, 1, 1, 1, 9, True, 0, 0)\n"
            "except RuntimeError as error: print(error)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "philox_normal: CUDA error: invalid argument" in done.stdout, done.stderr
