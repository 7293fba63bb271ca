"""Results files and names of before load and mean the same."""

import json
from pathlib import Path

import pytest

from benchmarks import record
from benchmarks.commands import step_cost
from benchmarks.report import documents, tables

FIXTURES = Path(__file__).parent / "fixtures"


def test_a_result_of_the_benchmark_that_was_called_kernels_is_one_of_the_operators():
    before = json.loads((FIXTURES / "kernels_cpu.json").read_text())
    assert before["benchmark"] == "kernels"
    results = record.load(FIXTURES)
    assert results["kernels_cpu"] == {**before, "benchmark": "operators"}
    ((kind, members),) = documents.by_kind(results)
    assert (kind.title, list(members)) == ("Operators", ["kernels_cpu"])
    weights, samples, caption = tables.blocks(kind.tables(results["kernels_cpu"]))
    assert [row[:2] for row in weights.rows] == [["squared_norm", "ResNet-18"], ["norm_and_perturb", "ResNet-18"]]
    assert [row[1] for row in samples.rows] == ["256 samples"]
    assert "5 interleaved rounds" in caption


@pytest.mark.parametrize("former", step_cost.FORMER_NAMES)
def test_a_method_answers_to_its_former_name(former):
    _, (case, *_) = step_cost.parse_args(["--methods", former])
    assert case.methods == [step_cost.FORMER_NAMES[former]]
    assert former not in step_cost.TIMED
