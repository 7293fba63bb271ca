"""A pack of JPEG files as plain arrays, for machines without the package pillow."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from .. import record
from ..training import data
from .refusals import refusals


def main(argv: Sequence[str] | None = None) -> None:
    """Read the pack and write the arrays, which ``--data-file`` takes too."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pack", type=Path, help="the .npz of JPEG files")
    parser.add_argument("arrays", type=Path, help="the .npz to be written")
    parser.add_argument("--train-samples", type=int, metavar="N", help="of the training images only so many")
    args = parser.parse_args(argv)
    if args.arrays.suffix != ".npz":
        parser.error(f"{args.arrays}: its name must end in .npz")
    with refusals(parser):
        record.require_writable(args.arrays.parent)
        images = data.load("cifar10", args.pack, torch.device("cpu"), torch.contiguous_format)
        if args.train_samples is not None:
            images = data.subset(images, args.train_samples)
    with record.whole(args.arrays) as new, new.open("wb") as file:
        np.savez_compressed(
            file,
            train_images=images.train_images.numpy(),
            train_labels=images.train_labels.numpy().astype(np.uint8),
            test_images=images.test_images.numpy(),
            test_labels=images.test_labels.numpy().astype(np.uint8),
        )
    print(f"Written: {args.arrays}, {args.arrays.stat().st_size / 2**20:.0f} MiB, {images.label}")
