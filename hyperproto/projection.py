"""From the backbone's features to the D numbers whose direction is the embedding."""

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperproto.arguments import as_tensor
from hyperproto.errors import ShapeError
from hyperproto.precision import full_precision, keeping_dtype

Projection = Literal["auto", "none", "linear", "linear+bn"]

#: What transformers marks by: tensors that it has loaded, and modules that need no start of their own or have had it.
LOADED = "_is_hf_initialized"


def build_projection(projection: Projection, in_features: int, dim: int, *, seed: int) -> nn.Module:
    """A module (B, in_features) -> (B, dim): nothing, a linear map, or that and batch norm ("auto").

    The linear map has no bias, so that scaling the features changes no direction. Batch norm centres the embeddings:
    pooled features behind a ReLU are non-negative, and prototypes point everywhere.
    """
    if projection == "none":
        return nn.Identity()
    linear = SeededLinear(in_features, dim, seed=seed)
    layers = linear if projection == "linear" else RowSequential(linear, RowBatchNorm(dim, dtype=torch.float32))
    for layer in layers.modules():
        # transformers' `init_weights` would draw them from the global generator: heads see to their start themselves.
        setattr(layer, LOADED, True)
    return layers


def seed_of_projection(seed: int) -> int:
    """Seed of a projection's start beside a bank of this seed: from one stream the two would be correlated.

    Examples:
        >>> seed_of_projection(0) != seed_of_projection(1)
        True
    """
    # Bit by bit as torch reads seeds, of which negative ones are some.
    return int(np.random.SeedSequence([seed % 2**64, 1]).generate_state(1, np.uint64)[0])


def has_layers(projection: nn.Module) -> bool:
    """Whether a projection does anything: it is not that of `projection="none"`."""
    return type(projection).forward is not nn.Identity.forward


def fresh_length(dim: int) -> float:
    """Expected length of the weight (D, F) of a fresh `SeededLinear`, whose entries have variance 1 / (3 F)."""
    return math.sqrt(dim / 3.0)


class SeededLinear(nn.Linear):
    """Bias-free linear map that starts from a seed, not from the global generator, in float32 under autocast.

    The start is that of `nn.Linear`, uniform in +-1 / sqrt(in_features). A bias that something gives it later, such as
    fusing the batch norm behind it, is added.

    Examples:
        >>> first, second = SeededLinear(4, 2, seed=0), SeededLinear(4, 2, seed=0)
        >>> torch.equal(first.weight, second.weight)
        True
    """

    def __init__(self, in_features: int, out_features: int, *, seed: int) -> None:
        self.seed = seed  # before the base class, which starts the weights
        super().__init__(in_features, out_features, bias=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew from the seed; a bias that came later is set to zero."""
        generator = torch.Generator(device="cpu").manual_seed(self.seed)
        bound = 1.0 / math.sqrt(self.in_features)
        start = torch.empty(self.out_features, self.in_features, dtype=torch.float32, device="cpu")
        self.weight.copy_(start.uniform_(-bound, bound, generator=generator))
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return _linear(input, self.weight, self.bias)


class RowSequential(nn.Sequential):
    """Layers over rows (N, features), also where a batch norm of maps comes in the place of one of rows.

    Code that splits, freezes or synchronises batch norms knows those of images alone, and puts its own in for any.

    Examples:
        >>> RowSequential(nn.Linear(4, 3), nn.BatchNorm2d(3))(torch.ones(2, 4)).shape
        torch.Size([2, 3])
    """

    def forward(self, input: Tensor) -> Tensor:
        """(N, in_features) -> (N, D)."""
        for layer in self:
            if torch.jit.is_scripting():
                input = layer(input)
            elif _takes_maps(layer):
                input = layer(input[:, :, None, None]).flatten(1)
            elif isinstance(layer, nn.SyncBatchNorm):
                input = _synchronised(layer, input)
            else:
                input = layer(input)
        return input


def _synchronised(layer: nn.SyncBatchNorm, rows: Tensor) -> Tensor:
    """What a SyncBatchNorm returns; a batch with infinity or NaN leaves its running statistics as they were."""
    own = {name: buffer for name, buffer in layer._buffers.items() if buffer is not None}
    if not layer.training or "running_mean" not in own:
        return layer(rows)
    layer._buffers.update({name: buffer.clone() for name, buffer in own.items()})
    try:
        result = layer(rows)
    finally:
        new = {name: layer.get_buffer(name) for name in own}
        layer._buffers.update(own)
    finite = torch.isfinite(new["running_mean"]).all()
    for name, buffer in own.items():
        buffer.copy_(torch.where(finite, new[name], buffer))
    return result


def _takes_maps(layer: nn.Module) -> bool:
    # torchvision's and timm's frozen ones are no batch norm of torch's.
    return isinstance(layer, nn.BatchNorm2d) or type(layer).__name__.startswith("FrozenBatchNorm")


class RowBatchNorm(nn.BatchNorm1d):
    """Batch norm in float32, whatever the model's dtype.

    A batch of fewer than two rows has no variance: the running statistics serve it, as in eval mode, where
    `nn.BatchNorm1d` raises. A batch with infinity or NaN leaves the running statistics as they were. With
    `track_running_stats` switched off they stay as they are in train mode, and where there are none the batch's serve
    in eval mode too, both as in `nn.BatchNorm1d`. What `convert_sync_batchnorm` puts in its place is torch's own, whose
    running statistics `RowSequential` guards.

    Examples:
        >>> RowBatchNorm(3)(torch.ones(1, 3)).shape
        torch.Size([1, 3])
    """

    def __init__(self, num_features: int, **options: Any) -> None:
        super().__init__(num_features, **options)
        be_leaf_(self)

    def forward(self, input: Tensor) -> Tensor:
        """(B, D) -> (B, D) float32."""
        return _batch_norm(
            input,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            self.num_batches_tracked,
            self.training,
            self.track_running_stats,
            self.momentum,
            self.eps,
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, own in (*self.named_parameters(), *self.named_buffers()):
            if prefix + name in state_dict:  # assign=True takes the dtype that comes
                state_dict[prefix + name] = state_dict[prefix + name].to(own.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RowBatchNorm":
        return super()._apply(keeping_dtype(fn), recurse)  # type: ignore[no-untyped-call]


def be_leaf_(module: nn.Module) -> None:
    """Let torch.fx call a module in the graphs that it traces, as it does a layer of torch, and not trace it.

    A graph then follows `train()` and `eval()`, where a traced one would keep to the mode of the day. A tracer takes
    for a leaf what comes from torch.nn, and asks the instance; classes, pickles and everything else are as before.
    """
    module.__module__ = nn.Module.__module__


def check_features(features: Tensor, in_features: int) -> None:
    """Raise unless `features` are dense floating-point rows of width `in_features`.

    Raises:
        ShapeError: they are not.
    """
    # A shape is a tensor there, and a look at its value would end in a warning.
    if torch.jit.is_tracing():  # type: ignore[no-untyped-call]
        return
    features = as_tensor(features, f"features of shape (B, ..., {in_features})")
    if not features.is_floating_point():
        raise ShapeError(f"HypersphericalHead expects features in a floating dtype, got {features.dtype}.")
    if features.dim() < 2 or features.shape[-1] != in_features:
        raise ShapeError(
            f"HypersphericalHead expects features of shape (B, ..., {in_features}), got {tuple(features.shape)}. "
            "For feature maps pool first, e.g. model.forward_head(x, pre_logits=True)."
        )


def unflatten_rows(rows: Tensor, features: Tensor) -> Tensor:
    """(N, D) as (..., D), with the leading dimensions of `features` (..., in_features), whose product N is."""
    if features.dim() == 2:  # nothing to do, and no batch size for a tracer to keep
        return rows
    return torch.unflatten(rows, 0, features.shape[:-1])


# Leaves to torch.fx: what depends on a shape or on autocast is decided when a traced graph runs.


@torch.fx.wrap
def _linear(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if torch.jit.is_scripting():
        return F.linear(features.to(weight.dtype), weight, bias)
    else:
        with full_precision(features.device):
            return F.linear(features.to(weight.dtype), weight, bias)


def _batch_norm(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    tracked: bool,
    momentum: float | None,
    eps: float,
) -> Tensor:
    of_batch = running_mean is None
    # By a branch, which a graph of all such sizes is guarded by; a trace, whose sizes are tensors, is of batches.
    if training and (torch.jit.is_tracing() or features.shape[0] > 1):  # type: ignore[no-untyped-call]
        of_batch = True
    if of_batch and not tracked:
        running_mean, running_var, num_batches_tracked = None, None, None
    share = 0.0 if momentum is None else momentum
    features = features.float()
    # Parameters in another dtype are what fully_shard's mixed precision makes of them.
    weight, bias = weight.float(), bias.float()
    if not of_batch or running_mean is None or running_var is None:
        return F.batch_norm(features, running_mean, running_var, weight, bias, of_batch, share, eps)
    if num_batches_tracked is not None and momentum is None:
        # A plain average over batches, which torch.optim.swa_utils.update_bn asks for.
        share = 1.0 / (float(num_batches_tracked) + 1.0)
    new_mean, new_var = running_mean.clone(), running_var.clone()
    rows = F.batch_norm(features, new_mean, new_var, weight, bias, of_batch, share, eps)
    # A batch that is not finite, such as a gradient scaler skips, would leave its trace for ever.
    finite = torch.isfinite(new_mean).all()  # tells it, at the cost of one row
    if num_batches_tracked is not None:
        num_batches_tracked.add_(finite.to(num_batches_tracked.dtype))
    running_mean.copy_(torch.where(finite, new_mean, running_mean))
    running_var.copy_(torch.where(finite, new_var, running_var))
    return rows
