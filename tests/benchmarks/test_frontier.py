"""A sweep that was stopped goes on where it was, compares what is comparable, and marks the Pareto front."""

import json
import math
import re
import time

import forks
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import record
from benchmarks.commands import command_line, frontier, train
from benchmarks.commands.frontier import CONFIGURATIONS, Planned, Sweep, pareto_front
from benchmarks.measuring.clock import turn
from benchmarks.measuring.journal import Journal, code_fingerprint
from benchmarks.report import plots, tables
from benchmarks.training import data
from benchmarks.training.methods import METHODS
from benchmarks.training.trainers import Settings, trainer

TINY = ["--device", "cpu", "--width", "4", "--train-samples", "200", "--epochs", "4", "--seeds", "2", "--rounds", "1"]
THREE = ["--configurations", "sgd", "esam", "esam-interval2"]
HERE = {"code": "abc", "cpu": "one", "date": "today", "commit": "1", "uncommitted_changes": False}
CPU = torch.device("cpu")


def sweep(folder, *more, name="frontier_digits_cpu"):
    """A sweep with whatever is in the folder's journal."""
    args = frontier.parse_args([*TINY, *THREE, *more, "--output", str(folder)])
    return Sweep(command_line.training_images(args), args, Journal(folder / f"{name}.jsonl", HERE))


def timed(costs):
    """A calibration: the seconds of a configuration's step, of which SGD's takes one."""
    steps = {name: {"seconds_per_step": {"median": x}, "time_over_sgd": {"median": x}} for name, x in costs.items()}
    return {"steps": steps, "seconds_besides": 0.0}


def fake_run(accuracy=90.0, seconds=1.0, besides=0.0, diverged=False):
    """What the journal keeps of a run."""
    loss = None if diverged else 0.5
    kept = {"test_accuracy": accuracy, "train_loss": loss, "diverged": diverged, "sharpness": None}
    return kept | {"seconds": seconds, "seconds_besides": besides}


def untimed(results):
    """Results without what depends on the clock."""
    if isinstance(results, dict):
        return {
            key: untimed(value) for key, value in results.items() if "seconds" not in key and "time_over" not in key
        }
    return [untimed(value) for value in results] if isinstance(results, list) else results


# Stopping and going on.


def always_from(here, patch):
    """Measured in one environment by one code."""
    patch.setattr(frontier, "environment", lambda: here)
    patch.setattr(frontier, "code_fingerprint", lambda *_: "abc")


def run_until_it_is_killed(here, arguments):
    """A sweep that hangs when its journal has the environment, the calibration and two runs."""
    torch.set_num_threads(1)
    add = Journal.add

    def add_then_hang(journal, *about):
        add(journal, *about)
        if journal.path.read_bytes().count(b"\n") == 4:
            time.sleep(1000)

    with pytest.MonkeyPatch.context() as patch:
        always_from(here, patch)
        patch.setattr(Journal, "add", add_then_hang)
        frontier.main(arguments)


def test_a_sweep_that_is_killed_goes_on_to_the_same_result(tmp_path, monkeypatch):
    """SIGKILL leaves nothing a chance to tidy up. Both sweeps have the killed one's calibration.

    All have one environment, whatever happens to the checkout meanwhile.
    """
    here = frontier.environment()
    always_from(here, monkeypatch)
    shared = [*TINY, *THREE, "--epochs", "6", "--seeds", "1", "--sharpness-samples", "20"]
    arguments = [*shared, "--output", str(tmp_path / "killed")]
    journal = tmp_path / "killed/frontier_digits_cpu.jsonl"
    process = forks.context().Process(target=run_until_it_is_killed, args=(here, arguments))
    process.start()
    deadline = time.monotonic() + 120
    while not (journal.exists() and journal.read_bytes().count(b"\n") == 4):
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.join()
    kept = journal.read_text().splitlines()
    planned = 2 * len(THREE[1:]) - 1  # SGD's runs are the same in both panels
    assert len(kept) == 4

    (tmp_path / "whole").mkdir()
    (tmp_path / "whole/frontier_digits_cpu.jsonl").write_text("".join(line + "\n" for line in kept[:2]))
    results = []
    for folder in ("killed", "whole"):
        frontier.main([*shared, "--output", str(tmp_path / folder)])
        results.append(json.loads((tmp_path / folder / "frontier_digits_cpu.json").read_text()))
    assert results[0]["runs"]["finished"] == results[0]["runs"]["planned"] <= planned
    assert untimed(results[0]["configurations"]) == untimed(results[1]["configurations"])
    assert all(run["sharpness"] for row in results[0]["configurations"].values() for run in row["equal_time"]["runs"])
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
    with pytest.raises(ValueError, match="code = 'abc', which is 'def' now: give --restart"):
        Journal(path, {**HERE, "code": "def"})
    assert Journal(path, {**HERE, "commit": "2", "uncommitted_changes": True}).get({"seed": 0}) == 1.5
    assert Journal(path, {**HERE, "code": "def"}, restart=True).get({"seed": 0}) is None


def test_the_fingerprint_is_of_all_code_and_of_nothing_else(tmp_path):
    def write(name, content):
        path = tmp_path / "package" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        return code_fingerprint(tmp_path / "package")

    prints = [write("a.py", "1"), write("deep/b.py", "2"), write("a.py", "3"), write("library.so", "4")]
    assert len(set(prints)) == 4
    assert write("notes.md", "5") == prints[-1]
    assert write("a.py", "1") not in prints  # with the other files it is another one
    assert write("a.py", "3") == prints[-1]


def test_edited_code_does_not_go_on_with_old_runs_and_says_how_to_begin_anew(tmp_path, monkeypatch, capsys):
    """No commit is needed for it, nor git: only sources count."""
    seen = []
    monkeypatch.setattr(frontier, "code_fingerprint", lambda *packages: seen.append(packages) or str(len(seen)))
    arguments = [*TINY, *THREE, "--time-budget", "0", "--output", str(tmp_path)]
    frontier.main(arguments)
    with pytest.raises(SystemExit) as stopped:
        frontier.main(arguments)
    assert stopped.value.code == 2
    assert "code = '1', which is '2' now: give --restart" in capsys.readouterr().err
    frontier.main([*arguments, "--restart"])
    names = [{path.name for path in packages} for packages in seen]
    assert names == [{"esam_kernels", "benchmarks"}] * 3
    assert all((path / "__init__.py").exists() for path in seen[0])


def test_what_is_no_journal_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("no journal\nand no end of line")
    with pytest.raises(ValueError, match="is no journal"):
        Journal(path, HERE)
    assert path.read_text() == "no journal\nand no end of line"


@pytest.mark.parametrize(
    "change",
    [
        ["--lr", "0.2"],
        ["--rho", "0.3"],
        ["--width", "5"],
        ["--label-noise", "0.1"],
        ["--train-samples", "199"],
        ["--sharpness-samples", "9"],
    ],
)
def test_a_changed_setting_is_a_run_of_its_own(tmp_path, monkeypatch, change):
    monkeypatch.setattr(frontier, "calibrate", lambda images, args: timed(dict.fromkeys(args.configurations, 2.0)))
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
    monkeypatch.setattr(frontier, "calibrate", lambda images, args: timed(costs))
    return sweep(tmp_path, "--epochs", "12")


def test_epochs_are_equal_or_take_sgds_time_and_seeds_stay_balanced(planned):
    one_seed = [("sgd", 12), ("esam", 12), ("esam-interval2", 12), ("esam", 6), ("esam-interval2", 8)]
    assert planned.plan() == [Planned(name, seed, epochs) for seed in (0, 1) for name, epochs in one_seed]


def test_early_stopping_costs_its_share_of_the_epochs(tmp_path, monkeypatch):
    monkeypatch.setattr(frontier, "calibrate", lambda images, args: timed(dict.fromkeys(args.configurations, 1.0)))
    short = sweep(tmp_path, "--epochs", "10", "--seeds", "1", "--configurations", "sgd", "sgd-short")
    assert short.plan() == [Planned("sgd", 0, 10), Planned("sgd-short", 0, 2)]
    assert frontier.summarize(short)["configurations"]["sgd-short"]["training_time_over_sgd"] == 0.2


def test_only_seeds_that_all_have_finished_count(planned):
    def finish(runs):
        for run in runs:
            planned.journal.add(planned._run_key(run), fake_run(90.0 + run.seed))

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
    assert not any("on_front" in row["equal_epochs"] for row in rows.values())
    finish(plan[9:])
    rows = frontier.summarize(planned)["configurations"]
    assert {name: row["equal_epochs"]["on_front"] for name, row in rows.items()} == {
        "sgd": True,
        "esam": False,
        "esam-interval2": False,
    }


def test_a_run_is_expected_to_be_like_the_slowest_so_far(planned):
    """Its steps by a factor, and what comes besides as it is: what a short run has besides makes no long one longer."""
    sgd, esam = Planned("sgd", 0, 12), Planned("esam", 0, 12)
    steps = planned.steps * 12  # seconds of SGD's by the calibration; ESAM's are twice those
    planned.calibration["seconds_besides"] = 3.0
    assert planned.expected_seconds(esam) == pytest.approx(1.2 * 2 * steps + 3)
    planned.journal.add(planned._run_key(sgd), fake_run(seconds=1.1 * steps, besides=50.0))
    assert planned.expected_seconds(esam) == pytest.approx(1.2 * 2 * steps + 50)
    planned.journal.add(planned._run_key(esam), fake_run(seconds=3 * steps, besides=10.0))
    assert planned.expected_seconds(sgd._replace(seed=1)) == pytest.approx(1.5 * steps + 50)


def test_no_run_is_begun_that_would_not_end_in_time(planned, monkeypatch):
    trained, now = [], [0.0]

    def train_it(run, progress):
        trained.append(run.configuration)
        now[0] += seconds
        return fake_run(seconds=seconds, besides=0.0)

    monkeypatch.setattr(planned, "_train", train_it)
    monkeypatch.setattr(frontier, "perf_counter", lambda: now[0])
    first, second, *_ = planned.plan()
    seconds = planned.expected_seconds(first) / 1.2  # as calibrated
    planned.run(deadline=planned.expected_seconds(first) - 0.01)
    assert trained == []
    planned.run(deadline=seconds + planned.expected_seconds(second) - 0.01)
    assert trained == ["sgd"]
    planned.run(deadline=now[0] + planned.expected_seconds(second))
    assert trained == ["sgd", "esam"]


def test_configurations_take_turns_in_the_shared_order(tmp_path, monkeypatch):
    """That of ``clock.turn``, in which each follows every other equally often."""
    args = frontier.parse_args([*TINY, *THREE, "--rounds", "5", "--output", str(tmp_path)])
    order, make = [], train.Run

    def spied(name, *rest):
        run = make(name, *rest)
        run.stopwatch.mark = lambda mark=run.stopwatch.mark: order.append(name) or mark()
        return run

    monkeypatch.setattr(frontier, "Run", spied)
    frontier.calibrate(command_line.training_images(args), args)
    assert order[::2] == order[1::2] == [THREE[1:][i] for number in range(6) for i in turn(3, number)]


def test_what_a_run_needs_besides_its_steps_is_measured_before_the_first(tmp_path, monkeypatch):
    args = frontier.parse_args([*TINY, "--configurations", "sgd", "--output", str(tmp_path)])
    images = command_line.training_images(args)
    done = []
    monkeypatch.setattr(train.Run, "accuracy", lambda run: done.append("accuracy"))
    monkeypatch.setattr(train.Run, "sharpness", lambda run: done.append("sharpness") or time.sleep(0.05))
    assert frontier.calibrate(images, args)["seconds_besides"] >= 0.05
    assert done == ["accuracy", "sharpness"]


def test_what_says_most_comes_first(capsys):
    """A budget that ends early has SGD, SAM, ESAM and the controls of its choice; CIFAR-10 has each option once."""
    assert list(CONFIGURATIONS)[:5] == ["sgd", "sam", "esam", "esam-random", "esam-loss"]
    on_cifar10 = frontier.parse_args(["--data", "cifar10"]).configurations
    assert on_cifar10[:5] == list(CONFIGURATIONS)[:5]
    changed = {key for name in on_cifar10 for key in METHODS[name].options}
    assert changed == {"beta", "gamma", "interval", "granularity", "selection", "steering_dtype"}
    assert {METHODS[name].trainer for name in on_cifar10} == {"sgd", "sam", "esam"}
    assert frontier.parse_args(["--data", "cifar10", "--configurations", "sgd", "esam-beta1"]).configurations == [
        "sgd",
        "esam-beta1",
    ]


def test_configurations_that_the_options_make_the_same_share_their_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(frontier, "calibrate", lambda images, args: timed(dict.fromkeys(args.configurations, 1.0)))
    same = sweep(tmp_path, "--seeds", "1", "--beta", "1", "--configurations", "sgd", "esam", "esam-beta1")
    trained = []
    monkeypatch.setattr(same, "_train", lambda run, progress: trained.append(run.configuration) or fake_run())
    same.run(math.inf)
    assert trained == ["sgd", "esam"]
    assert same.result(Planned("esam-beta1", 0, 4)) == fake_run()


def test_every_configuration_trains_as_it_says(tmp_path):
    """The optimizers in the runs have the settings that the labels promise."""
    args = frontier.parse_args([*TINY, "--label-noise", "0", "--output", str(tmp_path)])
    task = command_line.task(args, command_line.training_images(args))
    options_of = {}
    for name in CONFIGURATIONS:
        run = train.Run(name, command_line.settings(args, 7), 1, task)
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
        "momentum": {"beta": 1, "gamma": 1, "ascent": "momentum", "rho": 0.3, "start": 0},
        "previous": {"beta": 1, "gamma": 1, "ascent": "previous", "rho": 0.1},
        "share-quarter": {"beta": 1, "gamma": 1, "ascent_share": 0.25},
        "sam-interval5": {"beta": 1, "gamma": 1, "interval": 5},
        # Of 200 images in batches of 128 there is one step in the run's one epoch.
        "esam-tail0.5": {"start": 0},
    }
    plain |= {"ascent": "gradient", "ascent_share": 1.0}
    for name, change in changes.items():
        group = options_of[name]
        wanted = plain | change
        assert {key: group[key] for key in wanted} == wanted, name
    assert options_of["sam-twice-rho"]["rho"] == 2 * rho
    assert "rho" not in options_of["sgd"]


def test_a_tail_is_sharp_in_the_last_share_of_the_steps_and_momentum_gives_way_to_sam():
    settings = Settings(0.1, 0.9, 0.0, {"rho": 0.2}, steps=10)
    groups = {}
    for name in ("sam-tail0.2", "esam-tail0.5", "momentum-then-sam"):
        torch.manual_seed(0)
        one = trainer(name, torch.nn.Linear(4, 3), settings, CPU)
        groups[name] = []
        for _ in range(10):
            one.step(torch.randn(8, 4), torch.arange(8) % 3)
            group = one.optimizer.param_groups[0]
            groups[name].append((group["ascent"], group["rho"], group["start"]))
    assert groups["sam-tail0.2"] == [("gradient", 0.2, 8)] * 10
    assert groups["esam-tail0.5"] == [("gradient", 0.2, 5)] * 10
    assert groups["momentum-then-sam"] == [("momentum", 0.3, 0)] * 8 + [("gradient", 0.2, 0)] * 2


def test_the_wrong_sign_goes_the_other_way_and_a_random_direction_nowhere_in_particular():
    """Both controls move as far as climbing against momentum does: along the moment, and at right angles to it."""
    settings = Settings(0.1, 0.9, 0.0)
    moves = {}
    for name in ("momentum", "momentum-plus", "random-direction"):
        torch.manual_seed(0)
        model = torch.nn.Linear(400, 3, bias=False)
        one = trainer(name, model, settings, CPU)
        batch = torch.randn(8, 400), torch.arange(8) % 3
        one.step(*batch)
        start, seen = model.weight.detach().clone(), []
        moment = one.optimizer.state[model.weight]["momentum_buffer"].clone()
        model.register_forward_pre_hook(lambda module, _, seen=seen: seen.append(module.weight.detach().clone()))
        one.step(*batch)
        moves[name] = (seen[-1] - start).flatten()
        assert moves[name].norm().item() == pytest.approx(0.3, rel=1e-4)
        cosine = torch.cosine_similarity(moves[name], moment.flatten(), dim=0).item()
        assert cosine == pytest.approx({"momentum": -1, "momentum-plus": 1, "random-direction": 0}[name], abs=0.1)
    torch.testing.assert_close(moves["momentum"], -moves["momentum-plus"], rtol=1e-3, atol=1e-6)


# Choosing on a validation part.

CHOOSE = ["--choose", "0.5", "1", "2", "--validation-samples", "100"]


def test_factors_are_chosen_on_images_that_are_neither_trained_nor_tested_on(tmp_path, monkeypatch):
    monkeypatch.setattr(frontier, "calibrate", lambda images, args: timed(dict.fromkeys(args.configurations, 1.0)))
    one = sweep(tmp_path, *CHOOSE, "--seeds", "1", "--configurations", "sgd", "esam")
    seen = []

    def train_it(planned, progress):
        seen.append(planned)
        best = {"sgd": 2, "esam": 0.5}[planned.configuration]
        return fake_run(accuracy=95.0 if planned.factor == best else 90.0)

    monkeypatch.setattr(one, "_train", train_it)
    one.run(math.inf)
    assert [run.seed for run in seen if run.choosing] == [frontier.CHOOSING_SEED] * 6
    assert seen[6:] == [Planned("sgd", 0, 4, 2.0), Planned("esam", 0, 4, 0.5)]
    settings = one._own(seen[6]).by(METHODS["sgd"]), one._own(seen[7]).by(METHODS["esam"])
    assert (settings[0].lr, settings[1].lr) == (2 * one.args.lr, one.args.lr)
    assert settings[1].esam["rho"] == one.args.rho / 2
    summary = frontier.summarize(one)["configurations"]
    assert {name: row["factor"] for name, row in summary.items()} == {"sgd": 2.0, "esam": 0.5}
    assert summary["esam"]["tried"] == {"0.5": 95.0, "1": 90.0, "2": 90.0}
    shown = tables.frontier(record.header("frontier", one.images.label, one.args) | frontier.summarize(one))
    first, *_, chosen = (block for block in tables.blocks(shown) if isinstance(block, tables.Table))
    rate, rho = f"lr {2 * one.args.lr:g}", f"{one.args.rho / 2:g}"
    assert [row[1] for row in first.rows] == [rate, rho]
    assert chosen.rows == [["SGD", "90.00", "90.00", "95.00"], ["ESAM", "95.00", "90.00", "90.00"]]
    stopped = sweep(tmp_path / "stopped", *CHOOSE, "--seeds", "1", "--configurations", "sgd", "esam")
    first, second = stopped.choices("sgd")[:2]
    stopped.journal.add(stopped._run_key(first), fake_run(accuracy=90.0))
    stopped.journal.add(stopped._run_key(second), fake_run(accuracy=0.0, diverged=True))
    shown = tables.frontier(record.header("frontier", one.images.label, one.args) | frontier.summarize(stopped))
    *_, chosen = (block for block in tables.blocks(shown) if isinstance(block, tables.Table))
    assert chosen.rows == [["SGD", "90.00", "diverged", ""]]
    validation, train_part = one.args.validation, one.images
    assert torch.equal(validation.train_images, train_part.train_images)
    assert len(validation.test_labels) == 100
    held_out = {image.numpy().tobytes() for image in validation.test_images}
    assert not held_out & {image.numpy().tobytes() for image in train_part.train_images}


def test_a_whole_sweep_with_choices_on_small_images_with_adamw(tmp_path, capsys):
    arguments = [*TINY, *CHOOSE[:2], *CHOOSE[4:], "--configurations", "sgd", "momentum", "nesterov", "random-direction"]
    arguments += [
        "--epochs",
        "2",
        "--image-size",
        "6",
        "--batch-size",
        "50",
        "--sharpness-samples",
        "0",
        "--output",
        str(tmp_path),
    ]
    with pytest.raises(SystemExit):
        frontier.main([*arguments, "--base", "adamw"])
    assert "--configurations nesterov: Nesterov's momentum is SGD's" in capsys.readouterr().err
    frontier.main(arguments)
    printed = capsys.readouterr().out
    assert "scikit-learn digits of 6 pixels" in printed
    assert "the first moment and the next step's gradient have a cosine of" in printed
    assert "| p against SGD |" in printed
    assert re.search(r"^\| momentum +\| +0\.15 \|", printed, re.MULTILINE)
    result = json.loads((tmp_path / "frontier_digits_cpu.json").read_text())
    runs = result["configurations"]["momentum"]["equal_epochs"]["runs"]
    assert all(-1 <= value <= 1 for run in runs for value in run["cosines"])
    assert len(runs[0]["cosines"]) == 2


def test_choosing_needs_images_to_choose_on(capsys):
    with pytest.raises(SystemExit):
        frontier.parse_args([*TINY, "--choose", "1", "2"])
    assert "--choose, --validation-samples and --train-samples go together" in capsys.readouterr().err


@pytest.mark.parametrize("sizes", [(2, 2), (3, 5), (5, 5)])
def test_welchs_p_is_that_of_scipy(sizes):
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(0)
    for shift in (0.0, 1.0, 4.0):
        these, those = generator.normal(size=sizes[0]), generator.normal(shift, 2.0, size=sizes[1])
        expected = stats.ttest_ind(these, those, equal_var=False).pvalue
        assert tables.welch(these, those) == pytest.approx(expected, rel=1e-3)


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


def test_images_that_are_not_augmented_are_those_that_there_are(tmp_path):
    plain, usual = sweep(tmp_path, "--no-augment").images, sweep(tmp_path).images
    (inputs, labels), *_ = plain.train_batches(200, torch.Generator().manual_seed(0))
    (shifted, same), *_ = usual.train_batches(200, torch.Generator().manual_seed(0))
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    assert torch.equal(inputs, plain.normalize(plain.train_images[order]))
    assert torch.equal(labels, plain.train_labels[order])
    assert torch.equal(labels, same)
    assert not torch.equal(shifted, inputs)
    assert ", not augmented" in plain.label


# The job.


def test_a_stopped_sweep_shows_what_it_has_and_goes_on(tmp_path, capsys, monkeypatch):
    costs = {"sgd": 1.0, "esam": 2.0, "esam-interval2": 1.5}  # with equal ones some runs would be the same
    monkeypatch.setattr(frontier, "calibrate", lambda images, args: timed(costs))
    arguments = [*TINY, *THREE, "--seeds", "1", "--sharpness-samples", "20", "--output", str(tmp_path)]
    frontier.main([*arguments, "--time-budget", "0"])
    printed = capsys.readouterr().out
    assert "Stopped after 0 of 5 runs: there is no Pareto front yet." in printed
    assert "| Pareto front |" not in printed
    assert "Run the same command again until it is finished: 0 of 5 runs done." in printed
    assert "nothing yet" in plots.describe_frontier(json.loads((tmp_path / "frontier_digits_cpu.json").read_text()))
    frontier.main(arguments)
    printed = capsys.readouterr().out
    assert "Stopped" not in printed
    assert "again" not in printed
    assert "| ESAM, every 2nd step |" in printed
    assert "3 configurations were tried" in printed
    result = json.loads((tmp_path / "frontier_digits_cpu.json").read_text())
    assert tables.frontier(result) in printed
    _, _, sharpness, about = tables.blocks(tables.frontier(result))
    assert sharpness.columns[3:8] == [f"loss rise at {distance}" for distance in (0.1, 0.2, 0.4, 0.8, 1.6)]
    assert sharpness.columns[-2:] == ["in SGD's time: top eigenvalue", "in SGD's time: loss rise at 0.2"]
    runs = [row[panel]["runs"][0] for row in result["configurations"].values() for panel in tables.PANELS]
    eigenvalue = float(sharpness.rows[1][2].partition(",")[0])
    assert eigenvalue == pytest.approx(runs[2]["sharpness"]["hessian"]["value"], rel=0.05)
    assert float(sharpness.rows[1][9]) == pytest.approx(runs[3]["sharpness"]["gradient_rise"][1], rel=0.05)
    converged = sum(run["sharpness"]["hessian"]["converged"] for run in runs[1:])
    assert f"{converged} of 5 converged" in about  # SGD's run is in both panels
    assert "straight up the gradient" in about
    frontier.main([*arguments, "--time-budget", "0", "--restart"])
    assert "Run the same command without --restart again until" in capsys.readouterr().out
    frontier.main(arguments)
    assert result["configurations"]["sgd"]["training_time_over_sgd"] == 1
    assert result["data"] == "200 images of scikit-learn digits, 20 % of the training labels wrong"
    assert any(row["equal_epochs"]["on_front"] for row in result["configurations"].values())
    assert 1_000 < (tmp_path / "frontier_digits_cpu.svg").stat().st_size < 200_000


def test_configurations_without_sgd_or_bf16_under_amp_are_refused_or_left_out(capsys):
    with pytest.raises(SystemExit):
        frontier.parse_args(["--configurations", "esam"])
    assert "--configurations lacks sgd" in capsys.readouterr().err
    assert not any("bf16" in name for name in frontier.parse_args(["--amp", "bf16"]).configurations)


def test_the_quick_form_has_fewer_runs_of_the_same_length_and_the_early_stopped_control():
    quick, full = frontier.parse_args(["--quick"]), frontier.parse_args([])
    assert (quick.epochs, quick.label_noise) == (full.epochs, full.label_noise)
    assert {"sgd", "sam", "esam", "sgd-short"} <= set(quick.configurations) < set(full.configurations)
    assert quick.seeds < full.seeds
    assert quick.rounds < full.rounds


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (["--beta", "0"], "beta"),
        (["--batch-size", "5000"], "--batch-size 5000 is more than the"),
        (["--batch-size", "0"], "--batch-size 0: at least 1 is needed"),
        (["--label-noise", "2"], "--label-noise 2.0: a share in [0, 1] is needed"),
        (["--lr", "nan"], "--lr nan: a number in [0, inf) is needed"),
        (["--momentum", "1"], "--momentum 1.0: a number in [0, 1) is needed"),
        (["--time-budget", "-1"], "--time-budget -1.0: a number in [0, inf) is needed"),
        (["--data", "cifar10"], "--data cifar10 needs --data-file"),
        (["--model", "vit_s", "--width", "200"], "width 200 cannot be shared"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_anything_is_measured(tmp_path, capsys, change, complaint):
    with pytest.raises(SystemExit) as stopped:
        frontier.main(["--configurations", "sgd", "esam", *change, "--device", "cpu", "--output", str(tmp_path)])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "usage:" in error
    assert complaint in error
    assert not list(tmp_path.iterdir())


def test_the_plots_of_equal_results_are_equal(tmp_path, planned):
    for run in planned.plan():
        planned.journal.add(planned._run_key(run), fake_run(50.0 if run.configuration == "esam" else 90.0))
    settings = {"model": "small"}
    result = {"data": "digits", "settings": settings} | frontier.summarize(planned)
    for name in ("one", "other"):
        plots.frontier(result, tmp_path / f"{name}.svg")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "other.svg").read_bytes()


# Training that diverges.


def test_a_diverged_run_is_shown_and_has_no_part_in_means_or_front(tmp_path, planned):
    """ESAM diverges from one seed, every second step of it from both."""
    for run in planned.plan():
        diverged = run.configuration == "esam-interval2" or (run.configuration, run.seed) == ("esam", 1)
        accuracy = {"sgd": 90.0, "esam": 95.0 - 80 * run.seed, "esam-interval2": 99.0}[run.configuration]
        planned.journal.add(planned._run_key(run), fake_run(accuracy, diverged=diverged))
    result = record.header("frontier", "digits", planned.args) | frontier.summarize(planned)
    rows = result["configurations"]
    assert [rows[name]["equal_epochs"]["diverged_seeds"] for name in rows] == [[], [1], [0, 1]]
    assert [rows[name]["equal_epochs"]["on_front"] for name in rows] == [True, False, False]
    table, caption = tables.blocks(tables.frontier(result))
    assert [row[2] for row in table.rows] == ["90.00 ± 0.00", "95.00, 1 of 2 diverged", "diverged"]
    assert "Seeds that diverged have no part" in caption
    assert "From some seeds diverged: ESAM, ESAM, every 2nd step." in plots.describe_frontier(result)
    with plots.mpl.rc_context({"svg.fonttype": "none"}):
        plots.frontier(result, tmp_path / "plot.svg")
    assert "ESAM, every 2nd step (2 of 2 diverged)" in (tmp_path / "plot.svg").read_text()


def test_a_sweep_goes_on_beyond_training_that_diverges(tmp_path, capsys, monkeypatch):
    """At this learning rate the loss is not finite; accuracy and sharpness of what is left would say nothing.

    As calibrated, no run is so short that its loss is not seen after a step.
    """
    monkeypatch.setattr(frontier, "calibrate", lambda images, args: timed(dict.fromkeys(args.configurations, 2.0)))
    frontier.main([*TINY, *THREE, "--seeds", "1", "--lr", "1e30", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "frontier_digits_cpu.json").read_text())
    assert result["runs"]["finished"] == result["runs"]["planned"]
    for row in result["configurations"].values():
        (run,) = row["equal_epochs"]["runs"]
        assert (run["train_loss"], run["diverged"], run["sharpness"]) == (None, True, None)
        assert row["equal_epochs"]["test_accuracy"] is None
    assert printed.count("diverged") >= 6
    assert "nan" not in printed


@pytest.mark.parametrize(
    ("given", "stem"),
    [
        ([], "frontier_digits_cpu"),
        (["--label-noise", "0.4"], "frontier_digits_noise0.4_cpu"),
        (["--data", "cifar10"], "frontier_cifar10_cpu"),
        (["--data", "cifar10", "--model", "vit_s", "--base", "adamw"], "frontier_cifar10_vit_s_adamw_cpu"),
        (["--data", "cifar10", "--label-noise", "0.2"], "frontier_cifar10_noise0.2_cpu"),
        (["--data", "cifar10", "--no-augment"], "frontier_cifar10_plain_cpu"),
    ],
)
def test_tasks_do_not_overwrite_each_others_results(given, stem):
    assert frontier.stem_of(frontier.parse_args([*given, "--device", "cpu"])) == stem
