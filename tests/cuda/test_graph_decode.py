"""Decoding from CUDA graphs: what the loop gives step by step, in other batches of the same bucket, too."""

import warnings

import pytest
import torch

from pydiffseq.decoding import DecodeOptions, Decoder
from pydiffseq.models import ARDiffusion, ARDiffusionConfig, DiffuSeq, DiffuSeqConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SIZES = {"vocabulary": 200, "latent_dim": 32, "time_dim": 32, "hidden_dim": 64, "ffn_dim": 128, "heads": 2,
         "encoder_layers": 2, "length_policy": "predict"}


def network(kind):
    torch.manual_seed(1)
    if kind == "diffuseq":
        return DiffuSeq(DiffuSeqConfig(sequence_length=48, positions=64, **SIZES))
    return ARDiffusion(ARDiffusionConfig(source_vocabulary=200, decoder_layers=2, target_length=24, **SIZES))


@pytest.mark.parametrize("kind", ["ar_diffusion", "diffuseq"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("options", [{}, {"solver": "ancestral", "noise_limit": 2.0, "history": True},
                                     {"rounding": "off", "solver": "dpmpp2m"}], ids=str)
def test_replayed_graphs_are_the_loop(kind, dtype, options):
    model = network(kind).to("cuda", dtype).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")   # neither a failed capture nor a failed self-check
        recorded = Decoder(model, DecodeOptions(steps=5, noise_beam=2, **options))
        eager = Decoder(model, DecodeOptions(steps=5, noise_beam=2, graphs=False, **options))
        for seed in range(4):
            generator = torch.Generator().manual_seed(seed)
            source = torch.randint(4, 200, (8 - seed % 2, 11), generator=generator).cuda()
            ids = torch.arange(len(source), device="cuda") + 100 * seed
            for group, other in zip(recorded(source, ids), eager(source, ids), strict=True):
                for a, b in zip(group, other, strict=True):
                    assert a.token_scores.isfinite().all()
                    if dtype == torch.float32:   # buckets pad, which may move the last bits
                        assert len(a.tokens) == len(b.tokens)
                        torch.testing.assert_close(a.token_scores.mean(), b.token_scores.mean(), rtol=0.05, atol=0.05)
    assert recorded.replayer.recorded >= 1 and recorded.replayer.replayed >= 2 and eager.replayer is None


def test_one_recording_twice_gives_the_same_bits():
    model = network("ar_diffusion").cuda().bfloat16().eval()
    decoder, source = Decoder(model, DecodeOptions(steps=5)), torch.randint(4, 200, (4, 9)).cuda()
    found = [decoder(source, torch.arange(4, device="cuda")) for _ in range(4)]
    scores = [torch.cat([hypothesis.token_scores for (hypothesis,) in groups]) for groups in found]
    assert all(torch.equal(one, scores[0]) for one in scores)   # the first is the loop itself, the others are replays
