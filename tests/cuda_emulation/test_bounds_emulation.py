"""No kernel reads or writes outside the tensors it is given: guarded.py runs the self-checks between forbidden pages."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("guarded.py")


def run(emulation, *families):
    command = [sys.executable, str(SCRIPT), emulation.__file__, *families]
    return subprocess.run(command, capture_output=True, text=True, cwd=SCRIPT.parents[2])


@pytest.mark.parametrize("families", [("noise", "dropout", "geglu", "cross_entropy"), ("nearest",),
                                      ("timestep_attention", "packed_timestep_attention")])
def test_the_self_checks_stay_inside_their_tensors(emulation, families):
    done = run(emulation, *families)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == [f"{family} ok" for family in families]


@pytest.mark.parametrize("fault", ["behind", "in front"])
def test_the_guard_notices(emulation, fault):
    done = run(emulation, fault)
    assert done.returncode < 0 and "Segmentation fault" in done.stderr
