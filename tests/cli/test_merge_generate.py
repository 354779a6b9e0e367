"""pydiffseq merge-generate: order, completeness, the score line, and what is no output of fairseq-generate."""

import pytest
import sacrebleu

from pydiffseq.cli import main


def block(number, target, hypothesis):
    return (f"S-{number}\tein wort\nT-{number}\t{target}\nH-{number}\t-0.5\t{hypothesis}\nD-{number}\t-0.5\t{hypothesis}\n"
            f"P-{number}\t-0.5 -0.5\nH-{number}\t-0.9\tsecond\nD-{number}\t-0.9\tsecond\nE-{number}_0\tx\n")


TEXTS = {12: ("a small house .", "a small house ."), 3: ("he runs , too .", "he runs ."),
         0: ("yes , we can .", "yes we can .")}
BLOCKS = {number: block(number, *texts) for number, texts in TEXTS.items()}
SCORE = "Generate test with beam=5: BLEU = 12.30 1.0/2.0 (BP = 1.000)\n"


def merged(tmp_path, capsys, *contents):
    paths = [tmp_path / f"{i}.txt" for i in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_text(content)
    status = main(["merge-generate", *map(str, paths)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_sentences_come_in_order_and_logs_are_left_out(tmp_path, capsys):
    log = "2026-01-01 00:00:00 | INFO | fairseq.tasks | loaded\n"
    status, out, err = merged(tmp_path, capsys, log + BLOCKS[12] + log + BLOCKS[0], BLOCKS[3])
    assert (status, out, err) == (0, BLOCKS[0] + BLOCKS[3] + BLOCKS[12], "")


def test_one_file_keeps_its_score(tmp_path, capsys):
    assert merged(tmp_path, capsys, BLOCKS[3] + BLOCKS[0] + SCORE)[1] == BLOCKS[0] + BLOCKS[3] + SCORE


def test_sacrebleu_of_all_is_computed_anew(tmp_path, capsys):
    _, out, err = merged(tmp_path, capsys, BLOCKS[12] + BLOCKS[0] + SCORE, BLOCKS[3] + SCORE)
    targets, hypotheses = zip(*(TEXTS[number] for number in (0, 3, 12)), strict=True)
    bleu = sacrebleu.corpus_bleu(list(hypotheses), [list(targets)])
    assert out.splitlines()[-1] == f"Generate test with beam=5: {bleu.format()}" and not err


def test_another_score_is_left_out_with_a_word(tmp_path, capsys):
    score = "Generate test with beam=5: BLEU4 = 12.30, 1.0/2.0 (BP=1.000)\n"
    status, out, err = merged(tmp_path, capsys, BLOCKS[0] + score, BLOCKS[3] + score)
    assert (status, out) == (0, BLOCKS[0] + BLOCKS[3]) and "no score of all" in err


@pytest.mark.parametrize(("contents", "message"), [
    ((BLOCKS[0], BLOCKS[3] + BLOCKS[0]), "sentence 0 is in .*0.txt and in .*1.txt; give each shard once"),
    ((BLOCKS[0] + BLOCKS[3] + BLOCKS[0],), "sentence 0 is twice in .*0.txt, again in line 17"),
    (("nothing\n",), "0.txt must be the output of fairseq-generate, but has no S-, H- or D-lines")])
def test_bad_input(tmp_path, capsys, contents, message):
    import re

    status, out, err = merged(tmp_path, capsys, *contents)
    assert (status, out) == (2, "") and re.search(message, err) and err.count("\n") == 1
