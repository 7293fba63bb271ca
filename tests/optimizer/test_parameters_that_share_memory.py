"""Parameters whose elements share memory are refused, whenever they come to: a backup would hold perturbed elements."""

import pytest
import torch
from networks import batches, cross_entropy, mlp, same, train, values
from torch import Tensor, nn

from esam_kernels import ESAM, batch_closure

DATA = batches(3)


def sgd(params) -> ESAM:
    return ESAM(params, torch.optim.SGD, lr=0.1, gamma=1.0)


SHARING = {
    "the same": lambda x: (x, x),
    "a part": lambda x: (x, x[3:5]),
    "a transpose": lambda x: (x[:16].view(4, 4), x[:16].view(4, 4).t()),
    "columns with gaps": lambda x: (x.view(8, 8)[:, :5], x.view(8, 8)[:, 4:]),
    "every second and fourth": lambda x: (x[::2], x[::4]),
    "one that lies in the gaps of another but for one element": lambda x: (x[::2], x[1:4:2], x[5:8]),
    "a far one behind a near one": lambda x: (x[:20], x[20:30], x[10:15]),
    "halves of numbers with gaps": lambda x: (x[::2], x.view(torch.bfloat16)[1::4]),
    "another dtype": lambda x: (x[:4], x.view(torch.bfloat16)[7:9]),
}
BESIDE = {
    "halves": lambda x: (x[:32], x[32:]),
    "even and odd": lambda x: (x[::2], x[1::2]),
    "left and right columns": lambda x: (x.view(8, 8)[:, :4], x.view(8, 8)[:, 4:]),
    "empty ones": lambda x: (x, x[3:3], x[5:5]),
    "halves of numbers in the gaps": lambda x: (x[::2], x.view(torch.bfloat16)[2::4]),
    "other dtypes": lambda x: (x[:4], x.view(torch.bfloat16)[8:10]),
}
ALONE = {
    "a window that slides": lambda x: x.as_strided((4, 4), (1, 1)),
    "an expanded one": lambda x: x[:8].expand(3, 8),
}


@pytest.mark.parametrize("kind", SHARING)
def test_refused_at_construction(kind):
    params = [nn.Parameter(part) for part in SHARING[kind](torch.zeros(64))]
    for order in (params, params[::-1]):
        with pytest.raises(ValueError, match=r"share memory.*one Parameter in both places"):
            sgd(order)


@pytest.mark.parametrize("kind", BESIDE)
def test_neighbours_are_taken(kind):
    sgd([nn.Parameter(part) for part in BESIDE[kind](torch.zeros(64))])


@pytest.mark.parametrize("kind", ALONE)
def test_one_that_overlaps_itself(kind):
    with pytest.raises(ValueError, match=r"holds elements twice.*clone\(\)"):
        sgd([nn.Parameter(ALONE[kind](torch.zeros(64)))])


def test_a_group_that_is_added_later():
    memory = torch.zeros(8)
    optimizer = sgd([nn.Parameter(memory[::2])])
    with pytest.raises(ValueError, match="share memory"):
        optimizer.add_param_group({"params": [nn.Parameter(memory[::4])]})
    optimizer.add_param_group({"params": [nn.Parameter(memory[1::2])]})
    assert len(optimizer.param_groups) == 2


def tie(model: nn.Module) -> None:
    model[0].bias.data = model[2].bias.data


def tie_with_gaps(model: nn.Module) -> None:
    memory = torch.zeros(32)
    model[0].bias.data, model[2].bias.data = memory[:16:2], memory[::4]


def expand(model: nn.Module) -> None:
    model[2].bias.data = model[2].bias.data[:1].expand(8)  # at the same address


def slide(model: nn.Module) -> None:
    model[2].weight.data = model[2].weight.data.as_strided((8, 8), (1, 1))


LATER = [tie, tie_with_gaps, expand, slide]


@pytest.mark.parametrize("change", LATER)
@pytest.mark.parametrize("way", ["backward", "first_step"])
def test_what_comes_to_share_memory_between_steps(change, way):
    model = mlp()
    optimizer = sgd(model.parameters())
    train(model, optimizer, DATA[:2])
    closure = batch_closure(model, cross_entropy, *DATA[2])
    cross_entropy(model(DATA[2][0]), DATA[2][1]).mean().backward()
    change(model)
    before = values(model)
    with pytest.raises(ValueError, match=r"share memory|holds elements twice"):
        optimizer.backward(closure) if way == "backward" else optimizer.first_step()
    assert same(values(model), before)


def test_one_that_grows_into_its_neighbour():
    """It begins at the same address as before."""
    model, memory = mlp(), torch.zeros(16)
    model[0].bias.data, model[2].bias.data = memory[:8], memory[8:]
    optimizer = sgd(model.parameters())
    train(model, optimizer, DATA[:2])
    model[0].bias.data = memory
    with pytest.raises(ValueError, match="share memory"):
        optimizer.backward(batch_closure(model, cross_entropy, *DATA[2]))


def move(weight: Tensor) -> Tensor:
    return weight.clone()


@pytest.mark.parametrize("change", [move, Tensor.double, lambda weight: weight.t().contiguous().t()])
def test_weights_that_only_move_are_taken(change):
    model = mlp()
    optimizer = sgd(model.parameters())
    train(model, optimizer, DATA)
    for param in model.parameters():
        param.data = change(param.data)
    train(model, optimizer, batches(3, dtype=model[0].weight.dtype))
