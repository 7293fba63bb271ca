"""What a step costs: SGD's, SAM's and ESAM's, and the parts that ESAM's is made of, each timed by itself.

Each case, a network with a batch size, is measured in rounds. In a round every method takes a step on the same batch,
in an order that changes from round to round; SGD and ESAM take several, since all else is compared with them, and SGD
takes part a second time under another name: what the two differ by is noise.

The parts of ESAM's step are the package's own passes, with a mark of the stopwatch before and after each; the front
end's checks and its protection against exceptions are "left over" when they are taken from the whole step. The floor
under it is less than that: the three passes and the base optimizer's step in plain torch, with no weight moved and no
sample selected. Whole, parts and floor have the same batch and the same draws, as many visits, and are timed one right
after the other.

On a CPU the networks are scaled-down stand-ins: as deep as the published ones, but narrower, and on small images or
short sequences. Their widths stand in the tables.
"""

import argparse
import gc
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import partial
from itertools import chain
from itertools import count as naturals
from pathlib import Path
from statistics import mean, median
from time import perf_counter
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from esam_kernels import ops, options, sharpness
from esam_kernels.model_state import ModelState
from esam_kernels.options import OPTIONS
from esam_kernels.passes.draw import draw_tensors

from .. import record
from ..measuring.clock import Stopwatch, ratio, spread, turn
from ..measuring.journal import Journal
from ..measuring.progress import following
from ..report import tables
from ..training import authors, data, models, trainers
from ..training.catalogue import LANGUAGE_WIDTHS
from ..training.losses import mean_loss, per_sample_loss, per_sequence_loss
from ..training.methods import METHODS
from ..training.trainers import DTYPES, ESAMTrainer, Trainer, set_step, trainer
from . import command_line
from .refusals import refusals

WARM_UP = 2  # rounds that are not counted
# Steps in a round, of which the median counts; of all others one. ESAM's are as many as those of its parts and floor.
VISITS = {"sgd": 3, "sgd-again": 3, "esam": 3}
SHARED = [name for name, option in OPTIONS.items() if not option.per_group]  # what holds for all parameter groups
LR = 0.01  # of all cases: no step's cost depends on it, and with it none diverges
AGREEMENTS = 10  # rounds in which bf16 steering is compared with float32's
TIMED = (
    "sgd",
    "sgd-bf16",
    "sgd-again",
    "sam",
    "sam-davda54",
    "sam-foreach",
    "sam-own",
    "momentum",
    "momentum-random",
    "previous",
    "share-quarter",
    "share-half",
    "sam-tail0.2",
    "temperon-tail0.2",
    "esam-random",
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
OF_THE_JOB = ("rounds", "time_budget", "if_possible")  # options that say nothing of what is measured
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


# The passes by their names in ``esam_kernels.sharpness``, which calls them by these.
PASSES = {
    "ascend": "pass 1, forward and drawn gradients",
    "perturb": "perturb",
    "look": "pass 2, forward",
    "select": "select",
    "descend": "pass 3, forward and backward of the selected",
    "restore": "restore",
}
BUFFERS = "batch statistics kept and put back"
Part = Callable[..., Any]


@contextmanager
def parts_through(wrap: Callable[[str, Part], Part], one: ESAMTrainer) -> Iterator[None]:
    """Inside the block, let what ESAM's step is made of be called through ``wrap(name, function)``."""
    keep_buffers = ModelState.keep_buffers

    def keep_and_put_back(state: ModelState) -> Part:
        return wrap(BUFFERS, wrap(BUFFERS, keep_buffers)(state))

    with ExitStack() as stack:
        for function, name in PASSES.items():
            stack.enter_context(patch.object(sharpness, function, wrap(name, getattr(sharpness, function))))
        stack.enter_context(patch.object(ModelState, "keep_buffers", keep_and_put_back))
        base = one.optimizer.base
        stack.enter_context(patch.object(base, "zero_grad", wrap("zero_grad", base.zero_grad)))
        stack.enter_context(patch.object(one, "base_step", wrap("base step", one.base_step)))
        yield


def parts_of_step(one: ESAMTrainer, inputs: Tensor, targets: Tensor, stopwatch: Stopwatch) -> dict[str, float]:
    """Take ESAM's step, with the stopwatch marked where each part of it begins and ends; the seconds of each part.

    What one part calls of another is the other's.
    """
    laps, running = [], [""]  # nameless is what lies between the parts

    def timed(name: str, part: Part) -> Part:
        def call(*args: Any, **options: Any) -> Any:
            stopwatch.mark()
            laps.append(running[-1])
            running.append(name)
            result = part(*args, **options)
            stopwatch.mark()
            laps.append(running.pop())
            return result

        return call

    with parts_through(timed, one):
        stopwatch.mark()
        one.step(inputs, targets)
    parts: dict[str, float] = defaultdict(float)
    for name, seconds in zip(laps, stopwatch.laps(), strict=True):
        parts[name] += seconds
    return {name: seconds for name, seconds in parts.items() if name}


def agreement(one: ESAMTrainer, inputs: Tensor, targets: Tensor, step: int) -> tuple[float, float]:
    """How well bf16 steers: cosine of its ascent gradient with float32's, and share of samples selected alike."""
    directions: list[Tensor] = []
    chosen: list[Tensor] = []

    def watched(name: str, part: Part) -> Part:
        def call(*args: Any, **options: Any) -> Any:
            result = part(*args, **options)
            if name == PASSES["ascend"]:
                directions.append(torch.cat([grad.flatten().double() for grad in result.grads if grad is not None]))
            elif name == PASSES["select"]:
                (rows,) = result
                chosen.append(torch.arange(len(targets), device=targets.device) if rows is None else rows)
            return result

        return call

    group, own = one.optimizer.param_groups[0], one.settings.esam["steering_dtype"]
    with parts_through(watched, one):
        for name in (None, "bfloat16"):
            group["steering_dtype"] = name
            set_step(one, step)
            one.optimizer.backward(one.closure(inputs, targets))
            one.optimizer.zero_grad()  # no step is taken with it
    group["steering_dtype"] = own
    exact, steered = directions
    return nn.functional.cosine_similarity(exact, steered, dim=0).item(), torch.isin(*chosen).double().mean().item()


# The floor under ESAM's step.


def floor_of_step(bare: Trainer, inputs: Tensor, targets: Tensor, weights: list[nn.Parameter]) -> None:
    """What ESAM's step cannot be without, in plain torch: its passes, on the first samples, and the base step."""
    settings = options.Settings(**{name: bare.settings.esam[name] for name in SHARED})
    steering = settings.steering_dtype and torch.autocast(inputs.device.type, getattr(torch, settings.steering_dtype))
    bare.optimizer.zero_grad()
    for name in sharpness.passes(settings):
        if name in ("survey", "look"):
            with torch.no_grad(), steering or nullcontext():
                bare.loss_fn(bare.model(inputs), targets)
        elif name == "ascend":
            rows = options.count_of(settings.ascent_share, len(targets))
            with steering or nullcontext():
                losses = bare.loss_fn(bare.model(inputs[:rows]), targets[:rows])
            torch.autograd.grad(bare.scaler.scale(mean_loss(losses)), weights)
    size = options.count_of(settings.gamma, len(targets))
    bare.backward(inputs[:size], targets[:size])
    bare.base_step()


def drawn(bare: Trainer, step: int) -> list[nn.Parameter]:
    """The weights that ESAM draws in a step."""
    weights, esam = list(bare.model.parameters()), bare.settings.esam
    if esam["granularity"] == "element":
        return weights
    return [weights[i] for i in draw_tensors(range(len(weights)), esam["beta"], esam["seed"], step)]


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
    for name in () if cases[0].if_possible else cases[0].methods or ():
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
    why |= trainers.left_out(TIMED, slow_bf16=command_line.slow_bf16(args))
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
        own = replace(settings, steps=METHODS[name].cycle)
        return trainer(name, deepcopy(initial), own, device, loss_fn)

    timed, in_parts, at_floor = {name: start(name) for name in names}, start("esam"), start("sgd")
    assert isinstance(in_parts, ESAMTrainer)
    stopwatch = Stopwatch(device)
    rounds: dict[str, dict[str, list[float]]] = {"methods": {}, "parts": {}, "sums": {}}
    visits: dict[tuple[str, str], list[float]]  # of the round that is under way, by what they are medians for
    losses: dict[str, Tensor] = {}
    agreements = []

    def lead(work: Callable[[], object]) -> None:
        if number >= WARM_UP:  # what does not count needs none
            stopwatch.lead(work)

    def time_method(name: str) -> None:
        one, cycle = timed[name], METHODS[name].cycle

        def steps() -> None:
            # Whatever it has taken before, its draws are those of the round; a tail is one of the cycle.
            set_step(one, number * cycle if METHODS[name].late_share == 1 else 0)
            for _ in range(cycle):  # all kinds of steps that it takes
                losses[name] = one.step(inputs, targets)

        lead(steps)
        stopwatch.mark()
        steps()
        stopwatch.mark()
        visits["methods", name].append(stopwatch.laps()[0] / cycle)

    def time_parts() -> None:
        set_step(in_parts, number)
        lead(partial(in_parts.step, inputs, targets))
        set_step(in_parts, number)
        found = parts_of_step(in_parts, inputs, targets, stopwatch)
        for name, seconds in found.items():
            visits["parts", name].append(seconds)
        visits["sums", "parts"].append(sum(found.values()))

    def time_floor() -> None:
        work = partial(floor_of_step, at_floor, inputs, targets, drawn(at_floor, number))
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
    count = WARM_UP + args.rounds
    progress = following(range(count), count, f"{args.model}, batch {args.batch_size}")
    for number, (inputs, targets) in zip(progress, chain.from_iterable(epochs)):
        begin = perf_counter()
        if number > WARM_UP and begin + longest > deadline:
            break
        visits = defaultdict(list)
        take_turns(work, number)
        for (kind, name), seconds in visits.items():
            rounds[kind].setdefault(name, []).append(median(seconds))
        if settings.amp is None and settings.esam["ascent"] == "gradient" and number < WARM_UP + AGREEMENTS:
            agreements.append(agreement(in_parts, inputs, targets, number))
        longest = perf_counter() - begin if number < WARM_UP else max(longest, perf_counter() - begin)
    require_finite(timed | {"the parts of ESAM's step": in_parts, "the floor of ESAM's step": at_floor}, losses)
    counted = slice(WARM_UP, None)
    measured = {kind: {name: seconds[counted] for name, seconds in found.items()} for kind, found in rounds.items()}
    methods = {name: measured["methods"][name] for name in names}
    return measured | {"methods": methods, "agreements": agreements[counted]}


def require_finite(timed: Mapping[str, Trainer], losses: Mapping[str, Tensor]) -> None:
    """Refuse what was measured on networks that have diverged: arithmetic on NaN is no training.

    Args:
        timed: by name.
        losses: the last one of those that have one.

    Raises:
        FloatingPointError: if a loss or a weight is not finite.
    """
    for name, one in timed.items():
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
    add("--if-possible", action="store_true", help="leave out of --methods what cannot be measured, and say why")
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


def run(args: argparse.Namespace, batches: data.ImageData | data.TokenData, deadline: float, journal: Journal) -> None:
    """Measure a case unless it is in the journal, write its result and print its tables."""
    names, missing = rows(args)

    def result_of_case() -> dict[str, Any]:
        result = record.header("step_cost", batches.label, args)  # of the code that is about to run
        result |= {"backend": serving_backend(args.device), "left_out": missing}
        return result | summarize(measure(args, batches, names, deadline))

    result = journal.once(case_key(args), result_of_case)
    amp = f"_{args.amp}" if args.amp else ""
    record.save(result, args.output, f"step_cost_{args.device}_{args.model}_b{args.batch_size}{amp}")
    print(tables.step_cost(result), end="\n\n")


def case_key(args: argparse.Namespace) -> dict[str, Any]:
    """What decides what is measured in a case."""
    key = {name: value for name, value in record.as_json(args).items() if name not in OF_THE_JOB}
    return key | {"authors_code": args.authors_code is not None}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure each case; one that cannot be measured ends no other, but fails the whole unless time or memory ran out.

    Raises:
        SystemExit: if a case has failed, or none could be measured.
    """
    started = perf_counter()
    budget, cases = parse_args(argv)
    with refusals(make_parser()):
        batches = prepare(cases)
        journal = command_line.journal(cases[0], f"step_cost_{cases[0].device}")
    skipped: list[str] = []
    failed: list[str] = []
    for i, args in enumerate(cases):
        subject = f"{args.model}, batch {args.batch_size}"
        gc.collect()  # under autocast a model and its forward refer to each other, and keep the last case's memory
        begin, end = perf_counter(), started + budget
        if i > 0 and begin > end and journal.get(case_key(args)) is None:
            skipped.append(f"{subject}: left out, since the time budget of {budget:g} seconds was used up")
            continue
        try:
            run(
                args, batches[i], begin + (end - begin) / (len(cases) - i), journal
            )  # a share of what earlier cases have left
        except torch.OutOfMemoryError:
            skipped.append(f"{subject}: left out, since it takes more memory than the device has")
        except FloatingPointError as error:
            failed.append(f"{subject}: {error}")
    print(*skipped, sep="\n")
    if failed or len(skipped) == len(cases):
        sys.exit("\n".join(failed or ["no case was measured"]))
