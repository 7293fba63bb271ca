"""Image classification as timm has it: mixup, soft targets, EMA, a cosine schedule, clipping."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images[:600, None] / 16, dtype=torch.float32)
labels = torch.tensor(digits.target[:600])
loader = DataLoader(TensorDataset(images[:500], labels[:500]), batch_size=50, shuffle=True, drop_last=True)

model = nn.Sequential(
    nn.Conv2d(1, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(144, 10)
)
ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
epochs = 5
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs * len(loader))
mixing = torch.distributions.Beta(0.2, 0.2)


def mixup(inputs, targets):
    share, order = mixing.sample(), torch.randperm(len(inputs))
    targets = nn.functional.one_hot(targets, 10).float()
    return inputs.lerp(inputs[order], share), targets.lerp(targets[order], share)


for _ in range(epochs):
    model.train()
    for inputs, targets in loader:
        inputs, targets = mixup(inputs, targets)
        optimizer.zero_grad()
        outputs = model(inputs)
        loss = criterion(outputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        ema.update_parameters(model)

ema.eval()
with torch.no_grad():
    accuracy = (ema(images[500:]).argmax(1) == labels[500:]).float().mean().item()
learned = accuracy > 0.85
