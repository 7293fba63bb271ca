"""Groups by kind of layer perturb these layers alone, and pass 1 computes no other weight gradient."""

import pytest
import torch
from networks import batches, cross_entropy, mlp, same
from torch import nn

from esam_kernels import ESAM, batch_closure, param_groups_by_layer


class OwnRMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return x * self.weight / x.square().mean(-1, keepdim=True).sqrt()


NORMALIZATION = [
    nn.BatchNorm1d(8), nn.GroupNorm(2, 8), nn.LayerNorm(8), nn.RMSNorm(8), OwnRMSNorm(8),
    nn.InstanceNorm1d(8, affine=True), nn.SyncBatchNorm(8),
]  # fmt: skip


@pytest.mark.parametrize("layer", NORMALIZATION, ids=lambda layer: type(layer).__name__)
def test_normalization_layers_are_perturbed_by_default(layer):
    model = mlp(layer)
    first, rest = param_groups_by_layer(model, rho=0.3, weight_decay=0.0)
    assert {id(param) for param in first["params"]} == {id(param) for param in layer.parameters()}
    assert {id(p) for p in (*first["params"], *rest["params"])} == {id(p) for p in model.parameters()}
    assert (first["rho"], first["weight_decay"], rest["rho"]) == (0.3, 0.0, 0.0)
    assert "weight_decay" not in rest


def test_other_layers_may_be_chosen_by_class_or_by_a_function():
    model = mlp(nn.LayerNorm(8))
    by_class = param_groups_by_layer(model, (nn.Linear,))
    by_function = param_groups_by_layer(model, lambda layer: getattr(layer, "out_features", 0) == 3)
    assert len(by_class[0]["params"]) == 6
    assert [id(param) for param in by_function[0]["params"]] == [id(param) for param in model[-1].parameters()]
    assert len(param_groups_by_layer(nn.LayerNorm(3))) == 1  # no empty group


def test_a_tied_weight_stands_in_one_group():
    model = mlp()
    model[4].weight = model[2].weight
    first, rest = param_groups_by_layer(model, lambda layer: layer is model[4])
    assert model[2].weight in set(first["params"])
    assert len(first["params"]) + len(rest["params"]) == len(list(model.parameters()))


def test_no_such_layer_is_refused():
    with pytest.raises(ValueError, match=r"no layer.*perturbed=\(nn\.LayerNorm,\).*the model has Linear$"):
        param_groups_by_layer(mlp())


def test_pass_1_computes_their_gradients_alone_and_moves_them_alone():
    model = mlp(nn.LayerNorm(8))
    optimizer = ESAM(param_groups_by_layer(model, rho=0.5), torch.optim.SGD, lr=0.1, momentum=0.9, beta=1, gamma=1)
    start = {name: param.detach().clone() for name, param in model.named_parameters()}
    computed, moved = [], []
    closure = batch_closure(model, cross_entropy, *batches(1)[0])
    for name, param in model.named_parameters():
        param.register_hook(lambda grad, name=name: computed[-1].add(name))

    def watching(index):
        computed.append(set())
        moved.append({name for name, param in model.named_parameters() if not torch.equal(param, start[name])})
        return closure(index)

    optimizer.backward(watching)
    assert computed == [{"1.weight", "1.bias"}, set(start)]
    assert moved == [set(), {"1.weight", "1.bias"}]
    assert same(model.parameters(), start.values())
