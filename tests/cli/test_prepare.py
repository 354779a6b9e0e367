"""`pydiffseq prepare`: what it writes is what stock fairseq reads, and wrong input leaves nothing behind."""

import gzip
import json
import lzma
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from pydiffseq.cli import main

pytest.importorskip("fairseq")

WORDS = {"ich": "I", "du": "you", "sehe": "see", "kaufe": "buy", "den": "the", "roten": "red", "Hund": "dog",
         "Apfel": "apple", "heute": "today",
         "morgen": "tomorrow", "gern": "gladly", "nicht": "not", "Übung": "exercise", "schön": "nice"}


def sentences(count, seed=0):
    """German-looking lines and their word-by-word English."""
    random = np.random.default_rng(seed)
    sources, targets = [], []
    for _ in range(count):
        words = random.choice(list(WORDS), size=random.integers(1, 8))
        sources.append(" ".join(words) + ".")
        targets.append(" ".join(WORDS[word] for word in words) + ".")
    return sources, targets


def write(path, lines, opener=open):
    with opener(path, "wt", encoding="utf-8", newline="") as file:
        file.writelines(line + "\n" for line in lines)


@pytest.fixture
def corpus(tmp_path):
    """Prefixes of a training text (plain), a validation text (xz) and a test text (gz)."""
    kinds = (("train", 200, "", open), ("valid", 10, ".xz", lzma.open), ("test", 12, ".gz", gzip.open))
    for name, count, suffix, opener in kinds:
        for language, lines in zip(("de", "en"), sentences(count, seed=count), strict=True):
            write(tmp_path / f"{name}.{language}{suffix}", lines, opener)
    return tmp_path


def prepare(folder, *options, train="train", dest="out"):
    return main(["prepare", "-s", "de", "-t", "en", "--trainpref", str(folder / train), "--destdir", str(folder / dest),
                 "--quiet", "--vocab-size", "60", *map(str, options)])


def load(folder, split="train", languages=("de", "en")):
    """The pairs that fairseq's translation task reads from ``folder``, with its dictionary."""
    from fairseq.tasks.translation import TranslationConfig, TranslationTask

    cfg = TranslationConfig(data=str(folder), source_lang=languages[0], target_lang=languages[1],
                            dataset_impl="mmap")
    task = TranslationTask.setup_task(cfg)
    task.load_dataset(split)
    dataset = task.datasets[split]
    return [(dataset.src[i], dataset.tgt[i]) for i in range(len(dataset))], task.source_dictionary


def only_inputs(folder, *, dest="out"):
    """Whether neither the output nor a temporary folder of it exists."""
    return not [path.name for path in folder.iterdir() if dest in path.name]


def test_round_trip_as_fairseq_decodes(corpus, capsys):
    """Every split decodes to its text by fairseq's own sentencepiece, from plain, xz and gz files."""
    from fairseq.data.encoders.sentencepiece_bpe import SentencepieceBPE, SentencepieceConfig

    assert prepare(corpus, "--validpref", corpus / "valid", "--testpref", corpus / "test") == 0
    out = corpus / "out"
    bpe = SentencepieceBPE(SentencepieceConfig(sentencepiece_model=str(out / "sentencepiece.model")))
    for split, count in (("train", 200), ("valid", 10), ("test", 12)):
        pairs, dictionary = load(out, split)
        texts = sentences(count, seed=count)
        for side in (0, 1):
            decoded = [dictionary.string(pair[side], bpe_symbol="sentencepiece") for pair in pairs]
            assert decoded == texts[side]
        encoded = dictionary.encode_line(bpe.encode(texts[0][3]), add_if_not_exist=False)
        assert encoded.tolist() == pairs[3][0].tolist()  # what fairseq-interactive would feed
    assert "10 pairs" in capsys.readouterr().out


def test_dictionary_layout_and_counts(corpus):
    assert prepare(corpus) == 0
    pairs, dictionary = load(corpus / "out")
    assert [dictionary[i] for i in range(4)] == ["<s>", "<pad>", "</s>", "<unk>"]
    assert len(dictionary) == 60
    tokens = np.concatenate([ids.numpy() for pair in pairs for ids in pair])
    for index in range(4, 60):
        assert dictionary.count[index] == (tokens == index).sum()
    assert (corpus / "out/dict.de.txt").read_bytes() == (corpus / "out/dict.en.txt").read_bytes()


def test_given_model_reproduces_the_data(corpus):
    """The data do not depend on whether the model was trained here or given."""
    assert prepare(corpus) == 0
    assert prepare(corpus, "--sentencepiece-model", corpus / "out/sentencepiece.model", dest="again") == 0
    for file in sorted((corpus / "out").iterdir()):
        assert file.read_bytes() == (corpus / "again" / file.name).read_bytes(), file.name


def test_jsonl_equals_text(corpus):
    sources, targets = sentences(200, seed=200)
    write(corpus / "train.jsonl", [json.dumps({"src": s, "trg": t}) for s, t in zip(sources, targets, strict=True)])
    assert prepare(corpus) == 0
    assert prepare(corpus, "--jsonl", dest="json") == 0
    assert load(corpus / "json")[0][5][1].tolist() == load(corpus / "out")[0][5][1].tolist()


def test_jsonl_default_languages_and_other_keys(corpus):
    write(corpus / "q.jsonl", [json.dumps({"a": s, "b": t}) for s, t in zip(*sentences(50), strict=True)])
    assert main(["prepare", "--jsonl", "--trainpref", str(corpus / "q.jsonl"), "--destdir", str(corpus / "out"),
                 "--quiet", "--vocab-size", "50", "--source-key", "a", "--target-key", "b"]) == 0
    assert len(load(corpus / "out", languages=("src", "tgt"))[0]) == 50


def test_given_dictionary_splits_at_blanks(corpus):
    write(corpus / "dict.txt", ["ich 10", "sehe 5", "I 4", "see 3"])
    write(corpus / "t.de", ["ich sehe dich", "sehe"])
    write(corpus / "t.en", ["I see you", "see"])
    assert prepare(corpus, "--srcdict", corpus / "dict.txt", train="t") == 0
    pairs, dictionary = load(corpus / "out")
    assert [pair[0].tolist() for pair in pairs] == [[4, 5, 3, 2], [5, 2]]
    assert [pair[1].tolist() for pair in pairs] == [[6, 7, 3, 2], [7, 2]]
    assert not (corpus / "out/sentencepiece.model").exists()
    assert dictionary.count[4] == 10  # as given


def test_bpe_codes(corpus):
    pytest.importorskip("subword_nmt")
    write(corpus / "codes", ["#version: 0.2", "i c", "ic h</w>"])
    write(corpus / "t.de", ["ich da"])
    write(corpus / "t.en", ["ich ich"])
    assert prepare(corpus, "--bpe-codes", corpus / "codes", train="t") == 0
    pairs, dictionary = load(corpus / "out")
    assert dictionary.string(pairs[0][0]) == "ich d@@ a"
    assert len(dictionary) % 8 == 0


def test_empty_lines(corpus, capsys):
    """Training skips pairs with an empty side and counts them; validation keeps its line numbers."""
    write(corpus / "t.de", ["ich", "", "du", "  ", "du", *sentences(40)[0]])
    write(corpus / "t.en", ["I", "you", "", "", "you", *sentences(40)[1]])
    assert prepare(corpus, "--validpref", corpus / "t", "--vocab-size", "40", train="t") == 0
    assert "42 pairs" in (output := capsys.readouterr().out) and "3 pairs with an empty side skipped" in output
    assert len(load(corpus / "out")[0]) == 42
    valid, _ = load(corpus / "out", "valid")
    assert [len(pair[0]) for pair in valid[:5]] == [len(valid[0][0]), 1, len(valid[2][0]), 1, len(valid[4][0])]
    assert valid[1][0].tolist() == [2]


def test_line_ends_and_byte_order_mark(corpus):
    """CR LF and a byte order mark are no text; U+2028 does not end a line."""
    sources, targets = sentences(60)
    (corpus / "t.de").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(["ich\u2028du", *sources]).encode())
    write(corpus / "t.en", ["I you", *targets])
    assert prepare(corpus, train="t") == 0
    pairs, dictionary = load(corpus / "out")
    assert len(pairs) == 61
    assert dictionary.string(pairs[0][0], bpe_symbol="sentencepiece") == "ich du"
    assert dictionary.unk() not in pairs[0][0]


def test_overwrite(corpus, capsys):
    assert prepare(corpus) == 0
    assert prepare(corpus) == 2
    assert "--overwrite" in capsys.readouterr().err
    (corpus / "out/stale").touch()
    assert prepare(corpus, "--overwrite") == 0
    assert not (corpus / "out/stale").exists()
    assert not list(corpus.glob(".out*"))


def test_overwrite_spares_other_folders(corpus, capsys):
    (corpus / "out").mkdir()
    (corpus / "out/thesis.txt").write_text("all my work")
    assert prepare(corpus, "--overwrite") == 2
    assert "does not hold data from pydiffseq prepare" in capsys.readouterr().err
    assert (corpus / "out/thesis.txt").read_text() == "all my work"


def break_file(name, content):
    def spoil(folder):
        (folder / name).write_bytes(content)
    return spoil


def empty_text(content):
    def spoil(folder):
        for language in ("de", "en"):
            (folder / f"train.{language}").write_bytes(content)
    return spoil


def unspoilt(folder):
    pass


JSON = ("--jsonl",)
BAD_INPUT = {
    "not UTF-8": (break_file("train.de", b"ich\ndu \xe4\n"), (),
        "train.de:2 is not UTF-8 text (byte 0xe4 at position 4)"),
    "not UTF-8 in valid": (break_file("v.de", b"\xff\n"), ("--validpref", "{}/v"), "no file {}/v.en"),
    "line counts": (break_file("train.de", b"a\nb\n"), (), "train.de has 2 lines, but {}/train.en has 200"),
    "line counts, target short": (break_file("train.en", b"a\nb\nc\n"), (),
        "train.de has 200 lines, but {}/train.en has 3"),
    "missing file": (lambda folder: (folder / "train.en").unlink(), (), "no file {}/train.en (nor"),
    "empty": (empty_text(b""), (), "train.de and train.en has no pair with text"),
    "damaged xz": (break_file("valid.de.xz", b"not xz"), ("--validpref", "{}/valid"),
        "valid.de.xz is damaged after line 0"),
    "truncated gz": (lambda folder: (folder / "test.de.gz").write_bytes((folder / "test.de.gz").read_bytes()[:40]),
                     ("--testpref", "{}/test"), "test.de.gz is damaged"),
    "jsonl without key": (break_file("train.jsonl", b'{"src": "a", "tgt": "b"}\n'), JSON,
                          "train.jsonl:1 must have a string under the key 'trg', but it has 'src', 'tgt'"),
    "jsonl number": (break_file("train.jsonl", b'{"src": "a", "trg": "b"}\n{"src": 3, "trg": "b"}\n'), JSON,
                     "train.jsonl:2 must have a string under the key 'src', but it has int"),
    "jsonl syntax": (break_file("train.jsonl", b'{"src": "a"\n'), JSON, "train.jsonl:1 is not a JSON object"),
    "jsonl list": (break_file("train.jsonl", b"[1]\n"), JSON, "train.jsonl:1 is a JSON list, not an object"),
    "vocabulary too large": (unspoilt, ("--vocab-size", "6000"), "a vocabulary of 6000 is too large for this corpus"),
    "vocabulary too small": (unspoilt, ("--vocab-size", "12"), "a vocabulary of 12 is too small for the characters"),
    "vocabulary size": (unspoilt, ("--vocab-size", "0"), "--vocab-size must be at least 8, got 0"),
    "coverage": (unspoilt, ("--character-coverage", "1.5"), "--character-coverage must be above 0 and at most 1"),
    "no model": (unspoilt, ("--sentencepiece-model", "{}/x.model"), "no sentencepiece model {}/x.model"),
    "not a model": (break_file("x.model", b"garbage"), ("--sentencepiece-model", "{}/x.model"),
        "not a sentencepiece model"),
    "no dictionary": (unspoilt, ("--srcdict", "{}/dict.txt"), "no dictionary {}/dict.txt"),
    "not a dictionary": (break_file("dict.txt", b"one two three\n"), ("--srcdict", "{}/dict.txt"),
        "is not a fairseq dictionary"),
    "same language": (unspoilt, ("-t", "de"), "must differ, both are 'de'"),
    "all lines empty": (empty_text(b"\n\n"), (), "no pair with text on both sides"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input(corpus, capsys, name):
    """One sentence on standard error, exit status 2, and no output folder."""
    spoil, options, message = BAD_INPUT[name]
    spoil(corpus)
    assert prepare(corpus, *(option.format(corpus) for option in options)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("pydiffseq prepare: ") and message.format(corpus) in error
    assert only_inputs(corpus)


def test_suggested_vocabulary_sizes_work(corpus, capsys):
    """The bounds named in the two vocabulary errors are exact."""
    for wrong in ("6000", "12"):
        assert prepare(corpus, "--vocab-size", wrong) == 2
        limit = capsys.readouterr().err.rpartition("--vocab-size ")[2].split()[0]
        assert prepare(corpus, "--vocab-size", limit, dest=f"out{wrong}") == 0


def test_missing_subword_nmt(corpus, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "subword_nmt.apply_bpe", None)
    monkeypatch.setitem(sys.modules, "subword_nmt", None)
    assert prepare(corpus, "--bpe-codes", corpus / "codes") == 2
    assert "pip install subword-nmt" in capsys.readouterr().err
    assert only_inputs(corpus)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("a bug")])
def test_failure_while_writing_leaves_nothing(corpus, monkeypatch, error):
    """A full disk, Ctrl-C or a bug while encoding: no temporary files are left, and the data that were there stay."""
    import pydiffseq.data.binarize as binarize

    assert prepare(corpus) == 0
    before = (corpus / "out/train.de-en.de.bin").read_bytes()

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(binarize, "write_split", fail)
    if isinstance(error, RuntimeError):
        with pytest.raises(RuntimeError, match="a bug"):
            prepare(corpus, "--overwrite")
    else:
        assert prepare(corpus, "--overwrite") == (130 if isinstance(error, KeyboardInterrupt) else 2)
    assert (corpus / "out/train.de-en.de.bin").read_bytes() == before
    assert not list(corpus.glob(".out*"))


def test_terminated_run_leaves_nothing(tmp_path):
    """SIGTERM while the training text is being written."""
    write(tmp_path / "train.de", ["a b c"] * 150_000)
    write(tmp_path / "train.en", ["a b"] * 150_000)
    write(tmp_path / "dict.txt", ["a 1", "b 1"])
    process = subprocess.Popen(
        [sys.executable, "-m", "pydiffseq.cli", "prepare", "-s", "de", "-t", "en", "--trainpref", tmp_path / "train",
         "--srcdict", tmp_path / "dict.txt", "--destdir", tmp_path / "out", "--quiet"], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".out.partial*/train*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert only_inputs(tmp_path)
