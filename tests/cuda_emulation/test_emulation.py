"""The emulation notices what it is there to notice: kernels with one mistake each, in faulty.cu."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
FAULTS = ("none", "no_barrier", "no_wait", "lanes_apart", "barrier_apart", "outside", "unaligned", "behind", "too_much",
          "odd_vector")


@pytest.fixture(scope="module")
def faulty(load):
    return load("faulty", [HERE / "faulty.cu", HERE.parents[1] / "csrc" / "cuda" / "emulation" / "emulation.cpp"])


def reverse(faulty, fault, order=0):
    source, target = torch.arange(64.0), torch.zeros(64)
    faulty.set_order(order)
    faulty.reverse(source.data_ptr(), target.data_ptr(), FAULTS.index(fault))
    return target


@pytest.mark.parametrize("order", range(3))
def test_a_correct_kernel(faulty, order):
    assert torch.equal(reverse(faulty, "none", order), torch.arange(63.0, -1.0, -1.0))


def test_a_missing_barrier_shows_when_a_warp_runs_ahead(faulty):
    results = [reverse(faulty, "no_barrier", order) for order in range(3)]
    assert any(not torch.equal(result, torch.arange(63.0, -1.0, -1.0)) for result in results)


def test_a_copy_that_is_not_waited_for_reads_as_nan(faulty):
    assert reverse(faulty, "no_wait").isnan().all()


@pytest.mark.parametrize("fault, message", [
    ("lanes_apart", "the lanes of a warp are in different operations"), ("barrier_apart", "at different barriers"),
    ("outside", "cp.async outside shared memory"), ("unaligned", "not aligned"),
    ("behind", "wrote behind its shared memory"),
    ("too_much", "more shared memory than sm_86 has")])
def test_what_a_device_would_punish_is_an_error(faulty, fault, message):
    with pytest.raises(RuntimeError, match=message):
        reverse(faulty, fault)
    assert torch.equal(reverse(faulty, "none"), torch.arange(63.0, -1.0, -1.0))


def test_a_vector_that_is_not_aligned_ends_the_process(faulty):
    code = ("import importlib.util, sys, torch; spec = importlib.util.spec_from_file_location('faulty', sys.argv[1]); "
            "faulty = importlib.util.module_from_spec(spec); spec.loader.exec_module(faulty); x = torch.zeros(128); "
            "faulty.reverse(x.data_ptr(), x.data_ptr() + 256, int(sys.argv[2]))")
    status = [subprocess.run([sys.executable, "-c", code, faulty.__file__, str(FAULTS.index(fault))]).returncode
              for fault in ("none", "odd_vector")]
    assert status[0] == 0 and status[1] < 0
