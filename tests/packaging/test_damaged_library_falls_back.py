"""A native library or build record that is not whole: the next backend serves, with one warning."""

import hashlib
import json
import shutil

import pytest
import torch
from source_tree import ROOT, run_python

from esam_kernels import ops
from esam_kernels.ops import native

built = pytest.mark.skipif(not native._LIBRARY.exists(), reason="there is no library to damage")

# As a download, a disk or an interrupted copy may leave them.
DAMAGE = {
    "a record that is empty": lambda library, record: record.write_bytes(b""),
    "a record that is cut off": lambda library, record: record.write_bytes(record.read_bytes()[:-20]),
    "a record that is no text": lambda library, record: record.write_bytes(b"\xff\xfe\x00"),
    "a record that is a list": lambda library, record: record.write_text("[]"),
    "a record of numbers": lambda library, record: record.write_text('{"cpu": 1}'),
    "a library that is missing": lambda library, record: library.unlink(),
    "a library that is empty": lambda library, record: library.write_bytes(b""),
    "a library that is cut off": lambda library, record: library.write_bytes(library.read_bytes()[:150_000]),
    "a library with one byte changed": lambda library, record: flip(library),
    "a library that is another file": lambda library, record: replace(library, record, b"#!/bin/sh\n"),
}


def flip(library):
    content = bytearray(library.read_bytes())
    content[len(content) // 2] ^= 1
    library.write_bytes(content)


def replace(library, record, content):
    library.write_bytes(content)
    record.write_text(json.dumps({"sha256": hashlib.sha256(content).hexdigest()}))


@built
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_reference_serves_and_explain_says_why(damage, tmp_path, monkeypatch):
    library, record = (shutil.copy(path, tmp_path) for path in (native._LIBRARY, native._BUILD_RECORD))
    monkeypatch.setattr(native, "_LIBRARY", type(tmp_path)(library))
    monkeypatch.setattr(native, "_BUILD_RECORD", type(tmp_path)(record))
    damage(native._LIBRARY, native._BUILD_RECORD)
    with pytest.warns(RuntimeWarning, match="another backend serves") as warned:
        missing = native._load()
    assert len(warned) == 1
    monkeypatch.setattr(native, "_MISSING", missing)
    assert ops.explain(torch.ones(2)).startswith("reference; not native: built but not loadable: ")


STEPS = """
import warnings, torch
from esam_kernels import ESAM, batch_closure
model = torch.nn.Linear(4, 3)
optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1)
loss_fn = torch.nn.CrossEntropyLoss(reduction="none")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        optimizer.step(batch_closure(model, loss_fn, torch.randn(8, 4), torch.arange(8) % 3))
print(*[w.category.__name__ for w in caught if "esam_kernels" in str(w.message)])
"""


@built
@pytest.mark.parametrize("damage", ["a record that is cut off", "a library that is cut off"])
def test_steps_go_on_with_one_warning(damage, tmp_path):
    package = shutil.copytree(ROOT / "esam_kernels", tmp_path / "esam_kernels")
    for path in (native._LIBRARY, native._BUILD_RECORD):
        shutil.copy(path, package / "ops")
    DAMAGE[damage](package / "ops/libesam_kernels.so", package / "ops/native_build.json")
    assert run_python(tmp_path, STEPS, tmp_path).split() == ["RuntimeWarning"]


def test_library_that_was_not_built_is_explained_without_a_warning(tmp_path, monkeypatch, recwarn):
    record = tmp_path / "native_build.json"
    monkeypatch.setattr(native, "_BUILD_RECORD", record)
    assert "not built" in native._load()["cpu"]
    record.write_text(json.dumps({"cpu": "no compiler", "cuda": "no compiler"}))
    monkeypatch.setattr(native, "_MISSING", native._load())
    assert ops.explain(torch.ones(2)) == "reference; not native: no compiler"
    assert not recwarn.list
