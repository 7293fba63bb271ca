"""The operators that ESAM is made of, over lists of tensors: what each does, and which backend serves a call.

`reference.py` defines each operator in plain torch; the other backends are checked against it. A backend is a module
with all four operators, each over tensors on one device, and with `unsupported(tensor)`, which says why it does not
take a tensor, or None if it does; of contiguous tensors it looks at device, dtype and layout alone. The reference takes
every tensor.
"""

import importlib
import importlib.metadata
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from operator import attrgetter, is_
from types import ModuleType

import torch
from torch import Tensor

from .memory import two_that_share
from .reference import ElementMask, have_same_layout

__all__ = ["ElementMask", "back_up_", "explain", "perturb_", "restore_", "select_top", "squared_norm", "use_backend"]

# In order of preference, by device; what none of them takes goes to the reference.
# On CUDA, Triton before native until the two have been measured against each other.
_PREFERENCE: dict[str, tuple[str, ...]] = {"cpu": ("native",), "cuda": ("triton", "native")}
_MODULES = {"reference": "reference", "triton": "triton_kernels", "native": "native"}

# The package that each backend needs, and its newest version that was tested; `explain` says if there is a newer one.
_NEWEST_TESTED = {"native": ("torch", (2, 15)), "triton": ("triton", (3, 9))}

_DTYPES = frozenset((torch.float64, torch.float32, torch.bfloat16, torch.float16))

_Parts = list[tuple[ModuleType, list[int]]]  # the indices of the tensors that each backend serves, on each device

_backends: dict[str, ModuleType] = {}  # imported when they are first needed: importing Triton takes half a second
_forced: ContextVar[str | None] = ContextVar("esam_kernels_backend", default=None)
# The same for torch.compile, which cannot read a ContextVar, and compiles anew when this changes.
_traced: str | None = None


@torch.no_grad()
def squared_norm(
    params: Sequence[Tensor], grads: Sequence[Tensor], adaptive: bool = False, mask: ElementMask | None = None
) -> Tensor:
    """Squared norm of the masked gradient, ‖m * |w|^a * g‖² with a = 1 if ``adaptive`` else 0.

    Source: ESAM (arXiv 2110.03141) algorithm 1; adaptive: ASAM (arXiv 2102.11600) section 3.

    Args:
        params: weights w, of float64, float32, bfloat16 or float16, any shapes and strides, on any devices.
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
    return _squared_norm(_partition(params), params, grads, adaptive, mask)


@torch.no_grad()
def perturb_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    backups: Sequence[Tensor] | None,
    coefficients: Sequence[float],
    norm: Tensor | None = None,
    adaptive: bool = False,
    mask: ElementMask | None = None,
) -> Tensor:
    """Save the weights, then move them uphill: w <- w + e with e = coefficient / (norm + 1e-12) * m * w^2a * g.

    Source: ESAM (arXiv 2110.03141) algorithm 1; adaptive (a = 1): ASAM (arXiv 2102.11600) section 3.

    If ``norm`` is not finite, the weights are saved and left as they are; this is decided on the device. The error is
    at most 1 ulp of max(|w|, |e|, |w + e|) (3 ulp if ``adaptive``) given g and the scale coefficient / (norm + 1e-12)
    in the compute type. bf16 and fp16 sums are computed in float32, then rounded stochastically with the mask's bits
    (to nearest if it is None), so that the expected perturbation is e although most of it is below their precision.

    A weight is changed only after its backup is complete, and then the backup's version counter has moved: after an
    exception, ``restore_`` from the backups whose version moved gives back the weights from before the call.

    Args:
        params: weights w, changed in place: float64, float32, bfloat16 or float16, any shapes and strides, any devices.
        grads: their gradients g, of the same shapes; dtypes and strides may differ from the weights'.
        backups: where the weights are saved: same shapes, dtypes and devices. None saves nothing, as when ``back_up_``
            has done it.
        coefficients: rho / beta for each tensor.
        norm: ‖m * |w|^a * g‖ over everything that is perturbed, 0-dimensional, on any device. If it is None, these
            tensors are everything, and it is the square root of their ``squared_norm``.
        adaptive: whether e is weighted with w².
        mask: which elements move (all of them if None), and the bits that stochastic rounding needs.

    Returns:
        The norm.

    Raises:
        ValueError: if a list is empty, lengths, shapes, dtypes or devices do not fit, or tensors share memory; nothing
            has changed then.
    """
    _check_lists(params, mask, grads=grads, **({} if backups is None else {"backups": backups}))
    if len(coefficients) != len(params):
        raise ValueError(f"got {len(params)} params but {len(coefficients)} coefficients: give one for each tensor")
    if norm is not None and not (isinstance(norm, Tensor) and norm.dim() == 0):
        what = f"has shape {list(norm.shape)}" if isinstance(norm, Tensor) else f"is {norm!r}"
        raise ValueError(f"norm {what}: give the 0-dimensional tensor of the norm over all tensors")
    if backups is not None:
        _check_apart(params, backups)
    return _perturb(_partition(params, backups), params, grads, backups, coefficients, norm, adaptive, mask)


@torch.no_grad()
def back_up_(params: Sequence[Tensor], backups: Sequence[Tensor]) -> None:
    """Save the weights, bit for bit: backup <- w.

    Args:
        params: weights, of float64, float32, bfloat16 or float16, any shapes and strides, on any devices.
        backups: where they are saved: same shapes, dtypes and devices.

    Raises:
        ValueError: if a list is empty, lengths, shapes, dtypes or devices do not fit, or tensors share memory; nothing
            has changed then.
    """
    _check_lists(params, None, backups=backups)
    _check_apart(params, backups)
    _copy(_partition(params, backups), backups, params)


@torch.no_grad()
def restore_(params: Sequence[Tensor], backups: Sequence[Tensor]) -> None:
    """Put the saved weights back, bit for bit: w <- backup.

    Args:
        params: weights, overwritten in place.
        backups: what ``back_up_`` or ``perturb_`` saved: same shapes, dtypes and devices.

    Raises:
        ValueError: if a list is empty, or lengths, shapes, dtypes or devices do not fit; nothing has changed then.
    """
    _check_lists(params, None, backups=backups)
    _copy(_partition(params, backups), params, backups)


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
        ValueError: if the shapes differ or are not [b], if the devices differ, or if k is not in 1..b.
    """
    if before.dim() != 1 or before.shape != after.shape:
        raise ValueError(f"losses have shapes {list(before.shape)} and {list(after.shape)}: give two of shape [b]")
    device, b = before.device, before.numel()
    if device != after.device:
        raise ValueError(f"losses are on {device} and {after.device}: give two on one device")
    if not 1 <= k <= b:
        raise ValueError(f"k = {k} samples of {b} cannot be selected: 1 <= k <= {b} is needed")
    # No torch.no_grad(), which would take a third of the time: indices have no gradient.
    return _backends[_choose(before, _candidates(device))].select_top(before, after, k)


class Served:
    """The operators over weights of which a step makes all lists itself: nothing is checked, and who serves asked once.

    Attributes:
        params: the weights, one at least.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = params
        self._parts = _partition(params)

    def squared_norm(self, grads: Sequence[Tensor], adaptive: bool, mask: ElementMask | None) -> Tensor:
        """As the function."""
        return _squared_norm(self._parts, self.params, grads, adaptive, mask)

    def back_up(self) -> list[Tensor]:
        """Copies of the weights."""
        backups = list(map(torch.empty_like, self.params))
        _copy(self._parts, backups, self.params)
        return backups

    def perturb_(
        self,
        grads: Sequence[Tensor],
        coefficients: Sequence[float],
        norm: Tensor | None,
        adaptive: bool,
        mask: ElementMask | None,
    ) -> Tensor:
        """As the function, and saves nothing."""
        return _perturb(self._parts, self.params, grads, None, coefficients, norm, adaptive, mask)

    def restore_(self, backups: Sequence[Tensor]) -> None:
        """As the function."""
        _copy(self._parts, self.params, backups)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve the operators from one backend inside the ``with`` block; what it does not take goes to the reference.

    The environment variable ESAM_KERNELS_BACKEND does the same for a whole process. What torch.compile has traced is
    traced anew for another backend, but keeps the environment variable's value.

    Raises:
        ValueError: if there is no backend of that name.
    """
    if name not in _MODULES:
        raise ValueError(f"no backend is called {name!r}: choose one of {', '.join(_MODULES)}")
    global _traced
    token, outer = _forced.set(name), _traced
    _traced = name
    try:
        yield
    finally:
        _forced.reset(token)
        _traced = outer


def explain(tensors: Tensor | Iterable[Tensor]) -> str:
    """Which backend serves a tensor, and why the ones before it in the order of preference do not.

    For several tensors, one line for each distinct answer, with the number of tensors that it holds for. A last part
    says which of these backends stands on a torch or Triton that is newer than those tested.

    Raises:
        TypeError: if there is anything else than tensors.
    """
    if not isinstance(tensors, Tensor):
        several = None if isinstance(tensors, torch.nn.Module) or not isinstance(tensors, Iterable) else list(tensors)
        if several is None or not all(isinstance(tensor, Tensor) for tensor in several):
            raise TypeError(f"got a {type(tensors).__name__}: give a tensor, or several, such as model.parameters()")
        return "\n".join(f"{count} x {answer}" for answer, count in Counter(map(explain, several)).items())
    candidates = _candidates(tensors.device)
    serving = _choose(tensors, candidates)
    passed_over = candidates[: candidates.index(serving)]
    reasons = (f"not {name}: {_backends[name].unsupported(tensors)}" for name in passed_over)
    return "; ".join([serving, *reasons, *filter(None, map(_untested, (serving, *passed_over)))])


def _untested(name: str) -> str | None:
    if name not in _NEWEST_TESTED:
        return None
    package, tested = _NEWEST_TESTED[name]
    version = _installed(package)
    if tuple(map(int, re.findall(r"\d+", version)[:2])) <= tested:
        return None
    return f"{name} is untested with {package} {version}, newer than {'.'.join(map(str, tested))}"


@cache
def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""  # its backend says so


def _choose(tensor: Tensor, candidates: Iterable[str]) -> str:
    for name in candidates:  # a loop, since this runs for every tensor of every call
        if _backends[name].unsupported(tensor) is None:
            return name
    raise AssertionError("the reference takes every tensor")


def _candidates(device: torch.device) -> tuple[str, ...]:
    """The backends to try for a device, in order and imported; the last is the reference."""
    return _resolve(device, _traced if torch.compiler.is_dynamo_compiling() else _forced.get())


@torch.compiler.assume_constant_result
def _resolve(device: torch.device, forced: str | None) -> tuple[str, ...]:
    return _in_order(device, forced or os.environ.get("ESAM_KERNELS_BACKEND"))


@cache
def _in_order(device: torch.device, forced: str | None) -> tuple[str, ...]:
    if forced and forced not in _MODULES:
        raise ValueError(f"ESAM_KERNELS_BACKEND={forced}: choose one of {', '.join(_MODULES)}")
    wanted = (forced,) if forced else _PREFERENCE.get(device.type, ())
    names = (*(name for name in wanted if name != "reference"), "reference")
    for name in names:
        if name not in _backends:
            _backends[name] = _import(name)
    return names


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(f".{_MODULES[name]}", __name__)
    except ImportError as error:
        why = f"it cannot be imported ({error})"
        nothing = ModuleType(name)
        nothing.unsupported = lambda tensor: why  # type: ignore[attr-defined]
        return nothing


def _partition(params: Sequence[Tensor], backups: Sequence[Tensor] | None = None) -> _Parts:
    """The indices of the tensors that each backend serves on each device.

    Only the reference serves a weight whose backup lies in memory in another order.
    """
    if all(map(Tensor.is_contiguous, params)) and (backups is None or all(map(Tensor.is_contiguous, backups))):
        # One answer for all that are alike, of which there are few kinds.
        kinds = list(zip(*(map(attrgetter(name), params) for name in ("device", "dtype", "layout"))))
        names = {kind: _choose(param, _candidates(param.device)) for kind, param in dict(zip(kinds, params)).items()}
        if len(names) == 1:
            return [(_backends[names[kinds[0]]], list(range(len(params))))]
        found = [(names[kind], kind[0]) for kind in kinds]
    else:
        found = [
            (
                _choose(param, _candidates(param.device))
                if backups is None or have_same_layout(param, backups[i])
                else "reference",
                param.device,
            )
            for i, param in enumerate(params)
        ]
    indices: dict[tuple[str, torch.device], list[int]] = {}
    for i, one in enumerate(found):
        indices.setdefault(one, []).append(i)
    return [(_backends[name], ids) for (name, _), ids in indices.items()]


def _squared_norm(
    parts: _Parts, params: Sequence[Tensor], grads: Sequence[Tensor], adaptive: bool, mask: ElementMask | None
) -> Tensor:
    squares = [
        backend.squared_norm(_pick(params, ids), _pick(grads, ids), adaptive, mask and mask.subset(ids))
        for backend, ids in parts
    ]
    if len(squares) == 1:
        return squares[0]
    dtype = torch.float64 if any(square.dtype == torch.float64 for square in squares) else torch.float32
    return torch.stack([square.to(params[0].device, dtype, non_blocking=True) for square in squares]).sum()


def _perturb(
    parts: _Parts,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    backups: Sequence[Tensor] | None,
    coefficients: Sequence[float],
    norm: Tensor | None,
    adaptive: bool,
    mask: ElementMask | None,
) -> Tensor:
    if norm is None and len(parts) > 1:
        norm = _squared_norm(parts, params, grads, adaptive, mask).sqrt()
    norms = []
    for backend, ids in parts:
        saved = None if backups is None else _pick(backups, ids)
        scales = [coefficients[i] for i in ids]
        lists = (_pick(params, ids), _pick(grads, ids), saved, scales)
        norms.append(backend.perturb_(*lists, norm, adaptive, mask and mask.subset(ids)))
    return norms[0]


def _copy(parts: _Parts, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for backend, ids in parts:
        backend.restore_(_pick(targets, ids), _pick(sources, ids))


def _pick(tensors: Sequence[Tensor], ids: Sequence[int]) -> Sequence[Tensor]:
    return tensors if len(ids) == len(tensors) else [tensors[i] for i in ids]


def _check_lists(params: Sequence[Tensor], mask: ElementMask | None, **others: Sequence[Tensor]) -> None:
    if len(params) == 0:
        raise ValueError("got no params: give at least one tensor")
    expected = {attribute: list(map(attrgetter(attribute), params)) for attribute in ("shape", "device", "dtype")}
    dtypes = {"params": expected["dtype"]}
    for name, tensors in others.items():
        if len(tensors) != len(params):
            raise ValueError(f"got {len(params)} params but {len(tensors)} {name}: give one for each tensor")
        for attribute, wanted in expected.items():
            got = list(map(attrgetter(attribute), tensors))
            if attribute == "dtype":
                dtypes[name] = got
                if name != "backups":  # those of gradients may differ
                    continue
            if got != wanted:
                i = next(i for i in range(len(params)) if wanted[i] != got[i])
                raise ValueError(f"{name}[{i}] has {attribute} {got[i]}, params[{i}] {wanted[i]}: give the same")
    for name, kinds in dtypes.items():
        for dtype in set(kinds):
            if dtype not in _DTYPES:
                raise ValueError(
                    f"{name} has a tensor of {dtype}: one of float64, float32, bfloat16, float16 is needed"
                )
    for i, grad in enumerate(others.get("grads", ())):
        if grad.layout != torch.strided:
            raise ValueError(f"grads[{i}] is of layout {grad.layout}: give a dense one, grad.to_dense()")
    if mask is not None:
        _check_mask(mask, len(params))


def _check_mask(mask: ElementMask, count: int) -> None:
    ids, offsets = mask.tensor_ids, mask.offsets
    if len(ids) != count:
        raise ValueError(f"got {count} params but a mask for {len(ids)}: give one id for each tensor")
    if not (min(ids) >= 0 and max(ids) < 2**32):
        raise ValueError(f"a mask has the tensor ids {min(ids)} to {max(ids)}: ids in [0, 2**32) are needed")
    if offsets is not None and len(offsets) != count:
        raise ValueError(f"got {count} params but {len(offsets)} mask offsets: give one for each tensor")
    if offsets is not None and not (min(offsets) >= 0 and max(offsets) < 2**57):
        raise ValueError(f"a mask has the offsets {min(offsets)} to {max(offsets)}: offsets in [0, 2**57) are needed")
    if not (0 <= mask.beta <= 1 and 0 <= mask.seed < 2**64):
        raise ValueError(f"a mask has beta {mask.beta} and seed {mask.seed}: [0, 1] and [0, 2**64) are needed")


def _check_apart(params: Sequence[Tensor], backups: Sequence[Tensor]) -> None:
    """Refuse tensors that share elements: what is saved of one would be moved, or saved over, with the other."""
    tensors = [*params, *backups]
    if torch.compiler.is_dynamo_compiling():  # which knows no addresses
        shared = (0, len(params)) if any(map(is_, params, backups)) else None
    else:
        shared = two_that_share(tensors)
    if shared is not None:
        names = [f"params[{i}]" if i < len(params) else f"backups[{i - len(params)}]" for i in shared]
        raise ValueError(
            f"{names[0]} shares memory with {names[1]}: give tensors of their own, as backups torch.empty_like(param)"
        )
