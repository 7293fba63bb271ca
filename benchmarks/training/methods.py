"""Every way to train that a benchmark compares, in one table; nothing here imports torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from esam_kernels.options import OPTIONS, make


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        label: its name in tables and plots.
        trainer: one of ``trainers.TRAINERS``.
        options: those of ESAM that are not as the command line has them.
        rho_factor: what the command line's radius is multiplied with.
        late_share: the share of the steps, the last ones, that are sharpness-aware or have ``late_options``.
        late_options: those of ESAM that change then; with none of them the steps before are the base optimizer's.
        nesterov: whether SGD looks ahead.
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
    late_share: float = 1.0
    late_options: Mapping[str, Any] = field(default_factory=dict)
    nesterov: bool = False
    share_of_epochs: float = 1.0
    amp: str | None = None
    weights: str | None = None
    to_nearest: bool = False
    backend: str | None = None
    micro_batches: int = 1

    @property
    def cycle(self) -> int:
        """How many steps have every kind of step that it takes, each as often as over a whole training."""
        return int(self.options.get("interval", 1)) * round(1 / self.late_share)

    @property
    def has_radius(self) -> bool:
        """Whether it perturbs weights."""
        return not self.trainer.startswith("sgd")

    def radii(self, esam: Mapping[str, Any], base: str, factor: float = 1.0) -> list[float]:
        """Its radius, and where another follows late in training that one, too.

        One that climbs along another direction than the options has its own.

        Args:
            esam: the command line's options of ESAM; one that is not given has its default.
            base: the base optimizer's name.
            factor: what the radii are multiplied with.
        """
        esam = {name: esam.get(name, option.default) for name, option in OPTIONS.items()}
        changed = dict(self.options)
        if changed.get("ascent", esam["ascent"]) != esam["ascent"]:
            changed.setdefault("rho", None)
        stages = [{**esam, **changed}] + ([{**esam, **self.late_options}] if self.late_options else [])
        return [self.rho_factor * factor * _radius(stage, base) for stage in stages]

    @property
    def compares_precision(self) -> bool:
        """Whether it compares bf16 with float32, which makes no sense where --amp sets the precision of all passes."""
        return self.amp is not None or "steering_dtype" in self.options


def _radius(esam: Mapping[str, Any], base: str) -> float:
    """The radius among ESAM's options; where none is given, the one that suits the direction of ascent."""
    if esam["rho"] is not None:
        return float(esam["rho"])
    return float(make({"ascent": esam["ascent"]}, base_has_betas=base == "adamw")["rho"])


def _esam(label: str, **options: Any) -> Method:
    return Method(f"ESAM, {label}", "esam", options)


_SAM = {"beta": 1.0, "gamma": 1.0}


def _sam(label: str, **options: Any) -> Method:
    return Method(label, "esam", {**_SAM, **options})


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
    "sam-foreach": Method("SAM (foreach)", "sam-foreach"),
    "sam-own": _sam("SAM (esam_kernels)"),
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
    "sam-interval2": _sam("SAM, every 2nd step", interval=2),
    "sam-interval5": _sam("SAM, every 5th step", interval=5),
    # Directions of ascent without a pass, or with a smaller one; with gamma 1, as SAM has it.
    "momentum": _sam("momentum", ascent="momentum"),
    "momentum-random": _sam("momentum, random half", ascent="momentum", gamma=0.5, selection="random"),
    "previous": _sam("previous gradient", ascent="previous"),
    "share-quarter": _sam("ascent share 1/4", ascent_share=0.25),
    "share-half": _sam("ascent share 1/2", ascent_share=0.5),
    # Sharpness-aware at the end alone.
    "sam-tail0.2": Method("SAM in the last 1/5", "esam", _SAM, late_share=0.2),
    "temperon-tail0.2": Method("temperon, last 1/5", "temperon", late_share=0.2),
    "sam-tail0.5": Method("SAM in the last 1/2", "esam", _SAM, late_share=0.5),
    "esam-tail0.2": Method("ESAM in the last 1/5", "esam", late_share=0.2),
    "esam-tail0.5": Method("ESAM in the last 1/2", "esam", late_share=0.5),
    "momentum-then-sam": Method(
        "momentum, SAM in the last 1/5",
        "esam",
        {**_SAM, "ascent": "momentum"},
        late_share=0.2,
        late_options={"ascent": "gradient"},
    ),
    # Controls of climbing against momentum: the wrong sign, no direction at all, and looking ahead.
    "momentum-plus": Method("momentum, wrong sign (control)", "along-momentum", {"ascent": "momentum"}),
    "random-direction": Method("random direction (control)", "random-direction", {"ascent": "momentum"}),
    "nesterov": Method("SGD, Nesterov", "sgd", nesterov=True),
    # The best radius is not the same for SAM and ESAM.
    "esam-half-rho": Method("ESAM, rho / 2", "esam", rho_factor=0.5),
    "esam-twice-rho": Method("ESAM, rho * 2", "esam", rho_factor=2.0),
    "sam-half-rho": Method("SAM, rho / 2", "esam", _SAM, rho_factor=0.5),
    "sam-twice-rho": Method("SAM, rho * 2", "esam", _SAM, rho_factor=2.0),
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
