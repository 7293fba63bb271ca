"""A build that fails says so, or is an error where the library is required; what worked before it still does."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from source_tree import ROOT, copy_sources


@pytest.mark.parametrize(
    ("wanted", "compiler", "outcome"),
    [
        ("0", "c++", "ESAM_KERNELS_NATIVE was 0"),
        ("auto", "no-such-compiler", "no-such-compiler: not found"),
        ("require", "no-such-compiler", None),
    ],
)
def test_it_is_reported_or_an_error(wanted, compiler, outcome, tmp_path):
    command = ["setup.py", "build_ext", "--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "temp"]
    environment = os.environ | {"ESAM_KERNELS_NATIVE": wanted, "CXX": compiler}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode == 0) == (outcome is not None), done.stderr
    if outcome is not None:
        record = json.loads((tmp_path / "lib/esam_kernels/ops/native_build.json").read_text())
        assert outcome in record["cpu"]
        assert record["cpu"] in done.stderr


@pytest.fixture
def built_before(tmp_path):
    """Sources among which an earlier build left its two files: here a text each."""
    source = copy_sources(tmp_path / "source")
    for name in ("libesam_kernels.so", "native_build.json"):
        (source / "esam_kernels/ops" / name).write_text(f"the earlier {name}")
    return source


def start(source, **environment):
    """Begin a build in place; its processes are a group."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=source, env=os.environ | environment, stderr=pipe, text=True, start_new_session=True
    )


def left(source):
    """The texts of the library and the record, and nothing else that a build may leave beside them."""
    files = {path.name: path for path in (source / "esam_kernels/ops").iterdir() if path.suffix != ".py"}
    assert set(files) <= {"libesam_kernels.so", "native_build.json", "__pycache__"}
    return [files[name].read_text() if name in files else None for name in ("libesam_kernels.so", "native_build.json")]


@pytest.mark.parametrize("wanted", ["auto", "require"])
def test_it_keeps_the_library_of_the_build_before(built_before, wanted):
    build = start(built_before, ESAM_KERNELS_NATIVE=wanted, CXX="no-such-compiler")
    _, errors = build.communicate()
    assert (build.returncode == 0) == (wanted == "auto")
    assert wanted == "require" or "earlier build stays" in errors
    assert left(built_before) == ["the earlier libesam_kernels.so", "the earlier native_build.json"]


def test_one_that_is_killed_keeps_the_library_of_the_build_before(built_before, tmp_path):
    build = start(built_before, CXX=f"touch '{tmp_path}/compiling' && sleep 30 #")
    deadline = time.monotonic() + 60
    while not (tmp_path / "compiling").exists():
        assert build.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(build.pid, signal.SIGKILL)
    build.communicate()
    assert left(built_before) == ["the earlier libesam_kernels.so", "the earlier native_build.json"]


def test_library_that_is_not_wanted_any_more_goes(built_before):
    build = start(built_before, ESAM_KERNELS_NATIVE="0")
    build.communicate()
    assert build.returncode == 0
    library, record = left(built_before)
    assert library is None
    assert json.loads(record)["cpu"] == "not built: ESAM_KERNELS_NATIVE was 0"
