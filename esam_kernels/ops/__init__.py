"""The operators that ESAM is made of, over lists of tensors: what each does, and which backend serves a call.

`reference.py` defines each operator in plain torch; the other backends are checked against it. A backend is a module
with these four functions over tensors that it takes, and `unsupported(tensor)`, which says why it does not take one.
"""

import importlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType

import torch
from torch import Tensor

from .reference import ElementMask

__all__ = ["ElementMask", "explain", "perturb_", "restore_", "select_top", "squared_norm", "use_backend"]

# In order of preference, by device; what none of them takes goes to the reference.
_PREFERENCE: dict[str, tuple[str, ...]] = {}
_MODULES = {"reference": "reference"}

_forced: ContextVar[str | None] = ContextVar("esam_kernels_backend", default=None)


@torch.no_grad()
def squared_norm(
    params: Sequence[Tensor], grads: Sequence[Tensor], adaptive: bool = False, mask: ElementMask | None = None
) -> Tensor:
    """Squared norm of the masked gradient, ‖m * |w|^a * g‖² with a = 1 if ``adaptive`` else 0.

    Source: ESAM (arXiv 2110.03141) algorithm 1; adaptive: ASAM (arXiv 2102.11600) section 3.

    Args:
        params: weights w, of any real floating dtype, any shapes and strides, on any devices.
        grads: their gradients g, of the same shapes; dtypes and strides may differ from the weights'.
        adaptive: whether to weigh each gradient element with its weight's magnitude.
        mask: which elements count (all of them if None).

    Returns:
        A 0-dimensional tensor on the first weight's device, float64 if a weight is float64, else float32. It does not
        synchronize host and device, and is bit-identical from run to run.

    Raises:
        ValueError: if a list is empty, or lengths, shapes or dtypes do not fit.
    """
    _check_lists(params, mask, grads=grads)
    parts = [
        backend.squared_norm(_pick(params, ids), _pick(grads, ids), adaptive, mask and mask.subset(ids))
        for backend, ids in _partition(params)
    ]
    if len(parts) == 1:
        return parts[0]
    dtype = torch.float64 if any(part.dtype == torch.float64 for part in parts) else torch.float32
    return torch.stack([part.to(params[0].device, dtype, non_blocking=True) for part in parts]).sum()


@torch.no_grad()
def perturb_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    backups: Sequence[Tensor],
    coefficients: Sequence[float],
    norm: Tensor,
    adaptive: bool = False,
    mask: ElementMask | None = None,
) -> None:
    """Save the weights, then move them uphill: w <- w + e with e = coefficient / (norm + 1e-12) * m * w^2a * g.

    Source: ESAM (arXiv 2110.03141) algorithm 1; adaptive (a = 1): ASAM (arXiv 2102.11600) section 3.

    If ``norm`` is not finite, the weights are saved and left as they are; this is decided on the device. The error is
    at most 1 ulp of max(|w|, |e|, |w + e|) given the scale coefficient / (norm + 1e-12) in the compute type (3 ulp if
    ``adaptive``). bf16 and fp16 sums are computed in float32, then rounded stochastically with the mask's bits (to
    nearest if it is None), so that the expected perturbation is e although most of it is below their precision.

    A weight is changed only after its backup is complete, and then the backup's version counter has moved: after an
    exception, ``restore_`` from the backups whose version moved gives back the weights from before the call.

    Args:
        params: weights w, changed in place: any real floating dtype, any shapes and strides, on any devices.
        grads: their gradients g, of the same shapes; dtypes and strides may differ from the weights'.
        backups: where the weights are saved: same shapes, dtypes and devices.
        coefficients: rho / beta for each tensor.
        norm: ‖m * |w|^a * g‖ over everything that is perturbed, 0-dimensional, on any device.
        adaptive: whether e is weighted with w².
        mask: which elements move (all of them if None), and the bits that stochastic rounding needs.

    Raises:
        ValueError: if a list is empty, or lengths, shapes, dtypes or devices do not fit; nothing has changed then.
    """
    _check_lists(params, mask, grads=grads, backups=backups)
    if len(coefficients) != len(params):
        raise ValueError(f"got {len(params)} params but {len(coefficients)} coefficients: give one for each tensor")
    if norm.dim() != 0:
        raise ValueError(f"norm has shape {list(norm.shape)}: give the 0-dimensional norm over all tensors")
    for backend, ids in _partition(params):
        lists = (_pick(tensors, ids) for tensors in (params, grads, backups))
        backend.perturb_(*lists, [coefficients[i] for i in ids], norm, adaptive, mask and mask.subset(ids))


@torch.no_grad()
def restore_(params: Sequence[Tensor], backups: Sequence[Tensor]) -> None:
    """Put the saved weights back, bit for bit: w <- backup.

    Args:
        params: weights, overwritten in place.
        backups: what ``perturb_`` saved: same shapes, dtypes and devices.

    Raises:
        ValueError: if a list is empty, or lengths, shapes, dtypes or devices do not fit; nothing has changed then.
    """
    _check_lists(params, None, backups=backups)
    for backend, ids in _partition(params):
        backend.restore_(_pick(params, ids), _pick(backups, ids))


@torch.no_grad()
def select_top(before: Tensor, after: Tensor, k: int) -> Tensor:
    """Indices of the k samples whose loss rose most: the k largest after - before, in ascending order.

    Exactly k, whatever the values: ties go to the lower index, and NaN counts as largest, as in ``torch.topk``.
    Source: sharpness-sensitive data selection, ESAM (arXiv 2110.03141) section 3.

    Args:
        before: losses l(w), shape [b], any real floating dtype.
        after: losses l(w + e), shape [b], on the same device.
        k: how many, 1 <= k <= b.

    Returns:
        int64 tensor of shape [k] on the losses' device, without synchronizing with it.

    Raises:
        ValueError: if the shapes differ or are not [b], or if k is not in 1..b.
    """
    if before.dim() != 1 or before.shape != after.shape:
        raise ValueError(f"losses have shapes {list(before.shape)} and {list(after.shape)}: give two of shape [b]")
    if not 1 <= k <= len(before):
        raise ValueError(f"k = {k} samples of {len(before)} cannot be selected: 1 <= k <= {len(before)} is needed")
    return _module(_choose(before)[0]).select_top(before, after, k)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve the operators from one backend inside the ``with`` block; what it does not take goes to the reference.

    The environment variable ESAM_KERNELS_BACKEND does the same for a whole process.

    Raises:
        ValueError: if there is no backend of that name.
    """
    if name not in _MODULES:
        raise ValueError(f"no backend is called {name!r}: choose one of {', '.join(_MODULES)}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def explain(tensor: Tensor) -> str:
    """Which backend serves this tensor, and why the ones before it in the order of preference do not."""
    name, passed_over = _choose(tensor)
    return "; ".join([name, *(f"not {other}: {why}" for other, why in passed_over)])


def _choose(tensor: Tensor) -> tuple[str, list[tuple[str, str]]]:
    """The backend for a tensor, and the ones passed over with their reasons."""
    forced = _forced.get() or os.environ.get("ESAM_KERNELS_BACKEND")
    if forced is not None and forced not in _MODULES:
        raise ValueError(f"ESAM_KERNELS_BACKEND={forced}: choose one of {', '.join(_MODULES)}")
    passed_over: list[tuple[str, str]] = []
    for name in (forced,) if forced else _PREFERENCE.get(tensor.device.type, ()):
        if name == "reference":
            break
        why = _module(name).unsupported(tensor)
        if why is None:
            return name, passed_over
        passed_over.append((name, why))
    return "reference", passed_over


def _module(name: str) -> ModuleType:
    """A backend's module, imported when it is first needed: importing Triton takes half a second."""
    return importlib.import_module(f".{_MODULES[name]}", __name__)


def _partition(params: Sequence[Tensor]) -> list[tuple[ModuleType, list[int]]]:
    """For each backend that takes part, the indices of the tensors that it serves."""
    indices: dict[str, list[int]] = {}
    for i, param in enumerate(params):
        indices.setdefault(_choose(param)[0], []).append(i)
    return [(_module(name), ids) for name, ids in indices.items()]


def _pick(tensors: Sequence[Tensor], ids: Sequence[int]) -> list[Tensor]:
    return [tensors[i] for i in ids]


def _check_lists(params: Sequence[Tensor], mask: ElementMask | None, **others: Sequence[Tensor]) -> None:
    if len(params) == 0:
        raise ValueError("got no params: give at least one tensor")
    for name, tensors in others.items():
        if len(tensors) != len(params):
            raise ValueError(f"got {len(params)} params but {len(tensors)} {name}: give one for each tensor")
        for i, (param, tensor) in enumerate(zip(params, tensors)):
            if param.shape != tensor.shape:
                raise ValueError(f"{name}[{i}] has shape {list(tensor.shape)}, params[{i}] {list(param.shape)}")
            if not tensor.dtype.is_floating_point or not param.dtype.is_floating_point:
                raise ValueError(
                    f"params[{i}] is {param.dtype}, {name}[{i}] {tensor.dtype}: floating dtypes are needed"
                )
            if param.device != tensor.device:
                raise ValueError(f"{name}[{i}] is on {tensor.device}, params[{i}] on {param.device}")
            if name == "backups" and param.dtype != tensor.dtype:
                raise ValueError(f"backups[{i}] is {tensor.dtype}, params[{i}] {param.dtype}: a backup keeps every bit")
    if mask is not None and len(mask.tensor_ids) != len(params):
        raise ValueError(f"got {len(params)} params but a mask for {len(mask.tensor_ids)}: give one id for each tensor")
    if mask is not None and mask.offsets is not None and len(mask.offsets) != len(params):
        raise ValueError(f"got {len(params)} params but {len(mask.offsets)} mask offsets: give one for each tensor")
