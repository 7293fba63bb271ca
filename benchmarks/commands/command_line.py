"""The command line that the benchmarks share: data, network, device and hyperparameters."""

import argparse
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from esam_kernels.options import OPTIONS
from esam_kernels.passes.evaluate import cpu_has_bf16_units

from ..measuring.environment import environment
from ..measuring.journal import PACKAGES, Journal, code_fingerprint
from ..record import RESULTS
from ..training import data
from ..training.catalogue import IMAGE_WIDTHS, WIDTHS
from ..training.methods import METHODS
from ..training.run import Task
from ..training.trainers import BASES, DTYPES, Settings, left_out

# Where the defaults of options come from; --data and --model choose. Those for CIFAR-10 are the paper's.
RECIPES: dict[str, dict[str, Any]] = {
    "digits": {"model": "small", "batch_size": 128, "lr": 0.1, "weight_decay": 5e-4},
    "cifar10": {"model": "resnet18", "batch_size": 128, "lr": 0.05, "weight_decay": 1e-3},
    "random": {"model": "small", "batch_size": 128, "lr": 0.1, "weight_decay": 5e-4},
    "adamw": {"lr": 1e-3, "weight_decay": 0.05},
    "wrn28_10": {"rho": 0.1, "beta": 0.5},
}
SUBSTITUTES = {"sam": "sam-own"}  # for methods whose package is missing
DISTANCES = (0.5, 1, 2, 4, 8)  # of which the rise of the loss is measured, in units of rho


def base_parser(description: str) -> argparse.ArgumentParser:
    """A parser with what every benchmark has: where it runs, and where its result goes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--output", type=Path, default=RESULTS, metavar="FOLDER", help="default: benchmarks/results")
    add("--restart", action="store_true", help="do not go on with what is in the output folder's journal")
    return parser


def make_parser(description: str, many: bool = False) -> argparse.ArgumentParser:
    """A parser with the shared options; with ``many``, those for networks and batch sizes take several."""
    parser = base_parser(description)
    add = parser.add_argument
    add("--data", choices=data.DATASETS, default="digits", help="default: %(default)s")
    add("--data-file", type=Path, metavar="PATH", help="CIFAR-10: the .tar.gz, its folder, or an .npz of JPEG files")
    if many:
        add("--models", nargs="+", choices=WIDTHS, help="default: several")
        add("--batch-sizes", nargs="+", type=int, metavar="N", help="default: several, which depend on the network")
    else:
        add("--model", choices=IMAGE_WIDTHS, help="default: small for digits, resnet18 for cifar10")
        add("--batch-size", type=int, help="default: 128")
    add("--width", type=int, help="channels of the first stage or of a token; for wrn28_10 the factor of width")
    add("--channels-last", action="store_true", help="keep images and weights in channels-last order")
    default = "0.01" if many else "0.1 for digits, 0.05 for cifar10"
    add("--lr", type=float, help=f"peak learning rate; default: {default}")
    add("--skip-slow-bf16", action="store_true", help="leave out bf16 on a CPU where it is slower than float32")
    add("--momentum", type=float, default=0.9, help="default: %(default)s")
    add("--weight-decay", type=float, help="default: 5e-4 for digits, 1e-3 for cifar10")
    add_esam(parser, but=["interval", "start"] if many else [])  # the parts of a step are those of a sharp one
    return parser


def add_esam(parser: argparse.ArgumentParser, but: Collection[str] = ()) -> None:
    """Add ESAM's options to a parser: all but some, and but the seed, which is that of a run."""
    for name, option in OPTIONS.items():
        if name in ("seed", *but):
            continue
        others = [f", for {recipe} {values[name]}" for recipe, values in RECIPES.items() if name in values]
        default = "what suits --ascent" if name == "rho" else option.default
        about: dict[str, Any] = {
            "default": option.default,
            "help": f"ESAM: {option.meaning}; default: {default}{''.join(others)}".replace("%", "%%"),
        }
        if option.kind is bool:
            about["action"] = argparse.BooleanOptionalAction
        elif option.choices:
            about["choices"] = option.choices
        else:
            about["type"] = option.kind
        parser.add_argument(f"--{name.replace('_', '-')}", **about)


def make_training_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the shared options and those of benchmarks that train to the end."""
    parser = make_parser(description)
    add = parser.add_argument
    add("--base", choices=BASES, default="sgd", help="the base optimizer of all methods; default: %(default)s")
    add("--image-size", type=int, metavar="PIXELS", help="make the images so small first; default: as they are")
    add("--train-samples", type=int, metavar="N", help="train on so many images only; default: all")
    add(
        "--augment",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="shift and mirror training images; without it a network learns them by heart in fewer epochs",
    )
    add("--label-noise", type=float, metavar="SHARE", default=0.0, help="share of training labels made wrong")
    add("--epochs", type=int, help="the learning rate anneals over them")
    add("--seeds", type=int, default=3, help="how many; default: %(default)s")
    add("--amp", choices=DTYPES, help="train under autocast; fp16 with a GradScaler")
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
    for choice in ("data", "model", "base"):
        known = vars(parser.parse_known_args(argv)[0])
        recipe = RECIPES.get(known.get(choice, ""), {}) | recipes.get(known.get(choice, ""), {})
        parser.set_defaults(**{name: value for name, value in recipe.items() if name in known})
    args = parser.parse_args(argv)
    given = settings(args)
    if args.rho is None:
        (args.rho,) = METHODS["esam"].radii(given.esam, given.base)
    return args


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
    if args.device == "cpu" and cpu_has_bf16_units() is False:
        print("This CPU has no bf16 units (AMX, AVX512-BF16): what runs in bf16 saves no time here.")
    torch.backends.cudnn.benchmark = True


def slow_bf16(args: argparse.Namespace) -> bool:
    """Whether what runs in bf16 is to be left out, since it would only be slower."""
    return args.skip_slow_bf16 and args.device == "cpu" and cpu_has_bf16_units() is False


def require_device(args: argparse.Namespace) -> None:
    """Raise a ValueError if the chosen device is not there."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here; --device cpu needs none")


def journal(args: argparse.Namespace, stem: str) -> Journal:
    """The finished parts of a result, with which it goes on.

    Raises:
        ValueError: if they were measured elsewhere or by other code.
    """
    identity = environment() | {"code": code_fingerprint(*PACKAGES)}
    return Journal(args.output / f"{stem}.jsonl", identity, args.restart)


def draw(result: dict[str, Any], folder: Path, figures: Mapping[str, str]) -> list[str]:
    """Draw the plots of a result, by their files' names those of ``report.plots``; the files that were written."""
    if find_spec("matplotlib") is None:
        print("No plots: the package matplotlib is not installed. Where it is, python -m benchmarks report draws them.")
        return []
    from ..report import plots

    for file, name in figures.items():
        getattr(plots, name)(result, folder / file)
    return list(figures)


def without_left_out(parser: argparse.ArgumentParser, args: argparse.Namespace, option: str, default: bool) -> None:
    """Take out of an option's methods those that cannot be trained here, and keep in ``args.left_out`` why.

    SAM of this package takes the place of the one that is missing. What was asked for by name is refused instead.
    """
    names: list[str] = getattr(args, option)
    args.left_out = left_out(names, getattr(args, "base", "sgd"), slow_bf16(args))
    if args.left_out and not default:
        parser.error("; ".join(f"--{option} {name}: {why}" for name, why in args.left_out.items()))
    here = [SUBSTITUTES.get(name, "") if name in args.left_out else name for name in names]
    setattr(args, option, list(dict.fromkeys(filter(None, here))))


def check_training(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse values of the training options that make no sense."""
    for name in ("epochs", "seeds", "batch_size", "width"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value}: at least 1 is needed")
    for name, least_not in (("lr", math.inf), ("weight_decay", math.inf), ("momentum", 1), ("time_budget", math.inf)):
        value = getattr(args, name, None)
        if value is not None and not 0 <= value < least_not:
            parser.error(f"--{name.replace('_', '-')} {value}: a number in [0, {least_not}) is needed")
    if args.sharpness_samples < 0:
        parser.error(f"--sharpness-samples {args.sharpness_samples}: a number of images is needed, or 0")


def training_images(args: argparse.Namespace) -> data.ImageData:
    """The chosen data as it is to be trained on: the chosen part of it, with the chosen noise."""
    chosen = images(args)
    if args.image_size is not None:
        chosen = data.shrink(chosen, args.image_size)
    if not args.augment:
        chosen = replace(chosen, label=f"{chosen.label}, not augmented", pad=0, flip=False)
    if getattr(args, "validation_samples", None):
        args.validation = noisy(args, data.hold_out(chosen, args.train_samples or 0, args.validation_samples))
    if args.train_samples is not None:
        chosen = data.subset(chosen, args.train_samples)
    chosen = noisy(args, chosen)
    if chosen.steps_per_epoch(args.batch_size) == 0:
        raise ValueError(f"--batch-size {args.batch_size} is more than the {len(chosen.train_labels)} training images")
    return chosen


def noisy(args: argparse.Namespace, images: data.ImageData) -> data.ImageData:
    """The data with the chosen noise in its training labels."""
    return data.flip_labels(images, args.label_noise) if args.label_noise else images


def memory_format(args: argparse.Namespace) -> torch.memory_format:
    """The order of the dimensions in memory."""
    return torch.channels_last if args.channels_last else torch.contiguous_format


def settings(args: argparse.Namespace, seed: int = 0, **changed: Any) -> Settings:
    """The optimizers' options, with those of ESAM that are given here instead of the command line's."""
    esam = {name: getattr(args, name) for name in OPTIONS if hasattr(args, name)} | {"seed": seed} | changed
    amp = DTYPES.get(getattr(args, "amp", ""))  # some benchmarks have no such option
    base = getattr(args, "base", "sgd")
    return Settings(args.lr, args.momentum, args.weight_decay, esam, amp, base=base)


def task(args: argparse.Namespace, images: data.ImageData) -> Task:
    """What the methods are given to do with the images."""
    return Task(
        images,
        args.model,
        args.width,
        torch.device(args.device),
        memory_format(args),
        args.batch_size,
        args.sharpness_samples,
        distances=tuple(factor * args.rho for factor in DISTANCES),
    )
