"""What the extra forward passes of a step must not disturb: buffers, random state, gradient sync, autocast's cache."""

import gc
import random
import sys
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter, is_not
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from .ops.memory import has_address, read_only, span
from .rollback import Rollback
from .sharding import ShardedModules
from .warn import warn

P = ParamSpec("P")
R = TypeVar("R")
_FP4 = getattr(torch, "float4_e2m1fn_x2", None)  # which nothing compares
_WHOLE = frozenset((torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64))


@dataclass
class Findings:
    """What a step finds out for those after it."""

    # The ids of the weights that graphs without reentrant checkpoints did not reach; None before the first search.
    unreached: set[int] | None = None
    # Whether such a graph has functions written in Python, which can hide weights; whether it reached any weight; and
    # whether it has been said that some are hidden.
    has_own_functions: bool = False
    reached: bool = False
    hidden_said: bool = False
    # Whether an ordinary closure has made a gradient.
    closure_works: bool = False
    # The places among all parameters of those that forwards write; None before the first forward.
    written: list[int] | None = None
    # Whether the ranks of a sharded model have been found to have the same settings.
    agreed: bool = False
    # Whether forwards ask for gradients themselves, as those of physics-informed networks do.
    forward_needs_graph: bool = False
    # Whether it has been looked for state that the passes of a step share, and what was found.
    watched: bool = False
    shared: set[str] = field(default_factory=set)
    # Whether it has been looked for iterators in an ordinary closure.
    iterators: bool = False
    # The base that keeps nothing of its parameters, as its last step showed; None if all keep something.
    stateless_base: str | None = None


class WrittenWeights:
    """Keeps the weights that forwards write, such as those of ``nn.Embedding(max_norm=...)``.

    A step that fails puts them back, and one of several passes leaves them as the first one did. In the first step all
    are kept until its first pass has shown which are written; one that is first written in a later step is kept from
    the next step on. Parameters of FSDP2 are not kept: their forwards write gathered copies of them.
    """

    def __init__(self, params: Sequence[Tensor], rollback: Rollback, findings: Findings) -> None:
        self._findings = findings
        self._all = params
        self._lazy = any(map(is_lazy, {type(param): param for param in params}.values()))
        self._inference = not self._lazy and any(map(Tensor.is_inference, params))
        places = range(len(params)) if findings.written is None else findings.written
        self._params = {i: params[i] for i in places if not is_lazy(params[i])}
        if findings.written is None:
            untouchable = read_only(list(self._params.values()))
            self._params = {i: one for i, one in self._params.items() if _is_usual(one) and id(one) not in untouchable}
        self._before = self._copies()
        if self._params:
            rollback.undo_by(self.put_back)
        self._count_from(self._before)

    def put_back(self) -> None:
        """Undo what forwards have written."""
        self._write(self._before)

    def first_pass_begins(self) -> None:
        """Writes are counted from now on, when the weights have been perturbed before any pass."""
        self._count_from(self._copies() if self._findings.written is None else {})

    def _count_from(self, values: dict[int, Tensor]) -> None:
        self._versions, self._values = self._versions_now(), values

    def _versions_now(self) -> list[int]:
        if self._lazy or self._inference:  # which have no version
            return [-1 if is_lazy(param) or param.is_inference() else param._version for param in self._all]
        return [param._version for param in self._all]  # of every weight in every step

    def first_pass_has_run(self) -> None:
        """Find out which weights the first pass has written, beside those that are known.

        Writes through ``.data`` move no version: for them the first step compares values, but not on a GPU, where that
        would synchronize.
        """
        known = self._findings.written
        versions = zip(self._versions, self._versions_now())
        written = {i for i, (before, now) in enumerate(versions) if now != before and before >= 0}
        if known is None:
            written.update(i for i, value in self._values.items() if value.is_cpu and not self._holds(i, value))
        self._values = {}
        if known is None or not written.issubset(known):
            self._findings.written = sorted(written.union(known or ()))
            self._params = {i: self._all[i] for i in self._findings.written}
            self._before = {i: value for i, value in self._before.items() if i in self._params}

    def keep_first_pass(self) -> Callable[[], None]:
        """Keep what the first pass has left; the function that is returned undoes what later ones have written."""
        left = self._copies()
        return lambda: self._write(left)

    def _copies(self) -> dict[int, Tensor]:
        return dict(zip(self._params, copy_all([param.data for param in self._params.values()])))

    def _write(self, values: dict[int, Tensor]) -> None:
        copy_into([self._all[i].data for i in values], list(values.values()))

    def _holds(self, place: int, value: Tensor) -> bool:
        return torch.equal(self._all[place].data, value)


class Buffers:
    """The buffers of modules, and memory for copies of them that is used again in every step.

    Values are kept, since batch norm's updates do not show in version counters. Buffers that a module replaces by other
    tensors become the old tensors again, and those that it adds are gone. With these go the module's other attributes,
    which say what the buffers are, such as how long a table is.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._entries = [_own_buffers(module) for module in modules]
        for entries in self._entries:
            for name, buffer in entries.items():
                if buffer is not None and _is_inference(buffer):
                    entries[name] = buffer.clone()  # which can be written
        self._found = self._all()
        self._entries_before = [dict(entries) for entries in self._entries]
        self._attributes = [_own_attributes(module) for module in modules]
        self._lazy = [buffer for buffer in self._found if buffer is not None and is_lazy(buffer)]
        buffers = [buffer for buffer in self._found if buffer is not None and not is_lazy(buffer)]
        untouchable = read_only(buffers)
        buffers = [buffer for buffer in buffers if id(buffer) not in untouchable]
        # Nothing can write into a buffer whose elements share memory (an expanded constant): it needs no copy.
        self._plain = _by_dtype([buffer for buffer in buffers if _is_plain(buffer)])
        self._special = [buffer for buffer in buffers if not _is_plain(buffer) and _can_be_written(buffer)]
        self._shapes = [[buffer.shape for buffer in group] for group in self._plain]
        self._copies: list[list[list[Tensor]]] = []  # one for each time that a step keeps them
        self._used = 0

    def _all(self) -> list[Tensor | None]:
        return list(chain.from_iterable(map(dict.values, self._entries)))

    def _are_these(self) -> bool:
        found = self._all()
        return len(found) == len(self._found) and not any(map(is_not, found, self._found))

    def current(self) -> bool:
        """Whether the modules still have these buffers, of these shapes."""
        return (
            self._are_these()
            and [[buffer.shape for buffer in group] for group in self._plain] == self._shapes
            and all(map(is_lazy, self._lazy))
        )

    def _put_entries_back(self, attributes: Sequence[dict[str, Any] | None]) -> None:
        rows = zip(self._entries, self._entries_before, self._attributes, attributes)
        for entries, entries_before, own, own_before in rows:
            if _differ(entries, entries_before):
                if own is not None and own_before is not None:
                    _become(own, own_before)
                _become(entries, entries_before)

    def begin(self) -> None:
        """A step begins: the copies of the step before are no longer needed."""
        self._used = 0

    @torch.no_grad()
    def keep(self) -> Callable[[], None]:
        """Keep the values; the function that is returned puts buffers and values back."""
        if self._used == len(self._copies):
            self._copies.append([[torch.empty_like(buffer) for buffer in group] for group in self._plain])
        values = self._copies[self._used]
        self._used += 1
        for group, copies in zip(self._plain, values):
            torch._foreach_copy_(copies, group)
        special = [(buffer, buffer.clone()) for buffer in self._special]
        attributes = [None if own is None else dict(own) for own in self._attributes]

        @torch.no_grad()
        def put_back() -> None:
            if not self._are_these():
                self._put_entries_back(attributes)
            for group, copies, shapes in zip(self._plain, values, self._shapes):
                for buffer, shape in zip(group, shapes):
                    if buffer.shape != shape:  # as observers do
                        buffer.resize_(shape)
                torch._foreach_copy_(group, copies)
            for buffer, value in special:
                buffer.copy_(value)

        return put_back


class FoundModels:
    """The modules that parameters are in, for closures that do not say what they call."""

    def __init__(self) -> None:
        self._params: list[int] = []
        self._roots: list[weakref.ref[nn.Module]] = []  # not to keep a model alive, nor to be copied with an optimizer

    def __reduce__(self) -> Any:
        return FoundModels, ()

    def of(self, params: Sequence[Tensor]) -> list[nn.Module]:
        """The outermost of the modules alive that hold any of these parameters; looked for when they change."""
        ids = list(map(id, params))
        roots = [root() for root in self._roots]
        if ids != self._params or any(
            root is None for root in roots
        ):  # not None in roots, which asks a module's __eq__
            found = list(_roots(set(ids)))
            if not found and gc.get_freeze_count():
                warn(
                    "no module was found that these parameters belong to, as gc.freeze() hides objects: give the "
                    "model, ESAM(..., model=model), or its buffers are updated in every pass of a step"
                )
            self._params, self._roots = ids, list(map(weakref.ref, found))
            return found
        return [root for root in roots if root is not None]


def _own_attributes(module: nn.Module) -> dict[str, Any] | None:
    """The dictionary of a module's attributes, if what a forward changes there may be put back.

    Torch's own modules keep nothing there that says what their buffers are, its wrappers are looked after otherwise,
    and a lazy module that is made ready loses attributes for good.
    """
    others = type(module).__module__.startswith("torch.") or isinstance(module, LazyModuleMixin)
    return None if others else vars(module)


def _own_buffers(module: nn.Module) -> dict[str, Any]:
    """The dictionary that a module has its buffers in; one made anew if it has them elsewhere, as TorchScript's do."""
    entries = module._buffers
    return entries if isinstance(entries, dict) else dict(module.named_buffers(recurse=False))


def _roots(ids: Collection[int]) -> Iterator[nn.Module]:
    # Not isinstance(), which asks objects for their class: proxies and lazy imports answer with errors.
    modules = [found for found in gc.get_objects() if issubclass(type(found), nn.Module) and "_modules" in vars(found)]
    holders = [module for module in modules if any(id(param) in ids for param in _parameters(module))]
    inner = {id(child) for module in holders for child in module.modules() if child is not module}
    return (module for module in holders if id(module) not in inner)


def _parameters(module: nn.Module) -> list[Tensor]:
    try:
        return list(module.parameters())
    except Exception:  # a remote module refuses, and a class may mean something else by that name
        return []


class Start(NamedTuple):
    """What passes begin with: ``buffers`` and ``random_state`` put theirs back, as often as they are called."""

    buffers: Callable[[], None]
    random_state: Callable[[], None]
    written: WrittenWeights


class ModelState:
    """Looks after the models and devices that one step runs on."""

    def __init__(self, models: Iterable[nn.Module], params: Sequence[Tensor]) -> None:
        models = list(models)
        modules = {id(module): module for model in models for module in model.modules()}
        self._modules = list(modules.values())
        self._models = models
        self._children = self._children_now()
        self._buffers = Buffers(self._modules)
        # In TorchScript they are fixed.
        self._parameters = [one for module in self._modules if isinstance(one := module._parameters, dict)]
        self._replicas = [module for module in self._modules if isinstance(module, DistributedDataParallel)]
        self.shards = ShardedModules(self._modules, params)
        self.params = params
        trained = {id(param) for param in params}
        found = {id(param): param for module in self._modules for param in module._parameters.values()}
        self._others = [param for key, param in found.items() if param is not None and key not in trained]
        self._devices = _accelerators(params)

    def serves(self, models: Sequence[nn.Module], params: Sequence[Tensor]) -> bool:
        """Whether a new one, made of these, would be the same; to see that is quicker than to make it.

        Never with FSDP2, whose changes cannot be seen.
        """
        return (
            not self.shards
            and len(models) == len(self._models)
            and len(params) == len(self.params)
            and not any(map(is_not, models, self._models))
            and not any(map(is_not, params, self.params))
            and len(children := self._children_now()) == len(self._children)
            and not any(map(is_not, children, self._children))  # a module may say itself what it is equal to
            and self._devices == _accelerators(params)
        )

    def _children_now(self) -> list[nn.Module | None]:
        # In TorchScript they are in no dictionary.
        return list(chain.from_iterable(one.values() for one in map(attrgetter("_modules"), self._modules)))

    @property
    def trains_batch_norm(self) -> bool:
        """Whether a batch norm takes its statistics from the batch, which needs two rows."""
        return any(
            isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)
            for module in self._modules
        )

    def keep(self, rollback: Rollback, findings: Findings, several: bool) -> Start:
        """Keep all that passes must not disturb, and register it to be put back if the step fails.

        Args:
            rollback: the step's.
            findings: of the steps before.
            several: whether several passes follow, of which the first begin with rank 0's buffers, as a forward of
                ``DistributedDataParallel`` does.
        """
        rollback.undo_by(self.forget_weight_copies)
        rollback.undo_by(self.shards.abandon)
        self._buffers.begin()
        buffers, random_state = self.keep_buffers(), self.keep_random_state()
        rollback.undo_by(buffers)
        rollback.undo_by(random_state)
        if not self.shards:
            rollback.undo_by(keep_entries(self._parameters))
            rollback.undo_by(self._keep_bound())
        sending = [one for one in self._replicas if one._check_sync_bufs_pre_fwd()] if several else []
        for replica in sending:
            replica._sync_buffers()
        if sending:
            buffers = self.keep_buffers()
        written = WrittenWeights(() if self.shards else self.params, rollback, findings)
        if several and not findings.watched:
            self._check_buffers()
        return Start(buffers, random_state, written)

    def keep_first_pass(self, start: Start, findings: Findings, number: int) -> Callable[[], None]:
        """Keep what the first of several passes has left; the function that is returned puts it back after the last.

        Args:
            start: what passes begin with.
            findings: of the steps before.
            number: the step's.
        """
        start.written.first_pass_has_run()
        buffers, weights, watched = self.keep_buffers(), start.written.keep_first_pass(), self._watch(findings, number)
        bound = self._keep_bound()

        def put_back() -> None:
            bound()
            buffers()
            weights()
            watched()

        return put_back

    def _watch(self, findings: Findings, number: int) -> Callable[[], None]:
        """In the first step, and ever more seldom, look for tensors outside of buffers that later passes write.

        Returns:
            The function to call when they have run, which warns of them.
        """
        if self.shards or (findings.watched and number & (number - 1)):  # nor in step 1, 2, 4, 8, ...
            return lambda: None
        tensors = [(name, tensor, _place(tensor)) for name, tensor in self._tensors_outside_buffers()]

        def passes_have_run() -> None:
            findings.watched = True
            found = {name for name, tensor, place in tensors if _place(tensor) != place}
            written = sorted(found - findings.shared)
            findings.shared |= found
            if written:
                warn(
                    f"forwards write {', '.join(written)}, outside of buffers: each pass of a step does so. Make it a "
                    "buffer, which every pass then finds as it was before the step, or update it only if "
                    "esam_kernels.current_pass() in (None, esam_kernels.first_pass())"
                )

        return passes_have_run

    def _check_buffers(self) -> None:
        """Refuse buffers that are parts of weights: passes would put the weights back with them.

        Raises:
            ValueError: if there is one.
        """
        if self.shards:
            return
        trained = [param for param in self.params if param.requires_grad and not is_lazy(param)]
        weights = [span(param) for param in trained if has_address(param)]
        for module in self._modules:
            for name, buffer in module._buffers.items():
                if buffer is None or is_lazy(buffer) or not _is_plain(buffer) or not has_address(buffer):
                    continue
                start, end = span(buffer)
                if buffer.numel() > 0 and any(start < stop and begin < end for begin, stop in weights):
                    raise ValueError(
                        f"the buffer {type(module).__name__}.{name} shares memory with a parameter, which a step "
                        "perturbs, while every pass begins with the buffers from before it: register a copy, or make "
                        "it a property that returns the part"
                    )

    def _tensors_outside_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """With names, those in attributes of modules, also in lists, dicts and modules that are hidden there.

        Parameters that are not trained, such as a momentum encoder's, are among them.
        """
        trained = [param for param in self.params if param.requires_grad]
        buffers = [buffer for module in self._modules for buffer in module._buffers.values()]  # DDP lists them as well
        seen = {*map(id, trained), *map(id, self._modules), *map(id, buffers)}
        for module in self._modules:
            values = {name: value for name, value in vars(module).items() if name not in ("_buffers", "_modules")}
            for name, value in (*values.pop("_parameters", {}).items(), *values.items()):
                yield from _tensors_in(value, f"{type(module).__name__}.{name}", seen)

    def keep_buffers(self) -> Callable[[], None]:
        """Keep every buffer and its value, and which parameters modules have; what is returned puts them back."""
        if not self._buffers.current():
            self._buffers = Buffers(self._modules)
        values, parameters = self._buffers.keep(), self._keep_parameters()

        def put_back() -> None:
            parameters()
            values()

        return put_back

    def _keep_parameters(self) -> Callable[[], None]:
        """Keep which tensors the modules have as parameters, which a forward may replace, as it may buffers.

        What a forward adds, as a layer does that makes its weights when it first runs, stays.
        """
        if self.shards:  # FSDP2 replaces parameters itself
            return lambda: None
        before, entries = _values(self._parameters), [dict(one) for one in self._parameters]

        def put_back() -> None:
            now = _values(self._parameters)
            if len(now) != len(before) or any(map(is_not, now, before)):
                for one, one_before in zip(self._parameters, entries):
                    one.update({k: v for k, v in one_before.items() if v is not None and one.get(k) is not None})

        return put_back

    def _keep_bound(self) -> Callable[[], None]:
        """Keep the tensors that hooks before forwards have bound to modules, such as pruned and normed weights.

        What is returned binds them again: those of a later pass are made of perturbed weights.
        """
        hooks = list(map(attrgetter("_forward_pre_hooks"), self._modules))
        hooked = [vars(module) for module, some in zip(self._modules, hooks) if some] if any(hooks) else []
        bound = [{name: one for name, one in own.items() if isinstance(one, Tensor)} for own in hooked]

        def put_back() -> None:
            for own, values in zip(hooked, bound):
                own.update(values)

        return put_back

    def keep_random_state(self) -> Callable[[], None]:
        """Keep the state of every generator that a forward can draw from; the function that is returned replays it.

        They are torch's on the CPU and on the parameters' devices, Python's, and NumPy's if it is imported. No
        device is synchronized: the state of a CUDA generator is on the host.
        """
        cpu = torch.get_rng_state()
        devices = [(device, torch.get_device_module(device).get_rng_state(device)) for device in self._devices]
        python = random.getstate()
        numpy: Any = sys.modules.get("numpy")
        legacy = numpy and numpy.random.get_state()

        def replay() -> None:
            torch.set_rng_state(cpu)
            for device, state in devices:
                torch.get_device_module(device).set_rng_state(state, device)
            random.setstate(python)
            if legacy is not None:
                numpy.random.set_state(legacy)

        return replay

    def bypass_replicas(self, rollback: Rollback, into_grad: bool) -> Callable[[], None]:
        """Call what ``DistributedDataParallel`` wraps directly, for passes whose gradients are not reduced.

        Args:
            rollback: the step's.
            into_grad: whether these passes run a backward into ``.grad``, from which a replica with a static graph
                would learn that there are two in an iteration: it stays, and reduces their gradients, too.

        Returns:
            The function that puts the wrappers back.
        """
        replicas = [replica for replica in self._replicas if not (into_grad and replica.static_graph)]

        def put_back() -> None:
            for replica in self._replicas:
                vars(replica).pop("forward", None)

        rollback.undo_by(put_back)
        for replica in replicas:
            # An instance attribute hides the class's forward; not set through Module, which would register the module.
            vars(replica)["forward"] = replica.module.__call__
        return put_back

    def without_gradient_sync(self, function: Callable[P, R]) -> Callable[P, R]:
        """The same function, whose forward and backward add gradients up without reducing them over the replicas."""
        for replica in self._replicas:
            function = replica.no_sync()(function)
        return self.shards.without_reduction(function)

    def low_precision(self, function: Callable[P, R], dtype: torch.dtype) -> Callable[P, R]:
        """The same function under autocast to ``dtype`` on the parameters' types of devices."""
        for device_type in sorted({param.device.type for param in self.params}):
            function = torch.autocast(device_type, dtype)(function)
        return function

    def unsynchronized_gradients(self) -> list[Tensor]:
        """What this rank alone has added up ``without_gradient_sync``."""
        if self.shards:
            return self.shards.accumulated()
        return [param.grad for param in self.params if param.grad is not None]

    def watch_gradients(self) -> Callable[[], None]:
        """Watch the gradients during a call of a closure, which is not to change them.

        Returns:
            The function to call after it, which raises a RuntimeError if they have changed.
        """
        if self.shards:  # whose gradients are elsewhere until they are reduced
            return lambda: None
        grads = self.unsynchronized_gradients()
        versions = [grad._version for grad in grads]

        def unchanged() -> None:
            found = self.unsynchronized_gradients()
            if len(found) != len(grads) or any(map(is_not, found, grads)) or [g._version for g in grads] != versions:
                raise RuntimeError(
                    "a closure has changed the gradients in .grad: it returns losses, and leaves backward() and "
                    "zero_grad() to the optimizer, also model.zero_grad(), which would lose earlier micro-batches"
                )

        return unchanged

    def set_aside_others(self, rollback: Rollback) -> Callable[..., None]:
        """Put aside the gradients of the models' parameters that another optimizer trains, which are None then.

        Returns:
            The function to call afterwards: the gradients are those from before again, and with ``added=True`` what has
            been added since is added to them. If the step fails, they are those from before.
        """
        before = [(param, param.grad) for param in self._trained_by_others()]

        def put_back(added: bool = False) -> None:
            for param, grad in before:
                if added and param.grad is not None:
                    grad = param.grad if grad is None else grad + param.grad
                param.grad = grad

        rollback.undo_by(put_back)
        for param, _ in before:
            param.grad = None
        return put_back

    def gradients_of_others(self) -> list[Tensor]:
        """The gradients of those that another optimizer trains."""
        return [param.grad for param in self._trained_by_others() if param.grad is not None]

    def _trained_by_others(self) -> list[Tensor]:
        # FSDP2's gradients are elsewhere until they are reduced.
        return [] if self.shards else [param for param in self._others if param.requires_grad]

    def forget_weight_copies(self) -> None:
        """Give up copies of the weights, which survive in-place changes of the weights themselves.

        They are autocast's low-precision ones, those of ``parametrize.cached()``, and those that FSDP2 has gathered.
        """
        torch.clear_autocast_cache()
        getattr(parametrize, "_cache", {}).clear()
        self.shards.release()


def _accelerators(params: Sequence[Tensor]) -> list[torch.device]:
    found = {param.device for param in params} - {torch.device("cpu")}
    return sorted((device for device in found if device.type != "meta"), key=str)


def _differ(now: dict[str, Any], before: dict[str, Any]) -> bool:
    return now.keys() != before.keys() or any(map(is_not, now.values(), before.values()))


def _become(now: dict[str, Any], before: dict[str, Any]) -> None:
    now.update(before)
    for name in now.keys() - before.keys():
        del now[name]


def keep_entries(dicts: Sequence[dict[str, Any]]) -> Callable[[], None]:
    """Keep which entries dicts have; the function that is returned puts them back."""
    kept = [(one, dict(one)) for one in dicts]

    def put_back() -> None:
        for now, before in kept:
            if _differ(now, before):
                _become(now, before)

    return put_back


def _values(dicts: Sequence[dict[str, Any]]) -> list[Any]:
    return list(chain.from_iterable(map(dict.values, dicts)))


@torch.no_grad()
def copy_all(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of tensors of any dtypes, in few launches."""
    copies = [torch.empty_like(tensor) for tensor in tensors]
    copy_into(copies, tensors)
    return copies


@torch.no_grad()
def copy_into(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Overwrite tensors of any dtypes, in few launches."""
    for group, copies in zip(_by_dtype(tensors), _by_dtype(values)):
        torch._foreach_copy_(group, copies)


def _by_dtype(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """The tensors in groups that a foreach operation takes at once."""
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return list(groups.values())


def _place(tensor: Tensor) -> tuple[int, int]:
    """What changes when a tensor is written, or its ``.data`` becomes another."""
    return tensor._version, tensor.data_ptr() if has_address(tensor) else 0


def _tensors_in(value: Any, name: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor with a version in a value, with its name; ``seen`` are ids of what is left out."""
    if id(value) in seen:
        return
    if isinstance(value, Tensor):
        if not is_lazy(value) and not value.is_inference():
            yield name, value
        return
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, nn.Module):
        items = (*value.named_parameters(), *value.named_buffers())
    elif isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        return
    seen.add(id(value))
    for key, item in items:
        yield from _tensors_in(item, f"{name}.{key}", seen)


def _is_usual(param: Tensor) -> bool:
    """Whether a parameter can be copied, compared and written back, as forwards may write only such a one."""
    odd = param.is_quantized or param.is_nested or param.is_inference() or param.is_meta or param.dtype == _FP4
    return (
        param.layout == torch.strided
        and not odd
        and (param.is_floating_point() or param.is_complex() or param.dtype in _WHOLE)
    )


def _is_inference(buffer: Tensor) -> bool:
    return not is_lazy(buffer) and buffer.is_inference()


def _is_plain(buffer: Tensor) -> bool:
    """Whether foreach operations take it."""
    if buffer.layout != torch.strided or buffer.is_nested or buffer.is_conj() or buffer.is_neg():
        return False
    # Asked first since it is so of almost all, and takes a tenth of the time.
    return buffer.is_contiguous() or not _repeats_elements(buffer)


def _can_be_written(buffer: Tensor) -> bool:
    """Whether an operation can write into it: not into an expanded constant, whose elements share memory."""
    return buffer.layout != torch.strided or buffer.is_nested or not _repeats_elements(buffer)


def _repeats_elements(buffer: Tensor) -> bool:
    return any(stride == 0 and size > 1 for stride, size in zip(buffer.stride(), buffer.shape))
