"""Give a trained model a head of fewer dimensions, with projection and prototypes fitted to its features."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hyperproto.affine import affine, layers_of
from hyperproto.arguments import whole_number
from hyperproto.bank import PrototypeBank
from hyperproto.conversion.locate import check_unwrapped
from hyperproto.conversion.replace import replace_head
from hyperproto.errors import ArgumentError
from hyperproto.fitting.components import principal_components
from hyperproto.fitting.data import FitOptions, HeldFeatures
from hyperproto.fitting.hand_over import start_with_free_vectors
from hyperproto.fitting.report import HeadFit
from hyperproto.fitting.unit_fit import Task, fit_unit_head
from hyperproto.head import HypersphericalHead
from hyperproto.heads import get_heads, require_heads
from hyperproto.ranks import ProcessGroup, check_member


@torch.inference_mode(False)
def compress_head(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    dim: int,
    scale: float | None = None,
    iterations: int = 200,
    class_counts: Tensor | None = None,
    process_group: ProcessGroup | None = None,
) -> HeadFit:
    r"""Give a trained model a head of fewer dimensions, whose prototypes are class vectors fitted to its features.

    $$
    \min_{A, W} \; \frac1C \sum_c \mathbb{E}_{x \sim c} \left[ -\sum_k p_k(x) \log
        \frac{\exp(s \langle z(x), w_k / \lVert w_k \rVert \rangle)}
             {\sum_l \exp(s \langle z(x), w_l / \lVert w_l \rVert \rangle)} \right]
    $$

    After the last epoch of a backbone that trained in more dimensions, such as towards the simplex, since few
    dimensions are a hard target for a backbone, and a small loss at its end; or on the features of a pretrained one.
    The answers p are those of a softmax classifier of rank D with a penalty on lengths, as in `refit_head`; A and W
    start from its two factors. What is said there of the samples held out, of memory, modes and ranks holds here.
    Then W is the new head's bank, label c on prototype c, and never trains again. Where held-out samples speak for the
    `dim` principal components of the old head's logits instead, the new head is made of these.

    The old head is taken out: criteria and assigners bound to it raise, and an optimiser has to be made anew.
    `restore_model` brings back the original classifier as before. To load a checkpoint of the new model, take the bank
    from it: `PrototypeBank.from_tensor(state[...])`, then `convert_model(model, bank=bank)`.

    Args:
        model: a converted model with one head, not wrapped.
        loader: as for `refit_head`.
        dim: D of the new head, from 2 to the number of classes.
        scale: as for `refit_head`.
        iterations: as for `refit_head`.
        class_counts: as for `refit_head`.
        process_group: as for `refit_head`.

    Returns:
        What was reached.

    Raises:
        HeadNotFoundError: the model has no hyperspherical head, does not call it, or is wrapped.
        ArgumentError: several heads, or a bare one, which cannot be replaced in place; another projection than
            "linear+bn"; an option out of range; data as for `refit_head`.
        LabelError, ShapeError: targets that do not fit. After any error the model is as it was (on other ranks, with
            rank 0's buffers).

    Examples:
        >>> import torch
        >>> model = nn.Sequential(HypersphericalHead(8, 4, dim=4, bank="simplex"))
        >>> labels = torch.arange(4).repeat(25)
        >>> features = torch.eye(4, 8)[labels] + 0.01 * torch.randn(100, 8)
        >>> compress_head(model, (features, labels), dim=2).accuracy, model[0].dim
        (1.0, 2)
    """
    heads = require_heads(model)
    (name, old), *others = get_heads(model).items()
    options = FitOptions.checked(scale, iterations, class_counts, old.num_classes)
    dim = whole_number(dim, "dim", smallest=2, largest=old.num_classes)
    check_member(process_group)
    check_unwrapped(model, name, verb="compress_head")
    check_replaceable(old, name, [other for other, _ in others])
    features = HeldFeatures(model, heads, loader, process_group=process_group)
    return fit_class_vectors(model, name, features, dim, options, keep_scale=False)


def fit_class_vectors(
    model: nn.Module, name: str, features: HeldFeatures, dim: int, options: FitOptions, *, keep_scale: bool
) -> HeadFit:
    """Put a head whose bank are class vectors fitted to the features in the place of the model's only one."""
    old, scatter = get_heads(model)[name], features.scatters[0]
    matrix, _ = affine(old.projection, old.in_features)
    to_logits = old.class_prototypes.cpu().double() @ matrix  # (C, F)
    task = Task(
        index=0,
        rank=dim,
        present=partial(principal_components, to_logits, scatter, dim),
        start=partial(start_with_free_vectors, dim=dim, seen=scatter.labels),
        fixed_vectors=False,
        intercept=True,
    )
    fit = fit_unit_head(features, task, options)
    head = old.like(PrototypeBank.from_tensor(fit.head.vectors), logit_scale=None if keep_scale else fit.logit_scale)
    head.projection.load_state_dict(fit.head.state_of(head.projection, scatter, keep_statistics=False))
    replace_head(model, name, head)
    return features.report(head, fit.held_out)


def check_replaceable(head: HypersphericalHead, name: str, others: list[str]) -> None:
    """Raise ArgumentError unless a head of class vectors can take this one's place."""
    if not name:
        raise ArgumentError("a bare head cannot be replaced in place: pass the model that has it.")
    if others:
        raise ArgumentError(f"expected a model with one head, got {1 + len(others)}, at {', '.join([name, *others])}.")
    if layers_of(head.projection).batch_norm is None:
        raise ArgumentError('expected a head with projection="linear+bn": the new one has it, and starts from the old.')
