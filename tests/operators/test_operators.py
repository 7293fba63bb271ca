"""What every backend promises of every operator, each promise a test. All backends run the same tests.

A backend is skipped on devices that it does not serve. Without a GPU, Triton's kernels run in its interpreter on CPU
tensors; it cuts a cast to bf16 off where a GPU rounds to nearest, which the error bound covers.
"""

import math
import os
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from esam_kernels import ops
from esam_kernels.ops import ElementMask, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LOW = [torch.bfloat16, torch.float16]
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]

# The interpreter computes with numpy, which warns of what these tests do on purpose.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

drawn = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
# Fewer where each takes long, as in the emulator.
EXAMPLES = float(os.environ.get("ESAM_TEST_EXAMPLES", 1))
few, many = (settings(drawn, max_examples=round(EXAMPLES * number)) for number in (32, 64))


@pytest.fixture(params=[(name, device) for name in ops._MODULES for device in DEVICES], ids="-".join)
def device(request):
    """A device, while one backend is forced to serve it."""
    name, device = request.param
    with ops.use_backend(name):
        served = ops.explain(torch.zeros(1, device=device))
        if not served.startswith(name):
            pytest.skip(served)
        yield device


# ---- Tensors of all kinds


@dataclass
class Kind:
    """How one weight, its gradient and its backup are made."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str  # the weight's
    grad_layout: str
    grad_dtype: torch.dtype
    backup_layout: str
    tensor_id: int
    offset: int


def lay_out(values, layout):
    """The same values in another memory layout."""
    if layout == "transposed" and values.dim() >= 2:
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "channels_last" and values.dim() == 4:
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "misaligned":
        return values.new_empty(values.numel() + 1)[1:].view(values.shape).copy_(values)
    if layout == "gaps":
        return torch.stack([values, values], dim=-1)[..., 0]
    if layout == "expanded" and values.dim() >= 1 and values.shape[0] > 1:
        return values[:1].expand(values.shape)
    return values.clone(memory_format=torch.contiguous_format)


LAYOUTS = ["contiguous", "transposed", "channels_last", "misaligned", "gaps"]
SHAPES = [(), (0,), (1,), (3, 0, 2), (7,), (2, 3), (33, 5), (4, 3, 3, 3), (5, 8, 1, 1), (4096,), (4099,), (3, 2731)]
kinds = st.builds(
    Kind,
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    grad_layout=st.sampled_from([*LAYOUTS, "expanded"]),
    grad_dtype=st.sampled_from(DTYPES),
    backup_layout=st.sampled_from(["like the weight", "contiguous"]),
    tensor_id=st.integers(0, 2**32 - 1),
    offset=st.sampled_from([0, 1, 4, 7, 2**32 - 2, 2**34 + 3]),
)
lists_of_kinds = st.lists(kinds, min_size=1, max_size=4)
seeds = st.integers(0, 2**64 - 1)


def make(kinds, seed, device):
    """Weights and gradients of these kinds, of magnitudes from 2^-8 to 2^8."""
    generator = torch.Generator().manual_seed(seed % 2**63)

    def values(shape):
        exponents = torch.randint(-8, 8, shape, generator=generator)
        return torch.randn(shape, generator=generator, dtype=torch.float64) * 2.0**exponents

    params = [lay_out(values(k.shape).to(device, k.dtype), k.layout) for k in kinds]
    grads = [lay_out(values(k.shape).to(device, k.grad_dtype), k.grad_layout) for k in kinds]
    return params, grads


def make_backups(kinds, params):
    formats = {"like the weight": torch.preserve_format, "contiguous": torch.contiguous_format}
    return [torch.empty_like(p, memory_format=formats[k.backup_layout]) for k, p in zip(kinds, params)]


def make_mask(kinds, seed, beta):
    """No mask if beta is None."""
    if beta is None:
        return None
    return ElementMask(seed, seed >> 7, [k.tensor_id for k in kinds], beta, [k.offset for k in kinds])


def bits(tensor):
    """A tensor's bits, to compare NaN and signed zeros as well."""
    return tensor.contiguous().view(INTEGERS[tensor.element_size()])


def exact(tensor):
    """A tensor in numpy's widest float."""
    return tensor.double().cpu().numpy().astype(np.longdouble)


def ulp(x, dtype):
    """The distance between neighbouring numbers of a dtype at magnitude x."""
    info = torch.finfo(dtype)
    _, exponent = np.frexp(np.maximum(x, np.longdouble(info.smallest_normal)))
    return np.ldexp(np.longdouble(info.eps), exponent - 1)


# ---- squared_norm


@few
@given(lists_of_kinds, seeds, st.booleans(), st.sampled_from([None, 1.0, 0.6]))
def test_squared_norm_is_that_of_float64(device, kinds, seed, adaptive, beta):
    params, grads = make(kinds, seed, device)
    mask = make_mask(kinds, seed, beta)
    result = ops.squared_norm(params, grads, adaptive, mask)

    expected = np.longdouble(0)
    for i, (param, grad) in enumerate(zip(params, grads)):
        x = exact(grad) * exact(param) if adaptive else exact(grad)
        expected += ((x * exact(mask.keep(i, param))) ** 2).sum() if mask else (x**2).sum()
    assert result.shape == ()
    assert result.dtype == (torch.float64 if any(k.dtype == torch.float64 for k in kinds) else torch.float32)
    assert result.item() == pytest.approx(float(expected), rel=1e-6)


def test_squared_norm_keeps_its_digits_over_many_elements(device):
    grad = torch.rand(300_000, generator=torch.Generator().manual_seed(0)).to(device)
    assert ops.squared_norm([grad], [grad]).item() == pytest.approx(grad.double().square().sum().item(), rel=1e-6)


def test_squared_norm_is_bit_identical_from_run_to_run(device):
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(n, generator=generator).to(device, d) for d in DTYPES for n in (70_001, 5, 9000)]
    first, *others = [ops.squared_norm(grads, grads) for _ in range(200 if device == "cuda" else 2)]
    assert all(torch.equal(bits(other), bits(first)) for other in others)


# ---- perturb_ and restore_


# Of no elements, torch calls any strides contiguous.
EMPTY = Kind((3, 0, 2), torch.float32, "gaps", "transposed", torch.float32, "contiguous", tensor_id=0, offset=0)


@few
@given(lists_of_kinds, seeds, st.booleans(), st.sampled_from([None, 1.0, 0.6]))
@example([EMPTY, replace(EMPTY, shape=(2, 3), layout="contiguous")], 0, False, None)
def test_perturb_saves_every_bit_moves_within_the_bound_and_restore_undoes_it(device, kinds, seed, adaptive, beta):
    params, grads = make(kinds, seed, device)
    mask = make_mask(kinds, seed, beta)
    coefficients = [0.05 * (i + 1) for i in range(len(kinds))]
    norm = ops.squared_norm(params, grads, adaptive, mask).sqrt()
    before = [param.clone() for param in params]
    backups = make_backups(kinds, params)

    ops.perturb_(params, grads, backups, coefficients, norm, adaptive, mask)
    for i, (param, grad, backup, w, coefficient) in enumerate(zip(params, grads, backups, before, coefficients)):
        assert torch.equal(bits(backup), bits(w))
        compute = np.float64 if param.dtype == torch.float64 else np.float32
        scale = np.longdouble(compute(coefficient) / (compute(norm.item()) + compute(1e-12)))
        g = exact(grad.to(reference.compute_dtype(param)))
        e = scale * g * (exact(w) ** 2 if adaptive else 1) * (exact(mask.keep(i, param)) if mask else 1)
        largest = np.maximum(np.maximum(abs(exact(w)), abs(e)), abs(exact(w) + e))
        # Sums in bf16 and fp16 are rounded to fp32 first: hence the last factor.
        bound = (3 if adaptive else 1) * ulp(largest, param.dtype) * (1 + 2.0**-12)
        assert (abs(exact(param) - (exact(w) + e)) <= bound).all()

    ops.restore_(params, backups)
    assert all(torch.equal(bits(param), bits(w)) for param, w in zip(params, before))


@few
@given(lists_of_kinds, seeds, st.booleans(), st.sampled_from([None, 1.0, 0.6]))
def test_perturb_computes_the_norm_that_it_is_not_given(device, kinds, seed, adaptive, beta):
    (params, grads), (others, _) = make(kinds, seed, device), make(kinds, seed, device)
    mask = make_mask(kinds, seed, beta)
    coefficients = [0.05 * (i + 1) for i in range(len(kinds))]
    squared_norm = ops.squared_norm(params, grads, adaptive, mask)
    norm, results = None, []
    for weights in (others, params):
        backups = [torch.empty_like(weight) for weight in weights]
        norm = ops.perturb_(weights, grads, backups, coefficients, norm, adaptive, mask)
        results.append([*weights, *backups])
    for a, b in zip(*results):
        assert torch.equal(bits(a), bits(b))
    assert norm.dtype == squared_norm.dtype
    # Not to the bit: torch's own square root on a CPU is not always the nearest.
    torch.testing.assert_close(norm, squared_norm.sqrt(), rtol=torch.finfo(norm.dtype).eps, atol=0)


@few
@given(lists_of_kinds, seeds, st.booleans(), st.sampled_from([None, 0.6]), st.booleans())
def test_weights_backed_up_before_move_as_those_that_perturb_saves(device, kinds, seed, adaptive, beta, given_norm):
    (params, grads), (others, _) = make(kinds, seed, device), make(kinds, seed, device)
    mask = make_mask(kinds, seed, beta)
    coefficients = [0.05 * (i + 1) for i in range(len(kinds))]
    norm = ops.squared_norm(params, grads, adaptive, mask).sqrt() if given_norm else None
    # Of the weights' own layouts: others lead to another backend, whose norm may differ in its last bit.
    saved, backups = list(map(torch.empty_like, params)), list(map(torch.empty_like, others))
    expected_norm = ops.perturb_(params, grads, saved, coefficients, norm, adaptive, mask)

    versions = [backup._version for backup in backups]
    ops.back_up_(others, backups)
    assert all(backup._version > version for backup, version in zip(backups, versions))
    found_norm = ops.perturb_(others, grads, None, coefficients, norm, adaptive, mask)
    assert torch.equal(bits(found_norm), bits(expected_norm))
    for a, b in zip([*params, *saved], [*others, *backups]):
        assert torch.equal(bits(a), bits(b))

    served = ops.Served(others)
    moved, copies = [bits(other) for other in others], served.back_up()
    served.restore_(backups)
    assert all(torch.equal(bits(other), bits(backup)) for other, backup in zip(others, saved))
    assert torch.equal(bits(served.perturb_(grads, coefficients, norm, adaptive, mask)), bits(expected_norm))
    for other, copy, before in zip(others, copies, moved):
        assert torch.equal(bits(other), before)
        assert torch.equal(bits(copy), before)


@few
@given(lists_of_kinds, seeds, st.sampled_from([0.0, 0.3, 0.6, 1 - 2.0**-33]))
def test_the_elements_that_move_are_those_of_the_mask(device, kinds, seed, beta):
    params, _ = make(kinds, seed, device)
    mask = make_mask(kinds, seed, beta)
    for param in params:
        param.zero_()
    grads = [torch.ones_like(param) for param in params]
    ops.perturb_(
        params, grads, make_backups(kinds, params), [1.0] * len(kinds), torch.ones((), device=device), mask=mask
    )
    for i, param in enumerate(params):
        assert torch.equal(param != 0, mask.keep(i, param))


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("spacing", [2.0**-3, 2.0**-24])  # of the weights: normal numbers, and fp16's subnormal ones
def test_stochastic_rounding_takes_the_same_bits_everywhere(device, dtype, spacing):
    generator = torch.Generator().manual_seed(0)
    # Sums that are exact in fp32, so that only the last rounding is compared.
    w, g = (torch.randint(-64, 64, (5000,), generator=generator).to(dtype) * n for n in (spacing, spacing * 2.0**-6))
    mask = ElementMask(seed=11, step=3, tensor_ids=[5], offsets=[2**33 + 1])
    expected = reference.round_stochastically(w.float() + g.float(), dtype, mask.words(0, w, reference.ROUNDING_STREAM))
    param = w.to(device)
    ops.perturb_(
        [param], [g.float().to(device)], [torch.empty_like(param)], [1.0], torch.ones((), device=device), mask=mask
    )
    assert torch.equal(bits(param.cpu()), bits(expected))


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("w", [1.0, -3.0, 2.0**-14, 5 * 2.0**-24, 0.0])
def test_stochastic_rounding_is_right_on_average(device, dtype, w):
    count = 40_000
    param = torch.full((count,), w, dtype=dtype, device=device)
    ulp_w = float(ulp(abs(w), dtype)) if dtype == torch.float16 or w else 2.0**-10
    e = 0.3 * ulp_w
    grad = torch.full((count,), e, device=device)
    mask = ElementMask(seed=1, step=2, tensor_ids=[3])
    ops.perturb_([param], [grad], [torch.empty_like(param)], [1.0], torch.ones((), device=device), mask=mask)
    moved = (param.double() - w).mean().item()
    # Each of the weights moves by a whole ulp or not at all: a standard deviation of 0.46 ulp.
    assert moved == pytest.approx(e, abs=5 * 0.46 * ulp_w / math.sqrt(count))


@pytest.mark.parametrize("dtype", LOW)
def test_stochastic_rounding_saturates_and_lets_nan_pass(device, dtype):
    largest = torch.finfo(dtype).max
    param = torch.tensor([largest, -largest, 1.0, math.inf], dtype=dtype, device=device)
    grad = torch.tensor([largest, -largest, math.nan, 1.0], device=device) * 1e-3
    mask = ElementMask(seed=1, step=2, tensor_ids=[3])
    ops.perturb_([param], [grad], [torch.empty_like(param)], [1.0], torch.ones((), device=device), mask=mask)
    assert param.tolist() == pytest.approx([largest, -largest, math.nan, math.inf], nan_ok=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("masked", [False, True])
def test_a_norm_that_is_not_finite_perturbs_nothing(device, dtype, value, masked):
    w = torch.linspace(-1, 1, 50).to(device, dtype)
    param, backup, grad = w.clone(), torch.zeros_like(w), torch.full_like(w, value)
    mask = ElementMask(seed=1, step=2, tensor_ids=[3], beta=0.5) if masked else None
    ops.perturb_([param], [grad], [backup], [1.0], torch.tensor(value, device=device), True, mask)
    assert torch.equal(param, w)
    assert torch.equal(backup, w)


def test_a_gradient_of_zero_moves_nothing(device):
    w = torch.linspace(-1, 1, 50, device=device)
    param, grad = w.clone(), torch.zeros_like(w)
    ops.perturb_([param], [grad], [torch.empty_like(w)], [1.0], ops.squared_norm([param], [grad]).sqrt())
    assert torch.equal(param, w)


@pytest.mark.parametrize("dtype", DTYPES)
def test_restore_keeps_the_payload_of_nan_and_the_sign_of_zero(device, dtype):
    integer = INTEGERS[dtype.itemsize]
    info = torch.iinfo(integer)
    patterns = torch.tensor([info.max, info.max - 3, -1, -5, info.min, 0, 1], dtype=integer, device=device)
    backup, param = patterns.view(dtype), torch.zeros(7, dtype=dtype, device=device)
    ops.restore_([param], [backup])
    assert torch.equal(bits(param), patterns)


def test_version_counters_move_so_that_autograd_notices(device):
    w = torch.ones(3, device=device, requires_grad=True)
    grad, backup = torch.ones(3, device=device), torch.empty(3, device=device)
    for change in (
        lambda: ops.perturb_([w], [grad], [backup], [1.0], torch.ones((), device=device)),
        lambda: ops.restore_([w], [backup]),
    ):
        loss = (w * w).sum()
        versions = w._version, backup._version
        change()
        assert w._version > versions[0]
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    assert backup._version > 0


def test_empty_tensors_alone(device):
    empty = [torch.empty(0, device=device), torch.empty(2, 0, device=device, dtype=torch.bfloat16)]
    assert ops.squared_norm(empty, empty).item() == 0
    assert ops.perturb_(empty, empty, empty, [1.0, 1.0]).item() == 0
    ops.restore_(empty, empty)


# ---- select_top


def chosen_by_sorting(before, after, k):
    compute = torch.float64 if torch.float64 in (before.dtype, after.dtype) else torch.float32
    difference = (after.to(compute) - before.to(compute)).tolist()
    return sorted(sorted(range(len(before)), key=lambda i: (not math.isnan(difference[i]), -difference[i], i))[:k])


losses = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 2.0, 1e-8, 3e38, -3e38, math.inf, -math.inf, math.nan])


@many
@given(st.lists(st.tuples(losses, losses), min_size=1, max_size=70), st.data())
def test_select_top_takes_exactly_the_k_largest(device, pairs, data):
    k = data.draw(st.integers(1, len(pairs)))
    before, after = (
        torch.tensor(column, dtype=torch.float64).to(data.draw(st.sampled_from(DTYPES))) for column in zip(*pairs)
    )
    result = ops.select_top(before.to(device), after.to(device), k)
    assert result.dtype == torch.int64
    assert result.tolist() == chosen_by_sorting(before, after, k)


def test_select_top_holds_both_zeros_for_equal(device):
    before, after = torch.zeros(3, device=device), torch.tensor([-0.0, 0.0, -0.0], device=device)
    assert [ops.select_top(before, after, k).tolist() for k in (1, 2)] == [[0], [0, 1]]


@pytest.mark.parametrize("b", [1, 31, 128, 1000, 4096, 5000, 16384, 16385])
def test_select_top_at_every_size(device, b):
    generator = torch.Generator().manual_seed(b)
    before = torch.randn(b, generator=generator)
    after = before + torch.randint(-50, 50, (b,), generator=generator) / 8  # with ties
    for k in {1, (b + 1) // 2, b}:
        result = ops.select_top(before.to(device), after.to(device), k)
        assert result.tolist() == chosen_by_sorting(before, after, k)


@pytest.mark.filterwarnings("error")
def test_select_top_of_losses_that_require_grad(device):
    before, after = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)).to(device)
    expected = chosen_by_sorting(before, after, 20)
    result = ops.select_top(before.requires_grad_(), after.requires_grad_(), 20)
    assert not result.requires_grad
    assert result.tolist() == expected


def test_select_top_of_losses_that_are_not_contiguous(device):
    table = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    before, after = table[:, 0].contiguous(), table[:, 2]
    assert ops.select_top(before.to(device), after.to(device), 7).tolist() == chosen_by_sorting(before, after, 7)
    assert ops.select_top(after.to(device), before.to(device), 7).tolist() == chosen_by_sorting(after, before, 7)


# ---- Masks


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(counter, key, expected):
    """The known answers that Random123, by the generator's authors, ships for Philox4x32-10."""
    assert philox_in_integers(counter, key) == expected
    assert tuple(int(word) for word in reference.philox4x32(tuple(map(torch.tensor, counter)), key)) == expected


def philox_in_integers(counter, key):
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


@many
@given(seeds, st.integers(0, 2**33), st.integers(0, 2**32 - 1), st.integers(0, 2**40), st.integers(0, 20))
def test_element_words_count_as_documented(seed, step, tensor_id, offset, count):
    for stream in (reference.ELEMENT_STREAM, reference.ROUNDING_STREAM):
        words = reference.element_words(seed, step, tensor_id, stream, offset, count, torch.device("cpu"))
        for j, word in enumerate(words.tolist(), start=offset):
            counter = ((j // 4) % 2**32, stream << 24 | j // 4 >> 32, tensor_id, step % 2**32)
            assert word == philox_in_integers(counter, (seed % 2**32, seed >> 32))[j % 4]


def test_a_shard_has_the_mask_of_its_place_in_the_whole():
    whole = ElementMask(seed=5, step=6, tensor_ids=[7], beta=0.4).keep(0, torch.empty(100))
    shard = ElementMask(seed=5, step=6, tensor_ids=[7], beta=0.4, offsets=[37]).keep(0, torch.empty(30))
    assert torch.equal(shard, whole[37:67])


def test_a_mask_counts_in_memory_order():
    mask = ElementMask(seed=5, step=6, tensor_ids=[7], beta=0.4)
    weight = torch.empty(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    kept = mask.keep(0, weight)
    assert torch.equal(kept.permute(0, 2, 3, 1).reshape(-1), mask.keep(0, torch.empty(120)))


@pytest.mark.parametrize("beta", [0.1, 0.6])
def test_a_mask_keeps_the_share_beta(beta):
    kept = ElementMask(seed=5, step=6, tensor_ids=[7], beta=beta).keep(0, torch.empty(100_000))
    assert kept.double().mean().item() == pytest.approx(beta, abs=5 * math.sqrt(beta * (1 - beta) / 100_000))


# ---- Indices beyond 31 bits


def test_blocks_beyond_2_31_elements_find_their_addresses_and_words(device):
    """Of a tensor with more elements only the last blocks are worked on, as if the launch began there."""
    triton_kernels = pytest.importorskip("esam_kernels.ops.triton_kernels")
    if triton_kernels.unsupported(torch.zeros(1, device=device)) or not ops.explain(W.to(device)).startswith("triton"):
        pytest.skip("reaches into the Triton backend's table")
    block, count = triton_kernels._BLOCK, 2**31 + 5000
    param, backup = (torch.empty(count, dtype=torch.float16, device=device) for _ in range(2))
    tail = param[2**31 :].fill_(1.0)
    grad_tail = torch.ones_like(tail)
    mask = ElementMask(seed=1, step=2, tensor_ids=[3], beta=0.5)

    table, blocks = triton_kernels._table([0], [param], [param], [backup], [1.0], mask)
    header = triton_kernels._HEADER.value
    assert table[header] == 0
    assert table[header + 1] == count
    skipped = 2**31 // block
    table[header] -= skipped  # the row's first block: program 0 gets the block of element 2^31
    table[header + 5] = grad_tail.data_ptr() - 2**31 * 2  # read only from its tail on, so only that is there
    triton_kernels._perturb_kernel[(blocks - skipped,)](
        table,
        1,
        torch.ones((), device=device),
        PARAM=triton_kernels._DTYPES[param.dtype],
        GRAD=triton_kernels._DTYPES[grad_tail.dtype],
        SAVED=True,
        ADAPTIVE=False,
        MASKED=True,
        ROUNDED=True,
        BLOCK=block,
    )
    shard = ElementMask(seed=1, step=2, tensor_ids=[3], beta=0.5, offsets=[2**31])
    assert torch.equal(tail == 2, shard.keep(0, tail))
    assert torch.equal(backup[2**31 :], torch.ones_like(tail))


# ---- Input that does not fit is refused, with the value and the fix, before anything has changed

W, U, V = torch.ones(2, 3), torch.ones(2, 3), torch.ones(3, 2)
ONE = torch.tensor(1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.squared_norm([], []), "got no params: give at least one"),
        (lambda: ops.squared_norm([W], []), "got 1 params but 0 grads: give one for each"),
        (lambda: ops.squared_norm([W], [V]), r"grads\[0\] has shape .*3, 2.* params\[0\] .*2, 3.*: give the same"),
        (lambda: ops.squared_norm([W.int()], [W]), "params has a tensor of torch.int32: one of float64, float32"),
        (lambda: ops.squared_norm([W], [W.to("meta")]), r"grads\[0\] has device meta, params\[0\] cpu: give the same"),
        (
            lambda: ops.squared_norm([W], [W], mask=ElementMask(0, 0, [1, 2])),
            "got 1 params but a mask for 2: give one id for each",
        ),
        (
            lambda: ops.squared_norm([W], [W], mask=ElementMask(0, 0, [1], offsets=[])),
            "got 1 params but 0 mask offsets: give one for each",
        ),
        (
            lambda: ops.perturb_([W], [W], [W.double()], [1.0], ONE),
            r"backups\[0\] has dtype torch.float64.*give the same",
        ),
        (lambda: ops.perturb_([W], [W], [W], [1.0, 2.0], ONE), "got 1 params but 2 coefficients: give one for each"),
        (lambda: ops.perturb_([W], [W], [W], [1.0], ONE[None]), r"norm has shape \[1\]: give the 0-dimensional tensor"),
        (
            lambda: ops.perturb_([W], [W], [W], [1.0], ONE),
            r"params\[.\] shares memory with backups.*torch\.empty_like\(param\)",
        ),
        (lambda: ops.perturb_([U, W], [U, W], [W.detach(), torch.empty_like(W)], [1.0] * 2), "shares memory with"),
        (lambda: ops.squared_norm([W], [W], mask=ElementMask(0, 0, [2**32])), r"ids 4294967296 to .*\[0, 2\*\*32\)"),
        (lambda: ops.squared_norm([W], [W], mask=ElementMask(0, 0, [-1])), r"tensor ids -1 to -1.*\[0, 2\*\*32\)"),
        (lambda: ops.squared_norm([W], [W], mask=ElementMask(0, 0, [1], offsets=[-4])), r"offsets -4.*\[0, 2\*\*57\)"),
        (lambda: ops.squared_norm([W], [W], mask=ElementMask(0, 0, [1], beta=1.5)), r"beta 1\.5.*\[0, 1\]"),
        (lambda: ops.squared_norm([W], [W], mask=ElementMask(-1, 0, [1])), r"seed -1.*\[0, 2\*\*64\)"),
        (lambda: ops.restore_([W], [V]), r"backups\[0\] has shape"),
        (lambda: ops.back_up_([W], [V]), r"backups\[0\] has shape"),
        (
            lambda: ops.back_up_([W], [W.detach()]),
            r"params\[.\] shares memory with backups.*torch\.empty_like\(param\)",
        ),
        (lambda: ops.back_up_([], []), "got no params: give at least one"),
        (lambda: ops.select_top(W, W, 1), r"losses have shapes \[2, 3\] and \[2, 3\]: give two of shape \[b\]"),
        (lambda: ops.select_top(W[0], W[0].to("meta"), 1), "losses are on cpu and meta: give two on one device"),
        (lambda: ops.select_top(W[0], W[0], 0), "k = 0 samples of 3 cannot be selected: 1 <= k <= 3 is needed"),
        (lambda: ops.select_top(W[0], W[0], 4), "k = 4 samples of 3 cannot be selected: 1 <= k <= 3 is needed"),
    ],
)
def test_bad_input_is_refused_with_the_value_and_the_fix(call, message):
    with pytest.raises(ValueError, match=message):
        call()
    assert torch.equal(W, torch.ones(2, 3))
    assert W._version == 0


# ---- Which backend serves


@pytest.mark.parametrize(
    "given", [torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.Linear(2, 2)), "weight", 3, [1.0]]
)
def test_explain_takes_tensors_alone_and_says_where_they_are(given):
    with pytest.raises(TypeError, match=rf"got a {type(given).__name__}.*model\.parameters\(\)"):
        ops.explain(given)


def test_a_backend_is_forced_in_a_block_or_a_process_and_unknown_names_are_refused(monkeypatch):
    with ops.use_backend("reference"):
        assert ops.explain(W) == "reference"
    monkeypatch.setenv("ESAM_KERNELS_BACKEND", "reference")
    assert ops.explain(W) == "reference"
    monkeypatch.setenv("ESAM_KERNELS_BACKEND", "cublas")
    with pytest.raises(ValueError, match="ESAM_KERNELS_BACKEND=cublas: choose one of reference, triton"):
        ops.explain(W)
    with pytest.raises(ValueError, match="no backend is called 'cublas': choose one of"), ops.use_backend("cublas"):
        pass


def test_explain_says_why_a_backend_is_passed_over(device):
    served = ops.explain(torch.ones(3, device=device))
    if served == "reference":
        return
    assert ops.explain(torch.ones(6, device=device)[::2]).startswith(f"reference; not {served}: ")
    tensors = [torch.ones(3, device=device), torch.ones(3, device=device), torch.ones(6, device=device)[::2]]
    assert [line.split(";")[0] for line in ops.explain(tensors).splitlines()] == [f"2 x {served}", "1 x reference"]


@pytest.mark.parametrize(
    ("params", "backups", "names"),
    [
        (lambda x: [x[:4]], lambda x: [x[2:6]], r"params\[0\].*backups\[0\]"),
        (lambda x: [x[:4], x[4:]], lambda x: [torch.empty_like(x[:4])] * 2, r"backups\[0\].*backups\[1\]"),
        (lambda x: [x[:4]] * 2, lambda x: [torch.empty_like(x[:4]) for _ in range(2)], r"params\[0\].*params\[1\]"),
    ],
    ids=["a backup over a weight", "a backup twice", "a weight twice"],
)
def test_tensors_that_share_memory_are_refused(device, params, backups, names):
    x = torch.arange(8.0, device=device)
    weights, saved, before = params(x), backups(x), x.clone()
    with pytest.raises(ValueError, match=f"{names}.*empty_like"):
        ops.back_up_(weights, saved)
    with pytest.raises(ValueError, match=f"{names}.*empty_like"):
        ops.perturb_(weights, [torch.ones_like(w) for w in weights], saved, [0.5] * len(weights))
    assert torch.equal(x, before)
    gaps = [x[::2], x[1::2]]  # whose elements lie between each other
    ops.back_up_(gaps, [torch.empty_like(gap) for gap in gaps])


def test_what_no_kernel_reads_is_refused(device):
    w = torch.ones(4, device=device)
    small = w.to(torch.float8_e4m3fn)
    for args, words in (
        (([small], [w], [torch.empty_like(small)], [0.5]), r"float8_e4m3fn: one of float64, float32, bfloat16"),
        (([w], [w.to_sparse()], [torch.empty_like(w)], [0.5]), r"grads\[0\] is of layout torch.sparse_coo.*to_dense"),
        (([w], [w.clone()], [torch.empty_like(w)], [0.5], 2.0), r"norm is 2.0: give the 0-dimensional tensor"),
    ):
        with pytest.raises(ValueError, match=words):
            ops.perturb_(*args)
    assert torch.equal(w, torch.ones_like(w))


def test_gradients_with_the_negative_bit_have_their_sign(device):
    grad = torch.tensor([2 + 3j], device=device).conj().imag
    assert grad.is_neg()
    w = torch.zeros(2, device=device)[::2]  # of the gradient's stride, so that kernels read that itself
    norm = ops.perturb_([w], [grad.view(1)], [torch.empty_like(w)], [0.5])
    assert norm.item() == pytest.approx(3)
    assert w.item() == pytest.approx(-0.5)
