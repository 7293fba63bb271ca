"""What a step costs: SGD's, SAM's and ESAM's, and the parts that ESAM's is made of, each timed by itself.

Each case, a network with a batch size, is measured in rounds. In a round every method takes a step on the same batch,
in an order that changes from round to round; SGD and ESAM take several, since all else is compared with them, and SGD
takes part a second time under another name: what the two differ by is noise.

The parts of ESAM's step are written out below with torch and the operators, without the front end's checks and its
protection against exceptions, which are "left over" when the parts are taken from the whole step. The floor under it is
less than that: the three passes and the base optimizer's step, with no weight moved and no sample selected. Whole,
parts and floor have the same batch and the same draws, as many visits, and are timed one right after the other.

On a CPU the networks are scaled-down stand-ins: as deep as the published ones, but narrower, and on small images or
short sequences. Their widths stand in the tables.
"""

import argparse
import gc
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from itertools import chain
from itertools import count as naturals
from pathlib import Path
from statistics import mean, median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from esam_kernels import ESAM, ops
from esam_kernels.closure import Losses
from esam_kernels.model_state import ModelState
from esam_kernels.options import STEP, count_of
from esam_kernels.passes.draw import draw_tensors

from .. import record
from ..measuring.clock import Stopwatch, ratio, spread, turn
from ..report import tables
from ..training import authors, data, models
from ..training.catalogue import LANGUAGE_WIDTHS
from ..training.losses import mean_loss, per_sample_loss, per_sequence_loss
from ..training.methods import METHODS
from ..training.trainers import DTYPES, Settings, Trainer, trainer
from . import command_line
from .refusals import refusals

WARM_UP = 2  # rounds that are not counted
# Steps in a round, of which the median counts; of all others one. ESAM's are as many as those of its parts and floor.
VISITS = {"sgd": 3, "sgd-again": 3, "esam": 3}
LR = 0.01  # of all cases: no step's cost depends on it, and with it none diverges
AGREEMENTS = 10  # rounds in which bf16 steering is compared with float32's
TIMED = (
    "sgd",
    "sgd-bf16",
    "sgd-again",
    "sam",
    "sam-davda54",
    "esam",
    "esam-bf16",
    "esam-gamma1",
    "esam-beta1",
    "esam-loss",
    "esam-interval2",
    "esam-element",
    "esam-triton",
    "esam-native",
    "esam-reference",
    "esam-authors",
)
FORMER_NAMES = {"esam-gamma": "esam-gamma1", "esam-beta": "esam-beta1", "esam-interval": "esam-interval2"}
ALWAYS = ("sgd", "sgd-again", "esam")
BACKENDS = ("triton", "native", "reference")

# The networks that are measured unless others are asked for, by device: their sizes and their batch sizes.
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "cpu": {
        "gpt": {"width": 128, "vocabulary": 1024, "context": 64, "batch_sizes": [16]},
        "vit_s": {"width": 128, "batch_sizes": [64]},
        "resnet18": {"width": 32, "batch_sizes": [8, 64, 128]},
    },
    "cuda": {
        "resnet18": {"batch_sizes": [8, 64, 128, 512]},
        "resnet50": {"batch_sizes": [8, 64, 128, 512]},
        "wrn28_10": {"batch_sizes": [8, 128]},
        "vit_s": {"image_size": 224, "patch_size": 16, "batch_sizes": [8, 64, 128]},
        "gpt": {"vocabulary": 50257, "context": 1024, "batch_sizes": [2, 8, 16]},
    },
    "quick": {
        "gpt": {"width": 64, "vocabulary": 256, "context": 32, "batch_sizes": [8]},
        "vit_s": {"width": 64, "batch_sizes": [8]},
        "resnet18": {"width": 16, "batch_sizes": [32]},
    },
}
TIME_BUDGET = {"cpu": 300, "cuda": 440, "quick": 60}


# ESAM's step in parts.


def parts_of_step(bare: Trainer, inputs: Tensor, targets: Tensor, step: int) -> Iterator[str]:
    """ESAM's step of that number, yielding the name of each part when it has been given to the device.

    A name that comes twice is that of one part in two pieces.
    """
    bare.optimizer.zero_grad()
    weights = drawn(bare, step)
    yield "zero_grad and draw"
    before, grads = ascend(bare, inputs, targets, weights)
    yield "pass 1, forward and drawn gradients"
    put_back = ModelState([bare.model], weights).keep_buffers()
    yield "batch statistics kept and put back"
    backups = [torch.empty_like(param) for param in weights]
    perturb(weights, grads, backups, bare.settings)
    del grads  # a CPU's allocator takes its time for it
    yield "perturb"
    after = look(bare, inputs, targets)
    yield "pass 2, forward"
    index = ops.select_top(before, after, count_of(bare.settings.esam["gamma"], len(targets)))
    yield "select"
    bare.backward(inputs.index_select(0, index), targets.index_select(0, index))
    yield "pass 3, forward and backward of the selected"
    ops.restore_(weights, backups)
    del backups
    yield "restore"
    put_back()
    yield "batch statistics kept and put back"
    base_step(bare)
    yield "base step"


def floor_of_step(bare: Trainer, inputs: Tensor, targets: Tensor, weights: list[nn.Parameter]) -> None:
    """The three passes of ESAM's step and the base optimizer's step, on the first samples instead of selected ones."""
    bare.optimizer.zero_grad()
    ascend(bare, inputs, targets, weights)
    look(bare, inputs, targets)
    size = count_of(bare.settings.esam["gamma"], len(targets))
    bare.backward(inputs[:size], targets[:size])
    base_step(bare)


def drawn(bare: Trainer, step: int) -> list[nn.Parameter]:
    """The weights that ESAM draws in a step."""
    weights, settings = list(bare.model.parameters()), bare.settings
    return [weights[i] for i in draw_tensors(range(len(weights)), settings.esam["beta"], settings.seed, step)]


def ascend(
    bare: Trainer, inputs: Tensor, targets: Tensor, weights: list[nn.Parameter], dtype: torch.dtype | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Losses, and the gradients of the drawn weights."""
    with autocast(inputs.device, dtype):
        losses = bare.loss_fn(bare.model(inputs), targets)
    return unweighted(losses), torch.autograd.grad(bare.scaler.scale(mean_loss(losses)), weights)


def perturb(weights: list[nn.Parameter], grads: Sequence[Tensor], backups: list[Tensor], settings: Settings) -> None:
    """Move the drawn weights uphill."""
    coefficients = [settings.esam["rho"] / settings.esam["beta"]] * len(weights)
    ops.perturb_(weights, grads, backups, coefficients)


@torch.no_grad()
def look(bare: Trainer, inputs: Tensor, targets: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Losses at the weights as they are."""
    with autocast(inputs.device, dtype):
        return unweighted(bare.loss_fn(bare.model(inputs), targets))


def base_step(bare: Trainer) -> None:
    """The base optimizer's step, through the loss scaler."""
    bare.scaler.step(bare.optimizer)
    bare.scaler.update()


def unweighted(losses: Losses) -> Tensor:
    """The losses alone, without their graph."""
    return (losses if isinstance(losses, Tensor) else losses[0]).detach()


def autocast(device: torch.device, dtype: torch.dtype | None) -> Any:
    """Autocast to ``dtype``, or nothing if it is None."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def agreement(bare: Trainer, inputs: Tensor, targets: Tensor, weights: list[nn.Parameter]) -> tuple[float, float]:
    """How well bf16 steers: cosine of its ascent gradient with float32's, and share of samples selected alike."""
    directions, chosen = [], []
    for dtype in (None, torch.bfloat16):
        before, grads = ascend(bare, inputs, targets, weights, dtype)
        backups = [torch.empty_like(param) for param in weights]
        perturb(weights, grads, backups, bare.settings)
        after = look(bare, inputs, targets, dtype)
        ops.restore_(weights, backups)
        directions.append(torch.cat([grad.flatten().double() for grad in grads]))
        chosen.append(ops.select_top(before, after, count_of(bare.settings.esam["gamma"], len(targets))))
    exact, steered = directions
    return nn.functional.cosine_similarity(exact, steered, dim=0).item(), torch.isin(*chosen).double().mean().item()


# A case: a network, its data, and the methods that make sense there.


def case_data(args: argparse.Namespace, images: data.ImageData | None) -> data.ImageData | data.TokenData:
    """Random tokens for a language model; else the images in RGB and of the size asked for, by repeating pixels.

    Raises:
        ValueError: if there are fewer images than the batch needs, or their size does not divide that asked for.
    """
    if images is None or args.model in LANGUAGE_WIDTHS:
        return data.TokenData(args.vocabulary, args.context, torch.device(args.device))
    if len(images.train_images) < args.batch_size:
        raise ValueError(f"--batch-sizes {args.batch_size}: {images.label} has {len(images.train_images)} images only")
    size = images.train_images.shape[-1]
    if args.image_size % size:
        raise ValueError(f"--image-size {args.image_size}: a multiple of {size}, the size of {images.label}, is needed")
    factor, needed = args.image_size // size, 8 * args.batch_size  # more of them would take memory for nothing
    pixels = images.train_images[:needed].repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    labels = images.train_labels[:needed]
    return replace(images, train_images=pixels.expand(-1, 3, -1, -1), train_labels=labels, pad=images.pad * factor)


def prepare(cases: Sequence[argparse.Namespace]) -> list[data.ImageData | data.TokenData]:
    """The data of each case, when all of them have been found to make sense, before the first is measured.

    Raises:
        ValueError: if there is no such device, a method makes sense in no case, a network cannot have the shape or an
            optimizer the options, or the data are not to be had.
    """
    command_line.prepare(cases[0])
    for name in cases[0].methods or ():
        if all(name in left_out(args) for args in cases):
            raise ValueError(f"--methods {name}: {left_out(cases[0])[name]}")
    for args in cases:
        with torch.device("meta"):
            trainer("esam", build(args, 0), command_line.settings(args), torch.device(args.device))
    images = None
    if any(args.model not in LANGUAGE_WIDTHS for args in cases):
        shared = cases[0]
        images = data.load(
            shared.data, shared.data_file, torch.device(shared.device), command_line.memory_format(shared)
        )
    return [case_data(args, images) for args in cases]


def build(args: argparse.Namespace, seed: int) -> nn.Module:
    """The case's network with the initial weights of a seed."""
    shape = {"vocabulary": args.vocabulary, "context": args.context}
    if args.model not in LANGUAGE_WIDTHS:
        shape = {"image_size": args.image_size, "patch_size": args.patch_size} if args.model == "vit_s" else {}
    return models.build(args.model, width=args.width, seed=seed, **shape)


def serving_backend(device: str) -> str:
    """The backend that serves float32 weights on the device."""
    return ops.explain(torch.zeros(1, device=device)).partition(";")[0]


def left_out(args: argparse.Namespace) -> dict[str, str]:
    """The methods that make no sense in a case, and why."""
    of_precision = [name for name in TIMED if METHODS[name].compares_precision]
    why = dict.fromkeys(of_precision, "--amp sets the precision of all passes") if args.amp else {}
    if find_spec("pytorch_optimizer") is None:
        why["sam"] = "the package pytorch_optimizer is not installed"
    if args.authors_code is None:
        why["esam-authors"] = "--authors-code says where it is"
    elif args.model in LANGUAGE_WIDTHS:
        why["esam-authors"] = "the authors' code takes no weights of samples"
    default = serving_backend(args.device)
    for backend in BACKENDS:
        with ops.use_backend(backend):
            if backend == default:
                why[f"esam-{backend}"] = f"it is what the row esam has on {args.device}"
            elif serving_backend(args.device) != backend:
                why[f"esam-{backend}"] = f"this backend does not serve {args.device} here"
    return why


def rows(args: argparse.Namespace) -> tuple[list[str], dict[str, str]]:
    """The names of the methods that are measured, and why what was asked for beside them is not."""
    wanted, missing = {*(args.methods or TIMED), *ALWAYS}, left_out(args)
    order = [name for name in TIMED if name in wanted]
    return [name for name in order if name not in missing], {name: missing[name] for name in order if name in missing}


# Measurement.


def measure(
    args: argparse.Namespace, batches: data.ImageData | data.TokenData, names: list[str], deadline: float
) -> dict[str, Any]:
    """Seconds of each method's step, of each part of ESAM's, of all and of its floor, and how bf16 steers, by rounds.

    There are at most ``args.rounds`` rounds, and none after the first that would end after the deadline.

    Raises:
        FloatingPointError: if training has diverged.
    """
    device = torch.device(args.device)
    esam = authors.load(args.authors_code) if args.authors_code else None
    settings = replace(command_line.settings(args), authors_esam=esam)
    loss_fn = per_sequence_loss if isinstance(batches, data.TokenData) else per_sample_loss
    initial = build(args, settings.seed).to(device, memory_format=command_line.memory_format(args))  # type: ignore[call-overload]

    def start(name: str) -> Trainer:
        return trainer(name, deepcopy(initial), settings, device, loss_fn)

    trainers, in_parts, passes = {name: start(name) for name in names}, start("sgd"), start("sgd")
    stopwatch = Stopwatch(device)
    rounds: dict[str, dict[str, list[float]]] = {"methods": {}, "parts": {}, "sums": {}}
    visits: dict[tuple[str, str], list[float]]  # of the round that is under way, by what they are medians for
    losses: dict[str, Tensor] = {}
    agreements = []

    def lead(work: Callable[[], object]) -> None:
        if number >= WARM_UP:  # what does not count needs none
            stopwatch.lead(work)

    def time_method(name: str) -> None:
        one = trainers[name]

        def steps() -> None:
            if isinstance(one.optimizer, ESAM):  # whatever it has taken before, its draws are those of the round
                for group in one.optimizer.param_groups:
                    group[STEP] = number * one.settings.esam["interval"]
            for _ in range(one.settings.esam["interval"]):  # all kinds of steps that it takes
                losses[name] = one.step(inputs, targets)

        lead(steps)
        stopwatch.mark()
        steps()
        stopwatch.mark()
        visits["methods", name].append(stopwatch.laps()[0] / one.settings.esam["interval"])

    def time_parts() -> None:
        lead(lambda: deque(parts_of_step(in_parts, inputs, targets, number), maxlen=0))
        found = []
        stopwatch.mark()
        for name in parts_of_step(in_parts, inputs, targets, number):
            stopwatch.mark()
            found.append(name)
        laps = stopwatch.laps()
        parts: dict[str, float] = defaultdict(float)
        for name, seconds in zip(found, laps):
            parts[name] += seconds
        for name, seconds in parts.items():
            visits["parts", name].append(seconds)
        visits["sums", "parts"].append(sum(laps))

    def time_floor() -> None:
        work = partial(floor_of_step, passes, inputs, targets, drawn(passes, number))
        lead(work)
        stopwatch.mark()
        work()
        stopwatch.mark()
        visits["sums", "floor"] += stopwatch.laps()

    def time_esam() -> None:
        visit = len(visits["methods", "esam"])
        take_turns([partial(time_method, "esam"), time_parts, time_floor], VISITS["esam"] * number + visit)

    def take_turns(work: Sequence[Callable[[], None]], number: int) -> None:
        for i in turn(len(work), number):
            work[i]()

    timers: dict[str, Callable[[], None]] = {name: partial(time_method, name) for name in names}
    timers["esam"] = time_esam
    work = [timer for name, timer in timers.items() for _ in range(VISITS.get(name, 1))]
    generator = torch.Generator(device).manual_seed(settings.seed)
    epochs = (batches.train_batches(args.batch_size, generator) for _ in naturals())
    longest = 0.0
    progress = tqdm(range(WARM_UP + args.rounds), f"{args.model}, batch {args.batch_size}", unit="round")
    for number, (inputs, targets) in zip(progress, chain.from_iterable(epochs)):
        begin = perf_counter()
        if number > WARM_UP and begin + longest > deadline:
            break
        visits = defaultdict(list)
        take_turns(work, number)
        for (kind, name), seconds in visits.items():
            rounds[kind].setdefault(name, []).append(median(seconds))
        if settings.amp is None and number < WARM_UP + AGREEMENTS:
            agreements.append(agreement(in_parts, inputs, targets, drawn(in_parts, number)))
        longest = perf_counter() - begin if number < WARM_UP else max(longest, perf_counter() - begin)
    require_finite(trainers | {"the parts of ESAM's step": in_parts, "the floor of ESAM's step": passes}, losses)
    counted = slice(WARM_UP, None)
    measured = {kind: {name: seconds[counted] for name, seconds in found.items()} for kind, found in rounds.items()}
    methods = {name: measured["methods"][name] for name in names}
    return measured | {"methods": methods, "agreements": agreements[counted]}


def require_finite(trainers: Mapping[str, Trainer], losses: Mapping[str, Tensor]) -> None:
    """Refuse what was measured on networks that have diverged: arithmetic on NaN is no training.

    Args:
        trainers: by name.
        losses: the last one of those that have one.

    Raises:
        FloatingPointError: if a loss or a weight is not finite.
    """
    for name, one in trainers.items():
        tensors = [*one.model.parameters(), *([losses[name]] if name in losses else [])]
        if not all(tensor.isfinite().all() for tensor in tensors):
            raise FloatingPointError(
                f"{name} has diverged, its weights or losses are not finite, and what such steps take says nothing: "
                f"lower --lr {one.settings.lr:g}"
            )


def summarize(measured: dict[str, Any]) -> dict[str, Any]:
    """Medians and quartiles of the times, and of their ratios within a round.

    ``aa_difference`` is by how much SGD, entered a second time, differs from itself in the median of the ratios.
    """
    methods, (total, floor) = measured["methods"], (measured["sums"][name] for name in ("parts", "floor"))
    whole = methods["esam"]
    parts = measured["parts"] | {"sum of the parts": total, "left over": [a - b for a, b in zip(whole, total)]}

    def row(seconds: list[float]) -> dict[str, Any]:
        return {"seconds": spread(seconds)._asdict(), "time_over_sgd": ratio(seconds, methods["sgd"])._asdict()}

    cosines, overlaps = zip(*measured["agreements"]) if measured["agreements"] else ((), ())
    return {
        "rounds": len(whole),
        "methods": {name: {"label": METHODS[name].label, **row(seconds)} for name, seconds in methods.items()},
        "aa_difference": ratio(methods["sgd-again"], methods["sgd"]).median - 1,
        "parts": {name: row(seconds) for name, seconds in parts.items()},
        "whole_over_parts": ratio(whole, total)._asdict(),
        "floor": row(floor),
        "whole_over_floor": ratio(whole, floor)._asdict(),
        "steering": {"cosine": mean(cosines), "overlap": mean(overlaps)} if cosines else None,
    }


# The command line.


def current_name(name: str) -> str:
    """A method's name, if it had another one before."""
    return FORMER_NAMES.get(name, name)


def make_parser() -> argparse.ArgumentParser:
    """The options; a case's own defaults are not in it."""
    parser = command_line.make_parser(__doc__ or "", many=True)
    add = parser.add_argument
    add("--methods", nargs="+", type=current_name, choices=TIMED, help=f"beside {', '.join(ALWAYS)}; default: all")
    add("--amp", choices=DTYPES, help="train under autocast; fp16 with a GradScaler")
    add("--image-size", type=int, default=32, help="pixels; default: 32, for vit_s on a GPU 224")
    add("--patch-size", type=int, default=4, help="of vit_s, pixels; default: 4, on a GPU 16")
    add("--vocabulary", type=int, default=50257, help="of gpt, tokens; default: 50257, on a CPU 1024")
    add("--context", type=int, default=1024, help="of gpt, tokens in a sequence; default: 1024, on a CPU 64")
    add("--rounds", type=int, default=50, help="at most so many for each case; default: %(default)s")
    add(
        "--time-budget",
        type=float,
        metavar="SECONDS",
        help="of the whole job, which its cases share, those with the smallest batches first; the first takes a round "
        "in any case, and what is not reached is left out; default: 300, on a GPU 440",
    )
    add("--quick", action="store_true", help="small networks, in a minute")
    add("--authors-code", type=Path, metavar="FOLDER", help="a clone of github.com/dydjw9/Efficient_SAM, as a row")
    return parser


def parse_args(argv: Sequence[str] | None) -> tuple[float, list[argparse.Namespace]]:
    """The time budget in seconds, and for each case its command line, checked; the smallest batches first."""
    parser = make_parser()
    asked = parser.parse_args(argv)
    scale = "quick" if asked.quick else asked.device
    if min(asked.rounds, *(asked.batch_sizes or [1])) < 1:
        parser.error("--rounds and --batch-sizes must be at least 1")
    # A sequence is at least a quarter as long as the context, and not empty.
    for name, least in {"width": 1, "image_size": 1, "patch_size": 1, "vocabulary": 1, "context": 4}.items():
        value = getattr(asked, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} {value}: at least {least} is needed")
    if asked.time_budget is not None and not asked.time_budget >= 0:
        parser.error(f"--time-budget {asked.time_budget:g}: seconds are needed, at least 0")
    if asked.authors_code is not None:
        try:
            authors.load(asked.authors_code)
        except ValueError as error:
            parser.error(f"--authors-code: {error}")
    cases = []
    for model in asked.models or CASES[scale]:
        shape = dict(CASES[scale].get(model, {}))
        default_sizes = shape.pop("batch_sizes", [64])
        for batch_size in asked.batch_sizes or default_sizes:
            case = {"model": model, "batch_size": batch_size, "lr": LR}
            parser = make_parser()
            parser.set_defaults(**case)
            args = command_line.parse(parser, argv, dict.fromkeys(data.DATASETS, case | shape))
            del args.models, args.batch_sizes
            cases.append(args)
    cases.sort(key=lambda args: args.batch_size)  # the cheapest first, so that a short budget yields something
    return TIME_BUDGET[scale] if asked.time_budget is None else asked.time_budget, cases


def run(args: argparse.Namespace, batches: data.ImageData | data.TokenData, deadline: float) -> None:
    """Measure a case, write its result and print its tables."""
    names, missing = rows(args)
    result = record.header("step_cost", batches.label, args)  # of the code that is about to run
    result |= {"backend": serving_backend(args.device), "left_out": missing}
    result |= summarize(measure(args, batches, names, deadline))
    amp = f"_{args.amp}" if args.amp else ""
    record.save(result, args.output, f"step_cost_{args.device}_{args.model}_b{args.batch_size}{amp}")
    print(tables.step_cost(result), end="\n\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure each case; one that cannot be measured ends no other, but fails the whole unless time or memory ran out.

    Raises:
        SystemExit: if a case has failed, or none could be measured.
    """
    started = perf_counter()
    budget, cases = parse_args(argv)
    with refusals(make_parser()):
        batches = prepare(cases)
    skipped: list[str] = []
    failed: list[str] = []
    for i, args in enumerate(cases):
        subject = f"{args.model}, batch {args.batch_size}"
        gc.collect()  # under autocast a model and its forward refer to each other, and keep the last case's memory
        begin, end = perf_counter(), started + budget
        if i > 0 and begin > end:
            skipped.append(f"{subject}: left out, since the time budget of {budget:g} seconds was used up")
            continue
        try:
            run(args, batches[i], begin + (end - begin) / (len(cases) - i))  # a share of what earlier cases have left
        except torch.OutOfMemoryError:
            skipped.append(f"{subject}: left out, since it takes more memory than the device has")
        except FloatingPointError as error:
            failed.append(f"{subject}: {error}")
    print(*skipped, sep="\n")
    if failed or len(skipped) == len(cases):
        sys.exit("\n".join(failed or ["no case was measured"]))
