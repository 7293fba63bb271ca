"""The optimizers under comparison: each a trainer with ``optimizer`` and ``step(inputs, targets)``."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from esam_kernels import ESAM, batch_closure, ops
from esam_kernels.closure import Losses

from .data import PADDING

BF16_ON_ITS_OWN = ("esam-bf16", "sgd-bf16")  # they compare bf16 with float32: no sense under --amp


@dataclass(frozen=True)
class Settings:
    """SGD's options, which every method shares, and those of sharpness-aware minimization."""

    lr: float
    momentum: float
    weight_decay: float
    rho: float
    beta: float
    gamma: float
    amp: torch.dtype | None = None
    steering_dtype: torch.dtype | None = None
    granularity: str = "tensor"
    selection: str = "increase"
    interval: int = 1
    seed: int = 0
    backend: str | None = None  # of ESAM's operators; None: the first that serves
    authors_esam: type[torch.optim.Optimizer] | None = None

    @property
    def sgd(self) -> dict[str, Any]:
        """The base optimizer's options."""
        return {"lr": self.lr, "momentum": self.momentum, "weight_decay": self.weight_decay}


# From a network's outputs and the targets to one loss per sample, shape [b], or to (losses, weights) of shape [b] each.
LossFunction = Callable[[Tensor, Tensor], Losses]


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


class SGDTrainer(Trainer):
    """The base optimizer alone."""

    def make_optimizer(self) -> torch.optim.Optimizer:
        """SGD with momentum."""
        return torch.optim.SGD(self.model.parameters(), **self.settings.sgd)

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """One forward and one backward pass."""
        loss = self.backward(inputs, targets)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss


class SAMTrainer(Trainer):
    """SAM of the package pytorch_optimizer, an implementation independent of this one."""

    def make_optimizer(self) -> torch.optim.Optimizer:
        """SAM around SGD; its second half steps through the loss scaler, of which it knows nothing itself."""
        import pytorch_optimizer  # here, since the benchmarks without this row run where it is missing

        sam = pytorch_optimizer.SAM(
            self.model.parameters(), torch.optim.SGD, rho=self.settings.rho, **self.settings.sgd
        )
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
        moved = [(param, param.grad) for param in self.model.parameters() if param.grad is not None]
        norm = torch.stack([grad.norm() for _, grad in moved]).norm()
        scale = self.settings.rho / (norm + 1e-12)
        backups: list[tuple[Tensor, Tensor]] = [(param, param.clone()) for param, _ in moved]
        for param, grad in moved:
            param.add_(grad * scale)
        return backups

    @torch.no_grad()
    def second_step(self, backups: list[tuple[Tensor, Tensor]]) -> None:
        """Put the weights back and take SGD's step."""
        for param, backup in backups:
            param.copy_(backup)
        self.scaler.step(self.optimizer)
        self.scaler.update()


class ESAMTrainer(Trainer):
    """ESAM of this package."""

    optimizer: ESAM

    def make_optimizer(self) -> ESAM:
        """ESAM around SGD."""
        return ESAM(
            self.model.parameters(),
            torch.optim.SGD,
            rho=self.settings.rho,
            beta=self.settings.beta,
            gamma=self.settings.gamma,
            steering_dtype=self.settings.steering_dtype,
            granularity=self.settings.granularity,
            selection=self.settings.selection,
            interval=self.settings.interval,
            seed=self.settings.seed,
            **self.settings.sgd,
        )

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The three passes of ESAM."""
        backend = self.settings.backend
        with nullcontext() if backend is None else ops.use_backend(backend):
            loss = self.optimizer.backward(batch_closure(self.model, self.loss_fn, inputs, targets), self.scaler)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss


class AuthorsTrainer(Trainer):
    """ESAM of the paper's authors, given as ``settings.authors_esam``; it takes no weights of samples."""

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Their ESAM around SGD; it steps through the loss scaler, of which it knows nothing itself."""
        settings = self.settings
        assert settings.authors_esam is not None
        base = torch.optim.SGD(self.model.parameters(), **settings.sgd)
        scaled: Any = SimpleNamespace(param_groups=base.param_groups, step=lambda: self.scaler.step(base))
        options: dict[str, Any] = {"rho": settings.rho, "beta": settings.beta, "gamma": settings.gamma}
        return settings.authors_esam(self.model.parameters(), scaled, **options)

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Their three passes, all of which move batch norm's running statistics."""
        optimizer: Any = self.optimizer
        optimizer.paras = [inputs, targets, self.loss_fn, self.model, lambda loss: self.scaler.scale(loss).backward()]
        optimizer.step()
        self.scaler.update()
        _, losses = optimizer.returnthings
        return losses.mean()


@dataclass(frozen=True)
class Method:
    """A row of the tables: its name there, and how it trains."""

    label: str
    trainer: type[Trainer]
    overrides: Mapping[str, Any] = field(default_factory=dict)


METHODS = {
    "sgd": Method("SGD", SGDTrainer),
    "sam": Method("SAM (pytorch_optimizer)", SAMTrainer),
    "esam": Method("ESAM", ESAMTrainer),
    "esam-bf16": Method("ESAM, bf16 steering", ESAMTrainer, {"steering_dtype": torch.bfloat16}),
    "sgd-bf16": Method("SGD, bf16 autocast", SGDTrainer, {"amp": torch.bfloat16}),
}


# Methods whose steps are timed, but that need no training of their own: other implementations and other settings.
VARIANTS = {
    "sgd-again": Method("SGD again", SGDTrainer),
    "sam-davda54": Method("SAM, davda54 style", TwoStepSAMTrainer),
    "esam-gamma": Method("ESAM, gamma 1", ESAMTrainer, {"gamma": 1.0}),
    "esam-beta": Method("ESAM, beta 1", ESAMTrainer, {"beta": 1.0}),
    "esam-loss": Method('ESAM, selection "loss"', ESAMTrainer, {"selection": "loss"}),
    "esam-interval": Method("ESAM, interval 2", ESAMTrainer, {"interval": 2}),
    "esam-element": Method('ESAM, granularity "element"', ESAMTrainer, {"granularity": "element"}),
    "esam-triton": Method("ESAM, triton operators", ESAMTrainer, {"backend": "triton"}),
    "esam-native": Method("ESAM, native operators", ESAMTrainer, {"backend": "native"}),
    "esam-reference": Method("ESAM, reference operators", ESAMTrainer, {"backend": "reference"}),
    "esam-authors": Method("ESAM (the authors' code)", AuthorsTrainer),
}


def per_sample_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of each sample, shape [b], in float32 whatever precision the logits have."""
    return nn.functional.cross_entropy(logits.float(), targets, reduction="none")


def per_sequence_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross entropy of each sequence's tokens but padding, and how many those are, shape [b] each."""
    losses = nn.functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=PADDING, reduction="none"
    )
    counts = (targets != PADDING).sum(1)
    return losses.view_as(targets).sum(1) / counts, counts


def mean_loss(losses: Losses) -> Tensor:
    """What is trained on: the mean over the samples, weighted if there are weights."""
    if isinstance(losses, Tensor):
        return losses.mean()
    values, weights = losses
    return (values * weights).sum() / weights.sum()


def trainer(
    name: str, model: nn.Module, settings: Settings, device: torch.device, loss_fn: LossFunction = per_sample_loss
) -> Trainer:
    """What trains ``model``, which is on ``device``, by the method of that name."""
    method = (METHODS | VARIANTS)[name]
    return method.trainer(model, replace(settings, **method.overrides), device, loss_fn)


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
