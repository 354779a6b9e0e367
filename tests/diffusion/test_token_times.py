"""Token timesteps and the samplers of training timesteps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pydiffseq.diffusion import (
    TIMESTEP_SAMPLERS,
    TOKEN_SAMPLERS,
    LossAwareSampler,
    RollingSampler,
    UniformSampler,
    XYUniformSampler,
    make_timestep_sampler,
    rolling_token_timesteps,
    xy_token_timesteps,
)

GOLDEN_5 = {  # N = 5, T = 2000
    0: [0, 0, 0, 0, 0],
    2: [0, 0, 0, 250, 500],
    4: [0, 200, 400, 600, 800],
    5: [1, 201, 401, 600, 800],
    100: [96, 286, 477, 667, 857],
    1999: [1995, 1995, 1996, 1996, 1997],
    2003: [1999] * 5,
    2004: [1999] * 5,
}


def times(s, N, T=2000, max_len=None, scale=2.0):
    return xy_token_timesteps(torch.tensor([s]), torch.tensor([N]), max_len or N, T, scale)[0].tolist()


@pytest.mark.parametrize("s", GOLDEN_5)
def test_golden_values_of_five_tokens(s):
    assert times(s, 5) == GOLDEN_5[s]


def test_golden_values_of_fifty_tokens():
    assert times(49, 50)[:4] + times(49, 50)[-1:] == [0, 20, 40, 60, 980]
    middle = times(25, 50)
    assert middle[:25] == [0] * 25 and middle[25] == 26 and middle[-1] == 658
    assert times(1049, 50)[:3] + times(1049, 50)[-1:] == [1000, 1010, 1020, 1490]
    assert times(111, 50)[0] == 62 and times(111, 50)[25] == 546 and times(111, 50)[49] == 1011


def test_each_sentence_has_its_own_length():
    s, lengths = torch.tensor([2, 100, 25]), torch.tensor([5, 5, 50])
    together = xy_token_timesteps(s, lengths, 50, 2000)
    assert together.dtype == torch.int64 and together.shape == (3, 50)
    assert together[0, :5].tolist() == GOLDEN_5[2]
    assert together[1, :5].tolist() == GOLDEN_5[100]
    assert together[2].tolist() == times(25, 50)


def test_one_index_for_all_sentences_broadcasts():
    got = xy_token_timesteps(torch.tensor([4]), torch.tensor([5, 50]), 50, 2000)
    assert got[0, :5].tolist() == GOLDEN_5[4] and got[1].tolist() == times(4, 50)


@settings(deadline=None, max_examples=100)
@given(data=st.data(), T=st.integers(2, 2000), N=st.integers(1, 80), scale=st.floats(0.05, 4))
def test_token_times_are_ordered(data, T, N, scale):
    """In range, non-decreasing in the position (padding too) and in s, 0 at s = 0 and T-1 at the last s."""
    s = torch.arange(T + N) if T + N <= 150 else torch.tensor(sorted(
        {0, T + N - 1, *data.draw(st.lists(st.integers(0, T + N - 1), min_size=20, max_size=40))}))
    t = xy_token_timesteps(s, torch.tensor([N]), N + 3, T, scale)
    assert int(t.min()) >= 0 and int(t.max()) <= T - 1
    assert bool((t.diff(dim=1) >= 0).all())
    assert bool((t[:, :N].diff(dim=0) >= 0).all())
    assert bool((t[0, :N] == 0).all()) and bool((t[-1] == T - 1).all())


@settings(deadline=None, max_examples=50)
@given(T=st.integers(2, 2000), N=st.integers(1, 60), extra=st.integers(0, 20), seed=st.integers(0, 2**31))
def test_token_times_do_not_depend_on_padding(T, N, extra, seed):
    s = torch.randint(T + N, (1,), generator=torch.Generator().manual_seed(seed))
    lengths = torch.tensor([N])
    padded = xy_token_timesteps(s, lengths, N + extra, T)
    assert torch.equal(padded[:, :N], xy_token_timesteps(s, lengths, N, T))


def rolling(s, N, T=2001, scale=0.5):
    return rolling_token_timesteps(torch.tensor([s]), torch.tensor([N]), N, T, scale)[0].tolist()


def test_golden_values_of_rolling_times():
    """Five tokens, a ramp of 2.5: in each of 2,000 indices the last clean position moves by 6.5 / 2000."""
    assert rolling(0, 5) == [0] * 5 and rolling(2000, 5) == [2000] * 5
    assert rolling(1000, 5) == [0, 200, 1000, 1800, 2000]        # clean until 0.75
    assert rolling(400, 5) == [0, 0, 0, 240, 1040]               # until 2.7
    assert rolling(1900, 5) == [1740, 2000, 2000, 2000, 2000]    # until -2.175
    assert rolling(2, 3, T=5, scale=0.1) == [0, 2, 4]            # at least one token wide: clean until 0.5


@settings(deadline=None, max_examples=100)
@given(T=st.integers(2, 300), N=st.integers(1, 60), extra=st.integers(0, 5), scale=st.floats(0.05, 4))
def test_rolling_times_are_ordered(T, N, extra, scale):
    """Non-decreasing in position and index, from all clean to all noise, whatever the padding."""
    s, lengths = torch.arange(T), torch.tensor([N])
    t = rolling_token_timesteps(s, lengths, N + extra, T, scale)
    assert bool((t.diff(dim=1) >= 0).all()) and bool((t.diff(dim=0) >= 0).all())
    assert bool((t[0, :N] == 0).all()) and bool((t[-1] == T - 1).all())
    assert torch.equal(t[:, :N], rolling_token_timesteps(s, lengths, N, T, scale))


def test_rolling_times_settle_as_many_tokens_in_every_step():
    """Half-way marks pass at constant speed, while AR-Diffusion's times settle most tokens in the last of ten steps."""
    T, N, steps = 2000, 40, 10
    settled = {}
    for name in ("rolling", "xy_uniform"):
        sampler, lengths = TOKEN_SAMPLERS[name](T, 1.0), torch.tensor([N])
        last = sampler.indices(lengths) - 1
        t = torch.cat([sampler.token_times(last * (steps - i) // steps, lengths, N) for i in range(steps + 1)])
        settled[name] = (t < T / 2).sum(1).diff()
    assert settled["rolling"].max() == 8 and settled["rolling"].tolist() == [0, 0, 4, 8, 8, 8, 8, 4, 0, 0]
    assert settled["xy_uniform"][-1] >= N // 2


@pytest.mark.parametrize("s", [-1, 100])
def test_bad_rolling_index(s):
    with pytest.raises(ValueError, match=f"rolling index s must be in 0..99, got {s}"):
        rolling(s, 5, T=100)


@pytest.mark.parametrize("scale", [0, -1.0, float("nan"), float("inf")])
def test_bad_anchor_scale(scale):
    for call in (lambda: times(3, 5, scale=scale), lambda: rolling(3, 5, scale=scale), lambda: XYUniformSampler(100, scale),
                 lambda: RollingSampler(100, scale),
                 lambda: make_timestep_sampler("xy_uniform", 100, scale)):
        with pytest.raises(ValueError, match="anchor scale must be a positive number"):
            call()


@pytest.mark.parametrize("s", [-1, 2005])
def test_bad_sentence_index(s):
    with pytest.raises(ValueError, match=f"sentence index s must be in 0..2004, got {s}"):
        times(s, 5)


def test_unknown_sampler_lists_the_known_ones():
    with pytest.raises(ValueError, match="'xy'.*uniform, lossaware, xy_uniform"):
        make_timestep_sampler("xy")


@pytest.mark.parametrize("name", TIMESTEP_SAMPLERS)
def test_every_sampler_has_one_interface(name):
    sampler = make_timestep_sampler(name, T=30)
    lengths = torch.tensor([3, 7, 1, 7])
    t, weights = sampler.sample(lengths, 7, torch.Generator().manual_seed(1))
    assert t.dtype == torch.int64 and t.shape == ((4, 7) if name in TOKEN_SAMPLERS else (4,))
    assert weights.dtype == torch.float32 and weights.tolist() == [1.0] * 4
    assert int(t.min()) >= 0 and int(t.max()) < 30
    again, _ = sampler.sample(lengths, 7, torch.Generator().manual_seed(1))
    assert torch.equal(t, again)
    sampler.update(t if t.dim() == 1 else t[:, 0], torch.ones(4))
    make_timestep_sampler(name, T=30).load_state_dict(sampler.state_dict())


def test_uniform_sampler_is_uniform():
    t, _ = UniformSampler(10).sample(torch.ones(20000, dtype=torch.int64), 1, torch.Generator().manual_seed(0))
    counts = torch.bincount(t, minlength=10)
    assert counts.numel() == 10 and int(counts.min()) > 1800 and int(counts.max()) < 2200


def test_xy_sampler_draws_each_sentence_over_its_own_range():
    """Token 0 is at max(0, s - (N-1)): its mean and its share of zeros are those of s uniform over 0..T+N-1."""
    lengths = torch.tensor([1, 4]).repeat(5000)
    t, _ = XYUniformSampler(1000, 1.0).sample(lengths, 4, torch.Generator().manual_seed(0))
    first = t[:, 0].double()
    assert first[0::2].mean().item() == pytest.approx(500, abs=15)
    assert (first[1::2] == 0).double().mean().item() == pytest.approx(4 / 1004, abs=4e-3)
    assert int(first.max()) == 999


def naive_history(updates, T, history):
    kept = [[] for _ in range(T)]
    for timesteps, losses in updates:
        for t, loss in zip(timesteps, losses, strict=True):
            kept[t] = [*kept[t], loss][-history:]
    return kept


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.tuples(st.integers(0, 3), st.floats(0, 9)), max_size=12), min_size=1, max_size=6))
def test_loss_aware_history_is_that_of_a_loop(updates):
    sampler = LossAwareSampler(4, history=3)
    pairs = [([t for t, _ in batch], [loss for _, loss in batch]) for batch in updates]
    for timesteps, losses in pairs:
        sampler.update(torch.tensor(timesteps, dtype=torch.int64), torch.tensor(losses, dtype=torch.float64))
    for t, expected in enumerate(naive_history(pairs, 4, 3)):
        stored = sampler.losses[t, : len(expected)].tolist()
        assert sorted(stored) == sorted(expected)
        assert min(int(sampler.seen[t]), 3) == len(expected)


def warmed_up(T=5, history=2):
    sampler = LossAwareSampler(T, history)
    t = torch.arange(T).repeat(history)
    sampler.update(t, (t + 1).float())
    return sampler


def test_loss_aware_is_uniform_until_every_timestep_has_its_history():
    sampler = LossAwareSampler(5, 2)
    t = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 4])
    sampler.update(t, torch.arange(9.0))
    assert sampler.probabilities().tolist() == [0.2] * 5
    sampler.update(torch.tensor([4]), torch.tensor([1.0]))
    assert sampler.probabilities().tolist() != [0.2] * 5


def test_loss_aware_probabilities_and_weights():
    sampler = warmed_up()
    expected = 0.999 * torch.tensor([1, 2, 3, 4, 5]).double() / 15 + 0.001 / 5
    torch.testing.assert_close(sampler.probabilities(), expected)
    t, weights = sampler.sample(torch.ones(30000, dtype=torch.int64), 1, torch.Generator().manual_seed(0))
    torch.testing.assert_close(weights, (1 / (5 * expected[t])).float())
    assert weights.mean().item() == pytest.approx(1, abs=0.02)  # E[1 / (T p_t)] = 1: the loss stays unbiased
    torch.testing.assert_close(torch.bincount(t) / len(t), expected.float(), atol=0.01, rtol=0)


def test_loss_aware_with_losses_of_zero_stays_uniform():
    sampler = LossAwareSampler(3, 1)
    sampler.update(torch.arange(3), torch.zeros(3))
    assert sampler.probabilities().tolist() == [1 / 3] * 3


def test_loss_aware_state_round_trip():
    sampler = warmed_up()
    copy = LossAwareSampler(5, 2)
    copy.load_state_dict(sampler.state_dict())
    sampler.update(torch.tensor([0]), torch.tensor([50.0]))  # the copy must not share storage
    torch.testing.assert_close(copy.probabilities(), warmed_up().probabilities())
    with pytest.raises(ValueError, match=r"\[5, 3\].*got \[5, 2\]"):
        LossAwareSampler(5, 3).load_state_dict(sampler.state_dict())


def test_loss_aware_bad_updates():
    with pytest.raises(ValueError, match="timesteps must be in 0..4, got 5"):
        warmed_up().update(torch.tensor([5]), torch.tensor([1.0]))
    with pytest.raises(ValueError, match="shape"):
        warmed_up().update(torch.tensor([1, 2]), torch.tensor([1.0]))
