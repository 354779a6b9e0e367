"""fairseq's generator interface on :func:`pydiffseq.decoding.decode`."""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from typing import Any, cast

import torch
from torch import Tensor

from pydiffseq.decoding import DecodeOptions, Decoder, Hypothesis
from pydiffseq.decoding.model import DenoisingNetwork
from pydiffseq.errors import InputError, input_errors
from pydiffseq.fairseq_plugin.model import DiffusionFairseqModel

logger = logging.getLogger(__name__)


class DiffusionGenerator:
    """``generate(models, sample)`` -> for each sentence its hypotheses, best first, as fairseq's dictionaries."""

    def __init__(self, dictionary, options: DecodeOptions) -> None:
        self.options = options
        self.eos, self.pad = dictionary.eos(), dictionary.pad()
        self.symbols_to_strip_from_output = {self.eos, self.pad}
        self._decoder: Decoder | None = None
        self._decodes: tuple = ()
        self._steps = Counter[str]()
        if options.patience:   # fairseq does not tell a generator when it is done
            weakref.finalize(self, _log_saved_steps, self._steps)

    @torch.no_grad()
    def generate(self, models, sample: dict[str, Any], prefix_tokens: Tensor | None = None,
                 constraints: Tensor | None = None, **unused) -> list[list[dict[str, Any]]]:
        if len(models) != 1:
            raise InputError(f"diffusion decoding takes one checkpoint, got {len(models)}; average them first")
        if prefix_tokens is not None or constraints is not None:
            raise InputError("diffusion decoding takes neither --prefix-size nor --constraints")
        model = models[0]
        while not isinstance(model, DiffusionFairseqModel) and hasattr(model, "module"):
            model = model.module   # DistributedDataParallel, in validation
        if not isinstance(model, DiffusionFairseqModel):
            raise InputError(f"diffusion decoding takes a diffusion model, got a {type(model).__name__}; "
                             "give a checkpoint trained with --arch ar_diffusion or diffuseq")
        model.eval()
        source = sample["net_input"]["src_tokens"]
        ids = sample["id"] if sample.get("id") is not None else _content_ids(source, self.pad)
        with input_errors():
            decoder = self._decoder_of(model)
            before = decoder.steps_planned, decoder.steps_run
            hypotheses = decoder(source, ids.to(source.device))
        self._steps.update(planned=decoder.steps_planned - before[0], run=decoder.steps_run - before[1])
        return [[self._as_fairseq(hypothesis) for hypothesis in group] for group in hypotheses]

    def _decoder_of(self, model: DiffusionFairseqModel) -> Decoder:
        """One decoder for all batches; in training a new one after each update of the weights."""
        network = model.network()
        weight = next(network.parameters())
        now = (id(network), model.num_updates, weight.data_ptr(), weight._version)
        if self._decoder is None or self._decodes != now:
            self._decoder, self._decodes = Decoder(cast(DenoisingNetwork, network), self.options), now
        return self._decoder

    def _as_fairseq(self, hypothesis: Hypothesis) -> dict[str, Any]:
        # fairseq's own BLEU reads before the beginning of an empty tensor; </s> is stripped from every output.
        tokens = hypothesis.tokens if len(hypothesis.tokens) else hypothesis.tokens.new_tensor([self.eos])
        return {
            "tokens": tokens,
            "score": hypothesis.score,
            "positional_scores": hypothesis.token_scores.clone(),   # fairseq divides it in place
            "alignment": None,
            "attention": None,
            "steps": hypothesis.steps,
            "history": [{"tokens": tokens} for tokens in hypothesis.history],
        }


def _log_saved_steps(steps: Counter[str]) -> None:
    if steps["planned"]:
        saved = steps["planned"] - steps["run"]
        logger.info("early stopping saved %d of %d denoising steps (%.1f %%)", saved, steps["planned"],
                    100 * saved / steps["planned"])


def _content_ids(source: Tensor, pad: int) -> Tensor:
    """Sentence ids from the words alone, int64 ``[B]`` below 2^31, where the command gives none (fairseq-interactive).

    So a line has one translation, whatever stands around it.
    """
    ids = []
    for row in source.tolist():
        value = 0
        for token in row:
            if token != pad:
                value = (value * 1_000_003 + token) % (2**31 - 1)
        ids.append(value)
    return torch.tensor(ids, dtype=torch.int64)
