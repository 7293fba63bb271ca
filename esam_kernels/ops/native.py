"""The operators compiled from csrc/: C++ on the CPU and, where torch has CUDA and nvcc was found, CUDA.

setup.py builds them; what it could not build, and why, it leaves in a file beside the library, for `unsupported`.
"""

import hashlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch._C import _increment_version

from .reference import ElementMask, as_params_lie, compute_dtype, is_dense

_LIBRARY = Path(__file__).with_name("libesam_kernels.so")
_BUILD_RECORD = Path(__file__).with_name("native_build.json")
_DEVICES = ("cpu", "cuda")
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_ops = torch.ops.esam_kernels


def _load() -> dict[str, str]:
    """Load the library; for each device type that it has no operators for, why."""
    if not _BUILD_RECORD.exists():
        return dict.fromkeys(_DEVICES, "not built: install the package with pip, or run `setup.py build_ext --inplace`")
    try:
        missing, digest = _read_record()
        if "cpu" not in missing:
            _load_library(digest)
    except Exception as error:  # whatever is wrong with these two files, the other backends work
        why = f"built but not loadable: {error}"
        warnings.warn(
            f"esam_kernels' native operators are {why}; another backend serves instead. Install the package again",
            RuntimeWarning,
            stacklevel=2,
        )
        return dict.fromkeys(_DEVICES, why)
    return missing


def _read_record() -> tuple[dict[str, str], str | None]:
    """What setup.py wrote: for each device type without operators the reason, and the library's digest."""
    try:
        record = json.loads(_BUILD_RECORD.read_text())
    except ValueError as error:
        raise RuntimeError(f"{_BUILD_RECORD.name} is damaged ({error})") from error
    if not isinstance(record, dict) or not all(isinstance(value, str) for value in record.values()):
        raise RuntimeError(f"{_BUILD_RECORD.name} is damaged (it holds {record!r})")
    return {device: record[device] for device in _DEVICES if device in record}, record.get("sha256")


def _load_library(digest: str | None) -> None:
    # To load half a library can kill the process, so it is compared first.
    if digest is not None and hashlib.sha256(_LIBRARY.read_bytes()).hexdigest() != digest:
        raise RuntimeError(f"{_LIBRARY.name} is damaged (it is not the one that was built)")
    torch.ops.load_library(_LIBRARY)
    torch.library.register_fake("esam_kernels::squared_norm", _norm_fake)
    torch.library.register_fake("esam_kernels::perturb_", lambda *_: None)
    torch.library.register_fake("esam_kernels::norm_and_perturb_", _norm_fake)
    torch.library.register_fake("esam_kernels::restore_", lambda *_: None)
    torch.library.register_fake("esam_kernels::select_top", lambda before, _, k: before.new_empty(k, dtype=torch.int64))


def _norm_fake(params: Sequence[Tensor], *_: object) -> Tensor:
    wide = any(param.dtype == torch.float64 for param in params)
    return params[0].new_empty((), dtype=torch.float64 if wide else torch.float32)


_MISSING = _load()


def unsupported(tensor: Tensor) -> str | None:
    """Why these operators do not take a weight like ``tensor``, or None if they do."""
    device = "cpu" if tensor.is_cpu else tensor.device.type  # is_cpu is the quicker question
    if device not in _DEVICES:
        return f"there are no operators for {device}"
    if device in _MISSING:
        return _MISSING[device]
    if tensor.dtype not in _DTYPES:
        return f"{tensor.dtype} is not float32, float64, bfloat16 or float16"
    if tensor.layout != torch.strided:
        return f"its layout is {tensor.layout}"
    if not (tensor.is_contiguous() or is_dense(tensor)):
        return "its elements lie in memory with gaps or overlaps"
    return None


def squared_norm(
    params: Sequence[Tensor], grads: Sequence[Tensor], adaptive: bool = False, mask: ElementMask | None = None
) -> Tensor:
    """‖m * |w|^a * g‖², summed over the lists."""
    return _ops.squared_norm(params, as_params_lie(params, grads, _reads), adaptive, *_mask_arguments(mask))


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
    saved = [] if backups is None else backups
    lists, bits = (params, as_params_lie(params, grads, _reads), saved, coefficients), _mask_arguments(mask)
    changed = [*params, *saved]
    # One line, and no Python between the two calls: a backup's version tells whether the operator has run.
    if norm is None:
        norm = _ops.norm_and_perturb_(*lists, adaptive, *bits); _increment_version(changed)  # fmt: skip # noqa: E702
    else:
        total = norm.to(params[0].device, norm.dtype if norm.dtype == torch.float64 else torch.float32)
        _ops.perturb_(*lists, total, adaptive, *bits); _increment_version(changed)  # fmt: skip # noqa: E702
    return norm


def restore_(params: Sequence[Tensor], backups: Sequence[Tensor]) -> None:
    """w <- backup, bit for bit."""
    _ops.restore_(params, backups)
    _increment_version(params)


def select_top(before: Tensor, after: Tensor, k: int) -> Tensor:
    """Ascending indices of the k largest after - before; ties go to the lower index, NaN counts as largest."""
    return _ops.select_top(before, after, k)


def _reads(param: Tensor, grad: Tensor) -> bool:
    return grad.dtype == param.dtype or grad.dtype == compute_dtype(param)


def _mask_arguments(mask: ElementMask | None) -> tuple[int, int, int, Sequence[int], Sequence[int]]:
    """A mask as the operators take it: seed (as a signed integer), step, threshold, tensor ids, offsets."""
    if mask is None:
        return 0, 0, 0, [], []
    seed = (mask.seed + 2**63) % 2**64 - 2**63
    offsets = mask.offsets if mask.offsets is not None else [0] * len(mask.tensor_ids)
    return seed, mask.step & 0xFFFFFFFF, mask.threshold, mask.tensor_ids, offsets
