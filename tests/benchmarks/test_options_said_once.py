"""ESAM's options are said in ``esam_kernels.options`` alone: command lines, ESAM and the documents follow."""

import argparse
import dataclasses
import re

import pytest
import torch

from benchmarks.commands import command_line, frontier, memory, report, rounding, step_cost, train
from benchmarks.report import documents
from benchmarks.training import trainers
from benchmarks.training.methods import METHODS
from esam_kernels.options import OPTIONS

# Of no type that says what to give it.
SAMPLES = {"rho": 0.3, "steering_dtype": "bfloat16"}


def given(option):
    """What an option is given on a command line, and what ESAM must then have: never the default."""
    flag = f"--{option.name.replace('_', '-')}"
    if option.kind is bool:
        return ([f"--no{flag[1:]}"] if option.default else [flag]), not option.default
    if option.choices:
        value = option.choices[-1]
    else:
        value = SAMPLES.get(option.name, option.default + 2 if option.kind is int else 0.37)
    return [flag, str(value)], value


GIVEN = {name: given(option) for name, option in OPTIONS.items() if name != "seed"}


def parsed(command, arguments):
    """The command line of a benchmark, of step cost's that of its first case."""
    if command is memory:
        return memory.make_parser().parse_args(arguments)
    args = command.parse_args(arguments)
    return args[1][0] if command is step_cost else args


def made_by(settings, name="esam"):
    """The parameter group of the optimizer that a method makes."""
    return trainers.trainer(name, torch.nn.Linear(1, 1), settings, torch.device("cpu")).optimizer.param_groups[0]


def test_what_is_given_is_not_the_default():
    assert all(value != OPTIONS[name].default for name, (_, value) in GIVEN.items())


# The parts of a step, which step cost shows, are those of a sharp one.
@pytest.mark.parametrize(
    ("command", "name"),
    [
        (command, name)
        for command in (train, frontier, memory, step_cost, rounding)
        for name in GIVEN
        if (command, name) not in ((step_cost, "interval"), (step_cost, "start"))
    ],
)
def test_an_option_that_is_given_reaches_esam(command, name):
    arguments, value = GIVEN[name]
    args = parsed(command, ["--device", "cpu", *arguments])
    radius = {"rho": args.rho[0]} if command is rounding else {}  # it takes several
    group = made_by(command_line.settings(args, 5, **radius))
    assert group[name] == value
    assert group["seed"] == 5


def test_what_is_not_given_has_the_default_of_the_table():
    args = train.parse_args(["--device", "cpu"])
    defaults = {name: option.default for name, option in OPTIONS.items()}
    assert command_line.settings(args).esam == {**defaults, "rho": 0.05}


@pytest.mark.parametrize(("ascent", "rho"), [("momentum", 0.3), ("previous", 0.1)])
def test_a_radius_that_is_not_given_suits_the_direction_of_ascent(ascent, rho):
    args = train.parse_args(["--device", "cpu", "--ascent", ascent])
    assert args.rho == command_line.settings(args).esam["rho"] == rho
    assert made_by(trainers.Settings(0.1, 0.9, 0.0), ascent)["rho"] == rho
    given = trainers.Settings(0.1, 0.9, 0.0, {"ascent": ascent, "rho": 0.7})
    assert made_by(given, ascent)["rho"] == 0.7


def test_a_new_row_of_the_table_is_an_option_everywhere(monkeypatch, capsys):
    """It is on the command lines, reaches ESAM, and stands in the documents' table, with no edit in the benchmarks."""
    new = dataclasses.replace(OPTIONS["interval"], name="warm_up", default=4, meaning="plain steps at first")
    monkeypatch.setitem(OPTIONS, new.name, new)
    seen = []
    monkeypatch.setattr(trainers, "ESAM", lambda *_, **options: seen.append(options) or torch.optim.SGD(_[0]))
    for command in (train, frontier, step_cost, memory, rounding):
        with pytest.raises(SystemExit):
            parsed(command, ["--help"])
        assert "--warm-up" in capsys.readouterr().out
    for given, value in ([], 4), (["--warm-up", "9"], 9):
        made_by(command_line.settings(train.parse_args(["--device", "cpu", *given])))
        assert seen[-1]["warm_up"] == value
    assert "| `warm_up` | 4 | plain steps at first |" in documents.options_table()


def test_a_recipe_has_radius_and_share_of_its_own_and_the_help_says_so(capsys):
    args = train.parse_args(["--model", "wrn28_10", "--device", "cpu"])
    assert (args.rho, args.beta) == (0.1, 0.5)
    with pytest.raises(SystemExit):
        train.parse_args(["--help"])
    assert "default: what suits --ascent, for wrn28_10 0.1" in " ".join(capsys.readouterr().out.split())


def test_the_help_is_the_tables_sentence(capsys):
    parser = argparse.ArgumentParser()
    command_line.add_esam(parser)
    text = " ".join(parser.format_help().split()).replace("- ", "-")
    assert all(" ".join(option.meaning.split()) in text for name, option in OPTIONS.items() if name != "seed")


def test_settings_refuse_what_is_no_option():
    with pytest.raises(ValueError, match="ESAM has no option betta: it has rho, adaptive"):
        trainers.Settings(0.1, 0.9, 0.0, {"betta": 0.5})


@pytest.mark.parametrize("name", METHODS)
def test_the_ways_to_train_change_options_that_there_are(name):
    assert METHODS[name].options.keys() <= OPTIONS.keys()
    assert METHODS[name].trainer in trainers.TRAINERS


@pytest.mark.parametrize(
    ("file", "name", "made"),
    [("docs/options.md", "options", documents.options_table), ("README.md", "options:names", documents.option_names)],
)
def test_the_documents_have_every_option_as_it_is(file, name, made):
    """If this fails: ``python -m benchmarks report``."""
    text = (report.ROOT / file).read_text()
    shown = text.partition(f"<!-- {name} -->")[2].partition(f"<!-- /{name} -->")[0].strip()
    assert shown == made()
    assert all(re.search(rf"`{name}[`=]", shown) for name in OPTIONS)


def test_adaptive_holds_for_every_implementation():
    """So that SAM and ESAM are compared within neighbourhoods of one kind."""
    settings = trainers.Settings(0.1, 0.0, 0.0, {"rho": 0.5, "adaptive": True, "beta": 1.0, "gamma": 1.0})
    weights = {}
    for name in ("sam", "sam-davda54", "sam-foreach", "esam"):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        one = trainers.trainer(name, model, settings, torch.device("cpu"))
        one.step(torch.randn(8, 4), torch.arange(8) % 3)
        weights[name] = model.weight.detach()
    torch.testing.assert_close(weights["sam"], weights["esam"])
    torch.testing.assert_close(weights["sam-davda54"], weights["esam"])
    torch.testing.assert_close(weights["sam-foreach"], weights["esam"])
