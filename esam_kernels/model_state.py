"""What the extra forward passes of a step must not disturb: buffers, random state, gradient sync, autocast's cache."""

import random
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from .rollback import Rollback
from .sharding import ShardedModules

P = ParamSpec("P")
R = TypeVar("R")


class ModelState:
    """Looks after the models and devices that one step runs on."""

    def __init__(self, models: Iterable[nn.Module], params: Sequence[Tensor]) -> None:
        modules = {id(module): module for model in models for module in model.modules()}
        self._modules = list(modules.values())
        self._replicas = [module for module in self._modules if isinstance(module, DistributedDataParallel)]
        self.shards = ShardedModules(self._modules, params)
        self._params = params
        self._devices = sorted({param.device for param in params} - {torch.device("cpu")}, key=str)

    @property
    def trains_batch_norm(self) -> bool:
        """Whether a batch norm takes its statistics from the batch, which needs two rows."""
        return any(
            isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)
            for module in self._modules
        )

    def keep(self, rollback: Rollback) -> Callable[[], None]:
        """Register buffers, random state and sharding to be put back if the step fails.

        Returns:
            The function that replays the random state.
        """
        rollback.undo_by(self.forget_weight_copies)
        rollback.undo_by(self.shards.abandon)
        rollback.undo_by(self.keep_buffers())
        replay = self.keep_random_state()
        rollback.undo_by(replay)
        return replay

    def keep_buffers(self) -> Callable[[], None]:
        """Keep every buffer and its value; the function that is returned puts them back.

        Values, since batch norm's updates do not show in version counters. Buffers that a module replaces by other
        tensors become the old tensors again.
        """
        kept = [
            # What was made under inference_mode cannot be written: a copy takes its place.
            (module, name, buffer.clone() if buffer is not None and buffer.is_inference() else buffer)
            for module in self._modules
            for name, buffer in module._buffers.items()
        ]
        # Nothing can write into a buffer whose elements share memory (an expanded constant): it needs no copy. One that
        # is None may be made by the next forward.
        written = [buffer for _, _, buffer in kept if buffer is not None and not _overlaps(buffer)]
        values = copy_all(written)

        @torch.no_grad()
        def put_back() -> None:
            for module, name, buffer in kept:
                if module._buffers.get(name) is not buffer:
                    module._buffers[name] = buffer
            for buffer, value in zip(written, values):
                if buffer.shape != value.shape:  # as observers do
                    buffer.resize_(value.shape)
            for group, copies in zip(_by_dtype(written), _by_dtype(values)):
                torch._foreach_copy_(group, copies)

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

    def bypass_replicas(self, rollback: Rollback) -> Callable[[], None]:
        """Call what ``DistributedDataParallel`` wraps directly, for passes whose gradients are not reduced.

        Only the buffers are sent, as in a forward of its own: pass 1 begins with rank 0's, so that a step leaves on
        every rank the buffers that a plain step would.

        Returns:
            The function that puts the wrappers back.
        """

        def put_back() -> None:
            for replica in self._replicas:
                vars(replica).pop("forward", None)

        rollback.undo_by(put_back)
        for replica in self._replicas:
            if replica._check_sync_bufs_pre_fwd():
                replica._sync_buffers()
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
        for device_type in sorted({param.device.type for param in self._params}):
            function = torch.autocast(device_type, dtype)(function)
        return function

    def unsynchronized_gradients(self) -> list[Tensor]:
        """What this rank alone has added up ``without_gradient_sync``."""
        if self.shards:
            return self.shards.accumulated()
        return [param.grad for param in self._params if param.grad is not None]

    def forget_weight_copies(self) -> None:
        """Give up copies of the weights, which survive in-place changes of the weights themselves.

        They are autocast's low-precision ones, and those that FSDP2 has gathered.
        """
        torch.clear_autocast_cache()
        self.shards.release()


@torch.no_grad()
def copy_all(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of tensors of any dtypes, in few launches."""
    copies = [torch.empty_like(tensor) for tensor in tensors]
    for group, copied in zip(_by_dtype(tensors), _by_dtype(copies)):
        torch._foreach_copy_(copied, group)
    return copies


def _by_dtype(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """The tensors in groups that a foreach operation takes at once."""
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return list(groups.values())


def _overlaps(tensor: Tensor) -> bool:
    if tensor.layout != torch.strided:
        return True
    # Asked first since it is so of almost all, and takes a tenth of the time.
    if tensor.is_contiguous():
        return False
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape))
