"""The host's part of a step: how long Python and torch take to give a device its work, and how much each method adds.

The networks are as deep as the published ones, and so narrow, on so few and small images, that next to nothing is left
to compute: what they take on one thread of a CPU, the host of a GPU takes for the real ones. All methods take turns on
the same batch. What a method adds is its step's time over its floor's, which has the same passes and the same step of
the base optimizer in plain torch, and moves no weight. ESAM's parts are those of ``step_cost``.

Calls are those of torch's operators in one step, but for views and empty tensors: on a GPU mostly one launch each, and
few for a foreach operator, which counts once. ESAM draws its tensors for sixteen steps at once, which is not counted.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .. import record
from ..measuring.clock import Stopwatch, spread, turn
from ..measuring.progress import Progress
from ..report import tables
from ..training import models
from ..training.methods import METHODS
from ..training.trainers import ESAMTrainer, Settings, Trainer, left_out, set_step, trainer
from . import command_line
from .refusals import refusals
from .step_cost import PASSES, drawn, floor_of_step, parts_of_step

CASES: dict[str, Callable[[], nn.Module]] = {
    "ResNet-18": lambda: models.ResNet18(2),
    "ResNet-50": lambda: models.ResNet50(2),
    "ResNet-101": lambda: models.ResNet50(2, depths=(3, 4, 23, 3)),
    "ViT-S": lambda: models.VisionTransformer(8),
    "ViT-L": lambda: models.VisionTransformer(8, layers=24),
}
BATCH = (4, 3, 8, 8)
METHODS_TIMED = ("sgd", "sam", "sam-foreach", "sam-own", "esam", "momentum", "previous")
WARM_UP = 3  # rounds at most that are not counted
VISITS = 5  # of a round, of which the median counts


class Calls(TorchDispatchMode):
    """Counts the operators that are called and compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count the call, and make it."""
        views = any(one.alias_info is not None and not one.alias_info.is_write for one in func._schema.returns)
        name = func._schema.name.partition("::")[2]
        self.count += not (views or name.startswith(("empty", "new_empty", "detach")))
        return func(*args, **(kwargs or {}))


def measure(case: str, rounds: int, names: Sequence[str], settings: Settings, device: torch.device) -> dict[str, Any]:
    """Seconds of a step, of what each method adds to its floor, and of ESAM's parts; calls; the network's tensors."""
    inputs = torch.randn(BATCH, generator=torch.Generator().manual_seed(0)).to(device)
    targets = torch.arange(len(inputs), device=device) % 10

    def network() -> nn.Module:
        torch.manual_seed(0)
        return CASES[case]().to(device)

    timed = {name: trainer(name, network(), settings, device) for name in names}
    floors = {name: trainer("sgd", network(), passes_of(name, settings), device) for name in names if name != "sgd"}
    in_parts = trainer("esam", network(), settings, device)
    assert isinstance(in_parts, ESAMTrainer)
    work: dict[tuple[str, str], Callable[[int], object]] = {}
    for name, one in timed.items():
        work["steps", name] = partial(step_of, one, inputs, targets)
    for name, bare in floors.items():
        work["floors", name] = partial(floor_of, bare, inputs, targets)
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    parts: dict[str, list[float]] = defaultdict(list)
    order, warm_up = list(work), min(WARM_UP, rounds)
    for number in range(warm_up + rounds):
        for i in turn(len(order), number):
            seconds = median(host_seconds(work[order[i]], VISITS * number + visit, device) for visit in range(VISITS))
            found[order[i]].append(seconds)
        set_step(in_parts, number)
        for name, seconds in parts_of_step(in_parts, inputs, targets, Stopwatch(torch.device("cpu"))).items():
            parts[name].append(seconds)
    counted = slice(warm_up, None)
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        steps, floor = found["steps", name][counted], found["floors", name][counted] if name != "sgd" else []
        added = {"added_seconds": spread([a - b for a, b in zip(steps, floor)])._asdict()} if floor else {}
        last = partial(step_of, timed[name], inputs, targets, warm_up + rounds)
        last()  # which draws
        calls = calls_of(last)
        rows[name] = {"label": METHODS[name].label, "seconds": spread(steps)._asdict(), "calls": calls, **added}
    own_parts = {name: seconds[counted] for name, seconds in parts.items() if name not in PASS_NAMES}
    return {
        "tensors": len(list(network().parameters())),
        "rows": rows,
        "parts": {name: spread(seconds)._asdict() for name, seconds in own_parts.items()},
    }


PASS_NAMES = {PASSES[name] for name in ("ascend", "look", "descend")} | {"base step"}


def passes_of(name: str, settings: Settings) -> Settings:
    """Settings with the options of ESAM that have a method's passes."""
    method = METHODS[name] if METHODS[name].trainer == "esam" else METHODS["sam-own"]
    return replace(settings, esam=settings.by(method).esam)


def step_of(one: Trainer, inputs: Tensor, targets: Tensor, number: int) -> None:
    """One step, which draws what that of the number does."""
    set_step(one, number)
    one.step(inputs, targets)


def floor_of(bare: Trainer, inputs: Tensor, targets: Tensor, number: int) -> None:
    """The passes of one step, which draws what that of the number does."""
    floor_of_step(bare, inputs, targets, drawn(bare, number))


def host_seconds(work: Callable[[int], object], number: int, device: torch.device) -> float:
    """How long the host is at work; a GPU has nothing to do when it begins, and may not have finished when it ends."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = perf_counter()
    work(number)
    return perf_counter() - begin


def calls_of(work: Callable[[], object]) -> int:
    """How many operators it calls."""
    with Calls() as calls:
        work()
    return calls.count


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside the block, torch computes on one thread of a CPU, as there is nothing to share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = command_line.base_parser(__doc__ or "")
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES), help="default: all")
    parser.add_argument("--rounds", type=int, default=40, help="default: %(default)s")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every network, write the result and print the tables."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: at least 1 is needed")
    missing = left_out(METHODS_TIMED)
    names = [name for name in METHODS_TIMED if name not in missing]
    settings, stem = Settings(lr=1e-3, momentum=0.9, weight_decay=5e-4), f"host_time_{args.device}"
    with refusals(parser):
        command_line.require_device(args)
        journal = command_line.journal(args, stem)
    result = record.header("host_time", "random images", args) | {"left_out": missing, "cases": {}}
    progress = Progress(len(args.models), unit="network")
    with one_thread():
        for case in args.models:
            progress.describe(case)
            make = partial(measure, case, args.rounds, names, settings, torch.device(args.device))
            result["cases"][case] = journal.once({"case": case, "rounds": args.rounds, "names": names}, make)
            record.save(result, args.output, stem)
            progress.update()
    print(tables.host_time(result))
