"""What accuracy costs: ESAM with each of its settings changed, its controls, SGD and SAM.

Each configuration is trained from several seeds (i) for as many epochs as SGD and (ii) for as many as take SGD's time.
A step's time is measured beforehand, all configurations taking turns. Every finished run is kept in a journal, with the
sharpness of what it found, and from it a sweep that was stopped goes on: within a --time-budget, the same command is
given again and again until it is finished.

The task for a CPU is scikit-learn's digits with a fifth of the training labels wrong: on the digits as they are all
methods end within the spread of each other, and to resist wrong labels is what SAM is known for (arXiv 2010.01412,
section 3.3). The best radius is not the same for SAM and ESAM, so both are also shown with half and twice the radius.
ESAM's choice of samples (SDS) has two controls, those of the largest loss and random ones. Because SGD learns the wrong
labels late, it has a control that stops early: a fifth of the epochs.
"""

import argparse
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import chain, groupby, islice, repeat
from statistics import mean
from time import perf_counter
from typing import Any, NamedTuple

import torch

from .. import record
from ..measuring.clock import ratio, spread, turn
from ..measuring.environment import environment
from ..measuring.journal import PACKAGES, Journal, code_fingerprint
from ..measuring.progress import Progress, following
from ..report import tables
from ..report.tables import PANELS
from ..training.data import ImageData
from ..training.landscape import TOLERANCE
from ..training.methods import METHODS
from ..training.run import Run
from ..training.trainers import Settings, set_step
from . import command_line
from .refusals import refusals

WARM_UP = 1  # rounds of the calibration that are not counted
TURN = 10  # steps at least
CHOOSING_SEED = 1000  # the first of the seeds of which factors are chosen, and no accuracy is reported
SLOWDOWN = 1.2  # of a run's steps beside the calibration's, until a run is slower


# What says most comes first, as a time budget may cut off the rest: the optimizers, the controls of ESAM's choice of
# samples, SGD's controls, and bf16; then one option at a time.
CONFIGURATIONS = (
    "sgd",
    "sam",
    "esam",
    "esam-random",
    "esam-loss",
    "sgd-short",
    "momentum",
    "previous",
    "share-quarter",
    "share-half",
    "sam-tail0.2",
    "sam-tail0.5",
    "esam-tail0.2",
    "esam-tail0.5",
    "sam-interval5",
    "momentum-then-sam",
    "momentum-random",
    "nesterov",
    "momentum-plus",
    "random-direction",
    "sgd-bf16",
    "esam-bf16",
    "esam-random-bf16",
    "esam-gamma0.25",
    "esam-gamma0.75",
    "esam-gamma1",
    "esam-beta0.3",
    "esam-beta1",
    "esam-element",
    "esam-interval2",
    "esam-interval5",
    "esam-half-rho",
    "esam-twice-rho",
    "sam-half-rho",
    "sam-twice-rho",
    "sam-interval2",
)
MORE = ("sam-own", "sam-foreach")  # if asked for: the same as SAM
CORE = ["sgd", "sam", "esam", "esam-random", "esam-loss"]
RECIPES: dict[str, dict[str, Any]] = {
    "digits": {"width": 32, "epochs": 50, "label_noise": 0.2, "rho": 0.2},
    # Hours on a GPU even so: each of ESAM's options once.
    "cifar10": {
        "epochs": 20,
        "configurations": [*CORE, "esam-bf16", "esam-gamma0.25", "esam-beta0.3", "esam-element", "esam-interval2"],
    },
}
# Not fewer epochs: SGD would not have learnt the wrong labels yet, nor ESAM the right ones.
QUICK = {"configurations": ["sgd", "sam", "esam", "esam-random", "sgd-short"], "seeds": 2, "rounds": 3}
# Options that say which runs there are, and nothing of a run.
OF_THE_SWEEP = (
    "configurations",
    "epochs",
    "seeds",
    "rounds",
    "time_budget",
    "quick",
    "choose",
    "choose_seeds",
    "validation",
    "validation_samples",
)


class Planned(NamedTuple):
    """A run of the sweep."""

    configuration: str
    seed: int
    epochs: int
    factor: float | None = 1.0  # of its radius or learning rate; None while it is to be chosen
    choosing: bool = False  # tested on the validation part


class Sweep:
    """All runs there are to be, and the journal of those there have been.

    Attributes:
        calibration: what ``calibrate`` returned, now or when the journal was begun.
        epochs: for each panel and configuration, how many.
    """

    def __init__(self, images: ImageData, args: argparse.Namespace, journal: Journal) -> None:
        self.images = images
        self.args = args
        self.task = command_line.task(args, images)
        self.journal = journal
        self.steps = images.steps_per_epoch(args.batch_size)
        key = self._key(calibration={name: self._settings(name, 0) for name in args.configurations}, rounds=args.rounds)
        if journal.get(key) is None:
            journal.add(key, calibrate(images, args))
        self.calibration: dict[str, Any] = journal.get(key)
        self.epochs: dict[str, dict[str, int]] = {panel: {} for panel in PANELS}
        for name in args.configurations:
            epochs = METHODS[name].share_of_epochs * args.epochs
            cost = self.calibration["steps"][name]["time_over_sgd"]["median"]
            self.epochs["equal_epochs"][name] = max(1, round(epochs))
            self.epochs["equal_time"][name] = max(1, round(epochs / cost))

    def choices(self, name: str) -> list[Planned]:
        """The runs of which a configuration's factor is chosen, by as many for each; none if none is to be chosen."""
        epochs = self.epochs["equal_epochs"][name]
        seeds = range(CHOOSING_SEED, CHOOSING_SEED + self.args.choose_seeds)
        return [Planned(name, seed, epochs, factor, True) for factor in self.args.choose or () for seed in seeds]

    def factor(self, name: str) -> float | None:
        """What a configuration's radius or learning rate is multiplied with: what did best on the validation part.

        None while its runs are not finished. Of equals it is the one nearest to 1; what diverged is not chosen.
        """
        if not self.args.choose:
            return 1.0
        tried = self.tried(name)
        if tried.keys() != set(self.args.choose):
            return None
        gain = {factor: -math.inf if accuracy is None else accuracy for factor, accuracy in tried.items()}
        return min(gain, key=lambda factor: (-gain[factor], abs(math.log(factor))))

    def tried(self, name: str) -> dict[float, float | None]:
        """The mean accuracy on the validation part with each factor of which all runs are finished.

        None where one diverged.
        """
        found: dict[float, list[dict[str, Any] | None]] = {}
        for run in self.choices(name):
            assert run.factor is not None
            found.setdefault(run.factor, []).append(self.result(run))
        finished = {factor: [run for run in runs if run] for factor, runs in found.items() if all(runs)}
        return {
            factor: None if any(run["diverged"] for run in runs) else mean(run["test_accuracy"] for run in runs)
            for factor, runs in finished.items()
        }

    def plan(self) -> list[Planned]:
        """The runs in their order: all configurations of a seed before the next, so that a stop leaves them equal.

        Before them come those of which factors are chosen.
        """
        choosing = [run for name in self.args.configurations for run in self.choices(name)]
        return choosing + self.measured()

    def measured(self) -> list[Planned]:
        """The runs whose accuracy is reported."""
        factors = {name: self.factor(name) for name in self.args.configurations}
        runs = [
            Planned(name, seed, self.epochs[panel][name], factors[name])
            for seed in range(self.args.seeds)
            for panel in PANELS
            for name in self.args.configurations
        ]
        return list(dict.fromkeys(runs))  # SGD's time is SGD's epochs

    def result(self, planned: Planned) -> dict[str, Any] | None:
        """What a run gave; None if it is still to be made."""
        if planned.factor is None:
            return None
        return self.journal.get(self._run_key(planned))

    def run(self, deadline: float, finished: Callable[["Sweep"], object] = lambda _: None) -> None:
        """Make the runs that are still to be made, up to the first that is not expected to end by the deadline.

        Args:
            deadline: in seconds of ``perf_counter``.
            finished: called after each run.
        """
        missing = [planned for planned in self.plan() if self.result(planned) is None]
        progress = Progress(self.steps * sum(planned.epochs for planned in missing), unit="step")
        choosing = [planned for planned in missing if planned.choosing]
        for planned in chain(choosing, lazily(self.measured)):  # the factors are known when all are chosen
            if self.result(planned) is not None:
                continue  # the options make two configurations the same
            if perf_counter() + self.expected_seconds(planned) > deadline:
                return
            progress.describe(f"seed {planned.seed}, {METHODS[planned.configuration].label}")
            self.journal.add(self._run_key(planned), self._train(planned, progress))
            finished(self)

    def expected_seconds(self, planned: Planned) -> float:
        """How long a run takes if it is like the slowest so far.

        That is a factor on the calibrated time of its steps, and besides what does not depend on them: the network's
        making, its test and its sharpness.
        """
        finished = [(run, result) for run in self.plan() if (result := self.result(run)) is not None]
        factor = max([SLOWDOWN, *(result["seconds"] / self._calibrated_seconds(run) for run, result in finished)])
        besides = max([self.calibration["seconds_besides"], *(result["seconds_besides"] for _, result in finished)])
        return factor * self._calibrated_seconds(planned) + besides

    def _calibrated_seconds(self, planned: Planned) -> float:
        per_step = self.calibration["steps"][planned.configuration]["seconds_per_step"]["median"]
        return self.steps * planned.epochs * per_step

    def _train(self, planned: Planned, progress: Progress) -> dict[str, Any]:
        start = perf_counter()
        task = replace(self.task, images=self.args.validation, sharpness_samples=0) if planned.choosing else self.task
        run = Run(planned.configuration, self._own(planned), planned.epochs, task)
        for _ in range(planned.epochs):
            run.train_epoch(progress, test=False)
        seconds = sum(epoch["seconds"] for epoch in run.curve)
        return {
            "test_accuracy": run.accuracy(),
            "train_loss": run.curve[-1]["train_loss"],
            "diverged": run.diverged,
            "sharpness": run.sharpness(),
            "cosines": [epoch["cosine"] for epoch in run.curve if "cosine" in epoch],
            "seconds": seconds,
            "seconds_besides": perf_counter() - start - seconds,
        }

    def _own(self, planned: Planned) -> Settings:
        """The settings of a run, of which its method makes its own."""
        assert planned.factor is not None
        settings = command_line.settings(self.args, planned.seed)
        return replace(settings, factor=planned.factor, steps=planned.epochs * self.steps)

    def _run_key(self, planned: Planned) -> dict[str, Any]:
        return self._key(
            trainer=METHODS[planned.configuration].trainer,
            settings=self._as_json(planned.configuration, self._own(planned)),
            epochs=planned.epochs,
            **({"validation_samples": self.args.validation_samples} if planned.choosing else {}),
        )

    def _settings(self, name: str, seed: int) -> dict[str, Any]:
        return self._as_json(name, command_line.settings(self.args, seed))

    @staticmethod
    def _as_json(name: str, given: Settings) -> dict[str, Any]:
        settings = asdict(given.by(METHODS[name]))
        return {key: str(value) if isinstance(value, torch.dtype) else value for key, value in settings.items()}

    def _key(self, **more: Any) -> dict[str, Any]:
        shared = {name: value for name, value in record.as_json(self.args).items() if name not in OF_THE_SWEEP}
        return {**shared, "images": self.images.label, **more}


def calibrate(images: ImageData, args: argparse.Namespace) -> dict[str, Any]:
    """How long a step of each configuration takes, and what a run needs besides.

    In every round each takes a turn, in the order of ``clock.turn``. It is a whole number of every method's cycle, and
    for a method that is sharpness-aware in a share of the training it is like the whole of it.

    Returns:
        ``steps``: for each configuration the seconds of a step, with its batch's preparation, and their ratio to SGD's,
        medians and quartiles; ``seconds_besides``: of the making, test and sharpness of SGD's network.
    """
    start = perf_counter()
    task, settings = command_line.task(args, images), command_line.settings(args)
    untrained = Run("sgd", settings, 1, task)
    untrained.accuracy()
    untrained.sharpness()
    seconds_besides = perf_counter() - start
    cycle = math.lcm(*(math.lcm(settings.esam["interval"], METHODS[name].cycle) for name in args.configurations))
    steps = cycle * math.ceil(TURN / cycle)
    runs = {name: Run(name, replace(settings, steps=steps), 1, task) for name in args.configurations}
    batches = {name: endless_batches(run, args.batch_size) for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in following(range(WARM_UP + args.rounds), WARM_UP + args.rounds, "calibration"):
        for name in [list(runs)[i] for i in turn(len(runs), number)]:
            run = runs[name]
            if METHODS[name].late_share < 1:
                set_step(run.trainer, 0)
            run.stopwatch.mark()
            for inputs, targets in islice(batches[name], steps):
                run.trainer.step(inputs, targets)
            run.stopwatch.mark()
            seconds[name] += [lap / steps for lap in run.stopwatch.laps()]
    seconds = {name: laps[WARM_UP:] for name, laps in seconds.items()}
    return {
        "steps": {
            name: {"seconds_per_step": spread(laps)._asdict(), "time_over_sgd": ratio(laps, seconds["sgd"])._asdict()}
            for name, laps in seconds.items()
        },
        "seconds_besides": seconds_besides,
    }


def lazily(make: Callable[[], Iterable[Planned]]) -> Iterator[Planned]:
    """What ``make`` returns when the first of it is asked for."""
    yield from make()


def endless_batches(run: Run, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A run's batches, one epoch after another."""
    return chain.from_iterable(run.task.images.train_batches(batch_size, run.generator) for _ in repeat(None))


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

    While no seed has been finished by all, a panel shows the runs of the first that there are. Which configurations are
    on the Pareto front is said once all runs are finished; one of which a run diverged is not on it.
    """
    args = sweep.args
    configurations: dict[str, dict[str, Any]] = {}
    factors = {name: sweep.factor(name) for name in args.configurations}
    for name in args.configurations:
        timed, share = sweep.calibration["steps"][name], sweep.epochs["equal_epochs"][name] / args.epochs
        training_time = share * timed["time_over_sgd"]["median"]
        about = {"label": METHODS[name].label, **timed, "training_time_over_sgd": training_time}
        if args.choose:
            about |= {"factor": factors[name], "tried": {f"{key:g}": value for key, value in sweep.tried(name).items()}}
        configurations[name] = about
    for panel in PANELS:
        runs = {
            name: [
                sweep.result(Planned(name, seed, sweep.epochs[panel][name], factors[name]))
                for seed in range(args.seeds)
            ]
            for name in configurations
        }
        seeds = [seed for seed in range(args.seeds) if all(results[seed] for results in runs.values())] or [0]
        for name, results in runs.items():
            counted = {seed: result for seed in seeds if (result := results[seed]) is not None}
            configurations[name][panel] = summarize_runs(counted, sweep.epochs[panel][name]) if counted else None
    plan = sweep.plan()
    finished = sum(sweep.result(planned) is not None for planned in plan)
    if finished == len(plan):
        mark_front(configurations.values())
    return {
        "steps_per_epoch": sweep.steps,
        "runs": {"finished": finished, "planned": len(plan)},
        "configurations": configurations,
        "sharpness": {"distances": sweep.task.distances, "tolerance": TOLERANCE},
    }


def mark_front(configurations: Iterable[dict[str, Any]]) -> None:
    """Say of each configuration whether its mean accuracy at equal epochs is on the Pareto front."""
    candidates = []
    for one in configurations:
        one["equal_epochs"]["on_front"] = False
        if not one["equal_epochs"]["diverged_seeds"]:
            candidates.append(one)
    points = [(one["training_time_over_sgd"], one["equal_epochs"]["test_accuracy"]["mean"]) for one in candidates]
    for one, on_front in zip(candidates, pareto_front(points)):
        one["equal_epochs"]["on_front"] = on_front


def summarize_runs(runs: Mapping[int, dict[str, Any]], epochs: int) -> dict[str, Any]:
    """What a configuration's runs from several seeds come to, and the runs themselves.

    Seeds from which training diverged are listed, and have no part in the accuracy.
    """
    return {
        "epochs": epochs,
        "seeds": len(runs),
        "diverged_seeds": [seed for seed, run in runs.items() if run["diverged"]],
        "test_accuracy": record.mean_and_std([run["test_accuracy"] for run in runs.values() if not run["diverged"]]),
        "seconds": mean(run["seconds"] for run in runs.values()),
        "runs": list(runs.values()),
    }


def make_parser() -> argparse.ArgumentParser:
    """The command_line."""
    parser = command_line.make_training_parser(__doc__ or "")
    add = parser.add_argument
    add(
        "--configurations",
        nargs="+",
        choices=(*CONFIGURATIONS, *MORE),
        metavar="NAME",
        help=f"of {', '.join((*CONFIGURATIONS, *MORE))}",
    )
    add("--rounds", type=int, default=8, help="of the calibration, at which all take turns; default: %(default)s")
    add(
        "--time-budget",
        type=float,
        metavar="SECONDS",
        help="of the whole job; after the calibration, which is made once in any case, it begins no run that would not "
        "end within it; the same command goes on from there",
    )
    add("--validation-samples", type=int, metavar="N", help="training images beside --train-samples, to choose on")
    add(
        "--choose",
        type=float,
        nargs="+",
        metavar="FACTOR",
        help="for each configuration choose, on the validation part, by what its radius is multiplied, or where it has "
        "none the learning rate; accuracy is then that of other seeds",
    )
    add("--choose-seeds", type=int, default=1, metavar="N", help="of each choice; default: %(default)s")
    add("--quick", action="store_true", help="few configurations and seeds: the digits in two minutes")
    return parser


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = make_parser()
    asked = parser.parse_known_args(argv)[0]
    quick = QUICK if asked.quick else {}
    args = command_line.parse(parser, argv, {name: recipe | quick for name, recipe in RECIPES.items()})
    if args.configurations is None:
        args.configurations = list(CONFIGURATIONS)
    if args.amp:  # it sets the precision of all passes
        args.configurations = [name for name in args.configurations if not METHODS[name].compares_precision]
    if "sgd" not in args.configurations:
        parser.error("--configurations lacks sgd, which all are compared with")
    command_line.check_training(parser, args)
    command_line.without_left_out(parser, args, "configurations", default=asked.configurations is None)
    if (args.choose is None) != (args.validation_samples is None) or (args.choose and args.train_samples is None):
        parser.error(
            "--choose, --validation-samples and --train-samples go together: on what to choose, and what it is not"
        )
    if args.choose and (min(args.choose) <= 0 or args.choose_seeds < 1 or args.validation_samples < 1):
        parser.error("--choose, --choose-seeds and --validation-samples must be above 0")
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: at least 1 is needed")
    return args


def stem_of(args: argparse.Namespace) -> str:
    """What the files of a task are named: by its data, and by what is not the usual of it: network, base, noise."""
    usual = {"base": "sgd", "label_noise": 0.0} | command_line.RECIPES[args.data] | RECIPES.get(args.data, {})
    parts = ["frontier", args.data]
    parts += [str(getattr(args, name)) for name in ("model", "base") if getattr(args, name) != usual[name]]
    if args.label_noise != usual["label_noise"]:
        parts.append(f"noise{args.label_noise:g}")
    if not args.augment:
        parts.append("plain")
    return "_".join([*parts, args.device])


def main(argv: Sequence[str] | None = None) -> None:
    """Make the runs that are still to be made, write the result and print the table."""
    started = perf_counter()
    args = parse_args(argv)
    stem = stem_of(args)
    here = environment()
    with refusals(make_parser()):
        images = command_line.training_images(args)
        command_line.task(args, images).require_valid(args.configurations, command_line.settings(args))
        identity = here | {"code": code_fingerprint(*PACKAGES)}
        journal = Journal(args.output / f"{stem}.jsonl", identity, args.restart)
    sweep = Sweep(images, args, journal)
    header = record.header("frontier", images.label, args) | {"environment": here}
    header["left_out"] = args.left_out

    def save(sweep: Sweep) -> dict[str, Any]:
        result = header | summarize(sweep)
        record.save(result, args.output, stem)
        return result

    sweep.run(math.inf if args.time_budget is None else started + args.time_budget, save)
    result = save(sweep)
    written = [f"{stem}.json", *command_line.draw(result, args.output, {f"{stem}.svg": "frontier"})]
    print(tables.frontier(result))
    print(f"\nWritten to {args.output}: {', '.join(written)}; {journal.path.name} holds the single runs")
    if result["runs"]["finished"] < result["runs"]["planned"]:
        command = "the same command without --restart" if args.restart else "the same command"
        print(
            f"Run {command} again until it is finished: {result['runs']['finished']} of {result['runs']['planned']} "
            "runs done."
        )
