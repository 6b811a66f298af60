"""Two small architectures that nothing in the product was tuned for: residual adds, and concatenations.

Plain torch modules for 32x32 images, reached as ``--model benchmarks.accuracy.small_networks:thin_resnet``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside an identity, or a 1x1 convolution where the shape changes.

    Source: He et al., "Deep Residual Learning for Image Recognition", https://arxiv.org/abs/1512.03385, figure 2.
    """

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, inputs: Tensor) -> Tensor:
        features = functional.relu(self.norm1(self.conv1(inputs)))
        return functional.relu(self.norm2(self.conv2(features)) + self.shortcut(inputs))


def thin_resnet(num_classes: int) -> nn.Module:
    """Return a ResNet-14 of widths 16, 32, 64: section 4.2 of the same paper with n = 2."""
    stages: list[nn.Module] = []
    channels_in = 16
    for channels, first_stride in ((16, 1), (32, 2), (64, 2)):
        for stride in (first_stride, 1):
            stages.append(ResidualBlock(channels_in, channels, stride))
            channels_in = channels
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        *stages,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, num_classes),
    )


class DenseLayer(nn.Module):
    """BN, ReLU, 3x3 convolution; what it makes is concatenated to what it was given.

    Source: Huang et al., "Densely Connected Convolutional Networks", https://arxiv.org/abs/1608.06993, section 3.
    """

    def __init__(self, channels_in: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels_in)
        self.conv = nn.Conv2d(channels_in, growth, 3, padding=1, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.cat([inputs, self.conv(functional.relu(self.norm(inputs)))], 1)


class Transition(nn.Module):
    """BN, ReLU, 1x1 convolution to half the channels, 2x2 average pooling."""

    def __init__(self, channels_in: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels_in)
        self.conv = nn.Conv2d(channels_in, channels_in // 2, 1, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return functional.avg_pool2d(self.conv(functional.relu(self.norm(inputs))), 2)


def thin_densenet(num_classes: int) -> nn.Module:
    """Return a DenseNet of three blocks of 4 layers, growth 12, compression 0.5; its first convolution has stride 2."""
    growth, layers = 12, 4
    channels = 2 * growth
    parts: list[nn.Module] = [nn.Conv2d(3, channels, 3, stride=2, padding=1, bias=False)]
    for block in range(3):
        for _ in range(layers):
            parts.append(DenseLayer(channels, growth))
            channels += growth
        if block < 2:
            parts.append(Transition(channels))
            channels //= 2
    return nn.Sequential(
        *parts,
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, num_classes),
    )
