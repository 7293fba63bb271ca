"""ESAM as a ``torch.optim.Optimizer``: parameter groups, state, and the two halves of a step."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial, wraps
from operator import attrgetter
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from . import options, sharpness
from .base import check_ascent, check_params, check_storage, keep_contents, make_base, of_base, params_of, storage_of
from .bases import each_of
from .closure import BatchClosure, Closure, modules_behind
from .eager import eager
from .last_step import LastStep
from .model_state import Findings, FoundModels, ModelState
from .options import OPTIONS, STEP, STORED
from .ordinary import OrdinaryClosure
from .passes.ascend import Ascent, check_gradient
from .passes.draw import drawn
from .passes.ordinary import check_ordinary
from .passes.perturb import Perturbation, perturb
from .passes.sources import copy_gradients, is_lost, keep_gradients, stateless_base
from .rollback import Rollback
from .schedule import is_sharp
from .sharding import check_same_on_ranks, is_sharded
from .step import Step, Weight
from .trainers import check_closure_caller, check_plain_caller, computation_in
from .warn import called_by_scaler, warn


def _registers_for_owner(name: str) -> Any:
    """The base optimizer's method of that name, whose hooks get the ESAM that they were registered on."""

    @wraps(getattr(torch.optim.Optimizer, name))
    def register(self: "ESAM", hook: Callable[..., Any], *args: Any, **kwargs: Any) -> RemovableHandle:
        return getattr(self.base, name)(partial(_call_for_owner, self, hook), *args, **kwargs)

    return register


def _call_for_owner(owner: "ESAM", hook: Callable[..., Any], base: torch.optim.Optimizer, *args: Any) -> Any:
    """Call a hook with the ESAM in place of its base, also among the arguments of a step, which it may replace."""
    result = hook(owner, *(_exchanged(arg, base, owner) for arg in args))
    return tuple(_exchanged(item, owner, base) for item in result) if isinstance(result, tuple) else result


def _exchanged(value: Any, one: Any, other: Any) -> Any:
    return tuple(other if item is one else item for item in value) if isinstance(value, tuple) else value


@dataclass
class _Progress:
    """How far a step has come. An object of its own, since Lightning wraps optimizers into subclasses of theirs.

    Methods then run on the wrapper, which reads its attributes from the optimizer but keeps those that it sets.
    """

    phase: str = ""  # what is under way, for error messages
    perturbation: Perturbation | None = None  # between first_step() and second_step()
    has_gradient: bool = False  # between backward() and step()
    restored: bool = False  # between restore() and step()
    findings: Findings = field(default_factory=Findings)  # of the steps before
    storage: list[int] = field(default_factory=list)  # where the parameters lay when they were checked last
    scaler_states: Any = None  # of the grad scaler of the last backward(), which makes new ones in its update()
    warned: set[str] = field(default_factory=set)
    ordinary: OrdinaryClosure | None = None  # whose calls are under way
    models: FoundModels = field(default_factory=FoundModels)  # of ordinary closures
    last: LastStep | None = None
    zeroed: list[int | None] | None = None  # versions of gradients that zero_grad() has set to zeros
    state: ModelState | None = None  # of the step before, which serves as long as models and parameters are the same

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "state": None}  # a copy has models of its own


class ESAM(torch.optim.Optimizer):
    """Efficient sharpness-aware minimization around any PyTorch optimizer.

    Source: Du et al., "Efficient Sharpness-aware Minimization for Improved Training of Neural Networks", ICLR 2022,
    arXiv 2110.03141. With ``beta = gamma = 1`` it is SAM (arXiv 2010.01412), with ``adaptive`` as well ASAM (arXiv
    2102.11600), and with ``rho = 0`` the base optimizer:

        optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.05, beta=0.6, gamma=0.5)
        for inputs, targets in loader:
            loss = optimizer.backward(batch_closure(model, loss_fn, inputs, targets))  # loss_fn: one loss per sample
            optimizer.step()

    ``param_groups``, ``state``, ``defaults`` and the hooks are the base optimizer's own, so schedulers, checkpoints and
    trainers act on one truth. ESAM's settings stand in the parameter groups under the names of the arguments (with
    ``esam_`` before a name that the base optimizer uses itself), and may be changed there between steps; the number of
    steps taken, from which masks are drawn, stands there as ``esam_step``.

    Args:
        params: parameters or parameter groups, as for any optimizer; groups may have options of their own that are
            said to be per parameter group. None, or the same parameters, if ``base`` is an optimizer already.
        base: class of the base optimizer, made with ``base_options``; or a ready optimizer; or a list of ready ones,
            each with parameters of its own, such as ``[torch.optim.Muon(matrices), torch.optim.AdamW(others)]``. They
            are perturbed together, with one norm, and groups, state and checkpoints are those of all, one after
            another; a new group goes to the last.
    {options}
        model: the model, if closures are written by hand: its buffers are kept from the extra passes. Several networks
            are given as one ``nn.ModuleList``.
        base_options: options of the base optimizer's class.

    Raises:
        ValueError: if a value is out of its range, a name of ``base_options`` is one of ESAM's, parameters are complex
            or not the base optimizer's, or the base optimizer maximizes or needs a closure for its own step.
        TypeError: if ``base`` is no optimizer, or ``model`` no module.
    """

    @eager
    def __init__(
        self,
        params: Any,
        base: type[torch.optim.Optimizer]
        | torch.optim.Optimizer
        | list[torch.optim.Optimizer]
        | tuple[torch.optim.Optimizer, ...],
        *,
        model: nn.Module | None = None,
        **base_options: Any,
    ) -> None:
        if not isinstance(model, nn.Module | None):
            raise TypeError(f"model is {model!r}: give a module, and several networks as one nn.ModuleList")
        # Optimizer.__init__ is not called: it would make groups, state and hooks beside the base optimizer's.
        given = {name: base_options.pop(name) for name in OPTIONS if name in base_options}
        made, keys = make_base(params, base, base_options)
        values = options.make(given, all("betas" in each.defaults for each in each_of(made)))
        settings = {keys[name]: value for name, value in values.items()}
        # What a group says of itself holds, unless another ESAM said it, whose checkpoint the base has loaded.
        groups = [settings if STEP in group else {**settings, **group} for group in made.param_groups]
        groups = [{key: group[key] for key in settings} for group in groups]
        shared, own = options.read(groups, keys)
        check_ascent(made, shared.ascent, [group for group, one in zip(made.param_groups, own) if one.rho > 0])
        check_params(made.param_groups)
        check_storage(params_of(made.param_groups))
        self.base: torch.optim.Optimizer = made
        self.model = model
        self._keys = keys
        self._progress = _Progress()
        for each in each_of(made):
            each.defaults.update(settings)
        for group, own_settings in zip(made.param_groups, groups):
            group.update(own_settings)

    # One truth: the base optimizer's, whose hooks are called with this optimizer.

    register_step_pre_hook = _registers_for_owner("register_step_pre_hook")
    register_step_post_hook = _registers_for_owner("register_step_post_hook")
    register_state_dict_pre_hook = _registers_for_owner("register_state_dict_pre_hook")
    register_state_dict_post_hook = _registers_for_owner("register_state_dict_post_hook")
    register_load_state_dict_pre_hook = _registers_for_owner("register_load_state_dict_pre_hook")
    register_load_state_dict_post_hook = _registers_for_owner("register_load_state_dict_post_hook")

    param_groups = of_base("param_groups")
    state = of_base("state")
    defaults = of_base("defaults")
    # What GradScaler.step tells a fused optimizer, which unscales its gradients itself.
    grad_scale = of_base("grad_scale")
    found_inf = of_base("found_inf")

    def __getattr__(self, name: str) -> Any:
        if name == "base" or name.startswith("__"):  # not there yet, while a copy is being made
            raise AttributeError(name)
        return getattr(self.base, name)

    def __getstate__(self) -> dict[str, Any]:
        self._require_idle("copying or pickling the optimizer")
        names = ("base", "model", "_keys", "_progress")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __repr__(self) -> str:
        return f"ESAM({self.base!r})"

    @eager
    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state dict, with ESAM's settings and step count in its parameter groups.

        Raises:
            RuntimeError: during ``backward``, and between ``first_step`` and ``second_step``.
        """
        self._require_idle("state_dict()")
        options.make_plain(self.param_groups, self._keys)
        return self.base.state_dict()

    @eager
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of ESAM's or of the base optimizer's; settings that it lacks stay as they are.

        Where it is refused, by ESAM or by the base optimizer, groups and state stay as they were.

        Raises:
            ValueError: if a setting in it is out of its range, or may not differ between groups.
            RuntimeError: during ``backward``, and between ``first_step`` and ``second_step``.
        """
        self._require_idle("load_state_dict()")
        before = [{key: group[key] for key in self._keys.values()} for group in self.param_groups]
        # Before the base optimizer sees it, since not all of them change groups and state at their very end. What has
        # another layout, as of an optimizer around another one, is the base's to read.
        found = state_dict.get("param_groups", before)
        if len(found) == len(before):  # the base refuses any other number
            options.read([{**own, **group} for own, group in zip(before, found)], self._keys)
        put_back = keep_contents(self.base)
        try:
            self.base.load_state_dict(state_dict)
            for group, settings in zip(self.param_groups, before):
                for key, value in settings.items():
                    group.setdefault(key, value)
            options.read(self.param_groups, self._keys)
        except BaseException:
            put_back()
            raise
        options.make_plain(self.param_groups, self._keys)
        self._set_step_count(self._number)
        self._progress.has_gradient = False
        climbs = any(group[self._keys["rho"]] > 0 for group in self.param_groups)
        said = any(group.get(self._keys["ascent"]) == "previous" for group in found)
        if said and climbs and is_lost(self.state):
            self._warn_once(
                "lost direction",
                "the loaded state has ascent = 'previous' and no gradient of the last step, so the next step is plain. "
                "If ascent was changed in training, and this is a checkpoint of torch.distributed.checkpoint, set "
                "group['ascent'] = 'previous' in all groups before it is loaded",
            )

    @eager
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; it may have its own ``rho`` and ``adaptive``.

        Raises:
            ValueError: if a setting is out of its range or may not differ between groups, or parameters are complex.
            RuntimeError: during ``backward``, and between ``first_step`` and ``second_step``.
        """
        self._require_idle("add_param_group()")
        shared = {key: self.param_groups[0][key] for name, key in self._keys.items() if not STORED[name].per_group}
        put_back = keep_contents(self.base)
        try:
            self.base.add_param_group({**shared, **param_group})
            options.read(self.param_groups, self._keys)
            check_params(self.param_groups)
            check_storage(params_of(self.param_groups))
        except BaseException:
            put_back()
            raise

    @eager
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all parameters, as the base optimizer does.

        Raises:
            RuntimeError: during ``backward``, which has done it, and would lose those of earlier micro-batches.
        """
        if self._progress.phase and self._progress.ordinary is None:
            raise RuntimeError(
                f"zero_grad() was called during {self._progress.phase}, which does it itself: a closure returns "
                "losses, and has no backward() or zero_grad() of its own"
            )
        self.base.zero_grad(set_to_none)
        self._progress.has_gradient = self._progress.restored = False
        params = [] if set_to_none else params_of(self.param_groups)
        self._progress.zeroed = [None if param.grad is None else param.grad._version for param in params]
        if self._progress.ordinary is not None and set_to_none:
            self._progress.ordinary.forget()

    # A step: a sharpness-aware backward, and an ordinary step.

    @eager
    def backward(self, closure: Closure | Sequence[Closure], grad_scaler: torch.amp.GradScaler | None = None) -> Tensor:
        """Put the sharpness-aware gradient into ``.grad``, in place of what is there; the weights stay as they are.

        Whatever is raised inside, by the closure or by Ctrl-C, leaves the weights, the buffers and the random state
        from before the call, bit for bit, and no gradients.

        Args:
            closure: ``closure(index)`` returns the losses of the batch's rows in ``index`` (int64, shape [k]; None:
                all of them) with their graph: one per sample, shape [b], or (losses, weights) of shape [b] each, of
                which weighted means are taken. ``batch_closure`` makes one, which knows how many rows it has; where
                rows are drawn before a pass has told that, one written by hand costs a forward more. A list of
                closures is a list of micro-batches, whose gradients add up to that of one batch. With ``gamma=1`` and
                ``ascent_share=1`` one loss will do, a 0-dimensional tensor, or a mapping or an object that has it as
                ``loss``, or a mapping of such tensors alone, which are added; micro-batches then weigh alike, or by
                what comes with it as (loss, weight).
            grad_scaler: scales the losses; ``unscale_``, ``step`` and ``update`` are called on it as always.

        Returns:
            The mean loss of the first forward that was run, 0-dimensional, detached, on the losses' device. By default
            and in a plain step it is that of the whole batch at the weights. With an ``ascent_share`` it is that of
            these rows at the weights, and with ``ascent`` "momentum" or "previous" that of the rows of the last pass at
            the perturbed weights, unless a selection needs the losses of all rows at the weights, which are then the
            first. With a ``steering_dtype`` it is of low precision if other passes follow. It is this rank's.

        Raises:
            TypeError: if a closure cannot be called with an index, or returns no tensor; or ``grad_scaler`` is none.
            ValueError: if a closure returns anything but one loss per sample, a setting is out of its range, or a
                parameter to be perturbed has a sparse gradient.
            RuntimeError: during another ``backward``, between ``first_step`` and ``second_step``, and where gradients
                are disabled.
        """
        self._require_idle("backward()")
        _check_scaler(grad_scaler)
        if not torch.is_grad_enabled():
            raise RuntimeError("backward() was called under torch.no_grad() or inference_mode(): call it outside")
        closures = _check_closures(closure)
        self._warn_of_lost_gradient(grad_scaler)
        rollback = Rollback()
        return self._run(self._make_step(rollback, closures, grad_scaler), "backward()")

    @eager
    def step(self, closure: Any = None) -> Any:
        """Take the base optimizer's step with the gradients in ``.grad``; with a closure, ``backward(closure)`` first.

        A closure may also be that of ``torch.optim``, which takes no index: it clears the gradients, computes the loss,
        calls ``loss.backward()`` and returns the loss. With ``gamma=1`` it makes a sharpness-aware step, too: its first
        call gives the direction, from the gradient of all weights, and its second the gradient at the perturbed
        weights; where ``ascent`` is not "gradient", and in plain steps, it is called once. What it must not disturb is
        looked after as in ``backward``, in the given ``model`` or else in all modules that the parameters are in, and
        in those that the closure names.

        Signals wait for the base optimizer, which would otherwise leave some weights updated and some not. An exception
        from another thread does not wait: where one may come, keep a checkpoint.

        Trainers such as Lightning give a closure without an index, which runs hooks, also after ``backward`` or
        ``restore``: then it is called, and no more.

        Returns:
            What ``backward`` returns, or what the first call of a closure without an index does, or None.

        Raises:
            RuntimeError: if a closure without an index made no gradient, a ``GradScaler`` calls this with a closure, or
                a trainer has run a part of the step before; and where ``backward`` raises it.
            ValueError: if a closure without an index is given and gamma or ascent_share is not 1; and where
                ``backward`` raises it.
        """
        self._require_idle("step()")
        if closure is not None and called_by_scaler():
            raise RuntimeError(
                "GradScaler.step() was given a closure, whose gradients it would neither check nor unscale: call "
                "optimizer.backward(closure, grad_scaler) with a closure(index), then grad_scaler.step(optimizer)"
            )
        loss = None
        if callable(closure) and _takes_no_index(closure):
            if self._progress.has_gradient or self._progress.restored:
                closure()
            else:
                check_closure_caller()
                loss = self._run_ordinary(closure, in_step=True)
        elif closure is not None:
            loss = self.backward(closure)
        elif not (self._progress.has_gradient or self._progress.restored):
            check_plain_caller()
            self._warn_of_plain_step()

        def work() -> None:  # nothing to undo, but signals come before the base optimizer's step, or after it
            copies = self._gradients_to_keep()
            self.base.step()
            keep_gradients(self.state, copies)
            self._find_stateless_base()
            self._progress.has_gradient = self._progress.restored = False

        Rollback().run(work)
        return loss

    def _run_ordinary(self, closure: Callable[[], Any], in_step: bool = False) -> Any:
        """The passes of an ordinary closure; what its first call returns.

        Within ``step()`` its gradient is used at once: where that fails, the next ``step()`` begins anew.
        """
        rollback = Rollback()
        models: Sequence[nn.Module] = ()
        if self.model is None:
            models = [*self._progress.models.of(params_of(self.param_groups)), *modules_behind(closure)]
        params = params_of(self.param_groups)
        versions = self._progress.zeroed
        zeroed = bool(versions) and versions == [None if p.grad is None else p.grad._version for p in params]
        ordinary = OrdinaryClosure(closure, computation_in(closure), params, zeroed)
        step = self._make_step(rollback, models=models, ordinary=ordinary)
        check_ordinary(step)
        return self._run(step, "step()", stays=not in_step)

    def _run(self, step: Step, phase: str, stays: bool = True) -> Any:
        """Leave the gradient of the step in ``.grad``, or all as it was before; the loss of the first forward."""
        params = params_of([group for group in self.param_groups if group[self._keys["rho"]] > 0])
        trained = list(map(attrgetter("requires_grad"), params))

        def work() -> Any:
            step.rollback.undo_by(partial(self._reset, step.number))
            self._progress.ordinary = step.ordinary
            self._progress.phase = phase
            if step.ordinary is None:
                self.base.zero_grad()
            last = sharpness.backward(step)
            # Pass 1 of an ordinary closure finds them.
            found = step.ordinary is not None and step.settings.ascent == "gradient"
            if is_sharp(step.settings, step.number) and not found:
                self._warn_of_late_freezing(params, trained)
            loss = step.ordinary.returned[0] if step.ordinary else last.first_loss
            self._set_step_count(step.number + 1)
            self._progress.phase = ""
            self._progress.ordinary = None
            self._progress.last = last
            self._progress.has_gradient = stays
            return loss

        return step.rollback.run(work)

    @property
    def last_step(self) -> LastStep | None:
        """What the last ``backward()``, ``step(closure)`` or ``first_step()`` did; None before the first.

        It has ``sharp``, the direction's ``norm``, ``loss``, ``perturbed_loss``, and how many ``rows`` and ``weights``
        were taken. To hold it costs nothing; to read one of its tensors waits for the device.
        """
        return self._progress.last

    # The two halves of a step as in davda54/sam, for code that is written so.

    @eager
    def first_step(self, zero_grad: bool = False) -> None:
        """Perturb the weights by the gradients in ``.grad``, of which beta keeps a part.

        This counts as a step, as ``backward`` does, whatever follows: the next one draws anew.

        Raises:
            ValueError: if gamma, interval, start, ascent, ascent_share or steering_dtype is set, none of which can
                apply here.
            RuntimeError: if there are no gradients, or at the wrong time.
        """
        self._require_idle("first_step()")
        rollback = Rollback()
        step = self._make_step(rollback)
        needed_values = {
            "ascent": "gradient", "ascent_share": 1, "gamma": 1, "interval": 1, "start": 0, "steering_dtype": None
        }  # fmt: skip
        for name, needed in needed_values.items():
            value = getattr(step.settings, name)
            if value != needed:
                raise ValueError(
                    f"{name} = {value!r} cannot apply to first_step() and second_step(), whose passes the caller runs: "
                    f"set {name}={needed!r}, or use backward()"
                )
        if all(param.grad is None for param in params_of(self.param_groups)):
            raise RuntimeError("first_step() found no gradients: call loss.backward() before it")

        def work() -> None:
            rollback.undo_by(lambda: setattr(self._progress, "perturbation", None))
            rollback.undo_by(partial(self._set_step_count, step.number))
            weights = drawn(step)
            grads = [weight.param.grad for weight in weights]
            for weight, grad in zip(weights, grads):
                check_gradient(weight, grad)
            self._progress.perturbation = moved = perturb(step, Ascent(weights, grads))
            step.model_state.forget_weight_copies()
            self._set_step_count(step.number + 1)
            if zero_grad:
                self.base.zero_grad()
            self._progress.last = LastStep(True, moved.norm, moved.weights)

        rollback.run(work)

    @eager
    def second_step(self, zero_grad: bool = False) -> None:
        """Put the weights back and take the base optimizer's step with the gradients in ``.grad``.

        Raises:
            RuntimeError: if ``first_step`` was not called before.
        """
        self.restore()
        self.step()
        if zero_grad:
            self.zero_grad()

    @eager
    def restore(self) -> None:
        """Put the weights back after ``first_step`` without a step, bit for bit.

        ``restore()`` and ``step()`` are ``second_step()`` in two, between which gradients can be unscaled. Without a
        step the next ``first_step`` draws anew all the same.

        Raises:
            RuntimeError: if ``first_step`` was not called before.
        """
        if self._progress.perturbation is None:
            raise RuntimeError("there is nothing to restore: call first_step() before second_step() or restore()")
        perturbation = self._progress.perturbation

        def work() -> None:
            perturbation.restore()
            self._model_state().forget_weight_copies()
            self._progress.perturbation = None
            self._progress.restored = True

        Rollback().run(work)

    # What stands in the parameter groups.

    # Not _step_count, which torch's schedulers and others set on optimizers.
    @property
    def _number(self) -> int:
        return self.param_groups[0][self._keys[STEP]]

    def _set_step_count(self, count: int) -> None:
        # Also in the defaults, from which the base's own add_param_group() fills a group up.
        for settings in (*self.param_groups, *(each.defaults for each in each_of(self.base))):
            settings[self._keys[STEP]] = count

    def _reset(self, step_count: int) -> None:
        self._progress.phase = ""
        self._progress.ordinary = None
        self._progress.has_gradient = False
        self._set_step_count(step_count)
        self.base.zero_grad()

    def _make_step(
        self,
        rollback: Rollback,
        closures: Sequence[Closure] = (),
        grad_scaler: torch.amp.GradScaler | None = None,
        models: Sequence[nn.Module | None] = (),
        ordinary: OrdinaryClosure | None = None,
    ) -> Step:
        """The step that comes next, with the settings as they stand in the groups now, checked."""
        settings, own = options.read(self.param_groups, self._keys)
        options.make_plain(self.param_groups, self._keys)
        check_params(self.param_groups)
        params = params_of(self.param_groups)
        storage = storage_of(params)
        if storage != self._progress.storage:  # somebody gave a parameter other memory
            check_storage(params)
            self._progress.storage = storage
            self._progress.findings.written = None  # places in another list
        sharp = [group for group, one in zip(self.param_groups, own) if one.rho > 0]
        check_ascent(self.base, settings.ascent, sharp)
        # What is frozen now, an ordinary closure may train: pass 1 will tell.
        thaws = ordinary is not None and (settings.ascent, settings.gamma, settings.ascent_share) == ("gradient", 1, 1)
        weights, tensor_id = [], 0
        for group, group_settings in zip(self.param_groups, own):
            for param in group["params"]:
                # A lazy layer's weights are perturbed from the step on that follows their first forward.
                if group_settings.rho > 0 and (param.requires_grad or thaws) and not is_lazy(param):
                    weights.append(Weight(param, tensor_id, group_settings))
                tensor_id += 1
        model_state, findings = self._model_state(closures, models), self._progress.findings
        if model_state.shards and not findings.agreed:
            values = {name: [group[key] for group in self.param_groups] for name, key in self._keys.items()}
            values = {name: of_groups if STORED[name].per_group else of_groups[0] for name, of_groups in values.items()}
            check_same_on_ranks(values, [param for param in params_of(self.param_groups) if is_sharded(param)])
            findings.agreed = True
        return Step(
            self._number, settings, weights, closures, model_state, rollback, self.state, findings, grad_scaler,
            ordinary,
        )  # fmt: skip

    def _find_stateless_base(self) -> None:
        """After the base's step: whether it keeps what the next steps are to climb along."""
        found = None
        if self.param_groups[0][self._keys["ascent"]] == "momentum":
            found = stateless_base(each_of(self.base), self._keys["rho"])
        self._progress.findings.stateless_base = found

    def _gradients_to_keep(self) -> dict[Tensor, Tensor]:
        """Those that the next steps may climb along, copied; none unless ``ascent`` is "previous"."""
        if self.param_groups[0][self._keys["ascent"]] != "previous":
            return {}
        groups = [group for group in self.param_groups if group[self._keys["rho"]] > 0]
        return copy_gradients(params_of(groups), self.state)

    def _model_state(self, closures: Sequence[Closure] = (), models: Sequence[nn.Module | None] = ()) -> ModelState:
        # A closure written by hand may call anything its model.
        behind = [getattr(one, name, None) for one in closures for name in ("model", "loss_fn")]
        found = [module for one in (self.model, *models, *behind) for module in modules_behind(one)]
        params, state = params_of(self.param_groups), self._progress.state
        if state is None or not state.serves(found, params):
            state = ModelState(found, params)
            if not models:  # those that were found are not to be kept alive
                self._progress.state = state
        return state

    def _warn_of_plain_step(self) -> None:
        # What does not move, as the step by which torch.distributed.checkpoint makes the state, means nothing else.
        groups = [group for group in self.param_groups if group[self._keys["rho"]] > 0 and group.get("lr", 1) != 0]
        sharp = params_of(groups)
        if any(param.grad is not None for param in sharp):
            self._warn_once(
                "plain step",
                "step() takes a plain step of the base optimizer, since no backward() of ESAM came before it: call "
                "optimizer.backward(batch_closure(model, loss_fn, inputs, targets)) in place of loss.backward(), or "
                "set rho=0 to mean it",
            )

    def _warn_of_late_freezing(self, params: list[Tensor], trained: list[bool]) -> None:
        now = list(map(attrgetter("requires_grad"), params))
        if now != trained and any(one and not before for one, before in zip(now, trained)):
            self._warn_once(
                "late freezing",
                "the closure sets requires_grad of parameters that were frozen when the step began, so they are "
                "trained and were not perturbed: set it before the step",
            )

    def _warn_of_lost_gradient(self, grad_scaler: torch.amp.GradScaler | None) -> None:
        states = getattr(grad_scaler, "_per_optimizer_states", None)
        # A scaler that found an overflow has left step() out, and has been updated since.
        stepped = states is not None and states is not self._progress.scaler_states
        left = self._progress.has_gradient and not stepped
        if left and any(param.grad is not None for param in params_of(self.param_groups)):
            self._warn_once(
                "lost gradient",
                "backward() replaces the gradient of the backward() before it, with which no step was taken: to "
                "accumulate micro-batches give it all of their closures in one list, or call zero_grad() to drop it",
            )
        self._progress.scaler_states = states

    def _warn_once(self, what: str, message: str) -> None:
        if what not in self._progress.warned:
            self._progress.warned.add(what)
            warn(message)

    def _require_idle(self, action: str) -> None:
        if self._progress.phase:
            raise RuntimeError(f"{action} was called during {self._progress.phase}: call it after it has returned")
        if self._progress.perturbation is not None:
            raise RuntimeError(
                f"{action} was called between first_step() and second_step(), when the weights are perturbed: "
                "call second_step() or restore() first"
            )


ESAM.__doc__ = (ESAM.__doc__ or "").replace("    {options}", options.documentation("        "))
# Of the function in the decorator, where who unwraps it finds the options too, as the docs' builder does.
inspect.unwrap(ESAM.__init__).__signature__ = options.signature(inspect.signature(ESAM.__init__))


def _check_closures(closure: Closure | Sequence[Closure]) -> list[Closure]:
    closures: list[Any] = list(closure) if isinstance(closure, Sequence) else [closure]
    if not closures:
        raise ValueError("got an empty list of closures: give one for each micro-batch")
    for candidate in closures:
        if not callable(candidate):
            raise TypeError(f"closure is {candidate!r}: give a function closure(index), such as batch_closure makes")
        if not isinstance(candidate, BatchClosure) and _takes_no_index(candidate):
            raise TypeError(
                "the closure takes no index: define closure(index) to return one loss for each of the batch's rows in "
                "index (None: all of them), or use batch_closure; one that runs backward() itself is for step(closure)"
            )
    return closures


def _check_scaler(scaler: Any) -> None:
    if scaler is not None and not (callable(getattr(scaler, "scale", None)) and hasattr(scaler, "is_enabled")):
        raise TypeError(f"grad_scaler is {scaler!r}: give the GradScaler that is stepped, or None")


def _takes_no_index(closure: Any, seen: tuple[Any, ...] = ()) -> bool:
    try:
        bound = inspect.signature(closure).bind(None)
    except TypeError:
        return True
    except ValueError:  # a built-in without a signature: its call will tell
        return False
    index = bound.signature.parameters[next(iter(bound.arguments))]
    if index.kind is inspect.Parameter.VAR_POSITIONAL:  # a wrapper, such as a decorator's: what it wraps may tell
        cells = [cell.cell_contents for cell in getattr(closure, "__closure__", None) or () if cell != CellType()]
        inner = [one for one in cells if isinstance(one, FunctionType | MethodType | partial)]
        inner = [one for one in inner if one is not closure and one not in seen]
        return len(inner) == 1 and _takes_no_index(inner[0], (*seen, closure))
    # A default that is something binds a variable of a loop, as in lambda inputs=inputs: ...
    return index.name != "index" and index.default is not inspect.Parameter.empty and index.default is not None
