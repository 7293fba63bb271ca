"""How sharp the minimum is that a network was trained to.

Losses are means over fixed samples, with batch norm and dropout as at test time, and weights are seen as one vector.
Networks compare only where their weights are of like norm, which is reported too: batch norm makes the loss blind to
the scale of the weights before it, so shrinking them sharpens the minimum and changes nothing else.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .losses import per_sample_loss

RANDOM_DIRECTIONS = 3
TOLERANCE = 0.05  # of the top eigenvalue
MAX_ITERATIONS = 100

Batches = Sequence[tuple[Tensor, Tensor]]


class Landscape:
    """The mean loss of a network over fixed samples, and its derivatives, as functions of the trainable weights.

    Args:
        model: the network, which is in evaluation mode within ``measuring()`` and where it stood afterwards.
        batches: inputs and targets, all of which every loss and derivative takes.
        loss: from outputs and targets to one loss per sample, shape [b].
    """

    def __init__(
        self, model: nn.Module, batches: Batches, loss: Callable[[Tensor, Tensor], Tensor] = per_sample_loss
    ) -> None:
        if not batches:
            raise ValueError("batches is empty: sharpness needs samples")
        self.model = model
        self.weights = [param for param in model.parameters() if param.requires_grad]
        self._batches = batches
        self._loss = loss
        self._samples = sum(len(targets) for _, targets in batches)

    def vector(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors shaped like the weights as one vector."""
        return torch.cat([tensor.reshape(-1) for tensor in tensors])

    def loss(self) -> float:
        """The mean loss at the weights as they are."""
        with torch.no_grad():
            return torch.stack([self._share(*batch) for batch in self._batches]).sum().item()

    def gradient(self) -> Tensor:
        """The gradient of the mean loss, as one vector."""
        gradients = (torch.autograd.grad(self._share(*batch), self.weights) for batch in self._batches)
        return reduce(torch.add, map(self.vector, gradients))

    def hessian_vector_product(self, vector: Tensor) -> Tensor:
        """The mean loss's Hessian times a vector: the gradient of gradient · vector, batch by batch."""
        product = torch.zeros_like(vector)
        for batch in self._batches:
            with sdpa_kernel(SDPBackend.MATH):  # the fused attentions have no second derivative
                share = self._share(*batch)
            gradient = self.vector(torch.autograd.grad(share, self.weights, create_graph=True))
            # A weight that enters linearly has no second derivative.
            second = torch.autograd.grad(gradient @ vector, self.weights, materialize_grads=True)
            product += self.vector(second)
        return product

    def losses_along(self, direction: Tensor, distances: Sequence[float]) -> list[float]:
        """The mean loss at the weights + distance * direction / ‖direction‖, for each distance.

        The weights are put back bit for bit, whatever is raised.
        """
        norm = direction.norm()
        unit = direction / norm.where(norm > 0, 1.0)  # a gradient may be zero
        parts = [part.view_as(weight) for part, weight in zip(unit.split(self._sizes), self.weights)]
        backups = [weight.detach().clone() for weight in self.weights]
        losses = []
        try:
            with torch.no_grad():
                for distance in distances:
                    for weight, backup, part in zip(self.weights, backups, parts):
                        weight.copy_(backup + distance * part)
                    losses.append(self.loss())
        finally:
            with torch.no_grad():
                for weight, backup in zip(self.weights, backups):
                    weight.copy_(backup)
        return losses

    def random_vector(self, generator: torch.Generator) -> Tensor:
        """A vector whose direction is uniformly distributed."""
        like = self.weights[0]
        return torch.randn(sum(self._sizes), generator=generator, device=like.device, dtype=like.dtype)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """The network in evaluation mode, so that neither batch statistics nor dropout move the loss; without TF32."""
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            with full_precision():
                yield
        finally:
            for module, mode in modes.items():
                module.training = mode

    @property
    def _sizes(self) -> list[int]:
        return [weight.numel() for weight in self.weights]

    def _share(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """What a batch contributes to the mean loss; in float64, as rises may be a millionth of the loss."""
        return self._loss(self.model(inputs), targets).double().sum() / self._samples


@contextmanager
def full_precision() -> Iterator[None]:
    """Matrix products and convolutions in float32 on a GPU too: TF32 keeps 10 bits, too few for small rises."""
    matmul, convolution = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolution


class Eigenvalue(NamedTuple):
    """An eigenvalue of the Hessian by power iteration.

    Attributes:
        value: the Rayleigh quotient of the last vector; none exceeds the top eigenvalue.
        residual: ‖Hv - value v‖ for that vector of norm 1: so near an eigenvalue is for certain.
        iterations: Hessian-vector products that it took.
        converged: whether the residual came within the tolerance before the cap on iterations.
    """

    value: float
    residual: float
    iterations: int
    converged: bool


def top_eigenvalue(
    landscape: Landscape,
    generator: torch.Generator,
    tolerance: float = TOLERANCE,
    max_iterations: int = MAX_ITERATIONS,
) -> Eigenvalue:
    """The Hessian's largest eigenvalue, to a residual of ``tolerance`` times its size, by power iteration.

    Power iteration finds the eigenvalue of largest size. Where that is negative it goes on with the Hessian less that
    eigenvalue times the identity, whose eigenvalue of largest size is the Hessian's largest.
    """
    found = _power_iteration(landscape, 0.0, generator, tolerance, max_iterations)
    if found.value >= 0:
        return found
    above = _power_iteration(landscape, found.value, generator, tolerance, max_iterations)
    return above._replace(iterations=found.iterations + above.iterations)


def _power_iteration(
    landscape: Landscape, shift: float, generator: torch.Generator, tolerance: float, max_iterations: int
) -> Eigenvalue:
    """The Hessian's eigenvalue farthest from ``shift``, judged by its own size however large the shift is."""
    vector = landscape.random_vector(generator)
    value = residual = 0.0
    for iteration in range(1, max_iterations + 1):
        vector = vector / vector.norm()
        product = landscape.hessian_vector_product(vector)
        value = (vector @ product).item()
        residual = (product - value * vector).norm().item()
        if residual <= tolerance * abs(value):
            return Eigenvalue(value, residual, iteration, True)
        vector = product - shift * vector
    return Eigenvalue(value, residual, max_iterations, False)


def measure(
    landscape: Landscape,
    distances: Sequence[float],
    generator: torch.Generator,
    directions: int = RANDOM_DIRECTIONS,
) -> dict[str, Any]:
    """Everything about one network, as it goes into a result.

    Args:
        landscape: the network's.
        distances: radii of the balls around the weights.
        generator: of the random directions, on the weights' device.
        directions: how many random ones are averaged over.

    Returns:
        ``loss`` at the weights, ``weight_norm``; for each distance the loss's rise up the gradient (``gradient_rise``)
        and its mean rise along random directions (``random_rise``); and the top eigenvalue (``hessian``).
    """
    with landscape.measuring():
        start = landscape.loss()
        along_gradient = landscape.losses_along(landscape.gradient(), distances)
        along_random = [
            landscape.losses_along(landscape.random_vector(generator), distances) for _ in range(directions)
        ]
        return {
            "loss": start,
            "weight_norm": landscape.vector(landscape.weights).norm().item(),
            "gradient_rise": [loss - start for loss in along_gradient],
            "random_rise": [sum(losses) / directions - start for losses in zip(*along_random)],
            "hessian": top_eigenvalue(landscape, generator)._asdict(),
        }
