"""Peak memory of ESAM for each of its options, beside that of SGD and SAM.

What ESAM must hold beyond SGD is a copy of the weights that it has perturbed, from the perturbation until they are put
back: the floor is one copy of the drawn weights. Against it stands that the last pass keeps the activations of the
selected samples alone. Which of the two shows depends on the model, so there is one of either kind.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from unittest.mock import patch

import torch
from torch import Tensor, nn

from esam_kernels import ops
from esam_kernels.passes.draw import draw_tensors

from .. import record
from ..measuring.clock import peak_memory
from ..measuring.progress import Progress
from ..report import tables
from ..training import models
from ..training.methods import METHODS, Method
from ..training.trainers import Settings, left_out, trainer
from . import command_line
from .refusals import refusals

STEPS = 3  # the first makes SGD's momentum; where every other step is ESAM's, the third is the first that counts
# No weight decay: SGD holds a copy of gradients for it when ESAM's backup is gone, which would hide the backup.
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0}


@dataclass(frozen=True)
class Case:
    """A network with the initial weights of a seed, and the batch that it is trained on: images and their labels."""

    label: str
    make: Callable[[], nn.Module]
    batch: tuple[int, ...]  # samples, and the shape of each
    classes: int = 10


def _mlp(*widths: int) -> nn.Module:
    """Linear layers with ReLUs between them, over flattened images: many weights for few activations."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Flatten()]
    for n_in, n_out in pairwise(widths):
        layers += [nn.Linear(n_in, n_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


CASES = {
    "tiny": Case("MLP of 2 layers of width 16", lambda: _mlp(48, 16, 10), (8, 3, 4, 4)),
    "resnet18": Case("ResNet-18 of width 32", lambda: models.build("resnet18", width=32), (64, 3, 32, 32)),
    "mlp": Case("MLP of 12 layers of width 1024", lambda: _mlp(3072, *[1024] * 11, 10), (64, 3, 32, 32)),
}


LARGE = ["resnet18", "mlp"]
ROWS = (
    "sgd",
    "sgd-4-micro-batches",
    "sam",
    "sam-foreach",
    "esam",
    "esam-gamma1",
    "esam-gamma0.25",
    "esam-beta1",
    "esam-beta0.3",
    "esam-beta1-gamma1",
    "esam-adaptive",
    "esam-element",
    "esam-loss",
    "esam-interval2",
    "momentum",
    "previous",
    "share-quarter",
    "share-half",
    "esam-bf16",
    "esam-4-micro-batches",
    "esam-4-micro-batches-over-all",
)


def measure(case: Case, name: str, settings: Settings, device: torch.device) -> dict[str, int | None]:
    """Bytes at the peak, of ESAM's largest backup beside momentum, and of one copy of the weights drawn for it."""
    with backups() as sizes:

        def work() -> None:
            sizes.clear()  # of the run before, if this is not the first
            model = case.make().to(device)
            inputs = torch.rand(case.batch, device=device)
            targets = torch.arange(len(inputs), device=device) % case.classes
            one = trainer(name, model, settings, device)
            for _ in range(STEPS):
                one.step(inputs, targets)

        peak = peak_memory(device, work)
    method, weights = METHODS[name], list(case.make().parameters())
    floor = drawn_bytes(weights, method, settings) if method.has_radius else None
    return {"peak_bytes": peak, "backup_bytes": max(sizes[1:], default=None), "floor_bytes": floor}


@contextmanager
def backups() -> Iterator[list[int]]:
    """The bytes of the backups that each perturbation inside the block makes."""
    sizes: list[int] = []
    back_up = ops.Served.back_up

    def counted(served: ops.Served) -> list[Tensor]:
        copies = back_up(served)
        sizes.append(sum(copy.nbytes for copy in copies))
        return copies

    with patch.object(ops.Served, "back_up", counted):
        yield sizes


def drawn_bytes(params: Sequence[Tensor], method: Method, settings: Settings) -> int:
    """Bytes of one copy of what is perturbed beside momentum, in the step with most: for single elements expected."""
    esam = settings.by(method).esam
    beta = 1.0 if method.trainer != "esam" else esam["beta"]
    if esam["granularity"] == "element":
        return round(beta * sum(param.nbytes for param in params))
    counted = range(esam["interval"], STEPS, esam["interval"])
    draws = [draw_tensors(range(len(params)), beta, esam["seed"], step) for step in counted]
    return max(sum(params[i].nbytes for i in draw) for draw in draws)


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = command_line.base_parser(__doc__ or "")
    parser.add_argument("--models", nargs="+", choices=CASES, default=LARGE, help="default: all but tiny")
    command_line.add_esam(parser)
    parser.set_defaults(**SGD)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every option on every model, write the result and print the tables."""
    args = make_parser().parse_args(argv)
    settings = command_line.settings(args)
    missing = left_out(ROWS)
    names = [name for name in ROWS if name not in missing]
    stem = f"memory_{args.device}"
    with refusals(make_parser()):
        command_line.require_device(args)
        for name in names:
            trainer(name, nn.Linear(1, 1), settings, torch.device("cpu"))
        journal = command_line.journal(args, stem)
    result = record.header("memory", "random images", args)
    result["settings"]["steps"] = STEPS
    result |= {"left_out": missing, "cases": {}}
    shared = {name: value for name, value in record.as_json(args).items() if name != "models"}
    progress = Progress(len(args.models) * len(names), unit="row")
    for model in args.models:
        case = CASES[model]
        rows: dict[str, dict[str, int | None]] = {}
        with torch.device("meta"):
            weights = sum(param.nbytes for param in case.make().parameters())
        about = {"label": case.label, "batch_size": case.batch[0], "weight_bytes": weights}
        result["cases"][model] = {**about, "rows": rows}
        for name in names:
            label = METHODS[name].label
            progress.describe(f"{model}, {label}")
            key = {**shared, "model": model, "row": name}
            rows[label] = journal.once(key, partial(measure, case, name, settings, torch.device(args.device)))
            record.save(result, args.output, stem)
            progress.update()
    print(tables.memory(result))
