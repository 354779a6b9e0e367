"""DiffuSeq's clamp ranges and truncated noise, DiffuSeq-v2's absorbing state while sampling."""

import pytest
import torch
from test_decode import IDS, SOURCE, oracle, words

from pydiffseq import ops
from pydiffseq.decoding import DecodeOptions, Decoder, decode
from pydiffseq.decoding.updates import absorbing_update, choose_update, truncated_update
from pydiffseq.diffusion import uniform_steps
from pydiffseq.models import DiffuSeq, DiffuSeqConfig

X, X0 = torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(0))
ROWS = torch.tensor([4, 0, 7])


def coefficients(c: float) -> list[torch.Tensor]:
    return [torch.full((3, 4), value) for value in (0.5, 0.4, c)]


@pytest.mark.parametrize(("rounding", "step", "rounded"), [
    ("every", 0, [1999, 1599, 1199, 799, 399]), ("off", 0, []), ("from", 1199, [1199, 799, 399]), ("from", 0, []),
    ("from", 2000, [1999, 1599, 1199, 799, 399]), ("until", 1199, [1999, 1599, 1199]), ("until", 2000, [])])
def test_rounding_ranges(rounding, step, rounded):
    """x_self is what the solver was given: rows of the table where it was rounded, off them by 0.3 elsewhere."""
    model = oracle([4, 5, 6, 7, 8, 9, 10], latent_dim=31, timestep_sampler="uniform", self_conditioning=0.5)
    model.error = 0.3
    decode(model, SOURCE, IDS, DecodeOptions(steps=5, rounding=rounding, rounding_step=step))
    given = [call["x_self"] for call in model.calls[1:]]
    times = [int(call["t"][0, 0]) for call in model.calls]
    assert times == [1999, 1599, 1199, 799, 399]
    answer = model.embedding.table()[model.answer]
    for t, x_self in zip(times, given, strict=False):
        assert torch.equal(x_self[0], answer) == (t in rounded)


def test_rounding_goes_by_the_token_where_timesteps_do():
    model = oracle([4, 5, 6, 7, 8, 9, 10], latent_dim=31, self_conditioning=0.5)
    model.error = 0.3
    decode(model, SOURCE, IDS, DecodeOptions(steps=5, rounding="from", rounding_step=1300))
    answer = model.embedding.table()[model.answer]
    seen = [(call["t"][0] <= 1300, model.calls[i + 1]["x_self"][0]) for i, call in enumerate(model.calls[:-1])]
    assert any(wanted.any() and not wanted.all() for wanted, _ in seen)
    for wanted, x_self in seen:
        assert torch.equal((x_self == answer).all(1), wanted)


def test_truncated_update():
    a, b, c = coefficients(0.7)
    free = ops.sampler_step(X, X0, a, b, c, seed=3, step=2, rows=ROWS)
    tight = truncated_update(0.5)(X, X0, a, b, c, seed=3, step=2, rows=ROWS)
    mean = 0.5 * X + 0.4 * X0
    assert (tight - mean).abs().max() <= 0.7 * 0.5 + 1e-6 < (free - mean).abs().max()
    wide = truncated_update(30.0)(X, X0, a, b, c, seed=3, step=2, rows=ROWS)
    torch.testing.assert_close(wide, free, rtol=1e-4, atol=1e-4)
    assert torch.equal(tight, truncated_update(0.5)(X, X0, a, b, c, seed=3, step=2, rows=ROWS))


def test_absorbing_update():
    """Tokens become the vector with a probability in proportion to their noise, none where there is no noise."""
    x, rows, vector = torch.ones(50, 100, 2), torch.arange(50), torch.tensor([2.0, 3.0])
    update = absorbing_update(0.5, vector, ops.sampler_step)
    a, b, c = torch.ones(50, 100), torch.zeros(50, 100), torch.linspace(0, 1, 100).expand(50, 100)
    moved = update(x, x, a, b, c, seed=1, step=0, rows=rows)
    lost = (moved == vector).all(2)
    assert torch.equal(lost, (moved == vector).any(2))   # whole tokens
    assert lost.float().mean() == pytest.approx(0.25, abs=0.02) and not lost[:, 0].any()
    assert lost[:, 80:].float().mean() == pytest.approx(0.45, abs=0.05)
    assert torch.equal(moved[~lost], ops.sampler_step(x, x, a, b, c, seed=1, step=0, rows=rows)[~lost])


def test_the_solver_keeps_its_own_update_unless_asked():
    assert choose_update(0.0, 0.0, 0.0) is None


@pytest.mark.parametrize(("changes", "message"), [
    ({"rounding_step": 2001, "rounding": "from"}, r"rounding_step must be in 0..2000 .the diffusion steps., got 2001"),
    ({"rounding_step": -1}, "rounding_step must be in 0..2000"), ({"absorb_rate": 0.5}, "needs a model with an absorbing"),
    ({"drift": "start"}, "drift 'start' needs a model with an absorbing"), ({"drift": "no"}, "drift must be one of follow"),
    ({"absorb_rate": 1.5}, r"absorb_rate must be in \[0, 1\]"), ({"noise_limit": -1.0}, "noise_limit must be"),
    ({"rounding": "sometimes"}, "rounding must be one of off, every, from, until")])
def test_wrong_options(changes, message):
    with pytest.raises(ValueError, match=message):
        Decoder(oracle([4], latent_dim=31), DecodeOptions(**changes))


# --- DiffuSeq-v2 ---


def absorbing_model(**changes) -> DiffuSeq:
    torch.manual_seed(3)
    return DiffuSeq(DiffuSeqConfig(
        vocabulary=31, latent_dim=8, time_dim=8, hidden_dim=16, ffn_dim=24, heads=2, encoder_layers=1,
        sequence_length=16, positions=20, **{"soft_absorb": True, **changes})).eval()


def test_the_network_starts_from_noise_around_the_absorbing_vector(monkeypatch):
    """What the network reads is the state plus the vector; with an oracle every solver ends at the answer."""
    model = absorbing_model(embedding_norm=True)
    with torch.no_grad():
        model.absorbing.fill_(7.0)
    answer, seen = torch.tensor([4, 5, 6, 2] + [1] * 12), []

    def perfect(self, x_t, timesteps, *rest):
        seen.append(x_t)
        return self.embedding.table()[answer[: x_t.size(1)]].expand_as(x_t)

    monkeypatch.setattr(DiffuSeq, "denoise", perfect)
    for solver in ("ancestral", "ddim", "skip"):
        for final in ("x0_hat", "state"):
            seen.clear()
            found = decode(model, SOURCE, IDS, DecodeOptions(steps=6, solver=solver, final=final))
            assert words(found) == [[[4, 5, 6]]] * 4
            assert seen[0].mean() == pytest.approx(7.0, abs=0.2) and seen[0].std() == pytest.approx(1.0, abs=0.2)
            assert seen[-1].mean() < 5   # it has moved away from the vector, towards the answer


def test_absorbed_tokens_are_the_vector(monkeypatch):
    model, seen = absorbing_model(), []
    original = DiffuSeq.denoise

    def spy(self, x_t, *rest):
        seen.append(x_t.clone())
        return original(self, x_t, *rest)

    monkeypatch.setattr(DiffuSeq, "denoise", spy)
    decode(model, SOURCE, IDS, DecodeOptions(steps=5, solver="ancestral", absorb_rate=1.0))
    at_vector = [(x_t == model.absorbing).all(2).float().mean() for x_t in seen]
    assert at_vector[0] == 0 and at_vector[1] > 0.5 and all(share > 0 for share in at_vector[1:])


@pytest.mark.parametrize(("solver", "drift"), [("ancestral", "start"), ("dpmpp2m_refeed", "ignore")])
def test_drift_as_published(solver, drift, monkeypatch):
    """DiffuSeq-v2's code (spec 1.11): its ancestral loop has m in the start noise only, its DPM-Solver has it nowhere."""
    model, seen = absorbing_model(), []
    original = DiffuSeq.denoise

    def spy(self, x_t, *rest):
        seen.append((x_t, original(self, x_t, *rest)))
        return seen[-1][1]

    monkeypatch.setattr(DiffuSeq, "denoise", spy)
    decode(model, SOURCE, IDS, DecodeOptions(steps=4, solver=solver, drift=drift, rounding="off"))
    coordinates = {"seed": torch.tensor(1), "rows": IDS}
    x = ops.philox_normal(seen[0][0].shape, **coordinates) + (model.absorbing if drift == "start" else 0.0)
    abar = model.schedule.abar
    for i, ((t, u), (state, x0_hat)) in enumerate(zip(uniform_steps(2000, 4)[:2], seen, strict=False)):
        torch.testing.assert_close(state, x)
        if solver == "ancestral":
            beta = 1 - abar[t] / abar[u]
            z = ops.philox_normal(x.shape, step=i, stream="x_t", **coordinates)
            x = (abar[u].sqrt() * beta * x0_hat + (1 - beta).sqrt() * (1 - abar[u]) * x) / (1 - abar[t]) + beta.sqrt() * z
        else:   # its first step, from the prediction in place of the state
            a = ((1 - abar[u]) / (1 - abar[t])).sqrt()
            x = (a + abar[u].sqrt() - a * abar[t].sqrt()) * x0_hat
        x = x.float()
