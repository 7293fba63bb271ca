"""ESAM as a ``torch.optim.Optimizer``: arguments, parameter groups, state, and the two halves of a step."""

import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .closure import Closure
from .engines import local_shard
from .model_state import ModelState
from .ops.reference import is_dense
from .rollback import Rollback
from .sharpness import (
    Perturbation,
    ReentrantCheckpoints,
    Settings,
    Target,
    check_gradient,
    descend,
    drawn,
    esam_backward,
    evaluate,
    loss_scale,
    mean,
)

PER_GROUP = ("rho", "adaptive")  # the settings that may differ between parameter groups
STEP = "esam_step"  # in the groups beside the settings: the number of steps taken, from which masks are drawn


def _of_base(name: str) -> Any:
    """An attribute that is the base optimizer's, also when it is set and deleted."""
    return property(
        lambda self: getattr(self.base, name),
        lambda self, value: setattr(self.base, name, value),
        lambda self: delattr(self.base, name),
    )


@dataclass
class _Progress:
    """How far a step has come. An object of its own, since Lightning wraps optimizers into subclasses of theirs.

    Methods then run on the wrapper, which reads its attributes from the optimizer but keeps those that it sets.
    """

    phase: str = ""  # what is under way, for error messages
    perturbation: Perturbation | None = None  # between first_step() and second_step()
    has_gradient: bool = False  # between backward() and step()


class ESAM(torch.optim.Optimizer):
    """Efficient sharpness-aware minimization around any PyTorch optimizer.

    Source: Du et al., "Efficient Sharpness-aware Minimization for Improved Training of Neural Networks", ICLR 2022,
    arXiv 2110.03141. With ``beta = gamma = 1`` it is SAM (arXiv 2010.01412), with ``adaptive`` as well ASAM (arXiv
    2102.11600), and with ``rho = 0`` the base optimizer. ::

        optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.05, beta=0.6, gamma=0.5)
        for inputs, targets in loader:
            loss = optimizer.backward(batch_closure(model, loss_fn, inputs, targets))  # loss_fn: one loss per sample
            optimizer.step()

    ``param_groups``, ``state``, ``defaults`` and the hooks are the base optimizer's own, so schedulers, checkpoints and
    trainers act on one truth. ESAM's settings stand in the parameter groups under the names of the arguments (with
    ``esam_`` before a name that the base optimizer uses itself), and may be changed there between steps; the number of
    steps taken, from which masks are drawn, stands there as ``esam_step``.

    Args:
        params: parameters or parameter groups, as for any optimizer; groups may have a ``rho`` and an ``adaptive`` of
            their own. None, or the same parameters, if ``base`` is an optimizer already.
        base: class of the base optimizer, made with ``base_options``; or a ready optimizer.
        rho: radius of the neighbourhood, in units of the weights; 0 leaves a group unperturbed.
        beta: share of the weights that a step perturbs, in (0, 1] (stochastic weight perturbation).
        gamma: share of the samples that the gradient is taken on, in (0, 1] (sharpness-sensitive data selection).
        adaptive: scale the neighbourhood with the weights, as ASAM does.
        granularity: "tensor" draws whole tensors, so that the first pass skips the others' gradients; "element" draws
            each weight by itself, as the paper's equation has it, and saves no time in the first pass.
        selection: "increase" takes the samples whose loss the perturbation raises most; "loss" those of the largest
            loss and "random" any, both without the second pass.
        select_over: with a list of micro-batches, select from each ("micro_batch"), or from all together ("all"),
            which synchronizes host and device once a step.
        interval: every so many steps one is an ESAM step, beginning with the first; the others are the base
            optimizer's.
        steering_dtype: run the first two passes, which only steer, under autocast to torch.bfloat16; None runs all
            passes as the closure has them. An autocast inside the closure overrides it.
        seed: 64-bit seed of the masks, the same on every rank.
        model: the model, if closures are written by hand: its buffers are kept from the extra passes.
        base_options: options of the base optimizer's class.

    Raises:
        ValueError: if a value is out of its range, a name of ``base_options`` is one of ESAM's, parameters are complex
            or not the base optimizer's, or the base optimizer maximizes or needs a closure for its own step.
        TypeError: if ``base`` is no optimizer.
    """

    def __init__(
        self,
        params: Any,
        base: type[torch.optim.Optimizer] | torch.optim.Optimizer,
        *,
        rho: float = 0.05,
        beta: float = 0.6,
        gamma: float = 0.5,
        adaptive: bool = False,
        granularity: str = "tensor",
        selection: str = "increase",
        select_over: str = "micro_batch",
        interval: int = 1,
        steering_dtype: torch.dtype | None = None,
        seed: int = 0,
        model: nn.Module | None = None,
        **base_options: Any,
    ) -> None:
        # Optimizer.__init__ is not called: it would make groups, state and hooks beside the base optimizer's.
        if steering_dtype not in (None, torch.bfloat16):
            raise ValueError(
                f"steering_dtype = {steering_dtype}: torch.bfloat16 or None is needed (in float16 the gradient of the "
                "first pass would underflow)"
            )
        options = {
            "rho": rho,
            "adaptive": adaptive,
            "beta": beta,
            "gamma": gamma,
            "granularity": granularity,
            "selection": selection,
            "select_over": select_over,
            "interval": interval,
            "steering_dtype": None if steering_dtype is None else "bfloat16",  # a name is what checkpoints can hold
            "seed": seed,
            STEP: 0,
        }
        _check_options(options)
        _check_base(base, options)
        if isinstance(base, torch.optim.Optimizer):
            if STEP in base.defaults:
                raise ValueError(f"this {type(base).__name__} is the base of another ESAM already: make a new one")
            _check_same_params(params, base)
            if base_options:
                raise ValueError(f"{next(iter(base_options))} cannot be set: the base optimizer is made already")
            keys = {name: f"esam_{name}" if name in base.defaults else name for name in options}
        else:
            params = params if isinstance(params, Tensor) else list(params)
            _check_not_empty(params)
            base = base(params, **base_options)
            keys = {name: name for name in options}
        settings = {keys[name]: value for name, value in options.items()}
        # What a group says of itself holds, unless another ESAM said it, whose checkpoint the base has loaded.
        groups = [settings if STEP in group else {**settings, **group} for group in base.param_groups]
        groups = [{key: group[key] for key in settings} for group in groups]
        _check_not_empty(_params(base.param_groups))
        _check_groups([{**group, **own_settings} for group, own_settings in zip(base.param_groups, groups)], keys)
        _check_storage(_params(base.param_groups))
        self.base = base
        self.model = model
        self._keys = keys
        self._progress = _Progress()
        self._checkpoints = ReentrantCheckpoints()
        base.defaults.update(settings)
        for group, own_settings in zip(base.param_groups, groups):
            group.update(own_settings)

    # One truth: the base optimizer's.

    param_groups = _of_base("param_groups")
    state = _of_base("state")
    defaults = _of_base("defaults")
    # What GradScaler.step tells a fused optimizer, which unscales its gradients itself.
    grad_scale = _of_base("grad_scale")
    found_inf = _of_base("found_inf")

    def __getattr__(self, name: str) -> Any:
        if name == "base" or name.startswith("__"):  # not there yet, while a copy is being made
            raise AttributeError(name)
        return getattr(self.base, name)

    def __getstate__(self) -> dict[str, Any]:
        self._require_idle("copying or pickling the optimizer")
        names = ("base", "model", "_keys", "_progress", "_checkpoints")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __repr__(self) -> str:
        return f"ESAM({self.base!r})"

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state dict, with ESAM's settings and step count in its parameter groups.

        Raises:
            RuntimeError: during ``backward``, and between ``first_step`` and ``second_step``.
        """
        self._require_idle("state_dict()")
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of ESAM's or of the base optimizer's; settings that it lacks stay as they are.

        Raises:
            RuntimeError: during ``backward``, and between ``first_step`` and ``second_step``.
        """
        self._require_idle("load_state_dict()")
        before = [{key: group[key] for key in self._keys.values()} for group in self.param_groups]
        self.base.load_state_dict(state_dict)
        self._progress.has_gradient = False
        for group, settings in zip(self.param_groups, before):
            for key, value in settings.items():
                group.setdefault(key, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; it may have its own ``rho`` and ``adaptive``.

        Raises:
            ValueError: if a setting is out of its range or may not differ between groups, or parameters are complex.
            RuntimeError: during ``backward``, and between ``first_step`` and ``second_step``.
        """
        self._require_idle("add_param_group()")
        shared = {key: self.param_groups[0][key] for name, key in self._keys.items() if name not in PER_GROUP}
        self.base.add_param_group({**shared, **param_group})
        try:
            _check_groups(self.param_groups, self._keys)
            _check_storage(_params(self.param_groups))
        except ValueError:
            self.param_groups.pop()
            raise

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all parameters, as the base optimizer does.

        Raises:
            RuntimeError: during ``backward``, which has done it, and would lose those of earlier micro-batches.
        """
        if self._progress.phase:
            raise RuntimeError(
                f"zero_grad() was called during {self._progress.phase}, which does it itself: a closure returns "
                "losses, and has no backward() or zero_grad() of its own"
            )
        self.base.zero_grad(set_to_none)
        self._progress.has_gradient = False

    # A step: a sharpness-aware backward, and an ordinary step.

    def backward(self, closure: Closure | Sequence[Closure], grad_scaler: torch.amp.GradScaler | None = None) -> Tensor:
        """Put the sharpness-aware gradient into ``.grad``, in place of what is there; the weights stay as they are.

        Whatever is raised inside, by the closure or by Ctrl-C, leaves the weights, the buffers and the random state
        from before the call, bit for bit, and no gradients.

        Args:
            closure: ``closure(index)`` returns the losses of the batch's rows in ``index`` (int64, shape [k]; None:
                all of them) with their graph: one per sample, shape [b], or (losses, weights) of shape [b] each, of
                which weighted means are taken. ``batch_closure`` makes one. A list of closures is a list of
                micro-batches, whose gradients add up to that of one batch.
            grad_scaler: scales the losses; ``unscale_``, ``step`` and ``update`` are called on it as always.

        Returns:
            The mean loss of the whole batch at the weights, 0-dimensional, detached, on the losses' device; of the
            first, low-precision pass if there is a ``steering_dtype``. It is this rank's.

        Raises:
            TypeError: if a closure cannot be called with an index, or returns no tensor.
            ValueError: if a closure returns anything but one loss per sample, a setting is out of its range, or a
                parameter to be perturbed has a sparse gradient.
            RuntimeError: during another ``backward``, between ``first_step`` and ``second_step``, and where gradients
                are disabled.
        """
        self._require_idle("backward()")
        if not torch.is_grad_enabled():
            raise RuntimeError("backward() was called under torch.no_grad() or inference_mode(): call it outside")
        closures = _check_closures(closure)
        settings, step, targets = self._settings(), self._step, self._targets()
        rollback = Rollback()
        try:
            rollback.open()
            rollback.undo_by(lambda: self._reset(step))
            self._progress.phase = "backward()"
            self.base.zero_grad()
            state = self._model_state(closures)
            if targets and step % settings.interval == 0:
                loss = esam_backward(closures, targets, settings, step, state, self._checkpoints, grad_scaler, rollback)
            else:
                state.keep(rollback)
                everything = [None] * len(closures)
                loss = mean(descend(closures, everything, state, evaluate, loss_scale(grad_scaler), rollback))
            self._set_step(step + 1)
            self._progress.phase = ""
            self._progress.has_gradient = True
            rollback.close()
            return loss
        except BaseException as error:
            rollback.roll_back(error)
            raise

    def step(self, closure: Any = None) -> Any:
        """Take the base optimizer's step with the gradients in ``.grad``; with a closure, ``backward(closure)`` first.

        Ctrl-C and SIGTERM wait for the base optimizer, which would otherwise leave some weights updated and some not.
        Trainers such as Lightning give a closure without an index, which runs hooks: after ``backward`` it is called.

        Returns:
            What ``backward`` returns, or None.
        """
        self._require_idle("step()")
        loss = None
        if callable(closure) and self._progress.has_gradient and _takes_no_index(closure):
            closure()
        elif closure is not None:
            loss = self.backward(closure)
        signals = Rollback()  # with nothing to undo: they come before the base optimizer's step, or after it
        try:
            signals.open()
            self.base.step()
            self._progress.has_gradient = False
            signals.close()
        except BaseException as error:
            signals.roll_back(error)
            raise
        return loss

    # The two halves of a step as in davda54/sam, for code that is written so.

    def first_step(self, zero_grad: bool = False) -> None:
        """Perturb the weights by the gradients in ``.grad``, of which beta keeps a part.

        Raises:
            ValueError: if gamma, interval or steering_dtype is set, none of which can apply here.
            RuntimeError: if there are no gradients, or at the wrong time.
        """
        self._require_idle("first_step()")
        settings, targets = self._settings(), self._targets()
        for name, needed in (("gamma", 1), ("interval", 1), ("steering_dtype", None)):
            if getattr(settings, name) != needed:
                raise ValueError(
                    f"{name} = {getattr(settings, name)} cannot apply to first_step() and second_step(), whose passes "
                    f"the caller runs: set {name}={needed}, or use backward()"
                )
        if all(param.grad is None for param in _params(self.param_groups)):
            raise RuntimeError("first_step() found no gradients: call loss.backward() before it")
        state, perturbation = self._model_state(), Perturbation(settings, self._step)
        rollback = Rollback()
        try:
            rollback.open()
            rollback.undo_by(lambda: setattr(self._progress, "perturbation", None))
            rollback.undo_by(perturbation.restore)
            self._progress.perturbation = perturbation
            chosen = drawn(targets, settings, self._step) if targets else []
            perturbation.apply(chosen, [check_gradient(target, target.param.grad) for target in chosen])
            state.forget_weight_copies()
            rollback.close()
            if zero_grad:
                self.zero_grad()
        except BaseException as error:
            rollback.roll_back(error)
            raise

    def second_step(self, zero_grad: bool = False) -> None:
        """Put the weights back and take the base optimizer's step with the gradients in ``.grad``.

        Raises:
            RuntimeError: if ``first_step`` was not called before.
        """
        self.restore()
        self._set_step(self._step + 1)
        self.step()
        if zero_grad:
            self.zero_grad()

    def restore(self) -> None:
        """Put the weights back after ``first_step`` without a step, bit for bit.

        Raises:
            RuntimeError: if ``first_step`` was not called before.
        """
        if self._progress.perturbation is None:
            raise RuntimeError("there is nothing to restore: call first_step() before second_step() or restore()")
        self._progress.perturbation.restore()
        self._progress.perturbation = None
        self._model_state().forget_weight_copies()

    # What stands in the parameter groups.

    @property
    def _step(self) -> int:
        return self.param_groups[0][self._keys[STEP]]

    def _set_step(self, step: int) -> None:
        for group in self.param_groups:
            group[self._keys[STEP]] = step

    def _reset(self, step: int) -> None:
        self._progress.phase = ""
        self._progress.has_gradient = False
        self._set_step(step)
        self.base.zero_grad()

    def _model_state(self, closures: Sequence[Closure] = ()) -> ModelState:
        models = [self.model, *(getattr(closure, "model", None) for closure in closures)]
        # A closure written by hand may call anything its model.
        return ModelState([model for model in models if isinstance(model, nn.Module)], _params(self.param_groups))

    def _settings(self) -> Settings:
        """The settings as they stand in the groups now, checked."""
        _check_groups(self.param_groups, self._keys)
        values = {name: self.param_groups[0][self._keys[name]] for name in SHARED if name != STEP}
        return Settings(**{**values, "steering_dtype": values["steering_dtype"] and torch.bfloat16})

    def _targets(self) -> list[Target]:
        """The parameters that can be perturbed: trainable ones in groups whose rho is not 0."""
        targets, tensor_id = [], 0
        for group in self.param_groups:
            rho, adaptive = group[self._keys["rho"]], group[self._keys["adaptive"]]
            for param in group["params"]:
                if rho > 0 and param.requires_grad:
                    targets.append(Target(param, tensor_id, rho, adaptive))
                tensor_id += 1
        return targets

    def _require_idle(self, action: str) -> None:
        if self._progress.phase:
            raise RuntimeError(f"{action} was called during {self._progress.phase}: call it after it has returned")
        if self._progress.perturbation is not None:
            raise RuntimeError(
                f"{action} was called between first_step() and second_step(), when the weights are perturbed: "
                "call second_step() or restore() first"
            )


def _params(groups: list[dict[str, Any]]) -> list[Tensor]:
    return [param for group in groups for param in group["params"]]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# For each option, what it must fulfil, and how that is said.
_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "rho": (lambda x: _is_number(x) and x >= 0, "a number >= 0"),
    "adaptive": (lambda x: isinstance(x, bool), "True or False"),
    "beta": (lambda x: _is_number(x) and 0 < x <= 1, "a number in (0, 1]"),
    "gamma": (lambda x: _is_number(x) and 0 < x <= 1, "a number in (0, 1]"),
    "granularity": (lambda x: x in ("tensor", "element"), "'tensor' or 'element'"),
    "selection": (lambda x: x in ("increase", "loss", "random"), "'increase', 'loss' or 'random'"),
    "select_over": (lambda x: x in ("micro_batch", "all"), "'micro_batch' or 'all'"),
    "interval": (lambda x: isinstance(x, int) and not isinstance(x, bool) and x >= 1, "a whole number >= 1"),
    "steering_dtype": (lambda x: x in (None, "bfloat16"), "None or torch.bfloat16"),
    "seed": (lambda x: isinstance(x, int) and 0 <= x < 2**64, "a whole number in [0, 2**64)"),
    STEP: (lambda x: isinstance(x, int) and x >= 0, "a whole number >= 0"),
}
SHARED = tuple(name for name in _RANGES if name not in PER_GROUP)


def _check_options(options: dict[str, Any]) -> None:
    for name, value in options.items():
        fits, needed = _RANGES[name]
        if not fits(value):
            raise ValueError(f"{name} = {value!r}: {needed} is needed")


def _check_groups(groups: list[dict[str, Any]], keys: dict[str, str]) -> None:
    for group in groups:
        _check_options({name: group[key] for name, key in keys.items()})
        for name in SHARED:
            first, value = groups[0][keys[name]], group[keys[name]]
            if value != first:
                raise ValueError(
                    f"{name} is {first!r} in one parameter group and {value!r} in another: only rho and "
                    "adaptive may differ between groups"
                )
        if group.get("maximize"):
            raise ValueError("maximize = True: ESAM minimizes the loss; negate it and leave maximize out")
        for param in group["params"]:
            if param.is_complex():
                raise ValueError(
                    f"a parameter of shape {list(param.shape)} is {param.dtype}: ESAM takes real parameters; "
                    "torch.view_as_real gives such a one"
                )


def _check_storage(params: Sequence[Tensor]) -> None:
    """Refuse parameters that share elements: the backup of one would hold the perturbed elements of the other."""
    spans = []
    for param in map(local_shard, params):
        if param.numel() > 0 and param.device.type != "meta" and is_dense(param):
            spans.append((param.data_ptr(), param.data_ptr() + param.numel() * param.element_size(), list(param.shape)))
    spans.sort(key=lambda span: span[:2])
    for (_, end, shape), (start, _, other) in itertools.pairwise(spans):
        if start < end:
            raise ValueError(
                f"parameters of shapes {shape} and {other} share memory: to tie weights, use one Parameter in both "
                "places"
            )


def _check_not_empty(params: Any) -> None:
    if isinstance(params, list) and not params:
        raise ValueError(
            "got an empty parameter list: give the parameters that are to be trained, such as model.parameters(), "
            "which can be gone through only once"
        )


def _check_base(base: object, options: dict[str, Any]) -> None:
    kind = base if isinstance(base, type) else type(base)
    if not issubclass(kind, torch.optim.Optimizer):
        raise TypeError(f"base is {base!r}: give an optimizer's class, such as torch.optim.SGD, or an optimizer")
    closure = inspect.signature(kind.step).parameters.get("closure")
    if issubclass(kind, ESAM) or (closure is not None and closure.default is inspect.Parameter.empty):
        raise ValueError(f"{kind.__name__} evaluates a closure in its own step, so ESAM cannot be built on it")
    taken = sorted(options.keys() & inspect.signature(kind).parameters.keys())
    if isinstance(base, type) and taken:
        raise ValueError(
            f"{kind.__name__} has an option {taken[0]!r} of its own: make it first and give the optimizer as base, "
            f"ESAM(None, {kind.__name__}(params, {taken[0]}=...), {taken[0]}=...)"
        )


def _check_same_params(params: Iterable[Any] | None, base: torch.optim.Optimizer) -> None:
    if params is None:
        return
    given = list(params)
    if given and isinstance(given[0], dict):
        given = _params(given)
    given = [item[1] if isinstance(item, tuple) else item for item in given]  # named parameters
    if {id(param) for param in given} != {id(param) for param in _params(base.param_groups)}:
        raise ValueError("params are not the base optimizer's: give params=None, or the same ones")


def _check_closures(closure: Closure | Sequence[Closure]) -> list[Closure]:
    closures: list[Any] = list(closure) if isinstance(closure, Sequence) else [closure]
    if not closures:
        raise ValueError("got an empty list of closures: give one for each micro-batch")
    for candidate in closures:
        if not callable(candidate):
            raise TypeError(f"closure is {candidate!r}: give a function closure(index), such as batch_closure makes")
        if _takes_no_index(candidate):
            raise TypeError(
                "the closure takes no index: define closure(index) to return one loss for each of the batch's rows in "
                "index (None: all of them), or use batch_closure"
            )
    return closures


def _takes_no_index(closure: Any) -> bool:
    try:
        inspect.signature(closure).bind(None)
    except TypeError:
        return True
    except ValueError:  # a built-in without a signature: its call will tell
        pass
    return False
