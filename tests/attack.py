"""The fault campaign: an exception lands at any instant of a step, and nothing may be lost.

``python tests/attack.py --minutes 10 --output build/attack.json`` (``make attack``) runs it in full;
``tests/optimizer/test_fault_campaign.py`` runs the same cells with a few tries each.

A cell is a way to land, a backend, a configuration and a phase of a step. In each try a subject and its twin, equal
bit for bit, come to the phase; the subject runs it under fire, the twin undisturbed. What is the subject's must then be
as before the phase, which is run again, or as the twin's after it; and both end the step with the same bits.
"""

import argparse
import copy
import ctypes
import dis
import gc
import json
import os
import pathlib
import random
import signal
import sys
import threading
import time
from _thread import start_new_thread
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cache
from math import gcd
from types import CodeType, FrameType
from typing import Any
from zlib import crc32

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: its kernels run in its interpreter

import numpy as np
from networks import cross_entropy, random_state, same
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import esam_kernels
from esam_kernels import ESAM, batch_closure, ops

PACKAGE = str(pathlib.Path(esam_kernels.__file__).parent)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGUSR1)


class Fault(BaseException):
    """What lands. No Exception, so that nothing on the way takes it for an error of its own and goes on."""


# What is under fire: configurations, and the phases of their steps.


class Jitter(nn.Module):
    """An augmentation that draws from Python's and NumPy's generators."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + 0.1 * random.random()) + 0.1 * np.random.rand()  # noqa: NPY002


def network() -> nn.Module:
    """Everything that a step could disturb: batch statistics, power iterations, all generators."""
    return nn.Sequential(
        Jitter(),
        nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8)),
        nn.BatchNorm1d(8),
        nn.Dropout(0.3),
        nn.Linear(8, 3),
    )


@dataclass(frozen=True)
class Configuration:
    """How a subject is trained; one more row of the table below is all that a new option of ESAM needs."""

    options: dict[str, Any] = field(default_factory=dict)
    micro_batches: int = 1
    groups: Sequence[dict[str, Any]] = ({},)  # options of parameter groups, over which the layers are dealt out
    dtype: torch.dtype = torch.float32
    autocast: bool = False  # whether the step is taken inside an autocast
    halves: bool = False  # first_step() and second_step() instead of backward()


CONFIGURATIONS = {
    "default": Configuration(),
    "gamma=1": Configuration({"gamma": 1.0}),
    "by element": Configuration({"granularity": "element"}),
    "bf16 weights": Configuration({"granularity": "element"}, dtype=torch.bfloat16),
    "micro-batches": Configuration(micro_batches=2),
    # Two rows of each micro-batch are selected at least, which batch statistics need.
    "over all": Configuration({"select_over": "all", "beta": 1.0, "gamma": 0.75}, micro_batches=3),
    "groups": Configuration(groups=({"adaptive": True, "rho": 0.5}, {"adaptive": False})),
    "steering": Configuration({"steering_dtype": torch.bfloat16}),
    "autocast": Configuration(autocast=True),
    "interval": Configuration({"interval": 2}),
    "halves": Configuration({"gamma": 1.0}, halves=True),
}


class Subject:
    """A model and its optimizer; two with the same seed take the same steps."""

    def __init__(self, configuration: Configuration) -> None:
        torch.manual_seed(0)
        self.configuration = configuration
        self.model = network().to(configuration.dtype)
        groups = [{"params": [], **group} for group in configuration.groups]
        for i, param in enumerate(self.model.parameters()):
            groups[i % len(groups)]["params"].append(param)
        self.optimizer = ESAM(groups, torch.optim.SGD, lr=0.01, momentum=0.9, **{"rho": 0.1, **configuration.options})
        size = 8 * configuration.micro_batches
        inputs, targets = torch.randn(size, 6, dtype=configuration.dtype), torch.randint(3, (size,))
        self.batches = list(zip(inputs.split(8), targets.split(8)))
        self.closures = [batch_closure(self.model, cross_entropy, x, y) for x, y in self.batches]

    def backward(self) -> None:
        self.optimizer.backward(self.closures)

    def gradient(self) -> None:
        """A user's own backward, for the halves of a step."""
        self.optimizer.base.zero_grad()  # ESAM's would also do, before first_step() alone
        for inputs, targets in self.batches:
            cross_entropy(self.model(inputs), targets).mean().backward()

    def state(self) -> dict[str, Any]:
        """Copies of all that a fault may not touch, under the names of the report's columns."""
        kept = {
            "weights": dict(self.model.named_parameters()),
            "buffers": dict(self.model.named_buffers()),
            "gradients": {name: param.grad for name, param in self.model.named_parameters()},
        }
        return {
            **{column: {key: _copy(tensor) for key, tensor in tensors.items()} for column, tensors in kept.items()},
            "optimizer": copy.deepcopy(self.optimizer.base.state_dict()),  # ESAM's refuses during a step
            "random": random_state(),
        }

    def become(self, other: "Subject") -> None:
        """Take over the other's weights, buffers, optimizer state and no gradients."""
        self.model.load_state_dict(other.model.state_dict())
        self.optimizer.load_state_dict(copy.deepcopy(other.optimizer.state_dict()))
        self.optimizer.zero_grad()


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """The columns in which two states differ in any bit."""
    return [column for column in a if not _equal(a[column], b[column])]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and same([a], [b])
    return type(a) is type(b) and bool(a == b)


Act = Callable[[Subject], object]


def _nothing(subject: Subject) -> None:
    pass


@dataclass(frozen=True)
class Phase:
    """A part of a step that is under fire, with what comes before and after it in the step."""

    prepare: Act
    act: Act
    finish: Act
    # Which ways find it done whole or not at all. A base optimizer's own step is so for Ctrl-C and SIGTERM alone, which
    # wait for it: anything else may leave it between two weights, as it does without ESAM.
    whole: Callable[[str], bool] = lambda way: True
    may_be_done: bool = False  # after a fault it may be found done, and refuses to be done again then


def _held(way: str) -> bool:
    return way == "Ctrl-C"


def _gradient_and_first_step(subject: Subject) -> None:
    subject.gradient()
    subject.optimizer.first_step()


def _to_second_step(subject: Subject) -> None:
    _gradient_and_first_step(subject)
    subject.gradient()


def _second_half(subject: Subject) -> None:
    subject.gradient()
    subject.optimizer.second_step()


PHASES = {
    "backward": Phase(lambda s: s.optimizer.zero_grad(), Subject.backward, lambda s: s.optimizer.step()),
    "step": Phase(Subject.backward, lambda s: s.optimizer.step(), _nothing, whole=_held),
}
HALVES = {
    "first_step": Phase(Subject.gradient, lambda s: s.optimizer.first_step(), _second_half),
    "restore": Phase(
        _gradient_and_first_step, lambda s: s.optimizer.restore(), lambda s: s.optimizer.step(), may_be_done=True
    ),
    "second_step": Phase(_to_second_step, lambda s: s.optimizer.second_step(), _nothing, whole=lambda way: False),
}


# How an exception lands.


class Way:
    """One way to land: ``rehearse`` learns how long a phase is, ``strike`` runs it under fire."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.first = self.random.randrange(10**6)  # so that short cells do not all begin at the same place

    def rehearse(self, act: Callable[[], object]) -> None:
        raise NotImplementedError

    def strike(self, number: int, act: Callable[[], object]) -> object:
        """Run ``act``; try ``number`` of a cell chooses the instant. What lands is what this raises."""
        raise NotImplementedError


def spread(number: int, size: int) -> int:
    """Of 1, ..., size each once in ``size`` numbers, and at any time evenly: thinned, if there are fewer numbers."""
    stride = max(1, round(size * 0.618))
    while gcd(stride, size) > 1:
        stride += 1
    return 1 + number * stride % size


class Counted(Way):
    """At the n-th event of a kind, and in every second try again at the m-th after it, which is in the rollback."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.left: list[int] = []
        self.seen = 0
        self.size = 1
        self.size_after = 1

    def event(self) -> None:
        self.seen += 1
        if self.left:
            self.left[0] -= 1
            if self.left[0] <= 0:
                del self.left[0]
                self.seen = 0
                raise Fault

    def rehearse(self, act: Callable[[], object]) -> None:
        self.left, self.seen = [], 0
        self.watch(act)
        self.size = max(1, self.seen)

    def strike(self, number: int, act: Callable[[], object]) -> None:
        self.left, self.seen = [spread(self.first + number // 2, self.size)], 0
        if number % 2:
            self.left.append(self.random.randint(1, self.size_after))
        twice = len(self.left)
        try:
            self.watch(act)
        finally:
            if twice == 1 and not self.left:
                self.size_after = max(1, self.seen)  # of the rollback of one fault

    def watch(self, act: Callable[[], object]) -> None:
        """Run ``act`` and call ``event`` at every event."""
        raise NotImplementedError


class AtOperators(Counted):
    """Before and after every call of every operator, in the backends."""

    def watch(self, act: Callable[[], object]) -> None:
        patched = [
            (backend, name, getattr(backend, name))
            for backend in ops._backends.values()
            for name in ("squared_norm", "perturb_", "restore_", "select_top")
            if hasattr(backend, name)
        ]
        try:
            for backend, name, operator in patched:
                setattr(backend, name, self._around(operator))
            act()
        finally:
            for backend, name, operator in patched:
                setattr(backend, name, operator)

    def _around(self, operator: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.event()
            result = operator(*args, **kwargs)
            self.event()
            return result

        return call


class AtTorchFunctions(Counted):
    """Before and after every torch function that is called from Python."""

    def watch(self, act: Callable[[], object]) -> None:
        event = self.event

        class Mode(TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                event()
                result = func(*args, **(kwargs or {}))
                event()
                return result

        with Mode():
            act()


class AtTorchOperators(Counted):
    """Before and after every operator that torch dispatches, in backward passes too."""

    def watch(self, act: Callable[[], object]) -> None:
        event = self.event

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                event()
                result = func(*args, **(kwargs or {}))
                event()
                return result

        with Mode():
            act()


class AtOpcodes(Way):
    """Before every opcode of the package: more instants than an interpreter ever interrupts at."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.size = 1

    def rehearse(self, act: Callable[[], object]) -> None:
        seen = 0

        def count(frame: FrameType) -> None:
            nonlocal seen
            seen += 1

        trace_opcodes(count, act)
        self.size = seen

    def strike(self, number: int, act: Callable[[], object]) -> None:
        left = spread(self.first + number, self.size)

        def fire(frame: FrameType) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise Fault

        trace_opcodes(fire, act)


def trace_opcodes(event: Callable[[FrameType], None], act: Callable[[], object]) -> None:
    """Run, and call ``event`` before every opcode of the package."""

    def trace(frame: FrameType, kind: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if kind == "call":
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
        elif kind == "opcode":
            event(frame)
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        act()
    finally:
        sys.settrace(previous)


class AtInstants(Way):
    """Where CPython looks for signals and asynchronous exceptions, in all code that runs, torch's and the model's too.

    These are the entry of a Python function, the return of a C function, whose result is lost, and the head of a loop
    (of the package here). Of two tries the second strikes again, somewhere in what follows, which is the rollback; of
    four the last strikes a third time. A hook is gone once it has raised, and each puts the other one back.
    """

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.size = self.size_after = 1

    def rehearse(self, act: Callable[[], object]) -> None:
        self.size = self._run(act, [])

    def strike(self, number: int, act: Callable[[], object]) -> None:
        gaps = [spread(self.first + number // 2, self.size)]
        if number % 2:
            gaps.append(self.random.randint(1, self.size_after))
        if number % 4 == 3:
            gaps.append(self.random.randint(1, max(1, self.size_after // 4)))
        self._run(act, gaps)

    def _run(self, act: Callable[[], object], gaps: list[int]) -> int:
        seen, once = 0, len(gaps) == 1
        lasts: dict[FrameType, int] = {}

        def event() -> None:
            nonlocal seen
            seen += 1
            if gaps:
                gaps[0] -= 1
                if gaps[0] <= 0:
                    del gaps[0]
                    seen = 0
                    raise Fault

        def profile(frame: FrameType, kind: str, _: Any) -> None:
            if sys.gettrace() is not trace:
                self._trace(frame, trace)
            if kind in ("call", "c_return"):
                event()

        def trace(frame: FrameType, kind: str, _: Any) -> Any:
            if not frame.f_code.co_filename.startswith(PACKAGE):
                return None
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
            if kind == "opcode":
                if sys.getprofile() is not profile:
                    sys.setprofile(profile)
                last, lasts[frame] = lasts.get(frame, 0), frame.f_lasti
                if frame.f_lasti < last and frame.f_lasti in loop_heads(frame.f_code):
                    event()
            return trace

        previous = sys.gettrace()
        try:
            sys.settrace(trace)
            sys.setprofile(profile)
            act()
        finally:
            sys.setprofile(None)
            sys.settrace(previous)
            lasts.clear()
            if once and not gaps:
                self.size_after = max(1, seen)
        return seen

    @staticmethod
    def _trace(frame: FrameType | None, trace: Any) -> None:
        sys.settrace(trace)
        while frame is not None:
            if frame.f_code.co_filename.startswith(PACKAGE):
                frame.f_trace, frame.f_trace_opcodes, frame.f_trace_lines = trace, True, False
            frame = frame.f_back


@cache
def loop_heads(code: CodeType) -> frozenset[int]:
    return frozenset(int(op.argval) for op in dis.get_instructions(code) if "JUMP_BACKWARD" in op.opname)


class Timed(Way):
    """At a random time of the phase, and up to three times more shortly after it."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.durations: list[float] = []
        self.reach = 1.0  # the share of the phase that is aimed at: what is armed late strikes after it
        self.armed = False

    def rehearse(self, act: Callable[[], object]) -> None:
        began = time.perf_counter()
        act()
        self.durations = [*self.durations[-8:], time.perf_counter() - began]

    def delays(self) -> list[float]:
        """The time to the first exception, and from each to the next one."""
        again = self.random.choice((0, 0, 1, 3))
        first = self.random.uniform(0, self.reach * min(self.durations))
        return [
            max(first, 1e-6),
            *(self.random.choice((2e-6, 2e-5, 2e-4)) * self.random.random() for _ in range(again)),
        ]

    def strike(self, number: int, act: Callable[[], object]) -> None:
        landed: Fault | None = None
        try:
            try:
                self.arm(self.delays())
                act()
            except Fault as fault:
                landed = fault
            self.armed = False  # no call since the last thing that could be hit, nor before the next ``try``
        except Fault as fault:
            landed = fault
        self.armed = False
        # What still lands, lands here: of at most four, one is survived at each level.
        try:
            self.disarm()
        except Fault:
            try:
                self.disarm()
            except Fault:
                try:
                    self.disarm()
                except Fault:
                    try:
                        self.disarm()
                    except Fault:
                        self.disarm()
        if landed is not None:
            self.reach = min(1.0, 1.02 * self.reach)
            raise landed
        self.reach *= 0.9  # so that five in six land

    def arm(self, delays: list[float]) -> None:
        raise NotImplementedError

    def disarm(self) -> None:
        raise NotImplementedError


class Alarm(Timed):
    """SIGALRM with a handler that raises, as timeouts do: the kernel's own timing."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.left: list[float] = []

    def handle(self, *_: object) -> None:
        if self.armed and self.left:
            del self.left[0]
            if self.left:
                signal.setitimer(signal.ITIMER_REAL, max(self.left[0], 1e-6))
            raise Fault

    def arm(self, delays: list[float]) -> None:
        self.left, self.armed = delays, True
        signal.signal(signal.SIGALRM, self.handle)
        signal.setitimer(signal.ITIMER_REAL, delays[0])

    def disarm(self) -> None:
        self.left = []
        signal.setitimer(signal.ITIMER_REAL, 0)


class FromThread(Timed):
    """Something that another thread does to the main one."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.stop: list[bool] = [True]
        self.ended: list[bool] = [True]

    def arm(self, delays: list[float]) -> None:
        sys.setswitchinterval(1e-5)
        self.stop, self.ended = [], []
        start_new_thread(self._attack, (delays, self.stop, self.ended, self.weapon()))

    def disarm(self) -> None:
        self.stop.append(True)
        while not self.ended:
            time.sleep(1e-5)
        self.clear()
        sys.setswitchinterval(0.005)

    @staticmethod
    def _attack(delays: list[float], stop: list[bool], ended: list[bool], weapon: Callable[[], object]) -> None:
        for delay in delays:
            time.sleep(delay)
            if stop:
                break
            weapon()
        ended.append(True)

    def weapon(self) -> Callable[[], object]:
        raise NotImplementedError

    def clear(self) -> None:
        """Let what is pending land."""
        for _ in range(3):
            time.sleep(0)


class AsyncException(FromThread):
    """``PyThreadState_SetAsyncExc``, as notebooks and thread pools use it."""

    def weapon(self) -> Callable[[], object]:
        ident = ctypes.c_ulong(threading.get_ident())
        return lambda: ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(Fault))


class OtherSignal(FromThread):
    """A signal that has a handler which raises."""

    signals: tuple[signal.Signals, ...] = (signal.SIGUSR1, signal.SIGALRM)

    def handle(self, *_: object) -> None:
        if self.armed:
            raise Fault

    def weapon(self) -> Callable[[], object]:
        number, ident = self.random.choice(self.signals), threading.get_ident()
        for each in self.signals:
            signal.signal(each, self.handle)
        self.armed = True
        return lambda: signal.pthread_kill(ident, number)


class CtrlC(OtherSignal):
    """SIGINT and SIGTERM, which a step holds back outside of the calls that may be interrupted."""

    signals = (signal.SIGINT, signal.SIGTERM)


WAYS: dict[str, type[Way]] = {
    "alarm": Alarm,
    "signal": OtherSignal,
    "Ctrl-C": CtrlC,
    "thread": AsyncException,
    "opcode": AtOpcodes,
    "instant": AtInstants,
    "operator": AtOperators,
    "torch function": AtTorchFunctions,
    "torch operator": AtTorchOperators,
}


# What is counted.

WARM_UP = 20  # tries after which what is made only once has been made, and what becomes more is a leak
LOSSES = ("weights", "buffers", "gradients", "optimizer", "random")
COLUMNS = (*LOSSES, "modes", "handlers", "swallowed", "next", "leak")


def modes() -> dict[str, Any]:
    """All that torch switches for a thread."""
    depth = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "autocast dtype": torch.get_autocast_dtype("cpu"),
        "autocast cache": torch.is_autocast_cache_enabled(),
        "autocast depth": depth,
        "function modes": torch._C._len_torch_function_stack(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
    }


def put_back_modes(kept: dict[str, Any]) -> None:
    torch._C._set_grad_enabled(kept["grad"])
    torch.set_autocast_enabled("cpu", kept["autocast"])
    torch.set_autocast_dtype("cpu", kept["autocast dtype"])
    torch.set_autocast_cache_enabled(kept["autocast cache"])
    while torch.autocast_increment_nesting() > kept["autocast depth"] + 1:
        torch.autocast_decrement_nesting()
        torch.autocast_decrement_nesting()
    while torch.autocast_decrement_nesting() < kept["autocast depth"]:
        torch.autocast_increment_nesting()
        torch.autocast_increment_nesting()
    torch.clear_autocast_cache()


def handlers() -> dict[int, Any]:
    return {number: signal.getsignal(number) for number in SIGNALS}


def live() -> tuple[int, int]:
    """How many tensors there are, and how many objects."""
    gc.collect()
    objects = gc.get_objects()
    return sum(issubclass(type(each), Tensor) for each in objects), len(objects)


@dataclass(frozen=True)
class Cell:
    way: str
    backend: str
    configuration: str
    phase: str

    def __str__(self) -> str:
        return f"{self.way}, {self.backend}, {self.configuration}, {self.phase}"


def cells() -> list[Cell]:
    """What the campaign goes through; the Triton interpreter takes a second for what others do in a millisecond."""
    found = []
    for way in WAYS:
        for name, configuration in CONFIGURATIONS.items():
            phases = tuple(HALVES) if configuration.halves else ("backward", "step")
            for phase in phases:
                # The base optimizer's step calls no operator, and one configuration is like another to it.
                if phase != "step" or (name == "default" and way != "operator"):
                    found.append(Cell(way, "native", name, phase))
        found += [Cell(way, "reference", name, "backward") for name in ("default", "bf16 weights", "groups")]
        if way in ("alarm", "thread", "instant", "operator"):
            found.append(Cell(way, "triton", "default", "backward"))
    return found


def from_a_step(error: BaseException | None) -> bool:
    """Whether an exception landed in the package's code, or in what it called."""
    while error is not None:
        trace = error.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code.co_filename.startswith(PACKAGE):
                return True
            trace = trace.tb_next
        error = error.__context__
    return False


@dataclass(frozen=True)
class Result:
    """What a cell came to."""

    cell: Cell
    # Tries, landed, lost, what was lost, and where a way counts them the places of the phase that it can land at.
    counts: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)  # the first ones: what was lost, and where the faults landed


class Siege:
    """A cell under fire."""

    def __init__(self, cell: Cell, seed: int = 0) -> None:
        self.cell = cell
        self.result = Result(cell)
        self.counts, self.examples = self.result.counts, self.result.examples
        self._configuration = CONFIGURATIONS[cell.configuration]
        self._phase = {**PHASES, **HALVES}[cell.phase]
        self._way = WAYS[cell.way](seed + crc32(str(cell).encode()))
        self._subject, self._twin = Subject(self._configuration), Subject(self._configuration)
        self._live: tuple[int, int] | None = None
        self._landed_at_live = 0

    def run(self, tries: int, seconds: float = 1e9) -> None:
        """Strike until ``tries`` have been made or ``seconds`` are over."""
        end = time.monotonic() + seconds
        outer = torch.autocast("cpu", torch.bfloat16) if self._configuration.autocast else nullcontext()
        with ops.use_backend(self.cell.backend), outer, _quiet_destructors():
            ops.explain(torch.zeros(1))  # which imports the backend: what is patched must be there
            for number in range(tries):
                if time.monotonic() > end:
                    break
                self._try(number)
                if number == WARM_UP:
                    self._live, self._landed_at_live = live(), self.counts["landed"]
        self.counts["places"] = getattr(self._way, "size", 0)
        self._look_for_leaks()

    def _try(self, number: int) -> None:
        seed, subject, twin, phase = number, self._subject, self._twin, self._phase
        self._seed(seed)
        phase.prepare(twin)
        rehearse = self._way.rehearse if number == 0 or isinstance(self._way, Timed) else lambda act: act()
        rehearse(lambda: phase.act(twin))
        after = twin.state()

        self._seed(seed)
        phase.prepare(subject)
        before = subject.state()
        kept_modes, kept_handlers = modes(), handlers()
        bad: list[str] = []
        error = self._strike(number, lambda: phase.act(subject), bad, kept_handlers)
        landed = error is not None and from_a_step(error)
        why = "" if error is None else where(error)
        error = None  # which holds the step's frames, and they its tensors
        self.counts["tries"] += 1
        self.counts["landed"] += landed
        bad += self._check_surroundings(kept_modes, kept_handlers)
        done = False
        if phase.whole(self.cell.way):
            now = subject.state()
            lost = differences(now, before)
            done = bool(lost) and not differences(now, after)
            if done:
                lost = []
            bad += lost
            if not why and not done and not lost:
                bad.append("swallowed")
            if not bad:
                self._go_on(subject, done, after, bad)
        self._seed(seed + 1)
        phase.finish(twin)
        if not bad and phase.whole(self.cell.way):
            self._seed(seed + 1)
            self._finish(subject, bad)
        if bad:
            self.examples.append(f"{' '.join(bad)}: {why or 'nothing was raised'}")
            del self.examples[10:]
            self.counts["lost"] += 1
            self.counts.update(set(bad))
        if bad or not phase.whole(self.cell.way):
            self._replace(subject, bad)

    @staticmethod
    def _seed(seed: int) -> None:
        torch.default_generator.manual_seed(seed)  # torch.manual_seed keeps each of its calls for CUDA, for ever
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002

    def _strike(
        self, number: int, act: Callable[[], object], bad: list[str], kept_handlers: dict[int, Any]
    ) -> Fault | None:
        try:
            self._way.strike(number, act)
        except Fault as fault:
            return fault
        except Exception as error:
            bad.append("swallowed")  # the fault is not what came out
            self.examples.append(repr(error))
        finally:
            # A way installs its own handlers before the step: those are what must be there after it.
            expected = self._way.handle if isinstance(self._way, Alarm | OtherSignal) else None
            if expected is not None:
                mine = (signal.SIGALRM,) if isinstance(self._way, Alarm) else self._way.signals
                kept_handlers.update(dict.fromkeys(mine, expected))
        return None

    def _check_surroundings(self, kept_modes: dict[str, Any], kept_handlers: dict[int, Any]) -> list[str]:
        bad = []
        if modes() != kept_modes:
            bad.append("modes")
            put_back_modes(kept_modes)
        if handlers() != kept_handlers:
            bad.append("handlers")
            for number, handler in kept_handlers.items():
                signal.signal(number, handler)
        return bad

    def _go_on(self, subject: Subject, done: bool, after: dict[str, Any], bad: list[str]) -> None:
        """Run the phase again if it has not been done: it must work, and give the same bits."""
        try:
            if not done:
                self._phase.act(subject)
            elif self._phase.may_be_done:
                with suppress(RuntimeError):  # it was
                    self._phase.act(subject)
        except Exception as error:
            bad.append("next")
            self.examples.append(f"the next try: {error!r}")
        else:
            if differences(subject.state(), after):
                bad.append("next")

    def _finish(self, subject: Subject, bad: list[str]) -> None:
        try:
            self._phase.finish(subject)
        except Exception as error:
            bad.append("next")
            self.examples.append(f"the rest of the step: {error!r}")
            return
        mine, other = subject.state(), self._twin.state()
        if differences(mine, other):
            bad.append("next")

    def _replace(self, subject: Subject, bad: list[str]) -> None:
        """Start anew from the twin; where nothing was lost, with the subject, which must be able to go on."""
        try:
            if bad:
                raise RuntimeError
            if self._configuration.halves:
                with suppress(RuntimeError):  # there may be nothing to restore
                    subject.optimizer.restore()
            subject.become(self._twin)
        except RuntimeError as error:
            if not bad:
                self.counts.update(("next", "lost"))
                self.examples.append(f"cannot go on: {error!r}")
            self._subject = Subject(self._configuration)
            self._subject.become(self._twin)
        self._twin.optimizer.zero_grad()

    def _look_for_leaks(self) -> None:
        """Whether tensors or objects have become more with each fault, or nearly so."""
        landed = self.counts["landed"] - self._landed_at_live
        if self._live is None or landed < 20:
            return
        tensors, objects = (now - then for now, then in zip(live(), self._live))
        if tensors > landed / 4 or objects > landed / 2 + 200:  # caches grow by a few at any time
            self.counts["leak"] += 1
            self.examples.append(f"after {landed} faults there are {tensors} more tensors, {objects} more objects")


def where(error: BaseException) -> str:
    """The places of an exception and of those during whose handling it landed, the first one first."""
    places: list[str] = []
    seen: BaseException | None = error
    while seen is not None:
        trace, place = seen.__traceback__, "outside"
        while trace is not None:
            code = trace.tb_frame.f_code
            if code.co_filename.startswith(PACKAGE):
                place = f"{pathlib.Path(code.co_filename).name}:{trace.tb_lineno} {code.co_name}"
            trace = trace.tb_next
        places.append(place)
        seen = seen.__context__
    notes = getattr(error, "__notes__", [])
    return "; ".join([", then ".join(reversed(places)), *notes])


@contextmanager
def _quiet_destructors() -> Iterator[None]:
    """A fault that lands in a destructor is ignored by the interpreter, and need not be printed."""
    previous = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if not issubclass(unraisable.exc_type, Fault):
            previous(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = previous


@contextmanager
def _handlers_put_back() -> Iterator[None]:
    kept = handlers()
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def besiege(cell: Cell, tries: int, seconds: float = 1e9, seed: int = 0) -> Result:
    """Run one cell, for so many tries or seconds."""
    siege = Siege(cell, seed)
    with _handlers_put_back():
        siege.run(tries, seconds)
    return siege.result


# The long form.


def table(results: Sequence[Result], key: Callable[[Cell], str], title: str) -> str:
    rows: dict[str, Counter[str]] = {}
    for result in results:
        rows.setdefault(key(result.cell), Counter()).update(result.counts)
        rows.setdefault("all", Counter()).update(result.counts)
    rows["all"] = rows.pop("all")
    names = ("tries", "landed", "lost", *COLUMNS)
    width = max(map(len, (*rows, title)))
    lines = ["  ".join([title.ljust(width), *(name.rjust(9) for name in names)])]
    lines += [
        "  ".join([row.ljust(width), *(str(counts[name]).rjust(9) for name in names)]) for row, counts in rows.items()
    ]
    return "\n".join(lines)


def resident() -> float:
    """Megabytes of memory in use."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description="Let exceptions land at any instant of a step.")
    parser.add_argument("--minutes", type=float, default=10, help="how long, over all cells (default: %(default)s)")
    parser.add_argument("--output", type=pathlib.Path, help="write all counts as JSON")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [cell for cell in cells() if cell.way in options.ways]
    end = time.monotonic() + 60 * options.minutes
    results: list[Result] = []
    memory: list[float] = []
    for i, cell in enumerate(chosen):
        results.append(besiege(cell, 10**9, (end - time.monotonic()) / (len(chosen) - i), options.seed))
        memory.append(resident())
        counts = results[-1].counts
        print(
            f"{cell}: {counts['landed']} landed, {counts['lost']} lost",
            *results[-1].examples[:3],
            sep="\n    ",
            flush=True,
        )
    print("", table(results, lambda cell: cell.way, "way"), "", sep="\n")
    print(table(results, lambda cell: f"{cell.backend}, {cell.configuration}, {cell.phase}", "configuration"))
    grown = memory[-1] - memory[len(memory) // 4]  # by then everything has been imported
    print(f"\nmemory: {memory[-1]:.0f} MB, {grown:+.1f} MB since the first quarter")
    total = sum((result.counts for result in results), Counter())
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        report = {
            "torch": torch.__version__,
            "python": sys.version.split()[0],
            "seed": options.seed,
            "total": {name: total[name] for name in ("tries", "landed", "lost", *COLUMNS)},
            "memory_megabytes": memory,
            "cells": [{**vars(result.cell), **result.counts, "examples": result.examples} for result in results],
        }
        options.output.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if total["lost"] or total["leak"] or grown > 50 else 0


if __name__ == "__main__":
    sys.exit(main())
