"""Solvers: golden coefficients, and the oracle denoiser over every solver and step list.

With a denoiser that returns the true x_0, the factor of x_0 in the state must be sqrt(abar_t) at every visited t, and a
clean end must return x_0 itself. That catches a wrong target level (DiffuSeq's DDIM with skipped steps is left with a
factor of 0.10 at 100 steps and 0.025 at 10) and a wrong mean.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pydiffseq.diffusion import (
    SCHEDULES,
    SOLVERS,
    ancestral,
    ancestral_steps,
    cedi_timesteps,
    ddim,
    ddim_coefficients,
    dpmpp2m,
    get_solver,
    make_schedule,
    skip,
    skip_coefficients,
    token_steps,
    uniform_steps,
    xy_steps,
)

SQRT = make_schedule("sqrt")
B, N, D = 3, 6, 4
LENGTHS = torch.tensor([6, 3, 5])

STEP_LISTS = {
    "uniform 1": uniform_steps(2000, 1),
    "uniform 10": uniform_steps(2000, 10),
    "uniform 100 to zero": uniform_steps(2000, 100, end="zero"),
    "uniform 7": uniform_steps(2000, 7),
    "xy 20": xy_steps(2000, N, N, 20),
    "xy 20 clean": xy_steps(2000, N, N, 20, end="clean"),
    "xy 20, own lengths": xy_steps(2000, LENGTHS, N, 20),
    "xy 3 clean, own lengths": xy_steps(2000, LENGTHS, N, 3, anchor_scale=1.0, end="clean"),
    "xy 700, own lengths": xy_steps(2000, LENGTHS, N, 700, end="clean"),
    "rolling 12, own lengths": token_steps(2000, range(1999, 0, -166), LENGTHS, N, 0.5, path="rolling"),
    "per sentence": [(torch.tensor([1999, 900, 30]), torch.tensor([1000, 900, 0])), (torch.tensor([1000, 900, 0]), -1)],
}
SHORT = make_schedule("sqrt", 50)
SHORT_LISTS = {
    "ancestral": ancestral_steps(50),
    "full xy": xy_steps(50, LENGTHS, N, 53),
    "full xy clean": xy_steps(50, N, N, 56, end="clean"),
}
CASES = [(SQRT, name, steps) for name, steps in STEP_LISTS.items()]
CASES += [(SHORT, name, steps) for name, steps in SHORT_LISTS.items()]
EVERY_LIST = pytest.mark.parametrize(("schedule", "steps"), [(s, steps) for s, _, steps in CASES],
                                     ids=[name for _, name, _ in CASES])
EVERY_SOLVER = pytest.mark.parametrize("name", SOLVERS)
OFF_SCHEDULE = ("cedi", "dpmpp2m_refeed")   # their states are not at the schedule's level, by design


def mean_only(x, x0_hat, a, b, c, *, seed, step, rows):
    return a[..., None] * x + b[..., None] * x0_hat


def variance_only(x, x0_hat, a, b, c, *, seed, step, rows):
    """Lets ``x`` carry the variance of the state instead of the state."""
    return a[..., None].double() ** 2 * x + c[..., None].double() ** 2


def level(schedule, t):
    """abar of an entry of a step list, as float64 [B or 1, N or 1, 1]."""
    t = torch.as_tensor(t)
    return schedule.abar_at(t if t.dim() == 2 else t.reshape(-1, 1))[..., None]


@EVERY_LIST
@pytest.mark.parametrize("name", [name for name in SOLVERS if name not in OFF_SCHEDULE])
def test_oracle_denoiser(name, schedule, steps):
    x0 = torch.randn(B, N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    told = []

    def oracle(x, t):
        told.append(t)
        return x0

    def check(info):
        torch.testing.assert_close(info["x"], (level(schedule, info["t_next"]).sqrt() * x0), atol=2e-6, rtol=1e-5)

    start = level(schedule, steps[0][0]).sqrt() * x0
    x, x0_hat = SOLVERS[name](oracle, start, steps, schedule, update=mean_only, callback=check)
    assert torch.equal(x0_hat, x0)
    assert len(told) == len(steps)
    for t, (entry, _) in zip(told, steps, strict=True):
        expected = (B,) if torch.as_tensor(entry).dim() < 2 else (B, N)
        assert tuple(t.shape) == expected and bool((t == torch.as_tensor(entry).clamp_min(0)).all())
    if bool((torch.as_tensor(steps[-1][1]) == -1).all()):
        assert torch.equal(x, x0)


@EVERY_LIST
@pytest.mark.parametrize(("name", "options"), [("ancestral", {"variance": "small"}), ("skip", {})])
def test_noise_level_is_that_of_the_schedule(name, options, schedule, steps):
    """Starting from variance 1 - abar_t, each state has the variance 1 - abar_u (the skip solver: but at u = 0)."""

    def check(info):
        target = (1 - level(schedule, info["t_next"])).expand(B, N, 1)
        noisy = torch.ones(B, N, 1, dtype=torch.bool) if name == "ancestral" else target != 1 - schedule.abar[0]
        torch.testing.assert_close(info["x"][noisy], target[noisy], atol=1e-6, rtol=1e-5)

    start = (1 - level(schedule, steps[0][0])).expand(B, N, 1)
    SOLVERS[name](lambda x, t: torch.zeros_like(x), start, steps, schedule, update=variance_only, callback=check,
                  **options)


@EVERY_LIST
@pytest.mark.parametrize("name", ["ddim", "ddim_xy"])
def test_ddim_keeps_the_noise_it_started_with(name, schedule, steps):
    eps = torch.randn(B, N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def check(info):
        torch.testing.assert_close(info["x"], (1 - level(schedule, info["t_next"])).sqrt() * eps, atol=2e-6, rtol=1e-5)

    def refuse_noise(x, x0_hat, a, b, c, **kwargs):
        assert not bool(c.any())
        return mean_only(x, x0_hat, a, b, c, **kwargs)

    start = (1 - level(schedule, steps[0][0])).sqrt() * eps
    SOLVERS[name](lambda x, t: torch.zeros_like(x), start, steps, schedule, update=refuse_noise, callback=check)


@EVERY_LIST
@pytest.mark.parametrize("name", OFF_SCHEDULE)
def test_oracle_denoiser_off_the_schedule(name, schedule, steps):
    """CeDi: the noise estimate of the level told, put at the level of the next state. Refeed: DDIM's update of x0."""
    x0 = torch.randn(B, N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    told, states = [], [torch.randn(B, N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))]

    def check(info):
        told_level, after = level(schedule, told[-1]), level(schedule, info["t_next"])
        start = states[-1] if name == "cedi" else x0
        eps = (start - told_level.sqrt() * x0) / (1 - told_level).sqrt()
        expected = after.sqrt() * x0 + (1 - after).sqrt() * eps
        stay = level(schedule, info["t"]) == after
        torch.testing.assert_close(info["x"], torch.where(stay, start, expected), atol=2e-6, rtol=1e-5)
        states.append(info["x"])

    x, _ = SOLVERS[name](lambda x, t: told.append(t) or x0, states[0], steps, schedule, update=mean_only, callback=check)
    for t, (entry, _) in zip(told, steps, strict=True):
        entry = torch.as_tensor(entry).clamp_min(0)
        expected = cedi_timesteps(entry, schedule) if name == "cedi" else entry
        assert bool((t == (expected if t.dim() == expected.dim() else expected.reshape(-1))).all())
    if bool((torch.as_tensor(steps[-1][1]) == -1).all()):
        torch.testing.assert_close(x, x0, atol=2e-6, rtol=1e-5)


def test_cedi_tells_times_from_sigma_099_up():
    """0.9606 T on the sqrt schedule (DINOISER's value for it)."""
    told = cedi_timesteps(torch.arange(-1, 2000), SQRT)
    assert told[-1] == 1999 and told[0] == told[1] == pytest.approx(0.9606 * 2000, abs=3)
    assert SQRT.sigma[told[0]] >= 0.99 > SQRT.sigma[told[0] - 1] and bool((told.diff() >= 0).all())


def test_dpm_solver_is_of_second_order():
    """For x_0 ~ N(0, 1/4) the denoiser is linear and the probability flow scales the state by its deviation."""
    schedule = make_schedule("cosine", 4000)

    def deviation(t):
        abar = schedule.abar_at(torch.as_tensor(t))
        return (0.25 * abar + 1 - abar).sqrt()

    def denoise(x, t):
        abar = schedule.abar_at(t)[:, None, None]
        return abar.sqrt() * 0.25 / (0.25 * abar + 1 - abar) * x

    def error(solver, count):
        nodes = torch.linspace(3000, 200, count + 1).round().long().tolist()
        x = deviation(nodes[0]) * torch.ones(1, 1, 1, dtype=torch.float64)
        x, _ = solver(denoise, x, list(zip(nodes[:-1], nodes[1:], strict=True)), schedule, update=mean_only)
        return abs(float(x) - float(deviation(nodes[-1])))

    assert error(ddim, 20) / error(ddim, 40) == pytest.approx(2, rel=0.15)
    assert error(dpmpp2m, 20) / error(dpmpp2m, 40) > 3.3
    assert error(dpmpp2m, 20) < error(ddim, 20) / 4


@EVERY_SOLVER
def test_rows_that_leave_do_not_change_the_others(name):
    """The callback drops row 1 after the second transition, and row 0 after the fourth."""
    x = torch.randn(B, N, D, generator=torch.Generator().manual_seed(0))
    steps, rows = xy_steps(2000, LENGTHS, N, 12, end="clean"), torch.arange(B)
    leave = {1: torch.tensor([0, 2]), 3: torch.tensor([1])}

    def denoise(x, t):
        return torch.tanh(x) + t[..., None] / 2000

    whole, _ = SOLVERS[name](denoise, x, steps, SQRT, seed=3, rows=rows)
    left, x0_hat = SOLVERS[name](denoise, x, steps, SQRT, seed=3, rows=rows, callback=lambda info: leave.get(info["i"]))
    assert left.shape == x0_hat.shape == (1, N, D) and torch.equal(left[0], whole[2])
    seen = []
    SOLVERS[name](denoise, x, steps, SQRT, seed=3, callback=lambda info: seen.append(info) or torch.arange(0))
    assert len(seen) == 1


@pytest.mark.parametrize(("t", "u", "a", "b", "variance"), [
    (500, 398, 0.845847, 0.146787, 0.0866294),
    (1999, 1897, 0.00271278, 0.161377, 0.973950),
    (62, 0, 0.0793232, 0.920362, None),
    (1011, 0, 0.0112402, 0.986584, None),
    (700, 700, 1.0, 0.0, 0.0),
    (-1, -1, 1.0, 0.0, 0.0),
    (62, -1, 0.0, 1.0, 0.0),
])
def test_skip_coefficients(t, u, a, b, variance):
    got = skip_coefficients(SQRT.abar_at(torch.tensor(t)), SQRT.abar_at(torch.tensor(u)))
    assert got[0].item() == pytest.approx(a, rel=1e-5) and got[1].item() == pytest.approx(b, rel=1e-5)
    if variance is not None:
        assert got[2].item() == pytest.approx(variance, rel=1e-5)


@settings(deadline=None, max_examples=200)
@given(st.sampled_from([make_schedule(name) for name in SCHEDULES]), st.integers(0, 1999), st.integers(-1, 1999))
def test_coefficient_identities(schedule, t, u):
    abar_t, abar_u = schedule.abar_at(torch.tensor([t, min(u, t)]))
    a, b, variance = skip_coefficients(abar_t, abar_u)
    torch.testing.assert_close(a * abar_t.sqrt() + b, abar_u.sqrt(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(a**2 * (1 - abar_t) + variance, 1 - abar_u, rtol=1e-9, atol=1e-12)
    assert variance >= 0 and a >= 0 and b >= 0
    a, b = ddim_coefficients(abar_t, abar_u)
    torch.testing.assert_close(a * abar_t.sqrt() + b, abar_u.sqrt(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(a * (1 - abar_t).sqrt(), (1 - abar_u).sqrt(), rtol=1e-9, atol=1e-12)


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 1999), st.data())
def test_two_jumps_compose_to_one(t, data):
    """A jump t -> m -> u with the same x_0 has the mean and the variance of t -> u, as a posterior must."""
    m = data.draw(st.integers(0, t))
    u = data.draw(st.integers(-1, m))
    abar_t, abar_m, abar_u = SQRT.abar_at(torch.tensor([t, m, u]))
    a1, b1, v1 = skip_coefficients(abar_t, abar_m)
    a2, b2, v2 = skip_coefficients(abar_m, abar_u)
    composed = torch.stack([a1 * a2, a2 * b1 + b2, a2**2 * v1 + v2])
    torch.testing.assert_close(composed, torch.stack(skip_coefficients(abar_t, abar_u)), rtol=1e-8, atol=1e-10)


def recorded_noise(solver, steps, schedule=SQRT, **options):
    """The factor c of each transition, [transitions, B, N]."""
    seen = []

    def update(x, x0_hat, a, b, c, **kwargs):
        seen.append(c)
        return mean_only(x, x0_hat, a, b, c, **kwargs)

    solver(lambda x, t: x, torch.ones(B, N, D), steps, schedule, update=update, **options)
    return torch.stack(seen)


def test_large_variance_is_beta_on_the_full_list():
    noise = recorded_noise(ancestral, ancestral_steps(50), SHORT)[:, 0, 0].double()
    torch.testing.assert_close(noise[:-1] ** 2, SHORT.betas.flip(0)[:-1], rtol=1e-5, atol=0)
    assert noise[-1] == 0
    small = recorded_noise(ancestral, ancestral_steps(50), SHORT, variance="small")[:, 0, 0].double()
    torch.testing.assert_close(small**2, SHORT.posterior_variance.flip(0), rtol=1e-5, atol=1e-12)


def test_skip_draws_no_noise_into_timestep_zero_and_none_where_nothing_moves():
    steps = xy_steps(2000, LENGTHS, N, 700)
    noise = recorded_noise(skip, steps)
    for c, (t, u) in zip(noise, steps, strict=True):
        assert bool(((c == 0) == ((u == 0) | (t == u))).all())


@EVERY_SOLVER
def test_tokens_that_do_not_move_keep_their_bits(name):
    if name == "dpmpp2m_refeed":
        pytest.skip("it puts x0_hat in the place of every token")
    x = torch.randn(B, N, D)
    t = torch.full((B, N), 700)
    u = t.clone()
    u[:, ::2] = 300
    got, _ = SOLVERS[name](lambda x, t: x + 1, x, [(t, u)], SQRT, update=mean_only)
    assert torch.equal(got[:, 1::2], x[:, 1::2]) and not torch.equal(got[:, ::2], x[:, ::2])
    clean, _ = SOLVERS[name](lambda x, t: x + 1, x, [(-1, -1)], SQRT, update=mean_only)
    assert torch.equal(clean, x)


def test_update_gets_the_noise_coordinates():
    calls = []

    def update(x, x0_hat, a, b, c, *, seed, step, rows):
        assert a.dtype == b.dtype == c.dtype == torch.float32 and a.shape == b.shape == c.shape == (B, N)
        calls.append((seed, step, rows))
        return x

    rows = torch.arange(B)
    skip(lambda x, t: x, torch.ones(B, N, D), uniform_steps(2000, 3), SQRT, seed=5, rows=rows, update=update)
    assert [(seed, step) for seed, step, _ in calls] == [(5, 0), (5, 1), (5, 2)] and all(r is rows for _, _, r in calls)


def test_callback_sees_each_transition():
    seen = []
    steps = uniform_steps(2000, 4)
    x, x0_hat = ddim(lambda x, t: 2 * x, torch.ones(B, N, D), steps, SQRT, update=mean_only, callback=seen.append)
    assert [(info["i"], (info["t"], info["t_next"])) for info in seen] == list(enumerate(steps))
    assert seen[-1]["x"] is x and seen[-1]["x0_hat"] is x0_hat and set(seen[0]) == {"i", "t", "t_next", "x", "x0_hat"}


def test_low_precision_prediction_is_cast_to_the_state():
    x = torch.ones(B, N, D)
    got, x0_hat = ddim(lambda x, t: x.bfloat16(), x, uniform_steps(2000, 2), SQRT, update=mean_only)
    assert got.dtype == x0_hat.dtype == torch.float32


def test_default_update_is_the_op():
    """Seeded noise: the same output for the same seed, another one for another, no dependence on the batch."""
    x = torch.randn(B, N, D, generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([4, 9, 2])

    def run(keep, seed):
        steps = xy_steps(2000, LENGTHS[keep], N, 5)
        return skip(lambda x, t: 0.5 * x, x[keep], steps, SQRT, seed=seed, rows=rows[keep])[0]

    everything = torch.arange(B)
    assert torch.equal(run(everything, 1), run(everything, 1))
    assert not torch.equal(run(everything, 1), run(everything, 2))
    assert torch.equal(run(torch.tensor([1]), 1)[0], run(everything, 1)[1])


def test_bad_input():
    x, steps = torch.ones(B, N, D), uniform_steps(2000, 2)

    def run(steps, solver=ddim, **options):
        return solver(lambda x, t: x, x, steps, SQRT, update=mean_only, **options)

    with pytest.raises(ValueError, match="at least one transition"):
        run([])
    with pytest.raises(ValueError, match="transition 0 rises"):
        run([(3, 7)])
    with pytest.raises(ValueError, match="t must be in -1..1999, got 2000"):
        run([(2000, 7)])
    with pytest.raises(ValueError, match=r"t_next must .* shape \[3\], \[1, 6\] or \[3, 6\], got \[2, 6\]"):
        run([(1999, torch.zeros(2, N, dtype=torch.int64))])
    with pytest.raises(ValueError, match="'huge'.*large, small"):
        run(steps, ancestral, variance="huge")
    with pytest.raises(ValueError, match="'dim'.*ancestral, ddim, skip, ddim_xy, cedi, dpmpp2m, dpmpp2m_refeed"):
        get_solver("dim")
    assert get_solver("skip") is skip
