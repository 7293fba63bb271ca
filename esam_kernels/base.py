"""The base optimizer: which can be one, and which of its attributes ESAM shows as its own."""

import inspect
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .bases import Bases, each_of
from .ops.memory import addresses, two_that_share
from .ops.reference import is_dense
from .options import OPTIONS, STEP, STORED
from .sharding import is_sharded, local_shard

_WITHOUT_FIRST_MOMENT = (
    torch.optim.Adadelta, torch.optim.Adafactor, torch.optim.Adagrad, torch.optim.ASGD, torch.optim.Rprop
)  # fmt: skip


_NEEDS_CLOSURE = ("AliG",)  # of pytorch_optimizer, whose closure has a default that does not serve
_NEEDS_GRAPH = ("AdaHessian", "SophiaH")  # of pytorch_optimizer: they differentiate the gradients
_IN_ANOTHER_BASIS = ("APOLLO", "Fira", "GaLore")  # of pytorch_optimizer: where a group has a rank, so is the moment
_MAXIMIZES = "maximize = True: ESAM minimizes the loss; negate it and leave maximize out"


def of_base(name: str) -> Any:
    """An attribute that is the base optimizer's, also when it is set and deleted."""
    return property(
        lambda self: getattr(self.base, name),
        lambda self, value: setattr(self.base, name, value),
        lambda self: delattr(self.base, name),
    )


def params_of(groups: Iterable[dict[str, Any]]) -> list[Tensor]:
    """All parameters of the groups, in the order of the state dict."""
    return [param for group in groups for param in group["params"]]


def keep_contents(base: torch.optim.Optimizer) -> Callable[[], None]:
    """Keep which groups and state an optimizer has; the function that is returned puts them back."""
    if isinstance(base, Bases):
        of_each = [keep_contents(one) for one in base.bases]

        def put_all_back() -> None:
            for put_back in of_each:
                put_back()

        return put_all_back
    groups, state = base.param_groups, base.state
    of_groups = [(group, dict(group)) for group in groups]
    of_state = [(key, value, dict(value) if isinstance(value, dict) else None) for key, value in state.items()]

    def put_back() -> None:
        base.param_groups, base.state = groups, state
        groups[:] = [group for group, _ in of_groups]
        for group, contents in of_groups:
            group.clear()
            group.update(contents)
        state.clear()
        for key, value, of_value in of_state:
            state[key] = value
            if of_value is not None:
                value.clear()
                value.update(of_value)

    return put_back


def make_base(
    params: Any,
    base: type[torch.optim.Optimizer]
    | torch.optim.Optimizer
    | list[torch.optim.Optimizer]
    | tuple[torch.optim.Optimizer, ...],
    base_options: dict[str, Any],
) -> tuple[torch.optim.Optimizer, dict[str, str]]:
    """The base optimizer, and under which key each of ESAM's options stands in its groups.

    Args:
        params: what the constructor was given.
        base: a class, which is made; or an optimizer, or several, which are checked.
        base_options: for the class.

    Raises:
        TypeError: if ``base`` is no optimizer.
        ValueError: if it cannot be the base of an ESAM, or what is given with it does not fit.
    """
    if isinstance(base, list | tuple):
        for one in base:
            if not isinstance(one, torch.optim.Optimizer):
                raise TypeError(
                    f"base has {one!r} in its list: make each optimizer with its parameters, as in ESAM(None, "
                    "[torch.optim.Muon(matrices), torch.optim.AdamW(others)])"
                )
            _check_kind(type(one))
            _check_free(one)
        if not base:
            raise ValueError("base is an empty list: give an optimizer's class, or optimizers")
        base = Bases(base)
    kind = base if isinstance(base, type) else type(base)
    if not issubclass(kind, torch.optim.Optimizer):
        raise TypeError(f"base is {base!r}: give an optimizer's class, such as torch.optim.SGD, or an optimizer")
    _check_kind(kind)
    if isinstance(base, torch.optim.Optimizer):
        _check_free(base)
        _check_same_params(params, base)
        if base_options:
            raise ValueError(f"{next(iter(base_options))} cannot be set: the base optimizer is made already")
        check_not_empty(params_of(base.param_groups))
        # Groups may have been given a rho, say, when the base was made; what may not differ between groups was not.
        own = [name for name, option in STORED.items() if option.per_group]
        return base, _keys(base, [own] * len(base.param_groups))
    taken = sorted(OPTIONS.keys() & inspect.signature(kind).parameters.keys())
    if taken:
        raise ValueError(
            f"{kind.__name__} has an option {taken[0]!r} of its own: make it first and give the optimizer as base, "
            f"ESAM(None, {kind.__name__}(params, {taken[0]}=...), {taken[0]}=...)"
        )
    if params is None or isinstance(params, torch.nn.Module):
        raise TypeError(
            f"params is {'None' if params is None else f'a {type(params).__name__}'}, and base a class, which is made "
            f"with them: give model.parameters(), or make the base first, ESAM(None, {kind.__name__}(...))"
        )
    params = params if isinstance(params, Tensor) else list(params)
    check_not_empty(params)
    given = [list(group) if isinstance(group, dict) else [] for group in params] if isinstance(params, list) else []
    made = base(params, **base_options)
    _check_free(made)
    check_not_empty(params_of(made.param_groups))
    if len(given) != len(made.param_groups):  # parameters without groups, which are one
        given = [sorted({key for keys in given for key in keys})] * len(made.param_groups)
    return made, _keys(made, given)


def _check_kind(kind: type[torch.optim.Optimizer]) -> None:
    if hasattr(kind, "second_step"):
        raise ValueError(
            f"base is {kind.__name__}, which is sharpness-aware itself: give the optimizer that it is around"
        )
    if kind.__name__ in _NEEDS_GRAPH:
        raise ValueError(
            f"base is {kind.__name__}, which needs a graph of the gradients, and backward() leaves none: take another"
        )
    closure = inspect.signature(kind.step).parameters.get("closure")
    if kind.__name__ in _NEEDS_CLOSURE or (closure is not None and closure.default is inspect.Parameter.empty):
        raise ValueError(f"{kind.__name__} evaluates a closure in its own step, so ESAM cannot be built on it")


def _check_free(base: torch.optim.Optimizer) -> None:
    if not hasattr(base, "defaults"):
        raise ValueError(
            f"base is a {type(base).__name__}, which does not show its optimizer's defaults: give that optimizer itself"
        )
    if getattr(base, "maximize", False):  # where pytorch_optimizer's have it
        raise ValueError(_MAXIMIZES)
    if STEP in base.defaults:
        raise ValueError(f"this {type(base).__name__} is the base of another ESAM already: make a new one")


def _keys(base: torch.optim.Optimizer, given: Sequence[Collection[str]]) -> dict[str, str]:
    """Under which key each of ESAM's options stands in the groups: ``esam_rho`` where the base has a rho of its own.

    Args:
        base: the optimizer, whose groups may hold more than its defaults.
        given: for each of its groups, the keys that whoever made the groups may have meant for ESAM.
    """
    taken = {key for one in each_of(base) for key in one.defaults}
    for group, keys in zip(base.param_groups, given):
        if STEP in group:  # from a checkpoint of another ESAM, which has told them apart
            taken.update(name for name in STORED if f"esam_{name}" in group)
        else:
            taken.update(group.keys() - set(keys))
    return {name: f"esam_{name}" if name in taken else name for name in STORED}


def check_ascent(base: torch.optim.Optimizer, ascent: str, groups: Sequence[dict[str, Any]]) -> None:
    """Refuse a direction that the base optimizer is known not to have, before it has any state.

    Args:
        base: the base optimizer.
        ascent: the option.
        groups: the parameter groups that are to be perturbed.

    Raises:
        ValueError: if it keeps no first moment and that is to be climbed along, or keeps a part of the state alone.
    """
    if isinstance(base, Bases):
        for one in base.bases:
            own = {id(group) for group in one.param_groups}
            check_ascent(one, ascent, [group for group in groups if id(group) in own])
        return
    if ascent == "gradient" or not groups:
        return
    name = type(base).__name__
    if hasattr(base, "consolidate_state_dict"):  # torch's ZeroRedundancyOptimizer
        raise ValueError(
            f"ascent = {ascent!r}: {name} keeps the state of each parameter on one rank alone, so the others do not "
            "know the direction: set ascent='gradient', or shard the model with fully_shard"
        )
    if ascent == "momentum":
        switched_off = any(group.get("momentum") == 0 and "betas" not in group for group in groups)
        if name in _IN_ANOTHER_BASIS and any("rank" in group for group in groups):
            raise ValueError(
                f"ascent = 'momentum': {name} keeps the first moment of a group with a rank in another basis than the "
                "weights': set ascent='previous' or 'gradient'"
            )
        # What AccSGD of pytorch_optimizer has under the name momentum_buffer are weights.
        if switched_off or type(base) in _WITHOUT_FIRST_MOMENT or name == "AccSGD":
            raise ValueError(
                f"ascent = 'momentum': {name}{' with momentum = 0' if switched_off else ''} keeps no first moment: "
                f"{'set momentum=0.9' if switched_off else 'take SGD with momentum, or AdamW'}, or set "
                "ascent='previous' or 'gradient'"
            )


def check_params(groups: Sequence[dict[str, Any]]) -> None:
    """Refuse groups whose parameters ESAM cannot perturb.

    Raises:
        ValueError: if a group maximizes, or a parameter is complex.
    """
    for group in groups:
        if group.get("maximize"):
            raise ValueError(_MAXIMIZES)
        for param in group["params"]:
            if param.is_complex() and param.requires_grad:
                raise ValueError(
                    f"{_described(param)} is {param.dtype}: ESAM takes real parameters; "
                    "torch.view_as_real gives such a one"
                )


def check_storage(params: Sequence[Tensor]) -> None:
    """Refuse parameters that share elements: the backup of one would hold the perturbed elements of the other.

    Raises:
        ValueError: if two do, one is there twice, or one holds an element twice.
    """
    for param, count in Counter(params).items():
        if count > 1:
            raise ValueError(
                f"{_described(param)} is {count} times in the list: tied weights are trained as one parameter, "
                "whichever place it is listed for, so list it once, for example list(dict.fromkeys(params))"
            )
    # Frozen ones may lie anywhere, but not in one that moves.
    ordered = sorted(filter(_is_strided, params), key=lambda param: not param.requires_grad)
    trained = sum(param.requires_grad for param in ordered)
    stored = list(map(local_shard, ordered))
    for param in stored[:trained]:
        if not is_dense(param) and addresses(param).unique().numel() < param.numel() * param.element_size():
            raise ValueError(
                f"a parameter of shape {list(param.shape)} and strides {list(param.stride())} holds elements twice: "
                "give a contiguous one, such as its clone()"
            )
    if (shared := two_that_share(stored, trained)) is not None:
        one, other = (list(stored[i].shape) for i in shared)
        raise ValueError(
            f"parameters of shapes {one} and {other} share memory: to tie weights, use one Parameter in both places"
        )


def storage_of(params: Sequence[Tensor]) -> list[int]:
    """Where and how the parameters lie, to see whether ``check_storage`` has to be asked again."""
    kinds = {type(param): param for param in params}.values()
    if any(map(is_lazy, kinds)) or any(map(is_sharded, kinds)):  # these do not say; FSDP2 keeps its own apart
        return []
    odd = set(map(attrgetter("layout"), params)) != {torch.strided} or any(map(attrgetter("is_nested"), params))
    stored = [param for param in params if _is_strided(param)] if odd else params
    trained = map(attrgetter("requires_grad"), stored)
    return [*map(Tensor.data_ptr, stored), *map(Tensor.numel, stored), *map(Tensor.is_contiguous, stored), *trained]


def _is_strided(param: Tensor) -> bool:
    return not is_lazy(param) and param.layout == torch.strided and not param.is_nested


def check_not_empty(params: Any) -> None:
    """Refuse an empty list of parameters.

    Raises:
        ValueError: if it is one.
    """
    if isinstance(params, list) and not params:
        raise ValueError(
            "got an empty parameter list: give the parameters that are to be trained, such as model.parameters(), "
            "which can be gone through only once"
        )


def _described(param: Tensor) -> str:
    return "a parameter that is not initialized" if is_lazy(param) else f"a parameter of shape {list(param.shape)}"


def _check_same_params(params: Iterable[Any] | None, base: torch.optim.Optimizer) -> None:
    if params is None:
        return
    given = list(params)
    if given and isinstance(given[0], dict):
        given = params_of(given)
    given = [item[1] if isinstance(item, tuple) else item for item in given]  # named parameters
    if {id(param) for param in given} != {id(param) for param in params_of(base.param_groups)}:
        raise ValueError("params are not the base optimizer's: give params=None, or the same ones")
