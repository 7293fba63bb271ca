"""The optimizers under comparison: each a trainer with ``optimizer`` and ``step(inputs, targets)``."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from esam_kernels import ESAM, batch_closure, ops
from esam_kernels.options import OPTIONS, STEP

from .losses import LossFunction, mean_loss, per_sample_loss
from .methods import METHODS, Method

BASES: dict[str, type[torch.optim.Optimizer]] = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # by their names on the command line and in ``METHODS``


@dataclass(frozen=True)
class Settings:
    """The base optimizer's options, which every method shares, and those of sharpness-aware minimization.

    Attributes:
        momentum: AdamW's beta_1.
        esam: ESAM's options by name; one that is not given has its default.
        amp: autocast of all passes.
        backend: of ESAM's operators; None: the first that serves.
        micro_batches: in how many parts a batch is taken.
        authors_esam: the class of ``authors.load``, for the method that needs it.
        base: the base optimizer, one of ``BASES``.
        nesterov: whether SGD looks ahead.
        factor: of the radius, or of the learning rate where a method has none: what was chosen for it.
        steps: of the whole training, of which a method may have its own in the last share.
        late: ESAM's options that change, and from which step on.

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
    base: str = "sgd"
    nesterov: bool = False
    factor: float = 1.0
    steps: int = 0
    late: tuple[int, Mapping[str, Any]] | None = None

    def __post_init__(self) -> None:
        if unknown := self.esam.keys() - OPTIONS.keys():
            raise ValueError(f"ESAM has no option {', '.join(sorted(unknown))}: it has {', '.join(OPTIONS)}")
        complete = {name: self.esam.get(name, option.default) for name, option in OPTIONS.items()}
        object.__setattr__(self, "esam", complete)

    @property
    def base_class(self) -> type[torch.optim.Optimizer]:
        """The base optimizer."""
        return BASES[self.base]

    @property
    def base_options(self) -> dict[str, Any]:
        """The base optimizer's options."""
        shared = {"lr": self.lr, "weight_decay": self.weight_decay}
        if self.base == "adamw":
            return {**shared, "betas": (self.momentum, 0.999)}
        return {**shared, "momentum": self.momentum, "nesterov": self.nesterov}

    @property
    def seed(self) -> int:
        """Of the initial weights, of the batches, and of ESAM's draws."""
        return int(self.esam["seed"])

    def by(self, method: Method) -> "Settings":
        """As a method has them, with its own radii.

        What it changes in a share of the training begins at a whole step.
        """
        rho, *late_rho = method.radii(self.esam, self.base, self.factor if method.has_radius else 1.0)
        esam = {**self.esam, **method.options, "rho": rho}
        begin = round((1 - method.late_share) * self.steps)
        late: dict[str, Any] = dict(method.late_options)
        if late:
            (late["rho"],) = late_rho
        elif method.late_share < 1:
            esam["start"] = begin
        return replace(
            self,
            esam=esam,
            lr=self.lr if method.has_radius else self.factor * self.lr,
            factor=1.0,
            late=(begin, late) if late else None,
            nesterov=method.nesterov,
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
        """The base optimizer."""
        return self.settings.base_class(self.model.parameters(), **self.settings.base_options)

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
        """SAM around the base; its second half steps through the loss scaler, of which it knows nothing itself."""
        import pytorch_optimizer  # here, since the benchmarks without this row run where it is missing

        radius = {name: self.settings.esam[name] for name in ("rho", "adaptive")}
        options = {**radius, **self.settings.base_options}
        sam = pytorch_optimizer.SAM(self.model.parameters(), self.settings.base_class, **options)
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


class TemperonTrainer(Trainer):
    """SAM in the last part of training, of the package temperon."""

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Temperon around the base, with a tail from ``start`` on; it knows nothing of the loss scaler itself."""
        import temperon

        base = self.settings.base_class(self.model.parameters(), **self.settings.base_options)
        scaled: Any = SimpleNamespace(
            param_groups=base.param_groups, zero_grad=base.zero_grad, step=lambda: self.scaler.step(base)
        )
        share = 1 - self.settings.esam["start"] / max(1, self.settings.steps)
        tail: Any = temperon.Temperon(
            scaled, max(1, self.settings.steps), tail_frac=share, rho=self.settings.esam["rho"]
        )
        return tail

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """One forward and backward pass, or two of them, both of which move batch norm's running statistics."""
        optimizer: Any = self.optimizer
        loss: Tensor = optimizer.step(lambda: self.backward(inputs, targets))
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


class PerturbingTrainer(SGDTrainer):
    """The base optimizer with a gradient taken at moved weights, in plain torch's foreach functions."""

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The passes before the move, and one after it; the weights are put back before the base optimizer's step."""
        before = self.before(inputs, targets)
        params, direction = self.direction()
        backups = self.move(params, direction)
        with frozen_running_stats(self.model) if before is not None else nullcontext():
            loss = self.backward(inputs, targets)
        if params:  # of a first moment there is none in the first step
            with torch.no_grad():
                torch._foreach_copy_(params, backups)
        self.base_step()
        return loss if before is None else before

    def before(self, inputs: Tensor, targets: Tensor) -> Tensor | None:
        """What runs at the weights as they are; its mean loss."""
        return None

    @abstractmethod
    def direction(self) -> tuple[list[Tensor], list[Tensor]]:
        """The weights that are moved, and along what."""

    @torch.no_grad()
    def move(self, params: list[Tensor], direction: list[Tensor]) -> list[Tensor]:
        """Move by rho along the direction, in the adaptive norm if that is asked for; the weights as they were."""
        backups = [torch.empty_like(param) for param in params]
        if params:
            torch._foreach_copy_(backups, params)
            sizes = torch._foreach_abs(params) if self.settings.esam["adaptive"] else None
            scaled = torch._foreach_mul(direction, sizes) if sizes else direction
            norm = torch.stack(torch._foreach_norm(scaled)).norm()
            e = torch._foreach_mul(torch._foreach_mul(scaled, sizes) if sizes else scaled, self.scale / (norm + 1e-12))
            torch._foreach_add_(params, e)
        return backups

    @property
    def scale(self) -> float:
        """How far it moves, and which way."""
        return float(self.settings.esam["rho"])


class ForeachSAMTrainer(PerturbingTrainer):
    """SAM as one would write it for speed without this package: the fair rival in launches."""

    def before(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """A forward and backward pass."""
        return self.backward(inputs, targets)

    def direction(self) -> tuple[list[Tensor], list[Tensor]]:
        """The gradient."""
        pairs = [(param, param.grad) for param in self.model.parameters() if param.grad is not None]
        return [param for param, _ in pairs], [grad for _, grad in pairs]


class AlongMomentumTrainer(PerturbingTrainer):
    """The wrong sign, a control: along the first moment, which is downhill and ahead of the step."""

    def direction(self) -> tuple[list[Tensor], list[Tensor]]:
        """The first moments that there are."""
        moments = [(param, first_moment(self.optimizer.state.get(param, {}))) for param in self.model.parameters()]
        pairs = [(param, moment) for param, moment in moments if moment is not None]
        return [param for param, _ in pairs], [moment for _, moment in pairs]


class RandomDirectionTrainer(PerturbingTrainer):
    """A direction that is drawn anew in each step, a control: noise in the weights of the same length."""

    def __init__(self, model: nn.Module, settings: Settings, device: torch.device, loss_fn: LossFunction) -> None:
        super().__init__(model, settings, device, loss_fn)
        # Another stream than that of the initial weights and of the batches, with which it would be correlated.
        self.generator = torch.Generator(device).manual_seed(settings.seed + 2**31)  # a CPU takes 32 bits of it

    def direction(self) -> tuple[list[Tensor], list[Tensor]]:
        """Normal deviates in the weights' shapes."""
        params: list[Tensor] = list(self.model.parameters())
        return params, [
            torch.randn(param.shape, generator=self.generator, device=param.device, dtype=param.dtype)
            for param in params
        ]


def first_moment(state: Mapping[str, Any]) -> Tensor | None:
    """What SGD or AdamW keeps of a weight's gradients, if it does yet."""
    return state.get("momentum_buffer", state.get("exp_avg"))


class ESAMTrainer(Trainer):
    """ESAM of this package."""

    optimizer: ESAM

    def make_optimizer(self) -> ESAM:
        """ESAM around the base optimizer, with every option that it has."""
        settings = self.settings
        return ESAM(self.model.parameters(), settings.base_class, **settings.esam, **settings.base_options)

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The passes of ESAM, with the options that it has by then."""
        backend = self.settings.backend
        if self.settings.late is not None:
            begin, late = self.settings.late
            for group in self.optimizer.param_groups:
                group.update(late if group[STEP] >= begin else {name: self.settings.esam[name] for name in late})
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
        """Their ESAM around the base optimizer; it steps through the loss scaler, of which it knows nothing itself."""
        settings = self.settings
        assert settings.authors_esam is not None
        base = settings.base_class(self.model.parameters(), **settings.base_options)
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
    "temperon": TemperonTrainer,
    "sam-foreach": ForeachSAMTrainer,
    "along-momentum": AlongMomentumTrainer,
    "random-direction": RandomDirectionTrainer,
    "esam": ESAMTrainer,
    "esam-authors": AuthorsTrainer,
}


def set_step(one: Trainer, number: int) -> None:
    """Let the step that is taken next be that of this number, on which ESAM's draws and schedule depend, and a tail."""
    for group in one.optimizer.param_groups:
        if STEP in group:
            group[STEP] = number
    if isinstance(one, TemperonTrainer):
        vars(one.optimizer)["step_count"] = number


def trainer(
    name: str, model: nn.Module, settings: Settings, device: torch.device, loss_fn: LossFunction = per_sample_loss
) -> Trainer:
    """What trains ``model``, which is on ``device``, by the method of that name in ``METHODS``."""
    method = METHODS[name]
    return TRAINERS[method.trainer](model, settings.by(method), device, loss_fn)


PACKAGES = {"sam": "pytorch_optimizer", "temperon": "temperon"}  # that a trainer needs and that may be missing


def left_out(names: Iterable[str], base: str = "sgd", slow_bf16: bool = False) -> dict[str, str]:
    """Of methods those that cannot be trained here, or if ``slow_bf16`` that only lose time in bf16; and why."""
    why = {}
    for name in names:
        package = PACKAGES.get(METHODS[name].trainer)
        if package is not None and find_spec(package) is None:
            why[name] = f"the package {package} is not installed"
        elif METHODS[name].nesterov and base != "sgd":
            why[name] = f"Nesterov's momentum is SGD's, and the base is {base}"
        elif slow_bf16 and METHODS[name].compares_precision:
            why[name] = "bf16 is slower than float32 on this CPU, which has no units for it (AMX, AVX512-BF16)"
    return why


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
