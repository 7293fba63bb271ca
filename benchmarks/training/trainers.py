"""The optimizers under comparison: each a trainer with ``optimizer`` and ``step(inputs, targets)``."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from esam_kernels import ESAM, batch_closure, ops
from esam_kernels.options import OPTIONS, make

from .losses import LossFunction, mean_loss, per_sample_loss
from .methods import METHODS, Method

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # by their names on the command line and in ``METHODS``


def default_radius(ascent: str) -> float:
    """The radius that ESAM takes around SGD if it is given none."""
    return float(make({"ascent": ascent}, base_has_betas=False)["rho"])


@dataclass(frozen=True)
class Settings:
    """SGD's options, which every method shares, and those of sharpness-aware minimization.

    Attributes:
        esam: ESAM's options by name; one that is not given has its default.
        amp: autocast of all passes.
        backend: of ESAM's operators; None: the first that serves.
        micro_batches: in how many parts a batch is taken.
        authors_esam: the class of ``authors.load``, for the method that needs it.

    Raises:
        ValueError: if ESAM has no option of a name.
    """

    lr: float
    momentum: float
    weight_decay: float
    esam: Mapping[str, Any] = field(default_factory=dict)
    amp: torch.dtype | None = None
    backend: str | None = None
    micro_batches: int = 1
    authors_esam: type[torch.optim.Optimizer] | None = None

    def __post_init__(self) -> None:
        if unknown := self.esam.keys() - OPTIONS.keys():
            raise ValueError(f"ESAM has no option {', '.join(sorted(unknown))}: it has {', '.join(OPTIONS)}")
        complete = {name: self.esam.get(name, option.default) for name, option in OPTIONS.items()}
        if complete["rho"] is None:
            complete["rho"] = default_radius(complete["ascent"])
        object.__setattr__(self, "esam", complete)

    @property
    def sgd(self) -> dict[str, Any]:
        """The base optimizer's options."""
        return {"lr": self.lr, "momentum": self.momentum, "weight_decay": self.weight_decay}

    @property
    def seed(self) -> int:
        """Of the initial weights, of the batches, and of ESAM's draws."""
        return int(self.esam["seed"])

    def by(self, method: Method) -> "Settings":
        """As a method has them."""
        esam = {**self.esam, **method.options}
        return replace(
            self,
            esam={**esam, "rho": method.rho_factor * esam["rho"]},
            amp=DTYPES[method.amp] if method.amp else self.amp,
            backend=method.backend,
            micro_batches=method.micro_batches,
        )


class Trainer(ABC):
    """A network, the optimizer that trains it, and the loss scale of --amp fp16."""

    def __init__(self, model: nn.Module, settings: Settings, device: torch.device, loss_fn: LossFunction) -> None:
        self.model = model
        self.loss_fn = loss_fn
        self.settings = settings
        self.optimizer = self.make_optimizer()
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.amp == torch.float16)
        if settings.amp is not None:
            model.forward = torch.autocast(device.type, settings.amp)(model.forward)

    @abstractmethod
    def make_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of the model's parameters."""

    @abstractmethod
    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Train on one batch; the mean loss before it, 0-dimensional, on the device."""

    def backward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """An ordinary forward and backward pass; the mean loss."""
        self.optimizer.zero_grad()
        loss = mean_loss(self.loss_fn(self.model(inputs), targets))
        self.scaler.scale(loss).backward()
        return loss.detach()

    def base_step(self) -> None:
        """The optimizer's step with the gradients that there are, through the loss scaler."""
        self.scaler.step(self.optimizer)
        self.scaler.update()


def split(inputs: Tensor, targets: Tensor, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """A batch in that many parts of like size."""
    return zip(inputs.chunk(count), targets.chunk(count))


class SGDTrainer(Trainer):
    """The base optimizer alone."""

    def make_optimizer(self) -> torch.optim.Optimizer:
        """SGD with momentum."""
        return torch.optim.SGD(self.model.parameters(), **self.settings.sgd)

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """One forward and one backward pass."""
        loss = self.backward(inputs, targets)
        self.base_step()
        return loss


class AccumulatingTrainer(SGDTrainer):
    """The base optimizer over micro-batches; it takes no weights of samples."""

    def backward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """A forward and a backward pass for each micro-batch; the mean loss."""
        self.optimizer.zero_grad()
        shares = []
        for batch in split(inputs, targets, self.settings.micro_batches):
            losses = self.loss_fn(self.model(batch[0]), batch[1])
            if not isinstance(losses, Tensor):
                raise TypeError("the loss function gives weights of samples, over which gradients are not accumulated")
            share = losses.sum() / len(inputs)
            self.scaler.scale(share).backward()
            shares.append(share.detach())
        return torch.stack(shares).sum()


class SAMTrainer(Trainer):
    """SAM of the package pytorch_optimizer, an implementation independent of this one."""

    def make_optimizer(self) -> torch.optim.Optimizer:
        """SAM around SGD; its second half steps through the loss scaler, of which it knows nothing itself."""
        import pytorch_optimizer  # here, since the benchmarks without this row run where it is missing

        radius = {name: self.settings.esam[name] for name in ("rho", "adaptive")}
        sam = pytorch_optimizer.SAM(self.model.parameters(), torch.optim.SGD, **radius, **self.settings.sgd)
        base = sam.base_optimizer
        sam.base_optimizer = SimpleNamespace(step=lambda: self.scaler.step(base))  # type: ignore[assignment]
        return sam

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Two forward and backward passes, the second at perturbed weights."""
        loss = self.backward(inputs, targets)
        with frozen_running_stats(self.model):  # the package leaves this to its user
            self.optimizer.step(lambda: self.backward(inputs, targets))  # type: ignore[arg-type, return-value]
        self.scaler.update()
        return loss


class TwoStepSAMTrainer(SGDTrainer):
    """SAM as davda54/sam composes it, tensor by tensor in plain torch: a first step uphill, a second step back."""

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Two forward and backward passes, the second at perturbed weights."""
        loss = self.backward(inputs, targets)
        backups = self.first_step()
        with frozen_running_stats(self.model):
            self.backward(inputs, targets)
        self.second_step(backups)
        return loss

    @torch.no_grad()
    def first_step(self) -> list[tuple[Tensor, Tensor]]:
        """Move every weight by rho / norm of the gradient times its gradient; the weights with what they were."""
        adaptive = self.settings.esam["adaptive"]
        moved = [(param, param.grad) for param in self.model.parameters() if param.grad is not None]
        norm = torch.stack([(param.abs() * grad if adaptive else grad).norm() for param, grad in moved]).norm()
        scale = self.settings.esam["rho"] / (norm + 1e-12)
        backups: list[tuple[Tensor, Tensor]] = [(param, param.clone()) for param, _ in moved]
        for param, grad in moved:
            param.add_((param.square() * grad if adaptive else grad) * scale)
        return backups

    @torch.no_grad()
    def second_step(self, backups: list[tuple[Tensor, Tensor]]) -> None:
        """Put the weights back and take SGD's step."""
        for param, backup in backups:
            param.copy_(backup)
        self.base_step()


class ESAMTrainer(Trainer):
    """ESAM of this package."""

    optimizer: ESAM

    def make_optimizer(self) -> ESAM:
        """ESAM around SGD, with every option that it has."""
        return ESAM(self.model.parameters(), torch.optim.SGD, **self.settings.esam, **self.settings.sgd)

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The three passes of ESAM."""
        backend = self.settings.backend
        with nullcontext() if backend is None else ops.use_backend(backend):
            loss = self.optimizer.backward(self.closure(inputs, targets), self.scaler)
        self.base_step()
        return loss

    def closure(self, inputs: Tensor, targets: Tensor) -> Any:
        """What ``backward`` takes: a closure of the batch, or a list of those of its micro-batches."""
        if self.settings.micro_batches == 1:
            return batch_closure(self.model, self.loss_fn, inputs, targets)
        batches = split(inputs, targets, self.settings.micro_batches)
        return [batch_closure(self.model, self.loss_fn, *batch) for batch in batches]


class AuthorsTrainer(Trainer):
    """ESAM of the paper's authors, given as ``settings.authors_esam``; it takes no weights of samples."""

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Their ESAM around SGD; it steps through the loss scaler, of which it knows nothing itself."""
        settings = self.settings
        assert settings.authors_esam is not None
        base = torch.optim.SGD(self.model.parameters(), **settings.sgd)
        scaled: Any = SimpleNamespace(param_groups=base.param_groups, step=lambda: self.scaler.step(base))
        options = {name: settings.esam[name] for name in ("rho", "beta", "gamma", "adaptive")}
        return settings.authors_esam(self.model.parameters(), scaled, **options)

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Their three passes, all of which move batch norm's running statistics."""
        optimizer: Any = self.optimizer
        optimizer.paras = [inputs, targets, self.loss_fn, self.model, lambda loss: self.scaler.scale(loss).backward()]
        optimizer.step()
        self.scaler.update()
        _, losses = optimizer.returnthings
        return losses.mean()


TRAINERS: dict[str, type[Trainer]] = {
    "sgd": SGDTrainer,
    "sgd-accumulated": AccumulatingTrainer,
    "sam": SAMTrainer,
    "sam-davda54": TwoStepSAMTrainer,
    "esam": ESAMTrainer,
    "esam-authors": AuthorsTrainer,
}


def trainer(
    name: str, model: nn.Module, settings: Settings, device: torch.device, loss_fn: LossFunction = per_sample_loss
) -> Trainer:
    """What trains ``model``, which is on ``device``, by the method of that name in ``METHODS``."""
    method = METHODS[name]
    return TRAINERS[method.trainer](model, settings.by(method), device, loss_fn)


@contextmanager
def frozen_running_stats(model: nn.Module) -> Iterator[None]:
    """Let forward passes inside the block leave batch norm's running mean and variance as they are."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
