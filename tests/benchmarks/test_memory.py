"""What ESAM holds at its peak, against what it must hold."""

import pytest
import torch
from torch import nn

from benchmarks.commands import memory
from benchmarks.commands.memory import ROWS, SGD, STEPS, Case, drawn_bytes, measure
from benchmarks.report import tables
from benchmarks.training.methods import METHODS, Method
from benchmarks.training.trainers import Settings

SETTINGS = Settings(**SGD)
CPU = torch.device("cpu")
SLACK = 4096  # bytes: losses, gradients of logits, norms, indices


def linear():
    torch.manual_seed(0)
    return nn.Linear(1000, 200, bias=False)


WEIGHTS, BATCH, LOGITS = 4 * 1000 * 200, 4 * 4 * 1000, 4 * 4 * 200  # bytes
LINEAR = Case("one layer", linear, (4, 1000))
DEEP = Case("layers of equal size", lambda: memory._mlp(*[100] * 10), (4, 100))


def test_the_peak_of_a_linear_layer_is_what_must_live_at_once():
    """Weights, momentum and the gradient, and for ESAM the backup; logits and the like are small."""
    peaks = {
        name: measure(LINEAR, row, SETTINGS, CPU)["peak_bytes"]
        for name, row in {"sgd": "sgd", "esam": "esam-beta1-gamma1"}.items()
    }
    assert 0 <= peaks["sgd"] - (3 * WEIGHTS + BATCH) <= 8 * LOGITS + SLACK
    assert 0 <= peaks["esam"] - (4 * WEIGHTS + BATCH) <= 8 * LOGITS + SLACK


@pytest.fixture(scope="module")
def sgd():
    """SGD's peak in bytes."""
    return measure(DEEP, "sgd", SETTINGS, CPU)["peak_bytes"]


@pytest.mark.parametrize("name", ["sam", "esam-element", "esam-4-micro-batches-over-all"])
def test_a_second_measurement_finds_the_same_bytes(name):
    assert measure(DEEP, name, SETTINGS, CPU) == measure(DEEP, name, SETTINGS, CPU)


@pytest.mark.parametrize("name", ROWS)
def test_esam_holds_its_backup_beyond_sgd_and_little_else(name, sgd):
    measured = measure(DEEP, name, SETTINGS, CPU)
    if METHODS[name].trainer != "esam":
        assert measured["backup_bytes"] is None
        return
    assert measured["backup_bytes"] >= measured["floor_bytes"]
    if METHODS[name].options.get("granularity") != "element":
        assert measured["backup_bytes"] == measured["floor_bytes"]
    assert measured["peak_bytes"] >= sgd + measured["backup_bytes"] - SLACK


def test_the_floor_is_one_copy_of_the_largest_draw():
    params = [torch.empty(10) for _ in range(20)]
    everything = drawn_bytes(params, METHODS["esam-beta1"], SETTINGS)
    assert everything == drawn_bytes(params, METHODS["sam"], SETTINGS) == 20 * 40
    elements = Method("", "esam", {"granularity": "element", "beta": 0.25})
    assert drawn_bytes(params, elements, SETTINGS) == 20 * 10
    drawn = drawn_bytes(params, METHODS["esam"], SETTINGS)
    assert 0 < drawn < everything
    assert drawn % 40 == 0
    assert drawn_bytes(params, Method("", "esam", {"interval": STEPS - 1}), SETTINGS) <= drawn


def test_the_table_compares_with_sgd():
    rows = {
        "SGD": {"peak_bytes": 4_000_000, "backup_bytes": None, "floor_bytes": None},
        "ESAM": {"peak_bytes": 5_000_000, "backup_bytes": 900_000, "floor_bytes": 800_000},
    }
    environment = {"cpu": "CPU", "cpu_cores": 1, "cpu_bf16_units": False, "gpu": None, "torch": "2"}
    environment |= {"uncommitted_changes": False, "commit": "0", "date": "today"}
    case = {"label": "net", "batch_size": 8, "weight_bytes": 1_000_000, "rows": rows}
    result = {"environment": environment, "settings": {"device": "cpu", "steps": 3, "beta": 0.6, "gamma": 0.5}}
    about, table, caption = tables.blocks(tables.memory(result | {"cases": {"net": case}}))
    assert about == "net, 1.0 MB of weights, batch 8."
    assert table.rows == [
        ["SGD", "4.0", "1.000", "+0.0", "", ""],
        ["ESAM", "5.0", "1.250", "+1.0", "0.9", "0.8"],
    ]
    assert caption.startswith("Peak of 3 steps")
