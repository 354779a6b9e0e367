"""A frozen network computes what the network computes, from tables."""

import copy

import pytest
import torch

from pydiffseq.models import ARDiffusion, ARDiffusionConfig
from pydiffseq.nn.freeze import freeze
from pydiffseq.nn.time import TimeMLP

SIZES = {"vocabulary": 20, "source_vocabulary": 20, "latent_dim": 8, "time_dim": 6, "hidden_dim": 16, "ffn_dim": 24,
         "heads": 2, "encoder_layers": 1, "decoder_layers": 2, "source_positions": 12, "target_length": 7,
         "diffusion_steps": 50}


def network(**changes) -> ARDiffusion:
    torch.manual_seed(1)
    return ARDiffusion(ARDiffusionConfig(**{**SIZES, **changes})).eval()


@pytest.mark.parametrize("injection", ["txl", "rotary", "add"])
@pytest.mark.parametrize("embedding", [{}, {"embedding_norm": True, "scale_embedding": True, "share_embeddings": True}])
@torch.no_grad()
def test_a_frozen_network_computes_the_same(injection, embedding):
    model = network(time_injection=injection, length_policy="predict", **embedding)
    before = copy.deepcopy(model.state_dict())
    frozen = freeze(model)
    source = torch.tensor([[4, 5, 6, 2], [7, 8, 2, 1]])
    x, t = torch.randn(6, 7, 8), torch.randint(50, (6, 7))
    mask, lengths = torch.rand(6, 7) > 0.3, torch.randint(8, (6,))
    expected = model.denoise(x, t, model.encode(source).select(torch.tensor([0, 0, 0, 1, 1, 1])), mask, None, lengths)
    torch.testing.assert_close(frozen.denoise(x, t, frozen.encode(source), mask, None, lengths), expected,
                               rtol=1e-5, atol=1e-5)
    assert torch.equal(frozen.embedding.table(), model.embedding.table())
    assert torch.equal(frozen.embedding.head_table(), model.embedding.head_table())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@torch.no_grad()
def test_a_step_of_a_frozen_network_runs_no_time_network(monkeypatch):
    model = network(length_policy="pad")
    frozen, x = freeze(model), torch.randn(2, 7, 8)
    encoded, t = frozen.encode(torch.tensor([[4, 2], [5, 2]])), torch.zeros(2, 7, dtype=torch.int64)
    monkeypatch.setattr(TimeMLP, "forward", lambda *_: pytest.fail("the time network ran"))
    frozen.denoise(x, t, encoded, None)
