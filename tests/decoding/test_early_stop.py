"""Step lists by name and by hand, and candidates that stop before the list ends."""

import dataclasses

import pytest
import torch
from test_decode import IDS, PREDICT, SOURCE, oracle, tiny, words

from pydiffseq.decoding import DecodeOptions, Decoder, decode
from pydiffseq.diffusion import SOLVERS, SPACINGS


def test_rolling_times_start_with_half_an_interval():
    model, calls = tiny(timestep_sampler="rolling", anchor_scale=0.5), []
    original = model.denoise
    model.denoise = lambda *args: calls.append(args[1]) or original(*args)
    for step_list in ("auto", "halfstart", "uniform"):
        decode(model, SOURCE, IDS, DecodeOptions(steps=4, step_list=step_list))
    auto, half, even = calls[:4], calls[4:8], calls[8:]
    assert all(torch.equal(a, b) for a, b in zip(auto, half, strict=True))
    assert torch.equal(auto[0], even[0]) and bool((auto[1] >= even[1]).all()) and not torch.equal(auto[1], even[1])


@pytest.mark.parametrize("changes", [{}, {"timestep_sampler": "uniform"}, PREDICT], ids=str)
@pytest.mark.parametrize("step_list", SPACINGS)
def test_named_step_lists(changes, step_list):
    model, calls = tiny(**changes), []
    original = model.denoise
    model.denoise = lambda *args: calls.append(args[1]) or original(*args)
    decode(model, SOURCE, IDS, DecodeOptions(steps=6, step_list=step_list))
    assert len(calls) == 6 and int(calls[0].max()) == 1999
    assert all(bool((later <= earlier).all()) for earlier, later in zip(calls, calls[1:], strict=False))


def test_auto_is_the_stride_of_the_paper():
    model, options = tiny(**PREDICT), DecodeOptions(steps=5)
    assert words(decode(model, SOURCE, IDS, options)) == words(
        decode(model, SOURCE, IDS, dataclasses.replace(options, step_list="stride")))


def test_a_list_by_hand():
    model, calls = tiny(timestep_sampler="uniform"), []
    original = model.denoise
    model.denoise = lambda *args: calls.append(int(args[1].max())) or original(*args)
    (hypothesis,), *_ = decode(model, SOURCE, IDS, DecodeOptions(visited=(1999, 700, 3)))
    assert calls == [1999, 700, 3] and hypothesis.steps == 3
    for visited, message in (((5, 5), "fall"), ((2000,), r"hold timesteps in 0\.\.1999"), ((), "have at least one")):
        with pytest.raises(ValueError, match=f"the step list must {message}"):
            decode(model, SOURCE, IDS, DecodeOptions(visited=visited))


def test_a_candidate_stops_when_its_tokens_stay():
    model = oracle([9, 8, 7, 6, 5, 4, 3], latent_dim=31)
    decoder = Decoder(model, DecodeOptions(steps=20, patience=2, noise_beam=2, history=True))
    for group in decoder(SOURCE, IDS):
        for hypothesis in group:
            assert hypothesis.tokens.tolist() == [9, 8, 7, 6, 5, 4, 3]
            assert hypothesis.steps == len(hypothesis.history) == 3
    assert len(model.calls) == 3 and (decoder.steps_planned, decoder.steps_run) == (4 * 2 * 20, 4 * 2 * 3)


@pytest.mark.parametrize("changes", [{}, PREDICT, {"self_conditioning": 0.5}, {"timestep_sampler": "uniform"}], ids=str)
@pytest.mark.parametrize("solver", SOLVERS)
def test_early_stops_do_not_depend_on_the_batch(changes, solver):
    """Each candidate has the tokens of the step after which it stopped, alone and among others."""
    model = tiny(**changes)
    options = DecodeOptions(steps=20, solver=solver, patience=1, noise_beam=2, history=True)
    whole = decode(model, SOURCE, IDS, options)
    full = decode(model, SOURCE, IDS, dataclasses.replace(options, patience=0))
    steps = [sorted(hypothesis.steps for hypothesis in group) for group in whole]
    for row in range(4):
        alone = decode(model, SOURCE[row:row + 1], IDS[row:row + 1], options)
        assert words(alone) == words(whole[row:row + 1])
        assert [sorted(hypothesis.steps for hypothesis in group) for group in alone] == steps[row:row + 1]
        histories = [[step.tolist() for step in hypothesis.history] for hypothesis in full[row]]
        for hypothesis in whole[row]:
            own = [step.tolist() for step in hypothesis.history]
            assert len(own) == hypothesis.steps and own[-1] == hypothesis.tokens.tolist()
            assert any(history[: len(own)] == own for history in histories)


def test_patience_needs_tokens_of_x0_hat():
    with pytest.raises(ValueError, match="patience needs final 'x0_hat', got 'state'"):
        DecodeOptions(patience=1, final="state")
    with pytest.raises(ValueError, match="patience must be >= 0, got -1"):
        DecodeOptions(patience=-1)


@torch.no_grad()
def test_some_candidates_stop_early_and_some_do_not():
    """Otherwise the tests above would show little."""
    groups = decode(tiny(), SOURCE, IDS, DecodeOptions(steps=20, patience=1, noise_beam=4))
    assert len({hypothesis.steps for group in groups for hypothesis in group}) > 1
