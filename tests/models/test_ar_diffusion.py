"""Behaviour of the AR-Diffusion module: layouts, padding, seeds, gradients, options, fallback and bfloat16."""

import copy
import dataclasses
import os
import subprocess
import sys

import pytest
import torch

from pydiffseq import ops
from pydiffseq.models import ARDiffusion, ARDiffusionConfig

PAD, EOS = 1, 2
TINY = ARDiffusionConfig(
    vocabulary=23, source_vocabulary=23, latent_dim=8, time_dim=8, hidden_dim=16, ffn_dim=24, heads=2, encoder_layers=1,
    decoder_layers=2, source_positions=12, target_length=7, dropout=0.0, attention_dropout=0.0, length_policy="pad")
PLUS = {
    "length_policy": "predict", "length_relative": True, "self_conditioning": 0.5, "noise_factor": 4.0,
    "embedding_norm": True, "clean_x0": True, "ce_on": "pred", "label_smoothing": 0.1, "encoder_pre_norm": True,
    "without_pooler": True, "decoder_final_norm": True, "share_embeddings": True}
RECIPES = {"published": {}, "predict": {"length_policy": "predict"}, "plus": PLUS}
SOURCE = torch.tensor([[5, 6, 7, 8, 2], [4, 11, 2, 1, 1], [12, 2, 1, 1, 1]])
TARGET = torch.tensor([[4, 5, 22, 7, 8, 2], [9, 10, 2, 1, 1, 1], [12, 2, 1, 1, 1, 1]])
IDS = torch.tensor([5, 0, 9])


def tiny(**changes) -> ARDiffusion:
    torch.manual_seed(3)
    model = ARDiffusion(dataclasses.replace(TINY, **changes)).eval()
    with torch.no_grad():   # BERT's small start would hide what the encoder does
        for p in model.encoder.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def total(losses) -> torch.Tensor:
    return sum(v.sum() for v in (losses.per_token | losses.per_sentence).values())


def pad_left(tokens: torch.Tensor) -> torch.Tensor:
    return torch.stack([row.roll(int(row.eq(PAD).sum())) for row in tokens])


# --- layouts ---


def test_pad_policy_has_a_fixed_length_whose_padding_counts():
    targets = tiny().layout(TARGET)
    assert targets.tokens.tolist()[1] == [9, 10, 2, 1, 1, 1, 1]
    assert targets.mask.all() and targets.lengths.tolist() == [7, 7, 7]


def test_pad_policy_cuts_a_long_target_without_keeping_its_end():
    targets = tiny().layout(torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10, 2]]))
    assert targets.tokens.tolist() == [[3, 4, 5, 6, 7, 8, 9]] and targets.lengths.tolist() == [7]


def test_predict_policy_keeps_the_words_alone():
    targets = tiny(length_policy="predict").layout(TARGET)
    assert targets.tokens.tolist() == [[4, 5, 22, 7, 8], [9, 10, 1, 1, 1], [12, 1, 1, 1, 1]]
    assert targets.lengths.tolist() == [5, 2, 1]
    assert targets.mask.tolist() == [[True] * 5, [True] * 2 + [False] * 3, [True] + [False] * 4]


@pytest.mark.parametrize("words", [6, 7, 8, 11])
def test_predict_policy_at_the_longest_target(words):
    target = torch.tensor([[*range(3, 3 + words), EOS], [3, EOS] + [PAD] * (words - 1)])
    targets = tiny(length_policy="predict").layout(target)
    assert targets.lengths.tolist() == [min(words, 7), 1]
    assert targets.tokens.tolist()[0] == list(range(3, 3 + words))[:7]
    assert torch.equal(targets.mask.sum(1), targets.lengths)


@pytest.mark.parametrize("recipe", ["predict", "plus"])
def test_an_empty_target_has_one_masked_position_and_no_token_loss(recipe):
    model = tiny(**RECIPES[recipe])
    targets = model.layout(torch.tensor([[EOS]]))
    assert targets.tokens.shape == (1, 1) and not targets.mask.any() and targets.lengths.tolist() == [0]
    losses = model(torch.tensor([[5, EOS]]), torch.tensor([[EOS]]), seed=1)
    assert all(not v.any() for v in losses.per_token.values())
    assert losses.per_sentence["length"].isfinite().all()


# --- padding, batches and seeds ---


@pytest.mark.parametrize("changes", [*RECIPES.values(), {"length_policy": "predict", "length_feature": "token_embed"}])
@torch.no_grad()
def test_the_side_and_amount_of_source_padding_do_not_matter(changes):
    model = tiny(**changes)
    longer = torch.cat([SOURCE, torch.full((3, 2), PAD)], 1)
    expected = model(SOURCE, TARGET, IDS, seed=1)
    for source in (longer, pad_left(SOURCE), pad_left(longer)):
        losses = model(source, TARGET, IDS, seed=1)
        for name, value in (expected.per_token | expected.per_sentence).items():
            torch.testing.assert_close((losses.per_token | losses.per_sentence)[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recipe", RECIPES)
@torch.no_grad()
def test_losses_do_not_depend_on_batch_split_order_or_target_padding(recipe):
    model = tiny(**RECIPES[recipe])
    whole = model(SOURCE, torch.cat([TARGET, torch.full((3, 3), PAD)], 1), IDS, seed=4)
    for row in range(3):
        alone = model(SOURCE[row:row + 1], TARGET[row:row + 1], IDS[row:row + 1], seed=4)
        width = alone.mask.shape[1]
        assert torch.equal(alone.timesteps[alone.mask], whole.timesteps[row, :width][alone.mask[0]])
        for name, value in alone.per_token.items():
            torch.testing.assert_close(value[0], whole.per_token[name][row, :width], rtol=1e-5, atol=1e-5)
            assert not whole.per_token[name][row, width:].any()
    order = torch.tensor([2, 0, 1])
    shuffled = model(SOURCE[order], TARGET[order], IDS[order], seed=4)
    torch.testing.assert_close(total(shuffled), total(whole), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_seed_and_id_change_the_noise_and_torch_seeds_the_default():
    model = tiny()
    first = total(model(SOURCE, TARGET, IDS, seed=1))
    assert total(model(SOURCE, TARGET, IDS, seed=1)) == first
    assert total(model(SOURCE, TARGET, IDS, seed=2)) != first
    assert total(model(SOURCE, TARGET, IDS + 1, seed=1)) != first
    drawn = [total(model(SOURCE, TARGET, IDS)) for _ in (torch.manual_seed(1), torch.manual_seed(1), None)]
    assert len({float(v) for v in drawn}) > 1   # the generator moves on
    torch.manual_seed(1)
    once = total(model(SOURCE, TARGET, IDS))
    torch.manual_seed(1)
    assert total(model(SOURCE, TARGET, IDS)) == once


@torch.no_grad()
def test_a_source_of_nothing_but_its_end_is_finite():
    for changes in RECIPES.values():
        losses = tiny(**changes)(torch.tensor([[EOS]]), torch.tensor([[5, EOS]]), seed=1)
        assert total(losses).isfinite()


def test_a_source_longer_than_the_positions_is_refused_by_name():
    with pytest.raises(ValueError, match=r"at most 12 tokens \(source_positions\), got 13"):
        tiny().encode(torch.full((1, 13), 5))
    tiny().encode(torch.tensor([[PAD] * 9 + [5] * 11 + [EOS]]))   # padding takes no position


# --- gradients ---


def gradients(model: ARDiffusion, names, seed: int = 1) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    losses = model(SOURCE, TARGET, IDS, seed=seed)
    sum((losses.per_token | losses.per_sentence)[name].sum() for name in names).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_cross_entropy_on_x0_trains_the_table_and_its_bias_alone():
    grads = gradients(tiny(), ["nll"])
    assert {n for n, g in grads.items() if g is not None and g.any()} == {"embedding.weight", "embedding.bias"}


def test_cross_entropy_on_the_prediction_trains_the_network():
    grads = gradients(tiny(ce_on="pred"), ["nll"])
    assert grads["output_down.2.weight"].any() and grads["encoder.layers.0.up.weight"].any()


def test_mse_reaches_the_table_through_x0_and_x_t():
    """d mse / d table, against autograd through the formulas of the forward process."""
    model = tiny(clean_x0=True)
    grad = gradients(model, ["mse"])["embedding.weight"]
    table = model.embedding.weight.detach().clone().requires_grad_()
    targets, losses = model.layout(TARGET), model(SOURCE, TARGET, IDS, seed=1)
    noise = ops.philox_normal((3, 7, 8), seed=1, rows=IDS, stream="x_t")
    x0, t = table[targets.tokens], losses.timesteps
    x_t = model.schedule.signal[t][..., None] * x0 + model.schedule.sigma[t][..., None] * noise
    x0_hat = model.denoise(x_t, t, model.encode(SOURCE), None)
    (x0 - x0_hat).square().mean(-1).sum().backward()
    torch.testing.assert_close(grad, table.grad, rtol=1e-4, atol=1e-5)


def test_padding_rows_get_no_gradient_with_masked_padding():
    grads = gradients(tiny(length_policy="predict"), ["mse", "prior", "length"])
    assert not grads["embedding.weight"][PAD].any() and not grads["source_embedding.weight"][PAD].any()
    grads = gradients(tiny(length_policy="predict", share_embeddings=True), ["mse", "prior", "length"])
    assert not grads["embedding.weight"][PAD].any()
    assert grads["embedding.weight"][SOURCE[0, 0]].any()   # a source word


def test_every_parameter_is_trained():
    """Apart from the pooler, the second token type and rows of tokens and positions that did not occur."""
    for recipe, changes in RECIPES.items():
        model = tiny(**changes)
        names = ["mse", "nll"] + (["length"] if model.length_head else [])
        untrained = {n for n, g in gradients(model, names).items() if g is None or not g.any()}
        assert untrained == (set() if recipe == "plus" else {"encoder.pooler.weight", "encoder.pooler.bias"}), recipe


def test_dropout_is_off_in_evaluation_and_on_in_training():
    model = tiny(dropout=0.3, attention_dropout=0.2)
    assert total(model(SOURCE, TARGET, seed=1)) == total(model(SOURCE, TARGET, seed=1))
    model.train()
    assert total(model(SOURCE, TARGET, seed=1)) != total(model(SOURCE, TARGET, seed=1))


# --- options ---


@torch.no_grad()
def test_options_do_what_their_names_say():
    plain, clean = tiny(), tiny(clean_x0=True)
    assert "prior" in plain(SOURCE, TARGET, seed=1).per_token and "prior" not in clean(SOURCE, TARGET, seed=1).per_token
    scaled = tiny(scale_embedding=True)
    torch.testing.assert_close(scaled.embedding.table(), scaled.embedding.weight * 8**0.5)
    assert scaled.embedding.head_table() is scaled.embedding.weight
    normed = tiny(embedding_norm=True).embedding.table()
    torch.testing.assert_close(normed.square().sum(1), torch.full((23,), 8.0), rtol=1e-3, atol=1e-3)
    assert not tiny(length_policy="predict").embedding.weight[PAD].any() and plain.embedding.weight[PAD].any()


@torch.no_grad()
def test_self_conditioning_reads_its_first_pass():
    model = tiny(self_conditioning=1.0)
    losses = model(SOURCE, TARGET, IDS, seed=1)
    t, encoded = losses.timesteps, model.encode(SOURCE)
    x0, x_t = ops.embed_q_sample(model.embedding.weight, model.layout(TARGET).tokens, t, model.schedule.signal,
                                 model.schedule.sigma, sigma0=float(model.schedule.sigma[0]), seed=1, rows=IDS)
    x0_hat = model.denoise(x_t, t, encoded, None, model.denoise(x_t, t, encoded, None))
    torch.testing.assert_close(losses.per_token["mse"], (x0 - x0_hat).square().mean(-1))


def test_self_conditioning_has_its_probability():
    model, coins = tiny(self_conditioning=0.3), []
    for update in range(500):   # as fairseq seeds its updates
        torch.manual_seed(update)
        coins.append(model._flip_coin(ops.draw_seed()))
    assert 110 < sum(coins) < 190


@pytest.mark.parametrize(("changes", "message"), [
    ({"time_injection": "film"}, "time_injection must be one of add, txl, rotary, got 'film'"),
    ({"length_policy": "oracle"}, "length_policy must be one of pad, predict"),
    ({"timestep_sampler": "fixstep"}, "timestep_sampler must be one of uniform, lossaware, xy_uniform"),
    ({"heads": 3}, "hidden_dim must be a multiple of heads, got 16 and 3"),
    ({"heads": 16, "time_injection": "rotary"}, "even head size, got 1"),
    ({"anchor_scale": 0.0}, "anchor_scale must be > 0"), ({"noise_factor": -1.0}, "noise_factor must be > 0"),
    ({"self_conditioning": 1.5}, r"self_conditioning must be in \[0, 1\]"),
    ({"label_smoothing": -0.1}, r"label_smoothing must be in \[0, 1\]"),
    ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"), ({"target_length": 0}, "target_length must be >= 1"),
    ({"diffusion_steps": 1}, "diffusion_steps must be >= 2"),
    ({"source_vocabulary": 24, "share_embeddings": True}, "got 24 source and 23 target entries")])
def test_wrong_options_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


def test_length_scores_need_a_length_head():
    with pytest.raises(ValueError, match="length_policy 'predict'"):
        model = tiny()
        model.length_logits(model.encode(SOURCE))


# --- fallback and bfloat16 ---


@pytest.mark.parametrize("recipe", RECIPES)
def test_bfloat16_follows_float32(recipe):
    model = tiny(**RECIPES[recipe])
    low = copy.deepcopy(model).bfloat16()
    expected, losses = model(SOURCE, TARGET, IDS, seed=1), low(SOURCE, TARGET, IDS, seed=1)
    for name, value in (expected.per_token | expected.per_sentence).items():
        got = (losses.per_token | losses.per_sentence)[name]
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.mean(), value.mean(), rtol=0.1, atol=0.05)
    total(losses).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in low.parameters())


@torch.no_grad()
def test_bfloat16_does_not_round_the_noise_schedule(monkeypatch):
    model, tables = tiny().bfloat16(), []
    original = ops.embed_q_sample
    monkeypatch.setattr(ops, "embed_q_sample",
                        lambda table, ids, t, signal, sigma, **rest: (
                            tables.append((signal, sigma)) or original(table, ids, t, signal, sigma, **rest)))
    model(SOURCE, TARGET, seed=1)
    assert torch.equal(tables[0][0], model.schedule.signal) and torch.equal(tables[0][1], model.schedule.sigma)


FALLBACK = """
import dataclasses, sys, warnings
import torch
warnings.simplefilter("ignore")
from pydiffseq.decoding import DecodeOptions, decode
from pydiffseq.models import ARDiffusion
from pydiffseq.ops._extension import C
sys.path.insert(0, sys.argv[1])
from test_ar_diffusion import IDS, RECIPES, SOURCE, TARGET, tiny, total
assert C is None
for dtype in (torch.float32, torch.bfloat16):
    for name, changes in RECIPES.items():
        model = tiny(dropout=0.1, attention_dropout=0.1, **changes).to(dtype).train()
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        total(model(SOURCE, TARGET, IDS, seed=1)).backward()
        optimizer.step()
        model.eval()
        if dtype == torch.float32:
            print(name, float(total(tiny(**changes)(SOURCE, TARGET, IDS, seed=1))))
        found = decode(model, SOURCE, IDS, DecodeOptions(steps=2, noise_beam=2, rounding="every"))
        assert len(found) == 3 and all(len(group) == 2 for group in found)
"""


def test_without_the_extension_losses_are_the_same_and_decoding_works():
    result = subprocess.run(
        [sys.executable, "-c", FALLBACK, os.path.dirname(__file__)], capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYDIFFSEQ_EXTENSION": "0", "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    for line in result.stdout.splitlines():
        name, value = line.split()
        with torch.no_grad():
            expected = total(tiny(**RECIPES[name])(SOURCE, TARGET, IDS, seed=1))
        assert float(value) == pytest.approx(float(expected), rel=1e-5)
