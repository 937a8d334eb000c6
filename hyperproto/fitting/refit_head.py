"""Fit the heads of a trained backbone once more, by cross-entropy: with their prototypes, or in fewer dimensions."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hyperproto.affine import affine, layers_of
from hyperproto.bank import PrototypeBank
from hyperproto.conversion.locate import check_unwrapped
from hyperproto.conversion.replace import replace_head
from hyperproto.errors import ArgumentError, LabelError
from hyperproto.fitting.components import principal_components
from hyperproto.fitting.features import add_up_statistics, feed_features
from hyperproto.fitting.lbfgs import Batches, SampleLoss, minimise
from hyperproto.fitting.report import HeadFit, report_fit
from hyperproto.fitting.statistics import FeatureStatistics
from hyperproto.functional import prototype_cross_entropy
from hyperproto.geometry import normalise
from hyperproto.head import HypersphericalHead, get_heads, require_heads
from hyperproto.precision import full_precision
from hyperproto.projection import has_layers

#: Samples of a batch. The vectors that L-BFGS keeps come to lie where the last batch's temporaries were: with large
#: ones the heap grows by about as much at each iteration.
BATCH_ROWS = 1024
#: Numbers of a batch of features, and of the cosines of one: 16 MiB.
BATCH_NUMBERS = 2**22


def refit_head(model: nn.Module, loader: Iterable[Any], *, scale: float = 16.0, iterations: int = 200) -> HeadFit:
    r"""Fit the projections of a trained model once more, to all features at once; prototypes and assignment stay.

    $$
    \min_A \; \frac1C \sum_c \mathbb{E}_{x \sim c} \left[ -\log
        \frac{\exp(s \langle z(x), w_{\sigma(c)} \rangle)}{\sum_k \exp(s \langle z(x), w_{\sigma(k)} \rangle)}
        \right], \qquad z(x) = \frac{A x}{\lVert A x \rVert}
    $$

    After the last epoch: the features are those of the finished backbone, in eval mode, and labels count alike however
    many samples they have, where training counted samples. One pass without gradients, then L-BFGS, which has no
    learning rate and draws nothing: the same data, the same head. docs/results.md shows what it is worth.

    Memory: all features, 4 N F bytes, and 200 copies of a projection, where the head is. Modes, hooks, gradients and
    the global generator are as before afterwards; batch norm keeps its running statistics. The heads' `logit_scale`
    becomes `scale`; `fit_logit_scale` on held-out data finds a better one. Several heads in one model are fitted one by
    one. Under torch.distributed every rank must call it, each with its share of the data, before fully_shard; all take
    rank 0's buffers first, as DistributedDataParallel does, and arrive at the same head.

    Args:
        model: a converted model, bare or wrapped, or a head (whose inputs the batches are then).
        loader: batches whose first two items are inputs and labels (B,) int64: the training data, without
            augmentation.
        scale: s > 0, of the cosines; what the backbone was trained with, as in `PrototypeCrossEntropyLoss`.
        iterations: at most so many of L-BFGS, at least 1; each costs one or two passes over the features.

    Returns:
        What was reached.

    Raises:
        HeadNotFoundError: the model has no hyperspherical head, or does not call it.
        ArgumentError: a head without a projection, a scale or iterations out of range, no samples, or features that are
            not finite or tell no labels apart.
        LabelError, ShapeError: targets that do not fit. After any error the model is as it was (on other ranks, with
            rank 0's buffers).

    Examples:
        >>> head = HypersphericalHead(8, 4, dim=3)
        >>> labels = torch.arange(4).repeat(25)
        >>> features = torch.eye(4, 8)[labels] + 0.01 * torch.randn(100, 8)
        >>> refit_head(head, [(features, labels)]).accuracy
        1.0

    References:
        Kang et al., Decoupling representation and classifier for long-tailed recognition, ICLR 2020 (classifier
        re-training).
    """
    heads = require_heads(model)
    _check_options(scale, iterations)
    if not all(has_layers(head.projection) for head in heads):
        raise ArgumentError('a head with projection="none" has nothing to fit: convert with "linear" or "linear+bn".')
    features = _Features(model, heads, loader)
    fitted = []
    for head, batches in zip(heads, features.batches, strict=True):
        projection = copy.deepcopy(head.projection).float().eval().requires_grad_(True)
        loss = _cross_entropy(projection, head.class_prototypes, scale)
        minimise(loss, list(projection.parameters()), batches, num_classes=head.num_classes, iterations=iterations)
        fitted.append(projection)
    with torch.no_grad():
        for head, projection in zip(heads, fitted, strict=True):
            for parameter, value in zip(head.projection.parameters(), projection.parameters(), strict=True):
                parameter.copy_(value)
            head.logit_scale.fill_(scale)
    return features.report(heads[0])


def compress_head(
    model: nn.Module, loader: Iterable[Any], *, dim: int, scale: float = 16.0, iterations: int = 200
) -> HeadFit:
    r"""Give a trained model a head of fewer dimensions, whose prototypes are class vectors fitted to its features.

    $$
    \min_{A, V} \; \frac1C \sum_c \mathbb{E}_{x \sim c} \left[ -\log
        \frac{\exp(s \langle z(x), v_c / \lVert v_c \rVert \rangle)}
             {\sum_k \exp(s \langle z(x), v_k / \lVert v_k \rVert \rangle)} \right]
    $$

    After the last epoch of a backbone that trained in more dimensions, such as towards the simplex: few dimensions are
    a hard target for a backbone, and a small loss at its end. The new projection A ("linear+bn") starts from the `dim`
    principal components of the old head's linear logits over the data, V from the classes' shares in them. Both are
    fitted by L-BFGS as in `refit_head`; what is said there of memory, modes and ranks holds here. Then V is the new
    head's bank, label c on prototype c, and never trains again.

    The old head is taken out: criteria and assigners bound to it raise, and an optimiser has to be made anew.
    `restore_model` brings back the original classifier as before. To load a checkpoint of the new model, take the bank
    from it: `PrototypeBank.from_tensor(state[...])`, then `convert_model(model, bank=bank)`.

    Args:
        model: a converted model with one head, not wrapped.
        loader: as for `refit_head`.
        dim: D of the new head, from 2 to the number of classes.
        scale: s > 0, as for `refit_head`; the new head's `logit_scale`.
        iterations: as for `refit_head`.

    Returns:
        What was reached.

    Raises:
        HeadNotFoundError: the model has no hyperspherical head, does not call it, or is wrapped.
        ArgumentError: several heads, or a bare one, which cannot be replaced in place; another projection than
            "linear+bn"; an option out of range; data as for `refit_head`.
        LabelError, ShapeError: targets that do not fit. After any error the model is as it was (on other ranks, with
            rank 0's buffers).

    Examples:
        >>> model = nn.Sequential(HypersphericalHead(8, 4, dim=4, bank="simplex"))
        >>> labels = torch.arange(4).repeat(25)
        >>> features = torch.eye(4, 8)[labels] + 0.01 * torch.randn(100, 8)
        >>> compress_head(model, [(features, labels)], dim=2).accuracy, model[0].dim
        (1.0, 2)
    """
    [old, *_] = require_heads(model)
    [name, *others] = get_heads(model)
    _check_options(scale, iterations)
    check_unwrapped(model, name, verb="compress_head")
    _check_compressible(old, name, others, dim)
    features = _Features(model, (old,), loader)
    [batches] = features.batches
    matrix, _ = affine(old.projection, old.in_features)
    to_logits = old.class_prototypes.cpu().double() @ matrix  # (C, F)
    projection, start = principal_components(to_logits, features.scatters[0], dim)
    projection, vectors = projection.to(old.assignment.device), nn.Parameter(start.to(old.assignment.device))
    loss = _cross_entropy(projection, vectors, scale)
    minimise(loss, [*projection.parameters(), vectors], batches, num_classes=old.num_classes, iterations=iterations)
    head = type(old)(
        old.in_features,
        old.num_classes,
        bank=PrototypeBank.from_tensor(vectors),
        projection="linear+bn",
        logit_scale=scale,
        training_output=old.training_output,
    )
    head.projection.load_state_dict(projection.state_dict())
    replace_head(model, name, head)
    return features.report(head)


def _check_options(scale: float, iterations: int) -> None:
    if not (math.isfinite(scale) and scale > 0.0):
        raise ArgumentError(f"expected a finite scale > 0, got {scale}.")
    if iterations < 1:
        raise ArgumentError(f"expected at least 1 iteration, got {iterations}.")


def _check_compressible(head: HypersphericalHead, name: str, others: list[str], dim: int) -> None:
    if not name:
        raise ArgumentError("a bare head cannot be replaced in place: pass the model that has it.")
    if others:
        raise ArgumentError(f"expected a model with one head, got {1 + len(others)}, at {', '.join([name, *others])}.")
    if layers_of(head.projection).batch_norm is None:
        raise ArgumentError('expected a head with projection="linear+bn": the new one has it, and starts from the old.')
    if not 2 <= dim <= head.num_classes:
        raise ArgumentError(f"expected dim from 2 to the number of classes, {head.num_classes}, got {dim}.")


class _Features:
    """What reaches the heads of a model from a whole loader, where the heads are.

    Attributes:
        batches: for each head, features (N, F) float32 and labels (N,) of this rank.
        scatters: for each head, of the features of all ranks.
    """

    def __init__(self, model: nn.Module, heads: tuple[HypersphericalHead, ...], loader: Iterable[Any]) -> None:
        device = heads[0].assignment.device
        samples = [_Regrouped(_batch_rows(head)) for head in heads]
        self._statistics = [FeatureStatistics(head.num_classes, head.in_features) for head in heads]

        def consume(index: int, features: Tensor, target: Tensor) -> None:
            if target.dim() == 2:
                raise LabelError(
                    "expected labels (B,): a head is fitted to the training data as they are, without mixup."
                )
            samples[index].add(features, target.to(device))
            self._statistics[index].add(features.cpu(), target)

        num_samples = feed_features(model, heads, loader, consume)
        self._num_samples = add_up_statistics(heads[0], self._statistics, num_samples)
        self.scatters = [statistics.scatter() for statistics in self._statistics]
        self.batches = [each.batches() for each in samples]

    def report(self, head: HypersphericalHead) -> HeadFit:
        """What the first head reached."""
        return report_fit(head, self._statistics[0], self._num_samples, self.batches[0])


def _batch_rows(head: HypersphericalHead) -> int:
    return min(BATCH_ROWS, max(1, BATCH_NUMBERS // max(head.in_features, head.num_classes)))


class _Regrouped:
    """Samples copied into batches of one size as they come: all at once, at the end, would take the memory twice."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._full: Batches = []
        self._rest: Batches = []

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Features (N, F), which may be a view of all tokens or a buffer that is going to be reused; labels (N,)."""
        start = 0
        while start < len(labels):
            part = slice(start, start + self._size - sum(len(own) for _, own in self._rest))
            self._rest.append((features[part].clone(), labels[part].clone()))
            start += len(self._rest[-1][1])
            if sum(len(own) for _, own in self._rest) == self._size:
                self._full.append(_joined(self._rest))
                self._rest = []

    def batches(self) -> Batches:
        """All samples, in the order in which they came."""
        return [*self._full, _joined(self._rest)] if self._rest else self._full


def _joined(parts: Batches) -> tuple[Tensor, Tensor]:
    features, labels = zip(*parts, strict=True)
    return (features[0], labels[0]) if len(parts) == 1 else (torch.cat(features), torch.cat(labels))


def _cross_entropy(projection: nn.Module, vectors: Tensor, scale: float) -> SampleLoss:
    """Cross-entropy (N,) of features (N, F) over the cosines of what they project to with class vectors (C, D)."""

    def loss(features: Tensor, labels: Tensor) -> Tensor:
        embeddings, prototypes = normalise(projection(features)), normalise(vectors)
        with full_precision(features.device):
            cosines = F.linear(embeddings, prototypes)
        return prototype_cross_entropy(cosines, labels, scale=scale, reduction="none")

    return loss
