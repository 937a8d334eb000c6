"""Fit a head to the features that reach it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hyperproto.affine import affine_state, layers_of
from hyperproto.arguments import choice
from hyperproto.fitting.closed_form import least_squares, match_classes, regress
from hyperproto.fitting.compress_head import class_vector_task, only_head, put_in
from hyperproto.fitting.data import FitOptions, HeldFeatures
from hyperproto.fitting.features import checking, collect
from hyperproto.fitting.report import HeadFit, report_fit
from hyperproto.fitting.statistics import FeatureSample, FeatureStatistics
from hyperproto.fitting.unit_fit import fit_unit_head
from hyperproto.fitting.unit_head import UnitHead
from hyperproto.head import HypersphericalHead
from hyperproto.heads import require_heads
from hyperproto.matching.solve import solve_assignment
from hyperproto.projection import has_layers
from hyperproto.ranks import ProcessGroup, check_not_sharded, decided_by_first

#: Numbers of the features kept to measure the accuracy of the start by: 128 MiB.
KEPT_NUMBERS = 2**25

#: Iterations of L-BFGS for each penalty, where class vectors are fitted too.
MOST_ITERATIONS = 200

#: Samples whose accuracy is measured at a time.
ACCURACY_CHUNK = 4096


def fit_head(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    bank: Literal["class-vectors"] | None = None,
    process_group: ProcessGroup | None = None,
) -> HeadFit:
    r"""Choose assignment and projection in closed form from one pass over the data; in place.

    $$
    \sigma = \arg\max_{\sigma, R} \sum_c \langle R \Sigma^{-1/2} (\mu_c - \bar\mu), w_{\sigma(c)} \rangle,
        \qquad A, a = \arg\min_{A, a} \; \sum_c \mathbb{E}_{x \sim c} \lVert A x + a - w_{\sigma(c)} \rVert^2
    $$

    with the class means mu of the features x, their covariance Sigma within classes (shrunk as far as the number of
    samples asks for) and rotations R. Labels count alike, however many samples they have. What the published
    assignment step matches once an epoch are means that have been pulled to their prototypes already, so that it
    mostly confirms the assignment there is: what decides is the one before the first pull.

    Features of a fresh, a half-trained or a pretrained backbone will do, as will any dimension D. One pass in eval
    mode without gradients; modes, hooks and the global generator are as before afterwards. Memory: O(F^2 + C F) and
    256 MiB, whatever the number of samples; CPU time: seconds up to a thousand labels.

    - "linear+bn": batch norm takes over the intercept a. Its running statistics are those of the projected data, so
      that train mode starts from the same function as eval mode.
    - "linear": without the intercept. "none": only the assignment is chosen, by the mean embeddings.
    - Several heads in one model: the first one chooses the assignment, each gets a projection of its own.
    - `bank="class-vectors"`: prototypes from the data too. With D < C - 1 no assignment makes up for prototypes that
      know nothing of the classes. A head with a bank of fitted class vectors takes the place of the model's, whose
      projection must be "linear+bn", by the way of `compress_head` and in its time; what is said there of optimisers,
      criteria and checkpoints holds here. Its matching is done: no label moves where training confirms it.
    - Labels that the loader does not have keep their prototype unless a seen label needs it.
    - Under torch.distributed every rank must call it, each with its share of the data, before fully_shard: all ranks
      take rank 0's buffers, as DistributedDataParallel does, statistics are summed over the ranks, and all arrive at
      the same head.

    The projection's weights get the length of fresh ones, whatever the scale of the features. An optimiser that has
    taken steps already still has momentum of the old projection: `optimizer.state.pop(parameter, None)` for the
    parameters of `head.projection` forgets it.

    Args:
        model: a converted model, bare or wrapped, or a head (whose inputs the batches are then).
        loader: batches (inputs, labels (B,) int64), or soft targets (B, C), whose entries weigh the sample for each
            label; or labels (B, ...) of the positions of maps and of tokens. Dictionaries whose names say which is
            which, a data set, and a pair of whole arrays (X, y) will do. The training data, without augmentation or
            with it.
        bank: None keeps the prototypes that there are; "class-vectors" replaces them.
        process_group: the ranks that share out the data; by default all.

    Returns:
        What was reached.

    Raises:
        HeadNotFoundError: the model has no hyperspherical head, or does not call it.
        ArgumentError: no samples, features that are not finite, too far from zero for how they spread, or none that
            tell labels apart; another bank; with "class-vectors" a model whose head cannot be replaced.
        AssignmentError: mean embeddings that are not finite, for a head without a projection.
        BankError: its heads do not share one bank and one assignment.
        LabelError, ShapeError: targets that do not fit. After any error the model is as it was (on other ranks, with
            rank 0's buffers).

    Examples:
        >>> head = HypersphericalHead(8, 4, dim=3)
        >>> labels = torch.arange(4).repeat(25)
        >>> features = torch.eye(4, 8)[labels] + 0.01 * torch.randn(100, 8)
        >>> fit_head(head, [(features, labels)]).accuracy
        1.0

    References:
        Schoenemann, A generalized solution of the orthogonal Procrustes problem, 1966; Hastie, Tibshirani, Buja,
        Flexible discriminant analysis by optimal scoring, 1994 (discriminants by regression).
    """
    with checking(model, process_group=process_group):
        heads = require_heads(model)
        check_not_sharded(model, [each for head in heads for each in head.projection.parameters()])
        for head in heads:
            layers_of(head.projection)  # raises for a projection that cannot be set, before the pass over the data
        if bank is not None:
            choice(bank, "bank", ("class-vectors",))
            name, head = only_head(model, verb="fit_head")
    if bank is not None:
        return _fit_class_vectors(model, name, head, loader, process_group)
    return _fit_model(model, heads, loader, process_group)


@torch.inference_mode(False)
def _fit_class_vectors(
    model: nn.Module, name: str, head: HypersphericalHead, loader: Iterable[Any], process_group: ProcessGroup | None
) -> HeadFit:
    features = HeldFeatures(model, (head,), loader, process_group=process_group)
    present = partial(UnitHead.of_projection, head.projection, head.class_prototypes)
    stand_in = partial(least_squares, class_prototypes=head.class_prototypes, intercept=True)
    task = class_vector_task(features, head.dim, present=present, stand_in=stand_in, asks_present=True)
    fit = fit_unit_head(features, task, FitOptions(None, MOST_ITERATIONS, None))
    return put_in(model, name, fit, features) if fit.is_new else features.report(head, fit.held_out)


@torch.no_grad()
def _fit_model(
    model: nn.Module,
    heads: tuple[HypersphericalHead, ...],
    loader: Iterable[Any],
    process_group: ProcessGroup | None,
) -> HeadFit:
    sample = FeatureSample(max(1, KEPT_NUMBERS // heads[0].in_features), heads[0].in_features)

    def keep(index: int, features: Tensor, target: Tensor) -> None:
        if index == 0:
            sample.add(features.cpu(), target if target.dim() == 1 else target.argmax(dim=1))

    statistics, num_samples = collect(model, heads, loader, keep, process_group=process_group)
    rows, labels = sample.draw()
    batches = list(zip(torch.split(rows, ACCURACY_CHUNK), torch.split(labels, ACCURACY_CHUNK), strict=True))

    def report() -> HeadFit:
        return report_fit(heads[0], statistics[0], num_samples, batches, process_group=process_group)

    def decide() -> list[list[_Start]]:
        starts = [_fit_all(heads, statistics, shrunk=True)]
        if has_layers(heads[0].projection) and statistics[0].shrinking_hides_most():
            starts.append(_fit_all(heads, statistics, shrunk=False))
        return starts

    starts, *rest = decided_by_first(decide, heads[0].assignment.device, process_group=process_group)
    _write(heads, starts)
    fit = report()
    if not rest:
        return fit
    [others] = rest
    _write(heads, others)
    other = report()
    if other.accuracy > fit.accuracy:
        return other
    _write(heads, starts)
    return fit


@dataclass(frozen=True)
class _Start:
    """What is to be written into a head: nothing has changed while one of these is made."""

    assignment: Tensor
    projection: dict[str, Tensor]


def _write(heads: tuple[HypersphericalHead, ...], starts: list[_Start]) -> None:
    for head, start in zip(heads, starts, strict=True):
        head.projection.load_state_dict(start.projection)
        head.assign_(start.assignment.to(head.assignment.device))


def _fit_all(
    heads: tuple[HypersphericalHead, ...], statistics: list[FeatureStatistics], *, shrunk: bool
) -> list[_Start]:
    """The closed form for all heads, of which the first chooses the assignment."""
    first = _fit(heads[0], statistics[0], None, shrunk=shrunk)
    others = zip(heads[1:], statistics[1:], strict=True)
    return [first, *(_fit(*each, first.assignment, shrunk=shrunk) for each in others)]


def _fit(head: HypersphericalHead, statistics: FeatureStatistics, assignment: Tensor | None, *, shrunk: bool) -> _Start:
    """The closed form for one head, with the assignment given or chosen here."""
    prototypes, current = head.bank.prototypes.cpu().double(), head.assignment.cpu()
    layers = layers_of(head.projection)
    if layers.linear is None:
        if assignment is None:
            assignment = solve_assignment(statistics.sums, prototypes, current=current).assignment
        return _Start(assignment, {})
    scatter = statistics.scatter(shrunk=shrunk)
    if assignment is None:
        assignment = match_classes(scatter, prototypes, current)
    targets = prototypes[assignment[scatter.labels]]  # (S, D)
    matrix = regress(scatter, targets, intercept=layers.has_intercept)  # (D, F)
    state = affine_state(
        head.projection,
        matrix,
        targets.mean(dim=0),
        centre=scatter.centre,
        mean=scatter.sample_mean,
        covariance=scatter.sample_covariance,
    )
    return _Start(assignment, state)
