"""The main job: train one network with SGD, SAM and ESAM, and tell what each costs and buys, and how sharp it ends.

All methods start from the same weights and see the same batches, and take turns epoch by epoch, so that a disturbance
of the machine meets all of them. A step's time includes the preparation of its batch on the device.
"""

import argparse
import math
from collections.abc import Sequence
from statistics import mean, stdev
from time import perf_counter
from typing import Any

from tqdm import tqdm

from .. import record
from ..measuring.clock import peak_memory, ratio, spread, turn
from ..report import plots, tables
from ..training.data import ImageData
from ..training.landscape import TOLERANCE
from ..training.methods import METHODS
from ..training.run import Run, Task
from ..training.trainers import Settings
from . import command_line
from .refusals import refusals

TRAINED = ("sgd", "sam", "esam", "esam-bf16", "sgd-bf16")

Curves = dict[str, list[list[dict[str, Any]]]]  # for each method, for each seed, for each epoch
Sharpness = dict[str, list[dict[str, Any]]]  # for each method, for each seed that was finished and did not diverge


def memory_of(name: str, task: Task, settings: Settings) -> int:
    """Peak bytes of two steps of a method on its own: weights, gradients, optimizer state and activations."""

    def two_steps() -> None:
        run = Run(name, settings, 1, task)
        for _, (inputs, targets) in zip(range(2), task.images.train_batches(task.batch_size, run.generator)):
            run.trainer.step(inputs, targets)

    return peak_memory(task.device, two_steps)


def train(images: ImageData, args: argparse.Namespace, deadline: float) -> tuple[Curves, Sharpness]:
    """Train with every method from every seed, as far as the deadline lets it.

    Seeds come one after another, so that what is cut off by the deadline is a whole seed's training and not the end of
    every schedule. Within a seed the methods take turns epoch by epoch, in the order of ``clock.turn``.

    Returns:
        For each method the curves of its seeds, all methods being equally far, and the sharpness after each seed that
        was finished.
    """
    task = command_line.task(args, images)
    curves: Curves = {name: [] for name in args.optimizers}
    sharpnesses: Sharpness = {name: [] for name in args.optimizers}
    rounds, longest = args.seeds * args.epochs, 0.0
    with tqdm(total=rounds * len(curves) * images.steps_per_epoch(args.batch_size), unit="step") as progress:
        for seed in range(args.seeds):
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
                    progress.set_description(f"seed {seed}, epoch {epoch + 1}/{args.epochs}, {METHODS[name].label}")
                    runs[name].train_epoch(progress)
                longest = max(longest, perf_counter() - start)
            progress.set_description(f"seed {seed}, sharpness")
            for name, measured in sharpness_of_all(runs, deadline).items():
                sharpnesses[name].append(measured)
    return curves, sharpnesses


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
    add("--optimizers", nargs="+", choices=TRAINED, help="default: all that make sense")
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
    if args.optimizers is None:
        args.optimizers = [name for name in TRAINED if not (args.amp and METHODS[name].compares_precision)]
    elif args.amp and (odd := {name for name in args.optimizers if METHODS[name].compares_precision}):
        parser.error(f"--amp sets the precision of all passes: leave out {', '.join(sorted(odd))}")
    command_line.check_training(parser, args)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run the job, write its results and print the table."""
    started = perf_counter()
    args = parse_args(argv)
    with refusals(make_parser()):
        images = command_line.training_images(args)
        task, settings = command_line.task(args, images), command_line.settings(args)
        task.require_valid(args.optimizers, settings)
    result = record.header("train", images.label, args)  # of the code that is about to run
    steps = images.steps_per_epoch(args.batch_size)
    memory = {name: memory_of(name, task, settings) for name in tqdm(args.optimizers, "measuring memory", leave=False)}
    deadline = math.inf if args.time_budget is None else started + args.time_budget
    curves, sharpnesses = train(images, args, deadline)
    summary = summarize(curves, steps, args.epochs)
    methods = {
        name: {"label": METHODS[name].label, "peak_memory_bytes": memory[name], **summary[name]} for name in curves
    }
    result |= {"steps_per_epoch": steps, "methods": methods, "curves": curves}
    result |= {"sharpness": {"distances": task.distances, "tolerance": TOLERANCE, "seeds": sharpnesses}}
    stem = f"train_{args.data}_{args.device}"
    record.save(result, args.output, stem)
    plots.accuracy_over_time(result, args.output / f"{stem}_time.svg")
    plots.accuracy_over_cost(result, args.output / f"{stem}_cost.svg")
    written = [f"{stem}.json", f"{stem}_time.svg", f"{stem}_cost.svg"]
    if any(sharpnesses.values()):
        plots.loss_around_minimum(result, args.output / f"{stem}_sharpness.svg")
        written.append(f"{stem}_sharpness.svg")
    print(tables.train(result))
    print(f"\nWritten to {args.output}: {', '.join(written)}")
