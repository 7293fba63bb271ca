"""What SGD, SAM and ESAM cost and buy on this machine, in short: in minutes a table, and a page about it.

The parts run in the order of what they are worth, each in a process of its own, and save as they go. While they run,
one line says how far it is and for about how long it goes on. Ctrl-C ends it with what there is: the page and the table
are made of that, and the exit status is 130. Every call begins anew.
"""

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from esam_kernels.passes.evaluate import cpu_has_bf16_units

from .. import record
from ..measuring.progress import duration, last_said
from ..report import tables
from . import processes
from .processes import REPOSITORY, Part, run_part
from .refusals import refusals

INTERRUPTED = 130  # the exit status of what Ctrl-C has ended
LIMIT = 3600.0  # seconds, after which a part is taken to hang
TAIL = 4096  # bytes of a log in which its last line of progress is looked for
EVERY = 30.0  # seconds between two lines where they cannot take each other's place
# About how many seconds the parts take on 2 cores.
EXPECTED = {"train": 155.0, "frontier": 105.0, "step_cost": 60.0, "memory": 60.0}


def parts(args: argparse.Namespace) -> Iterator[Part]:
    """All parts in the order of their worth; of a dry run the same, tiny."""
    device, dry = args.device, args.dry_run
    data = "random" if dry else "digits"
    shared = ("--device", device, "--restart", "--output", str(args.output))
    more: tuple[str, ...]
    tiny: tuple[str, ...] = ("--data", "random", "--width", "4")
    training: tuple[str, ...] = (*tiny, "--epochs", "1", "--seeds", "1", "--train-samples", "64", "--batch-size", "16")
    training += ("--sharpness-samples", "0")

    def benchmark(name: str, why: str, stems: Sequence[str], *options: str) -> Part:
        slow = () if name == "memory" else ("--skip-slow-bf16",)  # how much memory bf16 takes is no matter of time
        return Part(name, why, LIMIT, ("-m", "benchmarks", name, *shared, *slow, *options), tuple(stems))

    more = training if dry else ("--epochs", "20")
    yield benchmark("train", "accuracy, time and memory of a whole training", [f"train_{data}_{device}"], *more)

    more = ("--configurations", "sgd", "sam-own", "esam", "--rounds", "1", *training) if dry else ("--quick",)
    yield benchmark("frontier", "accuracy against cost", [f"frontier_{data}_{device}"], *more)

    more = ("--models", "resnet18", "--batch-sizes", "4", "--rounds", "1", "--methods", "esam", *tiny)
    sizes = {"resnet18": 4} if dry else {"gpt": 8, "vit_s": 8, "resnet18": 32}
    stems = [f"step_cost_{device}_{model}_b{size}" for model, size in sizes.items()]
    yield benchmark("step_cost", "one step, and what it is made of", stems, *(more if dry else ("--quick",)))

    more = ("--models", "tiny") if dry else ()
    yield benchmark("memory", "peak memory for each option", [f"memory_{device}"], *more)


class ProgressLine:
    """One line on how far all parts are: in a terminal it stays in its place, in a log it is written now and then.

    Args:
        order: the parts.
        logs: the folder of their logs.
        stream: where it goes.
    """

    def __init__(self, order: Sequence[Part], logs: Path, stream: TextIO) -> None:
        self.order, self.logs, self.stream = order, logs, stream
        self.took: dict[str, float] = {}  # seconds, of the parts that are over
        self._part, self._began, self._said = order[0], processes.clock(), -EVERY

    def begin(self, part: Part) -> None:
        """A part begins."""
        self._part, self._began, self._said = part, processes.clock(), processes.clock() - EVERY
        self.show()

    def end(self, how: str) -> None:
        """The part is over."""
        seconds = processes.clock() - self._began
        self.took[self._part.name] = seconds
        self.clear()
        print(f"{self._part.name}: {how} in {duration(seconds)}", file=self.stream, flush=True)

    def show(self) -> None:
        """Say how far it is, unless that was said just now."""
        terminal, now = self.stream.isatty(), processes.clock()
        if now < self._said + (1.0 if terminal else EVERY):
            return
        self._said = now
        if terminal:
            line = self.text()[: shutil.get_terminal_size().columns - 1]
            print(f"\r\x1b[K{line}", end="", file=self.stream, flush=True)
        else:
            print(self.text(), file=self.stream, flush=True)

    def clear(self) -> None:
        """Take the line away, where it stays in its place."""
        if self.stream.isatty():
            print("\r\x1b[K", end="", file=self.stream, flush=True)

    def text(self) -> str:
        """The line."""
        part = self._part
        said = last_said(self._log_of(part))
        place = f"[{self.order.index(part) + 1} of {len(self.order)}] {part.name}"
        doing = said[0] if said else part.why
        return f"{place}, {doing}; about {duration(self.seconds_left())} left in all"

    def seconds_left(self) -> float:
        """What is left: of this part by its own count, or else as expected at the pace of the parts that are over."""
        over = sum(EXPECTED[name] for name in self.took)
        pace = sum(self.took.values()) / over if over else 1.0
        later = self.order[self.order.index(self._part) + 1 :]
        so_far = processes.clock() - self._began
        here = max(0.0, pace * EXPECTED[self._part.name] - so_far)
        said = last_said(self._log_of(self._part))
        if said and said[1] and not said[0].endswith("rounds"):  # which are those of one of several cases
            here = so_far / said[1] - so_far
        return here + pace * sum(EXPECTED[part.name] for part in later)

    def _log_of(self, part: Part) -> str:
        path = self.logs / f"{part.name}.log"
        if not path.exists():
            return ""
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL))
            return file.read().decode(errors="replace")


def clear_away(output: Path, order: Sequence[Part]) -> None:
    """Remove what an earlier call has measured, so that the page is of this one."""
    for stem in [stem for part in order for stem in part.results]:
        for path in [*output.glob(f"{stem}.*"), *output.glob(f"{stem}_*.svg")]:
            path.unlink()
    shutil.rmtree(output / "logs", ignore_errors=True)
    for name in ("report.html", "report.md"):
        (output / name).unlink(missing_ok=True)


def wanted_table(results: dict[str, dict[str, Any]]) -> str:
    """What a user wanted to know: each method's accuracy, time and memory, or what there is of that."""
    for benchmark, as_table in (
        ("train", tables.train),
        ("frontier", tables.frontier),
        ("step_cost", tables.step_cost),
    ):
        for result in results.values():
            if result["benchmark"] == benchmark:
                return as_table(result)
    return tables.memory(next(iter(results.values())))


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--output", type=Path, default=REPOSITORY / "build/bench", metavar="FOLDER", help="default: build/bench")
    add("--dry-run", action="store_true", help="everything with tiny sizes: shows that it runs, measures nothing")
    return parser


def measure(order: Sequence[Part], logs: Path, line: ProgressLine) -> list[str]:
    """Run the parts; the names of those that have failed."""
    failed = []
    for part in order:
        line.begin(part)
        how = run_part(part, part.seconds, logs / f"{part.name}.log", line.show)
        line.end(how)
        if how != "done":
            failed.append(part.name)
    return failed


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write the page and print the table and where the page is.

    Raises:
        SystemExit: if it was interrupted, a part has failed, or there is nothing to show.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    args.output = args.output.resolve()
    if args.output == record.RESULTS.resolve():
        parser.error("--output benchmarks/results: what is there is measured in full, by make results")
    with refusals(parser):
        record.require_writable(args.output)
    order = list(parts(args))
    clear_away(args.output, order)
    logs = args.output / "logs"
    line = ProgressLine(order, logs, sys.stderr)
    print("To be measured:", *(f"  {part.name:<10} {part.why}" for part in order), sep="\n")
    print(f"About {duration(line.seconds_left())} on 2 quiet cores; Ctrl-C ends it with what there is. Logs: {logs}")
    if args.device == "cpu" and cpu_has_bf16_units() is False:
        print("Steps in bf16 are left out: this CPU has no units for it (AMX, AVX512-BF16), and they would be slower.")
    sys.stdout.flush()
    interrupted, failed = False, []
    try:
        failed = measure(order, logs, line)
    except KeyboardInterrupt:
        interrupted = True
        line.clear()
        print("Interrupted: here is what there is.", flush=True)
    show(args.output, logs)
    if failed:
        print(f"Failed: {', '.join(failed)}; their logs are in {logs}", file=sys.stderr)
    if interrupted or failed:
        sys.exit(INTERRUPTED if interrupted else 1)


def show(output: Path, logs: Path) -> None:
    """Write the page, and print the table and where the page is."""
    if not record.load(output):
        print(f"Nothing is measured yet, and there is no page; the logs are in {logs}")
        return
    page = Part("report", "the page", LIMIT, ("-m", "benchmarks", "report", "--results", str(output)))
    how = run_part(page, page.seconds, logs / "report.log")
    print(f"\n{wanted_table(record.load(output))}\n")
    print(f"The page: {output / 'report.html'}" if how == "done" else f"No page: {how}, see {logs / 'report.log'}")
