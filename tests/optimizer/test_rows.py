"""Each loss is that of one row of the batch, in every pass, or the step is refused before it trains on other rows."""

import pytest
import torch
from networks import batches, cross_entropy, mlp, same, values
from torch import Tensor, nn

from esam_kernels import ESAM, batch_closure

SIZE = 8
INPUTS, TARGETS = batches(1, size=SIZE)[0]
OPTIONS = [{}, {"gamma": 1.0}, {"selection": "loss"}, {"rho": 0.0}]


def refused(model: nn.Module, loss_fn, words: str, inputs=INPUTS, targets=TARGETS, **options) -> None:
    """In the first pass, with everything as it was."""
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, **options)
    before = values(model)
    with pytest.raises(ValueError, match=words):
        optimizer.backward(batch_closure(model, loss_fn, inputs, targets))
    assert same(values(model), before)
    assert len(calls) == 1


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_loss_that_drops_rows(options):
    targets = TARGETS.clone()
    targets[3] = -100

    def loss_fn(outputs, y):
        return cross_entropy(outputs[y != -100], y[y != -100])

    refused(
        mlp(), loss_fn, r"7 losses for 8 rows.*0 with the weight 0.*\(losses, weights\)", targets=targets, **options
    )

    def weighted(outputs, y):  # what the message says
        return cross_entropy(outputs, y), y != -100

    model = mlp()
    loss = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, **options).backward(
        batch_closure(model, weighted, INPUTS, targets)
    )
    torch.testing.assert_close(loss, nn.functional.cross_entropy(model(INPUTS), targets).detach())


def test_rows_dropped_with_weights():
    def loss_fn(outputs, y):
        return cross_entropy(outputs, y)[1:], torch.ones(SIZE - 1)

    refused(mlp(), loss_fn, "7 losses for 8 rows.*weight 0")


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_loss_that_adds_rows(options):
    refused(mlp(), lambda outputs, y: cross_entropy(outputs, y).repeat(2)[:-1], "15 losses for 8 rows", **options)


def test_a_loss_that_drops_rows_of_a_selection_alone():
    model = mlp()
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1)

    def loss_fn(outputs, y):
        return cross_entropy(outputs, y)[: 8 if len(y) == 8 else 3]

    with pytest.raises(ValueError, match="3 losses for 4 rows"):
        optimizer.backward(batch_closure(model, loss_fn, INPUTS, TARGETS))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_mean_of_a_batch_in_the_shape_of_one_row(options):
    def loss_fn(outputs, y):
        return cross_entropy(outputs, y).mean().view(1)

    refused(mlp(), loss_fn, r"1 losses for 8 rows.*reduction='none'", **options)
    model = mlp()  # a batch of one row has no other shape
    ESAM(model.parameters(), torch.optim.SGD, lr=0.1, **options).step(
        batch_closure(model, loss_fn, INPUTS[:1], TARGETS[:1])
    )


class PerToken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.parametrize("flat", [True, False])
def test_losses_of_tokens_are_refused_with_the_loss_that_takes_them(flat):
    tokens, targets = torch.randn(SIZE, 5, 4), torch.randint(3, (SIZE, 5))

    def loss_fn(logits, y):
        losses = cross_entropy(logits.view(-1, 3), y.view(-1))
        return losses if flat else losses.view(y.shape)

    refused(PerToken(), loss_fn, r"esam_kernels\.token_loss", inputs=tokens, targets=targets)


# A batch that is written to.


class Scaled(nn.Module):
    def __init__(self, write) -> None:
        super().__init__()
        self.inner, self.write = mlp(), write

    def forward(self, x: Tensor, *_: Tensor) -> Tensor:
        return self.inner(self.write(x))


WRITES = {
    "mul_": lambda x: x.mul_(2),
    "relu": nn.ReLU(inplace=True),
    "an element": lambda x: x.index_fill_(0, torch.tensor(0), 1.0),
    "a view": lambda x: x.view(-1).add_(1).view(x.shape),
}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("write", WRITES)
def test_a_forward_that_writes_into_its_input(write, options):
    words = r"inputs in place.*clone.*inplace=False"
    refused(Scaled(WRITES[write]), cross_entropy, words, inputs=INPUTS.clone(), **options)
    model = Scaled(lambda x: WRITES[write](x.clone()))
    ESAM(model.parameters(), torch.optim.SGD, lr=0.1, **options).step(
        batch_closure(model, cross_entropy, INPUTS.clone(), TARGETS)
    )


def test_the_entry_that_is_written_is_named():
    class Second(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x, extra):
            extra["table"][0].add_(1)
            return self.inner(x)

    batch = {"x": INPUTS, "extra": {"table": [torch.ones(3)]}}
    closure_options = {"shared": ["inputs.extra"]}
    model = Second()
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match=r"writes into inputs\.extra\.table\.0 in place"):
        optimizer.backward(batch_closure(model, cross_entropy, batch, TARGETS, **closure_options))

    def loss_fn(outputs, y):
        return cross_entropy(outputs, y.clamp_(max=1))

    refused(mlp(), loss_fn, "writes into targets in place", targets=TARGETS.clone())


def test_a_batch_made_in_inference_mode_has_no_versions():
    with torch.inference_mode():
        inputs = INPUTS.clone()
    model = mlp()

    class Cloning(nn.Module):
        def forward(self, x):
            return model(x.clone())

    ESAM(model.parameters(), torch.optim.SGD, lr=0.1).step(batch_closure(Cloning(), cross_entropy, inputs, TARGETS))


# A batch norm trains on two rows at least.


def taken(size: int, model: nn.Module, inputs: Tensor | None = None, pieces: int = 1, **options) -> list[int]:
    """How many rows the last pass takes of each micro-batch."""
    inputs = INPUTS[:size] if inputs is None else inputs
    seen = []
    closures = [
        batch_closure(model, cross_entropy, x, y) for x, y in zip(inputs.chunk(pieces), TARGETS[:size].chunk(pieces))
    ]

    def watched(closure):
        def call(index):
            if index is not None:
                seen.append(len(index))
            return closure(index)

        return call

    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, model=model, **options)
    optimizer.step([watched(closure) for closure in closures])
    return seen


@pytest.mark.parametrize("selection", ["increase", "loss", "random"])
@pytest.mark.parametrize("size", [2, 3])
def test_the_last_small_batch_of_an_epoch_with_batch_norm(size, selection):
    model = mlp(nn.BatchNorm1d(8))
    assert taken(size, model, selection=selection) == [2]
    model.eval()
    assert taken(size, model, selection=selection) == [1]
    model.train()
    model[1].eval()  # a frozen one
    assert taken(size, model, selection=selection) == [1]
    assert taken(size, mlp(nn.BatchNorm1d(8, track_running_stats=False)).eval(), selection=selection) == [2]
    assert taken(size, mlp(nn.LayerNorm(8)), selection=selection) == [1]
    assert taken(8, mlp(nn.BatchNorm1d(8)), selection=selection, gamma=0.5) == [4]


def test_micro_batches_that_are_selected_over_together_give_none_or_two_rows_to_batch_norm():
    found = set()
    for seed in range(20):
        one = taken(8, mlp(nn.BatchNorm1d(8)), pieces=4, select_over="all", selection="random", seed=seed)
        assert set(one) == {2}
        assert 4 <= sum(one) <= 8
        found.add(tuple(one))
    assert len(found) > 1
    assert taken(8, mlp(), pieces=4, select_over="all", selection="random", seed=0) != [2] * 4


@pytest.mark.parametrize("selection", ["increase", "random"])
def test_a_share_of_the_rows_leaves_out_padding_where_weights_are_known(selection):
    """Nine of ten rows have no weight: a direction of theirs would be none."""
    model = mlp()
    inputs, targets = batches(1, size=20)[0]
    weights = torch.tensor([1.0, 0.0] + 18 * [0.0])
    rows = []

    def closure(index):
        index = torch.arange(20) if index is None else index
        rows.append(index)
        return cross_entropy(model(inputs[index]), targets[index]), weights[index]

    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, ascent_share=0.25, selection=selection, model=model)
    for _ in range(8):
        rows.clear()
        optimizer.backward(closure)
        assert len(rows[1]) == 5
        assert 0 in rows[1]
        assert optimizer.last_step.norm > 0
        optimizer.step()
