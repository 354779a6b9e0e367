"""Packed and padded again: the real tokens stay where they are; a decoder that skips the padding says the same."""

import dataclasses

import pytest
import torch

from pydiffseq.models import ARDiffusion, ARDiffusionConfig
from pydiffseq.nn.freeze import freeze
from pydiffseq.nn.packing import Packing, packed, padded
from pydiffseq.ops import _extension

MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
CONFIG = ARDiffusionConfig(
    vocabulary=31, source_vocabulary=31, latent_dim=8, time_dim=8, hidden_dim=16, ffn_dim=24, heads=2, encoder_layers=1,
    decoder_layers=2, source_positions=12, target_length=7, length_policy="predict")


def test_real_tokens_come_back_to_their_places():
    packing, x = Packing.of(MASK), torch.randn(4, 5, 3)
    assert packing.pack(x).shape == (9, 3) and torch.equal(packing.pack(x), x[MASK])
    assert packing.offsets.tolist() == [0, 3, 4, 4, 9]
    assert packing.pad(packing.pack(x)).shape == x.shape and torch.equal(packing.pad(packing.pack(x))[MASK], x[MASK])


@pytest.mark.parametrize("mask", [None, torch.ones(2, 3).bool(), torch.zeros(2, 3).bool(), torch.ones(0, 3).bool(),
                                  torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]).bool()])
def test_nothing_is_packed_where_it_does_not_pay(mask):
    assert Packing.of(mask) is None
    x = torch.randn(2, 3)
    assert packed(x, None) is x is padded(x, None)


@pytest.mark.skipif(_extension.C is None, reason="plain torch promises no bits")
@pytest.mark.parametrize("changes", [{}, {"time_injection": "rotary"}, {"time_injection": "add"},
                                     {"self_conditioning": 0.5}], ids=str)
@torch.no_grad()
def test_a_prepared_network_skips_the_padding_and_says_the_same(changes):
    torch.manual_seed(0)
    model = freeze(ARDiffusion(dataclasses.replace(CONFIG, **changes)).eval())
    source = torch.randint(4, 31, (2, 6))
    source[0, :2] = model.config.pad
    encoded, lengths = model.encode(source), torch.tensor([7, 2, 1, 4])
    mask = torch.arange(7) < lengths[:, None]
    x, x_self, t = torch.randn(4, 7, 8), torch.randn(4, 7, 8), torch.randint(0, 2000, (4, 7))
    prepared = model.prepare(encoded, mask, lengths, 7)
    assert prepared.packing is not None and prepared.base.shape == (14, 16)
    assert all(kv.key.shape == (10, 2, 8) and kv.offsets.tolist() == [0, 4, 10] for kv in prepared.memory)
    expected = model.denoise(x, t, encoded, mask, x_self, lengths)
    assert torch.equal(model.denoise(x, t, prepared, mask, x_self, lengths)[mask], expected[mask])
