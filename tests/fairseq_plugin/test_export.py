"""`pydiffseq export`: the file translates like the checkpoint, is small, and wrong input gives one sentence."""

import pytest
import torch
from test_generate_command import generate, interactive
from toy import load, train

from pydiffseq.cli import main


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_same_translations(data, trained, tmp_path, capsys, dtype):
    out = tmp_path / "small.pt"
    assert main(["export", str(trained), str(out), "--dtype", dtype]) == 0
    assert dtype in capsys.readouterr().out
    assert out.stat().st_size < trained.stat().st_size / (3 if dtype == "float32" else 5)
    state = load(out)
    assert {value.dtype for value in state["model"].values()} == {getattr(torch, dtype)}
    runs = [generate(data, path, "--decode-steps", 5).lines("H") for path in (trained, out)]
    same = [runs[0][i][0][1] == runs[1][i][0][1] for i in runs[0]]
    assert all(same) if dtype == "float32" else sum(same) >= 10
    lines = [interactive(data, path, ["ba da fi", "lo"], "--decode-steps", 5).lines("D") for path in (trained, out)]
    assert lines[0].keys() == lines[1].keys()
    if dtype == "float32":
        assert lines[0][0][0][1] == lines[1][0][0][1]


def test_fine_tuning_from_an_export(data, trained, tmp_path):
    """Training cannot go on from it, but can start from its weights."""
    out = tmp_path / "small.pt"
    assert main(["export", str(trained), str(out), "--dtype", "float32"]) == 0
    run = train(data, tmp_path / "tuned", "--length-policy", "predict", "--lr", 0.001, "--max-update", 1, "--ema-rate",
                0.9, "--finetune-from-model", out)
    assert run.stats("train_inner")[-1]["num_updates"] == 1
    tuned, source = load(tmp_path / "tuned/checkpoint_last.pt")["model"], load(out)["model"]
    assert (tuned["net.positions.weight"] - source["net.positions.weight"]).abs().max() < 2e-3


def test_wrong_input_leaves_nothing(trained, tmp_path, capsys, monkeypatch):
    def fails(*words):
        assert main(["export", *map(str, words)]) == 2
        return capsys.readouterr().err

    (tmp_path / "there.pt").write_text("mine")
    assert "exists; give another name or --overwrite" in fails(trained, tmp_path / "there.pt")
    assert (tmp_path / "there.pt").read_text() == "mine"
    assert "does not exist" in fails(tmp_path / "none.pt", tmp_path / "out.pt")
    (tmp_path / "cut.pt").write_bytes(trained.read_bytes()[:4000])
    assert "is not a readable checkpoint" in fails(tmp_path / "cut.pt", tmp_path / "out.pt")
    torch.save({"model": {"encoder.weight": torch.zeros(2)}, "cfg": {"model": {}}}, tmp_path / "foreign.pt")
    assert "holds no pydiffseq model" in fails(tmp_path / "foreign.pt", tmp_path / "out.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    assert "holds no pydiffseq model" in fails(tmp_path / "list.pt", tmp_path / "out.pt")
    assert "folder" in fails(trained, tmp_path / "nowhere" / "out.pt")

    def full(state, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    assert "No space left on device" in fails(trained, tmp_path / "out.pt")
    assert not list(tmp_path.glob("out.pt*"))
