"""From a model, a loss function and a batch to the closure that ``ESAM.backward`` calls."""

import copy
from collections import UserDict
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor, nn

# Per-sample losses, shape [b]; or losses and weights, shape [b] each.
Losses = Tensor | tuple[Tensor, Tensor]
# Called with None for the whole batch, or with an int64 tensor of row numbers.
Closure = Callable[[Tensor | None], Losses]


class BatchClosure:
    """The closure that ``batch_closure`` makes. It carries the model, so that ESAM can look after its buffers."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Losses],
        inputs: Any,
        targets: Any,
        shared: Collection[str],
    ) -> None:
        self.model = model
        self.loss_fn = loss_fn
        self._inputs = inputs
        self._targets = targets
        self._shared = frozenset(shared)

    def __call__(self, index: Tensor | None = None) -> Losses:
        """Losses of the whole batch, or of the rows in ``index`` (int64, shape [k])."""
        inputs, targets = self._inputs, self._targets
        if index is not None:
            inputs = _map_rows(inputs, "inputs", self._shared, lambda rows, _: _take(rows, index))
            targets = _map_rows(targets, "targets", self._shared, lambda rows, _: _take(rows, index))
        if isinstance(inputs, Mapping):
            outputs = self.model(**inputs)
        elif isinstance(inputs, list | tuple):
            outputs = self.model(*inputs)
        else:
            outputs = self.model(inputs)
        return self.loss_fn(outputs, targets)


def batch_closure(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Losses],
    inputs: Any,
    targets: Any,
    *,
    shared: Collection[str] = (),
) -> BatchClosure:
    """Make the closure of one batch for ``ESAM.backward``: it computes the losses of all rows, or of some.

    Args:
        model: called as ``model(inputs)``, ``model(*inputs)`` for a list or tuple, ``model(**inputs)`` for a mapping.
        loss_fn: called as ``loss_fn(outputs, targets)``; returns one loss per sample, shape [b], for example with
            ``reduction="none"``, or (losses, weights) of shape [b] each, whose weighted mean is trained on.
        inputs: a tensor, or lists, tuples and mappings of them, nested in any way. Rows are taken along the first
            dimension, which is the batch's in every tensor. Numbers and None are passed on as they are.
        targets: the same, or None.
        shared: paths of entries that belong to the whole batch and are passed on as they are: ``"inputs.mask"`` for
            ``inputs["mask"]``, ``"inputs.1"`` for ``inputs[1]``, ``"targets.weight"`` and so on.

    Raises:
        ValueError: if a tensor's first dimension is not the batch's, if there is no batch, or if ``shared`` names
            nothing.
        TypeError: if an entry is neither a tensor nor a number nor None and is not named as shared.
    """
    sizes: dict[str, int] = {}
    seen: set[str] = set()

    def measure(rows: Tensor, path: str) -> Tensor:
        if rows.dim() == 0:
            raise ValueError(f"{path} has no dimension to take rows along: name it as shared=({path!r},)")
        sizes[path] = len(rows)
        return rows

    for name, value in (("inputs", inputs), ("targets", targets)):
        _map_rows(value, name, frozenset(shared), measure, seen)
    if unknown := sorted(set(shared) - seen):
        raise ValueError(
            f"shared names {unknown[0]!r}, which the batch does not have: paths begin with inputs or targets"
        )
    if not sizes:
        raise ValueError("the batch has no tensor to take rows of")
    first, size = next(iter(sizes.items()))
    for path, other in sizes.items():
        if other != size:
            raise ValueError(
                f"{path} has {other} rows but {first} has {size}: "
                f"name it as shared=({path!r},) if it belongs to the whole batch"
            )
    return BatchClosure(model, loss_fn, inputs, targets, shared)


def _take(rows: Tensor, index: Tensor) -> Tensor:
    return rows.index_select(0, index.to(rows.device))


def _map_rows(
    value: Any,
    path: str,
    shared: Collection[str],
    function: Callable[[Tensor, str], Tensor],
    seen: set[str] | None = None,
) -> Any:
    """Apply the function to every tensor of a nested batch but the shared ones, keeping its structure."""
    if seen is not None:
        seen.add(path)
    if path in shared or value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Tensor):
        return function(value, path)
    if isinstance(value, Mapping):
        taken = {key: _map_rows(item, f"{path}.{key}", shared, function, seen) for key, item in value.items()}
        if type(value) is dict or not isinstance(value, dict | UserDict):
            return taken  # how to copy a mapping of another kind is not known
        mapping = copy.copy(value)  # its own type, such as the Transformers library's BatchEncoding
        for key, item in taken.items():
            mapping[key] = item
        return mapping
    if isinstance(value, list | tuple):
        items = [_map_rows(item, f"{path}.{i}", shared, function, seen) for i, item in enumerate(value)]
        if hasattr(value, "_fields"):  # a named tuple
            return type(value)(*items)
        return items if isinstance(value, list) else tuple(items)
    raise TypeError(f"{path} is a {type(value).__name__}, of which no rows can be taken: name it as shared=({path!r},)")
