"""`pydiffseq mbr`: every format gives the same choice, and what is missing is named with file and line."""

import gzip
import json

import pytest

from pydiffseq.cli import main
from pydiffseq.decoding import mbr_order

CANDIDATES = [["a b c d x", "a b c d e", "a b c d e f"], ["one", "two words", "two words"], ["same", "other", "third"]]
CHOSEN = ["a b c d e", "two words", "same"]


def fairseq(numbers=(2, 0, 1), candidates=CANDIDATES) -> str:
    lines = []
    for number in numbers:
        lines += [f"S-{number}\tsource", f"T-{number}\treference {number}"]
        for text in candidates[number]:
            lines += [f"H-{number}\t-0.5\t{text}", f"D-{number}\t-0.5\t{text}!", f"P-{number}\t-0.1 -0.2"]
    return "\n".join([*lines, "Generate test with beam=1: BLEU4 = 1.00"]) + "\n"


def write(folder, form: str) -> list[str]:
    """Files of ``form`` that hold CANDIDATES."""
    if form == "fairseq":
        texts = {"generate.txt": fairseq()}
    elif form == "json":
        texts = {"lists.jsonl": "".join(json.dumps(group) + "\n" for group in CANDIDATES)}
    else:
        columns = list(zip(*CANDIDATES, strict=True))
        records = [[json.dumps({"recover": f"[CLS] {text} [SEP] [PAD]", "reference": "r"}) for text in column]
                   for column in columns] if form == "diffuseq" else columns
        texts = {f"seed{i}": "\n".join(lines) + "\n" for i, lines in enumerate(records)}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [str(folder / name) for name in texts]


@pytest.mark.parametrize("form", ["fairseq", "json", "diffuseq", "text"])
def test_every_format_gives_the_same_choice(form, tmp_path, capsys):
    files = write(tmp_path, form)
    assert main(["mbr", *files, "--quiet"]) == 0
    assert capsys.readouterr().out.splitlines() == CHOSEN
    out = tmp_path / "chosen.txt"
    assert main(["mbr", *files, "--quiet", "--format", form, "-o", str(out)]) == 0
    assert out.read_text().splitlines() == CHOSEN


def test_options_reach_the_choice(tmp_path, capsys):
    group = ["A B c d e", "a b c d", "a b c.", "x y z w v u"]
    path = tmp_path / "lists.json.gz"
    path.write_bytes(gzip.compress((json.dumps(group) + "\n").encode()))

    def choice(*words):
        assert main(["mbr", str(path), "--quiet", *words]) == 0
        return capsys.readouterr().out.rstrip("\n")

    def best(symbols, *options):
        return group[mbr_order(symbols, *options)[0][0]]

    lower = [text.lower() for text in group]
    assert choice("--metric", "chrf", "--lowercase") == best(lower, "hypothesis", "chrf")
    tokens = [text.replace("c.", "c .").split() for text in lower]
    published = ("--smoothing", "add1_all", "--direction", "reference", "--tokenize", "13a", "--lowercase")
    assert choice(*published) == best(tokens, "reference", "bleu", "add1_all")
    assert choice("--metric", "edit") == best([text.split() for text in group], "hypothesis", "edit")
    (tmp_path / "out.txt").write_text(fairseq())
    assert main(["mbr", str(tmp_path / "out.txt"), "--quiet", "--fairseq-line", "D"]) == 0
    assert capsys.readouterr().out.splitlines() == ["a b c d x!", "two words!", "same!"]   # "e!" is not "e"


def test_sources_and_choices_are_parallel(tmp_path, capsys):
    path, sources, out = tmp_path / "generate.txt", tmp_path / "text.de", tmp_path / "text.en"
    path.write_text("".join(f"S-{i}\tQuelle {i}\nT-{i}\tr\nH-{i}\t-1\tsource {i}\n" for i in (2, 0, 1)))
    assert main(["mbr", str(path), "--quiet", "--sources", str(sources), "-o", str(out)]) == 0
    assert sources.read_text().splitlines() == [f"Quelle {i}" for i in range(3)]
    assert out.read_text().splitlines() == [f"source {i}" for i in range(3)]
    assert not capsys.readouterr().out
    assert main(["mbr", str(path), "--quiet", "--sources", str(out), "-o", str(out)]) == 2
    assert "must be two files" in capsys.readouterr().err and out.read_text().startswith("source 0")
    plain = write(tmp_path, "json")
    assert main(["mbr", *plain, "--quiet", "--sources", str(tmp_path / "none")]) == 2
    assert "--sources: sentence 0 of" in capsys.readouterr().err and not (tmp_path / "none").exists()


@pytest.mark.parametrize(("files", "words", "message"), [
    ({"a": fairseq((0, 2))}, [], "a:12 is the block of sentence 2, but no block of sentence 1 is there"),
    ({"a": "S-0\tx\nH-0\t-1\ty\nS-1\tz\n"}, [], "a:3 begins a block of sentence 1 without H- lines"),
    ({"a": fairseq((0, 1, 0))}, [], "a:23 begins a second block of sentence 0; the first is on line 1"),
    ({"a": "text only\n"}, ["--format", "fairseq"], "holds no H- lines"),
    ({"a": '["x"]\n\n["y"]\n'}, [], "a:2 is not a JSON list of strings"),
    ({"a": '["x"]\n[]\n'}, [], "a:2 must be a JSON list of at least one string"),
    ({"a": '["x"]\n["y", 3]\n'}, [], "a:2 must be a JSON list of at least one string"),
    ({"a": '["x"]\n{"y": 3}\n'}, [], "a:2 is a JSON dict, not a list of strings"),
    ({"a": "x\ny\n", "b": "x\n"}, [], "b ends before line 2, which "),
    ({"a": '{"recover": "x"}\n'}, [], "a:1 must have a string under the key 'reference', but it has no such key"),
    ({"a": '{"recover": 5, "reference": ""}\n'}, [], "a:1 must have a string under the key 'recover', but it has int"),
    ({"a": '["x"]\n', "b": '["x"]\n'}, [], "the format json takes one file, got 2"),
    ({"a": ""}, [], "a is empty"),
    ({}, [], "no file"),
])
def test_what_is_missing_is_named(files, words, message, tmp_path, capsys):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    out = tmp_path / "out.txt"
    assert main(["mbr", *(str(tmp_path / name) for name in files or ["none"]), *words, "--quiet", "-o", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))
