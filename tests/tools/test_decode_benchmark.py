"""benchmarks/decode.py: cases that run out of time, and results that are there already."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import scripts

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "decode.py"


@pytest.fixture(scope="module")
def decode():
    return scripts.load(SCRIPT)


def result(contender, speed, done=True, candidates=10, steps=20, size="iwslt14", batch=8):
    return {"size": size, "real": False, "batch": batch, "candidates": candidates, "steps": steps, "contender": contender,
            "sentences_per_second": speed, "seconds_per_run": batch / speed if done else None,
            "peak_mb": 100.0 if done else None, "device": "cpu"}


def test_what_ran_out_of_time_stops_only_larger_cases_of_its_contender(decode):
    late = [result("official float32", 0.1, done=False)]
    assert decode.hopeless(result("official float32", 1, candidates=50), late)
    assert decode.hopeless(result("official float32", 1), late)
    assert not decode.hopeless(result("official float32", 1, steps=3), late)
    assert not decode.hopeless(result("official float32", 1, size="xsum"), late)
    assert not decode.hopeless(result("pydiffseq float32", 1, candidates=50), late)
    assert not decode.hopeless(result("official float32", 1, candidates=50), [result("official float32", 0.1)])


def test_the_table_gives_bounds_where_time_ran_out(decode):
    results = [result("pydiffseq float32", 1.0), result("official float32", 0.25, done=False),
               result("transformer float32", 0.5), result("pydiffseq bfloat16", 0.2, done=False)]
    head, _, row = decode.table(results).splitlines()
    assert head.endswith("| steps | pydiffseq float32 | official float32 | transformer float32 | pydiffseq bfloat16 "
                         "| x official | x Transformer | MB |")
    assert row == "| iwslt14 | padded | 8 | 10 | 20 | 1 | < 0.25 | 0.5 | < 0.2 | > 4 / - | 2 / - | 100 / - / 100 / - |"


def test_the_transformer_has_a_row_where_it_is_alone_and_the_fastest_one_counts(decode):
    results = [result("transformer float16", 2.0), result("transformer float32", 1.0)]
    assert decode.table(results).splitlines()[2:] == ["| iwslt14 | padded | 8 |  |  | 2 | 1 |  |  | 100 / 100 |"]
    ours = [result("pydiffseq float16", 6.789, steps=3), result("pydiffseq float16", 1234.5, steps=2)]
    assert decode.table([*results, *ours]).splitlines()[2:] == [
        "| iwslt14 | padded | 8 | 10 | 3 | 2 | 1 | 6.79 | - | 3.39 | 100 / 100 / 100 |",
        "| iwslt14 | padded | 8 | 10 | 2 | 2 | 1 | 1230 | - | 617 | 100 / 100 / 100 |"]


def test_a_case_past_its_limit_has_a_bound_and_one_that_fails_says_why(decode, capsys):
    case = {"size": "iwslt14", "batch": 1, "candidates": 1, "steps": 2, "real": False, "contender": "pydiffseq float32",
            "official": None, "seconds": 60.0, "device": "cpu"}   # repeats for a minute
    late = decode.in_a_process(case, limit=0.2)
    assert late["sentences_per_second"] == 5 and late["seconds_per_run"] is None
    assert decode.in_a_process(case | {"size": "wmt"}, limit=None) is None
    assert "pydiffseq float32 failed: KeyError: 'wmt'" in capsys.readouterr().err


def test_results_that_are_there_are_not_measured_again(tmp_path):
    kept = tmp_path / "kept.json"
    made = result("pydiffseq float32", 123.4, candidates=1, steps=2, batch=1)
    kept.write_text(json.dumps([made]))
    command = [sys.executable, str(SCRIPT), "--sizes", "iwslt14", "--batches", "1", "--candidates", "1", "--steps", "2",
               "--contenders", "pydiffseq float32", "--json", str(kept)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "| 123 |" in done.stdout and json.loads(kept.read_text()) == [made]
