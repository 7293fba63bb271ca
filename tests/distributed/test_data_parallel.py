"""Under DistributedDataParallel the replicas stay bit-identical, and only pass 3's gradients travel.

All processes run every scenario in one go, since starting them is what takes long; the tests look at the results.
"""

import os
import signal

import pytest
import ranks
import torch
import torch.distributed as dist
from networks import batches, cross_entropy, grads, mlp, perturbed, same, values
from ranks import device
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from esam_kernels import ESAM, batch_closure

STEPS = 20


def data(rank: int, count: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    on_cpu = batches(count, size=12, seed=10 + rank, dtype=torch.float64)
    return [(inputs.to(device()), targets.to(device())) for inputs, targets in on_cpu]


class WithUnused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = mlp(dtype=torch.float64), nn.Linear(2, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
        self.layers[2].weight = self.layers[0].weight

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def network() -> nn.Module:
    return mlp(nn.BatchNorm1d(8), dtype=torch.float64)


def replicate(model: nn.Module, **options) -> DistributedDataParallel:
    return DistributedDataParallel(model.to(device()), **options)


def optimizer_of(network: nn.Module, **options) -> ESAM:
    return ESAM(network.parameters(), torch.optim.SGD, **{"lr": 0.1, "momentum": 0.9, "rho": 0.5, **options})


def hand_written(replica: nn.Module, inputs: Tensor, targets: Tensor):
    def closure(index):
        rows = slice(None) if index is None else index
        return cross_entropy(replica(inputs[rows]), targets[rows])

    return closure


def closures_of(replica: nn.Module, batch: tuple[Tensor, Tensor], sizes: list[int], by_hand: bool = False) -> list:
    make = hand_written if by_hand else lambda *parts: batch_closure(parts[0], cross_entropy, *parts[1:])
    return [make(replica, x, y) for x, y in zip(*(part.split(sizes) for part in batch))]


def clip(replica: nn.Module, optimizer: ESAM, scaler: torch.amp.GradScaler) -> None:
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(replica.parameters(), 0.1)


TRAINING = {
    "default": {},
    "static graph": {"ddp": {"static_graph": True}},
    "unused parameters": {"ddp": {"find_unused_parameters": True}, "network": WithUnused},
    "gradients as bucket views": {"ddp": {"gradient_as_bucket_view": True}},
    "micro-batches": {"sizes": [4, 8]},
    "micro-batches selected together": {  # often of one of them alone; batch norm takes no single rows
        "sizes": [4, 8],
        "esam": {"select_over": "all", "gamma": 0.2},
        "network": lambda: mlp(dtype=torch.float64),
    },
    "micro-batches and unused parameters": {
        "sizes": [4, 8],
        "ddp": {"find_unused_parameters": True},
        "network": WithUnused,
    },
    # PyTorch learns a static graph from its first backward, which is not to be one without reduction.
    "micro-batches and a static graph": {"sizes": [4, 8], "first": [12], "ddp": {"static_graph": True}},
    "uneven batches": {"sizes": [[12], [5], [8]]},
    "hundreds of uneven batches": {"sizes": [[12], [5], [8]], "steps": 150},
    "uneven micro-batches": {"sizes": [[4, 8], [5, 4], [4, 4]]},
    "float16 with a scaler, clipping and micro-batches": {
        "amp": True,
        "sizes": [4, 8],
        "network": lambda: mlp(nn.BatchNorm1d(8)),
    },
    "tied weights": {"network": Tied},
    "gamma 1": {"esam": {"gamma": 1.0}},
    "by element": {"esam": {"granularity": "element"}},
    "interval": {"esam": {"interval": 2}},
    "a closure by hand": {"by_hand": True},
    "momentum": {"esam": {"ascent": "momentum", "gamma": 1.0}},
    "momentum, with a selection in micro-batches": {"esam": {"ascent": "momentum"}, "sizes": [4, 8]},
    "momentum of uneven random rows": {
        "esam": {"ascent": "momentum", "selection": "random", "granularity": "element"},
        "sizes": [[12], [5], [8]],
    },
    "previous": {"esam": {"ascent": "previous", "gamma": 1.0}},
    "previous and unused parameters": {
        "esam": {"ascent": "previous", "adaptive": True},
        "ddp": {"find_unused_parameters": True},
        "network": WithUnused,
    },
    "previous in float16 with a scaler, clipping and micro-batches": {
        "esam": {"ascent": "previous"},
        "amp": True,
        "sizes": [4, 8],
        "network": lambda: mlp(nn.BatchNorm1d(8)),
    },
    "a share of the rows": {"esam": {"ascent_share": 0.5}, "sizes": [4, 8]},
    "momentum in every second step from the fifth on": {"esam": {"ascent": "momentum", "start": 5, "interval": 2}},
}


def training(
    rank: int, ddp=(), esam=(), network=network, sizes=(12,), first=None, by_hand=False, steps=STEPS, amp=False
):
    """Training with data of one's own; the start is rank 0's, as DDP has it."""
    torch.manual_seed(rank)
    replica = replicate(network(), **dict(ddp))
    optimizer = optimizer_of(replica, **dict(esam), model=replica if by_hand else None)
    start = values(replica)
    scaler = torch.amp.GradScaler(device(), enabled=amp)
    for step, (inputs, targets) in enumerate(data(rank, steps)):
        batch = inputs.to(start[0].dtype), targets
        split = first if first and step == 0 else sizes
        split = split[rank] if isinstance(split[0], list) else split
        with torch.autocast(device(), torch.float16, enabled=amp):
            optimizer.backward(
                closures_of(replica, [part[: sum(split)] for part in batch], list(split), by_hand), scaler
            )
        if amp:
            clip(replica, optimizer, scaler)
        scaler.step(optimizer)
        scaler.update()
    return start, [param.detach() for param in replica.parameters()]


SIZES = {"one batch": [12], "micro-batches": [4, 8]}


def gradient(rank: int, sizes: list[int]):
    replica = replicate(network())
    optimizer_of(replica, beta=1.0).backward(closures_of(replica, data(rank)[0], sizes))
    return grads(replica)


def communication(rank: int, sizes: list[int], **esam):
    """Gradient buckets reduced and buffers broadcast until each call of a closure, and at the end."""
    replica = replicate(network())
    counts = [0, 0]
    sync_buffers = replica._sync_buffers

    def reduce(state, bucket):
        counts[0] += 1
        return (
            dist.all_reduce(bucket.buffer() / dist.get_world_size(), async_op=True)
            .get_future()
            .then(lambda f: f.value()[0])
        )

    def broadcast():
        counts[1] += 1
        sync_buffers()

    replica.register_comm_hook(None, reduce)
    optimizer = optimizer_of(replica, **esam)
    if "ascent" in esam:  # so that there is something to climb along
        optimizer.step(closures_of(replica, data(rank)[1], sizes))
        counts[:] = 0, 0
    replica._sync_buffers = broadcast
    seen = []

    def counting(closure):
        def call(index):
            seen.append(tuple(counts))
            return closure(index)

        call.model = replica
        return call

    optimizer.backward([counting(c) for c in closures_of(replica, data(rank)[0], sizes)])
    return [*seen, tuple(counts)]


def failure(rank: int, when: int):
    """Rank 0 fails in one pass, finds everything as before, and tries again while others wait in their first try."""
    replica = replicate(mlp(dtype=torch.float64))
    optimizer = optimizer_of(replica)
    closure, calls = batch_closure(replica, cross_entropy, *data(rank)[0]), 0

    def failing(index):
        nonlocal calls
        calls += 1
        losses = closure(index)
        if calls == when:
            raise InterruptedError
        return losses

    failing.model = replica
    before, found = values(replica), []
    if rank == 0:
        with pytest.raises(InterruptedError):
            optimizer.backward(failing)
        found = ["forward" in vars(replica), same(before, values(replica)), any(g is not None for g in grads(replica))]
    for batch in data(rank)[:3]:
        optimizer.step(batch_closure(replica, cross_entropy, *batch))
    return found, values(replica)


OVERFLOWS = {"pass 1": [1], "pass 2": [2], "pass 3": [3], "passes 2 and 3": [2, 3]}


def overflow(rank: int, passes: list[int], sizes: list[int]):
    """In some passes of rank 0 alone."""
    replica = replicate(network())
    optimizer, scaler = optimizer_of(replica), torch.amp.GradScaler(device(), init_scale=1024.0)
    calls = 0

    def overflowing(closure):
        def call(index):
            nonlocal calls
            calls += 1
            spoiled = rank == 0 and -(-calls // len(sizes)) in passes
            return closure(index) * (float("inf") if spoiled else 1.0)

        call.model = replica
        return call

    before = [param.detach().clone() for param in replica.parameters()]
    optimizer.backward([overflowing(closure) for closure in closures_of(replica, data(rank)[0], sizes)], scaler)
    clip(replica, optimizer, scaler)
    scaler.step(optimizer)
    scaler.update()
    return before, [param.detach() for param in replica.parameters()], scaler.get_scale()


def masks(rank: int, granularity: str):
    """What each step perturbs of the weights."""
    replica = replicate(mlp(dtype=torch.float64))
    optimizer = optimizer_of(replica, granularity=granularity, beta=0.5)
    start, moved = [param.detach().clone() for param in replica.parameters()], []
    for batch in data(rank, 5):
        closure, calls = batch_closure(replica, cross_entropy, *batch), []

        def looking(index, closure=closure, calls=calls):
            calls.append([param.detach() != weights for param, weights in zip(replica.parameters(), start)])
            return closure(index)

        looking.model = replica
        optimizer.backward(looking)
        moved.append(calls[1])
    return moved


def buffers(rank: int, sizes: list[int]):
    """Those that ESAM leaves and those that plain training leaves; batch norm sees the data itself, not the weights."""
    found = []
    for plain in (False, True):
        torch.manual_seed(rank)
        replica = replicate(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)).double())
        optimizer = optimizer_of(replica)
        for batch in data(rank, 4):
            closures = closures_of(replica, batch, sizes)
            if not plain:
                optimizer.backward(closures)
                continue
            for closure in closures[:-1]:
                replica.no_sync()(lambda closure=closure: closure(None).mean().backward())()
            closures[-1](None).mean().backward()
        found.append([buffer.clone() for buffer in replica.buffers()])
    return found


def zero(rank: int):
    """The optimizer's state in parts, each on one rank, against the whole on each."""
    found = []
    for base, options in (
        (ZeroRedundancyOptimizer, {"optimizer_class": torch.optim.AdamW}),
        (torch.optim.AdamW, {}),
    ):
        replica = replicate(network())
        optimizer = ESAM(replica.parameters(), base, lr=0.01, rho=0.5, **options)
        for batch in data(rank):
            optimizer.step(closures_of(replica, batch, [12]))
        found.append([param.detach() for param in replica.parameters()])
        if base is ZeroRedundancyOptimizer:
            optimizer.consolidate_state_dict(to=0)
            state = optimizer.state_dict() if rank == 0 else None
    return found, state


def a_killed_rank(rank: int, when: int):
    """It dies in a pass, while the others go on until they wait for its gradients in pass 3."""
    if dist.get_backend() != "gloo":  # NCCL's watchdog ends the process
        return None
    replica = replicate(mlp(dtype=torch.float64))
    closure, calls = batch_closure(replica, cross_entropy, *data(rank)[0]), 0
    before = values(replica)

    def dying(index):
        nonlocal calls
        calls += 1
        if calls == when and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return closure(index)

    dying.model = replica
    with pytest.raises(RuntimeError):
        optimizer_of(replica).backward(dying)
    return same(before, values(replica)), any(g is not None for g in grads(replica))


SCENARIOS = {
    **{f"training, {name}": (training, options) for name, options in TRAINING.items()},
    **{f"gradient, {name}": (gradient, {"sizes": sizes}) for name, sizes in SIZES.items()},
    **{f"communication, {name}": (communication, {"sizes": sizes}) for name, sizes in SIZES.items()},
    "communication, plain": (communication, {"sizes": [4, 8], "rho": 0.0}),
    **{
        f"communication, {ascent}": (communication, {"sizes": [4, 8], "ascent": ascent, "gamma": 1.0})
        for ascent in ("momentum", "previous")
    },
    **{f"failure {when}": (failure, {"when": when}) for when in (1, 2, 3)},
    **{
        f"overflow in {where}, {name}": (overflow, {"passes": passes, "sizes": sizes})
        for where, passes in OVERFLOWS.items()
        for name, sizes in SIZES.items()
    },
    **{f"masks, {granularity}": (masks, {"granularity": granularity}) for granularity in ("tensor", "element")},
    **{f"buffers, {name}": (buffers, {"sizes": sizes}) for name, sizes in SIZES.items()},
    "zero": (zero, {}),
    "killed in pass 3": (a_killed_rank, {"when": 3}),  # the last one: nothing works after it
}


EARLY_1 = {"killed": (a_killed_rank, {"when": 1})}
EARLY_2 = {"killed": (a_killed_rank, {"when": 2})}


@pytest.fixture(
    # A mean over three ranks rounds, which one over two does not.
    scope="module",
    params=[("gloo", 3), pytest.param(("nccl", 2), marks=pytest.mark.gpu)],
    ids=str,
)
def results(request, tmp_path_factory):
    """For each scenario, what each rank returned."""
    backend, world = request.param
    if backend == "nccl" and torch.cuda.device_count() < world:
        pytest.skip(f"NCCL needs {world} GPUs for {world} ranks")
    return ranks.run(__name__, world, tmp_path_factory.mktemp("ranks"), backend)


@pytest.mark.parametrize("name", TRAINING)
def test_replicas_stay_bit_identical(results, name):
    (start, one), *others = results(f"training, {name}")
    assert all(same(one, other) for _, other in others)
    assert not same(start[: len(one)], one)
    assert all(weight.isfinite().all() for weight in one)


@pytest.mark.parametrize("name", SIZES)
def test_the_gradient_is_the_mean_of_those_of_the_ranks(results, name):
    """Each rank perturbs by its own gradient and selects among its own rows."""
    found, expected = results(f"gradient, {name}"), None
    for rank in range(len(found)):
        inputs, targets = data(rank)[0]
        parts = list(zip(inputs.split(SIZES[name]), targets.split(SIZES[name])))

        def mean(model, parts=parts):  # batch norm sees one micro-batch at a time
            return torch.cat([cross_entropy(model(x), y) for x, y in parts]).mean()

        model = network()
        there = perturbed(model, mean, rho=0.5)
        chosen = []
        for x, y in parts:
            rise = (cross_entropy(there(x), y) - cross_entropy(model(x), y)).detach()
            index = rise.topk(max(1, len(x) // 2)).indices.sort().values
            chosen.append(cross_entropy(there(x[index]), y[index]))
        torch.cat(chosen).mean().backward()
        expected = [g / len(found) + (e if expected else 0) for g, e in zip(grads(there), expected or [0] * 99)]
    for rank_grads in found:
        for mine, theirs in zip(rank_grads, expected):
            torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("name", [*SIZES, "plain", "momentum", "previous"])
def test_only_the_last_backward_of_pass_3_communicates(results, name):
    for counts in results(f"communication, {name}"):
        *before, (reduced, _) = counts
        assert len(before) == {"one batch": 3, "micro-batches": 6}.get(name, 2)
        assert {count[0] for count in before} == {0}
        assert reduced > 0
        if name in SIZES:  # buffers, once before pass 1; pass 3's own broadcast comes with its forward
            assert {count[1] for count in before[: 2 * len(SIZES[name]) + 1]} == {1}


@pytest.mark.parametrize("when", [1, 2, 3])
def test_a_failed_step_leaves_the_replica_as_it_was(results, when):
    (found, one), *others = results(f"failure {when}")
    forward_replaced, weights_as_before, gradients_left = found
    assert not forward_replaced
    assert weights_as_before
    assert not gradients_left
    assert all(same(one, other) for _, other in others)  # and the next steps work


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("where", [where for where in OVERFLOWS if where != "pass 2"])
def test_an_overflow_on_one_rank_skips_the_step_on_all(results, where, name):
    for before, after, scale in results(f"overflow in {where}, {name}"):
        assert same(before, after)
        assert scale == 512


@pytest.mark.parametrize("name", SIZES)
def test_an_overflow_that_only_the_second_pass_sees_selects_its_rows_and_no_more(results, name):
    """It has no part in the gradient. An overflow of the network itself comes again in the third pass."""
    found = results(f"overflow in pass 2, {name}")
    for before, after, scale in found:
        assert not same(before, after)
        assert all(weight.isfinite().all() for weight in after)
        assert same(after, found[0][1])
        assert scale == 1024


@pytest.mark.parametrize("granularity", ["tensor", "element"])
def test_all_ranks_perturb_the_same_weights(results, granularity):
    one, *others = results(f"masks, {granularity}")
    for other in others:
        assert all(same(*masks) for masks in zip(one, other))
    shares = [torch.cat([mask.flatten() for mask in masks]).double().mean().item() for masks in one]
    assert all(0 < share < 1 for share in shares)
    assert len(set(shares)) > 1


@pytest.mark.parametrize("name", SIZES)
def test_buffers_are_those_of_plain_training(results, name):
    """Rank 0's reach the others with every step."""
    for found, expected in results(f"buffers, {name}"):
        assert same(found, expected)


def test_zero_redundancy_optimizer_as_the_base(results):
    ((found, expected), state), *others = results("zero")
    assert same(found, expected)
    assert all(same(found, theirs) for (theirs, _), _ in others)
    assert state["param_groups"][0]["esam_step"] == STEPS
    assert len(state["state"]) == len(found)  # after consolidate_state_dict(), of all ranks' parts


def test_a_killed_rank_takes_no_weights_with_it(results):
    first, killed, *rest = results("killed in pass 3")
    assert killed is None
    assert {first, *rest} in ({None}, {(True, False)})


@pytest.mark.parametrize("when", ["EARLY_1", "EARLY_2"])
def test_a_rank_killed_in_an_earlier_pass_takes_no_weights_with_it(tmp_path, when):
    assert ranks.run(__name__, 2, tmp_path, scenarios=when)("killed") == [(True, False), None]
