"""Detection as torchvision's references have it: lists of images and targets, and a model that returns its losses."""

import math
import sys

import torch
from torch import nn
from torch.nn.functional import cross_entropy, pad, smooth_l1_loss
from torch.utils.data import DataLoader

torch.manual_seed(0)


def example(number):
    """A square or a bar, somewhere on an image of its own size."""
    generator = torch.Generator().manual_seed(number)
    height, width = torch.randint(10, 14, (2,), generator=generator).tolist()
    top, left = torch.randint(0, 6, (2,), generator=generator).tolist()
    label = number % 2
    image = 0.1 * torch.randn(1, height, width, generator=generator)
    image[:, top : top + 4, left : left + (4 if label else 2)] += 1
    return image, {"labels": torch.tensor(label), "boxes": torch.tensor([top, left], dtype=torch.float32) / 6}


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(1, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
        self.label, self.box = nn.Linear(8 * 36, 2), nn.Linear(8 * 36, 2)

    def forward(self, images, targets=None):
        padded = [pad(image, (0, 14 - image.shape[2], 0, 14 - image.shape[1])) for image in images]
        features = self.backbone(torch.stack(padded))
        labels, boxes = self.label(features), self.box(features)
        if not self.training:
            return [{"labels": label.argmax(), "boxes": box} for label, box in zip(labels, boxes)]
        return {
            "loss_classifier": cross_entropy(labels, torch.stack([target["labels"] for target in targets])),
            "loss_box_reg": smooth_l1_loss(boxes, torch.stack([target["boxes"] for target in targets])),
        }


examples = [example(number) for number in range(64)]
loader = DataLoader(examples, batch_size=8, shuffle=True, collate_fn=lambda batch: tuple(zip(*batch)))
model = Detector()
optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=len(loader))

for _ in range(8):
    model.train()
    for images, targets in loader:
        loss_dict = model(images, targets)
        losses = sum(loss_dict.values())
        if not math.isfinite(losses.item()):
            sys.exit(f"the loss is {losses.item()}")
        optimizer.zero_grad()
        losses.backward()
        optimizer.step()
        warmup.step()

model.eval()
with torch.no_grad():
    found = model([image for image, _ in examples])
right = [one["labels"] == target["labels"] for one, (_, target) in zip(found, examples)]
learned = sum(right) / len(right) > 0.9
