"""How tools/gpu_check.py runs its stages: what fails, hangs or is missing is reported and hides nothing else."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import scripts

PATH = Path(__file__).resolve().parents[2] / "tools" / "gpu_check.py"


@pytest.fixture
def check():
    return scripts.load(PATH)


def python(code):
    return lambda: [sys.executable, "-c", code]


def run_main(check, monkeypatch, out, stages, minutes="1"):
    monkeypatch.setattr(check, "stages", lambda *_: stages)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(out), "--minutes", minutes])
    return check.main()


def test_every_stage_is_run_and_reported(check, monkeypatch, tmp_path, capsys):
    def no_gpu():
        raise RuntimeError("torch sees no GPU")

    def no_tool():
        raise check.LeftOut("compute-sanitizer was not found")

    benchmark = f"import pathlib; pathlib.Path({str(tmp_path / 'benchmarks.json')!r}).write_text('{{\"cases\": [1]}}')"
    sleeper = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    started = time.monotonic()
    status = run_main(check, monkeypatch, tmp_path, [
        check.Stage("environment", python("print('hello')"), 30), check.Stage("build", no_gpu, 30),
        check.Stage("CUDA tests", python("print('1 failed'); raise SystemExit(3)"), 30),
        check.Stage("missing", lambda: ["/nowhere/program"], 30), check.Stage("hangs", python(sleeper), 6),
        check.Stage("benchmarks", python(benchmark + "; print('| table |')"), 30), check.Stage("memcheck", no_tool, 30)])
    assert status == 1 and time.monotonic() - started < 30
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert {s["name"]: s["status"] for s in report["stages"]} == {
        "environment": "ok", "build": "failed to start", "CUDA tests": "exit status 3", "missing": "failed to start",
        "hangs": "timed out after 6 s", "benchmarks": "ok", "memcheck": "left out"}
    assert report["benchmarks"] == {"cases": [1]} and report["decoding"] == {}
    text, log = (tmp_path / "gpu_check.md").read_text(), (tmp_path / "gpu_check.log").read_text()
    assert "1 failed" in text and "RuntimeError: torch sees no GPU" in text and "| table |" in text
    assert "hello" in log and "hello" not in text and "compute-sanitizer was not found" in log
    assert "CUDA tests: exit status 3" in capsys.readouterr().out


def test_all_good_is_status_0_and_no_time_left_is_not(check, monkeypatch, tmp_path):
    stages = [check.Stage("environment", python("pass"), 30)]
    assert run_main(check, monkeypatch, tmp_path, stages) == 0
    assert run_main(check, monkeypatch, tmp_path, stages, minutes="0.01") == 1
    assert stages[0].status == "no time left"


def test_the_real_stages_can_be_made(check, tmp_path, monkeypatch):
    monkeypatch.setattr(check, "architecture", lambda: "90-real")
    monkeypatch.setattr(check.shutil, "which", lambda name, path=None: f"/bin/{name}")
    stages = {stage.name: stage.command() for stage in check.stages(tmp_path, 10)}
    assert "-DCMAKE_CUDA_ARCHITECTURES=90-real" in stages["build"][2] and "--tool" in stages["racecheck"]
    for name, command in stages.items():
        script = [word for word in command if word.endswith(".py")]
        assert all(Path(word).is_file() for word in script), name
        if command[0] == "bash":
            subprocess.run(["bash", "-n", "-c", command[2]], check=True)


def test_decoding_is_measured_without_fairseq(check, tmp_path):
    (tmp_path / "fairseq.py").write_text("raise ImportError('not on that machine')")
    out = tmp_path / "out"
    out.mkdir()
    smaller = ["--device", "cpu", "--batches", "1", "--candidates", "1", "--steps", "2", "--seconds", "0"]
    command = [word for word in check.decoding(out) if word != "transformer float16"] + smaller
    run = check.Stage("decoding", lambda: command, 120, {"PYTHONPATH": f"{check.ROOT}{check.os.pathsep}{tmp_path}"})
    check.run(run, tmp_path / "log", time.monotonic() + 120)
    assert run.status == "ok", run.output
    check.report([run], out)
    measured = json.loads((out / "gpu_check.json").read_text())["decoding"]
    assert [m["contender"] for m in measured] == ["pydiffseq bfloat16", "pydiffseq bfloat16 without graphs"]
    assert all(m["sentences_per_second"] > 0 for m in measured)
    table = (out / "gpu_check.md").read_text()
    assert "| pydiffseq bfloat16 | pydiffseq bfloat16 without graphs |" in table
    assert "| iwslt14 | padded | 1 | 1 | 2 | " in table
