"""Fit a head to the features that reach it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hyperproto.assigner import check_shared_bank
from hyperproto.errors import ArgumentError, HeadNotFoundError, ShapeError
from hyperproto.fitting.closed_form import match_classes, regress
from hyperproto.fitting.statistics import FeatureSample, FeatureStatistics
from hyperproto.functional import solve_assignment
from hyperproto.geometry import normalise
from hyperproto.head import HypersphericalHead, require_heads
from hyperproto.projection import layers_of
from hyperproto.targets import check_target

#: Numbers of the features kept to measure the accuracy of the start by: 128 MiB.
KEPT_NUMBERS = 2**25

#: Samples whose accuracy is measured at a time.
ACCURACY_CHUNK = 4096


@dataclass(frozen=True)
class HeadFit:
    """What `fit_head` reached, measured on the features that it was fitted to.

    Attributes:
        similarity: mean over the labels seen of the cosine between the label's embedded mean feature and its
            prototype, in [-1, 1].
        accuracy: share in [0, 1] of the samples to which the fitted head (the first, where a model has several) gives
            their own label, or that of their largest soft target. Training accuracy; of many samples, that of a
            random draw.
        num_samples: samples seen, on all ranks.
        unseen: labels without a sample, ascending.
    """

    similarity: float
    accuracy: float
    num_samples: int
    unseen: tuple[int, ...]

    def __str__(self) -> str:
        text = (
            f"start from {self.num_samples} samples: training accuracy {100 * self.accuracy:.1f} %, "
            f"similarity {self.similarity:.4f}"
        )
        return f"{text}; {len(self.unseen)} labels not seen" if self.unseen else text


@torch.no_grad()
def fit_head(model: nn.Module, loader: Iterable[Any]) -> HeadFit:
    r"""Choose assignment and projection in closed form from one pass over the data; in place.

    .. math:: \sigma = \arg\max_{\sigma, R} \sum_c \langle R \Sigma^{-1/2} (\mu_c - \bar\mu), w_{\sigma(c)} \rangle,
              \qquad A, a = \arg\min_{A, a} \; \sum_c \mathbb{E}_{x \sim c} \lVert A x + a - w_{\sigma(c)} \rVert^2

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
    - Labels that the loader does not have keep their prototype unless a seen label needs it.
    - Under torch.distributed every rank must call it, each with its share of the data, before fully_shard:
      statistics are summed over the ranks, and all arrive at the same head.

    The projection's weights get the length of fresh ones, whatever the scale of the features. An optimiser that has
    taken steps already still has momentum of the old projection: `optimizer.state.pop(parameter, None)` for the
    parameters of `head.projection` forgets it.

    Args:
        model: a converted model, bare or wrapped, or a head (whose inputs the batches are then).
        loader: batches whose first two items are inputs and labels (B,) int64 (or soft targets (B, C), whose entries
            weigh the sample for each label). The training data, without augmentation or with it.

    Returns:
        What was reached.

    Raises:
        HeadNotFoundError: the model has no hyperspherical head, or does not call it.
        ArgumentError: no samples, features that are not finite, or none that tell labels apart.
        AssignmentError: mean embeddings that are not finite, for a head without a projection.
        BankError: its heads do not share one bank and one assignment.
        LabelError, ShapeError: targets that do not fit. After any error the model is as it was.

    Example:
        >>> head = HypersphericalHead(8, 4, dim=3)
        >>> labels = torch.arange(4).repeat(25)
        >>> features = torch.eye(4, 8)[labels] + 0.01 * torch.randn(100, 8)
        >>> fit_head(head, [(features, labels)]).accuracy
        1.0

    References:
        Schoenemann, A generalized solution of the orthogonal Procrustes problem, 1966; Hastie, Tibshirani, Buja,
        Flexible discriminant analysis by optimal scoring, 1994 (discriminants by regression).
    """
    heads = require_heads(model)
    check_shared_bank(heads)
    statistics = [FeatureStatistics(head.num_classes, head.in_features) for head in heads]
    sample = FeatureSample(max(1, KEPT_NUMBERS // heads[0].in_features), heads[0].in_features)
    num_samples = _collect(model, heads, loader, statistics, sample)
    device = heads[0].assignment.device
    samples = torch.tensor([num_samples], dtype=torch.float64, device="cpu")
    _add_up_ranks([samples, *(tensor for each in statistics for tensor in each.tensors())], device)
    if float(samples) == 0.0:
        raise ArgumentError("the loader gave no samples: a start needs data to be fitted to.")
    starts = [_fit(heads[0], statistics[0], None)]
    starts += [_fit(*each, starts[0].assignment) for each in zip(heads[1:], statistics[1:], strict=True)]
    for head, start in zip(heads, starts, strict=True):
        start.write_into(head)
    correct = _count_correct(heads[0], sample)
    _add_up_ranks([correct], device)
    return HeadFit(
        similarity=_similarity(heads[0], statistics[0]),
        accuracy=float(correct[0] / correct[1]),
        num_samples=int(samples),
        unseen=tuple(torch.nonzero(statistics[0].counts <= 0).flatten().tolist()),
    )


@dataclass(frozen=True)
class _Start:
    """What is to be written into a head: nothing has changed while one of these is made."""

    assignment: Tensor
    weight: Tensor | None = None
    batch_norm: dict[str, Tensor] | None = None

    def write_into(self, head: HypersphericalHead) -> None:
        linear, batch_norm = layers_of(head.projection)
        if linear is not None and self.weight is not None:
            linear.weight.copy_(self.weight)
        if batch_norm is not None and self.batch_norm is not None:
            batch_norm.load_state_dict({**batch_norm.state_dict(), **self.batch_norm})
        head.assign_(self.assignment.to(head.assignment.device))


def _fit(head: HypersphericalHead, statistics: FeatureStatistics, assignment: Tensor | None) -> _Start:
    """The closed form for one head, with the assignment given or chosen here."""
    prototypes, current = head.bank.prototypes.cpu().double(), head.assignment.cpu()
    linear, batch_norm = layers_of(head.projection)
    if linear is None:
        if assignment is None:
            assignment = solve_assignment(statistics.sums, prototypes, current=current).assignment
        return _Start(assignment)
    scatter = statistics.scatter()
    if assignment is None:
        assignment = match_classes(scatter, prototypes, current)
    targets = prototypes[assignment[scatter.labels]]  # (S, D)
    weight = regress(scatter, targets, intercept=batch_norm is not None)  # (D, F)
    # The length of a fresh projection, so that the learning rate and half precision find what they expect. Scaling
    # all of an embedding changes no direction.
    scale = math.sqrt(head.dim / 3.0) / float(weight.norm())
    weight = (scale * weight).to(linear.weight.dtype).double()  # as it is going to be rounded
    if batch_norm is None:
        return _Start(assignment, weight)
    variance = ((weight @ scatter.sample_covariance) * weight).sum(dim=1).clamp_min(0.0)
    mean = weight @ scatter.sample_mean
    # As long as fresh ones, on average.
    length = variance.mean().sqrt()
    state = {
        "running_mean": mean,
        "running_var": variance,
        "weight": (variance + batch_norm.eps).sqrt() / length,
        "bias": (mean - weight @ scatter.centre + scale * targets.mean(dim=0)) / length,
    }
    return _Start(assignment, weight, state)


def _collect(
    model: nn.Module,
    heads: tuple[HypersphericalHead, ...],
    loader: Iterable[Any],
    statistics: list[FeatureStatistics],
    sample: FeatureSample,
) -> int:
    """Feed what the heads project to `statistics`, and of the first one to `sample`; the number of samples."""
    device = heads[0].assignment.device
    model = _unwrapped(model)
    num_samples = 0
    with _captured_features(model, heads) as captured:
        for inputs, target, *_ in loader:
            target = target.cpu()
            check_target(target, len(inputs), heads[0].num_classes)
            captured.clear()
            model(inputs.to(device))
            num_samples += len(target)
            for index, features in captured:
                own = _target_of_rows(target, len(features))
                statistics[index].add(features, own)
                if index == 0:
                    sample.add(features, own if own.dim() == 1 else own.argmax(dim=1))
            if len(target) and len({index for index, _ in captured}) < len(heads):
                raise HeadNotFoundError(
                    f"{type(model).__name__} does not call all of its {len(heads)} heads in eval mode: "
                    "there are no features to fit them to. Pass the model whose forward pass ends in the head."
                )
    return num_samples


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of what replicates or compiles it.

    DistributedDataParallel would wait in each forward pass for ranks that have fewer batches.
    """
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model.get_submodule("_orig_mod")
        else:
            return model


def _target_of_rows(target: Tensor, num_rows: int) -> Tensor:
    """The target (B, ...) of each of B times so many rows: positions of feature maps, or tokens, are samples too."""
    positions, rest = divmod(num_rows, max(len(target), 1))
    if rest:
        raise ShapeError(f"expected features of {len(target)} samples at the head, as many as targets, got {num_rows}.")
    return target.repeat_interleave(positions, dim=0)


@contextmanager
def _captured_features(model: nn.Module, heads: tuple[HypersphericalHead, ...]) -> Iterator[list[tuple[int, Tensor]]]:
    """A list that the model's forward passes fill with features by head, all in eval mode."""
    captured: list[tuple[int, Tensor]] = []

    def keep(index: int, projection: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        # Without a projection it is directions that count.
        rows = normalise(arguments[0]) if isinstance(projection, nn.Identity) else arguments[0]
        captured.append((index, rows.float().cpu()))

    # At the projection, where features are rows (N, in_features) whatever the layout of the head.
    hooks = [head.projection.register_forward_pre_hook(partial(keep, index)) for index, head in enumerate(heads)]
    try:
        # A compiled model would not see the hooks, and a loader draws its seed from the global generator.
        with _eval_mode(model), torch.random.fork_rng(devices=[]), torch.compiler.set_stance("force_eager"):
            yield captured
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _add_up_ranks(tensors: list[Tensor], device: torch.device) -> None:
    """Sum each tensor over the ranks, in place and in one collective."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors]).to(device)
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, torch.split(flat.cpu(), [tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def _similarity(head: HypersphericalHead, statistics: FeatureStatistics) -> float:
    seen = torch.nonzero(statistics.counts > 0).flatten()
    means = statistics.sums[seen] / statistics.counts[seen, None]
    with _eval_mode(head):
        embedded = head.embed(means.float().to(head.assignment.device)).cpu()
    return float((embedded * head.class_prototypes.cpu()[seen]).sum(dim=1).mean())


def _count_correct(head: HypersphericalHead, sample: FeatureSample) -> Tensor:
    """(2,) float64: samples given their own label, and samples."""
    rows, labels = sample.draw()
    with _eval_mode(head):
        nearest = [
            head.topk(head.embed(part.to(head.assignment.device)), k=1)[1][:, 0].cpu()
            for part in torch.split(rows, ACCURACY_CHUNK)
        ]
    correct = torch.cat(nearest) == labels
    return torch.stack([correct.sum(), torch.tensor(len(correct), device="cpu")]).double()
