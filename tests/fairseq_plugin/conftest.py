"""The toy corpus and the toy checkpoint that the tests of the fairseq commands share."""

import importlib.util

import pytest
import torch
from toy import prepare, train, write_pairs

if importlib.util.find_spec("fairseq") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """300 training, 24 validation and 12 test pairs with a sentencepiece vocabulary of 80."""
    folder = tmp_path_factory.mktemp("corpus")
    for seed, (split, count) in enumerate((("train", 300), ("valid", 24), ("test", 12))):
        write_pairs(folder / split, count, seed)
    return prepare(folder, "--vocab-size", 80)


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory):
    """A checkpoint after 8 updates whose moving average differs much from its weights; with length prediction."""
    folder = tmp_path_factory.mktemp("trained")
    train(data, folder, "--length-policy", "predict", "--ema-rate", 0.9, "--lr", 0.02, "--max-update", 8)
    return folder / "checkpoint_last.pt"


@pytest.fixture(scope="session")
def other_data(data, tmp_path_factory):
    """A data folder of the same size whose dictionary is another one."""
    folder = tmp_path_factory.mktemp("other")
    for split in ("train", "valid", "test"):
        for language in ("de", "en"):
            text = (data.parent / f"{split}.{language}").read_text()
            (folder / f"{split}.{language}").write_text(text.translate(str.maketrans("bdfgk", "xwqcj")))
    return prepare(folder, "--vocab-size", 80)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
