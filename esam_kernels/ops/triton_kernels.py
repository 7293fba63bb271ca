"""The operators as Triton kernels: one launch for all tensors of one dtype, whatever their number.

A launch gets its tensors in a table of int64 words: four of a header, then a column for each thing that a kernel needs
to know of a tensor. A program finds the tensor that its block of elements belongs to in the table, and works on blocks
whose addresses are aligned to 16 bytes with 16-byte accesses, on all others with masked ones.

The operators make no host-device sync and can be captured in a CUDA graph: the graph replays the table of its capture,
so tensors, coefficients and mask are those of the capture. That holds for them alone: ESAM's ``backward`` reads and
sets the CUDA generator, which no capture allows. A gradient that lies in memory in another order than its weight, or
has a dtype that no kernel reads, costs a copy first.
"""
# mypy: allow-untyped-defs

from array import array
from collections.abc import Hashable, Iterable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from . import reference
from .reference import EPS, ElementMask, as_params_lie, is_dense

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float64: tl.float64}
_BITS = {2: tl.int16, 4: tl.int32, 8: tl.int64}

_BLOCK = 4096  # elements that a program works on
_NORM_BLOCK = 8192  # more, since each block leaves a partial sum that one program has to add
_WARPS = 8
_MOST_SAMPLES = 16384  # that select_top holds in the registers of one program

# The table's header, then its columns.
_SEED, _STEP, _THRESHOLD, _DONE = (tl.constexpr(word) for word in range(4))
_HEADER = tl.constexpr(4)
_FIRST_BLOCK, _COUNT, _OFFSET, _ID, _PARAM, _SOURCE, _BACKUP, _COEFFICIENT = (tl.constexpr(i) for i in range(8))
_SEARCH = tl.constexpr(512)  # rows of the table that are looked at together

_EPS = tl.constexpr(EPS)
_ELEMENT_STREAM = tl.constexpr(reference.ELEMENT_STREAM)
_ROUNDING_STREAM = tl.constexpr(reference.ROUNDING_STREAM)


@triton.jit
def _entry(table, rows, row, COLUMN: tl.constexpr):
    return tl.load(table + _HEADER + COLUMN * rows + row)


@triton.jit
def _locate(table, rows, BLOCK: tl.constexpr):
    """The row of the tensor that this program's block lies in, and which of the tensor's elements comes first in it.

    Blocks begin where Philox counters do, so in a shard the first one can begin up to 3 elements before the tensor.
    """
    block = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, _SEARCH)
    not_after = tl.zeros([_SEARCH], tl.int32)
    for i in range(0, rows, _SEARCH):
        first_block = tl.load(table + _HEADER + _FIRST_BLOCK * rows + i + lane, mask=i + lane < rows, other=block + 1)
        not_after += (first_block <= block).to(tl.int32)
    row = tl.sum(not_after) - 1
    first = (block - _entry(table, rows, row, _FIRST_BLOCK)) * BLOCK - _entry(table, rows, row, _OFFSET) % 4
    return row, first


@triton.jit
def _block_address(table, rows, row, COLUMN: tl.constexpr, first, DTYPE: tl.constexpr):
    """Where the block begins, in bytes: in 64 bits, unlike the offsets inside a block."""
    return _entry(table, rows, row, COLUMN) + first * (DTYPE.primitive_bitwidth // 8)


@triton.jit
def _inside(first, count, BLOCK: tl.constexpr):
    """Which of a block's elements, from the tensor's ``first`` on, the tensor has."""
    begin, end = tl.maximum(-first, 0).to(tl.int32), tl.minimum(count - first, BLOCK).to(tl.int32)
    lane = tl.arange(0, BLOCK)
    return (lane >= begin) & (lane < end)


@triton.jit
def _words(table, rows, row, first, STREAM: tl.constexpr, BLOCK: tl.constexpr):
    """The 32-bit words of a block's elements, as in ``reference.element_words``: four from each Philox counter."""
    counter = (_entry(table, rows, row, _OFFSET) + first) // 4 + tl.arange(0, BLOCK // 4)
    low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32) | (STREAM << 24)
    tensor_id = tl.zeros_like(low) + _entry(table, rows, row, _ID).to(tl.uint32)
    step = tl.zeros_like(low) + tl.load(table + _STEP).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(table + _SEED), low, high, tensor_id, step)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def _keep(table, rows, row, first, BLOCK: tl.constexpr):
    """Which of a block's elements the mask keeps."""
    return _words(table, rows, row, first, _ELEMENT_STREAM, BLOCK) < tl.load(table + _THRESHOLD).to(tl.uint32)


@triton.jit
def _round_stochastically(x, words, DTYPE: tl.constexpr):
    """As ``reference.round_stochastically``: random low bits are added below the last one kept, then cut off."""
    low_bits: tl.constexpr = 0xFFFF if DTYPE.is_bf16() else 0x1FFF
    largest: tl.constexpr = 3.3895313892515355e38 if DTYPE.is_bf16() else 65504.0
    magnitude = tl.abs(x)
    # fp16's subnormals are 2^-24 apart: lifted into the binade of that spacing, they round like the rest.
    lift = tl.where((magnitude < 2.0**-14) & (DTYPE.is_fp16()), 2.0**-14, 0.0)
    bits = (magnitude + lift).to(tl.uint32, bitcast=True) + (words & low_bits)
    rounded = tl.minimum((bits - (bits & low_bits)).to(tl.float32, bitcast=True) - lift, largest)
    sign = x.to(tl.uint32, bitcast=True) & 0x80000000
    rounded = (rounded.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    return tl.where(magnitude < float("inf"), rounded, x).to(DTYPE)


@triton.jit
def _squares(param, grad, keep, inside, COMPUTE: tl.constexpr, ADAPTIVE: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of (m * |w|^a * g)² over a block."""
    lane = tl.arange(0, BLOCK)
    x = tl.load(grad + lane, mask=inside, other=None if inside is None else 0.0).to(COMPUTE)
    if ADAPTIVE:
        x *= tl.load(param + lane, mask=inside, other=None if inside is None else 0.0).to(COMPUTE)
    if keep is not None:
        x *= keep.to(COMPUTE)
    return tl.sum(x * x)


@triton.jit(do_not_specialize=["rows", "partials_before"])
def _squared_norm_kernel(
    table,
    rows,
    partials,
    partials_before,
    out,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """partials[block] = sum of (m * |w|^a * g)²; the program that ends last adds them all, in their order."""
    COMPUTE: tl.constexpr = tl.float64 if PARAM.is_fp64() else tl.float32
    row, first = _locate(table, rows, BLOCK)
    count = _entry(table, rows, row, _COUNT)
    param = _block_address(table, rows, row, _PARAM, first, PARAM)
    grad = _block_address(table, rows, row, _SOURCE, first, GRAD)
    keep = _keep(table, rows, row, first, BLOCK) if MASKED else None
    aligned = ((param | grad) if ADAPTIVE else grad) % 16 == 0
    param, grad = param.to(tl.pointer_type(PARAM)), grad.to(tl.pointer_type(GRAD))
    if aligned & (first >= 0) & (first + BLOCK <= count):
        param, grad = tl.multiple_of(param, 16), tl.multiple_of(grad, 16)
        partial_sum = _squares(param, grad, keep, None, COMPUTE, ADAPTIVE, BLOCK)
    else:
        inside = _inside(first, count, BLOCK)
        partial_sum = _squares(param, grad, keep, inside, COMPUTE, ADAPTIVE, BLOCK)

    tl.store(partials + partials_before + tl.program_id(0), partial_sum.to(tl.float64))
    # Everything before the barrier is visible to whoever sees the counter raised.
    tl.debug_barrier()
    if tl.atomic_add(table + _DONE, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        lane = tl.arange(0, BLOCK // 2)
        total = tl.zeros([BLOCK // 2], tl.float64)
        end = partials_before + tl.num_programs(0)
        for i in range(0, end, BLOCK // 2):
            # Past the L1 cache, which does not see what other multiprocessors wrote.
            total += tl.load(partials + i + lane, mask=i + lane < end, other=0.0, cache_modifier=".cg")
        tl.store(out, tl.sum(total).to(out.dtype.element_ty))


@triton.jit
def _perturb_block(
    param,
    grad,
    backup,
    scale,
    finite,
    keep,
    words,
    inside,
    PARAM: tl.constexpr,
    COMPUTE: tl.constexpr,
    SAVED: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """backup <- w if it is to be SAVED, then w <- w + scale * m * w^2a * g if the norm is finite."""
    lane = tl.arange(0, BLOCK)
    saved = tl.load(param + lane, mask=inside)
    x = tl.load(grad + lane, mask=inside).to(COMPUTE)
    if SAVED:
        tl.store(backup + lane, saved, mask=inside)
    w = saved.to(COMPUTE)
    if ADAPTIVE:
        x = w * w * x
    if keep is not None:
        x *= keep.to(COMPUTE)
    moved = tl.where(finite, tl.fma(scale, x, w), w)
    moved = moved.to(PARAM) if words is None else _round_stochastically(moved, words, PARAM)
    tl.store(param + lane, moved, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _perturb_kernel(
    table,
    rows,
    norm,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    SAVED: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    MASKED: tl.constexpr,
    ROUNDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """backup <- w, then w <- w + e with e = coefficient / (norm + eps) * m * w^2a * g; e = 0 if norm is not finite."""
    COMPUTE: tl.constexpr = tl.float64 if PARAM.is_fp64() else tl.float32
    row, first = _locate(table, rows, BLOCK)
    count = _entry(table, rows, row, _COUNT)
    coefficient = _entry(table, rows, row, _COEFFICIENT).to(tl.float64, bitcast=True).to(COMPUTE)
    total = tl.load(norm).to(COMPUTE)
    # Rounded to nearest: Triton's own fp32 division is not, its fp64 division is.
    scale = coefficient / (total + _EPS) if COMPUTE.is_fp64() else tl.div_rn(coefficient, total + _EPS)
    finite = tl.abs(total) < float("inf")
    param = _block_address(table, rows, row, _PARAM, first, PARAM)
    grad = _block_address(table, rows, row, _SOURCE, first, GRAD)
    backup = _block_address(table, rows, row, _BACKUP, first, PARAM)
    keep = _keep(table, rows, row, first, BLOCK) if MASKED else None
    words = _words(table, rows, row, first, _ROUNDING_STREAM, BLOCK) if ROUNDED else None
    aligned = (param | grad | backup) % 16 == 0
    param, backup = param.to(tl.pointer_type(PARAM)), backup.to(tl.pointer_type(PARAM))
    grad = grad.to(tl.pointer_type(GRAD))
    if aligned & (first >= 0) & (first + BLOCK <= count):
        param, grad, backup = tl.multiple_of(param, 16), tl.multiple_of(grad, 16), tl.multiple_of(backup, 16)
        _perturb_block(param, grad, backup, scale, finite, keep, words, None, PARAM, COMPUTE, SAVED, ADAPTIVE, BLOCK)
    else:
        inside = _inside(first, count, BLOCK)
        _perturb_block(param, grad, backup, scale, finite, keep, words, inside, PARAM, COMPUTE, SAVED, ADAPTIVE, BLOCK)


@triton.jit(do_not_specialize=["rows"])
def _restore_kernel(table, rows, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """w <- backup, as integers: every bit of a NaN survives."""
    row, first = _locate(table, rows, BLOCK)
    count = _entry(table, rows, row, _COUNT)
    param = _block_address(table, rows, row, _PARAM, first, BITS)
    backup = _block_address(table, rows, row, _SOURCE, first, BITS)
    lane = tl.arange(0, BLOCK)
    aligned = (param | backup) % 16 == 0
    param, backup = param.to(tl.pointer_type(BITS)), backup.to(tl.pointer_type(BITS))
    if aligned & (first + BLOCK <= count):
        tl.store(tl.multiple_of(param, 16) + lane, tl.load(tl.multiple_of(backup, 16) + lane))
    else:
        inside = _inside(first, count, BLOCK)
        tl.store(param + lane, tl.load(backup + lane, mask=inside), mask=inside)


@triton.jit(do_not_specialize=["b", "k"])
def _select_top_kernel(before, after, out, b, k, KEY: tl.constexpr, BLOCK: tl.constexpr):
    """Ascending indices of the k largest after - before: radix selection on keys in the order of the differences."""
    BITS: tl.constexpr = KEY.primitive_bitwidth
    COMPUTE: tl.constexpr = tl.float64 if BITS == 64 else tl.float32
    lane = tl.arange(0, BLOCK)
    inside = lane < b
    x = tl.load(after + lane, mask=inside, other=0.0).to(COMPUTE)
    x -= tl.load(before + lane, mask=inside, other=0.0).to(COMPUTE)

    sign: tl.constexpr = 1 << (BITS - 1)
    largest: tl.constexpr = (1 << BITS) - 1
    bits = tl.where(x == 0, 0.0, x).to(KEY, bitcast=True)  # -0 is as large as +0
    key = tl.where(bits >= sign, largest - bits, bits + sign)
    key = tl.where(x != x, tl.full([BLOCK], largest, KEY), key)  # NaN is largest
    key = tl.where(inside, key, tl.zeros_like(key))  # no number's key is 0

    # The k-th largest key, two bits at a time from the top: of the four that the next two bits allow, the largest
    # with at least k keys that are not smaller.
    kth = tl.zeros([1], KEY)
    unit = tl.full([1], 1 << (BITS - 2), KEY)
    for _ in range(BITS // 2):
        candidate = kth + unit * tl.arange(0, 4).to(KEY)
        not_smaller = tl.sum((key[None, :] >= candidate[:, None]).to(tl.int32), axis=1)
        kth += unit * (tl.sum((not_smaller >= k).to(tl.int32), axis=0) - 1).to(KEY)
        unit = unit >> 2

    larger, tie = key > kth, key == kth
    ties_taken = k - tl.sum(larger.to(tl.int32))
    chosen = larger | (tie & (tl.cumsum(tie.to(tl.int32)) <= ties_taken))
    tl.store(out + tl.cumsum(chosen.to(tl.int32)) - 1, lane.to(tl.int64), mask=chosen)


# Triton reads TRITON_INTERPRET when a kernel is defined.
_INTERPRETED = not isinstance(_select_top_kernel, triton.runtime.JITFunction)


def _interpreter_obstacle() -> str | None:
    """Why Triton's interpreter, if it is asked for, cannot run what it is given; None if it can."""
    if not _INTERPRETED:
        return None
    import numpy  # which the interpreter needs, and the compiler does not

    versions = [tuple(map(int, module.__version__.split(".")[:2])) for module in (triton, numpy)]
    if versions[0] < (3, 7) and versions[1] >= (2, 4):
        return (
            f"the interpreter of Triton {triton.__version__} fails with NumPy {numpy.__version__}: take Triton 3.7 or "
            "newer, or NumPy before 2.4"
        )
    return None


_INTERPRETER_OBSTACLE = _interpreter_obstacle()


def unsupported(tensor: Tensor) -> str | None:
    """Why these kernels do not take a tensor as weights or losses; None if they do."""
    if _INTERPRETED and not tensor.is_cpu:
        return f"it is on {tensor.device}, and Triton's interpreter (TRITON_INTERPRET) reads only CPU memory"
    if _INTERPRETER_OBSTACLE:
        return _INTERPRETER_OBSTACLE
    if not _INTERPRETED and not tensor.is_cuda:
        return f"it is on {tensor.device}, and Triton's kernels run on CUDA devices (or with TRITON_INTERPRET=1)"
    if tensor.dtype not in _DTYPES:
        return f"it is {tensor.dtype}, and the kernels know {', '.join(map(str, _DTYPES))}"
    if not (tensor.is_contiguous() or is_dense(tensor)):
        return f"shape {list(tensor.shape)} with strides {list(tensor.stride())} leaves gaps in memory or overlaps"
    return None


def squared_norm(
    params: Sequence[Tensor], grads: Sequence[Tensor], adaptive: bool = False, mask: ElementMask | None = None
) -> Tensor:
    """‖m * |w|^a * g‖², summed over the lists."""
    grads = as_params_lie(params, grads, _reads)
    dtypes = [(param.dtype, grad.dtype) for param, grad in zip(params, grads)]
    tables = [
        (key, len(ids), *_table(ids, params, grads, mask=mask, block=_NORM_BLOCK)) for key, ids in _groups(dtypes)
    ]
    starts = list(accumulate((blocks for *_, blocks in tables), initial=0))
    out_dtype = torch.float64 if any(param.dtype == torch.float64 for param in params) else torch.float32
    if starts[-1] == 0:
        return params[0].new_zeros((), dtype=out_dtype)
    partials = params[0].new_empty(starts[-1], dtype=torch.float64)
    out = params[0].new_empty((), dtype=out_dtype)
    with torch.cuda.device_of(out):
        for ((param, grad), rows, table, blocks), start in zip(tables, starts):
            _squared_norm_kernel[(blocks,)](
                table,
                rows,
                partials,
                start,
                out,
                PARAM=_DTYPES[param],
                GRAD=_DTYPES[grad],
                ADAPTIVE=adaptive,
                MASKED=mask is not None and mask.beta < 1,
                BLOCK=_NORM_BLOCK,
                num_warps=_WARPS,
                enable_fp_fusion=False,
            )
    return out


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
    grads = as_params_lie(params, grads, _reads)
    norm = squared_norm(params, grads, adaptive, mask).sqrt() if norm is None else norm
    total = norm.to(params[0].device, non_blocking=True)
    launches = []
    for (param, grad), ids in _groups((param.dtype, grad.dtype) for param, grad in zip(params, grads)):
        table, blocks = _table(ids, params, grads, backups, coefficients, mask)
        launch = partial(
            _perturb_kernel[(blocks,)],
            table,
            len(ids),
            total,
            PARAM=_DTYPES[param],
            GRAD=_DTYPES[grad],
            SAVED=backups is not None,
            ADAPTIVE=adaptive,
            MASKED=mask is not None and mask.beta < 1,
            ROUNDED=mask is not None and param.itemsize < 4,
            BLOCK=_BLOCK,
            num_warps=_WARPS,
            enable_fp_fusion=False,
        )
        launches.append((launch, [tensors[i] for tensors in (params, backups or ()) for i in ids if tensors]))
    with torch.cuda.device_of(total):
        for launch, changed in launches:
            # One line: an exception between two would leave changed weights whose backups seem not to be written.
            increment_version((launch(), changed)[1])
    return norm


def restore_(params: Sequence[Tensor], backups: Sequence[Tensor]) -> None:
    """w <- backup, bit for bit."""
    tables = [(*group, *_table(group[1], params, backups)) for group in _groups(param.itemsize for param in params)]
    with torch.cuda.device_of(params[0]):
        for itemsize, ids, table, blocks in tables:
            _restore_kernel[(blocks,)](
                table, len(ids), BITS=_BITS[itemsize], BLOCK=_BLOCK, num_warps=_WARPS, enable_fp_fusion=False
            )
    increment_version(params)


def select_top(before: Tensor, after: Tensor, k: int) -> Tensor:
    """Ascending indices of the k largest after - before; ties go to the lower index, NaN counts as largest."""
    if len(before) > _MOST_SAMPLES:
        return reference.select_top(before, after, k)
    before, after = as_params_lie([before, before], [before, after], _reads)
    double = torch.float64 in (before.dtype, after.dtype)
    out = before.new_empty(k, dtype=torch.int64)
    block = max(32, triton.next_power_of_2(len(before)))
    with torch.cuda.device_of(out):
        _select_top_kernel[(1,)](
            before,
            after,
            out,
            len(before),
            k,
            KEY=tl.uint64 if double else tl.uint32,
            BLOCK=block,
            num_warps=_select_warps(block),
            enable_fp_fusion=False,
        )
    return out


def _select_warps(block: int) -> int:
    """Warps that select among so many samples: 8 samples a thread, more only where a program can have no more warps."""
    return min(16, max(1, block // 256))


def _reads(param: Tensor, tensor: Tensor) -> bool:
    return tensor.dtype in _DTYPES


def _groups(keys: Iterable[Hashable]) -> list[tuple[Any, list[int]]]:
    """The keys that differ, each with the places where it stands."""
    groups: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    return list(groups.items())


def _table(
    ids: list[int],
    params: Sequence[Tensor],
    sources: Sequence[Tensor],
    backups: Sequence[Tensor] | None = None,
    coefficients: Sequence[float] | None = None,
    mask: ElementMask | None = None,
    block: int = _BLOCK,
) -> tuple[Tensor, int]:
    """The table of some of the tensors, on their device, and the number of blocks that they have together.

    It travels from pinned memory without a sync. That memory comes from PyTorch's allocator, which does not hand it
    out again before the copy has run, nor, in a captured graph, before the graph is destroyed.
    """
    none = [0] * len(ids)
    counts = [params[i].numel() for i in ids]
    offsets = none if mask is None or mask.offsets is None else [mask.offsets[i] for i in ids]
    blocks = [-(-(count + offset % 4) // block) for count, offset in zip(counts, offsets)]
    first_blocks = list(accumulate(blocks, initial=0))
    words = array("Q", (0, 0, 0, 0) if mask is None else (mask.seed % 2**64, mask.step % 2**32, mask.threshold, 0))
    words.extend(first_blocks[:-1])
    words.extend(counts)
    words.extend(offsets)
    words.extend(none if mask is None else [mask.tensor_ids[i] for i in ids])
    words.extend([params[i].data_ptr() for i in ids])
    words.extend([sources[i].data_ptr() for i in ids])
    if coefficients is not None:
        words.extend(none if backups is None else [backups[i].data_ptr() for i in ids])
        words.frombytes(array("d", [coefficients[i] for i in ids]).tobytes())
    table = torch.frombuffer(words, dtype=torch.int64)
    if not _INTERPRETED:
        table = table.pin_memory().to(params[ids[0]].device, non_blocking=True)
    return table, first_blocks[-1]
