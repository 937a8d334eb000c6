"""The residual networks for small images with which the papers' tables on CIFAR were made."""

import sys

from torch import Tensor, nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut without parameters (option A: subsampled, padded with zero channels)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.padding = stride, (channels - in_channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, channels, H / stride, W / stride)."""
        shortcut = x
        if self.stride > 1:
            # Pooling over one pixel keeps channels last in the gradient too; slicing does not.
            shortcut = F.avg_pool2d(x, 1, self.stride)
            shortcut = F.pad(shortcut, (0, 0, 0, 0, self.padding, self.padding))
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(x)) + shortcut, inplace=True)


class CifarResNet(nn.Module):
    """The residual network for 32 x 32 images of He et al. 2016, section 4.2: three stages of (depth - 2) / 6 blocks.

    Stages have `width`, 2 `width` and 4 `width` channels: 16 in that paper, 32 in the long-tailed settings.
    """

    def __init__(self, depth: int, num_classes: int, width: int = 16) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            sys.exit(f"cifar_resnet{depth}: the depth must be 6 n + 2, such as 20, 32, 44 or 56.")
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        blocks, channels = [], width
        for stage in range(3):
            for block in range((depth - 2) // 6):
                blocks.append(BasicBlock(channels, width * 2**stage, stride=2 if stage and not block else 1))
                channels = width * 2**stage
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def get_classifier(self) -> nn.Module:
        """What `hyperproto.convert_model` replaces."""
        return self.fc

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C)."""
        x = F.relu(self.bn1(self.conv1(images)), inplace=True)
        return self.fc(F.adaptive_avg_pool2d(self.blocks(x), 1).flatten(1))
