"""The head for feature maps: what an nn.Conv2d of size 1 was to an nn.Linear."""

from torch import Tensor

from hyperproto.head import HypersphericalHead


class ChannelsFirstHead(HypersphericalHead):
    """`HypersphericalHead` over the second of four dimensions: (B, in_features, H, W) -> (B, C, H, W).

    A class of its own rather than a look at the number of dimensions, which would keep torch.fx from tracing. Its
    state and `embed`, which takes rows (..., in_features), are those of the base class.

    Examples:
        >>> import torch
        >>> ChannelsFirstHead(8, 4, dim=3)(torch.randn(2, 8, 5, 6)).shape
        torch.Size([2, 4, 5, 6])
    """

    class_dim = 1

    def forward(self, features: Tensor) -> Tensor:
        """(B, in_features, H, W) -> (B, C, H, W) logits, or (B, D, H, W) embeddings in train mode if so chosen."""
        return self._output(self.embed(features.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
