"""The five fairseq commands with --arch diffuseq and its relatives."""

import pytest
import torch
from test_generate_command import generate, interactive
from test_hydra_command import hydra_train
from toy import TRAIN, command, load, script, train

from pydiffseq.cli import main
from pydiffseq.errors import InputError

SMALL = {"hidden-dim": 32, "ffn-dim": 64, "heads": 2, "latent-dim": 16, "time-dim": 16, "encoder-layers": 1,
         "sequence-length": 48, "positions": 48}
TINY = [word for name, value in SMALL.items() for word in (f"--{name}", value)]


def train_diffuseq(data, save_dir, *words, arch="diffuseq"):
    return command("train", data, "--task", "diffusion_seq2seq", "--arch", arch, *TINY, *TRAIN, "--save-dir", save_dir,
                   *words)


@pytest.fixture(scope="module", params=["diffuseq", "diffuseq_plus"])
def checkpoint(request, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("diffuseq")
    train_diffuseq(data, folder, "--ema-rate", 0.9, "--lr", 0.02, "--max-update", 6, arch=request.param)
    return folder / "checkpoint_last.pt"


def test_as_a_user_types_it(data, tmp_path):
    words = ["--task", "diffusion_seq2seq", "--cpu"]
    done = script("train", data, *words, "--arch", "diffuseq", *TINY, "--optimizer", "adam", "--max-tokens", 512,
                  "--max-update", 2, "--save-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    done = script("generate", data, *words, "--path", tmp_path / "checkpoint_last.pt", "--decode-steps", 2, "--scoring",
                  "sacrebleu", "--remove-bpe", "sentencepiece")
    assert done.returncode == 0 and "Generate test with beam=5: BLEU = " in done.stdout, done.stderr


@pytest.mark.parametrize("model", ["diffuseq", "diffuseq_plus"])
def test_hydra_train(data, tmp_path, model):
    sizes = [f"model.{name.replace('-', '_')}={value}" for name, value in SMALL.items()]
    done = hydra_train(data, tmp_path, f"model={model}", sizes=sizes)
    assert done.returncode == 0, done.stderr[-3000:]
    saved = load(tmp_path / "checkpoints/checkpoint_last.pt")
    assert saved["cfg"]["model"]["_name"] == model and saved["cfg"]["model"]["hidden_dim"] == 32
    assert ("net.length_head.offset_bias" in saved["model"]) == (model == "diffuseq_plus")


def test_generate_validate_interactive(data, checkpoint):
    run = generate(data, checkpoint, "--decode-steps", 3, "--noise-beam", 2, "--nbest", 2)
    assert sorted(run.lines("D")) == list(range(12))
    out = command("validate", data, "--task", "diffusion_seq2seq", "--path", checkpoint, "--batch-size", 24,
                  "--valid-subset", "valid", "--cpu").out
    assert "| loss " in out
    lines = ["ba da fi", "", "lo mi nu"]
    texts = interactive(data, checkpoint, lines, "--decode-steps", 2).lines("D")
    assert sorted(texts) == [0, 1, 2] and texts[1] == [["0.0", ""]]


def test_export(data, checkpoint, tmp_path):
    """The averaged weights alone translate as the checkpoint does."""
    assert main(["export", str(checkpoint), str(tmp_path / "model.pt"), "--dtype", "float32"]) == 0
    texts = [generate(data, path, "--decode-steps", 3).lines("D") for path in (checkpoint, tmp_path / "model.pt")]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(("arch", "precision"), [("diffuseq", "--bf16"), ("diffuseq_plus", "--amp")])
def test_precisions(data, tmp_path, arch, precision):
    run = train_diffuseq(data, tmp_path, precision, "--max-update", 3, "--soft-absorb", "--disable-validation", arch=arch)
    assert len(run.stats("train_inner")) == 3
    state = load(tmp_path / "checkpoint_last.pt")["model"]
    assert all(value.isfinite().all() for value in state.values())
    average = state["ema.module.embedding.weight"]
    assert average.dtype == torch.float32 and not torch.equal(average, average.bfloat16().float())


def test_generation_does_not_depend_on_the_batch(data, checkpoint):
    runs = [generate(data, checkpoint, "--batch-size", size, "--decode-steps", 3).lines("D") for size in (1, 12)]
    assert [{i: fields[0][-1] for i, fields in run.items()} for run in runs][0] == {
        i: fields[0][-1] for i, fields in runs[1].items()}


@pytest.mark.parametrize("words", [["--ce-on", "pred", "--loss-scope", "nonpad"], ["--clean-source", "--ema-rate", 0]])
def test_loss_falls(data, tmp_path, words):
    run = train_diffuseq(data, tmp_path, *words, "--dropout", 0, "--lr", 0.01, "--max-update", 25)
    steps = run.stats("train_inner")
    assert sum(s["loss"] for s in steps[-5:]) < 0.95 * sum(s["loss"] for s in steps[:5])


def test_resume_with_the_loss_aware_sampler(data, tmp_path):
    """6 updates, and 3 + 3: the same parameters, average and history of losses."""
    words = ["--diffusion-steps", 4, "--ema-rate", 0.9, "--save-interval-updates", 3, "--disable-validation"]
    train_diffuseq(data, tmp_path / "whole", *words, "--max-update", 6)
    train_diffuseq(data, tmp_path / "parts", *words, "--max-update", 3)
    torch.manual_seed(999)
    train_diffuseq(data, tmp_path / "parts", *words, "--max-update", 6)
    a, b = (load(tmp_path / name / "checkpoint_last.pt")["model"] for name in ("whole", "parts"))
    assert a.keys() == b.keys() and a["net.sampler_state.seen"].all()
    assert all(torch.equal(value, b[key]) for key, value in a.items())


def test_long_pairs_are_trimmed_and_counted_once(data, tmp_path):
    run = train_diffuseq(data, tmp_path, "--sequence-length", 16, "--positions", 16, "--max-update", 14)
    told = [message for logger, message in run.log if "are trimmed" in message]
    assert len(told) == 2 and told[1].startswith("train: ") and " of 300 pairs have more than 11 words" in told[1]
    cut = generate(data, tmp_path / "checkpoint_last.pt", "--decode-steps", 2)
    assert any("sources have more than 9 words and are cut" in message for _, message in cut.log)
    assert sorted(cut.lines("D")) == list(range(12))
    long = interactive(data, tmp_path / "checkpoint_last.pt", [" ".join(["ba"] * 30)], "--decode-steps", 2)
    assert any("1 of 1 sources have more than 9 words" in message for _, message in long.log)


def test_two_dictionaries_of_one_size(data, other_data, tmp_path):
    """Both archs that embed source and target with one table refuse two dictionaries."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for path in data.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "dict.en.txt").unlink()
    (folder / "dict.en.txt").symlink_to(other_data / "dict.en.txt")
    with pytest.raises(InputError, match="arch diffuseq needs one joined dictionary"):
        train_diffuseq(folder, tmp_path)
    with pytest.raises(InputError, match="arch ar_diffusion_plus needs one joined dictionary"):
        train(folder, tmp_path, "--arch", "ar_diffusion_plus")


def test_checkpoint_of_the_other_model(data, trained, tmp_path):
    with pytest.raises(Exception, match="ensure that the architectures match") as error:
        train_diffuseq(data, tmp_path, "--restore-file", trained)
    assert isinstance(error.value.__context__, InputError) and len(str(error.value.__context__)) < 400


def test_second_version(data, tmp_path, checkpoint):
    """Soft absorbing state and discrete noise train, resume and decode; the first version has no absorbing state."""
    words = ["--soft-absorb", "--discrete-noise", 0.5, "--disable-validation", "--ema-rate", 0.9]
    run = train_diffuseq(data, tmp_path, *words, "--max-update", 2)
    assert 0 < run.stats("train_inner")[-1]["absorbing"] < 2   # the norm: it starts at about 1
    train_diffuseq(data, tmp_path, *words, "--max-update", 3)
    second = tmp_path / "checkpoint_last.pt"
    sampling = ["--solver", "ancestral", "--decode-steps", 3, "--absorb-rate", 0.5]
    run = generate(data, second, *sampling, "--noise-limit", 2, "--rounding", "from", "--rounding-step", 500)
    assert sorted(run.lines("D")) == list(range(12))
    with pytest.raises(InputError, match="absorb_rate needs a model with an absorbing state"):
        generate(data, checkpoint, *sampling)
    with pytest.raises(InputError, match="rounding_step must be in 0..2000"):
        generate(data, second, "--rounding", "until", "--rounding-step", 2001)
    with pytest.raises(Exception, match="architectures match") as error:
        train_diffuseq(data, tmp_path / "again", *words, "--restore-file", checkpoint)
    assert "trained without --soft-absorb" in str(error.value.__context__)
