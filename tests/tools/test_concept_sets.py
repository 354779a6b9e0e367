"""tools/concept_sets.py: which words of a sentence become concepts, and which sets are left out."""

import subprocess
import sys
from pathlib import Path

import pytest
import scripts

PATH = Path(__file__).resolve().parents[2] / "tools" / "concept_sets.py"


@pytest.fixture(scope="module")
def tool():
    return scripts.load(PATH)


@pytest.mark.parametrize(("word", "concept"), [
    ("dogs", "dog"), ("benches", "bench"), ("running", "run"), ("riding", "ride"), ("jumped", "jump"), ("carried", "carry"),
    ("ride", "ride"), ("stopped", "stop"), ("his", None), ("as", None), ("cat", None)])
def test_forms_of_a_concept(tool, word, concept):
    assert tool.concept_of(word, {"dog", "bench", "run", "ride", "jump", "carry", "stop"}) == concept


def test_a_concept_is_mentioned_once_and_does_not_begin_like_the_own_ones(tool):
    concepts = {"skier", "snow", "mountain", "slope"}
    assert tool.mentioned("Skiers on a slope, sloping, in snow.", ["mountain", "snowy"], concepts) == ["skier", "slope"]


def test_files_hold_larger_new_sets_with_their_sentences(tmp_path):
    files = {"train.src": "dog run park\ndog catch ball\nball cat dog park run",
             "train.tgt": "A dog runs and catches a ball in the park.\nThe dog catches a ball.\nA cat.",
             "valid.src": "", "test.src": "tree"}
    for name, text in files.items():
        (tmp_path / name).write_text(f"{text}\n")
    run = [sys.executable, str(PATH), str(tmp_path), "--out", str(tmp_path / "more"), "--often", "1"]
    subprocess.run(run, check=True, capture_output=True)
    made = (tmp_path / "more.src").read_text().splitlines()
    assert len(made) == 1 and {"dog", "run", "park"} < set(made[0].split()) <= {"dog", "run", "park", "catch", "ball"}
    assert (tmp_path / "more.tgt").read_text() == "A dog runs and catches a ball in the park.\n"
    (tmp_path / "test.src").write_text(f"{made[0]}\n")   # a set that test has
    failed = subprocess.run(run, capture_output=True, text=True)
    (tmp_path / "test.src").unlink()
    missing = subprocess.run(run, capture_output=True, text=True)
    assert missing.returncode and missing.stderr.startswith(f"no test.src in {tmp_path}")
    assert failed.returncode and "no new sets" in failed.stderr
