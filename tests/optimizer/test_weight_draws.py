"""Which weights a step perturbs depends on the seed and the step's number alone, and is beta of them."""

import math

import pytest
import torch
from networks import batches, cross_entropy, mlp, train
from torch import Tensor, nn

from esam_kernels import ESAM, batch_closure
from esam_kernels.ops.reference import TENSOR_STREAM, keep_threshold, philox4x32, philox_key
from esam_kernels.passes.draw import BLOCK, draw_tensors

INPUTS, TARGETS = batches(1)[0]


def perturbed_elements(optimizer: ESAM, model: nn.Module, batch=(INPUTS, TARGETS)) -> list[Tensor]:
    """One step; which elements of each parameter it moved before pass 3."""
    closure = batch_closure(model, cross_entropy, *batch)
    weights = []

    def spying(index):
        weights.append([param.detach().clone() for param in model.parameters()])
        return closure(index)

    optimizer.step(spying)
    return [a != b for a, b in zip(weights[0], weights[-1])]


def network() -> nn.Module:
    """Every element's gradient is far from 0, and so is what it is moved by."""
    return mlp(dtype=torch.float64)


def optimizer_of(network: nn.Module, **options) -> ESAM:
    return ESAM(network.parameters(), torch.optim.SGD, **{"lr": 0.0, "rho": 1.0, **options})


def history(count: int, model: nn.Module | None = None, batch=(INPUTS, TARGETS), **options) -> list[list[list]]:
    model = model or network()
    optimizer = optimizer_of(model, **options)
    batch = batch[0].double(), batch[1]
    return [[moved.tolist() for moved in perturbed_elements(optimizer, model, batch)] for _ in range(count)]


granularities = pytest.mark.parametrize("granularity", ["tensor", "element"])


@granularities
def test_draws_depend_on_seed_and_step_alone(granularity):
    first = history(6, granularity=granularity, seed=7)
    assert len({str(masks) for masks in first}) > 1  # they change from step to step
    torch.manual_seed(123)
    other_batch = batches(1, size=5, seed=9)[0]
    others = history(6, mlp(dtype=torch.float64, seed=4), other_batch, granularity=granularity, seed=7, lr=0.01)
    assert first == others
    assert first != history(6, granularity=granularity, seed=8)
    assert first != history(6, granularity=granularity, seed=7 + 2**32)  # all 64 bits count


@granularities
def test_draws_do_not_depend_on_the_thread_count(granularity):
    threads = torch.get_num_threads()
    try:
        sides = []
        for count in (1, 2):
            torch.set_num_threads(count)
            sides.append(history(3, granularity=granularity))
    finally:
        torch.set_num_threads(threads)
    assert sides[0] == sides[1]


@granularities
def test_draws_leave_torch_s_generator_alone(granularity):
    model = mlp()
    before = torch.get_rng_state()
    train(model, optimizer_of(model, granularity=granularity), batches(3))
    assert torch.equal(before, torch.get_rng_state())


@granularities
def test_draws_of_a_step_do_not_depend_on_the_steps_before(granularity):
    whole = history(6, granularity=granularity)
    model = network()
    optimizer = optimizer_of(model, granularity=granularity)
    optimizer.param_groups[0]["esam_step"] = 4  # as a checkpoint sets it
    late = perturbed_elements(optimizer, model, (INPUTS.double(), TARGETS))
    assert [mask.tolist() for mask in late] == whole[4]


def test_a_tensor_is_drawn_as_a_whole():
    for masks in history(5, granularity="tensor"):
        assert all(torch.tensor(mask).all() or not torch.tensor(mask).any() for mask in masks)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.6, 0.9])
def test_the_share_of_tensors_drawn_is_beta(beta):
    tensors, steps = 40, 500
    drawn = [len(draw_tensors(range(tensors), beta, seed=0, step=step)) for step in range(steps)]
    n = tensors * steps
    assert abs(sum(drawn) - beta * n) < 4 * math.sqrt(n * beta * (1 - beta))


def test_each_tensor_is_drawn_as_often_and_independently_of_its_neighbour():
    tensors, steps, beta = 6, 2000, 0.6
    draws = torch.zeros(steps, tensors)
    for step in range(steps):
        draws[step, draw_tensors(range(tensors), beta, seed=1, step=step)] = 1
    sigma = math.sqrt(beta * (1 - beta) / steps)
    assert ((draws.mean(0) - beta).abs() < 4 * sigma).all()
    both = (draws[:, 1:] * draws[:, :-1]).mean(0)
    assert ((both - beta**2).abs() < 4 * math.sqrt(beta**2 * (1 - beta**2) / steps)).all()
    again = (draws[1:] * draws[:-1]).mean(0)
    assert ((again - beta**2).abs() < 4 * math.sqrt(beta**2 * (1 - beta**2) / steps)).all()


@pytest.mark.parametrize("beta", [0.1, 0.6, 0.95])
def test_the_share_of_elements_drawn_is_beta(beta):
    masks = history(40, granularity="element", beta=beta)
    drawn = torch.tensor([bit for step in masks for mask in step for bit in torch.tensor(mask).flatten().tolist()])
    n = len(drawn)
    assert abs(drawn.sum().item() - beta * n) < 4 * math.sqrt(n * beta * (1 - beta))


@granularities
def test_beta_1_draws_all(granularity):
    assert all(torch.tensor(mask).all() for step in history(3, granularity=granularity, beta=1.0) for mask in step)


@pytest.mark.parametrize("step", [0, BLOCK - 1, BLOCK, 12345, 2**32 + BLOCK + 1])
def test_a_tensor_is_drawn_by_the_word_of_its_own_id_and_step(step):
    """Whatever is drawn at once: a word is that of Philox at (0, stream, id, low word of the step), one at a time."""
    ids, seed, beta = [0, 3, 4, 2**20], 2**40 + 5, 0.5
    words = [
        philox4x32(tuple(map(torch.tensor, (0, TENSOR_STREAM << 24, i, step % 2**32))), philox_key(seed))[0]
        for i in ids
    ]
    kept = [i for i, word in enumerate(words) if word < keep_threshold(beta)]
    assert draw_tensors(ids, beta, seed, step) == (kept or [words.index(min(words))])


def test_at_least_one_tensor_is_always_drawn():
    chosen = {tuple(draw_tensors(range(5), 1e-12, seed=0, step=step)) for step in range(200)}
    assert chosen == {(i,) for i in range(5)}  # and it is not always the same one
    for masks in history(5, beta=1e-12):
        assert sum(torch.tensor(mask).any().item() for mask in masks) == 1


@granularities
@pytest.mark.parametrize("beta", [1e-12, 0.6, 1.0])
def test_groups_of_rho_0_and_frozen_parameters_are_never_drawn(granularity, beta):
    model = network()
    model[2].requires_grad_(False)
    still = {"params": model[4].parameters(), "rho": 0.0}
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}, still]
    optimizer = ESAM(groups, torch.optim.SGD, lr=0.0, rho=1.0, beta=beta, granularity=granularity)
    for _ in range(10):
        moved = [mask.any().item() for mask in perturbed_elements(optimizer, model, (INPUTS.double(), TARGETS))]
        assert moved[2:] == [False] * 4
        assert any(moved[:2]) or (granularity == "element" and beta < 0.1)


@granularities
def test_draws_of_a_tensor_do_not_depend_on_others_being_frozen(granularity):
    whole = history(6, granularity=granularity, beta=0.5)
    model = network()
    model[0].requires_grad_(False)
    some = history(6, model, granularity=granularity, beta=0.5)
    # At least one is drawn: where none of the rest was, the two differ rightly.
    pairs = [(a[2:], b[2:]) for a, b in zip(whole, some) if any(torch.tensor(mask).any() for mask in a[2:])]
    assert len(pairs) > 3
    assert all(a == b for a, b in pairs)


@granularities
def test_ids_survive_add_param_group(granularity):
    whole = history(6, granularity=granularity, beta=0.5)
    model = network()
    optimizer = ESAM(model[:3].parameters(), torch.optim.SGD, lr=0.0, rho=1.0, beta=0.5, granularity=granularity)
    batch = INPUTS.double(), TARGETS
    steps = [perturbed_elements(optimizer, model, batch) for _ in range(3)]
    optimizer.add_param_group({"params": model[4].parameters()})
    assert optimizer.param_groups[1]["esam_step"] == 3
    steps += [perturbed_elements(optimizer, model, batch) for _ in range(3)]
    masks = [[mask.tolist() for mask in step] for step in steps]
    for i, (mine, theirs) in enumerate(zip(masks, whole)):
        if i >= 3:
            assert mine == theirs
        elif any(torch.tensor(mask).any() for mask in theirs[:4]):
            assert mine[:4] == theirs[:4]
            assert not any(torch.tensor(mask).any() for mask in mine[4:])


def test_draws_are_made_on_the_cpu_whatever_the_default_device():
    model = mlp()
    closures = [batch_closure(model, cross_entropy, *batch) for batch in batches(2)]
    with torch.device("meta"):
        optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, select_over="all")
        optimizer.backward(closures)
    optimizer.step()
    assert all(param.device.type == "cpu" for param in model.parameters())
