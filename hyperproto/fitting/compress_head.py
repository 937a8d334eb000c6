"""Give a trained model a head of fewer dimensions, with projection and prototypes fitted to its features."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
from hyperproto.fitting.closed_form import least_squares
from hyperproto.fitting.components import principal_components
from hyperproto.fitting.data import FitOptions, HeldFeatures
from hyperproto.fitting.features import checking
from hyperproto.fitting.hand_over import start_with_free_vectors
from hyperproto.fitting.lbfgs import Samples
from hyperproto.fitting.report import HeadFit
from hyperproto.fitting.unit_fit import Fit, Task, fit_unit_head
from hyperproto.fitting.unit_head import Coordinates, UnitHead
from hyperproto.head import HypersphericalHead
from hyperproto.heads import get_heads, heads_in_use, require_heads
from hyperproto.ranks import ProcessGroup, share_state_


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
    `dim` principal components of a closed form's logits instead, the new head is made of those of the old head.

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
    with checking(model, process_group=process_group):
        name, old = only_head(model, verb="compress_head")
        options = FitOptions.checked(scale, iterations, class_counts, old.num_classes)
        dim = whole_number(dim, "dim", smallest=2, largest=old.num_classes)
    features = HeldFeatures(model, (old,), loader, process_group=process_group)
    matrix, _ = affine(old.projection, old.in_features)
    to_logits = old.class_prototypes.cpu().double() @ matrix  # (C, F)
    prototypes, scatter = old.class_prototypes, features.scatters[0]

    def stand_in(samples: Samples, coordinates: Coordinates) -> UnitHead:
        closed = least_squares(samples, coordinates, class_prototypes=prototypes, intercept=True)
        matrix = coordinates.inverse_spread * closed.matrix.cpu().double()
        return principal_components(prototypes.cpu().double() @ matrix, scatter, dim, coordinates)

    task = class_vector_task(
        features,
        dim,
        present=partial(principal_components, to_logits, scatter, dim),
        stand_in=stand_in,
        asks_present=False,
    )
    fit = fit_unit_head(features, task, options)
    return put_in(model, name, fit, features)


def class_vector_task(
    features: HeldFeatures,
    dim: int,
    *,
    present: Callable[[Coordinates], UnitHead],
    stand_in: Callable[[Samples, Coordinates], UnitHead],
    asks_present: bool,
) -> Task:
    """Projection and class vectors of D dimensions for the features that reach a model's only head."""
    seen = features.scatters[0].labels
    start = partial(start_with_free_vectors, dim=dim, seen=seen)
    return Task(0, dim, present, start, stand_in, asks_present, free_vectors=seen.to(features.device), intercept=True)


def put_in(model: nn.Module, name: str, fit: Fit, features: HeldFeatures) -> HeadFit:
    """Put a head whose bank are the class vectors of a fit in the place of the one of this name."""
    head = get_heads(model)[name].like(PrototypeBank.from_tensor(fit.head.vectors), logit_scale=fit.logit_scale)
    state = fit.head.state_of(head.projection, features.scatters[0], keep_statistics=False)
    head.projection.load_state_dict(state)
    share_state_(head.to(features.device), process_group=features.process_group)
    replace_head(model, name, head)
    return features.report(head, fit.held_out)


def only_head(model: nn.Module, *, verb: str) -> tuple[str, HypersphericalHead]:
    """Name and head of a model whose only head one of class vectors can take the place of.

    Raises:
        HeadNotFoundError: there is none, or the model is wrapped.
        ArgumentError: a bare head, several, or one with another projection than "linear+bn".
    """
    require_heads(model)
    (name, head), *others = heads_in_use(model).items()
    check_unwrapped(model, name, verb=verb)
    if not name:
        raise ArgumentError("a bare head cannot be replaced in place: pass the model that has it.")
    if others:
        names = ", ".join([name, *(other for other, _ in others)])
        raise ArgumentError(f"expected a model with one head, got {1 + len(others)}, at {names}.")
    if layers_of(head.projection).batch_norm is None:
        raise ArgumentError('expected a head with projection="linear+bn": the new one has it, and starts from the old.')
    return name, head
