"""What nvcc makes of the CUDA sources, on any machine that has it: they compile plainly, and spill nothing."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = sorted((Path(__file__).parents[2] / "csrc").rglob("*.cu"))
FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-Werror=all-warnings", "-Xptxas=-v"]
OPERATORS = ("squared_norm_kernel", "add_up_kernel", "perturb_kernel", "restore_kernel", "select_top_kernel")
REGISTERS = 64  # with these, 1024 threads fit on a multiprocessor


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc was not found")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_compiles_without_torch_stack_or_spills(source, architecture, tmp_path):
    command = ["nvcc", *FLAGS, "-cubin", f"-arch={architecture}", "-o", tmp_path / "kernels.cubin", source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores,"
        r" (\d+) bytes spill loads.*?Used (\d+) registers",
        done.stderr,
        flags=re.DOTALL,
    )
    for operator in OPERATORS:
        assert any(operator in name for name, *_ in kernels)
    for name, stack, stores, loads, registers in kernels:
        assert (stack, stores, loads) == ("0", "0", "0"), name
        assert int(registers) <= REGISTERS, name
