"""The main job: train one network with SGD, SAM and ESAM, and tell what each costs and buys, and how sharp it ends.

All methods start from the same weights and see the same batches, and take turns epoch by epoch, so that a disturbance
of the machine meets all of them. A step's time includes the preparation of its batch on the device.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from functools import partial
from statistics import mean, stdev
from time import perf_counter
from typing import Any

from .. import record
from ..measuring.clock import peak_memory, ratio, spread, turn
from ..measuring.journal import Journal
from ..measuring.progress import Progress
from ..report import tables
from ..training.data import ImageData
from ..training.landscape import TOLERANCE
from ..training.methods import METHODS
from ..training.run import Run, Task
from ..training.trainers import Settings
from . import command_line
from .refusals import refusals

TRAINED = ("sgd", "sam", "esam", "esam-bf16", "sgd-bf16")
MORE = ("sam-own", "sam-foreach", "momentum", "previous", "share-quarter", "sam-tail0.2", "nesterov")  # if asked for

Curves = dict[str, list[list[dict[str, Any]]]]  # for each method, for each seed, for each epoch
Sharpness = dict[str, list[dict[str, Any]]]  # for each method, for each seed that was finished and did not diverge


def memory_of(name: str, task: Task, settings: Settings) -> int:
    """Peak bytes of two steps of a method on its own: weights, gradients, optimizer state and activations."""

    def two_steps() -> None:
        run = Run(name, settings, 1, task)
        for _, (inputs, targets) in zip(range(2), task.images.train_batches(task.batch_size, run.generator)):
            run.trainer.step(inputs, targets)

    return peak_memory(task.device, two_steps)


def train(
    images: ImageData,
    args: argparse.Namespace,
    deadline: float,
    journal: Journal | None = None,
    seen: Callable[[Curves, Sharpness], None] = lambda *_: None,
) -> tuple[Curves, Sharpness]:
    """Train with every method from every seed, as far as the deadline lets it.

    Seeds come one after another, so that what is cut off by the deadline is a whole seed's training and not the end of
    every schedule. Within a seed the methods take turns epoch by epoch, in the order of ``clock.turn``.

    Args:
        images: to train and test on.
        args: the command line.
        deadline: after which no epoch is begun.
        journal: where seeds that are finished are kept, and not trained again.
        seen: called with what there is after each round of epochs.

    Returns:
        For each method the curves of its seeds, all methods being equally far, and the sharpness after each seed that
        was finished.
    """
    task = command_line.task(args, images)
    curves: Curves = {name: [] for name in args.optimizers}
    sharpnesses: Sharpness = {name: [] for name in args.optimizers}
    rounds, longest = args.seeds * args.epochs, 0.0
    progress = Progress(rounds * len(curves) * images.steps_per_epoch(args.batch_size), unit="step")
    for seed in range(args.seeds):
        key = journal_key(args, images, seed=seed)
        kept = journal.get(key) if journal else None
        if kept is not None:
            for name in curves:
                curves[name].append(kept["curves"][name])
                sharpnesses[name] += kept["sharpness"].get(name, [])
            continue
        settings = command_line.settings(args, seed)
        runs = {name: Run(name, settings, args.epochs, task) for name in curves}
        for epoch in range(args.epochs):
            start = perf_counter()
            if longest and start + longest > deadline:
                return curves, sharpnesses
            if epoch == 0:
                for name, run in runs.items():
                    curves[name].append(run.curve)
            for name in [args.optimizers[i] for i in turn(len(runs), epoch)]:
                progress.describe(f"seed {seed}, epoch {epoch + 1}/{args.epochs}, {METHODS[name].label}")
                runs[name].train_epoch(progress)
            longest = max(longest, perf_counter() - start)
            seen(curves, sharpnesses)
        progress.describe(f"seed {seed}, sharpness")
        measured = sharpness_of_all(runs, deadline)
        for name, sharp in measured.items():
            sharpnesses[name].append(sharp)
        if journal:
            found = {name: [sharp] for name, sharp in measured.items()}
            journal.add(key, {"curves": {name: run.curve for name, run in runs.items()}, "sharpness": found})
    return curves, sharpnesses


def journal_key(args: argparse.Namespace, images: ImageData, **more: Any) -> dict[str, Any]:
    """What decides what is trained."""
    shared = {name: value for name, value in record.as_json(args).items() if name not in ("seeds", "time_budget")}
    return {**shared, "images": images.label, **more}


def sharpness_of_all(runs: dict[str, Run], deadline: float) -> dict[str, dict[str, Any]]:
    """The sharpness of each method's network that has one; of none, if they would not end by the deadline."""
    measured: dict[str, dict[str, Any]] = {}
    longest = 0.0
    for left, (name, run) in zip(range(len(runs), 0, -1), runs.items()):
        start = perf_counter()
        if start + left * longest > deadline:
            return {}
        if (sharp := run.sharpness()) is not None:
            measured[name] = sharp
        longest = max(longest, perf_counter() - start)
    return measured


def summarize(curves: Curves, steps: int, epochs: int) -> dict[str, dict[str, Any]]:
    """For each method its time, and its accuracy over the seeds that were finished (all of them if none was).

    Seeds from which training diverged are listed, and have no part in the accuracy.
    """
    seconds = {name: [epoch["seconds"] for curve in seeds for epoch in curve] for name, seeds in curves.items()}
    summary: dict[str, dict[str, Any]] = {}
    for name, seeds in curves.items():
        finished = [curve for curve in seeds if len(curve) == epochs] or seeds
        diverged = [seed for seed, curve in enumerate(finished) if curve[-1]["train_loss"] is None]
        final = [curve[-1]["test_accuracy"] for seed, curve in enumerate(finished) if seed not in diverged]
        summary[name] = {
            "seeds": len(finished),
            "diverged_seeds": diverged,
            "epochs": len(finished[0]),
            "test_accuracy_mean": mean(final) if final else None,
            "test_accuracy_std": stdev(final) if len(final) > 1 else None,
            "seconds_per_step": spread([epoch / steps for epoch in seconds[name]])._asdict(),
            "time_over_sgd": ratio(seconds[name], seconds["sgd"])._asdict() if "sgd" in seconds else None,
        }
    return summary


def make_parser() -> argparse.ArgumentParser:
    """The command_line."""
    parser = command_line.make_training_parser(__doc__ or "")
    add = parser.add_argument
    add(
        "--optimizers",
        nargs="+",
        choices=(*TRAINED, *MORE),
        help=f"default: of {', '.join(TRAINED)} all that make sense",
    )
    add(
        "--time-budget",
        type=float,
        metavar="SECONDS",
        help="of the whole job; it stops after the last epoch that fits, at the earliest after one",
    )
    return parser


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = make_parser()
    args = command_line.parse(parser, argv, {"digits": {"epochs": 40}, "cifar10": {"epochs": 200}})
    default = args.optimizers is None
    if default:
        args.optimizers = [name for name in TRAINED if not (args.amp and METHODS[name].compares_precision)]
    elif args.amp and (odd := {name for name in args.optimizers if METHODS[name].compares_precision}):
        parser.error(f"--amp sets the precision of all passes: leave out {', '.join(sorted(odd))}")
    command_line.check_training(parser, args)
    command_line.without_left_out(parser, args, "optimizers", default)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run the job, write its results and print the table."""
    started = perf_counter()
    args = parse_args(argv)
    stem = f"train_{args.data}_{args.device}"
    with refusals(make_parser()):
        images = command_line.training_images(args)
        task, settings = command_line.task(args, images), command_line.settings(args)
        task.require_valid(args.optimizers, settings)
        journal = command_line.journal(args, stem)
    header = record.header("train", images.label, args)  # of the code that is about to run
    header["left_out"] = args.left_out
    steps = images.steps_per_epoch(args.batch_size)
    memory = {
        name: journal.once(journal_key(args, images, memory_of=name), partial(memory_of, name, task, settings))
        for name in args.optimizers
    }

    def result_of(curves: Curves, sharpnesses: Sharpness) -> dict[str, Any]:
        summary = summarize(curves, steps, args.epochs)
        methods = {
            name: {"label": METHODS[name].label, "peak_memory_bytes": memory[name], **summary[name]} for name in curves
        }
        sharp = {"distances": task.distances, "tolerance": TOLERANCE, "seeds": sharpnesses}
        return header | {"steps_per_epoch": steps, "methods": methods, "curves": curves, "sharpness": sharp}

    deadline = math.inf if args.time_budget is None else started + args.time_budget
    curves, sharpnesses = train(
        images, args, deadline, journal, lambda *found: record.save(result_of(*found), args.output, stem)
    )
    result = result_of(curves, sharpnesses)
    record.save(result, args.output, stem)
    figures = {f"{stem}_time.svg": "accuracy_over_time", f"{stem}_cost.svg": "accuracy_over_cost"}
    if any(sharpnesses.values()):
        figures[f"{stem}_sharpness.svg"] = "loss_around_minimum"
    written = [f"{stem}.json", *command_line.draw(result, args.output, figures)]
    print(tables.train(result))
    print(f"\nWritten to {args.output}: {', '.join(written)}")
