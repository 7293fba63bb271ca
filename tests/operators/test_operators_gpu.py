"""What the operators promise of a GPU: no sync, few launches, CUDA graphs, streams, devices, and big tensors."""

import pytest
import torch

from esam_kernels import ops
from esam_kernels.ops import ElementMask

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True, params=[name for name in ops._MODULES if name != "reference"])
def backend(request):
    with ops.use_backend(request.param):
        served = ops.explain(torch.zeros(1, device="cuda"))
        if not served.startswith(request.param):
            pytest.skip(served)
        yield request.param


def a_step(params, grads, backups, before, after, step=1, beta=0.6):
    """Every operator once, as an ESAM step calls them; the selected samples."""
    mask = ElementMask(seed=7, step=step, tensor_ids=list(range(len(params))), beta=beta)
    ops.perturb_(params, grads, backups, [0.05] * len(params), mask=mask)
    selected = ops.select_top(before, after, len(before) // 2)
    ops.restore_(params, backups)
    return selected


def a_model(dtype=torch.float32, sizes=((64, 3, 7, 7), (64,), (1000, 512), (1000,), (5,))):
    generator = torch.Generator("cuda").manual_seed(0)
    params, grads = ([torch.randn(s, device="cuda", generator=generator).to(dtype) for s in sizes] for _ in range(2))
    losses = torch.rand(2, 128, device="cuda", generator=generator)
    return params, grads, [torch.empty_like(p) for p in params], *losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_makes_no_sync(dtype):
    model = a_model(dtype)
    a_step(*model)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        a_step(*model)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("count", [3, 300])
def test_launches_do_not_depend_on_the_number_of_tensors(backend, count):
    model = a_model(sizes=[(1000 + i,) for i in range(count)])
    params, grads, backups, before, after = model
    mask = ElementMask(seed=7, step=1, tensor_ids=list(range(count)), beta=0.6)
    a_step(*model)  # compiles

    def launches(call):
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        return sum(not e.name.startswith(("Memcpy", "Memset")) for e in kernels)

    # The native kernels for the norm and for the weights are one, where all of its blocks run at the same time.
    most = 1 if backend == "native" else 3
    assert launches(lambda: ops.perturb_(params, grads, backups, [0.05] * count, mask=mask)) <= most
    assert launches(lambda: ops.restore_(params, backups)) == 1
    assert launches(lambda: ops.select_top(before, after, 64)) == 1


def test_operators_can_be_captured_in_a_cuda_graph():
    params, grads, backups, before, after = a_model()
    a_step(params, grads, backups, before, after)  # compiles, and allocates pinned memory
    mask = ElementMask(seed=7, step=1, tensor_ids=list(range(len(params))), beta=0.6)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm = ops.perturb_(params, grads, backups, [0.05] * len(params), mask=mask)
        selected = ops.select_top(before, after, 64)
    weights = [torch.randn_like(p) for p in params]
    for _ in range(3):
        for param, grad, w in zip(params, grads, weights):
            grad.normal_()
            param.copy_(w)
        after.uniform_()
        # Takes pinned memory and memory on the device in between, which the graph must not share.
        a_step([w.clone() for w in weights], grads, backups, before, after, step=9)
        graph.replay()
        expected, saved = [w.clone() for w in weights], [torch.empty_like(w) for w in weights]
        expected_norm = ops.perturb_(expected, grads, saved, [0.05] * len(params), mask=mask)
        assert torch.equal(norm, expected_norm)
        assert all(map(torch.equal, params, expected))
        assert all(map(torch.equal, backups, weights))
        assert torch.equal(selected, ops.select_top(before, after, 64))


def test_tables_of_steps_in_flight_do_not_race():
    """Hundreds of steps queue up behind a busy GPU on several streams, while the host builds the tables of the next."""
    streams = [torch.cuda.Stream() for _ in range(3)]
    models = [a_model() for _ in streams]
    weights = [[p.clone() for p in params] for params, *_ in models]
    mask = ElementMask(seed=7, step=1, tensor_ids=list(range(len(weights[0]))))
    a_step(*models[0])
    torch.cuda.synchronize()
    norm = torch.ones((), device="cuda")
    repeats = 200
    for stream in streams:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)
    for _ in range(repeats):
        for stream, (params, grads, backups, *_) in zip(streams, models):
            with torch.cuda.stream(stream):
                ops.perturb_(params, grads, backups, [2.0**-10] * len(params), norm, mask=mask)
    torch.cuda.synchronize()
    for (params, grads, *_), start in zip(models, weights):
        for param, grad, w in zip(params, grads, start):
            expected = w.double() + repeats * 2.0**-10 * grad.double()
            torch.testing.assert_close(param.double(), expected, rtol=1e-5, atol=1e-4)


def test_more_than_2_31_elements():
    count = 2**31 + 5000
    if torch.cuda.mem_get_info()[0] < 8 * count:
        pytest.skip(f"needs {8 * count / 2**30:.0f} GiB of GPU memory")
    param = torch.zeros(count, device="cuda", dtype=torch.bfloat16)
    grad = torch.ones_like(param)
    backup = torch.full_like(param, 7)
    mask = ElementMask(seed=1, step=2, tensor_ids=[3], beta=0.5)
    kept = ops.squared_norm([param], [grad], mask=mask)
    ops.perturb_([param], [grad], [backup], [1.0], torch.ones((), device="cuda"), mask=mask)
    tail = ElementMask(seed=1, step=2, tensor_ids=[3], beta=0.5, offsets=[2**31]).keep(0, param[2**31 :])
    assert torch.equal(param[2**31 :] == 1, tail)
    assert kept.item() == pytest.approx(torch.count_nonzero(param).item(), rel=1e-6)
    assert not backup.any()
    ops.restore_([param], [backup])
    assert not param.any()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_lists_over_several_devices():
    devices = ["cuda:1", "cuda:0", "cuda:1"]
    params = [torch.full((5000,), float(i), device=d) for i, d in enumerate(devices)]
    grads, backups = [torch.ones_like(p) for p in params], [torch.empty_like(p) for p in params]
    squared = ops.squared_norm(params, grads)
    assert squared.device == params[0].device
    assert squared.item() == 15_000
    ops.perturb_(params, grads, backups, [1.0, 2.0, 3.0], torch.ones((), device="cuda:0"))
    assert [param[-1].item() for param in params] == [1.0, 3.0, 5.0]
    ops.restore_(params, backups)
    assert [param[-1].item() for param in params] == [0.0, 1.0, 2.0]
