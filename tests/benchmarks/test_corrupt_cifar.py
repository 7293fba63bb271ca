"""A CIFAR-10 file that is corrupt or only half there is refused by an error that names it and says what to do."""

import pickle
import tarfile

import numpy as np
import pytest
import torch

from benchmarks.commands import train, unpack
from benchmarks.training import data

BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def load(path):
    return data.load("cifar10", path, torch.device("cpu"), torch.contiguous_format)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name in BATCHES:
        pixels = generator.integers(0, 256, (4, 3072), np.uint8)
        (folder / name).write_bytes(pickle.dumps({b"data": pixels, b"labels": [0, 1, 2, 3]}, protocol=2))
    return folder


@pytest.fixture
def archive(folder, tmp_path):
    path = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder, folder.name)
    return path


def pack(path, **changed):
    arrays = {"images": np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), np.uint8), "labels": np.arange(4)}
    whole = {f"{split}_{name}": array for split in ("train", "test") for name, array in arrays.items()}
    np.savez_compressed(path, **whole | changed)
    return path


def refused(path):
    with pytest.raises(ValueError, match="corrupt or only part of CIFAR-10") as error:
        load(path)
    assert str(path) in str(error.value)
    assert "download it anew" in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_half_an_archive(archive, share):
    assert len(load(archive).train_labels) == 20
    content = archive.read_bytes()
    archive.write_bytes(content[: int(share * len(content))])
    assert f"{int(share * len(content)):,} bytes" in refused(archive)


@pytest.mark.parametrize("level", [0, 9])  # at 0 nothing but the checksum at the archive's end tells
def test_an_archive_with_a_byte_changed(archive, folder, level):
    with tarfile.open(archive, "w:gz", compresslevel=level) as tar:
        tar.add(folder, folder.name)
    content = bytearray(archive.read_bytes())
    content[len(content) // 2] ^= 255
    archive.write_bytes(content)
    refused(archive)


def test_an_archive_that_is_a_web_page_or_of_something_else(archive, tmp_path):
    archive.write_text("<html>404</html>")
    refused(archive)
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "cifar-10-batches-py" / "test_batch", "other/test_batch")
    assert "data_batch_1 is not in it" in refused(archive)


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_half_a_pack(tmp_path, share):
    path = pack(tmp_path / "pack.npz")
    assert len(load(path).train_labels) == 4
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refused(path)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"train_labels": np.arange(3)}, "4 images and labels of shape"),
        ({"test_labels": np.array([0, 1, 2, 10])}, "to 10"),
        ({"test_images": np.zeros((4, 3, 32, 32))}, "float64"),
        ({"train_images": np.zeros((4, 32, 32, 3), np.uint8)}, "(4, 32, 32, 3)"),
    ],
)
def test_a_pack_of_something_else(tmp_path, changed, words):
    assert words in refused(pack(tmp_path / "pack.npz", **changed))


def test_a_pack_of_one_array(tmp_path):
    np.savez(tmp_path / "pack.npz", values=np.arange(3))
    refused(tmp_path / "pack.npz")


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch"])
def test_a_folder_that_lacks_a_file_or_part_of_one(folder, name):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    refused(folder)
    (folder / name).unlink()
    assert name in refused(folder)


def test_a_command_refuses_it_before_it_writes_anything(archive, tmp_path, capsys):
    archive.write_bytes(archive.read_bytes()[:1000])
    with pytest.raises(SystemExit) as stopped:
        train.main(["--data", "cifar10", "--data-file", str(archive), "--output", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert "download it anew" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_unpacking_a_corrupt_pack_leaves_nothing(tmp_path):
    path = pack(tmp_path / "pack.npz")
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(SystemExit):
        unpack.main([str(path), str(tmp_path / "arrays.npz")])
    assert [path.name for path in tmp_path.iterdir()] == ["pack.npz"]
