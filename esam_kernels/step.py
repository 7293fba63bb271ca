"""What all passes of one step share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .closure import Closure
from .model_state import Findings, ModelState
from .options import GroupSettings, Settings
from .ordinary import OrdinaryClosure
from .rollback import Rollback


class Weight(NamedTuple):
    """A parameter that can be perturbed, and how."""

    param: Tensor
    tensor_id: int  # its place among all parameters of the optimizer, as in the state dict
    settings: GroupSettings


@dataclass(frozen=True)
class Step:
    """One step, as its passes see it.

    Attributes:
        number: counts the steps; draws depend on it and the seed alone.
        settings: what holds for all parameter groups, see ``ESAM``.
        weights: the parameters that can be perturbed: trainable ones in groups whose rho is not 0, and frozen ones that
            an ordinary closure may yet train.
        closures: one for each micro-batch; none where the caller runs the passes, or an ordinary closure does.
        model_state: what a forward must not disturb.
        base_state: the base optimizer's state of each parameter.
        rollback: where changes are registered before they are made.
        findings: what the steps before found out.
        grad_scaler: scales the losses, or None.
        ordinary: runs each pass itself, in place of the closures; or None.
    """

    number: int
    settings: Settings
    weights: Sequence[Weight]
    closures: Sequence[Closure]
    model_state: ModelState
    rollback: Rollback
    base_state: Mapping[Tensor, Mapping[str, Any]] = field(default_factory=dict)
    findings: Findings = field(default_factory=Findings)
    grad_scaler: torch.amp.GradScaler | None = None
    ordinary: OrdinaryClosure | None = None
