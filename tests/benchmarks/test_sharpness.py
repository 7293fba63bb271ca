"""Sharpness agrees with oracles: a quadratic whose Hessian is known, and autograd's Hessian of a small network."""

import math

import pytest
import torch
from torch import nn

from benchmarks.commands import command_line, train
from benchmarks.training import data, models
from benchmarks.training.landscape import Landscape, measure, top_eigenvalue


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Quadratic(nn.Module):
    """Its per-sample "losses" are input * w·diag(curvatures)·w / 2, whose mean over inputs of mean 1 is a quadratic."""

    def __init__(self, curvatures, weights):
        super().__init__()
        self.weights = nn.Parameter(torch.tensor(weights, dtype=torch.float64))
        self.curvatures = torch.tensor(curvatures, dtype=torch.float64)

    def forward(self, inputs):
        return inputs * (self.curvatures * self.weights**2).sum() / 2


def quadratic(curvatures, weights):
    batches = [(torch.tensor([0.5, 1.0, 1.5]), torch.zeros(3)), (torch.tensor([1.0]), torch.zeros(1))]
    return Landscape(Quadratic(curvatures, weights), batches, loss=lambda outputs, targets: outputs)


@pytest.mark.parametrize(
    ("curvatures", "top"),
    [([3.0, 7.0, 1.0], 7.0), ([-9.0, 2.0, 1.0], 2.0), ([-1.0, -4.0, -2.0], -1.0), ([0.0, 0.0, 0.0], 0.0)],
)
def test_the_top_eigenvalue_is_the_largest_not_the_one_of_largest_size(curvatures, top):
    found = top_eigenvalue(quadratic(curvatures, [1.0, 2.0, 3.0]), generator(), 1e-6, 200)
    assert found.converged
    assert found.value == pytest.approx(top, abs=1e-6)


def test_convergence_is_judged_by_the_eigenvalue_and_not_by_the_shift():
    """The lowest eigenvalue is a hundred times the top one: beside the shift by it, any residual looks small."""
    for cap, converged in ((60, False), (3000, True)):
        found = top_eigenvalue(quadratic([-200.0, 2.0, -1.0], [1.0, 1.0, 1.0]), generator(), 0.05, cap)
        assert found.converged == converged
        assert converged == (found.value == pytest.approx(2.0, rel=0.05))


def test_a_cap_on_the_iterations_is_said():
    found = top_eigenvalue(quadratic([1.0, 0.99, 0.9], [1.0, 1.0, 1.0]), generator(), 1e-9, 3)
    assert (found.converged, found.iterations) == (False, 3)
    # Even so an eigenvalue is within the residual.
    assert min(abs(found.value - curvature) for curvature in (1.0, 0.99, 0.9)) <= found.residual


def test_the_rise_in_a_ball_is_exact_for_a_quadratic():
    """Up the gradient the loss rises by d ‖g‖ + d² g·Hg / (2 ‖g‖²), at random on average by d² tr(H) / 2n."""
    curvatures, weights, distances = [3.0, 7.0, 1.0], [1.0, -2.0, 3.0], [0.1, 0.5, 2.0]
    measured = measure(quadratic(curvatures, weights), distances, generator(), directions=4000)
    gradient = [c * w for c, w in zip(curvatures, weights)]
    norm = math.hypot(*gradient)
    bend = sum(c * g * g for c, g in zip(curvatures, gradient)) / norm**2
    assert measured["gradient_rise"] == pytest.approx([d * norm + d * d * bend / 2 for d in distances])
    # Over all directions the slope cancels, and the curvature's mean is that of the eigenvalues.
    mean_curvature = sum(curvatures) / 3
    assert measured["random_rise"][2] == pytest.approx(2.0**2 * mean_curvature / 2, rel=0.1)
    assert measured["loss"] == pytest.approx(sum(c * w * w for c, w in zip(curvatures, weights)) / 2)
    assert measured["weight_norm"] == pytest.approx(math.hypot(*weights))


@pytest.fixture
def network():
    """Two layers with batch norm and dropout between, in training, and six samples in two batches."""
    torch.manual_seed(0)
    layers = [nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3)]
    model = nn.Sequential(*layers)
    model[1].running_mean.uniform_(-1, 1)
    inputs, targets = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 1])
    return model, inputs, targets, [(inputs[:4], targets[:4]), (inputs[4:], targets[4:])]


def flat_loss(model, inputs, targets):
    """The mean loss as a function of all weights in one vector."""
    weights = dict(model.named_parameters())

    def loss(vector):
        parts = vector.split([weight.numel() for weight in weights.values()])
        named = {name: part.view_as(weight) for (name, weight), part in zip(weights.items(), parts)}
        return nn.functional.cross_entropy(torch.func.functional_call(model, named, (inputs,)), targets)

    return loss, torch.cat([weight.detach().flatten() for weight in weights.values()])


def test_a_network_agrees_with_autograds_hessian(network):
    model, inputs, targets, batches = network
    landscape = Landscape(model, batches)
    model.eval()
    loss, weights = flat_loss(model, inputs, targets)
    hessian = torch.autograd.functional.hessian(loss, weights)
    vector = torch.randn(len(weights), generator=generator())
    torch.testing.assert_close(landscape.hessian_vector_product(vector), hessian @ vector)
    torch.testing.assert_close(landscape.gradient(), torch.autograd.functional.jacobian(loss, weights))
    found = top_eigenvalue(landscape, generator(), 1e-3, 1000)
    assert found.converged
    assert found.value == pytest.approx(torch.linalg.eigvalsh(hessian)[-1].item(), rel=1e-3)


def test_measuring_leaves_the_network_as_it_was(network):
    model, *_, batches = network
    model[1].eval()  # as if its user had frozen it
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    first = measure(Landscape(model, batches), [0.1, 1000.0], generator())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert all(param.grad is None for param in model.parameters())
    # Dropout has no say in it.
    assert measure(Landscape(model, batches), [0.1, 1000.0], generator()) == first


@pytest.mark.parametrize(("matmul", "convolution"), [("high", True), ("medium", False), ("highest", True)])
def test_sharpness_is_measured_without_tf32_which_is_as_before_afterwards(network, matmul, convolution):
    model, *_, batches = network

    def state():
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    before, seen = state(), set()
    model.register_forward_pre_hook(lambda *_: seen.add(state()))
    try:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolution
        measure(Landscape(model, batches), [0.1], generator())
        assert seen == {("highest", False)}
        assert state() == (matmul, convolution)
        with pytest.raises(ZeroDivisionError), Landscape(model, batches).measuring():
            raise ZeroDivisionError
        assert state() == (matmul, convolution)
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def test_an_exception_at_displaced_weights_puts_them_back(network):
    model, *_, batches = network
    before = [param.clone() for param in model.parameters()]
    landscape = Landscape(model, batches)
    calls = []

    def fail(module, inputs):
        calls.append(torch.equal(before[0], model[0].weight))
        raise KeyboardInterrupt

    model.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        landscape.losses_along(landscape.random_vector(generator()), [0.5])
    assert calls == [False]
    assert all(torch.equal(param, old) for param, old in zip(model.parameters(), before))


def test_no_samples_are_refused(network):
    with pytest.raises(ValueError, match="batches is empty"):
        Landscape(network[0], [])


def test_training_samples_are_always_the_same_and_of_all_classes():
    images = data.load("digits", None, torch.device("cpu"), torch.contiguous_format)
    first, again = (list(images.training_sample(100, 64)) for _ in range(2))
    assert [len(targets) for _, targets in first] == [64, 36]
    assert all(torch.equal(a, b) for pair, other in zip(first, again) for a, b in zip(pair, other))
    counts = torch.cat([targets for _, targets in first]).bincount()
    assert counts.tolist() == pytest.approx([10] * 10, abs=1)
    assert sum(len(targets) for _, targets in images.training_sample(5000, 64)) == 1000


def test_a_bf16_methods_sharpness_is_measured_in_float32():
    """The trainer has put autocast into its network's forward; the same weights have the same sharpness without."""
    images = data.load("digits", None, torch.device("cpu"), torch.contiguous_format)
    args = train.parse_args(["--device", "cpu", "--width", "4", "--sharpness-samples", "40"])
    settings, task = command_line.settings(args), command_line.task(args, images)
    plain, autocast = (train.Run(name, settings, 1, task).sharpness() for name in ("sgd", "sgd-bf16"))
    assert plain == autocast


def test_only_finished_seeds_are_measured_and_the_budget_is_kept():
    images = data.load("digits", None, torch.device("cpu"), torch.contiguous_format)
    arguments = ["--width", "4", "--epochs", "1", "--seeds", "2", "--optimizers", "sgd", "--sharpness-samples", "20"]
    args = train.parse_args([*arguments, "--device", "cpu"])
    curves, measured = train.train(images, args, deadline=math.inf)
    assert [len(curves["sgd"]), len(measured["sgd"])] == [2, 2]
    assert len(measured["sgd"][0]["gradient_rise"]) == len(command_line.DISTANCES)
    curves, measured = train.train(images, args, deadline=0.0)
    assert [len(curves["sgd"]), len(measured["sgd"])] == [1, 0]
    args.sharpness_samples = 0
    assert train.train(images, args, math.inf)[1] == {"sgd": []}


def test_attention_has_second_derivatives():
    """Its fused kernels have none. The oracle is a difference of gradients."""
    model = models.build("vit_s", width=12, image_size=8, patch_size=4)
    landscape = Landscape(model, [(torch.randn(4, 3, 8, 8, generator=generator()), torch.arange(4))])
    with landscape.measuring():
        direction = landscape.gradient()
        direction /= direction.norm()
        product = landscape.hessian_vector_product(direction)
        ends = []
        for distance in (0.001, -0.002):  # from the weights to one side, and from there to the other
            with torch.no_grad():
                torch.nn.utils.vector_to_parameters(
                    torch.nn.utils.parameters_to_vector(landscape.weights) + distance * direction, landscape.weights
                )
            ends.append(landscape.gradient())
    torch.testing.assert_close(product, (ends[0] - ends[1]) / 0.002, rtol=0.05, atol=0.02 * product.abs().max().item())


def test_a_direction_of_length_zero_leads_nowhere():
    model = torch.nn.Linear(3, 2)
    landscape = Landscape(model, [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))])
    with landscape.measuring():
        here = landscape.loss()
        zero = torch.zeros(sum(weight.numel() for weight in landscape.weights))
        assert landscape.losses_along(zero, [0.0, 1.0]) == [here, here]
