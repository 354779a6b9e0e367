"""The published AR-Diffusion, written out a second time in float64 with plain torch functions, against our module."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pydiffseq import ops
from pydiffseq.models import ARDiffusion, ARDiffusionConfig
from pydiffseq.models.base import sentence_uniform

PAD, EOS = 1, 2
SMALL = ARDiffusionConfig(
    vocabulary=37, source_vocabulary=29, latent_dim=12, time_dim=10, hidden_dim=24, ffn_dim=40, heads=3,
    encoder_layers=2, decoder_layers=2, source_positions=16, target_length=9, dropout=0.0, attention_dropout=0.0,
    length_policy="pad")
SOURCE = torch.tensor([[5, 6, 7, 8, 9, 2], [4, 11, 2, 1, 1, 1], [28, 2, 1, 1, 1, 1]])
TARGET = torch.tensor([[4, 5, 36, 7, 8, 2], [9, 10, 2, 1, 1, 1], [12, 2, 1, 1, 1, 1]])


class Literal:
    """AR-Diffusion's network from its description; ``w`` are a module's weights, only renamed, never reshaped."""

    def __init__(self, model: ARDiffusion) -> None:
        self.c = model.config
        self.w = {name: value.double() for name, value in model.state_dict().items()}

    def linear(self, x: Tensor, name: str) -> Tensor:
        out = x @ self.w[f"{name}.weight"].T
        return out + self.w[f"{name}.bias"] if f"{name}.bias" in self.w else out

    def norm(self, x: Tensor, name: str) -> Tensor:
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
        return (x - mean) / (variance + 1e-12).sqrt() * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, extra: Tensor | None = None) -> Tensor:
        """q, k, v ``[B, h, n, dh]``; ``extra`` is added to the scores before they are scaled."""
        scores = q @ k.transpose(-1, -2)
        if extra is not None:
            scores = scores + extra
        scores = scores / math.sqrt(q.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None, :], float("-inf"))
        return self.join(scores.softmax(-1) @ v)

    def heads(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], self.c.heads, -1).transpose(1, 2)

    @staticmethod
    def join(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)

    @staticmethod
    def gelu(x: Tensor) -> Tensor:
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    def bert(self, source: Tensor) -> Tensor:
        mask = source != PAD
        x = self.w["source_embedding.weight"][source] + self.w["encoder.positions.weight"][: source.shape[1]]
        x = self.norm(x + self.w["encoder.token_type.weight"][0], "encoder.norm")
        for i in range(self.c.encoder_layers):
            name = f"encoder.layers.{i}"
            q, k, v = (self.heads(part) for part in self.linear(x, f"{name}.attention.qkv").chunk(3, -1))
            attended = self.linear(self.attend(q, k, v, mask), f"{name}.attention.out")
            x = self.norm(x + attended, f"{name}.attention_norm")
            x = self.norm(x + self.linear(self.gelu(self.linear(x, f"{name}.up")), f"{name}.down"), f"{name}.ffn_norm")
        return x

    def mlp(self, x: Tensor, name: str) -> Tensor:
        h = self.linear(x, f"{name}.up")
        return self.linear(h * torch.sigmoid(h), f"{name}.down")

    def time_features(self, t: Tensor) -> Tensor:
        half = self.c.time_dim // 2
        frequency = torch.tensor([math.exp(-math.log(10000) * i / half) for i in range(half)], dtype=torch.float64)
        angle = (t.double() * 1000 / self.c.diffusion_steps)[..., None] * frequency
        return torch.cat([angle.cos(), angle.sin()], -1)

    def self_attention(self, x: Tensor, mask: Tensor | None, time: Tensor, name: str) -> Tensor:
        q, k, v = (self.heads(part) for part in self.linear(x, f"{name}.self_attention.qkv").chunk(3, -1))
        extra = None
        if self.c.time_injection == "txl":
            tau = self.heads(self.mlp(time, f"{name}.time_mlp"))
            u = self.w[f"{name}.self_attention.content_bias"][None, :, None]
            r = self.w[f"{name}.self_attention.time_bias"][None, :, None]
            extra = u @ k.transpose(-1, -2) + (q + r) @ tau.transpose(-1, -2)
        elif self.c.time_injection == "rotary":
            cos, sin = self.heads(self.mlp(time, f"{name}.time_mlp")).chunk(2, -1)
            q, k, v = (self.rotate(part, cos, sin) for part in (q, k, v))
        return self.linear(self.attend(q, k, v, mask, extra), f"{name}.self_attention.out")

    @staticmethod
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        out = torch.empty_like(x)
        for pair in range(x.shape[-1] // 2):
            x1, x2 = x[..., 2 * pair], x[..., 2 * pair + 1]
            out[..., 2 * pair] = x1 * cos[..., pair] - x2 * sin[..., pair]
            out[..., 2 * pair + 1] = x2 * cos[..., pair] + x1 * sin[..., pair]
        return out

    def cross_attention(self, x: Tensor, states: Tensor, mask: Tensor, name: str) -> Tensor:
        k, v = (self.heads(part) for part in self.linear(states, f"{name}.cross_attention.key_value").chunk(2, -1))
        q = self.heads(self.linear(x, f"{name}.cross_attention.query"))
        return self.linear(self.attend(q, k, v, mask), f"{name}.cross_attention.out")

    def denoise(self, x_t: Tensor, t: Tensor, source: Tensor, mask: Tensor | None, lengths: Tensor | None,
                x_self: Tensor | None = None) -> Tensor:
        c, states = self.c, self.bert(source)
        if c.self_conditioning:
            x_t = torch.cat([torch.zeros_like(x_t) if x_self is None else x_self, x_t], -1)
        h = self.linear(torch.tanh(self.linear(x_t, "input_up.0")), "input_up.2")
        h = h + self.w["positions.weight"][: x_t.shape[1]]
        time = self.time_features(t)
        if c.time_injection == "add":
            h = h + self.mlp(time, "time_mlp")
        if c.length_policy == "predict":
            h = h + self.w["length_head.table.weight"][lengths][:, None]
        h = self.norm(h, "input_norm")
        for i in range(c.decoder_layers):
            name = f"blocks.{i}"
            h = h + self.self_attention(self.norm(h, f"{name}.self_norm"), mask, time, name)
            h = h + self.cross_attention(self.norm(h, f"{name}.cross_norm"), states, source != PAD, name)
            a, gate = self.linear(self.norm(h, f"{name}.ffn_norm"), f"{name}.ffn.up").chunk(2, -1)
            h = h + self.linear(a * self.gelu(gate), f"{name}.ffn.down")
        return self.linear(torch.tanh(self.linear(h, "output_down.0")), "output_down.2")

    def logits(self, x0: Tensor) -> Tensor:
        return x0 @ self.w["embedding.weight"].T + self.w["embedding.bias"]

    def length_logits(self, source: Tensor) -> Tensor:
        states, mask = self.bert(source), source != PAD
        if self.c.length_feature == "token_embed":
            feature = states[:, 0]
        else:
            feature = torch.stack([row[keep].mean(0) for row, keep in zip(states, mask, strict=True)])
        return feature @ self.w["length_head.table.weight"].T

    def abar(self) -> Tensor:
        """The sqrt schedule: abar(u) = 1 - sqrt(u + 1e-4), betas clipped at 0.999."""
        T = self.c.diffusion_steps
        level = [1 - math.sqrt(i / T + 1e-4) for i in range(T + 1)]
        betas = [min(1 - after / before, 0.999) for before, after in zip(level[:-1], level[1:], strict=True)]
        return torch.cumprod(1 - torch.tensor(betas, dtype=torch.float64), 0)


def token_times(s: int, N: int, width: int, T: int) -> list[int]:
    """Token times of one sentence, from the published formula in float32."""
    n_s, t_s = max(0, N - 1 - s), max(0, s - (N - 1))
    n_e, t_e = int(2.0 * N), T - 1
    line = (torch.arange(width, dtype=torch.float32) - n_e) / (n_s - n_e) * (t_s - t_e) + t_e
    return [min(max(round(value), 0), T - 1) for value in line.tolist()]


def small(seed: int = 0, **changes) -> ARDiffusion:
    torch.manual_seed(seed)
    model = ARDiffusion(dataclasses.replace(SMALL, **changes)).eval()
    with torch.no_grad():   # biases and norms that start at 0 or 1 would hide a mistake
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.add_(0.1 * torch.randn_like(p))
            elif name.startswith(("encoder", "source_embedding", "length_head")):
                p.mul_(10)
    return model


def targets(model: ARDiffusion, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, mask and lengths of the two length policies, row by row."""
    c = model.config
    rows = [[token for token in row if token not in (PAD, EOS)] for row in target.tolist()]
    if c.length_policy == "pad":
        rows = [row + [EOS] for row in rows]
    width = c.target_length if c.length_policy == "pad" else max(len(row) for row in rows)
    tokens = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
    lengths = torch.tensor([width if c.length_policy == "pad" else len(row) for row in rows])
    return tokens, torch.arange(width) < lengths[:, None], lengths


VARIANTS = [
    {"time_injection": injection, "length_policy": policy}
    for injection in ("add", "txl", "rotary") for policy in ("pad", "predict")
] + [{"self_conditioning": 0.5}, {"length_policy": "predict", "length_feature": "token_embed"}]


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda changes: "-".join(map(str, changes.values())))
@torch.no_grad()
def test_network_agrees_with_the_literal_float64_network(changes):
    model = small(**changes)
    literal = Literal(model)
    tokens, mask, lengths = targets(model, TARGET)
    N, d, T = tokens.shape[1], SMALL.latent_dim, SMALL.diffusion_steps
    x_t, x_self = torch.randn(3, N, d), torch.randn(3, N, d)
    t = torch.randint(0, T, (3, N))
    mask = mask if model.config.length_policy == "predict" else None

    x0_hat = model.denoise(x_t, t, model.encode(SOURCE), mask, x_self, lengths)
    expected = literal.denoise(x_t.double(), t, SOURCE, mask, lengths, x_self.double())
    keep = slice(None) if mask is None else mask
    torch.testing.assert_close(x0_hat[keep].double(), expected[keep], rtol=1e-5, atol=1e-5)

    logits = F.linear(x0_hat, model.embedding.head_table(), model.embedding.bias)
    torch.testing.assert_close(logits[keep].double(), literal.logits(expected)[keep], rtol=1e-5, atol=1e-5)
    if model.length_head is not None:
        torch.testing.assert_close(model.length_logits(model.encode(SOURCE)).double(), literal.length_logits(SOURCE),
                                   rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changes", VARIANTS[:6], ids=lambda changes: "-".join(map(str, changes.values())))
@pytest.mark.parametrize("seed", [1, 19])   # seeds that draw timestep 0 for some token
@torch.no_grad()
def test_losses_agree_with_the_literal_float64_losses(changes, seed):
    model = small(diffusion_steps=20, **changes)   # few steps: timestep 0 is common
    literal, T, d = Literal(model), 20, SMALL.latent_dim
    tokens, mask, lengths = targets(model, TARGET)
    N, rows = tokens.shape[1], torch.tensor([7, 3, 11])
    losses = model(SOURCE, TARGET, ids=rows, seed=seed)

    u = sentence_uniform(torch.tensor([seed]), rows).tolist()
    s = [int(value * (T + length)) for value, length in zip(u, lengths.tolist(), strict=True)]
    t = torch.tensor([token_times(i, length, N, T) for i, length in zip(s, lengths.tolist(), strict=True)])
    assert torch.equal(losses.timesteps[mask], t[mask])
    assert (losses.timesteps == 0).any() and (losses.timesteps > 0).any()

    abar, table = literal.abar(), literal.w["embedding.weight"]
    noise_0, noise_t = (ops.philox_normal((3, N, d), seed=seed, rows=rows, stream=stream).double()
                        for stream in ("x_0", "x_t"))
    x0 = table[tokens] + (1 - abar[0]).sqrt() * noise_0
    x_t = abar[t].sqrt()[..., None] * x0 + (1 - abar[t]).sqrt()[..., None] * noise_t
    x0_hat = literal.denoise(x_t, t, SOURCE, mask if "predict" in changes.values() else None, lengths)
    mse = (x0 - x0_hat).square().mean(-1)
    mse = torch.where(t == 0, (table[tokens] - x0_hat).square().mean(-1), mse)
    nll = F.cross_entropy(literal.logits(x0).transpose(1, 2), tokens, reduction="none")
    prior = (abar[-1].sqrt() * x0).square().mean(-1)
    for name, expected in {"mse": mse, "nll": nll, "prior": prior}.items():
        torch.testing.assert_close(losses.per_token[name].double(), expected * mask, rtol=1e-5, atol=1e-5)
    assert torch.equal(losses.mask, mask)
    if model.length_head is not None:
        length = F.cross_entropy(literal.length_logits(SOURCE), lengths, reduction="none")
        torch.testing.assert_close(losses.per_sentence["length"].double(), length, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "vocabulary", "parameters"), [
    ("ar_diffusion_xsum", 30522, 74_070_202), ("ar_diffusion_iwslt_de_en", 10005, 16_865_685),
    ("ar_diffusion_commongen", 30522, 9_507_322)])
def test_published_parameter_counts(name, vocabulary, parameters):
    pytest.importorskip("fairseq")
    from pydiffseq.fairseq_plugin.architectures import ARCHITECTURES

    config = ARDiffusionConfig(vocabulary=vocabulary, source_vocabulary=vocabulary, **ARCHITECTURES["ar_diffusion"][name])
    assert sum(p.numel() for p in ARDiffusion(config).parameters()) == parameters


def test_cnndm_and_xsum_differ_in_the_target_length_alone():
    pytest.importorskip("fairseq")
    from pydiffseq.fairseq_plugin.architectures import ARCHITECTURES

    named = ARCHITECTURES["ar_diffusion"]
    assert named["ar_diffusion_cnndm"] == named["ar_diffusion_xsum"] | {"target_length": 180}
