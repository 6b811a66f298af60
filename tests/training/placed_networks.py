"""Small networks in which the rules of placement meet."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.down, self.up = nn.Conv2d(channels, channels // 4, 1), nn.Conv2d(channels // 4, channels, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        return functional.hardsigmoid(self.up(functional.relu(self.down(self.pool(inputs))))) * inputs


class InvertedResidual(nn.Module):
    def __init__(self, channels_in: int, expanded: int, channels: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(channels_in, expanded, 1, bias=False),
            nn.BatchNorm2d(expanded),
            activation(inplace=True),
            nn.Conv2d(expanded, expanded, 3, padding=1, groups=expanded, bias=False),
            nn.BatchNorm2d(expanded),
            activation(inplace=True),
            SqueezeExcite(expanded),
            nn.Conv2d(expanded, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.adds = channels_in == channels

    def forward(self, inputs: Tensor) -> Tensor:
        features = self.block(inputs)
        return features + inputs if self.adds else features


def mobile_net(num_classes: int) -> nn.Module:
    """As MobileNetV3: h-swish, squeeze-and-excitation, residual adds."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.Hardswish(inplace=True),
        InvertedResidual(16, 32, 16, nn.ReLU),
        InvertedResidual(16, 32, 24, nn.Hardswish),
        InvertedResidual(24, 48, 24, nn.Hardswish),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 32),
        nn.Hardswish(inplace=True),
        nn.Dropout(0.2),
        nn.Linear(32, num_classes),
    )


class Fire(nn.Module):
    def __init__(self, channels_in: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels_in, squeezed, 1)
        self.narrow, self.wide = nn.Conv2d(squeezed, expanded, 1), nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = functional.relu(self.squeeze(inputs), inplace=True)
        return torch.cat([functional.relu(self.narrow(inputs)), functional.relu(self.wide(inputs))], 1)


def squeeze_net(num_classes: int) -> nn.Module:
    """As SqueezeNet: concatenations, one of them behind max pooling."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        Fire(16, 8, 16),
        Fire(32, 8, 16),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.Conv2d(32, num_classes, 1),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


class SmallUNet(nn.Module):
    """A transposed convolution whose result is concatenated with an earlier tensor."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.first, self.deep = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.up, self.last = nn.ConvTranspose2d(16, 8, 2, 2), nn.Conv2d(16, 8, 3, padding=1)
        self.head = nn.Linear(8, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        early = functional.relu(self.first(images))
        late = self.up(functional.relu(self.deep(functional.max_pool2d(early, 2))))
        return self.head(functional.relu(self.last(torch.cat([late, early], 1))).mean((2, 3)))


class TwoConvolutionBranches(nn.Module):
    """An add of two convolutions. The first branch has more nodes, the path along the second is longer."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.first, self.down, self.up = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.gated = nn.Conv2d(8, 8, 1)
        self.longer = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1))
        self.head = nn.Linear(8, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        inputs = functional.relu(self.stem(images))
        features = self.first(inputs)
        gate = torch.sigmoid(self.up(functional.relu(self.down(functional.adaptive_avg_pool2d(features, 1)))))
        return self.head(functional.relu(self.gated(features * gate) + self.longer(inputs)).mean((2, 3)))


class SmallMlp(nn.Module):
    """Tensors of which some are parameters, as in a layer scale and a learned offset."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 1)
        self.second, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, num_classes)
        self.scale, self.offset = nn.Parameter(torch.rand(8)), nn.Parameter(torch.randn(8, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        features = functional.relu(self.stem(images))
        features = features + self.scale.view(1, -1, 1, 1) * self.first(features)
        features = functional.relu(self.second(features) + self.offset)
        return self.head((features * features).mean((2, 3)))


HARD_GATES = {
    "hardtanh": lambda _, features, excitation: features * (functional.hardtanh(excitation + 3, 0, 6) / 6),
    "relu6": lambda _, features, excitation: (functional.relu6(3 + excitation, inplace=True) * (1 / 6)) * features,
    "module": lambda block, features, excitation: features * (block.clamp(excitation + 3) / 6),
    "method": lambda _, features, excitation: features.mul(excitation.add(3).clamp(0, 6).div(6)),
    "keywords": lambda _, features, excitation: torch.mul(
        input=torch.div(input=torch.clamp(input=excitation + 3, min=0, max=6), other=6), other=features
    ),
}


class HardGate(nn.Module):
    """Squeeze-and-excitation whose hard sigmoid is written by hand, and a hard swish beside it, which is no gate."""

    def __init__(self, num_classes: int, form: str) -> None:
        super().__init__()
        self.form, self.clamp = form, nn.ReLU6(inplace=True)
        self.stem, self.down, self.up = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.last, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        features = functional.relu(self.stem(images))
        squeezed = functional.adaptive_avg_pool2d(features, 1)
        excitation = self.up(functional.relu(self.down(squeezed)))
        features = self.last(HARD_GATES[self.form](self, features, excitation))
        return self.head((features * (functional.relu6(features + 3) / 6)).mean((2, 3)))
