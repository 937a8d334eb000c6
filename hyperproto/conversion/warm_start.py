"""A start from a trained classifier: the head that ranks the classes as it did, as far as D dimensions can."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hyperproto.affine import affine, affine_state, layers_of
from hyperproto.conversion.hooks import without_hooks
from hyperproto.errors import ArgumentError, ShapeError
from hyperproto.head import HypersphericalHead
from hyperproto.matching.problem import check_assignment
from hyperproto.matching.procrustes import align
from hyperproto.matching.solve import solve_assignment


@dataclass(frozen=True)
class WarmStart:
    """What a warm start reached.

    Attributes:
        reproduced: share in [0, 1] of the old classifier, as the squared length of its centred weights, that the
            head reproduces. At 1 it ranks the classes of every input as the old one did (but for its bias, where the
            projection has none).
    """

    reproduced: float

    def __str__(self) -> str:
        return f"warm start: {100 * self.reproduced:.1f} % of the old classifier's weights reproduced"


@torch.no_grad()
def warm_start_(
    head: HypersphericalHead, classifier: nn.Linear | nn.Conv2d, *, assignment: Tensor | None = None
) -> WarmStart:
    r"""Choose the head's assignment and projection so that it ranks classes as a trained classifier does; in place.

    $$
    \min_{\sigma, A, a} \; \lVert \bar W_\sigma A - \bar V \rVert_F^2
        + \lVert \bar W_\sigma a - \bar b \rVert^2,
        \qquad \text{logits}_\text{old} = V x + b
    $$

    The bar takes the mean over classes out, which no ranking can see. With sigma fixed this is least squares; sigma
    comes from `matching.procrustes.align`, unless the head's own assignment fits as well, as it does where the bank was
    made from the same class vectors (`PrototypeBank.from_class_vectors`). Normalising the embedding divides a sample's
    logits by one number and leaves their ranking. It is therefore the old one exactly, for every input, where the C
    assigned prototypes span C - 1 dimensions: a simplex, or any bank with D >= C - 1. Below that the nearest C x D
    matrix is what there is.

    Batch norm starts with -a as its running mean, not with a as its bias: a trained classifier's logits average to
    about zero over balanced data, so that this is near the mean that train mode is going to find, and both modes
    start from about the same function. Without batch norm the old bias is dropped. Without a projection only the
    assignment can be chosen, by the cosine between class vectors and prototypes.

    Args:
        head: made for the classifier's width and number of classes.
        classifier: nn.Linear, or nn.Conv2d of size 1, or a subclass. What it computes counts, not what it stores: one
            whose weights something else makes (weight norm, pruning, a low-rank update) is asked for its outputs.
        assignment: (C,) int64, to be taken instead of one chosen here: for the second and later heads of a model,
            which must share that of the first.

    Returns:
        How much of the classifier could be kept.

    Raises:
        ShapeError: head and classifier differ in width or number of classes.
        ArgumentError: weights that are not finite, or have no values (meta device); a projection of another kind than
            `HypersphericalHead` makes.
        AssignmentError: `assignment` is invalid. After any error the head is as it was.

    Examples:
        >>> classifier, features = nn.Linear(32, 8), torch.randn(100, 32)
        >>> head = HypersphericalHead(32, 8, dim=7).eval()
        >>> warm_start_(head, classifier).reproduced > 0.999
        True
        >>> bool((head(features).argmax(1) == classifier(features).argmax(1)).all())
        True

    References:
        Schoenemann, A generalized solution of the orthogonal Procrustes problem, 1966.
    """
    weight, bias = centred_weights(classifier, head.num_classes, head.in_features)
    layers = layers_of(head.projection)
    prototypes = head.bank.prototypes.cpu().double()
    if assignment is not None:
        check_assignment(assignment, head.num_classes, head.bank.num_prototypes)
    if layers.linear is None:
        if assignment is None:
            assignment = solve_assignment(weight, prototypes, weights=weight.norm(dim=1)).assignment
        head.assign_(assignment.to(head.assignment.device))
        return WarmStart(_squared_cosine(_frame(prototypes, assignment), weight))
    # The head's own order is the right one where the bank was made from these class vectors, and stays in a tie.
    candidates = [assignment] if assignment is not None else [head.assignment, align(weight, prototypes).assignment]
    fits = [(candidate, _fit(_frame(prototypes, candidate), weight, bias)) for candidate in candidates]
    assignment, fit = max(fits, key=lambda candidate_and_fit: round(candidate_and_fit[1].reproduced, 9))
    state = affine_state(head.projection, fit.projection, fit.bias)
    head.assign_(assignment.to(head.assignment.device))
    head.projection.load_state_dict(state)
    return WarmStart(fit.reproduced)


class _Rows(nn.Module):
    """A convolution of size 1 as a layer over rows (N, in_features)."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, rows: Tensor) -> Tensor:
        return self.layer(rows[:, :, None, None])[:, :, 0, 0]


def _computed(classifier: nn.Linear | nn.Conv2d, in_features: int) -> tuple[Tensor, Tensor]:
    """The weight (C, in_features) and bias (C,) that a layer computes with, whatever it stores; float64, on the CPU."""
    stored = classifier._parameters.get("weight")
    if type(classifier).forward is nn.Conv2d.forward and type(stored) is nn.Parameter:
        weight = stored.flatten(1).cpu().double()
        return weight, weight.new_zeros(len(weight)) if classifier.bias is None else classifier.bias.cpu().double()
    try:
        with without_hooks(classifier):
            return affine(_Rows(classifier) if isinstance(classifier, nn.Conv2d) else classifier, in_features)
    except ArgumentError as error:
        raise ArgumentError(
            f"a warm start needs a classifier that computes W x + b, got {type(classifier).__name__}, which does not. "
            "Convert without warm_start, and start from data: fit_head(model, loader)."
        ) from error


class _Fit(NamedTuple):
    """Projection (D, in_features) and bias (D,) behind which prototypes come nearest to the classifier; how near."""

    projection: Tensor
    bias: Tensor
    reproduced: float


def _fit(frame: Tensor, weight: Tensor, bias: Tensor) -> _Fit:
    # Directions outside the span of centred prototypes have singular values at float32 rounding.
    inverse = torch.linalg.pinv(frame, rtol=1e-5)  # (D, C)
    projection = inverse @ weight
    return _Fit(projection, inverse @ bias, _squared_cosine(frame @ projection, weight))


def _frame(prototypes: Tensor, assignment: Tensor) -> Tensor:
    """The assigned prototypes (C, D), less their mean."""
    chosen = prototypes[assignment.cpu()]
    return chosen - chosen.mean(dim=0)


def _squared_cosine(matrix: Tensor, weight: Tensor) -> float:
    """Share of `weight` that a multiple of `matrix` accounts for; nothing where that is zero."""
    lengths = float(matrix.square().sum() * weight.square().sum())
    return float((matrix * weight).sum().square()) / lengths if lengths > 0 else 0.0


def centred_weights(classifier: nn.Linear | nn.Conv2d, num_classes: int, in_features: int) -> tuple[Tensor, Tensor]:
    """A classifier's weight (C, in_features) and bias (C,) in float64 on the CPU, less their means over classes.

    Raises:
        ShapeError: it has another width or number of classes.
        ArgumentError: its weights are not finite, have no values, or are not all that it computes with.
    """
    expected = (num_classes, in_features)
    if classifier.weight.shape[:2].numel() != classifier.weight.numel() or classifier.weight.shape[:2] != expected:
        raise ShapeError(
            f"a warm start needs a classifier with weights of shape {expected} (number of classes, features), got "
            f"{tuple(classifier.weight.shape)}. Convert with the trained classifier's own number of classes."
        )
    if classifier.weight.is_meta:
        raise ArgumentError(
            "a warm start needs a trained classifier, got one without values (device meta). Load the weights first."
        )
    weight, bias = _computed(classifier, in_features)
    if not bool(torch.isfinite(weight).all() and torch.isfinite(bias).all()):
        raise ArgumentError("a warm start needs finite weights and biases; the classifier's are not.")
    centred = weight - weight.mean(dim=0)
    if not bool(centred.any()):
        raise ArgumentError("a warm start needs a trained classifier, got one with the same weights for all classes.")
    return centred, bias - bias.mean()
