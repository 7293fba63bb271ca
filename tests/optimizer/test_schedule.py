"""Which steps are sharp, and which passes a sharp one makes, follows from the settings: the design's table."""

import itertools

import pytest
import torch
from networks import batches, cross_entropy, grads, mlp, same, train, values
from torch import Tensor, nn

from esam_kernels import ESAM, batch_closure
from esam_kernels.closure import BatchClosure
from esam_kernels.options import Settings
from esam_kernels.schedule import is_sharp, passes

SIZE = 16
BATCH = batches(1, size=SIZE)[0]

# Each pass, as the share of the batch that it runs on; of ascent, ascent_share, gamma, selection, and whether the
# closure knows its size.
WITHOUT_ASCENT = {
    (1.0, "increase"): ["descend 1"],
    (1.0, "loss"): ["descend 1"],
    (1.0, "random"): ["descend 1"],
    (0.5, "increase"): ["survey 1", "look 1", "descend 0.5"],
    (0.5, "loss"): ["survey 1", "descend 0.5"],
    (0.5, "random"): ["descend 0.5"],
}
WITH_ASCENT = {
    (1.0, "increase"): ["ascend 1", "descend 1"],
    (1.0, "loss"): ["ascend 1", "descend 1"],
    (1.0, "random"): ["ascend 1", "descend 1"],
    (0.5, "increase"): ["ascend 1", "look 1", "descend 0.5"],
    (0.5, "loss"): ["ascend 1", "descend 0.5"],
    (0.5, "random"): ["ascend 1", "descend 0.5"],
}
WITH_A_QUARTER = {
    (1.0, "increase"): ["ascend 0.25", "descend 1"],
    (1.0, "loss"): ["ascend 0.25", "descend 1"],
    (1.0, "random"): ["ascend 0.25", "descend 1"],
    (0.5, "increase"): ["survey 1", "ascend 0.25", "look 1", "descend 0.5"],
    (0.5, "loss"): ["survey 1", "ascend 0.25", "descend 0.5"],
    (0.5, "random"): ["ascend 0.25", "descend 0.5"],
}
TABLE = {
    ("gradient", 1.0): WITH_ASCENT,
    ("gradient", 0.25): WITH_A_QUARTER,
    **{(ascent, share): WITHOUT_ASCENT for ascent in ("momentum", "previous") for share in (0.25, 1.0)},
}
CASES = [
    (ascent, share, gamma, selection, by_hand)
    for (ascent, share), (gamma, selection), by_hand in itertools.product(TABLE, WITH_ASCENT, (False, True))
]


def expected_passes(ascent: str, share: float, gamma: float, selection: str, by_hand: bool) -> list[str]:
    expected = TABLE[ascent, share][gamma, selection]
    sizes_needed = (gamma < 1 or ascent == "gradient") and (ascent, share) != ("gradient", 1.0)
    return ["survey 1", *expected] if by_hand and sizes_needed and "survey 1" not in expected else expected


class Watch:
    """Notes what each call of a closure is, by what is done with its losses and where the weights are."""

    def __init__(self, model: nn.Module, closure: BatchClosure, by_hand: bool) -> None:
        self.model, self.closure = model, closure
        self.start = values(model)
        self.passes: list[str] = []
        self.losses: list[Tensor] = []
        self.backwards = 0
        self.indices: list[Tensor | None] = []
        call = self.note
        closure_call = type(closure).__call__
        if by_hand:
            self.watched = lambda index: call(closure_call(closure, index), index)
        else:

            class Watched(BatchClosure):
                def __call__(self, index=None):
                    return call(closure_call(self, index), index)

            closure.__class__ = Watched
            self.watched = closure

    def note(self, losses: Tensor, index: Tensor | None) -> Tensor:
        moved = not same(self.start, values(self.model))
        name = {(False, False): "survey", (False, True): "ascend", (True, False): "look", (True, True): "descend"}[
            moved, losses.requires_grad
        ]
        self.passes.append(f"{name} {(SIZE if index is None else len(index)) / SIZE:g}")
        self.losses.append(losses.detach().mean())
        self.indices.append(index)
        if losses.requires_grad:
            losses.register_hook(self.count)
        return losses

    def count(self, grad: Tensor) -> None:
        self.backwards += 1


@pytest.mark.parametrize(("ascent", "share", "gamma", "selection", "by_hand"), CASES)
def test_the_passes_that_a_step_makes_are_the_table_s(ascent, share, gamma, selection, by_hand):
    model = mlp()
    optimizer = ESAM(
        model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, ascent=ascent, ascent_share=share, gamma=gamma,
        selection=selection,
    )  # fmt: skip
    train(model, optimizer, batches(2))  # so that there is something to climb along
    watch = Watch(model, batch_closure(model, cross_entropy, *BATCH), by_hand)
    loss = optimizer.backward(watch.watched)
    expected = expected_passes(ascent, share, gamma, selection, by_hand)
    assert watch.passes == expected
    assert [name.split()[0] for name in expected] == list(
        passes(Settings(ascent=ascent, ascent_share=share, gamma=gamma, selection=selection), sizes_known=not by_hand)
    )
    assert watch.backwards == sum(name.startswith(("ascend", "descend")) for name in expected)
    torch.testing.assert_close(loss, watch.losses[0])  # of the first forward


@pytest.mark.parametrize(("start", "interval"), [(0, 1), (0, 3), (4, 1), (3, 2), (5, 3)])
def test_sharp_steps_begin_at_start_and_come_every_interval(start, interval):
    expected = [number in range(start, 12, interval) for number in range(12)]
    settings = Settings(start=start, interval=interval)
    assert [is_sharp(settings, number) for number in range(12)] == expected
    model = mlp()
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, start=start, interval=interval, gamma=1)
    for sharp in expected:
        watch = Watch(model, batch_closure(model, cross_entropy, *BATCH), by_hand=False)
        optimizer.step(watch.watched)
        # Without a perturbation it is the last pass at w.
        assert watch.passes == (["ascend 1", "descend 1"] if sharp else ["ascend 1"])


@pytest.mark.parametrize("ascent", ["gradient", "momentum", "previous"])
def test_steps_before_start_are_the_base_optimizer_s_bit_for_bit(ascent):
    model, twin = mlp(nn.BatchNorm1d(8)), mlp(nn.BatchNorm1d(8))
    optimizer = ESAM(model.parameters(), torch.optim.AdamW, lr=0.01, ascent=ascent, start=5)
    plain = torch.optim.AdamW(twin.parameters(), lr=0.01)
    data = batches(6)
    train(model, optimizer, data[:5])
    for inputs, targets in data[:5]:
        plain.zero_grad()
        cross_entropy(twin(inputs), targets).mean().backward()
        plain.step()
    assert same(values(model), values(twin))
    for one in (model, twin):
        one.zero_grad()
    optimizer.backward(batch_closure(model, cross_entropy, *data[5]))
    cross_entropy(twin(data[5][0]), data[5][1]).mean().backward()
    assert not same(grads(model), grads(twin))
    assert same(model.parameters(), twin.parameters())


def test_the_rows_of_the_ascent_are_exactly_its_share_and_drawn_by_seed_and_step_alone():
    def rows(seed: int, scale: float = 1.0) -> list[list[int]]:
        model, found = mlp(), []
        optimizer = ESAM(
            model.parameters(), torch.optim.SGD, lr=0.1, ascent_share=0.29, gamma=0.29, selection="random", seed=seed
        )
        for _ in range(60):
            torch.rand(3)  # torch's generator has no say
            inputs, targets = BATCH
            watch = Watch(model, batch_closure(model, cross_entropy, inputs * scale, targets), by_hand=False)
            optimizer.step(watch.watched)
            found.append([index.tolist() for index in watch.indices])
        return found

    found = rows(3)
    assert found == rows(3, scale=2.0)
    assert found != rows(4)
    ascents, descents = ([step[i] for step in found] for i in (0, 1))
    assert all(len(set(row)) == len(row) == 4 and row == sorted(row) for row in (*ascents, *descents))
    assert len(set(map(tuple, ascents))) > 50
    counts = torch.bincount(torch.tensor(ascents).flatten(), minlength=SIZE)
    assert ((counts - 15).abs() < 4 * (60 * 0.25 * 0.75) ** 0.5).all()  # 4 sigma of the binomial
    # What is descended on is another draw: in common they have what chance gives.
    common = sum(len(set(a) & set(b)) for a, b in zip(ascents, descents)) / 60
    assert 0.6 < common < 1.4


def test_micro_batches_each_ascend_on_their_share():
    model = mlp()
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, ascent_share=0.25, gamma=1)
    watches = [
        Watch(model, batch_closure(model, cross_entropy, x, y), by_hand=False)
        for x, y in zip(BATCH[0].split([4, 12]), BATCH[1].split([4, 12]))
    ]
    optimizer.backward([watch.watched for watch in watches])
    assert [len(watch.indices[0]) for watch in watches] == [1, 3]
    assert [watch.indices[1] for watch in watches] == [None, None]


@pytest.mark.parametrize(
    ("options", "rho"),
    [
        ({}, 0.05),
        ({"ascent": "momentum", "momentum": 0.9}, 0.3),
        ({"ascent": "momentum", "base": torch.optim.AdamW}, 1.0),
        ({"ascent": "momentum", "base": torch.optim.RMSprop, "momentum": 0.9}, 0.3),
        ({"ascent": "previous"}, 0.1),
        ({"ascent": "previous", "rho": 0.7}, 0.7),
        ({"ascent": "momentum", "momentum": 0.9, "rho": None}, 0.3),
    ],
)
def test_a_rho_left_out_takes_the_source_s_default(options, rho):
    options = dict(options)
    layers = mlp()
    groups = [{"params": layers[0].parameters()}, {"params": layers[2].parameters(), "rho": 0.02}]
    optimizer = ESAM(groups, options.pop("base", torch.optim.SGD), lr=0.1, **options)
    assert [group["rho"] for group in optimizer.param_groups] == [rho, 0.02]
    optimizer.add_param_group({"params": layers[4].parameters()})
    assert optimizer.param_groups[2]["rho"] == rho
    for group in optimizer.param_groups:
        group["ascent"] = "gradient"
    train(layers, optimizer, [BATCH])
    assert [group["rho"] for group in optimizer.param_groups] == [rho, 0.02, rho]  # both are to be set
