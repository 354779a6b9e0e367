"""The shipped model says the same, bit for bit, in any batch, order and padding, in float32 and bfloat16."""

from pathlib import Path

import pytest
import torch
from fairseq import checkpoint_utils

from pydiffseq.decoding import DecodeOptions, Decoder
from pydiffseq.ops import _extension

MODEL = Path(__file__).parents[2] / "examples" / "tatoeba_de_en" / "model"
OPTIONS = {"recipe": DecodeOptions(steps=3, length_beam=2, noise_beam=2),
           "unrounded": DecodeOptions(steps=6, rounding="off", patience=2)}


@pytest.fixture(scope="module")
def network():
    (model,), config, _ = checkpoint_utils.load_model_ensemble_and_task(
        [str(MODEL / "checkpoint.pt")], arg_overrides={"data": str(MODEL)})
    model.prepare_for_inference_(config)
    return model.eval().network()


@pytest.mark.skipif(_extension.C is None, reason="plain torch promises no bits")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_sentence_comes_out_the_same_bit_for_bit(network, dtype, name):
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 20, (32,), generator=generator).tolist()
    sources = [torch.cat([torch.randint(4, 800, (n,), generator=generator), torch.tensor([2])]) for n in lengths]
    decoder = Decoder(network.to(dtype), OPTIONS[name])

    def run(order, size, left=False, extra=0):
        found = {}
        for first in range(0, len(order), size):
            part = order[first : first + size]
            batch = torch.full((len(part), max(len(sources[i]) for i in part) + extra), 1)
            for row, i in enumerate(part):
                start = batch.size(1) - len(sources[i]) if left else 0
                batch[row, start : start + len(sources[i])] = sources[i]
            for i, group in zip(part, decoder(batch, torch.tensor(part)), strict=True):
                found[i] = [(h.tokens.tolist(), h.token_scores.tolist(), h.steps) for h in group]
        return found

    alone = run(list(range(32)), 1)
    assert len({str(group) for group in alone.values()}) == 32
    assert run(list(range(32)), 32) == alone
    assert run(torch.randperm(32, generator=generator).tolist(), 7, left=True, extra=3) == alone
