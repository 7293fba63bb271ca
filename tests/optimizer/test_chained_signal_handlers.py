"""A handler of Ctrl-C or SIGTERM that is installed inside a step, and calls the one before it, works ever after."""

import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from networks import batches, cross_entropy, mlp, same, values
from torch import Tensor

from esam_kernels import ESAM, batch_closure

SIGNALS = [signal.SIGINT, signal.SIGTERM]


class Raised(BaseException):
    """What the user's first handler raises."""


def raise_it(*_: object) -> None:
    raise Raised


@pytest.fixture(autouse=True)
def _handlers_that_raise() -> Iterator[None]:
    previous = {number: signal.signal(number, raise_it) for number in SIGNALS}
    yield
    for number, handler in previous.items():
        signal.signal(number, handler)


class Run:
    """A step whose closure can do more than compute losses."""

    def __init__(self) -> None:
        self.model = mlp()
        self.optimizer = ESAM(self.model.parameters(), torch.optim.SGD, lr=0.1)
        self.calls: list[int] = []
        self.previous: Any = None
        self._batch = batch_closure(self.model, cross_entropy, *batches(1)[0])

    def chain(self, number: int) -> None:
        """Install a handler that calls the one before it, as libraries and trainers do."""
        self.previous = previous = signal.getsignal(number)

        def handler(signum: int, frame: Any) -> None:
            self.calls.append(signum)
            previous(signum, frame)

        signal.signal(number, handler)

    def backward(self, *acts: Callable[[], object]) -> None:
        """With one act in each call of the closure, from the first one on."""
        remaining = iter(acts)

        def closure(index: Tensor | None) -> Any:
            next(remaining, lambda: None)()
            return self._batch(index)

        self.optimizer.backward(closure)


def arrives(number: int) -> bool:
    try:
        signal.raise_signal(number)
    except Raised:
        return True
    return False


@pytest.mark.parametrize("call", range(3))
@pytest.mark.parametrize("number", SIGNALS)
def test_it_works_after_the_step_and_in_the_next_ones(number: int, call: int) -> None:
    run = Run()
    run.backward(*[lambda: None] * call, lambda: run.chain(number))
    for times in range(1, 4):
        assert arrives(number)
        assert run.calls == [number] * times
    run.backward()
    before = values(run.model)
    with pytest.raises(Raised):
        run.backward(lambda: None, lambda: signal.raise_signal(number))
    assert same(values(run.model), before)
    assert arrives(number)
    assert run.calls == [number] * 5


@pytest.mark.parametrize("number", SIGNALS)
def test_it_works_in_the_step_itself(number: int) -> None:
    run = Run()
    before = values(run.model)
    with pytest.raises(Raised):
        run.backward(lambda: run.chain(number), lambda: signal.raise_signal(number))
    assert same(values(run.model), before)
    assert arrives(number)
    assert run.calls == [number] * 2


@pytest.mark.parametrize("number", SIGNALS)
def test_it_works_after_a_step_that_failed(number: int) -> None:
    run = Run()
    with pytest.raises(ZeroDivisionError):
        run.backward(lambda: run.chain(number), lambda: 1 / 0)
    assert arrives(number)
    assert run.calls == [number]


@pytest.mark.parametrize("number", SIGNALS)
def test_the_one_before_it_works_when_it_is_put_back_after_the_step(number: int) -> None:
    run = Run()
    run.backward(lambda: run.chain(number))
    signal.signal(number, run.previous)
    assert arrives(number)
    run.backward()
    assert arrives(number)
    with pytest.raises(Raised):
        run.backward(lambda: signal.raise_signal(number))
    assert run.calls == []


@pytest.mark.parametrize("number", SIGNALS)
def test_it_works_when_it_is_installed_in_the_base_optimizers_step(number: int) -> None:
    run = Run()
    hook = run.optimizer.register_step_pre_hook(lambda *_: run.chain(number))
    run.backward()
    run.optimizer.step()
    hook.remove()
    assert arrives(number)
    assert run.calls == [number]
