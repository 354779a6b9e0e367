"""The scripts of examples/commongen."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import scripts

FOLDER = Path(__file__).parents[2] / "examples" / "commongen"
RECORDS = [{"concept_set": "ski_V#mountain_N#skier_N", "scene": ["A skier skis down the mountain. ", "Skiers ski."]},
           {"concept_set": "dog#run", "scene": ["The dog runs."]}]


def run(name, *words):
    return subprocess.run([sys.executable, str(FOLDER / f"{name}.py"), *map(str, words)], capture_output=True, text=True)


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "official.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    done = run("pairs", tmp_path / "official.jsonl")
    assert done.returncode == 0, done.stderr
    (tmp_path / "test.jsonl").write_text(done.stdout)
    return tmp_path


def test_pairs(corpus):
    found = [json.loads(line) for line in (corpus / "test.jsonl").read_text().splitlines()]
    assert found == [{"src": "ski mountain skier", "trg": "A skier skis down the mountain."},
                     {"src": "ski mountain skier", "trg": "Skiers ski."}, {"src": "dog run", "trg": "The dog runs."}]
    with pytest.raises(SystemExit, match="line 2 must be a JSON object with concept_set and scene"):
        list(scripts.load(FOLDER / "pairs.py").pairs([json.dumps(RECORDS[0]), '{"scene": []}']))


def test_score(corpus):
    """The first candidate of the first pair of each set counts."""
    lines = {0: ["Skiers ski.", "worse"], 1: ["nothing"], 2: ["The dog runs."]}
    (corpus / "generate.txt").write_text("".join(
        f"D-{number}\t-0.1\t{text}\n" for number, texts in lines.items() for text in texts))
    done = run("score", corpus / "generate.txt", corpus / "test.jsonl")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "2 concept sets: concepts mentioned 83.3 %\n"
    (corpus / "generate.txt").write_text("D-0\t-0.1\tSkiers ski.\n")
    assert "has 1 sentences, but" in run("score", corpus / "generate.txt", corpus / "test.jsonl").stderr
