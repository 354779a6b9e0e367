"""fairseq-generate and fairseq-interactive: every decoding option, empty and long lines."""

import math

import pytest
from toy import command, script

from pydiffseq.diffusion import SOLVERS
from pydiffseq.errors import InputError


def generate(data, path, *words):
    return command("generate", data, "--task", "diffusion_seq2seq", "--path", path, "--cpu", "--num-workers", 0,
                   "--batch-size", 5, *words)


def interactive(data, path, lines, *words):
    return command("interactive", data, "--task", "diffusion_seq2seq", "--path", path, "--cpu", "--bpe",
                   "sentencepiece", "--sentencepiece-model", data / "sentencepiece.model", "--remove-bpe",
                   "sentencepiece", *words, stdin="".join(line + "\n" for line in lines))


def test_as_a_user_types_it(data, trained):
    done = script("generate", data, "--task", "diffusion_seq2seq", "--path", trained, "--scoring", "sacrebleu",
                  "--remove-bpe", "sentencepiece", "--decode-steps", 2)
    assert done.returncode == 0, done.stderr
    assert "Generate test with beam=5: BLEU = " in done.stdout
    lines = "ba da\n\nfi"
    done = script("interactive", data, "--task", "diffusion_seq2seq", "--path", trained, "--bpe", "sentencepiece",
                  "--sentencepiece-model", data / "sentencepiece.model", "--decode-steps", 2, stdin=lines)
    assert done.returncode == 0, done.stderr
    hypotheses = [line for line in done.stdout.splitlines() if line.startswith("D-")]
    assert [line.split("\t")[0] for line in hypotheses] == ["D-0", "D-1", "D-2"]
    assert hypotheses[1] == "D-1\t0.0\t"


@pytest.mark.parametrize("solver", list(SOLVERS))
@pytest.mark.parametrize("steps", [1, 2, 20])
def test_solvers_and_steps(data, trained, solver, steps):
    run = generate(data, trained, "--solver", solver, "--decode-steps", steps, "--print-step", "--retain-iter-history",
                   "--scoring", "sacrebleu", "--remove-bpe", "sentencepiece")
    assert run.bleu().startswith("Generate test with beam=5: BLEU = ")
    assert sorted(run.lines("D")) == list(range(12))
    assert all(fields == [[str(steps)]] for fields in run.lines("I").values())
    history = run.lines("E")
    assert len(history) == 12 * steps
    for sentence, [[score, _]] in run.lines("H").items():
        assert math.isfinite(float(score))
        [[scores]] = run.lines("P")[sentence]
        assert all(float(word) <= 0 for word in scores.split())
        assert float(score) == pytest.approx(
            sum(map(float, scores.split())) / max(1, len(scores.split())), abs=1e-3)
    assert min(float(score) for [[score, _]] in run.lines("H").values()) < -0.01   # not those of the rounded prediction


def test_translation_does_not_depend_on_the_batch(data, trained):
    runs = [generate(data, trained, "--batch-size", size, "--decode-steps", 5) for size in (1, 5, 12)]
    assert runs[0].lines("H").keys() == runs[1].lines("H").keys()
    for kind in "TD":
        texts = [{i: fields[0][-1] for i, fields in run.lines(kind).items()} for run in runs]
        assert texts[0] == texts[1] == texts[2]


def test_candidates_nbest_and_seed(data, trained):
    words = ["--noise-beam", 3, "--length-beam", 2, "--nbest", 4, "--decode-steps", 3]
    run = generate(data, trained, *words)
    for hypotheses in run.lines("H").values():
        scores = [float(score) for score, _ in hypotheses]
        assert len(scores) == 4 and scores == sorted(scores, reverse=True)
    assert run.out == generate(data, trained, *words).out
    assert run.out != generate(data, trained, *words, "--decode-seed", 2).out
    few = generate(data, trained, "--nbest", 3)
    assert all(len(hypotheses) == 1 for hypotheses in few.lines("H").values())
    assert any("only 1 candidate" in message for _, message in few.log)


def test_published_options(data, trained):
    run = generate(data, trained, "--rounding", "every", "--step-end", "zero", "--final", "state", "--mbr-direction",
                   "reference", "--noise-beam", 2, "--decode-steps", 3, "--fp16")
    assert sorted(run.lines("D")) == list(range(12))


def test_interactive_lines(data, trained):
    """An empty line, also between others, gives an empty translation; a line's translation depends on it alone."""
    lines = ["ba da fi", "", "   ", "lo mi nu", "ba da fi"]
    run = interactive(data, trained, lines, "--decode-steps", 4)
    scores = {i: fields[0][0] for i, fields in run.lines("P").items()}   # of the tokens, one number each
    assert sorted(scores) == [0, 1, 2, 3, 4]
    assert scores[1] == scores[2] == "" and scores[0] and scores[0] == scores[4]
    assert run.lines("D")[1] == [["0.0", ""]]
    texts = {i: fields[0][-1] for i, fields in run.lines("D").items()}
    together = interactive(data, trained, lines, "--decode-steps", 4, "--buffer-size", 5, "--batch-size", 5)
    assert {i: fields[0][-1] for i, fields in together.lines("D").items()} == texts


def test_interactive_long_line(data, trained):
    """32 source positions: fairseq refuses, skips or truncates a longer line as its flags say."""
    long = " ".join(["ba"] * 60)
    with pytest.raises(Exception, match="skip this example with --skip-invalid-size-inputs-valid-test"):
        interactive(data, trained, [long])
    skipped = interactive(data, trained, ["fi", long, "fi"], "--skip-invalid-size-inputs-valid-test", "--decode-steps", 2)
    assert sorted(skipped.lines("D")) == [0, 2]
    cut = interactive(data, trained, ["fi", long], "--truncate-source", "--decode-steps", 2)
    assert sorted(cut.lines("D")) == [0, 1]
    assert len(cut.lines("S")[1][0][0].split()) in range(15, 33)


def test_prefix_and_constraints_are_refused(data, trained):
    with pytest.raises(ValueError, match="--prefix-size"):
        generate(data, trained, "--prefix-size", 1)


def merged(tmp_path, capsys, *outputs):
    from pydiffseq.cli import main

    paths = [tmp_path / f"{i}.txt" for i in range(len(outputs))]
    for path, output in zip(paths, outputs, strict=True):
        path.write_text(output)
    capsys.readouterr()
    assert main(["merge-generate", *map(str, paths)]) == 0
    return capsys.readouterr().out


def test_shards_together_are_what_one_process_writes(data, trained, tmp_path, capsys, monkeypatch):
    words = ["--scoring", "sacrebleu", "--remove-bpe", "sentencepiece", "--decode-steps", 2, "--noise-beam", 2,
             "--nbest", 2]
    whole = merged(tmp_path, capsys, generate(data, trained, *words).out)
    shards = [generate(data, trained, *words, "--num-shards", 3, "--shard-id", i) for i in range(3)]
    numbers = [sorted(run.lines("D")) for run in shards]
    assert all(numbers) and sorted(sum(numbers, [])) == list(range(12))
    assert merged(tmp_path, capsys, *(run.out for run in reversed(shards))) == whole
    monkeypatch.setenv("WORLD_SIZE", "2")   # torchrun
    ranks = []
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        ranks.append(generate(data, trained, *words).out)
    assert merged(tmp_path, capsys, *ranks) == whole


@pytest.mark.parametrize("scoring", ["sacrebleu", "bleu"])
def test_a_shard_without_a_batch_writes_no_sentence(data, trained, tmp_path, capsys, scoring):
    words = ["--batch-size", 12, "--required-batch-size-multiple", 1, "--decode-steps", 1, "--scoring", scoring,
             "--num-shards", 2, "--shard-id"]
    full, empty = (generate(data, trained, *words, i) for i in range(2))
    assert len(full.lines("D")) == 12 and not empty.lines("D")
    assert empty.bleu() == "Generate test with beam=5: no sentences"
    assert merged(tmp_path, capsys, empty.out, full.out) == merged(tmp_path, capsys, full.out)


@pytest.mark.parametrize(("words", "message"), [
    (("--num-shards", 2, "--shard-id", 2), r"--shard-id must be in 0\.\.1 with --num-shards 2, got 2"),
    (("--noise-beam", 0), "noise_beam must be >= 1, got 0"), (("--length-beam", -1), "length_beam must be >= 1, got -1"),
    (("--candidate-tokens", 1), "candidate_tokens must hold one candidate of a sentence, here .* tokens, got 1"),
    (("--early-stop", 1, "--final", "state"), "patience needs final 'x0_hat'"),
    (("--step-list", "no-such"), "--step-list must be one of auto, uniform, .* or a file, got 'no-such'")])
def test_bad_decoding_options(data, trained, words, message):
    with pytest.raises(InputError, match=message):
        generate(data, trained, *words)


@pytest.mark.parametrize(("text", "message"), [
    ("5 5", "must fall, got 5 after 5 at place 2"), ("2000 3", r"must hold timesteps in 0\.\.1999, got 2000 at place 1"),
    ("7\nx", "line 2: must be integers, got 'x'"), ("# none", "must have at least one timestep")])
def test_bad_step_list_files(data, trained, tmp_path, text, message):
    (tmp_path / "steps").write_text(text)
    with pytest.raises(InputError, match=f"step list {tmp_path}/steps.*{message}"):
        generate(data, trained, "--step-list", tmp_path / "steps")


def test_step_list_file_and_early_stops(data, trained, tmp_path):
    (tmp_path / "steps").write_text("1999 1000\n10")
    run = generate(data, trained, "--step-list", tmp_path / "steps", "--print-step")
    assert all(fields == [["3"]] for fields in run.lines("I").values())
    run = generate(data, trained, "--early-stop", 1, "--print-step", "--decode-steps", 20)
    steps = [int(fields[0][0]) for fields in run.lines("I").values()]
    assert min(steps) < 20
    saved, = (message for _, message in run.log if message.startswith("early stopping saved"))
    assert saved.startswith(f"early stopping saved {12 * 20 - sum(steps)} of 240 denoising steps") or len(set(steps)) > 1
