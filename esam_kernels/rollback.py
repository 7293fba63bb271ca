"""All or nothing: what a step has changed is undone when anything goes wrong inside it."""

import _signal  # signal.getsignal makes an enum of each answer, which takes ten times as long
import signal
import threading
from collections.abc import Callable
from functools import partial
from operator import methodcaller
from types import FrameType
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

TRIES = 100  # of an undo, before it is given up: what comes from outside while it runs is no failure of its own
SIGNALS = sorted(int(signum) for signum in signal.valid_signals())


class Rollback:
    """The undo list of one step, and the hold on signals outside of the calls that may be interrupted.

    An undo is registered before the change that it undoes, may run whether or not the change was made, and may run
    twice. Use ``rollback.run(work)``, where ``work`` calls ``undo_by`` and ``interruptible``.

    Exceptions can come at any instant: from a handler of a signal, which is held back where it cannot be let through,
    or from another thread (``PyThreadState_SetAsyncExc``), which cannot. CPython lets them in where a Python function
    begins, after a call of a C function, and where a loop turns; so also in the rollback itself, which is called until
    it has come to its end.
    """

    def __init__(self) -> None:
        self._undos: list[Callable[[], object]] = []
        self._tries = 0  # of the last undo in the list
        self._failures: list[BaseException] = []  # of undos that were given up
        self._handlers: dict[int, Callable[[int, FrameType | None], object]] = {}
        self._holding = True
        self._closed = False
        self._held: list[int] = []

    def run(self, work: Callable[[], R]) -> R:
        """Call ``work``; if anything is raised in it, undo what it has registered, and raise that.

        What cannot be undone is noted on the error.
        """
        try:
            self._open()
            result = work()
            self._close()
            # Undos hold what they undo, in cycles with the step, and backups would outlive it. They are dropped in the
            # line that returns: an exception between two would find a step that failed and can no longer be undone.
            forget: Callable[[], object] = self._undos.clear
            return (result, forget())[0]
        except BaseException as error:
            # A try for each exception that may come where a function begins, before any try of its own.
            try:
                self._roll_back(error)
            except BaseException:
                try:
                    self._roll_back(error)
                except BaseException:
                    self._roll_back(error)
                    raise error from None
                raise error from None
            raise

    def undo_by(self, undo: Callable[[], object]) -> None:
        """Call ``undo`` if the step fails. It must do no harm when it runs twice, or when there is nothing to undo."""
        self._undos.append(undo)

    def interruptible(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function with signals let through. Only what may run long is called so; all else is short."""
        self._holding = False
        while self._held:
            self._deliver(self._held.pop(), None)
        try:
            return function(*args, **kwargs)
        finally:
            self._holding = True

    def _open(self) -> None:
        """Stand before the Python handlers of signals; elsewhere than in the main thread they never run."""
        self._undos.append(modes())
        if threading.current_thread() is not threading.main_thread():
            return
        for signum in SIGNALS:
            handler = _signal.getsignal(signum)
            if callable(handler):  # not SIG_DFL or SIG_IGN: those raise nothing in Python
                self._handlers[signum] = handler
                signal.signal(signum, self._handle)

    def _close(self) -> None:
        """Give the handlers back, and deliver what was held."""
        for signum, handler in self._handlers.items():
            if _signal.getsignal(signum) == self._handle:
                signal.signal(signum, handler)
        self._closed = True
        while self._held:
            signal.raise_signal(self._held.pop())

    def _roll_back(self, error: BaseException) -> None:
        """Undo everything, the last change first, whatever is raised meanwhile; calling it again goes on with it."""
        self._holding = True
        while self._undos:
            try:
                self._undos[-1]()
                self._drop_last()  # after it has run to its end: what is raised inside it has it run again
            except BaseException as failure:
                self._tries += 1
                if self._tries >= TRIES:
                    self._failures.append(failure)
                    self._drop_last()
        while self._failures:
            note(error, f"esam_kernels could not undo all of the step: {self._failures[-1]!r}")
            self._failures.pop()
        self._close()

    def _drop_last(self) -> None:
        self._tries = 0
        self._undos.pop()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        # Closed where a handler that was set during the step goes on to call this one, which it found.
        if self._holding and not self._closed:
            self._held.append(signum)
        else:
            self._deliver(signum, frame)

    def _deliver(self, signum: int, frame: FrameType | None) -> None:
        self._holding = True  # what the handler raises leads to a rollback, which a second Ctrl-C must not interrupt
        self._handlers[signum](signum, frame)
        self._holding = False


def modes() -> Callable[[], None]:
    """Keep the thread's modes that passes switch; the function that is returned switches them back.

    A decorator or ``with`` block leaves its mode switched where an exception comes right before or after it.
    """
    calls: list[Callable[[], object]] = [partial(torch.set_grad_enabled, torch.is_grad_enabled())]
    for device in dict.fromkeys(("cpu", torch._C._get_accelerator().type)):
        calls.append(partial(torch.set_autocast_enabled, device, torch.is_autocast_enabled(device)))
        calls.append(partial(torch.set_autocast_dtype, device, torch.get_autocast_dtype(device)))
    calls.append(partial(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled()))
    nesting = _autocast_nesting()

    def put_back() -> None:
        for call in calls:
            call()
        for _ in range(
            _autocast_nesting() - nesting
        ):  # too deep, no exit would clear the cache of low-precision weights
            torch.autocast_decrement_nesting()

    return put_back


def _autocast_nesting() -> int:
    # In one call of a C function, so that no exception comes between the two.
    calls = (torch.autocast_increment_nesting, torch.autocast_decrement_nesting)
    return list(map(methodcaller("__call__"), calls))[-1]


def note(error: BaseException, text: str) -> None:
    """Add a note to an exception, where this Python has them."""
    add_note: Any = getattr(error, "add_note", None)  # from Python 3.11 on
    if add_note is not None:
        add_note(text)
