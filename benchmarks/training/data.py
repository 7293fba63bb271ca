"""Image data, wholly on the device as uint8, with the usual augmentation done there, and random sequences of tokens."""

import io
import pickle
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

DATASETS = ("digits", "cifar10", "random")
PADDING = -100  # the target of a token that no loss is taken of

Arrays = tuple[NDArray[np.uint8], NDArray[np.uint8]]  # images [n, channels, height, width] and their labels [n]


class MissingPackageError(ValueError):
    """A file needs a package to be read."""


@dataclass
class ImageData:
    """A data set split in two: images are uint8 [n, channels, height, width], labels int64 [n].

    Attributes:
        label: what results obtained with it are called.
        pad: by how many pixels augmentation may shift an image.
        flip: whether augmentation may mirror an image (a mirrored digit is no digit).
        memory_format: of the batches.
    """

    label: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    pad: int
    flip: bool
    memory_format: torch.memory_format
    classes: int = 10
    _mean: Tensor = field(init=False)
    _std: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._std, self._mean = torch.std_mean(self.train_images.float(), dim=(0, 2, 3), keepdim=True)

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return self.train_images.shape[1]

    def steps_per_epoch(self, batch_size: int) -> int:
        """Full batches in an epoch; the remainder is left out, so that every step costs the same."""
        return len(self.train_images) // batch_size

    def train_batches(self, batch_size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch of shuffled, augmented, normalized batches."""
        order = torch.randperm(len(self.train_images), generator=generator, device=generator.device)
        for index in order[: self.steps_per_epoch(batch_size) * batch_size].split(batch_size):
            images = augment(self.train_images[index], self.pad, self.flip, generator)
            yield self.normalize(images), self.train_labels[index]

    def test_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The test set in order, as it is."""
        for images, labels in zip(self.test_images.split(batch_size), self.test_labels.split(batch_size)):
            yield self.normalize(images), labels

    def training_sample(self, n: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Always the same ``n`` training images (all, if there are no more), normalized but not augmented."""
        index = _stratified(self.train_labels, min(n, len(self.train_labels)))
        for rows in index.split(batch_size):
            yield self.normalize(self.train_images[rows]), self.train_labels[rows]

    def normalize(self, images: Tensor) -> Tensor:
        """Float images that have mean 0 and deviation 1 in each channel over the training set."""
        return ((images.float() - self._mean) / self._std).contiguous(memory_format=self.memory_format)


@dataclass(frozen=True)
class TokenData:
    """Sequences of random tokens and of random lengths: what a step costs does not depend on what they say."""

    vocabulary: int
    context: int
    device: torch.device
    label = "random tokens"

    def train_batches(self, batch_size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches without end: tokens and the next ones, int64 [b, context], with ``PADDING`` after a sequence's end.

        Lengths are uniform from a quarter of the context to all of it.
        """
        place = torch.arange(self.context, device=self.device)
        while True:
            tokens = torch.randint(
                self.vocabulary, (batch_size, self.context + 1), generator=generator, device=self.device
            )
            lengths = torch.randint(
                self.context // 4, self.context + 1, (batch_size, 1), generator=generator, device=self.device
            )
            yield tokens[:, :-1].contiguous(), tokens[:, 1:].masked_fill(place >= lengths, PADDING)


def augment(images: Tensor, pad: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Shift each image by up to ``pad`` pixels, filling with zeros, and mirror half of them if ``flip``."""
    n, _, height, width = images.shape
    device = images.device
    top, left = torch.randint(2 * pad + 1, (2, n, 1), generator=generator, device=device)
    rows, columns = top + torch.arange(height, device=device), left + torch.arange(width, device=device)
    if flip:
        mirrored = torch.rand(n, 1, generator=generator, device=device) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    # One gather for all images; indexing around the slice puts the channels last.
    sample = torch.arange(n, device=device)[:, None, None]
    crops = nn.functional.pad(images, (pad,) * 4)[sample, :, rows[:, :, None], columns[:, None, :]]
    return crops.permute(0, 3, 1, 2)


def subset(images: ImageData, n: int) -> ImageData:
    """The data with only ``n`` training images, as many of each class as before in proportion, always the same.

    Raises:
        ValueError: if there are not that many, or fewer than one of each class are wanted.
    """
    if not images.classes <= n <= len(images.train_labels):
        raise ValueError(
            f"--train-samples {n}: from {images.classes} (one of each class) to {len(images.train_labels)} can be had"
        )
    index = _stratified(images.train_labels, n)
    return replace(
        images,
        label=f"{n:,} images of {images.label}",
        train_images=images.train_images[index],
        train_labels=images.train_labels[index],
    )


def hold_out(images: ImageData, n: int, validation: int) -> ImageData:
    """Of the training images ``n`` to train on and ``validation`` others in the test images' place.

    Raises:
        ValueError: if there are not that many.
    """
    if n + validation > len(images.train_labels):
        raise ValueError(
            f"--train-samples {n} and --validation-samples {validation}: there are {len(images.train_labels)} images"
        )
    chosen = _stratified(images.train_labels, n)
    rest = torch.ones(len(images.train_labels), dtype=torch.bool, device=chosen.device)
    rest[chosen] = False
    others = rest.nonzero().squeeze(1)
    others = others[_stratified(images.train_labels[others], validation)]
    return replace(subset(images, n), test_images=images.train_images[others], test_labels=images.train_labels[others])


def shrink(images: ImageData, size: int) -> ImageData:
    """The data with images of fewer pixels, each the mean of what it covers.

    Raises:
        ValueError: if the images are smaller.
    """
    now = images.train_images.shape[-1]
    if not 1 <= size <= now:
        raise ValueError(f"--image-size {size}: from 1 to {now}, the size of {images.label}, can be had")
    if size == now:
        return images

    def smaller(pixels: Tensor) -> Tensor:
        parts = [nn.functional.adaptive_avg_pool2d(part.float(), size).round().byte() for part in pixels.split(1000)]
        return torch.cat(parts)

    return replace(
        images,
        label=f"{images.label} of {size} pixels",
        train_images=smaller(images.train_images),
        test_images=smaller(images.test_images),
        pad=max(1, round(images.pad * size / now)),
    )


def flip_labels(images: ImageData, share: float) -> ImageData:
    """The data with a share of the training labels wrong: replaced by any other class alike, always the same ones.

    Raises:
        ValueError: if ``share`` is not in [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"--label-noise {share}: a share in [0, 1] is needed")
    n, generator = len(images.train_labels), torch.Generator().manual_seed(0)
    flipped = torch.randperm(n, generator=generator)[: round(share * n)]
    shifts = torch.randint(1, images.classes, flipped.shape, generator=generator)
    flipped, shifts = flipped.to(images.train_labels.device), shifts.to(images.train_labels.device)
    labels = images.train_labels.clone()
    labels[flipped] = (labels[flipped] + shifts) % images.classes
    return replace(images, label=f"{images.label}, {100 * share:g} % of the training labels wrong", train_labels=labels)


def _stratified(labels: Tensor, n: int) -> Tensor:
    """Rows of ``n`` samples, in which every class has its share of all."""
    if n >= len(labels):
        return torch.arange(len(labels), device=labels.device)
    generator = np.random.default_rng(0)
    shuffled = generator.permutation(len(labels))
    classes, counts = np.unique(labels.cpu().numpy(), return_counts=True)
    shares = counts * n / len(labels)
    sizes = np.floor(shares).astype(int)
    sizes[np.argsort(sizes - shares, kind="stable")[: n - sizes.sum()]] += 1  # the largest remainders
    of_class = labels.cpu().numpy()[shuffled]
    rows = np.concatenate([shuffled[of_class == one][:size] for one, size in zip(classes, sizes)])
    return torch.from_numpy(generator.permutation(rows)).to(labels.device)


def load(name: str, file: Path | None, device: torch.device, memory_format: torch.memory_format) -> ImageData:
    """A data set on the device.

    Args:
        name: one of ``DATASETS``.
        file: where CIFAR-10 is: the python-pickle archive or its extracted folder, or an .npz pack of JPEG files or of
            ``unpack``.
        device: where to put it.
        memory_format: in which order the dimensions of its batches lie in memory.

    Raises:
        ValueError: if a file is missing, not needed, corrupt, or only part of what it should be.
    """
    if name == "random":
        if file is not None:
            raise ValueError(f"--data random needs no file: leave out --data-file {file}")
        label, pad, flip = "random images", 4, True
        train, test = _random(4096, 0), _random(1024, 1)
    elif name == "digits":
        if file is not None:
            raise ValueError(f"--data digits comes with scikit-learn: leave out --data-file {file}")
        if find_spec("sklearn") is None:
            raise ValueError(
                "--data digits needs the package scikit-learn, which is not installed: --data random does not"
            )
        label, pad, flip = "scikit-learn digits", 1, False
        train, test = _digits()
    else:
        if file is None:
            raise ValueError(f"--data {name} needs --data-file: cifar-10-python.tar.gz, its folder, or a JPEG pack")
        if not file.exists():
            raise ValueError(f"--data-file {file} does not exist")
        is_pack = file.suffix == ".npz"
        label, pad, flip = "CIFAR-10 (JPEG copy)" if is_pack else "CIFAR-10", 4, True
        with _readable(file):
            train, test = _cifar_pack(file) if is_pack else _cifar_pickles(file)
            for images, labels in (train, test):
                _require_images(images, labels)
    arrays = [torch.from_numpy(array) for array in (*train, *test)]
    train_images, train_labels, test_images, test_labels = (
        array.to(device, torch.uint8 if array.dim() == 4 else torch.int64) for array in arrays
    )
    return ImageData(label, train_images, train_labels, test_images, test_labels, pad, flip, memory_format)


def _random(n: int, seed: int) -> Arrays:
    """Noise in RGB, 32 pixels wide and high, and labels that have nothing to do with it: for what a step costs."""
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (n, 3, 32, 32), np.uint8), generator.integers(0, 10, n, np.uint8)


def _digits() -> tuple[Arrays, Arrays]:
    """1,797 handwritten digits of 8x8 pixels with values 0 to 16: 1,000 to train with, 797 to test."""
    from sklearn.datasets import load_digits  # here, since all else runs without the package
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = images.astype(np.uint8).reshape(-1, 1, 8, 8)
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, labels, train_size=1000, stratify=labels, random_state=0
    )
    return (train_images, train_labels), (test_images, test_labels)


def _cifar_pickles(path: Path) -> tuple[Arrays, Arrays]:
    """The archive or folder from the data set's page: five files to train with, one to test."""
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    batches: dict[str, Arrays] = {}

    def read(name: str, file: IO[bytes]) -> None:
        batch = _ArrayUnpickler(file, encoding="bytes").load()
        batches[name] = batch[b"data"].reshape(-1, 3, 32, 32), np.asarray(batch[b"labels"], np.uint8)

    if path.is_dir():
        for name in names:
            with (path / name).open("rb") as file:
                read(name, file)
    else:
        with tarfile.open(path) as archive:
            for member in archive:  # in their order there, so that it is unpacked once, and not to a disk
                folder, _, name = member.name.rpartition("/")
                if folder == "cifar-10-batches-py" and name in names and (content := archive.extractfile(member)):
                    read(name, content)
            while archive.fileobj and archive.fileobj.read(2**20):
                pass  # up to the checksum at its end
        if missing := [name for name in names if name not in batches]:
            raise EOFError(f"cifar-10-batches-py/{missing[0]} is not in it")
    images, labels = zip(*(batches[name] for name in names[:-1]))
    return (np.concatenate(images), np.concatenate(labels)), batches["test_batch"]


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Say of a file that cannot be read what it is and what to do; what it lacks is a ValueError already."""
    try:
        yield
    except MissingPackageError:
        raise
    except MemoryError:
        raise  # which is not the file's fault
    except PermissionError as error:
        raise ValueError(f"--data-file {path} may not be read: {error.strerror}") from error
    except Exception as error:  # tarfile, gzip, zipfile, zlib, pickle, NumPy and pillow each raise their own
        size = f" of {path.stat().st_size:,} bytes" if path.is_file() else ""
        raise ValueError(
            f"--data-file {path}{size} is corrupt or only part of CIFAR-10 ({type(error).__name__}: {error}): download "
            "it anew, and compare its checksum with that on its page"
        ) from error


def _require_images(images: NDArray[Any], labels: NDArray[Any]) -> None:
    """Raise a ValueError if these are not colour images with a class of ten each."""
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != np.uint8 or not len(images):
        raise ValueError(f"images are {images.dtype} of shape {images.shape}, and not uint8 [n, 3, height, width]")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"there are {len(images)} images and labels of shape {labels.shape}")
    if labels.min() < 0 or labels.max() > 9:
        raise ValueError(f"labels are from {labels.min()} to {labels.max()}, and not from 0 to 9")


class _ArrayUnpickler(pickle.Unpickler):
    """Builds NumPy arrays and nothing else, so that a file from anywhere cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        numpy_parts = module.split(".")[0] == "numpy" and name in {"_reconstruct", "_frombuffer", "ndarray", "dtype"}
        if not numpy_parts and (module, name) != ("_codecs", "encode"):
            raise pickle.UnpicklingError(f"{module}.{name} does not belong in a CIFAR-10 file")
        return super().find_class(module, name)


def _cifar_pack(path: Path) -> tuple[Arrays, Arrays]:
    """A pack of images as they are, or of JPEG files: file i of a split is ``jpeg[offsets[i]:offsets[i + 1]]``."""
    with np.load(path) as pack:
        arrays = {name: pack[name] for name in pack.files if name != "classes"}

    def split(name: str) -> Arrays:
        if f"{name}_images" in arrays:
            return arrays[f"{name}_images"], arrays[f"{name}_labels"]
        if find_spec("PIL") is None:
            raise MissingPackageError(
                f"--data-file {path} holds JPEG files, which need the package pillow: unpack them where it is, by "
                f"python -m benchmarks unpack {path.name} images.npz"
            )
        from PIL import Image

        files, cuts = arrays[f"{name}_jpeg"].tobytes(), arrays[f"{name}_offsets"].tolist()
        images = [np.asarray(Image.open(io.BytesIO(files[a:b])).convert("RGB")) for a, b in pairwise(cuts)]
        return np.stack(images).transpose(0, 3, 1, 2), arrays[f"{name}_labels"]

    return split("train"), split("test")
