"""The code in docs/recipes.md is what runs here, on small models and data, followed by a check of what it promises."""

import contextlib
import copy
import math
import re
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ranks
import torch
from networks import same, values
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from esam_kernels import ESAM, batch_closure
from esam_kernels.passes.draw import draw_tensors

PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
INTRODUCTION, *SECTIONS = re.split(r"^## ", PAGE, flags=re.MULTILINE)
RECIPES = dict(section.split("\n", 1) for section in SECTIONS)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCHES = 8


def blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


class Recipe:
    """A recipe's blocks, run one after the other in the names that the page says are there."""

    def __init__(self, name: str, **names: Any) -> None:
        torch.manual_seed(0)
        data = TensorDataset(torch.randn(16 * BATCHES, 4).to(DEVICE), torch.randint(3, (16 * BATCHES,)).to(DEVICE))
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).to(DEVICE)
        self.names: dict[str, Any] = {"model": model, "loader": DataLoader(data, batch_size=16), **names}
        self.blocks = blocks(RECIPES[name])
        self.start = copy.deepcopy(self["model"])
        self.run(*blocks(INTRODUCTION))

    def __getitem__(self, name: str) -> Any:
        return self.names[name]

    def run(self, *code: str) -> "Recipe":
        for block in code or self.blocks:
            exec(compile(block, "docs/recipes.md", "exec"), self.names)
        return self

    def steps(self) -> int:
        return self["optimizer"].param_groups[0]["esam_step"]

    def twin(self, **options: Any) -> tuple[nn.Module, ESAM]:
        """The model from before the recipe, and an optimizer as the page makes it."""
        model = copy.deepcopy(self.start)
        options = {"lr": 0.1, "momentum": 0.9, "rho": 0.05, **options}
        return model, ESAM(model.parameters(), torch.optim.SGD, **options)

    def check_trained(self, steps: int = BATCHES) -> None:
        assert self.steps() == steps
        assert all(value.isfinite().all() for value in values(self["model"]))
        assert not same(*([value.cpu() for value in values(one)[:2]] for one in (self["model"], self.start)))


def test_every_recipe_with_code_is_tested():
    with_code = {name for name, text in RECIPES.items() if blocks(text)}
    tested = set(re.findall(r'(?:Recipe|on_digits)\(\s*"([^"]+)"', Path(__file__).read_text()))
    assert with_code == tested


def test_a_closure_that_runs_backward_itself():
    recipe = Recipe("A closure that runs backward itself").run()
    model, optimizer = recipe.twin(gamma=1)
    for batch in recipe["loader"]:
        loss = optimizer.step(batch_closure(model, recipe["loss_fn"], *batch))
    assert recipe["optimizer"].last_step.sharp
    torch.testing.assert_close(recipe["loss"].detach(), loss)
    for mine, theirs in zip(values(recipe["model"]), values(model)):
        torch.testing.assert_close(mine, theirs)


def test_training_accuracy_and_logs():
    logged: dict[str, list[float]] = {}
    writer = SimpleNamespace(add_scalar=lambda name, value, step: logged.setdefault(name, []).append(value))
    recipe = Recipe("Training accuracy and logs", writer=writer).run()
    recipe.check_trained()
    model, optimizer = recipe.twin()
    correct, losses = 0, []
    for inputs, targets in recipe["loader"]:
        correct += (copy.deepcopy(model)(inputs).argmax(1) == targets).sum()  # a copy's batch norm counts it
        losses.append(float(optimizer.step(batch_closure(model, recipe["loss_fn"], inputs, targets))))
    assert recipe["correct"] == correct
    torch.testing.assert_close(logged["loss"], losses[::4])
    assert logged["rows"] == [8, 8]
    assert all(norm > 0 for norm in logged["norm"])
    assert logged["loss, perturbed"][0] > logged["loss"][0]


class Detector(nn.Module):
    """As torchvision's: lists in, and in training a dict of losses out."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.head = nn.Linear(4, 3 + 4)

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        height, width = (max(image.shape[side] for image in images) for side in (1, 2))
        padded = [nn.functional.pad(one, (0, width - one.shape[2], 0, height - one.shape[1])) for one in images]
        classes, boxes = self.head(self.layers(torch.stack(padded)).flatten(1)).split([3, 4], 1)
        truth = {name: torch.stack([target[name] for target in targets]) for name in ("labels", "boxes")}
        return {
            "loss_classifier": nn.functional.cross_entropy(classes, truth["labels"]),
            "loss_box_reg": nn.functional.smooth_l1_loss(boxes, truth["boxes"]),
        }


def test_one_loss_of_the_whole_batch():
    torch.manual_seed(0)
    detector = Detector().to(DEVICE)
    start = copy.deepcopy(detector)
    loader = [
        (
            [torch.rand(1, 5 + i % 3, 6 + i % 2, device=DEVICE) for i in range(4)],
            [{"labels": torch.tensor(i % 3, device=DEVICE), "boxes": torch.rand(4, device=DEVICE)} for i in range(4)],
        )
        for _ in range(BATCHES)
    ]
    names = {"detector": detector, "detection_loader": loader}
    recipe = Recipe("One loss of the whole batch: detection, contrastive and dice losses", **names)
    scalars, detection = recipe.blocks
    recipe.run(scalars).check_trained(2 * BATCHES)
    recipe.run(detection)
    assert recipe.steps() == detector.layers[1].num_batches_tracked == BATCHES
    optimizer = ESAM(start.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.05, gamma=1)
    for batch in loader:

        def closure(batch=batch):  # SAM's two passes on the sum of the losses
            optimizer.zero_grad()
            sum(start(*batch).values()).backward()

        optimizer.step(closure)
    for mine, theirs in zip(values(detector), values(start)):
        torch.testing.assert_close(mine, theirs)


def test_gradient_penalties():
    recipe = Recipe("Gradient penalties").run()
    recipe.check_trained()
    # With all samples and weights it is SAM on the penalized loss.
    recipe = Recipe("Gradient penalties")
    recipe.run(recipe.blocks[0].replace("rho=0.05", "rho=0.05, beta=1, gamma=1"))
    model, optimizer = recipe.twin(beta=1, gamma=1)
    for inputs, targets in recipe["loader"]:

        def closure(inputs=inputs, targets=targets):
            optimizer.zero_grad()
            x = inputs.clone().requires_grad_()
            losses = recipe["loss_fn"](model(x), targets)
            (slopes,) = torch.autograd.grad(losses.sum(), x, create_graph=True)
            (losses.mean() + 0.1 * slopes.square().sum(1).mean()).backward()

        optimizer.step(closure)
    for mine, theirs in zip(values(recipe["model"]), values(model)):
        torch.testing.assert_close(mine, theirs)


def test_an_optimizer_that_is_there_already():
    recipe = Recipe("An optimizer that is there already").run()
    recipe.check_trained()
    assert recipe["optimizer"].base is recipe["ready"]
    assert recipe["optimizer"].param_groups[0]["lr"] == pytest.approx(0)


class NativeScaler:
    """timm's (timm/utils/cuda.py), as far as it goes: it runs backward and steps in one."""

    def __init__(self) -> None:
        self._scaler = torch.amp.GradScaler(DEVICE)

    def __call__(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        self._scaler.scale(loss).backward()
        self._scaler.step(optimizer)
        self._scaler.update()


@pytest.mark.parametrize("overflows", [False, True])
def test_timm_s_native_scaler(overflows):
    recipe = Recipe("timm's NativeScaler", loss_scaler=NativeScaler())
    if overflows:
        recipe["model"][0].weight.register_hook(lambda grad: grad * math.inf)
    recipe.run()
    assert same(recipe["model"].parameters(), recipe.start.parameters()) == overflows
    assert (recipe["scaler"].get_scale() < torch.amp.GradScaler(DEVICE).get_scale()) == overflows
    loss = recipe["loss_fn"](
        recipe["model"](torch.randn(4, 4, device=DEVICE)), torch.zeros(4, dtype=int, device=DEVICE)
    )
    if not overflows:
        with pytest.warns(UserWarning, match="plain step"):  # where the call stays as it is
            recipe["loss_scaler"](loss.mean(), recipe["optimizer"])


def test_several_base_optimizers():
    recipe = Recipe("Several base optimizers: Muon and AdamW").run()
    recipe.check_trained()
    assert recipe["muon"].param_groups[0]["lr"] < 1e-6  # scheduled
    assert len(recipe["optimizer"].state) == len(list(recipe["model"].parameters()))


def test_plain_loop():
    recipe = Recipe("Plain loop").run()
    model, optimizer = recipe.twin()
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=BATCHES)
    for batch in recipe["loader"]:
        optimizer.step(batch_closure(model, recipe["loss_fn"], *batch))
        scheduler.step()
    assert same(values(recipe["model"]), values(model))
    recipe.check_trained()


def check_mixed_precision(recipe: Recipe, dtype: torch.dtype) -> None:
    seen = set()
    recipe["model"][0].register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    recipe.run().check_trained()
    assert seen == {dtype}


def test_bfloat16():
    check_mixed_precision(Recipe("Mixed precision in bfloat16"), torch.bfloat16)


def test_float16():
    recipe = Recipe("Mixed precision in float16")
    check_mixed_precision(recipe, torch.float16)
    assert recipe["scaler"].get_scale() == torch.amp.GradScaler(DEVICE).get_scale()  # nothing has overflowed
    recipe["model"][0].weight.register_hook(lambda grad: grad * math.inf)
    before = [param.detach().clone() for param in recipe["model"].parameters()]
    recipe.run(recipe.blocks[0].replace("scaler = ", "scaler = scaler; "))
    assert same(recipe["model"].parameters(), before)
    assert recipe["scaler"].get_scale() < torch.amp.GradScaler(DEVICE).get_scale()


def test_weights_in_bfloat16():
    recipe = Recipe("Weights in bfloat16").run()
    recipe.check_trained()
    assert {param.dtype for param in recipe["model"].parameters()} == {torch.bfloat16}


def test_tied_and_unused_weights():
    recipe = Recipe("Tied and unused weights").run()
    recipe.check_trained()
    model = recipe["model"]
    assert model[2].weight is model[4].weight
    assert len(list(model.parameters())) == 8
    assert not model.unused.any()


def test_gradient_clipping():
    recipe = Recipe("Gradient clipping")
    for i, block in enumerate(recipe.blocks, 1):
        recipe.run(block).check_trained(i * BATCHES)
        assert nn.utils.get_total_norm([param.grad for param in recipe["model"].parameters()]) < 0.1001


def test_gradient_accumulation():
    recipe = Recipe("Gradient accumulation")
    plain, with_scaler = recipe.blocks
    recipe.run(plain).check_trained(BATCHES // 4)
    model, optimizer = recipe.twin()
    batches = list(recipe["loader"])
    for start in range(0, BATCHES, 4):
        optimizer.step([batch_closure(model, recipe["loss_fn"], *batch) for batch in batches[start : start + 4]])
    assert same(values(recipe["model"]), values(model))
    recipe.run(with_scaler).check_trained(2 * (BATCHES // 4))
    assert recipe["scaler"].get_scale() == torch.amp.GradScaler(DEVICE).get_scale()  # nothing has overflowed


def test_language_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 11)).to(DEVICE)
    tokens = torch.randint(11, (24, 6)).to(DEVICE)
    labels = tokens.clone()
    for row, length in enumerate(torch.randint(1, 7, (24,)).tolist()):
        labels[row, length:] = -100
    loader = DataLoader(TensorDataset(tokens, labels), batch_size=8)
    recipe = Recipe("Language models: one loss per token", model=model, loader=loader).run()
    recipe.check_trained(3)
    # The loss is the mean over all tokens, as cross_entropy has it by itself.
    model, optimizer = recipe.twin()
    loss = optimizer.backward(batch_closure(model, recipe["next_token_loss"], tokens, labels))
    expected = nn.functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(loss, expected.detach())


def test_class_weights_and_ignored_targets():
    recipe = Recipe("Class weights and ignored targets")
    weighted, labelled = recipe.blocks
    recipe.run(weighted).check_trained()
    inputs, targets = next(iter(recipe["loader"]))
    model, optimizer = recipe.twin(gamma=1)
    loss = optimizer.backward(batch_closure(model, recipe["weighted_loss"], inputs, targets))
    own = nn.CrossEntropyLoss(recipe["class_weights"])
    torch.testing.assert_close(loss, own(copy.deepcopy(recipe.start)(inputs), targets).detach())

    recipe.names["loader"] = [(x, y.where(torch.rand(y.shape, device=DEVICE) < 0.7, -100)) for x, y in recipe["loader"]]
    recipe.run(labelled).check_trained(2 * BATCHES)
    inputs, targets = recipe["loader"][0]
    assert (targets == -100).any()
    model, optimizer = recipe.twin(gamma=1)
    loss = optimizer.backward(batch_closure(model, recipe["labelled_loss"], inputs, targets))
    torch.testing.assert_close(loss, nn.CrossEntropyLoss()(copy.deepcopy(recipe.start)(inputs), targets).detach())


def test_ctc():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(DEVICE)
    inputs, labels = torch.randn(24, 9, 4).to(DEVICE), torch.randint(1, 3, (24, 4)).to(DEVICE)
    data = TensorDataset(inputs, labels, torch.randint(1, 5, (24,)).to(DEVICE))
    recipe = Recipe("CTC", model=model, loader=DataLoader(data, batch_size=8)).run()
    recipe.check_trained(3)
    inputs, *targets = next(iter(recipe["loader"]))
    model, optimizer = recipe.twin(gamma=1)
    loss = optimizer.backward(batch_closure(model, recipe["ctc_loss"], inputs, targets))
    log_probs = copy.deepcopy(recipe.start)(inputs).log_softmax(2).transpose(0, 1)
    own = nn.CTCLoss()(log_probs, targets[0], torch.full((8,), 9), targets[1])
    torch.testing.assert_close(loss, own.detach())


def test_batches_of_any_other_kind():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(0)).to(DEVICE)
    images = [[torch.rand(1, 4 + i % 3, 5 + i % 2, device=DEVICE) for i in range(8)] for _ in range(3)]
    loader = [(batch, torch.arange(8, device=DEVICE) % 3) for batch in images]
    Recipe("Batches of any other kind", model=model, loader=loader).run().check_trained(3)
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(TypeError, match=r"closure\(index\) by hand"):
        optimizer.backward(
            batch_closure(model, nn.CrossEntropyLoss(), [image.numpy(force=True) for image in images[0]], None)
        )


def test_several_networks():
    norm = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    recipe = Recipe("Several networks", model=norm.to(DEVICE)).run()
    recipe.check_trained()
    for module in (recipe["model"][1], recipe["model"][3]):
        assert module.num_batches_tracked == BATCHES  # once a step


def test_torch_compile(monkeypatch):
    torch._dynamo.reset()
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile_(function, backend="aot_eager"))
    recipe = Recipe("torch.compile").run()
    recipe.check_trained()
    with torch._dynamo.config.patch(error_on_recompile=True):
        recipe.run(recipe.blocks[0][recipe.blocks[0].index("for ") :]).check_trained(2 * BATCHES)
    model, optimizer = recipe.twin()
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.99)
    for batch in [*recipe["loader"]] * 2:
        optimizer.step(batch_closure(model, recipe["loss_fn"], *batch))
        scheduler.step()
    for mine, theirs in zip(values(recipe["model"]), values(model)):
        torch.testing.assert_close(mine, theirs)
    torch._dynamo.reset()


def test_averaged_weights():
    recipe = Recipe("Averaged weights: EMA and SWA").run()
    recipe.check_trained()
    model, optimizer = recipe.twin()
    average: list[Tensor] = []
    for batch in recipe["loader"]:
        optimizer.step(batch_closure(model, recipe["loss_fn"], *batch))
        weights = [param.detach().clone() for param in model.parameters()]
        average = [torch.lerp(a, w, 0.01) for a, w in zip(average, weights)] if average else weights
    for mine, theirs in zip(recipe["averaged"].parameters(), average):
        torch.testing.assert_close(mine, theirs)


def test_checkpoint_and_resume():
    p = 0.5 if DEVICE == "cpu" else 0.0  # the recipe keeps the CPU's random state
    dropout = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(p), nn.Linear(8, 3)).to(DEVICE)
    recipe = Recipe("Checkpoint and resume", model=dropout)
    save, resume = recipe.blocks
    batches = list(recipe["loader"])
    recipe.run(save)

    def go_on() -> list[Tensor]:
        for batch in batches:
            recipe["optimizer"].step(batch_closure(recipe["model"], recipe["loss_fn"], *batch))
        return values(recipe["model"])

    uninterrupted = go_on()
    model, optimizer = recipe.twin(lr=7.0)
    recipe.names.update(model=model, optimizer=optimizer)
    recipe.run(resume)
    assert same(go_on(), uninterrupted)


def test_activation_checkpointing():
    recipe = Recipe("Activation checkpointing").run()
    model, optimizer = recipe.twin()
    for batch in recipe["loader"]:
        optimizer.step(batch_closure(model, recipe["loss_fn"], *batch))
    # Not batch norm's statistics: checkpointing computes its forward twice, in ordinary training too.
    assert same(recipe["model"].parameters(), model.parameters())


CHECKPOINTED = {
    "all layers": "for layer in self.layers:",
    "all but the first": "x = self.layers[0](x)\n        for layer in self.layers[1:]:",
    "all but the last": "for layer in self.layers[:-1]:",
}


@pytest.mark.parametrize("drawn", range(6))
@pytest.mark.parametrize("checkpointed", CHECKPOINTED)
def test_reentrant_activation_checkpointing_is_refused(checkpointed, drawn):
    """Whichever weight is drawn: one before a checkpoint, one in it, whose gradient it hides, or one after it."""
    recipe = Recipe("Activation checkpointing")
    # Without an input that requires a gradient, this kind would give the first layer none in any training.
    recipe.names["loader"] = [(inputs.requires_grad_(), targets) for inputs, targets in recipe["loader"]]
    seed = next(seed for seed in range(99) if draw_tensors(range(6), 1e-9, seed, 0) == [drawn])
    recipe["optimizer"].param_groups[0].update(beta=1e-9, seed=seed)
    reentrant = recipe.blocks[0].replace("use_reentrant=False", "use_reentrant=True")
    reentrant = reentrant.replace("for layer in self.layers:", CHECKPOINTED[checkpointed])
    if checkpointed == "all but the last":
        reentrant = reentrant.replace("return x", "return self.layers[-1](x)")
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        recipe.run(reentrant)
    assert same(values(recipe["model"]), values(recipe.start))
    assert all(param.grad is None for param in recipe["model"].parameters())


def test_a_rho_for_each_group():
    recipe = Recipe("A rho for each parameter group")
    moved: set[int] = set()
    start = [param.detach().clone() for param in recipe["model"].parameters()]

    def watch(module, inputs):
        if recipe.names["optimizer"].param_groups[0]["esam_step"] == 0:
            params = list(recipe["model"].parameters())
            moved.update(i for i, (now, before) in enumerate(zip(params, start)) if not torch.equal(now, before))

    recipe["model"].register_forward_pre_hook(watch)
    recipe.run().check_trained()
    assert moved
    assert moved <= {i for i, param in enumerate(start) if param.dim() > 1}


def test_rho_in_proportion_to_the_learning_rate():
    recipe = Recipe("rho in proportion to the learning rate")
    seen = []
    recipe["optimizer"].register_step_pre_hook(lambda optimizer, *_: seen.append(dict(optimizer.param_groups[0])))
    recipe.run().check_trained()
    assert len({group["rho"] for group in seen}) == BATCHES
    for group in seen:
        assert group["rho"] == pytest.approx(0.05 * group["lr"] / 0.1)


def forwards(recipe: Recipe) -> list[int]:
    """How many there are in each step of a recipe, which is run."""
    counts: dict[int, int] = {}

    def count(*_):
        counts[recipe.steps()] = counts.get(recipe.steps(), 0) + 1

    hook = recipe["model"].register_forward_pre_hook(count)
    recipe.run()
    hook.remove()
    recipe.check_trained(len(counts))
    return list(counts.values())


def test_sam_at_the_base_optimizer_s_price():
    recipe = Recipe("SAM at the base optimizer's price")
    assert forwards(recipe) == [1] * BATCHES
    assert recipe["optimizer"].param_groups[0]["rho"] == 0.3
    model, plain = recipe.twin(rho=0.0)
    for batch in recipe["loader"]:
        plain.step(batch_closure(model, recipe["loss_fn"], *batch))
    assert not same(values(recipe["model"]), values(model))


def test_momentum_first_and_sam_in_the_tail():
    recipe = Recipe("Momentum first, SAM in the tail")
    assert forwards(recipe) == [1] * (2 * BATCHES * 4 // 5) + [2] * (2 * BATCHES - 2 * BATCHES * 4 // 5)


def test_sam_on_normalization_layers_alone():
    recipe = Recipe("SAM on normalization layers alone")
    names: list[set[str]] = []
    for name, param in recipe["model"].named_parameters():
        param.register_hook(lambda grad, name=name: names[-1].add(name))
    recipe["model"].register_forward_pre_hook(lambda *_: names.append(set()))
    recipe.run().check_trained()
    assert (
        names == [{"1.weight", "1.bias"}, {"0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"}] * BATCHES
    )


def test_fine_tuning_with_frozen_layers():
    recipe = Recipe("Fine-tuning with frozen layers").run()
    assert recipe.steps() == BATCHES
    assert same(recipe["model"][0].parameters(), recipe.start[0].parameters())
    assert not same(recipe["model"][3].parameters(), recipe.start[3].parameters())


def test_from_davda54_sam():
    recipe = Recipe("From davda54/sam")
    plain, with_scaler = recipe.blocks
    recipe.run(plain).check_trained()
    model, optimizer = recipe.twin(beta=1, gamma=1)
    for batch in recipe["loader"]:
        optimizer.step(batch_closure(model, recipe["loss_fn"], *batch))
    for mine, theirs in zip(recipe["model"].parameters(), model.parameters()):
        torch.testing.assert_close(mine, theirs)

    recipe.names["torch"] = without_autocast = types.ModuleType("torch")  # to compare, in float32
    vars(without_autocast).update(vars(torch), autocast=lambda *_: contextlib.nullcontext())
    recipe.run(with_scaler).check_trained(2 * BATCHES)
    for batch in recipe["loader"]:
        optimizer.step(batch_closure(model, recipe["loss_fn"], *batch))
    for mine, theirs in zip(recipe["model"].parameters(), model.parameters()):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
    assert recipe["scaler"].get_scale() == torch.amp.GradScaler(DEVICE).get_scale()  # nothing has overflowed

    recipe.names["torch"] = torch
    recipe.run(with_scaler).check_trained(3 * BATCHES)
    recipe["model"][0].weight.register_hook(lambda grad: grad * math.inf)
    before = [param.detach().clone() for param in recipe["model"].parameters()]
    recipe.run(with_scaler)
    assert same(recipe["model"].parameters(), before)
    assert recipe["scaler"].get_scale() < torch.amp.GradScaler(DEVICE).get_scale()


# Many processes: each of two runs the recipe on its own half of the batches.


def share(rank: int, recipe: Recipe) -> list[tuple[Tensor, Tensor]]:
    return list(recipe["loader"])[rank::2]


def data_parallel(rank: int):
    recipe = Recipe("DistributedDataParallel")
    recipe.names["loader"] = share(rank, recipe)
    found = []
    for block in recipe.blocks:
        recipe.run(block).check_trained(BATCHES // 2)
        found += [param.detach().clone() for param in recipe["model"].parameters()]
    return found


def sharded(rank: int):
    layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(DEVICE)
    recipe = Recipe("FSDP2", model=layers)
    recipe.names["loader"] = share(rank, recipe)
    train, save, load = recipe.blocks
    recipe.run(train, save)
    assert recipe.steps() == BATCHES // 2
    saved = [param.full_tensor().detach() for param in recipe["model"].parameters()]
    again = train[train.index("for inputs") :]
    recipe.run(again)
    later = [param.full_tensor().detach() for param in recipe["model"].parameters()]
    recipe.run(load)
    assert recipe.steps() == BATCHES // 2
    loaded = [param.full_tensor().detach() for param in recipe["model"].parameters()]
    recipe.run(again)
    return saved, loaded, later, [param.full_tensor().detach() for param in recipe["model"].parameters()]


SCENARIOS = {"data parallel": (data_parallel, {}), "sharded": (sharded, {})}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # two ranks may not share a GPU
        return ranks.run(__name__, 2, tmp_path_factory.mktemp("ranks"))


def test_distributed_data_parallel(results):
    one, other = results("data parallel")
    assert same(one, other)


@ranks.needs_fsdp2
def test_fsdp2(results):
    for saved, loaded, later, later_again in results("sharded"):
        assert same(loaded, saved)
        assert not same(later, saved)
        assert same(later_again, later)  # with AdamW's moments


# Trainers, on handwritten digits.


class Digits:
    """1,437 images of handwritten digits to train on, 360 to test on, and a small network."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        digits = pytest.importorskip("sklearn.datasets").load_digits()
        order = torch.randperm(len(digits.target))
        images, labels = (
            torch.tensor(digits.data / 16.0, dtype=torch.float32)[order],
            torch.tensor(digits.target)[order],
        )
        self.train, self.test = TensorDataset(images[:-360], labels[:-360]), (images[-360:], labels[-360:])
        self.model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def accuracy(self, model: nn.Module) -> float:
        images, labels = self.test
        device = next(model.parameters()).device
        with torch.no_grad():
            return (model.eval()(images.to(device)).argmax(1).cpu() == labels).float().mean().item()


def on_digits(name: str, **names: Any) -> tuple[Digits, Recipe]:
    digits = Digits()
    loader = DataLoader(digits.train, batch_size=16, shuffle=True)
    return digits, Recipe(name, **{"model": digits.model, "loader": loader, **names})


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """What recipes write, they write where they run."""
    monkeypatch.chdir(tmp_path)


quiet = pytest.mark.filterwarnings("ignore")  # the trainers' own advice


@quiet
def test_lightning():
    pytest.importorskip("pytorch_lightning", reason="needs the extra 'lightning'")
    digits, recipe = on_digits("PyTorch Lightning")
    automatic, manual = recipe.blocks
    steps = len(recipe["loader"])
    recipe.run(automatic)
    assert digits.accuracy(recipe["model"]) > 0.75
    assert recipe["trainer"].global_step == 3 * steps
    assert recipe["trainer"].callback_metrics["loss"].isfinite()
    recipe.names["model"] = copy.deepcopy(recipe.start)
    recipe.run(manual)
    assert digits.accuracy(recipe["model"]) > 0.75
    assert recipe["trainer"].global_step == 3 * math.ceil(steps / 2)


@quiet
def test_accelerate():
    pytest.importorskip("accelerate", reason="needs the extra 'accelerate'")
    digits, recipe = on_digits("Hugging Face Accelerate")
    recipe.run()
    assert digits.accuracy(recipe["model"]) > 0.75
    recipe.check_trained(3 * math.ceil(len(recipe["loader"]) / 2))


OURS = "ESAM(self.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.05, gamma=1)"
PLAIN = {  # how a recipe reads without ESAM
    "A closure that runs backward itself": [
        (OURS.replace("self", "model"), "torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)")
    ],
    "PyTorch Lightning": [
        (OURS, "torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)"),
        ("\nfrom esam_kernels import current_pass, first_pass\n", ""),  # so that its log is of the loss at the weights
        ("        if current_pass() == first_pass():\n    ", ""),
    ],
    "Transformers Trainer": [
        (
            "ESAMTrainer(model, arguments, train_dataset=dataset, rho=0.05)",
            "Trainer(model, arguments, train_dataset=dataset)",
        ),
        ("from transformers import TrainingArguments\n", "from transformers import Trainer, TrainingArguments\n"),
        ("\nfrom esam_kernels.integrations.transformers import ESAMTrainer\n", ""),
    ],
}


@pytest.mark.parametrize(("name", "most"), [(one, 3 if one == "Transformers Trainer" else 1) for one in PLAIN])
def test_how_many_lines_change(name, most):
    """Beside the import that the page begins with, and in Lightning the guard of a log."""
    ours = blocks(RECIPES[name])[0]
    plain = ours
    for mine, theirs in PLAIN[name]:
        assert plain.count(mine) == 1
        plain = plain.replace(mine, theirs)
    assert "ESAM" not in plain
    assert "esam" not in plain
    changed = [line for line in ours.splitlines() if line.strip() and line not in plain.splitlines()]
    unneeded = [line for line in changed if "current_pass" in line or line.startswith(" " * 12)]
    assert len(changed) - len(unneeded) <= most


class Network(nn.Module):
    """A network that is called as those of the Transformers library are."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.layers(pixels)
        own = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
        return {**own, "logits": logits}


@quiet
def test_transformers_trainer():
    pytest.importorskip("transformers", reason="needs the extra 'transformers'")
    digits = Digits()
    dataset = [{"pixels": image, "labels": label} for image, label in digits.train]
    network = Network(nn.Sequential(digits.model, nn.Dropout(0.1)))
    _, recipe = on_digits("Transformers Trainer", model=network, dataset=dataset)
    own = "learning_rate=5e-3, save_strategy='no', disable_tqdm=True"
    recipe.run(recipe.blocks[0].replace("num_train_epochs=3", f"num_train_epochs=3, {own}"))
    steps = 3 * math.ceil(len(dataset) / (2 * 8))
    assert recipe["trainer"].state.global_step == recipe["trainer"].esam.param_groups[0]["esam_step"] == steps
    assert digits.accuracy(recipe["model"].layers) > 0.75
