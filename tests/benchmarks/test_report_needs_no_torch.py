"""Making the report reads JSON files: it loads neither torch nor what trains."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import record

REPOSITORY = record.RESULTS.parents[1]
PROGRAM = """
import sys
from benchmarks.__main__ import main

main(["report", "--results", sys.argv[1]])
print(*sorted(sys.modules))
"""


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    """All modules of a process that has made the report of the results that are in the repository."""
    folder = tmp_path_factory.mktemp("results")
    for path in record.RESULTS.glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder)], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert (folder / "report.html").read_text() == Path(record.RESULTS / "report.html").read_text()
    return run.stdout.splitlines()[-1].split()


@pytest.mark.parametrize(
    "name", ["torch", "sklearn", "triton", "esam_kernels.optimizer", "benchmarks.training.trainers", "tqdm"]
)
def test_the_report_is_made_without(modules, name):
    assert name not in modules
    assert "benchmarks.report.tables" in modules
