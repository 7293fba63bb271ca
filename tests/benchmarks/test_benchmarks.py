"""The benchmarks run end to end, and what they rest on (data, networks, statistics, tables) is right."""

import io
import json
import pickle
import re
import subprocess
import sys
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.commands import frontier, memory, operators, rounding, step_cost, train
from benchmarks.measuring.clock import Stopwatch, peak_memory, ratio, spread, turn
from benchmarks.report import plots, tables
from benchmarks.training import authors, data, models, trainers
from benchmarks.training.losses import mean_loss, per_sample_loss, per_sequence_loss
from benchmarks.training.methods import METHODS
from benchmarks.training.trainers import TRAINERS, ESAMTrainer, Settings, trainer
from esam_kernels import ops

CPU = torch.device("cpu")
SETTINGS = Settings(lr=0.05, momentum=0.9, weight_decay=5e-4, esam={"rho": 0.05, "beta": 0.6, "gamma": 0.5})


def load(name, file=None):
    return data.load(name, file, CPU, torch.contiguous_format)


# Data.


def smooth_images(n, seed):
    """RGB images that JPEG keeps almost as they are."""
    from PIL import Image  # here, so that the rest runs without the package

    corners = np.random.default_rng(seed).integers(0, 256, (n, 2, 2, 3), np.uint8)
    return np.stack([np.asarray(Image.fromarray(c).resize((32, 32), Image.Resampling.BILINEAR)) for c in corners])


@pytest.fixture
def cifar_folder(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        pixels = smooth_images(4, seed=i).transpose(0, 3, 1, 2).reshape(4, -1)
        (folder / name).write_bytes(pickle.dumps({b"data": pixels, b"labels": [i, 1, 2, 3]}, protocol=2))
    return folder


def test_cifar_from_its_folder_and_its_archive(cifar_folder, tmp_path):
    archive = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(cifar_folder, cifar_folder.name)
    for images in load("cifar10", cifar_folder), load("cifar10", archive):
        assert images.label == "CIFAR-10"
        assert images.train_images.shape == (20, 3, 32, 32)
        assert images.train_labels[::4].tolist() == [0, 1, 2, 3, 4]
        expected = torch.from_numpy(smooth_images(4, seed=5).transpose(0, 3, 1, 2))
        assert torch.equal(images.test_images, expected)
        assert images.test_labels.tolist() == [5, 1, 2, 3]


def test_a_pickle_that_would_run_code_is_refused(cifar_folder):
    (cifar_folder / "test_batch").write_bytes(pickle.dumps({b"data": print}))
    with pytest.raises(ValueError, match="print does not belong"):
        load("cifar10", cifar_folder)


def test_cifar_from_a_pack_of_jpeg_files(tmp_path):
    pack = {"classes": np.array(["cat", "dog"])}
    for split, n in ("train", 6), ("test", 3):
        files = []
        image_module = pytest.importorskip("PIL.Image")
        for image in smooth_images(n, seed=n):
            buffer = io.BytesIO()
            image_module.fromarray(image).save(buffer, "JPEG", quality=95)
            files.append(buffer.getvalue())
        pack[f"{split}_jpeg"] = np.frombuffer(b"".join(files), np.uint8)
        pack[f"{split}_offsets"] = np.cumsum([0, *map(len, files)])
        pack[f"{split}_labels"] = np.arange(n, dtype=np.uint8)
    np.savez_compressed(tmp_path / "pack.npz", **pack)
    images = load("cifar10", tmp_path / "pack.npz")
    assert images.label == "CIFAR-10 (JPEG copy)"
    expected = torch.from_numpy(smooth_images(6, seed=6).transpose(0, 3, 1, 2))
    assert (images.train_images.int() - expected.int()).abs().float().mean() < 4
    assert images.test_labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize(("name", "file"), [("cifar10", None), ("cifar10", "nowhere"), ("digits", "nowhere")])
def test_a_missing_or_needless_file_is_refused(tmp_path, name, file):
    with pytest.raises(ValueError, match="--data-file"):
        load(name, file and tmp_path / file)


def test_augmentation_is_a_crop_of_the_padded_image_or_of_its_mirror():
    images = torch.arange(1, 64 * 3 * 32 * 32 + 1).view(64, 3, 32, 32)  # no two pixels are equal, none is the filling
    augmented = data.augment(images, 4, True, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    offsets, mirrored = set(), 0
    for before, after in zip(padded, augmented):
        crops = [(y, x, before[:, y : y + 32, x : x + 32]) for y in range(9) for x in range(9)]
        found = [
            (y, x, flip)
            for y, x, crop in crops
            for flip in (0, 1)
            if torch.equal(crop.flip(2) if flip else crop, after)
        ]
        assert len(found) == 1
        offsets.add(found[0][:2])
        mirrored += found[0][2]
    assert len(offsets) > 30
    assert 16 < mirrored < 48


def test_batches_are_shuffled_normalized_and_the_same_for_the_same_seed():
    images = load("digits")
    epochs = [list(images.train_batches(128, torch.Generator().manual_seed(seed))) for seed in (0, 0, 1)]
    assert [len(epoch) for epoch in epochs] == [images.steps_per_epoch(128)] * 3 == [7] * 3
    pixels = torch.cat([inputs for inputs, _ in epochs[0]])
    assert pixels.shape == (896, 1, 8, 8)
    assert abs(pixels.mean()) < 0.2  # the shift loses a little ink
    assert 0.8 < pixels.std() < 1.1
    labels = [torch.cat([targets for _, targets in epoch]) for epoch in epochs]
    assert torch.equal(labels[0], labels[1])
    assert not torch.equal(labels[0], labels[2])
    assert sum(len(targets) for _, targets in images.test_batches(100)) == 797


# Networks.


@pytest.mark.parametrize(
    ("name", "shape", "parameters", "tensors"),
    [
        ("resnet18", {}, 11_173_962, 62),
        ("resnet50", {}, 23_520_842, 161),
        ("wrn28_10", {}, 36_479_194, None),
        ("vit_s", {"image_size": 224, "patch_size": 16, "classes": 1000}, 22_050_664, None),
        ("vit_s", {}, None, None),
        ("small", {}, None, None),
    ],
)
def test_networks_have_the_published_sizes(name, shape, parameters, tensors):
    size = shape.get("image_size", 32)
    with torch.device("meta"):
        model = models.build(name, **shape)
        assert model(torch.empty(2, 3, size, size)).shape == (2, shape.get("classes", 10))
    assert parameters in (None, sum(param.numel() for param in model.parameters()))
    assert tensors in (None, len(list(model.parameters())))


def test_gpt_has_the_published_size():
    with torch.device("meta"):
        model = models.build("gpt")
        assert model(torch.empty(2, 16, dtype=torch.int64)).shape == (2, 16, 50257)
    assert sum(param.numel() for param in model.parameters()) == 124_439_808


def test_gpt_sees_no_later_token_and_every_earlier_one():
    model = models.build("gpt", width=64, vocabulary=10, context=8)
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]])
    other = torch.tensor([[1, 2, 3, 4, 9, 6, 7, 8]])
    differs = (model(tokens) != model(other)).any(2)
    assert differs.tolist() == [[False] * 4 + [True] * 4]


def test_vit_tells_places_apart_and_takes_smaller_images():
    model = models.build("vit_s", width=64, channels=1)
    images = torch.randn(2, 1, 32, 32)
    assert not torch.allclose(model(images), model(images.roll(4, 2)), atol=1e-4)
    assert model(images[:, :, :8, :8]).shape == (2, 10)


def test_transformers_refuse_shapes_that_do_not_divide():
    with pytest.raises(ValueError, match="patches of 5"):
        models.build("vit_s", width=64, patch_size=5)
    with pytest.raises(ValueError, match="width 200 cannot be shared by 3 heads"):
        models.build("gpt", width=200)


def test_networks_start_from_the_weights_of_their_seed():
    one, same, other = (models.build("small", width=4, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters()))
    assert not torch.equal(one.head.weight, other.head.weight)


# Methods.


# All but one that needs a clone, and one that Triton's interpreter takes seconds for.
RUNNABLE = [name for name in step_cost.TIMED if name not in ("esam-authors", "esam-triton")]
RUNNABLE += ["sgd-4-micro-batches", "esam-4-micro-batches-over-all"]
RUNNABLE = [name for name in RUNNABLE if name not in trainers.left_out(RUNNABLE)]  # whose packages are missing


@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", RUNNABLE)
def test_every_method_trains_in_every_precision(name, amp):
    model = models.build("small", width=4, channels=1)
    method = trainer(name, model, replace(SETTINGS, lr=0.3, amp=amp), CPU)
    images = load("digits")
    inputs, targets = next(images.train_batches(64, torch.Generator().manual_seed(0)))
    losses = [method.step(inputs, targets).item() for _ in range(20)]
    assert losses[-1] < 0.8 * losses[0]
    assert model.features[1].num_batches_tracked > 0
    assert all(param.dtype == torch.float32 for param in model.parameters())


@pytest.mark.parametrize("name", ["sgd", "sam", "sam-davda54", "esam"])
def test_fp16_skips_a_step_that_overflows_and_backs_off(name):
    model = models.build("small", width=4, channels=1)
    method = trainer(name, model, replace(SETTINGS, amp=torch.float16), CPU)
    method.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    before = [param.clone() for param in model.parameters()]
    method.step(torch.randn(8, 1, 8, 8), torch.arange(8))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert method.scaler.get_scale() == 2.0**99


@pytest.mark.parametrize("amp", [None, torch.float16])
@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("name", ["sam", "sam-davda54", "sam-foreach"])
def test_all_implementations_of_sam_take_the_same_steps(name, base, amp):
    lr = {"sgd": 0.05, "adamw": 1e-3}[base]
    settings = replace(SETTINGS, amp=amp, base=base, lr=lr)
    if name == "sam":
        pytest.importorskip("pytorch_optimizer")
    one, other = (
        trainer(each, models.build("small", width=4, channels=1), settings, CPU) for each in (name, "sam-own")
    )
    start = [param.clone() for param in one.model.parameters()]
    for _, (inputs, targets) in zip(range(6), load("digits").train_batches(64, torch.Generator().manual_seed(0))):
        losses = [method.step(inputs, targets) for method in (one, other)]
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
        # Not the batches that batch norm has counted, which the others count twice.
        states = [
            [tensor for tensor in method.model.state_dict().values() if tensor.is_floating_point()]
            for method in (one, other)
        ]
        torch.testing.assert_close(*states, rtol=1e-3, atol=1e-5)
    assert not any(torch.equal(a, b) for a, b in zip(start, one.model.parameters()))


def test_rows_of_backends_use_them(monkeypatch):
    calls = []
    monkeypatch.setattr(ops.reference, "perturb_", lambda *arguments: calls.append(arguments))
    method = trainer("esam-reference", models.build("small", width=4, channels=1), SETTINGS, CPU)
    method.step(torch.randn(8, 1, 8, 8), torch.arange(8))
    assert len(calls) == 1


def test_sequences_weigh_as_many_tokens_as_they_have():
    images = data.TokenData(vocabulary=7, context=12, device=CPU)
    tokens, targets = next(images.train_batches(64, torch.Generator().manual_seed(0)))
    assert tokens.shape == targets.shape == (64, 12)
    real = targets != data.PADDING
    assert torch.equal(targets[:, :-1][real[:, :-1]], tokens[:, 1:][real[:, :-1]])  # the next token
    assert real.int().diff(dim=1).max() <= 0  # padding is at the end
    logits = torch.randn(64, 12, 7)
    losses, counts = per_sequence_loss(logits, targets)
    assert counts.tolist() == real.sum(1).tolist()
    assert set(counts.tolist()) == set(range(3, 13))
    flat = torch.nn.functional.cross_entropy(logits[real], targets[real])  # over all tokens alike
    torch.testing.assert_close(mean_loss((losses, counts)), flat)


# The authors' code: a class of the same interface stands in for it.

AUTHORS_INTERFACE = """
import torch

class ESAM(torch.optim.Optimizer):
    def __init__(self, params, base_optimizer, rho=0.05, beta=1.0, gamma=1.0, adaptive=False, **kwargs):
        super().__init__(params, {"rho": rho})
        self.base_optimizer, self.rho, self.beta, self.gamma = base_optimizer, rho, beta, gamma
        self.param_groups, self.paras = base_optimizer.param_groups, None

    def step(self):
        inputs, targets, loss_fct, model, defined_backward = self.paras
        self.zero_grad()
        losses = loss_fct(model(inputs), targets)
        defined_backward(losses.mean())
        self.base_optimizer.step()
        self.returnthings = (None, losses.detach())
"""


@pytest.fixture
def authors_clone(tmp_path):
    (tmp_path / "clone" / "utils").mkdir(parents=True)
    (tmp_path / "clone" / authors.FILE).write_text(AUTHORS_INTERFACE)
    return tmp_path / "clone"


@pytest.mark.parametrize("amp", [None, torch.float16])
def test_the_authors_code_is_given_what_it_expects(authors_clone, amp):
    settings = replace(SETTINGS, amp=amp, authors_esam=authors.load(authors_clone))
    one, sgd = (
        trainer(name, models.build("small", width=4, channels=1), settings, CPU) for name in ("esam-authors", "sgd")
    )
    assert (one.optimizer.rho, one.optimizer.beta, one.optimizer.gamma) == (0.05, 0.6, 0.5)
    for inputs, targets in load("digits").train_batches(64, torch.Generator().manual_seed(0)):
        assert torch.equal(one.step(inputs, targets), sgd.step(inputs, targets))
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), sgd.model.parameters()))


def test_a_folder_without_the_authors_code_is_refused(tmp_path, authors_clone, capsys):
    with pytest.raises(SystemExit):
        step_cost.main(["--quick", "--authors-code", str(tmp_path)])
    assert "utils/Esam.py does not exist: give the folder of a clone" in capsys.readouterr().err
    (authors_clone / authors.FILE).write_text("x = 1")
    with pytest.raises(ValueError, match="has no class ESAM"):
        authors.load(authors_clone)


# Measurements.


def test_spread_and_ratio_of_known_timings():
    assert spread([3.0, 1.0, 2.0, 5.0, 4.0]) == (3.0, 2.0, 4.0)
    # A disturbance that meets both, such as one that doubles each time, leaves the ratio alone.
    base = [2.0**i for i in range(9)]
    assert ratio([1.5 * seconds for seconds in base], base) == (1.5, 1.5, 1.5)
    with pytest.raises(ValueError):  # noqa: PT011
        ratio([1.0], [1.0, 2.0])


def test_stopwatch_counts_laps_anew_after_each_reading():
    stopwatch = Stopwatch(CPU)
    for laps in (2, 1):
        for _ in range(laps + 1):
            stopwatch.mark()
        seconds = stopwatch.laps()
        assert len(seconds) == laps
        assert all(0 <= lap < 1 for lap in seconds)


@pytest.mark.parametrize(("device", "runs"), [("cpu", 0), ("cuda", 1)])
def test_a_gpu_alone_is_given_work_before_it_is_timed(device, runs):
    work = []
    Stopwatch(torch.device(device)).lead(lambda: work.append(1))
    assert len(work) == runs


def test_a_gpu_is_kept_busy_for_longer_than_the_host_takes_to_launch_what_is_timed(monkeypatch):
    """On a fake GPU, with a host that launches for 30 ms."""
    now, done = [0.0], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            done.append("event")

        def synchronize(self):
            done.append("wait")

        def elapsed_time(self, end):
            return 5.0

    def call():
        now[0] += 0.03
        done.append("call")

    monkeypatch.setattr(operators.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("wait"))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(operators, "keep_busy", lambda seconds: done.append(f"busy {seconds > 1.5 * 0.03}"))
    assert operators.seconds(call, "cuda") == (pytest.approx(0.005), pytest.approx(0.03))
    assert done == ["wait", "call", "busy True", "event", "call", "event", "wait"]


FLAGS = """
import torch
from benchmarks.measuring.environment import tf32

print(*tf32().values())
torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = True, False
print(*tf32().values())
torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision = "ieee", "tf32"
print(*tf32().values())
"""


def test_tf32_is_told_through_whichever_of_torch_s_two_interfaces_it_was_set():
    """In a process of its own: torch has no way back from its new interface to the old one."""
    run = subprocess.run([sys.executable, "-c", FLAGS], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "True", "True", "False", "False", "True"]  # by default, old, new


def test_peak_memory_counts_what_lives_at_once():
    megabyte = 1 << 18  # floats

    def work():
        held = torch.empty(megabyte)
        for _ in range(3):
            held = held + 1  # the old and the new one

    assert peak_memory(CPU, work) == pytest.approx(2 * 2**20, rel=0.01)


# The jobs.


def test_train_end_to_end(tmp_path, capsys):
    arguments = ["--device", "cpu", "--width", "4", "--epochs", "2", "--seeds", "2", "--sharpness-samples", "20"]
    train.main([*arguments, "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert METHODS["esam"].label in printed
    assert "| loss rise at 0.05 |" in printed
    result = json.loads((tmp_path / "train_digits_cpu.json").read_text())
    assert list(result["methods"]) == list(train.TRAINED)
    assert tables.train(result) in printed
    _, _, sharpness, about = tables.blocks(tables.train(result))
    converged = [seed["hessian"]["converged"] for seeds in result["sharpness"]["seeds"].values() for seed in seeds]
    assert f"{sum(converged)} of {len(converged)} converged" in about
    assert "over 20 training images" in about
    for name, method in result["methods"].items():
        assert [len(curve) for curve in result["curves"][name]] == [2, 2]
        assert method["seeds"] == 2
        assert method["peak_memory_bytes"] > 0
        final = [curve[-1]["test_accuracy"] for curve in result["curves"][name]]
        assert method["test_accuracy_mean"] == pytest.approx(sum(final) / 2)
        assert method["diverged_seeds"] == []
        measured = result["sharpness"]["seeds"][name]
        (row,) = [row for row in sharpness.rows if row[0] == method["label"]]
        for column, values in (
            ("norm of the weights", [seed["weight_norm"] for seed in measured]),
            ("loss rise at 0.05", [seed["gradient_rise"][1] for seed in measured]),
            ("loss rise at 0.4", [seed["gradient_rise"][4] for seed in measured]),
            ("top eigenvalue", [seed["hessian"]["value"] for seed in measured]),
        ):
            shown, deviation = map(float, row[sharpness.columns.index(column)].partition(",")[0].split(" ± "))
            assert shown == pytest.approx(sum(values) / 2, rel=0.05)
            assert deviation == pytest.approx(abs(values[0] - values[1]) / 2**0.5, rel=0.05)
    assert result["methods"]["sgd"]["time_over_sgd"]["median"] == 1
    assert result["settings"]["rho"] == 0.05
    assert str(tmp_path) not in json.dumps(result)
    for plot in ("time", "cost", "sharpness"):
        assert 1_000 < (tmp_path / f"train_digits_cpu_{plot}.svg").stat().st_size < 150_000


def test_a_time_budget_stops_at_an_epoch_and_says_so(tmp_path, capsys):
    arguments = ["--device", "cpu", "--width", "4", "--optimizers", "sgd", "esam", "--time-budget", "0"]
    train.main([*arguments, "--output", str(tmp_path)])
    assert "stopped by the time budget after 1 of 40 epochs" in capsys.readouterr().out
    result = json.loads((tmp_path / "train_digits_cpu.json").read_text())
    assert {name: len(curves) for name, curves in result["curves"].items()} == {"sgd": 1, "esam": 1}


def test_seeds_that_were_not_finished_do_not_count_for_accuracy():
    epochs = [{"seconds": 1.0, "train_loss": 0.5, "test_accuracy": accuracy} for accuracy in (10.0, 90.0, 20.0)]
    summary = train.summarize({"sgd": [epochs[:2], epochs[2:]]}, steps=10, epochs=2)["sgd"]
    assert (summary["seeds"], summary["epochs"], summary["test_accuracy_mean"]) == (1, 2, 90.0)
    assert summary["seconds_per_step"]["median"] == 0.1


def test_seeds_that_diverged_are_listed_and_do_not_count_for_accuracy():
    def curve(*losses):
        return [{"seconds": 1.0, "train_loss": loss, "test_accuracy": 80.0 if loss else 10.0} for loss in losses]

    curves = {"sgd": [curve(0.5, None), curve(None, 0.5)], "sam": [curve(0.5, None), curve(None, None)]}
    summary = train.summarize(curves, steps=10, epochs=2)
    assert (summary["sgd"]["diverged_seeds"], summary["sgd"]["test_accuracy_mean"]) == ([0], 80.0)
    assert (summary["sam"]["diverged_seeds"], summary["sam"]["test_accuracy_mean"]) == ([0, 1], None)
    assert summary["sgd"]["seeds"] == summary["sam"]["seeds"] == 2


def test_a_method_that_diverges_is_shown_and_stops_no_other(tmp_path, capsys):
    """Its rho is such that the loss at the perturbed weights is not finite, as are the rises at such distances."""
    arguments = ["--device", "cpu", "--width", "4", "--epochs", "2", "--seeds", "2", "--sharpness-samples", "20"]
    train.main([*arguments, "--rho", "1e38", "--optimizers", "sgd", "sam", "--output", str(tmp_path)])
    result = json.loads((tmp_path / "train_digits_cpu.json").read_text())
    assert [result["methods"][name]["diverged_seeds"] for name in ("sgd", "sam")] == [[], [0, 1]]
    assert [len(result["sharpness"]["seeds"][name]) for name in ("sgd", "sam")] == [2, 0]
    printed = capsys.readouterr().out
    assert re.search(r"^\| SAM \(pytorch_optimizer\) \| +diverged \|", printed, re.MULTILINE)
    assert re.search(r"^\| SGD +\|.*( +nan ± nan \|){5}$", printed, re.MULTILINE)
    assert "SAM (pytorch_optimizer) (2 of 2 diverged)" in plots.describe_accuracy_over_time(result)
    assert tables.summary([result])


def test_methods_take_turns_in_the_shared_order(monkeypatch):
    """That of ``clock.turn``, in which each follows every other equally often."""
    order = []
    names = ["sgd", "sam", "esam"]
    args = train.parse_args(
        ["--device", "cpu", "--width", "4", "--epochs", "6", "--seeds", "1", "--optimizers", *names]
    )
    args.sharpness_samples = 0
    monkeypatch.setattr(train.Run, "train_epoch", lambda run, progress: order.append(type(run.trainer)))
    train.train(load("digits"), args, float("inf"))
    trainers = [TRAINERS[METHODS[name].trainer] for name in names]
    assert order == [trainers[i] for epoch in range(6) for i in turn(3, epoch)]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (["--gamma", "2"], "gamma"),
        (["--rho", "-1"], "rho"),
        (["--train-samples", "3"], "--train-samples 3"),
        (["--data-file", "nowhere"], "leave out --data-file nowhere"),
        (["--width", "0"], "--width 0: at least 1 is needed"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_measured(tmp_path, capsys, change, complaint):
    with pytest.raises(SystemExit) as stopped:
        train.main([*change, "--device", "cpu", "--output", str(tmp_path)])
    assert stopped.value.code == 2
    assert complaint in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
@pytest.mark.parametrize("command", [train, frontier, rounding, memory])
def test_a_gpu_that_is_not_there_is_said(command, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.main(["--device", "cuda", "--output", str(tmp_path)])
    assert "--device cuda: torch finds no GPU here" in capsys.readouterr().err


def test_bf16_rows_are_left_out_or_refused_under_amp(capsys):
    assert train.parse_args(["--amp", "bf16"]).optimizers == ["sgd", "sam", "esam"]
    with pytest.raises(SystemExit):
        train.parse_args(["--amp", "bf16", "--optimizers", "sgd", "esam-bf16"])
    assert "leave out esam-bf16" in capsys.readouterr().err


def test_defaults_follow_the_paper_unless_given():
    args = train.parse_args(["--data", "cifar10", "--model", "wrn28_10", "--lr", "0.2"])
    assert (args.rho, args.beta, args.gamma, args.weight_decay, args.epochs, args.lr) == (0.1, 0.5, 0.5, 1e-3, 200, 0.2)
    args = train.parse_args(["--data", "cifar10"])
    assert (args.model, args.rho, args.beta, args.gamma, args.batch_size) == ("resnet18", 0.05, 0.6, 0.5, 128)


def run_step_cost(folder, *arguments):
    """One counted round of a tiny network."""
    shared = ["--device", "cpu", "--width", "4", "--batch-sizes", "16", "--rounds", "1", "--output", str(folder)]
    step_cost.main([*shared, *arguments])
    return [json.loads(path.read_text()) for path in sorted(folder.glob("step_cost_*.json"))]


def test_step_cost_end_to_end(tmp_path, capsys, authors_clone):
    (result,) = run_step_cost(tmp_path, "--models", "small", "--authors-code", str(authors_clone))
    assert [path.name for path in tmp_path.glob("*.json")] == ["step_cost_cpu_small_b16.json"]
    printed = capsys.readouterr().out
    assert "times the sum of its parts" in printed
    assert all(method["label"] in printed for method in result["methods"].values())
    absent = {*step_cost.TIMED} - {*result["methods"]}  # backends that do not serve, and that of the row "ESAM"
    expected = {f"esam-{backend}" for backend in step_cost.BACKENDS} | trainers.left_out(step_cost.TIMED).keys()
    assert {f"esam-{result['backend']}"} <= absent <= expected
    assert result["left_out"].keys() == absent
    assert all(f"{METHODS[name].label}: {why}" in printed for name, why in result["left_out"].items())
    assert "where 50.0 % would be so by chance" in printed
    assert "small of width 4 (a scaled-down stand-in: the published one's is 64)" in printed
    assert list(result["parts"])[-2:] == ["sum of the parts", "left over"]
    assert len(result["parts"]) == 11
    assert result["environment"]["tf32_convolution"] is True
    assert result["rounds"] == 1
    again = result["methods"]["sgd-again"]["time_over_sgd"]["median"]
    assert result["aa_difference"] == pytest.approx(again - 1)
    assert 0.8 < result["steering"]["cosine"] <= 1
    assert 0.5 <= result["steering"]["overlap"] <= 1
    assert str(tmp_path) not in json.dumps(result)


def test_step_cost_of_several_networks_with_token_weights_and_under_autocast(tmp_path, capsys):
    shape = ["--vocabulary", "16", "--context", "8"]
    results = run_step_cost(tmp_path, "--models", "gpt", "small", "--methods", "sam", "--amp", "fp16", *shape)
    assert [result["settings"]["model"] for result in results] == ["gpt", "small"]
    assert all(list(result["methods"]) == ["sgd", "sgd-again", "sam", "esam"] for result in results)
    assert all(result["steering"] is None for result in results)
    assert ", batch 16, fp16 autocast, sequences of up to 8 out of 16 tokens" in capsys.readouterr().out


def test_a_time_budget_leaves_the_first_case_one_round_and_the_others_none(tmp_path, capsys):
    arguments = ["--models", "small", "--methods", "esam", "--rounds", "9", "--time-budget", "0"]
    (result,) = run_step_cost(tmp_path, *arguments, "--batch-sizes", "20", "16")
    assert (result["rounds"], result["settings"]["batch_size"]) == (1, 16)
    assert "small, batch 20: left out, since the time budget of 0 seconds was used up" in capsys.readouterr().out


def test_whole_parts_and_floor_have_as_many_visits_in_turns_and_the_draw_of_the_round(tmp_path, monkeypatch):
    steps = []  # (what, which weights it draws)
    in_parts = []

    def esam_step(method, *batch):
        weights = step_cost.drawn(method, method.optimizer.param_groups[0]["esam_step"])
        found = {i for i, weight in enumerate(method.model.parameters()) if any(weight is w for w in weights)}
        steps.append(("parts" if in_parts else "whole", found))
        return whole(method, *batch)

    def parts_of_step(*arguments):
        in_parts.append(True)
        found = parts(*arguments)
        in_parts.clear()
        return found

    def floor_of_step(bare, inputs, targets, weights):
        found = {i for i, weight in enumerate(bare.model.parameters()) if any(weight is w for w in weights)}
        steps.append(("floor", found))
        floor(bare, inputs, targets, weights)

    whole, parts, floor = ESAMTrainer.step, step_cost.parts_of_step, step_cost.floor_of_step
    monkeypatch.setattr(ESAMTrainer, "step", esam_step)
    monkeypatch.setattr(step_cost, "parts_of_step", parts_of_step)
    monkeypatch.setattr(step_cost, "floor_of_step", floor_of_step)
    run_step_cost(tmp_path, "--models", "small", "--methods", "sgd")
    visits = step_cost.VISITS["sgd"]
    assert len(steps) == (step_cost.WARM_UP + 1) * visits * 3
    rounds = [steps[i : i + 3 * visits] for i in range(0, len(steps), 3 * visits)]
    for one in rounds:
        assert all(drawn == one[0][1] for _, drawn in one)
        trios = [[what for what, _ in one[i : i + 3]] for i in range(0, len(one), 3)]
        assert all(len(set(place)) == 3 for place in (*trios, *zip(*trios)))  # each has each place once
    assert any(one[0][1] != rounds[0][0][1] for one in rounds)


def test_a_case_without_memory_ends_no_other(tmp_path, capsys, monkeypatch):
    def measure(args, *rest):
        if args.batch_size == 16:
            raise torch.OutOfMemoryError("tried to allocate")
        return measured(args, *rest)

    measured = step_cost.measure
    monkeypatch.setattr(step_cost, "measure", measure)
    arguments = ["--models", "small", "--methods", "sgd"]
    (result,) = run_step_cost(tmp_path, *arguments, "--batch-sizes", "16", "20")
    assert result["settings"]["batch_size"] == 20
    assert "small, batch 16: left out, since it takes more memory than the device has" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no case was measured"):
        run_step_cost(tmp_path, *arguments, "--batch-sizes", "16")


def test_what_has_diverged_is_refused_and_ends_no_other_case(tmp_path, monkeypatch):
    def measure(args, *rest):
        args.lr = 1e30 if args.batch_size == 16 else args.lr
        return measured(args, *rest)

    measured = step_cost.measure
    monkeypatch.setattr(step_cost, "measure", measure)
    with pytest.raises(SystemExit, match=r"small, batch 16: sgd has diverged.*: lower --lr 1e\+30"):
        run_step_cost(tmp_path, "--models", "small", "--methods", "sgd", "--batch-sizes", "16", "20")
    assert [path.name for path in tmp_path.glob("*.json")] == ["step_cost_cpu_small_b20.json"]


def test_sam_is_left_out_where_its_package_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trainers, "find_spec", lambda name: None)
    (result,) = run_step_cost(tmp_path, "--models", "small")
    assert "sam" not in result["methods"]
    assert "sam-davda54" in result["methods"]
    assert result["left_out"]["sam"] == "the package pytorch_optimizer is not installed"
    assert "Left out: SAM (pytorch_optimizer): the package pytorch_optimizer" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        step_cost.main(["--methods", "sam"])
    assert "--methods sam: the package pytorch_optimizer is not installed" in capsys.readouterr().err


def test_cases_have_their_own_defaults_unless_something_is_asked_for():
    def shapes(*arguments):
        return [
            (args.model, args.width, args.batch_size, args.image_size, args.beta)
            for args in step_cost.parse_args(["--device", *arguments])[1]
        ]

    assert [shape for shape in shapes("cpu") if shape[0] == "resnet18"] == [
        ("resnet18", 32, batch_size, 32, 0.6) for batch_size in (8, 64, 128)
    ]
    assert shapes("cuda", "--models", "wrn28_10", "vit_s", "--batch-sizes", "7") == [
        ("wrn28_10", None, 7, 32, 0.5),
        ("vit_s", None, 7, 224, 0.6),
    ]
    batch_sizes = [shape[2] for shape in shapes("cuda")]
    assert batch_sizes == sorted(batch_sizes)  # the cheapest first
    assert shapes("cuda", "--models", "vit_s", "--width", "64", "--image-size", "64", "--batch-sizes", "2") == [
        ("vit_s", 64, 2, 64, 0.6)
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "sam", "sgd-bf16", "--amp", "fp16"], "--methods sgd-bf16: --amp sets the precision"),
        (["--methods", "esam-authors"], "--methods esam-authors: --authors-code says where"),
        (["--rounds", "0"], "--rounds and --batch-sizes must be at least 1"),
        (["--models", "gpt", "--context", "3"], "--context 3: at least 4 is needed"),
        (["--width", "0"], "--width 0: at least 1 is needed"),
        (["--time-budget", "nan"], "--time-budget nan: seconds are needed"),
        (["--models", "gpt", "--width", "200"], "width 200 cannot be shared by 3 heads"),
        (["--gamma", "1.5"], "gamma = 1.5: a number in (0, 1] is needed"),
        (["--lr", "-1"], "Invalid learning rate: -1.0"),
        (["--data", "cifar10"], "--data-file"),
        pytest.param(
            ["--device", "cuda"],
            "--device cuda: torch finds no GPU here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU"),
        ),
        (["--models", "small", "--batch-sizes", "16", "2000"], "has 1000 images only"),
        (["--models", "small", "--image-size", "30"], "a multiple of 8"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        step_cost.main(["--device", "cpu", "--output", str(tmp_path), *arguments])
    error = capsys.readouterr().err
    assert message in error
    assert "usage:" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("amp", [None, torch.bfloat16])
@pytest.mark.parametrize("model", ["small", "gpt"])
def test_the_parts_are_the_step(model, amp):
    """From the same weights with the same draws, the parts leave the weights and buffers that ESAM leaves."""
    settings, loss_fn = replace(SETTINGS, amp=amp), per_sample_loss
    shape, batches = {"width": 8, "channels": 1}, load("digits")
    if model == "gpt":
        loss_fn = per_sequence_loss
        shape, batches = {"width": 8, "vocabulary": 16, "context": 8}, data.TokenData(16, 8, CPU)
    whole, parts = (trainer("esam", models.build(model, **shape), settings, CPU, loss_fn) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    for _, (inputs, targets) in zip(range(6), batches.train_batches(128, generator)):
        whole.step(inputs, targets)
        assert len(step_cost.parts_of_step(parts, inputs, targets, Stopwatch(CPU))) == 9
        states = (method.model.state_dict().values() for method in (whole, parts))
        assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_the_floor_moves_no_weight_but_by_the_base_step():
    method = trainer("sgd", models.build("small", width=8, channels=1), replace(SETTINGS, lr=0.0), CPU)
    before = [param.clone() for param in method.model.parameters()]
    inputs, targets = torch.randn(8, 1, 8, 8), torch.arange(8)
    step_cost.floor_of_step(method, inputs, targets, list(method.model.parameters())[:3])
    assert all(torch.equal(a, b) for a, b in zip(before, method.model.parameters()))
    assert all(param.grad is not None for param in method.model.parameters())
