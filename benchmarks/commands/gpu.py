"""Every figure that a GPU is needed for, as many as the time allows: the first ten minutes on a machine that has one.

The parts run in the order of what they are worth, each in a process of its own that is ended at its limit. They save as
they go and go on from what is there, so that the same command given again takes the parts that are not finished. What
it leaves in the output folder: the results as JSON, what they were measured on, each part's raw log, and page.md, which
is also printed. Where the environment variable OUT names a folder, all of it is copied there after every part.

No package but torch and NumPy is needed. A build that fails ends nothing: Triton's operators and the reference are
tested and measured without it.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .. import record
from ..measuring.environment import environment
from ..measuring.journal import CHANGING, PACKAGES, code_fingerprint
from ..report import tables
from . import processes
from .processes import REPOSITORY, Part, is_finished, run_part
from .refusals import refusals

RESERVE = 10.0  # seconds that the page takes at the end
STATE, ENVIRONMENT, RESULTS = "state.json", "environment.json", "results"  # in the output folder


def parts(args: argparse.Namespace) -> Iterator[Part]:
    """All parts in the order of their worth; of a dry run the same on a CPU, tiny."""
    dry, output = args.dry_run, str(args.output)
    device = "cpu" if dry else "cuda"
    shared = ("--device", device, "--output", str(args.output / RESULTS))

    def benchmark(name: str, *more: str) -> tuple[str, ...]:
        return ("-m", "benchmarks", name, *shared, *more)

    # Beside the sources in a dry run, which may be in use.
    place = ("--build-base", f"{output}/build", "--build-lib", f"{output}/build/lib") if dry else ()
    build = ("build", *place) if dry else ("build_ext", "--inplace")
    yield Part("build", "native operators", 120, ("setup.py", "--quiet", *build), again=True)

    tests = ("tests/optimizer/test_step_gpu.py", "tests/operators/test_operators_gpu.py")
    yield Part("tests", "steps and operators on the GPU", 90, ("-m", "pytest", "-q", "-p", "no:cacheprovider", *tests))

    methods: tuple[str, ...] = (
        "sam-foreach",
        "sam-own",
        "sam",
        "momentum",
        "previous",
        "share-quarter",
        "sam-tail0.2",
        "esam-bf16",
        "sgd-bf16",
    )
    methods += ("esam-native", "esam-triton", "esam-gamma1")
    tiny = (
        ("--width", "4", "--batch-sizes", "4", "--rounds", "1") if dry else ("--batch-sizes", "128", "--channels-last")
    )
    for amp, limit in (("", 130), ("bf16", 80)):
        more = ("--amp", amp) if amp else ()
        chosen = [name for name in methods if not (amp and name.endswith("-bf16"))]
        if dry and amp:  # slow where there are no units for it
            chosen = ["sam-foreach", "momentum"]
        case = (
            "--models",
            "resnet18",
            "resnet50",
            *tiny,
            "--data",
            "random",
            *more,
            "--if-possible",
            "--methods",
            *chosen,
        )
        stems = [
            f"step_cost_{device}_{model}_b{4 if dry else 128}{'_' + amp if amp else ''}"
            for model in ("resnet18", "resnet50")
        ]
        name = "step_cost_bf16" if amp else "step_cost"
        why = f"a step of SGD, SAM and ESAM{' under bf16 autocast' if amp else ''}"
        yield Part(name, why, limit, benchmark("step_cost", *case, "--time-budget"), tuple(stems))

    small = (
        ("--models", "1,000 tensors", "--repeats", "1", "--no-compile")
        if dry
        else ("--models", "ResNet-50", "1,000 tensors")
    )
    why = "operators beside a copy's bandwidth, foreach, and Triton beside native"
    yield Part("operators", why, 100, benchmark("operators", *small), (f"operators_{device}",))

    if args.data_file is not None or dry:
        data = ("--data", "cifar10", "--data-file", str(args.data_file)) if args.data_file else ("--data", "random")
        options = (
            ("--width", "4", "--epochs", "1", "--rounds", "1", "--train-samples", "64") if dry else ("--channels-last",)
        )
        batch = ("--batch-size", "16", "--seeds", "1") if dry else ("--batch-size", "128", "--seeds", "1")
        rows = (
            ("sgd", "sam-own", "momentum")
            if dry
            else ("sgd", "sam-own", "esam", "momentum", "sam-tail0.2", "esam-random")
        )
        rows_chosen = ("--configurations", *rows, "--sharpness-samples", "0")
        command = benchmark("frontier", *data, *options, *batch, *rows_chosen, "--time-budget")
        stem = f"frontier_{'cifar10' if args.data_file else 'random'}_{device}"
        yield Part("accuracy", "accuracy against cost", 600, command, (stem,))

    few = ("--models", "ResNet-18", "--rounds", "1") if dry else ()
    yield Part("host_time", "the host's part of a step", 60, benchmark("host_time", *few), (f"host_time_{device}",))

    yield Part(
        "memory", "peak memory", 90, benchmark("memory", *(("--models", "tiny") if dry else ())), (f"memory_{device}",)
    )

    if not dry:
        for amp in ("", "bf16"):
            more = ("--amp", amp) if amp else ()
            command = benchmark("step_cost", "--channels-last", "--data", "random", *more, "--time-budget")
            yield Part(f"step_cost_all{'_' + amp if amp else ''}", "a step of all networks", 540, command)


# All of them.


def read_state(output: Path) -> dict[str, Any]:
    """How the parts ended, by their names."""
    path = output / STATE
    return json.loads(path.read_text()) if path.exists() else {}


def page(output: Path, order: Sequence[Part]) -> str:
    """All figures that there are, with what became of the parts."""
    state = read_state(output)
    rows = [[part.name, part.why, state.get(part.name, {}).get("how", "not begun"),
             f"{state.get(part.name, {}).get('seconds', 0):.0f}"] for part in order]  # fmt: skip
    blocks = ["# What was measured", tables.table(["part", "yields", "how it ended", "seconds"], rows)]
    record_of_build = REPOSITORY / "esam_kernels/ops/native_build.json"
    if record_of_build.exists():
        missing = {key: why for key, why in json.loads(record_of_build.read_text()).items() if key in ("cpu", "cuda")}
        blocks += [f"No native operators for {device}: {why}" for device, why in missing.items()]
    results = record.load(output / RESULTS)
    for benchmark in ("step_cost", "operators", "frontier", "host_time", "memory"):
        for result in results.values():
            if result.get("benchmark") == benchmark:
                blocks += [f"## {tables.subject(result)}", getattr(tables, benchmark)(result)]
    return "\n\n".join(blocks) + "\n"


def set_aside_if_other(output: Path) -> None:
    """Begin anew where other code or another machine has measured what is there, which is set aside."""
    here = {name: value for name, value in environment().items() if name not in CHANGING}
    here["code"] = code_fingerprint(*PACKAGES)
    path = output / ENVIRONMENT
    before = json.loads(path.read_text()) if path.exists() else here
    if {name: before.get(name) for name in here} != here:
        other = output.with_name(f"{output.name}-{len(list(output.parent.glob(output.name + '-*'))) + 1}")
        shutil.copytree(output, other)
        shutil.rmtree(output / RESULTS, ignore_errors=True)
        (output / STATE).unlink(missing_ok=True)
        print(f"Other code or another machine measured what was here, which is now in {other}")
    record.write(path, json.dumps(environment() | here, indent=1) + "\n")


def hand_over(output: Path) -> None:
    """Copy what there is to the folder that OUT names, if it does."""
    target = os.environ.get("OUT")
    if target and Path(target).resolve() != output.resolve():
        shutil.copytree(output, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("build"))


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, default=REPOSITORY / "build/gpu", metavar="FOLDER", help="default: build/gpu")
    add("--minutes", type=float, default=9.5, help="for all parts together; default: %(default)s")
    add("--data-file", type=Path, metavar="PATH", help="CIFAR-10, for accuracy: an archive, its folder, or an .npz")
    add(
        "--dry-run",
        action="store_true",
        help="everything on a CPU with tiny sizes: shows that it runs, measures nothing",
    )
    add("--only", nargs="+", metavar="PART", help="these parts alone")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the parts that are not finished, as long as there is time; write and print the page.

    Raises:
        SystemExit: if a part has failed.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    args.output = args.output.resolve()
    order = list(parts(args))
    if args.only:
        if unknown := set(args.only) - {part.name for part in order}:
            parser.error(f"--only {' '.join(sorted(unknown))}: there are {', '.join(part.name for part in order)}")
        order = [part for part in order if part.name in args.only]
    if args.data_file is not None and not args.data_file.exists():
        parser.error(f"--data-file {args.data_file} does not exist")
    end = processes.clock() + 60 * args.minutes - RESERVE
    with refusals(parser):
        record.require_writable(args.output)
    failed: list[str] = []
    compared = False
    for part in order:
        if not part.again and not compared:  # the build is over
            compared = True
            set_aside_if_other(args.output)
        state = read_state(args.output)
        if state.get(part.name, {}).get("finished") and not part.again:
            continue
        limit = min(part.seconds, end - processes.clock())
        if limit <= 0:
            break
        print(f"{part.name}: {part.why}, {limit:.0f} seconds at most", flush=True)
        begin = processes.clock()
        how = run_part(part, limit, args.output / "logs" / f"{part.name}.log")
        print(f"{part.name}: {how}", flush=True)
        if how.startswith("failed"):
            failed.append(part.name)
        finished = is_finished(part, how, args.output / RESULTS)
        how += "" if finished or how != "done" else ", to be gone on with"
        state[part.name] = {"how": how, "finished": finished, "seconds": processes.clock() - begin}
        record.write(args.output / STATE, json.dumps(state, indent=1) + "\n")
        record.write(args.output / "page.md", page(args.output, order))
        hand_over(args.output)
    text = page(args.output, order)
    record.write(args.output / "page.md", text)
    hand_over(args.output)
    print(text)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; their logs are in {args.output / 'logs'}")
