"""Peak memory of ESAM for each of its options, beside that of SGD and SAM.

What ESAM must hold beyond SGD is a copy of the weights that it has perturbed, from the perturbation until they are put
back: the floor is one copy of the drawn weights. Against it stands that the last pass keeps the activations of the
selected samples alone. Which of the two shows depends on the model, so there is one of either kind.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from tqdm import tqdm

from esam_kernels import ESAM, batch_closure, ops
from esam_kernels.passes.draw import draw_tensors

from . import models, options, record, tables
from .measure import peak_memory
from .methods import Settings, per_sample_loss, trainer

STEPS = 3  # the first makes SGD's momentum; where every other step is ESAM's, the third is the first that counts
# No weight decay: SGD holds a copy of gradients for it when ESAM's backup is gone, which would hide the backup.
SETTINGS = Settings(lr=0.1, momentum=0.9, weight_decay=0.0, rho=0.05, beta=0.6, gamma=0.5)


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
    "resnet18": Case("ResNet-18 of width 32", lambda: models.build("resnet18", width=32), (64, 3, 32, 32)),
    "mlp": Case("MLP of 12 layers of width 1024", lambda: _mlp(3072, *[1024] * 11, 10), (64, 3, 32, 32)),
}


@dataclass(frozen=True)
class Variant:
    """A row of the tables: a method of ``METHODS``, what ESAM is told beyond defaults, and how many micro-batches."""

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    micro_batches: int = 1


VARIANTS = {
    "SGD": Variant("sgd"),
    "SGD, 4 micro-batches": Variant("sgd", micro_batches=4),
    "SAM (pytorch_optimizer)": Variant("sam"),
    "ESAM": Variant("esam"),
    "ESAM, gamma 1": Variant("esam", {"gamma": 1.0}),
    "ESAM, gamma 0.25": Variant("esam", {"gamma": 0.25}),
    "ESAM, beta 1": Variant("esam", {"beta": 1.0}),
    "ESAM, beta 0.3": Variant("esam", {"beta": 0.3}),
    "ESAM, beta 1, gamma 1 (SAM)": Variant("esam", {"beta": 1.0, "gamma": 1.0}),
    "ESAM, adaptive": Variant("esam", {"adaptive": True}),
    "ESAM, granularity element": Variant("esam", {"granularity": "element"}),
    "ESAM, selection by loss": Variant("esam", {"selection": "loss"}),
    "ESAM, interval 2": Variant("esam", {"interval": 2}),
    "ESAM, bf16 steering": Variant("esam", {"steering_dtype": torch.bfloat16}),
    "ESAM, 4 micro-batches": Variant("esam", micro_batches=4),
    "ESAM, 4 micro-batches, select over all": Variant("esam", {"select_over": "all"}, micro_batches=4),
}


def measure(case: Case, variant: Variant, device: torch.device) -> dict[str, int | None]:
    """Bytes at the peak, of ESAM's largest backup beside momentum, and of one copy of the weights drawn for it."""
    with backups() as sizes:

        def work() -> None:
            sizes.clear()  # of the run before, if this is not the first
            model = case.make().to(device)
            inputs = torch.rand(case.batch, device=device)
            targets = torch.arange(len(inputs), device=device) % case.classes
            step = stepper(model, variant, device)
            for _ in range(STEPS):
                step(inputs, targets)

        peak = peak_memory(device, work)
    floor = None if variant.method == "sgd" else drawn_bytes(list(case.make().parameters()), variant)
    return {"peak_bytes": peak, "backup_bytes": max(sizes[1:], default=None), "floor_bytes": floor}


def stepper(model: nn.Module, variant: Variant, device: torch.device) -> Callable[[Tensor, Tensor], None]:
    """What takes one step on a batch."""
    if variant.method == "esam":
        sam = {"rho": SETTINGS.rho, "beta": SETTINGS.beta, "gamma": SETTINGS.gamma, **variant.options}
        esam = ESAM(model.parameters(), torch.optim.SGD, **SETTINGS.sgd, **sam)

        def step(inputs: Tensor, targets: Tensor) -> None:
            batches = zip(inputs.chunk(variant.micro_batches), targets.chunk(variant.micro_batches))
            esam.step([batch_closure(model, per_sample_loss, *batch) for batch in batches])

        return step
    if variant.micro_batches == 1:
        return trainer(variant.method, model, SETTINGS, device).step  # type: ignore[return-value]
    sgd = torch.optim.SGD(model.parameters(), **SETTINGS.sgd)

    def accumulate(inputs: Tensor, targets: Tensor) -> None:
        sgd.zero_grad()
        for batch in zip(inputs.chunk(variant.micro_batches), targets.chunk(variant.micro_batches)):
            (per_sample_loss(model(batch[0]), batch[1]).sum() / len(inputs)).backward()
        sgd.step()

    return accumulate


@contextmanager
def backups() -> Iterator[list[int]]:
    """The bytes of the backups that each perturbation inside the block fills."""
    sizes: list[int] = []
    perturb = ops.perturb_

    def counted(params: Sequence[Tensor], grads: Sequence[Tensor], copies: Sequence[Tensor], *rest: Any) -> None:
        sizes.append(sum(copy.nbytes for copy in copies))
        perturb(params, grads, copies, *rest)

    with patch.object(ops, "perturb_", counted):
        yield sizes


def drawn_bytes(params: Sequence[Tensor], variant: Variant) -> int:
    """Bytes of one copy of what is perturbed beside momentum, in the step with most: for single elements expected."""
    beta = 1.0 if variant.method == "sam" else variant.options.get("beta", SETTINGS.beta)
    if variant.options.get("granularity") == "element":
        return round(beta * sum(param.nbytes for param in params))
    interval = variant.options.get("interval", 1)
    draws = [draw_tensors(range(len(params)), beta, SETTINGS.seed, step) for step in range(interval, STEPS, interval)]
    return max(sum(params[i].nbytes for i in draw) for draw in draws)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every option on every model, write the result and print the tables."""
    parser = options.base_parser(__doc__ or "")
    parser.add_argument("--models", nargs="+", choices=CASES, default=[*CASES], help="default: all")
    args = parser.parse_args(argv)
    with options.refusals(parser):
        options.require_device(args)
    result = record.header("memory", "random images", args)
    result["settings"] |= {"steps": STEPS, "beta": SETTINGS.beta, "gamma": SETTINGS.gamma, **SETTINGS.sgd}
    result["cases"] = {}
    with tqdm(total=len(args.models) * len(VARIANTS)) as progress:
        for name in args.models:
            case, rows = CASES[name], {}
            for label, variant in VARIANTS.items():
                progress.set_description(f"{name}, {label}")
                rows[label] = measure(case, variant, torch.device(args.device))
                progress.update()
            with torch.device("meta"):
                weights = sum(param.nbytes for param in case.make().parameters())
            about = {"label": case.label, "batch_size": case.batch[0], "weight_bytes": weights}
            result["cases"][name] = {**about, "rows": rows}
    record.save(result, args.output, f"memory_{args.device}")
    print(tables.memory(result))


if __name__ == "__main__":
    main()
