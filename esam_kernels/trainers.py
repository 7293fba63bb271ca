"""What trainers do around a step that it has to know of. They are known by their names: nothing here imports them."""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType
from typing import Any

LIGHTNING = ("pytorch_lightning.", "lightning.pytorch.")
WAY_OUT = "let the module inherit esam_kernels.integrations.lightning.ManualESAM"


def computation_in(closure: Callable[[], Any]) -> Callable[[], Any]:
    """What passes before the last call: Lightning's closure without clipping and the hook before the optimizer's step.

    Both are for the gradient that the step is taken with; clipped by value, that of pass 1 would be another direction.

    Raises:
        RuntimeError: if Lightning accumulates gradients, of which the closure makes the last micro-batch's alone.
    """
    if not isinstance(closure, partial) or len(closure.args) != 3 or not _is_lightnings(closure.func):
        return closure
    module, _, computation = closure.args
    if getattr(getattr(getattr(module, "trainer", None), "fit_loop", None), "_skip_backward", False):
        return computation  # weights are averaged, and batch norm's statistics taken anew: there is no step
    batches = getattr(getattr(module, "trainer", None), "accumulate_grad_batches", 1)
    if batches > 1:
        raise RuntimeError(
            f"Lightning's accumulate_grad_batches = {batches} runs all micro-batches but the last before the step, "
            f"without the perturbation: leave it out, or {WAY_OUT} and set accumulate_grad_batches on the module"
        )
    return computation


def _is_lightnings(function: Any) -> bool:
    name = getattr(function, "__module__", None) or ""
    return getattr(function, "__name__", "") == "_wrap_closure" and name.startswith(LIGHTNING)


def check_plain_caller() -> None:
    """Refuse a step without a gradient of ESAM that Lightning calls with a scaler.

    Raises:
        RuntimeError: if it has run its closure before the step.
    """
    for frame in _callers():
        name = frame.f_globals.get("__name__", "")
        if name.startswith(LIGHTNING) and getattr(frame.f_locals.get("model"), "automatic_optimization", False):
            raise RuntimeError(
                "Lightning's precision='16-mixed' runs the closure before the step, without the perturbation: set "
                f"precision='bf16-mixed', or {WAY_OUT}"
            )


def check_closure_caller() -> None:
    """Refuse a closure of ``torch.optim`` that Accelerate calls for one of several micro-batches.

    Raises:
        RuntimeError: if it accumulates gradients.
    """
    for frame in _callers():
        if frame.f_globals.get("__name__") == "accelerate.optimizer":
            batches = getattr(getattr(frame.f_locals.get("self"), "gradient_state", None), "num_steps", 1)
            if batches > 1:
                raise RuntimeError(
                    f"Accelerate's gradient_accumulation_steps = {batches} skips the closures of all micro-batches but "
                    "the last: leave it and accelerator.accumulate out, and let the closure run all micro-batches of "
                    "the step, or give optimizer.backward() the list of their closures"
                )


def _callers() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back
