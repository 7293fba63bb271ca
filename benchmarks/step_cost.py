"""What a step costs: SGD's, SAM's and ESAM's, and the passes that ESAM's is made of, each timed by itself.

The passes are written out below with torch and the operators alone, without the front end's protection against
exceptions, batch statistics at perturbed weights and the rest: their sum is the floor under ESAM's whole step.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain, count
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import trange

from esam_kernels import ops
from esam_kernels.weight_mask import draw_tensors

from . import data, options, record, tables
from .measure import Stopwatch, ratio, spread
from .methods import METHODS, Settings, Trainer, per_sample_loss, trainer

IMAGE_SIZE = 32
WARM_UP = 3  # rounds that are not counted
# The same network for all data.
RECIPES = {name: {"model": "resnet18", "batch_size": 64} for name in data.DATASETS} | {"resnet18": {"width": 32}}


def parts_of_step(floor: Trainer, inputs: Tensor, targets: Tensor, weights: list[nn.Parameter]) -> Iterator[str]:
    """One ESAM step, yielding the name of each part when it has been given to the device."""
    model, settings = floor.model, floor.settings
    before, grads = ascend(model, inputs, targets, weights)
    yield "pass 1, forward and drawn gradients"
    backups = [torch.empty_like(param) for param in weights]
    perturb(weights, grads, backups, settings)
    yield "perturb"
    after = look(model, inputs, targets)
    yield "pass 2, forward"
    index = ops.select_top(before, after, selected(settings, len(targets)))
    yield "select"
    floor.backward(inputs.index_select(0, index), targets.index_select(0, index))
    yield "pass 3, forward and backward of the selected"
    ops.restore_(weights, backups)
    yield "restore"
    floor.optimizer.step()
    yield "base step"


def drawn(weights: list[nn.Parameter], settings: Settings, step: int) -> list[nn.Parameter]:
    """The weights that ESAM draws in a step."""
    return [weights[i] for i in draw_tensors(range(len(weights)), settings.beta, settings.seed, step)]


def ascend(
    model: nn.Module, inputs: Tensor, targets: Tensor, weights: list[nn.Parameter], dtype: torch.dtype | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Losses, and the gradients of the drawn weights."""
    with autocast(inputs.device, dtype):
        losses = per_sample_loss(model(inputs), targets)
    return losses.detach(), torch.autograd.grad(losses.mean(), weights)


def perturb(weights: list[nn.Parameter], grads: Sequence[Tensor], backups: list[Tensor], settings: Settings) -> None:
    """Move the drawn weights uphill."""
    coefficients = [settings.rho / settings.beta] * len(weights)
    ops.perturb_(weights, grads, backups, coefficients, ops.squared_norm(weights, grads).sqrt())


@torch.no_grad()
def look(model: nn.Module, inputs: Tensor, targets: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Losses at the weights as they are."""
    with autocast(inputs.device, dtype):
        return per_sample_loss(model(inputs), targets)


def autocast(device: torch.device, dtype: torch.dtype | None) -> Any:
    """Autocast to ``dtype``, or nothing if it is None."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def selected(settings: Settings, size: int) -> int:
    """How many samples of a batch are selected."""
    return max(1, int(settings.gamma * size))


def agreement(floor: Trainer, inputs: Tensor, targets: Tensor, weights: list[nn.Parameter]) -> tuple[float, float]:
    """How well bf16 steers: cosine of its ascent gradient with float32's, and share of samples selected alike."""
    directions, chosen = [], []
    for dtype in (None, torch.bfloat16):
        before, grads = ascend(floor.model, inputs, targets, weights, dtype)
        backups = [torch.empty_like(param) for param in weights]
        perturb(weights, grads, backups, floor.settings)
        after = look(floor.model, inputs, targets, dtype)
        ops.restore_(weights, backups)
        directions.append(torch.cat([grad.flatten().double() for grad in grads]))
        chosen.append(ops.select_top(before, after, selected(floor.settings, len(targets))))
    exact, steered = directions
    return nn.functional.cosine_similarity(exact, steered, dim=0).item(), torch.isin(*chosen).double().mean().item()


def large_images(args: argparse.Namespace) -> data.ImageData:
    """The chosen data as RGB images of 32x32 pixels, the size of CIFAR's; smaller ones by repeating pixels."""
    images = options.images(args)
    factor = IMAGE_SIZE // images.train_images.shape[-1]
    pixels = images.train_images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    return replace(images, train_images=pixels.expand(-1, 3, -1, -1), pad=images.pad * factor)


def measure(args: argparse.Namespace, images: data.ImageData) -> dict[str, Any]:
    """Seconds of each method's step and of each part of ESAM's, and how well bf16 steers, in every round.

    Within a round all see the same batch, in an order that rotates, and the parts have the draws of ESAM's own step.
    """
    device, settings = torch.device(args.device), options.settings(args)

    def start(name: str) -> Trainer:
        return trainer(name, options.network(args, images.channels, images.classes, settings.seed), settings, device)

    trainers, floor = {name: start(name) for name in METHODS}, start("sgd")
    weights = list(floor.model.parameters())
    stopwatch = Stopwatch(device)
    methods: dict[str, list[float]] = {name: [] for name in trainers}
    parts: dict[str, list[float]] = defaultdict(list)
    agreements = []

    def time_method(name: str) -> None:
        stopwatch.mark()
        trainers[name].step(inputs, targets)
        stopwatch.mark()
        methods[name] += stopwatch.laps()

    def time_parts() -> None:
        stopwatch.mark()
        names = []
        for name in parts_of_step(floor, inputs, targets, perturbed):
            stopwatch.mark()
            names.append(name)
        for name, seconds in zip(names, stopwatch.laps()):
            parts[name].append(seconds)

    work = [partial(time_method, name) for name in trainers] + [time_parts]
    generator = torch.Generator(device).manual_seed(settings.seed)
    epochs = (images.train_batches(args.batch_size, generator) for _ in count())
    rounds = trange(WARM_UP + args.rounds, unit="round")
    for number, (inputs, targets) in zip(rounds, chain.from_iterable(epochs)):
        perturbed = drawn(weights, settings, number)
        turn = number % len(work)
        for time in work[turn:] + work[:turn]:
            time()
        agreements.append(agreement(floor, inputs, targets, perturbed))
    counted = slice(WARM_UP, None)
    return {
        "methods": {name: seconds[counted] for name, seconds in methods.items()},
        "parts": {name: seconds[counted] for name, seconds in parts.items()},
        "agreements": agreements[counted],
    }


def summarize(measured: dict[str, Any]) -> dict[str, Any]:
    """Medians and quartiles of the times, and of their ratios within a round."""
    methods, parts = measured["methods"], dict(measured["parts"])
    parts["sum of the parts"] = [sum(seconds) for seconds in zip(*parts.values())]
    cosines, overlaps = zip(*measured["agreements"])

    def row(seconds: list[float]) -> dict[str, Any]:
        return {"seconds": spread(seconds)._asdict(), "time_over_sgd": ratio(seconds, methods["sgd"])._asdict()}

    return {
        "methods": {name: {"label": METHODS[name].label, **row(seconds)} for name, seconds in methods.items()},
        "parts": {name: row(seconds) for name, seconds in parts.items()},
        "whole_over_parts": ratio(methods["esam"], parts["sum of the parts"])._asdict(),
        "steering": {"cosine": mean(cosines), "overlap": mean(overlaps)},
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Time the steps in turns, write the result and print the tables."""
    parser = options.make_parser(__doc__ or "")
    parser.add_argument(
        "--rounds", type=int, default=30, help="every method takes a step in each; default: %(default)s"
    )
    args = options.parse(parser, argv, RECIPES)
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    images = large_images(args)
    result = record.header("step_cost", images.label, args) | summarize(measure(args, images))
    record.save(result, args.output, f"step_cost_{args.device}")
    print(tables.step_cost(result))


if __name__ == "__main__":
    main()
