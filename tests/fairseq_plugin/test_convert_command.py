"""`pydiffseq convert`: fairseq-generate says on the converted file what the official weights say on official ids."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from official import HEADS, LONGEST, POSITIONS, V, ar_diffusion, diffuseq
from test_generate_command import generate
from toy import load

from pydiffseq.cli import main
from pydiffseq.convert import load_official
from pydiffseq.decoding import DecodeOptions, decode

TOKENS = ["[PAD]", "ba", "[UNK]", "di", "[SEP]", "fo", "##gu", "[CLS]", "[MASK]", "ko", "li", "mu", "na"]
PAD, UNK, EOS, BOS = 0, 2, 4, 7
SOURCE, TARGET = ["ba di fo", "li", "ko ##gu mu na ba", "fo fo"], ["na", "ba ##gu", "di", "li"]


# system -> options that its tensors do not tell, decoding as published but for the steps
SYSTEMS = {
    "ar_diffusion": ({"target_length": LONGEST, "eos": EOS}, {"steps": 6, "step_end": "zero", "final": "state"}),
    "diffuseq": ({"sequence_length": POSITIONS, "heads": HEADS, "bos": BOS, "eos": EOS}, {"steps": 6, "solver": "ddim"})}


def official_state(system="ar_diffusion"):
    """One vocabulary for both sides, and weights under which sentences come out different."""
    state, draw = {"ar_diffusion": ar_diffusion, "diffuseq": diffuseq}[system](), torch.Generator().manual_seed(6)
    for name in {"encoder.embeddings.word_embeddings.weight", "word_embedding.weight"} & state.keys():
        state[name] = 2 * F.normalize(torch.randn(V, state[name].shape[1], generator=draw))
    state["lm_head.bias"] = torch.randn(V, generator=draw) / 10
    state["output_down_proj.2.weight"] *= 3
    state["output_down_proj.2.bias"] *= 0
    return state | {"lm_head.weight": state["word_embedding.weight"]}


@pytest.fixture
def files(tmp_path):
    """The weights inside a training checkpoint of the official code, and the vocabulary."""
    torch.save({"model_dict": official_state(), "optimizer_dict": {"state": {}}, "offset": 7}, tmp_path / "ema.pt")
    (tmp_path / "vocab.txt").write_text("\n".join(TOKENS) + "\n")
    return tmp_path


def convert(folder, *words, system="ar_diffusion"):
    return main(["convert", str(folder / "ema.pt"), str(folder / "model.pt"), "--system", system, "--vocab",
                 str(folder / "vocab.txt"), *words])


@pytest.mark.parametrize("system", SYSTEMS)
def test_fairseq_generate_decodes_as_the_official_ids_would(files, capsys, system):
    torch.save({f"module.{name}": value for name, value in official_state(system).items()}, files / "ema.pt")
    told, decoding = SYSTEMS[system]
    first = system == "ar_diffusion"   # whose sentences begin with <s>; DiffuSeq's layout adds it
    assert convert(files, *(f"-O{name}={value}" for name, value in told.items()), system=system) == 0
    out = capsys.readouterr().out
    assert "13 entries" in out and ("put <s> before every line" in out) == first
    assert (files / "dict.txt").read_text().split("\n")[0] == "ba 1"
    for name, lines in {"train.de": SOURCE, "train.en": TARGET, "test.de": SOURCE, "test.en": TARGET}.items():
        (files / name).write_text("".join(f"{'<s> ' if first else ''}{line}\n" for line in lines))
    assert main(["prepare", "-s", "de", "-t", "en", "--trainpref", str(files / "train"), "--testpref", str(files / "test"),
                 "--srcdict", str(files / "dict.txt"), "--destdir", str(files / "data"), "--quiet"]) == 0
    options = {"steps": "--decode-steps", "step_end": "--step-end", "final": "--final", "solver": "--solver"}
    words = [word for name, value in decoding.items() for word in (options[name], value)]
    run = generate(files / "data", files / "model.pt", *words)
    hypotheses = {number: lines[0][1] for number, lines in run.lines("H").items()}

    network = load_official(system, official_state(system), **told)
    rows = [[*([BOS] if first else []), *(TOKENS.index(word) for word in line.split()), EOS] for line in SOURCE]
    source = torch.full((len(rows), max(map(len, rows))), PAD)
    for i, row in enumerate(rows):
        source[i, :len(row)] = torch.tensor(row)
    expected = decode(network, source, torch.arange(len(rows)), DecodeOptions(**decoding))
    names = dict(enumerate(TOKENS)) | {UNK: "<unk>"}
    for number, group in enumerate(expected):
        words = [names[token] for token in group[0].tokens.tolist() if token != BOS]
        assert hypotheses[number] == " ".join(words)
    assert len(set(hypotheses.values())) > 1 and any(hypotheses.values())


def test_json_vocabulary_and_options(files):
    ids = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", "<mask>", *"abcdefgh"])}
    (files / "vocab.json").write_text(json.dumps(dict(reversed(ids.items()))))
    words = ["--vocab", str(files / "vocab.json"), "--dict", str(files / "bpe.txt")]
    assert convert(files, "-O", f"target_length={LONGEST}", "-O", "dropout=0.25", "-O", "scale_embedding=true", *words) == 0
    checkpoint = load(files / "model.pt")
    assert checkpoint["cfg"]["model"]["dropout"] == 0.25 and checkpoint["cfg"]["model"]["scale_embedding"] is True
    assert [line.split()[0] for line in (files / "bpe.txt").read_text().splitlines()] == ["<mask>", *"abcdefgh"]
    table = checkpoint["model"]["net.embedding.weight"]
    order = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *"abcdefgh"]
    assert torch.equal(table, official_state()["word_embedding.weight"][[ids[token] for token in order]])


def test_wrong_input_leaves_nothing(files, capsys):
    told = ("-O", f"target_length={LONGEST}")

    def fails(*words):
        assert convert(files, *words) == 2
        assert not list(files.glob("model.pt*")) and not (files / "dict.txt").exists()
        return capsys.readouterr().err

    assert "the tensors do not tell target_length" in fails()
    assert "the option heads takes a value of type int, got 'two'" in fails("-O", "heads=two")
    assert "takes NAME=VALUE with an option of the model, got 'wings=2'" in fails("-O", "wings=2")
    assert "no vocabulary" in fails(*told, "--vocab", str(files / "none.txt"))
    for text, message in {
        "\n".join(TOKENS[:-1]): "has 12 tokens, but the embedding table has 13 rows",
        "\n".join(["[X]", *TOKENS[1:]]): "must have one token for <pad> (any of <pad>, [PAD]), it has none",
        "\n".join([*TOKENS[:-1], "ba"]): "token 1 of the vocabulary ('ba') is there twice",
    }.items():
        (files / "vocab.txt").write_text(text + "\n")
        assert message in fails(*told)
    (files / "v.json").write_text('{"a": 0, "b": 2}')
    assert "is not a JSON object of tokens and their ids" in fails(*told, "--vocab", str(files / "v.json"))
    torch.save({"model_dict": {"a": torch.zeros(1)}}, files / "ema.pt")
    assert "1 unknown (a)" in fails(*told)

    class Unsafe:
        def __reduce__(self):
            return (Path(files / "executed").write_text, ("x",))

    torch.save({"model_dict": Unsafe()}, files / "ema.pt")
    assert "is not a readable checkpoint" in fails(*told) and not (files / "executed").exists()
