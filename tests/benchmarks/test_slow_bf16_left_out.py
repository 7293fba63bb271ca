"""Where bf16 is slower than float32, ``--skip-slow-bf16`` leaves it out and says so; one function knows where."""

import pytest

from benchmarks.commands import bench, command_line, frontier, step_cost, train
from benchmarks.measuring import environment
from esam_kernels.passes import evaluate

BF16 = {"esam-bf16", "sgd-bf16"}


def measured(argv):
    """Of each benchmark what is measured in bf16, and why the others are not."""
    trained, swept = train.parse_args(argv), frontier.parse_args(argv)
    cases = step_cost.parse_args(argv)[1]
    timed, missing = step_cost.rows(cases[0])
    found = [BF16 & {*trained.optimizers}, BF16 & {*swept.configurations}, BF16 & {*timed}]
    return found, [trained.left_out, swept.left_out, missing]


@pytest.mark.parametrize("units", [True, False, None])
def test_bf16_is_left_out_where_it_is_known_to_be_slower(monkeypatch, units):
    monkeypatch.setattr(command_line, "cpu_has_bf16_units", lambda: units)
    without_option, _ = measured(["--device", "cpu"])
    assert all(without_option)
    found, missing = measured(["--device", "cpu", "--skip-slow-bf16"])
    assert found == ([set(), set(), set()] if units is False else without_option)
    for reasons in missing:
        slow = {name for name, why in reasons.items() if "slower than float32" in why}
        assert bool(slow) == (units is False)
        assert not any("bf16" not in name for name in slow)


@pytest.mark.parametrize("units", [True, False])
def test_bench_says_so_and_asks_for_it(monkeypatch, capsys, tmp_path, units):
    monkeypatch.setattr(bench, "cpu_has_bf16_units", lambda: units)
    monkeypatch.setattr(bench, "measure", lambda *_: [])
    bench.main(["--device", "cpu", "--output", str(tmp_path)])
    assert ("bf16 are left out" in capsys.readouterr().out) == (not units)
    args = bench.make_parser().parse_args(["--device", "cpu"])
    assert [part.name for part in bench.parts(args) if "--skip-slow-bf16" in part.command] == [
        "train",
        "frontier",
        "step_cost",
    ]


def test_results_and_the_optimizer_ask_the_same_function():
    assert environment.cpu_has_bf16_units is evaluate.cpu_has_bf16_units
    assert command_line.cpu_has_bf16_units is evaluate.cpu_has_bf16_units
    assert environment.environment()["cpu_bf16_units"] is evaluate.cpu_has_bf16_units()
