"""fairseq-train: criteria, precisions, architectures, validation BLEU, what is logged."""

import math

import pytest
import torch
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from toy import TINY, command, load, script, train

from pydiffseq.errors import InputError
from pydiffseq.fairseq_plugin.architectures import ARCHITECTURES
from pydiffseq.fairseq_plugin.model import FROM_DICTIONARY
from pydiffseq.models import ARDiffusionConfig, DiffuSeqConfig


def test_as_a_user_types_it(data, tmp_path):
    """The literal words --task diffusion_seq2seq --arch ar_diffusion, without --criterion and --user-dir."""
    done = script("train", data, "--task", "diffusion_seq2seq", "--arch", "ar_diffusion", *TINY, "--optimizer", "adam",
                  "--max-tokens", 512, "--max-update", 2, "--save-dir", tmp_path, "--cpu")
    assert done.returncode == 0, done.stderr
    assert "using diffusion_seq2seq" in done.stderr + done.stdout
    assert (tmp_path / "checkpoint_last.pt").is_file()


def test_loss_falls_and_is_logged_by_timestep(data, tmp_path):
    run = train(data, tmp_path, "--criterion", "diffusion_seq2seq", "--arch", "ar_diffusion_plus", "--dropout", 0,
                "--lr", 0.01, "--max-update", 40, "--ema-rate", 0.9)
    steps = run.stats("train_inner")
    assert len(steps) == 40
    for name in ("loss", "mse", "nll"):
        assert sum(s[name] for s in steps[-5:]) < 0.9 * sum(s[name] for s in steps[:5])
    last = steps[-1]
    assert {f"mse_q{i}" for i in range(4)} <= last.keys()
    assert min(last[f"mse_q{i}"] for i in range(4)) - 2e-3 <= last["mse"] <= max(last[f"mse_q{i}"] for i in range(4)) + 2e-3
    assert last["loss"] == pytest.approx(last["mse"] + last["nll"] + 0.1 * last["length"], rel=0.3)
    assert run.stats("valid")[-1]["valid_loss"] > 0


def test_losses_are_means_per_target_token(data, tmp_path, monkeypatch):
    """Weights scale their term; the sample size is the number of denoised tokens, whatever the batch."""
    from fairseq.logging import metrics

    from pydiffseq.fairseq_plugin.criterion import DiffusionCriterion

    seen = []
    forward = DiffusionCriterion.forward

    def record(self, model, sample, reduce=True):
        loss, size, log = forward(self, model, sample, reduce)
        seen.append((loss.item(), size, log))
        with metrics.aggregate(new_root=True) as logged:
            DiffusionCriterion.reduce_metrics([log, log])
        assert logged["mse"].avg == pytest.approx(float(log["mse"]) / size, abs=6e-4)
        assert logged["length"].avg == pytest.approx(float(log["length"]) / log["nsentences"], abs=6e-4)
        return loss, size, log

    monkeypatch.setattr(DiffusionCriterion, "forward", record)
    train(data, tmp_path, "--criterion", "diffusion_seq2seq", "--length-policy", "predict", "--mse-weight", 2,
          "--nll-weight", 0.5, "--prior-weight", 0, "--length-weight", 0, "--max-update", 1, "--disable-validation")
    loss, size, log = seen[0]
    assert size == log["ntokens"] == int(sum(log[f"tokens_q{i}"] for i in range(4)))
    assert loss == pytest.approx(2 * float(log["mse"]) + 0.5 * float(log["nll"]), rel=1e-5)
    assert float(log["mse"]) == pytest.approx(float(sum(log[f"mse_q{i}"] for i in range(4))), rel=1e-5)


@pytest.mark.parametrize("precision", [["--bf16"], ["--amp"], ["--fp16"], ["--fp16", "--fp16-init-scale", "4194304"]])
def test_precisions_as_typed(data, tmp_path, precision):
    """--fp16 also through an overflow, after which fairseq asks for a CUDA device. The average stays float32."""
    run = train(data, tmp_path, *precision, "--max-update", 3, "--length-policy", "predict", "--self-conditioning", 0.5)
    steps = run.stats("train_inner")
    assert len(steps) == 3 and all(math.isfinite(step["loss"]) for step in steps)
    overflows = sum("gradient overflow detected" in message for _, message in run.log)
    assert (overflows > 0) == (len(precision) > 1)
    state = load(tmp_path / "checkpoint_last.pt")["model"]
    assert all(value.isfinite().all() for value in state.values())
    average = state["ema.module.source_embedding.weight"]
    assert not torch.equal(average, average.bfloat16().float())


def test_amp_computes_in_bfloat16_on_a_cpu(data, tmp_path, monkeypatch):
    seen, linear = set(), torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *a: seen.add((out := linear(*a)).dtype) or out)
    train(data, tmp_path, "--amp", "--max-update", 1, "--disable-validation")
    assert seen == {torch.bfloat16}


def test_other_options_train(data, tmp_path):
    """Accumulated gradients, several timestep samplers, the pad policy, unused parameters."""
    run = train(data, tmp_path, "--update-freq", 3, "--timestep-sampler", "uniform", "--time-injection", "rotary",
                "--max-update", 2, "--ema-rate", 0)
    assert len(run.stats("train_inner")) == 2
    assert not any(key.startswith("ema.") for key in load(tmp_path / "checkpoint_last.pt")["model"])


@pytest.mark.parametrize(("model", "arch"), [(model, arch) for model in ARCHITECTURES
                                             for arch in (model, *ARCHITECTURES[model])])
def test_named_architectures(model, arch):
    """What the parser makes of an arch: its values, the published defaults elsewhere, and options typed on top."""
    words = ["data", "--task", "diffusion_seq2seq", "--arch", arch, "--dropout", "0.3"]
    args = options.parse_args_and_arch(options.get_training_parser(), words)
    parsed = convert_namespace_to_omegaconf(args).model
    config = {"ar_diffusion": ARDiffusionConfig, "diffuseq": DiffuSeqConfig}[model]
    changes = ARCHITECTURES[model].get(arch, {})
    expected = vars(config(10, 10)) | {"ema_rate": 0.9999} | changes | {"dropout": 0.3}
    for name in FROM_DICTIONARY:
        del expected[name]
    assert {name: getattr(parsed[name], "value", parsed[name]) for name in expected} == expected
    assert parsed._name == arch


@pytest.mark.parametrize("policy", ["pad", "predict"])
def test_validation_bleu(data, tmp_path, policy):
    """--eval-bleu decodes with the average; --eval-bleu-args takes the options of decoding."""
    run = train(data, tmp_path, "--length-policy", policy, "--max-update", 2, "--eval-bleu", "--eval-bleu-remove-bpe",
                "sentencepiece", "--eval-bleu-args", '{"decode_steps": 2, "noise_beam": 2}', "--eval-bleu-print-samples",
                "--best-checkpoint-metric", "bleu", "--maximize-best-checkpoint-metric")
    assert run.stats("valid")[-1]["valid_bleu"] >= 0
    assert any(message.startswith("example hypothesis: ") for _, message in run.log)
    assert (tmp_path / "checkpoint_best.pt").is_file()
    # The meters of BLEU hold numpy numbers; the checkpoint loads with weights_only all the same.
    again = train(data, tmp_path, "--length-policy", policy, "--max-update", 3, "--eval-bleu")
    assert again.stats("train_inner")[-1]["num_updates"] == 3


def test_validation_loss_is_the_same_every_time(data, tmp_path, trained):
    """The same timesteps and noise: fairseq-validate gives the number that training logged, whatever its batches."""
    losses = [command("validate", data, "--task", "diffusion_seq2seq", "--path", trained, "--batch-size", size,
                      "--valid-subset", "valid", "--cpu").out for size in (24, 5)]
    one, two = (next(line for line in out.splitlines() if "| loss " in line).split("| loss ")[1] for out in losses)
    assert one.split(" | wps")[0].split(" | bsz")[0] == two.split(" | wps")[0].split(" | bsz")[0]


def test_criterion_of_another_kind(data, tmp_path):
    with pytest.raises(InputError, match="must be diffusion_seq2seq, got label_smoothed_cross_entropy"):
        train(data, tmp_path, "--criterion", "label_smoothed_cross_entropy")
