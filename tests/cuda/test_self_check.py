"""The self-check before the first use of the CUDA kernels, and the arguments that their bindings get.

Runs without a GPU: a stand-in for ``_C`` computes on the very addresses that it is handed.
"""

import ctypes
import math
import warnings

import pytest
import torch

from pydiffseq.ops import _cuda, noise, reference

CPU = torch.device("cpu")
SIZES = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2, torch.int64: 8, torch.bool: 1}


def view(address, shape, dtype):
    """The tensor at ``address``, sharing its memory; ``None`` for address 0."""
    if address == 0:
        return None
    memory = (ctypes.c_char * (math.prod(shape) * SIZES[dtype])).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class FakeExtension:
    """Has the bindings of csrc/bindings/noise.cpp; they run the reference. Notes the calls."""

    has_cuda = True

    def __init__(self, wrong=""):
        self.wrong = wrong
        self.calls = []

    def finish(self, name, outputs):
        self.calls.append(name)
        for address, value in outputs:
            if address:
                view(address, value.shape, value.dtype).copy_(value)
        if name == self.wrong:
            first = view(outputs[-1][0], outputs[-1][1].shape, outputs[-1][1].dtype)
            first.view(-1)[-1] += 0.01

    @staticmethod
    def times(times, B, N):
        """(t, lengths, anchor scale)"""
        t, lengths, anchor_scale, per_token = times
        return view(t, (B, N) if per_token else (B,), torch.int64), view(lengths, (B,), torch.int64), anchor_scale

    @staticmethod
    def dtype(code):
        return next(dtype for dtype, number in _cuda.DTYPES.items() if number == code)

    def noise_q_sample_cuda(self, source, ids, times, signal, sigma, mask, absorbing, gone, x0, x_t, eps, seed, rows, step,
                            B, N, d, T, V, sigma0, dtype, seed_on_device, stream, device):
        dtype, key = self.dtype(dtype), (view(seed, (1,), torch.int64), step, view(rows, (B,), torch.int64))
        t, *line = self.times(times, B, N)
        sample = t, view(signal, (T,), torch.float32), view(sigma, (T,), torch.float32)
        mask, drift = view(mask, (B, N), torch.bool), (view(absorbing, (d,), dtype), view(gone, (B, N), torch.bool), *line)
        if ids:
            embedded = view(source, (V, d), dtype), view(ids, (B, N), torch.int64)
            out = reference.embed_q_sample(*embedded, *sample, sigma0, mask, *key, True, *drift)
            return self.finish("embed_q_sample", list(zip((x0, eps, x_t), (out[0], out[2], out[1]), strict=True)))
        x, noise_ = reference.q_sample(view(source, (B, N, d), dtype), *sample, mask, *key, True, *drift)
        return self.finish("q_sample", [(eps, noise_), (x_t, x)])

    def noise_q_sample_backward_cuda(self, grad, times, signal, mask, out, B, N, d, T, dtype, stream, device):
        t, *line = self.times(times, B, N)
        result = reference.q_sample_backward(view(grad, (B, N, d), self.dtype(dtype)), t, view(signal, (T,), torch.float32),
                                             view(mask, (B, N), torch.bool), *line)
        self.finish("q_sample_backward", [(out, result)])

    def noise_embed_backward_cuda(self, grad_x0, grad_x_t, times, signal, mask, sorted_ids, sorted_tokens, partial, table,
                                  B, N, d, T, V, dtype, stream, device):
        dtype, (t, *line) = self.dtype(dtype), self.times(times, B, N)
        ids = torch.empty(B * N, dtype=torch.int64)
        ids[view(sorted_tokens, (B * N,), torch.int64)] = view(sorted_ids, (B * N,), torch.int64)
        result = reference.embed_q_sample_backward(
            view(grad_x0, (B, N, d), dtype), view(grad_x_t, (B, N, d), dtype), ids.view(B, N), t,
            view(signal, (T,), torch.float32), view(mask, (B, N), torch.bool), V, view(table, (V, d), dtype), *line)
        self.finish("embed_q_sample_backward", [(table, result)])

    def noise_sampler_step_cuda(self, x, x0_hat, ids, a, b, c, out, seed, rows, step, B, N, d, V, limit, dtype,
                                seed_on_device, stream, device):
        goal = view(x0_hat, (V, d) if ids else (B, N, d), self.dtype(dtype))
        coefficients = (view(address, (B, N), torch.float32) for address in (a, b, c))
        self.finish("sampler_step", [(out, reference.sampler_step(
            view(x, (B, N, d), self.dtype(dtype)), goal, *coefficients, view(seed, (1,), torch.int64), step,
            view(rows, (B,), torch.int64), limit, view(ids, (B, N), torch.int64)))])

    def noise_philox_normal_cuda(self, out, seed, rows, step, philox_stream, B, N, d, dtype, seed_on_device, stream,
                                 device):
        self.finish("philox_normal", [(out, reference.philox_normal(
            view(seed, (1,), torch.int64), B, N, d, step, view(rows, (B,), torch.int64), philox_stream,
            self.dtype(dtype), CPU))])


@pytest.fixture
def install(monkeypatch):
    """Put a fake in the place of ``_C``, and CPU tensors in that of CUDA tensors."""
    def put(fake):
        monkeypatch.setattr(noise, "C", fake)
        monkeypatch.setattr(_cuda, "C", fake)
        monkeypatch.setattr(_cuda, "_verdicts", {})
        monkeypatch.setattr(_cuda, "launch", lambda kernel, device, *arguments: kernel(*arguments, 0, 0))
        monkeypatch.setattr(noise, "_use_cuda", lambda like: _cuda.trusted("noise", like.device, noise._cuda_cases))
        return fake
    return put


def run_all():
    """Every op once through its CUDA implementation, and what the reference gives."""
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, 5, 6, generator=g), torch.randint(0, 9, (2,), generator=g)
    ids, mask = torch.randint(0, 4, (2, 5), generator=g), torch.rand(2, 5, generator=g) > 0.3
    signal, a, key = torch.rand(9, generator=g), torch.rand(2, 5, generator=g), (torch.tensor([3]), 2, None)
    sample = (t, signal, 1 - signal)
    for name, arguments in (
            ("q_sample", (x, *sample, mask, *key, True)), ("q_sample", (x, *sample, None, *key, False)),
            ("embed_q_sample", (x[0], ids, *sample, 0.1, mask, *key, True)),
            ("q_sample_backward", (x, t, signal, mask)),
            ("embed_q_sample_backward", (x, x.flip(0), ids, t, signal, mask, 4, x)),
            ("embed_q_sample_backward", (None, x, ids, t, signal, None, 4, x)),
            ("embed_q_sample_backward", (None, None, ids, t, signal, None, 4, x)),
            ("sampler_step", (x, x.flip(0), a, 1 - a, a, *key)), ("sampler_step", (x, x[0], a, 1 - a, a, *key, None, ids)),
            ("philox_normal", (key[0], 2, 5, 6, 1, torch.tensor([7, 8]), 3, torch.float32, CPU))):
        short = {"embed_q_sample": "embed", "embed_q_sample_backward": "embed_backward"}.get(name, name)
        yield name, getattr(noise, f"_{short}_cuda")(*arguments), getattr(reference, name)(*arguments)


def test_kernels_that_agree_are_used(install):
    fake = install(FakeExtension())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, ours, theirs in run_all():
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 if "embed" in name else 0)
    trial = len(_cuda.DTYPES) * 2
    forms = {"q_sample": 3, "sampler_step": 3}  # with and without what they can do besides
    assert {name: fake.calls.count(name) - trial * forms.get(name, 1) for name in fake.calls} == {
        "q_sample": 2, "embed_q_sample": 1, "q_sample_backward": 1, "embed_q_sample_backward": 3, "sampler_step": 2,
        "philox_normal": 1}


@pytest.mark.parametrize("wrong", ["q_sample", "embed_q_sample", "q_sample_backward", "embed_q_sample_backward",
                                   "sampler_step", "philox_normal"])
def test_a_wrong_kernel_warns_once_and_leaves_the_ops_to_the_reference(install, wrong):
    fake = install(FakeExtension(wrong))
    with pytest.warns(UserWarning, match=f"noise failed their self-check on cpu .{wrong} differs") as caught:
        for _, ours, theirs in run_all():
            torch.testing.assert_close(ours, theirs)
    assert len(caught) == 1 and fake.calls.count(wrong) == 1


def test_a_failing_launch_warns_once_and_leaves_the_ops_to_the_reference(install):
    def fail(*_):
        raise RuntimeError("q_sample: CUDA error: no kernel image is available for execution on the device")

    fake = install(FakeExtension())
    fake.noise_q_sample_cuda = fail
    with pytest.warns(UserWarning, match="no kernel image is available") as caught:
        for _, ours, theirs in run_all():
            torch.testing.assert_close(ours, theirs)
    assert len(caught) == 1


def test_every_device_and_family_has_its_own_verdict(monkeypatch):
    monkeypatch.setattr(_cuda, "_verdicts", {})
    monkeypatch.setattr(_cuda, "capturing", lambda device: False)
    trials = []

    def cases(device):
        trials.append(device)
        yield "op", lambda: torch.zeros(1), lambda: torch.tensor([float(device.index)])

    with pytest.warns(UserWarning, match="of family failed their self-check on cuda:1"):
        verdicts = [_cuda.trusted("family", torch.device("cuda", index), cases) for index in (0, 1, 0, 1)]
    assert verdicts == [True, False, True, False] and len(trials) == 2
    assert _cuda.trusted("other", torch.device("cuda", 0), cases) and len(trials) == 3


def test_the_trial_may_use_any_algorithm(monkeypatch):
    monkeypatch.setattr(_cuda, "_verdicts", {})

    def cases(device):
        yield "op", lambda: torch.zeros(1), lambda: torch.ones(1) * torch.are_deterministic_algorithms_enabled()

    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert _cuda.trusted("family", CPU, cases)
        assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_no_trial_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(_cuda, "_verdicts", {})
    monkeypatch.setattr(_cuda, "capturing", lambda device: True)
    assert not _cuda.trusted("family", torch.device("cuda", 0), lambda device: pytest.fail("a trial"))
    monkeypatch.setattr(_cuda, "capturing", lambda device: False)
    assert _cuda.trusted("family", torch.device("cuda", 0), lambda device: [])
