"""The closure as torch.optim has it: it takes no index, and clears gradients, computes and runs backward itself."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .closure import iterators_behind, tensors_behind
from .ops.memory import has_address
from .rollback import note
from .warn import warn

OUTSIDE = (
    "the closure is called twice in a step, at the weights and at the perturbed ones, and its loss has been computed "
    "before: compute the loss inside the closure"
)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if has_address(tensor) else 0


class OrdinaryClosure:
    """One step's closure, what its first call returned, and the gradients from before the step.

    The last call begins with these, as it does under any optimizer: they are for the closure to clear, or to add to. A
    call before it begins without any, so that what it leaves is its own.

    Args:
        function: the closure.
        computation: what a call before the last runs of it.
        params: all parameters.
        zeroed: whether the gradients from before the step are zeros.
    """

    def __init__(
        self,
        function: Callable[[], Any],
        computation: Callable[[], Any],
        params: Sequence[Tensor],
        zeroed: bool = False,
    ) -> None:
        self._zeroed = zeroed
        self._first: Any = None  # what the call before has returned
        self._functions = {True: function, False: computation}  # for the last call, and for a call before it
        self.params = params
        self.returned: list[Any] = []  # by the first call
        self._named: list[tuple[str, Tensor, int]] = []  # what it names, with the versions from before a call
        self._before = [param.grad for param in params]
        self._versions = [0 if grad is None else grad._version for grad in self._before]

    def begin(self, last: bool) -> None:
        """Before a call: set the gradients that it begins with."""
        for param, grad in zip(self.params, self._before):
            param.grad = grad if last else None
        if not last:
            named = [(name, one) for name, one in tensors_behind(self._functions[False]) if not one.is_inference()]
            self._named = [(name, one, one._version) for name, one in named]

    def forget(self) -> None:
        """The closure has cleared the gradients: those from before the step need no memory until the last call."""
        self._before = [None] * len(self.params)

    def check(self, last: bool, works: bool, result: Any) -> bool:
        """After a call: whether the closure made a gradient. Warns of what a call before the last has written.

        Args:
            last: whether it was the last call.
            works: whether it has made one before, so that it left out its backward on purpose, of a loss that is not
                finite, say: under ``torch.optim``, too, such a step does what the gradients say that are there.
            result: what it returned.

        Raises:
            RuntimeError: if it made none and never has, though its loss is finite.
        """
        written = [] if last else [(name, one) for name, one, version in self._named if one._version != version]
        if written:  # parameters are looked after, and buffers of gradients are for the closure to clear
            known = set(map(id, self.params))
            gradients = {_storage(grad) for grad in self._before if grad is not None} - {0}
            written = [(name, one) for name, one in written if id(one) not in known and _storage(one) not in gradients]
        names = ", ".join(sorted({name for name, _ in written}))
        if names:
            warn(
                f"the closure writes into {names} in place, and is called twice in a step: let it write "
                "into a copy; what counts or adds up over the steps belongs behind the step"
            )
        before = self._before if last else [None] * len(self.params)
        rows = [
            (param.grad, grad, version)
            for param, grad, version in zip(self.params, before, self._versions)
            if param.grad is not None
        ]
        if all(now is grad and now._version == version for now, grad, version in rows):
            if works or (isinstance(result, Tensor) and not result.isfinite().all()):
                return False
            raise RuntimeError(
                "the closure made no gradient: it takes no index, so it is to clear the gradients, compute the loss, "
                "call loss.backward() and return the loss"
            )
        kept = [(now, version) for now, grad, version in rows if now is grad]
        # A closure that clears in place writes at least twice. Views are those of DistributedDataParallel's buckets.
        if (
            kept
            and not self._zeroed
            and all(now._version <= version + 1 and not now._is_view() for now, version in kept)
        ):
            warn(
                "the closure adds to gradients from before the step, which are not sharpness-aware: begin it with "
                "optimizer.zero_grad(), and let it run all micro-batches of the step"
            )
        return True

    def check_iterators(self) -> None:
        """Warn of what each call takes the next item of."""
        iterators = iterators_behind(self._functions[False])
        if iterators:
            warn(
                f"the closure names the iterator {', '.join(iterators)} and is called twice in a step: what it takes "
                "from it is another batch in each call; take the batch before step(closure)"
            )

    def call(self, last: bool) -> Any:
        """Call the function, and keep what its first call returns."""
        try:
            result = self._functions[last]()
        except RuntimeError as error:
            if self.returned and any(words in str(error) for words in ("a second time", "by an inplace operation")):
                note(error, OUTSIDE)
            raise
        if self.returned and isinstance(result, Tensor) and result.grad_fn is not None and result is self._first:
            raise RuntimeError(OUTSIDE)
        self._first = result
        if not self.returned:
            # A copy where another call follows, since the next run of a CUDA graph overwrites what it gave.
            self.returned.append(result.clone() if isinstance(result, Tensor) and not last else result)
        return result
