"""The command line that the benchmarks share: data, network, device and hyperparameters."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import data, models
from .environment import cpu_has_bf16_matrix_units
from .methods import Settings

RESULTS = Path(__file__).parent / "results"
AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}

# Where the defaults of options come from; --data and --model choose. Those for CIFAR-10 are the paper's.
RECIPES: dict[str, dict[str, Any]] = {
    "digits": {"model": "small", "batch_size": 128, "lr": 0.1, "weight_decay": 5e-4},
    "cifar10": {"model": "resnet18", "batch_size": 128, "lr": 0.05, "weight_decay": 1e-3},
    "wrn28_10": {"rho": 0.1, "beta": 0.5},
}


def base_parser(description: str) -> argparse.ArgumentParser:
    """A parser with what every benchmark has: where it runs, and where its result goes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--output", type=Path, default=RESULTS, metavar="FOLDER", help="default: benchmarks/results")
    return parser


def make_parser(description: str, many: bool = False) -> argparse.ArgumentParser:
    """A parser with the shared options; with ``many``, those for networks and batch sizes take several."""
    parser = base_parser(description)
    add = parser.add_argument
    add("--data", choices=data.DATASETS, default="digits", help="default: %(default)s")
    add("--data-file", type=Path, metavar="PATH", help="CIFAR-10: the .tar.gz, its folder, or an .npz of JPEG files")
    if many:
        add("--models", nargs="+", choices=[*models.MODELS, *models.LANGUAGE_MODELS], help="default: several")
        add("--batch-sizes", nargs="+", type=int, metavar="N", help="default: several, which depend on the network")
    else:
        add("--model", choices=models.MODELS, help="default: small for digits, resnet18 for cifar10")
        add("--batch-size", type=int, help="default: 128")
    add("--width", type=int, help="channels of the first stage or of a token; for wrn28_10 the factor of width")
    add("--channels-last", action="store_true", help="keep images and weights in channels-last order")
    add("--lr", type=float, help="peak learning rate; default: 0.1 for digits, 0.05 for cifar10")
    add("--momentum", type=float, default=0.9, help="default: %(default)s")
    add("--weight-decay", type=float, help="default: 5e-4 for digits, 1e-3 for cifar10")
    add("--rho", type=float, default=0.05, help="radius of SAM and ESAM; default: 0.05, for wrn28_10 0.1")
    add("--beta", type=float, default=0.6, help="share of weights that ESAM perturbs; default: 0.6, for wrn28_10 0.5")
    add("--gamma", type=float, default=0.5, help="share of samples that ESAM descends on; default: %(default)s")
    return parser


def make_training_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the shared options and those of benchmarks that train to the end."""
    parser = make_parser(description)
    add = parser.add_argument
    add("--train-samples", type=int, metavar="N", help="train on so many images only; default: all")
    add("--label-noise", type=float, metavar="SHARE", default=0.0, help="share of training labels made wrong")
    add("--epochs", type=int, help="the learning rate anneals over them")
    add("--seeds", type=int, default=3, help="how many; default: %(default)s")
    add("--amp", choices=AMP, help="train under autocast; fp16 with a GradScaler")
    add(
        "--sharpness-samples",
        type=int,
        default=256,
        metavar="N",
        help="training images on which sharpness is measured after training; 0: not at all; default: %(default)s",
    )
    return parser


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, recipes: Mapping[str, dict[str, Any]]
) -> argparse.Namespace:
    """Parse, with defaults for the chosen data and network from ``RECIPES``, and before them from ``recipes``."""
    for choice in ("data", "model"):
        known = vars(parser.parse_known_args(argv)[0])
        recipe = RECIPES.get(known[choice], {}) | recipes.get(known[choice], {})
        parser.set_defaults(**{name: value for name, value in recipe.items() if name in known})
    return parser.parse_args(argv)


@contextmanager
def refusals(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Let a ValueError inside the block, which says what in the command line cannot be, end it as one of argparse's."""
    try:
        yield
    except ValueError as error:
        parser.error(str(error))


def images(args: argparse.Namespace) -> data.ImageData:
    """The chosen data on the chosen device, after its preparation."""
    prepare(args)
    return data.load(args.data, args.data_file, torch.device(args.device), memory_format(args))


def prepare(args: argparse.Namespace) -> None:
    """Make the chosen device ready to be timed, after saying what may surprise there.

    Raises:
        ValueError: if the device is not there.
    """
    require_device(args)
    if args.device == "cpu" and not cpu_has_bf16_matrix_units():
        print("This CPU has no bf16 matrix units: what runs in bf16 saves no time here.")
    torch.backends.cudnn.benchmark = True


def require_device(args: argparse.Namespace) -> None:
    """Raise a ValueError if the chosen device is not there."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here; --device cpu needs none")


def check_training(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse values of the training options that make no sense."""
    for name in ("epochs", "seeds", "batch_size", "width"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value}: at least 1 is needed")
    if args.sharpness_samples < 0:
        parser.error(f"--sharpness-samples {args.sharpness_samples}: a number of images is needed, or 0")


def training_images(args: argparse.Namespace) -> data.ImageData:
    """The chosen data as it is to be trained on: the chosen part of it, with the chosen noise."""
    chosen = images(args)
    if args.train_samples is not None:
        chosen = data.subset(chosen, args.train_samples)
    if args.label_noise:
        chosen = data.flip_labels(chosen, args.label_noise)
    if chosen.steps_per_epoch(args.batch_size) == 0:
        raise ValueError(f"--batch-size {args.batch_size} is more than the {len(chosen.train_labels)} training images")
    return chosen


def as_json(args: argparse.Namespace) -> dict[str, Any]:
    """The options as they go into a result: all but the paths, which are this machine's own."""
    return {name: value for name, value in vars(args).items() if not isinstance(value, Path)}


def settings(args: argparse.Namespace, **more: Any) -> Settings:
    """The optimizers' options, and more of them."""
    shared = {name: getattr(args, name) for name in ("lr", "momentum", "weight_decay", "rho", "beta", "gamma")}
    shared["amp"] = AMP.get(getattr(args, "amp", ""))  # some benchmarks have no such option
    return Settings(**(shared | more))


def network(args: argparse.Namespace, channels: int, classes: int, seed: int) -> nn.Module:
    """The chosen network with the initial weights of a seed, on the chosen device."""
    model = models.build(args.model, width=args.width, channels=channels, classes=classes, seed=seed)
    return model.to(args.device, memory_format=memory_format(args))  # type: ignore[call-overload]


def memory_format(args: argparse.Namespace) -> torch.memory_format:
    """The order of the dimensions in memory."""
    return torch.channels_last if args.channels_last else torch.contiguous_format
