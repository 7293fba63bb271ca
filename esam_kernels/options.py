"""ESAM's options, each said once: its default, its range, whether it may differ between groups, and what it does.

The constructor, ``param_groups``, checkpoints, the benchmarks' command lines, README and docs are made from here.
Nothing here imports torch.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from typing import Any

STEP = "esam_step"  # stands in the groups beside the options: the number of steps taken, from which masks are drawn


@dataclass(frozen=True)
class Option:
    """What there is to say of one option."""

    name: str
    kind: type  # of a value that is not None: float, int, bool or str
    default: Any
    fits: Callable[[Any], bool]
    needed: str  # what a value must be, for messages
    meaning: str  # one sentence, for the reference and the docs
    choices: tuple[str, ...]  # all that a str may be
    per_group: bool  # whether it may differ between parameter groups

    def stored(self, value: Any) -> Any:
        """The value as it stands in groups and checkpoints: plain Python, and within its range.

        Raises:
            ValueError: if it is not.
        """
        value = _plain(value)
        if not self.fits(value):
            raise ValueError(f"{self.name} = {value!r}: {self.needed} is needed")
        return value


_PLAIN = (float, int, bool, str, type(None))


def _plain(value: Any) -> Any:
    """A number of NumPy's or a 0-dimensional tensor as Python's; a dtype as its name."""
    if type(value) in _PLAIN:
        return value
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return value.item()
    return str(value).removeprefix("torch.") if type(value).__name__ == "dtype" else value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _share(default: float, meaning: str, least: float = 0.0) -> Any:
    needed = "a number in (0, 1]" + (f", at least {least:g}," if least else "")
    return _option(default, lambda x: _is_number(x) and 0 < x <= 1 and x >= least, needed, meaning)


def _count(default: int, least: int, meaning: str) -> Any:
    return _option(default, lambda x: _is_whole(x) and x >= least, f"a whole number >= {least}", meaning)


def _choice(choices: tuple[str, ...], meaning: str) -> Any:
    needed = " or ".join([", ".join(map(repr, choices[:-1])), repr(choices[-1])])
    return _option(choices[0], lambda x: isinstance(x, str) and x in choices, needed, meaning, choices)


def _option(default: Any, fits: Callable[[Any], bool], needed: str, meaning: str, choices: tuple[str, ...] = ()) -> Any:
    about = {"fits": fits, "needed": needed, "meaning": meaning, "choices": choices}
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class GroupSettings:
    """The options that may differ between parameter groups."""

    rho: float = _option(
        None,  # make() resolves it: in groups and checkpoints it is always a number
        lambda x: _is_number(x) and 0 <= x <= 1e18,
        "a number >= 0, at most 1e18,",
        "radius of the neighbourhood, in units of the weights; 0 leaves a group unperturbed; None takes what suits "
        'ascent when the optimizer is made: 0.05 for "gradient", 0.1 for "previous", 0.3 for "momentum" or 1 if the '
        "base has betas, as Adam has",
    )
    adaptive: bool = _option(
        False,
        lambda x: isinstance(x, bool),
        "True or False",
        "a neighbourhood that scales with the weights, as ASAM has it (arXiv 2102.11600)",
    )


@dataclass(frozen=True)
class Settings:
    """The options that hold for all parameter groups; a step reads them here."""

    ascent: str = _choice(
        ("gradient", "momentum", "previous"),
        "climb along this batch's gradient, or save that pass: \"momentum\" climbs against the base optimizer's first "
        'moment, along which steps go down (MSAM, arXiv 2401.12033), "previous" along the gradient of the last step; '
        "where it is changed in param_groups rho stays as it was: set both",
    )
    ascent_share: float = _share(
        1.0,
        "share of the samples, drawn at random, whose gradient the first pass takes; less than 1 makes a selection by "
        "loss begin with a forward of all",
    )
    beta: float = _share(
        0.6,
        "share of the weights that a step perturbs: the probability with which each tensor, or each weight, is drawn "
        "(stochastic weight perturbation); at least one tensor is",
        least=1e-18,  # so that rho / beta is finite in float32
    )
    gamma: float = _share(
        0.5,
        "share of the samples that the gradient is taken on (sharpness-sensitive data selection); 1 takes all and "
        "skips the second pass",
    )
    granularity: str = _choice(
        ("tensor", "element"),
        'draw whole tensors, which saves time in the first pass, or with "element" each weight by itself, as the '
        "paper's equation has it, which saves none",
    )
    selection: str = _choice(
        ("increase", "loss", "random"),
        'the samples whose loss the perturbation raises most; "loss" takes those of the largest loss and "random" any, '
        "both without the second pass",
    )
    select_over: str = _choice(
        ("micro_batch", "all"),
        'with a list of micro-batches, select from each, or with "all" from all together, at the cost of one '
        "synchronization of host and device a step",
    )
    interval: int = _count(
        1,
        1,
        "every so many steps one is sharpness-aware, beginning with the first; the others are the base optimizer's",
    )
    start: int = _count(
        0,
        0,
        "number of the first step that may be sharpness-aware, from which interval counts; those before it are the "
        "base optimizer's",
    )
    steering_dtype: str | None = _option(
        None,
        lambda x: x is None or (isinstance(x, str) and x == "bfloat16"),
        "torch.bfloat16 or None (in float16 the gradient of the first pass would underflow)",
        "torch.bfloat16 runs all passes but the last, which only find a direction and a ranking, under autocast to it; "
        "an autocast inside the closure overrides it",
    )
    seed: int = _option(
        0,
        lambda x: _is_whole(x) and 0 <= x < 2**64,
        "a whole number in [0, 2**64)",
        "of the draws, which depend on it and on the step's number alone; the same on every rank",
    )


def _rows(settings: type, per_group: bool) -> list[Option]:
    kinds = {"float": float, "int": int, "bool": bool, "str": str, "str | None": str}
    return [
        Option(row.name, kinds[row.type.__name__ if isinstance(row.type, type) else str(row.type)], row.default,
               **row.metadata, per_group=per_group)
        for row in dataclasses.fields(settings)
    ]  # fmt: skip


OPTIONS = {option.name: option for option in (*_rows(GroupSettings, True), *_rows(Settings, False))}
_STEP_COUNT = Option(STEP, int, 0, lambda x: _is_whole(x) and x >= 0, "a whole number >= 0", "", (), False)
# All that stands in a parameter group.
STORED = {**OPTIONS, STEP: _STEP_COUNT}


def make(values: Mapping[str, Any], base_has_betas: bool) -> dict[str, Any]:
    """What stands in a parameter group for the values that the constructor was given.

    Raises:
        ValueError: if one is out of its range.
    """
    given = {name: values.get(name, option.default) for name, option in STORED.items()}
    ascent = STORED["ascent"].stored(given["ascent"])
    if given["rho"] is None:
        # For moments those of MSAM's authors, for SGD and for AdamW.
        given["rho"] = {"gradient": 0.05, "momentum": 1.0 if base_has_betas else 0.3, "previous": 0.1}[ascent]
    return {name: option.stored(given[name]) for name, option in STORED.items()}


def read(groups: Sequence[dict[str, Any]], keys: Mapping[str, str]) -> tuple[Settings, list[GroupSettings]]:
    """The options as they stand in the groups, checked.

    Args:
        groups: parameter groups.
        keys: under which key an option stands there, by its name.

    Raises:
        ValueError: if a value is out of its range, or differs between groups and may not.
    """
    for group in groups:
        if missing := [key for key in keys.values() if key not in group]:
            raise ValueError(f"a parameter group has no {missing[0]!r}: add groups by add_param_group()")
    found = [{name: STORED[name].stored(group[key]) for name, key in keys.items()} for group in groups]
    for values in found:
        for name, value in values.items():
            if not STORED[name].per_group and value != found[0][name]:
                several = [option.name for option in OPTIONS.values() if option.per_group]
                raise ValueError(
                    f"{name} is {found[0][name]!r} in one parameter group and {value!r} in another: only "
                    f"{' and '.join(several)} may differ between groups"
                )
    shared = Settings(**{name: found[0][name] for name in OPTIONS if not OPTIONS[name].per_group})
    own = [{name: values[name] for name in OPTIONS if OPTIONS[name].per_group} for values in found]
    return shared, [GroupSettings(**values) for values in own]


def make_plain(groups: Sequence[dict[str, Any]], keys: Mapping[str, str]) -> None:
    """Turn numbers of NumPy's and tensors that were set in the groups into Python's, which any checkpoint can hold."""
    for group in groups:
        for key in keys.values():
            value = group[key]
            if type(value) not in _PLAIN:
                group[key] = _plain(value)


def signature(own: inspect.Signature) -> inspect.Signature:
    """A constructor's signature with the options before its last parameter, ``**options``."""
    *first, rest = own.parameters.values()
    rows = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=option.kind)
        for name, option in OPTIONS.items()
    ]
    return own.replace(parameters=[*first, *rows, rest])


def documentation(indent: str) -> str:
    """The options as the ``Args`` of a docstring."""
    return "\n".join(
        f"{indent}{option.name}: {option.meaning}{'; per parameter group' if option.per_group else ''} "
        f"(default: {option.default!r})."
        for option in OPTIONS.values()
    )


@lru_cache(maxsize=1024)
def count_of(share: float, size: int) -> int:
    """How many of ``size`` things a share of them is, rounded down, but at least one: max(1, floor(share * size)).

    Exact for the share as it is written: 0.29 of 100 are 29, which floating point makes 28.
    """
    return max(1, math.floor(Fraction(repr(share)) * size))
