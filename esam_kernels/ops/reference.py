"""Every operator in plain torch: the definition that the kernels are tested against, and the path of last resort.

Notation, as in the ESAM paper (Du et al., ICLR 2022, arXiv 2110.03141) and the ASAM paper (Kwon et al., ICML 2021,
arXiv 2102.11600): w weights, g gradients, m the mask of kept elements, a = 1 when adaptive and 0 otherwise.
Arithmetic runs in the compute type of the parameter: float64 for float64, float32 for everything narrower.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter

import torch
from torch import Tensor

EPS = 1e-12  # added to the norm, as in the authors' code

# What a Philox counter is drawn for; it keeps the draws of one step independent of each other.
TENSOR_STREAM, ELEMENT_STREAM, ROUNDING_STREAM, SAMPLE_STREAM, ASCENT_STREAM = range(5)

_WORD = 0xFFFFFFFF
_CHUNK = 1 << 15  # counters worked on at a time: ten rounds over them stay in the L2 cache


@dataclass(frozen=True)
class ElementMask:
    """Everything random that an operator needs: which elements it keeps, and how sums in bf16 and fp16 round.

    It holds no bits. They are recomputed wherever they are needed from (seed, step, tensor id, element), so every
    backend sees the same ones and nothing is stored. Elements count in memory order for a dense tensor of any
    strides, in row-major order for one with gaps.

    Attributes:
        seed: 64-bit key of the generator.
        step: which step's bits; taken modulo 2**32.
        tensor_ids: for each tensor of the operator's lists, the fixed number that names it.
        beta: probability with which an element is kept; 1 keeps all.
        offsets: for each tensor, the place of its first element in the whole of which it is a shard (default: 0).
    """

    seed: int
    step: int
    tensor_ids: Sequence[int]
    beta: float = 1.0
    offsets: Sequence[int] | None = None

    @property
    def threshold(self) -> int:
        """An element is kept iff its 32-bit word is below this."""
        return keep_threshold(self.beta)

    def offset(self, i: int) -> int:
        """Place of tensor i's first element in its whole."""
        return 0 if self.offsets is None else self.offsets[i]

    def subset(self, ids: Sequence[int]) -> "ElementMask":
        """The same mask for some of the tensors."""
        offsets = None if self.offsets is None else [self.offsets[i] for i in ids]
        return replace(self, tensor_ids=[self.tensor_ids[i] for i in ids], offsets=offsets)

    def words(self, i: int, tensor: Tensor, stream: int) -> Tensor:
        """One 32-bit word per element of ``tensor``, the i-th of the list: int64, of its shape and memory order."""
        flat = element_words(
            self.seed, self.step, self.tensor_ids[i], stream, self.offset(i), tensor.numel(), tensor.device
        )
        return flat.as_strided(tensor.shape, tensor.stride()) if is_dense(tensor) else flat.view(tensor.shape)

    def keep(self, i: int, tensor: Tensor) -> Tensor:
        """Which elements of ``tensor``, the i-th of the list, are kept: bool, of its shape."""
        return self.words(i, tensor, ELEMENT_STREAM) < self.threshold


def keep_threshold(beta: float) -> int:
    """The bound below which a 32-bit word means "keep", for keep probability beta."""
    return int(beta * 2**32)


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory without gaps or overlaps, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape) if size != 1):
        if stride != expected and tensor.numel() > 0:
            return False
        expected *= size
    return True


def have_same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape have each element at the same place, counted from their first."""
    if a.stride() == b.stride():
        return True
    return not a.numel() or all(size == 1 or x == y for size, x, y in zip(a.shape, a.stride(), b.stride()))


def as_params_lie(
    params: Sequence[Tensor], tensors: Sequence[Tensor], reads: Callable[[Tensor, Tensor], bool]
) -> list[Tensor]:
    """The tensors in their params' memory order and in a dtype that kernels read: each itself, or a copy.

    ``reads(param, tensor)`` says whether kernels over the param read the tensor's dtype; they read the param's own and
    its compute type.
    """
    if (  # nearly always, and quick to see
        list(map(attrgetter("dtype"), params)) == list(map(attrgetter("dtype"), tensors))
        and list(map(Tensor.stride, params)) == list(map(Tensor.stride, tensors))
        and (torch.compiler.is_dynamo_compiling() or not any(map(Tensor.is_neg, tensors)))
    ):
        return list(tensors)
    tensors = [tensor.resolve_neg() for tensor in tensors]  # kernels read what is stored, without its sign
    return [
        tensor
        if (have_same_layout(param, tensor) and reads(param, tensor))
        else torch.empty_like(param, dtype=tensor.dtype if reads(param, tensor) else compute_dtype(param)).copy_(tensor)
        for param, tensor in zip(params, tensors)
    ]


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al., SC 2011): four words from a counter of four words and a key of two.

    Counters are int64 tensors of one shape with values below 2**32, and so are the results.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The products wrap at 64 bits, which leaves the bits of the unsigned ones.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0 = (p1 >> 32).bitwise_and_(_WORD).bitwise_xor_(c1).bitwise_xor_(k0)
        c2 = (p0 >> 32).bitwise_and_(_WORD).bitwise_xor_(c3).bitwise_xor_(k1)
        c1, c3 = p1.bitwise_and_(_WORD), p0.bitwise_and_(_WORD)
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def philox_key(seed: int) -> tuple[int, int]:
    """The two key words of a 64-bit seed."""
    return seed & _WORD, (seed >> 32) & _WORD


def element_words(
    seed: int, step: int, tensor_id: int, stream: int, offset: int, count: int, device: torch.device
) -> Tensor:
    """The words of elements offset, ..., offset + count - 1 of one tensor: int64 of shape [count].

    Element j's word is number j % 4 of Philox at key = seed and
    counter = (low word of j // 4, stream << 24 | high word of j // 4, tensor id, step).
    """
    first, last = offset // 4, (offset + count + 3) // 4
    words = torch.empty(4 * (last - first), dtype=torch.int64, device=device)
    for start in range(first, last, _CHUNK):
        block = torch.arange(start, min(start + _CHUNK, last), device=device)
        counter = (
            block & _WORD,
            (block >> 32) | (stream << 24),
            torch.full_like(block, tensor_id),
            torch.full_like(block, step & _WORD),
        )
        chunk = words[4 * (start - first) : 4 * (start - first + len(block))].view(-1, 4)
        torch.stack(philox4x32(counter, philox_key(seed)), dim=1, out=chunk)
    return words[offset - 4 * first :][:count]


def tensor_words(seed: int, steps: Sequence[int], tensor_ids: Sequence[int]) -> Tensor:
    """For each step and tensor, the word that decides whether it is drawn: int64 [steps, tensors], on the CPU."""
    ids = torch.tensor(tensor_ids, dtype=torch.int64, device="cpu").expand(len(steps), -1)
    numbers = torch.tensor([step & _WORD for step in steps], device="cpu")[:, None].expand_as(ids)
    zero = torch.zeros_like(ids)
    return philox4x32((zero, zero + (TENSOR_STREAM << 24), ids, numbers), philox_key(seed))[0]


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The type that arithmetic on ``tensor`` runs in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def unsupported(tensor: Tensor) -> str | None:
    """None: these operators take every tensor."""
    return None


def squared_norm(
    params: Sequence[Tensor], grads: Sequence[Tensor], adaptive: bool = False, mask: ElementMask | None = None
) -> Tensor:
    """‖m * |w|^a * g‖², summed over the lists."""
    total = []
    for i, (param, grad) in enumerate(zip(params, grads)):
        x = grad.to(compute_dtype(param))
        if adaptive:
            x = x * param
        if mask is not None and mask.beta < 1:
            x = x * mask.keep(i, param)
        # The sum of squares, not the norm: torch's norm loses digits with the number of elements on a CPU.
        total.append((x * x).sum())
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in total) else torch.float32
    return torch.stack([t.to(params[0].device, dtype) for t in total]).sum()


def perturb_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    backups: Sequence[Tensor] | None,
    coefficients: Sequence[float],
    norm: Tensor | None = None,
    adaptive: bool = False,
    mask: ElementMask | None = None,
) -> Tensor:
    """backup <- w, then w <- w + e with e = coefficient / (norm + eps) * m * w^2a * g; e = 0 if norm is not finite."""
    norm = squared_norm(params, grads, adaptive, mask).sqrt() if norm is None else norm
    for i, (param, grad, coefficient) in enumerate(zip(params, grads, coefficients)):
        if backups is not None:
            backups[i].copy_(param)
        dtype = compute_dtype(param)
        total = norm.to(param.device, dtype)
        # 0-dimensional: it stays on the device. (A number divided by a tensor is rounded twice, its own tensor once.)
        scale = torch.full_like(total, coefficient) / (total + EPS)
        e = param.to(dtype).square().mul_(grad).mul_(scale) if adaptive else grad.to(dtype) * scale
        if mask is not None and mask.beta < 1:
            e *= mask.keep(i, param)
        e.masked_fill_(~total.isfinite(), 0)
        if param.dtype == dtype:
            param.add_(e)
        elif mask is None:
            param.copy_(e.add_(param))
        else:
            param.copy_(round_stochastically(e.add_(param), param.dtype, mask.words(i, param, ROUNDING_STREAM)))
    return norm


def round_stochastically(x: Tensor, dtype: torch.dtype, words: Tensor) -> Tensor:
    """Round float32 to one of its two neighbours in bf16 or fp16, so that the expectation over the words is x.

    The random low bits of each word are added below the last bit that is kept, and the rest is cut off. Results
    saturate at the largest finite number; values that are not finite stay as they are.
    """
    dropped = 16 if dtype == torch.bfloat16 else 13
    magnitude = x.abs()
    # fp16's subnormals are 2^-24 apart: lifted into the binade of that spacing, they round like the rest.
    lift = torch.zeros_like(x)
    if dtype == torch.float16:
        lift.masked_fill_(magnitude < 2.0**-14, 2.0**-14)
    low_bits = (1 << dropped) - 1
    bits = (magnitude + lift).view(torch.int32) + (words & low_bits).to(torch.int32)
    rounded = bits.bitwise_and_(~low_bits).view(torch.float32) - lift
    rounded = rounded.clamp_(max=torch.finfo(dtype).max).copysign_(x)
    return torch.where(x.isfinite(), rounded, x).to(dtype)


def restore_(params: Sequence[Tensor], backups: Sequence[Tensor]) -> None:
    """w <- backup, bit for bit."""
    torch._foreach_copy_(list(params), list(backups))


def select_top(before: Tensor, after: Tensor, k: int) -> Tensor:
    """Ascending indices of the k largest after - before; ties go to the lower index, NaN counts as largest."""
    difference = after.to(compute_dtype(after)) - before.to(compute_dtype(before))
    # A stable sort, since torch.topk chooses among ties as it likes.
    return difference.sort(descending=True, stable=True).indices[:k].sort().values
