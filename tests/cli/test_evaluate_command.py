"""`pydiffseq evaluate`: the same numbers from every format, which are those of the metrics."""

import json
import sys

import pytest
import sacrebleu

from pydiffseq.cli import main
from pydiffseq.metrics import distinct_n, sentence_bleu

REFERENCES = ["the cat is on the mat .", "what is the best way to learn guitar ?"]
CANDIDATES = [["the cat sat on the mat .", "a cat sat on the mat ."],
              ["how do i learn to play the guitar ?", "how do i learn to play guitar ?"]]
FIRST = [group[0] for group in CANDIDATES]


def write(folder, form: str) -> list[str]:
    """Arguments that name CANDIDATES and REFERENCES in files of ``form``."""
    (folder / "ref.txt").write_text("\n".join(REFERENCES) + "\n")
    words = [] if form in ("fairseq", "diffuseq") else ["--references", str(folder / "ref.txt")]
    if form == "fairseq":
        lines = [line for i in (1, 0) for line in (
            f"S-{i}\tx", f"T-{i}\t{REFERENCES[i]}", *(f"H-{i}\t-1\t{text}" for text in CANDIDATES[i]))]
        texts = {"generate.txt": lines}
    elif form == "json":
        texts = {"lists.txt": [json.dumps(group) for group in CANDIDATES]}
    elif form == "diffuseq":
        texts = {f"seed{k}.json": [json.dumps({"recover": f"[CLS] {group[k]} [SEP]", "source": "x",
                                               "reference": f"[CLS] {reference} [SEP]"})
                                   for group, reference in zip(CANDIDATES, REFERENCES, strict=True)] for k in range(2)}
    else:
        texts = {f"seed{k}.txt": [group[k] for group in CANDIDATES] for k in range(2)}
    for name, lines in texts.items():
        (folder / name).write_text("\n".join(lines) + "\n")
    return [*(str(folder / name) for name in texts), *words, "--quiet"]


def evaluate(folder, form, *words):
    out = folder / "values.json"
    assert main(["evaluate", *write(folder, form), "--json", str(out), *words]) == 0
    return json.loads(out.read_text())


@pytest.mark.parametrize("form", ["fairseq", "json", "diffuseq", "text"])
def test_every_format_gives_the_values_of_the_metrics(form, tmp_path, capsys):
    values = evaluate(tmp_path, form)
    table = capsys.readouterr().out
    assert values["sacrebleu"] == pytest.approx(sacrebleu.corpus_bleu(FIRST, [REFERENCES]).score)
    bleu = [sentence_bleu(one.split(), other.split(), "method4") for one, other in zip(FIRST, REFERENCES, strict=True)]
    assert values["sentence_bleu"] == pytest.approx(sum(bleu) / 2)
    # The scores of rouge-score 0.1.2 for these pairs, and the rest by hand.
    assert values["rouge1"] == pytest.approx((0.8333333333333334 + 0.5) / 2)
    assert values["rouge2"] == pytest.approx(0.3) and values["rougeL"] == pytest.approx((0.8333333333333334 + 0.25) / 2)
    assert values["dist1"] == pytest.approx((6 / 7 + 1) / 2) and values["length"] == 8.0
    pairs = [sentence_bleu(a.split(), b.split(), "method4") for a, b in CANDIDATES]
    assert values["self_bleu"] == pytest.approx(sum(pairs) / 2)
    assert values["div4"] == pytest.approx(
        sum(distinct_n([text.split() for text in group], 4) for group in CANDIDATES) / 2)
    assert (values["sentences"], values["candidates"], values["bert_score"]) == (2, 2, None)
    assert f"SacreBLEU                   {values['sacrebleu']:.2f}" in table and "self-BLEU" in table
    assert "BERTScore" in table and "not computed: give a local model with --bert-model DIR" in table


def test_mbr_scores_the_chosen_candidate(tmp_path, capsys):
    (tmp_path / "more").mkdir()
    CANDIDATES[0].append("a cat sat on the mat .")
    try:
        plain, chosen = (evaluate(tmp_path / "more", "json", *words) for words in ([], ["--mbr", "--mbr-metric", "f1"]))
    finally:
        CANDIDATES[0].pop()
    assert chosen["scored"] == "MBR (f1, add1, hypothesis)" and plain["scored"] == "first candidate"
    assert chosen["sacrebleu"] == pytest.approx(
        sacrebleu.corpus_bleu(["a cat sat on the mat .", FIRST[1]], [REFERENCES]).score) != plain["sacrebleu"]


def test_one_candidate_has_no_diversity_and_lowercase_counts(tmp_path, capsys):
    for name, text in {"hyp": "The Cat\n", "ref": "the cat\n"}.items():
        (tmp_path / name).write_text(text)
    out = tmp_path / "v.json"
    words = ["evaluate", str(tmp_path / "hyp"), "-r", str(tmp_path / "ref"), "--quiet", "--json", str(out)]
    assert main(words) == 0
    assert "self_bleu" not in json.loads(out.read_text()) and json.loads(out.read_text())["sentence_bleu"] == 0
    assert main([*words, "--lowercase"]) == 0
    assert json.loads(out.read_text())["sentence_bleu"] > 0
    assert "case:lc" in capsys.readouterr().out


def test_wrong_input_is_one_sentence(tmp_path, capsys, monkeypatch):
    (tmp_path / "hyp").write_text("a\nb\n")
    (tmp_path / "ref").write_text("a\n")

    def fails(*words):
        assert main(["evaluate", "--quiet", str(tmp_path / "hyp"), *words]) == 2
        return capsys.readouterr().err

    assert "sentence 0 (of" in fails() and "has no reference" in fails()
    assert "has 1 references, but there are 2 sentences" in fails("-r", str(tmp_path / "ref"))
    (tmp_path / "ref").write_text("a\nb\n")
    monkeypatch.setitem(sys.modules, "bert_score", None)
    missing = fails("-r", str(tmp_path / "ref"), "--bert-model", str(tmp_path))
    assert "BERTScore cannot be computed: the package bert-score is not there" in missing
    assert "the folder" in fails("-r", str(tmp_path / "ref"), "--json", str(tmp_path / "no" / "v.json"))
    (tmp_path / "hyp").write_text("\n".join(json.dumps({"recover": "a", "reference": r}) for r in "ab"))
    (tmp_path / "two").write_text("\n".join(json.dumps({"recover": "a", "reference": r}) for r in "ac"))
    assert "two:2 has another reference than" in fails(str(tmp_path / "two"))


def test_several_references(tmp_path, capsys):
    """From several files, where an empty line is none, or from the sentences in a row that share a source."""
    texts = {"hyp": ["a skier skis down the mountain", "the dog runs home now"],
             "one": ["skiers are skiing", "the dog runs home"], "two": ["a skier skis down the mountain", ""]}
    for name, lines in texts.items():
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
    pairs = [("ski mountain", "skiers are skiing", texts["hyp"][0]), ("ski mountain", texts["two"][0], "never scored"),
             ("dog run", "the dog runs home", texts["hyp"][1])]
    (tmp_path / "generate.txt").write_text("".join(
        f"S-{i}\t{source}\nT-{i}\t{reference}\nH-{i}\t-1\t{text}\n"
        for i, (source, reference, text) in enumerate(pairs)))
    records = [{"recover": text, "reference": reference, "source": source} for source, reference, text in pairs]
    (tmp_path / "seed1.json").write_text("".join(json.dumps(record) + "\n" for record in records))

    def scores(*words):
        assert main(["evaluate", *map(str, words), "--json", str(tmp_path / "v.json"), "--quiet"]) == 0
        return json.loads((tmp_path / "v.json").read_text())

    found = scores(tmp_path / "hyp", "-r", tmp_path / "one", tmp_path / "two")
    assert found == scores(tmp_path / "generate.txt", "--join-sources") == scores(tmp_path / "seed1.json", "--join-sources")
    assert found["sentences"] == 2 and "nrefs:var" in found["signature"]
    streams = [["skiers are skiing", "the dog runs home"], ["a skier skis down the mountain", None]]
    assert found["sacrebleu"] == pytest.approx(sacrebleu.corpus_bleu(texts["hyp"], streams).score)
    assert found["rougeL"] == pytest.approx((1 + 8 / 9) / 2)
    words = ["evaluate", str(tmp_path / "hyp"), "-r", str(tmp_path / "one"), "--join-sources", "--quiet"]
    assert main(words) == 2 and "--join-sources needs the source of each sentence" in capsys.readouterr().err
