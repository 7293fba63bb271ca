"""Whatever is raised inside a step, and wherever, everything is as before the step and the next one works."""

import copy
import pathlib
import random
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import torch
from ranks import needs_fsdp2
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import esam_kernels
from esam_kernels import ESAM, batch_closure

PACKAGE = str(pathlib.Path(esam_kernels.__file__).parent)
Line = tuple[str, int]


class PlantedError(Exception):
    """The exception that the tests plant."""


class Setup:
    """A small network with everything that a step could disturb, and an optimizer on it."""

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        scaler: bool = False,
        sharded: bool = False,
        ordinary: bool = False,
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8)),
            nn.BatchNorm1d(8),
            nn.Dropout(0.3),
            nn.Linear(8, 3),
        ).to(dtype)
        if sharded:
            fully_shard(self.model[3])
            fully_shard(self.model)
        inputs, targets = torch.randn(16, 6, dtype=dtype), torch.randint(3, (16,))
        self.scaler = torch.amp.GradScaler("cpu") if scaler else None
        self.optimizer = ESAM(
            self.model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, **{"gamma": 0.75, **options}
        )
        self.ordinary = ordinary
        self.before_call: Callable[[], None] = lambda: None
        self.closures = [self.closure(inputs[:9], targets[:9]), self.closure(inputs[9:], targets[9:])]
        self.step()  # so that momentum buffers exist

    def closure(self, inputs: Tensor, targets: Tensor) -> Callable[[Tensor | None], Tensor]:
        batch = batch_closure(self.model, nn.CrossEntropyLoss(reduction="none"), inputs, targets)

        def closure(index: Tensor | None) -> Tensor:
            self.before_call()
            return batch(index)

        closure.model = self.model  # type: ignore[attr-defined]
        return closure

    def all_in_one(self) -> None:
        """torch.optim's closure."""
        self.optimizer.zero_grad()
        sum(closure(None).mean() for closure in self.closures).backward()

    def backward(self) -> Tensor:
        if self.ordinary:
            return self.optimizer._run_ordinary(self.all_in_one)
        return self.optimizer.backward(self.closures, self.scaler)

    def step(self) -> None:
        self.backward()
        self.optimizer.step()

    def snapshot(self) -> list[Any]:
        """All that must be as before: weights, buffers, base state, generators, modes, handlers, settings."""
        return copy.deepcopy(
            [
                *self.model.state_dict().items(),
                *([p.requires_grad, p.grad] for p in self.model.parameters()),
                self.optimizer.base.state_dict(),
                *(sorted(vars(module)) for module in self.model.modules()),
                torch.get_rng_state(),
                random.getstate(),
                [torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), self.optimizer._progress.phase],
                [id(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)],
            ]
        )


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    else:
        assert a == b


SETUPS = {
    "esam": {},
    "steering": {"steering_dtype": torch.bfloat16},
    "elements of bf16": {"dtype": torch.bfloat16, "granularity": "element"},
    "adaptive, over all, with a scaler": {"adaptive": True, "select_over": "all", "scaler": True},
    "random": {"selection": "random"},
    "base step": {"interval": 3},
    "momentum": {"ascent": "momentum", "gamma": 1.0},
    "momentum, with a selection": {"ascent": "momentum", "adaptive": True},
    "previous": {"ascent": "previous", "scaler": True, "gamma": 1.0},
    "previous, with a selection": {"ascent": "previous", "selection": "loss", "granularity": "element"},
    "a share": {"ascent_share": 0.5},
    "before start": {"start": 3, "ascent": "momentum"},
    "an ordinary closure": {"ordinary": True, "gamma": 1.0},
    "an ordinary closure, momentum": {"ordinary": True, "gamma": 1.0, "ascent": "momentum"},
}


def stride_of(name: str) -> int:
    """Every line of one setup, every second of those of another kind, every seventh where most lines are shared."""
    return {"esam": 1, "base step": 1, "momentum, with a selection": 2, "an ordinary closure": 2}.get(name, 7)


def at_lines(act: Callable[[Line], None], run: Callable[[], object], where: tuple[str, ...] = (PACKAGE,)) -> None:
    """Run, and act before every line of the package that is executed, or of other files."""

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(where):
            return None
        if event == "line":
            act((frame.f_code.co_filename, frame.f_lineno))
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(previous)


def places(run: Callable[[], object], where: tuple[str, ...] = (PACKAGE,)) -> list[tuple[Line, int]]:
    """Every line that a run executes, at its first and at its last execution."""
    counts: dict[Line, int] = {}

    def count(line: Line) -> None:
        counts[line] = counts.get(line, 0) + 1

    at_lines(count, run, where)
    return [(line, n) for line, total in counts.items() for n in sorted({1, total})]


def act_once(place: tuple[Line, int], act: Callable[[], None]) -> Callable[[Line], None]:
    remaining = place[1]

    def at(line: Line) -> None:
        nonlocal remaining
        if line == place[0]:
            remaining -= 1
            if remaining == 0:
                act()

    return at


def plant() -> None:
    raise PlantedError


def check_every_place(options: dict[str, Any], act: Callable[[], None], raised: type, stride: int = 1) -> None:
    """At every place of ``backward``, ``act``: it must end in the exception, and leave everything as it was.

    Or at one of ``stride``, where the setup differs in little from one that is checked at every place.
    """
    Setup(**options).backward()  # imports and fills caches, once
    rehearsal = Setup(**options)
    found = places(rehearsal.backward)
    assert len(found) > 100
    expected = [p.grad for p in rehearsal.model.parameters()]
    setup = Setup(**options)
    setup.optimizer.zero_grad()
    before = setup.snapshot()
    for place in found[::stride]:
        with pytest.raises(raised):
            at_lines(act_once(place, act), setup.backward)
        try:
            assert_same(setup.snapshot(), before)
        except AssertionError as error:
            raise AssertionError(f"after an exception at {place}") from error
    setup.backward()
    assert_same([p.grad for p in setup.model.parameters()], expected)


@pytest.mark.parametrize("name", SETUPS)
def test_an_exception_at_any_line(name: str) -> None:
    check_every_place(SETUPS[name], plant, PlantedError, stride_of(name))


@needs_fsdp2
@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("ascent", ["gradient", "momentum", "previous"])
def test_an_exception_at_any_line_of_a_sharded_step(ascent: str) -> None:
    check_every_place({"sharded": True, "ascent": ascent}, plant, PlantedError, 3 if ascent == "gradient" else 7)


@pytest.fixture
def ctrl_c_raises() -> Iterator[None]:
    """A shell without job control starts what is to run in the background with SIGINT ignored, also this suite."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("ctrl_c_raises")
@pytest.mark.parametrize("name", ["esam", "base step", "momentum", "previous, with a selection"])
def test_ctrl_c_at_any_line(name: str) -> None:
    stride = 2 * stride_of(name)  # every other place where an exception is planted
    check_every_place(SETUPS[name], lambda: signal.raise_signal(signal.SIGINT), KeyboardInterrupt, stride)


def test_sigterm_at_any_line_with_a_handler_that_raises() -> None:
    def leave(*_: object) -> None:
        raise SystemExit

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        check_every_place({}, lambda: signal.raise_signal(signal.SIGTERM), SystemExit, 3)
    finally:
        signal.signal(signal.SIGTERM, previous)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_is_ignored_is_ignored_in_a_step(signum: int) -> None:
    expected = Setup()
    expected.step()
    previous = signal.signal(signum, signal.SIG_IGN)
    try:
        setup = Setup()
        setup.before_call = lambda: signal.raise_signal(signum)
        at_lines(lambda line: signal.raise_signal(signum), setup.step)
        assert signal.getsignal(signum) is signal.SIG_IGN
    finally:
        signal.signal(signum, previous)
    assert_same(setup.model.state_dict(), expected.model.state_dict())


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_without_a_handler_ends_the_process_in_a_step(signum: int) -> None:
    """The system's own action: there is no exception to hold back, and no process to put anything back in."""
    previous = signal.signal(signum, signal.SIG_DFL)
    try:
        setup = Setup()
        seen = []
        setup.before_call = lambda: seen.append(signal.getsignal(signum))
        at_lines(lambda line: seen.append(signal.getsignal(signum)), setup.step)
    finally:
        signal.signal(signum, previous)
    assert set(seen) == {signal.SIG_DFL}


@pytest.mark.usefixtures("ctrl_c_raises")
@pytest.mark.parametrize("ascent", ["gradient", "previous"])
def test_ctrl_c_at_any_line_of_the_base_optimizer_s_step_comes_before_it_or_after_it(ascent: str) -> None:
    """Of its weights and of its state."""

    def moved(setup: Setup) -> list[Any]:
        return copy.deepcopy([list(setup.model.parameters()), setup.optimizer.base.state_dict()])

    rehearsal = Setup(foreach=False, ascent=ascent)
    rehearsal.backward()
    before = moved(rehearsal)
    where = (PACKAGE, str(pathlib.Path(torch.optim.__file__).parent))
    found = places(rehearsal.optimizer.step, where)
    after = moved(rehearsal)
    assert sum(line[0].endswith("sgd.py") for line, _ in found) > 20
    ends = set()
    for place in found:
        setup = Setup(foreach=False, ascent=ascent)
        setup.backward()
        handlers = setup.snapshot()[-1]
        with pytest.raises(KeyboardInterrupt):
            at_lines(act_once(place, lambda: signal.raise_signal(signal.SIGINT)), setup.optimizer.step, where)
        assert setup.snapshot()[-1] == handlers
        finished = torch.equal(setup.model[3].weight, after[0][-2])
        assert_same(moved(setup), after if finished else before)
        ends.add(finished)
    assert ends == {False, True}


@pytest.mark.usefixtures("ctrl_c_raises")
def test_a_second_ctrl_c_while_the_first_is_undone() -> None:
    """The first lands in the last call of the closure, the second at any line after it."""
    setup = Setup()
    setup.optimizer.zero_grad()
    before = setup.snapshot()
    calls = 0

    def interrupt() -> None:
        nonlocal calls
        calls += 1
        if calls == 6:
            signal.raise_signal(signal.SIGINT)

    def run() -> None:
        nonlocal calls
        calls = 0
        with pytest.raises(KeyboardInterrupt):
            setup.backward()

    setup.before_call = interrupt
    undoing: list[tuple[Line, int]] = []
    counts: dict[Line, int] = {}

    def count(line: Line) -> None:
        counts[line] = counts.get(line, 0) + 1
        if calls == 6:
            undoing.append((line, counts[line]))

    at_lines(count, run)
    # In the first lines the exception is still on its way out of the package's own calls.
    start = next(i for i, (line, _) in enumerate(undoing) if line[0].endswith("rollback.py"))
    assert len(undoing[start:]) > 20
    for place in undoing[start:]:
        at_lines(act_once(place, lambda: signal.raise_signal(signal.SIGINT)), run)
        assert_same(setup.snapshot(), before)


@pytest.mark.parametrize("call", range(6))
def test_an_exception_at_any_call_of_the_closure(call: int) -> None:
    setup = Setup()
    setup.optimizer.zero_grad()
    before = setup.snapshot()
    calls = iter(range(6))
    setup.before_call = lambda: plant() if next(calls) == call else None
    with pytest.raises(PlantedError):
        setup.backward()
    assert_same(setup.snapshot(), before)


def test_an_exception_at_any_line_of_first_step() -> None:
    setup = Setup(gamma=1.0, beta=1.0)  # whatever the number of the step
    setup.optimizer.zero_grad()
    nn.functional.cross_entropy(setup.model(torch.ones(4, 6)), torch.ones(4, dtype=torch.long)).backward()
    setup.optimizer.first_step()  # some lines run in the first one alone
    setup.optimizer.restore()
    before, count = setup.snapshot(), setup.optimizer.param_groups[0]["esam_step"]
    found = places(setup.optimizer.first_step)
    setup.optimizer.restore()
    setup.optimizer.param_groups[0]["esam_step"] = count  # the same draw, and so the same lines
    for place in found:
        with pytest.raises(PlantedError):
            at_lines(act_once(place, plant), setup.optimizer.first_step)
        assert_same(setup.snapshot(), before)
    setup.optimizer.first_step()
    setup.optimizer.second_step()


def test_an_exception_at_any_line_of_restore_leaves_it_to_be_done_again() -> None:
    setup = Setup(gamma=1.0, beta=1.0)  # whatever the number of the step
    setup.optimizer.zero_grad()
    nn.functional.cross_entropy(setup.model(torch.ones(4, 6)), torch.ones(4, dtype=torch.long)).backward()
    before, count = setup.snapshot(), setup.optimizer.param_groups[0]["esam_step"]

    setup.optimizer.first_step()
    found = places(setup.optimizer.restore)
    setup.optimizer.param_groups[0]["esam_step"] = count  # each first_step counts
    for place in found:
        setup.optimizer.first_step()
        with pytest.raises(PlantedError):
            at_lines(act_once(place, plant), setup.optimizer.restore)
        if setup.optimizer._progress.perturbation is not None:
            setup.optimizer.restore()
        setup.optimizer.param_groups[0]["esam_step"] = count  # each first_step counts
        assert_same(setup.snapshot(), before)
