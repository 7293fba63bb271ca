"""Builds the native operators of csrc/ as part of the install; metadata and tool settings are in pyproject.toml.

ESAM_KERNELS_NATIVE=0 leaves them out, =require makes it an error when the CPU's cannot be built. Otherwise a build that
fails is reported and passed over: the package works without it, and `esam_kernels.ops.explain` says what is missing.
CXX, CXXFLAGS, LDFLAGS and NVCC_APPEND_FLAGS mean what they usually do.
"""

import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

EXTENSION = "esam_kernels.ops.libesam_kernels"
CSRC = Path(__file__).resolve().parent / "csrc"

# The library uses the stable ABI of torch 2.11 and so loads into that version and those after it.
CXX_FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wextra -DTORCH_TARGET_VERSION=0x020b000000000000"
# Sums and products round as they are written; an fma stands where one is meant.
KERNEL_FLAGS = "-ffp-contract=off -fno-math-errno -fno-trapping-math"
X86_64_FLAGS = {
    "baseline": "",
    "avx2": "-mavx2 -mfma",
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mprefer-vector-width=512",
}
# Machine code for Ampere and Hopper, and PTX for what comes after them.
CUDA_FLAGS = "-std=c++17 -O3 -Xcompiler -fPIC -fmad=false"
for code in ("arch=compute_80,code=sm_80", "arch=compute_90,code=sm_90", "arch=compute_90,code=compute_90"):
    CUDA_FLAGS += f" -gencode={code}"

RULES = """\
rule cxx
  command = $cxx $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule nvcc
  command = $nvcc $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = $cxx -shared $in -o $out $flags
"""


class BuildNative(build_ext):
    """Compiles csrc/ with ninja into one library that does not use Python's C API."""

    def get_ext_filename(self, fullname: str) -> str:
        """Path of the library inside the package: the same for every version of Python."""
        return fullname.replace(".", "/") + ".so"

    def run(self) -> None:
        """Build, and write down beside the library for which devices it has no operators, and why."""
        self.missing: dict[str, str] = {}
        super().run()
        for device, why in self.missing.items():
            print(f"esam_kernels: no native operators for {device}: {why}", file=sys.stderr)
        # Where the library is now: in an editable install, in the source tree.
        report = Path(self.get_ext_fullpath(EXTENSION)).with_name("native_build.json")
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(json.dumps(self.missing, indent=2) + "\n")

    def build_extension(self, ext: Extension) -> None:
        """Build the library, or note why there is none."""
        wanted = os.environ.get("ESAM_KERNELS_NATIVE")
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        library.unlink(missing_ok=True)
        library.parent.mkdir(parents=True, exist_ok=True)
        try:
            if wanted == "0":
                raise RuntimeError("ESAM_KERNELS_NATIVE was 0")
            self.missing = self.build_library(library)
        except Exception as error:
            if wanted == "require":
                raise
            self.missing = dict.fromkeys(("cpu", "cuda"), f"not built: {error}")

    def build_library(self, library: Path) -> dict[str, str]:
        """Build with CUDA where possible, else without; for each device that is left out, the reason."""
        try:
            from torch.utils import cpp_extension
        except ImportError as error:
            raise RuntimeError(f"{error} (pip needs --no-build-isolation to see torch)") from error
        why_no_cuda = cuda_obstacle(cpp_extension.CUDA_HOME)
        if why_no_cuda is None:
            try:
                self.run_ninja(ninja_file(library, cpp_extension, cuda=True))
                return {}
            except RuntimeError as error:
                why_no_cuda = f"not built: {error}"
        self.run_ninja(ninja_file(library, cpp_extension, cuda=False))
        return {"cuda": why_no_cuda}

    def run_ninja(self, text: str) -> None:
        """Run ninja in the build's own folder."""
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(text)
        ninja = [sys.executable, "-m", "ninja"] if importlib.util.find_spec("ninja") else ["ninja"]
        try:
            done = subprocess.run(
                [*ninja, "-C", str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        except FileNotFoundError as error:
            raise RuntimeError("ninja was not found") from error
        print(done.stdout)
        if done.returncode != 0:
            first = re.search(r".*(?:error:|not found|cannot find).*", done.stdout)
            raise RuntimeError(f"the build failed: {first.group().strip() if first else done.stdout[-200:]}")


def cuda_obstacle(cuda_home: str | None) -> str | None:
    """Why CUDA sources cannot be built here, or None if they can."""
    import torch

    if torch.version.cuda is None:
        return "torch was built without CUDA"
    nvcc = Path(cuda_home or "") / "bin" / "nvcc"
    if cuda_home is None or not nvcc.exists():
        return "nvcc was not found"
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    if f"release {torch.version.cuda.split('.')[0]}." not in version:
        return f"torch was built for CUDA {torch.version.cuda}, and nvcc is of another major version"
    return None


def ninja_file(library: Path, cpp_extension: ModuleType, cuda: bool) -> str:
    """What to compile, with which flags, and how to link it."""
    device = "cuda" if cuda else "cpu"
    include = " ".join(f"-isystem {path}" for path in cpp_extension.include_paths(device))
    flags = f"{CXX_FLAGS} {include} {os.environ.get('CXXFLAGS', '')}"
    link = " ".join(f"-L{path}" for path in cpp_extension.library_paths(device)) + " -ltorch_cpu"
    x86_64 = platform.machine() in ("x86_64", "AMD64")
    if x86_64:
        flags += " -DESAM_X86_64"

    steps = [(f"{name}.o", "cxx", CSRC / f"{name}.cpp", flags) for name in ("operators", "cpu/operators")]
    for name, instructions in X86_64_FLAGS.items() if x86_64 else [("baseline", "")]:
        own = f"{flags} {KERNEL_FLAGS} {instructions} -DESAM_KERNELS=kernels_{name}"
        steps.append((f"cpu/kernels_{name}.o", "cxx", CSRC / "cpu/kernels.cpp", own))
    if cuda:
        steps.append(("cuda/operators.o", "cxx", CSRC / "cuda/operators.cpp", f"{flags} -DUSE_CUDA"))
        steps.append(("cuda/kernels.o", "nvcc", CSRC / "cuda/kernels.cu", CUDA_FLAGS))
        link += " -ltorch_cuda -lcudart_static -ldl -lrt -lpthread"

    lines = [RULES, f"cxx = {os.environ.get('CXX', 'c++')}"]
    if cuda:
        lines.append(f"nvcc = {cpp_extension.CUDA_HOME}/bin/nvcc")
    for output, rule, source, own in steps:
        lines += [f"build {output}: {rule} {source}", f"  flags = {own}"]
    objects = " ".join(output for output, *_ in steps)
    lines += [f"build {library}: link {objects}", f"  flags = {link} {os.environ.get('LDFLAGS', '')}", ""]
    return "\n".join(lines)


setup(
    ext_modules=[
        # Optional: setuptools looks for no library where none was built.
        Extension(
            EXTENSION,
            sources=[str(path.relative_to(CSRC.parent)) for path in sorted(CSRC.rglob("*.*"))],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildNative},
)
