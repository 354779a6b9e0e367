"""Noise schedules: golden values of the published code and the properties that every schedule has."""

import math

import pytest
import torch

from pydiffseq.diffusion import SCHEDULES, NoiseSchedule, make_schedule, model_time

# t, beta, abar, sigma, posterior variance, posterior factor of x_0, posterior factor of x_t; sqrt schedule, T = 2000
SQRT_GOLDEN = [
    (0, 0.0146413105, 0.985358689, 0.121001283, 0.0, 1.0, 0.0),
    (1, 0.00888908777, 0.97659975, 0.152971404, 0.00556182, 0.37708, 0.622903),
    (100, 0.00143543959, 0.782884406, 0.465956643, 0.001428, 0.00585403, 0.994102),
    (1000, 0.00120697593, 0.295423315, 0.839390663, 0.00120636, 9.31655e-4, 0.99889),
    (1998, 0.555611135, 2.02040408e-4, 0.999898975, 0.555471, 0.0118494, 0.666457),
    (1999, 0.999, 2.02040408e-7, 0.999999899, 0.998798, 0.0141999, 0.0316164),
]


@pytest.mark.parametrize(("t", "beta", "abar", "sigma", "variance", "of_x0", "of_xt"), SQRT_GOLDEN)
def test_sqrt_golden_values(t, beta, abar, sigma, variance, of_x0, of_xt):
    from pydiffseq.diffusion import skip_coefficients

    schedule = make_schedule("sqrt")
    assert schedule.T == 2000
    assert schedule.betas[t].item() == pytest.approx(beta, rel=1e-8)
    assert schedule.abar[t].item() == pytest.approx(abar, rel=1e-8)
    assert schedule.sigma[t].item() == pytest.approx(sigma, rel=1e-7)
    assert schedule.signal[t].item() == pytest.approx(math.sqrt(abar), rel=1e-6)
    assert schedule.posterior_variance[t].item() == pytest.approx(variance, rel=1e-5)
    a, b, posterior = skip_coefficients(schedule.abar_at(torch.tensor(t)), schedule.abar_at(torch.tensor(t - 1)))
    assert (a.item(), b.item(), posterior.item()) == pytest.approx((of_xt, of_x0, variance), rel=1e-5)


def test_other_schedules_follow_their_formulas():
    """Independent statement of each curve: the cumulative product has a closed form, or the betas have."""
    T = 2000
    at = torch.arange(T, dtype=torch.float64)
    cosine = lambda u, s: torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2  # noqa: E731
    zero = torch.zeros((), dtype=torch.float64)
    expected = cosine((at + 1) / T, 0.008) / cosine(zero, 0.008)
    torch.testing.assert_close(make_schedule("cosine").abar[:-1], expected[:-1])  # the last beta is clipped
    torch.testing.assert_close(make_schedule("trunc_cos").abar, cosine(at / T, 0.1))
    linear, truncated, piecewise = (make_schedule(name).betas for name in ("linear", "trunc_lin", "pw_lin"))
    torch.testing.assert_close(linear[[0, 1, -1]], torch.tensor([5e-5, 5e-5 + 0.00995 / 1999, 0.01]).double())
    torch.testing.assert_close(truncated[[0, -1]], torch.tensor([0.01005, 0.02]).double())
    torch.testing.assert_close(piecewise[[0, 9, 10, -1]], torch.tensor([0.01005, 5e-5, 5e-5, 0.01]).double())


@pytest.mark.parametrize("T", [50, 1000, 2000])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_only_adds_noise(name, T):
    schedule = make_schedule(name, T)
    assert schedule.name == name
    assert schedule.betas.dtype == schedule.abar.dtype == torch.float64
    assert schedule.signal.dtype == schedule.sigma.dtype == torch.float32
    assert schedule.betas.shape == schedule.signal.shape == (T,)
    assert bool((schedule.abar.diff() < 0).all())
    assert 0 < schedule.abar[-1] < schedule.abar[0] < 1
    torch.testing.assert_close(schedule.signal.double() ** 2 + schedule.sigma.double() ** 2,
                               torch.ones(T, dtype=torch.float64), atol=1e-6, rtol=0)


def test_abar_at_takes_any_shape_and_the_clean_end():
    schedule = make_schedule("sqrt", 100)
    t = torch.tensor([[[-1, 0, 99]], [[5, 5, -1]]])
    got = schedule.abar_at(t)
    assert got.shape == t.shape and got.dtype == torch.float64
    for index, value in zip(t.flatten().tolist(), got.flatten().tolist(), strict=True):
        assert value == (1.0 if index == -1 else schedule.abar[index].item())


@pytest.mark.parametrize("wrong", [-2, 100])
def test_abar_at_refuses_timesteps_out_of_range(wrong):
    with pytest.raises(ValueError, match=rf"t must be in -1..99, got {wrong}"):
        make_schedule("sqrt", 100).abar_at(torch.tensor([3, wrong]))


def test_abar_at_refuses_float_timesteps():
    with pytest.raises(TypeError, match="integer"):
        make_schedule("sqrt", 100).abar_at(torch.tensor([3.0]))


def test_bad_schedules():
    with pytest.raises(ValueError, match="'sqrtt'.*sqrt, linear, cosine, trunc_cos, trunc_lin, pw_lin"):
        make_schedule("sqrtt")
    with pytest.raises(ValueError, match="at least 1"):
        make_schedule("sqrt", 0)
    with pytest.raises(ValueError, match="more than 10"):
        make_schedule("pw_lin", 10)
    with pytest.raises(ValueError, match="float64"):
        NoiseSchedule("mine", torch.full((3,), 0.1))
    with pytest.raises(ValueError, match=r"\(0, 1\)"):
        make_schedule("linear", 10)


def test_model_time_does_not_depend_on_T():
    assert model_time(torch.tensor([[0, 1000, 1999]]), 2000).tolist() == [[0.0, 500.0, 999.5]]
    assert model_time(torch.tensor([25]), 50).tolist() == [500.0]
    assert model_time(torch.tensor([3]), 50).dtype == torch.float32


def test_to_keeps_the_schedule():
    schedule = make_schedule("cosine", 20)
    assert schedule.to("cpu") is schedule
    if torch.cuda.is_available():
        moved = schedule.to("cuda")
        assert moved.name == "cosine" and torch.equal(moved.abar.cpu(), schedule.abar)
