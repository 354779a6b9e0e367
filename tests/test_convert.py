"""Official weights in our modules, against the official networks written out a second time in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from official import HEADS, LAYERS, LONGEST, POSITIONS, TIME, D, H, V, ar_diffusion, diffuseq

from pydiffseq.convert import load_official
from pydiffseq.errors import InputError


class Official:
    """The published networks from their description (spec 1.2, 2.1 to 2.4), in float64, on official names."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        self.w = {name: value.double() for name, value in state.items()}

    def linear(self, x, name):
        out = x @ self.w[f"{name}.weight"].T
        return out + self.w[f"{name}.bias"] if f"{name}.bias" in self.w else out

    def norm(self, x, name):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-12).sqrt() * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    @staticmethod
    def gelu(x):
        return x / 2 * (1 + torch.erf(x / math.sqrt(2)))

    def up_and_down(self, x, name, activation=torch.tanh):
        return self.linear(activation(self.linear(x, f"{name}.0")), f"{name}.2")

    @staticmethod
    def heads(x):
        return x.reshape(*x.shape[:2], HEADS, H // HEADS).transpose(1, 2)

    @staticmethod
    def attend(q, k, v, keep, extra=0.0):
        scores = (q @ k.transpose(-1, -2) + extra) / math.sqrt(H // HEADS)
        if keep is not None:
            scores = scores.masked_fill(~keep[:, None, None], -math.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    def bert_layers(self, x, name, keep):
        for i in range(LAYERS):
            at = f"{name}.{i}"
            q, k, v = (self.heads(self.linear(x, f"{at}.attention.self.{part}")) for part in ("query", "key", "value"))
            attended = self.linear(self.attend(q, k, v, keep), f"{at}.attention.output.dense")
            x = self.norm(x + attended, f"{at}.attention.output.LayerNorm")
            inner = self.gelu(self.linear(x, f"{at}.intermediate.dense"))
            x = self.norm(x + self.linear(inner, f"{at}.output.dense"), f"{at}.output.LayerNorm")
        return x

    def ar_encoder(self, source):
        at = "encoder.embeddings"
        x = self.w[f"{at}.word_embeddings.weight"][source] + self.w[f"{at}.position_embeddings.weight"][:source.shape[1]]
        x = self.norm(x + self.w[f"{at}.token_type_embeddings.weight"][0], f"{at}.LayerNorm")
        return self.bert_layers(x, "encoder.encoder.layer", source != 0)

    @staticmethod
    def time_features(t, steps=2000):
        angle = (t.double() * 1000 / steps)[..., None] * 10000.0 ** (-torch.arange(TIME // 2).double() / (TIME // 2))
        return torch.cat([angle.cos(), angle.sin()], -1)

    def self_attention(self, x, time, block, keep):
        q, k, v = (self.linear(x, f"{block}.attn1.to_{part}") for part in "qkv")
        if f"{block}.time_trans.0.weight" not in self.w:
            return self.attend(*map(self.heads, (q, k, v)), keep)
        tau = self.up_and_down(time, f"{block}.time_trans", F.silu)
        if f"{block}.r_w_bias" in self.w:
            content, position = (self.w[f"{block}.{name}"].flatten() for name in ("r_w_bias", "r_r_bias"))
            extra = (self.heads(q + position) @ self.heads(tau).transpose(-1, -2)
                     + self.heads(content.expand_as(q)) @ self.heads(k).transpose(-1, -2))
            return self.attend(*map(self.heads, (q, k, v)), keep, extra)
        cos, sin = self.heads(tau).chunk(2, -1)

        def rotated(x):
            even, odd = self.heads(x)[..., 0::2], self.heads(x)[..., 1::2]
            return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)

        return self.attend(rotated(q), rotated(k), rotated(v), keep)

    def ar_denoise(self, x, t, source, keep, x_self, lengths):
        states, time = self.ar_encoder(source), self.time_features(t)
        h = self.up_and_down(x if x_self is None else torch.cat([x_self, x], -1), "input_up_proj")
        h = h + self.w["position_embeddings.weight"][:x.shape[1]]
        if "time_trans.0.weight" in self.w:
            h = h + self.up_and_down(time, "time_trans", F.silu)
        if lengths is not None:
            h = h + self.w["length_embedding.weight"][lengths][:, None]
        h = self.norm(h, "LayerNorm")
        for i in range(LAYERS):
            block = f"transformer_blocks.{i}"
            h = h + self.linear(self.self_attention(self.norm(h, f"{block}.norm1"), time, block, keep),
                                f"{block}.attn1.to_out.0")
            q = self.heads(self.linear(self.norm(h, f"{block}.norm2"), f"{block}.attn2.to_q"))
            k, v = (self.heads(self.linear(states, f"{block}.attn2.to_{part}")) for part in "kv")
            h = h + self.linear(self.attend(q, k, v, source != 0), f"{block}.attn2.to_out.0")
            a, gate = self.linear(self.norm(h, f"{block}.norm3"), f"{block}.ff.net.0.proj").chunk(2, -1)
            h = h + self.linear(a * self.gelu(gate), f"{block}.ff.net.2")
        return self.up_and_down(h, "output_down_proj")


    def diffuseq_denoise(self, x, t):
        h = self.up_and_down(x, "input_up_proj") if "input_up_proj.0.weight" in self.w else x
        time = self.up_and_down(self.time_features(t), "time_embed", F.silu)
        h = self.norm(h + self.w["position_embeddings.weight"][:x.shape[1]] + time[:, None], "LayerNorm")
        h = self.bert_layers(h, "input_transformers.layer", None)
        return self.up_and_down(h, "output_down_proj") if "output_down_proj.0.weight" in self.w else h


SOURCE = torch.tensor([[5, 6, 7, 8, 9, 2], [4, 10, 2, 0, 0, 0], [3, 0, 0, 0, 0, 0]])
AR_CASES = [("txl", False, False), ("txl", True, True), ("rotary", False, True), ("add", True, False)]


@pytest.mark.parametrize(("injection", "predict", "self_condition"), AR_CASES)
def test_ar_diffusion_computes_what_the_official_network_computes(injection, predict, self_condition):
    state = ar_diffusion(injection, predict, self_condition)
    told = {"target_length": LONGEST} if not predict else {}
    if injection != "txl":
        told |= {"heads": HEADS} | ({"time_injection": "rotary"} if injection == "rotary" else {})
    model, official = load_official("ar_diffusion", state, **told), Official(state)
    assert not model.training and model.config.pad == 0 and model.config.self_conditioning == (0.5 if self_condition else 0)
    draw = torch.Generator().manual_seed(4)
    x, x_self = torch.randn(2, 3, LONGEST, D, generator=draw)
    t = torch.randint(0, 2000, (3, LONGEST), generator=draw)
    lengths = torch.tensor([LONGEST, 5, 1]) if predict else None
    keep = torch.arange(LONGEST) < lengths[:, None] if predict else None
    theirs = official.ar_denoise(x.double(), t, SOURCE, keep, x_self.double() if self_condition else None, lengths)
    with torch.no_grad():
        encoded = model.encode(SOURCE)
        ours = model.denoise(x, t, encoded, keep, x_self if self_condition else None, lengths)
        logits = model.embedding.head_table() @ ours[0, 0] + model.embedding.bias
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    expected = official.w["word_embedding.weight"] @ theirs[0, 0] + official.w["lm_head.bias"]
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)
    if predict:
        states, real = official.ar_encoder(SOURCE), (SOURCE != 0).double()[..., None]
        pooled = (states * real).sum(1) / real.sum(1)
        torch.testing.assert_close(
            model.length_logits(encoded).double(), pooled @ official.w["length_embedding.weight"].T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("latent", [D, H])
@pytest.mark.parametrize("logits", ["dot", "distance"])
def test_diffuseq_computes_what_the_official_network_computes(latent, logits):
    """On the official layout [CLS] x [SEP] [SEP] [CLS] y [SEP] [PAD] .., with the source clean as in sampling."""
    state = diffuseq(latent)
    model = load_official("diffuseq", state, heads=HEADS, sequence_length=POSITIONS, bos=7, eos=4, logits=logits)
    official, words = Official(state), torch.tensor([[5, 6, 4], [9, 4, 0]])
    with torch.no_grad():
        encoded = model.encode(words)
        assert encoded.lengths.tolist() == [5, 4]   # with [CLS] and twice [SEP]
        ids = [[7, 5, 6, 4, 4], [7, 9, 4, 4]]
        draw = torch.Generator().manual_seed(4)
        t = torch.tensor([1999, 17])
        for row, source in enumerate(ids):
            target = torch.randn(POSITIONS - len(source), latent, generator=draw)
            whole = torch.cat([state["word_embedding.weight"][source], target])[None].double()
            theirs = official.diffuseq_denoise(whole, t[row:row + 1])[0, len(source):]
            one = encoded.select(torch.tensor([row]))
            ours = model.denoise(target[None], t[row:row + 1, None].expand(1, len(target)), one, None)[0]
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
            table, bias = official.w["word_embedding.weight"], official.w["lm_head.bias"]
            scores = theirs @ table.T + bias if logits == "dot" else -torch.cdist(theirs, table)
            nll = model.embedding.nll(ours[None], torch.full((1, len(target)), 3))[0]
            torch.testing.assert_close(nll.double(), -scores.log_softmax(-1)[:, 3], rtol=1e-5, atol=1e-4)


def test_diffuseq_keys_and_defaults():
    state = diffuseq()
    del state["time_embed.2.bias"]
    with pytest.raises(InputError, match=r"1 missing \(time_embed.2.bias\) and 1 unknown \(time_trans.0.bias\)"):
        load_official("diffuseq", state | {"time_trans.0.bias": torch.zeros(D)})
    with pytest.raises(InputError, match="the tensors do not tell heads"):
        load_official("diffuseq", diffuseq(), sequence_length=POSITIONS)
    with pytest.raises(InputError, match="the tensors say soft_absorb=False, but soft_absorb=True was given"):
        load_official("diffuseq", diffuseq(), heads=HEADS, sequence_length=POSITIONS, soft_absorb=True)
    second = load_official("diffuseq", diffuseq() | {"mean_embed": torch.arange(float(D))}, heads=HEADS,
                           sequence_length=POSITIONS, discrete_noise=0.5)   # DiffuSeq-v2
    assert second.config.soft_absorb and torch.equal(second.absorbing, torch.arange(float(D)))
    config = load_official("diffuseq", diffuseq(), heads=HEADS, sequence_length=POSITIONS).config
    assert (config.pad, config.bos, config.eos, config.length_policy) == (0, 101, 102, "pad")
    assert (config.time_dim, config.ffn_dim, config.encoder_layers, config.positions) == (TIME, 32, LAYERS, POSITIONS)


def test_prefixes_buffers_and_released_names():
    state = ar_diffusion()
    expected = load_official("ar_diffusion", state, target_length=LONGEST).state_dict()
    state["embed_positions.weight"] = state.pop("position_embeddings.weight")
    wrapped = {f"module.{name}": value for name, value in state.items()}
    loaded = load_official("ar_diffusion", wrapped, target_length=LONGEST, dropout=0.3)
    assert loaded.config.dropout == 0.3
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())


def test_random_numbers_are_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    load_official("ar_diffusion", ar_diffusion(), target_length=LONGEST)
    assert torch.equal(torch.rand(1), expected)


def test_all_missing_and_unknown_keys_are_listed_at_once():
    state = ar_diffusion()
    for name in ("transformer_blocks.1.ff.net.2.bias", "word_embedding.weight", "lm_head.weight"):
        del state[name]
    state |= {"lm_transform.0.weight": torch.zeros(2, 2), "transformer_blocks.2.norm9.bias": torch.zeros(2)}
    del state["encoder.encoder.layer.0.attention.self.key.bias"]
    with pytest.raises(InputError) as caught:
        load_official("ar_diffusion", state, target_length=LONGEST)
    message = str(caught.value)
    missing, unknown = message.split("missing")[1].split("unknown")
    for name in ("transformer_blocks.1.ff.net.2.bias", "word_embedding.weight",
                 "encoder.encoder.layer.0.attention.self.key.bias", "transformer_blocks.2.norm1.bias"):
        assert name in missing and name not in unknown
    assert "2 unknown" in message and "lm_transform.0.weight" in unknown and "transformer_blocks.2.norm9.bias" in unknown
    assert "lm_head.weight" not in message   # tied: it says nothing more


@pytest.mark.parametrize(("change", "config", "message"), [
    ({}, {}, "the tensors do not tell target_length"),
    ({}, {"target_length": LONGEST, "heads": 4}, "the tensors say heads=2, but heads=4 was given"),
    ({}, {"target_length": LONGEST, "self_conditioning": 0.5}, "the tensors say self_conditioning=0.0"),
    ({"lm_head.weight": torch.zeros(V, D)}, {"target_length": LONGEST}, "the official models tie them"),
    ({"LayerNorm.weight": torch.zeros(H + 1)}, {"target_length": LONGEST},
     r"the official tensors for input_norm.weight have shape \[9\], but the model's is \[8\]"),
    ({"epoch": 3}, {"target_length": LONGEST}, "got other values under epoch"),
])
def test_what_does_not_fit_is_named(change, config, message):
    with pytest.raises(InputError, match=message):
        load_official("ar_diffusion", {**ar_diffusion(), **change}, **config)


def test_what_cannot_be_told_apart_must_be_said():
    with pytest.raises(InputError, match="do not tell time_injection; give time_injection="):
        load_official("ar_diffusion", ar_diffusion("rotary"), target_length=LONGEST, heads=HEADS)
    with pytest.raises(InputError, match="must be one of diffuseq, ar_diffusion, got 'genie'"):
        load_official("genie", {})
    with pytest.raises(InputError, match="got an empty one"):
        load_official("ar_diffusion", {})
