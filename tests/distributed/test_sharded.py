"""With FSDP2 (``fully_shard``) a step is the one that a single process makes with all ranks' batches.

The truth is ESAM itself on one process without sharding, whose micro-batches are those of all the ranks.
"""

import copy
import os
import re
import signal
from collections.abc import Iterable
from unittest import mock

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from networks import batches, cross_entropy, same
from ranks import device, needs_fsdp2
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.torch_version import TorchVersion

from esam_kernels import ESAM, batch_closure, ops
from esam_kernels.passes.draw import draw_tensors
from esam_kernels.passes.sources import PREVIOUS
from esam_kernels.sharding import ShardedModules

STEPS = 4
SEED = 5


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Few of its shards are even, some are empty, and their offsets are odd."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 1), nn.Tanh(), nn.Linear(1, 3)
    ).to(device(), dtype)


def tied(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).to(device(), dtype)
    model[2].weight = model[0].weight
    return model


class ChannelsLast(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        return features.unflatten(1, (2, 2, 2)).to(memory_format=torch.channels_last)


def group_norm(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """PyTorch's CPU backward crashes if the first layer is frozen for the first pass, since it is not drawn."""
    torch.manual_seed(0)
    layers = nn.Linear(4, 8), ChannelsLast(), nn.GroupNorm(1, 2), nn.Flatten(), nn.Linear(8, 3)
    return nn.Sequential(*layers).to(device(), dtype)


def shard(model: nn.Sequential, **options) -> nn.Sequential:
    """Two layers by themselves; the last ones are the root's, which stays gathered after a forward by default."""
    for layer in (model[0], model[2]):
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def optimizer_of(network: nn.Module, base=torch.optim.SGD, **options) -> ESAM:
    base_options = {"lr": 0.1, "momentum": 0.9} if base is torch.optim.SGD else {"lr": 0.02}
    return ESAM(network.parameters(), base, **{**base_options, "rho": 0.5, "seed": SEED, **options})


def data(rank: int, sizes: list[int], step: int) -> list[tuple[Tensor, Tensor]]:
    """The micro-batches of a rank."""
    inputs, targets = batches(1, size=sum(sizes), seed=100 * step + rank, dtype=torch.float64)[0]
    return list(zip(inputs.to(device()).split(sizes), targets.to(device()).split(sizes)))


def loss_weighing(weight: float):
    def loss(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        losses = cross_entropy(outputs, targets)
        return losses, torch.full_like(losses, weight)

    return loss


def closures_of(model: nn.Module, rank: int, sizes: list[int], step: int) -> list:
    return [batch_closure(model, cross_entropy, *batch) for batch in data(rank, sizes, step)]


def closures_of_all(model: nn.Module, sizes: list[list[int]], step: int) -> list:
    """Those of all the ranks, each of which counts the same."""
    return [
        batch_closure(model, loss_weighing(1 / sum(sizes[rank])), *batch)
        for rank in range(dist.get_world_size())
        for batch in data(rank, sizes[rank], step)
    ]


def whole(model: nn.Module) -> list[Tensor]:
    return [param.full_tensor().detach().cpu() for param in model.parameters()]


def plain(model: nn.Module) -> list[Tensor]:
    return [param.detach().cpu() for param in model.parameters()]


def shards(model: nn.Module) -> list[Tensor]:
    return [param.to_local().detach().clone() for param in model.parameters()]


EVEN = [[12]] * 3
TRAINING = {
    "by tensor": {},
    "few tensors": {"esam": {"beta": 0.1}},
    "by element": {"esam": {"granularity": "element"}},
    "by element, adaptive": {"esam": {"granularity": "element", "adaptive": True}},
    "adaptive AdamW": {"esam": {"adaptive": True, "base": torch.optim.AdamW}},
    "SAM": {"esam": {"beta": 1.0, "gamma": 1.0}},
    "selection by loss": {"esam": {"selection": "loss"}},
    "micro-batches": {"sizes": [[4, 8]] * 3},
    "uneven micro-batches": {"sizes": [[4, 8], [10, 6], [2, 2]]},
    "plain steps between": {"esam": {"interval": 2}, "sizes": [[4, 8], [10, 6], [2, 2]]},
    "resharded after forward": {"fsdp": {"reshard_after_forward": True}},
    "kept after forward": {"fsdp": {"reshard_after_forward": False}},
    "not resharded after backward": {"reshard_after_backward": False, "sizes": [[4, 8]] * 3},
    "gradients reduced in float64": {  # and kept elsewhere than in .grad between micro-batches
        "fsdp": {"mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float64)},
        "dtype": torch.float32,
        "sizes": [[4, 8]] * 3,
    },
    "group norm in channels_last": {"network": group_norm, "shard": fully_shard, "esam": {"beta": 0.3}},
    "momentum": {"esam": {"ascent": "momentum", "gamma": 1.0}},
    "momentum by element, with a selection": {"esam": {"ascent": "momentum", "granularity": "element"}},
    "momentum of AdamW, adaptive, in micro-batches": {
        "esam": {"ascent": "momentum", "adaptive": True, "base": torch.optim.AdamW},
        "sizes": [[4, 8], [10, 6], [2, 2]],
    },
    "previous": {"esam": {"ascent": "previous", "gamma": 1.0}},
    "previous by element, by loss, in micro-batches": {
        "esam": {"ascent": "previous", "granularity": "element", "selection": "loss"},
        "sizes": [[4, 8]] * 3,
    },
    "previous of AdamW, adaptive": {"esam": {"ascent": "previous", "adaptive": True, "base": torch.optim.AdamW}},
    "momentum, offloaded": {
        "esam": {"ascent": "momentum"},
        "fsdp": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
        "only_on": "cpu",
    },
    "momentum in every second step from the second on": {"esam": {"ascent": "momentum", "start": 1, "interval": 2}},
    "tied weights": {"network": tied, "shard": fully_shard},
    "offloaded": {"fsdp": {"offload_policy": CPUOffloadPolicy(pin_memory=False)}, "only_on": "cpu"},
}


def training(
    rank,
    esam=(),
    fsdp=(),
    sizes=EVEN,
    dtype=torch.float64,
    reshard_after_backward=True,
    only_on=None,
    network=network,
    shard=shard,
):
    """The weights after some steps, and those of the single process."""
    if only_on not in (None, device()):  # gloo and NCCL together would be needed
        return [], []
    expected, model = network(), shard(network(dtype), **dict(fsdp))
    model.set_reshard_after_backward(reshard_after_backward)
    alone, together = (optimizer_of(one, **dict(esam)) for one in (expected, model))
    for step in range(STEPS):
        alone.step(closures_of_all(expected, sizes, step))
        closures = closures_of(model.to(dtype), rank, sizes[rank], step)
        for closure in closures:
            closure._inputs = closure._inputs.to(dtype)
        together.step(closures)
    return whole(model), plain(expected)


def share(rank, **esam):
    """The same batches on all ranks, of which they draw the same rows."""
    expected, model = network(), shard(network())
    alone, together = (optimizer_of(one, ascent_share=0.3, **esam) for one in (expected, model))
    for step in range(STEPS):
        alone.step(closures_of(expected, 0, [12], step))
        together.step(closures_of(model, 0, [12], step))
    return whole(model), plain(expected)


def overflow_of_what_is_kept(rank):
    """In a gradient of one rank alone, in a step that is taken all the same: all ranks keep what they had."""
    model = shard(network())
    optimizer = optimizer_of(model, ascent="previous")
    found = []
    for step, spoiled in enumerate([False, True]):
        optimizer.backward(closures_of(model, rank, [12], step))
        found.append([param.grad.to_local().clone() for param in model.parameters()])
        if spoiled and rank == 0:
            next(model.parameters()).grad.to_local()[0, 0] = float("inf")
        optimizer.step()
        kept = [optimizer.state[param][PREVIOUS].to_local() for param in model.parameters()]
        found.append([one.clone() for one in kept])
    return found


def gradient(rank):
    expected, model = network(), shard(network())
    optimizer_of(expected).backward(closures_of_all(expected, EVEN, 0))
    optimizer_of(model).backward(closures_of(model, rank, EVEN[0], 0))
    return [param.grad.full_tensor() for param in model.parameters()], [param.grad for param in expected.parameters()]


def perturbation(rank, granularity, dtype):
    """Of first_step, with gradients whose norm is exact in any order of summation: no bit may differ."""
    results = []
    for model in (network(dtype), shard(network(dtype))):
        optimizer = optimizer_of(model, granularity=granularity, gamma=1.0, model=model)
        start = [param.detach().clone() for param in model.parameters()]
        with torch.no_grad():
            for i, param in enumerate(model.parameters()):
                param.grad = (param * 64).round() + i
        optimizer.first_step()
        moved = [param.detach().clone() for param in model.parameters()]
        optimizer.restore()
        results.append((start, moved, list(model.parameters())))
    return [
        [
            [t.full_tensor().detach().cpu() if isinstance(t, DTensor) else t.detach().cpu() for t in part]
            for part in result
        ]
        for result in results
    ]


def gradients_computed(rank, beta):
    """The parameters whose gradients each pass computes, and those that are drawn."""
    model = shard(network())
    names = [name for name, _ in model.named_parameters()]
    passes: list[set[str]] = []

    def watch(module: nn.Module, _, prefix: str) -> None:
        for name, param in module.named_parameters(recurse=False):  # gathered: the forward is about to run
            if param.requires_grad:
                param.register_hook(lambda _, name=prefix + name: passes[-1].add(name))

    for prefix, module in model.named_children():
        module.register_forward_pre_hook(lambda module, args, prefix=prefix: watch(module, args, f"{prefix}."))
    closure = closures_of(model, rank, EVEN[0], 0)[0]

    def counting(index):
        passes.append(set())
        return closure(index)

    counting.model = model
    optimizer_of(model, beta=beta).backward(counting)
    drawn = {names[i] for i in draw_tensors(range(len(names)), beta, SEED, 0)}
    return passes, drawn, set(names)


class WithUnused(nn.Module):
    """More parameters than are used, so that often no drawn one is; with a trunk, the root has some of its own."""

    def __init__(self, trunk: bool) -> None:
        super().__init__()
        self.heads = nn.ModuleList(network() for _ in range(2))
        self.trunk = nn.Linear(4, 4).to(device(), torch.float64) if trunk else nn.Identity()
        self.head = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.heads[self.head](self.trunk(x))


# How a model of several heads is sharded: as a whole, or with modules in it by themselves.
NESTING = {
    "one module": (False, lambda model: []),
    "heads": (False, lambda model: model.heads),
    "heads and a trunk": (True, lambda model: model.heads),
    "layers of heads": (True, lambda model: [layer for head in model.heads for layer in (head[0], head[4], head)]),
}


def unsharded_and_sharded(nesting: str) -> tuple[WithUnused, WithUnused]:
    trunk, inner = NESTING[nesting]
    expected = WithUnused(trunk)
    model = copy.deepcopy(expected)
    for module in inner(model):
        fully_shard(module)
    return expected, fully_shard(model)


def with_head(closure, head: int):
    def call(index):
        closure.model.head = head
        return closure(index)

    call.model = closure.model
    return call


def unused(rank, nesting):
    """A head for each micro-batch, of which often one has no drawn parameter, or both have none."""
    expected, model = unsharded_and_sharded(nesting)
    alone, together = (optimizer_of(one, beta=0.05) for one in (expected, model))

    for step in range(8):
        heads = [step % 2] if step < 4 else [0, 1]
        sizes = [[12 // len(heads)] * len(heads)] * 3
        closures = closures_of_all(expected, sizes, step)
        alone.step([with_head(closure, heads[i % len(heads)]) for i, closure in enumerate(closures)])
        together.step([with_head(*both) for both in zip(closures_of(model, rank, sizes[0], step), heads)])
    return whole(model), plain(expected)


def used_early(rank, nesting):
    """The one drawn parameter is used in the first micro-batch alone."""
    expected, model = unsharded_and_sharded(nesting)
    params = [name for name, _ in model.named_parameters()]
    draws = [params[draw_tensors(range(len(params)), 1e-9, SEED, step)[0]] for step in range(99)]
    step = next(step for step, name in enumerate(draws) if name.startswith("heads.0."))
    gradients = []
    for one, closures in (
        (model, closures_of(model, rank, [6, 6], 0)),
        (expected, closures_of_all(expected, [[6, 6]] * 3, 0)),
    ):
        optimizer = optimizer_of(one, beta=1e-9, gamma=1.0, rho=1e-9)
        optimizer.param_groups[0]["esam_step"] = step
        optimizer.backward([with_head(closure, i % 2) for i, closure in enumerate(closures)])
        gradients.append([param.grad for param in one.parameters()])
    return [grad.full_tensor() for grad in gradients[0]], gradients[1]


def failing(closures: Iterable, when: int) -> list:
    calls = 0

    def make(closure):
        def call(index):
            nonlocal calls
            calls += 1
            losses = closure(index)
            if calls == when:
                raise InterruptedError
            return losses

        call.model = closure.model
        return call

    return [make(closure) for closure in closures]


def as_before(model: nn.Module, before: list[Tensor]) -> bool:
    params = list(model.parameters())
    return (
        all(isinstance(param, DTensor) and param.requires_grad and param.grad is None for param in params)
        and not ShardedModules(model.modules(), params).accumulated()
        and same(before, shards(model))
    )


def failure(rank, sizes, **fsdp):
    """All ranks fail at each call of a closure in turn, and then go on as if nothing had happened."""
    expected, model = network(), shard(network(), **fsdp)
    alone, together = optimizer_of(expected), optimizer_of(model)
    found = []
    for step in range(3 * len(sizes)):
        before = shards(model)
        together.zero_grad()
        with pytest.raises(InterruptedError):
            together.backward(failing(closures_of(model, rank, sizes, step), step + 1))
        found.append(as_before(model, before))
        together.step(closures_of(model, rank, [12], step))  # whose gradients are to be reduced again
        alone.step(closures_of_all(expected, EVEN, step))
    return found, whole(model), plain(expected)


def evaluation_before(rank):
    """A no-grad forward leaves weights gathered, which must not survive their change."""
    expected, model = network(), shard(network())
    alone, together = optimizer_of(expected), optimizer_of(model)
    for step in range(3):
        with torch.no_grad():
            model(data(rank, [12], step)[0][0])
        alone.step(closures_of_all(expected, EVEN, step))
        together.step(closures_of(model, rank, [12], step))
    return whole(model), plain(expected)


OVERFLOWS = [(1,), (3,), (2, 3)]


def overflow(rank, passes):
    """In some passes of rank 0 alone."""
    model = shard(network(torch.float32))
    optimizer, scaler = optimizer_of(model), torch.amp.GradScaler(device(), init_scale=1024.0)
    inputs, targets = data(rank, [12], 0)[0]
    closure, calls = batch_closure(model, cross_entropy, inputs.float(), targets), 0

    def overflowing(index):
        nonlocal calls
        calls += 1
        return closure(index) * (float("inf") if rank == 0 and calls in passes else 1.0)

    overflowing.model = model
    before = shards(model)
    optimizer.backward(overflowing, scaler)
    scaler.step(optimizer)
    scaler.update()
    return same(before, shards(model)), scaler.get_scale()


def held(rank):
    """The sizes of what one rank keeps between the perturbation and its end."""
    model = shard(network())
    kept = []
    back_up, perturb = ops.Served.back_up, ops.Served.perturb_

    def watched(served):
        backups = back_up(served)
        kept.append([backup.numel() for backup in backups])
        return backups

    def moved(served, gradients, *rest):
        kept.append([gradient.numel() for gradient in gradients])
        return perturb(served, gradients, *rest)

    with mock.patch.object(ops.Served, "back_up", watched), mock.patch.object(ops.Served, "perturb_", moved):
        optimizer_of(model, beta=1.0).backward(closures_of(model, rank, EVEN[0], 0))
    kept.append([tensor.numel() for tensor in shards(model)])
    return *kept, sum(param.numel() for param in model.parameters())


def checkpoint(rank, granularity, ascent="gradient"):
    """Saved by all ranks but the last, and loaded by all of them."""
    world = dist.get_world_size()
    few = list(range(max(1, world - 1)))
    mesh = DeviceMesh(device(), few)
    folder = f"checkpoint, {granularity}, {ascent}"
    options = {"granularity": granularity, "base": torch.optim.AdamW, "ascent": ascent}
    if rank in few:
        model = shard(network(), mesh=mesh)
        optimizer = optimizer_of(model, **options)
        for step in range(3):
            optimizer.step(closures_of(model, 0, [12], step))
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder, process_group=mesh.get_group())
    dist.barrier()
    model = shard(network())
    optimizer = optimizer_of(model, **{**options, "seed": 0})
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    expected = network()
    alone = optimizer_of(expected, **options)
    for step in range(6):
        alone.step(closures_of(expected, 0, [12], step))
        if step >= 3:
            optimizer.step(closures_of(model, 0, [12], step))
    return whole(model), plain(expected)


def differing(rank, name):
    """What is raised where ranks have settings of their own, which then works with the same."""
    model = shard(network())
    values = [0.1 * (1 + rank), 0.1] if name in ("rho", "gamma") else [rank, 0]
    optimizer, before = optimizer_of(model), shards(model)
    closures = closures_of(model, rank, [12], 0)
    messages = []
    for act in (lambda: optimizer.backward(closures), lambda: optimizer.step(closures)):
        optimizer.param_groups[0][name] = values[0]
        with pytest.raises(ValueError) as refusal:  # noqa: PT011
            act()
        messages.append(str(refusal.value))
        assert as_before(model, before)
    optimizer.param_groups[0][name] = values[1]
    optimizer.step(closures)
    return messages


def refusals(rank):
    """What each raises."""
    partly = network()
    sharded, differently = shard(network()), shard(network())
    differently.set_reduce_scatter_unused_params(True)
    cases = {
        "another dimension": (
            fully_shard(nn.Linear(12, 12, bias=False).to(device()), shard_placement_fn=lambda _: Shard(1)),
            {},
        ),
        "not all": (fully_shard(partly, ignored_params={partly[0].weight}), {}),
        "all micro-batches": (sharded, {"select_over": "all"}),
        "different parameters": (differently, {}),
    }
    if device() == "cuda":  # it runs on no CPU
        cases["the old one"] = FullyShardedDataParallel(network(), device_id=rank), {}
    messages = {}
    for name, (model, options) in cases.items():
        inputs = torch.randn(4, next(iter(model.parameters())).shape[-1] if name == "another dimension" else 4)
        closures = [batch_closure(model, cross_entropy, inputs, torch.zeros(4, dtype=torch.long))] * 2
        with pytest.raises(ValueError) as refusal:  # noqa: PT011
            optimizer_of(model, **options).backward(closures)
        messages[name] = str(refusal.value)
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        optimizer_of(sharded).backward(lambda index: cross_entropy(sharded(torch.ones(2, 4)), torch.ones(2)))
    messages["an unknown model"] = str(refusal.value)
    return messages


def a_killed_rank(rank, when):
    """It dies in a pass, while the others wait for its weights or gradients."""
    if dist.get_world_size() == 1 or dist.get_backend() != "gloo":  # NCCL's watchdog ends the process
        return [True] if rank == 0 else None
    model = shard(network())
    closure, calls = closures_of(model, rank, [12], 0)[0], 0
    before = shards(model)

    def dying(index):
        nonlocal calls
        calls += 1
        if calls == when and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return closure(index)

    dying.model = model
    with pytest.raises(RuntimeError):
        optimizer_of(model).backward(dying)
    return [as_before(model, before)]


SCENARIOS = {
    **{f"training, {name}": (training, options) for name, options in TRAINING.items()},
    "gradient": (gradient, {}),
    **{f"share, gamma {gamma}": (share, {"gamma": gamma}) for gamma in (0.5, 1.0)},
    "overflow of what is kept": (overflow_of_what_is_kept, {}),
    **{
        f"perturbation, {granularity}, {dtype}": (perturbation, {"granularity": granularity, "dtype": dtype})
        for granularity in ("tensor", "element")
        for dtype in (torch.float64, torch.float32, torch.bfloat16)
    },
    **{f"gradients computed, {beta}": (gradients_computed, {"beta": beta}) for beta in (0.1, 0.5)},
    **{f"unused, {nesting}": (unused, {"nesting": nesting}) for nesting in NESTING},
    "failure, one batch": (failure, {"sizes": [12]}),
    "failure, micro-batches": (failure, {"sizes": [4, 8]}),
    "failure, gradients reduced in float32": (
        failure,
        {"sizes": [4, 8], "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32)},
    ),
    **{f"used early, {nesting}": (used_early, {"nesting": nesting}) for nesting in NESTING},
    "evaluation before": (evaluation_before, {}),
    **{f"overflow in passes {passes}": (overflow, {"passes": passes}) for passes in OVERFLOWS},
    "held": (held, {}),
    **{
        f"checkpoint, {granularity}": (checkpoint, {"granularity": granularity})
        for granularity in ("tensor", "element")
    },
    **{
        f"checkpoint, {ascent}": (checkpoint, {"granularity": "tensor", "ascent": ascent})
        for ascent in ("momentum", "previous")
    },
    "refusals": (refusals, {}),
    **{f"ranks that differ in {name}": (differing, {"name": name}) for name in ("seed", "rho", "gamma", "esam_step")},
    "killed in pass 3": (a_killed_rank, {"when": 3}),  # the last one: nothing works after it
}


EARLY_1 = {"killed": (a_killed_rank, {"when": 1})}
EARLY_2 = {"killed": (a_killed_rank, {"when": 2})}

# Three ranks have shards of unlike sizes, and some of them none, where two would share evenly.
WORLDS = [
    pytest.param(("gloo", 3), marks=needs_fsdp2),
    pytest.param(("nccl", 3), marks=[needs_fsdp2, pytest.mark.gpu]),
]


@pytest.fixture(scope="module", params=WORLDS, ids=str)
def results(request, tmp_path_factory):
    backend, world = request.param
    if backend == "nccl":
        world = min(world, torch.cuda.device_count())
    return ranks.run(__name__, world, tmp_path_factory.mktemp("ranks"), backend)


def check_close(found: list[Tensor], expected: list[Tensor], rtol: float = 1e-8) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol / 100, check_dtype=False)


@pytest.mark.parametrize("name", TRAINING)
def test_a_run_is_that_of_one_process(results, name):
    for found, expected in results(f"training, {name}"):
        check_close(found, expected, 1e-3 if "float64" in name else 1e-8)


def test_the_gradient_is_that_of_one_process(results):
    for found, expected in results("gradient"):
        check_close(found, expected)


@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_a_share_of_the_rows_is_that_of_one_process(results, gamma):
    for found, expected in results(f"share, gamma {gamma}"):
        check_close(found, expected)


def test_a_gradient_that_is_not_finite_on_one_rank_is_kept_on_none(results):
    for gradient, kept, next_gradient, kept_then in results("overflow of what is kept"):
        assert same(gradient, kept)
        assert same(kept, kept_then)
        assert not same(gradient, next_gradient)


@pytest.mark.parametrize("granularity", ["tensor", "element"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_masks_and_rounding_are_those_of_one_process(results, granularity, dtype):
    for (start, moved, restored), (_, sharded_moved, sharded_restored) in results(
        f"perturbation, {granularity}, {dtype}"
    ):
        # Shards add their squares up in another order, which may change the last bit of the norm.
        torch.testing.assert_close(sharded_moved, moved, rtol=2 * torch.finfo(dtype).eps, atol=0)
        assert same([a != b for a, b in zip(moved, start)], [a != b for a, b in zip(sharded_moved, start)])
        assert same(start, restored)
        assert same(start, sharded_restored)
        assert not same(start, moved)


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_pass_1_computes_the_gradients_of_the_drawn_weights_alone(results, beta):
    for (first, second, third), drawn, every in results(f"gradients computed, {beta}"):
        assert first == drawn
        assert drawn < every
        assert second == set()
        assert third == every


@pytest.mark.parametrize("nesting", NESTING)
def test_drawn_weights_that_are_not_used(results, nesting):
    for found, expected in results(f"unused, {nesting}"):
        check_close(found, expected)


@pytest.mark.parametrize("nesting", NESTING)
def test_a_drawn_weight_that_the_last_micro_batch_does_not_use(results, nesting):
    for found, expected in results(f"used early, {nesting}"):
        check_close(found, expected)


@pytest.mark.parametrize("name", ["one batch", "micro-batches", "gradients reduced in float32"])
def test_a_failed_step_leaves_everything_as_it_was(results, name):
    for found, weights, expected in results(f"failure, {name}"):
        assert found == [True] * len(found)
        check_close(weights, expected, 1e-3 if "float32" in name else 1e-8)


def test_weights_that_an_evaluation_has_gathered(results):
    for found, expected in results("evaluation before"):
        check_close(found, expected)


@pytest.mark.parametrize("passes", OVERFLOWS, ids=str)
def test_an_overflow_on_one_rank_skips_the_step_on_all(results, passes):
    for answer in results(f"overflow in passes {passes}"):
        assert answer == (True, 512.0)


def test_each_rank_keeps_backups_and_gradients_of_its_own_shards_alone(results):
    found = results("held")
    for backups, gradients, sizes, _ in found:
        assert backups == gradients == sizes
    assert sum(sum(backups) for backups, *_ in found) == found[0][-1]


@pytest.mark.parametrize("name", ["tensor", "element", "momentum", "previous"])
def test_a_checkpoint_is_loaded_on_another_number_of_ranks(results, name):
    for found, expected in results(f"checkpoint, {name}"):
        check_close(found, expected)


@pytest.mark.parametrize("name", ["seed", "rho", "gamma", "esam_step"])
def test_settings_that_differ_between_ranks_are_refused_in_the_first_step_by_name(results, name):
    for messages in results(f"ranks that differ in {name}"):
        for message in messages:
            assert re.search(rf"^{name} is .* on one rank and .* on another: with FSDP2 give every rank", message)


def test_what_cannot_be_done_is_refused(results):
    fixes = {
        "another dimension": "first dimension",
        "not all": "ignored_params",
        "the old one": "fully_shard",
        "all micro-batches": "select_over='micro_batch'",
        "different parameters": "leave it off",
        "an unknown model": "model=model",
    }
    for messages in results("refusals"):
        assert len(messages) >= 5
        for name, message in messages.items():
            assert fixes[name] in message


def test_a_killed_rank_takes_no_weights_with_it(results):
    one, *others = results("killed in pass 3")
    assert all(one)
    assert others[:1] in ([], [None])
    assert all(all(found) for found in others[1:])


@needs_fsdp2
@pytest.mark.parametrize("when", ["EARLY_1", "EARLY_2"])
def test_a_rank_killed_in_an_earlier_pass_takes_no_weights_with_it(tmp_path, when):
    assert ranks.run(__name__, 2, tmp_path, scenarios=when)("killed") == [[True], None]


@pytest.mark.usefixtures("one_rank")
def test_an_older_torch_is_refused_before_anything_changes(monkeypatch):
    model = shard(network())
    optimizer = optimizer_of(model)
    before = shards(model)
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.12.1"))
    with pytest.raises(ValueError, match=r"2\.13 on.*2\.12\.1.*DistributedDataParallel"):
        optimizer.backward(closures_of(model, 0, [12], 0))
    assert same(before, shards(model))
    assert all(isinstance(param, DTensor) and param.grad is None for param in model.parameters())
    optimizer.base.step(lambda: closures_of(model, 0, [12], 0)[0](None).mean().backward())
    assert not same(before, shards(model))
