"""One call of a closure, checked: the losses of a micro-batch, or of some of its rows."""

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from ..closure import Closure
from ..schedule import draws_rows
from ..step import Step
from ..warn import warn

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class MicroBatch:
    """The losses of one micro-batch, and the weights of its samples if the closure gives any; shape [b]."""

    losses: Tensor
    sample_weights: Tensor | None

    @property
    def total_weight(self) -> Tensor | int:
        """The sum of the samples' weights; each is 1 if there are none."""
        return len(self.losses) if self.sample_weights is None else self.sample_weights.sum()

    @property
    def weighted_sum(self) -> Tensor:
        """The sum of the losses, each times its weight."""
        return (self.losses if self.sample_weights is None else self.losses * self.sample_weights).sum()

    def rows(self, index: Tensor | None) -> "MicroBatch":
        """Some of the micro-batch; all of it if None."""
        if index is None:
            return self
        weights = None if self.sample_weights is None else self.sample_weights.index_select(0, index)
        return MicroBatch(self.losses.index_select(0, index), weights)

    def detach(self) -> "MicroBatch":
        """The same without the graph, in memory of its own: losses may be views of weights, which are about to move."""
        weights = None if self.sample_weights is None else self.sample_weights.clone()
        return MicroBatch(self.losses.detach().clone(), weights)


def mean(micro_batches: Sequence[MicroBatch]) -> Tensor:
    """The weighted mean of the losses over all micro-batches, 0-dimensional."""
    total = sum(one.total_weight for one in micro_batches)
    return torch.stack([one.weighted_sum for one in micro_batches]).sum() / divisor(total)


def divisor(total: Tensor | int) -> Tensor | int:
    """The total weight, or 1 if it is 0: what has no weight, such as rows of padding, gives 0 and not NaN."""
    return total.masked_fill(total == 0, 1) if isinstance(total, Tensor) else total


def steered(step: Step) -> Callable[..., MicroBatch]:
    """``evaluate`` for a pass that only steers, in the precision that is set for these."""
    return in_steering_precision(step, evaluate)


def in_steering_precision(step: Step, function: Callable[P, R]) -> Callable[P, R]:
    """The function under autocast to ``steering_dtype``, if one is set."""
    name = step.settings.steering_dtype
    if name is None:
        return function
    if step.weights[0].param.device.type == "cpu":
        warn_if_bf16_is_slow()
    return step.model_state.low_precision(function, getattr(torch, name))


@cache
def warn_if_bf16_is_slow() -> None:
    """Say once that steering in bf16 costs time here rather than saving it, where that can be known."""
    if cpu_has_bf16_units() is False:
        warn(
            "steering_dtype = 'bfloat16' on a CPU without bf16 units (AMX, AVX512-BF16) is slower than float32, by "
            "several times for convolutions: leave it out on this machine"
        )


def cpu_has_bf16_units() -> bool | None:
    """Whether the CPU multiplies matrices of bf16 in hardware; None where torch cannot tell."""
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")  # not the public ones: there are none
    if platform.machine().lower() not in ("x86_64", "amd64") or not all(hasattr(torch.cpu, name) for name in names):
        return None
    return any(getattr(torch.cpu, name)() for name in names)


def as_row(weight: Any, loss: Tensor) -> Any:
    """The weight of a loss without rows, a number or a 0-dimensional tensor, as that of one row."""
    if isinstance(weight, int | float):
        return torch.full((1,), weight, dtype=torch.promote_types(loss.dtype, torch.float32), device=loss.device)
    return weight.view(1) if isinstance(weight, Tensor) and weight.dim() == 0 else weight


def loss_in(result: Any) -> Any:
    """The loss or losses in what models and trainers return; the result itself where it is none of that.

    A mapping without a ``loss`` is one of several terms, such as torchvision's detectors return in training: their sum
    is trained on, if each is one number with a graph. What has none is a metric, and not known to be a loss.
    """
    if hasattr(result, "loss"):  # the Transformers library's ModelOutput
        return result.loss
    if not isinstance(result, Mapping):
        return result
    if "loss" in result:
        return result["loss"]
    terms = list(result.values())
    if not terms or not all(_is_term(term) for term in terms):
        return result
    _check_terms(result)
    return sum(terms)


def _check_terms(terms: Mapping[str, Tensor]) -> None:
    """Refuse terms of a loss of which one is made of another, such as their total: their sum counts it twice.

    Raises:
        ValueError: if there is one, a few operations behind.
    """
    for whole, term in terms.items():
        found = {term.grad_fn}
        for _ in range(2 * len(terms)):
            found = {node for one in found if one is not None for node, _ in one.next_functions}
            parts = [name for name, other in terms.items() if other.grad_fn in found - {None}]
            if parts:
                raise ValueError(
                    f"the closure returned losses of which {whole!r} is made of {parts[0]!r}, so that to add them "
                    f"counts that twice: return {{'loss': losses[{whole!r}]}}, or the terms without it"
                )


def _is_term(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0 and value.requires_grad


def _described(result: Any) -> str:
    kind = type(result).__name__
    others = [str(key) for key, value in result.items() if not _is_term(value)] if isinstance(result, Mapping) else []
    return f"a {kind} in which {', '.join(others)} is no loss with a graph" if others else kind


def one_loss(result: Any) -> list[MicroBatch]:
    """What an ordinary closure returned, as a micro-batch of one row; nothing if it is no loss."""
    loss = loss_in(result)
    if isinstance(loss, float):
        loss = torch.tensor(loss, device="cpu")
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.dtype.is_floating_point:
        return []
    dtype = torch.promote_types(loss.dtype, torch.float32)
    return [MicroBatch(loss.detach().clone().view(1).to(dtype), None)]


def evaluate(
    step: Step, closure: Closure, index: Tensor | None = None, size: int | None = None, graph: bool = True
) -> MicroBatch:
    """Call the closure for the rows in ``index`` (None: all of them), and check what it returns.

    Args:
        step: lets signals through.
        closure: of one micro-batch.
        index: the rows.
        size: how many losses there must be, if it is known.
        graph: whether the losses must have a graph.

    Raises:
        TypeError: if it does not return a tensor, or two.
        ValueError: if the losses are not a floating tensor of shape [b], have no graph, or the weights do not fit.
    """
    size = size if index is None else len(index)
    result = loss_in(step.rollback.interruptible(closure, index))
    losses, weights = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    losses = loss_in(losses)
    if isinstance(losses, Tensor) and losses.dim() == 0 and index is None and not draws_rows(step.settings):
        losses, weights = losses.view(1), as_row(weights, losses)  # as if the micro-batch were one sample
    if not isinstance(losses, Tensor) or not isinstance(weights, Tensor | None):
        raise TypeError(
            f"the closure returned {_described(result)}: return one loss per sample, a tensor of shape [b], "
            "or a tuple (losses, weights); with gamma=1 also one loss, what has it as loss, or a dict of losses to add"
        )
    if losses.dim() == 0:
        raise ValueError(
            "the closure returned a scalar: return one loss per sample, for example with reduction='none', or "
            "(losses, weights) of shape [b] each; or set gamma=1 (and ascent_share=1), which selects no samples, so "
            "that one loss will do"
        )
    if losses.dim() != 1:
        raise ValueError(
            f"the closure returned losses of shape {list(losses.shape)}: return one loss per sample, shape [b], for "
            "example losses.flatten(1).mean(1), or (losses, weights), as esam_kernels.token_loss does for tokens"
        )
    if not losses.dtype.is_floating_point:
        raise ValueError(f"the closure returned {losses.dtype} losses: return a floating dtype")
    if len(losses) == 0 or size not in (None, len(losses)):
        raise ValueError(
            f"the closure returned {len(losses)} losses for {'a batch' if size is None else size} samples: "
            "closure(index) is to return the losses of the rows in index, and closure(None) always the same batch"
        )
    if graph and not losses.requires_grad:
        raise ValueError("the closure returned losses without a graph: compute them from the parameters, not detached")
    if weights is not None and (weights.shape != losses.shape or weights.is_complex()):
        raise ValueError(
            f"the closure returned {weights.dtype} weights of shape {list(weights.shape)} for losses of shape "
            f"{list(losses.shape)}: return one real weight for each loss"
        )
    if weights is not None and weights.requires_grad:
        raise ValueError(
            "the closure returned weights with a graph, which are taken as constants: give weights.detach(), or learn "
            "them through the losses, as in losses * weights"
        )
    dtype = torch.promote_types(losses.dtype, torch.float32)  # sums of bf16 and fp16 losses would lose their digits
    return MicroBatch(losses.to(dtype), None if weights is None else weights.detach().to(dtype))
