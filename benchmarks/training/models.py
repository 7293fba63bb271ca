"""Convolutional networks in their CIFAR forms (3x3 stem, no pooling before the first stage), and transformers."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from .catalogue import WIDTHS


class SmallNet(nn.Module):
    """Four 3x3 convolutions with batch norm, for images down to 4x4."""

    def __init__(self, width: int, channels: int = 3, classes: int = 10) -> None:
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
        self.shortcut = projection(n_in, n_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Features [n, n_out, height / stride, width / stride]."""
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 for 32x32 images: four stages of two blocks."""

    def __init__(self, width: int, channels: int = 3, classes: int = 10) -> None:
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


class BottleneckBlock(nn.Module):
    """Residual block of ResNet-50 (He et al., 2016): 1x1, 3x3 and 1x1 convolutions, the last four times wider."""

    def __init__(self, n_in: int, n_middle: int, stride: int) -> None:
        super().__init__()
        n_out = 4 * n_middle
        self.conv1, self.bn1 = nn.Conv2d(n_in, n_middle, 1, bias=False), nn.BatchNorm2d(n_middle)
        self.conv2, self.bn2 = conv3x3(n_middle, n_middle, stride), nn.BatchNorm2d(n_middle)
        self.conv3, self.bn3 = nn.Conv2d(n_middle, n_out, 1, bias=False), nn.BatchNorm2d(n_out)
        self.shortcut = projection(n_in, n_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Features [n, 4 * n_middle, height / stride, width / stride]."""
        out = torch.relu(self.bn1(self.conv1(x)))
        out = torch.relu(self.bn2(self.conv2(out)))
        return torch.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


class ResNet50(nn.Module):
    """ResNet-50 for 32x32 images: four stages of three, four, six and three bottleneck blocks, or of other depths."""

    def __init__(
        self, width: int, channels: int = 3, classes: int = 10, depths: tuple[int, ...] = (3, 4, 6, 3)
    ) -> None:
        super().__init__()
        n_in, blocks = width, []
        for stage, count in enumerate(depths):
            for block in range(count):
                blocks.append(BottleneckBlock(n_in, width << stage, stride=2 if stage > 0 and block == 0 else 1))
                n_in = 4 * (width << stage)
        self.stem = nn.Sequential(conv3x3(channels, width), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(n_in, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [n, classes]."""
        return self.head(self.blocks(self.stem(images)).mean(dim=(2, 3)))


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

    def __init__(self, width: int, channels: int = 3, classes: int = 10) -> None:
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


class TransformerBlock(nn.Module):
    """Attention and a four times wider MLP, each behind a layer norm and added to what it is given; heads 64 wide."""

    def __init__(self, width: int, causal: bool) -> None:
        super().__init__()
        self.heads = max(1, width // 64)
        if width % self.heads:
            raise ValueError(f"width {width} cannot be shared by {self.heads} heads: give a multiple of 64")
        self.causal = causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Features [n, length, width], as x."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.projection(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """ViT-S, of twelve layers (Dosovitskiy et al., 2021; Touvron et al., 2021), for images up to ``image_size`` pixels.

    A smaller image uses the positions of the upper left corner.
    """

    def __init__(
        self,
        width: int,
        channels: int = 3,
        classes: int = 10,
        image_size: int = 32,
        patch_size: int = 4,
        layers: int = 12,
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ValueError(
                f"images of {image_size} pixels cannot be cut into patches of {patch_size}: give a divisor"
            )
        side = image_size // patch_size
        self.patches = nn.Conv2d(channels, width, patch_size, stride=patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.class_position = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, width, side, side))
        self.blocks = nn.Sequential(*(TransformerBlock(width, causal=False) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [n, classes]."""
        x = self.patches(images)
        x = (x + self.positions[:, :, : x.shape[2], : x.shape[3]]).flatten(2).transpose(1, 2)
        token = (self.class_token + self.class_position).expand(len(x), -1, -1)
        return self.head(self.norm(self.blocks(torch.cat([token, x], dim=1)))[:, 0])


class GPT(nn.Module):
    """GPT-2 (Radford et al., 2019) of twelve layers: causal, with learned positions and the embedding as head."""

    def __init__(self, width: int, vocabulary: int = 50257, context: int = 1024) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        for embedding in (self.embedding, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)  # as a head, the default's logits would be far too large
        self.blocks = nn.Sequential(*(TransformerBlock(width, causal=True) for _ in range(12)))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of each next token, [n, length, vocabulary], for int64 tokens [n, length <= context]."""
        x = self.embedding(tokens) + self.positions.weight[: tokens.shape[1]]
        return nn.functional.linear(self.norm(self.blocks(x)), self.embedding.weight)


def conv3x3(n_in: int, n_out: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution without bias: batch norm follows, or preceded, every one of them."""
    return nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False)


def projection(n_in: int, n_out: int, stride: int) -> nn.Sequential:
    """The shortcut of a residual block: nothing where shapes fit, else a 1x1 convolution with batch norm."""
    if stride == 1 and n_in == n_out:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))


# Those of MODELS classify images.
MODELS: dict[str, Callable[..., nn.Module]] = {
    "small": SmallNet,
    "resnet18": ResNet18,
    "resnet50": ResNet50,
    "wrn28_10": WideResNet28,
    "vit_s": VisionTransformer,
}
LANGUAGE_MODELS: dict[str, Callable[..., nn.Module]] = {"gpt": GPT}


def build(name: str, *, width: int | None = None, seed: int = 0, **shape: int) -> nn.Module:
    """A network with the initial weights of a seed.

    Args:
        name: one of ``MODELS`` or ``LANGUAGE_MODELS``.
        width: channels of the first stage or features of a token; for wrn28_10 the factor of width.
        seed: of torch's generator.
        shape: ``channels`` (3) and ``classes`` (10) of images; for vit_s also ``image_size`` (32) and ``patch_size``
            (4); for gpt ``vocabulary`` (50257) and ``context`` (1024).
    """
    torch.manual_seed(seed)
    return (MODELS | LANGUAGE_MODELS)[name](width or WIDTHS[name], **shape)
