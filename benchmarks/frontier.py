"""What accuracy costs: ESAM with each of its settings changed, its controls, SGD and SAM.

Each configuration is trained from several seeds (i) for as many epochs as SGD and (ii) for as many as take SGD's time.
A step's time is measured beforehand, all configurations taking turns. Every finished run is kept in a journal, from
which a sweep that was stopped goes on.

The task for a CPU is scikit-learn's digits with a fifth of the training labels wrong: on the digits as they are all
methods end within the spread of each other, and to resist wrong labels is what SAM is known for (arXiv 2010.01412,
section 3.3). The best radius is not the same for SAM and ESAM, so both are also shown with half and twice the radius.
ESAM's choice of samples (SDS) has two controls, those of the largest loss and random ones. Because SGD learns the wrong
labels late, it has a control that stops early: a fifth of the epochs.
"""

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, groupby, islice, repeat
from statistics import mean
from time import perf_counter
from typing import Any, NamedTuple

import torch
from tqdm import tqdm, trange

from . import data, options, plots, record, tables
from .environment import environment
from .journal import Journal
from .measure import ratio, spread
from .methods import BF16_ON_ITS_OWN, Settings
from .train import Run, mean_and_std, summarize_sharpness

WARM_UP = 1  # rounds of the calibration that are not counted
TURN = 10  # steps at least
PANELS = ("equal_epochs", "equal_time")


@dataclass(frozen=True)
class Configuration:
    """A point of the plot.

    Attributes:
        label: its name there.
        method: one of ``methods.METHODS``.
        changes: those of the options that are not as the command line has them.
        rho_factor: what the command line's radius is multiplied with.
        share_of_epochs: of those that a panel gives to it.
    """

    label: str
    method: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    rho_factor: float = 1.0
    share_of_epochs: float = 1.0

    def settings(self, args: argparse.Namespace, seed: int) -> Settings:
        """All options of a run."""
        return options.settings(args, **{"rho": self.rho_factor * args.rho, **self.changes, "seed": seed})


CONFIGURATIONS = {
    "sgd": Configuration("SGD", "sgd"),
    "sgd-short": Configuration("SGD, 1/5 of the epochs", "sgd", share_of_epochs=0.2),
    "sgd-bf16": Configuration("SGD, bf16 autocast", "sgd-bf16"),
    "sam": Configuration("SAM", "sam"),
    "sam-half-rho": Configuration("SAM, rho / 2", "sam", rho_factor=0.5),
    "sam-twice-rho": Configuration("SAM, rho * 2", "sam", rho_factor=2.0),
    "sam-interval2": Configuration("SAM, every 2nd step", "esam", {"beta": 1.0, "gamma": 1.0, "interval": 2}),
    "esam": Configuration("ESAM", "esam"),
    "esam-bf16": Configuration("ESAM, bf16 steering", "esam-bf16"),
    "esam-half-rho": Configuration("ESAM, rho / 2", "esam", rho_factor=0.5),
    "esam-twice-rho": Configuration("ESAM, rho * 2", "esam", rho_factor=2.0),
    "esam-beta0.3": Configuration("ESAM, beta 0.3", "esam", {"beta": 0.3}),
    "esam-beta1": Configuration("ESAM, beta 1", "esam", {"beta": 1.0}),
    "esam-gamma0.25": Configuration("ESAM, gamma 0.25", "esam", {"gamma": 0.25}),
    "esam-gamma0.75": Configuration("ESAM, gamma 0.75", "esam", {"gamma": 0.75}),
    "esam-gamma1": Configuration("ESAM, gamma 1", "esam", {"gamma": 1.0}),
    "esam-element": Configuration("ESAM, element masks", "esam", {"granularity": "element"}),
    "esam-interval2": Configuration("ESAM, every 2nd step", "esam", {"interval": 2}),
    "esam-interval5": Configuration("ESAM, every 5th step", "esam", {"interval": 5}),
    "esam-loss": Configuration("ESAM, largest losses", "esam", {"selection": "loss"}),
    "esam-random": Configuration("ESAM, random samples", "esam", {"selection": "random"}),
    "esam-random-bf16": Configuration("ESAM, random samples, bf16 steering", "esam-bf16", {"selection": "random"}),
}
RECIPES: dict[str, dict[str, Any]] = {
    "digits": {"width": 32, "epochs": 50, "label_noise": 0.2, "rho": 0.2},
    "cifar10": {"epochs": 20},
}
QUICK = {"configurations": ["sgd", "sam", "esam", "esam-bf16", "esam-random"], "epochs": 10, "seeds": 2, "rounds": 3}
# Options that say which runs there are, and nothing of a run.
OF_THE_SWEEP = ("configurations", "epochs", "seeds", "rounds", "time_budget", "quick", "restart")


class Planned(NamedTuple):
    """A run of the sweep."""

    configuration: str
    seed: int
    epochs: int


class Sweep:
    """All runs there are to be, and the journal of those there have been.

    Attributes:
        calibration: for each configuration the seconds of a step and their ratio to SGD's: medians and quartiles.
        epochs: for each panel and configuration, how many.
    """

    def __init__(self, images: data.ImageData, args: argparse.Namespace, journal: Journal) -> None:
        self.images = images
        self.args = args
        self.journal = journal
        self.steps = images.steps_per_epoch(args.batch_size)
        key = self._key(calibration={name: self._settings(name, 0) for name in args.configurations}, rounds=args.rounds)
        if journal.get(key) is None:
            journal.add(key, calibrate(images, args))
        self.calibration: dict[str, Any] = journal.get(key)
        self.epochs: dict[str, dict[str, int]] = {panel: {} for panel in PANELS}
        for name in args.configurations:
            epochs = CONFIGURATIONS[name].share_of_epochs * args.epochs
            cost = self.calibration[name]["time_over_sgd"]["median"]
            self.epochs["equal_epochs"][name] = max(1, round(epochs))
            self.epochs["equal_time"][name] = max(1, round(epochs / cost))

    def plan(self) -> list[Planned]:
        """The runs in their order: all configurations of a seed before the next, so that a stop leaves them equal."""
        runs = [
            Planned(name, seed, self.epochs[panel][name])
            for seed in range(self.args.seeds)
            for panel in PANELS
            for name in self.args.configurations
        ]
        return list(dict.fromkeys(runs))  # SGD's time is SGD's epochs

    def result(self, planned: Planned) -> dict[str, Any] | None:
        """What a run gave; None if it is still to be made."""
        return self.journal.get(self._run_key(planned))

    def run(self, deadline: float) -> None:
        """Make the runs that are still to be made, and begin none that would not end by the deadline."""
        missing = [planned for planned in self.plan() if self.result(planned) is None]
        slack = 1.2  # a run's time over that of its steps, which is all that the calibration knows
        with tqdm(total=self.steps * sum(planned.epochs for planned in missing), unit="step") as progress:
            for planned in missing:
                if self.result(planned) is not None:
                    continue  # the options make two configurations the same
                median = self.calibration[planned.configuration]["seconds_per_step"]["median"]
                expected, start = self.steps * planned.epochs * median, perf_counter()
                if start + slack * expected > deadline:
                    return
                progress.set_description(f"seed {planned.seed}, {CONFIGURATIONS[planned.configuration].label}")
                self.journal.add(self._run_key(planned), self._train(planned, progress))
                slack = max(slack, (perf_counter() - start) / expected)

    def _train(self, planned: Planned, progress: tqdm) -> dict[str, Any]:
        configuration = CONFIGURATIONS[planned.configuration]
        settings = configuration.settings(self.args, planned.seed)
        run = Run(configuration.method, settings, planned.epochs, self.images, self.args)
        for _ in range(planned.epochs):
            run.train_epoch(progress, test=False)
        return {
            "test_accuracy": run.accuracy(),
            "train_loss": run.curve[-1]["train_loss"],
            "seconds": sum(epoch["seconds"] for epoch in run.curve),
            "sharpness": run.sharpness() if self.args.sharpness_samples else None,
        }

    def _run_key(self, planned: Planned) -> dict[str, Any]:
        return self._key(
            method=CONFIGURATIONS[planned.configuration].method,
            settings=self._settings(planned.configuration, planned.seed),
            epochs=planned.epochs,
        )

    def _settings(self, name: str, seed: int) -> dict[str, Any]:
        settings = asdict(CONFIGURATIONS[name].settings(self.args, seed))
        return {key: str(value) if isinstance(value, torch.dtype) else value for key, value in settings.items()}

    def _key(self, **more: Any) -> dict[str, Any]:
        shared = {name: value for name, value in options.as_json(self.args).items() if name not in OF_THE_SWEEP}
        return {**shared, "images": self.images.label, **more}


def calibrate(images: data.ImageData, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step of each configuration, with its batch's preparation, and their ratios to SGD's.

    In every round each takes a turn, in an order that rotates; a turn is a whole number of every interval.
    """
    configurations = {name: CONFIGURATIONS[name] for name in args.configurations}
    settings = {name: configuration.settings(args, seed=0) for name, configuration in configurations.items()}
    runs = {name: Run(configurations[name].method, settings[name], 1, images, args) for name in configurations}
    batches = {name: endless_batches(run, args.batch_size) for name, run in runs.items()}
    interval = math.lcm(*(one.interval for one in settings.values()))
    turn = interval * math.ceil(TURN / interval)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in trange(WARM_UP + args.rounds, desc="calibration", unit="round", leave=False):
        first = number % len(runs)
        for name in [*args.configurations[first:], *args.configurations[:first]]:
            run = runs[name]
            run.stopwatch.mark()
            for inputs, targets in islice(batches[name], turn):
                run.trainer.step(inputs, targets)
            run.stopwatch.mark()
            seconds[name] += [lap / turn for lap in run.stopwatch.laps()]
    seconds = {name: laps[WARM_UP:] for name, laps in seconds.items()}
    return {
        name: {"seconds_per_step": spread(laps)._asdict(), "time_over_sgd": ratio(laps, seconds["sgd"])._asdict()}
        for name, laps in seconds.items()
    }


def endless_batches(run: Run, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A run's batches, one epoch after another."""
    return chain.from_iterable(run.images.train_batches(batch_size, run.generator) for _ in repeat(None))


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which of the points (cost, gain) no other one beats: in one of the two, without losing in the other."""
    on_front, best = [False] * len(points), -math.inf
    for _, group in groupby(sorted(range(len(points)), key=lambda i: points[i][0]), key=lambda i: points[i][0]):
        equally_dear = list(group)
        top = max(points[i][1] for i in equally_dear)
        if top > best:
            for i in equally_dear:
                on_front[i] = points[i][1] == top
            best = top
    return on_front


def summarize(sweep: Sweep) -> dict[str, Any]:
    """For each configuration its cost, and in each panel its accuracy over the seeds that all configurations have.

    ``training_time_over_sgd`` is the cost at equal epochs: a step's time, times the share of the epochs.

    While no seed has been finished by all, a panel shows the runs of the first that there are.
    """
    args = sweep.args
    configurations: dict[str, dict[str, Any]] = {}
    for name in args.configurations:
        timed, share = sweep.calibration[name], sweep.epochs["equal_epochs"][name] / args.epochs
        training_time = share * timed["time_over_sgd"]["median"]
        configurations[name] = {"label": CONFIGURATIONS[name].label, **timed, "training_time_over_sgd": training_time}
    for panel in PANELS:
        runs = {
            name: [sweep.result(Planned(name, seed, sweep.epochs[panel][name])) for seed in range(args.seeds)]
            for name in configurations
        }
        seeds = [seed for seed in range(args.seeds) if all(results[seed] for results in runs.values())] or [0]
        for name, results in runs.items():
            counted = [result for seed in seeds if (result := results[seed]) is not None]
            configurations[name][panel] = summarize_runs(counted, sweep.epochs[panel][name]) if counted else None
    shown = [configuration for configuration in configurations.values() if configuration["equal_epochs"]]
    points = [(one["training_time_over_sgd"], one["equal_epochs"]["test_accuracy"]["mean"]) for one in shown]
    for configuration, on_front in zip(shown, pareto_front(points)):
        configuration["equal_epochs"]["on_front"] = on_front
    plan = sweep.plan()
    return {
        "steps_per_epoch": sweep.steps,
        "runs": {"finished": sum(sweep.result(planned) is not None for planned in plan), "planned": len(plan)},
        "configurations": configurations,
    }


def summarize_runs(runs: Sequence[dict[str, Any]], epochs: int) -> dict[str, Any]:
    """What a configuration's runs from several seeds come to, and the runs themselves."""
    return {
        "epochs": epochs,
        "seeds": len(runs),
        "test_accuracy": mean_and_std([run["test_accuracy"] for run in runs]),
        "seconds": mean(run["seconds"] for run in runs),
        "sharpness": summarize_sharpness([run["sharpness"] for run in runs if run["sharpness"]]),
        "runs": list(runs),
    }


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = options.make_training_parser(__doc__ or "")
    add = parser.add_argument
    add("--configurations", nargs="+", choices=CONFIGURATIONS, metavar="NAME", help=f"of {', '.join(CONFIGURATIONS)}")
    add("--rounds", type=int, default=8, help="of the calibration, at which all take turns; default: %(default)s")
    add("--time-budget", type=float, metavar="SECONDS", help="begin no run that would not end within it")
    add("--quick", action="store_true", help="few configurations, epochs and seeds: to see that it works")
    add("--restart", action="store_true", help="do not go on with the runs that are in the output folder's journal")
    parser.set_defaults(sharpness_samples=0)
    quick = QUICK if parser.parse_known_args(argv)[0].quick else {}
    args = options.parse(parser, argv, {name: recipe | quick for name, recipe in RECIPES.items()})
    if args.configurations is None:
        args.configurations = list(CONFIGURATIONS)
    if args.amp:  # it sets the precision of all passes
        own = [name for name in args.configurations if CONFIGURATIONS[name].method in BF16_ON_ITS_OWN]
        args.configurations = [name for name in args.configurations if name not in own]
    if "sgd" not in args.configurations:
        parser.error("--configurations lacks sgd, which all are compared with")
    options.check_training(parser, args)
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: at least 1 is needed")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Make the runs that are still to be made, write the result and print the table."""
    started = perf_counter()
    args = parse_args(argv)
    images = options.training_images(args)
    stem = f"frontier_{args.data}_{args.device}"
    here = environment()
    journal = Journal(args.output / f"{stem}.jsonl", here, args.restart)
    sweep = Sweep(images, args, journal)
    sweep.run(math.inf if args.time_budget is None else started + args.time_budget)
    result = record.header("frontier", images.label, args) | {"environment": here} | summarize(sweep)
    record.save(result, args.output, stem)
    plots.frontier(result, args.output / f"{stem}.svg")
    print(tables.frontier(result))
    print(f"\nWritten to {args.output}: {stem}.json, {stem}.svg; {journal.path.name} holds the single runs")


if __name__ == "__main__":
    main()
