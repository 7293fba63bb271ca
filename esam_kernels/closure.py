"""From a model, a loss function and a batch to the closure that ``ESAM.backward`` calls."""

import copy
import dis
import io
from collections import UserDict
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from itertools import count
from types import CellType, FunctionType
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.rnn import PackedSequence

from .eager import eager

# Per-sample losses, shape [b]; or losses and weights, shape [b] each.
Losses = Tensor | tuple[Tensor, Tensor]
# Called with None for the whole batch, or with an int64 tensor of row numbers.
Closure = Callable[[Tensor | None], Losses]

_BATCH = 16  # entries of a batch at most; what has more may be a data set
# For batches that batch_closure cannot take rows of.
BY_HAND = (
    "for rows of any other kind write closure(index) by hand, which returns the losses of the rows in index (int64, "
    "shape [k]; None: of all), and give ESAM(..., model=model)"
)


class BatchClosure:
    """The closure that ``batch_closure`` makes.

    It carries the model, so that ESAM can look after its buffers, and knows how many rows its batch has, and where.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Losses],
        inputs: Any,
        targets: Any,
        shared: Collection[str],
        rows: Tensor,
        keep_outputs: bool = False,
    ) -> None:
        self.model = model
        self.loss_fn = loss_fn
        self.size = len(rows)
        self.device = rows.device
        self._inputs = inputs
        self._targets = targets
        self._shared = frozenset(shared)
        self._keeps_outputs = keep_outputs
        self._kept: list[Any] = []  # the outputs, once there are some
        self._at_weights = False

    @property
    def outputs(self) -> Any:
        """The model's outputs for the whole batch at the weights, detached, of the last ``backward`` with this closure.

        They are those of its first pass, so that training accuracy costs no forward of its own: with a
        ``steering_dtype`` in low precision. Tensors, numbers and None are kept, in lists, tuples and mappings, and of
        what is neither None takes the place.

        Raises:
            RuntimeError: if they were not asked for, or no pass of the step ran on the whole batch at the weights.
        """
        if not self._keeps_outputs:
            raise RuntimeError("outputs are kept only if asked for: batch_closure(..., keep_outputs=True)")
        if not self._kept:
            raise RuntimeError(
                "there are no outputs: no backward() has been made with this closure, or none of its passes ran on the "
                "whole batch at the weights, as with ascent='momentum' or 'previous', or with an ascent_share, where "
                "nothing is selected by loss"
            )
        return self._kept[0]

    def begin(self) -> None:
        """A step begins, at the weights."""
        self._kept.clear()
        self._at_weights = True

    def leave_weights(self) -> None:
        """What follows is at perturbed weights, or of no step."""
        self._at_weights = False

    def __call__(self, index: Tensor | None = None) -> Losses:
        """Losses of the whole batch, or of the rows in ``index`` (int64, shape [k]).

        Raises:
            ValueError: if there is not one loss for each row, or the batch was written to, which the next pass sees.
        """
        inputs, targets = self._inputs, self._targets
        tensors = list(self._tensors())
        versions = [tensor._version for _, tensor in tensors]
        if index is not None:
            inputs = _map_rows(inputs, "inputs", self._shared, lambda rows, _: _take(rows, index))
            targets = _map_rows(targets, "targets", self._shared, lambda rows, _: _take(rows, index))
        if isinstance(inputs, Mapping):
            outputs = self.model(**inputs)
        elif isinstance(inputs, list | tuple):
            outputs = self.model(*inputs)
        else:
            outputs = self.model(inputs)
        if self._keeps_outputs and self._at_weights and index is None and not self._kept:
            self._kept.append(_detached(outputs))
        result = self.loss_fn(outputs, targets)
        for (path, tensor), version in zip(tensors, versions):
            if tensor._version != version:
                raise ValueError(
                    f"the model or the loss function writes into {path} in place, which the next pass would see: let "
                    "it write into a copy (x = x.clone(), or inplace=False in the first layer)"
                )
        _check_rows(result, self.size if index is None else len(index))
        return result

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for path, tensor in (*_tensors_of(self._inputs, "inputs"), *_tensors_of(self._targets, "targets")):
            if not tensor.is_inference():  # those have no version, and nobody can write into them
                yield path, tensor


@eager  # traced, it would be given what is inside a compiled model instead of that
def batch_closure(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Losses],
    inputs: Any,
    targets: Any,
    *,
    shared: Collection[str] = (),
    keep_outputs: bool = False,
) -> BatchClosure:
    """Make the closure of one batch for ``ESAM.backward``: it computes the losses of all rows, or of some.

    Args:
        model: called as ``model(inputs)``, ``model(*inputs)`` for a list or tuple, ``model(**inputs)`` for a mapping.
        loss_fn: called as ``loss_fn(outputs, targets)``; returns one loss per sample, shape [b], for example with
            ``reduction="none"``, or (losses, weights) of shape [b] each, whose weighted mean is trained on. Rows that
            do not count have the loss 0 and the weight 0. ``token_loss`` is one for tokens. With ``gamma=1`` it may
            return one loss of the whole batch, see ``ESAM.backward``.
        inputs: a tensor, or lists, tuples and mappings of them, nested in any way. Rows are taken along the first
            dimension, which is the batch's in every tensor. Numbers and None are passed on as they are.
        targets: the same, or None.
        shared: paths of entries that belong to the whole batch and are passed on as they are: ``"inputs.mask"`` for
            ``inputs["mask"]``, ``"inputs.1"`` for ``inputs[1]``, ``"targets.weight"`` and so on.
        keep_outputs: whether ``closure.outputs`` is what the model returned in the first pass of ``backward``.

    Raises:
        ValueError: if a tensor's first dimension is not the batch's, if there is no batch, or if ``shared`` names
            nothing.
        TypeError: if an entry is neither a tensor nor a number nor None and is not named as shared.
    """
    batch: dict[str, Tensor] = {}
    seen: set[str] = set()

    def measure(rows: Tensor, path: str) -> Tensor:
        if rows.dim() == 0:
            raise ValueError(
                f"{path} has no dimension to take rows along: name it as shared=({path!r},) if it belongs to the whole "
                f"batch; {BY_HAND}"
            )
        batch[path] = rows
        return rows

    for name, value in (("inputs", inputs), ("targets", targets)):
        _map_rows(value, name, frozenset(shared), measure, seen)
    if unknown := sorted(set(shared) - seen):
        raise ValueError(
            f"shared names {unknown[0]!r}, which the batch does not have: paths begin with inputs or targets"
        )
    if not batch:
        raise ValueError(f"the batch has no tensor to take rows of: {BY_HAND}")
    first, rows = next(iter(batch.items()))
    for path, other in batch.items():
        if len(other) != len(rows):
            raise ValueError(
                f"{path} has {len(other)} rows but {first} has {len(rows)}: "
                f"name it as shared=({path!r},) if it belongs to the whole batch; {BY_HAND}"
            )
    return BatchClosure(model, loss_fn, inputs, targets, shared, rows, keep_outputs)


def modules_behind(function: Any) -> Iterator[nn.Module]:
    """The modules that a callable is, is a method of, or names, such as a lambda around a loss."""
    yield from (one for _, one in _named_by(function) if isinstance(one, nn.Module))


def tensors_behind(function: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a callable names, also in short lists, tuples and mappings such as a batch, with the names."""
    for name, value in _named_by(function):
        items: Any = value if isinstance(value, list | tuple) else ()
        if isinstance(value, Tensor):
            items = (value,)
        elif isinstance(value, dict):
            items = value.values()
        if len(items) <= _BATCH:
            yield from ((name, one) for one in items if isinstance(one, Tensor) and not is_lazy(one))


def iterators_behind(function: Any) -> list[str]:
    """The names of iterators that a callable names, from which a call takes what the next one does not find."""
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    attributes = {one.argval for one in dis.get_instructions(code) if "ATTR" in one.opname} if code else set()
    named = ((name, one) for name, one in _named_by(function) if not isinstance(one, type | io.IOBase | count))
    return sorted({name for name, one in named if isinstance(one, Iterator) and name not in attributes})


def _named_by(function: Any) -> Iterator[tuple[str, Any]]:
    """What a callable is, is a method of, or names, with the names."""
    if isinstance(function, nn.Module):
        yield type(function).__name__, function
    elif isinstance(function, partial):
        arguments = {str(i): value for i, value in enumerate(function.args)} | function.keywords
        for name, one in {"func": function.func, **arguments}.items():
            yield name, one
            yield from _named_by(one)
    else:
        yield "self", getattr(function, "__self__", None)
        function = getattr(function, "__func__", function)
        if isinstance(function, FunctionType):
            names = function.__code__.co_freevars
            cells = zip(names, function.__closure__ or ())
            yield from ((name, cell.cell_contents) for name, cell in cells if cell != CellType())
            yield from ((name, function.__globals__.get(name)) for name in function.__code__.co_names)
            defaults = function.__defaults__ or ()
            named = function.__code__.co_varnames[: function.__code__.co_argcount]
            yield from zip(named[len(named) - len(defaults) :], defaults)


def _check_rows(result: Any, rows: int) -> None:
    """Refuse losses of another number than the rows: a selection among them would train on other rows."""
    losses = result[0] if isinstance(result, tuple) and len(result) == 2 else result
    if not isinstance(losses, Tensor) or losses.dim() != 1 or len(losses) == rows:
        return  # or refused wherever it comes from
    fix = (
        "return one for each row, in the order of the batch, and for rows that do not count 0 with the weight 0 as "
        "(losses, weights)"
    )
    if len(losses) == 1:
        fix = "leave out the mean over the batch, for example with reduction='none'"
    elif len(losses) > rows and len(losses) % rows == 0:
        fix = "for one loss per token use esam_kernels.token_loss, or " + fix
    raise ValueError(f"the loss function returned {len(losses)} losses for {rows} rows: {fix}")


def _tensors_of(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a nested batch, with its path."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors_of(item, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _tensors_of(item, f"{path}.{i}")


def _detached(value: Any) -> Any:
    """The tensors of a nested output without their graph, which would keep all that its nodes hold."""
    if isinstance(value, Tensor):
        return value.detach().clone()  # the next run of a CUDA graph overwrites what it gave
    if isinstance(value, Mapping):
        return _with_items(value, {key: _detached(item) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return _with_elements(value, [_detached(item) for item in value])
    return value if isinstance(value, bool | int | float | str) else None


def _with_items(mapping: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """A mapping of the same type, if it is known how to copy it, such as the Transformers library's BatchEncoding."""
    if type(mapping) is dict or not isinstance(mapping, dict | UserDict):
        return items
    result = copy.copy(mapping)
    for key, item in items.items():
        result[key] = item
    return result


def _with_elements(sequence: Any, items: list[Any]) -> Any:
    if hasattr(sequence, "_fields"):  # a named tuple
        return type(sequence)(*items)
    return items if isinstance(sequence, list) else tuple(items)


def _take(rows: Tensor, index: Tensor) -> Tensor:
    try:
        return rows.index_select(0, index.to(rows.device))
    except NotImplementedError as error:
        raise TypeError(f"no rows can be taken of a tensor of layout {rows.layout}; {BY_HAND}") from error


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
        return _with_items(value, taken)
    if isinstance(value, PackedSequence):
        raise TypeError(
            f"{path} is a PackedSequence, of which no rows can be taken: give the padded batch and its lengths, and "
            f"pack it in the model's forward; {BY_HAND}"
        )
    if isinstance(value, list | tuple):
        items = [_map_rows(item, f"{path}.{i}", shared, function, seen) for i, item in enumerate(value)]
        return _with_elements(value, items)
    raise TypeError(
        f"{path} is a {type(value).__name__}, of which no rows can be taken: name it as shared=({path!r},) if it "
        f"belongs to the whole batch; {BY_HAND}"
    )
