"""Two processes on half the batch each train the parameters of one process on the whole batch."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toy import TINY, TRAIN, load, prepare, train, write_pairs

# Plain SGD: Adam divides by the gradient's size and blows rounding up where the gradient is zero but for it.
WORDS = ("--optimizer sgd --lr 0.5 --momentum 0.9 --dropout 0 --attention-dropout 0 --ema-rate 0.9 --max-update 4 "
         "--length-policy predict --self-conditioning 0.5").split()


@pytest.fixture(scope="module")
def sixteen(data, tmp_path_factory):
    """16 training pairs: one batch is the whole epoch."""
    folder = tmp_path_factory.mktemp("sixteen")
    for seed, (split, count) in enumerate((("train", 16), ("valid", 6), ("test", 2))):
        write_pairs(folder / split, count, seed)
    return prepare(folder, "--sentencepiece-model", data / "sentencepiece.model")


def start(rank, port, data, folder, *words):
    command = [Path(sys.executable).with_name("fairseq-train"), data, "--task", "diffusion_seq2seq", "--arch",
               "ar_diffusion", *TINY, *TRAIN, *WORDS, "--save-dir", folder, "--distributed-world-size", 2,
               "--distributed-rank", rank, "--distributed-no-spawn", "--distributed-backend", "gloo",
               "--distributed-init-method", f"tcp://127.0.0.1:{port}", *words]
    return subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize("backend", [["legacy_ddp", "--eval-bleu"], ["pytorch_ddp"]])
def test_two_processes(sixteen, tmp_path, backend):
    words = ["--batch-size", 8, "--ddp-backend", *backend]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [start(rank, port, sixteen, tmp_path / "two", *words) for rank in (0, 1)]
    outputs = [process.communicate(timeout=300)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], outputs[0][-3000:] + outputs[1][-3000:]
    train(sixteen, tmp_path / "one", *WORDS, "--batch-size", 16)
    one, two = (load(tmp_path / name / "checkpoint_last.pt") for name in ("one", "two"))
    assert one["optimizer_history"][-1]["num_updates"] == two["optimizer_history"][-1]["num_updates"] == 4
    for key, value in one["model"].items():
        torch.testing.assert_close(two["model"][key], value, rtol=0, atol=1e-6, msg=key)
