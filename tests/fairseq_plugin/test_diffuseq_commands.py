"""The five fairseq commands with --arch diffuseq and its relatives."""

import pytest
import torch
from test_generate_command import generate, interactive
from test_hydra_command import hydra_train
from toy import TRAIN, command, load, train

from pydiffseq.cli import main
from pydiffseq.errors import InputError

SMALL = {"hidden-dim": 32, "ffn-dim": 64, "heads": 2, "latent-dim": 16, "time-dim": 16, "encoder-layers": 1,
         "sequence-length": 48, "positions": 48}
TINY = [word for name, value in SMALL.items() for word in (f"--{name}", value)]


def train_diffuseq(data, save_dir, *words, arch="diffuseq"):
    return command("train", data, "--task", "diffusion_seq2seq", "--arch", arch, *TINY, *TRAIN, "--save-dir", save_dir,
                   *words)


@pytest.fixture(scope="module")
def checkpoints(data, tmp_path_factory):
    """A checkpoint of the published recipe after 6 updates, and one of ours, trained as a user types it."""
    published, plus = (tmp_path_factory.mktemp(name) for name in ("diffuseq", "diffuseq_plus"))
    train_diffuseq(data, published, "--ema-rate", 0.9, "--lr", 0.02, "--max-update", 6)
    sizes = [f"model.{name.replace('-', '_')}={value}" for name, value in SMALL.items()]
    done = hydra_train(data, plus, "model=diffuseq_plus", "model.ema_rate=0.9", sizes=sizes)
    assert done.returncode == 0, done.stderr[-3000:]
    return {"diffuseq": published / "checkpoint_last.pt", "diffuseq_plus": plus / "checkpoints/checkpoint_last.pt"}


@pytest.fixture(params=["diffuseq", "diffuseq_plus"])
def checkpoint(request, checkpoints):
    return checkpoints[request.param]


def test_hydra_train(checkpoints):
    saved = load(checkpoints["diffuseq_plus"])
    assert saved["cfg"]["model"]["_name"] == "diffuseq_plus" and saved["cfg"]["model"]["hidden_dim"] == 32
    assert "net.length_head.offset_bias" in saved["model"]


def test_the_other_commands(data, checkpoint, tmp_path):
    """Generation is the same in batches of one, and from the averaged weights alone; validation; interactive."""
    run = generate(data, checkpoint, "--decode-steps", 3, "--noise-beam", 2, "--nbest", 2, "--scoring", "sacrebleu")
    assert sorted(run.lines("D")) == list(range(12)) and "Generate test with beam=5: BLEU = " in run.bleu()
    assert main(["export", str(checkpoint), str(tmp_path / "model.pt"), "--dtype", "float32"]) == 0
    again = generate(data, tmp_path / "model.pt", "--decode-steps", 3, "--noise-beam", 2, "--nbest", 2, "--batch-size", 1)
    texts = [{i: [text for _, text in fields] for i, fields in found.lines("D").items()} for found in (run, again)]
    assert texts[0] == texts[1]
    out = command("validate", data, "--task", "diffusion_seq2seq", "--path", checkpoint, "--batch-size", 24,
                  "--valid-subset", "valid", "--cpu").out
    assert "| loss " in out
    lines = ["ba da fi", "", "lo mi nu"]
    texts = interactive(data, checkpoint, lines, "--decode-steps", 2).lines("D")
    assert sorted(texts) == [0, 1, 2] and texts[1] == [["0.0", ""]]


@pytest.mark.parametrize(("arch", "precision"), [("diffuseq", "--bf16"), ("diffuseq_plus", "--amp")])
def test_precisions(data, tmp_path, arch, precision):
    run = train_diffuseq(data, tmp_path, precision, "--max-update", 3, "--soft-absorb", "--disable-validation", arch=arch)
    assert len(run.stats("train_inner")) == 3
    state = load(tmp_path / "checkpoint_last.pt")["model"]
    assert all(value.isfinite().all() for value in state.values())
    average = state["ema.module.embedding.weight"]
    assert average.dtype == torch.float32 and not torch.equal(average, average.bfloat16().float())


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
    assert not [key for key in a if key.startswith("ema.") and "sampler" in key]   # the history is there once


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


def test_timestep_sampler_switched_between_runs(data, tmp_path, checkpoints):
    """A sampler that learns starts anew on a checkpoint without its history, and leaves no trace in one without it."""
    words = ["--disable-validation", "--ema-rate", 0.9, "--lr", 0.02]
    train_diffuseq(data, tmp_path, *words, "--timestep-sampler", "uniform", "--max-update", 7, "--restore-file",
                   checkpoints["diffuseq"])
    last = tmp_path / "checkpoint_last.pt"
    assert not [key for key in load(last)["model"] if "sampler" in key]
    train_diffuseq(data, tmp_path, *words, "--max-update", 8)
    state = load(last)
    state["model"] |= {f"ema.module.sampler_state.{key}": state["model"][f"net.sampler_state.{key}"]
                       for key in ("losses", "seen")}   # as earlier versions wrote it
    assert state["model"]["net.sampler_state.seen"].sum() == 32
    torch.save(state, last)
    generate(data, last, "--decode-steps", 2)


def test_second_version(data, tmp_path, checkpoints):
    """Soft absorbing state and discrete noise train, resume and decode; the first version has no absorbing state."""
    words = ["--soft-absorb", "--discrete-noise", 0.5, "--disable-validation", "--ema-rate", 0.9]
    run = train_diffuseq(data, tmp_path, *words, "--max-update", 2)
    assert 0 < run.stats("train_inner")[-1]["absorbing"] < 2   # the norm: it starts at about 1
    train_diffuseq(data, tmp_path, *words, "--max-update", 3)
    second = tmp_path / "checkpoint_last.pt"
    sampling = ["--solver", "ancestral", "--decode-steps", 3, "--absorb-rate", 0.5]
    run = generate(data, second, *sampling, "--noise-limit", 2, "--rounding", "from", "--rounding-step", 500, "--drift",
                   "start")
    assert sorted(run.lines("D")) == list(range(12))
    with pytest.raises(InputError, match="absorb_rate needs a model with an absorbing state"):
        generate(data, checkpoints["diffuseq"], *sampling)
    with pytest.raises(InputError, match="rounding_step must be in 0..2000"):
        generate(data, second, "--rounding", "until", "--rounding-step", 2001)
    with pytest.raises(Exception, match="architectures match") as error:
        train_diffuseq(data, tmp_path / "again", *words, "--restore-file", checkpoints["diffuseq"])
    assert "trained without --soft-absorb" in str(error.value.__context__)
    with pytest.raises(Exception, match="architectures match") as error:
        train_diffuseq(data, tmp_path / "again", "--restore-file", second)
    assert "trained with --soft-absorb" in str(error.value.__context__)
