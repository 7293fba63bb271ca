"""What a method adds to its passes is counted in calls, which do not grow with the network, and timed in turns."""

import json
from functools import cache

import pytest
import torch

from benchmarks.commands import host_time
from benchmarks.commands.host_time import CASES, METHODS_TIMED, calls_of, passes_of
from benchmarks.training.trainers import Settings, left_out, trainer

SETTINGS = Settings(lr=1e-3, momentum=0.9, weight_decay=5e-4)
CPU = torch.device("cpu")


@cache
def calls(case, name):
    """Of the second step, which has a first moment to climb against."""
    one = trainer(name, CASES[case](), SETTINGS, CPU)
    inputs, targets = torch.randn(host_time.BATCH), torch.arange(host_time.BATCH[0])
    for number in range(2):
        host_time.step_of(one, inputs, targets, number)
    return calls_of(lambda: host_time.step_of(one, inputs, targets, 2))


@pytest.mark.parametrize(("name", "rival"), [("momentum", "sgd"), ("sam-own", "sam-foreach")])
def test_a_step_adds_the_same_few_calls_to_a_small_network_and_to_a_large_one(name, rival):
    added = [calls(case, name) - calls(case, rival) for case in ("ResNet-18", "ResNet-50")]
    assert added[0] == added[1] <= 16


def test_esam_calls_less_than_sam_tensor_by_tensor():
    if "sam" in left_out(["sam"]):
        pytest.skip("pytorch_optimizer is not installed")
    assert calls("ResNet-50", "esam") < calls("ResNet-50", "sam")


def test_views_and_empty_tensors_are_no_calls():
    x = torch.ones(4)
    assert calls_of(lambda: torch.empty_like(x.view(2, 2).t())) == 0
    assert calls_of(lambda: x.add(1).mul_(2)) == 2
    assert calls_of(lambda: torch._foreach_add_([x, x.clone()], 1)) == 2


def test_a_floor_has_the_passes_of_its_method():
    of_sam, of_esam = passes_of("sam-foreach", SETTINGS).esam, passes_of("esam", SETTINGS).esam
    assert (of_sam["beta"], of_sam["gamma"]) == (1.0, 1.0)
    assert (of_esam["beta"], of_esam["gamma"]) == (0.6, 0.5)
    assert passes_of("momentum", SETTINGS).esam["ascent"] == "momentum"


def test_the_command_saves_each_network_and_shows_what_is_added(tmp_path, capsys, monkeypatch):
    arguments = ["--device", "cpu", "--models", "ResNet-18", "--rounds", "1", "--output", str(tmp_path)]
    threads = torch.get_num_threads()
    host_time.main(arguments)
    assert torch.get_num_threads() == threads
    (case,) = json.loads((tmp_path / "host_time_cpu.json").read_text())["cases"].values()
    assert case["tensors"] == 62
    assert list(case["rows"]) == [name for name in METHODS_TIMED if name not in left_out(METHODS_TIMED)]
    assert all(("added_seconds" in row) == (name != "sgd") for name, row in case["rows"].items())
    assert {"perturb", "restore"} < case["parts"].keys()
    printed = capsys.readouterr().out
    assert "| SAM (foreach) |" in printed

    def measure(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(host_time, "measure", measure)
    host_time.main(arguments)
    assert capsys.readouterr().out == printed
