"""Behaviour of the DiffuSeq module: size, layouts, padding, seeds, partial noising, options, learning."""

import copy
import dataclasses

import pytest
import torch

from pydiffseq import ops
from pydiffseq.decoding import DecodeOptions, decode
from pydiffseq.diffusion import SOLVERS
from pydiffseq.models import DiffuSeq, DiffuSeqConfig

BOS, PAD, EOS = 0, 1, 2
TINY = DiffuSeqConfig(
    vocabulary=23, latent_dim=8, time_dim=8, hidden_dim=16, ffn_dim=24, heads=2, encoder_layers=2, sequence_length=16,
    positions=20, dropout=0.0, attention_dropout=0.0)
PLUS = {
    "length_policy": "predict", "length_relative": True, "self_conditioning": 0.5, "noise_factor": 4.0,
    "embedding_norm": True, "clean_x0": True, "ce_on": "pred", "label_smoothing": 0.1, "encoder_pre_norm": True,
    "loss_scope": "target", "timestep_sampler": "uniform", "position_start": "sinusoidal", "positions_after_norm": True}
RECIPES = {"published": {}, "predict": {"length_policy": "predict"}, "distance": {"logits": "distance"}, "plus": PLUS,
           "v2": {"soft_absorb": True, "discrete_noise": 0.5},
           "token times": PLUS | {"timestep_sampler": "xy_uniform"},
           "rolling": PLUS | {"timestep_sampler": "rolling", "anchor_scale": 0.3}}
SOURCE = torch.tensor([[5, 6, 7, 8, 2], [4, 11, 2, 1, 1], [12, 2, 1, 1, 1]])
TARGET = torch.tensor([[4, 5, 22, 7, 8, 2], [9, 10, 2, 1, 1, 1], [12, 2, 1, 1, 1, 1]])
IDS = torch.tensor([5, 0, 9])


def tiny(**changes) -> DiffuSeq:
    torch.manual_seed(3)
    return DiffuSeq(dataclasses.replace(TINY, **changes)).eval()


def named(losses) -> dict[str, torch.Tensor]:
    return losses.per_token | losses.per_sentence


def total(losses) -> torch.Tensor:
    return sum(v.sum() for v in named(losses).values())


def pad_left(tokens: torch.Tensor) -> torch.Tensor:
    return torch.stack([row.roll(int(row.eq(PAD).sum())) for row in tokens])


def test_published_parameter_count():
    assert sum(p.numel() for p in DiffuSeq(DiffuSeqConfig(30522)).parameters()) == 91_225_274


def test_no_projections_where_the_sizes_agree():
    names = dict(tiny(latent_dim=16).named_parameters())
    assert not any(name.startswith(("input_up", "output_down")) for name in names)
    assert any(name.startswith("input_up") for name in dict(tiny().named_parameters()))


# --- layout ---


def test_predict_layout_is_source_separator_words():
    batch = tiny(length_policy="predict").layout(SOURCE, TARGET)
    assert batch.tokens.tolist()[0] == [5, 6, 7, 8, 2, 4, 5, 22, 7, 8]
    assert batch.tokens.tolist()[1] == [4, 11, 2, 9, 10, 1, 1, 1, 1, 1]
    assert batch.lengths.tolist() == [5, 2, 1]
    assert batch.real[1].tolist() == [True] * 5 + [False] * 5 == batch.scored[1].tolist()


@pytest.mark.parametrize(("policy", "scope", "counts"), [
    ("pad", "all", [16, 16, 16]), ("pad", "target", [9, 11, 12]), ("pad", "nonpad", [7, 4, 3]),
    ("predict", "all", [10, 5, 3]), ("predict", "target", [5, 2, 1]), ("predict", "nonpad", [5, 2, 1])])
def test_loss_scope(policy, scope, counts):
    model = tiny(length_policy=policy, loss_scope=scope)
    losses = model(SOURCE, TARGET, IDS, seed=1)
    assert losses.mask.sum(1).tolist() == counts
    for value in losses.per_token.values():
        assert not value[~losses.mask].any() and (value[losses.mask] > 0).all()


def test_long_pairs_are_trimmed_alike_with_length_prediction():
    source, target = torch.tensor([[*range(4, 18), EOS]]), torch.tensor([[*range(4, 23), EOS]])
    model = tiny(length_policy="predict")
    batch = model.layout(source, target)
    assert batch.tokens[0].tolist() == [*range(4, 11), EOS, *range(4, 11)]   # 7 + 1 + 7 of 16: both lose alike
    assert model(source, target, seed=1).per_sentence["length"].isfinite().all()


def test_long_sources_leave_a_quarter_to_the_target_when_decoding():
    for policy in ("pad", "predict"):
        model = tiny(length_policy=policy)
        prompt = model.encode(torch.tensor([[*range(4, 22), EOS], [5, EOS] + [PAD] * 17]))
        assert prompt.lengths.tolist() == ([12, 4] if policy == "pad" else [12, 2])
        assert model.fixed_lengths(prompt).tolist() == [16 - n for n in prompt.lengths.tolist()]


@pytest.mark.parametrize("recipe", RECIPES)
def test_empty_sides(recipe):
    model = tiny(**RECIPES[recipe])
    nothing = torch.tensor([[EOS]])
    for source, target in ((nothing, TARGET[:1]), (SOURCE[:1], nothing), (nothing, nothing)):
        losses = model(source, target, seed=1)
        assert all(value.isfinite().all() for value in named(losses).values())
    assert decode(model, nothing, IDS[:1], DecodeOptions(steps=2))[0][0].tokens.tolist() == []


# --- padding, batches and seeds ---


@pytest.mark.parametrize("recipe", RECIPES)
@torch.no_grad()
def test_losses_do_not_depend_on_the_batch_or_the_side_and_amount_of_padding(recipe):
    model = tiny(**RECIPES[recipe])
    whole = model(SOURCE, TARGET, IDS, seed=4)
    longer = [torch.cat([tokens, torch.full((3, 3), PAD)], 1) for tokens in (SOURCE, TARGET)]
    for source, target in (longer, map(pad_left, longer)):
        for name, value in named(model(source, target, IDS, seed=4)).items():
            torch.testing.assert_close(value, named(whole)[name], rtol=1e-5, atol=1e-5)
    for row in range(3):
        alone = model(SOURCE[row:row + 1], TARGET[row:row + 1], IDS[row:row + 1], seed=4)
        width = alone.mask.shape[1]
        assert torch.equal(alone.timesteps[alone.mask], whole.timesteps[row, :width][alone.mask[0]])
        for name, value in alone.per_token.items():
            torch.testing.assert_close(value[0], whole.per_token[name][row, :width], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recipe", RECIPES)
def test_decoding_does_not_depend_on_the_batch(recipe):
    model = tiny(**RECIPES[recipe])
    options = DecodeOptions(steps=3, noise_beam=2, length_beam=2 if model.length_head else 1)
    together = decode(model, SOURCE, IDS, options)
    for row in range(3):
        for source in (SOURCE[row:row + 1], pad_left(SOURCE[row:row + 1])):
            alone = decode(model, source, IDS[row:row + 1], options)[0]
            assert [h.tokens.tolist() for h in alone] == [h.tokens.tolist() for h in together[row]]


# --- the network and the noise ---


@pytest.mark.parametrize("recipe", RECIPES)
@torch.no_grad()
def test_denoise_is_the_network_of_training_on_the_target_part(recipe):
    """The whole sequence as training lays it out, with a clean source, against what decoding calls."""
    model = tiny(**RECIPES[recipe])
    batch, prompt = model.layout(SOURCE, TARGET), model.encode(SOURCE)
    width = int(batch.lengths.max())
    x_t, t = torch.randn(3, width, 8), torch.tensor([3, 900, 1999])[:, None].expand(3, width)
    x_self = torch.randn(3, width, 8) if model.config.self_conditioning else None
    found = model.denoise(x_t, t, prompt, None, x_self, batch.lengths)
    for row, (start, length) in enumerate(zip(prompt.lengths.tolist(), batch.lengths.tolist(), strict=True)):
        source = model.embedding.table()[batch.tokens[row, :start]]
        x, known = (None if target is None else torch.cat([source, target[row, :length]])[None]
                    for target in (x_t, x_self))
        noised = torch.arange(start + length)[None] >= start
        states = model.states(x, t[row:row + 1, :1].expand(1, start + length), noised, None, known,
                              model._base(noised, torch.tensor([length])))
        torch.testing.assert_close(found[row, :length], model.output_down(states)[0, start:], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_only_the_target_part_is_noised(monkeypatch):
    seen = {}
    original = DiffuSeq.states

    def spy(self, x, timesteps, noised, *rest):
        seen.update(x=x, timesteps=timesteps, noised=noised)
        return original(self, x, timesteps, noised, *rest)

    monkeypatch.setattr(DiffuSeq, "states", spy)
    for changes in ({}, {"clean_source": True}):
        model = tiny(**changes)
        model(SOURCE, TARGET, IDS, seed=1)
        tokens, source = model.layout(SOURCE, TARGET).tokens, ~seen["noised"]
        clean = model.embedding.weight[tokens]
        noise = ops.philox_normal((3, 16, 8), seed=1, rows=IDS, stream="x_0")
        sigma0 = 0.0 if changes else float(model.schedule.sigma[0])
        torch.testing.assert_close(seen["x"][source], (clean + sigma0 * noise)[source])
        assert (seen["x"] - clean)[seen["noised"]].abs().mean() > 0.05
        assert (seen["timesteps"] == seen["timesteps"][:, :1]).all()


@torch.no_grad()
def test_noise_drifts_to_the_absorbing_vector(monkeypatch):
    """DiffuSeq-v2: x_t = sqrt(abar) (x0 - m) + sqrt(1 - abar) eps + m on the target, m alone for a share of its tokens."""
    seen = {}
    original = DiffuSeq.states

    def spy(self, x, timesteps, noised, *rest):
        seen.update(x=x, timesteps=timesteps, noised=noised)
        return original(self, x, timesteps, noised, *rest)

    monkeypatch.setattr(DiffuSeq, "states", spy)
    tiny()(SOURCE, TARGET, IDS, seed=1)
    plain = seen["x"]
    model = tiny(soft_absorb=True)
    losses = model(SOURCE, TARGET, IDS, seed=1)
    m, signal = model.absorbing, model.schedule.signal[seen["timesteps"]][..., None]
    torch.testing.assert_close(seen["x"], torch.where(seen["noised"][..., None], plain + (1 - signal) * m, plain))
    torch.testing.assert_close(losses.per_sentence["absorbing"], m.norm().expand(3))
    drifted, share = seen["x"], []
    for rate in (0.3, 1.0):
        many = [tensor.repeat(100, 1) for tensor in (SOURCE, TARGET)]
        model = tiny(soft_absorb=True, discrete_noise=rate)
        model(*many, torch.arange(300), seed=1)
        gone, noised = (seen["x"] == model.absorbing).all(-1), seen["noised"]
        assert not (gone & ~noised).any()
        share.append(float(gone[noised].float().mean() / model.schedule.sigma[seen["timesteps"]][noised].mean()))
    assert share == pytest.approx([0.3, 1.0], abs=0.05) and drifted.isfinite().all()


@pytest.mark.parametrize("recipe", ["published", "plus"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_oracle_on_the_partial_noising_layout(recipe, solver, monkeypatch):
    """A network that knows the target gives it back through every solver, and is asked about the target part alone."""
    model = tiny(**RECIPES[recipe] | {"embedding_norm": True})   # the argmax at a row of the table is that row
    prompt, batch = model.encode(SOURCE), model.layout(SOURCE, TARGET)
    start, table = prompt.lengths, model.embedding.table().detach()
    if model.length_head is not None:
        monkeypatch.setattr(DiffuSeq, "length_logits", lambda self, encoded: torch.nn.functional.one_hot(
            batch.lengths, 17).float())
    seen = []

    def oracle(self, x_t, timesteps, encoded, mask, x_self=None, lengths=None):
        index = (start[:, None] + torch.arange(x_t.size(1))).clamp_max(batch.tokens.size(1) - 1)
        seen.append((x_t, timesteps))
        return table[batch.tokens.gather(1, index)]

    monkeypatch.setattr(DiffuSeq, "denoise", oracle)
    found = decode(model, SOURCE, IDS, DecodeOptions(steps=7, solver=solver))
    assert [group[0].tokens.tolist() for group in found] == [[4, 5, 22, 7, 8], [9, 10], [12]]
    assert len(seen) == 7
    for x_t, timesteps in seen:   # the signal in the state is that of its timestep
        abar = model.schedule.abar_at(timesteps)[..., None].float()
        index = (start[:, None] + torch.arange(x_t.size(1))).clamp_max(batch.tokens.size(1) - 1)
        keep = torch.arange(x_t.size(1)) < batch.lengths[:, None]
        residual = ((x_t - abar.sqrt() * table[batch.tokens.gather(1, index)]) / (1 - abar).sqrt())[keep]
        assert residual.mean().abs() < 0.6
        if solver not in ("cedi", "dpmpp2m_refeed"):   # which tell another timestep than the state's, or drop its noise
            assert 0.6 < residual.std() < 1.4


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_parameter_is_trained(recipe):
    model = tiny(**RECIPES[recipe])
    losses = model(SOURCE, TARGET, IDS, seed=1)
    sum(named(losses)[name].sum() for name in ("mse", "nll", *losses.per_sentence)).backward()
    untrained = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert untrained == ({"embedding.bias"} if recipe == "distance" else set())
    assert all(p.grad is not None for p in model.parameters())


@torch.no_grad()
def test_distance_logits():
    model = tiny(logits="distance")
    x, table = torch.randn(3, 4, 8), model.embedding.weight
    scores = -(x[..., None, :] - table).norm(dim=-1)
    tokens = torch.randint(4, 23, (3, 4))
    expected = -scores.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    torch.testing.assert_close(model.embedding.nll(x, tokens), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.embedding.likeliest(x), scores.argmax(-1))


def test_sinusoidal_positions_turn_by_the_same_angles_from_token_to_token():
    table = tiny(position_start="sinusoidal").positions.weight.detach().double()
    pairs = torch.view_as_complex(torch.stack(table.chunk(2, -1), -1).contiguous())
    turned = pairs[1:] / pairs[:-1]
    torch.testing.assert_close(turned, turned[:1].expand_as(turned), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(turned[0, 0].angle(), torch.tensor(1.0, dtype=torch.float64))


@torch.no_grad()
def test_positions_after_the_norm_are_not_drowned_by_the_time_embedding():
    """With a large time embedding, only they tell the tokens of a target apart."""
    def spread(**options):
        model = tiny(**options)
        model.time_mlp.down.weight.mul_(1e4)
        x0_hat = model.denoise(torch.zeros(1, 4, 8), torch.full((1, 4), 5), model.encode(SOURCE[:1]))
        return (x0_hat - x0_hat.mean(1, keepdim=True)).norm() / x0_hat.norm()

    assert spread(positions_after_norm=True) > 100 * spread()


@pytest.mark.parametrize(("changes", "message"), [
    ({"position_start": "zero"}, "position_start must be one of random, sinusoidal, got 'zero'"),
    ({"loss_scope": "source"}, "loss_scope must be one of all, target, nonpad, got 'source'"),
    ({"logits": "cosine"}, "logits must be one of dot, distance"), ({"sequence_length": 4}, "sequence_length must be >= 8"),
    ({"positions": 15}, "positions must be at least sequence_length, got 15 and 16"),
    ({"discrete_noise": 0.5}, "discrete_noise needs soft_absorb"),
    ({"discrete_noise": 1.5, "soft_absorb": True}, r"discrete_noise must be in \[0, 1\]"),
    ({"source_vocabulary": 24}, "DiffuSeq needs one joined dictionary, got 24 source and 23 target entries")])
def test_wrong_options_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


def test_a_sequence_longer_than_the_positions_is_refused():
    model = tiny(length_policy="predict")
    prompt = model.encode(SOURCE)
    with pytest.raises(ValueError, match="at most 20 tokens .positions., got 23"):
        model.denoise(torch.randn(3, 18, 8), torch.zeros(3, 18, dtype=torch.int64), prompt)


@pytest.mark.parametrize("recipe", RECIPES)
def test_bfloat16_follows_float32(recipe):
    model = tiny(**RECIPES[recipe])
    low = copy.deepcopy(model).bfloat16()
    expected, losses = model(SOURCE, TARGET, IDS, seed=1), low(SOURCE, TARGET, IDS, seed=1)
    for name, value in named(expected).items():
        assert named(losses)[name].dtype == torch.float32
        torch.testing.assert_close(named(losses)[name].mean(), value.mean(), rtol=0.1, atol=0.05)
    total(losses).backward()
    assert all(p.grad.isfinite().all() for p in low.parameters())


# --- learning ---


def test_loss_aware_sampler_learns_in_training_and_is_saved():
    model = tiny(diffusion_steps=4, timestep_sampler="lossaware").train()
    for step in range(60):
        model(SOURCE, TARGET, IDS, seed=step)
    assert model.sampler.seen.sum() == 180
    other = tiny(diffusion_steps=4, timestep_sampler="lossaware")
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.sampler.probabilities(), model.sampler.probabilities())
    assert not torch.allclose(other.sampler.probabilities(), torch.full((4,), 0.25, dtype=torch.float64))


def test_it_learns_to_reverse():
    """Reversed sequences of 4 symbols out of 8: after a few seconds of training most are right in ten steps."""
    torch.manual_seed(0)
    model = DiffuSeq(dataclasses.replace(
        TINY, vocabulary=12, source_vocabulary=12, latent_dim=16, hidden_dim=64, ffn_dim=128, time_dim=16,
        **PLUS | {"label_smoothing": 0.0}))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)

    def pairs(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        words = torch.randint(4, 12, (count, 4))
        end = torch.full((count, 1), EOS)
        return torch.cat([words, end], 1), torch.cat([words.flip(1), end], 1)

    for step in range(300):
        losses = model.train()(*pairs(64), seed=step)
        loss = sum(value[losses.mask].mean() for value in losses.per_token.values())
        (loss + losses.per_sentence["length"].mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    source, target = pairs(100)
    found = decode(model.eval(), source, torch.arange(100), DecodeOptions(steps=10))
    exact = sum(group[0].tokens.tolist() == row[:-1] for group, row in zip(found, target.tolist(), strict=True))
    assert exact > 80
