"""Give a trained model a head of fewer dimensions, with projection and prototypes fitted to its features."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from numbers import Integral
from typing import Any

import torch
from torch import nn

from hyperproto.affine import affine, layers_of
from hyperproto.bank import PrototypeBank
from hyperproto.conversion.locate import check_unwrapped
from hyperproto.conversion.replace import replace_head
from hyperproto.errors import ArgumentError
from hyperproto.fitting.components import principal_components
from hyperproto.fitting.data import HeldFeatures, check_fit_options, cross_entropy_with
from hyperproto.fitting.features import checking
from hyperproto.fitting.lbfgs import class_mean, minimise
from hyperproto.fitting.report import HeadFit
from hyperproto.head import HypersphericalHead
from hyperproto.heads import get_heads, require_heads
from hyperproto.ranks import ProcessGroup, share_first_, share_state_


@torch.inference_mode(False)
def compress_head(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    dim: int,
    scale: float = 16.0,
    iterations: int = 200,
    process_group: ProcessGroup | None = None,
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
        >>> compress_head(model, [(features, labels)], dim=2).accuracy, model[0].dim
        (1.0, 2)
    """
    with checking(model, process_group=process_group):
        heads = require_heads(model)
        check_fit_options(scale, iterations)
        (name, old), *others = get_heads(model).items()
        check_unwrapped(model, name, verb="compress_head")
        _check_compressible(old, name, [other for other, _ in others], dim)
    features = HeldFeatures(model, heads, loader, process_group=process_group)
    [batches] = features.batches
    matrix, _ = affine(old.projection, old.in_features)
    to_logits = old.class_prototypes.cpu().double() @ matrix  # (C, F)
    projection, start = principal_components(to_logits, features.scatters[0], dim)
    projection, vectors = projection.to(old.assignment.device), nn.Parameter(start.to(old.assignment.device))
    share_state_(projection, process_group=process_group)
    share_first_(vectors.detach(), process_group=process_group)
    measure = partial(
        class_mean,
        batches=batches,
        num_classes=old.num_classes,
        device=vectors.device,
        process_group=process_group,
    )
    loss, fitted = cross_entropy_with(projection, vectors, scale), [*projection.parameters(), vectors]
    begun, started = [each.detach().clone() for each in fitted], measure(loss)
    if math.isinf(started):
        raise ArgumentError(
            "the features that reach the head are too large or too small for float32; the model is unchanged. Scale "
            "them, or normalise in front of the head."
        )
    minimise(loss, fitted, batches, num_classes=old.num_classes, iterations=iterations, process_group=process_group)
    if measure(loss) > started:
        with torch.no_grad():
            for each, value in zip(fitted, begun, strict=True):
                each.copy_(value)
    head = old.like(PrototypeBank.from_tensor(vectors), logit_scale=scale)
    head.projection.load_state_dict(projection.state_dict())
    replace_head(model, name, head)
    return features.report(head)


def _check_compressible(head: HypersphericalHead, name: str, others: list[str], dim: int) -> None:
    if not name:
        raise ArgumentError("a bare head cannot be replaced in place: pass the model that has it.")
    if others:
        raise ArgumentError(f"expected a model with one head, got {1 + len(others)}, at {', '.join([name, *others])}.")
    if layers_of(head.projection).batch_norm is None:
        raise ArgumentError('expected a head with projection="linear+bn": the new one has it, and starts from the old.')
    if not (isinstance(dim, Integral) and 2 <= dim <= head.num_classes):
        raise ArgumentError(
            f"expected dim, a whole number (for a quotient use //), from 2 to the number of classes, "
            f"{head.num_classes}, got {dim}."
        )
