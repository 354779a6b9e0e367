"""The criterion: weighs the named losses of a model, sums them and logs them per target token."""

from dataclasses import dataclass, field

import torch
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.dataclass import FairseqDataclass
from fairseq.logging import metrics
from torch import Tensor

from pydiffseq.models.losses import Losses

BUCKETS = 4
VALIDATION_SEED = 20230515   # validation uses the same timesteps and noise every time, so its losses compare


@dataclass
class DiffusionCriterionConfig(FairseqDataclass):
    mse_weight: float = field(default=1.0, metadata={"help": "weight of the squared error of x0_hat"})
    nll_weight: float = field(default=1.0, metadata={"help": "weight of the token cross-entropy"})
    prior_weight: float = field(default=1.0, metadata={"help": "weight of the prior term |sqrt(abar_T) x0|^2"})
    length_weight: float = field(default=0.1, metadata={"help": "weight of the length cross-entropy"})
    absorbing_weight: float = field(default=0.01, metadata={
        "help": "weight of the norm of the absorbing vector (soft_absorb)"})


@register_criterion("diffusion_seq2seq", dataclass=DiffusionCriterionConfig)
class DiffusionCriterion(FairseqCriterion):
    """Sum over target tokens of the weighted losses (spec 1.5, 2.6); the sample size is the number of target tokens.

    As in the official code the length loss counts once per target token. The logged numbers are means per target token
    (the length loss and the absorbing vector's norm: per sentence); ``mse_q0`` .. ``mse_q3`` split the squared error by
    quarter of the timesteps.
    """

    def __init__(self, task, mse_weight: float, nll_weight: float, prior_weight: float, length_weight: float,
                 absorbing_weight: float) -> None:
        super().__init__(task)
        self.weights = {"mse": mse_weight, "nll": nll_weight, "prior": prior_weight, "length": length_weight,
                        "absorbing": absorbing_weight}

    def forward(self, model, sample, reduce: bool = True) -> tuple[Tensor, int, dict[str, Tensor | int]]:
        losses: Losses = model(
            sample["net_input"]["src_tokens"], sample["target"], ids=sample["id"],
            seed=None if model.training else VALIDATION_SEED)
        tokens = losses.mask.sum(1)
        sample_size = int(tokens.sum())
        sums = {name: value.sum() for name, value in losses.per_token.items()}
        sums |= {name: (value * tokens).sum() for name, value in losses.per_sentence.items()}
        loss = torch.stack([self.weights[name] * value for name, value in sums.items()]).sum()
        log: dict[str, Tensor | int] = {name: value.detach() for name, value in sums.items()}
        log |= {"loss": loss.detach(), "ntokens": sample_size, "nsentences": len(tokens), "sample_size": sample_size}
        log |= {name: value.detach().sum() for name, value in losses.per_sentence.items()}
        log |= self._buckets(losses)
        return loss, sample_size, log

    @staticmethod
    def _buckets(losses: Losses) -> dict[str, Tensor]:
        """Sum and count of the squared error by quarter of the timesteps."""
        bucket = (losses.timesteps * BUCKETS // losses.steps)[losses.mask]
        error = losses.per_token["mse"].detach()[losses.mask]
        sums = error.new_zeros(BUCKETS).index_add_(0, bucket, error)
        counts = torch.bincount(bucket, minlength=BUCKETS)
        return {f"{kind}_q{i}": value for kind, values in (("mse", sums), ("tokens", counts))
                for i, value in enumerate(values.unbind())}

    @classmethod
    def reduce_metrics(cls, logging_outputs) -> None:
        def total(key: str) -> float:
            return float(sum(log.get(key, 0) for log in logging_outputs))

        tokens, sentences = total("sample_size"), total("nsentences")
        if not tokens:
            return
        for name in ("loss", "mse", "nll", "prior"):
            if any(name in log for log in logging_outputs):
                metrics.log_scalar(name, total(name) / tokens, tokens, round=3)
        for name in ("length", "absorbing"):
            if any(name in log for log in logging_outputs):
                metrics.log_scalar(name, total(name) / sentences, sentences, round=3)
        for i in range(BUCKETS):
            if count := total(f"tokens_q{i}"):
                metrics.log_scalar(f"mse_q{i}", total(f"mse_q{i}") / count, count, round=3)

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        return True
