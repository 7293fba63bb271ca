"""A torch or Triton that is newer than those tested is used, and `explain` says so."""

import pytest
import torch
from source_tree import load_pyproject

from esam_kernels import ops
from esam_kernels.ops import native

built = pytest.mark.skipif(native.unsupported(torch.ones(1)) is not None, reason="no native CPU operators")


@pytest.fixture
def newer(monkeypatch):
    monkeypatch.setattr(ops, "_installed", lambda package: "97.3.1+cpu")


@built
def test_explain_names_the_version_that_serves(newer):
    assert ops.explain(torch.ones(2)) == "native; native is untested with torch 97.3.1+cpu, newer than 2.15"


@built
def test_explain_names_the_version_that_does_not(newer):
    answer = ops.explain(torch.ones(4)[::2])
    assert answer.startswith("reference; not native: its elements lie in memory with gaps")
    assert answer.endswith("; native is untested with torch 97.3.1+cpu, newer than 2.15")


def test_explain_of_the_reference_hangs_on_no_version(newer):
    with ops.use_backend("reference"):
        assert ops.explain(torch.ones(2)) == "reference"


@pytest.mark.parametrize(("version", "told"), [("2.11.0", False), ("2.15.9a0+git1", False), ("2.16.0", True)])
def test_only_a_newer_minor_version_is_told(version, told, monkeypatch):
    monkeypatch.setattr(ops, "_installed", lambda package: version)
    assert (ops._untested("native") is not None) == told


def test_no_version_is_refused_for_being_new():
    dependencies = load_pyproject()["project"]["dependencies"]
    versions = [requirement.partition(";")[0] for requirement in dependencies]
    assert versions
    assert not [version for version in versions if "<" in version or "==" in version or "~=" in version]
