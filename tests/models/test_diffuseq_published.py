"""The published DiffuSeq, written out a second time in float64 with plain torch functions, against our module."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from test_ar_diffusion_published import Literal
from torch import Tensor

from pydiffseq import ops
from pydiffseq.models import DiffuSeq, DiffuSeqConfig
from pydiffseq.models.base import sentence_uniform

SMALL = DiffuSeqConfig(
    vocabulary=37, latent_dim=12, time_dim=10, hidden_dim=24, ffn_dim=40, heads=3, encoder_layers=2, sequence_length=18,
    positions=20, dropout=0.0, attention_dropout=0.0, timestep_sampler="uniform")
SOURCE = torch.tensor([[5, 6, 7, 8, 9, 2], [4, 11, 2, 1, 1, 1], [28, 2, 1, 1, 1, 1]])
TARGET = torch.tensor([[4, 5, 36, 7, 8, 2], [9, 10, 2, 1, 1, 1], [12, 2, 1, 1, 1, 1]])


class LiteralDiffuSeq(Literal):
    """DiffuSeq's network on whole sequences ``[B, L, d]``, one timestep per sentence, from spec 1.2."""

    def network(self, x: Tensor, t: Tensor) -> Tensor:
        h = x
        if "input_up.0.weight" in self.w:
            h = self.linear(torch.tanh(self.linear(x, "input_up.0")), "input_up.2")
        h = h + self.w["positions.weight"][: x.shape[1]] + self.mlp(self.time_features(t), "time_mlp")[:, None]
        h = self.norm(h, "input_norm")
        for i in range(self.c.encoder_layers):
            name = f"layers.{i}"
            q, k, v = (self.heads(part) for part in self.linear(h, f"{name}.attention.qkv").chunk(3, -1))
            h = self.norm(h + self.linear(self.attend(q, k, v, None), f"{name}.attention.out"), f"{name}.attention_norm")
            h = self.norm(h + self.linear(self.gelu(self.linear(h, f"{name}.up")), f"{name}.down"), f"{name}.ffn_norm")
        if "output_down.0.weight" not in self.w:
            return h
        return self.linear(torch.tanh(self.linear(h, "output_down.0")), "output_down.2")

    def logits(self, x0: Tensor) -> Tensor:
        if self.c.logits == "dot":
            return super().logits(x0)
        return -(x0[..., None, :] - self.w["embedding.weight"]).square().sum(-1).sqrt()


def small(**changes) -> DiffuSeq:
    torch.manual_seed(0)
    model = DiffuSeq(dataclasses.replace(SMALL, **changes)).eval()
    with torch.no_grad():   # biases and norms that start at 0 or 1 would hide a mistake
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.1 * torch.randn_like(p))
    return model


def sequences() -> tuple[Tensor, Tensor]:
    """The published merge of SOURCE and TARGET (none is too long), and the mask of what is noised."""
    tokens, noised = [], []
    for source, target in zip(SOURCE.tolist(), TARGET.tolist(), strict=True):
        first = [0, *(w for w in source if w > 2), 2, 2]
        second = [0, *(w for w in target if w > 2), 2]
        second += [1] * (SMALL.sequence_length - len(first) - len(second))
        tokens.append(first + second)
        noised.append([False] * len(first) + [True] * len(second))
    return torch.tensor(tokens), torch.tensor(noised)


@pytest.mark.parametrize("changes", [{}, {"latent_dim": 24}])
@torch.no_grad()
def test_network_agrees_with_the_literal_float64_network(changes):
    model = small(**changes)
    literal, (tokens, noised) = LiteralDiffuSeq(model), sequences()
    x_t, t = torch.randn(3, 18, model.config.latent_dim), torch.tensor([0, 700, 1999])
    x = torch.where(noised[..., None], x_t, model.embedding.weight[tokens])
    expected = literal.network(x.double(), t)
    # What decoding gives to denoise: the target part of each row at the left.
    start = (~noised).sum(1)
    index = (start[:, None] + torch.arange(int((18 - start).max()))).clamp_max(17)
    target = x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
    prompt = model.encode(SOURCE)
    found = model.denoise(target, t[:, None].expand(index.shape), prompt, None, None, model.fixed_lengths(prompt))
    for row, n in enumerate((18 - start).tolist()):
        torch.testing.assert_close(found[row, :n].double(), expected[row, 18 - n:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"logits": "distance"}, {"latent_dim": 24}])
@torch.no_grad()
def test_losses_agree_with_the_literal_float64_losses(changes):
    T, seed = 6, 0   # few steps: timestep 0 is common
    model = small(diffusion_steps=T, **changes)
    literal, (tokens, noised), rows = LiteralDiffuSeq(model), sequences(), torch.tensor([7, 3, 11])
    losses = model(SOURCE, TARGET, ids=rows, seed=seed)

    t = (sentence_uniform(torch.tensor([seed]), rows).double() * T).long()
    assert torch.equal(losses.timesteps, t[:, None].expand(3, 18)) and losses.mask.all()
    assert (t == 0).any() and (t > 0).any()
    abar, table = literal.abar(), literal.w["embedding.weight"]
    noise_0, noise_t = (ops.philox_normal((3, 18, SMALL.latent_dim if not changes.get("latent_dim") else 24), seed=seed,
                                          rows=rows, stream=stream).double() for stream in ("x_0", "x_t"))
    x0 = table[tokens] + (1 - abar[0]).sqrt() * noise_0   # of the source, too
    level = abar[t][:, None, None]
    x_t = torch.where(noised[..., None], level.sqrt() * x0 + (1 - level).sqrt() * noise_t, x0)
    x0_hat = literal.network(x_t, t)
    goal = torch.where((t == 0)[:, None, None], table[tokens], x0)
    expected = {"mse": (goal - x0_hat).square().mean(-1), "prior": (abar[-1].sqrt() * x0).square().mean(-1),
                "nll": F.cross_entropy(literal.logits(x0).transpose(1, 2), tokens, reduction="none")}
    for name, value in expected.items():
        torch.testing.assert_close(losses.per_token[name].double(), value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("i", "beta", "abar", "sigma", "variance", "coef1", "coef2"), [
    (0, 0.0146413105, 0.985358689, 0.121001283, 0, 1, 0),
    (1, 0.00888908777, 0.97659975, 0.152971404, 0.00556182, 0.37708, 0.622903),
    (100, 0.00143543959, 0.782884406, 0.465956643, 0.001428, 0.00585403, 0.994102),
    (1000, 0.00120697593, 0.295423315, 0.839390663, 0.00120636, 9.31655e-4, 0.99889),
    (1998, 0.555611135, 2.02040408e-4, 0.999898975, 0.555471, 0.0118494, 0.666457),
    (1999, 0.999, 2.02040408e-7, 0.999999899, 0.998798, 0.0141999, 0.0316164)])
def test_golden_values_of_the_schedule_and_the_ancestral_step(i, beta, abar, sigma, variance, coef1, coef2):
    """The published base schedule as the model holds it, and the posterior that its ancestral sampler uses."""
    from pydiffseq.diffusion import skip_coefficients

    schedule = small().schedule
    assert float(schedule.betas[i]) == pytest.approx(beta, rel=1e-6)
    assert float(schedule.abar[i]) == pytest.approx(abar, rel=1e-6)
    assert float(schedule.sigma[i]) == pytest.approx(sigma, rel=1e-6)
    assert float(schedule.posterior_variance[i]) == pytest.approx(variance, rel=2e-4, abs=1e-12)
    before = schedule.abar_at(torch.tensor([i - 1]))
    x_t, x_0, _ = skip_coefficients(schedule.abar[i:i + 1], before)
    assert float(x_0) == pytest.approx(coef1, rel=2e-4) and float(x_t) == pytest.approx(coef2, rel=2e-4, abs=1e-12)
    assert math.isclose(float(x_t) * math.sqrt(abar) + float(x_0), math.sqrt(float(before)), rel_tol=1e-5)
