"""The parts that step cost shows are the package's own passes, timed where they run; nothing of that stays."""

import pytest
import torch

from benchmarks.commands import step_cost
from benchmarks.training import models
from benchmarks.training.trainers import Settings, trainer
from esam_kernels import sharpness
from esam_kernels.model_state import ModelState

CPU = torch.device("cpu")
BATCH = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 10
ORDER = [
    "zero_grad",
    step_cost.BUFFERS,
    step_cost.PASSES["ascend"],
    *(step_cost.PASSES[name] for name in ("perturb", "look", "select", "descend", "restore")),
    "base step",
]


class Clock:
    """A stopwatch on which time passes only as a test lets it."""

    def __init__(self):
        self.now, self.marks = 0.0, []

    def mark(self):
        self.marks.append(self.now)

    def laps(self):
        return [b - a for a, b in zip(self.marks, self.marks[1:])]


def esam(**options):
    model = models.build("small", width=4, channels=1)
    return trainer("esam", model, Settings(0.1, 0.9, 0.0, options), CPU)


@pytest.mark.parametrize("name", step_cost.PASSES)
def test_a_pass_that_takes_longer_is_the_part_that_takes_longer(monkeypatch, name):
    clock, whole = Clock(), getattr(sharpness, name)

    def slow(*args):
        clock.now += 2.0
        return whole(*args)

    monkeypatch.setattr(sharpness, name, slow)
    parts = step_cost.parts_of_step(esam(), *BATCH, clock)
    assert parts == {part: 2.0 if part == step_cost.PASSES[name] else 0.0 for part in ORDER}
    assert list(parts) == ORDER


def test_what_lies_between_the_passes_is_in_no_part(monkeypatch):
    clock, keep = Clock(), ModelState.keep_random_state

    def slow(state):
        clock.now += 3.0
        return keep(state)

    monkeypatch.setattr(ModelState, "keep_random_state", slow)
    assert sum(step_cost.parts_of_step(esam(), *BATCH, clock).values()) == 0
    assert clock.laps().count(3.0) == 1


def test_a_part_within_another_takes_nothing_from_it(monkeypatch):
    """A pass may put buffers back itself: what it does before and after that is its own."""
    clock, look = Clock(), sharpness.look

    def slow(step, *rest):
        clock.now += 2.0
        step.model_state.keep_buffers()()
        clock.now += 1.0
        return look(step, *rest)

    monkeypatch.setattr(sharpness, "look", slow)
    parts = step_cost.parts_of_step(esam(), *BATCH, clock)
    assert {name: seconds for name, seconds in parts.items() if seconds} == {step_cost.PASSES["look"]: 3.0}


def test_passes_that_the_options_leave_out_are_no_parts():
    parts = step_cost.parts_of_step(esam(gamma=1.0), *BATCH, step_cost.Stopwatch(CPU))
    assert list(parts) == [part for part in ORDER if part != step_cost.PASSES["look"]]


def test_afterwards_the_package_is_as_it_was():
    one = esam()
    before = {name: getattr(sharpness, name) for name in step_cost.PASSES}
    keep_buffers, own = ModelState.keep_buffers, (set(vars(one)), set(vars(one.optimizer.base)))
    step_cost.parts_of_step(one, *BATCH, step_cost.Stopwatch(CPU))
    one.loss_fn = None
    with pytest.raises(TypeError):
        step_cost.parts_of_step(one, *BATCH, step_cost.Stopwatch(CPU))
    assert {name: getattr(sharpness, name) for name in step_cost.PASSES} == before
    assert ModelState.keep_buffers is keep_buffers
    assert (set(vars(one)), set(vars(one.optimizer.base))) == own


def test_agreement_is_of_the_same_draw_and_leaves_weights_and_precision_as_they_were():
    one = esam()
    before = [param.clone() for param in one.model.parameters()]
    cosine, overlap = step_cost.agreement(one, *BATCH, step=5)
    assert 0.9 < cosine < 1
    assert 0.5 <= overlap <= 1
    assert all(torch.equal(a, b) for a, b in zip(before, one.model.parameters()))
    assert one.optimizer.param_groups[0]["steering_dtype"] is None


@pytest.mark.parametrize(
    ("options", "forwards"),
    [
        ({}, [16, 16, 8]),
        ({"gamma": 1.0}, [16, 16]),
        ({"selection": "loss"}, [16, 8]),
        ({"gamma": 0.25}, [16, 16, 4]),
        ({"ascent": "momentum", "gamma": 1.0}, [16]),
        ({"ascent": "previous", "selection": "random"}, [8]),
        ({"ascent_share": 0.25}, [16, 4, 16, 8]),
    ],
)
def test_the_floor_has_the_forwards_that_the_step_has(options, forwards):
    found = {}
    for name in ("esam", "floor"):
        seen = found[name] = []
        if name == "esam":
            one = esam(**options)
        else:
            settings = Settings(0.1, 0.9, 0.0, options)
            one = trainer("sgd", models.build("small", width=4, channels=1), settings, CPU)
        one.model.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(len(inputs[0])))
        if name == "esam":
            one.step(*BATCH)
        else:
            step_cost.floor_of_step(one, *BATCH, step_cost.drawn(one, 0))
    assert found == {"esam": forwards, "floor": forwards}
