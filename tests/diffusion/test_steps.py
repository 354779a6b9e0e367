"""Step lists: published examples, counts of model calls, bad requests."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pydiffseq.diffusion import (
    SCHEDULES,
    SPACINGS,
    ancestral_steps,
    check_visited,
    make_schedule,
    read_visited,
    rolling_token_timesteps,
    sentence_steps,
    skip_indices,
    spaced_timesteps,
    token_steps,
    uniform_steps,
    xy_steps,
    xy_token_timesteps,
)


@pytest.mark.parametrize(("steps", "expected"), [
    (20, [2049 - 102 * i for i in range(20)]),
    (3, [2049, 1366, 683]),
    (2, [2049, 1024]),
])
def test_published_sentence_indices(steps, expected):
    assert skip_indices(torch.tensor([2050]), steps).flatten().tolist() == expected
    assert (expected[0], expected[-1]) == (2049, {20: 111, 3: 683, 2: 1024}[steps])


def test_published_list_ends_at_timestep_zero():
    steps = xy_steps(2000, 50, 50, 20)
    assert len(steps) == 20
    last, end = steps[-1]
    assert last.shape == (1, 50) and [int(last[0, n]) for n in (0, 25, 49)] == [62, 546, 1011]
    assert end.tolist() == [[0] * 50]


def test_clean_end_costs_no_model_call():
    published, clean = xy_steps(2000, 50, 50, 20), xy_steps(2000, 50, 50, 20, end="clean")
    assert len(published) == len(clean)
    for (t, u), (t_clean, u_clean) in zip(published[:-1], clean[:-1], strict=True):
        assert torch.equal(t, t_clean) and torch.equal(u, u_clean)
    assert torch.equal(published[-1][0], clean[-1][0]) and clean[-1][1].unique().tolist() == [-1]


def test_some_tokens_finish_early_where_the_stride_is_below_the_length():
    last, _ = xy_steps(2000, 180, 180, 20)[-1]
    assert [int(last[0, n]) for n in (0, 90, 179)] == [0, 131, 747]


def test_each_sentence_has_the_list_of_its_own_length():
    lengths = torch.tensor([5, 50, 17])
    together = xy_steps(2000, lengths, 50, 7)
    assert len(together) == 7
    for row, N in enumerate(lengths.tolist()):
        alone = xy_steps(2000, N, N, 7)
        for (t, u), (t_alone, u_alone) in zip(together, alone, strict=True):
            assert torch.equal(t[row, :N], t_alone[0]) and torch.equal(u[row, :N], u_alone[0])


def test_full_token_list():
    """All T + N sentence indices: one transition less to timestep 0, one each to the clean end."""
    assert len(xy_steps(20, 5, 5, 25)) == 24
    assert len(xy_steps(20, 5, 5, 25, end="clean")) == 25
    mixed = xy_steps(20, torch.tensor([5, 9]), 9, 25)  # the longer sentence needs the last transition
    assert len(mixed) == 25 and torch.equal(mixed[-1][0][0, :5], mixed[-1][1][0, :5])


def test_uniform_list_of_divisors_is_the_published_one():
    steps = uniform_steps(2000, 20)
    assert [t for t, _ in steps] == list(range(1999, 98, -100)) and steps[-1] == (99, -1)
    assert uniform_steps(2000, 20, end="zero")[-1] == (99, 0)
    assert uniform_steps(2000, 1) == [(1999, -1)]


def test_ancestral_list_visits_everything():
    assert ancestral_steps(4) == [(3, 2), (2, 1), (1, 0), (0, -1)]
    assert uniform_steps(4, 4, end="zero") == [(3, 2), (2, 1), (1, 0)]


@settings(deadline=None, max_examples=100)
@given(data=st.data(), T=st.integers(1, 300), end=st.sampled_from(["zero", "clean"]))
def test_uniform_lists_fall_and_chain(data, T, end):
    count = data.draw(st.integers(1, T))
    steps = uniform_steps(T, count, end)
    assert all(t > u for t, u in steps)
    assert all(a[1] == b[0] for a, b in zip(steps[:-1], steps[1:], strict=True))
    assert count - 1 <= len(steps) <= count
    if steps:
        assert steps[0][0] == T - 1 and steps[-1][1] == (-1 if end == "clean" else 0)
        gaps = [t - u for t, u in steps[:-1]]
        assert not gaps or max(gaps) - min(gaps) <= 1


@settings(deadline=None, max_examples=60)
@given(data=st.data(), T=st.integers(2, 60), lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
       scale=st.floats(0.2, 3), end=st.sampled_from(["zero", "clean"]))
def test_token_lists_fall_and_chain(data, T, lengths, scale, end):
    count = data.draw(st.integers(1, T + min(lengths)))
    N = torch.tensor(lengths)
    steps = xy_steps(T, N, max(lengths), count, scale, end)
    real = torch.arange(max(lengths)) < N[:, None]
    assert count - 1 <= len(steps) <= count
    for (t, u), (following, _) in zip(steps, [*steps[1:], (steps[-1][1], None)], strict=True):
        assert t.shape == u.shape == real.shape and torch.equal(u, following)
        assert bool((u <= t)[real].all())
    assert torch.equal(steps[0][0], xy_token_timesteps(T + N - 1, N, max(lengths), T, scale))
    assert bool((steps[-1][1][real] == (-1 if end == "clean" else 0)).all())


@pytest.mark.parametrize("count", [0, -3, 2051])
def test_bad_counts(count):
    with pytest.raises(ValueError, match=rf"number of steps must be in 1..2050.*got {count}"):
        xy_steps(2000, 50, 50, count)
    with pytest.raises(ValueError, match=rf"number of steps must be in 1..2000.*got {count}"):
        uniform_steps(2000, count)


def test_the_shortest_sentence_bounds_the_count():
    with pytest.raises(ValueError, match="1..2005"):
        xy_steps(2000, torch.tensor([50, 5]), 50, 2006)


def test_bad_names():
    with pytest.raises(ValueError, match="'cleen'.*zero, clean"):
        uniform_steps(10, 2, end="cleen")
    with pytest.raises(ValueError, match="'cleen'.*zero, clean"):
        xy_steps(10, 5, 5, 2, end="cleen")
    with pytest.raises(ValueError, match="anchor scale"):
        xy_steps(10, 5, 5, 2, anchor_scale=0)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 3, 20, 100, 199, 200])
def test_every_spacing_falls_from_the_top_once_for_each_step(spacing, schedule, steps):
    visited = spaced_timesteps(spacing, make_schedule(schedule, 200), steps)
    assert len(visited) == steps and visited[0] == 199
    assert check_visited("list", visited, 200) == visited


def test_spacings_by_hand():
    schedule = make_schedule("sqrt")
    assert spaced_timesteps("quadratic", schedule, 5) == [1999, 1279, 720, 320, 80]
    assert spaced_timesteps("stride", schedule, 3) == [1999, 1333, 667]
    assert spaced_timesteps("halfstart", schedule, 5) == [1999, 1776, 1332, 887, 443]   # 2000 / 4.5 apart
    assert spaced_timesteps("halfstart", schedule, 2000) == list(range(1999, -1, -1))
    visited = torch.tensor(spaced_timesteps("logsnr", schedule, 6))
    level = (schedule.abar / (1 - schedule.abar)).log()
    wanted = torch.linspace(float(level[-1]), float(level[0]), 7)[:-1].double()
    assert visited[0] == 1999 and bool((level[visited][1:] >= wanted[1:]).all())
    assert bool((level[visited[3:] + 1] < wanted[3:]).all())   # 1998 and 1997 are next to 1999, where it falls steeply


def test_uniform_spacing_is_the_uniform_list():
    for end in ("clean", "zero"):
        for steps in (1, 3, 20, 50):
            assert sentence_steps(spaced_timesteps("uniform", make_schedule("sqrt", 50), steps), end) == uniform_steps(
                50, steps, end)


@pytest.mark.parametrize("end", ["clean", "zero"])
def test_token_steps_scale_the_list_to_each_length(end):
    lengths, visited = torch.tensor([4, 9]), [49, 30, 11]
    together = token_steps(50, visited, lengths, 9, end=end)
    assert len(together) == 3
    for (t, u), v in zip(together, visited, strict=True):
        for row, N in enumerate((4, 9)):
            s = torch.tensor([round(v * (50 + N - 1) / 49)])
            assert torch.equal(t[row, :N], xy_token_timesteps(s, torch.tensor([N]), N, 50)[0])
        assert bool((u <= t).all())
    index = torch.zeros_like(lengths)
    target = torch.full((2, 9), -1) if end == "clean" else xy_token_timesteps(index, lengths, 9, 50)
    assert torch.equal(together[-1][1].expand(2, 9), target)


def test_token_steps_of_rolling_times():
    lengths, visited = torch.tensor([4, 9]), [49, 30, 11]
    steps = token_steps(50, visited, lengths, 9, 0.5, path="rolling")
    for (t, _), v in zip(steps, visited, strict=True):
        assert torch.equal(t, rolling_token_timesteps(torch.tensor([v]), lengths, 9, 50, 0.5))
    assert bool((steps[-1][1] == -1).all())


def test_step_list_files(tmp_path):
    path = tmp_path / "steps.txt"
    path.write_text("# few\n1999, 1500\t900\n\n 12 # last\n")
    assert read_visited(path) == [1999, 1500, 900, 12]
    path.write_text("1999\n15.5\n")
    with pytest.raises(ValueError, match=r"steps.txt, line 2: must be integers, got '15.5'"):
        read_visited(path)
    for visited, message in (([], "at least one"), ([5, 5], "must fall, got 5 after 5 at place 2"),
                             ([5, 7], "must fall, got 7 after 5 at place 2"), ([50], "in 0..49, got 50 at place 1"),
                             ([5, -1], "in 0..49, got -1 at place 2")):
        with pytest.raises(ValueError, match=f"the list .*{message}"):
            check_visited("the list", visited, 50)
    with pytest.raises(ValueError, match="unknown spacing 'cubic'.*uniform, halfstart, quadratic, logsnr, stride"):
        spaced_timesteps("cubic", make_schedule("sqrt", 50), 3)
    with pytest.raises(ValueError, match=r"must be in 1\.\.50 .*, got 51"):
        spaced_timesteps("uniform", make_schedule("sqrt", 50), 51)
