"""Wrong options and files: one sentence that names the thing, exit code != 0, nothing half-written."""

import os
import shutil

import pytest
import torch
from fairseq import checkpoint_utils
from test_generate_command import generate
from toy import TINY, TRAIN, command, load, script, train

from pydiffseq.errors import InputError


@pytest.mark.parametrize(("words", "valid"), [
    (["--noise-schedule", "quadratic"], "sqrt"), (["--time-injection", "film"], "rotary"),
    (["--solver", "euler"], "ddim"), (["--length-policy", "guess"], "predict"),
    (["--timestep-sampler", "cosine"], "xy_uniform"), (["--mbr-direction", "both"], "reference")])
def test_unknown_name_lists_the_valid_ones(data, tmp_path, capsys, words, valid):
    with pytest.raises(SystemExit) as stop:
        train(data, tmp_path, *words)
    message = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and f"argument {words[0]}: invalid choice" in message and valid in message


@pytest.mark.parametrize(("words", "message"), [
    (["--anchor-scale", 0], "anchor_scale must be > 0, got 0"), (["--anchor-scale", -1], "anchor_scale must be > 0"),
    (["--ema-rate", 1.5], "ema_rate must lie between 0 and 1"), (["--heads", 3], "multiple of heads"),
    (["--self-conditioning", 2], "self_conditioning must be"), (["--diffusion-steps", 1], "must be >= 2")])
def test_model_options(data, tmp_path, words, message):
    with pytest.raises(InputError, match=message):
        train(data, tmp_path, *words)


@pytest.mark.parametrize(("words", "message"), [
    (["--decode-steps", 0], "steps must be >= 1, got 0"), (["--decode-steps", 3000], r"must be in 1..20\d\d"),
    (["--noise-beam", 0], "noise_beam must be >= 1"), (["--length-beam", -1], "length_beam must be >= 1")])
def test_decoding_options(data, trained, words, message):
    with pytest.raises(InputError, match=message):
        generate(data, trained, *words)


def test_one_line_and_exit_code(data, trained, tmp_path):
    """As the user sees it: the last line of standard error, without a traceback."""
    truncated = tmp_path / "truncated.pt"
    truncated.write_bytes(trained.read_bytes()[:5000])
    words = [data, "--task", "diffusion_seq2seq", "--cpu", "--path"]
    done = script("generate", *words, truncated)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"pydiffseq: error: the checkpoint {truncated} cannot be read")
    done = script("train", data, "--task", "diffusion_seq2seq", "--arch", "ar_diffusion", *TINY, *TRAIN, "--save-dir",
                  tmp_path / "new", "--hidden-dim", 64, "--restore-file", trained)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "does not fit a model of these options" in done.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def transformer(data, tmp_path_factory):
    """A checkpoint of fairseq's Transformer for the same data."""
    folder = tmp_path_factory.mktemp("transformer")
    words = [data, "--task", "translation", "--arch", "transformer", *TRAIN, "--max-update", 1, "--save-dir", folder]
    sizes = [f"--{side}-{name}" for side in ("encoder", "decoder")
             for name in ("layers=1", "embed-dim=16", "ffn-embed-dim=16", "attention-heads=2")]
    command("train", *words, *sizes, "--disable-validation")
    return folder / "checkpoint_last.pt"


def test_checkpoint_of_another_architecture(data, trained, transformer, tmp_path):
    with pytest.raises(InputError, match="works with diffusion models, got a TransformerModel"):
        generate(data, transformer)
    with pytest.raises(InputError, match="ar_diffusion works with --task diffusion_seq2seq, got the task translation"):
        command("generate", data, "--task", "translation", "--path", trained, "--cpu")
    with pytest.raises(InputError, match="works with diffusion models, got a TransformerModel"):
        command("train", data, "--task", "diffusion_seq2seq", "--arch", "transformer", *TRAIN, "--save-dir", tmp_path)
    with pytest.raises(InputError, match="got the task translation"):
        command("train", data, "--task", "translation", "--arch", "ar_diffusion", *TINY, *TRAIN, "--save-dir", tmp_path)


def test_two_checkpoints(data, trained):
    with pytest.raises(InputError, match="takes one checkpoint in --path, got 2"):
        generate(data, f"{trained}:{trained}")


def test_dictionary_mismatch(data, other_data, trained, tmp_path):
    """Of the same size, where only the digest tells, and of another size."""
    with pytest.raises(InputError, match=f"dictionary in {other_data} is not the one"):
        generate(other_data, trained)
    smaller = tmp_path / "smaller"
    shutil.copytree(data, smaller)
    for language in ("de", "en"):
        words = (data / f"dict.{language}.txt").read_text().splitlines()[:-3]
        (smaller / f"dict.{language}.txt").write_text("\n".join(words) + "\n")
    state = load(trained)
    torch.save(state | {"task_state": {}}, tmp_path / "undigested.pt")
    for path in (trained, tmp_path / "undigested.pt"):
        with pytest.raises(InputError, match="dictionary"):
            generate(smaller, path)


def test_checkpoint_stays_safe_to_load(trained):
    """Nothing in it needs weights_only=False, and the dictionaries' digests are there."""
    state = load(trained)
    assert set(state["task_state"]["dictionaries"]) == {"source", "target"}


class _DiskFull:
    """A file system that takes ``room`` more bytes."""

    def __init__(self, monkeypatch, room):
        self.save = torch.save
        monkeypatch.setattr(torch, "save", self)
        monkeypatch.setattr(checkpoint_utils.time, "sleep", lambda seconds: None)

    def __call__(self, state, file, *args, **kwargs):
        file.write(b"half a checkpoint")
        raise OSError(28, "No space left on device")


def test_disk_full_while_saving(data, tmp_path, monkeypatch):
    """The previous checkpoint is as it was and nothing half-written stays; training goes on from it."""
    train(data, tmp_path, "--max-update", 2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with monkeypatch.context() as patch:
        _DiskFull(patch, 0)
        with pytest.raises(InputError, match="could not be written .*No space left on device"):
            train(data, tmp_path, "--max-update", 3)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    def half(source, target):
        with open(target, "wb") as file:
            file.write(b"half a checkpoint")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:   # the second copy of the same checkpoint does not fit
        patch.setattr(shutil, "copyfile", half)
        with pytest.raises(InputError, match="could not be copied .*No space left on device"):
            train(data, tmp_path, "--max-update", 3)
    assert (tmp_path / "checkpoint_last.pt").read_bytes() == before["checkpoint_last.pt"]
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]
    assert train(data, tmp_path, "--max-update", 3).stats("train_inner")[-1]["num_updates"] == 3
