"""What tools/kernel_report.py reads from ptxas, and what it calls a problem."""

from pathlib import Path

import pytest
import scripts

PATH = Path(__file__).resolve().parents[2] / "tools" / "kernel_report.py"
PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z20copy_kernelPf' for 'sm_80'
ptxas info    : Function properties for _Z20copy_kernelPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 24 registers, used 1 barriers, 1040 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function '_Z24attention_forward_kernelPf' for 'sm_80'
ptxas info    : Function properties for _Z24attention_forward_kernelPf
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
"""
SASS = """\
		Function : _Z20copy_kernelPf
        /*0000*/                   LDG.E R2, [R2] ;
		Function : _Z24attention_forward_kernelPf
        /*0010*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0020*/                   HGMMA.64x64x16.F32 R24, gdesc[UR8], R24 ;
"""


@pytest.fixture
def report():
    return scripts.load(PATH)


def test_registers_spills_and_shared_memory(report):
    copy, attention = report.parse(PTXAS, "x.cu", "80")
    assert (copy.registers, copy.stack, copy.spills, copy.shared) == (24, 0, 0, 1040) and copy.problems() == []
    assert (attention.registers, attention.stack, attention.spills) == (255, 8, 16)
    assert attention.problems() == ["8 bytes of stack, 16 bytes of spills"]


def test_tensor_core_instructions_are_counted(report, tmp_path):
    dump = tmp_path / "cuobjdump"
    dump.write_text(f"#!/bin/sh\ncat <<'END'\n{SASS}END\n")
    dump.chmod(0o755)
    kernels = report.parse(PTXAS, "x.cu", "80")
    assert report.count_tensor_instructions(str(dump), tmp_path / "x.o", kernels) == []
    assert [kernel.tensor for kernel in kernels] == [0, 2]
    kernels[1].tensor, kernels[1].stack, kernels[1].spills = 0, 0, 0
    assert kernels[1].problems() == ["no tensor-core instruction (HMMA, HGMMA)"] and kernels[0].problems() == []


def test_a_compile_error_and_a_warning_are_problems(report, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'x.cu(3): warning #177-D: declared but never referenced' >&2\nexit 2\n")
    nvcc.chmod(0o755)
    kernels, problems, _ = report.compile_file(str(nvcc), Path("x.cu"), "80", tmp_path)
    assert kernels == [] and problems == ["x.cu sm_80: x.cu(3): warning #177-D: declared but never referenced"]
