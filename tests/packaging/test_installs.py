"""From source to installed package, with a space in every path and no torch in sight, as pip builds in isolation."""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from source_tree import ROOT, call_backend, copy_sources, run_python

linux = pytest.mark.skipif(sys.platform != "linux", reason="the native operators are built for Linux")

TRAINING_STEP = """
import torch, esam_kernels
from esam_kernels import ESAM, batch_closure, ops
model = torch.nn.Linear(4, 3)
optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1)
before = model.weight.detach().clone()
loss_fn = torch.nn.CrossEntropyLoss(reduction="none")
optimizer.step(batch_closure(model, loss_fn, torch.randn(8, 4), torch.arange(8) % 3))
assert not torch.equal(model.weight, before)
print(esam_kernels.__file__, ops.explain(model.weight), sep="\\n")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("a folder with spaces")


@pytest.fixture(scope="module")
def sdist(folder):
    """The sdist, and the folder that it is unpacked in."""
    call_backend("build_sdist", copy_sources(folder / "the clone"), folder / "dist")
    (archive,) = (folder / "dist").glob("*.tar.gz")
    shutil.unpack_archive(archive, folder / "unpacked")
    (unpacked,) = (folder / "unpacked").iterdir()
    return unpacked


@pytest.fixture(scope="module")
def wheel(folder, sdist):
    """The wheel, built where the sources cannot be written to."""
    read_only = shutil.copytree(sdist, folder / "read only")
    folders = [read_only, *(path for path in read_only.rglob("*") if path.is_dir())]
    for path in folders:
        path.chmod(0o555)
    # The superuser may write everywhere, unless without this capability.
    prefix = ["setpriv", "--bounding-set=-dac_override"] if os.geteuid() == 0 else []
    if prefix and shutil.which(prefix[0]) is None:
        pytest.skip("the superuser can be kept from writing by setpriv alone, which was not found")
    try:
        probe = [*prefix, sys.executable, "-c", "open('new', 'w')"]
        assert b"PermissionError" in subprocess.run(probe, cwd=read_only, capture_output=True).stderr
        call_backend("build_wheel", read_only, folder / "dist", prefix, ESAM_KERNELS_NATIVE="require")
    finally:
        for path in folders:
            path.chmod(0o755)
    assert {path.name for path in read_only.iterdir()} == {path.name for path in sdist.iterdir()}
    (path,) = (folder / "dist").glob("*.whl")
    return path


def test_sdist_holds_all_that_git_does(sdist):
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = {name for name in tracked.split("\0") if name and (ROOT / name).exists()}
    names = {name for name in names if not name.startswith((".ci/", ".git"))}
    assert not [name for name in sorted(names) if not (sdist / name).exists()]


@linux
def test_wheel_is_for_every_python_3_of_the_platform(wheel):
    assert wheel.name.endswith(f"-py3-none-linux_{platform.machine()}.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        record = json.loads(archive.read("esam_kernels/ops/native_build.json"))
        library = archive.read("esam_kernels/ops/libesam_kernels.so")
    assert "esam_kernels/py.typed" in names
    assert sum("/licenses/" in name for name in names) == 2
    assert record["sha256"] == hashlib.sha256(library).hexdigest()
    assert "--no-build-isolation" in record["cuda"]
    assert "cpu" not in record


@linux
@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf was not found")
def test_library_needs_torch_and_the_compilers_libraries_alone(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        library = archive.extract("esam_kernels/ops/libesam_kernels.so", tmp_path)
    dynamic = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    needed = {line.split("[")[1].split("]")[0].split(".so")[0] for line in dynamic.splitlines() if "(NEEDED)" in line}
    assert "libtorch_cpu" in needed
    assert needed <= {"libtorch_cpu", "libstdc++", "libm", "libgcc_s", "libc"}


@linux
def test_step_of_the_wheel_is_native(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    file, backend = run_python(tmp_path, TRAINING_STEP, tmp_path).splitlines()
    assert Path(file).is_relative_to(tmp_path)
    assert backend == "native"


def test_wheel_without_library_is_for_any_platform_and_says_why(sdist, tmp_path):
    done = call_backend("build_wheel", sdist, tmp_path, CXX="no-such-compiler")
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "no native operators for cpu: not built: " in done.stderr
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    _, backend = run_python(tmp_path / "installed", TRAINING_STEP, tmp_path).splitlines()
    assert backend.startswith("reference; not native: not built: ")


@linux
def test_editable_install_builds_beside_the_sources(sdist, tmp_path):
    source = shutil.copytree(sdist, tmp_path / "the sources")
    call_backend("build_editable", source, tmp_path, CXXFLAGS="-O0", ESAM_KERNELS_NATIVE="require")
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
    file, backend = run_python(source, TRAINING_STEP, tmp_path).splitlines()
    assert Path(file).is_relative_to(source)
    assert backend == "native"
