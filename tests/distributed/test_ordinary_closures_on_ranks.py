"""torch.optim's closures are sharpness-aware steps on several ranks too: over replicas, and over shards."""

import copy

import pytest
import ranks
import torch
import torch.distributed as dist
from networks import batches, cross_entropy, mlp, same, values
from ranks import device, needs_fsdp2
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from esam_kernels import ESAM, batch_closure

STEPS = 4
REPLICAS = {
    "default": {},
    "unused parameters": {"find_unused_parameters": True},
    "gradients as bucket views": {"gradient_as_bucket_view": True},
}
ASCENTS = ("gradient", "momentum", "previous")


def network() -> nn.Module:
    return mlp(nn.BatchNorm1d(8), dtype=torch.float64).to(device())


def data(rank: int):
    return [(x.to(device()), y.to(device())) for x, y in batches(STEPS, seed=rank, dtype=torch.float64)]


def optimizer_of(model: nn.Module, **options) -> ESAM:
    options = {"lr": 0.1, "momentum": 0.9, "rho": 0.5, "gamma": 1.0, **options}
    return ESAM(model.parameters(), torch.optim.SGD, **options)


def train(model: nn.Module, optimizer: ESAM, rank: int) -> list[torch.Tensor]:
    losses = []
    for inputs, targets in data(rank):

        def closure(inputs=inputs, targets=targets):
            optimizer.zero_grad()
            loss = cross_entropy(model(inputs), targets).mean()
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).detach())
    return losses


def replicas(rank: int, ddp: dict, **options):
    """With an ordinary closure, and with one by index."""
    model, other = (DistributedDataParallel(network(), **ddp) for _ in range(2))
    losses = train(model, optimizer_of(model, **options), rank)
    twin = optimizer_of(other, **options)
    expected = [twin.step(batch_closure(other, cross_entropy, *batch)) for batch in data(rank)]
    return values(model), values(other), losses, expected


def failure(rank: int):
    """One rank fails in the first call, which communicates nothing; all go on together with the next step."""
    model = DistributedDataParallel(network())
    optimizer = optimizer_of(model)
    before, called = values(model), []

    def failing():
        called.append(1)
        optimizer.zero_grad()
        cross_entropy(model(data(rank)[0][0]), data(rank)[0][1]).mean().backward()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        optimizer.step(failing)
    restored = same(values(model), before) and len(called) == 1
    train(model, optimizer, rank)
    return restored, values(model)[: len(list(model.parameters()))]


def shard(model: nn.Module) -> nn.Module:
    fully_shard(model[0])
    return fully_shard(model)


def static(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model, static_graph=True)


def together(rank: int, spread, **options):
    """Spread over the ranks, and in one process on the batches of all: the direction is the one of all."""
    torch.manual_seed(0)
    alone = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3)).double().to(device())
    model = spread(copy.deepcopy(alone))
    train(model, optimizer_of(model, **options), rank)
    optimizer = optimizer_of(alone, **options)
    for parts in zip(*map(data, range(dist.get_world_size()))):
        inputs, targets = map(torch.cat, zip(*parts))
        optimizer.step(batch_closure(alone, cross_entropy, inputs, targets))
    found = [param.full_tensor() if isinstance(param, DTensor) else param for param in model.parameters()]
    return [param.detach() for param in found], [param.detach() for param in alone.parameters()]


SCENARIOS = {
    **{f"replicas, {name}": (replicas, {"ddp": ddp}) for name, ddp in REPLICAS.items()},
    **{f"replicas, {ascent}": (replicas, {"ddp": {}, "ascent": ascent}) for ascent in ASCENTS},
    "failure": (failure, {}),
    **{f"a static graph, {ascent}": (together, {"spread": static, "ascent": ascent}) for ascent in ASCENTS},
    **{
        f"shards, {ascent}": (together, {"spread": shard, "ascent": ascent})
        for ascent in ASCENTS
        if torch.__version__ >= (2, 13)
    },
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return ranks.run(__name__, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", [*REPLICAS, *ASCENTS])
def test_replicas_are_as_with_a_batch_closure(results, name):
    for mine, theirs, losses, expected in results(f"replicas, {name}"):
        for a, b in zip([*mine, *losses], [*theirs, *expected]):
            torch.testing.assert_close(a, b)
    (one, *_), (other, *_) = results(f"replicas, {name}")
    count = len(list(network().parameters()))
    assert same(one[:count], other[:count])


def test_a_failure_leaves_replicas_as_they_were(results):
    (one, weights), (other, others) = results("failure")
    assert one
    assert other
    assert same(weights, others)


@pytest.mark.parametrize("engine", [pytest.param("shards", marks=needs_fsdp2), "a static graph"])
@pytest.mark.parametrize("ascent", ASCENTS)
def test_with_a_reduced_direction_a_run_is_that_of_one_process(results, engine, ascent):
    for found, expected in results(f"{engine}, {ascent}"):
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
