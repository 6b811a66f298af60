"""Networks whose weights are not all in plain layers of torch.nn, reached as ``odd_networks:NAME``."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations


class StdConv2d(nn.Conv2d):
    """Standardizes its weight, as timm's does."""

    def forward(self, images: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return functional.conv2d(images, weight, self.bias, self.stride, self.padding)


class Conv3x3(nn.Conv2d):
    """Only its constructor differs."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, 3, stride, 1)


class Attention(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return self.head(tokens.mean(1))


class Functions(nn.Module):
    """Convolutions and a product with parameters, and one layer."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(8, 3, 3, 3) * 0.2)
        self.layer = nn.Conv2d(8, 8, 3)
        self.head = nn.Parameter(torch.randn(8, num_classes) * 0.2)

    def forward(self, images: Tensor) -> Tensor:
        features = functional.relu(functional.conv2d(images, self.kernel, stride=2))
        return functional.relu(self.layer(features)).mean((2, 3)) @ self.head


class OnlyFunctions(Functions):
    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        del self.layer

    def forward(self, images: Tensor) -> Tensor:
        return functional.relu(functional.conv2d(images, self.kernel)).mean((2, 3)) @ self.head


class Auxiliary(nn.Module):
    """A head that only trains."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 8, 3)
        self.auxiliary, self.head = nn.Linear(8, num_classes), nn.Linear(8, num_classes)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        features = functional.relu(self.stem(images))
        scores = self.head(functional.relu(self.body(features)).mean((2, 3)))
        return (scores, self.auxiliary(features.mean((2, 3)))) if self.training else scores


class Flow(nn.Module):
    """What runs depends on the values of the data."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem, self.bright, self.dark = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        features = functional.relu(self.stem(images))
        features = self.bright(features) if images.mean() > 1e6 else self.dark(features)
        return self.head(features.mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.rows = nn.LSTM(48, 8, batch_first=True)
        self.head = nn.Linear(8, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.rows(images.transpose(1, 2).flatten(2))[0][:, -1])


def attention(num_classes: int) -> nn.Module:
    return Attention(num_classes)


def functions(num_classes: int) -> nn.Module:
    return Functions(num_classes)


def only_functions(num_classes: int) -> nn.Module:
    return OnlyFunctions(num_classes)


def auxiliary(num_classes: int) -> nn.Module:
    return Auxiliary(num_classes)


def flow(num_classes: int) -> nn.Module:
    return Flow(num_classes)


def recurrent(num_classes: int) -> nn.Module:
    return Recurrent(num_classes)


def subclasses(num_classes: int) -> nn.Module:
    body = (Conv3x3(3, 8, 2), nn.ReLU(), StdConv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*body, nn.Linear(8, num_classes))


def parametrized(num_classes: int) -> nn.Module:
    first = parametrizations.weight_norm(nn.Conv2d(3, 8, 3, 2))
    second = parametrizations.spectral_norm(nn.Conv2d(8, 8, 3))
    head = parametrizations.weight_norm(nn.Linear(8, num_classes))
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
