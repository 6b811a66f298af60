"""EfficientNet-B0 with the state-dict keys and shapes of torchvision's ``efficientnet_b0``.

Architecture: Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", 2019,
https://arxiv.org/abs/1905.11946, table 1. The module tree follows torchvision's, so its checkpoints load with
``strict=True`` and ours load there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Stage:
    """One row of table 1: ``repeats`` MBConv blocks, of which only the first strides and changes the width."""

    expand_ratio: int
    kernel_size: int
    stride: int
    in_channels: int
    out_channels: int
    repeats: int


B0_STAGES = (
    Stage(1, 3, 1, 32, 16, 1),
    Stage(6, 3, 2, 16, 24, 2),
    Stage(6, 5, 2, 24, 40, 2),
    Stage(6, 3, 2, 40, 80, 3),
    Stage(6, 5, 1, 80, 112, 3),
    Stage(6, 5, 2, 112, 192, 4),
    Stage(6, 3, 1, 192, 320, 1),
)
HEAD_CHANNELS = 1280


class ConvNormActivation(nn.Sequential):
    """Convolution, batch norm and, unless it is a projection, SiLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        activation: bool = True,
    ) -> None:
        conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=(kernel_size - 1) // 2,
            groups=groups,
            bias=False,
        )
        layers: list[nn.Module] = [conv, nn.BatchNorm2d(out_channels)]
        if activation:
            layers.append(nn.SiLU(inplace=True))
        super().__init__(*layers)


class SqueezeExcitation(nn.Module):
    """Channel attention: global average, two 1x1 convolutions, sigmoid, multiply."""

    def __init__(self, channels: int, squeeze_channels: int) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeeze_channels, 1)
        self.fc2 = nn.Conv2d(squeeze_channels, channels, 1)
        self.activation = nn.SiLU(inplace=True)
        self.scale_activation = nn.Sigmoid()

    def forward(self, features: Tensor) -> Tensor:
        scale = self.activation(self.fc1(self.avgpool(features)))
        scaled: Tensor = self.scale_activation(self.fc2(scale)) * features
        return scaled


class StochasticDepth(nn.Module):
    """Drops a residual branch per sample while training (Huang et al., https://arxiv.org/abs/1603.09382)."""

    def __init__(self, drop_probability: float) -> None:
        super().__init__()
        self.drop_probability = drop_probability

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training or self.drop_probability == 0.0:
            return branch
        survival = 1.0 - self.drop_probability
        kept = torch.empty((branch.shape[0], 1, 1, 1), dtype=branch.dtype, device=branch.device).bernoulli_(survival)
        return branch * (kept / survival)


class MBConv(nn.Module):
    """Mobile inverted bottleneck with squeeze-and-excitation; the residual is added where shapes allow."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        expand_ratio: int,
        kernel_size: int,
        stride: int,
        drop_probability: float,
    ) -> None:
        super().__init__()
        expanded = in_channels * expand_ratio
        layers: list[nn.Module] = []
        if expanded != in_channels:
            layers.append(ConvNormActivation(in_channels, expanded, kernel_size=1))
        layers += [
            ConvNormActivation(expanded, expanded, kernel_size=kernel_size, stride=stride, groups=expanded),
            SqueezeExcitation(expanded, max(1, in_channels // 4)),
            ConvNormActivation(expanded, out_channels, kernel_size=1, activation=False),
        ]
        self.block = nn.Sequential(*layers)
        self.has_residual = stride == 1 and in_channels == out_channels
        self.stochastic_depth = StochasticDepth(drop_probability)

    def forward(self, features: Tensor) -> Tensor:
        branch: Tensor = self.block(features)
        if self.has_residual:
            branch = self.stochastic_depth(branch) + features
        return branch


class EfficientNet(nn.Module):
    """Classifier over RGB images.

    Args:
        num_classes: Width of the output.
        dropout: Probability before the last linear layer.
        drop_path: Stochastic-depth probability of the last block; it grows linearly from 0 over the blocks.
    """

    def __init__(self, *, num_classes: int, dropout: float = 0.2, drop_path: float = 0.2) -> None:
        super().__init__()
        blocks = sum(stage.repeats for stage in B0_STAGES)
        features: list[nn.Module] = [ConvNormActivation(3, B0_STAGES[0].in_channels, kernel_size=3, stride=2)]
        index = 0
        for stage in B0_STAGES:
            layers: list[nn.Module] = []
            for repeat in range(stage.repeats):
                first = repeat == 0
                layers.append(
                    MBConv(
                        stage.in_channels if first else stage.out_channels,
                        stage.out_channels,
                        expand_ratio=stage.expand_ratio,
                        kernel_size=stage.kernel_size,
                        stride=stage.stride if first else 1,
                        drop_probability=drop_path * index / blocks,
                    )
                )
                index += 1
            features.append(nn.Sequential(*layers))
        features.append(ConvNormActivation(B0_STAGES[-1].out_channels, HEAD_CHANNELS, kernel_size=1))
        self.features = nn.Sequential(*features)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(dropout, inplace=True), nn.Linear(HEAD_CHANNELS, num_classes))
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                # torchvision takes the outputs here, which for 1,000 classes is about the same; for ten it gives logits
                # so large that the first epochs go into shrinking them.
                bound = 1.0 / math.sqrt(module.in_features)
                nn.init.uniform_(module.weight, -bound, bound)
                nn.init.zeros_(module.bias)
            elif isinstance(module, MBConv) and module.has_residual:
                # Every residual block starts as the identity, which makes short schedules learn much faster
                # (Goyal et al., https://arxiv.org/abs/1706.02677, section 5.1).
                nn.init.zeros_(module.block.get_parameter(f"{len(module.block) - 1}.1.weight"))

    def forward(self, images: Tensor) -> Tensor:
        """Map ``(N, 3, H, W)`` float images to ``(N, num_classes)`` logits."""
        pooled = self.avgpool(self.features(images))
        logits: Tensor = self.classifier(torch.flatten(pooled, 1))
        return logits


def efficientnet_b0(num_classes: int) -> EfficientNet:
    """Return EfficientNet-B0 with random weights; 5,288,548 parameters at 1,000 classes."""
    return EfficientNet(num_classes=num_classes)
