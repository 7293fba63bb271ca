"""A sweep that was stopped goes on where it was, compares what is comparable, and marks the Pareto front."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import data, frontier, options, plots, tables, train
from benchmarks.frontier import CONFIGURATIONS, Planned, Sweep, pareto_front
from benchmarks.journal import Journal

TINY = ["--device", "cpu", "--width", "4", "--train-samples", "200", "--epochs", "4", "--seeds", "2", "--rounds", "1"]
THREE = ["--configurations", "sgd", "esam", "esam-interval2"]
HERE = {"commit": "abc", "cpu": "one", "date": "today"}
CPU = torch.device("cpu")


def sweep(folder, *more, name="frontier_digits_cpu"):
    """A sweep with whatever is in the folder's journal."""
    args = frontier.parse_args([*TINY, *THREE, *more, "--output", str(folder)])
    return Sweep(options.training_images(args), args, Journal(folder / f"{name}.jsonl", HERE))


def untimed(results):
    """Results without what depends on the clock."""
    if isinstance(results, dict):
        return {
            key: untimed(value) for key, value in results.items() if "seconds" not in key and "time_over" not in key
        }
    return [untimed(value) for value in results] if isinstance(results, list) else results


# Stopping and going on.


def test_a_sweep_that_is_killed_goes_on_to_the_same_result(tmp_path):
    """SIGKILL leaves nothing a chance to tidy up. Both sweeps have the killed one's calibration."""
    arguments = [*TINY, *THREE, "--epochs", "30", "--output", str(tmp_path / "killed")]
    code = f"from benchmarks import frontier; frontier.main({arguments})"
    journal = tmp_path / "killed/frontier_digits_cpu.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=Path(frontier.__file__).parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    # Environment, calibration and at least two runs.
    while not (journal.exists() and journal.read_bytes().count(b"\n") >= 4):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = journal.read_text().splitlines()
    planned = 2 * len(THREE[1:]) * 2 - 2  # SGD's runs are the same in both panels
    assert 4 <= len(kept) < 2 + planned

    (tmp_path / "whole").mkdir()
    (tmp_path / "whole/frontier_digits_cpu.jsonl").write_text("".join(line + "\n" for line in kept[:2]))
    results = []
    for folder in ("killed", "whole"):
        frontier.main([*arguments[:-1], str(tmp_path / folder)])
        results.append(json.loads((tmp_path / folder / "frontier_digits_cpu.json").read_text()))
    assert results[0]["runs"]["finished"] == results[0]["runs"]["planned"] <= planned
    assert untimed(results[0]["configurations"]) == untimed(results[1]["configurations"])
    # What was finished before was not made again.
    assert journal.read_text().splitlines()[: len(kept)] == kept


def test_a_line_torn_by_a_kill_is_dropped_and_its_part_made_again(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, HERE)
    journal.add({"seed": 0}, 1.5)
    whole = path.read_bytes()
    journal.add({"seed": 1}, 2.5)
    torn = path.read_bytes()[:-4]
    path.write_bytes(torn)
    again = Journal(path, {**HERE, "date": "tomorrow"})
    assert path.read_bytes() == whole
    assert (again.get({"seed": 0}), again.get({"seed": 1})) == (1.5, None)
    again.add({"seed": 1}, 3.5)
    assert Journal(path, HERE).get({"seed": 1}) == 3.5


def test_another_environment_is_refused_unless_begun_anew(tmp_path):
    path = tmp_path / "journal.jsonl"
    Journal(path, HERE).add({"seed": 0}, 1.5)
    with pytest.raises(ValueError, match="commit = 'abc', which is 'def' now: give --restart"):
        Journal(path, {**HERE, "commit": "def"})
    assert Journal(path, HERE).get({"seed": 0}) == 1.5
    assert Journal(path, {**HERE, "commit": "def"}, restart=True).get({"seed": 0}) is None


def test_what_is_no_journal_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("no journal\nand no end of line")
    with pytest.raises(ValueError, match="is no journal"):
        Journal(path, HERE)
    assert path.read_text() == "no journal\nand no end of line"


@pytest.mark.parametrize(
    "change",
    [["--lr", "0.2"], ["--rho", "0.3"], ["--width", "5"], ["--label-noise", "0.1"], ["--train-samples", "199"]],
)
def test_a_changed_setting_is_a_run_of_its_own(tmp_path, monkeypatch, change):
    timed = {"seconds_per_step": {"median": 0.01}, "time_over_sgd": {"median": 2.0}}
    monkeypatch.setattr(frontier, "calibrate", lambda images, args: dict.fromkeys(args.configurations, timed))
    first, run = sweep(tmp_path), Planned("esam", 0, 4)
    first.journal.add(first._run_key(run), {"test_accuracy": 1.0})
    assert sweep(tmp_path).result(run) == {"test_accuracy": 1.0}
    assert sweep(tmp_path, "--seeds", "5", "--time-budget", "9").result(run) == {"test_accuracy": 1.0}
    assert sweep(tmp_path, *change).result(run) is None
    assert all(first.result(other) is None for other in (Planned("esam", 1, 4), Planned("esam", 0, 3)))
    assert first.result(Planned("sgd", 0, 4)) is None
    assert first.result(Planned("esam-interval2", 0, 4)) is None


# What is compared.


@pytest.fixture
def planned(tmp_path, monkeypatch):
    """A sweep in which a step of ESAM takes twice SGD's time, and every second one 1.5 times."""
    costs = {"sgd": 1.0, "esam": 2.0, "esam-interval2": 1.5}
    timed = {
        name: {"seconds_per_step": {"median": cost}, "time_over_sgd": {"median": cost}} for name, cost in costs.items()
    }
    monkeypatch.setattr(frontier, "calibrate", lambda images, args: timed)
    return sweep(tmp_path, "--epochs", "12")


def test_epochs_are_equal_or_take_sgds_time_and_seeds_stay_balanced(planned):
    one_seed = [("sgd", 12), ("esam", 12), ("esam-interval2", 12), ("esam", 6), ("esam-interval2", 8)]
    assert planned.plan() == [Planned(name, seed, epochs) for seed in (0, 1) for name, epochs in one_seed]


def test_early_stopping_costs_its_share_of_the_epochs(tmp_path, monkeypatch):
    timed = {"seconds_per_step": {"median": 1.0}, "time_over_sgd": {"median": 1.0}}
    monkeypatch.setattr(frontier, "calibrate", lambda images, args: dict.fromkeys(args.configurations, timed))
    short = sweep(tmp_path, "--epochs", "10", "--seeds", "1", "--configurations", "sgd", "sgd-short")
    assert short.plan() == [Planned("sgd", 0, 10), Planned("sgd-short", 0, 2)]
    assert frontier.summarize(short)["configurations"]["sgd-short"]["training_time_over_sgd"] == 0.2


def test_only_seeds_that_all_have_finished_count(planned):
    def finish(runs):
        for run in runs:
            value = {"test_accuracy": 90.0 + run.seed, "seconds": run.epochs, "sharpness": None}
            planned.journal.add(planned._run_key(run), value)

    plan = planned.plan()
    finish(plan[:2])  # of the first seed at equal epochs one is missing
    summary = frontier.summarize(planned)
    rows = summary["configurations"]
    assert summary["runs"] == {"finished": 2, "planned": 10}
    assert rows["esam"]["equal_epochs"]["test_accuracy"] == {"mean": 90.0, "std": None}
    assert rows["esam-interval2"]["equal_epochs"] is None
    assert rows["esam"]["equal_time"] is None
    finish(plan[2:9])  # of the second seed in equal time one is missing
    rows = frontier.summarize(planned)["configurations"]
    assert {name: (row["equal_epochs"]["seeds"], row["equal_time"]["seeds"]) for name, row in rows.items()} == (
        dict.fromkeys(rows, (2, 1))
    )
    assert rows["esam"]["equal_epochs"]["test_accuracy"]["mean"] == 90.5


def test_no_run_is_begun_that_would_not_end_in_time(planned, monkeypatch):
    trained = []
    monkeypatch.setattr(planned, "_train", lambda run, progress: trained.append(run))
    now = [0.0]
    monkeypatch.setattr(frontier, "perf_counter", lambda: now[0])
    first = planned.plan()[0].epochs * planned.steps * 1.0  # its seconds, by the calibration
    planned.run(deadline=1.19 * first)
    assert trained == []
    planned.run(deadline=1.21 * first)
    assert [run.configuration for run in trained] == ["sgd"]


def test_configurations_that_the_options_make_the_same_share_their_runs(tmp_path, monkeypatch):
    timed = {"seconds_per_step": {"median": 1.0}, "time_over_sgd": {"median": 1.0}}
    monkeypatch.setattr(frontier, "calibrate", lambda images, args: dict.fromkeys(args.configurations, timed))
    same = sweep(tmp_path, "--seeds", "1", "--beta", "1", "--configurations", "sgd", "esam", "esam-beta1")
    trained = []
    monkeypatch.setattr(same, "_train", lambda run, progress: trained.append(run.configuration) or {"seconds": 1.0})
    same.run(float("inf"))
    assert trained == ["sgd", "esam"]
    assert same.result(Planned("esam-beta1", 0, 4)) == {"seconds": 1.0}


def test_every_configuration_trains_as_it_says(tmp_path):
    """The optimizers in the runs have the settings that the labels promise."""
    args = frontier.parse_args([*TINY, "--label-noise", "0", "--output", str(tmp_path)])
    images = options.training_images(args)
    options_of = {}
    for name, configuration in CONFIGURATIONS.items():
        run = train.Run(configuration.method, configuration.settings(args, 7), 1, images, args)
        options_of[name] = run.trainer.optimizer.param_groups[0]
    rho = args.rho
    plain = {"rho": rho, "beta": 0.6, "gamma": 0.5, "interval": 1, "granularity": "tensor", "selection": "increase"}
    plain |= {"steering_dtype": None, "seed": 7}
    changes = {
        "sam-interval2": {"beta": 1, "gamma": 1, "interval": 2},
        "esam-bf16": {"steering_dtype": "bfloat16"},
        "esam-half-rho": {"rho": rho / 2},
        "esam-twice-rho": {"rho": rho * 2},
        "esam-element": {"granularity": "element"},
        "esam-interval5": {"interval": 5},
        "esam-random-bf16": {"selection": "random", "steering_dtype": "bfloat16"},
        "esam-gamma0.25": {"gamma": 0.25},
        "esam-beta0.3": {"beta": 0.3},
        "esam-loss": {"selection": "loss"},
        "esam": {},
    }
    for name, change in changes.items():
        group = options_of[name]
        assert {key: group[key] for key in plain} == plain | change, name
    assert options_of["sam-twice-rho"]["rho"] == 2 * rho
    assert "rho" not in options_of["sgd"]


points = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12)


@given(points)
def test_the_front_is_what_no_other_point_beats(points):
    def beaten(one):
        return any(cost <= one[0] and gain >= one[1] and (cost, gain) != one for cost, gain in points)

    assert pareto_front(points) == [not beaten(point) for point in points]


# The task.


def test_a_subset_keeps_the_shares_of_the_classes():
    images = data.load("digits", None, CPU, torch.contiguous_format)
    part = data.subset(images, 200)
    assert part.train_images.shape == (200, 1, 8, 8)
    assert part.train_labels.bincount().tolist() == pytest.approx((images.train_labels.bincount() / 5).tolist(), abs=1)
    assert torch.equal(part.test_images, images.test_images)
    assert torch.equal(data.subset(images, 200).train_images, part.train_images)
    assert part.label == "200 images of scikit-learn digits"
    for n in (9, 1001):
        with pytest.raises(ValueError, match=f"--train-samples {n}"):
            data.subset(images, n)


def test_label_noise_makes_its_share_of_the_training_labels_wrong():
    images = data.load("digits", None, CPU, torch.contiguous_format)
    noisy = data.flip_labels(images, 0.2)
    wrong = noisy.train_labels != images.train_labels
    assert wrong.sum() == 200
    shifts = (noisy.train_labels - images.train_labels)[wrong] % 10
    assert set(shifts.tolist()) == set(range(1, 10))
    assert torch.equal(noisy.test_labels, images.test_labels)
    assert torch.equal(data.flip_labels(images, 0.2).train_labels, noisy.train_labels)
    with pytest.raises(ValueError, match=r"--label-noise 1\.5"):
        data.flip_labels(images, 1.5)


# The job.


def test_a_stopped_sweep_shows_what_it_has_and_goes_on(tmp_path, capsys):
    arguments = [*TINY, *THREE, "--seeds", "1", "--sharpness-samples", "20", "--output", str(tmp_path)]
    frontier.main([*arguments, "--time-budget", "0"])
    assert "Stopped after 0 of 5 runs." in capsys.readouterr().out
    frontier.main(arguments)
    printed = capsys.readouterr().out
    assert "Stopped" not in printed
    assert "| ESAM, every 2nd step |" in printed
    assert "top eigenvalue" in printed
    result = json.loads((tmp_path / "frontier_digits_cpu.json").read_text())
    assert tables.frontier(result) in printed
    assert result["configurations"]["sgd"]["training_time_over_sgd"] == 1
    assert result["data"] == "200 images of scikit-learn digits, 20 % of the training labels wrong"
    assert any(row["equal_epochs"]["on_front"] for row in result["configurations"].values())
    assert 1_000 < (tmp_path / "frontier_digits_cpu.svg").stat().st_size < 200_000


def test_configurations_without_sgd_or_bf16_under_amp_are_refused_or_left_out(capsys):
    with pytest.raises(SystemExit):
        frontier.parse_args(["--configurations", "esam"])
    assert "--configurations lacks sgd" in capsys.readouterr().err
    assert not any("bf16" in name for name in frontier.parse_args(["--amp", "bf16"]).configurations)
    assert len(frontier.parse_args(["--quick"]).configurations) < len(frontier.parse_args([]).configurations)


def test_the_plots_of_equal_results_are_equal(tmp_path, planned):
    for run in planned.plan():
        value = {"test_accuracy": 50.0 if run.configuration == "esam" else 90.0, "seconds": 1.0, "sharpness": None}
        planned.journal.add(planned._run_key(run), value)
    settings = {"model": "small"}
    result = {"data": "digits", "settings": settings} | frontier.summarize(planned)
    for name in ("one", "other"):
        plots.frontier(result, tmp_path / f"{name}.svg")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "other.svg").read_bytes()
