"""Decoding of sentences: candidates, step lists, rounding, determinism, and the published loop written out."""

import copy
import dataclasses

import pytest
import torch
from torch import Tensor

from pydiffseq import ops
from pydiffseq.decoding import DecodeOptions, decode, mbr_order
from pydiffseq.diffusion import TOKEN_SAMPLERS
from pydiffseq.models import ARDiffusion, ARDiffusionConfig

BOS, PAD, EOS = 0, 1, 2
CONFIG = ARDiffusionConfig(
    vocabulary=31, source_vocabulary=31, latent_dim=8, time_dim=8, hidden_dim=16, ffn_dim=24, heads=2, encoder_layers=1,
    decoder_layers=2, source_positions=12, target_length=7, dropout=0.1, attention_dropout=0.1, length_policy="pad")
SOURCE = torch.tensor([[5, 6, 7, 8, 2], [4, 11, 2, 1, 1], [12, 2, 1, 1, 1], [13, 14, 15, 2, 1]])
IDS = torch.tensor([5, 0, 9, 1000])
PUBLISHED = DecodeOptions(rounding="every", step_end="zero", final="state")
PREDICT = {"length_policy": "predict", "length_relative": True}


def tiny(cls=ARDiffusion, **changes) -> ARDiffusion:
    """A random model that is far enough from a constant to say different words."""
    torch.manual_seed(5)
    model = cls(dataclasses.replace(CONFIG, **changes)).eval()
    with torch.no_grad():
        for p in model.encoder.parameters():
            p.add_(0.3 * torch.randn_like(p))
        model.output_down[2].weight.mul_(6)
        model.embedding.bias.normal_(std=0.1)
        if model.length_head is not None:
            model.length_head.table.weight.normal_()
            model.length_head.offset_bias.copy_(-20.0 * (torch.arange(15) - 8).abs())   # source length + 1
    return model


def words(groups) -> list[list[list[int]]]:
    return [[hypothesis.tokens.tolist() for hypothesis in group] for group in groups]


class Oracle(ARDiffusion):
    """Predicts the embeddings of ``answer`` plus ``error``; remembers what it was asked."""

    answer: Tensor
    error: float = 0.0
    calls: list

    def denoise(self, x_t, timesteps, encoded, mask, x_self=None, lengths=None):
        self.calls.append({"x_t": x_t, "t": timesteps, "mask": mask, "x_self": x_self, "lengths": lengths})
        return self.embedding.table()[self.answer[: x_t.size(1)]].expand_as(x_t) + self.error


def oracle(answer: list[int], **changes) -> Oracle:
    model = tiny(Oracle, **changes)
    with torch.no_grad():   # orthogonal rows of one norm: the nearest and the best scored row are the row itself
        model.embedding.weight.copy_(10 * torch.eye(31))
        model.embedding.bias.zero_()
    model.answer, model.calls = torch.tensor(answer), []
    return model


@pytest.fixture
def noise_rows(monkeypatch) -> list[Tensor]:
    """Rows (candidate << 32 | id) of the start noise of every decoding run."""
    seen, original = [], ops.philox_normal
    monkeypatch.setattr(ops, "philox_normal", lambda *a, **k: seen.append(k["rows"]) or original(*a, **k))
    return seen


# --- candidates ---


def test_words_end_before_the_first_eos_and_have_no_padding():
    model = oracle([9, PAD, 8, EOS, 7, PAD, PAD], latent_dim=31)
    (hypothesis,), *_ = decode(model, SOURCE, IDS, DecodeOptions(steps=2))
    assert hypothesis.tokens.tolist() == [9, 8]
    assert hypothesis.token_scores.tolist() == pytest.approx([0.0, 0.0], abs=1e-6)
    assert hypothesis.score == pytest.approx(0.0, abs=1e-6)


def test_candidates_are_the_likeliest_lengths_times_the_noises(noise_rows):
    model = oracle([9, 8, 7, 6, 5, 4, 3], latent_dim=31, **PREDICT)
    with torch.no_grad():
        model.length_head.table.weight.zero_()
    model.length_head.forward = lambda states, mask: torch.tensor(
        [[99.0, 0, 5, 4, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 2, 3]] * 2)
    groups = decode(model, SOURCE, IDS, DecodeOptions(steps=2, length_beam=2, noise_beam=3))
    lengths = model.calls[0]["lengths"].view(4, 6)
    assert lengths.tolist() == [[2, 2, 2, 3, 3, 3], [7, 7, 7, 6, 6, 6]] * 2   # never 0, the best first
    assert noise_rows[0].view(4, 6).tolist() == [[c << 32 | i for c in range(6)] for i in IDS.tolist()]
    assert [len(group) for group in groups] == [6] * 4
    assert torch.equal(model.calls[0]["mask"].sum(1), lengths.flatten())
    assert sorted(map(len, words(groups)[0])) == [2, 2, 2, 3, 3, 3]


def test_more_lengths_than_there_are_give_all_lengths():
    groups = decode(tiny(**PREDICT), SOURCE, IDS, DecodeOptions(steps=2, length_beam=50))
    assert [len(group) for group in groups] == [7] * 4


@pytest.mark.parametrize(("direction", "metric", "smoothing"), [
    ("hypothesis", "bleu", "add1"), ("reference", "bleu", "method4"), ("hypothesis", "edit", "add1")])
def test_hypotheses_come_in_the_order_of_mbr(direction, metric, smoothing):
    options = DecodeOptions(steps=3, length_beam=2, noise_beam=3, mbr_direction=direction, mbr_metric=metric,
                            mbr_smoothing=smoothing)
    model = tiny(**PREDICT)
    for group in decode(model, SOURCE, IDS, options):
        tokens, scores = [h.tokens.tolist() for h in group], [h.score for h in group]
        assert len({tuple(t) for t in tokens}) > 2
        order, utilities = mbr_order(tokens, direction, metric, smoothing)
        assert scores == pytest.approx(utilities) and scores == sorted(scores, reverse=True)
        assert scores[0] == pytest.approx(max(utilities[i] for i in order))


def test_a_candidate_does_not_depend_on_how_many_there_are():
    model = tiny()
    many = words(decode(model, SOURCE, IDS, DecodeOptions(steps=3, noise_beam=4)))
    one = words(decode(model, SOURCE, IDS, DecodeOptions(steps=3)))
    assert all(alone[0] in group for alone, group in zip(one, many, strict=True))


def test_the_only_score_is_the_mean_log_probability():
    (hypothesis,), = decode(tiny(), SOURCE[:1], IDS[:1], DecodeOptions(steps=3))
    assert len(hypothesis.tokens) and hypothesis.score == pytest.approx(float(hypothesis.token_scores.mean()))
    assert (hypothesis.token_scores <= 0).all() and hypothesis.token_scores.dtype == torch.float32


@pytest.mark.parametrize("changes", [{}, PREDICT])
def test_a_source_without_words_becomes_an_empty_hypothesis(changes):
    source = torch.tensor([[EOS, PAD, PAD], [5, 6, EOS], [PAD, PAD, PAD]])
    groups = decode(tiny(**changes), source, torch.arange(3), DecodeOptions(steps=3, noise_beam=2, history=True))
    for group, empty in zip(groups, (True, False, True), strict=True):
        for hypothesis in group:
            assert (len(hypothesis.tokens) == 0) == (len(hypothesis.token_scores) == 0) == empty
            assert len(hypothesis.history) == 3 and all(len(step) == 0 for step in hypothesis.history) == empty


def test_an_empty_batch_has_no_hypotheses():
    assert decode(tiny(), SOURCE[:0], IDS[:0], DecodeOptions()) == []


# --- the denoising loop ---


@pytest.mark.parametrize("rounding", ["off", "every"])
def test_rounding_replaces_every_prediction_also_for_self_conditioning(rounding):
    model = oracle([9, 8, 7, 6, 5, 4, 3], latent_dim=31, self_conditioning=0.5)
    model.error = 0.5
    decode(model, SOURCE, IDS, DecodeOptions(steps=3, rounding=rounding))
    expected = model.embedding.weight[model.answer] + (0.5 if rounding == "off" else 0.0)
    assert model.calls[0]["x_self"] is None
    for call in model.calls[1:]:
        torch.testing.assert_close(call["x_self"], expected.expand(4, 7, 31))


def test_final_chooses_between_the_state_and_the_prediction():
    """One step to timestep 0 keeps a little of the start noise in the state, and nothing of it in the prediction."""
    model = tiny()

    def scores(**options):
        groups = decode(model, SOURCE, IDS, DecodeOptions(steps=1, rounding="off", **options))
        return torch.cat([hypothesis.token_scores for (hypothesis,) in groups])

    prediction = scores(final="x0_hat")
    assert torch.equal(prediction, scores(final="state"))   # the list ends at the clean state
    assert not torch.equal(prediction, scores(final="state", step_end="zero"))


@pytest.mark.parametrize("rounding", ["off", "every", "from", "until"])
@pytest.mark.parametrize("patience", [0, 1])
@pytest.mark.parametrize("changes", [{}, PREDICT], ids=str)
@torch.no_grad()
def test_scores_are_probabilities_under_the_prediction_before_it_is_rounded(rounding, patience, changes):
    """Of a row that stops early, the prediction of its last step."""
    model, predictions, alone = tiny(**changes), [], []
    with torch.no_grad():
        model.embedding.bias[:4] = -1000.0   # so that every position has a word
    original = model.denoise
    model.denoise = lambda *args: predictions.append(original(*args)) or predictions[-1]
    options = DecodeOptions(steps=9, patience=patience, rounding=rounding, rounding_step=1000)
    for row in range(4):
        predictions.clear()
        (hypothesis,), = decode(model, SOURCE[row:row + 1], IDS[row:row + 1], options)
        alone.append(hypothesis)
        vectors = predictions[hypothesis.steps - 1][0].double()
        log_probabilities = (vectors @ model.embedding.weight.T.double() + model.embedding.bias).log_softmax(-1)
        expected = log_probabilities.gather(1, hypothesis.tokens[:, None])[:, 0].float()
        torch.testing.assert_close(hypothesis.token_scores, expected, rtol=1e-4, atol=1e-4)
        assert len(expected) and float(expected.max()) < -1e-3
    assert len({hypothesis.steps for hypothesis in alone}) > 1 or not patience
    together = decode(model, SOURCE, IDS, options)
    for (hypothesis,), other in zip(together, alone, strict=True):
        assert torch.equal(hypothesis.token_scores, other.token_scores)


@pytest.mark.parametrize("changes", [{}, PREDICT, {"timestep_sampler": "rolling"}, {"timestep_sampler": "uniform"},
                                     {"timestep_sampler": "lossaware"}])
@pytest.mark.parametrize("end", ["clean", "zero"])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_one_network_call_and_one_history_entry_for_each_step(changes, end, steps):
    model, calls = tiny(**changes), []
    original = model.denoise
    model.denoise = lambda *args: calls.append(args[1]) or original(*args)
    options = DecodeOptions(steps=steps, step_end=end, history=True)
    for (hypothesis,) in decode(model, SOURCE, IDS, options):
        assert len(hypothesis.history) == steps
        assert torch.equal(hypothesis.history[-1], hypothesis.tokens)   # final = x0_hat
    assert len(calls) == steps and all(t.shape == calls[0].shape for t in calls)
    per_token = changes.get("timestep_sampler", "xy_uniform") in TOKEN_SAMPLERS
    assert any((t[:, 0] != t[:, -1]).any() for t in calls) == (per_token and steps > 1)


@pytest.mark.parametrize("changes", [{}, {"timestep_sampler": "uniform"}])
def test_too_many_steps_are_refused(changes):
    model = tiny(diffusion_steps=10, **changes)
    most = 10 if changes else 17
    assert len(decode(model, SOURCE, IDS, DecodeOptions(steps=most))) == 4
    with pytest.raises(ValueError, match=rf"must be in 1\.\.{most} .*, got {most + 1}"):
        decode(model, SOURCE, IDS, DecodeOptions(steps=most + 1))


@pytest.mark.parametrize(("name", "accepted"), [
    ("solver", "ancestral, ddim, skip, ddim_xy, cedi, dpmpp2m, dpmpp2m_refeed"),
    ("step_list", "auto, uniform, halfstart, quadratic, logsnr, stride"), ("rounding", "off, every, from, until"),
    ("step_end", "zero, clean"), ("final", "x0_hat, state"), ("mbr_direction", "hypothesis, reference"),
    ("mbr_metric", "bleu, f1, edit"), ("mbr_smoothing", "add1, add1_all, method4, exp")])
def test_unknown_names_are_refused_with_the_accepted_ones(name, accepted):
    with pytest.raises(ValueError, match=f"{name} must be one of {accepted}, got 'best'"):
        DecodeOptions(**{name: "best"})


@pytest.mark.parametrize("name", ["steps", "length_beam", "noise_beam"])
def test_counts_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be >= 1, got 0"):
        DecodeOptions(**{name: 0})


def test_a_length_beam_needs_length_prediction():
    with pytest.raises(ValueError, match="length_beam > 1 needs a model with length prediction"):
        decode(tiny(), SOURCE, IDS, DecodeOptions(length_beam=2))


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(ValueError, match="evaluation mode"):
        decode(tiny().train(), SOURCE, IDS, DecodeOptions())


# --- determinism ---


@pytest.mark.parametrize("changes", [{}, PREDICT, {"time_injection": "rotary"}, {"timestep_sampler": "uniform"}])
@pytest.mark.parametrize("options", [PUBLISHED, DecodeOptions(steps=5, noise_beam=2)], ids=["published", "clean"])
def test_a_sentence_has_one_translation_whatever_stands_around_it(changes, options):
    model = tiny(**changes)
    whole = words(decode(model, SOURCE, IDS, options))
    assert len({str(group) for group in whole}) > 1
    for row in range(4):
        alone = SOURCE[row:row + 1, : int(SOURCE[row].ne(PAD).sum())]
        assert words(decode(model, alone, IDS[row:row + 1], options)) == whole[row:row + 1]
    order = torch.tensor([2, 3, 0, 1])
    assert words(decode(model, SOURCE[order], IDS[order], options)) == [whole[i] for i in order.tolist()]
    padded = torch.cat([SOURCE, torch.full((4, 5), PAD)], 1)
    left = torch.stack([row.roll(int(row.eq(PAD).sum())) for row in padded])
    assert words(decode(model, padded, IDS, options)) == words(decode(model, left, IDS, options)) == whole


def test_the_seed_changes_the_candidates():
    model = tiny()
    first, second = (words(decode(model, SOURCE, IDS, DecodeOptions(seed=seed))) for seed in (1, 2))
    assert first != second


def test_decoding_leaves_the_generator_and_the_gradients_alone():
    model = tiny()
    state = torch.get_rng_state()
    decode(model, SOURCE, IDS, PUBLISHED)
    assert torch.equal(torch.get_rng_state(), state) and all(p.grad is None for p in model.parameters())


def test_decoding_sees_what_an_optimiser_wrote_through_data():
    """fairseq's optimisers and moving averages update ``p.data``, which no version counter notices."""
    model, options = tiny(), dataclasses.replace(PUBLISHED, steps=4)
    decode(model, SOURCE, IDS, options)
    model.embedding.weight.data.copy_(model.embedding.weight.flip(0))
    fresh = copy.deepcopy(model)
    assert words(decode(model, SOURCE, IDS, options)) == words(decode(fresh, SOURCE, IDS, options))


@pytest.mark.parametrize("changes", [{}, PREDICT, {"embedding_norm": True, "scale_embedding": True}])
def test_bfloat16_decodes(changes):
    model = tiny(**changes).bfloat16()
    options = dataclasses.replace(PUBLISHED, steps=4, noise_beam=2)
    first = decode(model, SOURCE, IDS, options)
    assert words(first) == words(decode(model, SOURCE, IDS, options))
    assert all(h.token_scores.isfinite().all() for group in first for h in group)


# --- the published loop ---


def token_times(s: int, N: int, T: int) -> Tensor:
    n_s, t_s = max(0, N - 1 - s), max(0, s - (N - 1))
    line = (torch.arange(N, dtype=torch.float32) - 2 * N) / (n_s - 2 * N) * (t_s - (T - 1)) + T - 1
    return torch.tensor([min(max(round(value), 0), T - 1) for value in line.tolist()])


def published_loop(model: ARDiffusion, source: Tensor, ids: Tensor, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """Skip sampling in float64: final state ``[B, N, d]`` and its log probabilities ``[B, N, V]``."""
    model = copy.deepcopy(model).double()
    T, N, d = model.config.diffusion_steps, model.config.target_length, model.config.latent_dim
    abar, table = model.schedule.abar, model.embedding.weight
    every = list(range(T + N))[::-1]
    visited = every[:: (T + N) // steps][:steps]
    visited += [0] if visited[-1] != 0 else []
    x = ops.philox_normal((len(source), N, d), seed=seed, rows=ids).double()
    for i, (now, after) in enumerate(zip(visited[:-1], visited[1:], strict=True)):
        t, u = token_times(now, N, T), token_times(after, N, T)
        x0_hat = model.denoise(x, t.expand(len(source), N), model.encode(source), None)
        x0_hat = table[(x0_hat[..., None, :] - table).square().sum(-1).argmin(-1)]
        noise = ops.philox_normal((len(source), N, d), seed=seed, rows=ids, step=i, stream="x_t").double()
        for n in range(N):
            at, au = abar[t[n]], abar[u[n]]
            if t[n] == u[n]:
                continue
            mean = ((at / au).sqrt() * (1 - au) / (1 - at) * x[:, n]
                    + au.sqrt() * (1 - at / au) / (1 - at) * x0_hat[:, n])
            variance = (1 - at / au) * (1 - au) / (1 - at)
            x[:, n] = mean + (variance.sqrt() * noise[:, n] if u[n] != 0 else 0)
    return x, (x @ table.T + model.embedding.bias).log_softmax(-1)


@pytest.mark.parametrize("steps", [1, 3, 20])
@pytest.mark.parametrize("changes", [{}, {"time_injection": "add"}, {"diffusion_steps": 30}], ids=str)
@torch.no_grad()
def test_published_decoding_is_the_published_loop(changes, steps):
    model = tiny(**changes)
    found = decode(model, SOURCE, IDS, dataclasses.replace(PUBLISHED, steps=steps, seed=3))
    _, log_probabilities = published_loop(model, SOURCE, IDS, steps, seed=3)
    best = log_probabilities.max(-1)
    for (hypothesis,), tokens, scores in zip(found, best.indices.tolist(), best.values, strict=True):
        end = tokens.index(EOS) if EOS in tokens else len(tokens)
        kept = [n for n in range(end) if tokens[n] not in (PAD, BOS)]
        assert hypothesis.tokens.tolist() == [tokens[n] for n in kept]
        torch.testing.assert_close(hypothesis.token_scores.double(), scores[kept], rtol=1e-4, atol=1e-4)
    assert sum(len(hypothesis.tokens) for (hypothesis,) in found) > 8

