"""What the project says of itself, in each file that says it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from source_tree import ROOT, load_pyproject

import esam_kernels

PYPROJECT = load_pyproject()
VENDORED = ROOT / "third_party/torch"
VENDORED_VERSION = (VENDORED / "VERSION").read_text().strip()


def test_version_is_read_without_torch():
    code = "import sys; sys.modules['torch'] = None; import esam_kernels; print(esam_kernels.__version__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == esam_kernels.__version__


def test_files_name_the_same_version():
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "esam_kernels.__version__"}
    text = (ROOT / "CHANGELOG.md").read_text()
    released = re.findall(r"^## \[?(\d[^\] ]*)", text, flags=re.MULTILINE)
    cited = re.findall(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), flags=re.MULTILINE)
    assert [released[0]] == cited
    unreleased = text.partition("## [Unreleased]")[2].partition("\n## ")[0].strip()
    ours = Version(esam_kernels.__version__)
    assert (ours.is_devrelease and ours > Version(released[0])) if unreleased else str(ours) == released[0]


def test_classifiers_begin_with_the_oldest_python():
    classifiers = [line.rpartition(" :: ")[2] for line in PYPROJECT["project"]["classifiers"] if ":: 3." in line]
    assert PYPROJECT["project"]["requires-python"] == f">={classifiers[0]}"


@pytest.mark.skipif(
    torch.__version__.partition("+")[0] != VENDORED_VERSION, reason=f"the headers are torch {VENDORED_VERSION}'s"
)
def test_headers_are_torchs_own():
    headers = [path for path in (VENDORED / "include").rglob("*") if path.is_file()]
    assert headers
    for header in headers:
        original = Path(torch.__file__).parent / "include" / header.relative_to(VENDORED / "include")
        assert header.read_bytes() == original.read_bytes(), header
