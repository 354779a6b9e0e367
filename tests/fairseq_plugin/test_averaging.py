"""The moving average: what it is, and that validation, generation and export read it."""

import pytest
import torch
from test_generate_command import generate
from torch import nn
from toy import command, load, train

from pydiffseq.fairseq_plugin.ema import ModuleEMA


def test_average_follows_the_formula():
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    average = ModuleEMA(module, 0.5)
    expected = module.weight.detach().clone()
    for update in range(1, 20):
        with torch.no_grad():
            module.weight.add_(torch.randn(2, 3))
        average.update(module, update)
        average.update(module, update)   # a number that was seen changes nothing
        decay = min(0.5, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * module.weight.detach()
    torch.testing.assert_close(average.module.weight, expected)


def test_average_stays_float32_and_in_eval_mode():
    module = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5))
    average = ModuleEMA(module, 0.9)
    before = average.module[0].weight.clone()
    average.half().train()
    assert average.module[0].weight.dtype == torch.float32 and torch.equal(average.module[0].weight, before)
    assert not average.module[1].training
    assert not any(p.requires_grad for p in average.parameters())


@pytest.mark.parametrize("rate", [1.0, -0.1, 2.0])
def test_rate_out_of_range(rate):
    with pytest.raises(ValueError, match="ema_rate must lie between 0 and 1"):
        ModuleEMA(nn.Linear(1, 1), rate)


@pytest.fixture(scope="module")
def swapped(trained, tmp_path_factory):
    """The checkpoint once with the average in place of the weights, once the other way round."""
    state = load(trained)
    prefix = "ema.module."
    average = {key: value for key, value in state["model"].items() if key.startswith(prefix)}
    assert any(not torch.allclose(value, state["model"][f"net.{key[len(prefix):]}"], atol=1e-3)
               for key, value in average.items())
    folder = tmp_path_factory.mktemp("swapped")
    spoiled = state["model"] | {f"net.{key[len(prefix):]}": torch.full_like(value, float("nan"))
                                for key, value in average.items()}
    torch.save(state | {"model": spoiled}, folder / "average.pt")
    weights = state["model"] | {key: state["model"][f"net.{key[len(prefix):]}"] for key in average}
    torch.save(state | {"model": weights}, folder / "weights.pt")
    return folder


def texts(run):
    return {i: fields[0] for i, fields in run.lines("H").items()}


def test_generation_reads_the_average(data, trained, swapped):
    """Trained weights of NaN change nothing; other averaged weights do."""
    expected = texts(generate(data, trained, "--decode-steps", 3))
    assert texts(generate(data, swapped / "average.pt", "--decode-steps", 3)) == expected
    assert texts(generate(data, swapped / "weights.pt", "--decode-steps", 3)) != expected
    off = generate(data, trained, "--decode-steps", 3, "--model-overrides", "{'ema_rate': 0.0}")
    assert texts(off) == texts(generate(data, swapped / "weights.pt", "--decode-steps", 3))


def test_validation_reads_the_average(data, trained, swapped):
    def loss(path):
        out = command("validate", data, "--task", "diffusion_seq2seq", "--path", path, "--batch-size", 24,
                      "--valid-subset", "valid", "--cpu").out
        return next(line for line in out.splitlines() if "| loss " in line).split("| loss ")[1].split()[0]

    assert loss(swapped / "average.pt") == loss(trained) != loss(swapped / "weights.pt")


def test_average_switched_on_and_off_between_runs(data, tmp_path):
    """A checkpoint without an average starts one from its weights; one with an average trains on without it."""
    train(data, tmp_path / "a", "--ema-rate", 0, "--max-update", 2)
    train(data, tmp_path / "b", "--ema-rate", 0.9, "--max-update", 3, "--restore-file", tmp_path / "a/checkpoint_last.pt")
    state = load(tmp_path / "b/checkpoint_last.pt")["model"]
    assert int(state["ema.updates"]) == 2 and torch.isfinite(state["ema.module.positions.weight"]).all()
    train(data, tmp_path / "c", "--ema-rate", 0, "--max-update", 4, "--restore-file", tmp_path / "b/checkpoint_last.pt")
    assert not any(key.startswith("ema.") for key in load(tmp_path / "c/checkpoint_last.pt")["model"])
