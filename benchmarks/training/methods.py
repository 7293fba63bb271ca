"""Every way to train that a benchmark compares, in one table; nothing here imports torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        label: its name in tables and plots.
        trainer: one of ``trainers.TRAINERS``.
        options: those of ESAM that are not as the command line has them.
        rho_factor: what the command line's radius is multiplied with.
        share_of_epochs: of those that are given to it.
        amp: autocast of all passes, whatever the command line says.
        weights: the weights' precision, "bf16" or None for float32.
        to_nearest: whether ESAM's perturbation of such weights rounds to nearest instead of stochastically.
        backend: of ESAM's operators; None: the first that serves.
        micro_batches: in how many parts a batch is taken.
    """

    label: str
    trainer: str
    options: Mapping[str, Any] = field(default_factory=dict)
    rho_factor: float = 1.0
    share_of_epochs: float = 1.0
    amp: str | None = None
    weights: str | None = None
    to_nearest: bool = False
    backend: str | None = None
    micro_batches: int = 1

    @property
    def compares_precision(self) -> bool:
        """Whether it compares bf16 with float32, which makes no sense where --amp sets the precision of all passes."""
        return self.amp is not None or "steering_dtype" in self.options


def _esam(label: str, **options: Any) -> Method:
    return Method(f"ESAM, {label}", "esam", options)


# Tables show them in the order of the command that measures them.
METHODS = {
    "sgd": Method("SGD", "sgd"),
    "sam": Method("SAM (pytorch_optimizer)", "sam"),
    "esam": Method("ESAM", "esam"),
    "esam-bf16": _esam("bf16 steering", steering_dtype="bfloat16"),
    "sgd-bf16": Method("SGD, bf16 autocast", "sgd", amp="bf16"),
    # Controls of SGD: it differs from itself by noise, it stops early, it takes a batch in parts.
    "sgd-again": Method("SGD again", "sgd"),
    "sgd-short": Method("SGD, 1/5 of the epochs", "sgd", share_of_epochs=0.2),
    "sgd-4-micro-batches": Method("SGD, 4 micro-batches", "sgd-accumulated", micro_batches=4),
    # Other implementations.
    "sam-davda54": Method("SAM, davda54 style", "sam-davda54"),
    "esam-authors": Method("ESAM (the authors' code)", "esam-authors"),
    # Other options of ESAM.
    "esam-gamma0.25": _esam("gamma 0.25", gamma=0.25),
    "esam-gamma0.75": _esam("gamma 0.75", gamma=0.75),
    "esam-gamma1": _esam("gamma 1", gamma=1.0),
    "esam-beta0.3": _esam("beta 0.3", beta=0.3),
    "esam-beta1": _esam("beta 1", beta=1.0),
    "esam-beta1-gamma1": _esam("beta 1, gamma 1 (SAM)", beta=1.0, gamma=1.0),
    "esam-loss": _esam("largest losses", selection="loss"),
    "esam-random": _esam("random samples", selection="random"),
    "esam-random-bf16": _esam("random samples, bf16 steering", selection="random", steering_dtype="bfloat16"),
    "esam-element": _esam("element masks", granularity="element"),
    "esam-adaptive": _esam("adaptive", adaptive=True),
    "esam-interval2": _esam("every 2nd step", interval=2),
    "esam-interval5": _esam("every 5th step", interval=5),
    "sam-interval2": Method("SAM, every 2nd step", "esam", {"beta": 1.0, "gamma": 1.0, "interval": 2}),
    # The best radius is not the same for SAM and ESAM.
    "esam-half-rho": Method("ESAM, rho / 2", "esam", rho_factor=0.5),
    "esam-twice-rho": Method("ESAM, rho * 2", "esam", rho_factor=2.0),
    "sam-half-rho": Method("SAM, rho / 2", "sam", rho_factor=0.5),
    "sam-twice-rho": Method("SAM, rho * 2", "sam", rho_factor=2.0),
    # ESAM over micro-batches and with other operators.
    "esam-4-micro-batches": Method("ESAM, 4 micro-batches", "esam", micro_batches=4),
    "esam-4-micro-batches-over-all": Method(
        "ESAM, 4 micro-batches, select over all", "esam", {"select_over": "all"}, micro_batches=4
    ),
    "esam-triton": Method("ESAM, triton operators", "esam", backend="triton"),
    "esam-native": Method("ESAM, native operators", "esam", backend="native"),
    "esam-reference": Method("ESAM, reference operators", "esam", backend="reference"),
    # Weights in bf16 alone.
    "sgd-bf16-weights": Method("SGD, bf16 weights", "sgd", weights="bf16"),
    "esam-bf16-weights": Method("ESAM, bf16 weights, stochastic", "esam", weights="bf16"),
    "esam-bf16-weights-to-nearest": Method("ESAM, bf16 weights, to nearest", "esam", weights="bf16", to_nearest=True),
}
