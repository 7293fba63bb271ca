"""Builds the native operators of csrc/ as part of the install; metadata and tool settings are in pyproject.toml.

The CPU's need a C++ compiler and ninja, and no torch: the headers of its stable ABI lie in third_party/torch. CUDA's
need nvcc and a torch built for CUDA in sight of the build, which pip hides without --no-build-isolation.

ESAM_KERNELS_NATIVE=0 leaves them out, =require makes it an error when the CPU's cannot be built. Otherwise a build that
fails is reported and passed over: the wheel is then tagged for any platform, the package works without them, and
`esam_kernels.ops.explain` says what is missing. CXX, CXXFLAGS, LDFLAGS and NVCC_APPEND_FLAGS mean what they usually do.
"""

import atexit
import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

EXTENSION = "esam_kernels.ops.libesam_kernels"
LIBRARY = "libesam_kernels.so"
RECORD = "native_build.json"
ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
TORCH_HEADERS = ROOT / "third_party/torch/include"

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

# The library needs libtorch_cpu.so by name alone, which an empty library of that name gives to the linker.
RULES = """\
rule cxx
  command = $cxx $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule nvcc
  command = $nvcc $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule name
  command = $cxx -shared -nostdlib -Wl,-soname,$out -x c++ /dev/null -o $out
rule link
  command = $cxx -shared $in -o $out $flags
build libtorch_cpu.so: name
"""


class BuildNative(build_ext):
    """Compiles csrc/ with ninja into one library that does not use Python's C API.

    Beside it stands a record: the digests of the library and of its sources, and for each device without operators the
    reason.
    """

    def get_ext_filename(self, fullname: str) -> str:
        """Path of the library inside the package: the same for every version of Python."""
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Build the library, or note why there is none."""
        wanted = os.environ.get("ESAM_KERNELS_NATIVE")
        self.built: Path | None = None
        self.failed = False
        try:
            if wanted == "0":
                raise RuntimeError("ESAM_KERNELS_NATIVE was 0")
            self.sources = digest_of_sources()
            self.built, self.missing = self.build_library()
        except Exception as error:
            if wanted == "require":
                raise
            self.failed = wanted != "0"
            self.missing = dict.fromkeys(("cpu", "cuda"), f"not built: {error}")
        for device, why in self.missing.items():
            print(f"esam_kernels: no native operators for {device}: {why}", file=sys.stderr)
        self.place(Path(self.get_ext_fullpath(ext.name)).parent)

    def copy_extensions_to_source(self) -> None:
        """In the source tree, what an earlier build left stays where this one failed."""
        package = self.get_finalized_command("build_py").get_package_dir("esam_kernels.ops")
        folder = Path(package)
        if self.failed and (folder / LIBRARY).exists():
            print("esam_kernels: the library of an earlier build stays", file=sys.stderr)
        else:
            self.place(folder)

    def place(self, folder: Path) -> None:
        """Put the library and its record into a folder, each whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        record = dict(self.missing)
        if self.built is not None:
            content = self.built.read_bytes()
            record |= {"sha256": hashlib.sha256(content).hexdigest(), "sources": self.sources}
            replace(folder / LIBRARY, content)
        replace(folder / RECORD, (json.dumps(record, indent=2) + "\n").encode())
        if self.built is None:
            (folder / LIBRARY).unlink(missing_ok=True)

    def build_library(self) -> tuple[Path, dict[str, str]]:
        """Build with CUDA where possible, else without; for each device that is left out, the reason."""
        if sys.platform != "linux":
            raise RuntimeError(f"they are built for Linux, and this is {sys.platform}")
        why_no_cuda = cuda_obstacle()
        if why_no_cuda is None:
            try:
                return self.run_ninja(ninja_file(cuda=True)), {}
            except RuntimeError as error:
                why_no_cuda = f"not built: {error}"
        return self.run_ninja(ninja_file(cuda=False)), {"cuda": why_no_cuda}

    def run_ninja(self, text: str) -> Path:
        """Run ninja in the build's own folder, where the library is then."""
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
        return folder / LIBRARY


class Wheel(bdist_wheel):
    """A wheel for every Python 3: of this platform with the library, of any without."""

    def get_tag(self) -> tuple[str, str, str]:
        """Python, ABI and platform."""
        build = self.get_finalized_command("build_ext")
        here = Path(build.get_ext_fullpath(EXTENSION)).exists()
        return "py3", "none", super().get_tag()[2] if here else "any"


def replace(path: Path, content: bytes) -> None:
    """Write a file beside the old one, then put it into its place."""
    new = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        new.write_bytes(content)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def digest_of_sources() -> str:
    """Of what the library is compiled from and how: nvcc does not give the same bytes twice."""
    digest = hashlib.sha256()
    for path in [Path(__file__), *sorted(path for path in CSRC.rglob("*") if path.is_file())]:
        digest.update(path.read_bytes())
    for name in ("CXX", "CXXFLAGS", "LDFLAGS", "NVCC_APPEND_FLAGS"):
        digest.update(f"{name}={os.environ.get(name, '')}\n".encode())
    return digest.hexdigest()


def cuda_obstacle() -> str | None:
    """Why CUDA sources cannot be built here, or None if they can."""
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME
    except Exception as error:
        return f"the build sees no torch ({error}): pip needs --no-build-isolation to show it one"
    if torch.version.cuda is None:
        return "torch was built without CUDA"
    nvcc = Path(CUDA_HOME or "") / "bin" / "nvcc"
    if CUDA_HOME is None or not nvcc.exists():
        return "nvcc was not found"
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    if f"release {torch.version.cuda.split('.')[0]}." not in version:
        return f"torch was built for CUDA {torch.version.cuda}, and nvcc is of another major version"
    return None


def ninja_file(cuda: bool) -> str:
    """What to compile, with which flags, and how to link it."""
    include, libraries = [TORCH_HEADERS], []
    if cuda:
        from torch.utils import cpp_extension

        include += cpp_extension.include_paths("cuda")
        libraries = cpp_extension.library_paths("cuda")
    flags = " ".join([CXX_FLAGS, *(f"-isystem {quoted(path)}" for path in include), os.environ.get("CXXFLAGS", "")])
    link = " ".join(["-L. -Wl,--no-as-needed -ltorch_cpu", *(f"-L{quoted(path)}" for path in libraries)])
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

    lines = [f"cxx = {os.environ.get('CXX', 'c++')}"]
    if cuda:
        lines.append(f"nvcc = {quoted(cpp_extension.CUDA_HOME)}/bin/nvcc")
    lines.append(RULES)
    for output, rule, source, own in steps:
        lines += [f"build {output}: {rule} {escaped(source)}", f"  flags = {own}"]
    objects = " ".join(output for output, *_ in steps)
    lines += [f"build {LIBRARY}: link {objects} | libtorch_cpu.so"]
    lines += [f"  flags = {link} {os.environ.get('LDFLAGS', '')}", f"default {LIBRARY}", ""]
    return "\n".join(lines)


def quoted(path: object) -> str:
    """A path inside a command that ninja gives to the shell."""
    return shlex.quote(str(path)).replace("$", "$$")


def escaped(path: Path) -> str:
    """A path among ninja's inputs, which it quotes for the shell itself."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def options() -> dict[str, dict[str, str]]:
    """Where the source tree cannot be written to, a folder of its own for what a build writes into it."""
    if os.access(ROOT, os.W_OK):
        return {}
    scratch = tempfile.mkdtemp(prefix="esam_kernels-")
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    return {"build": {"build_base": scratch}, "egg_info": {"egg_base": scratch}}


setup(
    ext_modules=[
        # Optional: setuptools looks for no library where none was built.
        Extension(
            EXTENSION,
            sources=[str(path.relative_to(ROOT)) for path in sorted(CSRC.rglob("*.*"))],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
    options=options(),
)
