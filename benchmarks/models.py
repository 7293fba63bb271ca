"""Networks in their CIFAR forms: 3x3 stem, no pooling before the first stage."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn


class SmallNet(nn.Module):
    """Four 3x3 convolutions with batch norm, for images down to 4x4."""

    def __init__(self, width: int, channels: int, classes: int) -> None:
        super().__init__()
        widths = [channels, width, width, 2 * width, 2 * width]
        layers: list[nn.Module] = []
        for i, (n_in, n_out) in enumerate(pairwise(widths)):
            layers += [conv3x3(n_in, n_out, stride=2 if i == 2 else 1), nn.BatchNorm2d(n_out), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [n, classes]."""
        return self.head(self.features(images).mean(dim=(2, 3)))


class BasicBlock(nn.Module):
    """Residual block of ResNet-18 (He et al., 2016): relu(conv-bn-relu-conv-bn + shortcut)."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3x3(n_in, n_out, stride), nn.BatchNorm2d(n_out)
        self.conv2, self.bn2 = conv3x3(n_out, n_out), nn.BatchNorm2d(n_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or n_in != n_out:
            self.shortcut = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))

    def forward(self, x: Tensor) -> Tensor:
        """Features [n, n_out, height / stride, width / stride]."""
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 for 32x32 images: four stages of two blocks."""

    def __init__(self, width: int, channels: int, classes: int) -> None:
        super().__init__()
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        self.stem = nn.Sequential(conv3x3(channels, width), nn.BatchNorm2d(width), nn.ReLU())
        self.stages = nn.Sequential(
            *(
                nn.Sequential(BasicBlock(n_in, n_out, stride=1 if i == 0 else 2), BasicBlock(n_out, n_out, stride=1))
                for i, (n_in, n_out) in enumerate(pairwise(widths))
            )
        )
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [n, classes]."""
        return self.head(self.stages(self.stem(images)).mean(dim=(2, 3)))


class PreactivationBlock(nn.Module):
    """Residual block of WideResNet (Zagoruyko and Komodakis, 2016): bn-relu-conv twice, plus the shortcut."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(n_in), conv3x3(n_in, n_out, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(n_out), conv3x3(n_out, n_out)
        self.shortcut = nn.Conv2d(n_in, n_out, 1, stride, bias=False) if n_in != n_out else None

    def forward(self, x: Tensor) -> Tensor:
        """Features [n, n_out, height / stride, width / stride]."""
        out = torch.relu(self.bn1(x))
        # A projection sees the activated features, an identity the raw ones.
        skip = x if self.shortcut is None else self.shortcut(out)
        return self.conv2(torch.relu(self.bn2(self.conv1(out)))) + skip


class WideResNet28(nn.Module):
    """WideResNet-28-k for 32x32 images: three stages of four blocks; ``width`` is k."""

    def __init__(self, width: int, channels: int, classes: int) -> None:
        super().__init__()
        widths = [16, 16 * width, 32 * width, 64 * width]
        blocks: list[nn.Module] = []
        for i, (n_in, n_out) in enumerate(pairwise(widths)):
            blocks += [PreactivationBlock(n_in, n_out, stride=1 if i == 0 else 2)]
            blocks += [PreactivationBlock(n_out, n_out, stride=1) for _ in range(3)]
        self.stem = conv3x3(channels, widths[0])
        self.blocks = nn.Sequential(*blocks, nn.BatchNorm2d(widths[-1]), nn.ReLU())
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [n, classes]."""
        return self.head(self.blocks(self.stem(images)).mean(dim=(2, 3)))


def conv3x3(n_in: int, n_out: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution without bias: batch norm follows, or preceded, every one of them."""
    return nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False)


# Each network and the width that it has unless told otherwise.
MODELS: dict[str, tuple[Callable[[int, int, int], nn.Module], int]] = {
    "small": (SmallNet, 64),
    "resnet18": (ResNet18, 64),
    "wrn28_10": (WideResNet28, 10),
}


def build(name: str, *, width: int | None = None, channels: int = 3, classes: int = 10, seed: int = 0) -> nn.Module:
    """A network with the initial weights of a seed."""
    make, default_width = MODELS[name]
    torch.manual_seed(seed)
    return make(width or default_width, channels, classes)
