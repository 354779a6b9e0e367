"""`pydiffseq info` and the command itself."""

import json
import subprocess
import sys

import pytest

from pydiffseq.cli import COMMANDS, info, main
from pydiffseq.version import __version__


def report(capsys):
    assert main(["info", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_text_lists_versions_devices_and_ops(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for part in ("versions", "devices", "compiled kernels", __version__, *info.KERNELS):
        assert part in text
    assert all(len(line) < 200 for line in text.splitlines())


def test_every_op_is_listed():
    """The table names exactly the public ops, and the functions that it looks for are those of the extension."""
    import pydiffseq.ops as ops
    from pydiffseq.ops._extension import C

    assert set(info.KERNELS) == set(ops.__all__) - {"draw_seed"}
    if C is not None:
        assert all(hasattr(C, kernel) for kernel in info.KERNELS.values())


def test_report_agrees_with_the_extension(capsys):
    from pydiffseq.ops._extension import C

    values = report(capsys)
    assert values["extension"]["compiled"] == (C is not None)
    if C is not None:
        assert values["extension"]["isa"] == C.isa()
        assert values["ops"]["q_sample"]["cpu"] == C.isa()


def test_without_the_extension(capsys, monkeypatch):
    monkeypatch.setenv("PYDIFFSEQ_EXTENSION", "0")
    values = report(capsys)
    assert not values["extension"]["compiled"]
    assert {targets["cpu"] for targets in values["ops"].values()} == {"plain torch"}
    assert {"what": "the compiled kernels, switched off by PYDIFFSEQ_EXTENSION=0",
            "mend": "unset PYDIFFSEQ_EXTENSION"} in values["missing"]


def test_extension_that_was_not_built(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydiffseq._C", None)
    values = report(capsys)
    assert any("C++17 compiler" in problem["mend"] for problem in values["missing"])
    assert main(["info"]) == 0
    assert "the ops run on plain torch" in capsys.readouterr().out


@pytest.mark.parametrize(("module", "package"), [("fairseq", "fairseq-fixed"), ("tqdm", "tqdm")])
def test_missing_packages_come_with_a_command(capsys, monkeypatch, module, package):
    find_spec = info.importlib.util.find_spec
    monkeypatch.setattr(info.importlib.util, "find_spec", lambda name: None if name == module else find_spec(name))
    values = report(capsys)
    assert values["versions"][module] is None
    assert f"pip install {package}" in [problem["mend"] for problem in values["missing"]]


def test_command_line(capsys):
    """--version, --help, an unknown command, `python -m pydiffseq.cli`; the help is quick as it imports no torch."""
    for option, expected in (("--version", f"pydiffseq {__version__}"), ("--help", "prepare")):
        with pytest.raises(SystemExit) as stop:
            main([option])
        assert stop.value.code == 0
        assert expected in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["translat"])
    assert stop.value.code == 2
    assert "prepare" in capsys.readouterr().err
    code = "import sys, pydiffseq.cli as cli; cli.build_parser('prepare'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    command = [sys.executable, "-m", "pydiffseq.cli", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"pydiffseq {__version__}"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "(default: None)" not in capsys.readouterr().out
