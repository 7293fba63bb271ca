"""Which pass of a step is running, for models that keep state outside of buffers."""

import threading
from functools import partial

from ..eager import eager
from ..step import Step


class _Running(threading.local):
    """The steps of this thread that are running, each with its pass and its first one; a closure may run another."""

    def __init__(self) -> None:
        self.steps: list[tuple[Step, str, str]] = []


_running = _Running()


@eager
def current_pass() -> str | None:
    """Which pass of a step calls the model: "survey", "ascend", "look" or "descend"; None outside of a step.

    With an ``ascent_share`` or another ``ascent`` a "survey" of all losses may come first; a plain step is "descend".
    A step runs the model several times. Buffers begin each pass as they were before the step and end it as the first
    pass left them, but what a model keeps elsewhere is updated in every pass: counters, metrics, a momentum encoder, a
    generator of its own. Guard such an update, so that a step makes it once:

        if current_pass() in (None, first_pass()):
            self.update_momentum_encoder()
    """
    return _running.steps[-1][1] if _running.steps else None


@eager
def first_pass() -> str | None:
    """The first pass of the step that is running; None outside of a step."""
    return _running.steps[-1][2] if _running.steps else None


def enter(step: Step, name: str) -> None:
    """Say that a pass begins; the step's rollback takes it back."""
    steps = _running.steps
    if steps and steps[-1][0] is step:
        steps[-1] = (step, name, steps[-1][2])
    else:
        step.rollback.undo_by(partial(leave, step))
        steps.append((step, name, name))


def leave(step: Step) -> None:
    """Say that the step has no more passes; one that it runs in goes on."""
    if _running.steps and _running.steps[-1][0] is step:
        _running.steps.pop()
