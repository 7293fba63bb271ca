"""The native operators as torch operators, and what happens without them; test_operators.py has their values."""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from esam_kernels import ops
from esam_kernels.ops import native
from esam_kernels.ops.reference import ElementMask

ROOT = Path(__file__).parents[2]
WHY_NOT = native.unsupported(torch.ones(1))
built = pytest.mark.skipif(WHY_NOT is not None, reason=f"native CPU operators: {WHY_NOT}")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = ((5,), (40, 33), (70_001,), (), (0,), (8, 4, 3, 3))


def make_lists(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    # Uniform numbers: randn's bits depend on the instruction set.
    params = [(torch.rand(shape, generator=generator) - 0.5).to(dtype) for shape in SHAPES]
    grads = [(torch.rand(shape, generator=generator) - 0.5).to(dtype) for shape in SHAPES]
    mask = ElementMask(seed=1, step=2, tensor_ids=range(len(SHAPES)), beta=0.5)
    return params, grads, [torch.zeros_like(param) for param in params], [0.05] * len(SHAPES), mask


def perturbed(dtype):
    """The norm, and the weights after a perturbation with everything that is optional."""
    params, grads, backups, coefficients, mask = make_lists(dtype)
    norm = native.squared_norm(params, grads, True, mask).sqrt()
    again = native.perturb_(params, grads, backups, coefficients, None, True, mask)
    native.perturb_(params, grads, backups, coefficients, norm, True, mask)
    return [norm, again, *params]


@built
@pytest.mark.parametrize("adaptive", [False, True])
def test_opcheck(adaptive):
    params, grads, backups, coefficients, mask = make_lists()
    operators, bits = torch.ops.esam_kernels, native._mask_arguments(mask)
    calls = {
        operators.squared_norm.default: (params, grads, adaptive, *bits),
        operators.perturb_.default: (params, grads, backups, coefficients, torch.tensor(1.0), adaptive, *bits),
        operators.norm_and_perturb_.default: (params, grads, backups, coefficients, adaptive, *bits),
        operators.restore_.default: (params, backups),
        operators.select_top.default: (torch.rand(9), torch.rand(9), 4),
    }
    for operator, arguments in calls.items():
        torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("backend", [pytest.param("native", marks=built), "reference"])
def test_compiles_without_graph_break(backend):
    params, grads, backups, coefficients, mask = make_lists()
    before, after = torch.rand(9), torch.rand(9)

    def step(params):
        norm = ops.squared_norm(params, grads, mask=mask).sqrt()
        ops.perturb_(params, grads, backups, coefficients, norm, mask=mask)
        norm = ops.perturb_(params, grads, backups, coefficients, mask=mask)
        moved = [param.clone() for param in params]
        ops.restore_(params, backups)
        return [norm, ops.select_top(before, after, 4), *moved, *params]

    with ops.use_backend(backend):
        expected = step([param.clone() for param in params])
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(params)
    for a, b in zip(expected, compiled, strict=True):
        assert torch.equal(a, b)


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_number_of_threads_changes_no_bit(dtype):
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            results.append(perturbed(dtype))
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@built
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_instruction_set_changes_no_bit(capability, tmp_path):
    code = "import sys, torch, test_native as t; torch.save([t.perturbed(d) for d in t.DTYPES], sys.argv[1])"
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code, tmp_path / "results.pt"], env=environment, check=True)
    for dtype, results in zip(DTYPES, torch.load(tmp_path / "results.pt"), strict=True):
        for a, b in zip(perturbed(dtype), results, strict=True):
            assert torch.equal(a, b)


@built
def test_autograd_sees_the_mutations():
    params, grads, backups, coefficients, _ = make_lists()
    weight = params[1].requires_grad_()
    loss = (weight * weight).sum()
    with torch.no_grad():
        native.perturb_(params, grads, backups, coefficients, torch.tensor(1.0))
    assert all(tensor._version == 1 for tensor in (*params, *backups))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.no_grad():
        native.restore_(params, backups)
    assert all(param._version == 2 for param in params)


@built
@pytest.mark.parametrize("norm", [torch.tensor(1.0), None])
def test_version_tells_whether_a_backup_is_whole(norm):
    """An exception at any line of Python, torch's own included, leaves a weight or a whole backup of it."""
    perturbed(torch.float32)  # torch runs fewer lines once it has looked an operator up
    for stop in range(1, 10_000):
        params, grads, backups, coefficients, _ = make_lists()
        grads[1] = torch.zeros(33, 40).t()  # a layout that takes the way round
        before = [param.clone() for param in params]
        lines = 0

        def tracer(frame, event, arg, stop=stop):
            nonlocal lines
            lines += event == "line"
            if event == "line" and lines == stop:
                raise InterruptedError
            return tracer

        with suppress(InterruptedError):
            sys.settrace(tracer)
            try:
                native.perturb_(params, grads, backups, coefficients, norm)
            finally:
                sys.settrace(None)
        for param, backup, original in zip(params, backups, before, strict=True):
            assert torch.equal(backup if backup._version else param, original)
        if lines < stop:
            return
    pytest.fail("the operator never finished")


@built
def test_gradients_that_differ_in_layout_and_dtype():
    params, grads, backups, coefficients, _ = make_lists()
    moved = [param.clone(memory_format=torch.channels_last) if param.dim() == 4 else param.clone() for param in params]
    other_grads = [grad.double() for grad in grads]
    other_grads[1] = torch.zeros(33, 40, 2)[..., 0].t().copy_(grads[1])
    other_backups = [torch.zeros_like(param) for param in moved]
    norm = native.squared_norm(params, grads).sqrt()
    torch.testing.assert_close(native.squared_norm(moved, other_grads).sqrt(), norm, rtol=1e-6, atol=0)

    originals = [param.clone() for param in params]
    native.perturb_(params, grads, backups, coefficients, norm)
    native.perturb_(moved, other_grads, other_backups, coefficients, norm)
    for param, other, backup, original in zip(params, moved, other_backups, originals, strict=True):
        assert torch.equal(param, other)
        assert torch.equal(backup, original)
    native.restore_(moved, other_backups)
    for param, original in zip(moved, originals, strict=True):
        assert torch.equal(param, original)


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lists_larger_than_the_caches(dtype):
    """Their backups take another path through memory; the last one is not aligned for it."""
    sizes = (4_000_003, 5_000_001, 7)
    params = [torch.arange(size).remainder(97).to(dtype) for size in sizes]
    originals = [param.clone() for param in params]
    backups = [torch.empty_like(param) for param in params[:-1]] + [torch.empty(8, dtype=dtype)[1:]]
    native.perturb_(params, params, backups, [1 + 1e-12] * 3, torch.tensor(1.0))
    for param, backup, original in zip(params, backups, originals, strict=True):
        assert torch.equal(backup, original)
        assert torch.equal(param, 2 * original)
    native.restore_(params, backups)
    for param, original in zip(params, originals, strict=True):
        assert torch.equal(param, original)
    native.perturb_(params, originals, None, [1 + 1e-12] * 3, torch.tensor(1.0))
    for param, original in zip(params, originals, strict=True):
        assert torch.equal(param, 2 * original)


@built
def test_operators_refuse_what_they_cannot_read():
    params, grads, backups, coefficients, _ = make_lists()
    operators, no_bits = torch.ops.esam_kernels, native._mask_arguments(None)
    norm = torch.tensor(1.0)
    with pytest.raises(RuntimeError, match="memory layout"):
        operators.squared_norm(params[1:2], [torch.ones(33, 40).t()], False, *no_bits)
    with pytest.raises(RuntimeError, match="without gaps or overlaps"):
        operators.restore_([torch.ones(4)[::2]], [torch.ones(2)])
    with pytest.raises(RuntimeError, match="dtype of params"):
        operators.perturb_(params[:1], [grads[0].double()], backups[:1], coefficients[:1], norm, False, *no_bits)
    with pytest.raises(RuntimeError, match="coefficients"):
        operators.perturb_(params, grads, backups, coefficients[:1], norm, False, *no_bits)
    with pytest.raises(RuntimeError, match="one id for each tensor"):
        operators.squared_norm(params, grads, False, 1, 2, 3, [0], [0])
    with pytest.raises(RuntimeError, match="cannot be selected"):
        operators.select_top(torch.rand(3), torch.rand(3), 4)
    assert all(not tensor._version for tensor in (*params, *backups))


@built
def test_explain_names_native_or_the_obstacle():
    assert ops.explain(torch.ones(2)) == "native"
    obstacles = {
        "torch.float8_e5m2": torch.ones(2).to(torch.float8_e5m2),
        "gaps or overlaps": torch.ones(4)[::2],
        "sparse_coo": torch.eye(2).to_sparse(),
    }
    for why, tensor in obstacles.items():
        assert ops.explain(tensor).startswith("reference; not native: ")
        assert why in ops.explain(tensor)
    assert "no operators for meta" in native.unsupported(torch.ones(2, device="meta"))
