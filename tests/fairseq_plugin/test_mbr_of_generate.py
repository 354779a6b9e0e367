"""`pydiffseq mbr` and `evaluate` read what fairseq-generate writes."""

import json

from test_generate_command import generate

from pydiffseq.cli import main


def test_selection_agrees_with_the_order_of_generation(data, trained, tmp_path, capsys):
    """fairseq-generate writes the candidates in MBR's order, so MBR on the file chooses the first one again."""
    words = ["--mbr-metric", "edit", "--mbr-direction", "reference"]
    run = generate(data, trained, "--decode-steps", 3, "--noise-beam", 4, "--nbest", 4, *words)
    path = tmp_path / "generate.txt"
    path.write_text(run.out, encoding="utf-8")
    capsys.readouterr()
    assert main(["mbr", str(path), "--quiet", "--metric", "edit", "--direction", "reference"]) == 0
    first = {number: lines[0][1] for number, lines in run.lines("H").items()}
    assert capsys.readouterr().out.splitlines() == [first[number] for number in sorted(first)]
    assert any(len({fields[1] for fields in lines}) > 1 for lines in run.lines("H").values())
    assert main(["evaluate", str(path), "--quiet", "--json", str(tmp_path / "v.json")]) == 0
    values = json.loads((tmp_path / "v.json").read_text())
    assert values["candidates"] == 4 and values["sentences"] == len(first) and 0 < values["self_bleu"] < 1
