"""The CUDA operators, compiled for the CPU and run there: the tests of all backends, and of what only they have."""

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from esam_kernels.ops import native

ROOT = Path(__file__).parents[2]
EMULATOR = Path(__file__).with_name("cuda_emulator")
COMPILER = os.environ.get("CXX", "c++")
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-ffp-contract=off", "-pthread", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
FLAGS += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror", "-DUSE_CUDA"]
FLAGS += os.environ.get("CXXFLAGS", "").split()

pytestmark = pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"{COMPILER} was not found")


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A folder with the package, whose native operators on the CPU are the CUDA ones."""
    folder = tmp_path_factory.mktemp("emulated")
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    shutil.copytree(ROOT / "esam_kernels", folder / "esam_kernels", ignore=shutil.ignore_patterns("*.so", "*.json"))
    operators = folder / "csrc/cuda/operators.cpp"
    registration = "STABLE_TORCH_LIBRARY_IMPL(esam_kernels, {}, m)"
    text = operators.read_text()
    assert registration.format("CUDA") in text
    operators.write_text(text.replace(registration.format("CUDA"), registration.format("CPU")))

    sources = [folder / "csrc/operators.cpp", operators, EMULATOR / "emulator.cpp", folder / "csrc/cuda/kernels.cu"]
    include = [f"-I{EMULATOR}", *(f"-isystem{path}" for path in cpp_extension.include_paths("cpu"))]
    builds = []
    for source in sources:
        command = [COMPILER, *FLAGS, *include, "-x", "c++", "-c", source, "-o", folder / f"{len(builds)}.o"]
        builds.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    for build in builds:
        _, errors = build.communicate()
        assert build.returncode == 0, errors[:3000]
    library = folder / "esam_kernels/ops/libesam_kernels.so"
    paths = [f"-L{path}" for path in cpp_extension.library_paths("cpu")]
    link = [*paths, "-ltorch_cpu", "-pthread", *os.environ.get("LDFLAGS", "").split()]
    subprocess.run([COMPILER, "-shared", *folder.glob("*.o"), *link, "-o", library], check=True)
    library.with_name("native_build.json").write_text("{}")
    return folder


def run(package, *command, **environment):
    path = os.pathsep.join([str(package), str(Path(__file__).parent)])
    few = {"ESAM_TEST_EXAMPLES": "0.2"}
    environment = os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"} | few | environment
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("order", "tests"),
    [
        ("forwards", "native-cpu or opcheck or version or differ or refuse"),
        ("backwards", "native-cpu and (norm or select)"),  # those whose threads wait for each other
    ],
)
def test_the_tests_of_all_backends(package, order, tests):
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--capture=sys", "-k", tests]
    printed = run(
        package,
        *command,
        "tests/operators/test_operators.py",
        "tests/operators/test_native.py",
        CUDA_EMULATOR_ORDER=order,
    )
    assert " passed" in printed


LISTS = {"small": [[100, 80], [8192], [5]], "large": [[41_000]], "many": [[3]] * 1500}


def print_launches():
    """In a process with the emulated operators: how many launches each list takes, after a check of its values."""
    count_launches, found = ctypes.CDLL(str(native._LIBRARY)).count_launches, {}
    for name, shapes in LISTS.items():
        generator = torch.Generator().manual_seed(0)
        params = [torch.rand(shape, generator=generator) for shape in shapes]
        originals, backups = [param.clone() for param in params], [torch.empty_like(param) for param in params]
        before = count_launches()
        norm = native.perturb_(params, originals, backups, [0.1] * len(params))
        found[name] = count_launches() - before
        expected = torch.cat([original.flatten().double() for original in originals]).norm()
        torch.testing.assert_close(norm.double(), expected, rtol=1e-6, atol=0)
        for param, original, backup in zip(params, originals, backups, strict=True):
            assert torch.equal(backup, original)
            torch.testing.assert_close(param, original * (1 + 0.1 / norm))
    print(json.dumps(found))


def test_number_of_launches(package):
    """One where all blocks run at the same time, as 4 do here; else two for each table, and one that adds up."""
    printed = run(package, "-c", "import test_cuda_kernels_emulated as test; test.print_launches()")
    assert json.loads(printed) == {"small": 1, "large": 3, "many": 7}
