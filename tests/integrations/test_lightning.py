"""PyTorch Lightning: automatic optimization is SAM where only configure_optimizers changes, the mixin does the rest."""

import copy
import inspect
import os
import warnings

import pytest
import ranks
import torch
from networks import batches, mlp, perturbed, same, values
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from esam_kernels import ESAM, batch_closure, current_pass, first_pass

lightning = pytest.importorskip("pytorch_lightning", reason="needs the extra 'lightning'")

from pytorch_lightning.plugins.precision import MixedPrecision  # noqa: E402

from esam_kernels.integrations.lightning import ManualESAM  # noqa: E402

# Not the trainer's own advice, but what ESAM says.
OURS = ("error:forwards write", "error:step.. takes a plain step")
pytestmark = [pytest.mark.filterwarnings(one) for one in ("ignore", *OURS)]

each = nn.CrossEntropyLoss(reduction="none")
DATA = batches(6)
RHO = 0.5


def loader(rank=0, world=1):
    inputs, targets = (torch.cat(tensors)[rank::world] for tensors in zip(*DATA))
    return DataLoader(TensorDataset(inputs, targets), batch_size=8)


class Plain(lightning.LightningModule):
    def __init__(self, model, **options):
        super().__init__()
        self.model = model
        self.options = options

    def forward(self, inputs):
        return self.model(inputs)

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        loss = cross_entropy(self(inputs), targets)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Automatic(Plain):
    def configure_optimizers(self):
        return ESAM(self.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=RHO, beta=1, gamma=1)


class Scheduled(Automatic):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Manual(ManualESAM, Plain):
    def training_step(self, batch, batch_idx):
        loss = self.esam_step(batch_closure(self.replica, each, *batch))
        if loss is not None:
            self.log("loss", loss)

    def configure_optimizers(self):
        options = {"beta": 1, "gamma": 1, "rho": RHO} | self.options
        return ESAM(self.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, **options)


def trainer(**options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return lightning.Trainer(**quiet | {"max_epochs": 1, "enable_checkpointing": False} | options)


def network(*extra):
    return mlp(nn.BatchNorm1d(8), *extra)


def by_hand(model, data, bf16=False, clip=None, decay=1.0):
    """SAM with SGD, written out; batches of data are lists of micro-batches."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def mean_loss(network, batch):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return sum(cross_entropy(network(inputs), targets) for inputs, targets in batch) / len(batch)

    for batch in data:
        moved = perturbed(model, lambda network, batch=batch: mean_loss(network, batch), RHO)
        mean_loss(model, batch)  # whose statistics stay
        mean_loss(moved, batch).backward()
        for param, twin in zip(model.parameters(), moved.parameters()):
            param.grad = twin.grad
        if clip is not None:
            clip(model.parameters())
        optimizer.step()
        optimizer.param_groups[0]["lr"] *= decay
    return values(model)


def close(these, those, tolerance=1e-6):
    for mine, theirs in zip(these, those):
        torch.testing.assert_close(mine, theirs, atol=tolerance, rtol=tolerance * 10)


def test_one_line_changes():
    plain, ours = (
        inspect.getsource(one).splitlines()[1:] for one in (Plain.configure_optimizers, Automatic.configure_optimizers)
    )
    assert len([1 for a, b in zip(plain, ours) if a != b]) == 1
    assert len(plain) == len(ours)


def test_it_is_sam_by_hand_and_counts_a_step_once():
    module = Automatic(network())
    expected = by_hand(copy.deepcopy(module.model), [[batch] for batch in DATA])
    run = trainer()
    run.fit(module, loader())
    close(values(module.model), expected)
    assert run.global_step == run.optimizers[0].param_groups[0]["esam_step"] == len(DATA)
    assert module.model[1].num_batches_tracked == len(DATA)
    assert run.callback_metrics["loss"].isfinite()


def test_a_guarded_log_is_the_loss_at_the_weights():
    logged = []

    class Guarded(Automatic):
        def training_step(self, batch, batch_idx):
            loss = cross_entropy(self(batch[0]), batch[1])
            if current_pass() == first_pass():
                self.log("loss", loss)
            return loss

        def on_train_batch_end(self, *_):
            logged.append(self.trainer.callback_metrics["loss"].item())

    module = Guarded(network())
    model, expected = copy.deepcopy(module.model), []
    for number, batch in enumerate(DATA):
        expected.append(cross_entropy(copy.deepcopy(model)(batch[0]), batch[1]).item())
        model = copy.deepcopy(module.model)
        by_hand(model, [[one] for one in DATA[: number + 1]])
    trainer().fit(module, loader())
    assert logged == pytest.approx(expected, abs=1e-5)


CLIPS = {
    "norm": lambda params: nn.utils.clip_grad_norm_(params, 0.05),
    "value": lambda params: nn.utils.clip_grad_value_(params, 0.02),
}


@pytest.mark.parametrize("algorithm", CLIPS)
def test_the_gradient_of_the_step_alone_is_clipped(algorithm):
    module, hooks = Scheduled(network()), []
    module.on_before_optimizer_step = lambda optimizer: hooks.append(optimizer)
    expected = by_hand(copy.deepcopy(module.model), [[batch] for batch in DATA], clip=CLIPS[algorithm], decay=0.9)
    clip = {"norm": 0.05, "value": 0.02}[algorithm]
    trainer(gradient_clip_val=clip, gradient_clip_algorithm=algorithm).fit(module, loader())
    close(values(module.model), expected)
    assert len(hooks) == len(DATA)


def test_in_bfloat16():
    module = Automatic(network())
    expected = by_hand(copy.deepcopy(module.model), [[batch] for batch in DATA], bf16=True)
    trainer(precision="bf16-mixed").fit(module, loader())
    close(values(module.model), expected, 1e-3)


@pytest.mark.parametrize("kind", [Scheduled, Manual])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(kind, tmp_path):
    keep = lightning.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    ends = []
    for path in (None, tmp_path / "epoch=0.ckpt"):
        module = kind(network(), beta=0.6, gamma=0.5)
        options = {"callbacks": [keep], "enable_checkpointing": True} if path is None else {}
        torch.manual_seed(0)
        run = trainer(max_epochs=2, **options)
        run.fit(module, loader(), ckpt_path=path)
        assert run.global_step == run.optimizers[0].param_groups[0]["esam_step"] == 2 * len(DATA)
        ends.append([*values(module.model), torch.tensor(run.optimizers[0].param_groups[0]["lr"])])
    assert same(*ends)


def test_accumulation_is_refused_with_the_way_out():
    module = Automatic(network())
    before = values(module.model)[:4]
    with pytest.raises(RuntimeError, match=r"accumulate_grad_batches = 2.*ManualESAM"):
        trainer(accumulate_grad_batches=2).fit(module, loader())
    assert same(values(module.model)[:4], before)


def scaled():
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))


def test_a_scaler_is_refused_with_the_way_out():
    module = Automatic(network())
    before = [param.detach().clone() for param in module.parameters()]
    with pytest.raises(RuntimeError, match=r"16-mixed.*bf16-mixed.*ManualESAM"):
        trainer(plugins=[scaled()]).fit(module, loader())
    assert same(module.parameters(), before)


# Manual optimization.


def test_the_mixin_is_sam_by_hand():
    module = Manual(network())
    expected = by_hand(copy.deepcopy(module.model), [[batch] for batch in DATA])
    run = trainer()
    run.fit(module, loader())
    close(values(module.model), expected)
    assert run.callback_metrics["loss"].isfinite()


def test_the_mixin_accumulates_clips_and_steps_schedulers():
    class Accumulating(Manual):
        accumulate_grad_batches = 4  # of six: the last step has two
        gradient_clip_val = 0.05

        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
            epochs = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}, epochs]

    module = Accumulating(mlp())
    expected = by_hand(copy.deepcopy(module.model), [DATA[:4], DATA[4:]], clip=CLIPS["norm"], decay=0.5)
    run = trainer()
    run.fit(module, loader())
    close(values(module.model), expected)
    assert run.global_step == 2
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**2 * 0.1)


def test_the_mixin_selects_samples():
    module = Manual(network(), gamma=0.5)
    model = copy.deepcopy(module.model)
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=RHO, beta=1, gamma=0.5)
    trainer().fit(module, loader())
    for batch in DATA:
        optimizer.step(batch_closure(model, each, *batch))
    assert same(values(module.model), values(model))


@pytest.mark.parametrize("overflows", [False, True])
def test_the_mixin_gives_the_scaler(overflows):
    module, plugin = Manual(network()), scaled()
    before = [param.detach().clone() for param in module.parameters()]
    if overflows:
        module.model[0].weight.register_hook(lambda grad: grad * torch.inf)
    trainer(plugins=[plugin]).fit(module, loader())
    assert (plugin.scaler.get_scale() < 1024) == overflows
    assert same(module.parameters(), before) == overflows


def test_the_mixin_refuses_what_it_cannot_use():
    module = Manual(network())
    module.accumulate_grad_batches = 0
    with pytest.raises(ValueError, match="accumulate_grad_batches = 0"):
        trainer().fit(module, loader())

    class Other(Manual):
        configure_optimizers = Plain.configure_optimizers

    with pytest.raises(TypeError, match="one ESAM"):
        trainer().fit(Other(network()), loader())


def test_halves_of_a_step_written_out():
    class Halves(Plain):
        automatic_optimization = False

        def __init__(self, model):
            super().__init__(model)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer, (inputs, targets) = self.optimizers(), batch
            self.manual_backward(cross_entropy(self(inputs), targets))
            optimizer.first_step(zero_grad=True)
            self.manual_backward(cross_entropy(self(inputs), targets))
            optimizer.second_step(zero_grad=True)

        configure_optimizers = Automatic.configure_optimizers

    module = Halves(mlp())
    expected = by_hand(copy.deepcopy(module.model), [[batch] for batch in DATA])
    trainer().fit(module, loader())
    close(values(module.model), expected)


# Two processes, as torchrun starts them: Lightning takes the process group that is there.


def replicas(rank, kind):
    ranks_of = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
    os.environ.update({name: str(value) for name, value in ranks_of.items()}, TORCHELASTIC_RUN_ID="test")
    module = kind(network())
    warnings.filterwarnings("error", message="forwards write")
    options = {"gradient_clip_val": 0.05} if kind is Scheduled else {}
    run = trainer(devices=2, strategy="ddp", use_distributed_sampler=False, **options)
    run.fit(module, loader(rank, 2))
    return run.world_size, run.global_step, values(module.model)


class Accumulating(Manual):
    accumulate_grad_batches = 2  # of three: the last step has one


SCENARIOS = {kind.__name__: (replicas, {"kind": kind}) for kind in (Scheduled, Manual, Accumulating)}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        return ranks.run(__name__, 2, tmp_path_factory.mktemp("ranks"))


def replicas_by_hand(accumulated=1, clip=None, decay=1.0):
    """Each rank climbs by itself; gradients are averaged, and statistics are rank 0's."""
    inputs, targets = (torch.cat(tensors) for tensors in zip(*DATA))
    of_ranks = [list(zip(inputs[rank::2].split(8), targets[rank::2].split(8))) for rank in range(2)]
    models = [network(), network()]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in models]

    def loss(model, step):
        return sum(cross_entropy(model(x), y) for x, y in step) / len(step)

    for start in range(0, 3, accumulated):
        gradients = []
        for model, data in zip(models, of_ranks):
            model.load_state_dict(models[0].state_dict())
            step = data[start : start + accumulated]
            moved = perturbed(model, lambda network, step=step: loss(network, step), RHO)
            gradients.append(torch.autograd.grad(loss(moved, step), list(moved.parameters())))
        for model, data, optimizer in zip(models, of_ranks, optimizers):
            loss(model, data[start : start + accumulated])
            for param, *of_both in zip(model.parameters(), *gradients):
                param.grad = sum(of_both) / 2
            if clip is not None:
                clip(model.parameters())
            optimizer.step()
            optimizer.param_groups[0]["lr"] *= decay
    return values(models[0])


@pytest.mark.parametrize(
    ("kind", "options", "steps"),
    [
        (Scheduled, {"clip": CLIPS["norm"], "decay": 0.9}, 3),
        (Manual, {}, 3),
        (Accumulating, {"accumulated": 2}, 2),
    ],
)
def test_two_processes(results, kind, options, steps):
    (world, found_steps, one), (_, _, other) = results(kind.__name__)
    assert (world, found_steps) == (2, steps)
    weights = len(list(network().parameters()))
    close(one, replicas_by_hand(**options))
    assert same(one[:weights], other[:weights])
