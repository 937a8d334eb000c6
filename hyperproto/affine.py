"""The affine form of a projection: the only place that reads it, and the only one that writes it.

Folding a head, a warm start and the fits all speak of x -> A x + b and know no layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import SyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm

from hyperproto.errors import ArgumentError
from hyperproto.modes import eval_mode
from hyperproto.projection import RowBatchNorm, RowSequential, SeededLinear, fresh_length, has_layers

#: Rows of the identity that an unknown projection is asked for at a time.
PROBED_AT_ONCE = 1024
#: Random rows by which the answers are checked.
CHECKED_ROWS = 64
#: Largest error of a checked row, in units of its dtype's rounding times the lengths that were added up.
MOST_ROUNDING = 64.0


class Layers(NamedTuple):
    """What a projection that can be written consists of: nothing, a linear map, or that and a batch norm."""

    linear: nn.Linear | None
    batch_norm: _BatchNorm | None

    @property
    def has_intercept(self) -> bool:
        """Whether the b of A x + b is free."""
        return self.batch_norm is not None or (self.linear is not None and self.linear.bias is not None)


def known_layers(projection: nn.Module) -> Layers | None:
    """The layers of a projection such as `build_projection` makes, SyncBatchNorm for batch norm; None of any other.

    A weight that something else computes (a parametrisation, pruning, an adapter, a quantised or sharded tensor) is
    not known, nor is a layer with hooks or a `forward` of its own, or batch norm without running statistics, weight
    or bias.

    Examples:
        >>> known_layers(nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))) is not None
        True
        >>> known_layers(nn.Sequential(nn.Linear(4, 2), nn.LayerNorm(2))) is None
        True
    """
    if any(_is_interfered_with(module) for module in projection.modules()):
        return None
    if not has_layers(projection):
        return Layers(None, None)
    parts = [projection]
    if type(projection).forward in (nn.Sequential.forward, RowSequential.forward):
        parts = list(projection.children())
    if len(parts) not in (1, 2):
        return None
    linear, batch_norm = (*parts, None)[:2]
    if not _is_linear(linear):
        return None
    if batch_norm is None:
        return Layers(linear, None)
    if not isinstance(batch_norm, _BatchNorm) or batch_norm.running_mean is None:
        return None
    if type(batch_norm).forward not in (_BatchNorm.forward, SyncBatchNorm.forward, RowBatchNorm.forward):
        return None
    return Layers(linear, batch_norm) if _holds(batch_norm, "weight") and _holds(batch_norm, "bias") else None


def layers_of(projection: nn.Module) -> Layers:
    """The layers of a projection that can be written.

    Raises:
        ArgumentError: it is of another kind.
    """
    layers = known_layers(projection)
    if layers is None:
        raise ArgumentError(
            "expected a projection that can be set: an nn.Linear, or nn.Sequential(nn.Linear, nn.BatchNorm1d) with "
            f"running statistics, weights of their own and no hooks; got {_kinds(projection)}. Merge adapters, remove "
            "parametrisations, pruning and hooks first (their packages have functions for that), or build the head "
            'with projection="linear+bn".'
        )
    return layers


@torch.no_grad()
def affine(projection: nn.Module, in_features: int) -> tuple[Tensor, Tensor]:
    r"""The A and b with which a projection computes A x + b in eval mode.

    Read from the layers where they are known. Any other projection is asked: b is what it makes of zero, A what it
    makes of the unit rows less b, and random rows, in batches of two sizes, tell whether that is all there is to it.

    Args:
        projection: (N, F) -> (N, D).
        in_features: F.

    Returns:
        A (D, F) and b (D,), float64 on the CPU.

    Raises:
        ArgumentError: it computes something else, such as a layer norm or an activation between two layers.

    Examples:
        >>> matrix, shift = affine(nn.Linear(3, 2), 3)
        >>> matrix.shape, shift.shape
        (torch.Size([2, 3]), torch.Size([2]))
    """
    layers = known_layers(projection)
    if layers is None:
        return _probed(projection, in_features)
    if layers.linear is None:
        matrix = torch.eye(in_features, dtype=torch.float64, device="cpu")
        return matrix, matrix.new_zeros(in_features)
    matrix = layers.linear.weight.cpu().double()
    shift = matrix.new_zeros(len(matrix)) if layers.linear.bias is None else layers.linear.bias.cpu().double()
    norm = layers.batch_norm
    if norm is None or norm.running_mean is None or norm.running_var is None:
        return matrix, shift
    gain = norm.weight.cpu().double() / (norm.running_var.cpu().double() + norm.eps).sqrt()
    return gain[:, None] * matrix, norm.bias.cpu().double() + gain * (shift - norm.running_mean.cpu().double())


@torch.no_grad()
def affine_state(
    projection: nn.Module,
    matrix: Tensor,
    offset: Tensor,
    *,
    centre: Tensor | None = None,
    mean: Tensor | None = None,
    covariance: Tensor | None = None,
    keep_statistics: bool = False,
) -> dict[str, Tensor]:
    r"""The `state_dict` with which a projection computes a positive multiple of A (x - c) + o; changes nothing.

    No direction sees the multiple. It gives weights the length of fresh ones, and batch norm's gains 1 on average,
    whatever the scale of the features, so that the learning rate and half precision find what they expect.

    Batch norm's statistics are those of A x over the features, so that train mode starts from the same function. Where
    nothing is known of the features, their entries are taken to be independent, with a mean that the offset undoes.
    Without batch norm and without a bias there is no place for an offset, and it is dropped.

    Args:
        projection: one that can be written; see `layers_of`.
        matrix: A (D, F) float64 on the CPU.
        offset: o (D,) float64.
        centre: c (F,) float64; zero by default.
        mean: (F,) of the features.
        covariance: (F, F) of the features.
        keep_statistics: batch norm keeps its running statistics, and weight and bias make up for them: eval mode
            computes the same.

    Returns:
        All entries of the projection's `state_dict`.

    Raises:
        ArgumentError: the projection is of another kind, or its dtype does not hold what would be written.
    """
    linear, batch_norm = layers_of(projection)
    state = dict(projection.state_dict())
    if linear is None:
        return state
    scale = fresh_length(len(matrix)) / _at_least_tiny(matrix.norm())
    weight = (scale * matrix).to(linear.weight.dtype).double()  # as it is going to be rounded
    shift = scale * offset - (0.0 if centre is None else weight @ centre)
    prefix = "" if isinstance(projection, nn.Linear) else "0."
    state[prefix + "weight"] = weight
    if linear.bias is not None:
        state[prefix + "bias"] = shift if batch_norm is None else torch.zeros_like(shift)
    if batch_norm is not None:
        location = -shift if mean is None else weight @ mean
        spread = weight if covariance is None else weight @ covariance
        variance = (spread * weight).sum(dim=1).clamp_min(0.0)
        length = _at_least_tiny(variance.mean().sqrt())
        if keep_statistics:
            location, variance = (state[f"1.running_{name}"].cpu().double() for name in ("mean", "var"))
        state["1.running_mean"], state["1.running_var"] = location, variance
        state["1.weight"] = (variance + batch_norm.eps).sqrt() / length
        state["1.bias"] = (location + shift) / length
    _check_writable(projection, state)
    return state


def set_affine_(
    projection: nn.Module,
    matrix: Tensor,
    offset: Tensor,
    *,
    centre: Tensor | None = None,
    mean: Tensor | None = None,
    covariance: Tensor | None = None,
) -> None:
    """Let a projection compute a positive multiple of A (x - c) + o from now on, in place; see `affine_state`.

    Examples:
        >>> projection = nn.Sequential(nn.Linear(3, 2, bias=False), nn.BatchNorm1d(2))
        >>> set_affine_(projection, torch.eye(2, 3).double(), torch.tensor([0.0, 2.0]).double())
        >>> matrix, shift = affine(projection, 3)
        >>> torch.allclose(matrix / matrix[0, 0], torch.eye(2, 3).double())
        True
        >>> round(float(shift[1] / matrix[0, 0]), 5)
        2.0
    """
    state = affine_state(projection, matrix, offset, centre=centre, mean=mean, covariance=covariance)
    projection.load_state_dict(state)


def typical_length(projection: nn.Module) -> float | None:
    r"""Root mean square of the length of what a projection returns, as the batch norm at its end knows it.

    $$ \sqrt{\textstyle\sum_i g_i^2 \, v_i / (v_i + \epsilon) + b_i^2} $$

    with gains g, biases b and running variances v: over features distributed as those that it has averaged over.

    Returns:
        None without a batch norm at the end, or without running statistics.

    Examples:
        >>> typical_length(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, eps=0.0)))
        2.0
    """
    last = projection[-1] if isinstance(projection, nn.Sequential) and len(projection) else projection
    if not isinstance(last, _BatchNorm) or last.running_var is None or last.weight is None or last.bias is None:
        return None
    variance = last.running_var.detach().cpu().double()
    squares = last.weight.detach().cpu().double().square() * variance / (variance + last.eps)
    return math.sqrt(float((squares + last.bias.detach().cpu().double().square()).sum()))


def _probed(projection: nn.Module, in_features: int) -> tuple[Tensor, Tensor]:
    like = _tensor_of(projection)
    rows = torch.eye(in_features, dtype=like.dtype, device=like.device)
    generator = torch.Generator(device="cpu").manual_seed(0)
    checked = torch.randn(CHECKED_ROWS, in_features, generator=generator, device="cpu").to(rows)
    with eval_mode(projection):
        shift = projection(rows.new_zeros(2, in_features))[0].cpu().double()  # (D,)
        answers = torch.cat([projection(part).cpu().double() for part in torch.split(rows, PROBED_AT_ONCE)])  # (F, D)
        matrix = (answers - shift).T
        found = [projection(part).cpu().double() for part in (checked, checked[: CHECKED_ROWS // 4])]
    expected = checked.cpu().double() @ matrix.T + shift
    added_up = checked.cpu().double().norm(dim=1)[:, None] * matrix.norm(dim=1) + shift.abs().max()
    allowed = MOST_ROUNDING * torch.finfo(like.dtype).eps * added_up
    if not all(bool(((answer - expected[: len(answer)]).abs() <= allowed[: len(answer)]).all()) for answer in found):
        raise ArgumentError(
            f"expected a projection that computes A x + b in eval mode, got {_kinds(projection)}, which does not: no "
            "linear layer ranks as it does. Keep the head, and deploy it with hyperproto, e.g. through torch.export."
        )
    return matrix, shift


def _tensor_of(projection: nn.Module) -> Tensor:
    """A tensor that tells which dtype and device the projection takes."""
    for tensor in _tensors(projection):
        if tensor.is_floating_point():
            return tensor
    return torch.zeros((), dtype=torch.float32, device="cpu")


def _tensors(projection: nn.Module) -> Iterator[Tensor]:
    yield from projection.parameters()
    yield from projection.buffers()


def _check_writable(projection: nn.Module, state: dict[str, Tensor]) -> None:
    """Raise if a value would be written as infinity or NaN."""
    for name, own in projection.state_dict().items():
        if not bool(torch.isfinite(state[name].to(own.dtype)).all()):
            raise ArgumentError(
                f"the projection's {name} cannot hold the fit in {own.dtype}; the head is unchanged. The features are "
                "too large or too small for it: scale them, or normalise in front of the head."
            )


def _is_linear(layer: nn.Module | None) -> TypeGuard[nn.Linear]:
    """Whether a layer computes W x + b with a W that it holds itself."""
    known = (nn.Linear.forward, SeededLinear.forward)
    if not isinstance(layer, nn.Linear) or type(layer).forward not in known:
        return False
    return _holds(layer, "weight") and (layer.bias is None or _holds(layer, "bias"))


def _is_interfered_with(module: nn.Module) -> bool:
    """Whether hooks, or a `forward` put on the instance, may have a say in what a module returns."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def _holds(layer: nn.Module, name: str) -> bool:
    """Whether a layer has a parameter of this name that nothing computes: no quantised or sharded tensor, either."""
    parameter = layer._parameters.get(name)
    return parameter is not None and not hasattr(parameter, "__tensor_flatten__")


def _kinds(projection: nn.Module) -> str:
    names = ", ".join(type(module).__name__ for module in projection.children())
    return f"{type(projection).__name__}({names})" if names else type(projection).__name__


def _at_least_tiny(length: Tensor) -> float:
    return max(float(length), math.sqrt(torch.finfo(torch.float32).tiny))
