"""tools/quality_curve.py: it measures what fairseq-generate writes, goes on where it was, and shows tables."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import sacrebleu
import scripts
import torch
from test_generate_command import generate

PATH = Path(__file__).parents[2] / "tools" / "quality_curve.py"


@pytest.fixture(scope="module")
def tool():
    return scripts.load(PATH)


def test_curve(tool, data, trained, tmp_path, monkeypatch, capsys):
    out = tmp_path / "curve.jsonl"

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["quality_curve.py", "--out", str(out), *map(str, words)])
        tool.main()
        return capsys.readouterr().out

    run(data, trained, "--solver", "ddim", "skip", "--steps", 2, 10, "--batch", 5)
    printed = run(data, trained, "--solver", "ddim", "skip", "--steps", 2, 10, "--candidates", 2)
    assert len(printed.splitlines()) == 2   # what is there is not measured again
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["solver"], row["steps"], row["noise_beam"]) for row in rows] == [
        ("ddim", 2, 1), ("skip", 2, 1), ("ddim", 10, 1), ("skip", 10, 1), ("ddim", 10, 2), ("skip", 10, 2)]
    assert "self_bleu" in rows[-1] and "self_bleu" not in rows[0]
    lines = generate(data, trained, "--decode-steps", 2, "--solver", "ddim", "--remove-bpe", "sentencepiece")
    texts = [[lines.lines(kind)[i][0][-1] for i in range(12)] for kind in "DT"]
    assert rows[0]["sacrebleu"] == pytest.approx(sacrebleu.corpus_bleu(texts[0], [texts[1]]).score)
    table = run("--show", "candidates", "--value", "rougeL", "--csv", tmp_path / "c.csv").splitlines()
    assert table[0] == "| | 1 | 2 |" and table[2] == f"| ddim | {rows[2]['rougeL']:.3f} | {rows[4]['rougeL']:.3f} |"
    assert (tmp_path / "c.csv").read_text().splitlines()[:2] == [
        "solver,candidates,rougeL", f"ddim,1,{rows[2]['rougeL']}"]
    assert run("--show", "steps").splitlines()[0] == "| | 2 | 10 |"


def test_sources_in_a_row_are_one_sentence(tool):
    pairs = [{"id": i, "source": torch.tensor(source), "target": torch.tensor([i])}
             for i, source in enumerate([[5, 6, 7, 2], [5, 6, 7, 2], [4, 2], [8, 2]])]
    words = SimpleNamespace(string=lambda tokens, symbol: str(tokens.tolist()), pad=lambda: 1)
    task = SimpleNamespace(load_dataset=lambda split: None, dataset=lambda split: pairs, target_dictionary=words)
    data = tool.Data(task, "test", 2)
    assert data.references == (["[2]"], ["[0]", "[1]"])   # the shorter source first
    (sources, ids), = data.batches(5)
    assert sources.tolist() == [[4, 2, 1, 1], [5, 6, 7, 2]] and ids.tolist() == [2, 0]
