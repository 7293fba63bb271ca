"""Each operator over the parameter lists of real models, beside what one would write without this library.

How it is measured stands in docs/benchmarks.md. ``pytest benchmarks/commands/operators.py --benchmark-only`` times our
side alone, to compare two commits.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from esam_kernels import ops
from esam_kernels.ops import ElementMask, reference

from .. import record
from ..measuring.environment import environment
from ..measuring.progress import following
from ..report import tables
from . import command_line
from .refusals import refusals

COMPILED_TENSORS = 100  # torch.compile takes minutes for lists that are longer
CACHED_BYTES = 2**20  # a CPU's caches hold what moves fewer
Shapes = list[tuple[int, ...]]


# ---- The parameter lists


def _resnet(blocks: Iterable[int], bottleneck: bool) -> Shapes:
    """Convolutions, batch norms' weights and biases, and the classifier of a ResNet for ImageNet."""

    def conv(width_in: int, width_out: int, kernel: int) -> Shapes:
        return [(width_out, width_in, kernel, kernel), (width_out,), (width_out,)]

    shapes, width_in = conv(3, 64, 7), 64
    for stage, count in enumerate(blocks):
        width = 64 << stage
        width_out = 4 * width if bottleneck else width
        for block in range(count):
            if bottleneck:
                shapes += conv(width_in, width, 1) + conv(width, width, 3) + conv(width, width_out, 1)
            else:
                shapes += conv(width_in, width, 3) + conv(width, width, 3)
            if block == 0 and width_in != width_out:
                shapes += conv(width_in, width_out, 1)
            width_in = width_out
    return [*shapes, (1000, width_in), (1000,)]


def _transformer(depth: int, width: int, embeddings: Shapes, last: Shapes) -> Shapes:
    """Embeddings, blocks of attention and a 4 times wider MLP with their norms, and what follows them."""
    norm = [(width,), (width,)]
    attention = [(3 * width, width), (3 * width,), (width, width), (width,)]
    mlp = [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return embeddings + (norm + attention + norm + mlp) * depth + norm + last


MODELS: dict[str, Shapes] = {
    "ResNet-18": _resnet((2, 2, 2, 2), bottleneck=False),
    "ResNet-50": _resnet((3, 4, 6, 3), bottleneck=True),
    "ViT-B/16": _transformer(12, 768, [(1, 1, 768), (1, 197, 768), (768, 3, 16, 16), (768,)], [(1000, 768), (1000,)]),
    "GPT-2 medium": _transformer(24, 1024, [(50257, 1024), (1024, 1024)], []),
    "1,000 tensors": [(256,)] * 1000,  # for what the host pays
}


# ---- The operators and their rivals: (bytes that must move, {who: call})

Case = tuple[int, dict[str, Callable[[], Any] | None]]


def _tensors(shapes: Shapes, device: str) -> tuple[list[Tensor], list[Tensor], list[Tensor], int]:
    params = [torch.randn(shape, device=device) for shape in shapes]
    return params, [torch.randn_like(p) for p in params], [p.clone() for p in params], sum(p.numel() for p in params)


def squared_norm(shapes: Shapes, device: str) -> Case:
    """Foreach: the norm of the tensors' norms, as in davda54/sam."""
    _, grads, _, count = _tensors(shapes, device)
    return 4 * count, {
        "esam_kernels": lambda: ops.squared_norm(grads, grads),
        "foreach": lambda: torch.stack(torch._foreach_norm(grads)).square().sum(),
        "torch.compile": _compiled(lambda: reference.squared_norm(grads, grads), shapes),
    }


def perturb(shapes: Shapes, device: str) -> Case:
    """Foreach: save, multiply, add."""
    params, grads, backups, count = _tensors(shapes, device)
    norm = torch.full((), 1e3, device=device)
    arguments = params, grads, backups, [0.05] * len(params), norm

    def foreach() -> None:
        torch._foreach_copy_(backups, params)
        torch._foreach_add_(params, torch._foreach_mul(grads, 0.05 / (norm + 1e-12)))

    return 16 * count, {
        "esam_kernels": lambda: ops.perturb_(*arguments),
        "foreach": foreach,
        "torch.compile": _compiled(lambda: reference.perturb_(*arguments), shapes),
    }


def norm_and_perturb(shapes: Shapes, device: str) -> Case:
    """Foreach: the same two in a row; "foreach, scale on the host" waits for the norm, and adds without a product."""
    params, grads, backups, count = _tensors(shapes, device)

    def ours() -> None:
        ops.perturb_(params, grads, backups, [0.05] * len(params))

    def foreach(on_host: bool) -> None:
        scale = 0.05 / (torch.stack(torch._foreach_norm(grads)).norm() + 1e-12)
        torch._foreach_copy_(backups, params)
        if on_host:
            torch._foreach_add_(params, grads, alpha=scale.item())
        else:
            torch._foreach_add_(params, torch._foreach_mul(grads, scale))

    return 20 * count, {
        "esam_kernels": ours,
        "foreach": partial(foreach, on_host=False),
        "foreach, scale on the host": partial(foreach, on_host=True),
    }


def perturb_masked(shapes: Shapes, device: str) -> Case:
    """Foreach: a Bernoulli mask for each tensor, then as without one."""
    params, grads, backups, count = _tensors(shapes, device)
    norm = torch.full((), 1e3, device=device)
    mask = ElementMask(seed=1, step=2, tensor_ids=list(range(len(params))), beta=0.6)
    arguments = params, grads, backups, [0.05] * len(params), norm, False, mask

    def foreach() -> None:
        torch._foreach_copy_(backups, params)
        e = torch._foreach_mul(grads, [torch.empty_like(g).bernoulli_(0.6) for g in grads])
        torch._foreach_add_(params, torch._foreach_mul(e, 0.05 / (norm + 1e-12)))

    return 16 * count, {"esam_kernels": lambda: ops.perturb_(*arguments), "foreach": foreach}


def restore(shapes: Shapes, device: str) -> Case:
    """Foreach: one copy."""
    params, _, backups, count = _tensors(shapes, device)
    return 8 * count, {
        "esam_kernels": lambda: ops.restore_(params, backups),
        "foreach": lambda: torch._foreach_copy_(params, backups),
        "torch.compile": _compiled(lambda: reference.restore_(params, backups), shapes),
    }


def select_top(samples: int, device: str) -> Case:
    """The rival sorts the indices that topk gives."""
    before, after = torch.rand(2, samples, device=device)
    k = samples // 2
    return 8 * samples + 8 * k, {
        "esam_kernels": lambda: ops.select_top(before, after, k),
        "topk": lambda: torch.topk(after - before, k).indices.sort().values,
        "torch.compile": torch.compile(lambda: reference.select_top(before, after, k)),
    }


def _compiled(call: Callable[[], Any], shapes: Shapes) -> Callable[[], Any] | None:
    return torch.compile(torch.no_grad()(call)) if len(shapes) <= COMPILED_TENSORS else None


def on_one_thread(make: Callable[[], Case]) -> Case:
    """A case on one thread of the CPU; the copy that it is compared with has them all."""

    def alone(call: Callable[[], Any]) -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            call()
        finally:
            torch.set_num_threads(threads)

    moved, rivals = make()
    return moved, {who: call and partial(alone, call) for who, call in rivals.items()}


def cases(device: str, models: Iterable[str]) -> Iterable[tuple[str, str, Callable[[], Case]]]:
    """Operator, what it works on, and what makes its case."""
    for model in models:
        for operator in (squared_norm, perturb, norm_and_perturb, perturb_masked, restore):
            yield operator.__name__, model, partial(operator, MODELS[model], device)
        if device == "cpu":
            alone = partial(on_one_thread, partial(norm_and_perturb, MODELS[model], device))
            yield "norm_and_perturb", f"{model}, 1 thread", alone
    for samples in (64, 256, 1024, 4096, 16384):
        yield "select_top", f"{samples} samples", partial(select_top, samples, device)


# ---- Measurement


def seconds(call: Callable[[], Any], device: str, cached: bool = False) -> tuple[float, float]:
    """What one call takes the device and the host; on a CPU, with its caches warm if what moves is cached there."""
    if device == "cpu":
        calls = range(20 if cached else 1)
        for _ in calls if cached else ():
            call()
        start = time.perf_counter()
        for _ in calls:
            call()
        return ((time.perf_counter() - start) / len(calls),) * 2
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    host = time.perf_counter() - start
    keep_busy(2 * host + 1e-3)  # a host that is disturbed takes longer
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3, host


def keep_busy(seconds: float) -> None:
    """Let the GPU do nothing for so long, so that the host can launch what follows meanwhile."""
    torch.cuda._sleep(round(seconds * cycles_per_second()))


@cache
def cycles_per_second() -> float:
    """How many cycles of ``torch.cuda._sleep`` pass in a second."""
    begin, end, cycles = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True), 10_000_000
    torch.cuda._sleep(cycles)  # wakes the device
    begin.record()
    torch.cuda._sleep(cycles)
    end.record()
    end.synchronize()
    return 1e3 * cycles / begin.elapsed_time(end)


def launches(call: Callable[[], Any]) -> int:
    """How many kernels a call launches on a GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    on_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in on_device)


def a_large_copy(device: str) -> tuple[int, Callable[[], Any]]:
    """Bytes read and written, and the call: its speed is the one that nothing on the device exceeds by much."""
    source = torch.ones(2**28 if device == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes, lambda: target.copy_(source)


def other_backends(device: str) -> list[str]:
    """The fast backends that serve the device beside the one that is chosen there."""
    zero = torch.zeros(1, device=device)
    found: list[str] = []
    chosen = ops.explain(zero).partition(";")[0]
    for name in ("triton", "native") if device == "cuda" else ("native",):  # Triton's interpreter is no rival
        with ops.use_backend(name):
            if name != chosen and ops.explain(zero).partition(";")[0] == name:
                found.append(name)
    return found


def measure(case: Case, device: str, repeats: int, compiles: bool = True) -> dict[str, Any]:
    """Medians of all rivals, of our other backends and of a large copy, which run in turns."""
    moved, rivals = case
    copied, copy = a_large_copy(device)
    calls = {"copy": copy} | {who: call for who, call in rivals.items() if call is not None}
    if not compiles:
        calls.pop("torch.compile", None)
    for name in other_backends(device):
        calls[f"our {name}"] = ops.use_backend(name)(calls["esam_kernels"])
    for call in calls.values():
        call()  # compiles
    times: dict[str, list[tuple[float, float]]] = {who: [] for who in calls}
    order = random.Random(0)
    for _ in range(repeats):
        for who in order.sample(list(calls), len(calls)):
            times[who].append(seconds(calls[who], device, cached=moved < CACHED_BYTES and who != "copy"))
    medians = {who: [statistics.median(column) for column in zip(*pairs)] for who, pairs in times.items()}
    copy_speed = copied / medians.pop("copy")[0]
    return {
        "bytes": moved,
        "copy_gb_per_second": round(copy_speed / 1e9, 1),
        "rivals": {
            who: {
                "us": round(1e6 * on_device, 2),
                "host_us": round(1e6 * host, 2),
                "share_of_copy_bandwidth": round(moved / on_device / copy_speed, 3),
                "launches": launches(calls[who]) if device == "cuda" else None,
            }
            for who, (on_device, host) in medians.items()
        },
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every operator, write the result and print the tables."""
    parser = command_line.base_parser(__doc__ or "")
    parser.add_argument("--models", nargs="+", choices=MODELS, help="default: ResNet-18, on a GPU all")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure torch.compile, which takes its time",
    )
    parser.add_argument("--repeats", type=int, help="rounds; default: 11, on a GPU 50")
    on_gpu = parser.parse_known_args(argv)[0].device == "cuda"
    parser.set_defaults(models=[*MODELS] if on_gpu else ["ResNet-18"], repeats=50 if on_gpu else 11)
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error("--repeats must be at least 1")
    stem = f"operators_{args.device}"
    with refusals(parser):
        command_line.require_device(args)
        journal = command_line.journal(args, stem)
    result = record.header("operators", "random tensors", args)
    result |= {"backend": ops.explain(torch.zeros(1, device=args.device)), "operators": []}
    shared = {name: value for name, value in record.as_json(args).items() if name != "models"}
    todo = list(cases(args.device, args.models))
    for operator, subject, make in following(todo, len(todo), "operators", "row"):
        about = {"operator": operator, "on": subject}

        def measured(make: Callable[[], Case] = make) -> dict[str, Any]:
            return measure(make(), args.device, args.repeats, args.compile)

        row = journal.once({**shared, **about}, measured)
        result["operators"].append({**about, **row})
        record.save(result, args.output, stem)
    print(tables.operators(result))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("operator", [squared_norm, perturb, perturb_masked, restore])
def test_operator_over_resnet18(benchmark: Any, operator: Callable[[Shapes, str], Case], device: str) -> None:
    """Our side alone, timed by pytest-benchmark."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    call = operator(MODELS["ResNet-18"], device)[1]["esam_kernels"]
    assert call is not None
    call()
    benchmark.extra_info["commit"] = environment()["commit"]
    benchmark.pedantic(lambda: seconds(call, device), rounds=20)
