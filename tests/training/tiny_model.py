"""A network of a few thousand parameters, reached as ``tiny_model:tiny``, and some that are wrong on purpose."""

import torch
from torch import nn

from training.loop.augmentation import Augmentation
from training.loop.schedule import Schedule

IMAGE_SIZE = 16


class Tiny(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding="same", groups=12)
        self.norm2 = nn.BatchNorm2d(12)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(12 * 16, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = torch.relu(self.norm(self.stem(images)))
        features = features + torch.nn.functional.silu(self.norm2(self.depthwise(features)))
        return self.head(self.dropout(torch.flatten(nn.functional.adaptive_avg_pool2d(features, 4), 1)))


class SameNames(nn.Module):
    """Its layer ``residual`` is called as the quantizer of its addition is labelled."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem, self.residual = nn.Conv2d(3, 8, 3, stride=4, padding=1), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = torch.relu(self.stem(images))
        return self.head(torch.relu(self.residual(torch.tanh(features)) + features).mean((2, 3)))


class WritesIntoItsInput(Tiny):
    """As one that normalises its images itself."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images.mul_(0.5).add_(1))


def writes_into_its_input(num_classes: int) -> nn.Module:
    return WritesIntoItsInput(num_classes)


def same_names(num_classes: int) -> nn.Module:
    return SameNames(num_classes)


def tiny(num_classes: int) -> nn.Module:
    return Tiny(num_classes)


def always_seven(num_classes: int) -> nn.Module:
    return Tiny(7)


def not_a_network(num_classes: int) -> str:
    return "network"


def fails(num_classes: int) -> nn.Module:
    raise RuntimeError("out of neurons")


class OddConv(nn.Conv2d):
    """Computes something else than a Conv2d does."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images) * 2


def nothing_to_quantize(num_classes: int) -> nn.Module:
    return nn.Sequential(OddConv(3, num_classes, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def tiny_schedule(**changes):
    """How it is trained: a second or so, to well above 80% on digits."""
    values = {
        "epochs": 6,
        "batch_size": 32,
        "learning_rate": 1e-2,
        "warm_up": 0.1,
        "augmentation": Augmentation(shift_px=1),
    }
    return Schedule(**(values | changes))


class DropoutBetweenReaders(nn.Module):
    """One tensor of which a layer reads what dropout gives, and another layer the tensor itself."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem, self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.dropout, self.head = nn.Dropout2d(0.1), nn.Linear(8, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = torch.relu(self.stem(images))
        branch = self.first(features) + self.dropout(features)
        return self.head((self.second(self.dropout(features)) + branch).mean((2, 3)))
