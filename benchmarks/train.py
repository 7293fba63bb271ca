"""The main job: train one network with SGD, SAM and ESAM, and tell what each costs and buys, and how sharp it ends.

All methods start from the same weights and see the same batches, and take turns epoch by epoch, so that a disturbance
of the machine meets all of them. A step's time includes the preparation of its batch on the device.
"""

import argparse
import math
from collections.abc import Iterable, Sequence
from statistics import mean, stdev
from time import perf_counter
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

from . import data, options, plots, record, sharpness, tables
from .measure import Stopwatch, peak_memory, ratio, spread, turn
from .methods import BF16_ON_ITS_OWN, METHODS, Settings, trainer

TEST_BATCH = 1000
DISTANCES = (0.5, 1, 2, 4, 8)  # of which the rise of the loss is measured, in units of rho

Curves = dict[str, list[list[dict[str, Any]]]]  # for each method, for each seed, for each epoch
Sharpness = dict[str, list[dict[str, Any]]]  # for each method, for each seed that was finished and did not diverge


class Run:
    """One network in training, by one method from one seed.

    Attributes:
        curve: for each epoch its seconds of training, mean training loss (None if it is not finite) and, if tested,
            test accuracy in percent.
    """

    def __init__(
        self, name: str, settings: Settings, epochs: int, images: data.ImageData, args: argparse.Namespace
    ) -> None:
        self.images = images
        self.args = args
        device = torch.device(args.device)
        model = options.network(args, images.channels, images.classes, settings.seed)
        self.trainer = trainer(name, model, settings, device)
        self.scheduler = CosineAnnealingLR(self.trainer.optimizer, T_max=epochs)
        self.generator = torch.Generator(device).manual_seed(settings.seed)
        self.stopwatch = Stopwatch(device)
        self.curve: list[dict[str, Any]] = []

    def train_epoch(self, progress: tqdm, test: bool = True) -> None:
        """Train for an epoch, and test; host and device meet only at its end."""
        self.stopwatch.mark()
        losses = []
        for inputs, targets in self.images.train_batches(self.args.batch_size, self.generator):
            losses.append(self.trainer.step(inputs, targets))
            progress.update()
        self.stopwatch.mark()
        self.scheduler.step()
        (seconds,) = self.stopwatch.laps()
        loss = torch.stack(losses).mean().item()
        self.curve.append({"seconds": seconds, "train_loss": loss if math.isfinite(loss) else None})
        if test:
            self.curve[-1]["test_accuracy"] = self.accuracy()

    @property
    def diverged(self) -> bool:
        """Whether the last epoch's loss is not finite."""
        return bool(self.curve) and self.curve[-1]["train_loss"] is None

    @torch.inference_mode()
    def accuracy(self) -> float:
        """Share of the test images that are classified correctly, in percent."""
        self.trainer.model.eval()
        batches = self.images.test_batches(TEST_BATCH)
        right = sum((self.trainer.model(images).argmax(1) == labels).sum() for images, labels in batches)
        self.trainer.model.train()
        return 100 * int(right) / len(self.images.test_labels)

    def sharpness(self) -> dict[str, Any] | None:
        """How sharp the minimum is that was reached, in the precision of the weights whatever the method trained in.

        None if this is not asked for, or if there is no minimum as training diverged.
        """
        if self.diverged or not self.args.sharpness_samples:
            return None
        # A copy, since a trainer may have put autocast into its network's forward.
        model = options.network(self.args, self.images.channels, self.images.classes, seed=0)
        model.load_state_dict(self.trainer.model.state_dict())
        samples = list(self.images.training_sample(self.args.sharpness_samples, self.args.batch_size))
        generator = torch.Generator(self.args.device).manual_seed(0)  # the same random directions for all
        return sharpness.measure(sharpness.Landscape(model, samples), distances(self.args), generator)


def distances(args: argparse.Namespace) -> list[float]:
    """How far from the weights sharpness is measured."""
    return [factor * args.rho for factor in DISTANCES]


def require_valid(images: data.ImageData, args: argparse.Namespace, methods: Iterable[tuple[str, Settings]]) -> None:
    """Make the network and each method with its options once, before anything is measured.

    Raises:
        ValueError: the network's or an optimizer's, which says what option it does not take.
    """
    options.network(args, images.channels, images.classes, seed=0)
    for name, settings in methods:
        trainer(name, nn.Linear(1, 1), settings, torch.device("cpu"))


def memory_of(name: str, images: data.ImageData, args: argparse.Namespace) -> int:
    """Peak bytes of two steps of a method on its own: weights, gradients, optimizer state and activations."""

    def two_steps() -> None:
        run = Run(name, options.settings(args), args.epochs, images, args)
        for _, (inputs, targets) in zip(range(2), images.train_batches(args.batch_size, run.generator)):
            run.trainer.step(inputs, targets)

    return peak_memory(torch.device(args.device), two_steps)


def train(images: data.ImageData, args: argparse.Namespace, deadline: float) -> tuple[Curves, Sharpness]:
    """Train with every method from every seed, as far as the deadline lets it.

    Seeds come one after another, so that what is cut off by the deadline is a whole seed's training and not the end of
    every schedule. Within a seed the methods take turns epoch by epoch, in the order of ``measure.turn``.

    Returns:
        For each method the curves of its seeds, all methods being equally far, and the sharpness after each seed that
        was finished.
    """
    curves: Curves = {name: [] for name in args.optimizers}
    sharpnesses: Sharpness = {name: [] for name in args.optimizers}
    rounds, longest = args.seeds * args.epochs, 0.0
    with tqdm(total=rounds * len(curves) * images.steps_per_epoch(args.batch_size), unit="step") as progress:
        for seed in range(args.seeds):
            settings = options.settings(args, seed=seed)
            runs = {name: Run(name, settings, args.epochs, images, args) for name in curves}
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
    """The options."""
    parser = options.make_training_parser(__doc__ or "")
    add = parser.add_argument
    add("--optimizers", nargs="+", choices=METHODS, help="default: all that make sense")
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
    args = options.parse(parser, argv, {"digits": {"epochs": 40}, "cifar10": {"epochs": 200}})
    if args.optimizers is None:
        args.optimizers = [name for name in METHODS if not (args.amp and name in BF16_ON_ITS_OWN)]
    elif args.amp and (odd := set(args.optimizers) & set(BF16_ON_ITS_OWN)):
        parser.error(f"--amp sets the precision of all passes: leave out {', '.join(sorted(odd))}")
    options.check_training(parser, args)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run the job, write its results and print the table."""
    started = perf_counter()
    args = parse_args(argv)
    with options.refusals(make_parser()):
        images = options.training_images(args)
        require_valid(images, args, [(name, options.settings(args)) for name in args.optimizers])
    result = record.header("train", images.label, args)  # of the code that is about to run
    steps = images.steps_per_epoch(args.batch_size)
    memory = {name: memory_of(name, images, args) for name in tqdm(args.optimizers, "measuring memory", leave=False)}
    deadline = math.inf if args.time_budget is None else started + args.time_budget
    curves, sharpnesses = train(images, args, deadline)
    summary = summarize(curves, steps, args.epochs)
    methods = {
        name: {"label": METHODS[name].label, "peak_memory_bytes": memory[name], **summary[name]} for name in curves
    }
    result |= {"steps_per_epoch": steps, "methods": methods, "curves": curves}
    result |= {"sharpness": {"distances": distances(args), "seeds": sharpnesses}}
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


if __name__ == "__main__":
    main()
