"""Which pass of a step is running, for models that keep state outside of buffers."""

import threading

from ..eager import eager
from ..step import Step

_running = threading.local()


@eager
def current_pass() -> str | None:
    """Which pass of a step calls the model: "ascend", "look" or "descend"; None outside of a step.

    With an ``ascent_share`` or another ``ascent`` a "survey" of all losses may come first; a plain step is "descend".
    A step runs the model several times. Buffers begin each pass as they were before the step and end it as the first
    pass left them, but what a model keeps elsewhere is updated in every pass: counters, metrics, a momentum encoder, a
    generator of its own. Guard such an update, so that a step makes it once::

        if current_pass() in (None, first_pass()):
            self.update_momentum_encoder()
    """
    return getattr(_running, "name", None)


@eager
def first_pass() -> str | None:
    """The first pass of the step that is running; None outside of a step."""
    return getattr(_running, "first", None)


def enter(step: Step, name: str) -> None:
    """Say that a pass begins; the step's rollback takes it back."""
    if current_pass() is None:
        step.rollback.undo_by(leave)
        _running.first = name
    _running.name = name


def leave() -> None:
    """Say that no pass is running."""
    _running.name = _running.first = None
