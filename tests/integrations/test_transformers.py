"""ESAMTrainer makes ESAM's steps of what a Transformers Trainer is told, and a Trainer with an ESAM alone says it."""

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

from esam_kernels import ESAM, batch_closure, current_pass, token_loss

transformers = pytest.importorskip("transformers", reason="needs the extra 'transformers'")
pytest.importorskip("accelerate", reason="needs the extra 'transformers'")

from esam_kernels.integrations.transformers import ESAMTrainer  # noqa: E402
from esam_kernels.options import OPTIONS  # noqa: E402

# Not the trainer's own advice, but what ESAM says.
OURS = ("error:forwards write", "error:step.. takes a plain step")
pytestmark = [pytest.mark.filterwarnings(one) for one in ("ignore", *OURS)]

INPUTS, TARGETS = (torch.cat(tensors) for tensors in zip(*batches(6)))
DATA = [{"inputs": inputs, "labels": label} for inputs, label in zip(INPUTS, TARGETS)]
RHO = 0.5


class Network(nn.Module):
    """As models of the library are: the loss is the first that it returns."""

    def __init__(self, *extra):
        super().__init__()
        self.layers = mlp(nn.BatchNorm1d(8), *extra)

    def forward(self, inputs, labels=None):
        logits = self.layers(inputs)
        return {"logits": logits} if labels is None else {"loss": cross_entropy(logits, labels), "logits": logits}


class Regression(Network):
    def forward(self, inputs, labels=None):
        logits = self.layers(inputs)[:, :1]
        return {"loss": (logits[:, 0] - labels).square().mean(), "logits": logits}


class Weighted(Network):
    def forward(self, inputs, labels=None):
        outputs = super().forward(inputs, labels)
        if labels is None:
            return outputs
        return {**outputs, "loss": cross_entropy(outputs["logits"], labels, torch.tensor([1.0, 2.0, 3.0]))}


def arguments(folder, **options):
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}
    plain = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0}
    sizes = {"per_device_train_batch_size": 8, "num_train_epochs": 1, "train_sampling_strategy": "sequential"}
    return transformers.TrainingArguments(str(folder), **quiet | plain | sizes | options)


def trained(model, folder, data=DATA, options=None, compute_loss_func=None, **arguments_):
    options = {"rho": RHO, "beta": 1, "gamma": 1} if options is None else options
    trainer = ESAMTrainer(
        model, arguments(folder, **arguments_), train_dataset=data, compute_loss_func=compute_loss_func, **options
    )
    trainer.train()
    return trainer


def by_hand(model, loss, steps, clip=None):
    """SAM with SGD, written out; returned are the weights, and the losses at them."""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    for step in steps:
        moved = perturbed(model, lambda network, step=step: loss(network, step), RHO)
        losses.append(loss(model, step).item())  # whose statistics stay
        loss(moved, step).backward()
        for param, twin in zip(model.parameters(), moved.parameters()):
            param.grad = twin.grad
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return values(model), losses


def mean_loss(network, step, **options):
    """Of a step's micro-batches, of which each is a slice of the data."""
    return sum(cross_entropy(network.layers(INPUTS[rows]), TARGETS[rows], **options) for rows in step) / len(step)


EIGHT = [slice(start, start + 8) for start in range(0, 48, 8)]


def close(these, those, tolerance=1e-6):
    for mine, theirs in zip(these, those):
        torch.testing.assert_close(mine, theirs, atol=tolerance, rtol=tolerance * 10)


def test_with_gamma_1_it_is_sam_by_hand_on_the_model_s_own_loss(tmp_path):
    model = Network()
    expected, losses = by_hand(copy.deepcopy(model), mean_loss, [EIGHT[:4], EIGHT[4:]], clip=0.05)
    trainer = trained(model, tmp_path, gradient_accumulation_steps=4, max_grad_norm=0.05, logging_steps=1)
    close(values(model), expected)
    assert trainer.state.global_step == trainer.esam.param_groups[0]["esam_step"] == 2
    assert [log["loss"] for log in trainer.state.log_history[:2]] == pytest.approx(losses, abs=1e-4)


def test_in_bfloat16(tmp_path):
    model = Network()

    def loss(network, step):
        with torch.autocast("cpu", torch.bfloat16):
            return mean_loss(network, step)

    expected, _ = by_hand(copy.deepcopy(model), loss, [[rows] for rows in EIGHT])
    trained(model, tmp_path, bf16=True)
    close(values(model), expected, 2e-3)


def test_a_loss_function_of_one_s_own(tmp_path):
    model = Network()

    def compute_loss(outputs, labels, num_items_in_batch):
        return 2 * cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch

    expected, _ = by_hand(copy.deepcopy(model), lambda *step: 2 * mean_loss(*step), [EIGHT[:2], EIGHT[2:4], EIGHT[4:]])
    trained(model, tmp_path, compute_loss_func=compute_loss, gradient_accumulation_steps=2)
    close(values(model), expected)


# Samples are selected by one loss of each.


def classifier():
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=3,
        max_position_embeddings=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config)


def llama():
    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def gpt():
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config)


def sequences(count=24):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(11, (count, 6), generator=generator)
    labels = tokens.clone()
    for row, length in enumerate(torch.randint(2, 7, (count,), generator=generator).tolist()):
        labels[row, length:] = -100
    return tokens, labels


def esam(model, **options):
    return ESAM(model.parameters(), torch.optim.SGD, lr=0.1, **options)


def test_sequence_classification(tmp_path):
    tokens, _ = sequences()
    classes = tokens[:, 0] % 3
    data = [{"input_ids": row, "labels": label} for row, label in zip(tokens, classes)]
    model, other = classifier(), classifier()
    options = {"rho": RHO, "gamma": 0.5, "beta": 1}
    trained(model, tmp_path, data, options)
    optimizer, each = esam(other, **options), nn.CrossEntropyLoss(reduction="none")
    for rows in EIGHT[:3]:
        inputs, labels = {"input_ids": tokens[rows]}, classes[rows]
        optimizer.step(batch_closure(other, lambda outputs, y: each(outputs.logits, y), inputs, labels))
    close(values(model), values(other))


def next_token_loss(outputs, labels):
    return token_loss(outputs.logits[:, :-1], labels[:, 1:])


@pytest.mark.parametrize(("language_model", "gamma"), [(llama, 1), (llama, 0.5), (gpt, 0.5)])
def test_language_models_weigh_tokens(tmp_path, language_model, gamma):
    """Also over the micro-batches of a step: what is trained on is the mean over all of its tokens."""
    tokens, labels = sequences()
    data = [{"input_ids": row, "labels": label} for row, label in zip(tokens, labels)]
    model, other = language_model(), language_model()
    options = {"rho": RHO, "gamma": gamma, "beta": 1}
    trained(model, tmp_path, data, options, gradient_accumulation_steps=3)
    optimizer = esam(other, **options)
    closures = [batch_closure(other, next_token_loss, {"input_ids": tokens[i]}, labels[i]) for i in EIGHT[:3]]
    loss = optimizer.step(closures)
    expected = cross_entropy(language_model()(tokens).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    close([loss], [expected.detach()])
    close(values(model), values(other))


def test_token_classification_does_not_shift(tmp_path):
    tokens, labels = sequences()
    data = [{"input_ids": row, "labels": label} for row, label in zip(tokens, labels % 3)]
    config = classifier().config
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(transformers.BertForTokenClassification(config))
    options = {"rho": RHO, "beta": 1, "gamma": 0.5}
    trained(models[0], tmp_path, data, options)
    optimizer = esam(models[1], **options)
    for i in EIGHT[:3]:
        optimizer.step(
            batch_closure(models[1], lambda out, y: token_loss(out.logits, y), {"input_ids": tokens[i]}, labels[i] % 3)
        )
    close(values(models[0]), values(models[1]))


@pytest.mark.parametrize("gamma", [1, 0.5])
def test_label_smoothing(tmp_path, gamma):
    tokens, _ = sequences()
    classes = tokens[:, 0] % 3
    data = [{"input_ids": row, "labels": label} for row, label in zip(tokens, classes)]
    model, other = classifier(), classifier()
    options = {"rho": RHO, "beta": 1, "gamma": gamma}
    trained(model, tmp_path, data, options, label_smoothing_factor=0.3)
    optimizer, each = esam(other, **options), nn.CrossEntropyLoss(reduction="none", label_smoothing=0.3)
    for i in EIGHT[:3]:
        optimizer.step(batch_closure(other, lambda out, y: each(out.logits, y), {"input_ids": tokens[i]}, classes[i]))
    close(values(model), values(other))


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path):
    ends = []
    options = {"save_strategy": "steps", "save_steps": 3, "num_train_epochs": 2, "gradient_accumulation_steps": 2}
    for resume in (None, str(tmp_path / "checkpoint-3")):
        model = Network(nn.Dropout(0.3))
        trainer = ESAMTrainer(
            model,
            arguments(tmp_path, optim="adamw_torch", lr_scheduler_type="linear", **options),
            train_dataset=DATA,
            rho=RHO,
        )
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.state.global_step == trainer.esam.param_groups[0]["esam_step"] == 6
        ends.append(values(model))
    assert same(*ends)


@pytest.mark.parametrize("overflows", [False, True])
@pytest.mark.parametrize("gamma", [1, 0.5])
def test_with_a_scaler(tmp_path, gamma, overflows):
    """Accelerate makes one on a GPU only: here it gets one of a CPU."""
    ends = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        model = Network()
        if overflows and scaler is not None:
            model.layers[0].weight.register_hook(lambda grad: grad * torch.inf)
        options = {"rho": RHO, "beta": 1, "gamma": gamma}
        trainer = ESAMTrainer(model, arguments(tmp_path, gradient_accumulation_steps=2), train_dataset=DATA, **options)
        trainer.accelerator.scaler = scaler
        trainer.train()
        ends.append(list(model.parameters()))
    assert (scaler.get_scale() < 1024) == overflows
    if overflows:
        assert same(ends[1], Network().parameters())
    else:
        close(*ends)


def test_an_optimizer_that_is_given_is_the_base(tmp_path):
    model, other = Network(), Network()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"rho": RHO, "beta": 1, "gamma": 1}
    trainer = ESAMTrainer(model, arguments(tmp_path), train_dataset=DATA, optimizers=(sgd, None), **options)
    trainer.train()
    assert trainer.esam.base is sgd
    expected, _ = by_hand(other, mean_loss, [[rows] for rows in EIGHT])
    close(values(model), expected)


def test_all_options_are_arguments():
    arguments_ = inspect.signature(ESAMTrainer).parameters
    assert {name: arguments_[name].default for name in OPTIONS} == {one.name: one.default for one in OPTIONS.values()}


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="beta = 2"):
        trained(Network(), tmp_path, options={"beta": 2})
    with pytest.raises(TypeError, match="betta"):
        trained(Network(), tmp_path, options={"betta": 0.5})
    with pytest.raises(ValueError, match=r"compute_loss_func.*gamma=1"):
        trained(Network(), tmp_path, options={}, compute_loss_func=lambda *_: None)
    numbers = [{"inputs": row["inputs"], "labels": row["inputs"][0]} for row in DATA]
    with pytest.raises(TypeError, match=r"float32 labels.*gamma=1"):
        trained(Regression(), tmp_path, numbers, options={})
    with pytest.raises(ValueError, match=r"own loss is .*mean cross-entropy.*gamma=1.*sample_losses"):
        trained(Weighted(), tmp_path, options={})
    with pytest.raises(ValueError, match=r"without labels.*inputs.*gamma=1"):
        trained(Network(), tmp_path, [{"inputs": row["inputs"]} for row in DATA], options={})


def test_a_trainer_that_only_gets_an_esam_says_that_it_does_not_use_it(tmp_path):
    model = Network()
    trainer = transformers.Trainer(
        model, arguments(tmp_path), train_dataset=DATA, optimizers=(esam(model, gamma=1), None)
    )
    with pytest.warns(UserWarning, match=r"plain step.*no backward\(\) of ESAM"):
        trainer.train()


# Two processes, as torchrun starts them.


def replicas(rank, folder="replicas", **options):
    ranks_of = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
    os.environ.update({name: str(value) for name, value in ranks_of.items()})
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="29500")  # asked for, though the group is there
    warnings.filterwarnings("error", message="forwards write")
    model = Network()
    trainer = trained(
        model,
        folder,
        options={"rho": RHO, "beta": 1, "gamma": 1} | options,
        gradient_accumulation_steps=3,
        per_device_train_batch_size=4,
        ddp_backend="gloo",
    )
    return type(trainer.model_wrapped).__name__, trainer.state.global_step, values(model)


SCENARIOS = {"the model's own loss": (replicas, {}), "one loss for each sample": (replicas, {"gamma": 0.99})}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        return ranks.run(__name__, 2, tmp_path_factory.mktemp("ranks"))


def test_two_processes(results):
    """Each rank climbs by itself; gradients are averaged. Batches are dealt out in turn."""
    models = [Network(), Network()]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    for start in range(0, 48, 24):
        gradients = []
        for rank, model in enumerate(models):
            model.load_state_dict(models[0].state_dict())
            step = [slice(first, first + 4) for first in range(start + 4 * rank, start + 24, 8)]
            moved = perturbed(model, lambda network, step=step: mean_loss(network, step), RHO)
            gradients.append(torch.autograd.grad(mean_loss(moved, step), list(moved.parameters())))
            if rank == 0:
                statistics = copy.deepcopy(model)
                mean_loss(statistics, step)
        for model, optimizer in zip(models, optimizers):
            for param, *of_ranks in zip(model.parameters(), *gradients):
                param.grad = (of_ranks[0] + of_ranks[1]) / 2
            optimizer.step()
        models[0].layers[1].load_state_dict(
            {**models[0].layers[1].state_dict(), **dict(statistics.layers[1].named_buffers())}
        )
    (kind, steps, one), (_, _, other) = results("the model's own loss")
    assert (kind, steps) == ("DistributedDataParallel", 2)
    close(one, values(models[0]))
    weights = len(list(models[0].parameters()))
    assert same(one[:weights], other[:weights])


def test_two_processes_that_select(results):
    (kind, steps, one), (_, _, other) = results("one loss for each sample")
    assert (kind, steps) == ("DistributedDataParallel", 2)
    weights = len(list(Network().parameters()))
    assert same(one[:weights], other[:weights])
    assert not same(one, values(Network()))


@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_batches_of_a_step_that_was_interrupted_are_not_of_the_next_training(tmp_path, gamma):
    class Interrupts(transformers.TrainerCallback):
        def on_substep_end(self, *args, **kwargs):
            trainer.remove_callback(self)
            raise KeyboardInterrupt

    seen = []
    model = Network()
    model.layers.register_forward_hook(lambda module, inputs, output: seen.append((current_pass(), len(inputs[0]))))
    args = arguments(tmp_path, gradient_accumulation_steps=2, max_steps=1)
    trainer = ESAMTrainer(model, args, train_dataset=DATA, gamma=gamma)
    trainer.add_callback(Interrupts())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    seen.clear()
    trainer.train()
    assert [rows for name, rows in seen if name == "ascend"] == [8, 8]


def test_a_weighted_loss_is_told_from_the_mean_also_where_the_first_batches_have_one_class(tmp_path):
    """Of one class alone the weighted mean is the mean."""
    data = [{**row, "labels": torch.tensor(int(i >= 20))} for i, row in enumerate(DATA)]
    with pytest.raises(ValueError, match=r"own loss is .*mean cross-entropy"):
        trained(Weighted(), tmp_path, data, options={})


def test_a_loss_that_is_overridden_has_no_samples_to_select(tmp_path):
    class Own(ESAMTrainer):
        def compute_loss(self, *args, **kwargs):
            calls.append(super().compute_loss(*args, **kwargs))
            return calls[-1]

    calls = []
    with pytest.raises(ValueError, match=r"compute_loss returns one loss.*gamma=1"):
        Own(Network(), arguments(tmp_path), train_dataset=DATA)
    Own(Network(), arguments(tmp_path, max_steps=1), train_dataset=DATA, gamma=1).train()
    assert len(calls) == 2


@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_a_schedule_free_optimizer_trains_after_an_evaluation(tmp_path, gamma):
    pytorch_optimizer = pytest.importorskip("pytorch_optimizer")
    model = Network()
    optimizer = pytorch_optimizer.ScheduleFreeAdamW(model.parameters(), lr=1e-3)
    modes = []
    optimizer.register_step_pre_hook(lambda one, args, kwargs: modes.append(one.param_groups[0]["train_mode"]))
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=2)
    ESAMTrainer(
        model, args, train_dataset=DATA, eval_dataset=DATA, optimizers=(optimizer, None), gamma=gamma, rho=0.01
    ).train()
    assert modes
    assert all(modes)
