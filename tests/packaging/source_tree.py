"""Copies of the source tree, and builds of them by the backend that pip calls, where torch is not to be seen."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOT_SOURCE = (".*", "build", "dist", "data", "*.egg-info", "__pycache__", "*.so", "native_build.json", "*.jsonl")


def copy_sources(folder: Path) -> Path:
    """What a fresh clone holds."""
    keep = shutil.ignore_patterns(*NOT_SOURCE)
    shutil.copytree(ROOT, folder, ignore=lambda path, names: keep(path, names) - {".clang-format"})
    return folder


def load_pyproject() -> dict:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def call_backend(hook: str, source: Path, output: Path, prefix=(), **environment: str) -> subprocess.CompletedProcess:
    """Call ``build_wheel`` or another hook of the build backend, as pip does in isolation: without torch.

    The command is run by the program and its arguments in ``prefix``.
    """
    no_torch = output / "no torch"
    no_torch.mkdir(parents=True, exist_ok=True)
    (no_torch / "torch.py").write_text("raise ImportError('there is none in isolation')\n")
    code = f"from setuptools import build_meta; build_meta.{hook}({str(output)!r})"
    environment = os.environ | {"PYTHONPATH": str(no_torch)} | environment
    done = subprocess.run(
        [*prefix, sys.executable, "-c", code], cwd=source, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def run_python(path: Path, code: str, cwd: Path, **environment: str) -> str:
    """Run code that sees the package that lies in ``path``."""
    environment = os.environ | {"PYTHONPATH": str(path), "PYTHONSAFEPATH": "1"} | environment
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
