"""Several base optimizers as one, each with parameters of its own, such as Muon for matrices and AdamW for the rest."""

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor


class Bases(torch.optim.Optimizer):
    """Presents several optimizers as one: their groups and state one after another, in the order that they are given.

    Groups and state are theirs and are kept nowhere else. A new group goes to the last one.
    """

    def __init__(self, bases: Sequence[torch.optim.Optimizer]) -> None:
        # Not Optimizer.__init__, which makes groups and state; this gives it hooks, as after a copy.
        self.__setstate__({"bases": list(bases)})

    def __getstate__(self) -> dict[str, Any]:
        return {"bases": self.bases}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.bases: list[torch.optim.Optimizer] = state["bases"]
        super().__setstate__(state)

    def __repr__(self) -> str:
        return repr(self.bases)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups of all, the same dictionaries as theirs."""
        return _Groups(group for base in self.bases for group in base.param_groups)

    @property
    def state(self) -> "_State":  # type: ignore[override]
        """The state of all."""
        return _State(self.bases)

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """What a new group is filled up with."""
        return self.bases[-1].defaults

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether all unscale their gradients and skip steps themselves; where some do not, GradScaler does it."""
        return all(getattr(base, "_step_supports_amp_scaling", False) for base in self.bases)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the last optimizer."""
        self.bases[-1].add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all parameters."""
        for base in self.bases:
            base.zero_grad(set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take the step of each."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for base in self.bases:
            base.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """One state dict, in the layout of one optimizer that has all of the groups."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        merged: dict[str, Any] = {"state": {}, "param_groups": []}
        first = 0  # the number of the next optimizer's first parameter
        for base in self.bases:
            own = base.state_dict()
            merged["state"].update({_moved(key, first): value for key, value in own["state"].items()})
            for group in own["param_groups"]:
                merged["param_groups"].append({**group, "params": [first + i for i in group["params"]]})
            first += _count(base.param_groups)
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, merged)
            merged = merged if changed is None else changed
        return merged

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load such a state dict.

        Raises:
            ValueError: if its groups are not of the same sizes.
        """
        state_dict = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        groups = state_dict["param_groups"]
        sizes, found = ([len(group["params"]) for group in each] for each in (self.param_groups, groups))
        if sizes != found:
            raise ValueError(
                f"the state dict has parameter groups of {found} parameters, and these optimizers together {sizes}: "
                "load what they have saved, in the same order"
            )
        numbers = [number for group in groups for number in group["params"]]
        i = first = 0
        for base in self.bases:
            own, count = groups[i : i + len(base.param_groups)], _count(base.param_groups)
            named = set(numbers[first : first + count])
            # Theirs find their parameters by the places in the groups, so that the numbers may be any.
            base.load_state_dict(
                {
                    "state": {key: value for key, value in state_dict["state"].items() if key in named},
                    "param_groups": own,
                }
            )
            i, first = i + len(own), first + count
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)


def _of_all(name: str) -> Any:
    """An attribute that is set on all of the optimizers."""

    def get(self: Bases) -> Any:
        return getattr(self.bases[0], name)

    def put(self: Bases, value: Any) -> None:
        for base in self.bases:
            setattr(base, name, value)

    def drop(self: Bases) -> None:
        for base in self.bases:
            delattr(base, name)

    return property(get, put, drop)


Bases.grad_scale = _of_all("grad_scale")  # type: ignore[attr-defined]
Bases.found_inf = _of_all("found_inf")  # type: ignore[attr-defined]


def each_of(base: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """The optimizers that it stands for: itself, unless it is several."""
    return base.bases if isinstance(base, Bases) else [base]


def _count(groups: Sequence[dict[str, Any]]) -> int:
    return sum(len(group["params"]) for group in groups)


def _moved(key: Any, by: int) -> Any:
    if not isinstance(key, int):
        raise ValueError(
            f"an optimizer keeps state under {key!r}, which is no parameter: it cannot be one of several, in whose "
            "state nothing says whose that is"
        )
    return key + by


class _Groups(list):
    """A list of groups that are kept elsewhere: changes to the list itself would be lost, so they are refused."""

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise TypeError(
            "param_groups of several base optimizers cannot be changed as a list: use add_param_group(), or change the "
            "groups in it"
        )

    append = extend = insert = pop = remove = clear = sort = reverse = _refuse
    __setitem__ = __delitem__ = __iadd__ = __imul__ = _refuse


class _State(MutableMapping):
    """The state of several optimizers, each of which keeps that of its own parameters."""

    def __init__(self, bases: Sequence[torch.optim.Optimizer]) -> None:
        self._bases = bases

    def __getitem__(self, key: Tensor) -> Any:
        return self._of(key)[key]  # which makes what is missing, as that of one optimizer does

    def __setitem__(self, key: Tensor, value: Any) -> None:
        self._of(key)[key] = value

    def __delitem__(self, key: Tensor) -> None:
        del self._of(key)[key]

    def __iter__(self) -> Iterator[Any]:
        return (key for base in self._bases for key in base.state)

    def __len__(self) -> int:
        return sum(len(base.state) for base in self._bases)

    def __contains__(self, key: object) -> bool:
        return any(key in base.state for base in self._bases)

    def __repr__(self) -> str:
        return repr(dict(self))

    def get(self, key: Any, default: Any = None) -> Any:
        """What there is, without making it."""
        return next((base.state[key] for base in self._bases if key in base.state), default)

    def _of(self, key: Any) -> Any:
        for base in self._bases:
            if key in base.state:
                return base.state
        for base in self._bases:
            if any(param is key for group in base.param_groups for param in group["params"]):
                return base.state
        raise KeyError(key)
