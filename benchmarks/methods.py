"""The optimizers under comparison: each a trainer with ``optimizer`` and ``step(inputs, targets)``."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytorch_optimizer
import torch
from pytorch_optimizer.optimizer.utils import disable_running_stats, enable_running_stats
from torch import Tensor, nn

from esam_kernels import ESAM, batch_closure

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

    @property
    def sgd(self) -> dict[str, Any]:
        """The base optimizer's options."""
        return {"lr": self.lr, "momentum": self.momentum, "weight_decay": self.weight_decay}


class Trainer(ABC):
    """A network, the optimizer that trains it, and the loss scale of --amp fp16."""

    def __init__(self, model: nn.Module, settings: Settings, device: torch.device) -> None:
        self.model = model
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
        loss = per_sample_loss(self.model(inputs), targets).mean()
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
        sam = pytorch_optimizer.SAM(
            self.model.parameters(), torch.optim.SGD, rho=self.settings.rho, **self.settings.sgd
        )
        base = sam.base_optimizer
        sam.base_optimizer = SimpleNamespace(step=lambda: self.scaler.step(base))  # type: ignore[assignment]
        return sam

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Two forward and backward passes, the second at perturbed weights."""
        loss = self.backward(inputs, targets)
        disable_running_stats(self.model)  # the package leaves this to its user
        self.optimizer.step(lambda: self.backward(inputs, targets))  # type: ignore[arg-type, return-value]
        enable_running_stats(self.model)
        self.scaler.update()
        return loss


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
        loss = self.optimizer.backward(batch_closure(self.model, per_sample_loss, inputs, targets), self.scaler)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss


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


def trainer(name: str, model: nn.Module, settings: Settings, device: torch.device) -> Trainer:
    """What trains ``model``, which is on ``device``, by the method of that name."""
    method = METHODS[name]
    return method.trainer(model, replace(settings, **method.overrides), device)


def per_sample_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of each sample, shape [b], in float32 whatever precision the logits have."""
    return nn.functional.cross_entropy(logits.float(), targets, reduction="none")
