"""A toy corpus, a toy model, and the stock fairseq commands: in this process (:func:`command`) or a fresh one."""

import contextlib
import fileinput
import importlib
import io
import json
import logging
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch

SYLLABLES = [(consonant + vowel, vowel + consonant) for consonant in "bdfgklmnprstvz" for vowel in "aiou"]
TINY = ("--hidden-dim 32 --ffn-dim 64 --heads 2 --latent-dim 16 --time-dim 16 --encoder-layers 1 --decoder-layers 1 "
        "--target-length 24 --source-positions 32").split()
TRAIN = ("--cpu --optimizer adam --lr 0.005 --batch-size 32 --num-workers 0 --log-format json --log-interval 1 "
         "--no-epoch-checkpoints").split()


class Run(NamedTuple):
    out: str                        # standard output
    log: list[tuple[str, str]]      # (logger, message)

    def stats(self, name):
        """The numbers logged as json by ``name``: train_inner, train or valid."""
        return [{key: float(value) for key, value in json.loads(message).items() if value is not None}
                for logger, message in self.log if logger == name and message.startswith("{")]

    def lines(self, kind):
        """Lines of fairseq-generate by their first letter, as fields: ``{sentence: [[...], ...]}``."""
        rows = {}
        for line in self.out.splitlines():
            if line.startswith(f"{kind}-"):
                number, *fields = line[len(kind) + 1:].split("\t")
                rows.setdefault(number if "_" in number else int(number), []).append(fields)
        return rows

    def bleu(self):
        line, = (line for line in self.out.splitlines() if line.startswith("Generate "))
        return line


class _Collector(logging.Handler):
    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        self.messages.append((record.name, record.getMessage()))


def command(name, *words, stdin=""):
    """``fairseq-<name> words`` in this process; its errors are raised."""
    from fairseq import checkpoint_utils

    root, collector, out = logging.getLogger(), _Collector(), io.StringIO()
    saved = sys.argv, sys.stdin, root.handlers[:], root.level
    # What the commands keep between runs in one process.
    vars(checkpoint_utils.save_checkpoint).pop("best", None)
    fileinput._state = None
    torch.manual_seed(0)
    try:
        root.handlers[:] = [collector]
        root.setLevel(logging.INFO)
        sys.argv, sys.stdin = [f"fairseq-{name}", *map(str, words)], io.StringIO(stdin)
        with contextlib.redirect_stdout(out):
            importlib.import_module(f"fairseq_cli.{name}").cli_main()
    finally:
        sys.argv, sys.stdin, root.handlers[:] = saved[:3]
        root.setLevel(saved[3])
    return Run(out.getvalue(), collector.messages)


def script(name, *words, stdin="", cwd=None, **environment):
    """``fairseq-<name> words`` in a fresh process, as a user types it."""
    program = Path(sys.executable).with_name(f"fairseq-{name}")
    env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([str(program), *map(str, words)], input=stdin, env=env, cwd=cwd, capture_output=True,
                          text=True, timeout=300)


def train(data, save_dir, *words):
    """Train the tiny model; later words override earlier ones."""
    return command("train", data, "--task", "diffusion_seq2seq", "--arch", "ar_diffusion", *TINY, *TRAIN,
                   "--save-dir", save_dir, *words)


def load(path):
    return torch.load(path, weights_only=True, map_location="cpu")


def write_pairs(prefix, count, seed):
    """``count`` pairs: 1 to 7 syllables, and the same syllables reversed letter by letter."""
    chooser = random.Random(seed)
    with open(f"{prefix}.de", "w") as source, open(f"{prefix}.en", "w") as target:
        for _ in range(count):
            words = [chooser.choice(SYLLABLES) for _ in range(chooser.randint(1, 7))]
            source.write(" ".join(word for word, _ in words) + "\n")
            target.write(" ".join(word for _, word in words) + "\n")


def prepare(folder, *words):
    from pydiffseq.cli import main

    assert main(["prepare", "-s", "de", "-t", "en", "--quiet", "--trainpref", str(folder / "train"), "--validpref",
                 str(folder / "valid"), "--testpref", str(folder / "test"), "--destdir", str(folder / "data"),
                 *map(str, words)]) == 0
    return folder / "data"
