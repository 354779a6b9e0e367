"""The stock fairseq commands find the plug-in: the autoload hook, --user-dir, hydra, and the repairs of fairseq."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def python(code, *argv, folders=(ROOT,), site=True, **environment):
    """Run ``code`` in a fresh interpreter; ``site=False`` leaves out site-packages and with it every .pth file."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYDIFFSEQ_")} | environment
    env["PYTHONPATH"] = os.pathsep.join(map(str, folders))
    command = [sys.executable, *([] if site else ["-S"]), "-c", code, *argv]
    # -c puts the working folder first on the path: not that of the repository.
    return subprocess.run(command, env=env, cwd=ROOT.anchor, capture_output=True, text=True, timeout=120)


def passes(code, *argv, **options):
    done = python(code, *argv, **options)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture
def stand_ins(tmp_path):
    """A fairseq that records when it is complete, and a pydiffseq whose plug-in says so when it is imported."""
    (tmp_path / "fairseq").mkdir()
    (tmp_path / "fairseq/__init__.py").write_text("import fairseq.options\ncomplete = True\n")
    (tmp_path / "fairseq/options.py").write_text("")
    (tmp_path / "pydiffseq/fairseq_plugin").mkdir(parents=True)
    (tmp_path / "pydiffseq/__init__.py").write_text("")
    (tmp_path / "pydiffseq/fairseq_plugin/__init__.py").write_text(
        "import fairseq\nprint('registered, fairseq complete:', fairseq.complete)\n")
    (tmp_path / "pydiffseq_autoload.py").write_bytes((ROOT / "pydiffseq_autoload.py").read_bytes())
    return tmp_path


IMPORT = "import pydiffseq_autoload, fairseq"


def test_hook_registers_after_fairseq(stand_ins):
    done = passes(IMPORT, folders=[stand_ins], site=False)
    assert done.stdout == "registered, fairseq complete: True\n"


def test_hook_survives_the_question_whether_fairseq_is_there(stand_ins):
    """``find_spec`` without an import, as many libraries call it, must not use the hook up."""
    code = "import pydiffseq_autoload, importlib.util as u; assert u.find_spec('fairseq') and u.find_spec('fairseq')"
    assert passes(code, folders=[stand_ins], site=False).stdout == ""
    done = passes(f"{code}; import fairseq, sys; assert 'PluginFinder' not in repr(sys.meta_path)", folders=[stand_ins],
                  site=False)
    assert done.stdout == "registered, fairseq complete: True\n"


def test_hook_costs_no_import():
    """Run at every interpreter start, the hook loads neither torch, fairseq nor the package."""
    code = "import pydiffseq_autoload, sys; assert {'torch', 'fairseq', 'pydiffseq'}.isdisjoint(sys.modules)"
    passes(code, site=False)
    assert (ROOT / "pydiffseq.pth").read_text() == "import pydiffseq_autoload\n"


def test_hook_off_switch(stand_ins):
    assert passes(IMPORT, folders=[stand_ins], site=False, PYDIFFSEQ_AUTOLOAD="0").stdout == ""


def test_hook_survives_missing_fairseq():
    done = python(IMPORT, site=False)
    assert done.returncode == 1 and "ModuleNotFoundError: No module named 'fairseq'" in done.stderr
    passes("import pydiffseq_autoload, importlib.util as u; assert u.find_spec('fairseq') is None", site=False)


def test_hook_ignores_a_folder_named_fairseq(tmp_path):
    """A checkout of fairseq in the working folder is a namespace package; it has nothing to register with."""
    (tmp_path / "fairseq").mkdir()
    assert passes(IMPORT, folders=[ROOT, tmp_path], site=False).stderr == ""


def test_broken_plugin_does_not_take_fairseq_away(stand_ins):
    (stand_ins / "pydiffseq/fairseq_plugin/__init__.py").write_text("raise RuntimeError('broken')\n")
    done = passes(IMPORT + "; assert fairseq.complete", folders=[stand_ins], site=False)
    assert done.stderr.startswith("pydiffseq: the fairseq plug-in was not loaded (RuntimeError: broken)")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "form", ["--user-dir {}", "--user-dir={}", "common.user_dir={}", "--user-dir {}/fairseq_plugin"])
def test_user_dir_of_another_copy_wins(stand_ins, tmp_path_factory, form):
    other = tmp_path_factory.mktemp("other") / "pydiffseq"
    (other / "fairseq_plugin").mkdir(parents=True)
    assert passes(IMPORT, *form.format(other).split(), folders=[stand_ins], site=False).stdout == ""
    same = stand_ins / "pydiffseq"
    assert passes(IMPORT, *form.format(same).split(), folders=[stand_ins], site=False).stdout
    assert passes(IMPORT, "--user-dir", "my_plugin", folders=[stand_ins], site=False).stdout


CHOICES = """
from fairseq import options
for parser in (options.get_training_parser(), options.get_generation_parser(interactive=True),
               options.get_validation_parser()):
    choices = {action.dest: action.choices for action in parser._actions}
    assert "diffusion_seq2seq" in choices["task"], sorted(choices["task"])
    assert "arch" not in choices or "ar_diffusion" in choices["arch"]
"""


@pytest.fixture(scope="module")
def fairseq():
    return pytest.importorskip("fairseq")


def test_commands_know_the_task(fairseq):
    """With the hook, no --user-dir; with one that names the package in any spelling, fairseq does not complain."""
    own = ("pydiffseq", "pydiffseq/fairseq_plugin", str(ROOT / "pydiffseq"), str(ROOT / "pydiffseq" / "fairseq_plugin"),
           str(ROOT / "docs" / ".." / "pydiffseq"))
    passes(f"import pydiffseq_autoload{CHOICES}\nimport argparse\nfrom fairseq import utils\n"
           f"for folder in {own!r}:\n    utils.import_user_module(argparse.Namespace(user_dir=folder))\n")


@pytest.mark.parametrize("folder", ["pydiffseq", "pydiffseq/fairseq_plugin"])
def test_user_dir_without_the_hook(fairseq, folder):
    passes(CHOICES, "--user-dir", str(ROOT / folder), PYDIFFSEQ_AUTOLOAD="0")


def test_hydra_finds_the_plugin_without_the_hook(fairseq):
    passes("import sys\nsys.meta_path = [finder for finder in sys.meta_path if 'PluginFinder' not in repr(finder)]\n"
           "import fairseq\nfrom fairseq.tasks import TASK_REGISTRY\nassert 'diffusion_seq2seq' not in TASK_REGISTRY\n"
           "from hydra.core.plugins import Plugins\nPlugins.instance()\nassert 'diffusion_seq2seq' in TASK_REGISTRY\n")


@pytest.mark.parametrize(("flags", "tpu"), [(["--bf16"], False), (["--bf16", "--tpu"], True), ([], False)])
def test_bf16_does_not_imply_tpu(fairseq, monkeypatch, flags, tpu):
    from fairseq import options

    from pydiffseq.fairseq_plugin import compat

    compat.apply()
    words = ["data", "--task", "translation", "--arch", "transformer", *flags]
    assert options.parse_args_and_arch(options.get_training_parser(), words).tpu is tpu
    parsed, extra = options.parse_args_and_arch(options.get_training_parser(), [*words, "--mine"], parse_known=True)
    assert parsed.tpu is tpu and extra == ["--mine"]
    monkeypatch.setattr(sys, "argv", ["fairseq-train", *words])
    assert options.parse_args_and_arch(options.get_training_parser()).tpu is tpu


def test_checkpoint_types_load_with_weights_only(fairseq, tmp_path):
    """What fairseq's checkpoints hold (legacy Namespace, omegaconf, meters of numpy numbers) loads safely."""
    from omegaconf import OmegaConf

    from pydiffseq.fairseq_plugin import compat

    compat.apply()
    state = {"args": argparse.Namespace(arch="x"), "cfg": OmegaConf.create({"model": {"dim": 4, "layers": [1, 2]}}),
             "meters": [np.float64(1.5), np.int64(3), np.arange(4), np.float32(2)], "epoch": 1}
    torch.save(state, tmp_path / "checkpoint.pt")
    loaded = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert loaded["args"].arch == "x" and loaded["cfg"].model.layers == [1, 2]
    assert loaded["meters"][0] == 1.5 and loaded["meters"][2].tolist() == [0, 1, 2, 3]
