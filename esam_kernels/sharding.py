"""FSDP2: parameters that ``torch.distributed.fsdp.fully_shard`` has split over the ranks, and the passes over them.

FSDP2 is not imported here: that takes a second, and there are no such parameters before somebody else has imported it.
Apart from its public methods this uses FSDP2's lazy initialization, the end of its backward, and the places where it
keeps gradients that are not reduced yet; ``ShardedModules`` has all of it.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import wraps
from math import prod
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from .rollback import Rollback

P = ParamSpec("P")
R = TypeVar("R")


def is_sharded(tensor: Tensor) -> bool:
    """Whether each rank has only a part of it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_shard(tensor: Any) -> Tensor:
    """Its part on this rank, sharing its memory and without a graph; the tensor itself if it is not sharded."""
    # Not under no_grad() where there is nothing to be done: that takes ten times as long, for each tensor of each step.
    return torch.no_grad()(tensor.to_local)() if is_sharded(tensor) else tensor


def shard_offset(tensor: Any) -> int:
    """The place of this rank's first element in the whole, in row-major order."""
    if not is_sharded(tensor):
        return 0
    mesh, dim = tensor.device_mesh, _shard_dim(tensor)
    rows = -(-len(tensor) // mesh.size(dim))  # as torch.chunk: the last ranks may have fewer rows, or none
    return min(rows * mesh.get_local_rank(dim), len(tensor)) * prod(tensor.shape[1:])


def sum_over_shards(number: Tensor, params: Sequence[Any]) -> Tensor:
    """The sum over the ranks that these parameters are sharded over; the number itself if they are not."""
    if not params or not is_sharded(params[0]):
        return number
    mesh = params[0].device_mesh
    total = number.to(mesh.device_type, copy=True)
    torch.distributed.all_reduce(total, group=mesh.get_group(_shard_dim(params[0])))
    return total


def check_same_on_ranks(settings: dict[str, Any], params: Sequence[Any]) -> None:
    """Compare settings over the ranks that these parameters are sharded over, which have to call this together.

    Raises:
        ValueError: on every rank, if one differs: ranks would wait for each other's weights for ever.
    """
    mesh, found = params[0].device_mesh, [settings]
    for dim in range(mesh.ndim):
        rows: list[Any] = [None] * mesh.size(dim)
        torch.distributed.all_gather_object(rows, found, group=mesh.get_group(dim))
        found = [one for row in rows for one in row]
    for name, value in found[0].items():
        for other in found:
            if other[name] != value:
                raise ValueError(
                    f"{name} is {value!r} on one rank and {other[name]!r} on another: with FSDP2 give every rank the "
                    "same, since all have to perturb the same weights and run the same passes"
                )


def _shard_dim(tensor: Any) -> int:
    """The dimension of the mesh over which a parameter is sharded; over the others it is replicated."""
    return next(i for i, placement in enumerate(tensor.placements) if placement.is_shard())


class ShardedModules:
    """The modules that ``fully_shard`` has been applied to, with those below the same root.

    They gather the weights for a forward and may keep them until a backward, and reduce gradients in it.
    """

    def __init__(self, modules: Iterable[nn.Module], params: Sequence[Tensor]) -> None:
        """Check that the parameters can be perturbed.

        Raises:
            ValueError: if they are sharded in another way than ``fully_shard`` shards them by default, some of them are
                not, their modules are not known, or ranks may use different ones.
        """
        fsdp: Any = sys.modules.get("torch.distributed.fsdp")
        modules = list(modules) if fsdp is not None else []
        if any(isinstance(module, fsdp.FullyShardedDataParallel) for module in modules):
            raise ValueError(
                "ESAM does not support FullyShardedDataParallel: shard the model with "
                "torch.distributed.fsdp.fully_shard, which is its successor"
            )
        sharded: list[Any] = [module for module in modules if isinstance(module, fsdp.FSDPModule)]
        _check_sharding([param for param in params if param.requires_grad], sharded)
        states: dict[int, Any] = {}
        for module in sharded:  # an outer one before those in it, so that it is their root
            state = module._get_fsdp_state()
            state._lazy_init()  # which learns dtypes from the parameters that require gradients, so before any does not
            states.update((id(one), one) for one in state._state_ctx.all_states)
        self._states: list[Any] = list(states.values())
        if any(group.reduce_scatter_unused_params for state in self._states for group in state._fsdp_param_groups):
            raise ValueError(
                "set_reduce_scatter_unused_params(True) lets ranks use different parameters, of which ESAM's first "
                "pass may reach some on one rank and none on another: leave it off"
            )
        self._modules = sharded

    def __bool__(self) -> bool:
        return bool(self._modules)

    def release(self) -> None:
        """Give up gathered weights and whatever passes have left unfinished, with no communication."""
        for state in self._states:
            if state._is_root:
                state._reset_iter_state()

    def abandon(self) -> None:
        """After a failure, forget the gradients that have not been reduced, and reduce the next ones again."""
        self._reduce_gradients(True)
        for param in self._params():
            param.unsharded_accumulated_grad = None
            if hasattr(param, "_unsharded_param"):  # since the first forward
                param._unsharded_param.grad = None

    def train_only(self, params: Iterable[Tensor], rollback: Rollback) -> Callable[[], None]:
        """Let the following passes compute the gradients of these parameters and of no others.

        Returns:
            The function that makes the others trainable again.
        """
        chosen = {id(param) for param in params}
        others = [
            param.sharded_param
            for param in self._params()
            if param.sharded_param.requires_grad and id(param.sharded_param) not in chosen
        ]

        def put_back() -> None:
            for param in others:
                param.requires_grad_(True)

        rollback.undo_by(put_back)
        for param in others:
            param.requires_grad_(False)
        return put_back

    def accumulated(self) -> list[Tensor]:
        """The gradients of this rank's own samples that have not been reduced yet."""
        kept = [param.unsharded_accumulated_grad for param in self._params()]
        whole = [param._unsharded_param.grad for param in self._params() if hasattr(param, "_unsharded_param")]
        return [grad for grad in (*kept, *whole) if grad is not None]

    def reduce_rest(self) -> None:
        """Reduce what is left of earlier micro-batches after a last one that had no backward."""
        if self.accumulated():
            for state in self._states:
                if state._is_root:
                    state._root_post_backward_final_callback()

    def without_reduction(self, function: Callable[P, R]) -> Callable[P, R]:
        """The same function, whose backward adds gradients up on each rank without reducing them."""

        @wraps(function)
        def unreduced(*args: P.args, **kwargs: P.kwargs) -> R:
            self._reduce_gradients(False)
            result = function(*args, **kwargs)
            self._reduce_gradients(True)  # after an exception, abandon() does it
            return result

        return unreduced

    def _reduce_gradients(self, enabled: bool) -> None:
        for module in self._modules:
            module.set_requires_gradient_sync(enabled, recurse=False)

    def _params(self) -> Iterator[Any]:
        for state in self._states:
            for group in state._fsdp_param_groups:
                yield from group.fsdp_params


def _check_sharding(params: Sequence[Any], modules: Sequence[Any]) -> None:
    sharded = [param for param in params if is_sharded(param)]
    if not sharded:
        return
    for param in params:
        if not is_sharded(param) or param.device_mesh != sharded[0].device_mesh:
            raise ValueError(
                f"a parameter of shape {list(param.shape)} is not sharded over the same ranks as the others: apply "
                "fully_shard to the whole model, with one mesh and without ignored_params"
            )
        split = [placement for placement in param.placements if not placement.is_replicate()]
        if len(split) != 1 or not split[0].is_shard(0):
            raise ValueError(
                f"a parameter of shape {list(param.shape)} is distributed as {param.placements}: ESAM supports "
                "parameters that fully_shard has sharded along their first dimension, and no tensor parallelism"
            )
    if not modules:
        raise ValueError(
            "the parameters are sharded, but not by a model that ESAM knows of: give it as ESAM(..., model=model), or "
            "make closures with batch_closure, after fully_shard"
        )
    if torch.__version__ < "2.13":  # as versions, not as text
        raise ValueError(
            "ESAM supports FSDP2 from torch 2.13 on, with which it can be put in order after an exception, and this is "
            f"torch {torch.__version__}: take a later one, or DistributedDataParallel"
        )
