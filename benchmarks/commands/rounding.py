"""Weights in bf16 alone: what it does to ESAM that their perturbation rounds stochastically, and not to nearest.

A perturbation is far smaller than a weight, so that in bf16, which keeps 8 bits, rounding to nearest loses part of it.
The network is a wide perceptron, whose perturbation is spread over a million weights; the data are scikit-learn's
digits with a fifth of the training labels wrong, as in the frontier. Steps of the base optimizer round to nearest in
every row, as torch's own do.
"""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from esam_kernels import ops
from esam_kernels.passes import perturb

from .. import record
from ..measuring.progress import Progress
from ..report import tables
from ..training import data
from ..training.losses import per_sample_loss
from ..training.methods import METHODS
from ..training.run import TEST_BATCH
from ..training.trainers import DTYPES, trainer
from . import command_line
from .refusals import refusals

LABEL_NOISE = 0.2


class Row(NamedTuple):
    """A row of the table: how it trains, by its name in ``METHODS``, and ESAM's radius there."""

    method: str
    rho: float = 0.0

    @property
    def label(self) -> str:
        """Its name in the table."""
        optimizer, _, precision = METHODS[self.method].label.partition(", ")
        return ", ".join([optimizer, *([f"rho {self.rho}"] if self.rho else []), precision or "float32 weights"])

    @property
    def dtype(self) -> torch.dtype:
        """The weights' precision."""
        return DTYPES.get(METHODS[self.method].weights or "", torch.float32)


def rows_of(rhos: Sequence[float]) -> list[Row]:
    """SGD, and ESAM with each radius, in every precision."""
    esam = ("esam", "esam-bf16-weights", "esam-bf16-weights-to-nearest")
    return [Row("sgd"), Row("sgd-bf16-weights"), *(Row(name, rho) for rho in rhos for name in esam)]


@contextmanager
def rounding_to_nearest() -> Iterator[None]:
    """Let ESAM perturb without random bits: the control, for which it has no option."""
    with patch.object(perturb, "element_mask", lambda *_: None):
        yield


def network(width: int, images: data.ImageData, seed: int, dtype: torch.dtype) -> nn.Sequential:
    """Two hidden layers with the initial weights of a seed."""
    torch.manual_seed(seed)
    inputs = images.train_images[0].numel()
    layers = [nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    model = nn.Sequential(nn.Flatten(), *layers, nn.Linear(width, images.classes))
    return model.to(images.train_images.device, dtype)


def train(row: Row, seed: int, images: data.ImageData, args: argparse.Namespace) -> dict[str, float] | None:
    """Train to the end; test accuracy in percent, and for ESAM what its perturbation is like there.

    None if training diverges: the loss of the last step is not finite.
    """
    device = torch.device(args.device)
    model = network(args.width, images, seed, row.dtype)
    method = trainer(row.method, model, command_line.settings(args, seed, rho=row.rho), device)
    scheduler = CosineAnnealingLR(method.optimizer, T_max=args.epochs)
    generator = torch.Generator(device).manual_seed(seed)
    with rounding_to_nearest() if METHODS[row.method].to_nearest else nullcontext():
        for _ in range(args.epochs):
            for inputs, targets in images.train_batches(args.batch_size, generator):
                last = method.step(inputs.to(row.dtype), targets)
            scheduler.step()
    if not last.isfinite():
        return None
    with torch.inference_mode():
        batches = images.test_batches(TEST_BATCH)
        right = sum((model(inputs.to(row.dtype)).argmax(1) == labels).sum() for inputs, labels in batches)
    result = {"test_accuracy": 100 * int(right) / len(images.test_labels)}
    if row.rho:
        loss = per_sample_loss(model(inputs.to(row.dtype)), targets).mean()
        to_nearest = METHODS[row.method].to_nearest
        result["projection"], result["length"] = move(list(model.parameters()), loss, row.rho, to_nearest)
    return result


def move(weights: list[nn.Parameter], loss: Tensor, rho: float, to_nearest: bool) -> tuple[float, float]:
    """How the weights really move by e = rho g / norm of g: the projection on e, and the length, both over e's length.

    Args:
        weights: n parameters in all, which stay as they are.
        loss: of which g is the gradient.
        rho: radius.
        to_nearest: whether e rounds to nearest, or below float32 stochastically.
    """
    grads = torch.autograd.grad(loss, weights)
    norm = ops.squared_norm(weights, grads).sqrt()
    moved = [weight.detach().clone() for weight in weights]
    backups = [torch.empty_like(weight) for weight in moved]
    bits = None if to_nearest else ops.ElementMask(0, 0, range(len(weights)), 1.0, [0] * len(weights))
    ops.perturb_(moved, grads, backups, [rho] * len(weights), norm, False, bits)
    moves = torch.cat([(new.double() - old.double()).flatten() for new, old in zip(moved, backups)])
    exact = torch.cat([grad.double().flatten() for grad in grads]) * (rho / norm.double())
    return (moves @ exact / exact.square().sum()).item(), (moves.norm() / exact.norm()).item()


def summarize(runs: Sequence[dict[str, float] | None]) -> dict[str, Any]:
    """What a row's runs from several seeds come to: means over those that did not diverge, and how many did."""
    sound = [run for run in runs if run is not None]
    names = list(sound[0]) if sound else []
    return {"diverged": len(runs) - len(sound)} | {
        name: record.mean_and_std([run[name] for run in sound]) for name in names
    }


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = command_line.base_parser(__doc__ or "")
    add = parser.add_argument
    add("--width", type=int, default=1024, help="of both hidden layers; default: %(default)s")
    add("--batch-size", type=int, default=128, help="default: %(default)s")
    add("--epochs", type=int, default=30, help="default: %(default)s")
    add("--seeds", type=int, default=5, help="how many; default: %(default)s")
    add("--lr", type=float, default=0.1, help="peak learning rate; default: %(default)s")
    add("--rho", type=float, nargs="+", default=[0.01, 0.05], help="one or more; default: 0.01 0.05")
    command_line.add_esam(parser, but=["rho"])
    parser.set_defaults(momentum=0.9, weight_decay=5e-4)
    return parser


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if min(args.width, args.batch_size, args.epochs, args.seeds) < 1:
        parser.error("--width, --batch-size, --epochs and --seeds must be at least 1")
    if min(args.rho) <= 0:
        parser.error(f"--rho {min(args.rho)}: must be above 0")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Train every row from every seed, write the result and print the table."""
    args = parse_args(argv)
    plan = rows_of(args.rho)
    with refusals(make_parser()):
        command_line.prepare(args)
        images = data.load("digits", None, torch.device(args.device), torch.contiguous_format)
        images = data.flip_labels(images, LABEL_NOISE)
        if images.steps_per_epoch(args.batch_size) == 0:
            raise ValueError(f"--batch-size {args.batch_size}: more than the {len(images.train_labels)} images")
        for row in plan:
            settings = command_line.settings(args, rho=row.rho)
            trainer(row.method, nn.Linear(1, 1), settings, torch.device("cpu"))
        stem = f"rounding_{args.device}"
        journal = command_line.journal(args, stem)
    result = record.header("rounding", images.label, args)  # of the code that is about to run
    runs: dict[str, list[dict[str, float] | None]] = {row.label: [] for row in plan}
    shared = {name: value for name, value in record.as_json(args).items() if name not in ("seeds", "rho")}
    progress = Progress(args.seeds * len(plan), "rounding", "run")
    for seed in range(args.seeds):
        for row in plan:
            key = {**shared, "row": row._asdict(), "seed": seed}
            # In a list, since a run that diverges is None.
            runs[row.label] += journal.once(key, lambda row=row, seed=seed: [train(row, seed, images, args)])  # type: ignore[misc]
            rows = {label: summarize(found) for label, found in runs.items() if found}
            result |= {"rows": rows, "runs": runs}
            record.save(result, args.output, stem)
            progress.update()
    print(tables.rounding(result))
