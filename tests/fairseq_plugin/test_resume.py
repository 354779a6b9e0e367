"""A resumed training repeats the uninterrupted one bit by bit."""

import pytest
import torch
from toy import load, train

from pydiffseq.fairseq_plugin.criterion import DiffusionCriterion


@pytest.fixture
def losses(monkeypatch):
    """The exact training losses, in order."""
    seen = []
    forward = DiffusionCriterion.forward

    def record(self, model, sample, reduce=True):
        result = forward(self, model, sample, reduce)
        if model.training:
            seen.append((sample["id"].tolist(), result[0].item()))
        return result

    monkeypatch.setattr(DiffusionCriterion, "forward", record)
    return seen


@pytest.mark.parametrize("words", [
    ["--arch", "ar_diffusion_plus", "--dropout", 0.3, "--attention-dropout", 0.1],
    ["--length-policy", "pad", "--update-freq", 2, "--timestep-sampler", "uniform"],
    ["--timestep-sampler", "lossaware", "--diffusion-steps", 4], ["--bf16"], ["--fp16"], ["--amp"]])
def test_resume_is_exact(data, tmp_path, losses, words):
    """6 updates, and 3 + 3 with the cut inside an epoch: the same losses, parameters, average and Adam state."""
    words = [*words, "--ema-rate", 0.9, "--save-interval-updates", 3, "--validate-interval-updates", 3, "--log-interval", 1]
    whole = train(data, tmp_path / "whole", *words, "--max-update", 6)
    expected = losses[:]
    losses.clear()
    train(data, tmp_path / "parts", *words, "--max-update", 3)
    torch.manual_seed(999)
    rest = train(data, tmp_path / "parts", *words, "--max-update", 6)
    assert losses == expected
    a, b = (load(tmp_path / name / "checkpoint_last.pt") for name in ("whole", "parts"))
    assert a["model"].keys() == b["model"].keys()
    for key, value in a["model"].items():
        assert torch.equal(value, b["model"][key]), key
    moments = [state["last_optimizer_state"]["state"] for state in (a, b)]
    for index, value in moments[0].items():
        assert torch.equal(value["exp_avg_sq"], moments[1][index]["exp_avg_sq"])
    assert [s["loss"] for s in whole.stats("train_inner")[3:]] == [s["loss"] for s in rest.stats("train_inner")]
    assert whole.stats("valid")[-1]["valid_loss"] == rest.stats("valid")[-1]["valid_loss"]
