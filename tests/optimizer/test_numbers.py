"""Numbers of NumPy's and 0-dimensional tensors are numbers, and are stored as Python's; shares are exact."""

import io
from fractions import Fraction
from math import floor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import batches, mlp, same, train, values

from esam_kernels import ESAM
from esam_kernels.options import OPTIONS, count_of

DATA = batches(3)
NUMBERS = {
    "rho": [np.float64(0.25), np.float32(0.25), np.array(0.25), torch.tensor(0.25), np.int64(0), 1],
    "beta": [np.float64(0.25), torch.tensor(0.25, dtype=torch.float64), np.float16(0.25)],
    "gamma": [np.float64(0.25), torch.tensor(1), np.int32(1)],
    "adaptive": [np.bool_(True), torch.tensor(True)],
    "interval": [np.int64(2), torch.tensor(2)],
    "seed": [np.uint64(2**63 + 1), np.int32(5), torch.tensor(5)],
    "granularity": [np.str_("element")],
    "steering_dtype": [torch.bfloat16],
}
PLAIN = (float, int, bool, str, type(None))
CASES = [(name, value) for name, values_ in NUMBERS.items() for value in values_]


def optimizer_of(model, **options) -> ESAM:
    return ESAM(model.parameters(), torch.optim.SGD, lr=0.1, **options)


def check_plain(groups) -> None:
    for group in groups:
        assert all(type(group[name]) in PLAIN for name in (*OPTIONS, "esam_step"))


@pytest.mark.parametrize(("name", "value"), CASES, ids=str)
@pytest.mark.parametrize("when", ["constructor", "group", "checkpoint"])
def test_a_number_is_stored_as_python_s_wherever_it_comes_from(name, value, when):
    plain = value.item() if hasattr(value, "item") else str(value).removeprefix("torch.")
    plain = value if type(value) is int else plain
    expected, model = mlp(), mlp()
    train(expected, optimizer_of(expected, **{name: plain}), DATA)
    if when == "constructor":
        optimizer = optimizer_of(model, **{name: value})
        check_plain(optimizer.param_groups)
    else:
        optimizer = optimizer_of(model)
        if when == "group":
            optimizer.param_groups[0][name] = value
        else:
            state = optimizer.state_dict()
            state["param_groups"][0][name] = value
            optimizer.load_state_dict(state)
            check_plain(optimizer.param_groups)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)  # before any step
    file.seek(0)
    check_plain(torch.load(file, weights_only=True)["param_groups"])
    train(model, optimizer, DATA)
    assert same(values(expected), values(model))
    check_plain(optimizer.param_groups)
    assert optimizer.param_groups[0][name] == plain


def test_a_number_set_in_a_group_is_plain_after_the_step_that_takes_it():
    model = mlp()
    optimizer = optimizer_of(model)
    optimizer.param_groups[0]["rho"] = torch.tensor(0.25)
    train(model, optimizer, DATA[:1])
    assert type(optimizer.param_groups[0]["rho"]) is float


@pytest.mark.parametrize(
    ("name", "value"),
    [("rho", np.array([0.1, 0.2])), ("rho", torch.ones(1)), ("granularity", np.array(["tensor"])), ("selection", 0),
     ("steering_dtype", np.zeros(2)), ("interval", np.float64(2.5)), ("gamma", np.float32("nan")), ("rho", 1e308),
     ("rho", np.inf), ("beta", 5e-324), ("interval", True), ("adaptive", np.int64(1))],
    ids=str,
)  # fmt: skip
def test_what_is_no_number_in_range_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} = "):
        optimizer_of(mlp(), **{name: value})


@pytest.mark.parametrize(
    ("share", "size", "count"),
    [(0.29, 100, 29), (0.57, 100, 57), (0.58, 50, 29), (0.1, 10, 1), (0.7, 10, 7), (0.07, 100, 7), (1e-18, 10, 1)],
)
def test_a_share_of_a_whole_is_exact(share, size, count):
    assert count_of(share, size) == count


@given(st.integers(1, 1000), st.integers(1, 4096))
def test_thousandths_are_exact(thousandths, size):
    assert count_of(thousandths / 1000, size) == max(1, floor(Fraction(thousandths, 1000) * size))
