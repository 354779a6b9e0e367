"""Building blocks: time features, padding sides, where dropout acts, the length head, the latent table."""

import math

import pytest
import torch

from pydiffseq import ops
from pydiffseq.nn.attention import CrossAttention, SelfAttention
from pydiffseq.nn.embedding import LatentEmbedding
from pydiffseq.nn.encoder import Encoder
from pydiffseq.nn.length import LengthHead
from pydiffseq.nn.time import TimeFeatures, TimeMLP, sinusoid_table
from pydiffseq.nn.transformer import DecoderBlock, EncoderLayer


def left(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Rows of ``x`` with the positions that ``mask`` (right-padded) leaves out moved to the front."""
    return torch.stack([row.roll(int((~keep).sum()), 0) for row, keep in zip(x, mask, strict=True)])


# --- time ---


@pytest.mark.parametrize(("steps", "t", "i"), [(2000, 0, 0), (2000, 1999, 3), (2000, 500, 1), (100, 40, 2)])
def test_time_features_are_cosines_then_sines_of_the_rescaled_time(steps, t, i):
    row = sinusoid_table(steps, 8)[t]
    angle = t * 1000 / steps * math.exp(-math.log(10000) * i / 4)
    assert row[i] == pytest.approx(math.cos(angle), abs=1e-6) and row[4 + i] == pytest.approx(math.sin(angle), abs=1e-6)


def test_time_features_of_any_shape_and_odd_size():
    features = TimeFeatures(10, 5)
    assert features(torch.tensor([[0, 9, 4]])).shape == (1, 3, 5)
    assert not features.table[:, 4].any() and not list(features.state_dict())   # the table is no weight
    with pytest.raises(IndexError):
        features(torch.tensor([10]))


def test_time_mlp_has_four_times_the_width_inside():
    mlp = TimeMLP(6, 10)
    assert mlp.up.weight.shape == (24, 6) and mlp(torch.randn(2, 3, 6)).shape == (2, 3, 10)


# --- dropout ---


@pytest.fixture
def dropped(monkeypatch) -> list[str]:
    """Runs the layers with a dropout that drops everything, and records which of the two ops it was."""
    seen: list[str] = []

    def dropout(x, p, *, training=True, seed=None):
        if training and p:
            seen.append("dropout")
        return x * 0 if training and p else x

    def dropout_add(x, residual, p, *, training=True, seed=None):
        if training and p:
            seen.append("dropout_add")
        return residual + (x * 0 if training and p else x)

    monkeypatch.setattr(ops, "dropout", dropout)
    monkeypatch.setattr(ops, "dropout_add", dropout_add)
    return seen


def test_attention_and_feed_forward_drop_their_output_before_the_residual(dropped):
    x, residual, mask = torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.ones(2, 3, dtype=torch.bool)
    attention = SelfAttention(8, 2, 0.5, 0.0, bias=False)
    assert torch.equal(attention(x, mask, residual), residual)
    cross = CrossAttention(8, 2, 0.5, 0.0)
    assert torch.equal(cross(x, cross.project(x), mask, residual), residual)
    layer = EncoderLayer(8, 2, 16, 0.5, 0.0, pre_norm=True)
    assert torch.equal(layer(x, mask), x)
    assert dropped == ["dropout_add"] * 4
    assert not torch.equal(layer.eval()(x, mask), x)


def test_encoder_drops_the_embeddings_after_their_norm(dropped):
    encoder = Encoder(8, 2, 16, 1, 10, 0.5, 0.0, pre_norm=True, pooler=False)
    states = encoder(torch.randn(1, 3, 8), torch.ones(1, 3, dtype=torch.bool))
    assert torch.equal(states, encoder.final_norm.bias.expand(1, 3, 8))   # nothing is left but the final norm's bias
    assert dropped == ["dropout", "dropout_add", "dropout_add"]


def test_the_time_mlp_of_a_block_drops_its_input(dropped):
    block = DecoderBlock(8, 2, 16, 0.5, 0.0, time_dim=4, injection="txl")
    time = torch.randn(1, 3, 4)
    assert torch.equal(block.time_mlp(time), block.time_mlp(time * 0))
    assert dropped == ["dropout"] * 2
    assert DecoderBlock(8, 2, 16, 0.5, 0.0, time_dim=4, injection="add").time_mlp is None


# --- padding ---


@pytest.mark.parametrize("pre_norm", [False, True])
@torch.no_grad()
def test_encoder_states_do_not_depend_on_the_side_of_the_padding(pre_norm):
    torch.manual_seed(0)
    encoder = Encoder(8, 2, 16, 2, 10, 0.0, 0.0, pre_norm=pre_norm, pooler=True).eval()
    encoder.positions.weight.normal_()
    words, mask = torch.randn(3, 5, 8), torch.arange(5) < torch.tensor([5, 2, 1])[:, None]
    right = encoder(words, mask)
    other = encoder(left(words, mask), left(mask, mask))
    torch.testing.assert_close(other[left(mask, mask)], right[mask], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("feature", ["mean_pool", "token_embed"])
@torch.no_grad()
def test_length_scores_do_not_depend_on_the_side_of_the_padding(feature):
    torch.manual_seed(0)
    head = LengthHead(8, 6, feature, relative=True)
    head.table.weight.normal_()
    head.offset_bias.normal_()
    states, mask = torch.randn(3, 5, 8), torch.arange(5) < torch.tensor([5, 2, 1])[:, None]
    scores = head(states, mask)
    assert scores.shape == (3, 7) and scores.dtype == torch.float32
    torch.testing.assert_close(head(left(states, mask), left(mask, mask)), scores)
    feature_1 = states[1, 0] if feature == "token_embed" else states[1, :2].mean(0)
    expected = [float(head.table.weight[n] @ feature_1 + head.offset_bias[n - 2 + 6]) for n in range(7)]
    assert scores[1].tolist() == pytest.approx(expected, abs=1e-5)


def test_length_features_are_named_when_unknown():
    with pytest.raises(ValueError, match="length feature must be one of mean_pool, token_embed, got 'last'"):
        LengthHead(8, 6, "last", relative=False)


@torch.no_grad()
def test_length_offsets_beyond_the_table_share_its_ends():
    head = LengthHead(4, 3, "mean_pool", relative=True)
    head.table.weight.zero_()
    head.offset_bias.copy_(torch.arange(7))
    assert head(torch.zeros(1, 9, 4), torch.ones(1, 9, dtype=torch.bool)).tolist() == [[0.0, 0.0, 0.0, 0.0]]


# --- attention ---


@pytest.mark.parametrize("injection", ["txl", "rotary"])
def test_an_injection_needs_the_time(injection):
    attention = SelfAttention(8, 2, 0.0, 0.0, bias=False, injection=injection)
    x = torch.randn(1, 3, 8)
    assert attention(x, None, x, torch.randn(1, 3, 8)).shape == (1, 3, 8)
    with pytest.raises(ValueError, match=f"the {injection} injection needs the time projection"):
        attention(x, None, x)


def test_txl_biases_start_between_0_and_1():
    attention = SelfAttention(64, 4, 0.0, 0.0, bias=False, injection="txl")
    for bias in (attention.content_bias, attention.time_bias):
        assert bias.shape == (4, 16) and 0 <= bias.min() < 0.2 and 0.8 < bias.max() < 1


# --- the latent table ---


def test_latent_table_norm_scale_and_padding_row():
    torch.manual_seed(0)
    plain = LatentEmbedding(50, 16, padding_idx=1)
    assert plain.table() is plain.weight and not plain.weight[1].any() and plain.weight[2].any()
    assert 0.9 < plain.weight.std() < 1.1 and not plain.bias.any()
    normed = LatentEmbedding(50, 16, norm=True, scale=True, padding_idx=1)
    rows = normed.head_table()
    torch.testing.assert_close(rows.mean(1), torch.zeros(50), atol=1e-6, rtol=0)
    torch.testing.assert_close(rows.square().mean(1), torch.ones(50), atol=1e-3, rtol=0)
    torch.testing.assert_close(normed.table(), 4 * rows)
