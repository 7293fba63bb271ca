"""Directions to climb along that need no pass, since they stand in the base optimizer's state.

Source: MSAM (Becker et al., arXiv 2401.12033) for the base's first moment. Its sign is in ``schedule.coefficient``.
"""

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..sharding import local_shard, sum_over_shards
from ..step import Step, Weight
from .ascend import Ascent
from .draw import drawn

FIRST_MOMENTS = ("exp_avg", "momentum_buffer")  # of Adam and its kin, Lion and others; of SGD, RMSprop and Muon
ADVICE = (
    f"take one that keeps {' or '.join(FIRST_MOMENTS)} in the parameter's shape, such as SGD with momentum or AdamW, "
    "or set ascent='previous' or 'gradient'"
)
PREVIOUS = "esam_previous"  # stands in the state of a parameter beside what the base optimizer keeps there


def along_momentum(step: Step) -> Ascent:
    """The base's first moments as the last step has left them; a weight that has none yet stays.

    Raises:
        ValueError: if the base optimizer keeps none.
    """
    if step.findings.stateless_base is not None:
        raise ValueError(
            f"ascent = 'momentum' needs a first moment, and {step.findings.stateless_base} has taken a step and keeps "
            f"nothing of its parameters in its state: {ADVICE}"
        )
    weights = drawn(step)
    return Ascent(weights, [first_moment(weight, step.base_state.get(weight.param, {})) for weight in weights])


def along_previous(step: Step) -> Ascent:
    """The gradients that the last step was taken with; a weight that had none stays."""
    weights = drawn(step)
    return Ascent(weights, [step.base_state.get(weight.param, {}).get(PREVIOUS) for weight in weights])


def first_moment(weight: Weight, state: Mapping[str, Any]) -> Tensor | None:
    """The sum or mean of a weight's gradients that the base optimizer keeps; None if it has none yet.

    Raises:
        ValueError: if the base optimizer keeps other things of the weight, but not this.
    """
    names = [name for name in FIRST_MOMENTS if name in state]
    moment = state[names[0]] if names else None
    if isinstance(moment, Tensor) and moment.shape == weight.param.shape and moment.dtype.is_floating_point:
        return moment
    if moment is None and (names or state.keys() <= {PREVIOUS}):
        return None
    raise ValueError(
        f"ascent = 'momentum' needs a first moment, and of parameter {weight.tensor_id}, of shape "
        f"{list(weight.param.shape)}, the base optimizer keeps only {', '.join(state)}: {ADVICE}"
    )


def stateless_base(bases: Sequence[torch.optim.Optimizer], rho: str) -> str | None:
    """The name of a base that has just taken a step, and keeps nothing of any parameter it was taken with; or None.

    Args:
        bases: of which each is looked at by itself.
        rho: under what a group has its radius.
    """
    for base in bases:
        groups = [group for group in base.param_groups if group[rho] > 0]
        taken = [param for group in groups for param in group["params"] if param.grad is not None]
        if taken and not any(base.state.get(param) for param in taken):
            return type(base).__name__
    return None


@torch.no_grad()  # gradients may have a graph
def copy_gradients(params: Sequence[Tensor], state: Mapping[Tensor, Mapping[str, Any]]) -> dict[Tensor, Tensor]:
    """Copies of the gradients that a step is about to be taken with, by their parameters.

    Zeros for a parameter that has none but had one before: it stays in the next step, and in every checkpoint. If their
    norm is not finite, such as in a step that a fused optimizer skips for a ``GradScaler``, what was kept before is
    copied instead, or zeros if there was nothing. That is decided on the device.
    """
    with_grad = [param for param in params if param.grad is not None and param.grad.layout == torch.strided]
    grads = [param.grad for param in with_grad if param.grad is not None]
    local = [local_shard(grad) for grad in grads]
    finite = (
        sum_over_shards(ops.squared_norm(local, local), grads).isfinite() if grads else torch.tensor(True, device="cpu")
    )
    copies = {}
    for param, grad in zip(with_grad, grads):
        kept = state.get(param, {}).get(PREVIOUS)
        copies[param] = _either(finite, grad, torch.zeros_like(grad) if kept is None else kept)
    for param in params:
        if param not in copies and (kept := state.get(param, {}).get(PREVIOUS)) is not None:
            copies[param] = _either(finite, torch.zeros_like(kept), kept)
    return copies


def _either(finite: Tensor, grad: Tensor, kept: Tensor) -> Tensor:
    copy = torch.empty_like(grad)
    here, other = local_shard(grad), local_shard(kept)
    torch.where(finite.to(here.device), here, other.to(here.dtype), out=local_shard(copy))
    return copy


@torch.no_grad()
def keep_gradients(state: MutableMapping[Tensor, dict[str, Any]], copies: Mapping[Tensor, Tensor]) -> None:
    """Keep these gradients for the next step, and none of those from before.

    Only after the base optimizer's step: many take a state that is not empty for one that they have made. What is kept
    stays where it is, for a compiled step, which is compiled anew for a state that looks otherwise.
    """
    for param, entry in state.items():
        if isinstance(entry, dict) and param not in copies:  # some bases keep what is no parameter's there, too
            entry.pop(PREVIOUS, None)
    kept, new = [], []
    for param, copy in copies.items():
        entry = state.setdefault(param, {})
        there = entry.get(PREVIOUS)
        if there is None or (there.dtype, there.device) != (copy.dtype, copy.device):
            entry[PREVIOUS] = copy
        else:
            kept.append(local_shard(there))
            new.append(local_shard(copy))
    if kept:
        torch._foreach_copy_(kept, new)


def is_lost(state: Mapping[Tensor, Any]) -> bool:
    """Whether a base that has a state has kept no gradient in it."""
    entries = [entry for entry in state.values() if isinstance(entry, dict)]
    return any(entries) and not any(PREVIOUS in entry for entry in entries)
