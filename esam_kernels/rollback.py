"""All or nothing: what a step has changed is undone when anything goes wrong inside it."""

import signal
import threading
from collections.abc import Callable
from contextlib import ExitStack
from types import FrameType
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class Rollback:
    """The undo list of one step, and the hold on Ctrl-C and SIGTERM outside of the calls that may be interrupted.

    An undo is registered before the change that it undoes, and may run whether or not the change was made. Use::

        rollback = Rollback()
        try:
            rollback.open()
            ...  # rollback.undo_by(...), rollback.interruptible(...)
            rollback.close()
            return result
        except BaseException as error:
            rollback.roll_back(error)
            raise

    It is a ``try`` and not a ``with`` block, since an exception can land between the body of a ``with`` block and the
    call of its ``__exit__``, which is then never made.
    """

    def __init__(self) -> None:
        self._undo = ExitStack()  # runs every callback, the last one first, even when one raises
        self._handlers: dict[int, Callable[[int, FrameType | None], object]] = {}
        self._holding = True
        self._held: list[int] = []

    def open(self) -> None:
        """Stand before the Python handlers of SIGINT and SIGTERM; elsewhere than in the main thread they never run."""
        if threading.current_thread() is not threading.main_thread():
            return
        for signum in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(signum)
            if callable(handler):  # not SIG_DFL or SIG_IGN: those raise nothing in Python
                self._handlers[signum] = handler
                signal.signal(signum, self._handle)

    def close(self) -> None:
        """Give the handlers back, and deliver what was held."""
        for signum, handler in self._handlers.items():
            if signal.getsignal(signum) == self._handle:
                signal.signal(signum, handler)
        while self._held:
            signal.raise_signal(self._held.pop())

    def undo_by(self, undo: Callable[[], object]) -> None:
        """Call ``undo`` if the step fails. It must do no harm when it runs twice, or when there is nothing to undo."""
        self._undo.callback(undo)

    def interruptible(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function with signals let through. Only what may run long is called so; all else is short."""
        self._holding = False
        while self._held:
            self._deliver(self._held.pop(), None)
        try:
            return function(*args, **kwargs)
        finally:
            self._holding = True

    def roll_back(self, error: BaseException) -> None:
        """Undo everything, the last change first; what cannot be undone is noted on the error, which stays the one."""
        self._holding = True
        try:
            self._undo.close()
        except Exception as failure:
            error.add_note(f"esam_kernels could not undo all of the step: {failure!r}")
        finally:
            self.close()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._holding:
            self._held.append(signum)
        else:
            self._deliver(signum, frame)

    def _deliver(self, signum: int, frame: FrameType | None) -> None:
        self._holding = True  # what the handler raises leads to a roll-back, which a second Ctrl-C must not interrupt
        self._handlers[signum](signum, frame)
        self._holding = False
